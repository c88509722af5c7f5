//! Sockets that a task can wait for.

use std::collections::btree_map::Entry;
use std::future::poll_fn;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::event::epoll::{self, EventFlags};
use rustix::net::{SocketFlags, acceptfrom_with};
use socket2::Socket;

use super::reactor::{Interest, Reactor, SocketKey, current};

/// A non-blocking socket registered with the reactor of the thread that created it. One task at a time may wait for it,
/// inside [`run`](super::reactor::run).
#[derive(Debug)]
pub struct Io<T> {
    reactor: Rc<Reactor>,
    socket: T,
    key: SocketKey,
}

impl<T: AsFd> Io<T> {
    /// Registers a socket that is already non-blocking.
    pub fn new(socket: T) -> io::Result<Self> {
        let events = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::PRI;
        Self::register(socket, events | EventFlags::ET)
    }

    /// Registers a non-blocking listener that several threads wait for: a connection wakes one of the idle threads.
    pub fn shared_listener(listener: T) -> io::Result<Self> {
        Self::register(listener, EventFlags::IN | EventFlags::EXCLUSIVE | EventFlags::ET)
    }

    /// Registers a non-blocking UDP socket for reading only: otherwise each datagram sent would cause a write event.
    /// Level-triggered: unread data wakes the event loop again and again, so keep reading while there is data.
    pub fn read_only(socket: T) -> io::Result<Self> {
        Self::register(socket, EventFlags::IN)
    }

    fn register(socket: T, events: EventFlags) -> io::Result<Self> {
        let reactor = current();
        let key = reactor.register(&socket, events)?;
        Ok(Self { reactor, socket, key })
    }

    /// Removes the socket from epoll. Required before a drop of `self` if another descriptor keeps the socket open.
    pub fn deregister(&self) {
        if let Some(epoll) = self.reactor.epoll.get() {
            // Fails only if it is not registered.
            let _ = epoll::delete(epoll, &self.socket);
        }
    }

    pub(crate) fn get_ref(&self) -> &T {
        &self.socket
    }

    /// Calls `op` whenever the socket may be ready. Returns its first result except `WouldBlock` and `Interrupted`.
    pub fn poll_with<R>(
        &self,
        cx: &mut Context<'_>,
        interest: Interest,
        mut op: impl FnMut(&T) -> io::Result<R>,
    ) -> Poll<io::Result<R>> {
        loop {
            ready!(self.reactor.poll_ready(self.key, cx, interest));
            match self.try_with(interest, &mut op) {
                Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
                done => return Poll::Ready(done),
            }
        }
    }

    /// Async version of [`Io::poll_with`].
    pub async fn with<R>(&self, interest: Interest, mut op: impl FnMut(&T) -> io::Result<R>) -> io::Result<R> {
        poll_fn(|cx| self.poll_with(cx, interest, &mut op)).await
    }

    /// Returns when the socket may be ready.
    pub async fn ready(&self, interest: Interest) {
        poll_fn(|cx| self.reactor.poll_ready(self.key, cx, interest)).await;
    }

    /// Ready when the socket may be ready.
    pub fn poll_ready(&self, cx: &Context<'_>, interest: Interest) -> Poll<()> {
        self.reactor.poll_ready(self.key, cx, interest)
    }

    /// Calls `op` once, without waiting. Returns `WouldBlock` when the socket is not ready.
    pub fn try_with<R>(&self, interest: Interest, op: impl FnOnce(&T) -> io::Result<R>) -> io::Result<R> {
        let result = op(&self.socket);
        if result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
            self.reactor.mark_not_ready(self.key, interest, true);
        }
        result
    }

    /// Records that the socket is not ready although no operation has returned `WouldBlock`. Allowed after a short read
    /// or write, and at any time for an [`Io::read_only`] socket: its unread data is reported again.
    pub fn mark_not_ready(&self, interest: Interest) {
        self.reactor.mark_not_ready(self.key, interest, false);
    }
}

impl<T> Drop for Io<T> {
    fn drop(&mut self) {
        // epoll forgets the socket when its last descriptor is closed, which happens next.
        self.reactor.forget(self.key);
    }
}

impl<T: AsFd> AsFd for Io<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.get_ref().as_fd()
    }
}

impl Io<Socket> {
    /// Makes [`Io::poll_read`] return `bytes` before those of the socket. For bytes that were read too early.
    pub fn put_back(&self, bytes: &[u8]) {
        self.reactor.put_back.borrow_mut().entry(self.key).or_default().extend(bytes);
    }

    /// Returns whether [`Io::put_back`] has left bytes to read.
    pub fn has_put_back(&self) -> bool {
        self.reactor.put_back.borrow().contains_key(&self.key)
    }

    /// Reads from a stream. `short_read_means_empty`: a read shorter than `buf` has emptied the socket.
    pub fn poll_read(
        &self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
        short_read_means_empty: bool,
    ) -> Poll<io::Result<usize>> {
        if let Entry::Occupied(mut bytes) = self.reactor.put_back.borrow_mut().entry(self.key) {
            let n = bytes.get_mut().read(buf)?;
            if bytes.get().is_empty() {
                bytes.remove();
            }
            return Poll::Ready(Ok(n));
        }
        let n = ready!(self.poll_with(cx, Interest::Read, |mut socket| socket.read(buf)))?;
        if short_read_means_empty && (1..buf.len()).contains(&n) {
            self.mark_not_ready(Interest::Read);
        }
        Poll::Ready(Ok(n))
    }

    pub(crate) fn poll_write(&self, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let n = ready!(self.poll_with(cx, Interest::Write, |mut socket| socket.write(buf)))?;
        if n < buf.len() {
            self.mark_not_ready(Interest::Write);
        }
        Poll::Ready(Ok(n))
    }
}

/// Pause after a failed accept(2), for example when no descriptor is left.
pub const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// Accepts a pending connection as a non-blocking socket. Returns the peer's address if it is an IP address.
pub fn accept(listener: &impl AsFd) -> io::Result<(OwnedFd, Option<SocketAddr>)> {
    let (socket, peer) = acceptfrom_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC)?;
    Ok((socket, peer.and_then(|peer| SocketAddr::try_from(peer).ok())))
}
