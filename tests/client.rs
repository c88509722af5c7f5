//! The clients end to end, against a proxy that does as a script says and against our own server. Their command line
//! alone, and the server's, are in cli.rs.

#[path = "common/behaviours.rs"]
mod behaviour_table;
mod common;
#[path = "common/scripted.rs"]
mod scripted;

#[path = "client/behaviours.rs"]
mod behaviours;
#[path = "client/bind.rs"]
mod bind;
#[path = "client/compare.rs"]
mod compare;
#[path = "client/credentials.rs"]
mod credentials;
#[path = "client/failures.rs"]
mod failures;
#[path = "client/prompts.rs"]
mod prompts;
#[path = "client/proxies.rs"]
mod proxies;
#[path = "client/streams.rs"]
mod streams;
#[path = "client/udp.rs"]
mod udp;
#[path = "client/wire.rs"]
mod wire;
