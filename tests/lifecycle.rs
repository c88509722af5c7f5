//! The server itself, end to end: where it listens, how many it serves, who may log in, what it logs, how it ends.

mod common;
mod kit;

#[path = "lifecycle/end.rs"]
mod end;
#[path = "lifecycle/handshake.rs"]
mod handshake;
#[path = "lifecycle/limits.rs"]
mod limits;
#[path = "lifecycle/listen.rs"]
mod listen;
#[path = "lifecycle/log.rs"]
mod log;
#[path = "lifecycle/users.rs"]
mod users;
