//! One direction of a relay: what is read, what is held, what is written; copied, or spliced once it is bulk.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use super::Stream;
use super::splice::{self, Pipe};
use crate::reactor::{Interest, wake_later};

/// The buffer of a thread, in octets, and so the most that a direction keeps outside of a pipe; but for once, when it
/// turns out that what is in the pipe can't be spliced out.
const BUFFER: usize = 64 * 1024;
/// How many octets one direction may move before the other tunnels of the thread get their turn.
const BUDGET: usize = 1 << 20;
/// After how many full buffers in a row a direction is bulk.
const BULK: u8 = 3;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; BUFFER]);
}

/// Which end of a direction failed.
pub(super) enum Fault {
    Source(io::Error),
    Sink(io::Error),
}

/// One direction of a tunnel. Small, since most tunnels are idle most of the time.
#[derive(Default)]
pub(super) struct Direction {
    held: Option<Box<Held>>,
    /// How many full buffers have been read in a row.
    full: u8,
    /// The streams are no bare sockets, or the kernel can't splice them, or there was no pipe to be had.
    copies: bool,
    /// The source has ended.
    pub(super) ended: bool,
    /// And the sink knows; or it takes no more.
    pub(super) done: bool,
}

/// What was read and the sink has not taken yet.
enum Held {
    /// From `sent` on.
    Octets { octets: Vec<u8>, sent: usize },
    /// In a pipe, which may be empty.
    Pipe(Pipe),
}

impl Direction {
    /// Whether the streams say all that is to be known of it.
    pub(super) fn is_fresh(&self) -> bool {
        self.held.is_none() && !self.ended
    }

    /// Whether it has just proved to be bulk, with nothing left over.
    pub(super) fn is_bulk(&self) -> bool {
        self.full >= BULK && self.held.is_none()
    }

    /// Whether something was read that the sink has not taken yet.
    pub(super) fn holds(&self) -> bool {
        match self.held.as_deref() {
            None => false,
            Some(Held::Octets { .. }) => true,
            Some(Held::Pipe(pipe)) => !pipe.is_empty(),
        }
    }

    pub(super) fn has_pipe(&self) -> bool {
        matches!(self.held.as_deref(), Some(Held::Pipe(_)))
    }

    /// Closes the pipe if nothing has gone through it since this was asked last.
    pub(super) fn give_back(&mut self, moved: &AtomicU64) {
        if let Some(Held::Pipe(pipe)) = self.held.as_deref_mut()
            && pipe.is_empty()
            && !pipe.has_moved(moved.load(Ordering::Relaxed))
        {
            self.held = None;
        }
    }

    /// Moves what can be moved now. Ready when the source has ended and the sink knows.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut impl Stream,
        sink: &mut impl Stream,
        moved: &AtomicU64,
        may_move: bool,
    ) -> Poll<Result<(), Fault>> {
        if self.done {
            return Poll::Ready(Ok(()));
        }
        let mut left = BUDGET;
        while left > 0 {
            let n = ready!(self.flush(cx, sink))?;
            moved.fetch_add(n as u64, Ordering::Relaxed);
            left = left.saturating_sub(n);
            if self.holds() {
                continue;
            }
            if self.ended {
                ready!(Pin::new(sink).poll_close(cx)).map_err(Fault::Sink)?;
                self.done = true;
                return Poll::Ready(Ok(()));
            }
            let filled = match self.has_pipe() {
                true => self.fill_pipe(cx, source),
                false => SCRATCH.with_borrow_mut(|buffer| self.copy(cx, source, sink, buffer)),
            };
            if filled.is_pending() && sink.has_unsent() {
                let _ = Pin::new(&mut *sink).poll_flush(cx).map_err(Fault::Sink)?;
            }
            let n = ready!(filled)?;
            moved.fetch_add(n as u64, Ordering::Relaxed);
            left = left.saturating_sub(n);
            if self.is_bulk() {
                if may_move {
                    return Poll::Pending;
                }
                self.splice();
            }
        }
        wake_later(cx);
        Poll::Pending
    }

    /// From now on what is read goes through a pipe, unless there is no descriptor or memory to spare for one.
    fn splice(&mut self) {
        self.full = 0;
        if self.copies {
            return;
        }
        match Pipe::open(BUFFER) {
            Ok(pipe) => self.held = Some(Box::new(Held::Pipe(pipe))),
            Err(_) => self.copies = true,
        }
    }

    /// One write of what was read before: how much the sink took.
    fn flush(&mut self, cx: &mut Context<'_>, sink: &mut impl Stream) -> Poll<Result<usize, Fault>> {
        match self.held.as_deref_mut() {
            None => Poll::Ready(Ok(0)),
            Some(Held::Octets { octets, sent }) => {
                let rest = octets.get(*sent..).unwrap_or_default();
                let n = ready!(Pin::new(sink).poll_write(cx, rest)).and_then(not_zero).map_err(Fault::Sink)?;
                *sent += n;
                if *sent >= octets.len() {
                    self.held = None;
                }
                Poll::Ready(Ok(n))
            }
            Some(Held::Pipe(pipe)) if pipe.is_empty() => Poll::Ready(Ok(0)),
            Some(Held::Pipe(pipe)) => match sink.poll_bare(cx, Interest::Write, &mut |socket| pipe.write_to(socket)) {
                Some(Poll::Pending) => Poll::Pending,
                Some(Poll::Ready(Ok(n))) => Poll::Ready(not_zero(n).map_err(Fault::Sink)),
                Some(Poll::Ready(Err(error))) if !splice::is_refusal(&error) => Poll::Ready(Err(Fault::Sink(error))),
                Some(Poll::Ready(Err(_))) | None => {
                    let octets = pipe.empty().map_err(Fault::Source)?;
                    self.copies = true;
                    self.held = Some(Box::new(Held::Octets { octets, sent: 0 }));
                    Poll::Ready(Ok(0))
                }
            },
        }
    }

    /// Fills the pipe, which is empty.
    fn fill_pipe(&mut self, cx: &mut Context<'_>, source: &impl Stream) -> Poll<Result<usize, Fault>> {
        let Some(Held::Pipe(pipe)) = self.held.as_deref_mut() else { return Poll::Ready(Ok(0)) };
        match source.poll_bare(cx, Interest::Read, &mut |socket| pipe.read_from(socket)) {
            Some(Poll::Pending) => return Poll::Pending,
            Some(Poll::Ready(Ok(n))) => self.ended = n == 0,
            Some(Poll::Ready(Err(error))) if !splice::is_refusal(&error) => {
                return Poll::Ready(Err(Fault::Source(error)));
            }
            Some(Poll::Ready(Err(_))) | None => {
                self.copies = true;
                self.held = None;
            }
        }
        Poll::Ready(Ok(0))
    }

    /// One read, and one write of what it gave: how much the sink took. What is left is kept.
    fn copy(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut impl Stream,
        sink: &mut impl Stream,
        buffer: &mut [u8],
    ) -> Poll<Result<usize, Fault>> {
        let n = ready!(Pin::new(source).poll_read(cx, buffer)).map_err(Fault::Source)?;
        let Some(octets @ [_, ..]) = buffer.get(..n) else {
            self.ended = true;
            return Poll::Ready(Ok(0));
        };
        let sent = match Pin::new(sink).poll_write(cx, octets) {
            Poll::Ready(sent) => sent.and_then(not_zero).map_err(Fault::Sink)?,
            Poll::Pending => 0,
        };
        self.full = if n == buffer.len() { self.full.saturating_add(1) } else { 0 };
        if let Some(octets @ [_, ..]) = octets.get(sent..) {
            self.held = Some(Box::new(Held::Octets { octets: octets.to_vec(), sent: 0 }));
        }
        Poll::Ready(Ok(sent))
    }
}

fn not_zero(n: usize) -> io::Result<usize> {
    if n == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(n) }
}
