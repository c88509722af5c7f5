//! CONNECT and BIND end to end, on loopback: replies and relaying. udp.rs tests UDP ASSOCIATE, and lifecycle.rs the
//! start and shutdown of the server.

mod bind;
mod bulk;
mod connect;
mod names;
mod relay;
