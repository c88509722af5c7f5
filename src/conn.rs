//! A SOCKS connection over TCP, a Unix socket or a GSSAPI-protected stream; it reads and writes whole messages.
//!
//! Other modules do not distinguish these transports.

mod protected;

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::mem::take;
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures_lite::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::RecvFlags;
use socket2::Socket;

use crate::net::{
    Interest, Io, SHORT_KEEPALIVE_TIME, SocketOp, SocketPoll, Stream, set_keepalive, set_reset_after_delivery,
    shorten_keepalive, sleep, timeout_at, yield_now,
};
use crate::proto::{DecodeError, Message, ProtocolError};
use protected::ProtectedStream;
pub use protected::{Protection, SecurityContext, TokenOrder, Unwrapped};

/// Time that a closing connection is still read: unread data would cause a reset, which can discard the last message.
/// RFC 1928 section 6 requires the connection to be closed within 10 s.
const GRACEFUL_CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum number of bytes that are discarded during this time: a peer that goes on can send gigabytes.
const MAX_DISCARDED: usize = 1 << 20;
/// Buffer size for reads of a message, in bytes.
const READ_LEN: usize = 1024;
/// Time to go on connecting, or waiting for the peer of BIND, after the client has shut down its write side: it may
/// still want to receive.
pub const HALF_CLOSED_GRACE: Duration = Duration::from_secs(2);
/// Interval of checks whether the peer has closed a connection with unread data.
const CLOSE_POLL_INTERVAL: Duration = Duration::from_secs(1);

/// A connection between a SOCKS client and a SOCKS server.
#[derive(Debug)]
pub enum Conn {
    /// Over TCP.
    Tcp(Io<Socket>),
    /// Over a Unix socket.
    Unix(Io<Socket>),
    /// Over another connection, with GSSAPI protection.
    Protected(Box<ProtectedStream<Self>>),
}

/// A connection that is not registered with the event loop of any thread. Can be sent to another thread.
#[derive(Debug)]
#[allow(missing_docs, reason = "as in Conn")]
pub enum DetachedConn {
    Tcp(Socket),
    Unix(Socket),
}

impl DetachedConn {
    /// Registers the connection with the event loop of this thread.
    pub fn attach(self) -> io::Result<Conn> {
        Ok(match self {
            Self::Tcp(socket) => Conn::Tcp(Io::new(socket)?),
            Self::Unix(socket) => Conn::Unix(Io::new(socket)?),
        })
    }
}

/// Reason why no message was read.
#[derive(Debug)]
pub enum ReadError {
    /// The peer closed or reset the connection after these bytes of the message.
    Closed(Vec<u8>, Option<io::Error>),
    /// The received bytes (second field) are not a valid message.
    Protocol(ProtocolError, Vec<u8>),
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed(_, Some(error)) => error.fmt(f),
            Self::Closed(bytes, None) if bytes.is_empty() => f.write_str("connection closed before a message"),
            Self::Closed(..) => f.write_str("connection closed within a message"),
            Self::Protocol(error, _) => error.fmt(f),
        }
    }
}

impl Conn {
    /// Reads one message. The next read returns the bytes after it. The caller sets the deadline.
    pub fn read_message<M: Message>(&mut self) -> impl Future<Output = Result<M, ReadError>> {
        self.read_message_with(true, || {})
    }

    /// Like [`Self::read_message`]. Calls `on_receipt` after each read that has returned bytes. Without `reads_ahead`,
    /// the bytes after the message stay in the socket.
    pub fn read_message_with<M: Message>(
        &mut self,
        reads_ahead: bool,
        on_receipt: impl Fn(),
    ) -> impl Future<Output = Result<M, ReadError>> {
        // Bytes of a message that arrives in several pieces.
        let (mut begun, mut missing) = (Vec::new(), M::MIN_LEN);
        poll_fn(move |cx| {
            loop {
                // On the stack: an idle handshake owns no buffer, and a length field alone allocates nothing.
                let mut buffer = [0; READ_LEN];
                // A read that does not fill its buffer also shows that the socket is empty, which saves the next read.
                let reads_ahead = reads_ahead && !matches!(self, Self::Protected(_));
                let max = if reads_ahead { READ_LEN } else { missing.min(READ_LEN) };
                let read = Pin::new(&mut *self).poll_read(cx, buffer.get_mut(..max).unwrap_or_default());
                let received = match ready!(read) {
                    Ok(n) if n > 0 => buffer.get(..n).unwrap_or_default(),
                    end => return Poll::Ready(Err(ReadError::Closed(take(&mut begun), end.err()))),
                };
                on_receipt();
                let is_first = begun.is_empty();
                if !is_first {
                    append_exactly(&mut begun, received);
                }
                let bytes = if is_first { received } else { &begun };
                match M::decode_prefix(bytes) {
                    Ok((message, rest)) => {
                        if !rest.is_empty() {
                            self.io().put_back(rest);
                        }
                        return Poll::Ready(Ok(message));
                    }
                    Err(DecodeError::Incomplete(n)) => missing = n,
                    Err(DecodeError::Invalid(error)) => {
                        return Poll::Ready(Err(ReadError::Protocol(error, bytes.to_vec())));
                    }
                }
                if is_first {
                    append_exactly(&mut begun, received);
                }
            }
        })
    }

    /// Writes one message with one call: many peers read once and expect the whole message.
    pub async fn write_message(&mut self, message: &impl Message) -> io::Result<()> {
        self.write_all(&message.encode()).await?;
        self.flush().await
    }

    /// Adds protection to the connection, for all further data.
    pub fn protect(self, protection: Protection) -> Self {
        Self::Protected(Box::new(ProtectedStream::new(self, protection)))
    }

    /// Returns the protection of the connection and its datagrams.
    pub fn protection(&self) -> Option<&Protection> {
        match self {
            Self::Protected(protected) => Some(&protected.protection),
            Self::Tcp(_) | Self::Unix(_) => None,
        }
    }

    /// Sends `last_message` and closes the connection so that the message arrives even while the peer is sending.
    /// After the write side is shut down, reads until the peer closes, for at most 5 s and 1 MiB.
    pub async fn close_gracefully(mut self, last_message: &[u8]) {
        let close = async {
            self.write_all(last_message).await?;
            self.close().await?;
            let (mut discarded, mut limit) = (vec![0; 2048], MAX_DISCARDED);
            while limit > 0 {
                match self.read(&mut discarded).await? {
                    0 => break,
                    n => limit = limit.saturating_sub(n),
                }
                // Without a yield, a peer that never stops sending would starve the timeout.
                yield_now().await;
            }
            io::Result::Ok(())
        };
        // An error does not matter: a peer that resets the connection does not want the message.
        let _ = timeout_at(Instant::now() + GRACEFUL_CLOSE_TIMEOUT, close).await;
    }

    /// Returns at a reset by the peer, or at the end of its stream if no data is left to read. Consumes no data.
    pub async fn wait_eof(&self) {
        self.wait_for_events(PollFlags::HUP | PollFlags::ERR).await;
    }

    /// Like [`Conn::wait_eof`], but also returns while data is left to read, up to 1 s late.
    pub async fn wait_peer_closed(&self) {
        self.wait_for_events(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR).await;
    }

    /// Returns whether the peer has reset the connection.
    pub fn is_reset(&self) -> bool {
        self.has_event(PollFlags::HUP | PollFlags::ERR)
    }

    /// Returns when the next read would be the end of the stream or an error, or when the socket has one of `events`.
    async fn wait_for_events(&self, events: PollFlags) {
        let mut byte = [0; 1];
        let mut peek = |socket: &Socket| Ok(rustix::net::recv(socket, &mut byte, RecvFlags::PEEK)?.1);
        self.io().ready(Interest::Hangup).await;
        let mut is_open =
            async || self.io().with(Interest::Read, &mut peek).await.is_ok_and(|n| n > 0 || self.has_unread());
        while is_open().await && !self.has_event(events) {
            sleep(CLOSE_POLL_INTERVAL).await;
        }
    }

    /// Returns whether bytes from the socket are buffered here, and not yet read by the caller.
    fn has_unread(&self) -> bool {
        match self {
            Self::Tcp(io) | Self::Unix(io) => io.has_put_back(),
            Self::Protected(protected) => protected.has_unread() || protected.inner.has_unread(),
        }
    }

    fn has_event(&self, events: PollFlags) -> bool {
        let mut fds = [PollFd::new(self, events)];
        rustix::event::poll(&mut fds, Some(&Timespec::default())).is_ok()
            && fds.iter().any(|fd| fd.revents().intersects(events))
    }

    /// Duplicates the socket for another thread. The caller must then [`deregister`](Self::deregister) and drop `self`.
    /// A protected connection cannot be detached.
    pub fn detach(&self) -> io::Result<DetachedConn> {
        Ok(match self {
            Self::Tcp(io) => DetachedConn::Tcp(io.get_ref().try_clone()?),
            Self::Unix(io) => DetachedConn::Unix(io.get_ref().try_clone()?),
            Self::Protected(_) => return Err(io::ErrorKind::Unsupported.into()),
        })
    }

    /// Sets whether a close sends a reset instead of a FIN (SO_LINGER with 0 s).
    pub fn set_reset_on_close(&self, should_reset: bool) -> io::Result<()> {
        self.io().get_ref().set_linger(should_reset.then_some(Duration::ZERO))
    }

    /// Removes a detached connection from the event loop of this thread. Do not wait for the connection after this.
    pub fn deregister(&self) {
        self.io().deregister();
    }

    /// Returns the socket below all protection.
    fn io(&self) -> &Io<Socket> {
        match self {
            Self::Tcp(io) | Self::Unix(io) => io,
            Self::Protected(protected) => protected.inner.io(),
        }
    }

    /// Returns the socket below all protection; `None` if it is a Unix socket.
    fn tcp_socket(&self) -> Option<&Socket> {
        match self {
            Self::Tcp(io) => Some(io.get_ref()),
            Self::Unix(_) => None,
            Self::Protected(protected) => protected.inner.tcp_socket(),
        }
    }

    /// Returns the address of the peer; `None` on a Unix socket.
    pub fn peer_addr(&self) -> Option<SocketAddr> {
        self.io().get_ref().peer_addr().ok()?.as_socket().map(to_canonical_addr)
    }

    /// Returns the local address; `None` on a Unix socket.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.io().get_ref().local_addr().ok()?.as_socket().map(to_canonical_addr)
    }
}

/// Appends to a vector without room for more: the rest of a message may never arrive.
fn append_exactly(begun: &mut Vec<u8>, received: &[u8]) {
    begun.reserve_exact(received.len());
    begun.extend(received);
}

/// Returns an IPv4-mapped address as IPv4. Others keep their scope.
pub(crate) fn to_canonical_addr(addr: SocketAddr) -> SocketAddr {
    match addr.ip().to_canonical() {
        ip if ip == addr.ip() => addr,
        ip => SocketAddr::new(ip, addr.port()),
    }
}

impl Stream for Conn {
    fn abort(&self) {
        // Fails for no connection: at worst, the close is orderly.
        let _ = self.set_reset_on_close(true);
    }

    fn keep_alive(&self, peer_has_ended: bool) {
        let Some(socket) = self.tcp_socket() else { return };
        if socket.keepalive().is_ok_and(|is_set| !is_set) {
            set_keepalive(socket);
        }
        if peer_has_ended && socket.tcp_keepalive_time().is_ok_and(|time| time != SHORT_KEEPALIVE_TIME) {
            shorten_keepalive(socket);
        }
    }

    fn reset_after_delivery(&self) {
        if let Some(socket) = self.tcp_socket() {
            set_reset_after_delivery(socket);
        }
    }

    fn has_unflushed(&self) -> bool {
        matches!(self, Self::Protected(protected) if protected.has_unflushed() || protected.inner.has_unflushed())
    }

    fn is_reset(&self) -> bool {
        self.has_event(PollFlags::ERR)
    }

    /// A Unix socket has no error after an orderly close.
    fn is_closed(&self) -> bool {
        self.has_event(PollFlags::ERR | PollFlags::HUP)
    }

    fn poll_socket(&self, cx: &mut Context<'_>, interest: Interest, op: &mut SocketOp<'_>) -> SocketPoll {
        match self {
            Self::Tcp(io) | Self::Unix(io) => Some(io.poll_with(cx, interest, |socket| op(socket.as_fd()))),
            Self::Protected(_) => None,
        }
    }
}

impl AsFd for Conn {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.io().as_fd()
    }
}

impl AsyncRead for Conn {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(io) => io.poll_read(cx, buf, true),
            // A read ends early at data that was sent together with descriptors.
            Self::Unix(io) => io.poll_read(cx, buf, false),
            Self::Protected(stream) => Pin::new(&mut **stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Conn {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(io) | Self::Unix(io) => io.poll_write(cx, buf),
            Self::Protected(stream) => Pin::new(&mut **stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(_) | Self::Unix(_) => Poll::Ready(Ok(())),
            Self::Protected(stream) => Pin::new(&mut **stream).poll_flush(cx),
        }
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(io) | Self::Unix(io) => Poll::Ready(io.get_ref().shutdown(Shutdown::Write)),
            Self::Protected(stream) => Pin::new(&mut **stream).poll_close(cx),
        }
    }
}
