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
use direction::{Direction, DirectionError};

/// How long dst may be silent before a client that can't send to it any more is told so.
const UNDELIVERED_WAIT: Duration = Duration::from_secs(1);
/// How often a peer that is not being read from is looked at, whether it is still there; and a pipe, whether it is
/// still of use.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// An operation on a bare socket: octets moved, 0 at the end.
pub type SocketOp<'a> = dyn FnMut(BorrowedFd<'_>) -> io::Result<usize> + 'a;
/// Result of [`Stream::poll_socket`]: `None` if the stream is not backed by a plain socket.
pub type SocketPoll = Option<Poll<io::Result<usize>>>;

/// A stream that can be relayed. It can be cut so that its peer does not take what it got for the whole.
pub trait Stream: AsyncRead + AsyncWrite + Unpin {
    /// Makes the coming close a reset, where the stream has such a thing.
    fn abort(&self);

    /// Whether octets that it has taken have yet to be flushed.
    fn has_unflushed(&self) -> bool {
        false
    }

    /// Whether the peer has reset the stream, which reading would show, were there a use for what is read.
    fn is_reset(&self) -> bool {
        false
    }

    /// Does `op` on the socket when that may be ready. `None` when there is no socket whose octets are the stream's.
    fn poll_socket(&self, _: &mut Context<'_>, _: Interest, _: &mut SocketOp<'_>) -> SocketPoll {
        None
    }
}

/// Any stream, for those who need no code of their own for theirs.
impl Stream for &mut dyn Stream {
    fn abort(&self) {
        (**self).abort();
    }

    fn has_unflushed(&self) -> bool {
        (**self).has_unflushed()
    }

    fn is_reset(&self) -> bool {
        (**self).is_reset()
    }

    fn poll_socket(&self, cx: &mut Context<'_>, interest: Interest, op: &mut SocketOp<'_>) -> SocketPoll {
        (**self).poll_socket(cx, interest, op)
    }
}

/// Octets moved so far; readable while the relay runs.
#[derive(Debug, Default)]
pub struct ByteCounts {
    /// From client to dst.
    pub up: AtomicU64,
    /// From dst to client.
    pub down: AtomicU64,
}

/// When a relay ends although not both sides have.
#[derive(Clone, Copy, Debug, Default)]
pub struct RelayOptions {
    /// After this long without an octet either way.
    pub idle_timeout: Option<Duration>,
    /// When `down` has ended: after the client side has given nothing for this long. What it has given is still sent,
    /// however long dst takes. None: `up` may take as long as it likes.
    pub linger: Option<Duration>,
    /// When a direction proves to be bulk, both are open and nothing is held: so that it can be taken up elsewhere.
    pub stop_when_bulk: bool,
}

/// How a relay ended when nothing was wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RelayOutcome {
    /// Both directions have ended.
    Finished,
    /// As [`RelayOptions::stop_when_bulk`] says. The streams are as they were.
    Bulk,
}

/// Where a relay broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RelayOp {
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
pub enum RelayError {
    /// An operation failed. Both sides have been reset.
    Io(RelayOp, io::Error),
    /// [`RelayOptions::idle_timeout`] passed. Both sides have been reset.
    IdleTimeout,
    /// The caller did not let it go on. Both sides have been reset.
    Stopped,
    /// dst has said all that it has to say, and takes no more. It has been reset; the client has not, and has yet to
    /// be drained if it is to receive the last of what it was sent.
    Undelivered(io::Error),
}

impl fmt::Display for RelayError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (operation, error) = match self {
            Self::IdleTimeout => return f.write_str("idle for too long"),
            Self::Stopped => return f.write_str("cut"),
            Self::Io(RelayOp::ReadClient, error) => ("reading from the client", error),
            Self::Io(RelayOp::WriteClient, error) => ("writing to the client", error),
            Self::Io(RelayOp::ReadDst, error) => ("reading from dst", error),
            Self::Io(RelayOp::WriteDst, error) | Self::Undelivered(error) => ("writing to dst", error),
        };
        write!(f, "{operation}: {error}")
    }
}

/// Result of [`relay`].
pub type RelayResult = Result<RelayOutcome, RelayError>;

/// Moves octets both ways until both directions have ended. A direction ends when its source does, which is passed on
/// by closing its sink's write side. Before each step `may_go_on` is asked.
///
/// Both streams are reset when an operation on either fails, when the idle limit ends the tunnel, and when the future
/// is dropped while it runs. A reset is noticed within a second also from a side that is not being read from.
///
/// # Errors
/// As [`RelayError`] says.
pub fn relay<'a, C, D>(
    client: &'a mut C,
    dst: &'a mut D,
    options: &'a RelayOptions,
    counts: &'a ByteCounts,
    may_go_on: impl Fn(&C, &D) -> bool + 'a,
) -> impl Future<Output = RelayResult>
where
    C: Stream,
    D: Stream,
{
    let mut streams = AbortGuard { client: Some(client), dst: Some(dst) };
    let mut tunnel = Tunnel {
        up: Direction::default(),
        down: Direction::default(),
        counts,
        undelivered: None,
        options,
        last_progress: Instant::now(),
        timer: IdleTimer::default(),
    };
    // Not an async fn, which would have room for its arguments twice; there may be many thousands of these.
    poll_fn(move |cx| {
        let AbortGuard { client: Some(client), dst: Some(dst) } = &mut streams else { return Poll::Pending };
        if !may_go_on(client, dst) {
            return Poll::Ready(Err(RelayError::Stopped));
        }
        let result = ready!(tunnel.poll(cx, *client, *dst));
        if matches!(result, Ok(_) | Err(RelayError::Undelivered(_))) {
            streams.client = None;
        }
        if result.is_ok() {
            streams.dst = None;
        }
        Poll::Ready(result)
    })
}

/// The streams, but for those that have ended well. The others are left reset.
struct AbortGuard<'a, C: Stream, D: Stream> {
    client: Option<&'a mut C>,
    dst: Option<&'a mut D>,
}

impl<C: Stream, D: Stream> Drop for AbortGuard<'_, C, D> {
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
    counts: &'a ByteCounts,
    /// Why the rest of `up` can't be sent; the tunnel ends with it when `down` has.
    undelivered: Option<io::Error>,
    options: &'a RelayOptions,
    /// When an octet moved last.
    last_progress: Instant,
    timer: IdleTimer,
}

impl Tunnel<'_> {
    fn poll(&mut self, cx: &mut Context<'_>, client: &mut impl Stream, dst: &mut impl Stream) -> Poll<RelayResult> {
        let before = self.progress();
        if let Poll::Ready(result) = self.pump(cx, client, dst) {
            return Poll::Ready(result);
        }
        if self.progress() != before {
            self.last_progress = Instant::now();
        }
        self.poll_timeouts(cx, client, dst)
    }

    fn progress(&self) -> (u64, u64, bool, bool) {
        let count = |bytes: &AtomicU64| bytes.load(Ordering::Relaxed);
        (count(&self.counts.up), count(&self.counts.down), self.up.is_done, self.down.is_done)
    }

    fn pump(&mut self, cx: &mut Context<'_>, client: &mut impl Stream, dst: &mut impl Stream) -> Poll<RelayResult> {
        let may_stop = |one: &Direction, other: &Direction| {
            self.options.stop_when_bulk && !one.has_ended && other.is_stateless() && self.undelivered.is_none()
        };
        let (up_may_stop, down_may_stop) = (may_stop(&self.up, &self.down), may_stop(&self.down, &self.up));
        match self.up.poll(cx, client, dst, &self.counts.up, up_may_stop) {
            Poll::Ready(Err(DirectionError::Read(error))) => return io_error(RelayOp::ReadClient, error),
            // What dst sent before it stopped listening is still on its way to the client.
            Poll::Ready(Err(DirectionError::Write(error))) => {
                self.up.is_done = true;
                self.undelivered = Some(error);
            }
            Poll::Ready(Ok(())) | Poll::Pending => {}
        }
        match self.down.poll(cx, dst, client, &self.counts.down, down_may_stop) {
            Poll::Ready(Err(DirectionError::Read(_))) if self.undelivered.is_some() => self.down.is_done = true,
            Poll::Ready(Err(DirectionError::Read(error))) => return io_error(RelayOp::ReadDst, error),
            Poll::Ready(Err(DirectionError::Write(error))) => return io_error(RelayOp::WriteClient, error),
            Poll::Ready(Ok(())) | Poll::Pending => {}
        }
        if self.up.is_done && self.down.is_done {
            return Poll::Ready(
                self.undelivered.take().map_or(Ok(RelayOutcome::Finished), |error| Err(self.undelivered_error(error))),
            );
        }
        if up_may_stop && self.up.is_bulk() || down_may_stop && self.down.is_bulk() {
            if self.up.is_stateless() && self.down.is_stateless() && self.undelivered.is_none() {
                return Poll::Ready(Ok(RelayOutcome::Bulk));
            }
            // The other direction has come to hold something just now.
            wake_later(cx);
        }
        Poll::Pending
    }

    /// How the tunnel ends when dst takes no more.
    fn undelivered_error(&self, error: io::Error) -> RelayError {
        if self.down.has_ended && self.down.is_done {
            RelayError::Undelivered(error)
        } else {
            RelayError::Io(RelayOp::WriteDst, error)
        }
    }

    /// Ready when the tunnel has been silent for too long, or one side has given it up.
    fn poll_timeouts(&mut self, cx: &mut Context<'_>, client: &impl Stream, dst: &impl Stream) -> Poll<RelayResult> {
        let mut fired = false;
        loop {
            let now = Instant::now();
            let stalled = self.up.has_pending() || dst.has_unflushed();
            // Who is not being read from can only be seen to be gone by looking, which is done now and then.
            let (check_client, check_dst) = (self.up.has_pending() || self.up.has_ended, self.down.is_done);
            if fired && check_client && client.is_reset() {
                return io_error(RelayOp::ReadClient, io::ErrorKind::ConnectionReset.into());
            }
            if fired && check_dst && dst.is_reset() {
                let error = self.undelivered.take().unwrap_or(io::ErrorKind::ConnectionReset.into());
                return Poll::Ready(Err(self.undelivered_error(error)));
            }
            let lingers = self.down.is_done && !stalled && !self.up.has_ended;
            let limit = match *self.options {
                _ if self.undelivered.is_some() && !self.down.has_pending() && !client.has_unflushed() => {
                    Some(UNDELIVERED_WAIT)
                }
                RelayOptions { linger: Some(linger), .. } if lingers => Some(linger),
                RelayOptions { idle_timeout, .. } => idle_timeout,
            };
            let due = limit.map(|limit| self.last_progress + limit);
            if due.is_some_and(|due| now >= due) {
                return Poll::Ready(match self.undelivered.take() {
                    Some(error) => Err(self.undelivered_error(error)),
                    None if lingers && self.options.linger.is_some() => Ok(RelayOutcome::Finished),
                    None => Err(RelayError::IdleTimeout),
                });
            }
            if fired {
                self.up.close_idle_pipe(&self.counts.up);
                self.down.close_idle_pipe(&self.counts.down);
            }
            let is_checked = check_client || check_dst || self.up.has_pipe() || self.down.has_pipe();
            let check = is_checked.then(|| now + CHECK_INTERVAL);
            let Some(wake) = due.into_iter().chain(check).min() else { return Poll::Pending };
            ready!(self.timer.poll(cx, wake));
            fired = true;
        }
    }
}

fn io_error(operation: RelayOp, error: io::Error) -> Poll<RelayResult> {
    Poll::Ready(Err(RelayError::Io(operation, error)))
}
