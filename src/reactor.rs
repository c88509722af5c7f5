//! The event loop: sockets and timers.
//!
//! On Linux, each thread inside [`run`] has its own edge-triggered epoll instance. A socket is registered once for its
//! lifetime, waiting for it costs no system call, and it is read or written only when it may be ready.
//! Outside [`run`] (in tests) and on other systems the same types use async-io.

mod connect;
#[cfg(target_os = "linux")]
mod epoll;

use std::future::{Future, poll_fn};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures_lite::{AsyncRead, AsyncWrite};
use smol::Async;

pub use connect::ConnectError;

/// Runs `future` to completion on this thread. On Linux, sockets and timers that it creates use this thread's reactor.
///
/// # Errors
/// The reactor's descriptors cannot be opened, or epoll_wait(2) fails.
pub fn run<F: Future>(future: F) -> io::Result<F::Output> {
    #[cfg(target_os = "linux")]
    return epoll::run(future);
    #[cfg(not(target_os = "linux"))]
    return Ok(smol::block_on(future));
}

/// Wakes the task when the other tasks of this thread have run. For a task that has more work but must take turns.
pub fn wake_later(cx: &Context<'_>) {
    #[cfg(target_os = "linux")]
    if epoll::wake_later(cx) {
        return;
    }
    cx.waker().wake_by_ref();
}

/// Makes this thread's reactor store its number of sockets in `count` whenever it waits. No-op without a reactor.
pub fn publish_socket_count(count: Arc<AtomicUsize>) {
    #[cfg(target_os = "linux")]
    if let Some(reactor) = epoll::current() {
        reactor.publish_socket_count(count);
    }
    #[cfg(not(target_os = "linux"))]
    drop(count);
}

/// Wakes every task of this thread that waits for a socket, so that it notices another change, such as a reload. No-op
/// without a reactor.
pub fn wake_all() {
    #[cfg(target_os = "linux")]
    if let Some(reactor) = epoll::current() {
        reactor.wake_all();
    }
}

/// Lets the other tasks of this thread run once.
pub async fn yield_now() {
    let mut has_yielded = false;
    poll_fn(|cx| {
        if has_yielded {
            return Poll::Ready(());
        }
        has_yielded = true;
        wake_later(cx);
        Poll::Pending
    })
    .await;
}

/// Readiness that a future waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Data, a connection to accept, or the end of the stream.
    Read,
    /// Buffer space, or the end of a connect.
    Write,
}

/// Events that a socket is registered for during its lifetime.
#[derive(Clone, Copy, Debug)]
enum EventSet {
    ReadWrite,
    Read,
    /// For a listener that several threads wait for: each event wakes one of them.
    SharedRead,
}

/// A non-blocking socket registered with the reactor of the thread that created it. One task at a time may wait for it.
#[derive(Debug)]
pub struct Io<T>(Backend<T>);

#[derive(Debug)]
enum Backend<T> {
    #[cfg(target_os = "linux")]
    Epoll(epoll::Registration<T>),
    AsyncIo(Arc<Async<T>>),
}

impl<T: AsFd> Io<T> {
    /// Registers a socket that is already non-blocking.
    pub fn new(socket: T) -> io::Result<Self> {
        Self::register(socket, EventSet::ReadWrite)
    }

    /// Registers a non-blocking listener that several threads wait for: a connection wakes one of the idle threads.
    pub fn shared_listener(listener: T) -> io::Result<Self> {
        Self::register(listener, EventSet::SharedRead)
    }

    /// Registers a non-blocking UDP socket for reading only: otherwise each datagram sent would cause a write event.
    /// Level-triggered: unread data wakes the event loop again and again, so keep reading while there is data.
    pub fn read_only(socket: T) -> io::Result<Self> {
        Self::register(socket, EventSet::Read)
    }

    fn register(socket: T, events: EventSet) -> io::Result<Self> {
        #[cfg(target_os = "linux")]
        if let Some(reactor) = epoll::current() {
            return reactor.register(socket, events).map(|registration| Self(Backend::Epoll(registration)));
        }
        #[cfg(not(target_os = "linux"))]
        let _ = events;
        Ok(Self(Backend::AsyncIo(Arc::new(Async::new_nonblocking(socket)?))))
    }

    /// Removes the socket from the reactor, because it continues under another descriptor. Then drop `self`.
    pub fn deregister(&self) {
        #[cfg(target_os = "linux")]
        if let Backend::Epoll(registration) = &self.0 {
            registration.deregister();
        }
    }

    /// Returns the socket.
    pub fn get_ref(&self) -> &T {
        match &self.0 {
            #[cfg(target_os = "linux")]
            Backend::Epoll(registration) => registration.get_ref(),
            Backend::AsyncIo(socket) => (**socket).get_ref(),
        }
    }

    /// Calls `op` whenever the socket may be ready, until `op` returns something other than `WouldBlock`.
    pub fn poll_with<R>(
        &self,
        cx: &mut Context<'_>,
        interest: Interest,
        mut op: impl FnMut(&T) -> io::Result<R>,
    ) -> Poll<io::Result<R>> {
        loop {
            #[cfg(target_os = "linux")]
            if let Backend::Epoll(registration) = &self.0 {
                ready!(registration.poll_ready(cx, interest));
            }
            match op(self.get_ref()) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return Poll::Ready(done),
            }
            match &self.0 {
                #[cfg(target_os = "linux")]
                Backend::Epoll(registration) => registration.mark_would_block(interest),
                Backend::AsyncIo(socket) => match interest {
                    Interest::Read => ready!(socket.poll_readable(cx))?,
                    Interest::Write => ready!(socket.poll_writable(cx))?,
                },
            }
        }
    }

    /// Async version of [`Io::poll_with`].
    pub async fn with<R>(&self, interest: Interest, mut op: impl FnMut(&T) -> io::Result<R>) -> io::Result<R> {
        poll_fn(|cx| self.poll_with(cx, interest, &mut op)).await
    }

    /// Returns when the socket may be ready.
    pub async fn ready(&self, interest: Interest) -> io::Result<()> {
        match &self.0 {
            #[cfg(target_os = "linux")]
            Backend::Epoll(registration) => {
                poll_fn(|cx| registration.poll_ready(cx, interest)).await;
                Ok(())
            }
            Backend::AsyncIo(socket) if interest == Interest::Read => socket.readable().await,
            Backend::AsyncIo(socket) => socket.writable().await,
        }
    }

    /// Ready after a FIN, a reset, an error or urgent data, possibly with unread data before it. Without a reactor
    /// always ready, since only a read can detect these.
    pub fn poll_hangup(&self, cx: &mut Context<'_>) -> Poll<()> {
        match &self.0 {
            #[cfg(target_os = "linux")]
            Backend::Epoll(registration) => registration.poll_hangup(cx),
            Backend::AsyncIo(_) => Poll::Ready(()),
        }
    }

    /// Calls `op` once, without waiting.
    ///
    /// # Errors
    /// Errors from `op`, including `WouldBlock` when the socket is not ready.
    pub fn try_with<R>(&self, interest: Interest, op: impl FnOnce(&T) -> io::Result<R>) -> io::Result<R> {
        let result = op(self.get_ref());
        #[cfg(target_os = "linux")]
        if let (Backend::Epoll(registration), Err(error)) = (&self.0, &result)
            && error.kind() == io::ErrorKind::WouldBlock
        {
            registration.mark_would_block(interest);
        }
        #[cfg(not(target_os = "linux"))]
        let _ = interest;
        result
    }

    /// Records that the socket is not ready although no operation has returned `WouldBlock`: after a short read or
    /// write, or at any time for an [`Io::read_only`] socket, whose unread data is reported again.
    pub fn mark_not_ready(&self, interest: Interest) {
        #[cfg(target_os = "linux")]
        if let Backend::Epoll(registration) = &self.0 {
            registration.mark_not_ready(interest);
        }
        #[cfg(not(target_os = "linux"))]
        let _ = interest;
    }
}

impl<T> From<Arc<Async<T>>> for Io<T> {
    fn from(socket: Arc<Async<T>>) -> Self {
        Self(Backend::AsyncIo(socket))
    }
}

impl<T: AsFd> AsFd for Io<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.get_ref().as_fd()
    }
}

/// A connected stream socket.
pub trait StreamSocket: AsFd {
    /// Set if a read shorter than the buffer means that the socket is empty. Not so for Unix sockets: a read ends early
    /// at data that was sent together with descriptors.
    const SHORT_READ_MEANS_EMPTY: bool;
}

impl StreamSocket for TcpStream {
    const SHORT_READ_MEANS_EMPTY: bool = true;
}

impl StreamSocket for UnixStream {
    const SHORT_READ_MEANS_EMPTY: bool = false;
}

impl<T: StreamSocket> AsyncRead for Io<T>
where
    for<'a> &'a T: Read,
{
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let n = ready!(self.poll_with(cx, Interest::Read, |mut socket| socket.read(buf)))?;
        if T::SHORT_READ_MEANS_EMPTY && (1..buf.len()).contains(&n) {
            self.mark_not_ready(Interest::Read);
        }
        Poll::Ready(Ok(n))
    }
}

impl<T: StreamSocket> AsyncWrite for Io<T>
where
    for<'a> &'a T: Write,
{
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let n = ready!(self.poll_with(cx, Interest::Write, |mut socket| socket.write(buf)))?;
        if n < buf.len() {
            self.mark_not_ready(Interest::Write);
        }
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(rustix::net::shutdown(self.get_ref(), rustix::net::Shutdown::Write).map_err(Into::into))
    }
}

/// A timer for a deadline that is often postponed, such as an idle timeout. A later deadline does not re-arm it, so
/// relaying costs no timer operation; it fires early instead. One task at a time may poll it.
#[derive(Debug, Default)]
pub struct IdleTimer(Option<ArmedTimer>);

/// A timer that is set. Small, since each idle tunnel has one.
#[derive(Debug)]
enum ArmedTimer {
    #[cfg(target_os = "linux")]
    Epoll(epoll::Timer),
    AsyncIo(Box<(smol::Timer, Instant)>),
}

impl IdleTimer {
    /// Ready at `due`, or at an earlier deadline from a previous call, so check the clock and poll again.
    pub fn poll(&mut self, cx: &mut Context<'_>, due: Instant) -> Poll<()> {
        if self.0.as_ref().is_none_or(|timer| timer.is_after(due)) {
            self.0 = Some(ArmedTimer::new(cx, due));
        }
        match &mut self.0 {
            #[cfg(target_os = "linux")]
            Some(ArmedTimer::Epoll(timer)) => ready!(timer.poll()),
            Some(ArmedTimer::AsyncIo(timer)) => drop(ready!(Pin::new(&mut timer.0).poll(cx))),
            None => {}
        }
        self.0 = None;
        Poll::Ready(())
    }
}

impl ArmedTimer {
    fn new(cx: &Context<'_>, due: Instant) -> Self {
        #[cfg(target_os = "linux")]
        if let Some(reactor) = epoll::current() {
            return Self::Epoll(reactor.timer(cx, due));
        }
        let _ = cx;
        Self::AsyncIo(Box::new((smol::Timer::at(due), due)))
    }

    fn is_after(&self, due: Instant) -> bool {
        match self {
            #[cfg(target_os = "linux")]
            Self::Epoll(timer) => timer.is_after(due),
            Self::AsyncIo(timer) => timer.1 > due,
        }
    }
}

/// Pause after a failed accept(2), for example when no descriptor is left.
pub const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// Accepts a pending connection as a non-blocking socket. Returns the peer's address if it is an IP address.
///
/// # Errors
/// Errors from accept(2).
pub fn accept(listener: &impl AsFd) -> io::Result<(OwnedFd, Option<SocketAddr>)> {
    #[cfg(target_os = "linux")]
    let (socket, peer) = {
        use rustix::net::{SocketFlags, acceptfrom_with};
        acceptfrom_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC)?
    };
    #[cfg(not(target_os = "linux"))]
    let (socket, peer) = {
        let (socket, peer) = rustix::net::acceptfrom(listener)?;
        rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC)?;
        rustix::io::ioctl_fionbio(&socket, true)?;
        (socket, peer)
    };
    Ok((socket, peer.and_then(|peer| SocketAddr::try_from(peer).ok())))
}

/// Returns at `due`.
pub async fn sleep_until(due: Instant) {
    let mut timer = IdleTimer::default();
    poll_fn(|cx| timer.poll(cx, due)).await;
}

/// Returns after `time`.
pub async fn sleep(time: Duration) {
    // A time that `Instant` cannot represent is never reached.
    match Instant::now().checked_add(time) {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}
