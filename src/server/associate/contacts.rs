//! Whom an association has sent to: those may answer.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;

use crate::proto::HostName;

/// How many addresses are remembered; the oldest is forgotten first.
const MAX_CONTACTS: usize = 4096;

/// The addresses that the client has sent to.
#[derive(Default)]
pub(super) struct Contacts {
    last: Option<IpAddr>,
    /// The name by which the client has called the address last, if it ever did.
    ips: HashMap<IpAddr, Option<HostName>>,
    order: VecDeque<IpAddr>,
}

impl Contacts {
    pub(super) fn insert(&mut self, ip: IpAddr, name: Option<&HostName>) {
        // The usual case, at no cost. Only another insertion could have it forgotten.
        if self.last.replace(ip) == Some(ip) && name.is_none() {
            return;
        }
        match self.ips.get_mut(&ip) {
            Some(called) if called.as_ref() == name || name.is_none() => {}
            Some(called) => *called = name.cloned(),
            None => {
                self.ips.insert(ip, name.cloned());
                self.order.push_back(ip);
            }
        }
        if self.order.len() > MAX_CONTACTS {
            let oldest = self.order.pop_front();
            oldest.map(|ip| self.ips.remove(&ip));
        }
    }

    /// Whether the client has sent to that address, and what it called it.
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
    fn the_oldest_of_too_many_addresses_is_forgotten() {
        let mut contacts = Contacts::default();
        (0..=4096).for_each(|n| contacts.insert(ip(n), None));
        assert!(contacts.get(ip(0)).is_none());
        assert!(contacts.get(ip(1)).is_some() && contacts.get(ip(4096)).is_some());
        assert_eq!((contacts.ips.len(), contacts.order.len()), (MAX_CONTACTS, MAX_CONTACTS));
    }

    #[test]
    fn an_address_keeps_the_name_that_it_was_called_by() {
        let mut contacts = Contacts::default();
        let [a, b] = ["a.test", "b.test"].map(|name| HostName::new(name.as_bytes()).expect("a name"));
        for (name, expected) in [(None, None), (Some(&a), Some(&a)), (None, Some(&a)), (Some(&b), Some(&b))] {
            contacts.insert(ip(1), name);
            assert_eq!(contacts.get(ip(1)), Some(expected));
        }
    }
}
