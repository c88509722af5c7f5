//! Senders that may answer, closed ports, and lookups: none of them ends the association or delays other datagrams.
//! tests/wire has datagrams of other senders, malformed datagrams and forbidden targets.

use super::association::{Association, datagram_name, receive, relayed, socket};
use crate::*;

fn socket_at(ip: &str) -> UdpSocket {
    socket(ip.parse().expect("valid address"))
}

#[test]
fn udp_answers_are_relayed_only_from_addresses_sent_to() {
    let (_server, association, target, dst) = relayed();
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
    let (_server, mut association, target, dst) = relayed();
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

#[test]
fn udp_answers_come_from_the_last_1024_addresses_that_the_client_has_used() {
    let server = Server::start(&[]);
    let association = Association::new(&server);
    let echo = udp_echo_server(V4);
    let [(old, old_addr), (reused, reused_addr)] = [2, 3].map(|n| {
        let target = socket([127, 0, 0, n].into());
        let addr = target.local_addr().expect("local address");
        association.send(addr, b"hello");
        (target, addr)
    });
    let (_, egress) = receive(&old);
    receive(&reused);
    for n in 0..1100_u16 {
        let [high, low] = n.to_be_bytes();
        association.send(SocketAddr::new([127, 1, high, low].into(), 9), b"");
        if n % 50 == 0 {
            association.ping(echo, b"the server has received all so far");
        }
        if n == 600 {
            association.send(reused_addr, b"again");
        }
    }
    association.ping(echo, b"the server has received all");
    old.send_to(b"too late", egress).expect("datagram sent");
    reused.send_to(b"in time", egress).expect("datagram sent");
    assert_eq!(association.receive(), (reused_addr, b"in time".to_vec()));
    association.send(old_addr, b"hello");
    receive(&old);
    old.send_to(b"in time again", egress).expect("datagram sent");
    assert_eq!(association.receive(), (old_addr, b"in time again".to_vec()));
}
