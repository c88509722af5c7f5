//! CONNECT and BIND end to end, on loopback (gateway.rs: with two networks): replies and relaying. udp.rs tests UDP
//! ASSOCIATE, and lifecycle.rs the start and shutdown of the server.

mod bind;
mod bulk;
mod connect;
mod gateway;
mod names;
mod outbound;
mod relay;
