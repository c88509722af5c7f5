//! Copies bytes between two streams in both directions, forwards half-closes and resets, and counts bytes.
//!
//! An idle tunnel owns no buffer: each poll borrows the thread's buffer. Only bytes that the sink has not accepted yet
//! are kept, at most one buffer for each direction. A bulk transfer between two plain sockets is spliced through a
//! pipe, which is closed when it is idle. A rate-limited relay only copies.

mod direction;
mod splice;

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use super::rate_limit::RateLimit;
use super::reactor::wake_later;
use super::stream::Stream;
use super::timer::IdleTimer;
use crate::counters::{self, Counter};
pub use direction::RELAY_BUFFER_SIZE;
use direction::{Direction, DirectionError};

/// After a failed write to dst, the relay ends when this much time has passed without a byte from dst.
const WRITE_ERROR_TIMEOUT: Duration = Duration::from_secs(1);
/// Time for the client to receive the last data from dst after [`RelayError::Undelivered`].
pub const UNDELIVERED_GRACE: Duration = Duration::from_secs(2);
/// Interval of checks for a reset by a peer that is not being read, and for idle pipes.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Time after which dst gets TCP keepalive, which takes four system calls and sends the first probe after 60 s. Most
/// tunnels end before that. After the end of a stream, its peer gets a shorter keepalive at the first check.
const KEEPALIVE_DELAY: Duration = Duration::from_secs(45);
/// If dst is gone this long after the last byte, it has received all bytes: a lost one would have caused a reset
/// earlier. A reset takes up to 3 s for each proxy that it passes.
const LOSS_WINDOW: Duration = Duration::from_secs(10);

/// Bytes relayed so far, readable while the relay runs.
#[derive(Debug, Default)]
pub struct ByteCounts {
    /// From client to dst.
    pub up: AtomicU64,
    /// From dst to client.
    pub down: AtomicU64,
}

/// One of the two streams of a relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "self-explanatory")]
pub enum Side {
    Client,
    Dst,
}

/// Events of a relay, readable while it runs and afterwards.
#[derive(Debug)]
pub struct RelayStats {
    started: Instant,
    first_byte: OnceLock<Duration>,
    ended_first: OnceLock<Side>,
    /// Bytes that dst had accepted when it ended its stream.
    up_at_dst_end: OnceLock<u64>,
    is_up_done: AtomicBool,
}

impl Default for RelayStats {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            first_byte: OnceLock::new(),
            ended_first: OnceLock::new(),
            up_at_dst_end: OnceLock::new(),
            is_up_done: AtomicBool::new(false),
        }
    }
}

impl RelayStats {
    /// Returns the time from the creation of this value to the first byte from dst.
    pub fn first_byte(&self) -> Option<Duration> {
        self.first_byte.get().copied()
    }

    /// Records the first byte from dst, for a relay of datagrams.
    pub fn set_first_byte(&self) {
        self.first_byte.get_or_init(|| self.started.elapsed());
    }

    /// Returns the side that ended its stream first. The client's end counts when dst has received it.
    pub fn ended_first(&self) -> Option<Side> {
        self.ended_first.get().copied()
    }

    /// Returns true when the client has ended its stream and dst has all of it.
    pub fn is_up_done(&self) -> bool {
        self.is_up_done.load(Ordering::Relaxed)
    }

    fn update(&self, up: &Direction, down: &Direction, up_count: u64) {
        if down.has_read {
            self.set_first_byte();
        }
        if up.has_delivered {
            self.is_up_done.store(true, Ordering::Relaxed);
            self.ended_first.get_or_init(|| Side::Client);
        }
        if down.has_source_ended {
            self.up_at_dst_end.get_or_init(|| up_count);
            self.ended_first.get_or_init(|| Side::Dst);
        }
    }
}

/// How a relay moves bytes, and what ends it before both directions have ended.
#[derive(Clone, Debug, Default)]
pub struct RelayOptions {
    /// Ends the relay after this long without a byte in either direction.
    pub idle_timeout: Option<Duration>,
    /// After dst has ended its stream: ends the relay after this long without a byte from the client. Bytes that are
    /// already read are still sent, limited only by `idle_timeout`. `None`: waits until the client ends its stream too.
    pub linger: Option<Duration>,
    /// Ends the relay at the start of a bulk transfer if nothing is pending. It can continue on another thread.
    pub stop_when_bulk: bool,
    /// Leaves the write side of dst open when the client ends its stream.
    pub keeps_dst_open: bool,
    /// Limits the rate of both directions together. Bytes are then copied and not spliced.
    pub rate_limit: RateLimit,
    /// Records the events of the relay.
    pub stats: Option<Arc<RelayStats>>,
}

/// How a relay ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RelayOutcome {
    /// Both directions have ended, or [`RelayOptions::linger`] has passed.
    Finished,
    /// Stopped by [`RelayOptions::stop_when_bulk`]. Both streams are still open.
    Bulk,
}

/// The operation that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "self-explanatory")]
pub enum RelayOp {
    ReadClient,
    WriteClient,
    ReadDst,
    WriteDst,
}

/// Reason why a relay ended before both directions had ended.
#[derive(Debug)]
pub enum RelayError {
    /// An operation failed. Both streams have been reset.
    Io(RelayOp, io::Error),
    /// [`RelayOptions::idle_timeout`] passed. Both streams have been reset.
    IdleTimeout,
    /// `may_continue` returned false. Both streams have been reset.
    Stopped,
    /// dst has ended its stream and accepts no more bytes. dst has been reset, the client has not. The caller must wait
    /// for [`UNDELIVERED_GRACE`] before it closes the client's stream, or the client can lose the last bytes.
    Undelivered(io::Error),
    /// dst has ended its stream, and is gone now. Nothing is lost. dst has been reset; the client is reset when its
    /// stream is closed, after it has received all data.
    DstGone,
}

impl fmt::Display for RelayError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (operation, peer, error) = match self {
            Self::IdleTimeout => return f.write_str("idle timeout"),
            Self::Stopped => return f.write_str("stopped"),
            Self::DstGone => return f.write_str("dst is gone after the end of its stream: connection reset"),
            Self::Io(RelayOp::ReadClient, error) => ("read from", "the client", error),
            Self::Io(RelayOp::WriteClient, error) => ("write to", "the client", error),
            Self::Io(RelayOp::ReadDst, error) => ("read from", "dst", error),
            Self::Io(RelayOp::WriteDst, error) | Self::Undelivered(error) => ("write to", "dst", error),
        };
        // shutdown(2) after a reset fails with ENOTCONN.
        if error.kind() == io::ErrorKind::NotConnected {
            return write!(f, "{peer} closed the connection");
        }
        write!(f, "{operation} {peer}: {error}")
    }
}

/// Result of [`relay`].
pub type RelayResult = Result<RelayOutcome, RelayError>;

/// Relays bytes in both directions until both have ended. The end of a source closes the write side of its sink.
/// `may_continue` is called at each poll; the relay ends when it returns false.
///
/// Both streams are reset on each error except [`RelayError::Undelivered`] and [`RelayError::DstGone`], and when the
/// future is dropped before it completes. A reset by a peer is detected within a second, also on a side that is not
/// being read. TCP keepalive detects that a peer is gone.
pub fn relay<'a, C, D>(
    client: &'a mut C,
    dst: &'a mut D,
    options: &'a RelayOptions,
    counts: &'a ByteCounts,
    may_continue: impl Fn(&C, &D) -> bool + 'a,
) -> impl Future<Output = RelayResult>
where
    C: Stream,
    D: Stream,
{
    let mut streams = AbortGuard { client: Some(client), dst: Some(dst) };
    let mut relay = RelayState {
        up: Direction::new(&options.rate_limit, options.keeps_dst_open),
        down: Direction::new(&options.rate_limit, false),
        counts,
        undelivered: None,
        options,
        last_progress: Instant::now(),
        timer: IdleTimer::default(),
    };
    // Not an async fn, whose future would store its arguments twice: there may be many thousands of tunnels.
    poll_fn(move |cx| {
        let AbortGuard { client: Some(client), dst: Some(dst) } = &mut streams else { return Poll::Pending };
        if !may_continue(client, dst) {
            return Poll::Ready(Err(RelayError::Stopped));
        }
        let result = ready!(relay.poll(cx, *client, *dst));
        if matches!(result, Ok(_) | Err(RelayError::Undelivered(_) | RelayError::DstGone)) {
            streams.client = None;
        }
        if result.is_ok() {
            streams.dst = None;
        }
        Poll::Ready(result)
    })
}

/// Resets the streams that it still holds when it is dropped.
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

struct RelayState<'a> {
    up: Direction,
    down: Direction,
    counts: &'a ByteCounts,
    /// Error of a failed write to dst. The relay returns it when `down` has ended.
    undelivered: Option<io::Error>,
    options: &'a RelayOptions,
    last_progress: Instant,
    timer: IdleTimer,
}

impl RelayState<'_> {
    fn poll(&mut self, cx: &mut Context<'_>, client: &mut dyn Stream, dst: &mut dyn Stream) -> Poll<RelayResult> {
        let before = self.progress();
        let pumped = self.pump(cx, client, dst);
        let after = self.progress();
        counters::add(Counter::BytesUp, after.0 - before.0);
        counters::add(Counter::BytesDown, after.1 - before.1);
        if let Some(stats) = &self.options.stats {
            stats.update(&self.up, &self.down, self.counts.up.load(Ordering::Relaxed));
        }
        if pumped.is_ready() {
            return pumped;
        }
        if after != before {
            self.last_progress = Instant::now();
        }
        self.poll_timeouts(cx, client, dst)
    }

    fn progress(&self) -> (u64, u64, bool, bool) {
        let count = |bytes: &AtomicU64| bytes.load(Ordering::Relaxed);
        (count(&self.counts.up), count(&self.counts.down), self.up.is_done, self.down.is_done)
    }

    fn pump(&mut self, cx: &mut Context<'_>, client: &mut dyn Stream, dst: &mut dyn Stream) -> Poll<RelayResult> {
        let may_stop = |this: &Direction, other: &Direction| {
            self.options.stop_when_bulk && !this.has_source_ended && other.is_stateless() && self.undelivered.is_none()
        };
        let (up_may_stop, down_may_stop) = (may_stop(&self.up, &self.down), may_stop(&self.down, &self.up));
        match self.up.poll(cx, client, dst, &self.counts.up, up_may_stop) {
            Poll::Ready(Err(DirectionError::Read(error))) => return io_error(RelayOp::ReadClient, error),
            // `down` continues: dst may have sent bytes before, which the client has not received yet.
            Poll::Ready(Err(DirectionError::Write(error))) => {
                self.up.is_done = true;
                self.down.is_source_reset = error.kind() == io::ErrorKind::ConnectionReset;
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
            // The other direction has read bytes in this poll that are still pending: try again in the next poll.
            wake_later(cx);
        }
        Poll::Pending
    }

    fn undelivered_error(&self, error: io::Error) -> RelayError {
        if self.down.has_source_ended && self.down.is_done {
            RelayError::Undelivered(error)
        } else {
            RelayError::Io(RelayOp::WriteDst, error)
        }
    }

    /// Returns whether bytes of the client wait until dst accepts more.
    fn is_stalled(&self, dst: &dyn Stream) -> bool {
        self.up.has_pending() || dst.has_unflushed()
    }

    /// If dst, which has ended its stream, is gone: returns whether it may lack bytes of the client.
    fn dst_loss(&self, dst: &dyn Stream) -> Option<bool> {
        let up = self.counts.up.load(Ordering::Relaxed);
        let is_recent = self.last_progress.elapsed() < LOSS_WINDOW;
        let may_be_late = match &self.options.stats {
            _ if dst.is_reset() => up > 0,
            // An orderly close, which only a Unix socket reports, loses nothing that was sent before.
            Some(stats) if dst.is_closed() => stats.up_at_dst_end.get().is_none_or(|before| up > *before),
            None if dst.is_closed() && !is_recent => false,
            _ => return None,
        };
        Some(self.undelivered.is_some() || self.is_stalled(dst) || may_be_late && is_recent)
    }

    /// Ready when a timeout has passed, or when a side that is not being read has reset its stream.
    fn poll_timeouts(&mut self, cx: &mut Context<'_>, client: &dyn Stream, dst: &dyn Stream) -> Poll<RelayResult> {
        let mut has_fired = false;
        loop {
            let now = Instant::now();
            // Without reads, a reset is not noticed, so these sides are checked at intervals.
            let (checks_client, checks_dst) = (self.up.has_pending() || self.up.has_source_ended, self.down.is_done);
            if has_fired && checks_client && client.is_reset() {
                return io_error(RelayOp::ReadClient, io::ErrorKind::ConnectionReset.into());
            }
            if has_fired
                && checks_dst
                && let Some(may_lack_bytes) = self.dst_loss(dst)
            {
                if !may_lack_bytes {
                    client.reset_after_delivery();
                    return Poll::Ready(Err(RelayError::DstGone));
                }
                let error = self.undelivered.take().unwrap_or(io::ErrorKind::ConnectionReset.into());
                return Poll::Ready(Err(self.undelivered_error(error)));
            }
            let is_lingering = self.down.is_done && !self.is_stalled(dst) && !self.up.has_source_ended;
            let limit = match self.options {
                _ if self.undelivered.is_some() && !self.down.has_pending() && !client.has_unflushed() => {
                    Some(WRITE_ERROR_TIMEOUT)
                }
                RelayOptions { linger: Some(linger), .. } if is_lingering => Some(*linger),
                RelayOptions { idle_timeout, .. } => *idle_timeout,
            };
            let due = limit.map(|limit| self.last_progress + limit);
            if due.is_some_and(|due| now >= due) {
                return Poll::Ready(match self.undelivered.take() {
                    Some(error) => Err(self.undelivered_error(error)),
                    None if is_lingering && self.options.linger.is_some() => Ok(RelayOutcome::Finished),
                    None => Err(RelayError::IdleTimeout),
                });
            }
            if has_fired {
                dst.keep_alive(self.down.has_source_ended);
                if self.up.has_source_ended {
                    client.keep_alive(true);
                }
                self.up.close_idle_pipe(&self.counts.up);
                self.down.close_idle_pipe(&self.counts.down);
            }
            let needs_check = checks_client || checks_dst || self.up.has_pipe() || self.down.has_pipe();
            let check = needs_check.then(|| now + CHECK_INTERVAL);
            let tokens = [&self.up, &self.down].into_iter().filter_map(Direction::tokens_due).min();
            if tokens.is_some_and(|tokens| now >= tokens) {
                wake_later(cx);
                return Poll::Pending;
            }
            let keepalive = (!has_fired && !self.timer.is_set()).then(|| now + KEEPALIVE_DELAY);
            let Some(wake) = [due, check, tokens, keepalive].into_iter().flatten().min() else { return Poll::Pending };
            ready!(self.timer.poll(cx, wake));
            has_fired = true;
        }
    }
}

fn io_error(operation: RelayOp, error: io::Error) -> Poll<RelayResult> {
    Poll::Ready(Err(RelayError::Io(operation, error)))
}
