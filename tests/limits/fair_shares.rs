//! The share of one client address of each limited resource: one client cannot use up what the others need.

use std::os::unix::net::UnixStream;

use crate::*;

const ANY_V4: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
const OTHER: [u8; 4] = [127, 0, 0, 2];

/// Connects from another address, and sends a greeting.
fn greet_from(server: &Server, source: impl Into<IpAddr>) -> TcpStream {
    let mut stream = connect_from_ip(server, source);
    stream.write_all(&[5, 1, 0]).expect("greeting sent");
    assert_eq!(read_exact(&mut stream, 2), [5, 0]);
    stream
}

fn assert_closed(mut stream: TcpStream) {
    assert_eq!(stream_end(&mut stream), StreamEnd::Closed(vec![]));
}

#[test]
fn one_client_has_three_quarters_of_the_sessions() {
    for threads in ["1", "2"] {
        let server = Server::start(&["--max-connections", "8", "--threads", threads]);
        let dst = echo_server();
        let _tunnels = [(); 6].map(|()| open(&server, CONNECT, dst));
        assert_closed(server.connect());
        server.wait_log(|log| log.contains("client 127.0.0.1: refused: limit of 6 connections reached"));
        let mut other = greet_from(&server, OTHER);
        other.write_all(&request(CONNECT, dst)).expect("request sent");
        assert_eq!(read_reply(&mut other).0, 0);
    }
}

#[test]
fn clients_on_unix_sockets_are_one_client_but_not_for_max_per_client() {
    let dir = temp_dir();
    let path = dir.path().join("socket");
    let open_on_unix_socket = |_: usize| {
        let mut stream = UnixStream::connect(&path).expect("connected");
        stream.set_read_timeout(Some(TIMEOUT)).expect("option set");
        let is_admitted = stream.write_all(&[5, 1, 0]).is_ok() && retry(|| stream.read_exact(&mut [0; 2])).is_ok();
        let request = request(BIND, SocketAddr::new(ANY_V4, 0));
        let is_open = is_admitted && stream.write_all(&request).is_ok() && stream.read_exact(&mut [0; 10]).is_ok();
        is_open.then_some(stream)
    };
    let listen = format!("unix:{}", path.display());
    for (args, count) in [(&[][..], 6), (&["--max-per-client", "1"], 7)] {
        let server = serve("127.0.0.1:0", 2, &[&["--max-connections", "8", "--listen", &listen], args].concat());
        let open: Vec<UnixStream> = (0..count).map_while(open_on_unix_socket).collect();
        assert_eq!(open.len(), count, "{args:?}");
        assert!(args.len() == 2 || open_on_unix_socket(7).is_none());
        greet_from(&server, OTHER);
    }
}

#[test]
fn max_per_client_may_be_all_sessions() {
    let server = Server::start(&["--max-connections", "8", "--max-per-client", "8"]);
    let dst = echo_server();
    let tunnels = [(); 8].map(|()| open(&server, CONNECT, dst));
    assert!(tunnels.iter().all(|(_, rep, _)| *rep == 0));
}

#[test]
fn oldest_unfinished_handshake_ends_for_a_newcomer_when_half_of_the_sessions_are_unfinished() {
    for threads in ["1", "2"] {
        let server = Server::start(&["--max-connections", "8", "--threads", threads]);
        let dst = echo_server();
        let (mut tunnel, ..) = open(&server, CONNECT, dst);
        let [first, mut second, _third, mut fourth] = [(); 4].map(|()| greet(&server));
        let mut fifth = greet(&server);
        assert_closed(first);
        server.wait_log(|log| log.contains("closed for a newer connection: too many unfinished handshakes"));
        for stream in [&mut second, &mut fourth, &mut fifth] {
            stream.write_all(&request(CONNECT, dst)).expect("request sent");
            assert_eq!(read_reply(stream).0, 0);
        }
        ping(&mut tunnel, b"not disturbed");
    }
}

#[test]
fn many_handshakes_of_one_client_end_only_its_own() {
    let server = Server::start(&["--max-connections", "8"]);
    let mut other = greet_from(&server, OTHER);
    let streams: Vec<TcpStream> = (0..40).map(|_| server.connect()).collect();
    streams.iter().for_each(|stream| stream.set_nonblocking(true).expect("option set"));
    let is_open = |stream: &&TcpStream| stream.peek(&mut [0]).is_err_and(|error| error.kind() == ErrorKind::WouldBlock);
    wait_until("all but three have ended", TIMEOUT, || streams.iter().filter(is_open).count() <= 3);
    other.write_all(&request(CONNECT, echo_server())).expect("request sent");
    assert_eq!(read_reply(&mut other).0, 0);
}

#[test]
fn newcomer_is_served_when_tunnels_and_unfinished_handshakes_take_all_sessions() {
    let server = Server::start(&["--max-connections", "4"]);
    let dst = echo_server();
    let mut tunnels = [[127, 0, 0, 3], [127, 0, 0, 4]].map(|source| {
        let mut stream = greet_from(&server, source);
        stream.write_all(&request(CONNECT, dst)).expect("request sent");
        assert_eq!(read_reply(&mut stream).0, 0);
        stream
    });
    let [first, second] = [(); 2].map(|()| greet(&server));
    let mut newcomer = greet_from(&server, OTHER);
    newcomer.write_all(&request(CONNECT, dst)).expect("request sent");
    assert_eq!(read_reply(&mut newcomer).0, 0);
    assert_closed(first);
    assert_no_data(&second, Duration::from_millis(50));
    tunnels.iter_mut().for_each(|stream| ping(stream, b"not disturbed"));
}

/// Opens sessions of one client until one is closed, refused or not answered. Returns those that are open.
fn open_all(server: &Server, source: [u8; 4], command: u8) -> Vec<TcpStream> {
    let messages = [&[5, 1, 0], &request(command, SocketAddr::new(ANY_V4, 0))[..]].concat();
    let open = |_: usize| {
        let (mut stream, mut answer) = (connect_from_ip(server, source), [0; 12]);
        stream.set_read_timeout(Some(Duration::from_secs(1))).expect("option set");
        let is_open = stream.write_all(&messages).is_ok() && stream.read_exact(&mut answer).is_ok() && answer[3] == 0;
        is_open.then_some(stream)
    };
    (0..1000).map_while(open).collect()
}

#[test]
fn one_client_has_three_quarters_of_the_ports_of_bind_and_of_associations() {
    enter_namespace!("", "");
    let server = Server::start(&["--bind-ports", "20000-20007", "--udp-ports", "20000-20007"]);
    for command in [BIND, UDP_ASSOCIATE] {
        let open = open_all(&server, [127, 0, 0, 1], command);
        assert_eq!(open.len(), 6, "command {command}");
        assert_eq!(open_all(&server, OTHER, command).len(), 2, "command {command}");
    }
    let log = server.wait_log(|log| log.contains("(see --udp-ports)"));
    assert!(log.contains("(see --bind-ports)"), "{log}");
}

#[test]
fn association_counts_as_sessions_for_all_of_its_descriptors() {
    enter_namespace!("", "");
    let proxies = [(); 3].map(|()| Server::start(&[]));
    let chain = proxies.each_ref().map(|proxy| format!("socks5://{}", proxy.addr())).join(",");
    // One client may have 12 of the 16. A chain of 3 proxies counts as one more session, and the socket of a shared port
    // for this client does too.
    let cases = [
        (&[][..], 6),
        (&["--max-per-client", "8"], 6),
        (&["--udp-ports", "20000"], 5),
        (&["--via", &chain], 4),
        (&["--via", &chain, "--udp-ports", "20000"], 3),
    ];
    for (args, count) in cases {
        let server = Server::start(&[&["--max-connections", "16"], args].concat());
        let associations = open_all(&server, [127, 0, 0, 1], UDP_ASSOCIATE);
        assert_eq!(associations.len(), count, "{args:?}");
        greet_from(&server, OTHER);
        drop(associations);
        let is_free = || open_all(&server, [127, 0, 0, 1], UDP_ASSOCIATE).len() == count;
        wait_until("their shares are free", TIMEOUT, is_free);
    }
}

#[test]
fn refusal_for_the_descriptors_of_associations_names_max_connections() {
    enter_namespace!("", "");
    let server = Server::start(&["--max-connections", "16", "--max-per-client", "8"]);
    // They count as all 12 sessions that one client may have, but as 6 for --max-per-client.
    let associations = open_all(&server, [127, 0, 0, 1], UDP_ASSOCIATE);
    assert_eq!(associations.len(), 6);
    server.wait_log(|log| log.contains("refused: limit of 12 connections reached (raise --max-connections)"));
}

#[test]
fn reload_works_when_sessions_have_all_descriptors() {
    if !is_installed("prlimit") {
        return;
    }
    let dir = temp_dir();
    let rules = write_file(dir.path(), "rules", "# no rules\n");
    for args in [&[][..], &["--max-connections", "1000", "--max-per-client", "1000"]] {
        let mut command = Command::new("prlimit");
        command.args(["--nofile=128:128"]).arg(s5().get_program());
        command.args(["serve", "--listen", "127.0.0.1:0", "--rules", &rules, "--threads", "2"]).args(args);
        let server = Server::start_with(&mut command, 1);
        let sockets = [(); 80].map(|()| server.connect());
        let associations = open_all(&server, OTHER, UDP_ASSOCIATE);
        assert!(!associations.is_empty());
        write_file(dir.path(), "rules", "deny from=127.0.0.2\n");
        assert!(server.reload().contains("rules: 1, "), "{}", server.log());
        associations.into_iter().for_each(assert_closed);
        drop(sockets);
        write_file(dir.path(), "rules", "# no rules\n");
    }
}

#[test]
fn refused_client_is_read_for_at_most_one_mebibyte() {
    let (_dir, users) = users_file(&[("alice", "secret")]);
    let open = Server::start(&[]);
    let with_users = Server::start(&["--users", &users]);
    let refused = closed_port();
    let cases = [
        (&open, [&[5, 1, 0], &request(CONNECT, refused)[..]].concat(), vec![5, 0, 5, 5]),
        (&open, b"GET / HTTP/1.1\r\n\r\n".to_vec(), b"HTTP".to_vec()),
        (&open, vec![5, 1, 9], vec![5, 0xFF]),
        (&with_users, [&[5, 1, 2], &login_message(b"alice", b"wrong")[..]].concat(), vec![5, 2, 1, 1]),
    ];
    for (server, messages, answer) in cases {
        let mut stream = server.connect();
        stream.write_all(&messages).expect("data sent");
        assert_eq!(read_exact(&mut stream, answer.len()), answer);
        let (chunk, mut sent) = (vec![0; 1 << 16], 0);
        while stream.write_all(&chunk).is_ok() && sent < 64 << 20 {
            sent += chunk.len();
        }
        // The buffers of the kernel hold several MiB.
        assert!(sent < 32 << 20, "{answer:?}: {} MiB", sent >> 20);
    }
}

#[test]
fn local_route_of_ipv6_does_not_lead_into_the_server_again() {
    enter_namespace!("", "");
    let ip = |args: &str| {
        let status = Command::new("ip").args(args.split(' ')).status().expect("ip runs");
        assert!(status.success(), "ip {args}");
    };
    ip("-6 route add local 2001:db8:a::/64 dev lo");
    ip("-6 addr add 2001:db8:b::1/128 dev lo nodad");
    let server = serve("[::]:0", 1, &["--allow-open-relay"]);
    let port = server.addr().port();
    let own = ["2001:db8:a::1", "2001:db8:a::ffff", "2001:db8:b::1"].map(|ip| ip.parse::<IpAddr>().expect("valid"));
    for (n, from) in own.into_iter().enumerate() {
        for to in own {
            let mut stream = retry(|| TcpStream::connect((from, port))).expect("the server accepts");
            stream.set_read_timeout(Some(TIMEOUT)).expect("option set");
            let messages = [&[5, 1, 0], &request(CONNECT, SocketAddr::new(to, port))[..]].concat();
            stream.write_all(&messages).expect("data sent");
            assert_eq!(read_exact(&mut stream, 4), [5, 0, 5, 2], "{n}: {from} to {to}");
        }
        // Other ports of these addresses are not the server.
        let mut stream = retry(|| TcpStream::connect((from, port))).expect("the server accepts");
        stream.set_read_timeout(Some(TIMEOUT)).expect("option set");
        let echo = echo_server_at(IpAddr::from([0; 16])).port();
        stream.write_all(&[&[5, 1, 0], &request(CONNECT, SocketAddr::new(own[1], echo))[..]].concat()).expect("sent");
        assert_eq!(read_exact(&mut stream, 4), [5, 0, 5, 0]);
    }
}
