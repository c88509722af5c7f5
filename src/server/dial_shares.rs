//! Limits the lookups and the connection attempts of each client, for all commands, hops and datagrams.

use std::fmt;
use std::pin::Pin;

use super::limiter::warn;
use super::shares::{ClientKey, Shares};
use crate::net::{DialLimits, LimitGuard};

/// Maximum number of lookups at once, and of connection attempts in addition to the first one of each session. With few
/// descriptors, it is a fraction of them: each lookup and each attempt has one.
const MAX_AT_ONCE: u64 = 256;
const DESCRIPTORS_PER_USE: u64 = 32;
/// One client has at most this fraction of each.
const CLIENTS_AT_LIMIT: usize = 4;

/// The limits of the sessions of one client. Those of all clients have the same shares.
#[derive(Clone)]
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

impl fmt::Debug for DialShares {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DialShares({})", self.client)
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
