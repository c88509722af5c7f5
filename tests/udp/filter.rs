//! What does not pass: strangers on either side, and what is no datagram; none of it ends or takes an association.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use crate::association::{Association, assert_nothing, datagram, datagram_name, receive, socket, target};
use crate::common::{Server, TIMEOUT, closed_port, in_namespace, udp_echo_server, wait_until};
use crate::kit::{V4, V6};

fn addr(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

fn socket_at(ip: &str) -> UdpSocket {
    socket(ip.parse().expect("an address"))
}

#[test]
fn another_address_neither_gets_through_nor_takes_the_association() {
    let server = Server::start(&[]);
    let (target, dst) = target();
    let association = Association::new(&server);
    let stranger = socket_at("127.0.0.2");
    for _ in 0..3 {
        let _ = stranger.send_to(&datagram(0, dst, b"stranger"), association.bnd);
    }
    association.send(dst, b"client");
    assert_eq!(receive(&target).0, b"client", "what came before was dropped");
    let _ = stranger.send_to(&datagram(0, dst, b"stranger"), association.bnd);
    association.send(dst, b"client again");
    assert_eq!(receive(&target).0, b"client again");
}

#[test]
fn the_port_of_the_first_datagram_is_the_clients() {
    let server = Server::start(&[]);
    let (target, dst) = target();
    let association = Association::new(&server);
    association.send(dst, b"first");
    assert_eq!(receive(&target).0, b"first");
    let stranger = socket(V4);
    // On loopback the stranger hears by ICMP that nobody takes it: an error that is none here.
    let _ = stranger.send_to(&datagram(0, dst, b"stranger"), association.bnd);
    association.send(dst, b"second");
    let (data, relay) = receive(&target);
    assert_eq!(data, b"second");
    target.send_to(b"answer", relay).expect("it is sent");
    assert_eq!(association.receive(), (dst, b"answer".to_vec()));
    assert_nothing(&stranger);
}

#[test]
fn the_port_that_dst_names_is_the_only_one() {
    let server = Server::start(&[]);
    let (target, dst) = target();
    // An address of DST that is not the client's does not move the association there.
    for ip in ["127.0.0.1", "0.0.0.0", "192.0.2.1"] {
        let socket = socket(V4);
        let port = socket.local_addr().expect("an address").port();
        let declared = SocketAddr::new(ip.parse().expect("an address"), port);
        let association = Association::declare(&server, declared, socket);
        let stranger = self::socket(V4);
        let _ = stranger.send_to(&datagram(0, dst, b"stranger"), association.bnd);
        association.send(dst, b"client");
        assert_eq!(receive(&target).0, b"client", "{ip}");
    }
}

#[test]
fn only_those_who_were_sent_to_may_answer() {
    let server = Server::start(&[]);
    let association = Association::new(&server);
    let (target, dst) = target();
    association.send(dst, b"hello");
    let (_, relay) = receive(&target);
    let stranger = socket_at("127.0.0.3");
    stranger.send_to(b"stranger", relay).expect("it is sent");
    // Address-dependent: another port of a host that was sent to may answer (RFC 4787 section 5).
    let neighbour = socket(V4);
    neighbour.send_to(b"neighbour", relay).expect("it is sent");
    let from = neighbour.local_addr().expect("an address");
    assert_eq!(association.receive(), (from, b"neighbour".to_vec()), "the stranger came first");
    // Once it was sent to, it is none any more.
    let known = stranger.local_addr().expect("an address");
    association.send(known, b"hello");
    receive(&stranger);
    stranger.send_to(b"no stranger", relay).expect("it is sent");
    assert_eq!(association.receive(), (known, b"no stranger".to_vec()));
}

#[test]
fn anybody_may_answer_where_the_server_is_told_so() {
    let server = Server::start(&["--udp-filtering", "endpoint-independent"]);
    let association = Association::new(&server);
    let (target, dst) = target();
    association.send(dst, b"hello");
    let (_, relay) = receive(&target);
    let stranger = socket_at("127.0.0.3");
    stranger.send_to(b"stranger", relay).expect("it is sent");
    assert_eq!(association.receive(), (stranger.local_addr().expect("an address"), b"stranger".to_vec()));
}

#[test]
fn a_closed_port_of_a_target_ends_nothing() {
    let server = Server::start(&[]);
    let association = Association::new(&server);
    let echo = udp_echo_server(V4);
    let closed = [closed_port(), SocketAddr::new(V6, closed_port().port())];
    for _ in 0..5 {
        for closed in closed {
            association.send(closed, b"anybody?");
        }
        // Two, since the error may be told in place of one.
        association.ping(echo, b"still there");
        association.ping(echo, b"still there");
    }
}

#[test]
fn a_client_whose_port_is_closed_for_a_while_ends_nothing() {
    // A port is let go and taken again: nobody else may come in between.
    if !in_namespace("filter::a_client_whose_port_is_closed_for_a_while_ends_nothing", "", "") {
        return;
    }
    let server = Server::start(&[]);
    let (target, dst) = target();
    let mut association = Association::new(&server);
    association.send(dst, b"hello");
    let (_, relay) = receive(&target);
    let own = association.socket.local_addr().expect("an address");
    // The answers meet a closed port, and the server's socket gets the ICMP error.
    association.socket = socket(V4);
    for _ in 0..3 {
        target.send_to(b"nobody hears this", relay).expect("it is sent");
    }
    association.socket = UdpSocket::bind(own).expect("the port is still free");
    association.socket.set_read_timeout(Some(TIMEOUT)).expect("a timeout can be set");
    // The first one may have come in before the error was told.
    association.send(dst, b"back again");
    assert_eq!(receive(&target).0, b"back again");
    target.send_to(b"welcome", relay).expect("it is sent");
    while association.receive().1 != b"welcome" {}
}

#[test]
fn what_is_no_datagram_is_dropped_and_ends_nothing() {
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
        let mut octets = by_address.clone();
        octets[3] = atyp;
        bad.push(octets);
    }
    for name in ["", "a\0b", "a\nb", "a..b", "a b"] {
        bad.push(datagram_name(0, name, dst.port(), b"x"));
    }
    for dst in ["127.0.0.1:0", "224.0.0.1:9", "255.255.255.255:9", "240.0.0.1:9", "[ff02::1]:9", "[::]:0"] {
        bad.push(datagram(0, addr(dst), b"x"));
    }
    let count = bad.len();
    for (number, octets) in (0..count).zip(bad) {
        association.send_raw(&octets);
        association.send(dst, &number.to_be_bytes());
        assert_eq!(receive(&target).0, number.to_be_bytes(), "after {octets:02x?}");
    }
    assert!(count > 50);
}

#[test]
fn multicast_and_broadcast_are_sent_nothing() {
    let server = Server::start(&[]);
    let association = Association::new(&server);
    let echo = udp_echo_server(V4);
    association.send(addr("224.0.0.1:9"), b"many");
    association.send(addr("255.255.255.255:9"), b"all");
    association.ping(echo, b"one");
    drop(association);
    let log = server.wait_log(|log| log.contains("session "));
    assert!(log.contains("up=3 down=3 "), "{log}");
}

#[test]
fn names_that_nobody_knows_end_nothing_and_hold_up_nobody() {
    // Nobody listens at the resolver's port: each look-up fails for now.
    let test = "filter::names_that_nobody_knows_end_nothing_and_hold_up_nobody";
    if !in_namespace(test, "", crate::kit::dns::RESOLV) {
        return;
    }
    let server = Server::start(&[]);
    let association = Association::new(&server);
    let echo = udp_echo_server(V4);
    for number in 0..50 {
        association.send_raw(&datagram_name(0, &format!("n{number}.example"), 9, b"x"));
        association.ping(echo, b"still there");
    }
    // No route: nothing is sent, nothing ends.
    association.send(addr("192.0.2.1:9"), b"x");
    association.send(addr("[2001:db8::1]:9"), b"x");
    association.ping(echo, b"still there");
}

#[test]
fn silent_look_ups_hold_up_nobody() {
    if !in_namespace("filter::silent_look_ups_hold_up_nobody", "", crate::kit::dns::RESOLV) {
        return;
    }
    let asked = crate::kit::dns::start();
    let server = Server::start(&["--connect-timeout", "60"]);
    let association = Association::new(&server);
    let echo = udp_echo_server(V4);
    // More of each than wait for a look-up, and no more than the kernel keeps.
    for number in 0..30 {
        for _ in 0..10 {
            association.send_raw(&datagram_name(0, &format!("silent.n{number}"), 9, b"x"));
        }
    }
    association.socket.set_read_timeout(Some(Duration::from_millis(500))).expect("a timeout can be set");
    wait_until("an answer", TIMEOUT, || {
        // UDP may lose one in the crowd.
        association.send(echo, b"still there");
        association.socket.recv_from(&mut [0; 64]).is_ok()
    });
    let mut names = asked.lock().expect("no panic").clone();
    names.sort_unstable();
    names.dedup();
    assert!(names.len() <= 16, "one association asks for {} names at once", names.len());
}
