//! TCP connections with Happy Eyeballs (RFC 8305), and connections to Unix sockets.

use std::collections::VecDeque;
use std::fmt;
use std::future::{Future, poll_fn, ready};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::pin::Pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use nix::sys::socket::sockopt::{GetStruct, IpBindAddressNoPort, SetStruct};
use nix::sys::socket::{GetSockOpt as _, SetSockOpt as _, setsockopt};
use nix::{getsockopt_impl, libc, setsockopt_impl};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with, sockopt};
use socket2::{SockRef, Socket, TcpKeepalive};
use thiserror::Error;

use super::outbound::{interface, set_outbound_options, source_hint};
use super::reactor::Interest;
use super::socket::Io;
use super::timer::{sleep, timeout_at};
use crate::counters::ConnectTimer;
use crate::name_addrs::alternate_families;

/// Time after which [`dial`] tries the next address: the Connection Attempt Delay of RFC 8305 section 5.
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// Attempts of one connection that run at the same time. Each but the last few has a second.
const MAX_ATTEMPTS: usize = 4;
/// Time without a packet after which a peer that has ended its stream is probed.
pub const SHORT_KEEPALIVE_TIME: Duration = Duration::from_secs(5);
/// Pause before connecting again to a Unix socket whose backlog is full.
const BACKLOG_RETRY_DELAY: Duration = Duration::from_millis(10);

/// Cause of a failed connection, from the least to the most specific. Of several causes, [`dial`] returns the greatest.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the texts describe the others")]
pub enum DialError {
    #[error("out of descriptors, ports or memory on this machine")]
    LocalResources,
    #[error("source address {0}: not an address of this machine, or no free port{hint}", hint = source_hint())]
    LocalAddr(IpAddr),
    #[error("--outbound-interface {}: no such device", interface())]
    OutboundInterface,
    /// The resolver did not answer, or reported a temporary failure.
    #[error("temporary failure in name resolution")]
    Resolver,
    /// No address of the target has a family that this machine and [`LocalAddr`] support.
    #[error("no address of a usable family")]
    FamilyUnavailable,
    #[error("a link-local address requires a zone, as in fe80::1%eth0")]
    ZoneRequired,
    #[error("no such interface on this machine")]
    NoInterface,
    #[error("network unreachable")]
    NetworkUnreachable,
    #[error("timed out")]
    TimedOut,
    /// The name has no addresses, or is not a valid host name.
    #[error("name not found")]
    NameNotFound,
    /// A router reported it (ICMP), or ARP or neighbour discovery had no answer.
    #[error("host unreachable")]
    HostUnreachable,
    #[error("denied by the packet filter of this machine")]
    Denied,
    #[error("connection refused")]
    Refused,
}

impl DialError {
    /// Classifies an error of connect(2) to `addr`.
    pub fn from_connect(error: &io::Error, addr: SocketAddr) -> Self {
        match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::CONNREFUSED | Errno::CONNRESET) => Self::Refused,
            Some(Errno::ACCESS | Errno::PERM) => Self::Denied,
            Some(Errno::HOSTUNREACH | Errno::HOSTDOWN) => Self::HostUnreachable,
            Some(Errno::NETUNREACH | Errno::NETDOWN) => Self::NetworkUnreachable,
            Some(Errno::TIMEDOUT) => Self::TimedOut,
            Some(Errno::AFNOSUPPORT) => Self::FamilyUnavailable,
            Some(Errno::INVAL) if requires_zone(addr) => Self::ZoneRequired,
            // connect(2) fails with this for IPv6 if no interface has an IPv6 address.
            Some(Errno::ADDRNOTAVAIL) if addr.is_ipv6() => Self::FamilyUnavailable,
            // Only the error of set_outbound_options for the interface has no number.
            None => Self::OutboundInterface,
            _ => Self::LocalResources,
        }
    }
}

/// Local addresses of connections and datagrams. Targets of other address families are not tried.
#[derive(Clone, Copy, Debug)]
pub struct LocalAddr {
    /// At most one of each family; without one, the family is not used. Unspecified: chosen by the kernel.
    pub ips: [Option<IpAddr>; 2],
    /// 0: chosen by the kernel.
    pub port: u16,
}

impl Default for LocalAddr {
    fn default() -> Self {
        Self { ips: [Some(Ipv4Addr::UNSPECIFIED.into()), Some(Ipv6Addr::UNSPECIFIED.into())], port: 0 }
    }
}

impl LocalAddr {
    /// Returns the address for sockets to `to`. `None`: its family is not allowed.
    pub fn ip_to(&self, to: IpAddr) -> Option<IpAddr> {
        self.ips.into_iter().flatten().find(|ip| ip.is_ipv4() == to.is_ipv4())
    }

    /// Returns true if the address family of `to` is allowed.
    pub fn can_reach(&self, to: IpAddr) -> bool {
        self.ip_to(to).is_some()
    }

    /// Returns the address to bind(2) before connecting to `to`. `None` if the kernel chooses both address and port.
    pub fn bind_addr(&self, to: SocketAddr) -> Option<SocketAddr> {
        let ip = self.ip_to(to.ip()).filter(|ip| !ip.is_unspecified() || self.port != 0)?;
        // A link-local address is on the link of `to`.
        Some(with_scope(SocketAddr::new(ip, self.port), to))
    }
}

/// Returns true if connect(2) requires the scope of the address, and it has none.
fn requires_zone(addr: SocketAddr) -> bool {
    matches!(addr, SocketAddr::V6(addr) if addr.ip().is_unicast_link_local() && addr.scope_id() == 0)
}

/// Replaces an error of bind(2) that a link-local address without a scope causes.
pub fn bind_error(error: io::Error, addr: SocketAddr) -> io::Error {
    if requires_zone(addr) { io::Error::other(DialError::ZoneRequired) } else { error }
}

/// Gives a link-local address without a scope (interface) that of `from`.
pub fn with_scope(mut addr: SocketAddr, from: SocketAddr) -> SocketAddr {
    let is_missing = requires_zone(addr);
    if let (SocketAddr::V6(addr), SocketAddr::V6(from)) = (&mut addr, from)
        && is_missing
    {
        addr.set_scope_id(from.scope_id());
    }
    addr
}

/// Returns the unspecified address of the family of `ip`.
pub fn unspecified(ip: IpAddr) -> IpAddr {
    if ip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
}

/// Limits of the lookups and attempts that run at the same time (default: none). A guard counts one until its drop.
pub trait DialLimits: fmt::Debug + Send + Sync {
    /// Waits until another lookup may start.
    fn start_lookup(&self) -> Pin<Box<dyn Future<Output = LimitGuard> + '_>> {
        Box::pin(ready(Box::new(()) as LimitGuard))
    }

    /// Returns `None` unless another attempt may start, in addition to those that are running for the same connection.
    fn start_extra_attempt(&self) -> Option<LimitGuard> {
        Some(Box::new(()))
    }
}

/// Counts a lookup or a connection attempt until it is dropped.
pub type LimitGuard = Box<dyn Send>;

/// No limits but those of a single connection.
#[derive(Debug)]
pub struct Unlimited;

impl DialLimits for Unlimited {}

/// Connects to the first of `addrs` that accepts (RFC 8305), and returns it too. [`alternate_families`] determines
/// their order. The next attempt starts after 250 ms, or at once if one fails. If too many are running, it replaces the
/// oldest, and has a second itself. Sets the options of [`set_tcp_options`], but leaves keepalive to the caller.
///
/// # Errors
/// The most specific error of all attempts. Attempts that are still running at `deadline` count as timed out.
pub async fn dial(
    addrs: Vec<SocketAddr>,
    local: LocalAddr,
    limits: &dyn DialLimits,
    deadline: Instant,
) -> Result<Dialed, DialError> {
    let _timer = ConnectTimer(Instant::now());
    // Most targets have one address, and need neither the queue nor a list of attempts.
    if let [addr] = addrs.as_slice()
        && local.can_reach(addr.ip())
    {
        return timeout_at(deadline, attempt(*addr, local)).await.unwrap_or(Err(DialError::TimedOut));
    }
    let reachable: Vec<SocketAddr> = addrs.into_iter().filter(|addr| local.can_reach(addr.ip())).collect();
    let mut queue = VecDeque::from(alternate_families(&reachable));
    let mut attempts = VecDeque::new();
    let (mut most_specific, mut delay) = (None, ATTEMPT_DELAY);
    let most_specific = loop {
        match queue.pop_front() {
            Some(addr) => {
                let is_replaced = replace_or_add(&mut attempts, limits, Box::pin(attempt(addr, local)));
                most_specific = most_specific.max(is_replaced.then_some(DialError::TimedOut));
                // An attempt that replaces another one has a second.
                let running = if is_replaced { attempts.len() } else { MAX_ATTEMPTS };
                delay = ATTEMPT_DELAY * MAX_ATTEMPTS as u32 / running as u32;
            }
            None if attempts.is_empty() => break most_specific,
            None => {}
        }
        let pause = if queue.is_empty() { deadline } else { deadline.min(Instant::now() + delay) };
        match timeout_at(pause, first_done(&mut attempts)).await {
            Some(Ok(dialed)) => return Ok(dialed),
            Some(Err(error)) => most_specific = most_specific.max(Some(error)),
            None if Instant::now() >= deadline => break most_specific.max(Some(DialError::TimedOut)),
            None => {}
        }
    };
    Err(most_specific.unwrap_or(DialError::FamilyUnavailable))
}

/// The attempts that are running, oldest first. All but one count against the limits.
type Attempts = VecDeque<(Option<LimitGuard>, Attempt)>;

/// Adds an attempt. At a limit, it replaces the oldest one: then returns true.
fn replace_or_add(attempts: &mut Attempts, limits: &dyn DialLimits, attempt: Attempt) -> bool {
    let may_add = (1..MAX_ATTEMPTS).contains(&attempts.len());
    let guard = may_add.then(|| limits.start_extra_attempt()).flatten();
    let replaced = if guard.is_none() { attempts.pop_front() } else { None };
    let is_replaced = replaced.is_some();
    attempts.push_back((guard.or_else(|| replaced?.0), attempt));
    is_replaced
}

type Dialed = (Io<Socket>, SocketAddr);

type Attempt = Pin<Box<dyn Future<Output = Result<Dialed, DialError>>>>;

/// Connects a new socket to `addr`, bound to `local`.
async fn attempt(addr: SocketAddr, local: LocalAddr) -> Result<Dialed, DialError> {
    let connect_error = |error: Errno| DialError::from_connect(&error.into(), addr);
    let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let (socket, from) = (stream_socket(family).map_err(connect_error)?, local.bind_addr(addr));
    set_outbound_options(&socket).map_err(|error| DialError::from_connect(&error, addr))?;
    if let Some(from) = from {
        let shared = match from.port() {
            // connect(2) chooses a port that is free for this target. bind(2) would choose one that is free for all.
            0 => setsockopt(&socket, IpBindAddressNoPort, &true).map_err(io::Error::from),
            // Permits a port whose last connection, to another peer, is in TIME_WAIT.
            _ => sockopt::set_socket_reuseaddr(&socket, true).map_err(io::Error::from),
        };
        let bound = shared.and_then(|()| rustix::net::bind(&socket, &from).map_err(io::Error::from));
        bound.map_err(|_| DialError::LocalAddr(from.ip()))?;
    }
    match (rustix::net::connect(&socket, &addr), from) {
        (Ok(()) | Err(Errno::INPROGRESS | Errno::INTR), _) => {}
        (Err(Errno::ADDRNOTAVAIL | Errno::ADDRINUSE | Errno::INVAL), Some(from)) => {
            return Err(DialError::LocalAddr(from.ip()));
        }
        (Err(error), _) => return Err(connect_error(error)),
    }
    // Registered after connect(2): epoll reports an unconnected socket as hung up.
    let io = Io::new(socket.into()).map_err(|error| DialError::from_connect(&error, addr))?;
    io.ready(Interest::Write).await;
    // A failed connect is reported as a hang-up, with the error in SO_ERROR.
    if poll_fn(|cx| Poll::Ready(io.poll_ready(cx, Interest::Hangup))).await.is_ready() {
        sockopt::socket_error(&io).and_then(|error| error).map_err(connect_error)?;
    }
    log_failure(set_stream_options(&io));
    Ok((io, addr))
}

fn stream_socket(family: AddressFamily) -> rustix::io::Result<OwnedFd> {
    socket_with(family, SocketType::STREAM, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None)
}

/// Connects to the Unix socket at `path`. The caller sets the deadline.
pub async fn connect_unix(path: &Path) -> io::Result<Io<Socket>> {
    let (addr, socket) = (SocketAddrUnix::new(path)?, stream_socket(AddressFamily::UNIX)?);
    loop {
        match rustix::net::connect(&socket, &addr) {
            Ok(()) | Err(Errno::ISCONN) => return Io::new(socket.into()),
            // The backlog is full, and epoll does not report when it has room again.
            Err(Errno::AGAIN | Errno::INTR | Errno::INPROGRESS | Errno::ALREADY) => sleep(BACKLOG_RETRY_DELAY).await,
            Err(error) => return Err(error.into()),
        }
    }
}

/// Waits until an attempt has finished, and removes it.
async fn first_done(attempts: &mut Attempts) -> Result<Dialed, DialError> {
    poll_fn(|cx| {
        for i in 0..attempts.len() {
            let polled = attempts.get_mut(i).map(|(_, attempt)| attempt.as_mut().poll(cx));
            if let Some(Poll::Ready(done)) = polled {
                drop(attempts.remove(i));
                return Poll::Ready(done);
            }
        }
        Poll::Pending
    })
    .await
}

/// Sets the options of a connection, or of a listener, whose connections inherit them. Failures are only logged.
///
/// - TCP_NODELAY: small messages are not delayed.
/// - SO_OOBINLINE: urgent data is not lost.
/// - Keepalive, see [`set_keepalive`].
pub fn set_tcp_options(socket: &impl AsFd) {
    log_failure(set_stream_options(socket));
    set_keepalive(socket);
}

/// Makes the kernel detect an unreachable peer by 6 probes, 15 s apart, after 60 s. Failures are only logged.
pub fn set_keepalive(socket: &impl AsFd) {
    let keepalive =
        TcpKeepalive::new().with_time(Duration::from_secs(60)).with_interval(Duration::from_secs(15)).with_retries(6);
    log_failure(SockRef::from(socket).set_tcp_keepalive(&keepalive));
}

/// Shortens keepalive, which is already set, for a peer that has ended its stream: the kernel detects within 65 s that
/// the peer is unreachable, and that the peer's kernel has forgotten the connection, which Linux does 60 s after a
/// close.
pub fn shorten_keepalive(socket: &impl AsFd) {
    let set = || {
        sockopt::set_tcp_keepidle(socket, SHORT_KEEPALIVE_TIME)?;
        sockopt::set_tcp_keepintvl(socket, Duration::from_secs(10))?;
        sockopt::set_tcp_keepcnt(socket, 6)
    };
    log_failure(set().map_err(io::Error::from));
}

/// The option TCP_LINGER2 of tcp(7).
#[derive(Clone)]
struct Linger2;

setsockopt_impl!(Linger2, libc::IPPROTO_TCP, libc::TCP_LINGER2, i32, SetStruct<'_, i32>);

/// The option SO_MEMINFO, in bytes. The sixth value is the send queue (SK_MEMINFO_WMEM_QUEUED).
#[derive(Clone, Copy)]
struct MemInfo;

getsockopt_impl!(MemInfo, libc::SOL_SOCKET, libc::SO_MEMINFO, [u32; 6], GetStruct<[u32; 6]>);

/// Returns the memory of the data that the peer has not acknowledged, in bytes. 0 for a Unix socket.
pub fn send_queue(socket: &impl AsFd) -> u32 {
    MemInfo.get(&socket.as_fd()).map_or(0, |[.., queue]| queue)
}

/// Makes the kernel reset the connection after the next close, as soon as the peer has acknowledged all data and the
/// end of the stream. Failures are only logged.
pub fn set_reset_after_delivery(socket: &impl AsFd) {
    log_failure(Linger2.set(&socket.as_fd(), &-1).map_err(io::Error::from));
}

fn set_stream_options(socket: &impl AsFd) -> io::Result<()> {
    let socket = SockRef::from(socket);
    socket.set_tcp_nodelay(true)?;
    socket.set_out_of_band_inline(true)
}

fn log_failure(result: io::Result<()>) {
    if let Err(error) = result {
        log::debug!("cannot set socket options: {error}");
    }
}
