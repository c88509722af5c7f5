//! Limits of sessions, bytes per second and failed logins: for the server, a client address, a user or a session.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use smol::lock::{Semaphore, SemaphoreGuard};

use super::login_throttle::{BLOCK_TIME, LoginThrottle};
use super::options::Quotas;
use crate::net::{RateLimit, TokenBucket};

/// Applies the limits to all sessions of the server.
pub(super) struct Limiter {
    max_sessions: usize,
    /// One permit per session that can still start.
    permits: Semaphore,
    quotas: Quotas,
    usage: Arc<Mutex<Usage>>,
    login_throttle: Mutex<LoginThrottle>,
    /// Set by the first failed login. Until then, no session locks `login_throttle`.
    has_failed_logins: AtomicBool,
}

/// For each client address or user: the number of its sessions, and the token bucket that they share. A key without
/// sessions has no entry.
type Usage = HashMap<QuotaKey, (usize, Option<Arc<TokenBucket>>)>;

#[derive(Clone, PartialEq, Eq, Hash)]
enum QuotaKey {
    Client(IpAddr),
    User(Box<[u8]>),
}

/// Counts a session against one key until it is dropped.
struct QuotaGuard {
    usage: Arc<Mutex<Usage>>,
    key: QuotaKey,
}

impl Drop for QuotaGuard {
    fn drop(&mut self) {
        let mut usage = self.usage.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((sessions, _)) = usage.get_mut(&self.key) {
            *sessions -= 1;
            if *sessions == 0 {
                usage.remove(&self.key);
            }
        }
    }
}

/// The counts and rate limits of one session. Dropping it decrements the counts.
#[derive(Default)]
pub(super) struct SessionQuota {
    guards: Vec<QuotaGuard>,
    pub(super) rate_limit: RateLimit,
}

impl Limiter {
    pub(super) fn new(max_sessions: usize, quotas: Quotas) -> Self {
        Self {
            max_sessions,
            permits: Semaphore::new(max_sessions),
            quotas,
            usage: Arc::default(),
            login_throttle: Mutex::default(),
            has_failed_logins: AtomicBool::new(false),
        }
    }

    /// Waits until another session can start. The caller forgets the permit, and the end of the session releases it.
    pub(super) async fn acquire_permit(&self) -> SemaphoreGuard<'_> {
        if let Some(permit) = self.permits.try_acquire() {
            return permit;
        }
        let limit = self.max_sessions;
        warn(|| format!("limit of {limit} connections reached: new ones wait (raise --max-connections)"));
        self.permits.acquire().await
    }

    pub(super) fn release_permit(&self) {
        self.permits.add_permits(1);
    }

    /// Counts a new connection. On a Unix socket `client` is `None`, and the limits per client do not apply. Returns
    /// false if the client is blocked or has too many sessions. `quota` stays `None` if no limit is set.
    pub(super) fn admit_client(&self, client: Option<SocketAddr>, quota: &mut Option<Box<SessionQuota>>) -> bool {
        if let Some(client) = client.map(|client| client.ip()) {
            if self.login_delay(Some(client)).is_none() {
                log::debug!("client {client}: refused: blocked after failed logins");
                return false;
            }
            if let Some(limit) = self.quotas.sessions_per_client
                && !self.acquire(QuotaKey::Client(client_key(client)), Some(limit), None, quota)
            {
                warn(|| {
                    format!("client {client}: refused: limit of {limit} connections reached (raise --max-per-client)")
                });
                return false;
            }
        }
        if let Some(rate) = self.quotas.session_rate {
            quota.get_or_insert_default().rate_limit.add(Arc::new(TokenBucket::new(rate, Instant::now())));
        }
        true
    }

    /// Counts the session against the limits of its user. Returns false if the user has too many sessions.
    pub(super) fn admit_user(&self, user: &[u8], quota: &mut Option<Box<SessionQuota>>) -> bool {
        let Quotas { sessions_per_user, user_rate, .. } = self.quotas;
        let is_limited = sessions_per_user.is_some() || user_rate.is_some();
        !is_limited || self.acquire(QuotaKey::User(user.into()), sessions_per_user, user_rate, quota)
    }

    /// Counts one more session of `key` and adds its rate limit. Returns false if the key is at its limit.
    fn acquire(
        &self,
        key: QuotaKey,
        limit: Option<usize>,
        rate: Option<u64>,
        quota: &mut Option<Box<SessionQuota>>,
    ) -> bool {
        let mut usage = self.usage.lock().unwrap_or_else(PoisonError::into_inner);
        let new_bucket = || rate.map(|rate| Arc::new(TokenBucket::new(rate, Instant::now())));
        let (sessions, bucket) = usage.entry(key.clone()).or_insert_with(|| (0, new_bucket()));
        // A limit is at least 1, so a new entry never stays at 0.
        if limit.is_some_and(|limit| *sessions >= limit) {
            return false;
        }
        *sessions += 1;
        let quota = quota.get_or_insert_default();
        quota.guards.push(QuotaGuard { usage: self.usage.clone(), key });
        bucket.iter().for_each(|bucket| quota.rate_limit.add(bucket.clone()));
        true
    }

    /// Returns the delay of the next login answer to `client`; `None` if the client is blocked.
    pub(super) fn login_delay(&self, client: Option<IpAddr>) -> Option<Duration> {
        let Some(client) = client.filter(|_| self.has_failed_logins.load(Ordering::Relaxed)) else {
            return Some(Duration::ZERO);
        };
        self.login_throttle().delay(client_key(client), Instant::now())
    }

    pub(super) fn record_failed_login(&self, client: Option<IpAddr>) {
        let Some(key) = client.map(client_key) else { return };
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

/// Logs at most one warning per second and drops the others.
pub(super) fn warn(text: impl FnOnce() -> String) {
    static LAST: Mutex<Option<Instant>> = Mutex::new(None);
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if last.is_none_or(|last| last.elapsed() >= Duration::from_secs(1)) {
        *last = Some(Instant::now());
        log::warn!("{}", text());
    }
}

/// Returns the key that clients are counted by: an IPv4 address, or an IPv6 /64, which usually belongs to one customer.
fn client_key(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from(u128::from(v6) & !u128::from(u64::MAX)).into(),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_of_one_user_share_a_token_bucket_until_the_last_one_ends() {
        let limiter = Limiter::new(10, Quotas { user_rate: Some(1000), ..Quotas::default() });
        let admit = || {
            let mut quota = None;
            assert!(limiter.admit_user(b"alice", &mut quota));
            quota.expect("a quota")
        };
        let (first, second) = (admit(), admit());
        let buckets = first.rate_limit.buckets().zip(second.rate_limit.buckets());
        assert!(buckets.map(|(first, second)| Arc::ptr_eq(first, second)).eq([true]));
        drop((first, second));
        assert!(limiter.usage.lock().expect("no panic").is_empty());
    }
}
