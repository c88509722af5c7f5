//! Rules in a running server: each condition with each command, at each time of evaluation.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::net::UnixStream;

use super::tools::{
    ALICE, BOB, Login, addr, alice_and_bob, assert_no_datagram, associate, ip, is_closed, log_in, open_as, request_for,
    send_request,
};
use crate::support::{
    BIND, CONNECT, Server, StreamEnd, UDP_ASSOCIATE, closed_port, connect_from, in_namespace, listener, ping,
    read_exact, read_reply, s5, serve, stream_end, tcp_server, temp_dir, udp_echo_server, write_file,
};
use crate::udp::association::{datagram, datagram_name, receive, socket};

const HOSTS: &str = "127.0.0.1 localhost a.test sub.a.test xa.test b.test deep.sub.a.test\n\
                     127.0.0.3 three.test\n";

/// True if the server has users; its rules; and requests: client address, login, command, DST and expected REP. P and Q
/// stand for ports that accept connections at every address.
type Row = (bool, &'static str, &'static [(&'static str, Login<'static>, u8, &'static str, u8)]);

const LOCAL: &str = "127.0.0.1";
const NO_LOGIN: Login<'_> = None;

const ROWS: [Row; 22] = [
    (
        false,
        "deny from=127.0.0.2 port=P",
        &[
            ("127.0.0.2", NO_LOGIN, CONNECT, "127.0.0.1:P", 2),
            ("127.0.0.2", NO_LOGIN, CONNECT, "127.0.0.1:Q", 0),
            ("127.0.0.3", NO_LOGIN, CONNECT, "127.0.0.1:P", 0),
        ],
    ),
    (
        false,
        "deny from=127.0.0.2,127.64.0.0/10 port=P",
        &[("127.64.0.9", NO_LOGIN, CONNECT, "127.0.0.1:P", 2), ("127.128.0.9", NO_LOGIN, CONNECT, "127.0.0.1:P", 0)],
    ),
    (
        true,
        "deny user=alice",
        &[
            (LOCAL, ALICE, CONNECT, "127.0.0.1:P", 2),
            (LOCAL, ALICE, BIND, "0.0.0.0:0", 2),
            (LOCAL, ALICE, UDP_ASSOCIATE, "0.0.0.0:0", 2),
            (LOCAL, BOB, CONNECT, "127.0.0.1:P", 0),
        ],
    ),
    (
        true,
        "deny user=*@corp to=127.0.0.1",
        &[
            (LOCAL, BOB, CONNECT, "127.0.0.1:P", 2),
            (LOCAL, BOB, CONNECT, "127.0.0.2:P", 0),
            (LOCAL, ALICE, CONNECT, "127.0.0.1:P", 0),
        ],
    ),
    (
        true,
        "allow user=alice\ndeny user=*",
        &[(LOCAL, ALICE, CONNECT, "127.0.0.1:P", 0), (LOCAL, BOB, CONNECT, "127.0.0.1:P", 2)],
    ),
    (
        true,
        "deny method=password port=P\n",
        &[(LOCAL, ALICE, CONNECT, "127.0.0.1:P", 2), (LOCAL, ALICE, CONNECT, "127.0.0.1:Q", 0)],
    ),
    (false, "deny method=password user=alice", &[(LOCAL, NO_LOGIN, CONNECT, "127.0.0.1:P", 0)]),
    (
        false,
        "deny command=connect",
        &[
            (LOCAL, NO_LOGIN, CONNECT, "127.0.0.1:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "a.test:P", 2),
            (LOCAL, NO_LOGIN, BIND, "0.0.0.0:0", 0),
            (LOCAL, NO_LOGIN, UDP_ASSOCIATE, "0.0.0.0:0", 0),
        ],
    ),
    (
        false,
        "deny command=bind,udp",
        &[
            (LOCAL, NO_LOGIN, CONNECT, "127.0.0.1:P", 0),
            (LOCAL, NO_LOGIN, BIND, "0.0.0.0:0", 2),
            (LOCAL, NO_LOGIN, UDP_ASSOCIATE, "0.0.0.0:0", 2),
        ],
    ),
    (
        false,
        "deny to=a.test",
        &[
            (LOCAL, NO_LOGIN, CONNECT, "a.test:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "A.Test.:P", 2),
            (LOCAL, NO_LOGIN, BIND, "a.test:0", 2),
            (LOCAL, NO_LOGIN, CONNECT, "sub.a.test:P", 0),
            (LOCAL, NO_LOGIN, CONNECT, "xa.test:P", 0),
            (LOCAL, NO_LOGIN, CONNECT, "127.0.0.1:P", 0),
        ],
    ),
    (
        false,
        "deny to=.a.test",
        &[
            (LOCAL, NO_LOGIN, CONNECT, "a.test:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "sub.a.test:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "DEEP.Sub.A.test.:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "xa.test:P", 0),
            (LOCAL, NO_LOGIN, CONNECT, "b.test:P", 0),
        ],
    ),
    (
        false,
        "deny to=127.0.0.1",
        &[
            (LOCAL, NO_LOGIN, CONNECT, "127.0.0.1:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "a.test:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "0.0.0.0:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "[::ffff:127.0.0.1]:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "[::ffff:0.0.0.0]:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "[64:ff9b::7f00:1]:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "[2002:7f00:1::]:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "[2001:0:7f00:1::]:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "[2001::80ff:fffe]:P", 2),
            // Addresses that are sent as names.
            (LOCAL, NO_LOGIN, CONNECT, "=[::ffff:127.0.0.1]:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "=::ffff:127.0.0.1:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "=127.0.0.1:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "127.1:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "2130706433:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "0x7f000001:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "0:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "127.0.0.2:P", 0),
            (LOCAL, NO_LOGIN, CONNECT, "[::1]:P", 0),
        ],
    ),
    (
        false,
        "deny to=127.0.0.0/8,::1",
        &[
            (LOCAL, NO_LOGIN, CONNECT, "127.255.0.1:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "[::1]:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "[::]:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "[::ffff:127.9.9.9]:P", 2),
        ],
    ),
    // An allow compares the embedded address. An allowed name is allowed regardless of its address.
    (
        false,
        "allow to=127.0.0.1,three.test\ndeny",
        &[
            (LOCAL, NO_LOGIN, CONNECT, "127.0.0.1:P", 0),
            (LOCAL, NO_LOGIN, CONNECT, "[::ffff:127.0.0.1]:P", 0),
            (LOCAL, NO_LOGIN, CONNECT, "a.test:P", 0),
            (LOCAL, NO_LOGIN, CONNECT, "three.test:P", 0),
            (LOCAL, NO_LOGIN, CONNECT, "127.0.0.3:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "[::1]:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "[64:ff9b::7f00:2]:P", 2),
        ],
    ),
    (
        false,
        "allow to=::/0\ndeny",
        &[
            (LOCAL, NO_LOGIN, CONNECT, "[::1]:P", 0),
            (LOCAL, NO_LOGIN, CONNECT, "127.0.0.1:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "[::ffff:127.0.0.1]:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "[64:ff9b::7f00:1]:P", 2),
        ],
    ),
    (
        false,
        "deny port=P",
        &[
            (LOCAL, NO_LOGIN, CONNECT, "127.0.0.1:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "b.test:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "127.0.0.1:Q", 0),
        ],
    ),
    (
        false,
        "allow port=P-P,Q\ndeny port=1-65535",
        &[
            (LOCAL, NO_LOGIN, CONNECT, "127.0.0.1:P", 0),
            (LOCAL, NO_LOGIN, CONNECT, "127.0.0.1:Q", 0),
            (LOCAL, NO_LOGIN, CONNECT, "127.0.0.1:9", 2),
        ],
    ),
    (
        false,
        "# a comment\n\n  deny \t port=P to=127.0.0.2 # and more\nallow port=P to=127.0.0.0/8\ndeny",
        &[
            (LOCAL, NO_LOGIN, CONNECT, "127.0.0.2:P", 2),
            (LOCAL, NO_LOGIN, CONNECT, "127.0.0.3:P", 0),
            (LOCAL, NO_LOGIN, CONNECT, "127.0.0.3:Q", 2),
        ],
    ),
    // An allow with from= makes deny the default.
    (
        false,
        "allow from=127.0.0.1 port=P",
        &[("127.0.0.1", NO_LOGIN, CONNECT, "127.0.0.1:P", 0), ("127.0.0.1", NO_LOGIN, CONNECT, "127.0.0.1:Q", 2)],
    ),
    (
        false,
        "allow from=loopback command=connect",
        &[("127.9.9.9", NO_LOGIN, CONNECT, "a.test:P", 0), ("127.9.9.9", NO_LOGIN, BIND, "0.0.0.0:0", 2)],
    ),
    (
        true,
        "allow user=alice to=127.0.0.1 port=P\nallow user=bob%40corp to=b.test\ndeny",
        &[
            (LOCAL, ALICE, CONNECT, "127.0.0.1:P", 0),
            (LOCAL, ALICE, CONNECT, "b.test:P", 0),
            (LOCAL, ALICE, CONNECT, "b.test:Q", 2),
            (LOCAL, BOB, CONNECT, "b.test:Q", 0),
            (LOCAL, BOB, CONNECT, "127.0.0.1:P", 2),
        ],
    ),
    (false, "allow", &[(LOCAL, NO_LOGIN, CONNECT, "127.0.0.1:P", 0), (LOCAL, NO_LOGIN, CONNECT, "[::1]:P", 0)]),
];

#[test]
fn each_condition_applies_to_each_command() {
    if !in_namespace("guard::rules::each_condition_applies_to_each_command", HOSTS, "") {
        return;
    }
    let dir = temp_dir();
    let users = write_file(dir.path(), "users", alice_and_bob());
    let [p, q] = [(); 2].map(|()| tcp_server(Ipv6Addr::UNSPECIFIED.into(), drop).port().to_string());
    let with_ports = |text: &str| text.replace('P', &p).replace('Q', &q);
    for (has_users, rules, cases) in ROWS {
        let rules = write_file(dir.path(), "rules", &with_ports(rules));
        let mut args = vec!["--rules", &rules];
        args.extend(if has_users { vec!["--users", &users] } else { vec![] });
        let server = Server::start(&args);
        for (from, login, command, dst, expected) in cases {
            let mut stream = log_in(server.addr(), ip(from), *login);
            let (rep, _) = send_request(&mut stream, *command, &with_ports(dst));
            let rules = std::fs::read_to_string(&rules).expect("file read");
            assert_eq!(rep, *expected, "{rules}\n{from} {login:?} {command} {dst}");
            if rep == 2 {
                assert_eq!(stream_end(&mut stream), StreamEnd::Closed(vec![]));
            }
        }
    }
}

#[test]
fn rule_options_keep_order_and_precede_file() {
    let dir = temp_dir();
    let (_listener, dst) = listener(ip(LOCAL));
    let port = format!("port={}", dst.port());
    let deny = write_file(dir.path(), "deny", &format!("deny {port}\n"));
    let allow = write_file(dir.path(), "allow", &format!("allow {port}\n"));
    let rows: [(&[&str], u8); 7] = [
        (&["--deny", &port, "--allow", &port], 2),
        (&["--allow", &port, "--deny", &port], 0),
        (&["--allow", "port=1", "--deny", &port, "--allow", &port], 2),
        (&["--deny", "port=1", "--allow", &port, "--deny", &port], 0),
        (&["--rules", &deny, "--allow", &port], 0),
        (&["--rules", &allow, "--deny", &port], 2),
        (&["--rules", &deny], 2),
    ];
    for (args, expected) in rows {
        let server = Server::start(args);
        assert_eq!(open_as(&server, None, CONNECT, &dst.to_string()).1, expected, "{args:?}");
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
        let line = format!("client={}", stream.local_addr().expect("local address"));
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
    if !in_namespace("guard::rules::bind_checks_expected_and_actual_peer", HOSTS, "") {
        return;
    }
    let port = closed_port().port();
    let server = Server::start(&[
        "--deny",
        "command=bind to=127.0.0.3",
        "--deny",
        &format!("command=bind to=127.0.0.2 port={port}"),
    ]);
    let denied = format!("127.0.0.2:{port}");
    for (dst, expected) in [
        ("127.0.0.3:0", 2),
        ("three.test:0", 2),
        ("[::ffff:127.0.0.3]:0", 2),
        (&*denied, 2),
        ("127.0.0.2:0", 0),
        ("127.0.0.2:9", 0),
    ] {
        assert_eq!(open_as(&server, None, BIND, dst).1, expected, "{dst}");
    }
    // The request restricts only the peer's address, or nothing. The rules restrict the peer.
    for dst in ["0.0.0.0:0", "127.0.0.2:0"] {
        let (mut client, rep, bnd) = open_as(&server, None, BIND, dst);
        assert_eq!(rep, 0);
        for denied in [addr("127.0.0.3:0"), SocketAddr::new(ip("127.0.0.2"), port)] {
            assert!(is_closed(&mut connect_from(denied, bnd)), "{dst}: {denied}");
        }
        let mut peer = connect_from(addr("127.0.0.2:0"), bnd);
        assert_eq!(read_reply(&mut client), (0, peer.local_addr().expect("local address")), "{dst}");
        peer.write_all(b"hello").expect("data sent");
        assert_eq!(read_exact(&mut client, 5), b"hello", "{dst}");
    }
}

#[test]
fn each_outgoing_datagram_is_checked() {
    if !in_namespace("guard::rules::each_outgoing_datagram_is_checked", HOSTS, "") {
        return;
    }
    let dir = temp_dir();
    let users = write_file(dir.path(), "users", alice_and_bob());
    let (good, bad) = (socket(ip(LOCAL)), socket(ip("127.0.0.3")));
    let closed = socket(ip(LOCAL));
    let [good_addr, bad_addr, closed_addr] =
        [&good, &bad, &closed].map(|socket| socket.local_addr().expect("local address"));
    let rules = format!(
        "deny command=udp to=127.0.0.3\ndeny port={}\ndeny user=alice to=b.test command=udp\n",
        closed_addr.port()
    );
    let rules = write_file(dir.path(), "rules", &rules);
    let server = Server::start(&["--rules", &rules, "--users", &users]);
    let association = associate(server.addr(), ip(LOCAL), ALICE);
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
    let association = associate(server.addr(), ip(LOCAL), BOB);
    association.send_raw(&datagram_name(0, "b.test", good_addr.port(), b"bob"));
    assert_eq!(receive(&good).0, b"bob");
}

#[test]
fn answers_come_only_from_allowed_targets() {
    let (target, denied) = (socket(ip(LOCAL)), socket(ip(LOCAL)));
    let [target_addr, denied_addr] = [&target, &denied].map(|socket| socket.local_addr().expect("local address"));
    for more in [&[][..], &["--udp-filtering", "endpoint-independent"]] {
        let rule = format!("command=udp to=127.0.0.1 port={}", denied_addr.port());
        let server = Server::start(&[&["--deny", &rule], more].concat());
        let association = associate(server.addr(), ip(LOCAL), None);
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
fn loopback_client_reaches_loopback_but_not_own_listeners() {
    if !in_namespace("guard::rules::loopback_client_reaches_loopback_but_not_own_listeners", HOSTS, "") {
        return;
    }
    let start = |more: &[&str]| {
        let args = [&["serve", "--listen", "127.0.0.1:0", "--listen", "127.0.0.2:0"], more].concat();
        Server::start_with(s5().args(args), 2)
    };
    let server = start(&[]);
    let [first, second] = [0, 1].map(|i| server.addrs[i].port());
    let dsts = [
        format!("127.0.0.1:{first}"),
        format!("127.0.0.2:{second}"),
        format!("0.0.0.0:{first}"),
        format!("[::ffff:127.0.0.1]:{first}"),
        format!("localhost:{first}"),
        format!("LOCALHOST.:{first}"),
        format!("127.0.0.1.:{first}"),
        format!("127.1:{first}"),
    ];
    for dst in &dsts {
        let rep = open_as(&server, None, CONNECT, dst).1;
        // A resolver may not know a name with a final dot.
        assert!(rep == 2 || rep != 0 && dst.contains(".:"), "{dst}: {rep}");
    }
    for other in ["127.0.0.2", "127.0.0.3", "::1"] {
        assert_eq!(open_as(&server, None, CONNECT, &SocketAddr::new(ip(other), first).to_string()).1, 5, "{other}");
    }
    // An allow without to= does not override built-in denials; an allow with to= does.
    let server = start(&["--allow", "from=loopback"]);
    assert_eq!(open_as(&server, None, CONNECT, &server.addr().to_string()).1, 2);
    let server = start(&["--allow", "from=loopback to=127.0.0.1"]);
    let (mut inner, rep, _) = open_as(&server, None, CONNECT, &server.addr().to_string());
    assert_eq!(rep, 0);
    inner.write_all(&[5, 1, 0]).expect("data sent");
    assert_eq!(read_exact(&mut inner, 2), [5, 0]);
    let echo = tcp_server(ip(LOCAL), |mut stream| {
        let mut other = stream.try_clone().expect("cloned");
        let _ = std::io::copy(&mut stream, &mut other);
    });
    inner.write_all(&request_for(CONNECT, &echo.to_string())).expect("data sent");
    assert_eq!(read_reply(&mut inner).0, 0);
    ping(&mut inner, b"through the server itself");
    // Datagrams to a listener are dropped and not counted.
    let server = start(&[]);
    let association = associate(server.addr(), ip(LOCAL), None);
    association.send(server.addr(), b"to the listener");
    association.ping(udp_echo_server(ip(LOCAL)), b"hello");
    drop(association);
    server.wait_log(|log| log.contains("command=udp") && log.contains(" up=5 down=5 "));
}
