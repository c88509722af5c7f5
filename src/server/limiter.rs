//! The limits of one client address and of one user: sessions, bytes per second, and failed logins.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::connection_counts::{ConnectionCounts, CountGuard, client_key};
use super::login_throttle::{BLOCK_TIME, LoginThrottle};
use super::options::Quotas;
use crate::net::{RateLimit, TokenBucket};

/// Applies the limits to all sessions of the server.
#[derive(Debug)]
pub(super) struct Limiter {
    quotas: Quotas,
    client_sessions: Option<Arc<ConnectionCounts<IpAddr>>>,
    user_sessions: Option<Arc<ConnectionCounts<Box<[u8]>>>>,
    /// Entries of users without a session are removed before the map grows.
    user_buckets: Mutex<HashMap<Box<[u8]>, Weak<TokenBucket>>>,
    login_throttle: Mutex<LoginThrottle>,
    /// Set by the first failed login. Until then, no session locks `login_throttle`.
    has_failed_logins: AtomicBool,
}

/// The counts and rate limits of one session. Dropping it decrements the counts.
#[derive(Debug, Default)]
pub(super) struct SessionQuota {
    _client_guard: Option<CountGuard<IpAddr>>,
    _user_guard: Option<CountGuard<Box<[u8]>>>,
    pub(super) rate_limit: Option<RateLimit>,
}

/// A reason to close a connection right after accept.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum AdmitError {
    /// Too many failed logins.
    Blocked,
    /// The client has reached its limit of this many sessions.
    AtLimit(usize),
}

impl Limiter {
    pub(super) fn new(quotas: Quotas) -> Self {
        Self {
            quotas,
            client_sessions: quotas.sessions_per_client.map(ConnectionCounts::new),
            user_sessions: quotas.sessions_per_user.map(ConnectionCounts::new),
            user_buckets: Mutex::default(),
            login_throttle: Mutex::default(),
            has_failed_logins: AtomicBool::new(false),
        }
    }

    /// Counts a new connection. On a Unix socket `client` is `None`, and the limits per client do not apply.
    /// Returns no quota if no limit is set.
    pub(super) fn admit_client(&self, client: Option<SocketAddr>) -> Result<Option<Box<SessionQuota>>, AdmitError> {
        let key = client.map(|client| client_key(client.ip()));
        if let Some(key) = key
            && self.has_failed_logins.load(Ordering::Relaxed)
            && self.login_throttle().is_blocked(key, Instant::now())
        {
            return Err(AdmitError::Blocked);
        }
        let client = match (&self.client_sessions, key) {
            (Some(counts), Some(key)) => Some(counts.try_acquire(key).ok_or(AdmitError::AtLimit(counts.limit()))?),
            _ => None,
        };
        let bucket = self.quotas.session_rate.map(|rate| Arc::new(TokenBucket::new(rate, Instant::now())));
        let rate_limit = bucket.map(|session| RateLimit { session, user: None });
        let is_limited = client.is_some() || rate_limit.is_some();
        Ok(is_limited.then(|| Box::new(SessionQuota { _client_guard: client, _user_guard: None, rate_limit })))
    }

    /// Counts the session against the limits of its user. Returns false if the user has too many sessions.
    pub(super) fn admit_user(&self, user: &[u8], quota: &mut Option<Box<SessionQuota>>) -> bool {
        if let Some(users) = &self.user_sessions {
            let Some(guard) = users.try_acquire(user.into()) else { return false };
            quota.get_or_insert_default()._user_guard = Some(guard);
        }
        if let Some(rate) = self.quotas.user_rate {
            let bucket = self.user_bucket(user, rate);
            let rate_limit = &mut quota.get_or_insert_default().rate_limit;
            *rate_limit = Some(match rate_limit.take() {
                Some(rate_limit) => RateLimit { user: Some(bucket), ..rate_limit },
                None => RateLimit { session: bucket, user: None },
            });
        }
        true
    }

    fn user_bucket(&self, user: &[u8], rate: u64) -> Arc<TokenBucket> {
        let mut buckets = self.user_buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bucket) = buckets.get(user).and_then(Weak::upgrade) {
            return bucket;
        }
        if buckets.len() == buckets.capacity() {
            buckets.retain(|_, bucket| bucket.strong_count() > 0);
        }
        let bucket = Arc::new(TokenBucket::new(rate, Instant::now()));
        buckets.insert(user.into(), Arc::downgrade(&bucket));
        bucket
    }

    /// Returns the delay of the next login answer to `client`; `None` if the client is blocked.
    pub(super) fn login_delay(&self, client: Option<SocketAddr>) -> Option<Duration> {
        let Some(client) = client.filter(|_| self.has_failed_logins.load(Ordering::Relaxed)) else {
            return Some(Duration::ZERO);
        };
        let (key, now) = (client_key(client.ip()), Instant::now());
        let throttle = self.login_throttle();
        (!throttle.is_blocked(key, now)).then(|| throttle.delay(key, now))
    }

    pub(super) fn record_failed_login(&self, client: Option<SocketAddr>) {
        let Some(client) = client else { return };
        let key = client_key(client.ip());
        self.has_failed_logins.store(true, Ordering::Relaxed);
        if self.login_throttle().record_failure(key, Instant::now()) {
            let prefix_len = if key.is_ipv6() { "/64" } else { "" };
            log::warn!("too many failed logins from {key}{prefix_len}: blocked for {} s", BLOCK_TIME.as_secs());
        }
    }

    fn login_throttle(&self) -> MutexGuard<'_, LoginThrottle> {
        self.login_throttle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(n: u8) -> Option<SocketAddr> {
        Some(SocketAddr::from(([192, 0, 2, n], 4711)))
    }

    #[test]
    fn session_without_limits_has_no_quota() {
        let limiter = Limiter::new(Quotas::default());
        let mut quota = limiter.admit_client(client(1)).expect("admitted");
        assert!(limiter.admit_user(b"alice", &mut quota) && quota.is_none());
    }

    #[test]
    fn session_limits_hold_per_client_and_per_user() {
        let limiter =
            Limiter::new(Quotas { sessions_per_client: Some(2), sessions_per_user: Some(1), ..Quotas::default() });
        let mut first = limiter.admit_client(client(1)).expect("one");
        let mut second = limiter.admit_client(client(1)).expect("two");
        assert_eq!(limiter.admit_client(client(1)).expect_err("three"), AdmitError::AtLimit(2));
        assert!(limiter.admit_client(client(2)).is_ok() && limiter.admit_client(None).is_ok());
        assert!(limiter.admit_user(b"alice", &mut first) && !limiter.admit_user(b"alice", &mut second));
        assert!(limiter.admit_user(b"bob", &mut second));
        drop(first);
        assert!(limiter.admit_client(client(1)).is_ok() && limiter.admit_user(b"alice", &mut None));
    }

    #[test]
    fn sessions_of_one_user_share_a_token_bucket_until_the_last_one_ends() {
        let limiter = Limiter::new(Quotas { session_rate: Some(1000), user_rate: Some(1000), ..Quotas::default() });
        let mut quotas = [None, None];
        assert!(quotas.iter_mut().all(|quota| limiter.admit_user(b"alice", quota)));
        let [Some(first), Some(second)] = &quotas else { panic!("both have a quota") };
        let bucket = |quota: &SessionQuota| quota.rate_limit.clone().expect("a rate limit").session;
        assert!(Arc::ptr_eq(&bucket(first), &bucket(second)));
        drop(quotas);
        (0..1000).for_each(|n: u32| drop(limiter.user_bucket(&n.to_be_bytes(), 1)));
        assert!(limiter.user_buckets.lock().expect("no panic").len() < 100);
    }

    #[test]
    fn blocked_client_is_not_admitted_and_its_login_fails() {
        let limiter = Limiter::new(Quotas::default());
        (0..11).for_each(|_| limiter.record_failed_login(client(1)));
        assert_eq!(limiter.admit_client(client(1)).expect_err("blocked"), AdmitError::Blocked);
        assert_eq!((limiter.login_delay(client(1)), limiter.login_delay(client(2))), (None, Some(Duration::ZERO)));
    }
}
