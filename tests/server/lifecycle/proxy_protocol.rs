//! `--proxy-protocol-from`: the client in the header of a load balancer counts for rules, limits, the log, BIND and UDP.

use crate::udp::association::{Association, assert_nothing_arrives, datagram, socket};
use crate::*;

const GREETING: &[u8] = &[5, 1, 0];
/// Remote clients reach loopback only if a rule allows it.
const LOOPBACK: [&str; 2] = ["--allow", "to=127.0.0.0/8"];

/// A header of version 1.
fn v1(client: SocketAddr) -> Vec<u8> {
    let family = if client.is_ipv4() { "TCP4" } else { "TCP6" };
    format!("PROXY {family} {0} {0} {1} 1080\r\n", client.ip(), client.port()).into()
}

/// A header of version 2 with a TLV.
fn v2(client: SocketAddr) -> Vec<u8> {
    let (family, ip) = match client.ip() {
        IpAddr::V4(ip) => (0x11, ip.octets().to_vec()),
        IpAddr::V6(ip) => (0x21, ip.octets().to_vec()),
    };
    let rest = [&ip, &ip, &client.port().to_be_bytes()[..], &[4, 56], &[4, 0, 1, 0]].concat();
    let length = u8::try_from(rest.len()).expect("a short header");
    [b"\r\n\r\n\0\r\nQUIT\n", &[0x21, family, 0, length][..], &rest].concat()
}

/// Starts a server that trusts headers of 127.0.0.1.
fn behind_balancer(args: &[&str]) -> Server {
    Server::start(&[&["--proxy-protocol-from", "127.0.0.1", "--allow-open-relay"], args].concat())
}

/// Sends a header for this client, and a greeting. Returns the connection if the server accepts it.
fn forward(server: &Server, client: &str) -> Option<TcpStream> {
    let mut stream = server.connect();
    stream.write_all(&[&v2(addr(client)), GREETING].concat()).expect("header sent");
    let mut selection = [0; 2];
    stream.read_exact(&mut selection).ok().map(|()| assert_eq!(selection, [5, 0]))?;
    Some(stream)
}

/// Sends a request of this client. Returns the connection, REP and BND.
fn forward_request(server: &Server, client: &str, command: u8, dst: SocketAddr) -> (TcpStream, u8, SocketAddr) {
    let mut stream = forward(server, client).expect("accepted");
    stream.write_all(&request(command, dst)).expect("request sent");
    let (rep, bnd) = read_reply(&mut stream);
    (stream, rep, bnd)
}

#[test]
fn proxy_header_arrives_in_any_pieces_and_nothing_after_it_is_lost() {
    let dst = echo_server();
    let dir = temp_dir();
    let path = dir.path().join("s5.sock");
    let unix = format!("unix:{}", path.display());
    let args = ["--listen", "[::1]:0", "--listen", &unix, "--proxy-protocol-from", "127.0.0.0/8,::1,unix"];
    let server = serve("127.0.0.1:0", 3, &[&args[..], &LOOPBACK, &["--allow-open-relay"]].concat());
    // Different clients, because the log has at most 20 lines a second of each.
    let clients =
        (0..16).map(|n| if n % 2 == 0 { format!("192.0.2.{}:4000", n + 1) } else { format!("[2001:db8:{n}::1]:4000") });
    let cases = [v1, v2].into_iter().flat_map(|header| [1, 15, 29, 1000].map(|piece| (header, piece)));
    for ((header, piece), client) in cases.flat_map(|case| [case; 2]).zip(clients) {
        let bytes = [&header(addr(&client)), GREETING, &request(CONNECT, dst), b"hello"].concat();
        let tcp = server.addrs.iter().map(|at| {
            let stream = TcpStream::connect(at).expect("the server accepts");
            stream.set_nodelay(true).expect("option set");
            let own = stream.local_addr().expect("local address").to_string();
            (OwnedFd::from(stream), own)
        });
        let unix = UnixStream::connect(&path).expect("the server accepts").into();
        for (stream, own) in tcp.chain([(unix, "unix".into())]) {
            // Reads and writes are the same for both kinds of sockets.
            let mut stream = UnixStream::from(stream);
            stream.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
            bytes.chunks(piece).for_each(|piece| stream.write_all(piece).expect("data sent"));
            let mut answer = vec![0; 2 + 10 + 5];
            stream.read_exact(&mut answer).expect("answer received");
            assert_eq!((&answer[..4], &answer[12..]), (&[5, 0, 5, 0][..], &b"hello"[..]), "{client} {piece}");
            drop(stream);
            wait_session(&server, &[&format!("from={client} proxy={own} method=none"), "up=5 down=5"]);
        }
    }
}

#[test]
fn false_or_missing_proxy_header_is_logged_once_with_its_cause_and_health_checks_are_not() {
    let server = behind_balancer(&["--handshake-timeout", "1s"]);
    let table: [(&[u8], bool, &str); 7] = [
        (GREETING, false, "nor the signature of version 2 (let the load balancer send it, or remove"),
        (b"PROXY TCP4 1.2.3.4\r\n", false, "error=\"invalid PROXY header: expected TCP4"),
        (&[b'P'; 2000], false, "nor the signature of version 2 (let"),
        (b"PROXY UNKNOWN", true, "PROXY header: connection closed within a message"),
        (b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x20\x00", false, "error=\"invalid PROXY header: more than 4096 bytes"),
        (b"PROXY UNKNOWN", false, "no complete PROXY header within 1s"),
        (b"", false, "no complete PROXY header within 1s"),
    ];
    for (number, (bytes, ends, error)) in table.into_iter().enumerate() {
        let mut stream = server.connect();
        stream.write_all(bytes).expect("data sent");
        if ends {
            stream.shutdown(Shutdown::Write).expect("half-closed");
        }
        assert!(matches!(stream_end(&mut stream), StreamEnd::Closed(bytes) if bytes.is_empty()) || bytes.len() > 1000);
        let log = server.wait_log(|log| session_lines(log).len() > number);
        assert!(session_lines(&log)[number].contains(error), "{error:?}: {log}");
        assert!(session_lines(&log)[number].contains("from=127.0.0.1:"), "{log}");
    }
    for check in [&b""[..], b"PROXY UNKNOWN\r\n", b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"] {
        let mut stream = server.connect();
        stream.write_all(check).expect("data sent");
        reset(stream);
        let mut stream = server.connect();
        stream.write_all(check).expect("data sent");
        stream.shutdown(Shutdown::Write).expect("half-closed");
        assert_eq!(stream_end(&mut stream), StreamEnd::Closed(vec![]));
    }
    drop(forward_request(&server, "192.0.2.7:1", CONNECT, closed_port()));
    let log = server.wait_log(|log| log.contains("from=192.0.2.7:1 "));
    assert_eq!(session_lines(&log).len(), 8, "a health check was logged: {log}");
}

#[test]
fn proxy_header_of_other_addresses_is_refused_with_the_remedy() {
    let server = Server::start(&["--proxy-protocol-from", "127.0.0.2,unix", "--allow-open-relay"]);
    for (number, header) in [v1, v2].into_iter().enumerate() {
        let mut stream = server.connect();
        stream.write_all(&[header(addr("192.0.2.7:4000")), GREETING.into()].concat()).expect("header sent");
        let _ = stream.read_to_end(&mut Vec::new());
        let log = server.wait_log(|log| session_lines(log).len() > number);
        let error = "PROXY header from an address not in --proxy-protocol-from (if it is your load balancer, add it)";
        assert!(session_lines(&log)[number].contains(error), "{log}");
        assert!(session_lines(&log)[number].contains("from=127.0.0.1:"), "{log}");
    }
    // In pieces that are shorter than the start of a header. The first piece of `POST` is answered at once.
    let mut stream = server.connect();
    stream.set_nodelay(true).expect("option set");
    let header = v1(addr("192.0.2.7:4000"));
    for piece in [&header[..1], &header[1..5]] {
        stream.write_all(piece).expect("data sent");
        assert_no_data(&stream, Duration::from_millis(100));
    }
    stream.write_all(&header[5..]).expect("data sent");
    let _ = stream.read_to_end(&mut Vec::new());
    wait_until("it is logged", TIMEOUT, || server.log().matches("error=\"PROXY header from an address").count() == 3);
    for start in [&b"PO"[..], b"PROP", b"G"] {
        let mut stream = server.connect();
        stream.write_all(start).expect("data sent");
        assert!(read_exact(&mut stream, 9).starts_with(b"HTTP/1.0 "), "{start:?}");
    }
    // From the same address, sessions without a header work.
    drop(connect_to(&server, echo_server()));
}

#[test]
fn second_proxy_header_is_refused_as_one_that_the_balancer_passes_on() {
    let server = behind_balancer(&[]);
    for (number, first) in [v2(addr("192.0.2.7:1")), b"PROXY UNKNOWN\r\n".into()].into_iter().enumerate() {
        let mut stream = server.connect();
        stream.write_all(&[first, v1(addr("192.0.2.8:1")), GREETING.into()].concat()).expect("headers sent");
        let _ = stream.read_to_end(&mut Vec::new());
        let log = server.wait_log(|log| session_lines(log).len() > number);
        let error = "error=\"second PROXY header (if another load balancer is in front of yours, let";
        assert!(session_lines(&log)[number].contains(error), "{log}");
    }
}

#[test]
fn rules_see_the_forwarded_client_and_local_headers_the_balancer() {
    let dst = echo_server();
    let rules = ["--deny", "from=192.0.2.8", "--allow", "from=192.0.2.0/24 to=127.0.0.1"];
    for (threads, local, local_is_allowed) in [("1", "--allow", true), ("2", "--deny", false)] {
        let server = behind_balancer(&[&rules[..], &[local, "from=loopback", "--threads", threads]].concat());
        assert_eq!(forward_request(&server, "192.0.2.7:1", CONNECT, dst).1, 0);
        assert!(forward(&server, "192.0.2.8:1").is_none(), "denied at accept");
        wait_session(&server, &["from=192.0.2.8:1 proxy=127.0.0.1:", "denied: --deny"]);
        assert!(forward(&server, "198.51.100.1:1").is_none(), "no rule allows it");
        let mut local = server.connect();
        local.write_all(&[b"PROXY UNKNOWN\r\n", GREETING, &request(CONNECT, dst)].concat()).expect("data sent");
        let mut answer = [0; 4];
        assert_eq!(local.read_exact(&mut answer).is_ok_and(|()| answer == [5, 0, 5, 0]), local_is_allowed);
        drop(local);
        if local_is_allowed {
            wait_session(&server, &["from=127.0.0.1:", "rep=0"]);
        }
        let log = server.log();
        let is_own_client = |line: &&str| line.contains("from=127.0.0.1:") && line.contains("proxy=");
        assert_eq!(log.lines().find(is_own_client), None, "the balancer itself has no proxy=");
    }
}

#[test]
fn limits_count_the_forwarded_client_and_not_the_balancer() {
    let server = behind_balancer(&[&["--max-per-client", "3"], &LOOPBACK[..]].concat());
    let _silent = [(); 3].map(|()| server.connect());
    let one = |port: u16| forward_request(&server, &format!("192.0.2.1:{port}"), CONNECT, echo_server()).0;
    let first = [one(1), one(2), one(3)];
    assert!(forward(&server, "192.0.2.1:4").is_none(), "a fourth session of the same client");
    server.wait_log(|log| log.contains("client 192.0.2.1: refused: limit of 3 connections reached"));
    let _other = forward_request(&server, "192.0.2.2:1", CONNECT, echo_server()).0;
    drop(first);
    wait_until("a session has ended", TIMEOUT, || forward(&server, "192.0.2.1:5").is_some());
}

#[test]
fn connections_without_a_header_end_no_handshake_of_a_client() {
    // Up to 4 handshakes may be unfinished. One thread accepts connections in their order.
    let server = behind_balancer(&[&["--max-connections", "8", "--threads", "1"], &LOOPBACK[..]].concat());
    let mut clients = ["192.0.2.1:1", "192.0.2.2:1"].map(|client| forward(&server, client).expect("accepted"));
    let silent: Vec<TcpStream> = (0..6).map(|_| server.connect()).collect();
    for mut oldest in silent.into_iter().take(4) {
        assert_eq!(stream_end(&mut oldest), StreamEnd::Closed(vec![]), "not ended for a newer connection");
    }
    for client in &mut clients {
        client.write_all(&request(CONNECT, echo_server())).expect("request sent");
        assert_eq!(read_reply(client).0, 0, "the handshake of a client was ended");
    }
}

#[test]
fn failed_logins_delay_only_the_forwarded_client() {
    let (_dir, users) = users_file(&[("alice", "secret")]);
    let server = behind_balancer(&["--users", &users]);
    let log_in = |client: &str, passwd: &[u8]| {
        let mut stream = server.connect();
        stream.write_all(&[&v2(addr(client)), &[5, 1, 2][..]].concat()).expect("header sent");
        assert_eq!(read_exact(&mut stream, 2), [5, 2]);
        stream.write_all(&login_message(b"alice", passwd)).expect("login sent");
        stream
    };
    for port in 1..=5 {
        let mut stream = log_in(&format!("192.0.2.1:{port}"), b"wrong");
        assert_eq!(read_exact(&mut stream, 2), [1, 1]);
    }
    let delayed = log_in("192.0.2.1:6", b"wrong");
    let mut other = log_in("192.0.2.2:1", b"wrong");
    assert_eq!(read_exact(&mut other, 2), [1, 1]);
    assert_eq!(read_exact(&mut log_in("192.0.2.2:2", b"secret"), 2), [1, 0]);
    assert_no_data(&delayed, Duration::from_millis(100));
    server.wait_log(|log| log.contains("from=192.0.2.1:1 proxy=127.0.0.1:") && log.contains("error=\"login refused\""));
}

#[test]
fn association_belongs_to_the_forwarded_client() {
    let server = behind_balancer(&[]);
    let dst = udp_echo_server(V4);
    let [client, balancer] = ["127.0.0.9", "127.0.0.1"].map(|client| socket(ip(client)));
    for announced in [addr("0.0.0.0:0"), client.local_addr().expect("local address")] {
        let (control, rep, bnd) = forward_request(&server, "127.0.0.9:4000", UDP_ASSOCIATE, announced);
        assert_eq!((rep, bnd.ip()), (0, V4));
        let association = Association { control, socket: client.try_clone().expect("cloned"), bnd };
        balancer.send_to(&datagram(0, dst, b"balancer"), bnd).expect("datagram sent");
        association.ping(dst, b"client");
        assert_nothing_arrives(&balancer);
    }
    // An announced port keeps other ports of the client away.
    let (_control, _, bnd) = forward_request(&server, "127.0.0.9:4000", UDP_ASSOCIATE, addr("127.0.0.9:9"));
    client.send_to(&datagram(0, dst, b"other port"), bnd).expect("datagram sent");
    assert_nothing_arrives(&client);
}

#[test]
fn bind_works_for_a_forwarded_client() {
    let server = behind_balancer(&[]);
    let (mut client, rep, bnd) = forward_request(&server, "127.0.0.9:4000", BIND, addr("127.0.0.1:0"));
    assert_eq!((rep, bnd.ip()), (0, V4));
    let mut peer = TcpStream::connect(bnd).expect("the server listens");
    assert_eq!(read_reply(&mut client), (0, peer.local_addr().expect("local address")));
    peer.write_all(b"hello").expect("data sent");
    assert_eq!(read_exact(&mut client, 5), b"hello");
}

/// Adds an address to the loopback device of the namespace. Returns when datagrams to it arrive, which can be later.
fn add_address(family: &str, block: &str, flags: &[&str]) -> IpAddr {
    let added = Command::new("ip").args([family, "addr", "add", block, "dev", "lo"]).args(flags).status();
    assert!(added.expect("ip runs").success());
    let added = ip(block.split('/').next().expect("an address"));
    let own = socket(added);
    wait_until("the address is in use", TIMEOUT, || {
        own.send_to(b"ping", own.local_addr().expect("local address")).is_ok_and(|_| arrives(&own))
    });
    added
}

#[test]
fn bnd_is_reachable_for_clients_that_the_balancers_address_is_not() {
    enter_namespace!("", "");
    let ips = [add_address("-4", "10.9.0.1/24", &[]), add_address("-6", "2001:db8:9::1/64", &["nodad"])];
    let dir = temp_dir();
    let path = dir.path().join("s5.sock");
    let unix = format!("unix:{}", path.display());
    let args = ["--listen", "10.9.0.1:0", "--listen", &unix, "--proxy-protocol-from", "127.0.0.1,10.9.0.1,unix"];
    let rules = ["--allow-open-relay", "--allow", "to=10.9.0.1,2001:db8:9::1"];
    let server = serve("127.0.0.1:0", 3, &[&args[..], &rules].concat());
    let tcp = |addr: SocketAddr| TcpStream::connect(addr).expect("the server accepts");
    // Reads and writes are the same for both kinds of sockets.
    let by_unix = || TcpStream::from(OwnedFd::from(UnixStream::connect(&path).expect("the server accepts")));
    for ip in ips {
        let any =
            SocketAddr::new(if ip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }, 0);
        for connect in [&(|| tcp(server.addrs[0])) as &dyn Fn() -> TcpStream, &|| tcp(server.addrs[1]), &by_unix] {
            let forward = |command| {
                let mut stream = connect();
                stream.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
                let header = v2(SocketAddr::new(ip, 4000));
                stream.write_all(&[&header, GREETING, &request(command, any)].concat()).expect("request sent");
                assert_eq!(read_exact(&mut stream, 2), [5, 0]);
                let (rep, bnd) = read_reply(&mut stream);
                assert_eq!((rep, bnd.ip()), (0, ip));
                (stream, bnd)
            };
            let (control, bnd) = forward(UDP_ASSOCIATE);
            Association { control, socket: socket(ip), bnd }.ping(udp_echo_server(ip), b"hello");
            let (mut control, bnd) = forward(BIND);
            let _peer = TcpStream::connect(bnd).expect("the server listens");
            assert_eq!(read_reply(&mut control).0, 0);
        }
    }
}

#[test]
fn loopback_client_of_a_balancer_on_another_host_counts_as_the_balancer() {
    enter_namespace!("", "");
    add_address("-4", "10.9.0.1/24", &[]);
    let server = serve("10.9.0.1:0", 1, &["--allow-open-relay", "--proxy-protocol-from", "10.9.0.1"]);
    let (_, rep, _) = forward_request(&server, "127.0.0.1:4000", CONNECT, echo_server());
    assert_eq!(rep, 2, "a client of another host has reached loopback");
    wait_session(&server, &["from=10.9.0.1:", "rep=2"]);
}

#[test]
fn invalid_proxy_protocol_from_names_the_option_and_the_word() {
    for (value, words) in [
        ("10.0.0.1/8", ["--proxy-protocol-from", "did you mean 10.0.0.0/8?"]),
        ("10.0.0.1:80", ["--proxy-protocol-from", "write --proxy-protocol-from=10.0.0.1"]),
        ("haproxy", ["--proxy-protocol-from", "expected an address, a CIDR such as 192.0.2.0/24, or unix"]),
        ("unix,", ["--proxy-protocol-from", "expected an address"]),
    ] {
        let output = run(s5().args(["serve", "--proxy-protocol-from", value]), b"", TIMEOUT);
        assert_fails_with(&output, 2, &words);
    }
}
