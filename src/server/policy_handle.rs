//! The current policy, shared by all sessions. A reload replaces it, and each session rechecks itself once.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Instant;

use super::local_addr::is_local;
use super::passwords::{Login, VerifiedPasswords};
use super::session_log::{SessionLog, with_addr};
use super::shares::lock;
use crate::policy::rules::{AccessRequest, Decision, Route, Rule};
use crate::policy::users::HashMemory;
use crate::policy::{Policy, is_reachable};

/// Maximum number of rules whose denials are counted separately. A block list has far more.
const MAX_DENYING_RULES: usize = 1000;

/// One generation of the policy, with the verified passwords of its users.
pub(super) struct PolicySnapshot {
    pub(super) policy: Policy,
    pub(super) passwords: VerifiedPasswords,
    pub(super) generation: u32,
    /// Number of denials by the label of the rule, for metrics.
    pub(super) denials: Mutex<BTreeMap<String, u64>>,
}

/// Holds the current policy.
pub(super) struct PolicyHandle {
    current: RwLock<Arc<PolicySnapshot>>,
    /// Copy of the current generation, which sessions read without taking the lock.
    generation: AtomicU32,
    /// Sessions that the current generation has closed.
    pub(super) closed_sessions: AtomicUsize,
    /// Set to let sessions keep the policy that they started with.
    keep_sessions: bool,
}

/// Reason why a request is refused.
#[derive(Clone, Copy, Debug)]
pub(super) enum Denial<'a> {
    /// The method or the user of the session is no longer accepted.
    Login,
    /// This rule denies it.
    Rule(&'a Rule),
    /// The address is not unicast, or the port is 0.
    Unreachable,
}

impl fmt::Display for Denial<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Login => f.write_str("this login is no longer valid"),
            Self::Rule(rule) => write!(f, "denied: {} ({rule})", rule.origin()),
            Self::Unreachable => f.write_str("not a unicast address, or port 0"),
        }
    }
}

impl PolicyHandle {
    pub(super) fn new(policy: Policy, keep_sessions: bool) -> Self {
        let current = RwLock::new(PolicySnapshot::new(policy, 0));
        Self { current, generation: 0.into(), closed_sessions: 0.into(), keep_sessions }
    }

    pub(super) fn current(&self) -> Arc<PolicySnapshot> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn replace(&self, policy: Policy) {
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        let generation = current.generation.wrapping_add(1);
        *current = PolicySnapshot::new(policy, generation);
        self.closed_sessions.store(0, Ordering::Relaxed);
        self.generation.store(generation, Ordering::Release);
    }

    /// Returns the current policy if its generation differs. `None` if sessions keep their policy.
    pub(super) fn newer_than(&self, generation: u32) -> Option<Arc<PolicySnapshot>> {
        let is_newer = !self.keep_sessions && self.generation.load(Ordering::Acquire) != generation;
        is_newer.then(|| self.current())
    }

    /// Rechecks a session after a reload, once per generation. Returns the reason if it is now denied. `seen` is the
    /// last generation that the session was checked with; `peer` returns its target address if known.
    pub(super) fn recheck(
        &self,
        log: &SessionLog,
        seen: &Cell<u32>,
        peer: impl FnOnce() -> Option<SocketAddr>,
    ) -> Option<String> {
        let snapshot = self.newer_than(seen.get())?;
        seen.set(snapshot.generation);
        let request = log.access_request();
        let request = peer().map_or(request, |peer| with_addr(request, peer));
        let denial = snapshot.authorize(&request).err()?;
        self.closed_sessions.fetch_add(1, Ordering::Relaxed);
        Some(denial.to_string())
    }
}

impl PolicySnapshot {
    fn new(policy: Policy, generation: u32) -> Arc<Self> {
        Arc::new(Self { policy, passwords: VerifiedPasswords::default(), generation, denials: Mutex::default() })
    }

    /// Returns whether the password of a login is right. Hashes it, unless it was verified lately.
    pub(super) fn has_password(&self, login: &Login, memory: &mut HashMemory) -> bool {
        let Some(users) = &self.policy.users else { return false };
        if self.passwords.contains(login, false, Instant::now()) {
            return true;
        }
        let is_right = users.verify(&login.credentials.uname, &login.credentials.passwd, memory);
        if is_right {
            self.passwords.insert(login, Instant::now());
        }
        is_right
    }

    fn count_denial(&self, rule: &Rule) {
        let (mut denials, label) = (lock(&self.denials), rule.label());
        let is_separate = denials.len() < MAX_DENYING_RULES || denials.contains_key(&label);
        *denials.entry(if is_separate { label } else { "others".into() }).or_default() += 1;
    }

    /// Decides a request, and returns its route. `None`: the rules depend on an address that is not known yet.
    pub(super) fn authorize(&self, request: &AccessRequest<'_>) -> Result<Option<Route>, Denial<'_>> {
        if request.identity.is_some_and(|identity| !self.policy.accepts_identity(&identity)) {
            return Err(Denial::Login);
        }
        let (rule, route) = match self.policy.evaluate(request, is_local) {
            Decision::Allow(rule, route) => (rule, route),
            Decision::Deny(rule) => {
                self.count_denial(rule);
                return Err(Denial::Rule(rule));
            }
            Decision::Undecided(_) => return Ok(None),
        };
        if is_reachable(request, rule, route) { Ok(Some(route)) } else { Err(Denial::Unreachable) }
    }
}
