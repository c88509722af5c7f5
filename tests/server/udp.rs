//! UDP ASSOCIATE end to end, on loopback (RFC 1928 section 7): relaying, filtering, names, and the end of an
//! association.

pub mod association;
pub mod bursts;
mod client_port;
mod filter;
mod fragments;
mod lifetime;
mod log;
mod names;
mod nat;
mod ports;
mod relay;
