//! Name resolution on other threads, and IP addresses in any notation.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Instant;

use dns_lookup::{AddrInfoHints, LookupErrorKind, SockType, getaddrinfo};
use nix::libc;
use rustix::pipe::{PipeFlags, pipe_with};

use super::dial::{DialError, DialLimits, with_scope};
use super::outbound::sort_by_preference;
use super::threads::unblock;
use crate::counters::Histogram;

const MAX_ADDRS_PER_NAME: usize = 32;

/// Returns the addresses of `name`, canonical and without duplicates. IP addresses neither wait nor count as lookups.
/// The caller limits the time. A lookup that has begun counts until its end, also if its result is no longer awaited.
///
/// # Errors
/// [`DialError::NameNotFound`], [`DialError::NoInterface`], [`DialError::FamilyUnavailable`],
/// [`DialError::Resolver`] or [`DialError::LocalResources`].
pub async fn lookup(name: &str, port: u16, limits: &dyn DialLimits) -> Result<Vec<SocketAddr>, DialError> {
    if zoned_address(name).is_some() {
        return system_lookup(name, port, libc::AI_NUMERICHOST).map_err(|error| match error {
            DialError::NameNotFound => DialError::NoInterface,
            error => error,
        });
    }
    if let Some(ip) = parse_literal(name) {
        return Ok(vec![canonical(ip, port)]);
    }
    if !is_host_name(name) {
        return Err(DialError::NameNotFound);
    }
    let (name, guard) = (name.to_owned(), limits.start_lookup().await);
    let found = unblock(move || {
        let (_guard, started) = (guard, Instant::now());
        let found = system_lookup(&name, port, 0);
        Histogram::Lookup.observe(started.elapsed());
        found
    });
    found.await.unwrap_or(Err(DialError::LocalResources))
}

fn system_lookup(name: &str, port: u16, flags: i32) -> Result<Vec<SocketAddr>, DialError> {
    let hints = AddrInfoHints { socktype: SockType::Stream.into(), flags, ..AddrInfoHints::default() };
    let found = getaddrinfo(Some(name), None, Some(hints)).map_err(|error| lookup_error(error.kind()))?;
    let mut addrs: Vec<SocketAddr> = Vec::new();
    for info in found.flatten().take(MAX_ADDRS_PER_NAME) {
        let addr = with_scope(canonical(info.sockaddr.ip(), port), info.sockaddr);
        if !addrs.contains(&addr) {
            addrs.push(addr);
        }
    }
    if addrs.is_empty() { Err(DialError::NameNotFound) } else { Ok(sort_by_preference(addrs)) }
}

/// Returns the port of a TCP or UDP service, as getservbyname(3) does, or else that for the other protocol.
pub fn service_port(name: &str, is_udp: bool) -> Option<u16> {
    // getaddrinfo(3) would accept a number, and truncate it.
    if !name.contains(|c: char| c.is_ascii_alphabetic()) {
        return None;
    }
    let types = if is_udp { [SockType::DGram, SockType::Stream] } else { [SockType::Stream, SockType::DGram] };
    types.into_iter().find_map(|socktype| {
        let hints = AddrInfoHints { socktype: socktype.into(), ..AddrInfoHints::default() };
        let found = getaddrinfo(None, Some(name), Some(hints)).ok()?.flatten().next()?;
        Some(found.sockaddr.port())
    })
}

/// Parses an IP address that a client sent as a name, with or without brackets. Accepts the forms of inet_aton(3) too,
/// as getaddrinfo(3) does: `127.1`, `0x7f.0.0.1` or `2130706433`. Ignores the zone of a link-local address.
pub fn parse_literal(text: &str) -> Option<IpAddr> {
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let ip = bare.parse().ok().or_else(|| parse_inet_aton(text));
    ip.or_else(|| zoned_address(text).map(IpAddr::V6))
}

/// Parses a link-local address with a zone, such as `fe80::1%eth0`. Other addresses have no zone.
fn zoned_address(text: &str) -> Option<Ipv6Addr> {
    let (ip, _) = text.split_once('%').filter(|(_, zone)| !zone.is_empty())?;
    ip.parse().ok().filter(Ipv6Addr::is_unicast_link_local)
}

/// Parses the numbers of inet_aton(3), as getaddrinfo(3) does.
fn parse_inet_aton(text: &str) -> Option<IpAddr> {
    // The last part of a name is rarely a number, so most names need no call.
    let is_number = text.rsplit('.').next()?.starts_with(|c: char| c.is_ascii_digit());
    if !is_number || !text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'.') {
        return None;
    }
    let hints = AddrInfoHints { flags: libc::AI_NUMERICHOST, ..AddrInfoHints::default() };
    Some(getaddrinfo(Some(text), None, Some(hints)).ok()?.flatten().next()?.sockaddr.ip())
}

/// Returns the address to which Linux sends the packets, so that rules match it. This is IPv4 instead of IPv4-mapped
/// IPv6, and loopback instead of the unspecified address.
pub fn canonical(ip: IpAddr, port: u16) -> SocketAddr {
    let ip = match ip.to_canonical() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, port)
}

/// Checks the length (253 bytes, 63 per label) and the characters: letters of any script, digits, `-` and `_`.
fn is_host_name(name: &str) -> bool {
    let name = name.strip_suffix('.').unwrap_or(name);
    let is_allowed = |c: char| c.is_alphanumeric() || c == '-' || c == '_';
    name.len() <= 253 && name.split('.').all(|label| (1..=63).contains(&label.len()) && label.chars().all(is_allowed))
}

fn lookup_error(kind: LookupErrorKind) -> DialError {
    match kind {
        // getaddrinfo(3) needs two descriptors at most. Without them, it reports that the name does not exist.
        _ if pipe_with(PipeFlags::CLOEXEC).is_err() => DialError::LocalResources,
        LookupErrorKind::NoName | LookupErrorKind::NoData => DialError::NameNotFound,
        LookupErrorKind::Family => DialError::FamilyUnavailable,
        _ => DialError::Resolver,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_names_may_have_underscores_letters_of_any_script_and_a_final_dot() {
        for name in ["localhost", "LOCALHOST.", "a-b.example", "_srv.example", "127.1", "bücher.example"] {
            assert!(is_host_name(name), "{name}");
        }
    }
}
