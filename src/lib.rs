//! s5: a SOCKS5 server and three clients over one protocol module. This page is the map.
//!
//! | module | what it is | may import |
//! | --- | --- | --- |
//! | [`proto`] | every octet of RFC 1928, 1929 and 1961; pure | nothing |
//! | [`reassembly`] | the FRAG queue; pure | `proto` |
//! | [`policy`] | access control: methods, users, rules; pure | `proto` |
//! | [`reactor`] | where futures wait for sockets and for the time | nothing |
//! | [`relay`] | the two-way pump | `reactor` |
//! | [`dial`] | names to addresses to one connection | `reactor`, `proto` |
//! | [`conn`] | one connection, one message at a time | `relay`, `reactor`, `proto` |
//! | [`gssapi`] | RFC 1961: establishing a security context, both sides | `conn`, `proto` |
//! | [`client`] | the handshake of a client, through any number of hops | `gssapi`, `conn`, `dial`, `reactor`, `reassembly`, `proto` |
//! | [`server`] | listen, limit, session, drain | all of the above |
//! | [`cmd`] | the four modes, their flags, messages and exit statuses | all of the above |
//!
//! The library exists for the binary, the tests and the fuzz targets. Its interface is not stable.

#![warn(missing_docs, unreachable_pub)]
// Nothing that the network, a file or a user can say may end in a panic.
#![warn(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unreachable)]

pub mod client;
pub mod cmd;
pub mod conn;
pub mod dial;
pub mod gssapi;
pub mod policy;
pub mod proto;
pub mod reactor;
pub mod reassembly;
pub mod relay;
pub mod server;
