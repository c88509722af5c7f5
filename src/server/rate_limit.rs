//! Bandwidth limits: token buckets, and a stream that takes its bytes from them.
//!
//! Each direction of a stream reserves some bytes, waits until the bucket has earned them, and then moves them with as
//! many reads or writes as needed. So a timer is set per reservation and not per read, and streams with a shared bucket
//! take turns. An unused bucket fills up, which makes up for timers that fire late.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures_lite::{AsyncRead, AsyncWrite};

use crate::conn::Conn;
use crate::reactor::IdleTimer;
use crate::relay::Stream;

/// Size of a reservation from an empty bucket, as the time in which it is earned.
const RESERVATION_TIME: Duration = Duration::from_millis(25);
/// Capacity of a bucket, as the time in which it fills up.
const BURST_TIME: Duration = Duration::from_millis(250);
/// Lower limit of the capacity: room for one datagram.
const MIN_BURST_BYTES: f64 = 65_536.0;
/// Upper limit of one wait.
const MAX_WAIT_SECONDS: f64 = 3600.0;

/// A token bucket. One token is one byte in either direction.
#[derive(Debug)]
pub(super) struct TokenBucket {
    rate: f64,
    state: Mutex<BucketState>,
}

#[derive(Debug)]
struct BucketState {
    /// Negative if more is reserved than earned.
    tokens: f64,
    updated: Instant,
}

impl TokenBucket {
    /// `rate` is in bytes per second, at least 1.
    pub(super) fn new(rate: u64, now: Instant) -> Self {
        let rate = rate as f64;
        Self { rate, state: Mutex::new(BucketState { tokens: rate * RESERVATION_TIME.as_secs_f64(), updated: now }) }
    }

    /// Locks the state, with the tokens earned until `now`.
    fn state(&self, now: Instant) -> MutexGuard<'_, BucketState> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let max = (self.rate * BURST_TIME.as_secs_f64()).max(MIN_BURST_BYTES);
        let passed = now.saturating_duration_since(state.updated).as_secs_f64();
        state.tokens = max.min(state.tokens + passed * self.rate);
        state.updated = state.updated.max(now);
        state
    }

    /// Returns the number of tokens to reserve: `requested` if the bucket has as many; otherwise those that it has, or
    /// earns in [`RESERVATION_TIME`], whichever is more.
    fn reservation_size(&self, requested: usize, now: Instant) -> f64 {
        let tokens = self.state(now).tokens;
        let requested = requested as f64;
        if tokens >= requested { requested } else { tokens.max(self.rate * RESERVATION_TIME.as_secs_f64()).max(1.0) }
    }

    /// Takes tokens, also unearned ones. Returns the time until all of them are earned.
    fn reserve(&self, bytes: usize, now: Instant) -> Duration {
        let mut state = self.state(now);
        state.tokens -= bytes as f64;
        Duration::from_secs_f64(((-state.tokens).max(0.0) / self.rate).min(MAX_WAIT_SECONDS))
    }

    fn refund(&self, bytes: usize, now: Instant) {
        self.state(now).tokens += bytes as f64;
    }
}

/// The buckets of a session: its own, and that of its user. All limits apply at once.
#[derive(Clone, Debug)]
pub(super) struct RateLimit {
    pub(super) session: Arc<TokenBucket>,
    pub(super) user: Option<Arc<TokenBucket>>,
}

impl RateLimit {
    fn buckets(&self) -> impl Iterator<Item = &TokenBucket> {
        [Some(&self.session), self.user.as_ref()].into_iter().flatten().map(|bucket| &**bucket)
    }

    /// Reserves bytes. Returns their number, and the time to wait before moving them.
    fn reserve(&self, requested: usize, now: Instant) -> (usize, Duration) {
        let bytes =
            self.buckets().map(|bucket| bucket.reservation_size(requested, now)).fold(f64::MAX, f64::min) as usize;
        let wait = self.buckets().map(|bucket| bucket.reserve(bytes, now)).max();
        (bytes, wait.unwrap_or_default())
    }

    fn refund(&self, bytes: usize) {
        let now = Instant::now();
        self.buckets().for_each(|bucket| bucket.refund(bytes, now));
    }

    /// Takes the tokens for one datagram. Returns false if a bucket is empty, and the datagram has to be dropped.
    pub(super) fn try_take(&self, bytes: usize, now: Instant) -> bool {
        let has_tokens = self.buckets().all(|bucket| bucket.state(now).tokens > 0.0);
        if has_tokens {
            for bucket in self.buckets() {
                bucket.reserve(bytes, now);
            }
        }
        has_tokens
    }
}

/// The reserved bytes of one direction of a stream.
#[derive(Default)]
struct Reservation {
    bytes: usize,
    /// Time at which they are earned; `None` if they may move.
    due: Option<Instant>,
    timer: IdleTimer,
}

impl Reservation {
    /// Ready with the number of bytes that may move now.
    fn poll(&mut self, requested: usize, rate_limit: &RateLimit, cx: &mut Context<'_>) -> Poll<usize> {
        if self.bytes == 0 {
            let now = Instant::now();
            let (bytes, wait) = rate_limit.reserve(requested, now);
            self.bytes = bytes;
            self.due = (!wait.is_zero()).then(|| now + wait);
        }
        while let Some(due) = self.due {
            if Instant::now() >= due {
                self.due = None;
            } else {
                ready!(self.timer.poll(cx, due));
            }
        }
        Poll::Ready(self.bytes)
    }

    /// Deducts the bytes that have moved. If none can move now, refunds the reservation for the use of other streams.
    fn commit(&mut self, moved: Poll<io::Result<usize>>, rate_limit: &RateLimit) -> Poll<io::Result<usize>> {
        match moved {
            Poll::Ready(Ok(n)) => self.bytes = self.bytes.saturating_sub(n),
            Poll::Ready(Err(_)) | Poll::Pending => rate_limit.refund(std::mem::take(&mut self.bytes)),
        }
        moved
    }
}

/// A client's connection with a bandwidth limit for reads and writes.
pub(super) struct RateLimitedStream<'a> {
    conn: &'a mut Conn,
    rate_limit: &'a RateLimit,
    read: Reservation,
    write: Reservation,
}

impl<'a> RateLimitedStream<'a> {
    pub(super) fn new(conn: &'a mut Conn, rate_limit: &'a RateLimit) -> Self {
        Self { conn, rate_limit, read: Reservation::default(), write: Reservation::default() }
    }
}

impl Drop for RateLimitedStream<'_> {
    fn drop(&mut self) {
        self.rate_limit.refund(self.read.bytes + self.write.bytes);
    }
}

impl AsyncRead for RateLimitedStream<'_> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let Self { conn, rate_limit, read, .. } = self.get_mut();
        let max = ready!(read.poll(buf.len(), rate_limit, cx)).min(buf.len());
        let moved = Pin::new(&mut **conn).poll_read(cx, buf.get_mut(..max).unwrap_or_default());
        read.commit(moved, rate_limit)
    }
}

impl AsyncWrite for RateLimitedStream<'_> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let Self { conn, rate_limit, write, .. } = self.get_mut();
        let max = ready!(write.poll(buf.len(), rate_limit, cx)).min(buf.len());
        let moved = Pin::new(&mut **conn).poll_write(cx, buf.get(..max).unwrap_or_default());
        write.commit(moved, rate_limit)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.get_mut().conn).poll_flush(cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.get_mut().conn).poll_close(cx)
    }
}

impl Stream for RateLimitedStream<'_> {
    fn abort(&self) {
        self.conn.abort();
    }

    fn has_unflushed(&self) -> bool {
        self.conn.has_unflushed()
    }

    fn is_reset(&self) -> bool {
        self.conn.is_reset()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate_limit(rate: u64, start: Instant) -> RateLimit {
        RateLimit { session: Arc::new(TokenBucket::new(rate, start)), user: None }
    }

    /// Returns the bytes that move in `time` if each timer fires late by `late`.
    fn moved(rate: u64, late: Duration, time: Duration) -> usize {
        let start = Instant::now();
        let rate_limit = rate_limit(rate, start);
        let (mut now, mut moved) = (start, 0);
        while now < start + time {
            let (bytes, wait) = rate_limit.reserve(65_536, now);
            now += if wait.is_zero() { wait } else { wait + late };
            moved += bytes;
        }
        moved
    }

    #[test]
    fn rate_is_met_within_five_percent_although_timers_fire_late() {
        for rate in [10_000, 1_000_000, 1_000_000_000] {
            for late in [0, 1, 20, 100] {
                let moved = moved(rate, Duration::from_millis(late), Duration::from_secs(10)) as f64;
                let share = moved / (10.0 * rate as f64);
                assert!((0.98..1.05).contains(&share), "{rate} bytes per second, {late} ms late: {share}");
            }
        }
    }

    #[test]
    fn reservations_from_a_shared_bucket_take_turns() {
        let start = Instant::now();
        let rate_limit = rate_limit(1_000_000, start);
        let mut waits = [(); 4].map(|()| rate_limit.reserve(65_536, start).1.as_millis());
        waits.sort_unstable();
        assert_eq!(waits, [0, 25, 50, 75]);
    }

    #[test]
    fn idle_bucket_holds_a_quarter_of_a_second_and_accepts_refunds() {
        let start = Instant::now();
        let later = start + Duration::from_secs(60);
        let bucket = TokenBucket::new(4_000_000, start);
        assert_eq!(bucket.reservation_size(2_000_000, later), 1_000_000.0);
        assert_eq!(bucket.reservation_size(1000, later), 1000.0);
        assert_eq!(bucket.reserve(1_100_000, later), Duration::from_millis(25));
        bucket.refund(1_100_000, later);
        assert_eq!(bucket.reservation_size(2_000_000, later), 1_000_000.0);
        assert_eq!(bucket.reservation_size(1000, later), 1000.0);
    }

    #[test]
    fn datagrams_pass_while_the_bucket_has_a_token() {
        let start = Instant::now();
        let rate_limit = rate_limit(1_000_000, start);
        assert!(rate_limit.try_take(60_000, start));
        assert!(!rate_limit.try_take(1, start));
        assert!(rate_limit.try_take(1, start + Duration::from_millis(40)));
    }
}
