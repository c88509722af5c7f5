//! The reassembly queue of associations. tests/wire has sequences of fragments.

use super::association::{Association, datagram, datagram_name, receive, target};
use crate::*;

const LAST: u8 = 0x80;

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
