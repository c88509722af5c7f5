//! Dropped datagrams: other senders, malformed datagrams, forbidden targets. None of them ends the association.

use super::association::{Association, assert_nothing_arrives, datagram, datagram_name, receive, socket, target};
use crate::*;

fn addr(text: &str) -> SocketAddr {
    text.parse().expect("valid address")
}

fn socket_at(ip: &str) -> UdpSocket {
    socket(ip.parse().expect("valid address"))
}

#[test]
fn udp_datagrams_from_another_address_are_dropped() {
    let server = Server::start(&[]);
    let (target, dst) = target();
    let association = Association::new(&server);
    let other = socket_at("127.0.0.2");
    for _ in 0..3 {
        let _ = other.send_to(&datagram(0, dst, b"other"), association.bnd);
    }
    association.send(dst, b"client");
    assert_eq!(receive(&target).0, b"client", "an earlier datagram was relayed");
    let _ = other.send_to(&datagram(0, dst, b"other"), association.bnd);
    association.send(dst, b"client again");
    assert_eq!(receive(&target).0, b"client again");
}

#[test]
fn udp_first_datagram_sets_the_client_port() {
    let server = Server::start(&[]);
    let (target, dst) = target();
    let association = Association::new(&server);
    association.send(dst, b"first");
    assert_eq!(receive(&target).0, b"first");
    let other = socket(V4);
    // On loopback, sending may report the ICMP error of the previous datagram.
    let _ = other.send_to(&datagram(0, dst, b"other"), association.bnd);
    association.send(dst, b"second");
    let (data, egress) = receive(&target);
    assert_eq!(data, b"second");
    target.send_to(b"answer", egress).expect("datagram sent");
    assert_eq!(association.receive(), (dst, b"answer".to_vec()));
    assert_nothing_arrives(&other);
}

#[test]
fn udp_answers_are_relayed_only_from_addresses_sent_to() {
    let server = Server::start(&[]);
    let association = Association::new(&server);
    let (target, dst) = target();
    association.send(dst, b"hello");
    let (_, egress) = receive(&target);
    let other = socket_at("127.0.0.3");
    other.send_to(b"other", egress).expect("datagram sent");
    // Address-dependent filtering: other ports of a host may answer after a datagram to the host (RFC 4787 section 5).
    let other_port = socket(V4);
    other_port.send_to(b"other port", egress).expect("datagram sent");
    let from = other_port.local_addr().expect("local address");
    assert_eq!(association.receive(), (from, b"other port".to_vec()), "the datagram from another address arrived");
    // After a datagram to an address, its answers are relayed.
    let known = other.local_addr().expect("local address");
    association.send(known, b"hello");
    receive(&other);
    other.send_to(b"after a datagram", egress).expect("datagram sent");
    assert_eq!(association.receive(), (known, b"after a datagram".to_vec()));
}

#[test]
fn udp_endpoint_independent_filtering_accepts_any_sender() {
    let server = Server::start(&["--udp-filtering", "endpoint-independent"]);
    let association = Association::new(&server);
    let (target, dst) = target();
    association.send(dst, b"hello");
    let (_, egress) = receive(&target);
    let other = socket_at("127.0.0.3");
    other.send_to(b"other", egress).expect("datagram sent");
    assert_eq!(association.receive(), (other.local_addr().expect("local address"), b"other".to_vec()));
}

#[test]
fn udp_association_survives_closed_target_ports() {
    let server = Server::start(&[]);
    let association = Association::new(&server);
    let echo = udp_echo_server(V4);
    let closed = [closed_port(), SocketAddr::new(V6, closed_port().port())];
    for _ in 0..5 {
        for closed in closed {
            association.send(closed, b"to a closed port");
        }
        // Twice, because sending may report the ICMP error of the previous datagram.
        association.ping(echo, b"still open");
        association.ping(echo, b"still open");
    }
}

#[test]
fn udp_association_survives_a_closed_client_port() {
    // In a namespace, so that no other process can bind the port while it is closed.
    enter_namespace!("", "");
    let server = Server::start(&[]);
    let (target, dst) = target();
    let mut association = Association::new(&server);
    association.send(dst, b"hello");
    let (_, egress) = receive(&target);
    let addr = association.socket.local_addr().expect("local address");
    // The answers arrive at a closed port. The server's socket receives the ICMP errors.
    association.socket = socket(V4);
    for _ in 0..3 {
        target.send_to(b"to a closed port", egress).expect("datagram sent");
    }
    association.socket = UdpSocket::bind(addr).expect("the port is still free");
    association.socket.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    // The client may have received the first answer before it closed its port.
    association.send(dst, b"open again");
    assert_eq!(receive(&target).0, b"open again");
    target.send_to(b"answer", egress).expect("datagram sent");
    while association.receive().1 != b"answer" {}
}

#[test]
fn udp_malformed_datagrams_are_dropped() {
    let server = Server::start(&[]);
    let association = Association::new(&server);
    let (target, dst) = target();
    association.send(dst, b"first");
    assert_eq!(receive(&target).0, b"first");
    let (by_address, by_name) = (datagram(0, dst, b""), datagram_name(0, "127.0.0.1", dst.port(), b""));
    let mut bad: Vec<Vec<u8>> = Vec::new();
    for whole in [&by_address, &by_name, &datagram(0, addr("[::1]:9"), b"")] {
        bad.extend((0..whole.len()).map(|length| whole[..length].to_vec()));
    }
    for atyp in [0, 2, 5, 255] {
        let mut bytes = by_address.clone();
        bytes[3] = atyp;
        bad.push(bytes);
    }
    for name in ["", "a\0b", "a\nb", "a..b", "a b"] {
        bad.push(datagram_name(0, name, dst.port(), b"x"));
    }
    for dst in ["127.0.0.1:0", "224.0.0.1:9", "255.255.255.255:9", "240.0.0.1:9", "[ff02::1]:9", "[::]:0"] {
        bad.push(datagram(0, addr(dst), b"x"));
    }
    let count = bad.len();
    for (number, bytes) in (0..count).zip(bad) {
        association.send_raw(&bytes);
        association.send(dst, &number.to_be_bytes());
        assert_eq!(receive(&target).0, number.to_be_bytes(), "after {bytes:02x?}");
    }
    assert!(count > 50);
}

#[test]
fn udp_multicast_and_broadcast_are_dropped() {
    let server = Server::start(&[]);
    let association = Association::new(&server);
    let echo = udp_echo_server(V4);
    association.send(addr("224.0.0.1:9"), b"many");
    association.send(addr("255.255.255.255:9"), b"all");
    association.ping(echo, b"one");
    drop(association);
    let log = server.wait_log(|log| log.contains("msg=session "));
    assert!(log.contains("up=3 down=3 "), "{log}");
}

#[test]
fn udp_failed_lookups_do_not_stop_other_datagrams() {
    // The resolver's port is closed, so each lookup fails.
    enter_namespace!("", crate::support::dns::RESOLV);
    let server = Server::start(&[]);
    let association = Association::new(&server);
    let echo = udp_echo_server(V4);
    for number in 0..50 {
        association.send_raw(&datagram_name(0, &format!("n{number}.example"), 9, b"x"));
        association.ping(echo, b"still open");
    }
    // Unreachable targets.
    association.send(addr("192.0.2.1:9"), b"x");
    association.send(addr("[2001:db8::1]:9"), b"x");
    association.ping(echo, b"still open");
}

#[test]
fn udp_pending_lookups_are_limited_and_do_not_stop_other_datagrams() {
    enter_namespace!("", crate::support::dns::RESOLV);
    let queries = crate::support::dns::start();
    let server = Server::start(&["--connect-timeout", "60"]);
    let association = Association::new(&server);
    let echo = udp_echo_server(V4);
    // More names, and more datagrams for each name, than the server queues. Fewer than the socket buffer holds.
    for number in 0..30 {
        for _ in 0..10 {
            association.send_raw(&datagram_name(0, &format!("silent.n{number}"), 9, b"x"));
        }
    }
    association.socket.set_read_timeout(Some(Duration::from_millis(500))).expect("timeout set");
    wait_until("an answer arrives", TIMEOUT, || {
        // Repeated, because UDP may lose datagrams.
        association.send(echo, b"still open");
        retry(|| association.socket.recv_from(&mut [0; 64])).is_ok()
    });
    let mut names = queries.lock().expect("not poisoned").clone();
    names.sort_unstable();
    names.dedup();
    assert!(names.len() <= 16, "one association resolves {} names at the same time", names.len());
}
