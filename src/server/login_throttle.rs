//! Slows down password guessing, and refuses no right password. The time is an argument.
//!
//! After five failures of a client within a minute, its logins wait for turns. At each turn, one password is hashed.
//! The user names take turns, and the newest login of a name is first. So even many other logins delay a right password
//! by only one turn, unless they have the same name.
//!
//! Refusals must not show which names are known. An unknown name takes the turn of no other name, and is refused like a
//! known one: at a turn, the newest login that was hashed or needs no hash is refused, after a delay.

use std::collections::HashMap;
use std::fmt::Display;
use std::hash::{BuildHasher as _, Hash};
use std::time::{Duration, Instant};

use smol::channel::{self, Receiver, Sender};

/// Failures within [`FAILURE_WINDOW`] without a delay, because users mistype.
pub(super) const FREE_FAILURES: usize = 5;
const FAILURE_WINDOW: Duration = Duration::from_secs(60);
/// Delay of the first refusal after that. It doubles with each further one, up to [`MAX_DELAY`].
const MIN_DELAY: Duration = Duration::from_secs(1);
const MAX_DELAY: Duration = Duration::from_secs(30);
/// Refusals of a client that are delayed at a time.
const MAX_DELAYED: usize = 2;
/// Time between two turns; less while the delays are shorter. It limits the guesses: 900 in an hour.
const TURN_INTERVAL: Duration = Duration::from_secs(4);
/// Time without a refusal after which a client is forgotten.
const FORGET_TIME: Duration = Duration::from_secs(600);
/// Names whose last turns are known. All other names precede them.
const MAX_NAMES: usize = 64;
/// Maximum wait for a turn: by then, each of these names has had one.
pub(super) const MAX_WAIT: Duration = TURN_INTERVAL.saturating_mul(MAX_NAMES as u32);
/// Maximum number of tracked clients. One without waiting logins, with the fewest refusals, is evicted first.
const MAX_CLIENTS: usize = 4096;

/// What a waiting login has to do.
pub(super) enum Turn {
    /// Hash the password.
    Hash,
    /// Be refused, at this time.
    Refuse(Instant),
}

/// The clients with recent failures, by address, IPv6 by /64.
pub(super) struct LoginThrottle<K> {
    clients: HashMap<K, FailedLogins>,
}

struct FailedLogins {
    /// Times of the failures without a delay, within [`FAILURE_WINDOW`]. With [`FREE_FAILURES`], the logins wait for
    /// turns.
    free: Vec<Instant>,
    /// Number of refusals with a delay.
    refusals: u32,
    /// Ends of the last delays, or the time of the last failure.
    delays: [Instant; MAX_DELAYED],
    next_turn: Instant,
    /// The names of the last turns, hashed, newest first.
    names: Vec<u64>,
    /// The logins that wait, oldest first.
    waiting: Vec<WaitingLogin>,
    /// Number of those in `waiting` that no longer wait.
    left: usize,
}

struct WaitingLogin {
    name: u64,
    needs_hash: bool,
    turns: Sender<Turn>,
}

impl FailedLogins {
    fn new(now: Instant) -> Self {
        let (free, names, waiting) = (Vec::new(), Vec::new(), Vec::new());
        Self { free, refusals: 0, delays: [now; MAX_DELAYED], next_turn: now, names, waiting, left: 0 }
    }

    fn is_expired(&self, now: Instant) -> bool {
        let time = if self.free.len() < FREE_FAILURES { FAILURE_WINDOW } else { FORGET_TIME };
        self.delays.iter().all(|end| now.saturating_duration_since(*end) >= time)
    }

    fn delay(&self) -> Duration {
        MIN_DELAY.saturating_mul(2_u32.saturating_pow(self.refusals)).min(MAX_DELAY)
    }

    /// Delays a refusal. Returns the end of the delay.
    fn refuse(&mut self, now: Instant) -> Instant {
        let end = now + self.delay();
        self.refusals = self.refusals.saturating_add(1);
        self.delays.iter_mut().min().into_iter().for_each(|oldest| *oldest = end);
        end
    }

    fn remove_left(&mut self) {
        self.left = 0;
        self.waiting.retain(|login| !login.turns.is_closed());
        self.waiting.shrink_to_fit();
    }

    /// Performs the next turn if it is due. Returns the time of the one after it.
    fn take_turn(&mut self, now: Instant) -> Instant {
        if now < self.next_turn {
            return self.next_turn;
        }
        self.remove_left();
        if self.waiting.is_empty() {
            return now;
        }
        self.next_turn = now + self.delay().min(TURN_INTERVAL);
        let turns_since = |name| self.names.iter().position(|other| *other == name).unwrap_or(MAX_NAMES);
        let logins = self.waiting.iter_mut().enumerate().filter(|(_, login)| login.needs_hash);
        if let Some((_, login)) = logins.max_by_key(|(i, login)| (turns_since(login.name), *i)) {
            login.needs_hash = false;
            self.names.retain(|name| *name != login.name);
            self.names.insert(0, login.name);
            self.names.truncate(MAX_NAMES);
            let _ = login.turns.try_send(Turn::Hash);
        }
        if self.delays.iter().any(|end| *end <= now)
            && let Some(newest) = self.waiting.iter().rposition(|login| !login.needs_hash)
        {
            let (login, end) = (self.waiting.remove(newest), self.refuse(now));
            let _ = login.turns.try_send(Turn::Refuse(end));
        }
        self.next_turn
    }
}

impl<K> Default for LoginThrottle<K> {
    fn default() -> Self {
        Self { clients: HashMap::new() }
    }
}

impl<K: Copy + Display + Eq + Hash> LoginThrottle<K> {
    /// Returns the number of recent failures of `client`. With [`FREE_FAILURES`], its logins wait for turns.
    pub(super) fn failures(&self, client: K, now: Instant) -> usize {
        let failed = self.clients.get(&client).filter(|failed| !failed.is_expired(now));
        failed.map_or(0, |failed| failed.free.len())
    }

    /// Counts a failure of a login without a turn. Returns the time to refuse it.
    pub(super) fn record_failure(&mut self, client: K, now: Instant) -> Instant {
        let failed = self.failed_logins(client, now);
        if failed.free.len() >= FREE_FAILURES {
            return failed.refuse(now);
        }
        failed.free.retain(|time| now.saturating_duration_since(*time) < FAILURE_WINDOW);
        failed.free.push(now);
        failed.delays = [now; MAX_DELAYED];
        if failed.free.len() >= FREE_FAILURES {
            log::warn!(
                "{FREE_FAILURES} failed logins from {client} within a minute: its further logins wait for turns"
            );
        }
        now
    }

    /// Lets a login wait. The caller drops the result to end that, and then calls [`Self::leave`]; meanwhile, it calls
    /// [`Self::take_turn`].
    pub(super) fn wait(&mut self, client: K, name: &[u8], needs_hash: bool, now: Instant) -> Receiver<Turn> {
        let name = self.clients.hasher().hash_one(name);
        let (turns, receiver) = channel::bounded(2);
        self.failed_logins(client, now).waiting.push(WaitingLogin { name, needs_hash, turns });
        receiver
    }

    /// Frees the memory of a login that no longer waits: when it leaves, or once half of the logins of `client` have
    /// left.
    pub(super) fn leave(&mut self, client: K) {
        let Some(failed) = self.clients.get_mut(&client) else { return };
        failed.left += 1;
        if 2 * failed.left >= failed.waiting.len() {
            failed.remove_left();
        }
    }

    /// Performs the next turn of `client` if it is due. Returns the time of the next call.
    pub(super) fn take_turn(&mut self, client: K, now: Instant) -> Instant {
        self.clients.get_mut(&client).map_or(now, |failed| failed.take_turn(now))
    }

    /// Ends the turn of a login with a right password at once. `turns` has the refusal that it would have had, if any.
    pub(super) fn give_back_turn(&mut self, client: K, turns: &Receiver<Turn>, now: Instant) {
        turns.close();
        let Some(failed) = self.clients.get_mut(&client) else { return };
        if let Ok(Turn::Refuse(refusal)) = turns.try_recv() {
            failed.refusals = failed.refusals.saturating_sub(1);
            failed.delays.iter_mut().filter(|end| **end == refusal).for_each(|end| *end = now);
        }
        failed.next_turn = now;
        failed.take_turn(now);
    }

    /// Returns the entry of `client`, which is a new one if it has expired.
    fn failed_logins(&mut self, client: K, now: Instant) -> &mut FailedLogins {
        if !self.clients.contains_key(&client) && self.clients.len() >= MAX_CLIENTS {
            self.clients.retain(|_, failed| !failed.is_expired(now));
            let rank =
                |failed: &FailedLogins| (failed.waiting.len(), failed.free.len(), failed.refusals, failed.delays);
            let evicted = self.clients.iter().min_by_key(|(_, failed)| rank(failed)).map(|(client, _)| *client);
            evicted.filter(|_| self.clients.len() >= MAX_CLIENTS).map(|client| self.clients.remove(&client));
        }
        let failed = self.clients.entry(client).or_insert_with(|| FailedLogins::new(now));
        if failed.is_expired(now) {
            *failed = FailedLogins::new(now);
        }
        failed
    }
}

#[cfg(test)]
mod tests {
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
}
