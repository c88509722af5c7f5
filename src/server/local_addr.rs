//! Addresses and ports of this host: which of them a peer can reach, and which are free.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use crate::net::unspecified;
use crate::proto::PortRange;

/// Returns the local address, with port 0, at which `peer` can reach the listener of BIND: the one on the route to it. The
/// session's client has connected to `control`: `None` on a Unix socket. An unspecified `peer` is any peer of that
/// family: one on this host if the client is, else the default route leads to it.
pub(super) fn reachable_addr(control: Option<SocketAddr>, peer: SocketAddr) -> io::Result<SocketAddr> {
    let loopback: IpAddr = if peer.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
    let mut control = control.unwrap_or(SocketAddr::new(loopback, 0));
    control.set_port(0);
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
    // Without a route, the peer may still be on the client's side.
    route_source(target).or_else(|error| if is_same_family && !is_client_local { Ok(control) } else { Err(error) })
}

/// Returns the local address, with port 0, from which this host sends to `target`.
fn route_source(mut target: SocketAddr) -> io::Result<SocketAddr> {
    // connect(2) on a UDP socket sends nothing, and selects the source address.
    let probe = UdpSocket::bind((unspecified(target.ip()), 0))?;
    target.set_port(9);
    probe.connect(target)?;
    let mut local = probe.local_addr()?;
    local.set_port(0);
    Ok(local)
}

/// Returns false if `addr` is certainly not an address of this host: bind(2) refuses it with one of three errors.
/// Any other error, such as a lack of ports or descriptors, is inconclusive: returns true.
pub fn is_local(mut addr: SocketAddr) -> bool {
    use rustix::io::Errno;
    addr.set_port(0);
    let refused = UdpSocket::bind(addr).err().and_then(|error| error.raw_os_error()).map(Errno::from_raw_os_error);
    !matches!(refused, Some(Errno::ADDRNOTAVAIL | Errno::INVAL | Errno::AFNOSUPPORT))
}

/// Returns the ports to try in turn: all ports of a range, rotated to a random start, or only 0 (the kernel chooses).
fn candidate_ports(ports: Option<&PortRange>) -> Vec<u16> {
    let Some(PortRange(range)) = ports else { return vec![0] };
    let mut ports: Vec<u16> = range.clone().collect();
    let start = getrandom::u32().ok().and_then(|random| usize::try_from(random).ok()).unwrap_or(0);
    let start = start.checked_rem(ports.len()).unwrap_or(0);
    ports.rotate_left(start);
    ports
}

/// Binds `local` with the first free port of `ports`.
pub(super) fn bind_in_range<T>(
    ports: Option<&PortRange>,
    mut local: SocketAddr,
    bind: impl Fn(SocketAddr) -> io::Result<T>,
) -> io::Result<T> {
    let mut result = Err(io::ErrorKind::AddrInUse.into());
    for port in candidate_ports(ports) {
        local.set_port(port);
        result = bind(local);
        if !result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse) {
            break;
        }
    }
    result
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
}
