//! Limits of sessions and bytes per second: for the server, a client address, a user or a session. Limits of the
//! lookups and connection attempts of each client, for all commands, hops and datagrams.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, Weak};
use std::time::Instant;

use super::handshakes::Handshakes;
use super::log_shares::{Topic, admit};
use super::options::Options;
use super::shares::{ClientKey, ExtraGuard, ShareGuard, Shares, lock};
use crate::counters::{self, Counter};
use crate::net::{DialLimits, LimitGuard, RateLimit, TokenBucket};
use crate::proto::PortRange;

/// Maximum number of lookups at once, and of connection attempts in addition to the first one of each session. With few
/// descriptors, it is a fraction of them: each lookup and each attempt has one.
const MAX_AT_ONCE: u64 = 256;
const DESCRIPTORS_PER_USE: u64 = 32;
/// One client has at most this fraction of each.
const CLIENTS_AT_LIMIT: usize = 4;

/// Applies the limits to all sessions of the server.
pub(super) struct Limiter {
    pub(super) max_sessions: usize,
    /// Sessions, and what counts as further ones of their clients.
    pub(super) sessions: Shares,
    /// Sessions until their requests.
    pub(super) handshakes: Handshakes,
    /// Listeners of BIND, at most one per port of `--bind-ports`.
    pub(super) bind_listeners: Shares,
    /// UDP associations, at most one per port of `--udp-ports`. All can share a single port.
    associations: Shares,
    users: Users,
}

/// The token bucket of each user. Each session holds a reference to it, which counts the session.
type Users = Mutex<HashMap<Box<[u8]>, Weak<Option<Arc<TokenBucket>>>>>;

/// The rate limits of one session, and its count against its user.
#[derive(Default)]
pub(super) struct SessionQuota {
    user: Option<Arc<Option<Arc<TokenBucket>>>>,
    pub(super) rate_limit: RateLimit,
}

impl Limiter {
    pub(super) fn new(max_sessions: usize, options: &Options) -> Self {
        // One address leaves a quarter to the others. Two sessions are always possible.
        let three_quarters = (max_sessions.saturating_mul(3) / 4).max(max_sessions.min(2));
        let per_port = |ports: Option<&PortRange>| {
            let limit = ports.map_or(max_sessions, |PortRange(ports)| ports.len().min(max_sessions));
            Shares::new(limit, limit - limit / 4)
        };
        Self {
            max_sessions,
            sessions: Shares::new(max_sessions, three_quarters.max(options.max_per_client.unwrap_or_default())),
            handshakes: Handshakes::new(max_sessions / 2),
            bind_listeners: per_port(options.bind_ports.as_ref()),
            associations: per_port(options.udp_ports.as_ref().filter(|ports| ports.single().is_none())),
            users: Users::default(),
        }
    }

    /// Reserves a session, or waits until one can start if a connection is waiting. If too many sessions are unfinished
    /// handshakes, one of them ends. Returns `None` if no connection is waiting any more.
    pub(super) async fn reserve(&self, has_waiting: impl FnOnce() -> bool) -> Option<ShareGuard> {
        if let Some(reserved) = self.sessions.try_acquire(None) {
            return Some(reserved);
        }
        // Another worker may accept the connection at any time.
        let latest = self.handshakes.latest();
        if !has_waiting() || !self.handshakes.make_room(latest) {
            return None;
        }
        let limit = self.max_sessions;
        warn(|| format!("limit of {limit} connections reached: new ones wait (raise --max-connections)"));
        Some(self.sessions.acquire(None).await)
    }

    /// Counts a reserved session against its client. Returns false if the client has too many sessions.
    pub(super) fn admit_client(
        &self,
        options: &Options,
        reserved: &mut ShareGuard,
        client: Option<SocketAddr>,
    ) -> bool {
        // Clients on Unix sockets have no address for `--max-per-client`.
        if client.is_none() && options.max_per_client.is_some() {
            return true;
        }
        let limit = options.max_per_client.unwrap_or(usize::MAX);
        let assigned = reserved.assign(ClientKey::new(client.map(|client| client.ip())), limit);
        if let Err(limit) = assigned {
            counters::count(Counter::Refused);
            let client = client.map_or("unix".into(), |client| client.ip().to_string());
            let is_of_all = options.max_per_client.is_some_and(|max| max != limit);
            let option = if is_of_all { "--max-connections" } else { "--max-per-client" };
            warn(|| format!("client {client}: refused: limit of {limit} connections reached (raise {option})"));
        }
        assigned.is_ok()
    }

    /// Counts an association against its client, and its sockets: to a hop, or one for each family of targets.
    pub(super) fn admit_association(&self, client: ClientKey, sockets: usize) -> io::Result<impl Sized + use<>> {
        let share = self.associations.try_acquire(client).ok_or_else(|| associations_reached("--udp-ports"))?;
        Ok((share, self.count_descriptors(client, sockets)?))
    }

    /// Counts further descriptors of a session as sessions: each has two. `--max-per-client` is a number of sessions, and
    /// does not count them; the limit of all that a client has is three quarters, or `--max-per-client` if that is more.
    pub(super) fn count_descriptors(&self, client: ClientKey, count: usize) -> io::Result<Vec<ExtraGuard>> {
        let guards = self.sessions.try_acquire_extra(client, count.div_ceil(2));
        guards.ok_or_else(|| associations_reached("--max-connections"))
    }

    /// Counts the session against the limits of its user. Returns false if the user has too many sessions.
    pub(super) fn admit_user(&self, options: &Options, user: &[u8], quota: &mut Option<Box<SessionQuota>>) -> bool {
        let rate = options.rate_per_user.or(options.rate);
        if options.max_per_user.is_none() && rate.is_none() {
            return true;
        }
        let mut users = lock(&self.users);
        if users.len() == users.capacity() && !users.contains_key(user) {
            users.retain(|_, bucket| bucket.strong_count() > 0);
        }
        let bucket = users.entry(user.into()).or_default();
        if bucket.strong_count() >= options.max_per_user.unwrap_or(usize::MAX) {
            return false;
        }
        let shared = bucket.upgrade().unwrap_or_else(|| Arc::new(rate.map(new_bucket)));
        *bucket = Arc::downgrade(&shared);
        let quota = quota.get_or_insert_default();
        shared.iter().for_each(|bucket| quota.rate_limit.add(bucket.clone()));
        quota.user = Some(shared);
        true
    }
}

fn new_bucket(rate: u64) -> Arc<TokenBucket> {
    Arc::new(TokenBucket::new(rate, Instant::now()))
}

/// Returns the limits of a session that apply before its login, if there are any.
pub(super) fn session_quota(options: &Options) -> Option<Box<SessionQuota>> {
    let mut quota = Box::<SessionQuota>::default();
    quota.rate_limit.add(new_bucket(options.rate?));
    Some(quota)
}

fn associations_reached(option: &str) -> io::Error {
    io::Error::other(format!("limit of associations reached, or of those of one client (see {option})"))
}

/// Logs at most one warning per second, and counts the others.
pub(super) fn warn(text: impl FnOnce() -> String) {
    if admit(Topic::Warning, None) {
        log::warn!("{}", text());
    }
}

/// The limits of the sessions of one client. Those of all clients have the same shares.
#[derive(Clone, Debug)]
pub(super) struct DialShares {
    lookups: Shares,
    extra_attempts: Shares,
    client: ClientKey,
}

impl DialShares {
    /// Returns the shares of a process with this number of descriptors, and how many of these they can use.
    pub(super) fn new(descriptors: u64) -> (Self, u64) {
        let limit = (descriptors / DESCRIPTORS_PER_USE).clamp(1, MAX_AT_ONCE);
        let at_once = usize::try_from(limit).unwrap_or(usize::MAX);
        let shares = || Shares::new(at_once, (at_once / CLIENTS_AT_LIMIT).max(1));
        (Self { lookups: shares(), extra_attempts: shares(), client: ClientKey::new(None) }, 2 * limit)
    }

    pub(super) fn of(&self, client: ClientKey) -> Self {
        Self { client, ..self.clone() }
    }
}

impl DialLimits for DialShares {
    fn start_lookup(&self) -> Pin<Box<dyn Future<Output = LimitGuard> + '_>> {
        Box::pin(async {
            let guard = match self.lookups.try_acquire(self.client) {
                Some(guard) => guard,
                None => {
                    warn(|| format!("client {}: limit of DNS lookups reached: further ones wait", self.client));
                    self.lookups.acquire(self.client).await
                }
            };
            Box::new(guard) as LimitGuard
        })
    }

    fn start_extra_attempt(&self) -> Option<LimitGuard> {
        let guard = self.extra_attempts.try_acquire(self.client)?;
        Some(Box::new(guard))
    }
}
