//! Where futures wait for sockets and for the time.
//!
//! A thread inside of [`run`] on Linux has a reactor of its own: epoll-triggered epoll. There a socket is registered
//! once for its life, waiting for it costs no system call, and it is tried only when there may be something to be had.
//! Everywhere else the same types wait by way of async-io: in tests, and on other systems.

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

/// Runs `future` to its end on this thread. On Linux everything that is made in here waits on the thread's own reactor.
///
/// # Errors
/// The descriptors that a reactor needs could not be had, or waiting failed for good.
pub fn run<F: Future>(future: F) -> io::Result<F::Output> {
    #[cfg(target_os = "linux")]
    return epoll::run(future);
    #[cfg(not(target_os = "linux"))]
    return Ok(smol::block_on(future));
}

/// Wakes the task once the sockets have been looked at again: for one that could go on at once, and must let the
/// others have their turn.
pub fn wake_later(cx: &Context<'_>) {
    #[cfg(target_os = "linux")]
    if epoll::wake_later(cx) {
        return;
    }
    cx.waker().wake_by_ref();
}

/// Has the reactor of this thread show how many sockets it has, from now on; without one, nothing is shown.
pub fn publish_socket_count(count: Arc<AtomicUsize>) {
    #[cfg(target_os = "linux")]
    if let Some(reactor) = epoll::current() {
        reactor.publish_socket_count(count);
    }
    #[cfg(not(target_os = "linux"))]
    drop(count);
}

/// Wakes every task that waits for a socket on this thread: for when something has changed that is no event. Without a
/// reactor, each hears of it when it wakes for something else.
pub fn wake_all() {
    #[cfg(target_os = "linux")]
    if let Some(reactor) = epoll::current() {
        reactor.wake_all();
    }
}

/// Lets the others have their turn, once.
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

/// What a future waits for on a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Something to read, to accept, or an end.
    Read,
    /// Room to write, or the end of a connect.
    Write,
}

/// What a socket is waited for, as long as it lives.
#[derive(Clone, Copy, Debug)]
enum EventSet {
    ReadWrite,
    Read,
    /// To read, by several threads.
    SharedRead,
}

/// A non-blocking socket that can be waited for. Bound to the thread that made it.
#[derive(Debug)]
pub struct Io<T>(Backend<T>);

#[derive(Debug)]
enum Backend<T> {
    #[cfg(target_os = "linux")]
    Epoll(epoll::Registration<T>),
    AsyncIo(Arc<Async<T>>),
}

impl<T: AsFd> Io<T> {
    /// Of a socket that is non-blocking already.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub fn new(socket: T) -> io::Result<Self> {
        Self::register(socket, EventSet::ReadWrite)
    }

    /// Of a non-blocking listener for which several threads wait: a connection wakes one of those that are idle.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub fn shared_listener(listener: T) -> io::Result<Self> {
        Self::register(listener, EventSet::SharedRead)
    }

    /// Of a non-blocking socket that is only waited for to read, and has to be read whenever there is something. Room
    /// to write would be an event for each datagram that has left. After [`Io::mark_drained`] it says itself whether there
    /// is more.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
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

    /// Ends all waiting for the socket, which lives on under another descriptor. To be dropped then.
    pub fn deregister(&self) {
        #[cfg(target_os = "linux")]
        if let Backend::Epoll(registration) = &self.0 {
            registration.deregister();
        }
    }

    /// The socket itself.
    pub fn get_ref(&self) -> &T {
        match &self.0 {
            #[cfg(target_os = "linux")]
            Backend::Epoll(registration) => registration.get_ref(),
            Backend::AsyncIo(socket) => (**socket).get_ref(),
        }
    }

    /// Does `op` when the socket may be ready, as often as it takes: `op` says `WouldBlock` when it was not.
    ///
    /// One task at a time may wait for a socket.
    ///
    /// # Errors
    /// Those of `op`, but for `WouldBlock` and `Interrupted`.
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

    /// As [`Io::poll_with`].
    ///
    /// # Errors
    /// Those of `op`, but for `WouldBlock` and `Interrupted`.
    pub async fn with<R>(&self, interest: Interest, mut op: impl FnMut(&T) -> io::Result<R>) -> io::Result<R> {
        poll_fn(|cx| self.poll_with(cx, interest, &mut op)).await
    }

    /// Returns when the socket may be ready.
    ///
    /// # Errors
    /// Those of the reactor.
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

    /// Ready when there is an end, an error or an urgent octet, maybe behind something to be read; or when that can't be
    /// told without looking.
    pub fn poll_hangup(&self, cx: &mut Context<'_>) -> Poll<()> {
        match &self.0 {
            #[cfg(target_os = "linux")]
            Backend::Epoll(registration) => registration.poll_hangup(cx),
            Backend::AsyncIo(_) => Poll::Ready(()),
        }
    }

    /// Does `op` once, without waiting.
    ///
    /// # Errors
    /// Those of `op`; `WouldBlock`, when the socket was not ready after all.
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

    /// The socket is known to have nothing more for now, although no operation has said so; or is an [`Io::read_only`].
    pub fn mark_drained(&self, interest: Interest) {
        #[cfg(target_os = "linux")]
        if let Backend::Epoll(registration) = &self.0 {
            registration.mark_drained(interest);
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
    /// Whether a read that gives less than there was room for has taken all that there is. Not so on Unix sockets,
    /// where what was sent together with descriptors is read by itself.
    const SHORT_READ_MEANS_DRAINED: bool;
}

impl StreamSocket for TcpStream {
    const SHORT_READ_MEANS_DRAINED: bool = true;
}

impl StreamSocket for UnixStream {
    const SHORT_READ_MEANS_DRAINED: bool = false;
}

impl<T: StreamSocket> AsyncRead for Io<T>
where
    for<'a> &'a T: Read,
{
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let n = ready!(self.poll_with(cx, Interest::Read, |mut socket| socket.read(buf)))?;
        if T::SHORT_READ_MEANS_DRAINED && (1..buf.len()).contains(&n) {
            self.mark_drained(Interest::Read);
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
            self.mark_drained(Interest::Write);
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

/// A timer for whoever keeps moving its deadline: it is not set anew when the deadline moves away, only when it comes
/// nearer, and fires too early instead. So an octet that moves costs no timer. One task at a time polls it.
#[derive(Debug, Default)]
pub struct IdleTimer(Option<ArmedTimer>);

/// What an alarm is set to. Small, since an idle tunnel holds one.
#[derive(Debug)]
enum ArmedTimer {
    #[cfg(target_os = "linux")]
    Epoll(epoll::Timer),
    AsyncIo(Box<(smol::Timer, Instant)>),
}

impl IdleTimer {
    /// Ready at `due`, or at an earlier deadline that it was set to before: look at the clock, and poll again.
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

/// Accepts a connection that is there already, non-blocking: itself, and where it came from when that is an address.
///
/// # Errors
/// Those of accept(2).
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
    // What lies behind the end of the clock never comes.
    match Instant::now().checked_add(time) {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}
