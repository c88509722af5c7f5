//! FRAG (RFC 1928 section 7): positions in their order make a datagram, everything else is dropped.

use std::thread;
use std::time::{Duration, Instant};

use crate::association::{Association, datagram, datagram_name, receive, target};
use crate::common::Server;

const LAST: u8 = 0x80;

/// Sends each fragment and then a datagram that stands alone, and gives what the target got before that.
fn relayed(fragments: &[(u8, &[u8])]) -> Vec<Vec<u8>> {
    let server = Server::start(&[]);
    let (target, dst) = target();
    let association = Association::new(&server);
    for (frag, data) in fragments {
        association.send_raw(&datagram(*frag, dst, data));
    }
    association.send(dst, b"end");
    let mut got = Vec::new();
    loop {
        match receive(&target).0 {
            end if end == b"end" => return got,
            data => got.push(data),
        }
    }
}

fn assert_relayed(fragments: &[(u8, &[u8])], expected: &[&[u8]]) {
    assert_eq!(relayed(fragments), expected, "{fragments:?}");
}

#[test]
fn fragments_in_their_order_make_one_datagram() {
    assert_relayed(&[(1, b"a"), (2, b"b"), (3 | LAST, b"c")], &[b"abc"]);
    assert_relayed(&[(1 | LAST, b"all of it")], &[b"all of it"]);
    assert_relayed(&[(1, b""), (2 | LAST, b"")], &[b""]);
    assert_relayed(&[(1, b"a"), (2 | LAST, b"b"), (1, b"c"), (2 | LAST, b"d")], &[b"ab", b"cd"]);
}

#[test]
fn fragments_out_of_order_are_dropped() {
    assert_relayed(&[(2, b"b"), (1, b"a"), (3 | LAST, b"c")], &[]);
    assert_relayed(&[(1, b"a"), (3 | LAST, b"c")], &[]);
    assert_relayed(&[(2 | LAST, b"b")], &[]);
    assert_relayed(&[(LAST, b"position 0")], &[]);
    assert_relayed(&[(127 | LAST, b"x")], &[]);
}

#[test]
fn a_lower_frag_begins_anew() {
    assert_relayed(&[(1, b"a"), (2, b"b"), (1, b"x"), (2 | LAST, b"y")], &[b"xy"]);
    assert_relayed(&[(1, b"a"), (2, b"b"), (3, b"c"), (2 | LAST, b"x")], &[]);
}

#[test]
fn a_datagram_that_stands_alone_ends_a_sequence() {
    assert_relayed(&[(1, b"a"), (0, b"alone"), (2 | LAST, b"b")], &[b"alone"]);
}

#[test]
fn a_sequence_may_have_127_fragments_and_no_more_octets_than_a_datagram() {
    let mut whole: Vec<(u8, &[u8])> = (1..127).map(|position| (position, b"x".as_slice())).collect();
    whole.push((127 | LAST, b"y"));
    let expected = ["x".repeat(126).as_bytes(), b"y"].concat();
    assert_relayed(&whole, &[&expected]);
    let large = vec![0; 60_000];
    assert_relayed(&[(1, &large), (2 | LAST, &large)], &[]);
    assert_relayed(&[(1, &large[..50_000]), (2 | LAST, &large[..15_000])], &[&[0; 65_000]]);
}

#[test]
fn a_sequence_is_of_one_dst() {
    let server = Server::start(&[]);
    let ((first, a), (second, b)) = (target(), target());
    let association = Association::new(&server);
    association.send_raw(&datagram(1, a, b"for a"));
    association.send_raw(&datagram(2 | LAST, b, b"for b"));
    association.send_raw(&datagram_name(1, "127.0.0.1", b.port(), b"by "));
    association.send_raw(&datagram_name(2 | LAST, "127.0.0.1", b.port(), b"name"));
    // By name it may take a little longer, so this one is waited for.
    assert_eq!(receive(&second).0, b"by name");
    association.send(a, b"end");
    assert_eq!(receive(&first).0, b"end");
}

#[test]
fn two_clients_have_a_queue_each() {
    let server = Server::start(&[]);
    let (target, dst) = target();
    let [one, other] = [(); 2].map(|()| Association::new(&server));
    one.send_raw(&datagram(1, dst, b"a"));
    other.send_raw(&datagram(1, dst, b"x"));
    one.send_raw(&datagram(2 | LAST, dst, b"b"));
    assert_eq!(receive(&target).0, b"ab");
    other.send_raw(&datagram(2 | LAST, dst, b"y"));
    assert_eq!(receive(&target).0, b"xy");
}

#[test]
fn a_sequence_lasts_five_seconds_but_not_for_ever() {
    let server = Server::start(&[]);
    let (target, dst) = target();
    let [kept, late] = [(); 2].map(|()| Association::new(&server));
    let started = Instant::now();
    for association in [&kept, &late] {
        association.send_raw(&datagram(1, dst, b"a"));
    }
    // The passing of time is what is tested: "no less than 5 seconds", and here it is 6.
    thread::sleep(Duration::from_millis(5000).saturating_sub(started.elapsed()));
    kept.send_raw(&datagram(2 | LAST, dst, b"b"));
    if started.elapsed() < Duration::from_millis(5900) {
        assert_eq!(receive(&target).0, b"ab");
    }
    thread::sleep(Duration::from_millis(6500).saturating_sub(started.elapsed()));
    late.send_raw(&datagram(2 | LAST, dst, b"b"));
    late.send(dst, b"end");
    assert_eq!(receive(&target).0, b"end");
}
