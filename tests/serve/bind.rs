//! BIND: both replies, who is let in, and that nothing stays behind.

use std::io::{ErrorKind, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::common::{Server, TIMEOUT, in_namespace, open, read_exact, read_reply, wait_until};
use crate::kit::{
    BIND, StreamEnd, V4, V6, connect_from, idle_descriptors, open_by_name, ping, reset, serve, stream_end, timed,
};

const ANYBODY: &str = "0.0.0.0:0";
const STRANGER: &str = "127.0.0.2:0";
/// How long a listener may outlive its client.
const FREED: Duration = Duration::from_secs(2);

fn addr(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// Asks to listen for `dst`: the client's connection, and where the peer shall go.
fn bind(server: &Server, dst: &str) -> (TcpStream, SocketAddr) {
    let (stream, rep, bnd) = open(server, BIND, addr(dst));
    assert_eq!(rep, 0, "BIND for {dst}");
    assert_ne!(bnd.port(), 0);
    (stream, bnd)
}

fn from(ip: IpAddr, to: SocketAddr) -> TcpStream {
    connect_from(SocketAddr::new(ip, 0), to)
}

/// The second reply names the peer, and data flows both ways.
fn assert_served(client: &mut TcpStream, peer: &mut TcpStream) {
    assert_eq!(read_reply(client), (0, peer.local_addr().expect("an address")));
    client.write_all(b"question").expect("it is sent");
    client.shutdown(Shutdown::Write).expect("half-close");
    assert_eq!(stream_end(peer), StreamEnd::Closed(b"question".to_vec()));
    peer.write_all(b"answer").expect("it is sent");
    peer.shutdown(Shutdown::Write).expect("half-close");
    assert_eq!(stream_end(client), StreamEnd::Closed(b"answer".to_vec()));
}

/// A stranger may see the end as a FIN or as a reset, but nothing else.
fn assert_turned_away(stranger: &mut TcpStream) {
    let end = stream_end(stranger);
    assert!(end == StreamEnd::Closed(vec![]) || end == StreamEnd::Reset, "{end:?}");
}

fn refuses(addr: SocketAddr) -> bool {
    TcpStream::connect(addr).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

#[test]
fn both_replies_come_and_then_data_flows_both_ways() {
    for (listen, ip) in [("127.0.0.1:0", V4), ("[::1]:0", V6), ("127.0.0.1:0", V6), ("[::1]:0", V4)] {
        let server = serve(listen, 1, &[]);
        let (mut client, bnd) = bind(&server, &SocketAddr::new(ip, 0).to_string());
        assert_eq!(bnd.ip(), ip, "BND is of the family of DST");
        assert_served(&mut client, &mut from(ip, bnd));
    }
}

#[test]
fn bnd_is_the_address_that_the_client_connected_to() {
    let server = serve("*:0", 2, &["--open"]);
    let through = SocketAddr::new(addr("127.0.0.3:0").ip(), server.addr().port());
    let mut client = from(V4, through);
    client.write_all(&[5, 1, 0]).expect("the greeting is sent");
    assert_eq!(read_exact(&mut client, 2), [5, 0]);
    client.write_all(&crate::common::request(BIND, addr(ANYBODY))).expect("the request is sent");
    let (rep, bnd) = read_reply(&mut client);
    assert_eq!((rep, bnd.ip()), (0, through.ip()));
    assert_served(&mut client, &mut from(V4, bnd));
}

#[test]
fn zeros_are_anybody() {
    for (listen, dst, ip) in [("127.0.0.1:0", ANYBODY, "127.0.0.5"), ("[::1]:0", "[::]:0", "::1")] {
        let server = serve(listen, 1, &[]);
        let (mut client, bnd) = bind(&server, dst);
        assert_served(&mut client, &mut from(ip.parse().expect("an address"), bnd));
    }
}

#[test]
fn a_stranger_is_closed_and_the_wait_goes_on() {
    let server = Server::start(&[]);
    for dst in ["127.0.0.1:0", "[::ffff:127.0.0.1]:0"] {
        let (mut client, bnd) = bind(&server, dst);
        for _ in 0..3 {
            assert_turned_away(&mut connect_from(addr(STRANGER), bnd));
        }
        assert_served(&mut client, &mut from(V4, bnd));
    }
}

#[test]
fn a_port_in_dst_is_expected_too() {
    // A port is let go and taken again: nobody else may come in between.
    if !in_namespace("bind::a_port_in_dst_is_expected_too", "", "") {
        return;
    }
    let server = Server::start(&[]);
    let expected = crate::common::closed_port();
    let (mut client, bnd) = bind(&server, &expected.to_string());
    assert_turned_away(&mut from(V4, bnd));
    assert_served(&mut client, &mut connect_from(expected, bnd));
}

#[test]
fn all_addresses_of_a_name_are_expected() {
    let hosts = "127.0.0.1 localhost\n127.0.0.4 pair\n127.0.0.5 pair\n::1 dual\n127.0.0.1 dual\n";
    if !in_namespace("bind::all_addresses_of_a_name_are_expected", hosts, "") {
        return;
    }
    let server = Server::start(&[]);
    let table = [("localhost", "127.0.0.1"), ("pair", "127.0.0.4"), ("pair", "127.0.0.5"), ("dual", "127.0.0.1")];
    for (name, ip) in table {
        let (mut client, rep, bnd) = open_by_name(&server, BIND, name, 0);
        assert_eq!(rep, 0, "{name}");
        let bnd = SocketAddr::new(V4, bnd.port());
        assert_turned_away(&mut connect_from(addr(STRANGER), bnd));
        assert_served(&mut client, &mut from(ip.parse().expect("an address"), bnd));
    }
    // Of a name of both families the peer may come by either.
    let (mut client, _, bnd) = open_by_name(&server, BIND, "dual", 0);
    assert_served(&mut client, &mut from(V6, SocketAddr::new(V6, bnd.port())));
    let (_, rep, _) = open_by_name(&server, BIND, "nobody.a..b", 0);
    assert_eq!(rep, 4);
}

#[test]
fn a_peer_that_does_not_come_in_time_is_06_in_the_second_reply() {
    let server = Server::start(&["--bind-timeout", "200ms"]);
    let (time, (mut client, bnd)) = timed(|| {
        let (mut client, bnd) = bind(&server, ANYBODY);
        assert_eq!(read_reply(&mut client).0, 6);
        (client, bnd)
    });
    assert!(time >= Duration::from_millis(200) && time < TIMEOUT, "{time:?}");
    assert_eq!(stream_end(&mut client), StreamEnd::Closed(vec![]));
    assert!(refuses(bnd), "the listener is gone");
    assert!(server.wait_log(|log| log.contains("session ")).contains("rep=6"));
}

#[test]
fn strangers_do_not_extend_the_wait() {
    let server = Server::start(&["--bind-timeout", "300ms"]);
    let (mut client, bnd) = bind(&server, "127.0.0.1:0");
    let started = Instant::now();
    // Turned away again and again, until nobody listens any more.
    while !refuses_from_stranger(bnd) {
        assert!(started.elapsed() < Duration::from_secs(5));
    }
    assert!(started.elapsed() >= Duration::from_millis(250));
    assert_eq!(read_reply(&mut client).0, 6);
}

fn refuses_from_stranger(bnd: SocketAddr) -> bool {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
    socket.bind(&addr(STRANGER).into()).expect("the source is ours");
    socket.connect(&bnd.into()).is_err()
}

#[test]
fn a_client_that_leaves_takes_its_listener_along() {
    let server = Server::start(&[]);
    let before = idle_descriptors(&server);
    let leave: [fn(TcpStream); 4] = [
        drop,
        reset,
        |stream| {
            // Even when its close is behind octets that nobody has read.
            (&stream).write_all(b"early").expect("it is sent");
        },
        |mut stream| {
            stream.shutdown(Shutdown::Write).expect("half-close");
            assert_eq!(stream_end(&mut stream), StreamEnd::Closed(vec![]));
        },
    ];
    for leave in leave {
        let (client, bnd) = bind(&server, "192.0.2.1:9");
        leave(client);
        wait_until("the listener is gone", FREED, || refuses(bnd));
        wait_until("the descriptors are free", FREED, || server.descriptors() == before);
    }
}

#[test]
fn data_that_the_client_sends_too_early_reaches_the_peer() {
    let server = Server::start(&[]);
    let (mut client, bnd) = bind(&server, ANYBODY);
    client.write_all(b"early").expect("it is sent");
    let mut peer = from(V4, bnd);
    assert_eq!(read_exact(&mut peer, 5), b"early");
    assert_eq!(read_reply(&mut client).0, 0);
    ping_both(&mut client, &mut peer);
}

fn ping_both(client: &mut TcpStream, peer: &mut TcpStream) {
    client.write_all(b"ping").expect("it is sent");
    assert_eq!(read_exact(peer, 4), b"ping");
    peer.write_all(b"pong").expect("it is sent");
    assert_eq!(read_exact(client, 4), b"pong");
}

#[test]
fn one_peer_is_let_in_and_no_more() {
    let server = Server::start(&[]);
    let (mut client, bnd) = bind(&server, ANYBODY);
    let mut peer = from(V4, bnd);
    assert_eq!(read_reply(&mut client).0, 0);
    assert!(refuses(bnd), "the listener is gone");
    ping_both(&mut client, &mut peer);
}

#[test]
fn a_reset_of_the_peer_is_a_reset_for_the_client() {
    let server = Server::start(&[]);
    let (mut client, bnd) = bind(&server, ANYBODY);
    let peer = from(V4, bnd);
    assert_eq!(read_reply(&mut client).0, 0);
    reset(peer);
    assert_eq!(stream_end(&mut client), StreamEnd::Reset);
}

#[test]
fn bind_ports_limits_the_ports() {
    if !in_namespace("bind::bind_ports_limits_the_ports", "", "") {
        return;
    }
    let server = Server::start(&["--bind-ports", "20000-20002"]);
    let mut open_binds: Vec<(TcpStream, SocketAddr)> = (0..3).map(|_| bind(&server, ANYBODY)).collect();
    let mut ports: Vec<u16> = open_binds.iter().map(|(_, bnd)| bnd.port()).collect();
    ports.sort_unstable();
    assert_eq!(ports, [20000, 20001, 20002]);
    assert_eq!(open(&server, BIND, addr(ANYBODY)).1, 1, "all are taken");
    // A port is free again after its tunnel, although connections of it linger in TIME-WAIT.
    let (mut client, bnd) = open_binds.swap_remove(1);
    assert_served(&mut client, &mut from(V4, bnd));
    drop(client);
    wait_until("the port is free", FREED, || open(&server, BIND, addr(ANYBODY)).1 == 0);
}

#[test]
fn advertise_is_what_bnd_says_and_the_listener_takes_connections_from_everywhere() {
    let server = Server::start(&["--advertise", "192.0.2.9"]);
    let (mut client, bnd) = bind(&server, ANYBODY);
    assert_eq!(bnd.ip(), addr("192.0.2.9:0").ip());
    assert_served(&mut client, &mut from(V4, SocketAddr::new(V4, bnd.port())));
    // It is an IPv4 address, so an IPv6 client hears where it really is.
    let (_client, bnd) = bind(&server, "[::1]:0");
    assert_eq!(bnd.ip(), V6);
}

#[test]
fn fifty_at_once_keep_apart() {
    let server = Server::start(&[]);
    let before = idle_descriptors(&server);
    let mut clients: Vec<_> = (0..50_u8).map(|_| bind(&server, ANYBODY)).collect();
    let mut peers: Vec<TcpStream> = clients.iter().map(|(_, bnd)| from(V4, *bnd)).collect();
    for (number, peer) in (0..50).zip(&mut peers) {
        peer.write_all(&[number]).expect("it is sent");
    }
    for ((number, (client, _)), peer) in (0..50).zip(&mut clients).zip(&peers) {
        assert_eq!(read_reply(client), (0, peer.local_addr().expect("an address")));
        assert_eq!(read_exact(client, 1), [number]);
    }
    drop((clients, peers));
    wait_until("all descriptors are free", TIMEOUT, || server.descriptors() == before);
}

#[test]
fn a_peer_that_answers_like_an_echo_is_heard_at_once() {
    let server = Server::start(&[]);
    let (mut client, bnd) = bind(&server, ANYBODY);
    let mut peer = from(V4, bnd);
    assert_eq!(read_reply(&mut client).0, 0);
    std::thread::spawn(move || {
        let mut sink = peer.try_clone().expect("a second handle");
        let _ = std::io::copy(&mut peer, &mut sink);
    });
    for _ in 0..20 {
        ping(&mut client, b"small");
    }
}
