//! `s5 connect -l` and `s5 udp -l`: local ports that lead through the proxy.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use crate::common::{Server, TIMEOUT, closed_port, echo_server, s5, tcp_server, udp_echo_server, wait_until};
use crate::kit::{StreamEnd, V4, session_lines, stream_end};
use crate::scripted::{RunningProgram, ScriptedServer, Step, reply_with, text};

/// A client that listens, and where.
fn listening(args: &[&str]) -> (RunningProgram, SocketAddr) {
    let client = RunningProgram::start(s5().args(args));
    let said = client.stderr(|said| said.lines().any(|line| line.starts_with("listening on ")));
    let line = said.lines().find_map(|line| line.strip_prefix("listening on ")).expect("it says so");
    (client, line.parse().expect("an address"))
}

fn ping(stream: &mut TcpStream, octets: &[u8]) {
    stream.set_read_timeout(Some(TIMEOUT)).expect("it can be set");
    stream.write_all(octets).expect("it is sent");
    let mut back = vec![0; octets.len()];
    stream.read_exact(&mut back).expect("it comes back");
    assert!(back == octets);
}

#[test]
fn one_connection_gets_its_tunnel_and_then_it_ends() {
    let (server, echo) = (Server::start(&[]), echo_server().to_string());
    let (mut client, at) = listening(&["connect", "-l", "0", "-x", &server.addr().to_string(), &echo]);
    assert_eq!(at.ip(), V4, "on loopback unless told otherwise");
    let mut local = TcpStream::connect(at).expect("it listens");
    ping(&mut local, b"hello");
    assert!(TcpStream::connect(at).is_err(), "it takes one");
    local.shutdown(Shutdown::Write).expect("it can be");
    assert_eq!(stream_end(&mut local), StreamEnd::Closed(Vec::new()));
    assert_eq!(client.end(TIMEOUT).0.code(), Some(0));
}

#[test]
fn the_status_of_the_one_connection_is_that_of_its_tunnel() {
    let (server, down) = (Server::start(&[]), closed_port().to_string());
    let (mut client, at) = listening(&["connect", "-l", "127.0.0.7:0", "-x", &server.addr().to_string(), &down]);
    assert_eq!(at.ip().to_string(), "127.0.0.7");
    let mut local = TcpStream::connect(at).expect("it listens");
    assert_eq!(stream_end(&mut local), StreamEnd::Reset, "nothing is not to be taken for the whole");
    let (status, _, said) = client.end(TIMEOUT);
    assert_eq!(status.code(), Some(105), "{said}");
    assert!(said.ends_with("connection refused (REP 5)\n"), "{said}");
}

#[test]
fn any_number_of_connections_have_their_tunnels_and_fail_each_for_itself() {
    let server = Server::start(&[]);
    let count = std::sync::atomic::AtomicUsize::new(0);
    let target = tcp_server(V4, move |mut stream| {
        let n = count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let mut other = stream.try_clone().expect("a second handle");
        if n % 3 == 2 {
            let _ = stream.read_exact(&mut [0]);
            crate::scripted::reset(stream);
        } else {
            let _ = std::io::copy(&mut stream, &mut other);
        }
    });
    let proxy = server.addr().to_string();
    let (mut client, at) = listening(&["connect", "-l", "0", "-k", "-x", &proxy, &target.to_string()]);
    let mut locals: Vec<TcpStream> = (0..30).map(|_| TcpStream::connect(at).expect("it listens")).collect();
    let mut resets = 0;
    for local in &mut locals {
        local.set_read_timeout(Some(TIMEOUT)).expect("it can be set");
        let mut octet = [0];
        match local.write_all(b"x").and_then(|()| local.read_exact(&mut octet)) {
            Ok(()) => assert_eq!(octet, *b"x"),
            Err(_) => resets += 1,
        }
    }
    assert_eq!(resets, 10);
    assert!(client.is_running());
    // The rest is still there.
    let alive = locals.iter_mut().filter_map(|local| local.write_all(b"y").ok()).count();
    assert!(alive >= 20, "{alive}");
    drop(locals);
    server.wait_log(|log| session_lines(log).len() >= 30);
    let count = |said: &str| said.matches("read error: Connection reset").count();
    let said = client.stderr(|said| count(said) >= 10);
    assert_eq!(count(&said), 10, "{said}");
}

#[test]
fn a_local_client_that_leaves_ends_the_attempt() {
    let proxy = ScriptedServer::start(vec![Step::Greeting, Step::WaitForClose]);
    let (mut client, at) = listening(&["connect", "-l", "0", "-x", &proxy.url(), "target.example:80"]);
    let local = TcpStream::connect(at).expect("it listens");
    proxy.message();
    // Whoever has only closed his side may still want to listen, for a while.
    drop(local);
    let (status, _, said) = client.end(TIMEOUT);
    assert_eq!(status.code(), Some(56), "{said}");
    assert!(said.contains("the local client disconnected"), "{said}");
}

#[test]
fn it_comes_back_from_a_want_of_descriptors() {
    let (server, echo) = (Server::start(&[]), echo_server().to_string());
    let mut command = std::process::Command::new("sh");
    let script = "ulimit -n 24; exec \"$0\" connect -l 0 -k -x \"$1\" \"$2\"";
    command.args(["-c", script, env!("CARGO_BIN_EXE_s5"), &server.addr().to_string(), &echo]);
    let mut client = RunningProgram::start(&mut command);
    let said = client.stderr(|said| said.contains("listening on "));
    let at: SocketAddr = said.trim().trim_start_matches("listening on ").parse().expect("an address");
    let locals: Vec<TcpStream> = (0..30).map(|_| TcpStream::connect(at).expect("it listens")).collect();
    client.stderr(|said| said.contains("Too many open files"));
    drop(locals);
    wait_until("there is room again", TIMEOUT, || {
        let mut local = TcpStream::connect(at).expect("it listens");
        local.set_read_timeout(Some(Duration::from_millis(500))).expect("it can be set");
        local.write_all(b"x").is_ok() && local.read(&mut [0]).is_ok_and(|n| n == 1)
    });
    assert!(client.is_running());
}

#[test]
fn a_place_to_listen_that_makes_no_sense_or_is_taken_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let at = taken.local_addr().expect("an address").to_string();
    for (place, status) in [("x", 2), ("host:1", 2), ("70000", 2), ("", 2), (at.as_str(), 45)] {
        let output = crate::common::run(s5().args(["connect", "-l", place, "a.example:80"]), b"", TIMEOUT);
        let said = text(&output.stderr);
        assert_eq!((output.status.code(), said.lines().count()), (Some(status), 1), "{place}: {said}");
    }
}

fn udp() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a port");
    socket.set_read_timeout(Some(TIMEOUT)).expect("it can be set");
    socket
}

fn exchange(socket: &UdpSocket, at: SocketAddr, data: &[u8]) {
    socket.send_to(data, at).expect("it is sent");
    let mut buffer = [0; 2048];
    let (n, from) = socket.recv_from(&mut buffer).expect("an answer comes");
    assert_eq!((&buffer[..n], from), (data, at));
}

#[test]
fn each_local_peer_has_an_association_that_ends_when_it_is_silent() {
    let server = Server::start(&[]);
    let echo = udp_echo_server(V4).to_string();
    let proxy = server.addr().to_string();
    let (_client, at) = listening(&["udp", "-l", "0", "-i", "1500ms", "-x", &proxy, &echo]);
    let (one, two) = (udp(), udp());
    exchange(&one, at, b"of one");
    exchange(&two, at, b"of two");
    exchange(&one, at, b"of one again");
    assert_eq!(session_lines(&server.log()).len(), 0, "both are still there");
    let log = server.wait_log(|log| session_lines(log).len() >= 2);
    assert!(log.contains("up=18") && log.contains("up=6"), "{log}");
    exchange(&one, at, b"afresh");
}

#[test]
fn what_comes_while_it_associates_is_kept() {
    let server = Server::start(&[]);
    let echo = udp_echo_server(V4).to_string();
    let (_client, at) = listening(&["udp", "-l", "0", "-x", &server.addr().to_string(), &echo]);
    let socket = udp();
    for n in 0..20_u8 {
        socket.send_to(&[n], at).expect("it is sent");
    }
    for n in 0..20_u8 {
        let mut octet = [0];
        socket.recv_from(&mut octet).expect("an answer comes");
        assert_eq!(octet, [n]);
    }
}

#[test]
fn peers_are_limited_in_number() {
    let server = Server::start(&[]);
    let echo = udp_echo_server(V4).to_string();
    let (client, at) = listening(&["udp", "-l", "0", "--max-peers", "2", "-x", &server.addr().to_string(), &echo]);
    let (one, two, three) = (udp(), udp(), udp());
    exchange(&one, at, b"one");
    exchange(&two, at, b"two");
    three.send_to(b"three", at).expect("it is sent");
    client.stderr(|said| said.contains("too many peers"));
    exchange(&one, at, b"one still");
    three.set_read_timeout(Some(Duration::from_millis(200))).expect("it can be set");
    assert!(three.recv_from(&mut [0; 16]).is_err());
}

#[test]
fn a_lost_association_is_told_and_the_next_datagram_gets_a_new_one() {
    let relay = UdpSocket::bind("127.0.0.1:0").expect("a port");
    let bnd = crate::scripted::success_reply(relay.local_addr().expect("an address"));
    let (told, tell) = std::sync::mpsc::channel::<()>();
    let script = reply_with(&bnd).into_iter().chain([crate::scripted::with_stream(move |stream| {
        let _ = tell.recv();
        drop(stream);
    })]);
    let proxy = ScriptedServer::start(script.collect());
    let (mut client, at) = listening(&["udp", "-l", "0", "-x", &proxy.url(), "192.0.2.7:7"]);
    let socket = udp();
    socket.send_to(b"x", at).expect("it is sent");
    relay.recv_from(&mut [0; 64]).expect("it comes");
    drop(told);
    client.stderr(|said| said.contains("the proxy ended the association"));
    assert!(client.is_running());
    socket.send_to(b"y", at).expect("it is sent");
    client.stderr(|said| said.contains("connection refused (is the proxy running?)"));
    assert!(client.is_running());
}

#[test]
fn answers_of_strangers_are_not_handed_on() {
    let relay = UdpSocket::bind("127.0.0.1:0").expect("a port");
    let bnd = crate::scripted::success_reply(relay.local_addr().expect("an address"));
    let hold = crate::scripted::with_stream(|mut stream| drop(std::io::copy(&mut stream, &mut std::io::sink())));
    let proxy = ScriptedServer::start(reply_with(&bnd).into_iter().chain([hold]).collect());
    let (_client, at) = listening(&["udp", "-l", "0", "-x", &proxy.url(), "192.0.2.7:7"]);
    let socket = udp();
    socket.send_to(b"x", at).expect("it is sent");
    let (_, from) = relay.recv_from(&mut [0; 64]).expect("it comes");
    let datagram = |last: u8, data: &[u8]| [&[0, 0, 0, 1, 192, 0, 2, last, 0, 7][..], data].concat();
    relay.send_to(&datagram(8, b"evil"), from).expect("it is sent");
    relay.send_to(&datagram(7, b"good"), from).expect("it is sent");
    let mut buffer = [0; 16];
    let (n, _) = socket.recv_from(&mut buffer).expect("an answer comes");
    assert_eq!(&buffer[..n], b"good");
}

#[test]
fn a_local_client_that_only_wants_to_listen_gets_what_the_target_says() {
    let server = Server::start(&[]);
    let target = tcp_server(V4, |mut stream| drop(stream.write_all(b"banner"))).to_string();
    let (mut client, at) = listening(&["connect", "-l", "0", "-x", &server.addr().to_string(), &target]);
    let mut local = TcpStream::connect(at).expect("it listens");
    local.shutdown(Shutdown::Write).expect("it can be");
    assert_eq!(stream_end(&mut local), StreamEnd::Closed(b"banner".to_vec()));
    assert_eq!(client.end(TIMEOUT).0.code(), Some(0));
}

#[test]
fn a_peer_that_goes_on_sending_to_a_dead_proxy_does_not_make_an_attempt_of_each_datagram() {
    let down = closed_port().to_string();
    let (client, at) = listening(&["udp", "-l", "0", "-x", &down, "192.0.2.7:7"]);
    let socket = udp();
    for _ in 0..200 {
        socket.send_to(b"x", at).expect("it is sent");
        std::thread::sleep(Duration::from_millis(1));
    }
    let said = client.stderr(|said| said.contains("connection refused"));
    assert!(said.lines().count() < 5, "{said}");
}

#[test]
fn each_association_tells_what_went_through_it() {
    let server = Server::start(&[]);
    let echo = udp_echo_server(V4).to_string();
    let args = ["udp", "-l", "0", "-i", "300ms", "--json", "-x", &server.addr().to_string(), &echo];
    let (client, at) = listening(&args);
    exchange(&udp(), at, b"seven..");
    let said = client.stderr(|said| said.contains("\"up\":"));
    assert!(said.contains("\"up\":7,\"down\":7") && !said.contains("\"first_byte\":null"), "{said}");
}
