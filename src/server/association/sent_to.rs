//! The addresses that an association has sent to, from which answers are accepted.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::IpAddr;

use crate::proto::{Addr, HostName};

/// Maximum number of addresses. The one that was not used for the longest time is removed first. That takes up to 100
/// KiB, and as much again for long names.
const MAX_ADDRS: usize = 1024;

/// Maximum number of destinations through hops that are counted. They can be long names.
const MAX_COUNTED_THROUGH_HOPS: usize = 256;

/// The target addresses of one association.
#[derive(Default)]
pub(super) struct SentTo {
    last_ip: Option<IpAddr>,
    ips: HashMap<IpAddr, Contact>,
    /// In the order of removal, except those that were used again: they get a second turn.
    order: VecDeque<IpAddr>,
    /// Destinations through hops, which are only counted: the hop filters the answers.
    through_hops: HashSet<Addr>,
}

struct Contact {
    /// The name that the client last used for the address, if any.
    name: Option<HostName>,
    /// Set when the address was used again since it got its place in `order`.
    is_used_again: bool,
}

impl SentTo {
    /// Returns true if the address is new.
    pub(super) fn insert(&mut self, ip: IpAddr, name: Option<&HostName>) -> bool {
        // Fast path for a flow to one target: the address of the previous call is always in the map.
        if self.last_ip.replace(ip) == Some(ip) && name.is_none() {
            return false;
        }
        if let Some(contact) = self.ips.get_mut(&ip) {
            contact.is_used_again = true;
            if contact.name.as_ref() != name && name.is_some() {
                contact.name = name.cloned();
            }
            return false;
        }
        if self.order.len() >= MAX_ADDRS {
            self.remove_least_used();
        }
        self.ips.insert(ip, Contact { name: name.cloned(), is_used_again: false });
        self.order.push_back(ip);
        true
    }

    fn remove_least_used(&mut self) {
        while let Some(ip) = self.order.pop_front() {
            match self.ips.get_mut(&ip) {
                Some(contact) if contact.is_used_again => contact.is_used_again = false,
                _ => return drop(self.ips.remove(&ip)),
            }
            self.order.push_back(ip);
        }
    }

    /// Records a destination that is sent to through a hop. Returns true if it is new. At the limit, none is.
    pub(super) fn insert_through_hop(&mut self, dst: &Addr) -> bool {
        self.through_hops.len() < MAX_COUNTED_THROUGH_HOPS
            && !self.through_hops.contains(dst)
            && self.through_hops.insert(dst.clone())
    }

    /// Returns `None` for an address that nothing was sent to, else the name of the address if it has one.
    pub(super) fn get(&self, ip: IpAddr) -> Option<Option<&HostName>> {
        self.ips.get(&ip).map(|contact| contact.name.as_ref())
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn ip(n: u32) -> IpAddr {
        IpAddr::V4(Ipv4Addr::from(n))
    }

    #[test]
    fn sent_to_removes_the_least_recently_used_address_above_the_limit() {
        let mut sent_to = SentTo::default();
        (0..1024).for_each(|n| assert!(sent_to.insert(ip(n), None)));
        assert!(!sent_to.insert(ip(0), None));
        (1024..1026).for_each(|n| assert!(sent_to.insert(ip(n), None)));
        assert!((1..3).all(|n| sent_to.get(ip(n)).is_none()));
        assert!([0, 3, 1024, 1025].into_iter().all(|n| sent_to.get(ip(n)).is_some()));
        assert_eq!((sent_to.ips.len(), sent_to.order.len()), (MAX_ADDRS, MAX_ADDRS));
    }

    #[test]
    fn sent_to_keeps_the_last_name_of_an_address() {
        let mut sent_to = SentTo::default();
        let [a, b] = ["a.test", "b.test"].map(|name| HostName::new(name.as_bytes()).expect("valid name"));
        for (name, expected) in [(None, None), (Some(&a), Some(&a)), (None, Some(&a)), (Some(&b), Some(&b))] {
            let is_first = sent_to.ips.is_empty();
            assert_eq!(sent_to.insert(ip(1), name), is_first);
            assert_eq!(sent_to.get(ip(1)), Some(expected));
        }
    }
}
