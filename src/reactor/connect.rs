//! Connecting TCP sockets, optionally from a given source address, and Unix sockets.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::task::Poll;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with, sockopt};
use socket2::Socket;

use super::epoll::Interest;
use super::socket::Io;
use super::timer::sleep;

/// Pause before connecting again to a Unix socket whose backlog is full.
const BACKLOG_RETRY_DELAY: Duration = Duration::from_millis(10);

impl Io<Socket> {
    /// Connects a new socket to `addr`, bound to `from` if given.
    ///
    /// # Errors
    /// Errors from socket(2) and connect(2); [`ConnectError::LocalAddr`] if binding to `from` fails.
    pub async fn connect(addr: SocketAddr, from: Option<SocketAddr>) -> Result<Self, ConnectError> {
        let socket = stream_socket(if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 })?;
        if let Some(from) = from {
            // Permits a port whose last connection, to another peer, is in TIME_WAIT.
            let bound = sockopt::set_socket_reuseaddr(&socket, true).and_then(|()| rustix::net::bind(&socket, &from));
            bound.map_err(|error| ConnectError::LocalAddr(error.into()))?;
        }
        match rustix::net::connect(&socket, &addr) {
            Ok(()) | Err(Errno::INPROGRESS | Errno::INTR) => {}
            Err(error @ (Errno::ADDRNOTAVAIL | Errno::ADDRINUSE)) if from.is_some() => {
                return Err(ConnectError::LocalAddr(error.into()));
            }
            Err(error) => return Err(error.into()),
        }
        // Registered after connect(2): epoll reports an unconnected socket as hung up.
        let io = Self::new(socket.into())?;
        io.ready(Interest::Write).await;
        // A failed connect is reported as a hang-up, with the error in SO_ERROR.
        if poll_fn(|cx| Poll::Ready(io.poll_hangup(cx))).await.is_ready() {
            sockopt::socket_error(&io).and_then(|error| error)?;
        }
        Ok(io)
    }

    /// Connects to the Unix socket at `path`. The caller sets the deadline.
    ///
    /// # Errors
    /// Errors from socket(2) and connect(2).
    pub async fn connect_unix(path: &Path) -> io::Result<Self> {
        let addr = SocketAddrUnix::new(path)?;
        let socket = stream_socket(AddressFamily::UNIX)?;
        loop {
            match rustix::net::connect(&socket, &addr) {
                Ok(()) | Err(Errno::ISCONN) => return Self::new(socket.into()),
                // The backlog is full, and epoll does not report when it has room again.
                Err(Errno::AGAIN | Errno::INTR | Errno::INPROGRESS | Errno::ALREADY) => {
                    sleep(BACKLOG_RETRY_DELAY).await
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Failure of [`Io::connect`].
#[derive(Debug)]
pub enum ConnectError {
    /// The local address or port is not available.
    LocalAddr(io::Error),
    /// Any other error.
    Io(io::Error),
}

impl<E: Into<io::Error>> From<E> for ConnectError {
    fn from(error: E) -> Self {
        Self::Io(error.into())
    }
}

/// Creates a non-blocking stream socket.
fn stream_socket(family: AddressFamily) -> rustix::io::Result<OwnedFd> {
    socket_with(family, SocketType::STREAM, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None)
}
