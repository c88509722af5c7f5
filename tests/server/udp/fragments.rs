//! Fragments (RFC 1928 section 7): fragments in order are reassembled, all others are dropped.

use super::association::{Association, datagram, datagram_name, receive, target};
use crate::*;

const LAST: u8 = 0x80;

/// Sends the fragments and then a standalone datagram. Returns the datagrams that the target receives before it.
fn relay_fragments(fragments: &[(u8, &[u8])]) -> Vec<Vec<u8>> {
    let server = Server::start(&[]);
    let (target, dst) = target();
    let association = Association::new(&server);
    for (frag, data) in fragments {
        association.send_raw(&datagram(*frag, dst, data));
    }
    association.send(dst, b"end");
    let mut received = Vec::new();
    loop {
        match receive(&target).0 {
            end if end == b"end" => return received,
            data => received.push(data),
        }
    }
}

fn assert_relayed(fragments: &[(u8, &[u8])], expected: &[&[u8]]) {
    assert_eq!(relay_fragments(fragments), expected, "{fragments:?}");
}

#[test]
fn udp_fragments_in_order_are_reassembled() {
    assert_relayed(&[(1, b"a"), (2, b"b"), (3 | LAST, b"c")], &[b"abc"]);
    assert_relayed(&[(1 | LAST, b"all of it")], &[b"all of it"]);
    assert_relayed(&[(1, b""), (2 | LAST, b"")], &[b""]);
    assert_relayed(&[(1, b"a"), (2 | LAST, b"b"), (1, b"c"), (2 | LAST, b"d")], &[b"ab", b"cd"]);
}

#[test]
fn udp_fragments_out_of_order_are_dropped() {
    assert_relayed(&[(2, b"b"), (1, b"a"), (3 | LAST, b"c")], &[]);
    assert_relayed(&[(1, b"a"), (3 | LAST, b"c")], &[]);
    assert_relayed(&[(2 | LAST, b"b")], &[]);
    assert_relayed(&[(LAST, b"position 0")], &[]);
    assert_relayed(&[(127 | LAST, b"x")], &[]);
}

#[test]
fn udp_lower_frag_starts_a_new_sequence() {
    assert_relayed(&[(1, b"a"), (2, b"b"), (1, b"x"), (2 | LAST, b"y")], &[b"xy"]);
    assert_relayed(&[(1, b"a"), (2, b"b"), (3, b"c"), (2 | LAST, b"x")], &[]);
}

#[test]
fn udp_standalone_datagram_ends_a_sequence() {
    assert_relayed(&[(1, b"a"), (0, b"alone"), (2 | LAST, b"b")], &[b"alone"]);
}

#[test]
fn udp_sequence_is_limited_to_127_fragments_and_the_size_of_a_datagram() {
    let mut complete: Vec<(u8, &[u8])> = (1..127).map(|position| (position, b"x".as_slice())).collect();
    complete.push((127 | LAST, b"y"));
    let expected = ["x".repeat(126).as_bytes(), b"y"].concat();
    assert_relayed(&complete, &[&expected]);
    let large = vec![0; 60_000];
    assert_relayed(&[(1, &large), (2 | LAST, &large)], &[]);
    assert_relayed(&[(1, &large[..50_000]), (2 | LAST, &large[..15_000])], &[&[0; 65_000]]);
}

#[test]
fn udp_fragments_with_another_dst_are_not_joined() {
    let server = Server::start(&[]);
    let ((first, a), (second, b)) = (target(), target());
    let association = Association::new(&server);
    association.send_raw(&datagram(1, a, b"for a"));
    association.send_raw(&datagram(2 | LAST, b, b"for b"));
    association.send_raw(&datagram_name(1, "127.0.0.1", b.port(), b"by "));
    association.send_raw(&datagram_name(2 | LAST, "127.0.0.1", b.port(), b"name"));
    // The datagram by name waits for its lookup.
    assert_eq!(receive(&second).0, b"by name");
    association.send(a, b"end");
    assert_eq!(receive(&first).0, b"end");
}

#[test]
fn udp_reassembly_queue_is_per_association() {
    let server = Server::start(&[]);
    let (target, dst) = target();
    let [first, second] = [(); 2].map(|()| Association::new(&server));
    first.send_raw(&datagram(1, dst, b"a"));
    second.send_raw(&datagram(1, dst, b"x"));
    first.send_raw(&datagram(2 | LAST, dst, b"b"));
    assert_eq!(receive(&target).0, b"ab");
    second.send_raw(&datagram(2 | LAST, dst, b"y"));
    assert_eq!(receive(&target).0, b"xy");
}

#[test]
fn udp_sequence_expires_between_5_and_6_5_seconds() {
    let server = Server::start(&[]);
    let (target, dst) = target();
    let [in_time, late] = [(); 2].map(|()| Association::new(&server));
    let started = Instant::now();
    for association in [&in_time, &late] {
        association.send_raw(&datagram(1, dst, b"a"));
    }
    // The RFC requires at least 5 seconds. The timeout of s5 is 6 seconds.
    thread::sleep(Duration::from_millis(5000).saturating_sub(started.elapsed()));
    in_time.send_raw(&datagram(2 | LAST, dst, b"b"));
    if started.elapsed() < Duration::from_millis(5900) {
        assert_eq!(receive(&target).0, b"ab");
    }
    thread::sleep(Duration::from_millis(6500).saturating_sub(started.elapsed()));
    late.send_raw(&datagram(2 | LAST, dst, b"b"));
    late.send(dst, b"end");
    assert_eq!(receive(&target).0, b"end");
}
