//! Unit tests of the private items of `src/server/login_throttle.rs`.

use super::*;

#[test]
fn logins_that_left_take_no_memory() {
    let (mut throttle, now) = (LoginThrottle::default(), Instant::now());
    (0..FREE_FAILURES).for_each(|_| assert_eq!(throttle.record_failure("client", now), now));
    let mut logins: Vec<_> = (0..100).map(|_| throttle.wait("client", b"alice", true, now)).collect();
    for left in 1..=100 {
        logins.pop();
        throttle.leave("client");
        let waiting = throttle.clients.get("client").map(|failed| &failed.waiting);
        assert!(waiting.is_some_and(|waiting| waiting.len() <= 2 * (100 - left)), "{left}");
    }
    assert!(throttle.clients.get("client").is_some_and(|failed| failed.waiting.capacity() == 0));
}
