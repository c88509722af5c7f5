//! `--max-per-client` and `--max-per-user`: the limits, the addresses that count as one client, and ends of sessions.

use std::sync::Barrier;

use crate::*;

const ANY: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 0);

/// Sends a greeting. Returns true if the server accepts it.
fn is_admitted(stream: &mut TcpStream) -> bool {
    let mut selection = [0; 2];
    // A server that closes with unread bytes sends a reset, so that errors are possible.
    stream.write_all(&[5, 1, 0]).is_ok() && stream.read_exact(&mut selection).is_ok() && selection == [5, 0]
}

fn assert_closed(mut stream: TcpStream) {
    assert_eq!(stream_end(&mut stream), StreamEnd::Closed(vec![]), "not closed without an answer");
}

#[test]
fn max_per_client_counts_every_command_and_closes_extra_connections_of_that_address_only() {
    for threads in ["1", "2"] {
        let server = Server::start(&["--max-per-client", "4", "--threads", threads]);
        // Silent clients count too.
        let mut silent = server.connect();
        let _open = [(CONNECT, echo_server()), (BIND, ANY), (UDP_ASSOCIATE, ANY)].map(|(command, dst)| {
            let (stream, rep, _) = open(&server, command, dst);
            assert_eq!(rep, 0, "command {command}");
            stream
        });
        assert_closed(server.connect());
        assert!(is_admitted(&mut connect_from_ip(&server, [127, 0, 0, 2])), "another address");
        assert!(is_admitted(&mut silent), "an earlier connection was closed");
        let line = "client 127.0.0.1: refused: limit of 4 connections reached (raise --max-per-client)";
        server.wait_log(|log| log.contains(line));
    }
}

#[test]
fn max_per_client_is_logged_at_most_once_per_second() {
    let server = Server::start(&["--max-per-client", "1"]);
    let _only = open(&server, CONNECT, echo_server());
    let started = Instant::now();
    let lines = || server.log().matches("limit of 1 connections reached").count() as u64;
    wait_until("a second line", TIMEOUT, || {
        (0..20).for_each(|_| assert_closed(server.connect()));
        lines() >= 2
    });
    let lines = lines();
    assert!(lines <= 1 + started.elapsed().as_secs(), "{lines} lines in {:?}", started.elapsed());
}

/// Opens and ends a session. Returns streams that stay open after it.
type Ending = fn(&Server) -> Vec<TcpStream>;

#[test]
fn max_per_client_frees_the_permit_at_each_kind_of_session_end() {
    /// Returns the connection that the server has closed.
    fn closed(mut stream: TcpStream) -> Vec<TcpStream> {
        assert_eq!(stream_end(&mut stream), StreamEnd::Closed(vec![]));
        vec![stream]
    }
    /// Sends a request that gets this REP.
    fn requested(server: &Server, command: u8, dst: SocketAddr, expected: u8) -> TcpStream {
        let (stream, rep, _) = open(server, command, dst);
        assert_eq!(rep, expected, "command {command}");
        stream
    }
    fn end(what: impl FnOnce()) -> Vec<TcpStream> {
        what();
        vec![]
    }
    let endings: [(&str, Ending); 10] = [
        ("a silent client closes", |server| end(|| drop(server.connect()))),
        ("greeting times out", |server| closed(server.connect())),
        ("request times out", |server| closed(crate::support::greet(server))),
        ("no acceptable method", |server| {
            let mut stream = server.connect();
            stream.write_all(&[5, 1, 9]).expect("data sent");
            end(|| assert_eq!(read_exact(&mut stream, 2), [5, 0xFF]))
        }),
        ("refused", |server| end(|| drop(closed(requested(server, CONNECT, closed_port(), 5))))),
        ("both close", |server| {
            let (client, target) = tunnel(server);
            drop(target);
            end(|| drop(closed(client)))
        }),
        ("the client resets", |server| {
            let (client, target) = tunnel(server);
            reset(client);
            vec![target]
        }),
        ("the target resets", |server| {
            let (client, target) = tunnel(server);
            reset(target);
            vec![client]
        }),
        ("the client of a waiting BIND closes", |server| end(|| drop(requested(server, BIND, ANY, 0)))),
        ("an association ends", |server| end(|| drop(requested(server, UDP_ASSOCIATE, ANY, 0)))),
    ];
    for threads in ["1", "2"] {
        for (what, end) in endings {
            let args = ["--max-per-client", "1", "--handshake-timeout", "1s", "--threads", threads];
            let server = Server::start(&args);
            let _open_streams = end(&server);
            wait_until(what, TIMEOUT, || is_admitted(&mut server.connect()));
        }
    }
}

/// Returns the number of open connections from clients.
fn client_connections(server: &Server) -> usize {
    let port = format!(":{:04X} ", server.addr().port());
    let table = std::fs::read_to_string(format!("/proc/{}/net/tcp", server.pid())).expect("the server runs");
    // proc_net_tcp(5): the second field is the local address, the fourth the state. 01 is ESTABLISHED, 08 CLOSE_WAIT.
    let is_open = |line: &&str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        format!("{} ", fields[1]).ends_with(&port) && ["01", "08"].contains(&fields[3])
    };
    table.lines().skip(1).filter(is_open).count()
}

#[test]
fn max_per_client_counts_an_ipv6_prefix_of_64_bits_as_one_client() {
    enter_namespace!("", "");
    let sources = ["2001:db8:1::1", "2001:db8:1:0:ffff:ffff:ffff:ffff", "2001:db8:2::1", "2001:db8:1:1::1"];
    for source in sources {
        let mut add = Command::new("ip");
        add.args(["-6", "addr", "add", &format!("{source}/128"), "dev", "lo", "nodad"]);
        assert!(add.status().expect("ip runs").success());
    }
    let server = serve("[2001:db8:1::1]:0", 1, &["--allow-open-relay", "--max-per-client", "2"]);
    let [one, two, three, four] = sources.map(|source| SocketAddr::new(source.parse().expect("valid address"), 0));
    let connect = |from| connect_from(from, server.addr());
    let _open_streams = [connect(one), connect(two)];
    assert_closed(connect(one));
    assert_closed(connect(two));
    for other in [three, four] {
        assert!(is_admitted(&mut connect(other)), "{other}");
    }
    server.wait_log(|log| log.contains("refused: limit of 2 connections reached (raise --max-per-client)"));
}

#[test]
fn max_per_user_denies_the_request_after_login_for_that_user_only() {
    let (_dir, users) = users_file(&[("alice", "secret"), ("bob", "other")]);
    let dst = echo_server();
    for threads in ["1", "2"] {
        let server = Server::start(&["--users", &users, "--max-per-user", "2", "--threads", threads]);
        let alice = |command, dst| open_with_login(&server, ("alice", "secret"), command, dst);
        let (mut first, second) = (alice(CONNECT, dst), alice(UDP_ASSOCIATE, ANY));
        assert_eq!((first.1, second.1), (0, 0));
        for (command, dst) in [(CONNECT, dst), (BIND, ANY), (UDP_ASSOCIATE, ANY)] {
            let (mut third, rep) = alice(command, dst);
            assert_eq!((rep, stream_end(&mut third)), (2, StreamEnd::Closed(vec![])), "command {command}");
        }
        assert_eq!(open_with_login(&server, ("bob", "other"), CONNECT, dst).1, 0);
        ping(&mut first.0, b"undisturbed");
        drop(second);
        wait_until("a session of alice has ended", TIMEOUT, || alice(CONNECT, dst).1 == 0);
        let log = server.wait_log(|log| log.contains("rep=2"));
        assert!(log.contains("error=\"session limit of this user reached (raise --max-per-user)\""), "{log}");
    }
}

/// Opens sessions for 200 simultaneous clients. Returns the number of clients that receive `answer`.
fn open_simultaneously(server: &Server, messages: &[u8], answer: &[u8]) -> usize {
    let start = Barrier::new(200);
    thread::scope(|scope| {
        let clients: Vec<_> = (0..200)
            .map(|_| {
                scope.spawn(|| {
                    start.wait();
                    let mut stream = server.connect();
                    let mut received = vec![0; answer.len()];
                    let is_sent = stream.write_all(messages).is_ok();
                    let is_open = is_sent && stream.read_exact(&mut received).is_ok() && received == answer;
                    is_open.then_some(stream)
                })
            })
            .collect();
        let streams: Vec<_> =
            clients.into_iter().filter_map(|client| client.join().expect("the thread does not panic")).collect();
        streams.len()
    })
}

#[test]
fn session_limits_hold_for_200_simultaneous_clients() {
    let (_dir, users) = users_file(&[("alice", "secret")]);
    let _machine = lock_machine();
    let dst = tcp_server(V4, |mut stream| drop(retry(|| stream.read(&mut [0]))));
    let connect_request = request(CONNECT, dst);
    let by_client = [&[5, 1, 0], &connect_request[..]].concat();
    let by_user = [&[5, 1, 2], &login_message(b"alice", b"secret")[..], &connect_request].concat();
    for threads in ["1", "2"] {
        for (limit, messages, answer) in [
            (["--max-per-client", "20"], &by_client, &[5, 0, 5, 0][..]),
            (["--max-per-user", "20"], &by_user, &[5, 2, 1, 0, 5, 0]),
        ] {
            let mut args = vec!["--threads", threads];
            args.extend(limit);
            if limit[0] == "--max-per-user" {
                args.extend(["--users", &users]);
            }
            let server = Server::start(&args);
            assert_eq!(open_simultaneously(&server, messages, answer), 20, "{args:?}");
            wait_until("all connections are closed", TIMEOUT, || client_connections(&server) == 0);
            assert_eq!(open_simultaneously(&server, messages, answer), 20, "{args:?}, second time");
        }
    }
}
