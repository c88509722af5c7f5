//! Who fails to log in, and what comes of it: after a few failures answers take longer and longer, then the door is
//! shut for a while. Knows addresses and times and nothing else; the clock is an argument.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// How many failures within [`WINDOW`] are taken for typing errors.
const FREE: usize = 5;
/// See [`FREE`].
const WINDOW: Duration = Duration::from_secs(60);
/// How long the first answer after them takes; each further one twice as long, up to [`LONGEST`].
const SHORTEST: Duration = Duration::from_secs(1);
/// See [`SHORTEST`].
pub(super) const LONGEST: Duration = Duration::from_secs(30);
/// How many answers are delayed before the door is shut.
const DELAYED: u32 = 6;
/// How long the door is shut; and after how long without a failure everything is forgotten.
pub(super) const SHUT: Duration = Duration::from_secs(600);
/// How many sources are remembered. At the limit the most harmless one is forgotten for a new one, and of several the
/// one that has been quiet for longest.
const MAX_SOURCES: usize = 4096;

/// Those who have failed to log in lately.
#[derive(Debug, Default)]
pub(super) struct Offenders(HashMap<IpAddr, Offender>);

#[derive(Debug)]
struct Offender {
    /// When the first and the last of the failures that still count were; the last one is the last of all.
    recent: [Option<Instant>; FREE],
    last: Instant,
    /// How many answers were delayed, once there were too many failures.
    strikes: Option<u32>,
}

impl Offender {
    fn new(now: Instant) -> Self {
        Self { recent: [None; FREE], last: now, strikes: None }
    }

    fn is_over(&self, now: Instant) -> bool {
        now.duration_since(self.last) >= if self.strikes.is_some() { SHUT } else { WINDOW }
    }

    fn is_shut_out(&self) -> bool {
        self.strikes.is_some_and(|strikes| strikes >= DELAYED)
    }

    fn fail(&mut self, now: Instant) {
        self.last = now;
        if let Some(strikes) = &mut self.strikes {
            *strikes += 1;
            return;
        }
        self.recent.rotate_left(1);
        if let Some(newest) = self.recent.last_mut() {
            *newest = Some(now);
        }
        let oldest = self.recent.first().copied().flatten();
        self.strikes = oldest.filter(|oldest| now.duration_since(*oldest) < WINDOW).map(|_| 0);
    }
}

impl Offenders {
    /// How much later than otherwise `source` gets its next answer.
    pub(super) fn delay(&self, source: IpAddr, now: Instant) -> Duration {
        match self.get(source, now).and_then(|offender| offender.strikes) {
            Some(strikes) => SHORTEST.saturating_mul(2_u32.saturating_pow(strikes)).min(LONGEST),
            None => Duration::ZERO,
        }
    }

    /// Whether connections of `source` are closed as they come.
    pub(super) fn is_shut_out(&self, source: IpAddr, now: Instant) -> bool {
        self.get(source, now).is_some_and(Offender::is_shut_out)
    }

    /// Counts a failure. True when it is the one that shuts the door.
    pub(super) fn fail(&mut self, source: IpAddr, now: Instant) -> bool {
        if self.get(source, now).is_none() {
            self.0.remove(&source);
            self.make_room(now);
        }
        let offender = self.0.entry(source).or_insert_with(|| Offender::new(now));
        let was_shut_out = offender.is_shut_out();
        offender.fail(now);
        offender.is_shut_out() && !was_shut_out
    }

    fn get(&self, source: IpAddr, now: Instant) -> Option<&Offender> {
        self.0.get(&source).filter(|offender| !offender.is_over(now))
    }

    fn make_room(&mut self, now: Instant) {
        if self.0.len() < MAX_SOURCES {
            return;
        }
        self.0.retain(|_, offender| !offender.is_over(now));
        if self.0.len() >= MAX_SOURCES {
            let harmless = self.0.iter().min_by_key(|(_, offender)| (offender.strikes, offender.last));
            let harmless = harmless.map(|(source, _)| *source);
            harmless.map(|source| self.0.remove(&source));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
    const B: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2));

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn answers_take_longer_and_longer_and_then_the_door_is_shut_for_a_while() {
        let (mut offenders, now) = (Offenders::default(), Instant::now());
        for _ in 0..FREE {
            assert_eq!(offenders.delay(A, now), Duration::ZERO);
            assert!(!offenders.fail(A, now));
        }
        for delay in [1, 2, 4, 8, 16, 30] {
            assert_eq!(offenders.delay(A, now), seconds(delay));
            assert!(!offenders.is_shut_out(A, now));
            assert_eq!(offenders.fail(A, now), delay == 30);
        }
        assert!(offenders.is_shut_out(A, now + SHUT - seconds(1)));
        assert!(!offenders.fail(A, now), "the door is shut once");
        assert!(!offenders.is_shut_out(A, now + SHUT));
        assert_eq!(offenders.delay(A, now + SHUT), Duration::ZERO);
        assert!(!offenders.is_shut_out(B, now), "somebody else");
    }

    #[test]
    fn failures_that_are_far_apart_cost_nothing() {
        let (mut offenders, mut now) = (Offenders::default(), Instant::now());
        for _ in 0..100 {
            offenders.fail(A, now);
            now += WINDOW / 4;
            assert_eq!(offenders.delay(A, now), Duration::ZERO);
        }
        now += WINDOW;
        (0..FREE).for_each(|_| assert!(!offenders.fail(A, now)));
        assert_eq!(offenders.delay(A, now + SHUT - seconds(1)), seconds(1));
        assert_eq!(offenders.delay(A, now + SHUT), Duration::ZERO, "it is forgotten");
    }

    #[test]
    fn of_too_many_sources_the_harmless_and_quiet_ones_are_forgotten() {
        let (mut offenders, now) = (Offenders::default(), Instant::now());
        (0..FREE).for_each(|_| assert!(!offenders.fail(A, now)));
        for n in 0..2 * MAX_SOURCES {
            let source = IpAddr::from(u32::try_from(n).expect("small").to_be_bytes());
            offenders.fail(source, now + seconds(1));
            assert!(offenders.0.len() <= MAX_SOURCES);
        }
        assert_eq!(offenders.delay(A, now + seconds(2)), seconds(1));
    }
}
