//! Slows down password guessing. After five failures of a client address within a minute, the answers to further logins
//! have a growing delay. After six more failures, its connections are closed for 10 minutes. The clock is an argument.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Failures within [`FAILURE_WINDOW`] without a delay, because users mistype.
const FREE_FAILURES: usize = 5;
const FAILURE_WINDOW: Duration = Duration::from_secs(60);
/// Delay of the first answer after that. It doubles with each further failure, up to [`MAX_DELAY`].
const MIN_DELAY: Duration = Duration::from_secs(1);
pub(super) const MAX_DELAY: Duration = Duration::from_secs(30);
/// Failures with a delay before the client is blocked.
const MAX_DELAYED_FAILURES: u32 = 6;
/// Time that a client is blocked, and time without a failure after which delayed failures are forgotten.
pub(super) const BLOCK_TIME: Duration = Duration::from_secs(600);
/// Maximum number of tracked addresses. The one with the fewest delayed failures is evicted first, then the oldest.
const MAX_CLIENTS: usize = 4096;

/// The clients with recent failures, by address, IPv6 by /64.
#[derive(Default)]
pub(super) struct LoginThrottle(HashMap<IpAddr, FailedLogins>);

struct FailedLogins {
    /// Times of the last failures, oldest first.
    recent: [Option<Instant>; FREE_FAILURES],
    last: Instant,
    /// Number of failures with a delay; `None` until the free ones are used up.
    delayed_failures: Option<u32>,
}

impl FailedLogins {
    fn new(now: Instant) -> Self {
        Self { recent: [None; FREE_FAILURES], last: now, delayed_failures: None }
    }

    fn is_expired(&self, now: Instant) -> bool {
        now.duration_since(self.last) >= if self.delayed_failures.is_some() { BLOCK_TIME } else { FAILURE_WINDOW }
    }

    fn record_failure(&mut self, now: Instant) {
        self.last = now;
        if let Some(count) = &mut self.delayed_failures {
            *count += 1;
            return;
        }
        self.recent.rotate_left(1);
        if let Some(newest) = self.recent.last_mut() {
            *newest = Some(now);
        }
        let oldest = self.recent.first().copied().flatten();
        self.delayed_failures = oldest.filter(|oldest| now.duration_since(*oldest) < FAILURE_WINDOW).map(|_| 0);
    }
}

impl LoginThrottle {
    /// Returns the delay of the next login answer to `client`; `None` if the client is blocked.
    pub(super) fn delay(&self, client: IpAddr, now: Instant) -> Option<Duration> {
        match self.failures_of(client, now).and_then(|failed| failed.delayed_failures) {
            Some(MAX_DELAYED_FAILURES..) => None,
            Some(count) => Some(MIN_DELAY.saturating_mul(2_u32.saturating_pow(count)).min(MAX_DELAY)),
            None => Some(Duration::ZERO),
        }
    }

    /// Counts a failure. Returns true if `client` is blocked from now on.
    pub(super) fn record_failure(&mut self, client: IpAddr, now: Instant) -> bool {
        if self.failures_of(client, now).is_none() {
            self.0.remove(&client);
            self.make_room(now);
        }
        let failed = self.0.entry(client).or_insert_with(|| FailedLogins::new(now));
        failed.record_failure(now);
        failed.delayed_failures == Some(MAX_DELAYED_FAILURES)
    }

    fn failures_of(&self, client: IpAddr, now: Instant) -> Option<&FailedLogins> {
        self.0.get(&client).filter(|failed| !failed.is_expired(now))
    }

    fn make_room(&mut self, now: Instant) {
        if self.0.len() < MAX_CLIENTS {
            return;
        }
        self.0.retain(|_, failed| !failed.is_expired(now));
        if self.0.len() >= MAX_CLIENTS {
            let evicted = self.0.iter().min_by_key(|(_, failed)| (failed.delayed_failures, failed.last));
            let evicted = evicted.map(|(client, _)| *client);
            evicted.map(|client| self.0.remove(&client));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn delay_doubles_after_free_failures_until_the_client_is_blocked_for_ten_minutes() {
        let (mut throttle, now) = (LoginThrottle::default(), Instant::now());
        for _ in 0..FREE_FAILURES {
            assert_eq!(throttle.delay(A, now), Some(Duration::ZERO));
            assert!(!throttle.record_failure(A, now));
        }
        for delay in [1, 2, 4, 8, 16, 30] {
            assert_eq!(throttle.delay(A, now), Some(seconds(delay)));
            assert_eq!(throttle.record_failure(A, now), delay == 30);
        }
        assert!(!throttle.record_failure(A, now), "only one failure starts the block");
        assert_eq!(throttle.delay(A, now + BLOCK_TIME - seconds(1)), None);
        assert_eq!(throttle.delay(A, now + BLOCK_TIME), Some(Duration::ZERO));
    }

    #[test]
    fn failures_far_apart_are_not_delayed() {
        let (mut throttle, mut now) = (LoginThrottle::default(), Instant::now());
        for _ in 0..100 {
            throttle.record_failure(A, now);
            now += FAILURE_WINDOW / 4;
            assert_eq!(throttle.delay(A, now), Some(Duration::ZERO));
        }
        now += FAILURE_WINDOW;
        (0..FREE_FAILURES).for_each(|_| assert!(!throttle.record_failure(A, now)));
        assert_eq!(throttle.delay(A, now + BLOCK_TIME - seconds(1)), Some(seconds(1)));
        assert_eq!(throttle.delay(A, now + BLOCK_TIME), Some(Duration::ZERO), "forgotten");
    }
}
