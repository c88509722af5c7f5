//! Unit tests of the private items of `src/server/shares.rs`.

use futures_lite::future::{block_on, poll_once};

use super::*;

#[test]
fn clients_that_wait_for_shares_take_turns_and_leave_nothing_behind() {
    let shares = Shares::new(2, 1);
    let [a, b, c] = [1, 2, 3].map(|n| ClientKey::new(Some(Ipv4Addr::from_bits(n).into())));
    let mut requests = [a, a, a, b, b].map(|client| Some(Box::pin(shares.acquire(client))));
    let (a, c) = (shares.try_acquire(a), shares.try_acquire(c));
    let mut poll = |i: usize| requests.get_mut(i).and_then(Option::as_mut).and_then(|r| block_on(poll_once(r)));
    assert!(a.is_some() && c.is_some() && (0..5).all(|i| poll(i).is_none()));
    drop(c);
    assert!(poll(0).is_none(), "a is at its limit");
    let b = poll(3).expect("b is next");
    drop(a);
    let a = poll(0).expect("a has room again");
    drop(b);
    assert!(poll(4).is_some());
    drop(a);
    // Granted to a request that is dropped without having noticed it.
    requests = requests.map(|_| None);
    assert!(requests.iter().all(Option::is_none));
    let usage = shares.usage();
    assert!(usage.in_use == 0 && usage.clients.is_empty() && usage.turns.is_empty());
}

#[test]
fn client_key_is_the_ipv4_address_the_ipv6_prefix_or_unix() {
    let key = |ip: &str| ClientKey::new(ip.parse().ok()).to_string();
    let table = [("192.0.2.7", "192.0.2.7"), ("::ffff:192.0.2.7", "192.0.2.7"), ("::1", "::/64"), ("", "unix")];
    table.into_iter().for_each(|(ip, expected)| assert_eq!(key(ip), expected));
    assert_eq!(key("2001:db8:0:1::7"), "2001:db8:0:1::/64");
}
