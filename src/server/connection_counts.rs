//! Counts concurrent sessions per client address or per user. Only keys with a session take up memory.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

/// The sessions of each key, at most `limit` per key.
#[derive(Debug)]
pub(super) struct ConnectionCounts<K> {
    limit: usize,
    by_key: Mutex<HashMap<K, usize>>,
}

/// One counted session. Dropping it decrements the count.
#[derive(Debug)]
pub(super) struct CountGuard<K: Hash + Eq> {
    counts: Arc<ConnectionCounts<K>>,
    key: K,
}

impl<K: Hash + Eq + Clone> ConnectionCounts<K> {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, by_key: Mutex::default() })
    }

    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Counts one more session of `key`; `None` if it is at its limit.
    pub(super) fn try_acquire(self: &Arc<Self>, key: K) -> Option<CountGuard<K>> {
        let mut by_key = self.by_key.lock().unwrap_or_else(PoisonError::into_inner);
        let count = by_key.entry(key.clone()).or_default();
        // A limit is at least 1, so that no new entry stays at 0.
        (*count < self.limit).then(|| {
            *count += 1;
            CountGuard { counts: self.clone(), key }
        })
    }
}

impl<K: Hash + Eq> Drop for CountGuard<K> {
    fn drop(&mut self) {
        let mut by_key = self.counts.by_key.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = by_key.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                by_key.remove(&self.key);
            }
        }
    }
}

/// Returns the key that clients are counted by: an IPv4 address, or an IPv6 /64, which usually belongs to one customer.
pub(super) fn client_key(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from(u128::from(v6) & !u128::from(u64::MAX)).into(),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn count_guard_decrements_on_drop_and_the_last_one_removes_the_entry() {
        let counts = ConnectionCounts::new(2);
        let first = counts.try_acquire("alice");
        let second = counts.try_acquire("alice");
        assert!(first.is_some() && second.is_some() && counts.try_acquire("alice").is_none());
        assert!(counts.try_acquire("bob").is_some());
        drop(first);
        assert!(counts.try_acquire("alice").is_some());
        drop(second);
        assert!(counts.by_key.lock().expect("no panic").is_empty());
    }

    #[test]
    fn client_key_is_the_ipv4_address_or_the_ipv6_prefix_of_64_bits() {
        let key = |text: &str| client_key(text.parse().expect("an address")).to_string();
        assert_eq!(key("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
        assert_eq!(key("192.0.2.1"), "192.0.2.1");
        assert_eq!(key("::ffff:192.0.2.1"), "192.0.2.1");
    }
}
