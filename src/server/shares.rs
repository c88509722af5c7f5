//! How many sessions somebody has, and that it is not more than his share. Remembers only who has one.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

/// The sessions of everybody, at most `limit` each.
#[derive(Debug)]
pub(super) struct Shares<K> {
    limit: usize,
    open: Mutex<HashMap<K, usize>>,
}

/// One session, for as long as it lives.
#[derive(Debug)]
pub(super) struct Share<K: Hash + Eq> {
    all: Arc<Shares<K>>,
    key: K,
}

impl<K: Hash + Eq + Clone> Shares<K> {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, open: Mutex::default() })
    }

    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// One session more for `key`; `None` when that would be too many.
    pub(super) fn take(self: &Arc<Self>, key: K) -> Option<Share<K>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let count = open.entry(key.clone()).or_default();
        // There is no entry of 0 to be left behind, since the limit is not 0.
        (*count < self.limit).then(|| {
            *count += 1;
            Share { all: self.clone(), key }
        })
    }
}

impl<K: Hash + Eq> Drop for Share<K> {
    fn drop(&mut self) {
        let mut open = self.all.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.key);
            }
        }
    }
}

/// Whom an address stands for: itself; or, of IPv6, the /64 that one customer usually has.
pub(super) fn source(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from(u128::from(v6) & !u128::from(u64::MAX)).into(),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_given_back_at_its_end_and_leaves_nothing_behind() {
        let shares = Shares::new(2);
        let first = shares.take("alice");
        let second = shares.take("alice");
        assert!(first.is_some() && second.is_some() && shares.take("alice").is_none());
        assert!(shares.take("bob").is_some());
        drop(first);
        assert!(shares.take("alice").is_some());
        drop(second);
        assert!(shares.open.lock().expect("no panic").is_empty());
    }

    #[test]
    fn ipv6_addresses_of_one_customer_are_one_source() {
        let source = |text: &str| source(text.parse().expect("an address")).to_string();
        assert_eq!(source("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
        assert_eq!(source("192.0.2.1"), "192.0.2.1");
        assert_eq!(source("::ffff:192.0.2.1"), "192.0.2.1");
    }
}
