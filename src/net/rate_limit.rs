//! Bandwidth limits: token buckets, and the bytes that a relay has reserved in them.
//!
//! Each direction of a relay reserves some bytes, waits until the bucket has earned them, and then moves them with as
//! many writes as needed. So a timer is set per reservation and not per write, and relays with a shared bucket take
//! turns. An unused bucket fills up, which makes up for timers that fire late.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

/// Time in which a bucket earns one reservation. Determines the size of a reservation from an empty bucket.
const RESERVATION_TIME: Duration = Duration::from_millis(25);
/// Time in which an empty bucket fills up. Determines the capacity.
const BURST_TIME: Duration = Duration::from_millis(250);
/// Lower limit of the capacity: room for one datagram.
const MIN_BURST_BYTES: f64 = 65_536.0;
const MAX_WAIT_SECONDS: f64 = 3600.0;

/// A token bucket. One token is one byte in either direction.
#[derive(Debug)]
pub struct TokenBucket {
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
    pub fn new(rate: u64, now: Instant) -> Self {
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

    /// Returns the number of tokens to reserve: `requested` if the bucket has as many. Otherwise those that it has, or
    /// earns in [`RESERVATION_TIME`], whichever is more.
    fn reservation_size(&self, requested: usize, now: Instant) -> f64 {
        let tokens = self.state(now).tokens;
        let requested = requested as f64;
        if tokens >= requested { requested } else { tokens.max(self.rate * RESERVATION_TIME.as_secs_f64()).max(1.0) }
    }

    /// Takes tokens, even if they are not earned yet. Returns the time until all of them are earned.
    fn reserve(&self, bytes: usize, now: Instant) -> Duration {
        let mut state = self.state(now);
        state.tokens -= bytes as f64;
        Duration::from_secs_f64(((-state.tokens).max(0.0) / self.rate).min(MAX_WAIT_SECONDS))
    }

    fn refund(&self, bytes: usize, now: Instant) {
        self.state(now).tokens += bytes as f64;
    }
}

/// The buckets of a session: its own, that of its user, or both. All of them apply at once. Without one, there is no
/// limit. One pointer, because every tunnel has one.
#[derive(Clone, Debug, Default)]
pub struct RateLimit(Option<Arc<Vec<Arc<TokenBucket>>>>);

impl RateLimit {
    /// Returns false if there is no bucket.
    pub fn is_limited(&self) -> bool {
        self.0.is_some()
    }

    /// Adds a bucket.
    pub fn add(&mut self, bucket: Arc<TokenBucket>) {
        Arc::make_mut(self.0.get_or_insert_default()).push(bucket);
    }

    /// Returns the buckets.
    pub fn buckets(&self) -> impl Iterator<Item = &Arc<TokenBucket>> {
        self.0.iter().flat_map(|buckets| buckets.iter())
    }

    /// Reserves bytes. Returns their number, and the time to wait before moving them.
    fn reserve(&self, requested: usize, now: Instant) -> (usize, Duration) {
        let sizes = self.buckets().map(|bucket| bucket.reservation_size(requested, now));
        let bytes = sizes.fold(f64::MAX, f64::min) as usize;
        let wait = self.buckets().map(|bucket| bucket.reserve(bytes, now)).max();
        (bytes, wait.unwrap_or_default())
    }

    /// Takes the tokens for one datagram. Returns false if a bucket is empty, and the caller drops the datagram.
    pub fn try_take(&self, bytes: usize, now: Instant) -> bool {
        let has_tokens = self.buckets().all(|bucket| bucket.state(now).tokens > 0.0);
        if has_tokens {
            let _ = self.buckets().map(|bucket| bucket.reserve(bytes, now)).max();
        }
        has_tokens
    }
}

/// The bytes that one direction of a relay has reserved. Those that have not moved are refunded when it is dropped.
#[derive(Debug)]
pub(super) struct Reservation {
    rate_limit: RateLimit,
    bytes: usize,
    /// Time at which the bytes are earned. `None` after that.
    pub(super) due: Option<Instant>,
}

impl Reservation {
    pub(super) fn new(rate_limit: &RateLimit) -> Self {
        Self { rate_limit: rate_limit.clone(), bytes: 0, due: None }
    }

    /// Ready with the number of bytes that may move now. Sets no timer: poll again at `due`.
    pub(super) fn poll(&mut self, requested: usize) -> Poll<usize> {
        let now = Instant::now();
        if self.bytes == 0 {
            let (bytes, wait) = self.rate_limit.reserve(requested, now);
            (self.bytes, self.due) = (bytes, Some(now + wait));
        }
        self.due = self.due.filter(|due| *due > now);
        if self.due.is_some() { Poll::Pending } else { Poll::Ready(self.bytes) }
    }

    pub(super) fn commit(&mut self, bytes: usize) {
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    /// Refunds the reserved bytes, because none can move now. Other relays can use them.
    pub(super) fn refund(&mut self) {
        self.due = None;
        let bytes = std::mem::take(&mut self.bytes);
        if bytes > 0 {
            let now = Instant::now();
            self.rate_limit.buckets().for_each(|bucket| bucket.refund(bytes, now));
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.refund();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate_limit(rate: u64, start: Instant) -> RateLimit {
        let mut rate_limit = RateLimit::default();
        rate_limit.add(Arc::new(TokenBucket::new(rate, start)));
        rate_limit
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
    fn reservation_is_refunded_when_no_byte_can_move_and_on_drop() {
        let rate_limit = rate_limit(1_000, Instant::now());
        let tokens = || rate_limit.buckets().map(|bucket| bucket.state(Instant::now()).tokens).sum::<f64>();
        let [mut up, mut down] = [(); 2].map(|()| Reservation::new(&rate_limit));
        assert_eq!(up.poll(100), Poll::Ready(25), "at least 25 ms of bytes");
        up.commit(5);
        assert_eq!((up.poll(100), up.due), (Poll::Ready(20), None));
        assert!(down.poll(100).is_pending() && down.due.is_some());
        up.refund();
        assert!(tokens() < 0.0);
        drop((up, down));
        assert!(tokens() >= 20.0);
    }
}
