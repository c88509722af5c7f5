//! What the log says about datagrams: the number of targets, each target once, and dropped datagrams with the reason.

use super::association::{Association, datagram, datagram_name};
use crate::*;

const HOSTS: &str = "127.0.0.1 one.test\n";

/// Ends an association, and returns the log.
fn end(server: &Server, association: Association) -> String {
    drop(association);
    server.wait_log(|log| !session_lines(log).is_empty())
}

#[test]
fn log_counts_the_targets_of_an_association_and_names_each_once_if_verbose() {
    enter_namespace!(HOSTS, "");
    let [one, two] = [V4, Ipv4Addr::new(127, 0, 0, 2).into()].map(udp_echo_server);
    for args in [&["-v"][..], &[]] {
        let server = Server::start(args);
        let association = Association::new(&server);
        for _ in 0..3 {
            association.send_raw(&datagram_name(0, "one.test", one.port(), b"hello"));
            association.receive();
            association.ping(two, b"hello");
            association.ping(one, b"hello");
        }
        let log = end(&server, association);
        let [line] = session_lines(&log)[..] else { panic!("one session: {log}") };
        assert!(line.contains(" command=udp bnd=") && line.contains(" rep=0 targets=2 up=45 down=45 "), "{line}");
        let expected = [format!(" to=\"one.test:{}\" addr={one}", one.port()), format!(" to=\"{two}\" addr={two}")];
        let ends =
            steps(&log, "datagram").into_iter().map(|line| line.split_once(" command=udp").expect("the command").1);
        assert!(ends.eq(expected.iter().take(if args.is_empty() { 0 } else { 2 })), "{log}");
        let lookups = steps(&log, "lookup");
        assert_eq!(lookups.len(), args.len(), "{log}");
        assert!(lookups.iter().all(|line| line.ends_with(" to=\"one.test\" addrs=\"127.0.0.1:0\"")), "{log}");
    }
}

#[test]
fn log_names_the_targets_behind_a_hop_with_the_hop() {
    let hop = Server::start(&[]);
    let server = Server::start(&["-v", "--via", &hop.addr().to_string()]);
    let association = Association::new(&server);
    let target = udp_echo_server(V4);
    for _ in 0..2 {
        association.ping(target, b"hello");
    }
    let log = end(&server, association);
    let [line] = steps(&log, "datagram")[..] else { panic!("one target: {log}") };
    assert!(line.ends_with(&format!(" to=\"{target}\" via=\"--via\"")), "{line}");
    assert!(session_lines(&log)[0].contains(" targets=1 "), "{log}");
}

#[test]
fn log_names_all_hops_of_an_association_in_lines_that_share_an_id() {
    let hops = [Server::start(&[]), Server::start(&[])];
    let addrs = [("near", hops[0].addr()), ("far", hops[1].addr()), ("gone", closed_port())];
    let [near, far, gone] = addrs.map(|(name, addr)| format!("--hop={name}={addr}"));
    let rules = ["127.0.0.1 via=near", "127.0.0.2 via=far", "127.0.0.3 via=gone"].map(|to| format!("--allow=to={to}"));
    let server = Server::start(&["-vv", &near, &far, &gone, &rules[0], &rules[1], &rules[2]]);
    let association = Association::new(&server);
    for host in ["127.0.0.1", "127.0.0.2"] {
        association.ping(udp_echo_server(host.parse().expect("valid address")), b"hello");
    }
    association.send("127.0.0.3:9".parse().expect("valid address"), b"dropped");
    server.wait_log(|log| !steps(log, "hop").is_empty());
    let log = end(&server, association);
    assert!(session_lines(&log)[0].contains(" via=\"near,far,gone\" "), "{log}");
    assert!(steps(&log, "hop")[0].contains(" via=\"near,far,gone\" hop=\"gone\" "), "{log}");
    let is_start = |line: &str| line.contains(" listening on ") || line.contains(" sandbox: ");
    let lines: Vec<&str> = log.lines().filter(|line| !is_start(line)).collect();
    let is_of_session = |line: &str| line.starts_with("ts=") && line.contains(" msg=") && line.contains(" id=1 ");
    assert!(lines.iter().all(|line| is_of_session(line)), "{log}");
    assert!(log.contains(" id=1 module=s5::client text=\"proxy "), "{log}");
}

#[test]
fn verbose_log_has_the_reason_of_dropped_datagrams() {
    enter_namespace!(HOSTS, "");
    let any: SocketAddr = closed_port();
    let denied: SocketAddr = "127.0.0.1:9".parse().expect("valid address");
    let no_route: SocketAddr = "192.0.2.1:9".parse().expect("valid address");
    let rows: [(&[&str], Vec<u8>, &str, &str); 6] = [
        (&["--deny", "port=9"], datagram(0, denied, b"x"), " to=\"127.0.0.1:9\"", "denied: --deny (deny port=9)"),
        (
            &["--deny", "to=127.0.0.1"],
            datagram_name(0, "one.test", 7, b"x"),
            "",
            "one.test has no address that is allowed",
        ),
        (&["--rate", "1k"], datagram(0, any, &[0; 65_000]), "", "rate limit"),
        (&[], b"not a datagram".to_vec(), "", "unknown address type"),
        (
            &[],
            datagram_name(0, "missing.test", 9, b"x"),
            " to=\"missing.test:9\"",
            "temporary failure in name resolution",
        ),
        (&[], datagram(0, no_route, b"x"), " to=\"192.0.2.1:9\"", "not sent: "),
    ];
    for (args, bytes, to, error) in rows {
        let server = Server::start(&[args, &["-v"]].concat());
        let association = Association::new(&server);
        // With a rate limit, the first datagram can pass as a burst.
        for _ in 0..100 {
            association.send_raw(&bytes);
        }
        let log = server.wait_log(|log| !steps(log, "drop").is_empty());
        let line = steps(&log, "drop")[0];
        let (_, fields) = line.split_once(" command=udp").expect("the command");
        assert!(fields.starts_with(&format!("{to} dropped=1 error=\"")) && fields.contains(error), "{error}: {line}");
        let log = end(&server, association);
        assert!(steps(&log, "drop").len() <= 2, "more than one line a second: {log}");
    }
}
