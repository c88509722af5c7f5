//! Slows down password guessing, and refuses no right password. The clock is an argument.
//!
//! After five failures of a client address within a minute, its logins wait for turns. At each turn, one password is
//! hashed; if it is wrong, the refusal is delayed. The names take turns, the newest login of a name first: a client that
//! waits with many logins delays one for another name by a turn, and a later one for the same name too. A login for an
//! unknown name needs no hash, so it takes no turn of the others. The times of the refusals do not show which names are
//! known: one of the two newest logins that have been hashed, or that need no hash, is refused next.

use std::collections::{HashMap, VecDeque};
use std::fmt::Display;
use std::hash::{BuildHasher as _, Hash, RandomState};
use std::time::{Duration, Instant};

use smol::channel::{self, Receiver, Sender};

/// Failures within [`FAILURE_WINDOW`] without a delay, because users mistype.
pub(super) const FREE_FAILURES: usize = 5;
const FAILURE_WINDOW: Duration = Duration::from_secs(60);
/// Delay of the first refusal after that. It doubles with each further one, up to [`MAX_DELAY`].
const MIN_DELAY: Duration = Duration::from_secs(1);
const MAX_DELAY: Duration = Duration::from_secs(30);
/// Time between two turns; less while the delays are shorter. It limits the guesses: 900 in an hour.
const TURN_INTERVAL: Duration = Duration::from_secs(4);
/// Refusals of a client that are delayed at a time.
const MAX_DELAYED: usize = 2;
/// Time without a refusal after which a client is forgotten.
const FORGET_TIME: Duration = Duration::from_secs(600);
/// Names whose last turns are known. A name that had none is first.
const MAX_NAMES: usize = 64;
/// Maximum wait for a turn: by then, each of the names has had one.
pub(super) const MAX_WAIT: Duration = TURN_INTERVAL.saturating_mul(MAX_NAMES as u32);
/// Maximum number of tracked clients. One without waiting logins, with the fewest refusals, is evicted first.
const MAX_CLIENTS: usize = 4096;

/// What a waiting login has to do.
#[derive(Debug)]
pub(super) enum Turn {
    /// Hash the password.
    Hash,
    /// Be refused, at this time.
    Refuse(Instant),
}

/// The clients with recent failures, by address, IPv6 by /64.
pub(super) struct LoginThrottle<K> {
    clients: HashMap<K, FailedLogins>,
    name_hasher: RandomState,
}

#[derive(Default)]
struct FailedLogins {
    /// Times of the last failures, oldest first; at most [`FREE_FAILURES`].
    recent: Vec<Instant>,
    throttled: Option<Throttled>,
}

/// A client that has used up its free failures.
struct Throttled {
    /// Number of delayed refusals.
    refusals: u32,
    /// Ends of the last delays.
    delays: [Instant; MAX_DELAYED],
    next_turn: Instant,
    /// The names of the last turns, hashed, oldest first.
    names: VecDeque<u64>,
    /// The logins that wait, oldest first.
    waiting: Vec<WaitingLogin>,
}

struct WaitingLogin {
    name: u64,
    needs_hash: bool,
    turns: Sender<Turn>,
}

impl FailedLogins {
    fn is_expired(&self, now: Instant) -> bool {
        let since = |time: Option<&Instant>| time.map(|time| now.saturating_duration_since(*time));
        match &self.throttled {
            Some(throttled) => since(throttled.delays.iter().max()) >= Some(FORGET_TIME),
            None => since(self.recent.last()) >= Some(FAILURE_WINDOW),
        }
    }
}

impl Throttled {
    fn new(now: Instant) -> Self {
        Self { refusals: 0, delays: [now; MAX_DELAYED], next_turn: now, names: VecDeque::new(), waiting: Vec::new() }
    }

    fn delay(&self) -> Duration {
        MIN_DELAY.saturating_mul(2_u32.saturating_pow(self.refusals)).min(MAX_DELAY)
    }

    /// Delays a refusal. Returns the time of its end.
    fn refuse(&mut self, now: Instant) -> Instant {
        let end = now + self.delay();
        self.refusals = self.refusals.saturating_add(1);
        self.delays.iter_mut().min().into_iter().for_each(|oldest| *oldest = end);
        end
    }

    /// Performs the next turn if it is due. Returns the time of the one after it.
    fn take_turn(&mut self, now: Instant) -> Instant {
        if now < self.next_turn {
            return self.next_turn;
        }
        self.waiting.retain(|login| !login.turns.is_closed());
        if self.waiting.is_empty() {
            return now;
        }
        self.next_turn = now + self.delay().min(TURN_INTERVAL);
        let names = &self.names;
        let turns_since = |name| names.iter().rev().position(|other| *other == name).unwrap_or(MAX_NAMES);
        let logins = self.waiting.iter_mut().enumerate().filter(|(_, login)| login.needs_hash);
        if let Some((_, login)) = logins.max_by_key(|(i, login)| (turns_since(login.name), *i)) {
            login.needs_hash = false;
            let (name, _) = (login.name, login.turns.try_send(Turn::Hash));
            self.names.retain(|other| *other != name);
            self.names.push_back(name);
            if self.names.len() > MAX_NAMES {
                self.names.pop_front();
            }
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
        Self { clients: HashMap::new(), name_hasher: RandomState::new() }
    }
}

impl<K: Copy + Display + Eq + Hash> LoginThrottle<K> {
    /// Returns the number of recent failures of `client`. From [`FREE_FAILURES`] on, its logins wait for turns.
    pub(super) fn failures(&self, client: K, now: Instant) -> usize {
        let failed = self.clients.get(&client).filter(|failed| !failed.is_expired(now));
        failed.map_or(0, |failed| if failed.throttled.is_some() { FREE_FAILURES } else { failed.recent.len() })
    }

    /// Counts a failure. Returns the time to refuse the login.
    pub(super) fn record_failure(&mut self, client: K, now: Instant) -> Instant {
        let failed = self.failed_logins(client, now);
        if let Some(throttled) = &mut failed.throttled {
            return throttled.refuse(now);
        }
        failed.recent.retain(|time| now.saturating_duration_since(*time) < FAILURE_WINDOW);
        failed.recent.push(now);
        if failed.recent.len() >= FREE_FAILURES {
            failed.throttled = Some(Throttled::new(now));
            log::warn!(
                "{FREE_FAILURES} failed logins from {client} within a minute: its further logins wait for turns"
            );
        }
        now
    }

    /// Lets a login wait. The caller drops the result to end that, and calls [`Self::take_turn`] meanwhile.
    pub(super) fn wait(&mut self, client: K, name: &[u8], needs_hash: bool, now: Instant) -> Receiver<Turn> {
        let name = self.name_hasher.hash_one(name);
        let throttled = self.failed_logins(client, now).throttled.get_or_insert_with(|| Throttled::new(now));
        let (turns, receiver) = channel::bounded(2);
        throttled.waiting.push(WaitingLogin { name, needs_hash, turns });
        receiver
    }

    /// Performs the next turn of `client` if it is due. Returns the time of the next call.
    pub(super) fn take_turn(&mut self, client: K, now: Instant) -> Instant {
        let throttled = self.clients.get_mut(&client).and_then(|failed| failed.throttled.as_mut());
        throttled.map_or(now, |throttled| throttled.take_turn(now))
    }

    /// Ends a turn at once, because its password is right. `refusal`: the one that the login would have had.
    pub(super) fn give_back_turn(&mut self, client: K, refusal: Option<Instant>, now: Instant) {
        let throttled = self.clients.get_mut(&client).and_then(|failed| failed.throttled.as_mut());
        if let Some(throttled) = throttled {
            let end = throttled.delays.iter_mut().find(|end| Some(**end) == refusal);
            throttled.refusals -= u32::from(end.is_some());
            end.into_iter().for_each(|end| *end = now);
            throttled.next_turn = now;
            throttled.take_turn(now);
        }
    }

    /// Returns the entry of `client`, which is a new one if it has expired.
    fn failed_logins(&mut self, client: K, now: Instant) -> &mut FailedLogins {
        if !self.clients.contains_key(&client) && self.clients.len() >= MAX_CLIENTS {
            self.make_room(now);
        }
        let failed = self.clients.entry(client).or_default();
        if failed.is_expired(now) {
            *failed = FailedLogins::default();
        }
        failed
    }

    fn make_room(&mut self, now: Instant) {
        self.clients.retain(|_, failed| !failed.is_expired(now));
        if self.clients.len() >= MAX_CLIENTS {
            let rank = |failed: &FailedLogins| {
                let throttled = failed.throttled.as_ref();
                (
                    throttled.map(|throttled| (throttled.waiting.len(), throttled.refusals)),
                    failed.recent.last().copied(),
                )
            };
            let evicted = self.clients.iter().min_by_key(|(_, failed)| rank(failed)).map(|(client, _)| *client);
            evicted.map(|client| self.clients.remove(&client));
        }
    }
}
