//! UDP ASSOCIATE end to end, on loopback (RFC 1928 section 7): relaying, filtering, and the end of an association.

mod common;
mod kit;

#[path = "udp/association.rs"]
mod association;
#[path = "udp/bursts.rs"]
mod bursts;
#[path = "udp/filter.rs"]
mod filter;
#[path = "udp/fragments.rs"]
mod fragments;
#[path = "udp/lifetime.rs"]
mod lifetime;
#[path = "udp/relay.rs"]
mod relay;
