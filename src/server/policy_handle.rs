//! The current policy, shared by all sessions. A reload replaces it, and each session rechecks itself once.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::local_addr::is_local;
use super::passwords::PasswordVerifier;
use super::reply::denial_reason;
use super::session_log::SessionLog;
use crate::policy::Policy;
use crate::policy::rules::{AccessRequest, Decision, Route};

/// One generation of the policy, with the password cache that belongs to its users.
#[derive(Debug)]
pub(super) struct PolicySnapshot {
    pub(super) policy: Policy,
    pub(super) passwords: PasswordVerifier,
    pub(super) generation: u32,
}

/// Holds the current policy.
#[derive(Debug)]
pub(super) struct PolicyHandle {
    current: RwLock<Arc<PolicySnapshot>>,
    /// Copy of the current generation, which sessions read without taking the lock.
    generation: AtomicU32,
    /// Sessions that the current generation has closed.
    pub(super) closed_sessions: AtomicUsize,
    /// Set to let sessions keep the policy that they started with.
    keep_sessions: bool,
}

impl PolicyHandle {
    pub(super) fn new(policy: Policy, keep_sessions: bool) -> Self {
        let snapshot = Arc::new(PolicySnapshot { policy, passwords: PasswordVerifier::default(), generation: 0 });
        Self { current: RwLock::new(snapshot), generation: 0.into(), closed_sessions: 0.into(), keep_sessions }
    }

    pub(super) fn current(&self) -> Arc<PolicySnapshot> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn replace(&self, policy: Policy) {
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        let generation = current.generation.wrapping_add(1);
        *current = Arc::new(PolicySnapshot { policy, passwords: current.passwords.with_empty_cache(), generation });
        self.closed_sessions.store(0, Ordering::Relaxed);
        self.generation.store(generation, Ordering::Release);
    }

    /// Returns the current policy if its generation differs. `None` if sessions keep their policy.
    pub(super) fn newer_than(&self, generation: u32) -> Option<Arc<PolicySnapshot>> {
        let is_newer = !self.keep_sessions && self.generation.load(Ordering::Acquire) != generation;
        is_newer.then(|| self.current())
    }
}

impl PolicySnapshot {
    pub(super) fn evaluate(&self, request: &AccessRequest<'_>) -> Decision<'_> {
        self.policy.evaluate(request, is_local)
    }

    /// Returns the route if the request is allowed; `None` if it is denied or not decided yet.
    pub(super) fn allowed_route(&self, request: &AccessRequest<'_>) -> Option<Route> {
        match self.evaluate(request) {
            Decision::Allow(_, route) => Some(route),
            Decision::Deny(_) | Decision::Undecided(_) => None,
        }
    }

    /// Checks the login and the request of a session. Returns the reason if either is refused.
    pub(super) fn reason_to_refuse(&self, log: &SessionLog, request: &AccessRequest<'_>) -> Option<String> {
        if log.identity().is_some_and(|identity| !self.policy.accepts_identity(&identity)) {
            return Some("this login is no longer valid".into());
        }
        match self.evaluate(request) {
            Decision::Deny(rule) => Some(denial_reason(rule)),
            Decision::Allow(..) | Decision::Undecided(_) => None,
        }
    }
}
