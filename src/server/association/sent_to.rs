//! Whom an association has sent to: those may answer.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;

use crate::proto::HostName;

/// How many addresses are remembered; the oldest is forgotten first.
const MAX_ADDRS: usize = 4096;

/// The addresses that the client has sent to.
#[derive(Default)]
pub(super) struct SentTo {
    last_ip: Option<IpAddr>,
    /// The name by which the client has called the address last, if it ever did.
    ips: HashMap<IpAddr, Option<HostName>>,
    order: VecDeque<IpAddr>,
}

impl SentTo {
    pub(super) fn insert(&mut self, ip: IpAddr, name: Option<&HostName>) {
        // The usual case, at no cost. Only another insertion could have it forgotten.
        if self.last_ip.replace(ip) == Some(ip) && name.is_none() {
            return;
        }
        match self.ips.get_mut(&ip) {
            Some(known_name) if known_name.as_ref() == name || name.is_none() => {}
            Some(known_name) => *known_name = name.cloned(),
            None => {
                self.ips.insert(ip, name.cloned());
                self.order.push_back(ip);
            }
        }
        if self.order.len() > MAX_ADDRS {
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
        let mut sent_to = SentTo::default();
        (0..=4096).for_each(|n| sent_to.insert(ip(n), None));
        assert!(sent_to.get(ip(0)).is_none());
        assert!(sent_to.get(ip(1)).is_some() && sent_to.get(ip(4096)).is_some());
        assert_eq!((sent_to.ips.len(), sent_to.order.len()), (MAX_ADDRS, MAX_ADDRS));
    }

    #[test]
    fn an_address_keeps_the_name_that_it_was_called_by() {
        let mut sent_to = SentTo::default();
        let [a, b] = ["a.test", "b.test"].map(|name| HostName::new(name.as_bytes()).expect("a name"));
        for (name, expected) in [(None, None), (Some(&a), Some(&a)), (None, Some(&a)), (Some(&b), Some(&b))] {
            sent_to.insert(ip(1), name);
            assert_eq!(sent_to.get(ip(1)), Some(expected));
        }
    }
}
