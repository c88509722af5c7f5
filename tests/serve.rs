//! CONNECT and BIND end to end, on loopback: what client and target see. UDP ASSOCIATE is in udp.rs, start and end of
//! the server itself in lifecycle.rs.

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
