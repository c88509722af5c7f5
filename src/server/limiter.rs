//! What a client and a user may take up: how many sessions, how fast; and who is not let in at all for a while, after
//! too many failed logins.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::connection_counts::{ConnectionCounts, CountGuard, client_key};
use super::login_throttle::{BLOCK_TIME, LoginThrottle};
use super::rate_limit::{RateLimit, TokenBucket};

/// What is set for a server; `None` is no limit.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quotas {
    /// Sessions at once from one address (of IPv6: from one /64), at least 1.
    pub sessions_per_client: Option<usize>,
    /// Sessions at once of one user, at least 1.
    pub sessions_per_user: Option<usize>,
    /// Octets a second, both ways together, of one session.
    pub session_rate: Option<u64>,
    /// Octets a second, both ways together, of all sessions of one user.
    pub user_rate: Option<u64>,
}

/// Keeps account of all sessions.
#[derive(Debug)]
pub(super) struct Limiter {
    quotas: Quotas,
    client_sessions: Option<Arc<ConnectionCounts<IpAddr>>>,
    user_sessions: Option<Arc<ConnectionCounts<Box<[u8]>>>>,
    /// Of the users who have a session; others are swept out now and then.
    user_buckets: Mutex<HashMap<Box<[u8]>, Weak<TokenBucket>>>,
    login_throttle: Mutex<LoginThrottle>,
    /// Whether there ever was an offender: as long as there was none, nobody has to look.
    has_failed_logins: AtomicBool,
}

/// What one session takes up, for as long as it lives.
#[derive(Debug, Default)]
pub(super) struct SessionQuota {
    _client_guard: Option<CountGuard<IpAddr>>,
    _user_guard: Option<CountGuard<Box<[u8]>>>,
    /// How fast it may be.
    pub(super) rate_limit: Option<RateLimit>,
}

/// Why a connection is closed as it comes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum AdmitError {
    /// Too many failed logins.
    Blocked,
    /// As many sessions as there may be: so many.
    TooManySessions(usize),
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

    /// What a new connection takes up; on a Unix socket a client has no address, and no limits by it.
    pub(super) fn admit_client(&self, client: Option<SocketAddr>) -> Result<Option<Box<SessionQuota>>, AdmitError> {
        let key = client.map(|client| client_key(client.ip()));
        if let Some(key) = key
            && self.has_failed_logins.load(Ordering::Relaxed)
            && self.login_throttle().is_blocked(key, Instant::now())
        {
            return Err(AdmitError::Blocked);
        }
        let client = match (&self.client_sessions, key) {
            (Some(clients), Some(key)) => {
                Some(clients.try_acquire(key).ok_or(AdmitError::TooManySessions(clients.limit()))?)
            }
            _ => None,
        };
        let bucket = self.quotas.session_rate.map(|rate| Arc::new(TokenBucket::new(rate, Instant::now())));
        let rate_limit = bucket.map(|session| RateLimit { session, user: None });
        let is_limited = client.is_some() || rate_limit.is_some();
        Ok(is_limited.then(|| Box::new(SessionQuota { _client_guard: client, _user_guard: None, rate_limit })))
    }

    /// Adds what a user takes up. False when he has as many sessions as he may.
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

    /// How long the next answer to a login of `client` is held back; `None` when there is none but "no".
    pub(super) fn login_delay(&self, client: Option<SocketAddr>) -> Option<Duration> {
        let Some(client) = client.filter(|_| self.has_failed_logins.load(Ordering::Relaxed)) else {
            return Some(Duration::ZERO);
        };
        let (key, now) = (client_key(client.ip()), Instant::now());
        let throttle = self.login_throttle();
        (!throttle.is_blocked(key, now)).then(|| throttle.delay(key, now))
    }

    /// A login of `client` has failed.
    pub(super) fn record_failed_login(&self, client: Option<SocketAddr>) {
        let Some(client) = client else { return };
        let key = client_key(client.ip());
        self.has_failed_logins.store(true, Ordering::Relaxed);
        if self.login_throttle().record_failure(key, Instant::now()) {
            let net = if key.is_ipv6() { "/64" } else { "" };
            log::warn!("too many failed logins: connections of {key}{net} are closed for {} s", BLOCK_TIME.as_secs());
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
    fn without_bounds_a_session_takes_up_nothing() {
        let limiter = Limiter::new(Quotas::default());
        let mut quota = limiter.admit_client(client(1)).expect("it is open");
        assert!(limiter.admit_user(b"alice", &mut quota) && quota.is_none());
    }

    #[test]
    fn a_client_and_a_user_have_as_many_sessions_as_they_may() {
        let limiter =
            Limiter::new(Quotas { sessions_per_client: Some(2), sessions_per_user: Some(1), ..Quotas::default() });
        let mut first = limiter.admit_client(client(1)).expect("one");
        let mut second = limiter.admit_client(client(1)).expect("two");
        assert_eq!(limiter.admit_client(client(1)).expect_err("three"), AdmitError::TooManySessions(2));
        assert!(limiter.admit_client(client(2)).is_ok() && limiter.admit_client(None).is_ok());
        assert!(limiter.admit_user(b"alice", &mut first) && !limiter.admit_user(b"alice", &mut second));
        assert!(limiter.admit_user(b"bob", &mut second));
        drop(first);
        assert!(limiter.admit_client(client(1)).is_ok() && limiter.admit_user(b"alice", &mut None));
    }

    #[test]
    fn sessions_of_a_user_share_a_bucket_and_it_goes_with_them() {
        let limiter = Limiter::new(Quotas { session_rate: Some(1000), user_rate: Some(1000), ..Quotas::default() });
        let mut quota = [None, None];
        assert!(quota.iter_mut().all(|quota| limiter.admit_user(b"alice", quota)));
        let [Some(first), Some(second)] = &quota else { panic!("both are bound") };
        let bucket = |quota: &SessionQuota| quota.rate_limit.clone().expect("a pace").session;
        assert!(Arc::ptr_eq(&bucket(first), &bucket(second)));
        drop(quota);
        (0..1000).for_each(|n: u32| drop(limiter.user_bucket(&n.to_be_bytes(), 1)));
        assert!(limiter.user_buckets.lock().expect("no panic").len() < 100);
    }

    #[test]
    fn whoever_is_shut_out_gets_no_answer_but_no() {
        let limiter = Limiter::new(Quotas::default());
        (0..11).for_each(|_| limiter.record_failed_login(client(1)));
        assert_eq!(limiter.admit_client(client(1)).expect_err("he is shut out"), AdmitError::Blocked);
        assert_eq!((limiter.login_delay(client(1)), limiter.login_delay(client(2))), (None, Some(Duration::ZERO)));
    }
}
