//! The client modes end to end, against scripted proxies and against `s5 serve`. Tests of the command line alone are in
//! cli.rs. `client/README.md` lists the files.

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
