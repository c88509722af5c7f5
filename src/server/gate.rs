//! What a client and a user may take up: how many sessions, how fast; and who is not let in at all for a while, after
//! too many failed logins.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::offenders::{Offenders, SHUT};
use super::pace::{Bucket, Pace};
use super::shares::{Share, Shares, source};

/// What is set for a server; `None` is no limit.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bounds {
    /// Sessions at once from one address (of IPv6: from one /64), at least 1.
    pub per_client: Option<usize>,
    /// Sessions at once of one user, at least 1.
    pub per_user: Option<usize>,
    /// Octets a second, both ways together, of one session.
    pub rate: Option<u64>,
    /// Octets a second, both ways together, of all sessions of one user.
    pub user_rate: Option<u64>,
}

/// Keeps account of all sessions.
#[derive(Debug)]
pub(super) struct Gate {
    bounds: Bounds,
    clients: Option<Arc<Shares<IpAddr>>>,
    users: Option<Arc<Shares<Box<[u8]>>>>,
    /// Of the users who have a session; others are swept out now and then.
    user_buckets: Mutex<HashMap<Box<[u8]>, Weak<Bucket>>>,
    offenders: Mutex<Offenders>,
    /// Whether there ever was an offender: as long as there was none, nobody has to look.
    offended: AtomicBool,
}

/// What one session takes up, for as long as it lives.
#[derive(Debug, Default)]
pub(super) struct Claims {
    _client: Option<Share<IpAddr>>,
    _user: Option<Share<Box<[u8]>>>,
    /// How fast it may be.
    pub(super) pace: Option<Pace>,
}

/// Why a connection is closed as it comes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Closed {
    /// Too many failed logins.
    ShutOut,
    /// As many sessions as there may be: so many.
    Full(usize),
}

impl Gate {
    pub(super) fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            clients: bounds.per_client.map(Shares::new),
            users: bounds.per_user.map(Shares::new),
            user_buckets: Mutex::default(),
            offenders: Mutex::default(),
            offended: AtomicBool::new(false),
        }
    }

    /// What a new connection takes up; on a Unix socket a client has no address, and no limits by it.
    pub(super) fn enter(&self, client: Option<SocketAddr>) -> Result<Option<Box<Claims>>, Closed> {
        let source = client.map(|client| source(client.ip()));
        if let Some(source) = source
            && self.offended.load(Ordering::Relaxed)
            && self.offenders().is_shut_out(source, Instant::now())
        {
            return Err(Closed::ShutOut);
        }
        let client = match (&self.clients, source) {
            (Some(clients), Some(source)) => Some(clients.take(source).ok_or(Closed::Full(clients.limit()))?),
            _ => None,
        };
        let bucket = self.bounds.rate.map(|rate| Arc::new(Bucket::new(rate, Instant::now())));
        let pace = bucket.map(|session| Pace { session, user: None });
        let is_bound = client.is_some() || pace.is_some();
        Ok(is_bound.then(|| Box::new(Claims { _client: client, _user: None, pace })))
    }

    /// Adds what a user takes up. False when he has as many sessions as he may.
    pub(super) fn log_in(&self, user: &[u8], claims: &mut Option<Box<Claims>>) -> bool {
        if let Some(users) = &self.users {
            let Some(share) = users.take(user.into()) else { return false };
            claims.get_or_insert_default()._user = Some(share);
        }
        if let Some(rate) = self.bounds.user_rate {
            let bucket = self.user_bucket(user, rate);
            let pace = &mut claims.get_or_insert_default().pace;
            *pace = Some(match pace.take() {
                Some(pace) => Pace { user: Some(bucket), ..pace },
                None => Pace { session: bucket, user: None },
            });
        }
        true
    }

    fn user_bucket(&self, user: &[u8], rate: u64) -> Arc<Bucket> {
        let mut buckets = self.user_buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bucket) = buckets.get(user).and_then(Weak::upgrade) {
            return bucket;
        }
        if buckets.len() == buckets.capacity() {
            buckets.retain(|_, bucket| bucket.strong_count() > 0);
        }
        let bucket = Arc::new(Bucket::new(rate, Instant::now()));
        buckets.insert(user.into(), Arc::downgrade(&bucket));
        bucket
    }

    /// How long the next answer to a login of `client` is held back; `None` when there is none but "no".
    pub(super) fn delay(&self, client: Option<SocketAddr>) -> Option<Duration> {
        let Some(client) = client.filter(|_| self.offended.load(Ordering::Relaxed)) else {
            return Some(Duration::ZERO);
        };
        let (source, now) = (source(client.ip()), Instant::now());
        let offenders = self.offenders();
        (!offenders.is_shut_out(source, now)).then(|| offenders.delay(source, now))
    }

    /// A login of `client` has failed.
    pub(super) fn failed(&self, client: Option<SocketAddr>) {
        let Some(client) = client else { return };
        let source = source(client.ip());
        self.offended.store(true, Ordering::Relaxed);
        if self.offenders().fail(source, Instant::now()) {
            let net = if source.is_ipv6() { "/64" } else { "" };
            log::warn!("too many failed logins: connections of {source}{net} are closed for {} s", SHUT.as_secs());
        }
    }

    fn offenders(&self) -> MutexGuard<'_, Offenders> {
        self.offenders.lock().unwrap_or_else(PoisonError::into_inner)
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
        let gate = Gate::new(Bounds::default());
        let mut claims = gate.enter(client(1)).expect("it is open");
        assert!(gate.log_in(b"alice", &mut claims) && claims.is_none());
    }

    #[test]
    fn a_client_and_a_user_have_as_many_sessions_as_they_may() {
        let gate = Gate::new(Bounds { per_client: Some(2), per_user: Some(1), ..Bounds::default() });
        let mut first = gate.enter(client(1)).expect("one");
        let mut second = gate.enter(client(1)).expect("two");
        assert_eq!(gate.enter(client(1)).expect_err("three"), Closed::Full(2));
        assert!(gate.enter(client(2)).is_ok() && gate.enter(None).is_ok());
        assert!(gate.log_in(b"alice", &mut first) && !gate.log_in(b"alice", &mut second));
        assert!(gate.log_in(b"bob", &mut second));
        drop(first);
        assert!(gate.enter(client(1)).is_ok() && gate.log_in(b"alice", &mut None));
    }

    #[test]
    fn sessions_of_a_user_share_a_bucket_and_it_goes_with_them() {
        let gate = Gate::new(Bounds { rate: Some(1000), user_rate: Some(1000), ..Bounds::default() });
        let mut claims = [None, None];
        assert!(claims.iter_mut().all(|claims| gate.log_in(b"alice", claims)));
        let [Some(first), Some(second)] = &claims else { panic!("both are bound") };
        let bucket = |claims: &Claims| claims.pace.clone().expect("a pace").session;
        assert!(Arc::ptr_eq(&bucket(first), &bucket(second)));
        drop(claims);
        (0..1000).for_each(|n: u32| drop(gate.user_bucket(&n.to_be_bytes(), 1)));
        assert!(gate.user_buckets.lock().expect("no panic").len() < 100);
    }

    #[test]
    fn whoever_is_shut_out_gets_no_answer_but_no() {
        let gate = Gate::new(Bounds::default());
        (0..11).for_each(|_| gate.failed(client(1)));
        assert_eq!(gate.enter(client(1)).expect_err("he is shut out"), Closed::ShutOut);
        assert_eq!((gate.delay(client(1)), gate.delay(client(2))), (None, Some(Duration::ZERO)));
    }
}
