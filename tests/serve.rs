//! CONNECT and BIND end to end, on loopback: replies and relaying. UDP ASSOCIATE is in udp.rs, start and end
//! of the server in lifecycle.rs.

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
