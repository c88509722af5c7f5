//! The policy that is in force: sessions ask it, a reload replaces it, and those that it would refuse are cut.

use std::cell::Cell;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::passwords::PasswordVerifier;
use super::session::SessionError;
use super::session_log::SessionLog;
use super::{Server, is_local};
use crate::policy::Policy;
use crate::policy::rules::{AccessRequest, Decision, Route, Rule};

/// A policy, and the logins that were verified by it.
#[derive(Debug)]
pub(super) struct PolicySnapshot {
    pub(super) policy: Policy,
    pub(super) passwords: PasswordVerifier,
    pub(super) generation: u32,
}

/// The law of the day.
#[derive(Debug)]
pub(super) struct PolicyHandle {
    current: RwLock<Arc<PolicySnapshot>>,
    /// That of the current one.
    generation: AtomicU32,
    /// How many sessions the current one has cut.
    pub(super) closed_sessions: AtomicUsize,
    /// Whether sessions live on under the law that they began with.
    keep_sessions: bool,
}

impl PolicyHandle {
    pub(super) fn new(policy: Policy, keep_sessions: bool) -> Self {
        let snapshot = Arc::new(PolicySnapshot { policy, passwords: PasswordVerifier::default(), generation: 0 });
        Self {
            current: RwLock::new(snapshot),
            generation: AtomicU32::new(0),
            closed_sessions: AtomicUsize::new(0),
            keep_sessions,
        }
    }

    pub(super) fn current(&self) -> Arc<PolicySnapshot> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts another policy in force.
    pub(super) fn replace(&self, policy: Policy) {
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        let generation = current.generation.wrapping_add(1);
        *current = Arc::new(PolicySnapshot { policy, passwords: current.passwords.with_empty_cache(), generation });
        self.closed_sessions.store(0, Ordering::Relaxed);
        self.generation.store(generation, Ordering::Release);
    }

    /// The law of the day, when it is another one and counts for those who live under the one of this number.
    pub(super) fn newer_than(&self, generation: u32) -> Option<Arc<PolicySnapshot>> {
        let is_newer = !self.keep_sessions && self.generation.load(Ordering::Acquire) != generation;
        is_newer.then(|| self.current())
    }
}

impl PolicySnapshot {
    pub(super) fn evaluate(&self, question: &AccessRequest<'_>) -> Decision<'_> {
        self.policy.evaluate(question, is_local)
    }

    /// The way on which all that is known is allowed; none when it is denied or not decided.
    pub(super) fn allowed_route(&self, question: &AccessRequest<'_>) -> Option<Route> {
        match self.evaluate(question) {
            Decision::Allow(_, route) => Some(route),
            Decision::Deny(_) | Decision::Undecided(_) => None,
        }
    }

    /// Why a session may not be what it is.
    pub(super) fn check(&self, log: &SessionLog, question: &AccessRequest<'_>) -> Option<String> {
        match log.identity() {
            Some(login) if !self.policy.accepts_identity(&login) => {
                return Some("this login is no longer valid".into());
            }
            _ => {}
        }
        match self.evaluate(question) {
            Decision::Deny(rule) => Some(denial_reason(rule)),
            Decision::Allow(..) | Decision::Undecided(_) => None,
        }
    }
}

pub(super) fn denial_reason(rule: &Rule) -> String {
    format!("denied: {} ({rule})", rule.origin())
}

pub(super) fn denial(rule: &Rule) -> SessionError {
    SessionError::not_allowed(denial_reason(rule))
}

impl Server {
    /// Why a session that goes to `peer`, if that is known, may no longer be what it is. Looks once for each law that is
    /// newer than the one that was `seen` last.
    pub(super) fn recheck(
        &self,
        log: &SessionLog,
        seen: &Cell<u32>,
        peer: impl FnOnce() -> Option<SocketAddr>,
    ) -> Option<String> {
        let snapshot = self.policy.newer_than(seen.get())?;
        seen.set(snapshot.generation);
        let mut question = log.access_request();
        if let Some(peer) = peer() {
            question = AccessRequest { target_ip: Some(peer.ip()), target_port: Some(peer.port()), ..question };
        }
        let denial = snapshot.check(log, &question);
        if denial.is_some() {
            self.policy.closed_sessions.fetch_add(1, Ordering::Relaxed);
        }
        denial
    }
}
