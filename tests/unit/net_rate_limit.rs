//! Unit tests of the private items of `src/net/rate_limit.rs`.

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
