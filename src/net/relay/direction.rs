//! One direction of a relay: copies bytes from source to sink, or splices them during a bulk transfer.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use super::splice::{self, Pipe};
use crate::net::rate_limit::{RateLimit, Reservation};
use crate::net::reactor::{Interest, wake_later};
use crate::net::stream::Stream;

/// Size of a thread's buffer, in bytes. A direction keeps at most this many bytes outside a pipe. The exception is the
/// content of a pipe that cannot be spliced to the sink.
pub const RELAY_BUFFER_SIZE: usize = 64 * 1024;
/// Bytes that a direction relays before other tasks of the thread run.
const POLL_BUDGET: usize = 1 << 20;
/// Number of consecutive reads that fill the buffer, after which a transfer counts as bulk.
const BULK_READS: u8 = 3;

thread_local! {
    static THREAD_BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; RELAY_BUFFER_SIZE]);
}

/// Failure of a direction's source (`Read`) or sink (`Write`).
pub(super) enum DirectionError {
    Read(io::Error),
    Write(io::Error),
}

/// One direction of a tunnel. Small, since most tunnels are idle most of the time.
#[derive(Default)]
pub(super) struct Direction {
    pending: Option<Box<Pending>>,
    reservation: Option<Box<Reservation>>,
    /// Consecutive reads that filled the buffer.
    full_reads: u8,
    /// Set when splicing is impossible: rate limit, not plain sockets, no support by the kernel, or no pipe available.
    must_copy: bool,
    /// Leaves the write side of the sink open after the source has ended.
    keeps_sink_open: bool,
    pub(super) has_read: bool,
    pub(super) has_source_ended: bool,
    /// Set when a write to the source's socket has reported its reset. The kernel reports an error only once, and after
    /// that a reset stream reads like one that has ended.
    pub(super) is_source_reset: bool,
    /// Set when the sink has everything and its write side is closed, or flushed if `keeps_sink_open`.
    pub(super) has_delivered: bool,
    /// Set together with `has_delivered`, or when an error has ended the direction.
    pub(super) is_done: bool,
}

/// Bytes that have been read and not yet written.
enum Pending {
    /// `bytes[sent..]` is pending.
    Bytes { bytes: Vec<u8>, sent: usize },
    /// The pipe may be empty.
    Pipe(Pipe),
}

impl Direction {
    pub(super) fn new(rate_limit: &RateLimit, keeps_sink_open: bool) -> Self {
        let reservation = rate_limit.is_limited().then(|| Box::new(Reservation::new(rate_limit)));
        Self { must_copy: reservation.is_some(), reservation, keeps_sink_open, ..Self::default() }
    }

    /// Returns the time at which a direction that waits for its rate limit can continue.
    pub(super) fn tokens_due(&self) -> Option<Instant> {
        self.reservation.as_ref()?.due
    }

    /// Returns whether a new `Direction` could continue: nothing is pending, and the source is open.
    pub(super) fn is_stateless(&self) -> bool {
        self.pending.is_none() && !self.has_source_ended
    }

    /// Returns whether a bulk transfer was just detected and nothing is pending.
    pub(super) fn is_bulk(&self) -> bool {
        self.full_reads >= BULK_READS && self.pending.is_none()
    }

    pub(super) fn has_pending(&self) -> bool {
        match self.pending.as_deref() {
            None => false,
            Some(Pending::Bytes { .. }) => true,
            Some(Pending::Pipe(pipe)) => !pipe.is_empty(),
        }
    }

    pub(super) fn has_pipe(&self) -> bool {
        matches!(self.pending.as_deref(), Some(Pending::Pipe(_)))
    }

    /// Closes the pipe if it is empty and `count`, the bytes relayed so far, has not changed since the last call.
    pub(super) fn close_idle_pipe(&mut self, count: &AtomicU64) {
        if let Some(Pending::Pipe(pipe)) = self.pending.as_deref_mut()
            && pipe.is_empty()
            && !pipe.has_progressed(count.load(Ordering::Relaxed))
        {
            self.pending = None;
        }
    }

    /// Relays until an operation would block or the budget is used up. Ready when the source has ended and the sink is
    /// closed. With `stop_if_bulk`, returns `Pending` at the start of a bulk transfer, without registering a wake-up.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut dyn Stream,
        sink: &mut dyn Stream,
        count: &AtomicU64,
        stop_if_bulk: bool,
    ) -> Poll<Result<(), DirectionError>> {
        if self.is_done {
            return Poll::Ready(Ok(()));
        }
        let mut budget = POLL_BUDGET;
        while budget > 0 {
            let n = ready!(self.write_pending(cx, sink))?;
            count.fetch_add(n as u64, Ordering::Relaxed);
            budget = budget.saturating_sub(n);
            if self.has_pending() {
                continue;
            }
            if self.has_source_ended && self.is_source_reset {
                self.has_source_ended = false;
                return Poll::Ready(Err(DirectionError::Read(io::ErrorKind::ConnectionReset.into())));
            }
            if self.has_source_ended {
                let sink = Pin::new(sink);
                ready!(if self.keeps_sink_open { sink.poll_flush(cx) } else { sink.poll_close(cx) })
                    .map_err(DirectionError::Write)?;
                (self.has_delivered, self.is_done) = (true, true);
                return Poll::Ready(Ok(()));
            }
            let progress = match self.has_pipe() {
                true => self.fill_pipe(cx, source),
                false => THREAD_BUFFER.with_borrow_mut(|buffer| self.copy_once(cx, source, sink, buffer)),
            };
            if progress.is_pending() {
                if let Some(reservation) = &mut self.reservation {
                    reservation.refund();
                }
                flush(cx, sink)?;
            }
            let n = ready!(progress)?;
            count.fetch_add(n as u64, Ordering::Relaxed);
            budget = budget.saturating_sub(n);
            if self.is_bulk() {
                if stop_if_bulk {
                    return Poll::Pending;
                }
                self.start_splicing();
            }
        }
        wake_later(cx);
        Poll::Pending
    }

    /// Opens a pipe for the bulk transfer. If none is available, copying continues.
    fn start_splicing(&mut self) {
        self.full_reads = 0;
        if self.must_copy {
            return;
        }
        match Pipe::open(RELAY_BUFFER_SIZE) {
            Ok(pipe) => self.pending = Some(Box::new(Pending::Pipe(pipe))),
            Err(_) => self.must_copy = true,
        }
    }

    /// Writes pending bytes once. Returns how many the sink accepted.
    fn write_pending(&mut self, cx: &mut Context<'_>, sink: &mut dyn Stream) -> Poll<Result<usize, DirectionError>> {
        match self.pending.as_deref_mut() {
            None => Poll::Ready(Ok(0)),
            Some(Pending::Bytes { bytes, sent }) => {
                let unsent = bytes.get(*sent..).unwrap_or_default();
                let n = ready!(poll_write(cx, sink, self.reservation.as_deref_mut(), unsent))?;
                *sent += n;
                if *sent >= bytes.len() {
                    self.pending = None;
                }
                Poll::Ready(Ok(n))
            }
            Some(Pending::Pipe(pipe)) if pipe.is_empty() => Poll::Ready(Ok(0)),
            Some(Pending::Pipe(pipe)) => {
                match sink.poll_socket(cx, Interest::Write, &mut |socket| pipe.drain_to(socket)) {
                    Some(Poll::Pending) => Poll::Pending,
                    Some(Poll::Ready(Ok(n))) => Poll::Ready(nonzero(n).map_err(DirectionError::Write)),
                    Some(Poll::Ready(Err(error))) if !splice::is_unsupported(&error) => {
                        Poll::Ready(Err(DirectionError::Write(error)))
                    }
                    Some(Poll::Ready(Err(_))) | None => {
                        let bytes = pipe.take_all().map_err(DirectionError::Read)?;
                        self.must_copy = true;
                        self.pending = Some(Box::new(Pending::Bytes { bytes, sent: 0 }));
                        Poll::Ready(Ok(0))
                    }
                }
            }
        }
    }

    /// Splices from the source into the empty pipe. Returns 0, as nothing has reached the sink yet.
    fn fill_pipe(&mut self, cx: &mut Context<'_>, source: &dyn Stream) -> Poll<Result<usize, DirectionError>> {
        let Some(Pending::Pipe(pipe)) = self.pending.as_deref_mut() else { return Poll::Ready(Ok(0)) };
        match source.poll_socket(cx, Interest::Read, &mut |socket| pipe.fill_from(socket)) {
            Some(Poll::Pending) => return Poll::Pending,
            Some(Poll::Ready(Ok(0))) => self.has_source_ended = true,
            Some(Poll::Ready(Ok(_))) => self.has_read = true,
            Some(Poll::Ready(Err(error))) if !splice::is_unsupported(&error) => {
                return Poll::Ready(Err(DirectionError::Read(error)));
            }
            Some(Poll::Ready(Err(_))) | None => {
                self.must_copy = true;
                self.pending = None;
            }
        }
        Poll::Ready(Ok(0))
    }

    /// Reads once and writes the bytes once. Returns how many the sink accepted; the others become pending.
    fn copy_once(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut dyn Stream,
        sink: &mut dyn Stream,
        buffer: &mut [u8],
    ) -> Poll<Result<usize, DirectionError>> {
        let n = ready!(Pin::new(source).poll_read(cx, buffer)).map_err(DirectionError::Read)?;
        let Some(bytes @ [_, ..]) = buffer.get(..n) else {
            self.has_source_ended = true;
            return Poll::Ready(Ok(0));
        };
        self.has_read = true;
        let sent = match poll_write(cx, sink, self.reservation.as_deref_mut(), bytes) {
            Poll::Ready(sent) => sent?,
            Poll::Pending => 0,
        };
        self.full_reads = if n == buffer.len() { self.full_reads.saturating_add(1) } else { 0 };
        if let Some(bytes @ [_, ..]) = bytes.get(sent..) {
            self.pending = Some(Box::new(Pending::Bytes { bytes: bytes.to_vec(), sent: 0 }));
        }
        Poll::Ready(Ok(sent))
    }
}

/// Writes once, and at most as many bytes as the rate limit has granted.
fn poll_write(
    cx: &mut Context<'_>,
    sink: &mut dyn Stream,
    reservation: Option<&mut Reservation>,
    bytes: &[u8],
) -> Poll<Result<usize, DirectionError>> {
    let Some(reservation) = reservation else {
        return Pin::new(sink).poll_write(cx, bytes).map(|sent| sent.and_then(nonzero).map_err(DirectionError::Write));
    };
    let Poll::Ready(max) = reservation.poll(bytes.len()) else {
        flush(cx, sink)?;
        return Poll::Pending;
    };
    let sent = poll_write(cx, sink, None, bytes.get(..max).unwrap_or(bytes));
    match &sent {
        Poll::Ready(Ok(n)) => reservation.commit(*n),
        Poll::Ready(Err(_)) | Poll::Pending => reservation.refund(),
    }
    sent
}

fn flush(cx: &mut Context<'_>, sink: &mut dyn Stream) -> Result<(), DirectionError> {
    match sink.has_unflushed().then(|| Pin::new(sink).poll_flush(cx)) {
        Some(Poll::Ready(Err(error))) => Err(DirectionError::Write(error)),
        Some(Poll::Ready(Ok(())) | Poll::Pending) | None => Ok(()),
    }
}

fn nonzero(n: usize) -> io::Result<usize> {
    if n == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(n) }
}
