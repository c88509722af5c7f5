//! CONNECT and BIND end to end, on loopback: replies and relaying. udp.rs tests UDP ASSOCIATE, and lifecycle.rs the
//! start and shutdown of the server.

mod common;
mod kit;

#[path = "serve/bind.rs"]
mod bind;
#[path = "serve/bulk.rs"]
mod bulk;
#[path = "serve/connect.rs"]
mod connect;
#[path = "serve/names.rs"]
mod names;
#[path = "serve/relay.rs"]
mod relay;
