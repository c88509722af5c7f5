//! The two-way pump over any two streams: half-close carried over, a reset carried over as a reset, exact octet counts.
//!
//! It owns no memory while a tunnel is idle: a buffer is borrowed from the thread for the length of one poll, and only
//! what the other side did not take at once is kept, at most one buffer a direction. A direction between two bare
//! sockets that proves to be bulk is spliced through a pipe (Linux), which it gives back when it goes quiet.

#[cfg_attr(not(target_os = "linux"), path = "relay/no_splice.rs")]
mod splice;

use std::cell::RefCell;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures_lite::{AsyncRead, AsyncWrite};

use crate::reactor::{Alarm, Way, wake_later};
use splice::Pipe;

/// The buffer of a thread, in octets, and so the most that a direction keeps.
const BUFFER: usize = 64 * 1024;
/// How long dst may be silent before a client that can't send to it any more is told so.
const UNSENT: Duration = Duration::from_secs(1);
/// How often a peer that is not being read from is looked at, whether it is still there; and a pipe, whether it is
/// still of use.
const LOOK: Duration = Duration::from_secs(1);
/// How many octets one direction may move before the other tunnels of the thread get their turn.
const BUDGET: usize = 1 << 20;
/// After how many full buffers in a row a direction is bulk.
const BULK: u8 = 3;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; BUFFER]);
}

/// An operation on a bare socket: octets moved, 0 at the end.
pub type BareOp<'a> = dyn FnMut(BorrowedFd<'_>) -> io::Result<usize> + 'a;

/// A stream that can be relayed. It can be cut so that its peer does not take what it got for the whole.
pub trait Stream: AsyncRead + AsyncWrite + Unpin {
    /// Makes the coming close a reset, where the stream has such a thing.
    fn abort(&self);

    /// Whether the peer has reset the stream, which reading would show, were there a use for what is read.
    fn is_reset(&self) -> bool {
        false
    }

    /// Does `op` on the socket when that may be ready. `None` when there is no socket whose octets are the stream's.
    fn poll_bare(&self, _: &mut Context<'_>, _: Way, _: &mut BareOp<'_>) -> Option<Poll<io::Result<usize>>> {
        None
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
    C: Stream,
    D: Stream,
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
struct Ends<'a, C: Stream, D: Stream> {
    client: &'a mut C,
    dst: &'a mut D,
    clean: (bool, bool),
}

impl<C: Stream, D: Stream> Drop for Ends<'_, C, D> {
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

    fn pump(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut impl Stream,
        dst: &mut impl Stream,
    ) -> Poll<Result<(), Broken>> {
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
    fn poll_limits(
        &mut self,
        cx: &mut Context<'_>,
        client: &impl Stream,
        dst: &impl Stream,
    ) -> Poll<Result<(), Broken>> {
        let mut fired = false;
        loop {
            let now = Instant::now();
            let stalled = self.up.holds();
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
                _ if self.unsent.is_some() && !self.down.holds() => Some(UNSENT),
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
            if fired {
                self.up.give_back();
                self.down.give_back();
            }
            let looks = look_at_client || look_at_dst || self.up.pipe.is_some() || self.down.pipe.is_some();
            let look = looks.then(|| now + LOOK);
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
    /// What was read and the sink has not taken yet.
    rest: Option<Box<Rest>>,
    pipe: Option<Box<Pipe>>,
    /// How many full buffers have been read in a row.
    full: u8,
    /// Whether the streams are bare sockets that the kernel can splice, as far as is known.
    splices: bool,
    ended: bool,
    done: bool,
}

struct Rest {
    octets: Vec<u8>,
    sent: usize,
}

impl<'a> Direction<'a> {
    fn new(moved: &'a AtomicU64) -> Self {
        Self { moved, rest: None, pipe: None, full: 0, splices: true, ended: false, done: false }
    }

    fn moved(&self) -> u64 {
        self.moved.load(Ordering::Relaxed)
    }

    fn took(&self, n: usize) {
        self.moved.fetch_add(n as u64, Ordering::Relaxed);
    }

    /// Whether something was read that the sink has not taken yet.
    fn holds(&self) -> bool {
        self.rest.is_some() || self.pipe.as_ref().is_some_and(|pipe| !pipe.is_empty())
    }

    /// Closes the pipe if nothing has gone through it since this was asked last.
    fn give_back(&mut self) {
        let moved = self.moved();
        if self.pipe.as_mut().is_some_and(|pipe| pipe.is_empty() && !pipe.has_moved(moved)) {
            self.pipe = None;
        }
    }

    /// Moves what can be moved now. Ready when the source has ended and the sink knows.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut impl Stream,
        sink: &mut impl Stream,
    ) -> Poll<Result<(), Fault>> {
        if self.done {
            return Poll::Ready(Ok(()));
        }
        let enough = self.moved() + BUDGET as u64;
        while self.moved() < enough {
            ready!(self.flush(cx, sink))?;
            if self.ended {
                ready!(Pin::new(sink).poll_close(cx)).map_err(Fault::Sink)?;
                self.done = true;
                return Poll::Ready(Ok(()));
            }
            ready!(if self.pipe.is_some() {
                self.fill_pipe(cx, source)
            } else {
                SCRATCH.with_borrow_mut(|buffer| self.copy(cx, source, sink, buffer))
            })?;
        }
        wake_later(cx);
        Poll::Pending
    }

    /// Passes on what was read before.
    fn flush(&mut self, cx: &mut Context<'_>, sink: &mut impl Stream) -> Poll<Result<(), Fault>> {
        while let Some(rest) = &mut self.rest {
            let octets = rest.octets.get(rest.sent..).unwrap_or_default();
            if octets.is_empty() {
                self.rest = None;
                break;
            }
            let n = ready!(Pin::new(&mut *sink).poll_write(cx, octets)).and_then(not_zero).map_err(Fault::Sink)?;
            rest.sent += n;
            self.took(n);
        }
        while let Some(pipe) = self.pipe.as_mut().filter(|pipe| !pipe.is_empty()) {
            match sink.poll_bare(cx, Way::Write, &mut |socket| pipe.write_to(socket)) {
                Some(Poll::Pending) => return Poll::Pending,
                Some(Poll::Ready(Ok(n))) => {
                    not_zero(n).map_err(Fault::Sink)?;
                    self.took(n);
                }
                Some(Poll::Ready(Err(error))) if !splice::is_refusal(&error) => {
                    return Poll::Ready(Err(Fault::Sink(error)));
                }
                Some(Poll::Ready(Err(_))) | None => {
                    let octets = pipe.empty().map_err(Fault::Source)?;
                    self.rest = Some(Box::new(Rest { octets, sent: 0 }));
                    self.refuse();
                    return self.flush(cx, sink);
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    /// From now on this direction is copied. What is in the pipe has been taken out.
    fn refuse(&mut self) {
        self.pipe = None;
        self.splices = false;
    }

    fn fill_pipe(&mut self, cx: &mut Context<'_>, source: &impl Stream) -> Poll<Result<(), Fault>> {
        let Some(pipe) = &mut self.pipe else { return Poll::Ready(Ok(())) };
        match source.poll_bare(cx, Way::Read, &mut |socket| pipe.read_from(socket)) {
            Some(Poll::Pending) => return Poll::Pending,
            Some(Poll::Ready(Ok(0))) => self.ended = true,
            Some(Poll::Ready(Ok(_))) => {}
            Some(Poll::Ready(Err(error))) if !splice::is_refusal(&error) => {
                return Poll::Ready(Err(Fault::Source(error)));
            }
            Some(Poll::Ready(Err(_))) | None => self.refuse(),
        }
        Poll::Ready(Ok(()))
    }

    /// One read, and one write of what it gave; what is left is kept.
    fn copy(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut impl Stream,
        sink: &mut impl Stream,
        buffer: &mut [u8],
    ) -> Poll<Result<(), Fault>> {
        let n = ready!(Pin::new(source).poll_read(cx, buffer)).map_err(Fault::Source)?;
        let Some(octets @ [_, ..]) = buffer.get(..n) else {
            self.ended = true;
            return Poll::Ready(Ok(()));
        };
        let sent = match Pin::new(sink).poll_write(cx, octets) {
            Poll::Ready(sent) => sent.and_then(not_zero).map_err(Fault::Sink)?,
            Poll::Pending => 0,
        };
        self.took(sent);
        if let Some(octets @ [_, ..]) = octets.get(sent..) {
            self.rest = Some(Box::new(Rest { octets: octets.to_vec(), sent: 0 }));
        }
        self.full = if n == buffer.len() { self.full.saturating_add(1) } else { 0 };
        if self.full >= BULK && self.splices {
            self.full = 0;
            // Without a descriptor or memory to spare for it, copying has to do.
            self.pipe = Pipe::open(self.moved()).ok().map(Box::new);
        }
        Poll::Ready(Ok(()))
    }
}

fn not_zero(n: usize) -> io::Result<usize> {
    if n == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(n) }
}
