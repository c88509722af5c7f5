//! The addresses that an association has sent to, from which answers are accepted.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::IpAddr;

use crate::proto::{Addr, HostName};

/// Maximum number of addresses. The oldest is removed first.
const MAX_ADDRS: usize = 4096;

/// Maximum number of destinations through hops that are counted. They can be long names.
const MAX_COUNTED_THROUGH_HOPS: usize = 256;

/// The target addresses of one association.
#[derive(Default)]
pub(super) struct SentTo {
    last_ip: Option<IpAddr>,
    /// Each address with the name that the client last used for it, if any.
    ips: HashMap<IpAddr, Option<HostName>>,
    /// Oldest first.
    order: VecDeque<IpAddr>,
    /// Destinations through hops, which are only counted: the hop filters the answers.
    through_hops: HashSet<Addr>,
}

impl SentTo {
    /// Returns true if the address is new.
    pub(super) fn insert(&mut self, ip: IpAddr, name: Option<&HostName>) -> bool {
        // Fast path for a flow to one target: the address of the previous call is always in the map.
        if self.last_ip.replace(ip) == Some(ip) && name.is_none() {
            return false;
        }
        if let Some(known_name) = self.ips.get_mut(&ip) {
            if known_name.as_ref() != name && name.is_some() {
                *known_name = name.cloned();
            }
            return false;
        }
        self.ips.insert(ip, name.cloned());
        self.order.push_back(ip);
        if self.order.len() > MAX_ADDRS {
            let oldest = self.order.pop_front();
            oldest.map(|ip| self.ips.remove(&ip));
        }
        true
    }

    /// Records a destination that is sent to through a hop. Returns true if it is new. At the limit, none is.
    pub(super) fn insert_through_hop(&mut self, dst: &Addr) -> bool {
        self.through_hops.len() < MAX_COUNTED_THROUGH_HOPS
            && !self.through_hops.contains(dst)
            && self.through_hops.insert(dst.clone())
    }

    /// Returns `None` for an address that nothing was sent to, else the name of the address if it has one.
    pub(super) fn get(&self, ip: IpAddr) -> Option<Option<&HostName>> {
        self.ips.get(&ip).map(Option::as_ref)
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
    fn sent_to_removes_the_oldest_address_above_the_limit() {
        let mut sent_to = SentTo::default();
        (0..=4096).for_each(|n| assert!(sent_to.insert(ip(n), None)));
        assert!(sent_to.get(ip(0)).is_none());
        assert!(sent_to.get(ip(1)).is_some() && sent_to.get(ip(4096)).is_some());
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
