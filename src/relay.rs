//! The two-way pump over any two streams: half-close carried over, a reset carried over as a reset, exact octet counts.
//!
//! It owns no memory while a tunnel is idle: a buffer is borrowed from the thread for the length of one poll, and only
//! what the other side did not take at once is kept, at most one buffer a direction.

use std::cell::RefCell;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures_lite::{AsyncRead, AsyncWrite};

use crate::alarm::Alarm;

/// The buffer of a thread, in octets, and so the most that a direction keeps.
const BUFFER: usize = 64 * 1024;
/// How long dst may be silent before a client that can't send to it any more is told so.
const UNSENT: Duration = Duration::from_secs(1);
/// How often a peer that is not being read from is looked at, whether it is still there.
const LOOK: Duration = Duration::from_secs(1);
/// How many buffers one direction may move before the other tunnels of the thread get their turn.
const BUDGET: usize = 16;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; BUFFER]);
}

/// A stream that can be cut so that its peer does not take what it got for the whole.
pub trait Abort {
    /// Makes the coming close a reset, where the stream has such a thing.
    fn abort(&self);

    /// Whether the peer has reset the stream, which reading would show, were there a use for what is read.
    fn is_reset(&self) -> bool {
        false
    }
}

/// Octets moved so far; readable while the relay runs.
#[derive(Debug, Default)]
pub struct Moved {
    /// From client to dst.
    pub up: AtomicU64,
    /// From dst to client.
    pub down: AtomicU64,
}

/// When a relay ends although not both sides have.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// After this long without an octet either way.
    pub idle: Option<Duration>,
    /// When `down` has ended: after the client side has given nothing for this long. What it has given is still sent,
    /// however long dst takes. None: `up` may take as long as it likes.
    pub linger: Option<Duration>,
}

/// Where a relay broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Reading from the client side.
    ReadClient,
    /// Writing to the client side.
    WriteClient,
    /// Reading from the dst side.
    ReadDst,
    /// Writing to the dst side.
    WriteDst,
}

/// Why a relay ended before both sides did.
#[derive(Debug)]
pub enum Broken {
    /// An operation failed. Both sides have been reset.
    Io(Place, io::Error),
    /// [`Limits::idle`] passed. Both sides have been reset.
    Idle,
    /// dst has said all that it has to say, and takes no more. It has been reset; the client has not, and has yet to
    /// be drained if it is to receive the last of what it was sent.
    Unsent(io::Error),
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (place, error) = match self {
            Self::Idle => return f.write_str("idle for too long"),
            Self::Io(Place::ReadClient, error) => ("reading from the client", error),
            Self::Io(Place::WriteClient, error) => ("writing to the client", error),
            Self::Io(Place::ReadDst, error) => ("reading from dst", error),
            Self::Io(Place::WriteDst, error) | Self::Unsent(error) => ("writing to dst", error),
        };
        write!(f, "{place}: {error}")
    }
}

/// Moves octets both ways until both directions have ended. A direction ends when its source does, which is passed on
/// by closing its sink's write side.
///
/// Both streams are reset when an operation on either fails, when the idle limit ends the tunnel, and when the future
/// is dropped while it runs. A reset is noticed within a second also from a side that is not being read from.
///
/// # Errors
/// As [`Broken`] says.
pub async fn relay<C, D>(client: &mut C, dst: &mut D, limits: Limits, moved: &Moved) -> Result<(), Broken>
where
    C: AsyncRead + AsyncWrite + Abort + Unpin,
    D: AsyncRead + AsyncWrite + Abort + Unpin,
{
    let mut ends = Ends { client, dst, clean: (false, false) };
    let mut tunnel = Tunnel {
        up: Direction::new(&moved.up),
        down: Direction::new(&moved.down),
        unsent: None,
        limits,
        last: Instant::now(),
        alarm: Alarm::default(),
    };
    let result = poll_fn(|cx| {
        let before = tunnel.progress();
        if let Poll::Ready(result) = tunnel.pump(cx, ends.client, ends.dst) {
            return Poll::Ready(result);
        }
        if tunnel.progress() != before {
            tunnel.last = Instant::now();
        }
        tunnel.poll_limits(cx, ends.client, ends.dst)
    });
    let result = result.await;
    ends.clean = (matches!(result, Ok(()) | Err(Broken::Unsent(_))), result.is_ok());
    result
}

/// The streams. What has not ended well is left reset.
struct Ends<'a, C: Abort, D: Abort> {
    client: &'a mut C,
    dst: &'a mut D,
    clean: (bool, bool),
}

impl<C: Abort, D: Abort> Drop for Ends<'_, C, D> {
    fn drop(&mut self) {
        if !self.clean.0 {
            self.client.abort();
        }
        if !self.clean.1 {
            self.dst.abort();
        }
    }
}

struct Tunnel<'a> {
    up: Direction<'a>,
    down: Direction<'a>,
    /// Why the rest of `up` can't be sent; the tunnel ends with it when `down` has.
    unsent: Option<io::Error>,
    limits: Limits,
    /// When an octet moved last.
    last: Instant,
    alarm: Alarm,
}

impl Tunnel<'_> {
    fn progress(&self) -> (u64, u64, bool, bool) {
        (self.up.moved(), self.down.moved(), self.up.done, self.down.done)
    }

    fn pump<C, D>(&mut self, cx: &mut Context<'_>, client: &mut C, dst: &mut D) -> Poll<Result<(), Broken>>
    where
        C: AsyncRead + AsyncWrite + Unpin,
        D: AsyncRead + AsyncWrite + Unpin,
    {
        match self.up.poll(cx, client, dst) {
            Poll::Ready(Err(Fault::Source(error))) => return broken(Place::ReadClient, error),
            // What dst sent before it stopped listening is still on its way to the client.
            Poll::Ready(Err(Fault::Sink(error))) => {
                self.up.done = true;
                self.unsent = Some(error);
            }
            Poll::Ready(Ok(())) | Poll::Pending => {}
        }
        match self.down.poll(cx, dst, client) {
            Poll::Ready(Err(Fault::Source(_))) if self.unsent.is_some() => self.down.done = true,
            Poll::Ready(Err(Fault::Source(error))) => return broken(Place::ReadDst, error),
            Poll::Ready(Err(Fault::Sink(error))) => return broken(Place::WriteClient, error),
            Poll::Ready(Ok(())) | Poll::Pending => {}
        }
        if self.up.done && self.down.done {
            return Poll::Ready(self.unsent.take().map_or(Ok(()), |error| Err(self.cut_short(error))));
        }
        Poll::Pending
    }

    /// How the tunnel ends when dst takes no more.
    fn cut_short(&self, error: io::Error) -> Broken {
        if self.down.ended && self.down.done { Broken::Unsent(error) } else { Broken::Io(Place::WriteDst, error) }
    }

    /// Ready when the tunnel has been silent for too long, or one side has given it up.
    fn poll_limits(&mut self, cx: &mut Context<'_>, client: &impl Abort, dst: &impl Abort) -> Poll<Result<(), Broken>> {
        let mut fired = false;
        loop {
            let now = Instant::now();
            let stalled = !self.up.rest.is_empty();
            // Who is not being read from can only be seen to be gone by looking, which is done now and then.
            let (look_at_client, look_at_dst) = (stalled || self.up.ended, self.down.done);
            if fired && look_at_client && client.is_reset() {
                return broken(Place::ReadClient, io::ErrorKind::ConnectionReset.into());
            }
            if fired && look_at_dst && dst.is_reset() {
                let error = self.unsent.take().unwrap_or(io::ErrorKind::ConnectionReset.into());
                return Poll::Ready(Err(self.cut_short(error)));
            }
            let lingers = self.down.done && !stalled && !self.up.ended;
            let limit = match self.limits {
                _ if self.unsent.is_some() && self.down.rest.is_empty() => Some(UNSENT),
                Limits { linger: Some(linger), .. } if lingers => Some(linger),
                Limits { idle, .. } => idle,
            };
            let due = limit.map(|limit| self.last + limit);
            if due.is_some_and(|due| now >= due) {
                return Poll::Ready(match self.unsent.take() {
                    Some(error) => Err(self.cut_short(error)),
                    None if lingers && self.limits.linger.is_some() => Ok(()),
                    None => Err(Broken::Idle),
                });
            }
            let look = (look_at_client || look_at_dst).then(|| now + LOOK);
            let Some(wake) = due.into_iter().chain(look).min() else { return Poll::Pending };
            ready!(self.alarm.poll(cx, wake));
            fired = true;
        }
    }
}

fn broken(place: Place, error: io::Error) -> Poll<Result<(), Broken>> {
    Poll::Ready(Err(Broken::Io(place, error)))
}

/// Which end of a direction failed.
enum Fault {
    Source(io::Error),
    Sink(io::Error),
}

/// One direction of a tunnel.
struct Direction<'a> {
    moved: &'a AtomicU64,
    /// What the sink has not taken yet, from `sent` on.
    rest: Vec<u8>,
    sent: usize,
    ended: bool,
    done: bool,
}

impl<'a> Direction<'a> {
    fn new(moved: &'a AtomicU64) -> Self {
        Self { moved, rest: Vec::new(), sent: 0, ended: false, done: false }
    }

    fn moved(&self) -> u64 {
        self.moved.load(Ordering::Relaxed)
    }

    fn took(&self, n: usize) {
        self.moved.fetch_add(n as u64, Ordering::Relaxed);
    }

    /// Moves what can be moved now. Ready when the source has ended and the sink knows.
    fn poll<S, T>(&mut self, cx: &mut Context<'_>, source: &mut S, sink: &mut T) -> Poll<Result<(), Fault>>
    where
        S: AsyncRead + Unpin,
        T: AsyncWrite + Unpin,
    {
        let (mut source, mut sink) = (Pin::new(source), Pin::new(sink));
        if self.done {
            return Poll::Ready(Ok(()));
        }
        for _ in 0..BUDGET {
            while let Some(rest @ [_, ..]) = self.rest.get(self.sent..) {
                let n = ready!(sink.as_mut().poll_write(cx, rest)).and_then(not_zero).map_err(Fault::Sink)?;
                self.sent += n;
                self.took(n);
            }
            self.rest = Vec::new();
            if self.ended {
                ready!(sink.poll_close(cx)).map_err(Fault::Sink)?;
                self.done = true;
                return Poll::Ready(Ok(()));
            }
            let step = SCRATCH.with_borrow_mut(|buffer| self.step(cx, source.as_mut(), sink.as_mut(), buffer));
            ready!(step)?;
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// One read, and one write of what it gave; what is left is kept.
    fn step<S: AsyncRead, T: AsyncWrite>(
        &mut self,
        cx: &mut Context<'_>,
        source: Pin<&mut S>,
        sink: Pin<&mut T>,
        buffer: &mut [u8],
    ) -> Poll<Result<(), Fault>> {
        let n = ready!(source.poll_read(cx, buffer)).map_err(Fault::Source)?;
        let Some(octets @ [_, ..]) = buffer.get(..n) else {
            self.ended = true;
            return Poll::Ready(Ok(()));
        };
        let sent = match sink.poll_write(cx, octets) {
            Poll::Ready(sent) => sent.and_then(not_zero).map_err(Fault::Sink)?,
            Poll::Pending => 0,
        };
        self.took(sent);
        self.rest = octets.get(sent..).unwrap_or_default().to_vec();
        self.sent = 0;
        Poll::Ready(Ok(()))
    }
}

fn not_zero(n: usize) -> io::Result<usize> {
    if n == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(n) }
}
