//! CONNECT by name: several addresses (RFC 8305), resolvers that fail or say nothing. Each runs in a network namespace
//! of its own with its own /etc/hosts and resolver.

use std::io::Write as _;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use crate::common::{Server, closed_port, echo_server, in_namespace, open, read_exact, read_reply, wait_until};
use crate::kit::{CONNECT, FullBacklog, accept, dns, fastest, greet, open_by_name, request_by_name, timed};

fn at(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().expect("an address"), port)
}

const PAIR: [&str; 2] = ["127.0.0.2", "127.0.0.3"];

#[test]
fn the_second_address_is_tried_when_the_first_refuses() {
    let hosts = "127.0.0.2 pair\n127.0.0.3 pair\n::1 dual\n127.0.0.1 dual\n";
    if !in_namespace("names::the_second_address_is_tried_when_the_first_refuses", hosts, "") {
        return;
    }
    let server = Server::start(&[]);
    // Whichever of the two is first for the resolver: one of the rounds begins with the one that refuses.
    for (name, ip) in [("pair", PAIR[0]), ("pair", PAIR[1]), ("dual", "::1"), ("dual", "127.0.0.1")] {
        let target = TcpListener::bind((ip, 0)).expect("a port");
        let port = target.local_addr().expect("an address").port();
        let time = fastest(|| {
            let (_stream, rep, bnd) = open_by_name(&server, CONNECT, name, port);
            assert_eq!((rep, bnd), (0, accept(&target).1), "{name} at {ip}");
        });
        assert!(time < Duration::from_millis(200), "{name} at {ip}: a failure needs no waiting, but took {time:?}");
    }
}

#[test]
fn the_second_address_is_tried_when_the_first_is_silent_for_a_while() {
    let hosts = "127.0.0.2 pair\n127.0.0.3 pair\n";
    if !in_namespace("names::the_second_address_is_tried_when_the_first_is_silent_for_a_while", hosts, "") {
        return;
    }
    let server = Server::start(&[]);
    let times = [[PAIR[0], PAIR[1]], [PAIR[1], PAIR[0]]].map(|[silent, listening]| {
        let silent = FullBacklog::at(at(silent, 0));
        let target = TcpListener::bind(at(listening, silent.addr.port())).expect("a port");
        fastest(|| {
            assert_eq!(open_by_name(&server, CONNECT, "pair", silent.addr.port()).1, 0);
            accept(&target);
        })
    });
    // In one of the two rounds the silent one was first.
    let [fast, slow] = if times[0] < times[1] { times } else { [times[1], times[0]] };
    assert!(fast < Duration::from_millis(240), "{fast:?}");
    assert!(slow >= Duration::from_millis(245) && slow < Duration::from_secs(2), "{slow:?}");
}

#[test]
fn the_rep_is_the_most_telling_one_of_all_addresses() {
    let hosts = "::1 dual\n127.0.0.1 dual\n\
                 2001:db8::1 mixed\n127.0.0.1 mixed\n\
                 192.0.2.1 away\n2001:db8::1 away\n\
                 192.0.2.1 slow\n127.0.0.2 slow\n\
                 224.0.0.1 many\n";
    if !in_namespace("names::the_rep_is_the_most_telling_one_of_all_addresses", hosts, "") {
        return;
    }
    let server = Server::start(&["--connect-timeout", "300ms"]);
    let rep = |name, port| open_by_name(&server, CONNECT, name, port).1;
    let closed = closed_port().port();
    assert_eq!(rep("dual", closed), 5, "both refuse");
    assert_eq!(rep("mixed", closed), 5, "no route and a refusal");
    assert_eq!(rep("away", closed), 3, "no route at all");
    let silent = FullBacklog::at(at("127.0.0.2", 0));
    assert_eq!(rep("slow", silent.addr.port()), 6, "no route and nobody who answers");
    assert_eq!(rep("many", closed), 3, "multicast is no host");
    assert_eq!(rep("127.0.0.1", closed), 5, "a literal");
    for dst in ["192.0.2.1:9", "[2001:db8::1]:9"] {
        assert_eq!(open(&server, CONNECT, dst.parse().expect("an address")).1, 3, "{dst}");
    }
}

#[test]
fn of_a_name_that_leads_back_here_too_only_the_other_address_is_dialled() {
    let hosts = "127.0.0.2 pair\n127.0.0.1 pair\n127.0.0.1 here\n";
    if !in_namespace("names::of_a_name_that_leads_back_here_too_only_the_other_address_is_dialled", hosts, "") {
        return;
    }
    let server = Server::start(&[]);
    let port = server.addr().port();
    assert_eq!(open_by_name(&server, CONNECT, "here", port).1, 2);
    assert_eq!(open_by_name(&server, CONNECT, "pair", port).1, 5, "nobody listens at the other address yet");
    let target = TcpListener::bind(at("127.0.0.2", port)).expect("the port is free at this address");
    let (_stream, rep, bnd) = open_by_name(&server, CONNECT, "pair", port);
    assert_eq!((rep, bnd), (0, accept(&target).1));
}

#[test]
fn what_the_resolver_says_decides_the_rep() {
    if !in_namespace("names::what_the_resolver_says_decides_the_rep", "", dns::RESOLV) {
        return;
    }
    let asked = dns::start();
    let server = Server::start(&["--connect-timeout", "300ms"]);
    let rep = |name| open_by_name(&server, CONNECT, name, 9).1;
    assert_eq!(rep("nx.example"), 4, "not found");
    assert_eq!(rep("servfail.example"), 1, "a resolver that fails");
    let (time, rep_of_silent) = timed(|| rep("silent.example"));
    assert_eq!(rep_of_silent, 1, "a resolver that says nothing");
    assert!(time >= Duration::from_millis(290) && time < Duration::from_secs(3), "{time:?}");
    // What no host can be called is asked of nobody.
    asked.lock().expect("no panic").clear();
    let long_label = format!("{}.example", "a".repeat(64));
    let long_name = "a.".repeat(127) + "a";
    for name in ["a..b", ".example", "a b", "a/b", "a%b", "$(id)", "a:b", &long_label, &long_name] {
        assert_eq!(rep(name), 4, "{name}");
    }
    let asked = asked.lock().expect("no panic");
    assert!(asked.is_empty(), "{asked:?}");
}

#[test]
fn hundreds_of_silent_look_ups_hold_up_nobody() {
    const SILENT: usize = 300;
    if !in_namespace("names::hundreds_of_silent_look_ups_hold_up_nobody", "", dns::RESOLV) {
        return;
    }
    let asked = dns::start();
    let server = Server::start(&["--connect-timeout", "60"]);
    let dst = echo_server();
    let waiting: Vec<_> = (0..SILENT)
        .map(|number| {
            let mut stream = greet(&server);
            stream.write_all(&request_by_name(CONNECT, &format!("silent.n{number}"), 9)).expect("the request is sent");
            stream
        })
        .collect();
    // Fewer than 300 are asked for at once; how many is the server's affair.
    wait_until("many have been asked for", Duration::from_secs(10), || {
        let mut names = asked.lock().expect("no panic").clone();
        names.sort_unstable();
        names.dedup();
        names.len() >= 100
    });
    let time = fastest(|| assert_eq!(open(&server, CONNECT, dst).1, 0));
    assert!(time < Duration::from_millis(100), "{time:?}");
    drop(waiting);
}

#[test]
fn a_client_that_leaves_during_a_look_up_frees_its_descriptor() {
    if !in_namespace("names::a_client_that_leaves_during_a_look_up_frees_its_descriptor", "", dns::RESOLV) {
        return;
    }
    let asked = dns::start();
    let server = Server::start(&["--connect-timeout", "60"]);
    let mut stream = greet(&server);
    stream.write_all(&request_by_name(CONNECT, "silent.example", 9)).expect("the request is sent");
    wait_until("the resolver is asked", Duration::from_secs(5), || !asked.lock().expect("no panic").is_empty());
    drop(stream);
    let log = server.wait_log(|log| log.contains("the client left"));
    assert!(log.contains("dst=\"silent.example:9\""), "{log}");
}

#[test]
fn a_name_is_looked_up_and_its_address_dialled() {
    if !in_namespace("names::a_name_is_looked_up_and_its_address_dialled", "", dns::RESOLV) {
        return;
    }
    dns::start();
    let server = Server::start(&[]);
    let dst = echo_server();
    let mut stream = greet(&server);
    stream.write_all(&request_by_name(CONNECT, "known.example", dst.port())).expect("the request is sent");
    assert_eq!(read_reply(&mut stream).0, 0);
    stream.write_all(b"hello").expect("it is sent");
    assert_eq!(read_exact(&mut stream, 5), b"hello");
}
