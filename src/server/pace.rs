//! How fast a session may be: token buckets, and a stream that keeps to them.
//!
//! A stream that has used up its tokens waits until there are some for [`SLICE`], so that there is a timer now and then
//! and not for each read. A bucket that is not used fills up, so that what is lost by waking late is not lost.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures_lite::{AsyncRead, AsyncWrite};

use crate::conn::Conn;
use crate::reactor::Alarm;
use crate::relay::Stream;

/// What is waited for at least, in time.
const SLICE: Duration = Duration::from_millis(25);
/// What an unused bucket holds, in time.
const BURST: Duration = Duration::from_millis(250);
/// What a bucket holds at least, in octets: a datagram must fit in.
const MIN_BURST: f64 = 65_536.0;

/// Octets that may move, as many a second.
#[derive(Debug)]
pub(super) struct Bucket {
    rate: f64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Below 0 when more was moved than there was.
    tokens: f64,
    since: Instant,
}

impl Bucket {
    /// `rate` is in octets a second, and not 0.
    pub(super) fn new(rate: u64, now: Instant) -> Self {
        let rate = rate as f64;
        Self { rate, state: Mutex::new(State { tokens: rate * SLICE.as_secs_f64(), since: now }) }
    }

    /// How many octets may move now, or how long it is until some may.
    fn ready(&self, now: Instant) -> Result<f64, Duration> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let most = (self.rate * BURST.as_secs_f64()).max(MIN_BURST);
        let passed = now.saturating_duration_since(state.since).as_secs_f64();
        state.tokens = most.min(state.tokens + passed * self.rate);
        state.since = state.since.max(now);
        let enough = (self.rate * SLICE.as_secs_f64()).max(1.0);
        if state.tokens >= enough {
            return Ok(state.tokens);
        }
        Err(Duration::from_secs_f64(((enough - state.tokens) / self.rate).min(3600.0)))
    }

    fn spend(&self, octets: usize) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).tokens -= octets as f64;
    }
}

/// The buckets of a session: its own, and that of its user.
#[derive(Clone, Debug)]
pub(super) struct Pace {
    pub(super) session: Arc<Bucket>,
    pub(super) user: Option<Arc<Bucket>>,
}

impl Pace {
    fn buckets(&self) -> impl Iterator<Item = &Bucket> {
        [Some(&self.session), self.user.as_ref()].into_iter().flatten().map(|bucket| &**bucket)
    }

    fn ready(&self, now: Instant) -> Result<usize, Duration> {
        let mut most = f64::MAX;
        let mut wait = Duration::ZERO;
        for bucket in self.buckets() {
            match bucket.ready(now) {
                Ok(tokens) => most = most.min(tokens),
                Err(until) => wait = wait.max(until),
            }
        }
        // At least 1: whoever has waited for his slice of a small rate is to get on.
        if wait.is_zero() { Ok((most as usize).max(1)) } else { Err(wait) }
    }

    fn spend(&self, octets: usize) {
        self.buckets().for_each(|bucket| bucket.spend(octets));
    }

    /// Whether a datagram of that size may pass; it counts if so.
    pub(super) fn lets_pass(&self, octets: usize, now: Instant) -> bool {
        let may_pass = self.ready(now).is_ok();
        if may_pass {
            self.spend(octets);
        }
        may_pass
    }
}

/// A client's connection that is read from and written to at a pace.
pub(super) struct Paced<'a> {
    conn: &'a mut Conn,
    pace: &'a Pace,
    read: Alarm,
    write: Alarm,
}

impl<'a> Paced<'a> {
    pub(super) fn new(conn: &'a mut Conn, pace: &'a Pace) -> Self {
        Self { conn, pace, read: Alarm::default(), write: Alarm::default() }
    }
}

fn poll_tokens(pace: &Pace, alarm: &mut Alarm, cx: &mut Context<'_>) -> Poll<usize> {
    loop {
        let now = Instant::now();
        match pace.ready(now) {
            Ok(tokens) => return Poll::Ready(tokens),
            Err(wait) => ready!(alarm.poll(cx, now + wait)),
        }
    }
}

impl AsyncRead for Paced<'_> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let Self { conn, pace, read, .. } = self.get_mut();
        let most = ready!(poll_tokens(pace, read, cx)).min(buf.len());
        let n = ready!(Pin::new(&mut **conn).poll_read(cx, buf.get_mut(..most).unwrap_or_default()))?;
        pace.spend(n);
        Poll::Ready(Ok(n))
    }
}

impl AsyncWrite for Paced<'_> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let Self { conn, pace, write, .. } = self.get_mut();
        let most = ready!(poll_tokens(pace, write, cx)).min(buf.len());
        let n = ready!(Pin::new(&mut **conn).poll_write(cx, buf.get(..most).unwrap_or_default()))?;
        pace.spend(n);
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.get_mut().conn).poll_flush(cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.get_mut().conn).poll_close(cx)
    }
}

impl Stream for Paced<'_> {
    fn abort(&self) {
        self.conn.abort();
    }

    fn has_unsent(&self) -> bool {
        self.conn.has_unsent()
    }

    fn is_reset(&self) -> bool {
        self.conn.is_reset()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What moves in `time` when each wait is as much too long as said.
    fn moved(rate: u64, late: Duration, time: Duration, piece: usize) -> usize {
        let start = Instant::now();
        let pace = Pace { session: Arc::new(Bucket::new(rate, start)), user: None };
        let (mut now, mut moved) = (start, 0);
        while now < start + time {
            match pace.ready(now) {
                Ok(tokens) => {
                    let n = tokens.min(piece);
                    pace.spend(n);
                    moved += n;
                }
                Err(wait) => now += wait + late,
            }
        }
        moved
    }

    #[test]
    fn a_pace_is_kept_and_made_use_of_even_by_those_who_wake_late() {
        for rate in [10_000, 1_000_000, 1_000_000_000] {
            for late in [0, 1, 20, 100] {
                for piece in [1500, 65_536] {
                    let moved = moved(rate, Duration::from_millis(late), Duration::from_secs(10), piece) as f64;
                    let share = moved / (10.0 * rate as f64);
                    assert!((0.98..1.05).contains(&share), "{rate} a second, {late} ms late: {share}");
                }
            }
        }
    }

    #[test]
    fn an_idle_bucket_holds_a_quarter_of_a_second() {
        let start = Instant::now();
        let bucket = Bucket::new(4_000_000, start);
        assert_eq!(bucket.ready(start + Duration::from_secs(60)), Ok(1_000_000.0));
        bucket.spend(1_000_000);
        assert!(bucket.ready(start + Duration::from_secs(60)).is_err());
    }
}
