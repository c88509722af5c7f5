//! The server, end to end: listening, the handshake, logins, the connection limit, the session log and shutdown.

mod access_log;
mod activation;
mod check;
mod connection_limit;
mod containers;
mod handshake;
mod listen;
mod log_lines;
pub mod notify;
mod passwords;
mod proxy_protocol;
mod restart;
mod sandbox;
mod session_log;
mod shutdown;
mod stalled_log;
mod terminal;
mod units;
