//! `--max-per-client` and `--max-per-user`: how many, who counts as one, and when a place is free again.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::Command;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{
    Server, TIMEOUT, closed_port, echo_server, in_namespace, open, read_exact, read_reply, request, tcp_server,
    wait_until,
};
use crate::kit::login::{connect_from_ip, log_in, login_message, users_file};
use crate::kit::{
    BIND, CONNECT, StreamEnd, UDP_ASSOCIATE, V4, accept, connect_from, listener, ping, reset, serve, stream_end,
};
use crate::machine;

const ZEROS: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 0);

/// Greets, and says whether it was let in.
fn is_let_in(stream: &mut TcpStream) -> bool {
    let mut selection = [0; 2];
    // Octets that nobody reads make the end of a connection a reset.
    stream.write_all(&[5, 1, 0]).is_ok() && stream.read_exact(&mut selection).is_ok() && selection == [5, 0]
}

fn assert_shut(mut stream: TcpStream) {
    assert_eq!(stream_end(&mut stream), StreamEnd::Closed(vec![]), "closed without an octet");
}

#[test]
fn one_connection_too_many_is_closed_and_other_addresses_have_their_own() {
    for threads in ["1", "2"] {
        let server = Server::start(&["--max-per-client", "3", "--threads", threads]);
        let mut first: Vec<TcpStream> = (0..3).map(|_| connect_from_ip(&server, [127, 0, 0, 1])).collect();
        // Those who say nothing count as well.
        assert_shut(connect_from_ip(&server, [127, 0, 0, 1]));
        let mut other = connect_from_ip(&server, [127, 0, 0, 2]);
        assert!(is_let_in(&mut other), "another address");
        assert!(first.iter_mut().all(is_let_in), "those who came first are not disturbed");
        assert_shut(connect_from_ip(&server, [127, 0, 0, 1]));
        let log = server.wait_log(|log| log.contains("connections reached, connection closed"));
        assert!(log.contains("client 127.0.0.1: limit of 3 connections reached, connection closed"), "{log}");
    }
}

#[test]
fn the_log_names_those_who_are_too_many_at_most_once_a_second() {
    let server = Server::start(&["--max-per-client", "1"]);
    let _only = open(&server, CONNECT, echo_server());
    let started = Instant::now();
    while started.elapsed() < Duration::from_millis(1100) {
        (0..20).for_each(|_| assert_shut(server.connect()));
    }
    let lines = server.wait_log(|log| log.matches("connections reached, connection closed").count() >= 2);
    let lines = u64::try_from(lines.matches("connections reached, connection closed").count()).expect("a number");
    assert!(lines <= 1 + started.elapsed().as_secs(), "{lines} lines in {:?}", started.elapsed());
}

#[test]
fn each_command_takes_a_place_of_its_client() {
    let server = Server::start(&["--max-per-client", "3"]);
    let dst = echo_server();
    let _open = [(CONNECT, dst), (BIND, ZEROS), (UDP_ASSOCIATE, ZEROS)].map(|(command, dst)| {
        let (stream, rep, _) = open(&server, command, dst);
        assert_eq!(rep, 0, "command {command}");
        stream
    });
    assert_shut(server.connect());
}

/// One way in which a session ends; what is left open belongs to a session that is over.
type Ending = fn(&Server) -> Option<TcpStream>;

/// A tunnel to a target that is held by the test.
fn tunnel(server: &Server) -> (TcpStream, TcpStream) {
    let (target, dst) = listener(V4);
    let (client, rep, _) = open(server, CONNECT, dst);
    assert_eq!(rep, 0);
    (client, accept(&target).0)
}

#[test]
fn a_place_is_free_again_however_its_session_ends() {
    let endings: [(&str, Ending); 14] = [
        ("a silent client leaves", |server| {
            drop(server.connect());
            None
        }),
        ("a silent client resets", |server| {
            reset(server.connect());
            None
        }),
        ("too late", |server| {
            let mut stream = server.connect();
            assert_eq!(stream_end(&mut stream), StreamEnd::Closed(vec![]));
            Some(stream)
        }),
        ("too late with the request", |server| {
            let mut stream = crate::kit::greet(server);
            assert_eq!(stream_end(&mut stream), StreamEnd::Closed(vec![]));
            Some(stream)
        }),
        ("no method", |server| {
            let mut stream = server.connect();
            stream.write_all(&[5, 1, 9]).expect("it is sent");
            assert_eq!(read_exact(&mut stream, 2), [5, 0xFF]);
            None
        }),
        ("not SOCKS5", |server| {
            server.connect().write_all(b"GET / HTTP/1.1\r\n\r\n").expect("it is sent");
            None
        }),
        ("refused", |server| {
            let (mut stream, rep, _) = open(server, CONNECT, closed_port());
            assert_eq!((rep, stream_end(&mut stream)), (5, StreamEnd::Closed(vec![])));
            None
        }),
        ("an unknown command", |server| {
            assert_eq!(open(server, 9, ZEROS).1, 7);
            None
        }),
        ("both close", |server| {
            let (mut client, target) = tunnel(server);
            drop(target);
            assert_eq!(stream_end(&mut client), StreamEnd::Closed(vec![]));
            None
        }),
        ("the client resets", |server| {
            let (client, target) = tunnel(server);
            reset(client);
            Some(target)
        }),
        ("the target resets", |server| {
            let (client, target) = tunnel(server);
            reset(target);
            Some(client)
        }),
        ("nobody comes to a BIND, and its client leaves", |server| {
            assert_eq!(open(server, BIND, ZEROS).1, 0);
            None
        }),
        ("an association ends", |server| {
            assert_eq!(open(server, UDP_ASSOCIATE, ZEROS).1, 0);
            None
        }),
        ("an association is reset", |server| {
            reset(open(server, UDP_ASSOCIATE, ZEROS).0);
            None
        }),
    ];
    for threads in ["1", "2"] {
        for (what, end) in endings {
            let args = ["--max-per-client", "1", "--handshake-timeout", "300ms", "--threads", threads];
            let server = Server::start(&args);
            let _left = end(&server);
            wait_until(what, TIMEOUT, || is_let_in(&mut server.connect()));
        }
    }
}

/// How many connections to clients a server has open.
fn descriptors_of_clients(server: &Server) -> usize {
    let port = format!(":{:04X} ", server.addr().port());
    let table = std::fs::read_to_string(format!("/proc/{}/net/tcp", server.pid())).expect("the server runs");
    // proc_net_tcp: the local address second, the state fourth; 01 is ESTABLISHED, 08 CLOSE_WAIT.
    let is_open = |line: &&str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        format!("{} ", fields[1]).ends_with(&port) && ["01", "08"].contains(&fields[3])
    };
    table.lines().skip(1).filter(is_open).count()
}

#[test]
fn addresses_of_one_ipv6_network_are_one_client() {
    if !in_namespace("shares::addresses_of_one_ipv6_network_are_one_client", "", "") {
        return;
    }
    let sources = ["2001:db8:1::1", "2001:db8:1:0:ffff:ffff:ffff:ffff", "2001:db8:2::1", "2001:db8:1:1::1"];
    for source in sources {
        let mut add = Command::new("ip");
        add.args(["-6", "addr", "add", &format!("{source}/128"), "dev", "lo", "nodad"]);
        assert!(add.status().expect("ip runs").success());
    }
    let server = serve("[2001:db8:1::1]:0", 1, &["--open", "--max-per-client", "2"]);
    let [one, two, three, four] = sources.map(|source| SocketAddr::new(source.parse().expect("an address"), 0));
    let come = |from| connect_from(from, server.addr());
    let _held = [come(one), come(two)];
    assert_shut(come(one));
    assert_shut(come(two));
    for elsewhere in [three, four] {
        assert!(is_let_in(&mut come(elsewhere)), "{elsewhere}");
    }
    server.wait_log(|log| log.contains("limit of 2 connections reached, connection closed"));
}

#[test]
fn a_user_too_many_is_told_so_behind_the_login_and_other_users_are_not() {
    let (_folder, users) = users_file(&[("alice", "secret"), ("bob", "other")]);
    let dst = echo_server();
    for threads in ["1", "2"] {
        let server = Server::start(&["--users", &users, "--max-per-user", "2", "--threads", threads]);
        let mut last = 0;
        let mut ask = |uname: &[u8], passwd: &[u8], command, dst| {
            last += 1;
            let (mut stream, status) = log_in(&server, [127, 0, 3, last], uname, passwd);
            assert_eq!(status, 0, "the login is right");
            stream.write_all(&request(command, dst)).expect("the request is sent");
            let (rep, _) = read_reply(&mut stream);
            (stream, rep)
        };
        let mut alice = |command, dst| ask(b"alice", b"secret", command, dst);
        let (mut first, second) = (alice(CONNECT, dst), alice(UDP_ASSOCIATE, ZEROS));
        assert_eq!((first.1, second.1), (0, 0));
        for (command, dst) in [(CONNECT, dst), (BIND, ZEROS), (UDP_ASSOCIATE, ZEROS)] {
            let (mut third, rep) = alice(command, dst);
            assert_eq!((rep, stream_end(&mut third)), (2, StreamEnd::Closed(vec![])), "command {command}");
        }
        assert_eq!(ask(b"bob", b"other", CONNECT, dst).1, 0);
        ping(&mut first.0, b"not disturbed");
        drop(second);
        wait_until("a place is free", TIMEOUT, || ask(b"alice", b"secret", CONNECT, dst).1 == 0);
        let log = server.wait_log(|log| log.contains("rep=2"));
        assert!(log.contains("error=\"session limit of this user reached\""), "{log}");
    }
}

/// 200 who come at the same moment, say this and stay: how many of their targets were reached.
fn stampede(server: &Server, all: &[u8], answer: &[u8]) -> usize {
    let start = Barrier::new(200);
    thread::scope(|scope| {
        let clients: Vec<_> = (0..200)
            .map(|_| {
                scope.spawn(|| {
                    start.wait();
                    let mut stream = server.connect();
                    let mut said = vec![0; answer.len()];
                    let is_in = stream.write_all(all).is_ok() && stream.read_exact(&mut said).is_ok() && said == answer;
                    is_in.then_some(stream)
                })
            })
            .collect();
        let streams: Vec<_> = clients.into_iter().filter_map(|client| client.join().expect("a client")).collect();
        streams.len()
    })
}

#[test]
fn no_stampede_gets_more_in_than_there_may_be() {
    let (_folder, users) = users_file(&[("alice", "secret")]);
    let _machine = machine();
    let dst = tcp_server(V4, |mut stream| drop(stream.read(&mut [0])));
    let asked = request(CONNECT, dst);
    let by_client = [&[5, 1, 0], &asked[..]].concat();
    let by_user = [&[5, 1, 2], &login_message(b"alice", b"secret")[..], &asked].concat();
    for threads in ["1", "2"] {
        for (limit, said, answer) in [
            (["--max-per-client", "20"], &by_client, &[5, 0, 5, 0][..]),
            (["--max-per-user", "20"], &by_user, &[5, 2, 1, 0, 5, 0]),
        ] {
            let mut args = vec!["--threads", threads];
            args.extend(limit);
            if limit[0] == "--max-per-user" {
                args.extend(["--users", &users]);
            }
            let server = Server::start(&args);
            assert_eq!(stampede(&server, said, answer), 20, "{args:?}");
            wait_until("all have left", TIMEOUT, || descriptors_of_clients(&server) == 0);
            assert_eq!(stampede(&server, said, answer), 20, "{args:?}, once more");
        }
    }
}
