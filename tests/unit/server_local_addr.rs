//! Unit tests of the private items of `src/server/local_addr.rs`.

use super::*;

#[test]
fn reachable_addr_is_loopback_if_client_and_peer_are_on_this_host() {
    let control = |text: &str| Some(text.parse().expect("an address"));
    let reachable = |control, peer: &str| {
        let peer = SocketAddr::new(peer.parse().expect("an address"), 0);
        reachable_addr(control, peer).map(|addr| addr.ip().to_string()).ok()
    };
    assert_eq!(reachable(control("127.0.0.2:1080"), "127.0.0.1").as_deref(), Some("127.0.0.2"));
    assert_eq!(reachable(control("127.0.0.2:1080"), "0.0.0.0").as_deref(), Some("127.0.0.2"));
    assert_eq!(reachable(control("[::1]:1080"), "0.0.0.0").as_deref(), Some("127.0.0.1"));
    assert_eq!(reachable(None, "0.0.0.0").as_deref(), Some("127.0.0.1"));
    assert_eq!(reachable(None, "::").as_deref(), Some("::1"));
    assert_eq!(reachable(control("192.0.2.7:1080"), "127.0.0.1").as_deref(), Some("127.0.0.1"));
}

#[test]
fn candidate_ports_are_all_ports_of_a_small_range_and_a_limited_number_of_a_large_one() {
    for (range, count) in [(5000..=5000, 1), (5000..=5002, 3), (1..=1024, 1024), (1..=u16::MAX, 1024)] {
        let mut ports: Vec<u16> = candidate_ports(&range).collect();
        ports.sort_unstable();
        ports.dedup();
        assert!(ports.len() == count && ports.iter().all(|port| range.contains(port)), "{range:?}: {ports:?}");
    }
}
