//! The two-way pump over any two streams: half-close carried over, a reset carried over as a reset, exact octet counts.
//!
//! It owns no memory while a tunnel is idle: a buffer is borrowed from the thread for the length of one poll, and only
//! what the other side did not take at once is kept, at most one buffer a direction. A direction between two bare
//! sockets that proves to be bulk is spliced through a pipe (Linux), which it gives back when it goes quiet.

mod direction;
#[cfg_attr(not(target_os = "linux"), path = "relay/no_splice.rs")]
mod splice;

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures_lite::{AsyncRead, AsyncWrite};

use crate::reactor::{IdleTimer, Interest, wake_later};
use direction::{Direction, Fault};

/// How long dst may be silent before a client that can't send to it any more is told so.
const UNSENT: Duration = Duration::from_secs(1);
/// How often a peer that is not being read from is looked at, whether it is still there; and a pipe, whether it is
/// still of use.
const LOOK: Duration = Duration::from_secs(1);
/// An operation on a bare socket: octets moved, 0 at the end.
pub type BareOp<'a> = dyn FnMut(BorrowedFd<'_>) -> io::Result<usize> + 'a;

/// A stream that can be relayed. It can be cut so that its peer does not take what it got for the whole.
pub trait Stream: AsyncRead + AsyncWrite + Unpin {
    /// Makes the coming close a reset, where the stream has such a thing.
    fn abort(&self);

    /// Whether octets that it has taken have yet to be flushed.
    fn has_unsent(&self) -> bool {
        false
    }

    /// Whether the peer has reset the stream, which reading would show, were there a use for what is read.
    fn is_reset(&self) -> bool {
        false
    }

    /// Does `op` on the socket when that may be ready. `None` when there is no socket whose octets are the stream's.
    fn poll_bare(&self, _: &mut Context<'_>, _: Interest, _: &mut BareOp<'_>) -> Option<Poll<io::Result<usize>>> {
        None
    }
}

/// Any stream, for those who need no code of their own for theirs.
impl Stream for &mut dyn Stream {
    fn abort(&self) {
        (**self).abort();
    }

    fn has_unsent(&self) -> bool {
        (**self).has_unsent()
    }

    fn is_reset(&self) -> bool {
        (**self).is_reset()
    }

    fn poll_bare(
        &self,
        cx: &mut Context<'_>,
        interest: Interest,
        op: &mut BareOp<'_>,
    ) -> Option<Poll<io::Result<usize>>> {
        (**self).poll_bare(cx, interest, op)
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
    /// When a direction proves to be bulk, both are open and nothing is held: so that it can be taken up elsewhere.
    pub until_bulk: bool,
}

/// How a relay ended when nothing was wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Both directions have ended.
    Over,
    /// As [`Limits::until_bulk`] says. The streams are as they were.
    Bulk,
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
    /// The caller did not let it go on. Both sides have been reset.
    Cut,
    /// dst has said all that it has to say, and takes no more. It has been reset; the client has not, and has yet to
    /// be drained if it is to receive the last of what it was sent.
    Unsent(io::Error),
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (place, error) = match self {
            Self::Idle => return f.write_str("idle for too long"),
            Self::Cut => return f.write_str("cut"),
            Self::Io(Place::ReadClient, error) => ("reading from the client", error),
            Self::Io(Place::WriteClient, error) => ("writing to the client", error),
            Self::Io(Place::ReadDst, error) => ("reading from dst", error),
            Self::Io(Place::WriteDst, error) | Self::Unsent(error) => ("writing to dst", error),
        };
        write!(f, "{place}: {error}")
    }
}

/// Moves octets both ways until both directions have ended. A direction ends when its source does, which is passed on
/// by closing its sink's write side. Before each step `may_go_on` is asked.
///
/// Both streams are reset when an operation on either fails, when the idle limit ends the tunnel, and when the future
/// is dropped while it runs. A reset is noticed within a second also from a side that is not being read from.
///
/// # Errors
/// As [`Broken`] says.
pub fn relay<'a, C, D>(
    client: &'a mut C,
    dst: &'a mut D,
    limits: &'a Limits,
    moved: &'a Moved,
    may_go_on: impl Fn(&C, &D) -> bool + 'a,
) -> impl Future<Output = Result<End, Broken>>
where
    C: Stream,
    D: Stream,
{
    let mut ends = Ends { client: Some(client), dst: Some(dst) };
    let mut tunnel = Tunnel {
        up: Direction::default(),
        down: Direction::default(),
        moved,
        unsent: None,
        limits,
        last: Instant::now(),
        timer: IdleTimer::default(),
    };
    // Not an async fn, which would have room for its arguments twice; there may be many thousands of these.
    poll_fn(move |cx| {
        let Ends { client: Some(client), dst: Some(dst) } = &mut ends else { return Poll::Pending };
        if !may_go_on(client, dst) {
            return Poll::Ready(Err(Broken::Cut));
        }
        let result = ready!(tunnel.poll(cx, *client, *dst));
        if matches!(result, Ok(_) | Err(Broken::Unsent(_))) {
            ends.client = None;
        }
        if result.is_ok() {
            ends.dst = None;
        }
        Poll::Ready(result)
    })
}

/// The streams, but for those that have ended well. The others are left reset.
struct Ends<'a, C: Stream, D: Stream> {
    client: Option<&'a mut C>,
    dst: Option<&'a mut D>,
}

impl<C: Stream, D: Stream> Drop for Ends<'_, C, D> {
    fn drop(&mut self) {
        if let Some(client) = &self.client {
            client.abort();
        }
        if let Some(dst) = &self.dst {
            dst.abort();
        }
    }
}

struct Tunnel<'a> {
    up: Direction,
    down: Direction,
    moved: &'a Moved,
    /// Why the rest of `up` can't be sent; the tunnel ends with it when `down` has.
    unsent: Option<io::Error>,
    limits: &'a Limits,
    /// When an octet moved last.
    last: Instant,
    timer: IdleTimer,
}

impl Tunnel<'_> {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut impl Stream,
        dst: &mut impl Stream,
    ) -> Poll<Result<End, Broken>> {
        let before = self.progress();
        if let Poll::Ready(result) = self.pump(cx, client, dst) {
            return Poll::Ready(result);
        }
        if self.progress() != before {
            self.last = Instant::now();
        }
        self.poll_limits(cx, client, dst)
    }

    fn progress(&self) -> (u64, u64, bool, bool) {
        let moved = |octets: &AtomicU64| octets.load(Ordering::Relaxed);
        (moved(&self.moved.up), moved(&self.moved.down), self.up.done, self.down.done)
    }

    fn pump(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut impl Stream,
        dst: &mut impl Stream,
    ) -> Poll<Result<End, Broken>> {
        let may_move = |one: &Direction, other: &Direction| {
            self.limits.until_bulk && !one.ended && other.is_fresh() && self.unsent.is_none()
        };
        let (up_may_move, down_may_move) = (may_move(&self.up, &self.down), may_move(&self.down, &self.up));
        match self.up.poll(cx, client, dst, &self.moved.up, up_may_move) {
            Poll::Ready(Err(Fault::Source(error))) => return broken(Place::ReadClient, error),
            // What dst sent before it stopped listening is still on its way to the client.
            Poll::Ready(Err(Fault::Sink(error))) => {
                self.up.done = true;
                self.unsent = Some(error);
            }
            Poll::Ready(Ok(())) | Poll::Pending => {}
        }
        match self.down.poll(cx, dst, client, &self.moved.down, down_may_move) {
            Poll::Ready(Err(Fault::Source(_))) if self.unsent.is_some() => self.down.done = true,
            Poll::Ready(Err(Fault::Source(error))) => return broken(Place::ReadDst, error),
            Poll::Ready(Err(Fault::Sink(error))) => return broken(Place::WriteClient, error),
            Poll::Ready(Ok(())) | Poll::Pending => {}
        }
        if self.up.done && self.down.done {
            return Poll::Ready(self.unsent.take().map_or(Ok(End::Over), |error| Err(self.cut_short(error))));
        }
        if up_may_move && self.up.is_bulk() || down_may_move && self.down.is_bulk() {
            if self.up.is_fresh() && self.down.is_fresh() && self.unsent.is_none() {
                return Poll::Ready(Ok(End::Bulk));
            }
            // The other direction has come to hold something just now.
            wake_later(cx);
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
    ) -> Poll<Result<End, Broken>> {
        let mut fired = false;
        loop {
            let now = Instant::now();
            let stalled = self.up.holds() || dst.has_unsent();
            // Who is not being read from can only be seen to be gone by looking, which is done now and then.
            let (look_at_client, look_at_dst) = (self.up.holds() || self.up.ended, self.down.done);
            if fired && look_at_client && client.is_reset() {
                return broken(Place::ReadClient, io::ErrorKind::ConnectionReset.into());
            }
            if fired && look_at_dst && dst.is_reset() {
                let error = self.unsent.take().unwrap_or(io::ErrorKind::ConnectionReset.into());
                return Poll::Ready(Err(self.cut_short(error)));
            }
            let lingers = self.down.done && !stalled && !self.up.ended;
            let limit = match *self.limits {
                _ if self.unsent.is_some() && !self.down.holds() && !client.has_unsent() => Some(UNSENT),
                Limits { linger: Some(linger), .. } if lingers => Some(linger),
                Limits { idle, .. } => idle,
            };
            let due = limit.map(|limit| self.last + limit);
            if due.is_some_and(|due| now >= due) {
                return Poll::Ready(match self.unsent.take() {
                    Some(error) => Err(self.cut_short(error)),
                    None if lingers && self.limits.linger.is_some() => Ok(End::Over),
                    None => Err(Broken::Idle),
                });
            }
            if fired {
                self.up.give_back(&self.moved.up);
                self.down.give_back(&self.moved.down);
            }
            let looks = look_at_client || look_at_dst || self.up.has_pipe() || self.down.has_pipe();
            let look = looks.then(|| now + LOOK);
            let Some(wake) = due.into_iter().chain(look).min() else { return Poll::Pending };
            ready!(self.timer.poll(cx, wake));
            fired = true;
        }
    }
}

fn broken(place: Place, error: io::Error) -> Poll<Result<End, Broken>> {
    Poll::Ready(Err(Broken::Io(place, error)))
}
