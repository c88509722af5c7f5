//! BIND: BND, peers of rules and names, ports, and the relay. tests/wire has both replies, accepted and refused peers,
//! and closing of the listener.

use crate::*;

const ANY_PEER: &str = "0.0.0.0:0";
const OTHER_PEER: &str = "127.0.0.2:0";
/// Time for the server to close the listener after the client has disconnected.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(2);

/// Sends BIND for `dst`. Returns the client's connection and BND.
fn bind(server: &Server, dst: &str) -> (TcpStream, SocketAddr) {
    let (stream, rep, bnd) = open(server, BIND, addr(dst));
    assert_eq!(rep, 0, "BIND for {dst}");
    assert_ne!(bnd.port(), 0);
    (stream, bnd)
}

fn connect_peer(ip: IpAddr, to: SocketAddr) -> TcpStream {
    connect_from(SocketAddr::new(ip, 0), to)
}

/// Asserts that the second reply has the peer's address, and that both directions are relayed.
fn assert_relayed(client: &mut TcpStream, peer: &mut TcpStream) {
    assert_eq!(read_reply(client), (0, peer.local_addr().expect("local address")));
    client.write_all(b"question").expect("data sent");
    client.shutdown(Shutdown::Write).expect("half-closed");
    assert_eq!(stream_end(peer), StreamEnd::Closed(b"question".to_vec()));
    peer.write_all(b"answer").expect("data sent");
    peer.shutdown(Shutdown::Write).expect("half-closed");
    assert_eq!(stream_end(client), StreamEnd::Closed(b"answer".to_vec()));
}

/// Asserts that the connection is closed or reset without data.
fn assert_closed(peer: &mut TcpStream) {
    let end = stream_end(peer);
    assert!(end == StreamEnd::Closed(vec![]) || end == StreamEnd::Reset, "{end:?}");
}

#[test]
fn bind_bnd_is_the_address_that_the_client_connected_to() {
    let server = serve("*:0", 2, &["--allow-open-relay"]);
    let listen = SocketAddr::new(addr("127.0.0.3:0").ip(), server.addr().port());
    let mut client = connect_peer(V4, listen);
    client.write_all(&[5, 1, 0]).expect("greeting sent");
    assert_eq!(read_exact(&mut client, 2), [5, 0]);
    client.write_all(&crate::support::request(BIND, addr(ANY_PEER))).expect("request sent");
    let (rep, bnd) = read_reply(&mut client);
    assert_eq!((rep, bnd.ip()), (0, listen.ip()));
    assert_relayed(&mut client, &mut connect_peer(V4, bnd));
}

#[test]
fn bind_accepts_the_expected_peer_from_any_port() {
    let server = Server::start(&[]);
    let hop = Server::start(&["--via", &server.addr().to_string()]);
    // These rules allow the primary connection of FTP, and so its data connection.
    let rules = ["--allow", "from=loopback to=127.0.0.1,::1 port=21"];
    for server in [&server, &hop, &Server::start(&rules)] {
        for (dst, ip) in [("127.0.0.1:21", V4), ("[::1]:21", V6), ("[::ffff:127.0.0.1]:21", V4)] {
            let (mut client, bnd) = bind(server, dst);
            if ip == V4 {
                assert_closed(&mut connect_from(addr(OTHER_PEER), bnd));
            }
            assert_relayed(&mut client, &mut connect_peer(ip, bnd));
        }
    }
}

#[test]
fn bind_listens_on_the_port_of_dst_if_any_peer_may_connect() {
    // In a namespace, so that no other process uses the ports.
    enter_namespace!("", "");
    let server = Server::start(&[]);
    let hop = Server::start(&["--via", &server.addr().to_string()]);
    let ranges = Server::start(&["--bind-ports", "20000-20003"]);
    // The rule does not apply: the port is not that of a target.
    let rules = Server::start(&["--deny", "port=21000"]);
    let table = [
        (&server, "0.0.0.0:24242", true),
        (&server, "[::]:1024", true),
        (&server, "0.0.0.0:1023", false),
        (&server, "127.0.0.1:24242", false),
        (&hop, "0.0.0.0:24242", true),
        (&ranges, "0.0.0.0:20002", true),
        (&ranges, "0.0.0.0:20004", false),
        (&rules, "0.0.0.0:21000", true),
    ];
    for (server, dst, is_granted) in table {
        let (mut client, bnd) = bind(server, dst);
        assert_eq!(bnd.port() == addr(dst).port(), is_granted, "{dst}: {bnd}");
        // The second client gets another port.
        let (_other, other) = bind(server, dst);
        assert_ne!(other.port(), bnd.port());
        assert_relayed(&mut client, &mut connect_peer(bnd.ip(), bnd));
    }
}

#[test]
fn bind_accepts_all_addresses_of_a_name() {
    let hosts = "127.0.0.1 localhost\n127.0.0.4 pair\n127.0.0.5 pair\n::1 dual\n127.0.0.1 dual\n";
    enter_namespace!(hosts, "");
    let server = Server::start(&[]);
    let table = [("localhost", "127.0.0.1"), ("pair", "127.0.0.4"), ("pair", "127.0.0.5"), ("dual", "127.0.0.1")];
    for (name, ip) in table {
        let (mut client, rep, bnd) = open_by_name(&server, BIND, name, 21);
        assert_eq!(rep, 0, "{name}");
        let bnd = SocketAddr::new(V4, bnd.port());
        assert_closed(&mut connect_from(addr(OTHER_PEER), bnd));
        assert_relayed(&mut client, &mut connect_peer(ip.parse().expect("valid address"), bnd));
    }
    // The peer can connect over each family of the name.
    let (mut client, _, bnd) = open_by_name(&server, BIND, "dual", 0);
    assert_relayed(&mut client, &mut connect_peer(V6, SocketAddr::new(V6, bnd.port())));
    let (_, rep, _) = open_by_name(&server, BIND, "invalid.a..b", 0);
    assert_eq!(rep, 4);
}

#[test]
fn bind_for_any_peer_of_a_family_that_the_host_lacks_uses_the_family_of_the_client() {
    enter_namespace!("", "");
    let dir = temp_dir();
    let unix = dir.path().join("socket");
    let remove = |ip: &str| run(Command::new("ip").args(["addr", "del", ip, "dev", "lo"]), b"", TIMEOUT);
    let add = |ip: &str| run(Command::new("ip").args(["addr", "add", ip, "dev", "lo", "nodad"]), b"", TIMEOUT);
    for (missing, listen, dst) in [("::1/128", "127.0.0.1:0", "[::]:0"), ("127.0.0.1/8", "[::1]:0", "0.0.0.0:0")] {
        assert!(remove(missing).status.success());
        let server = serve(listen, 2, &["--listen", &format!("unix:{}", unix.display())]);
        let (mut client, bnd) = bind(&server, dst);
        assert_eq!(bnd.ip(), addr(listen).ip());
        assert_relayed(&mut client, &mut connect_peer(bnd.ip(), bnd));
        let mut client = UnixStream::connect(&unix).expect("the server accepts");
        client.write_all(&[&[5, 1, 0][..], &request(BIND, addr(dst))].concat()).expect("request sent");
        let mut replies = [0; 6];
        client.read_exact(&mut replies).expect("a reply");
        assert_eq!(replies[..4], [5, 0, 5, 0], "{dst}");
        assert_eq!(replies[5] == 1, bnd.is_ipv4(), "{dst}");
        assert!(add(missing).status.success());
    }
}

#[test]
fn bind_timeout_is_not_extended_by_unexpected_peers() {
    let server = Server::start(&["--bind-timeout", "300ms"]);
    let started = Instant::now();
    let (mut client, bnd) = bind(&server, "127.0.0.1:0");
    // Connects repeatedly until the listener is closed.
    while !refuses_unexpected_peer(bnd) {
        assert!(started.elapsed() < Duration::from_secs(5));
    }
    assert!(started.elapsed() >= Duration::from_millis(300));
    assert_eq!(read_reply(&mut client).0, 6);
}

/// Returns true if the listener refuses a connection from another address than DST.
fn refuses_unexpected_peer(bnd: SocketAddr) -> bool {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("socket created");
    socket.bind(&addr(OTHER_PEER).into()).expect("free port");
    socket.connect(&bnd.into()).is_err()
}

#[test]
fn bind_accepts_a_peer_of_a_client_that_has_half_closed() {
    let hop = Server::start(&[]);
    for args in [&[][..], &["--via", &hop.addr().to_string()]] {
        let server = Server::start(args);
        // A stall of the machine can be longer than the two seconds that a peer has.
        let is_accepted = (0..5).any(|_| {
            let (mut client, bnd) = bind(&server, "0.0.0.0:0");
            client.shutdown(Shutdown::Write).expect("half-closed");
            thread::sleep(Duration::from_millis(50));
            let sent = TcpStream::connect(bnd).and_then(|mut peer| peer.write_all(b"answer"));
            let mut answer = Vec::new();
            sent.is_ok()
                && read_reply(&mut client).0 == 0
                && client.read_to_end(&mut answer).is_ok()
                && answer == b"answer"
        });
        assert!(is_accepted, "{args:?}: {}", server.log());
    }
}

#[test]
fn bind_forwards_a_reset_of_the_peer() {
    let server = Server::start(&[]);
    let (mut client, bnd) = bind(&server, ANY_PEER);
    let peer = connect_peer(V4, bnd);
    assert_eq!(read_reply(&mut client).0, 0);
    reset(peer);
    assert_eq!(stream_end(&mut client), StreamEnd::Reset);
}

#[test]
fn bind_ports_limits_the_ports_of_listeners() {
    enter_namespace!("", "");
    let server = Server::start(&["--bind-ports", "20000-20002"]);
    let mut open_binds: Vec<(TcpStream, SocketAddr)> = (0..3).map(|_| bind(&server, ANY_PEER)).collect();
    let mut ports: Vec<u16> = open_binds.iter().map(|(_, bnd)| bnd.port()).collect();
    ports.sort_unstable();
    assert_eq!(ports, [20000, 20001, 20002]);
    assert_eq!(open(&server, BIND, addr(ANY_PEER)).1, 1, "all ports are in use");
    // A port can be bound again after its tunnel has ended, although connections are in TIME-WAIT.
    let (mut client, bnd) = open_binds.swap_remove(1);
    assert_relayed(&mut client, &mut connect_peer(V4, bnd));
    drop(client);
    wait_until("the port is free", RELEASE_TIMEOUT, || open(&server, BIND, addr(ANY_PEER)).1 == 0);
}

#[test]
fn bind_bnd_is_the_advertised_address_of_its_family() {
    let server = Server::start(&["--advertise", "192.0.2.9"]);
    let (mut client, bnd) = bind(&server, ANY_PEER);
    assert_eq!(bnd.ip(), addr("192.0.2.9:0").ip());
    assert_relayed(&mut client, &mut connect_peer(V4, SocketAddr::new(V4, bnd.port())));
    // The advertised address is IPv4. For an IPv6 peer, BND is the address of the listener.
    let (_client, bnd) = bind(&server, "[::1]:0");
    assert_eq!(bnd.ip(), V6);
    // The BND of a hop is the address of its listener.
    let via = ["--via", &server.addr().to_string(), "--advertise", "192.0.2.10"];
    assert_eq!(bind(&Server::start(&via), ANY_PEER).1.ip(), addr("192.0.2.9:0").ip());
}

#[test]
fn bind_fifty_sessions_are_isolated() {
    let server = Server::start(&[]);
    let before = idle_descriptors(&server);
    let mut clients: Vec<_> = (0..50_u8).map(|_| bind(&server, ANY_PEER)).collect();
    let mut peers: Vec<TcpStream> = clients.iter().map(|(_, bnd)| connect_peer(V4, *bnd)).collect();
    for (number, peer) in (0..50).zip(&mut peers) {
        peer.write_all(&[number]).expect("data sent");
    }
    for ((number, (client, _)), peer) in (0..50).zip(&mut clients).zip(&peers) {
        assert_eq!(read_reply(client), (0, peer.local_addr().expect("local address")));
        assert_eq!(read_exact(client, 1), [number]);
    }
    drop((clients, peers));
    wait_until("all descriptors are closed", TIMEOUT, || server.descriptors() == before);
}

#[test]
fn bind_relays_small_messages_without_delay() {
    let server = Server::start(&[]);
    let (mut client, bnd) = bind(&server, ANY_PEER);
    let mut peer = connect_peer(V4, bnd);
    assert_eq!(read_reply(&mut client).0, 0);
    std::thread::spawn(move || {
        let mut writer = peer.try_clone().expect("cloned");
        let _ = std::io::copy(&mut peer, &mut writer);
    });
    for _ in 0..20 {
        ping(&mut client, b"small");
    }
}
