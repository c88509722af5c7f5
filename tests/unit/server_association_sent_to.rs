//! Unit tests of the private items of `src/server/association/sent_to.rs`.

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
