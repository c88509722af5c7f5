//! The clients end to end, against a proxy that does as a script says and against our own server. Their command line
//! alone, and the server's, are in cli.rs.

mod common;
#[path = "common/scripted.rs"]
mod scripted;

#[path = "client/bind.rs"]
mod bind;
#[path = "client/failures.rs"]
mod failures;
#[path = "client/proxies.rs"]
mod proxies;
#[path = "client/streams.rs"]
mod streams;
#[path = "client/udp.rs"]
mod udp;
#[path = "client/wire.rs"]
mod wire;
