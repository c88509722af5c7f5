//! UDP ASSOCIATE end to end, on loopback (RFC 1928 section 7): what passes, what does not, and when it ends.

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
#[path = "udp/life.rs"]
mod life;
#[path = "udp/relay.rs"]
mod relay;
