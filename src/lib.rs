//! s5: a SOCKS5 server and three client modes. This page lists the modules, and the modules that each may import.
//!
//! | module | content | may import |
//! | --- | --- | --- |
//! | [`proto`] | encoding and decoding of the messages of RFC 1928, 1929 and 1961; pure | nothing |
//! | [`reassembly`] | reassembly of UDP fragments; pure | `proto` |
//! | [`name_addrs`] | the addresses of a name that datagrams are sent to; pure | nothing |
//! | [`values`] | times, rates, numbers and lists, as users write them | nothing |
//! | [`policy`] | access control: methods, users, rules; pure | `proto` |
//! | [`counters`] | counts of events by thread, for metrics | nothing |
//! | [`net`] | sockets and timers: event loop, name resolution, connecting, relaying, batches of datagrams | `counters`, `name_addrs` |
//! | [`conn`] | a SOCKS connection that reads and writes whole messages | `net`, `proto` |
//! | [`gssapi`] | RFC 1961: security contexts, both sides | `conn`, `net`, `proto` |
//! | [`client`] | the client handshake, through any number of proxies | `gssapi`, `conn`, `net`, `reassembly`, `name_addrs`, `proto` |
//! | [`server`] | the server: listeners, limits, sessions, shutdown | all of the above |
//! | [`cmd`] | the four modes: options, messages, exit statuses | all of the above |
//!
//! Pure modules do no I/O and read no clock. The library serves the binary, tests and fuzzing; its API is not stable.

#![warn(missing_docs, unreachable_pub)]
// No input from the network, a file or a user may cause a panic.
#![forbid(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unreachable)]
#![forbid(clippy::todo, clippy::unimplemented)]

#[cfg(not(target_os = "linux"))]
compile_error!("s5 runs on Linux only: it relies on epoll and splice");

pub mod client;
pub mod cmd;
pub mod conn;
pub mod counters;
pub mod gssapi;
pub mod name_addrs;
pub mod net;
pub mod policy;
pub mod proto;
pub mod reassembly;
pub mod server;
pub mod values;
