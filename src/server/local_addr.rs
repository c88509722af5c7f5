//! Addresses and ports of this host: which of them a peer can reach, and which are free.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::ops::RangeInclusive;

use rustix::net::sockopt::ipv6_mtu;

use crate::net::{bind_outbound, unspecified, yield_now};
use crate::proto::PortRange;

/// Maximum number of ports that are tried for one socket. If 1 % of a large range is free, one is almost always found.
const MAX_PORTS_TRIED: u64 = 1024;
/// Ports tried before other tasks run. One try takes about 1 µs.
const PORTS_TRIED_PER_TURN: usize = 64;
const LOOPBACK_MTU: u32 = 65_536;

/// Returns the local address, with port 0, at which `peer` can reach the listener of BIND: the one on the route to it.
/// The session's client has connected to `control`: `None` on a Unix socket. An unspecified `peer` is any peer of that
/// family: one on this host if the client is, else the default route leads to it. If this host lacks that family, the
/// family of the client is used.
pub(super) fn reachable_addr(control: Option<SocketAddr>, peer: SocketAddr) -> io::Result<SocketAddr> {
    let (v4, v6): (IpAddr, IpAddr) = (Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into());
    let (loopback, other) = if peer.is_ipv4() { (v4, v6) } else { (v6, v4) };
    let is_missing = |ip| peer.ip().is_unspecified() && route_source(SocketAddr::new(ip, 0)).is_err();
    let unix_control = || SocketAddr::new(if is_missing(loopback) { other } else { loopback }, 0);
    let control = with_port(control.unwrap_or_else(unix_control), 0);
    let is_same_family = control.is_ipv4() == peer.is_ipv4();
    let is_client_local = control.ip().is_loopback();
    let mut target = peer;
    match peer.ip() {
        ip if ip.is_loopback() || ip.is_unspecified() && is_client_local => target.set_ip(loopback),
        // A documentation address (RFC 5737, RFC 3849) stands for any peer: it selects the default route.
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => target.set_ip(Ipv4Addr::new(192, 0, 2, 1).into()),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => target.set_ip(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into()),
        _ => {}
    }
    if is_same_family && is_client_local && target.ip() == loopback {
        return Ok(control);
    }
    // Without a route, the peer may still be on the client's side. Any peer may have the family of the client.
    let is_usable = is_same_family && !is_client_local || peer.ip().is_unspecified();
    route_source(target).or_else(|error| if is_usable { Ok(control) } else { Err(error) })
}

/// Returns the local address, with port 0, from which this host sends to `target`.
pub(super) fn route_source(target: SocketAddr) -> io::Result<SocketAddr> {
    // connect(2) on a UDP socket sends nothing, and selects the source address.
    let probe = bind_outbound(SocketAddr::new(unspecified(target.ip()), 0))?;
    probe.connect(with_port(target, 9))?;
    Ok(with_port(probe.local_addr()?, 0))
}

/// Returns the address with another port. Its zone is kept.
pub(super) fn with_port(mut addr: SocketAddr, port: u16) -> SocketAddr {
    addr.set_port(port);
    addr
}

/// Returns false if `addr` is certainly not an address of this host: bind(2) refuses it with one of three errors.
/// Any other error, such as a lack of ports or descriptors, is inconclusive: returns true.
pub fn is_local(addr: SocketAddr) -> bool {
    use rustix::io::Errno;
    if is_delivered_locally(addr) {
        return true;
    }
    let refused = UdpSocket::bind(with_port(addr, 0)).err().and_then(|error| error.raw_os_error());
    !matches!(refused.map(Errno::from_raw_os_error), Some(Errno::ADDRNOTAVAIL | Errno::INVAL | Errno::AFNOSUPPORT))
}

/// Returns true if a local route of IPv6 leads to `addr`, for example to all addresses of a prefix (AnyIP), or only for
/// packets with a mark: bind(2) refuses such addresses. The path then has the MTU of the loopback device, which no other
/// device has. IPv4 does not answer at addresses that bind(2) refuses.
fn is_delivered_locally(addr: SocketAddr) -> bool {
    let probe = bind_outbound((Ipv6Addr::UNSPECIFIED, 0).into());
    let mtu = probe.and_then(|probe| probe.connect(with_port(addr, 9)).and(ipv6_mtu(&probe).map_err(io::Error::from)));
    addr.is_ipv6() && mtu.is_ok_and(|mtu| mtu >= LOOPBACK_MTU)
}

/// Returns ports of the range to try in turn, from a random start and spread over the range.
fn candidate_ports(range: &RangeInclusive<u16>) -> impl Iterator<Item = u16> + use<> {
    // A prime that is larger than any range, so that no port is returned twice.
    const STEP: u64 = 2_654_435_761;
    let (first, start) = (u64::from(*range.start()), u64::from(getrandom::u32().unwrap_or_default()));
    let count = u64::from(range.end().saturating_sub(*range.start())) + 1;
    (0..count.min(MAX_PORTS_TRIED)).filter_map(move |n| u16::try_from(first + (start + n * STEP) % count).ok())
}

/// Binds `local` with the first free port of those tried in `ports`, or with any free port. `option` sets the ports.
pub(super) async fn bind_in_range<T>(
    ports: Option<&PortRange>,
    option: &str,
    local: SocketAddr,
    bind: impl Fn(SocketAddr) -> io::Result<T>,
) -> io::Result<T> {
    let Some(PortRange(range)) = ports else { return bind(local) };
    let mut tried = 0;
    for port in candidate_ports(range) {
        if tried > 0 && tried % PORTS_TRIED_PER_TURN == 0 {
            yield_now().await;
        }
        tried += 1;
        match bind(with_port(local, port)) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            result => return result,
        }
    }
    let (low, high) = (range.start(), range.end());
    Err(io::Error::other(format!("no free port in {low}-{high}: {tried} tried (choose more ports with {option})")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reachable_addr_is_loopback_if_client_and_peer_are_on_this_host() {
        let control = |text: &str| Some(text.parse().expect("an address"));
        let reachable = |control, peer: &str| {
            let peer = SocketAddr::new(peer.parse().expect("an address"), 0);
            reachable_addr(control, peer).map(|addr| addr.ip().to_string()).ok()
        };
        assert_eq!(reachable(control("127.0.0.2:1080"), "127.0.0.1").as_deref(), Some("127.0.0.2"));
        assert_eq!(reachable(control("127.0.0.2:1080"), "0.0.0.0").as_deref(), Some("127.0.0.2"));
        assert_eq!(reachable(control("[::1]:1080"), "0.0.0.0").as_deref(), Some("127.0.0.1"));
        assert_eq!(reachable(None, "0.0.0.0").as_deref(), Some("127.0.0.1"));
        assert_eq!(reachable(None, "::").as_deref(), Some("::1"));
        assert_eq!(reachable(control("192.0.2.7:1080"), "127.0.0.1").as_deref(), Some("127.0.0.1"));
    }

    #[test]
    fn candidate_ports_are_all_ports_of_a_small_range_and_a_limited_number_of_a_large_one() {
        for (range, count) in [(5000..=5000, 1), (5000..=5002, 3), (1..=1024, 1024), (1..=u16::MAX, 1024)] {
            let mut ports: Vec<u16> = candidate_ports(&range).collect();
            ports.sort_unstable();
            ports.dedup();
            assert!(ports.len() == count && ports.iter().all(|port| range.contains(port)), "{range:?}: {ports:?}");
        }
    }
}
