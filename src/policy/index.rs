//! An index of values by name, user or network. The time of a lookup does not depend on the number of values.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, Hash, RandomState};
use std::net::IpAddr;

use ipnet::IpNet;

/// Index of no entry: so many would take more text than a file can have.
const NONE: u32 = u32::MAX;

/// Values by key. `space` tells keys of different owners apart.
///
/// Keys are not stored, only their hashes. A lookup may return other values too, so the caller compares them.
#[derive(Debug)]
pub(super) struct Index<V> {
    hasher: RandomState,
    /// The last entry with this hash. 32 bits of it, because a long list has hundreds of thousands.
    last: HashMap<u32, u32>,
    entries: Vec<Entry<V>>,
    /// Prefix lengths that occur, of IPv4 and IPv6.
    prefix_lens: [Vec<u8>; 2],
}

#[derive(Debug)]
struct Entry<V> {
    value: V,
    /// The previous entry with the same hash, or [`NONE`].
    previous: u32,
}

impl<V> Default for Index<V> {
    fn default() -> Self {
        Self::with_capacity(0)
    }
}

impl<V> Index<V> {
    /// Returns an empty index with memory for `count` keys, so that it does not leave holes as it grows.
    pub(super) fn with_capacity(count: usize) -> Self {
        let (last, entries) = (HashMap::with_capacity(count), Vec::with_capacity(count));
        Self { hasher: RandomState::default(), last, entries, prefix_lens: Default::default() }
    }
}

impl<V: Copy> Index<V> {
    pub(super) fn insert(&mut self, space: u32, key: &[u8], value: V) {
        self.insert_key((space, key), value);
    }

    pub(super) fn insert_net(&mut self, space: u32, net: IpNet, value: V) {
        let [v4, v6] = &mut self.prefix_lens;
        let lens = if net.addr().is_ipv4() { v4 } else { v6 };
        if !lens.contains(&net.prefix_len()) {
            lens.push(net.prefix_len());
        }
        self.insert_key((space, net), value);
    }

    fn insert_key(&mut self, key: impl Hash, value: V) {
        let Ok(entry) = u32::try_from(self.entries.len()) else { return };
        let previous = self.last.insert(self.hash(key), entry).unwrap_or(NONE);
        self.entries.push(Entry { value, previous });
    }

    fn hash(&self, key: impl Hash) -> u32 {
        (self.hasher.hash_one(key) >> 32) as u32
    }

    pub(super) fn find(&self, space: u32, key: &[u8]) -> impl Iterator<Item = V> {
        self.find_key((space, key))
    }

    /// Returns the values of a name and of its parent domains.
    pub(super) fn find_domains(&self, space: u32, name: &str) -> impl Iterator<Item = V> {
        let parents = name.match_indices('.').filter_map(|(dot, _)| name.get(dot + 1..));
        [name].into_iter().chain(parents).flat_map(move |name| self.find(space, name.as_bytes()))
    }

    /// Returns the values of the networks that contain an address.
    pub(super) fn find_ip(&self, space: u32, ip: IpAddr) -> impl Iterator<Item = V> {
        let [v4, v6] = &self.prefix_lens;
        let lens = if ip.is_ipv4() { v4 } else { v6 };
        let nets = lens.iter().filter_map(move |len| IpNet::new(ip, *len).ok());
        nets.flat_map(move |net| self.find_key((space, net.trunc())))
    }

    fn find_key(&self, key: impl Hash) -> impl Iterator<Item = V> {
        // Most servers have no rules.
        let last = if self.entries.is_empty() { None } else { self.last.get(&self.hash(key)) };
        let entry = |index: u32| self.entries.get(to_index(index));
        let last = last.and_then(|last| entry(*last));
        let entries = std::iter::successors(last, move |found| entry(found.previous));
        entries.map(|entry| entry.value)
    }
}

/// Converts an index or an offset, which fits: a file of rules is much smaller than 4 GiB.
pub(super) fn to_u32(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

pub(super) fn to_index(index: u32) -> usize {
    index as usize
}
