//! Datagrams to names with several addresses, and to names whose addresses change. Each test runs in a new network
//! namespace with an /etc/hosts or a resolver.

use super::association::{Association, assert_nothing_arrives, datagram_name, receive};
use crate::support::dns::Answer;
use crate::*;

/// An /etc/hosts. The resolver returns ::1 first.
const BOTH: &str = "::1 both.test\n127.0.0.1 both.test\n";

impl Association {
    fn send_to_name(&self, name: &str, port: u16, data: &[u8]) {
        self.send_raw(&datagram_name(0, name, port, data));
    }
}

/// Sends datagrams to a name until one is answered. Returns the time until then.
fn ping_until_answered(association: &Association, name: &str, port: u16) -> Duration {
    let started = Instant::now();
    while !arrives(&association.socket) {
        association.send_to_name(name, port, b"x");
        assert!(started.elapsed() < TIMEOUT, "no answer from {name}");
    }
    started.elapsed()
}

/// Fails unless the name answers from this address, once all earlier answers are read.
fn assert_answers_from(association: &Association, name: &str, addr: SocketAddr) {
    while arrives(&association.socket) {}
    association.send_to_name(name, addr.port(), b"question");
    assert_eq!(association.receive(), (addr, b"question".to_vec()));
}

#[test]
fn udp_to_a_name_uses_the_next_address_after_an_icmp_error() {
    enter_namespace!(BOTH, "");
    let server = Server::start(&[]);
    for ip in [V4, V6] {
        let ([target], port) = udp_sockets([ip]);
        udp_echo(target);
        let association = Association::new(&server);
        let started = Instant::now();
        // The error shows that the first datagram has not been delivered, so it is sent again.
        for data in [b"first", b"other"] {
            association.send_to_name("both.test", port, data);
            assert_eq!(association.receive(), (SocketAddr::new(ip, port), data.to_vec()));
        }
        assert!(started.elapsed() < Duration::from_millis(900), "{:?}", started.elapsed());
        assert!(!arrives(&association.socket), "an answer twice");
    }
}

#[test]
fn udp_icmp_errors_of_names_do_not_drop_other_datagrams() {
    enter_namespace!(BOTH, "");
    let server = Server::start(&[]);
    let ([other_v6, other_v4], port) = udp_sockets([V6, V4]);
    let association = Association::new(&server);
    for number in 0..100_u32 {
        // Nothing listens at either address.
        association.send_to_name("both.test", 9, b"x");
        for (socket, ip) in [(&other_v6, V6), (&other_v4, V4)] {
            association.send(SocketAddr::new(ip, port), &number.to_be_bytes());
            assert_eq!(receive(socket).0, number.to_be_bytes());
        }
    }
    // The errors are read: the server does not wake up again and again.
    let before = server.cpu_seconds();
    thread::sleep(Duration::from_millis(300));
    let used = server.cpu_seconds() - before;
    assert!(used < 0.1, "an idle association uses {used} s of CPU");
}

#[test]
fn udp_to_a_name_leaves_a_silent_address_after_a_second_and_keeps_one_that_has_answered() {
    enter_namespace!(BOTH, "");
    let server = Server::start(&[]);
    let ([silent, answering], port) = udp_sockets([V6, V4]);
    let association = Association::new(&server);
    let started = Instant::now();
    while !arrives(&answering) {
        association.send_to_name("both.test", port, b"x");
        assert!(started.elapsed() < TIMEOUT, "the second address is not used");
    }
    let time = started.elapsed();
    assert!((900..2500).contains(&time.as_millis()), "{time:?}");
    while arrives(&silent) || arrives(&answering) {}
    association.send_to_name("both.test", port, b"question");
    let (_, egress) = receive(&answering);
    answering.send_to(b"answer", egress).expect("datagram sent");
    assert_eq!(association.receive(), (SocketAddr::new(V4, port), b"answer".to_vec()));
    // A flow without answers stays at the address.
    let answered = Instant::now();
    while answered.elapsed() < Duration::from_millis(1200) {
        association.send_to_name("both.test", port, b"more");
        receive(&answering);
    }
    assert_nothing_arrives(&silent);
}

#[test]
fn udp_to_a_name_through_a_hop_that_gets_addresses_leaves_a_silent_address() {
    enter_namespace!(BOTH, "");
    let hop = Server::start(&[]);
    // The rule has an address, so the server resolves the name itself. It receives no ICMP errors.
    let server = Server::start(&["--via", &hop.addr().to_string(), "--deny", "to=192.0.2.1"]);
    let ([target], port) = udp_sockets([V4]);
    udp_echo(target);
    let association = Association::new(&server);
    ping_until_answered(&association, "both.test", port);
    thread::sleep(Duration::from_millis(1100));
    for _ in 0..3 {
        assert_answers_from(&association, "both.test", SocketAddr::new(V4, port));
    }
}

#[test]
fn udp_to_a_name_skips_denied_addresses() {
    enter_namespace!(BOTH, "");
    for (denied, allowed) in [(V4, V6), (V6, V4)] {
        let server = Server::start(&["--deny", &format!("to={denied}")]);
        let ([denied, allowed], port) = udp_sockets([denied, allowed]);
        let association = Association::new(&server);
        let started = Instant::now();
        while started.elapsed() < Duration::from_millis(1200) {
            association.send_to_name("both.test", port, b"x");
            receive(&allowed);
        }
        assert_nothing_arrives(&denied);
    }
}

#[test]
fn udp_names_are_looked_up_again_after_a_minute() {
    // The interval is a constant.
    if !is_strict() {
        return record_skip("takes a minute");
    }
    enter_namespace!("", dns::RESOLV);
    let ips = [2, 3, 4].map(|n| Ipv4Addr::new(127, 0, 0, n));
    let queries = dns::start_with(move |name, nth| match (name, nth) {
        (_, 0) => Answer::addrs([ips[0]]),
        ("moves.test", _) => Answer::addrs([ips[1], ips[2]]),
        _ => Answer::Rcode(2),
    });
    let server = Server::start(&["--deny", "to=127.0.0.3"]);
    let ([old, denied, new], port) = udp_sockets(ips.map(IpAddr::from));
    let ([kept], kept_port) = udp_sockets([ips[0].into()]);
    let association = Association::new(&server);
    let started = Instant::now();
    while !arrives(&new) {
        association.send_to_name("moves.test", port, b"x");
        association.send_to_name("fails.test", kept_port, b"x");
        // The association goes on during the lookups.
        receive(&kept);
        assert!(started.elapsed() < Duration::from_secs(75), "the new address is not used");
    }
    assert!(started.elapsed() > Duration::from_secs(59), "{:?}", started.elapsed());
    assert!(arrives(&old));
    assert_nothing_arrives(&denied);
    // A failed lookup keeps the old address.
    let is_repeated = || queries.lock().expect("not poisoned").iter().filter(|name| *name == "fails.test").count() > 2;
    crate::support::wait_until("the lookup is repeated", TIMEOUT, is_repeated);
    for _ in 0..10 {
        association.send_to_name("fails.test", kept_port, b"x");
        receive(&kept);
    }
}

#[test]
fn udp_cache_of_names_forgets_the_name_that_was_looked_up_first() {
    enter_namespace!("", dns::RESOLV);
    let queries = dns::start();
    let count = |n: usize| {
        let name = format!("n{n}.test");
        queries.lock().expect("not poisoned").iter().filter(|query| **query == name).count()
    };
    let server = Server::start(&[]);
    let ([target], port) = udp_sockets([V4]);
    let association = Association::new(&server);
    let send = |n: usize| {
        association.send_to_name(&format!("n{n}.test"), port, b"x");
        receive(&target);
    };
    (0..33).for_each(send);
    let before = [0, 1, 32].map(count);
    [1, 32, 0].into_iter().for_each(send);
    assert!(count(0) > before[0], "32 names are cached");
    assert_eq!([1, 32].map(count), before[1..]);
}
