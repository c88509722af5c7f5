//! Addresses as users write them: a port can be the name of a service.

use std::net::Ipv6Addr;

use crate::net::service_port;
use crate::proto::{self, Addr, split_host_port};

/// Parses a port from 0 to 65535, or the name of a TCP or UDP service.
pub fn parse_port(text: &str, is_udp: bool) -> Result<u16, String> {
    let unknown = |error| if is_word(text) { format!("{text:?} is neither a port nor a known service") } else { error };
    proto::parse_port(text).or_else(|error| service_port(text, is_udp).ok_or_else(|| unknown(error)))
}

fn is_word(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
}

/// Parses `host:port` or `[ipv6]:port`.
pub fn parse_addr(text: &str, is_udp: bool) -> Result<Addr, String> {
    Addr::parse_with(text, None, |port| parse_port(port, is_udp))
}

/// Parses `host`, `host:port` or `[ipv6]:port`. Without brackets, an IPv6 address must not look as if it ended with a
/// port.
pub fn parse_addr_or_host(text: &str, default_port: u16) -> Result<Addr, String> {
    let (host, port) = text.rsplit_once(':').unwrap_or_default();
    let ends_with_port = port.parse::<u16>().is_ok() && host.parse::<Ipv6Addr>().is_ok();
    if split_host_port(text).1.is_none() && ends_with_port {
        return Err(format!("{text} is ambiguous (write [{host}]:{port}, or [{text}] if it has no port)"));
    }
    Addr::parse_with(text, Some(default_port), |port| parse_port(port, false))
}
