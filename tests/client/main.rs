//! The client modes end to end, against scripted proxies and against `s5 serve`. `README.md` lists the files.

mod behaviours;
mod bind;
mod cli;
mod compare;
mod credentials;
mod failures;
mod netcat;
mod prompts;
mod proxies;
mod streams;
#[path = "../support/mod.rs"]
mod support;
mod udp;
mod wire;
