//! The listening sockets of a server: TCP and Unix.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use socket2::{Domain, SockAddr, Socket, Type};

use crate::conn::DetachedConn;
use crate::net::{accept, set_tcp_options};
use crate::proto::{Addr, Host};

/// Connections that wait for accept(2). The kernel limits it to net.core.somaxconn.
const LISTEN_BACKLOG: i32 = 4096;
/// Attempts to find a port that is free in both families, for port 0.
const MAX_PORT_ATTEMPTS: usize = 16;

/// A value of `--listen`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddr {
    /// `HOST:PORT`: all addresses of a host.
    Host(Addr),
    /// `PORT`: loopback, both families.
    Loopback(u16),
    /// `*:PORT`: the unspecified address, both families.
    Wildcard(u16),
    /// `unix:PATH`.
    Unix(PathBuf),
}

impl FromStr for ListenAddr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() {
                Err("requires a path, as in unix:/run/s5.sock".into())
            } else {
                Ok(Self::Unix(path.into()))
            };
        }
        let invalid = || "expected HOST:PORT, [IPV6]:PORT, PORT, *:PORT or unix:PATH".to_owned();
        match text.strip_prefix("*:") {
            Some(port) => port.parse().map(Self::Wildcard).map_err(|_| invalid()),
            None => text.parse().map(Self::Loopback).or_else(|_| text.parse().map(Self::Host)).map_err(|_| invalid()),
        }
    }
}

impl fmt::Display for ListenAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(addr) => addr.fmt(f),
            Self::Loopback(port) => write!(f, "{port}"),
            Self::Wildcard(port) => write!(f, "*:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl ListenAddr {
    /// Returns the TCP addresses before they are bound. A name that can't be resolved has none.
    pub fn addrs(&self) -> Vec<SocketAddr> {
        let both_families =
            |v4: Ipv4Addr, v6: Ipv6Addr, port| [IpAddr::V4(v4), v6.into()].map(|ip| SocketAddr::new(ip, port));
        match self {
            Self::Host(addr) => resolve(addr).unwrap_or_default(),
            Self::Loopback(port) => both_families(Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST, *port).into(),
            Self::Wildcard(port) => both_families(Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED, *port).into(),
            Self::Unix(_) => Vec::new(),
        }
    }

    /// Binds all addresses. Skips a family that this machine does not have if the other one can be bound.
    ///
    /// # Errors
    /// Those of the resolver and of bind(2).
    pub(super) fn bind(&self) -> io::Result<Vec<Listener>> {
        match self {
            Self::Host(addr) => bind_all(resolve(addr)?),
            Self::Loopback(port) => bind_both([Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()], *port),
            Self::Wildcard(port) => bind_both([Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()], *port),
            Self::Unix(path) => Ok(vec![bind_unix(path.clone())?]),
        }
    }
}

fn resolve(addr: &Addr) -> io::Result<Vec<SocketAddr>> {
    match &addr.host {
        Host::Ip(ip) => Ok(vec![SocketAddr::new(*ip, addr.port)]),
        Host::Name(name) => (name.as_str(), addr.port).to_socket_addrs().map(Iterator::collect),
    }
}

fn bind_all(addrs: Vec<SocketAddr>) -> io::Result<Vec<Listener>> {
    let mut unique: Vec<SocketAddr> = Vec::new();
    for addr in addrs {
        if !unique.contains(&addr) {
            unique.push(addr);
        }
    }
    let (bound, failed): (Vec<_>, Vec<_>) = unique.into_iter().map(bind_tcp).partition(Result::is_ok);
    let mut failed = failed.into_iter().filter_map(Result::err);
    match failed.find(|error| bound.is_empty() || !is_family_unavailable(error)) {
        Some(error) => Err(error),
        None => bound.into_iter().map(|listener| listener.and_then(Listener::tcp)).collect(),
    }
}

fn bind_tcp(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&addr.into())?;
    set_tcp_options(&socket);
    socket.listen(LISTEN_BACKLOG)?;
    Ok(socket.into())
}

fn bind_both(ips: [IpAddr; 2], port: u16) -> io::Result<Vec<Listener>> {
    let [first, second] = ips;
    let mut attempts = if port == 0 { MAX_PORT_ATTEMPTS } else { 1 };
    loop {
        attempts -= 1;
        let first = bind_tcp(SocketAddr::new(first, port));
        // Port 0: the second family gets the port that the kernel chose for the first one.
        let chosen =
            first.as_ref().ok().and_then(|listener| listener.local_addr().ok()).map_or(port, |addr| addr.port());
        match (first, bind_tcp(SocketAddr::new(second, chosen))) {
            (Ok(first), Ok(second)) => return Ok(vec![Listener::tcp(first)?, Listener::tcp(second)?]),
            (Ok(only), Err(error)) | (Err(error), Ok(only)) if is_family_unavailable(&error) => {
                return Ok(vec![Listener::tcp(only)?]);
            }
            (Ok(_), Err(error)) if attempts > 0 && error.kind() == io::ErrorKind::AddrInUse => {}
            (Err(error), _) | (_, Err(error)) => return Err(error),
        }
    }
}

fn is_family_unavailable(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(errno, Some(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL))
}

fn bind_unix(path: PathBuf) -> io::Result<Listener> {
    let is_socket = std::fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.file_type().is_socket());
    if is_socket && is_stale(&path)? {
        std::fs::remove_file(&path)?;
    }
    let listener = UnixListener::bind(&path)?;
    listener.set_nonblocking(true)?;
    Ok(Listener::Unix(SocketPathGuard(path), listener))
}

/// Returns whether a socket file is left over from a process that has ended: only then does connect(2) refuse.
fn is_stale(path: &Path) -> io::Result<bool> {
    let probe = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    probe.set_nonblocking(true)?;
    let refused = probe.connect(&SockAddr::unix(path)?);
    Ok(refused.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused))
}

/// One listening socket.
#[derive(Debug)]
pub(super) enum Listener {
    Tcp(TcpListener, SocketAddr),
    /// The file is removed before the socket closes, because a new server may create its own file after that.
    Unix(SocketPathGuard, UnixListener),
}

/// Removes the socket file on drop.
#[derive(Debug)]
pub(super) struct SocketPathGuard(PathBuf);

impl Drop for SocketPathGuard {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(_, addr) => addr.fmt(f),
            Self::Unix(path, _) => write!(f, "unix:{}", path.0.display()),
        }
    }
}

impl Listener {
    fn tcp(listener: TcpListener) -> io::Result<Self> {
        let addr = listener.local_addr()?;
        Ok(Self::Tcp(listener, addr))
    }

    pub(super) fn addr(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(_, addr) => Some(*addr),
            Self::Unix(..) => None,
        }
    }

    /// Accepts a waiting connection. The address is `None` on a Unix socket.
    pub(super) fn accept(&self) -> io::Result<(DetachedConn, Option<SocketAddr>)> {
        let (socket, peer) = accept(self)?;
        Ok(match self {
            Self::Tcp(..) => (DetachedConn::Tcp(socket.into()), peer),
            Self::Unix(..) => (DetachedConn::Unix(socket.into()), None),
        })
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener, _) => listener.as_fd(),
            Self::Unix(_, listener) => listener.as_fd(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listen_addr_displays_as_the_text_it_was_parsed_from() {
        let texts = ["127.0.0.1:1080", "localhost:0", "[::1]:1080", "1080", "*:1080", "unix:/run/s5.sock"];
        for text in texts {
            assert_eq!(text.parse::<ListenAddr>().map(|listen| listen.to_string()).as_deref(), Ok(text));
        }
        for text in ["", ":1080", "host", "host:", "host:65536", "::1:1080", "[::1]", "[host]:1", "unix:", "-1"] {
            assert!(text.parse::<ListenAddr>().is_err(), "{text}");
        }
    }
}
