//! Verifies passwords (RFC 1929), within the limits of each client address. They are hashed on other threads.

use std::sync::{Arc, LazyLock, Mutex};
use std::thread;
use std::time::Instant;

use super::login_throttle::{FREE_FAILURES, LoginThrottle, MAX_WAIT, Turn};
use super::passwords::Login;
use super::policy_handle::{PolicyHandle, PolicySnapshot};
use super::shares::{ClientKey, ShareGuard, Shares, lock};
use crate::counters::{self, Counter};
use crate::net::{ThreadPool, sleep_until, timeout_at};
use crate::policy::users::HashMemory;

/// Maximum number of threads, even with more cores: with the hashes of `--add-user`, they take 152 MiB.
const MAX_THREADS: usize = 8;
/// Maximum number of hashes of one client at a time.
const HASHES_PER_CLIENT: usize = 2;
/// Memory of a hash in KiB above which only one is computed at a time: all take at most 1 GiB + 8 × 64 MiB.
const LARGE_KIB: usize = 64 << 10;

/// Each has the memory of one hash, which is freed when the thread ends.
static THREADS: LazyLock<ThreadPool<HashMemory>> = LazyLock::new(|| ThreadPool::new("s5-hash", max_threads(), true));

/// At most one thread per core.
fn max_threads() -> usize {
    thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS)
}

/// The limits of logins, which outlive a reload.
pub(super) struct Logins {
    pub(super) threads: Shares,
    /// The threads that clients with failures may use: half of all, so that they do not delay the logins of other
    /// clients.
    suspects: Shares,
    large_hashes: Shares,
    throttle: Arc<Mutex<LoginThrottle<ClientKey>>>,
}

/// The policy with the password, or `None` if the login is refused.
type LoginDecision = Option<Arc<PolicySnapshot>>;

enum Hashed {
    Right(Arc<PolicySnapshot>),
    /// The login is refused at this time.
    Wrong(Instant),
    /// Not hashed, because the login must wait for a turn.
    MustWait,
}

impl Default for Logins {
    fn default() -> Self {
        Self {
            threads: Shares::new(max_threads(), HASHES_PER_CLIENT),
            suspects: Shares::new(max_threads().div_ceil(2), HASHES_PER_CLIENT),
            large_hashes: Shares::new(1, 1),
            throttle: Arc::default(),
        }
    }
}

impl Logins {
    /// Verifies a password, by the policy of that moment. Calls `on_refused` as soon as the result is known, and
    /// returns it after the delay. Returns `None` if the hash did not begin until `deadline`, or within [`MAX_WAIT`] if
    /// the logins of the client wait for turns.
    pub(super) async fn verify(
        &self,
        policy: &PolicyHandle,
        login: Arc<Login>,
        deadline: Instant,
        on_refused: impl Fn(),
    ) -> Option<LoginDecision> {
        let current = policy.current();
        if current.passwords.contains(&login, true, Instant::now()) {
            return Some(Some(current));
        }
        match timeout_at(deadline, self.hash(policy, &login, false)).await? {
            Hashed::Right(policy) => Some(Some(policy)),
            Hashed::Wrong(end) => {
                on_refused();
                delay_refusal(end).await;
                Some(None)
            }
            Hashed::MustWait => {
                // Boxed: most logins take no memory for it.
                let verified = Box::pin(self.verify_in_turn(policy, &login, on_refused));
                timeout_at(Instant::now() + MAX_WAIT, verified).await
            }
        }
    }

    async fn verify_in_turn(&self, policy: &PolicyHandle, login: &Arc<Login>, on_refused: impl Fn()) -> LoginDecision {
        let (client, uname) = (login.client, &login.credentials.uname);
        let is_known = policy.current().policy.users.as_ref().is_some_and(|users| users.contains(uname));
        if !is_known {
            on_refused();
        }
        let mut is_hashed = false;
        // Dropped after `turns`.
        let _leave = Leave(&self.throttle, client);
        let wait = |is_hashed: bool| lock(&self.throttle).wait(client, uname, is_known && !is_hashed, Instant::now());
        let mut turns = wait(is_hashed);
        loop {
            let next_turn = lock(&self.throttle).take_turn(client, Instant::now());
            match timeout_at(next_turn, turns.recv()).await {
                None => {}
                Some(Ok(Turn::Hash)) => {
                    if let Hashed::Right(policy) = self.hash(policy, login, true).await {
                        lock(&self.throttle).give_back_turn(client, &turns, Instant::now());
                        return Some(policy);
                    }
                    on_refused();
                    is_hashed = true;
                }
                Some(Ok(Turn::Refuse(end))) => {
                    // An unknown name takes as long as a known one, also if a hash takes longer than the delay.
                    if !is_hashed {
                        self.hash(policy, login, true).await;
                    }
                    delay_refusal(end).await;
                    return None;
                }
                // The client was evicted, because too many others had failures.
                Some(Err(_)) => turns = wait(is_hashed),
            }
        }
    }

    /// Hashes the password, unless it was verified lately. Without a turn, a failure counts.
    async fn hash(&self, policy: &PolicyHandle, login: &Arc<Login>, has_turn: bool) -> Hashed {
        let client = login.client;
        let failures = || lock(&self.throttle).failures(client, Instant::now());
        let must_wait = || !has_turn && failures() >= FREE_FAILURES;
        if must_wait() {
            return Hashed::MustWait;
        }
        let users = policy.current().policy.users.clone();
        let is_large = users.is_some_and(|users| users.hash_kib(&login.credentials.uname) > LARGE_KIB);
        let limits = [(failures() > 0, &self.suspects), (is_large, &self.large_hashes), (true, &self.threads)];
        let mut guards: Vec<Arc<ShareGuard>> = Vec::new();
        for (_, limit) in limits.iter().filter(|(is_needed, _)| *is_needed) {
            guards.push(limit.acquire(client).await.into());
        }
        // Logins that were hashed before this one may have failed.
        if must_wait() {
            return Hashed::MustWait;
        }
        let (policy, login, throttle) = (policy.current(), login.clone(), self.throttle.clone());
        // The limits and the failure count even if the client leaves meanwhile.
        let hash = move |memory: &mut HashMemory| {
            let _guards = guards;
            let is_right = policy.has_password(&login, memory);
            if is_large {
                // Other threads need it.
                *memory = HashMemory::default();
            }
            match is_right {
                true => Hashed::Right(policy),
                false if has_turn => Hashed::Wrong(Instant::now()),
                false => Hashed::Wrong(lock(&throttle).record_failure(client, Instant::now())),
            }
        };
        // If no thread can be started, this worker computes the hash: a right password is not refused.
        THREADS.run(hash.clone()).await.unwrap_or_else(|| hash(&mut HashMemory::default()))
    }
}

async fn delay_refusal(end: Instant) {
    counters::add(Counter::Delayed, u64::from(end > Instant::now()));
    sleep_until(end).await;
}

/// Removes a login that has waited from the throttle, also if it is cancelled.
struct Leave<'a>(&'a Mutex<LoginThrottle<ClientKey>>, ClientKey);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        lock(self.0).leave(self.1);
    }
}
