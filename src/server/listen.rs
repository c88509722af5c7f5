//! The listening sockets of a server: TCP and Unix.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Access, access};
use rustix::io::Errno;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::client::{check_unix_path, parse_addr, parse_port};
use crate::conn::{DetachedConn, to_canonical_addr};
use crate::net::{DialError, accept, bind_error, set_tcp_options};
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
    /// `unix:/PATH`.
    Unix(PathBuf),
}

impl FromStr for ListenAddr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return check_unix_path(path).map(|()| Self::Unix(path.into()));
        }
        let parsed = match text.strip_prefix("*:") {
            Some(port) => parse_port(port, false).map(Self::Wildcard),
            None => parse_port(text, false).map(Self::Loopback).or_else(|_| parse_addr(text, false).map(Self::Host)),
        };
        let hint = || meant(text).map(|meant| format!(" (write {meant})")).unwrap_or_default();
        parsed.map_err(|error| match text.is_ascii() {
            true => format!("expected HOST:PORT, [IPV6]:PORT, PORT, *:PORT or unix:/PATH{}", hint()),
            // The advice about the name.
            false => error,
        })
    }
}

/// Returns what a text that is not an address probably means: it lacks the host, the port, or the brackets of IPv6.
fn meant(text: &str) -> Option<String> {
    let split = text.rsplit_once(':').filter(|(_, port)| port.parse::<u16>().is_ok());
    let (host, port) = match split {
        Some(("", port)) => return Some(format!("*:{port} for all addresses, or {port} for loopback")),
        Some((host, port)) if host.split('%').next().is_some_and(|ip| ip.parse::<Ipv6Addr>().is_ok()) => (host, port),
        _ => (text, "PORT"),
    };
    match host.parse().ok()? {
        Host::Ip(ip) if ip.is_unspecified() => Some(format!("*:{port}")),
        Host::Name(name) if name.as_str() != "*" && !name.as_str().starts_with(char::is_alphabetic) => None,
        host => Some(Addr { host, port: 0 }.to_string().trim_end_matches('0').to_owned() + port),
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
    /// Returns the TCP addresses before they are bound.
    pub fn resolve(&self) -> io::Result<Vec<SocketAddr>> {
        let both_families = |v4: Ipv4Addr, v6: Ipv6Addr, port| vec![(v4, port).into(), (v6, port).into()];
        Ok(match self {
            Self::Host(Addr { host: Host::Ip(ip), port }) => vec![(ip.to_canonical(), *port).into()],
            Self::Host(Addr { host: Host::Name(name), port }) => {
                let found = (name.as_str(), *port).to_socket_addrs();
                let no_interface = |_| io::Error::other(DialError::NoInterface);
                if name.is_zoned_address() { found.map_err(no_interface)? } else { found? }.collect()
            }
            Self::Loopback(port) => both_families(Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST, *port),
            Self::Wildcard(port) => both_families(Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED, *port),
            Self::Unix(_) => Vec::new(),
        })
    }

    /// Binds the addresses that this machine has; fails if there are none. An error names its address.
    pub(super) fn bind(&self) -> Result<Vec<Listener>, (String, io::Error)> {
        let name_self = |error| (self.to_string(), error);
        if let Self::Unix(path) = self {
            return Ok(vec![bind_unix(path).map_err(name_self)?]);
        }
        let addrs = self.resolve().map_err(name_self)?;
        // The kernel chooses the port for the first address; it may be in use at another one.
        let may_retry = addrs.first().is_some_and(|addr| addr.port() == 0);
        for _ in 1..MAX_PORT_ATTEMPTS {
            match bind_all(&addrs, Some(LISTEN_BACKLOG)) {
                Err((_, error)) if may_retry && error.kind() == io::ErrorKind::AddrInUse => {}
                result => return result.map(|(listeners, _)| listeners),
            }
        }
        bind_all(&addrs, Some(LISTEN_BACKLOG)).map(|(listeners, _)| listeners)
    }

    /// Returns the error of [`bind`](Self::bind), but opens no port and creates no file. `addrs` are the resolved ones;
    /// those that `bind` would skip are removed. The server whose options are checked may be running, so addresses and
    /// sockets in use are not an error.
    pub(super) fn check(&self, addrs: &mut Vec<SocketAddr>) -> Result<(), (String, io::Error)> {
        if let Self::Unix(path) = self {
            return check_unix(path).map_err(|error| (self.to_string(), error));
        }
        let (_, skipped) = bind_all(addrs, None)?;
        addrs.retain(|addr| !skipped.contains(&addr.ip()));
        Ok(())
    }
}

/// Binds each address. With port 0, all get the port that the kernel chooses for the first one. Without a backlog, an
/// address may be in use. Also returns the addresses that this machine does not have, and warns of them if it has
/// the family. Fails if it has none of them.
fn bind_all(addrs: &[SocketAddr], backlog: Option<i32>) -> Result<(Vec<Listener>, Vec<IpAddr>), (String, io::Error)> {
    let (mut listeners, mut skipped) = (Vec::<Listener>::new(), Vec::new());
    let mut unavailable = ("the name".to_owned(), io::ErrorKind::AddrNotAvailable.into());
    for mut addr in addrs.iter().copied() {
        if let (0, Some(first)) = (addr.port(), listeners.first().and_then(|first| first.addr)) {
            addr.set_port(first.port());
        }
        if listeners.iter().any(|listener| listener.addr == Some(addr)) {
            continue;
        }
        let bound = listen_tcp(addr, true, backlog, |_| Ok(()));
        match bound.and_then(|socket| Listener::new(socket.into(), "", false)) {
            Ok(listener) => listeners.push(listener),
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::ADDRINUSE) if backlog.is_none() => {}
                Some(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) => {
                    unavailable = (addr.to_string(), error);
                    skipped.push(addr.ip());
                }
                _ => return Err((addr.to_string(), error)),
            },
        }
    }
    if skipped.len() == addrs.len() {
        return Err(unavailable);
    }
    let is_bound = |addr: &&SocketAddr| !skipped.contains(&addr.ip());
    for ip in &skipped {
        if addrs.iter().filter(is_bound).any(|bound| bound.is_ipv4() == ip.is_ipv4()) {
            log::warn!("listen on {ip}: not an address of this host, so it is skipped");
        }
    }
    Ok((listeners, skipped))
}

/// Returns a non-blocking socket, which listens if there is a backlog. `prepare` is called before it is bound.
pub(super) fn listen_tcp(
    addr: SocketAddr,
    is_v6_only: bool,
    backlog: Option<i32>,
    prepare: impl FnOnce(&Socket) -> io::Result<()>,
) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None)?;
    prepare(&socket)?;
    socket.set_nonblocking(true)?;
    if addr.is_ipv6() {
        socket.set_only_v6(is_v6_only)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&addr.into()).map_err(|error| bind_error(error, addr))?;
    set_tcp_options(&socket);
    backlog.map_or(Ok(()), |backlog| socket.listen(backlog))?;
    Ok(socket.into())
}

/// Returns the error of [`bind_unix`], but creates no file.
fn check_unix(path: &Path) -> io::Result<()> {
    SockAddr::unix(path)?;
    match path.symlink_metadata() {
        Ok(file) if !file.file_type().is_socket() => Err(Errno::ADDRINUSE.into()),
        _ => Ok(access(Path::new(".").join(path).parent().unwrap_or(path), Access::WRITE_OK | Access::EXEC_OK)?),
    }
}

fn bind_unix(path: &Path) -> io::Result<Listener> {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    if is_socket && is_stale(path)? {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    Listener::new(OwnedFd::from(listener).into(), "", true)
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
pub struct Listener {
    /// Address, and name if it has one, for the log.
    text: String,
    /// File to remove: of a Unix socket that s5 has created.
    path: Option<PathBuf>,
    /// Of a TCP socket.
    addr: Option<SocketAddr>,
    /// Set for `::` without IPV6_V6ONLY, as systemd opens it.
    accepts_ipv4_too: bool,
    socket: Socket,
}

/// Set while the files of Unix sockets belong to another process: the one that this one replaces, or its replacement.
pub(super) static KEEP_SOCKET_FILES: AtomicBool = AtomicBool::new(false);

/// Removes the file before the socket closes, because a new server may create its own file after that.
impl Drop for Listener {
    fn drop(&mut self) {
        if !KEEP_SOCKET_FILES.load(Ordering::Relaxed) {
            self.path.iter().for_each(|path| drop(std::fs::remove_file(path)));
        }
    }
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Listener {
    /// Wraps a non-blocking TCP or Unix socket. `owns_file`: s5 has created the file of a Unix socket.
    pub(super) fn new(socket: Socket, name: &str, owns_file: bool) -> io::Result<Self> {
        let local = socket.local_addr()?;
        let addr = local.as_socket().map(to_canonical_addr);
        let mut text = match (addr, local.as_pathname(), local.as_abstract_namespace()) {
            (Some(addr), ..) => addr.to_string(),
            (_, Some(path), _) => format!("unix:{}", path.display()),
            (.., name) => format!("unix:@{}", String::from_utf8_lossy(name.unwrap_or_default())),
        };
        if !name.is_empty() {
            text += &format!(" ({name})");
        }
        let is_any_ipv6 = addr.is_some_and(|addr| addr.ip() == Ipv6Addr::UNSPECIFIED);
        let accepts_ipv4_too = is_any_ipv6 && !socket.only_v6()?;
        let path = local.as_pathname().filter(|_| owns_file).map(PathBuf::from);
        Ok(Self { text, path, addr, accepts_ipv4_too, socket })
    }

    /// Returns the TCP addresses that the socket accepts connections to.
    pub(super) fn addrs(&self) -> impl Iterator<Item = SocketAddr> {
        let any_ipv4 = |addr: SocketAddr| SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), addr.port());
        self.addr.into_iter().chain(self.addr.filter(|_| self.accepts_ipv4_too).map(any_ipv4))
    }

    /// Accepts a waiting connection. The address is `None` on a Unix socket.
    pub(super) fn accept(&self) -> io::Result<(DetachedConn, Option<SocketAddr>)> {
        let (socket, peer) = accept(self)?;
        let conn = if self.addr.is_some() { DetachedConn::Tcp } else { DetachedConn::Unix };
        Ok((conn(socket.into()), peer.map(to_canonical_addr)))
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
