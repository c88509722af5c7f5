//! The server, end to end: listening, the handshake, logins, the connection limit, the session log and shutdown.

mod common;
mod kit;

#[path = "lifecycle/connection_limit.rs"]
mod connection_limit;
#[path = "lifecycle/handshake.rs"]
mod handshake;
#[path = "lifecycle/listen.rs"]
mod listen;
#[path = "lifecycle/passwords.rs"]
mod passwords;
#[path = "lifecycle/session_log.rs"]
mod session_log;
#[path = "lifecycle/shutdown.rs"]
mod shutdown;
