//! Name resolution on a thread pool, and TCP connections with Happy Eyeballs (RFC 8305).
//!
//! This module does not depend on SOCKS. Callers map a [`DialError`] to a REP or an exit status.

use std::collections::VecDeque;
use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use dns_lookup::{AddrInfoHints, LookupErrorKind, SockType, getaddrinfo};
use futures_lite::FutureExt as _;
use smol::lock::Semaphore;
use socket2::Socket;

use crate::proto::{Addr, Host, HostName};
use crate::reactor::{ConnectError, Io, sleep_until};

/// Time after which [`dial`] tries the next address: the Connection Attempt Delay of RFC 8305 section 5.
pub const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// Maximum concurrent calls of getaddrinfo(3). Each occupies one of the 500 threads of the pool.
const MAX_LOOKUPS: usize = 256;
const MAX_ADDRS_PER_NAME: usize = 32;

/// Cause of a failed connection, from the least to the most specific. Of several causes, [`dial`] returns the greatest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DialError {
    /// Out of descriptors, ports or memory on this machine.
    LocalResources,
    /// The requested local address or port is not available.
    LocalAddr,
    /// The resolver did not answer, or reported a temporary failure.
    Resolver,
    /// This machine has no address of the target's family.
    FamilyUnavailable,
    /// No route to the network of the target.
    NetworkUnreachable,
    /// No answer within the time limit.
    TimedOut,
    /// The name has no addresses, or is not a valid host name.
    NameNotFound,
    /// A router reported it (ICMP), or ARP or neighbour discovery had no answer.
    HostUnreachable,
    /// The packet filter of this machine denied it.
    Denied,
    /// The host refused the connection.
    Refused,
}

impl DialError {
    /// Classifies an error of connect(2) to `addr`.
    pub fn from_connect(error: &io::Error, addr: SocketAddr) -> Self {
        use rustix::io::Errno;
        match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::CONNREFUSED | Errno::CONNRESET) => Self::Refused,
            Some(Errno::ACCESS | Errno::PERM) => Self::Denied,
            Some(Errno::HOSTUNREACH | Errno::HOSTDOWN) => Self::HostUnreachable,
            Some(Errno::NETUNREACH | Errno::NETDOWN) => Self::NetworkUnreachable,
            Some(Errno::TIMEDOUT) => Self::TimedOut,
            Some(Errno::AFNOSUPPORT) => Self::FamilyUnavailable,
            // connect(2) fails with this for IPv6 if no interface has an IPv6 address.
            Some(Errno::ADDRNOTAVAIL) if addr.is_ipv6() => Self::FamilyUnavailable,
            _ => Self::LocalResources,
        }
    }

    fn from_lookup(kind: LookupErrorKind) -> Self {
        match kind {
            LookupErrorKind::NoName | LookupErrorKind::NoData => Self::NameNotFound,
            LookupErrorKind::Family => Self::FamilyUnavailable,
            _ => Self::Resolver,
        }
    }
}

impl fmt::Display for DialError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LocalResources => "out of descriptors, ports or memory on this machine",
            Self::LocalAddr => "source address or port not available on this machine",
            Self::Resolver => "temporary failure in name resolution",
            Self::FamilyUnavailable => "no address of a usable family",
            Self::NetworkUnreachable => "network unreachable",
            Self::TimedOut => "timed out",
            Self::NameNotFound => "name not found",
            Self::HostUnreachable => "host unreachable",
            Self::Denied => "denied by the packet filter of this machine",
            Self::Refused => "connection refused",
        })
    }
}

impl std::error::Error for DialError {}

/// Local address and address family of new connections. Targets of other families are not tried.
#[derive(Clone, Copy, Debug, Default)]
pub struct LocalAddr {
    /// `None`: chosen by the kernel.
    pub ip: Option<IpAddr>,
    /// 0: chosen by the kernel.
    pub port: u16,
    /// `Some(true)`: IPv4 only. `Some(false)`: IPv6 only. `None`: both.
    pub is_ipv4: Option<bool>,
}

impl LocalAddr {
    /// Returns true if the address family of `to` is allowed.
    pub fn can_reach(&self, to: IpAddr) -> bool {
        let family = self.ip.map(|ip| ip.is_ipv4()).into_iter().chain(self.is_ipv4);
        family.into_iter().all(|is_ipv4| is_ipv4 == to.is_ipv4())
    }

    /// Returns the address to bind(2) before connecting to `to`. `None` if the kernel chooses both address and port.
    pub fn bind_addr(&self, to: SocketAddr) -> Option<SocketAddr> {
        let is_any = self.ip.is_none() && self.port == 0;
        (!is_any).then(|| SocketAddr::new(self.ip.unwrap_or(unspecified(to.ip())), self.port))
    }
}

/// The system's resolver, with a limit of concurrent look-ups. Clones share the limit.
#[derive(Clone, Debug)]
pub struct Resolver {
    permits: Arc<Semaphore>,
}

impl Default for Resolver {
    fn default() -> Self {
        Self { permits: Arc::new(Semaphore::new(MAX_LOOKUPS)) }
    }
}

impl Resolver {
    /// Returns the addresses of `addr`, canonical and without duplicates. IP addresses are not looked up. The caller
    /// limits the time.
    ///
    /// # Errors
    /// [`DialError::NameNotFound`], [`DialError::FamilyUnavailable`] or [`DialError::Resolver`].
    pub async fn lookup(&self, addr: &Addr) -> Result<Vec<SocketAddr>, DialError> {
        let name = match &addr.host {
            Host::Ip(ip) => return Ok(vec![canonical(*ip, addr.port)]),
            Host::Name(name) => name,
        };
        if let Some(ip) = parse_literal(name) {
            return Ok(vec![canonical(ip, addr.port)]);
        }
        let name = name.as_str();
        if !is_host_name(name) {
            return Err(DialError::NameNotFound);
        }
        let (name, port) = (name.to_owned(), addr.port);
        let permit = self.permits.acquire_arc().await;
        smol::unblock(move || {
            let _permit = permit;
            let hints = AddrInfoHints { socktype: SockType::Stream.into(), ..AddrInfoHints::default() };
            let found = getaddrinfo(Some(&name), None, Some(hints)).map_err(|e| DialError::from_lookup(e.kind()))?;
            let mut addrs: Vec<SocketAddr> = Vec::new();
            for info in found.flatten().take(MAX_ADDRS_PER_NAME) {
                let addr = with_scope(canonical(info.sockaddr.ip(), port), info.sockaddr);
                if !addrs.contains(&addr) {
                    addrs.push(addr);
                }
            }
            if addrs.is_empty() { Err(DialError::NameNotFound) } else { Ok(addrs) }
        })
        .await
    }
}

/// Parses an IP address that a client sent as a name: with or without brackets, or in a form of inet_aton(3), which
/// getaddrinfo(3) accepts too, such as `127.1`, `0x7f.0.0.1` or `2130706433`.
pub fn parse_literal(name: &HostName) -> Option<IpAddr> {
    let text = name.as_str();
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    bare.parse().ok().or_else(|| parse_inet_aton(text).map(IpAddr::V4))
}

/// Parses one to four numbers separated by dots: decimal, octal (`0…`) or hexadecimal (`0x…`). The last number fills
/// the remaining bytes.
fn parse_inet_aton(text: &str) -> Option<Ipv4Addr> {
    let part = |part: &str| {
        let (digits, radix) = match part.strip_prefix("0x").or_else(|| part.strip_prefix("0X")) {
            Some(digits) => (digits, 16),
            None if part.len() > 1 && part.starts_with('0') => (part, 8),
            None => (part, 10),
        };
        // from_str_radix accepts a sign.
        let value = u32::from_str_radix(digits, radix).ok();
        value.filter(|_| digits.starts_with(|c: char| c.is_ascii_hexdigit()))
    };
    let parts: Vec<u32> = text.split('.').map(part).collect::<Option<_>>()?;
    let (last, before) = parts.split_last().filter(|(_, before)| before.len() <= 3)?;
    let mut address = u64::from(*last);
    for (index, part) in (0..).zip(before) {
        if *part > 255 {
            return None;
        }
        address |= u64::from(*part) << (24 - 8 * index);
    }
    let fits = u64::from(*last) < 1 << (32 - 8 * before.len());
    u32::try_from(address).ok().filter(|_| fits).map(Ipv4Addr::from)
}

/// Returns the address to which Linux sends the packets, so that rules match it: IPv4 instead of IPv4-mapped IPv6, and
/// loopback instead of the unspecified address.
pub fn canonical(ip: IpAddr, port: u16) -> SocketAddr {
    let ip = match ip.to_canonical() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, port)
}

/// Returns the unspecified address of the family of `ip`.
pub fn unspecified(ip: IpAddr) -> IpAddr {
    if ip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
}

/// Copies the scope (interface) of a link-local address. connect(2) requires it.
fn with_scope(mut addr: SocketAddr, from: SocketAddr) -> SocketAddr {
    if let (SocketAddr::V6(addr), SocketAddr::V6(from)) = (&mut addr, from) {
        addr.set_scope_id(from.scope_id());
    }
    addr
}

/// Returns true if each label has 1 to 63 bytes: letters of any script, digits, `-` and `_`. A final dot is allowed.
fn is_host_name(name: &str) -> bool {
    let name = name.strip_suffix('.').unwrap_or(name);
    let is_allowed = |c: char| c.is_alphanumeric() || c == '-' || c == '_';
    name.len() <= 253 && name.split('.').all(|label| (1..=63).contains(&label.len()) && label.chars().all(is_allowed))
}

/// Connects to the first of `addrs` that accepts (RFC 8305). Address families alternate. The next attempt starts after
/// [`ATTEMPT_DELAY`], or at once if one fails. Sets the options of [`set_tcp_options`].
///
/// # Errors
/// The most specific error of all attempts. Attempts that are still running at `deadline` count as timed out.
pub async fn dial(addrs: Vec<SocketAddr>, local: LocalAddr, deadline: Instant) -> Result<Io<Socket>, DialError> {
    let mut queue = interleave(addrs.into_iter().filter(|addr| local.can_reach(addr.ip())).collect());
    let mut attempts: Vec<Attempt> = Vec::new();
    let mut most_specific = None;
    loop {
        match queue.pop_front() {
            Some(addr) => attempts.push(Box::pin(attempt(addr, local))),
            None if attempts.is_empty() => return Err(most_specific.unwrap_or(DialError::FamilyUnavailable)),
            None => {}
        }
        let pause = if queue.is_empty() { deadline } else { deadline.min(Instant::now() + ATTEMPT_DELAY) };
        let first = async { Some(first_done(&mut attempts).await) };
        let timeout = async {
            sleep_until(pause).await;
            None
        };
        match first.or(timeout).await {
            Some(Ok(stream)) => return Ok(stream),
            Some(Err(error)) => most_specific = most_specific.max(Some(error)),
            None if Instant::now() >= deadline => {
                return Err(most_specific.max(Some(DialError::TimedOut)).unwrap_or(DialError::TimedOut));
            }
            None => {}
        }
    }
}

type Attempt = Pin<Box<dyn Future<Output = Result<Io<Socket>, DialError>>>>;

async fn attempt(addr: SocketAddr, local: LocalAddr) -> Result<Io<Socket>, DialError> {
    let stream = Io::connect(addr, local.bind_addr(addr)).await.map_err(|error| match error {
        ConnectError::LocalAddr(_) => DialError::LocalAddr,
        ConnectError::Io(error) => DialError::from_connect(&error, addr),
    })?;
    set_tcp_options(&stream);
    Ok(stream)
}

/// Waits until an attempt has finished, and removes it.
async fn first_done(attempts: &mut Vec<Attempt>) -> Result<Io<Socket>, DialError> {
    poll_fn(|cx| {
        for i in 0..attempts.len() {
            let polled = attempts.get_mut(i).map(|attempt| attempt.as_mut().poll(cx));
            if let Some(Poll::Ready(done)) = polled {
                drop(attempts.swap_remove(i));
                return Poll::Ready(done);
            }
        }
        Poll::Pending
    })
    .await
}

/// Alternates the address families, and keeps the resolver's order within each (RFC 8305 section 4).
fn interleave(addrs: Vec<SocketAddr>) -> VecDeque<SocketAddr> {
    let first_is_v6 = addrs.first().is_some_and(SocketAddr::is_ipv6);
    let (first, second): (Vec<_>, Vec<_>) = addrs.into_iter().partition(|addr| addr.is_ipv6() == first_is_v6);
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    let mut mixed = VecDeque::new();
    loop {
        let pair = (first.next(), second.next());
        if pair == (None, None) {
            return mixed;
        }
        mixed.extend(pair.0);
        mixed.extend(pair.1);
    }
}

/// Sets the options of a connection, or of a listener, whose connections inherit them. Failures are only logged.
///
/// - TCP_NODELAY: small messages are not delayed.
/// - Keepalive: an unreachable peer is detected by 6 probes, 15 s apart, after 60 s of silence.
/// - SO_OOBINLINE: urgent data is not lost.
pub fn set_tcp_options(socket: &impl AsFd) {
    let socket = socket2::SockRef::from(socket);
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(Duration::from_secs(60))
        .with_interval(Duration::from_secs(15))
        .with_retries(6);
    let result = socket
        .set_tcp_nodelay(true)
        .and_then(|()| socket.set_tcp_keepalive(&keepalive))
        .and_then(|()| socket.set_out_of_band_inline(true));
    if let Err(error) = result {
        log::debug!("cannot set socket options: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_families_alternate_starting_with_the_resolvers_first_address() {
        let addrs = ["[::1]:1", "[::2]:1", "[::3]:1", "10.0.0.1:1"].map(|a| a.parse().expect("an address"));
        let order: Vec<String> = interleave(addrs.to_vec()).iter().map(ToString::to_string).collect();
        assert_eq!(order, ["[::1]:1", "10.0.0.1:1", "[::2]:1", "[::3]:1"]);
    }

    #[test]
    fn connect_errno_maps_to_dial_error() {
        let v4 = "127.0.0.1:1".parse().expect("an address");
        let v6 = "[::1]:1".parse().expect("an address");
        let table = [
            (libc_errno::ECONNREFUSED, v4, DialError::Refused),
            (libc_errno::ENETUNREACH, v4, DialError::NetworkUnreachable),
            (libc_errno::EHOSTUNREACH, v4, DialError::HostUnreachable),
            (libc_errno::ETIMEDOUT, v4, DialError::TimedOut),
            (libc_errno::EAFNOSUPPORT, v6, DialError::FamilyUnavailable),
            (libc_errno::EADDRNOTAVAIL, v6, DialError::FamilyUnavailable),
            (libc_errno::EADDRNOTAVAIL, v4, DialError::LocalResources),
            (libc_errno::EMFILE, v4, DialError::LocalResources),
            (libc_errno::EPERM, v4, DialError::Denied),
        ];
        for (errno, addr, error) in table {
            assert_eq!(DialError::from_connect(&io::Error::from_raw_os_error(errno), addr), error, "errno {errno}");
        }
    }

    mod libc_errno {
        use rustix::io::Errno;
        pub(super) const ECONNREFUSED: i32 = Errno::CONNREFUSED.raw_os_error();
        pub(super) const ENETUNREACH: i32 = Errno::NETUNREACH.raw_os_error();
        pub(super) const EHOSTUNREACH: i32 = Errno::HOSTUNREACH.raw_os_error();
        pub(super) const ETIMEDOUT: i32 = Errno::TIMEDOUT.raw_os_error();
        pub(super) const EAFNOSUPPORT: i32 = Errno::AFNOSUPPORT.raw_os_error();
        pub(super) const EADDRNOTAVAIL: i32 = Errno::ADDRNOTAVAIL.raw_os_error();
        pub(super) const EMFILE: i32 = Errno::MFILE.raw_os_error();
        pub(super) const EPERM: i32 = Errno::PERM.raw_os_error();
    }

    #[test]
    fn dial_errors_are_ordered_by_specificity() {
        assert!(DialError::Refused > DialError::HostUnreachable);
        assert!(DialError::HostUnreachable > DialError::TimedOut);
        assert!(DialError::TimedOut > DialError::NetworkUnreachable);
        assert!(DialError::NetworkUnreachable > DialError::FamilyUnavailable);
        assert!(DialError::FamilyUnavailable > DialError::LocalResources);
    }

    #[test]
    fn parse_literal_accepts_every_form_of_inet_aton() {
        let table = [
            ("127.0.0.1", Some("127.0.0.1")),
            ("[::1]", Some("::1")),
            ("127.1", Some("127.0.0.1")),
            ("2130706433", Some("127.0.0.1")),
            ("0x7f.1", Some("127.0.0.1")),
            ("0177.0.0.1", Some("127.0.0.1")),
            ("0xA9FEA9FE", Some("169.254.169.254")),
            ("10.258", Some("10.0.1.2")),
            ("0", Some("0.0.0.0")),
            ("4294967296", None),
            ("1.2.3.256", None),
            ("256.1", None),
            ("1.2.3.4.5", None),
            ("08", None),
            ("+1", None),
            ("1.", None),
            ("a.1", None),
            ("face", None),
        ];
        for (text, ip) in table {
            let name = HostName::new(text.as_bytes()).expect("a name");
            assert_eq!(parse_literal(&name).map(|ip| ip.to_string()).as_deref(), ip, "{text}");
        }
    }

    #[test]
    fn only_valid_host_names_are_looked_up() {
        for name in ["localhost", "LOCALHOST.", "a-b.example", "_srv.example", "127.1", "bücher.example"] {
            assert!(is_host_name(name), "{name}");
        }
        let long = format!("{}.example", "a".repeat(64));
        for name in ["", ".", "a..b", ".a", "a b", "a/b", "a:b", "a%b", "$a", &long] {
            assert!(!is_host_name(name), "{name}");
        }
    }
}
