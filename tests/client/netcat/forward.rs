//! `s5 connect -l` and `s5 udp -l`: local ports forwarded through the proxy.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use crate::support::scripted::{RunningProgram, ScriptedServer, Step, reply_with, text};
use crate::support::{
    Server, StreamEnd, TIMEOUT, V4, closed_port, echo_server, retry, s5, session_lines, stream_end, tcp_server,
    udp_echo_server, wait_until,
};

/// Starts a client with -l. Returns it and the address that it listens on.
fn start_forward(args: &[&str]) -> (RunningProgram, SocketAddr) {
    let client = RunningProgram::start(s5().args(args));
    let stderr = client.stderr(|stderr| stderr.lines().any(|line| line.starts_with("listening on ")));
    let line = stderr.lines().find_map(|line| line.strip_prefix("listening on ")).expect("the address is printed");
    (client, line.parse().expect("valid address"))
}

fn assert_echo(stream: &mut TcpStream, bytes: &[u8]) {
    stream.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    stream.write_all(bytes).expect("data sent");
    let mut echo = vec![0; bytes.len()];
    stream.read_exact(&mut echo).expect("the echo arrives");
    assert!(echo == bytes);
}

#[test]
fn forward_without_k_serves_one_connection() {
    let (server, echo) = (Server::start(&[]), echo_server().to_string());
    let (mut client, at) = start_forward(&["connect", "-l", "0", "-x", &server.addr().to_string(), &echo]);
    assert_eq!(at.ip(), V4, "-l PORT does not listen on loopback");
    let mut local = TcpStream::connect(at).expect("the listener accepts");
    assert_echo(&mut local, b"hello");
    assert!(TcpStream::connect(at).is_err(), "a second connection is accepted");
    local.shutdown(Shutdown::Write).expect("half-closed");
    assert_eq!(stream_end(&mut local), StreamEnd::Closed(Vec::new()));
    assert_eq!(client.wait_exit(TIMEOUT).0.code(), Some(0));
}

#[test]
fn forward_without_k_exits_with_the_status_of_its_tunnel() {
    let (server, down) = (Server::start(&[]), closed_port().to_string());
    let (mut client, at) = start_forward(&["connect", "-l", "127.0.0.7:0", "-x", &server.addr().to_string(), &down]);
    assert_eq!(at.ip().to_string(), "127.0.0.7");
    let mut local = TcpStream::connect(at).expect("the listener accepts");
    assert_eq!(
        stream_end(&mut local),
        StreamEnd::Reset,
        "a failed tunnel is reset, since a FIN would be an empty answer"
    );
    let (status, _, stderr) = client.wait_exit(TIMEOUT);
    assert_eq!(status.code(), Some(105), "{stderr}");
    assert!(stderr.ends_with("connection refused (REP 5)\n"), "{stderr}");
}

#[test]
fn forward_k_serves_many_connections_that_fail_independently() {
    let server = Server::start(&[]);
    let count = std::sync::atomic::AtomicUsize::new(0);
    let target = tcp_server(V4, move |mut stream| {
        let n = count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let mut other = stream.try_clone().expect("cloned");
        if n % 3 == 2 {
            let _ = stream.read_exact(&mut [0]);
            crate::support::scripted::reset(stream);
        } else {
            let _ = std::io::copy(&mut stream, &mut other);
        }
    });
    let proxy = server.addr().to_string();
    let (mut client, at) = start_forward(&["connect", "-l", "0", "-k", "-x", &proxy, &target.to_string()]);
    let mut locals: Vec<TcpStream> = (0..30).map(|_| TcpStream::connect(at).expect("the listener accepts")).collect();
    let mut resets = 0;
    for local in &mut locals {
        local.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
        let mut byte = [0];
        match local.write_all(b"x").and_then(|()| local.read_exact(&mut byte)) {
            Ok(()) => assert_eq!(byte, *b"x"),
            Err(_) => resets += 1,
        }
    }
    assert_eq!(resets, 10);
    assert!(client.is_running());
    // The other connections are still open.
    let open = locals.iter_mut().filter_map(|local| local.write_all(b"y").ok()).count();
    assert!(open >= 20, "{open}");
    drop(locals);
    server.wait_log(|log| session_lines(log).len() >= 30);
    let count = |stderr: &str| stderr.matches("read error: connection reset").count();
    let stderr = client.stderr(|stderr| count(stderr) >= 10);
    assert_eq!(count(&stderr), 10, "{stderr}");
}

#[test]
fn forward_aborts_handshake_when_local_client_disconnects() {
    let proxy = ScriptedServer::start(vec![Step::Greeting, Step::WaitForClose]);
    let (mut client, at) = start_forward(&["connect", "-l", "0", "-x", &proxy.url(), "target.example:80"]);
    let local = TcpStream::connect(at).expect("the listener accepts");
    proxy.message();
    // s5 waits before it aborts, since a local client may close its sending side and still read.
    drop(local);
    let (status, _, stderr) = client.wait_exit(TIMEOUT);
    assert_eq!(status.code(), Some(56), "{stderr}");
    assert!(stderr.contains("the local client disconnected"), "{stderr}");
}

#[test]
fn forward_recovers_from_descriptor_exhaustion() {
    let (server, echo) = (Server::start(&[]), echo_server().to_string());
    let mut command = std::process::Command::new("sh");
    let script = "ulimit -n 24; exec \"$0\" connect -l 0 -k -x \"$1\" \"$2\"";
    command.args(["-c", script, env!("CARGO_BIN_EXE_s5"), &server.addr().to_string(), &echo]);
    let mut client = RunningProgram::start(&mut command);
    let stderr = client.stderr(|stderr| stderr.contains("listening on "));
    let at: SocketAddr = stderr.trim().trim_start_matches("listening on ").parse().expect("valid address");
    let locals: Vec<TcpStream> = (0..30).map(|_| TcpStream::connect(at).expect("the listener accepts")).collect();
    client.stderr(|stderr| stderr.contains("too many open files"));
    drop(locals);
    wait_until("connections are forwarded again", TIMEOUT, || {
        let mut local = TcpStream::connect(at).expect("the listener accepts");
        local.set_read_timeout(Some(Duration::from_millis(500))).expect("timeout set");
        local.write_all(b"x").is_ok() && retry(|| local.read(&mut [0])).is_ok_and(|n| n == 1)
    });
    assert!(client.is_running());
}

#[test]
fn invalid_listen_address_or_port_in_use_is_an_error() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("free port");
    let at = taken.local_addr().expect("local address").to_string();
    for (listen, status) in [("x", 2), ("host:1", 2), ("70000", 2), ("", 2), (at.as_str(), 45)] {
        let output = crate::support::run(s5().args(["connect", "-l", listen, "a.example:80"]), b"", TIMEOUT);
        let stderr = text(&output.stderr);
        assert_eq!((output.status.code(), stderr.lines().count()), (Some(status), 1), "{listen}: {stderr}");
    }
}

fn udp_socket() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("free port");
    socket.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    socket
}

fn exchange(socket: &UdpSocket, at: SocketAddr, data: &[u8]) {
    socket.send_to(data, at).expect("datagram sent");
    let mut buffer = [0; 2048];
    let (n, from) = retry(|| socket.recv_from(&mut buffer)).expect("answer received");
    assert_eq!((&buffer[..n], from), (data, at));
}

#[test]
fn udp_forward_opens_one_association_for_each_peer_until_idle() {
    let server = Server::start(&[]);
    let echo = udp_echo_server(V4).to_string();
    let proxy = server.addr().to_string();
    let (_client, at) = start_forward(&["udp", "-l", "0", "-i", "1500ms", "-x", &proxy, &echo]);
    let (one, two) = (udp_socket(), udp_socket());
    exchange(&one, at, b"from 1");
    exchange(&two, at, b"from 2");
    exchange(&one, at, b"from 1 again");
    assert_eq!(session_lines(&server.log()).len(), 0, "an association has ended");
    let log = server.wait_log(|log| session_lines(log).len() >= 2);
    assert!(log.contains("up=18") && log.contains("up=6"), "{log}");
    exchange(&one, at, b"a new association");
}

#[test]
fn udp_forward_queues_datagrams_until_the_association_is_open() {
    let server = Server::start(&[]);
    let echo = udp_echo_server(V4).to_string();
    let (_client, at) = start_forward(&["udp", "-l", "0", "-x", &server.addr().to_string(), &echo]);
    let socket = udp_socket();
    for n in 0..20_u8 {
        socket.send_to(&[n], at).expect("datagram sent");
    }
    for n in 0..20_u8 {
        let mut byte = [0];
        retry(|| socket.recv_from(&mut byte)).expect("answer received");
        assert_eq!(byte, [n]);
    }
}

#[test]
fn udp_forward_limits_peers() {
    let server = Server::start(&[]);
    let echo = udp_echo_server(V4).to_string();
    let (client, at) = start_forward(&["udp", "-l", "0", "--max-peers", "2", "-x", &server.addr().to_string(), &echo]);
    let (one, two, three) = (udp_socket(), udp_socket(), udp_socket());
    exchange(&one, at, b"one");
    exchange(&two, at, b"two");
    three.send_to(b"three", at).expect("datagram sent");
    client.stderr(|stderr| stderr.contains("too many peers"));
    exchange(&one, at, b"one again");
    three.set_read_timeout(Some(Duration::from_millis(200))).expect("timeout set");
    assert!(retry(|| three.recv_from(&mut [0; 16])).is_err());
}

#[test]
fn udp_forward_reports_lost_association_and_opens_a_new_one() {
    let relay = UdpSocket::bind("127.0.0.1:0").expect("free port");
    let bnd = crate::support::scripted::success_reply(relay.local_addr().expect("local address"));
    let (disconnect, disconnected) = std::sync::mpsc::channel::<()>();
    let script = reply_with(&bnd).into_iter().chain([crate::support::scripted::with_stream(move |stream| {
        let _ = disconnected.recv();
        drop(stream);
    })]);
    let proxy = ScriptedServer::start(script.collect());
    let (mut client, at) = start_forward(&["udp", "-l", "0", "-x", &proxy.url(), "192.0.2.7:7"]);
    let socket = udp_socket();
    socket.send_to(b"x", at).expect("datagram sent");
    retry(|| relay.recv_from(&mut [0; 64])).expect("datagram received");
    drop(disconnect);
    client.stderr(|stderr| stderr.contains("the proxy ended the association"));
    assert!(client.is_running());
    socket.send_to(b"y", at).expect("datagram sent");
    client.stderr(|stderr| stderr.contains("connection refused (is the proxy running?)"));
    assert!(client.is_running());
}

#[test]
fn udp_forward_drops_answers_from_other_addresses() {
    let relay = UdpSocket::bind("127.0.0.1:0").expect("free port");
    let bnd = crate::support::scripted::success_reply(relay.local_addr().expect("local address"));
    let hold =
        crate::support::scripted::with_stream(|mut stream| drop(std::io::copy(&mut stream, &mut std::io::sink())));
    let proxy = ScriptedServer::start(reply_with(&bnd).into_iter().chain([hold]).collect());
    let (_client, at) = start_forward(&["udp", "-l", "0", "-x", &proxy.url(), "192.0.2.7:7"]);
    let socket = udp_socket();
    socket.send_to(b"x", at).expect("datagram sent");
    let (_, from) = retry(|| relay.recv_from(&mut [0; 64])).expect("datagram received");
    let datagram = |last: u8, data: &[u8]| [&[0, 0, 0, 1, 192, 0, 2, last, 0, 7][..], data].concat();
    relay.send_to(&datagram(8, b"evil"), from).expect("datagram sent");
    relay.send_to(&datagram(7, b"good"), from).expect("datagram sent");
    let mut buffer = [0; 16];
    let (n, _) = retry(|| socket.recv_from(&mut buffer)).expect("answer received");
    assert_eq!(&buffer[..n], b"good");
}

#[test]
fn forward_serves_local_client_that_only_reads() {
    let server = Server::start(&[]);
    let target = tcp_server(V4, |mut stream| drop(stream.write_all(b"banner"))).to_string();
    let (mut client, at) = start_forward(&["connect", "-l", "0", "-x", &server.addr().to_string(), &target]);
    let mut local = TcpStream::connect(at).expect("the listener accepts");
    local.shutdown(Shutdown::Write).expect("half-closed");
    assert_eq!(stream_end(&mut local), StreamEnd::Closed(b"banner".to_vec()));
    assert_eq!(client.wait_exit(TIMEOUT).0.code(), Some(0));
}

#[test]
fn udp_forward_limits_tries_to_reach_a_proxy_that_is_down() {
    let down = closed_port().to_string();
    let (client, at) = start_forward(&["udp", "-l", "0", "-x", &down, "192.0.2.7:7"]);
    let socket = udp_socket();
    for _ in 0..200 {
        socket.send_to(b"x", at).expect("datagram sent");
        std::thread::sleep(Duration::from_millis(1));
    }
    let stderr = client.stderr(|stderr| stderr.contains("connection refused"));
    assert!(stderr.lines().count() < 5, "{stderr}");
}

#[test]
fn udp_forward_json_reports_each_association() {
    let server = Server::start(&[]);
    let echo = udp_echo_server(V4).to_string();
    let args = ["udp", "-l", "0", "-i", "300ms", "--json", "-x", &server.addr().to_string(), &echo];
    let (client, at) = start_forward(&args);
    exchange(&udp_socket(), at, b"seven..");
    let stderr = client.stderr(|stderr| stderr.contains("\"up\":"));
    assert!(stderr.contains("\"up\":7,\"down\":7") && !stderr.contains("\"first_byte\":null"), "{stderr}");
}
