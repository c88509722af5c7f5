//! Rules in a running server, at each time of evaluation: accept, request, resolved name, peer of BIND, datagrams each
//! way. tests/policy tests the rules themselves.

use super::tools::{
    ALICE, BOB, alice_and_bob, assert_accepts_peer, assert_no_datagram, associate, associate_anonymously, bind,
    is_closed, log_in, open_ok, rep, send_request, udp_target,
};
use crate::udp::association::{datagram, datagram_name, receive};
use crate::*;

const HOSTS: &str = "127.0.0.1 localhost a.test sub.a.test xa.test b.test\n127.0.0.3 three.test\n";

/// Rules, and requests: client address, user, command, expected REP, and one or more DST. P and Q stand for ports that
/// accept connections at every address.
const TABLE: [(&str, &[&str]); 5] = [
    (
        "deny from=127.0.0.2,127.64.0.0/10 port=P",
        &[
            "127.0.0.2 - connect 2 127.0.0.1:P",
            "127.0.0.2 - connect 0 127.0.0.1:Q",
            "127.64.0.9 - connect 2 b.test:P",
            "127.0.0.3 - connect 0 127.0.0.1:P",
        ],
    ),
    (
        "deny user=alice command=udp,bind\nallow user=alice to=127.0.0.1 port=P\ndeny user=alice\n\
         deny user=*@corp method=password to=127.0.0.1 port=P",
        &[
            "127.0.0.1 alice connect 0 127.0.0.1:P",
            "127.0.0.1 alice connect 2 127.0.0.1:Q",
            "127.0.0.1 alice bind 2 0.0.0.0:0",
            "127.0.0.1 alice udp 2 0.0.0.0:0",
            "127.0.0.1 bob@corp connect 2 127.0.0.1:P",
            "127.0.0.1 bob@corp connect 0 127.0.0.2:P",
            "127.0.0.1 bob@corp bind 0 0.0.0.0:0",
            "127.0.0.1 bob@corp udp 0 0.0.0.0:0",
        ],
    ),
    (
        "deny command=connect",
        &["127.0.0.1 - connect 2 127.0.0.1:P a.test:P", "127.0.0.1 - bind 0 0.0.0.0:0", "127.0.0.1 - udp 0 0.0.0.0:0"],
    ),
    (
        "deny to=.a.test\ndeny to=three.test",
        &[
            "127.0.0.1 - connect 2 A.Test.:P sub.a.test:P three.test:P",
            "127.0.0.1 - bind 2 a.test:0",
            "127.0.0.1 - connect 0 xa.test:P 127.0.0.1:P",
        ],
    ),
    (
        "deny to=127.0.0.1",
        &[
            "127.0.0.1 - connect 2 127.0.0.1:P a.test:P 0.0.0.0:P [::ffff:127.0.0.1]:P [::ffff:0.0.0.0]:P",
            "127.0.0.1 - connect 2 [64:ff9b::7f00:1]:P [64:ff9b:1::7f00:1]:P [2002:7f00:1::]:P [2001::80ff:fffe]:P",
            // Addresses that are sent as names.
            "127.0.0.1 - connect 2 =[::ffff:127.0.0.1]:P =::ffff:127.0.0.1:P =127.0.0.1:P",
            "127.0.0.1 - connect 2 127.1:P 2130706433:P 0x7f000001:P 0:P",
            "127.0.0.1 - connect 0 127.0.0.2:P [::1]:P",
        ],
    ),
];

#[test]
fn rules_apply_to_the_request_of_each_command() {
    enter_namespace!(HOSTS, "");
    let dir = temp_dir();
    let users = write_file(dir.path(), "users", alice_and_bob());
    let [p, q] = [(); 2].map(|()| tcp_server(Ipv6Addr::UNSPECIFIED.into(), drop).port().to_string());
    let with_ports = |text: &str| text.replace('P', &p).replace('Q', &q);
    for (rules, cases) in TABLE {
        let file = write_file(dir.path(), "rules", &with_ports(rules));
        let args = ["--rules", &file, "--users", &users];
        let server = Server::start(if rules.contains("user=") { &args } else { &args[..2] });
        for case in cases {
            let mut words = case.split(' ');
            let [from, user, command, expected] = [(); 4].map(|()| words.next().expect("four words and a DST"));
            let login = [ALICE, BOB].into_iter().flatten().find(|(name, _)| *name == user);
            let command = match command {
                "connect" => CONNECT,
                "bind" => BIND,
                _ => UDP_ASSOCIATE,
            };
            for dst in words {
                let mut stream = log_in(server.addr(), ip(from), login);
                let rep = send_request(&mut stream, command, &with_ports(dst)).0;
                assert_eq!(rep.to_string(), expected, "{rules}: {case}: {dst}");
                if rep == 2 {
                    assert_eq!(stream_end(&mut stream), StreamEnd::Closed(vec![]));
                }
            }
        }
    }
}

#[test]
fn client_denied_by_address_is_closed_without_reply() {
    let dir = temp_dir();
    let users = write_file(dir.path(), "users", alice_and_bob());
    let file = write_file(dir.path(), "rules", "# comment\ndeny from=127.0.0.2\n");
    let list = write_file(dir.path(), "list", "allow from=127.0.0.3\n");
    let in_file = format!("denied: {file} line 2 (deny from=127.0.0.2)");
    let rows: [(&[&str], &str); 4] = [
        (&["--deny", "from=127.0.0.2"], "denied: --deny (deny from=127.0.0.2)"),
        (&["--rules", &file], &in_file),
        (&["--rules", &list], "denied: built in, because an allow rule has from= (deny)"),
        (&["--users", &users, "--deny", "from=127.0.0.2"], "denied: --deny (deny from=127.0.0.2)"),
    ];
    for (args, reason) in rows {
        let server = Server::start(args);
        let mut stream = connect_from(SocketAddr::new(ip("127.0.0.2"), 0), server.addr());
        assert_eq!(stream_end(&mut stream), StreamEnd::Closed(vec![]), "{args:?}");
        let line = format!("from={}", stream.local_addr().expect("local address"));
        let log = server.wait_log(|log| log.contains(&line));
        assert!(log.lines().any(|logged| logged.contains(&line) && logged.contains(reason)), "{log}");
        log_in(server.addr(), ip("127.0.0.3"), if args.contains(&"--users") { ALICE } else { None });
    }
}

#[test]
fn unix_socket_client_counts_as_loopback() {
    let dir = temp_dir();
    let path = dir.path().join("socket");
    let unix = format!("unix:{}", path.display());
    for (rule, is_allowed) in [("from=remote", true), ("from=10.0.0.0/8,::1", true), ("from=loopback", false)] {
        let _server = serve(&unix, 1, &["--deny", rule]);
        let mut stream = UnixStream::connect(&path).expect("the server accepts");
        let _ = stream.write_all(&[5, 1, 0]);
        let mut selection = Vec::new();
        let _ = stream.take(2).read_to_end(&mut selection);
        assert_eq!(selection, if is_allowed { vec![5, 0] } else { vec![] }, "{rule}");
    }
}

#[test]
fn bind_checks_expected_and_actual_peer() {
    // In a namespace, so that no other process uses the port.
    enter_namespace!(HOSTS, "");
    let port = closed_port().port();
    let server = Server::start(&[
        "--deny",
        "command=bind to=127.0.0.3",
        "--deny",
        &format!("command=bind to=127.0.0.2 port={port}"),
        // Another route than that of the listener.
        "--allow",
        "to=127.0.0.5 outbound=127.0.0.9",
    ]);
    for dst in ["127.0.0.3:0", "three.test:0", "[::ffff:127.0.0.3]:0", &format!("127.0.0.2:{port}")] {
        assert_eq!(rep(&server, BIND, dst), 2, "{dst}");
    }
    // The request restricts only the peer's address, or nothing. The rules restrict the peer.
    for dst in ["0.0.0.0:0", "127.0.0.2:0"] {
        let (mut client, bnd) = bind(&server, None, dst);
        for denied in [addr("127.0.0.3:0"), addr("127.0.0.5:0"), SocketAddr::new(ip("127.0.0.2"), port)] {
            assert!(is_closed(&mut connect_from(denied, bnd)), "{dst}: {denied}");
        }
        assert_accepts_peer(&mut client, bnd, addr("127.0.0.2:0"));
    }
}

#[test]
fn each_outgoing_datagram_is_checked() {
    enter_namespace!(HOSTS, "");
    let dir = temp_dir();
    let users = write_file(dir.path(), "users", alice_and_bob());
    let [(good, good_addr), (bad, bad_addr), (closed, closed_addr)] =
        ["127.0.0.1", "127.0.0.3", "127.0.0.1"].map(udp_target);
    let rules = format!(
        "deny command=udp to=127.0.0.3\ndeny port={}\ndeny user=alice to=b.test command=udp\n",
        closed_addr.port()
    );
    let rules = write_file(dir.path(), "rules", &rules);
    let server = Server::start(&["--rules", &rules, "--users", &users]);
    let association = associate(server.addr(), V4, ALICE);
    let mapped = SocketAddr::new(Ipv4Addr::new(127, 0, 0, 3).to_ipv6_mapped().into(), bad_addr.port());
    let denied = [
        datagram(0, bad_addr, b"denied"),
        datagram(0, mapped, b"denied"),
        datagram(0, closed_addr, b"denied"),
        datagram_name(0, "three.test", bad_addr.port(), b"denied"),
        datagram_name(0, "127.0.0.3", bad_addr.port(), b"denied"),
        datagram_name(0, "b.test", good_addr.port(), b"denied"),
        datagram_name(0, "B.TEST.", good_addr.port(), b"denied"),
        // Two fragments.
        datagram(1, bad_addr, b"den"),
        datagram(0x82, bad_addr, b"ied"),
    ];
    for round in 0..3 {
        for bytes in &denied {
            // An allowed datagram comes first: its decision must not apply to the next datagram.
            association.send(good_addr, b"good");
            assert_eq!(receive(&good).0, b"good");
            association.send_raw(bytes);
        }
        association.send_raw(&datagram_name(0, "xa.test", good_addr.port(), b"by name"));
        assert_eq!(receive(&good).0, b"by name", "round {round}");
        [&good, &bad, &closed].into_iter().for_each(assert_no_datagram);
    }
    // Bob is allowed to use b.test.
    let association = associate(server.addr(), V4, BOB);
    association.send_raw(&datagram_name(0, "b.test", good_addr.port(), b"bob"));
    assert_eq!(receive(&good).0, b"bob");
}

#[test]
fn answers_come_only_from_allowed_targets() {
    let [(target, target_addr), (denied, denied_addr)] = [(); 2].map(|()| udp_target("127.0.0.1"));
    for more in [&[][..], &["--udp-filtering", "endpoint-independent"]] {
        let rule = format!("command=udp to=127.0.0.1 port={}", denied_addr.port());
        let server = Server::start(&[&["--deny", &rule, "--deny", "to=127.0.0.1 command=connect"], more].concat());
        let association = associate_anonymously(&server);
        association.send(target_addr, b"hello");
        let (_, relay) = receive(&target);
        for _ in 0..3 {
            denied.send_to(b"from a port that is denied", relay).expect("datagram sent");
            target.send_to(b"answer", relay).expect("datagram sent");
            assert_eq!(association.receive(), (target_addr, b"answer".to_vec()), "{more:?}");
        }
    }
}

#[test]
fn own_listeners_are_denied_by_name_and_address_unless_a_rule_allows_them() {
    enter_namespace!(HOSTS, "");
    let server = serve("127.0.0.1:0", 2, &["--listen", "127.0.0.2:0"]);
    let first = server.addr().port();
    for dst in ["0.0.0.0", "localhost", "LOCALHOST.", "127.0.0.1."] {
        let rep = rep(&server, CONNECT, &format!("{dst}:{first}"));
        // A resolver may not know a name with a final dot.
        assert!(rep == 2 || rep != 0 && dst.ends_with('.'), "{dst}: {rep}");
    }
    assert_eq!(rep(&server, CONNECT, &server.addrs[1].to_string()), 2);
    for other in ["127.0.0.2", "127.0.0.3", "::1"] {
        assert_eq!(rep(&server, CONNECT, &SocketAddr::new(ip(other), first).to_string()), 5, "{other}");
    }
    let server = Server::start(&["--allow", "from=loopback to=127.0.0.1"]);
    let (mut inner, _) = open_ok(&server, None, CONNECT, &server.addr().to_string());
    inner.write_all(&[5, 1, 0]).expect("data sent");
    assert_eq!(read_exact(&mut inner, 2), [5, 0], "through the server itself");
}
