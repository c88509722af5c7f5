//! How fast a session may be: token buckets, and a stream that keeps to them.
//!
//! Each way of a stream reserves a slice, waits until that is paid for, and moves it in as many reads or writes as it
//! takes; so there is a timer for each slice and not for each read, and whoever shares a bucket gets his turn. A bucket
//! that is not used fills up, so that what is lost by waking late is not lost.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures_lite::{AsyncRead, AsyncWrite};

use crate::conn::Conn;
use crate::reactor::IdleTimer;
use crate::relay::Stream;

/// What is reserved at once, in time, where there is no more.
const RESERVATION_TIME: Duration = Duration::from_millis(25);
/// What an unused bucket holds, in time.
const BURST_TIME: Duration = Duration::from_millis(250);
/// What a bucket holds at least, in octets: a datagram must fit in.
const MIN_BURST_BYTES: f64 = 65_536.0;
/// The longest that is waited for at once.
const MAX_WAIT_SECONDS: f64 = 3600.0;

/// Octets that may move, as many a second.
#[derive(Debug)]
pub(super) struct TokenBucket {
    rate: f64,
    state: Mutex<BucketState>,
}

#[derive(Debug)]
struct BucketState {
    /// Below 0 when more has been reserved than there is.
    tokens: f64,
    updated: Instant,
}

impl TokenBucket {
    /// `rate` is in octets a second, and not 0.
    pub(super) fn new(rate: u64, now: Instant) -> Self {
        let rate = rate as f64;
        Self { rate, state: Mutex::new(BucketState { tokens: rate * RESERVATION_TIME.as_secs_f64(), updated: now }) }
    }

    /// With what has come in since.
    fn state(&self, now: Instant) -> MutexGuard<'_, BucketState> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let max = (self.rate * BURST_TIME.as_secs_f64()).max(MIN_BURST_BYTES);
        let passed = now.saturating_duration_since(state.updated).as_secs_f64();
        state.tokens = max.min(state.tokens + passed * self.rate);
        state.updated = state.updated.max(now);
        state
    }

    /// What is wanted, if it is there; or else what is, or a slice.
    fn available(&self, requested: usize, now: Instant) -> f64 {
        let tokens = self.state(now).tokens;
        let requested = requested as f64;
        if tokens >= requested { requested } else { tokens.max(self.rate * RESERVATION_TIME.as_secs_f64()).max(1.0) }
    }

    /// Takes so many octets, which need not be there yet: how long it is until they are.
    fn reserve(&self, bytes: usize, now: Instant) -> Duration {
        let mut state = self.state(now);
        state.tokens -= bytes as f64;
        Duration::from_secs_f64(((-state.tokens).max(0.0) / self.rate).min(MAX_WAIT_SECONDS))
    }

    fn refund(&self, bytes: usize, now: Instant) {
        self.state(now).tokens += bytes as f64;
    }
}

/// The buckets of a session: its own, and that of its user.
#[derive(Clone, Debug)]
pub(super) struct RateLimit {
    pub(super) session: Arc<TokenBucket>,
    pub(super) user: Option<Arc<TokenBucket>>,
}

impl RateLimit {
    fn buckets(&self) -> impl Iterator<Item = &TokenBucket> {
        [Some(&self.session), self.user.as_ref()].into_iter().flatten().map(|bucket| &**bucket)
    }

    /// How many octets may move, and how long it is until they may. Where there is enough, no more than is wanted, so
    /// that others find some.
    fn reserve(&self, requested: usize, now: Instant) -> (usize, Duration) {
        let bytes = self.buckets().map(|bucket| bucket.available(requested, now)).fold(f64::MAX, f64::min) as usize;
        let wait = self.buckets().map(|bucket| bucket.reserve(bytes, now)).max();
        (bytes, wait.unwrap_or_default())
    }

    fn refund(&self, bytes: usize) {
        let now = Instant::now();
        self.buckets().for_each(|bucket| bucket.refund(bytes, now));
    }

    /// Whether a datagram of that size may pass; it counts if so.
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

/// What one way of a stream has reserved.
#[derive(Default)]
struct Reservation {
    bytes: usize,
    /// Until when it has to wait for them.
    due: Option<Instant>,
    alarm: IdleTimer,
}

impl Reservation {
    /// Ready when so many octets may move.
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
                ready!(self.alarm.poll(cx, due));
            }
        }
        Poll::Ready(self.bytes)
    }

    /// Pays for what has moved. Whoever can't move anything now gives back what others may have use for.
    fn commit(&mut self, moved: Poll<io::Result<usize>>, rate_limit: &RateLimit) -> Poll<io::Result<usize>> {
        match moved {
            Poll::Ready(Ok(n)) => self.bytes = self.bytes.saturating_sub(n),
            Poll::Ready(Err(_)) | Poll::Pending => rate_limit.refund(std::mem::take(&mut self.bytes)),
        }
        moved
    }
}

/// A client's connection that is read from and written to at a pace.
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

    /// What moves in `time` when each wait is as much too long as said.
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
    fn a_pace_is_kept_and_made_use_of_even_by_those_who_wake_late() {
        for rate in [10_000, 1_000_000, 1_000_000_000] {
            for late in [0, 1, 20, 100] {
                let moved = moved(rate, Duration::from_millis(late), Duration::from_secs(10)) as f64;
                let share = moved / (10.0 * rate as f64);
                assert!((0.98..1.05).contains(&share), "{rate} a second, {late} ms late: {share}");
            }
        }
    }

    #[test]
    fn those_who_share_a_bucket_take_turns() {
        let start = Instant::now();
        let rate_limit = rate_limit(1_000_000, start);
        let mut waits = [(); 4].map(|()| rate_limit.reserve(65_536, start).1.as_millis());
        waits.sort_unstable();
        assert_eq!(waits, [0, 25, 50, 75]);
    }

    #[test]
    fn an_idle_bucket_holds_a_quarter_of_a_second_and_what_is_given_back_is_there_again() {
        let start = Instant::now();
        let later = start + Duration::from_secs(60);
        let bucket = TokenBucket::new(4_000_000, start);
        assert_eq!(bucket.available(2_000_000, later), 1_000_000.0);
        assert_eq!(bucket.available(1000, later), 1000.0);
        assert_eq!(bucket.reserve(1_100_000, later), Duration::from_millis(25));
        bucket.refund(1_100_000, later);
        assert_eq!(bucket.available(2_000_000, later), 1_000_000.0);
        assert_eq!(bucket.available(1000, later), 1000.0);
    }

    #[test]
    fn datagrams_pass_as_long_as_there_is_something_left() {
        let start = Instant::now();
        let rate_limit = rate_limit(1_000_000, start);
        assert!(rate_limit.try_take(60_000, start));
        assert!(!rate_limit.try_take(1, start));
        assert!(rate_limit.try_take(1, start + Duration::from_millis(40)));
    }
}
