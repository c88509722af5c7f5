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
/// Upper limit of one wait.
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

/// The buckets of a session, at least one. All of them apply at once.
#[derive(Clone, Debug)]
pub struct RateLimit {
    /// The bucket of the session; if only its user has a limit, that of the user.
    pub session: Arc<TokenBucket>,
    /// The bucket that all sessions of the user share, if the session has its own limit too.
    pub user: Option<Arc<TokenBucket>>,
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

    /// Takes the tokens for one datagram. Returns false if a bucket is empty, and the caller drops the datagram.
    pub fn try_take(&self, bytes: usize, now: Instant) -> bool {
        let has_tokens = self.buckets().all(|bucket| bucket.state(now).tokens > 0.0);
        if has_tokens {
            for bucket in self.buckets() {
                bucket.reserve(bytes, now);
            }
        }
        has_tokens
    }
}

/// The reservations of a relay, one for each direction.
#[derive(Debug)]
pub struct RelayRateLimit {
    pub(super) up: Reservation,
    pub(super) down: Reservation,
}

impl RelayRateLimit {
    /// Returns the limit of one relay, which takes its bytes from the buckets of `rate_limit`.
    pub fn new(rate_limit: &RateLimit) -> Self {
        let [up, down] = [(); 2].map(|()| Reservation { rate_limit: rate_limit.clone(), state: Mutex::default() });
        Self { up, down }
    }

    /// Returns the earliest time at which a waiting direction can continue.
    pub(super) fn due(&self) -> Option<Instant> {
        [&self.up, &self.down].into_iter().filter_map(|reservation| reservation.state().due).min()
    }
}

/// The reserved bytes of one direction. Those that have not moved are refunded when it is dropped.
#[derive(Debug)]
pub(super) struct Reservation {
    rate_limit: RateLimit,
    state: Mutex<Reserved>,
}

#[derive(Debug, Default)]
struct Reserved {
    bytes: usize,
    /// Time at which the bytes are earned. `None` after that.
    due: Option<Instant>,
}

impl Reservation {
    fn state(&self) -> MutexGuard<'_, Reserved> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ready with the number of bytes that may move now. Sets no timer: poll again at [`RelayRateLimit::due`].
    pub(super) fn poll(&self, requested: usize) -> Poll<usize> {
        let (mut state, now) = (self.state(), Instant::now());
        if state.bytes == 0 {
            let (bytes, wait) = self.rate_limit.reserve(requested, now);
            *state = Reserved { bytes, due: Some(now + wait) };
        }
        state.due = state.due.filter(|due| *due > now);
        if state.due.is_some() { Poll::Pending } else { Poll::Ready(state.bytes) }
    }

    /// Deducts bytes that have moved.
    pub(super) fn commit(&self, bytes: usize) {
        let mut state = self.state();
        state.bytes = state.bytes.saturating_sub(bytes);
    }

    /// Refunds the reserved bytes, because none can move now. Other relays can use them.
    pub(super) fn refund(&self) {
        let bytes = std::mem::take(&mut *self.state()).bytes;
        if bytes > 0 {
            self.rate_limit.refund(bytes);
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
    fn reservation_is_refunded_when_no_byte_can_move_and_on_drop() {
        let rate_limit = rate_limit(1_000, Instant::now());
        let tokens = || rate_limit.session.state(Instant::now()).tokens;
        let relay_limit = RelayRateLimit::new(&rate_limit);
        assert_eq!(relay_limit.up.poll(100), Poll::Ready(25), "at least 25 ms of bytes");
        relay_limit.up.commit(5);
        assert_eq!((relay_limit.up.poll(100), relay_limit.due()), (Poll::Ready(20), None));
        assert!(relay_limit.down.poll(100).is_pending() && relay_limit.due().is_some());
        relay_limit.up.refund();
        assert!(tokens() < 0.0);
        drop(relay_limit);
        assert!(tokens() >= 20.0);
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
