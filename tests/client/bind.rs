//! `s5 bind`, through `s5 serve` and against scripted proxies.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

use crate::support::scripted::{
    RunningProgram, SUCCESS_REPLY, ScriptedServer, Step, reply_with, send, success_reply, text, with_stream,
};
use crate::support::{Server, TIMEOUT, retry, run, s5};

/// Connects from the address `from`.
fn connect_from(from: &str, to: SocketAddr) -> TcpStream {
    let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None);
    let socket = socket.expect("socket created");
    let from: SocketAddr = from.parse().expect("valid address");
    socket.bind(&from.into()).expect("the source address is local");
    socket.connect(&to.into()).expect("the listener accepts");
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    stream
}

/// Starts `s5 bind` and waits for the bound address.
fn start_bind(args: &[&str]) -> (RunningProgram, SocketAddr) {
    let client = RunningProgram::start(s5().arg("bind").args(args));
    let stderr =
        client.stderr(|stderr| stderr.lines().any(|line| line.starts_with("bound ")) && stderr.ends_with('\n'));
    let line = stderr.lines().find_map(|line| line.strip_prefix("bound ")).expect("a line with the bound address");
    (client, line.parse().expect("valid address"))
}

/// Exchanges data in both directions over a connection that `s5 bind` has accepted, until both directions have ended.
fn exchange_data(mut client: RunningProgram, mut peer: TcpStream) {
    let from = peer.local_addr().expect("local address");
    let stderr = client.stderr(|stderr| stderr.contains("accepted ") && stderr.ends_with('\n'));
    assert_eq!(stderr.lines().filter(|line| *line == format!("accepted {from}")).count(), 1, "{stderr}");
    client.write(b"from the client");
    client.close_stdin();
    let mut received = Vec::new();
    peer.read_to_end(&mut received).expect("data received");
    assert_eq!(text(&received), "from the client");
    peer.write_all(b"from the peer").expect("data sent");
    drop(peer);
    let (status, stdout, stderr) = client.wait_exit(TIMEOUT);
    assert_eq!((status.code(), text(&stdout)), (Some(0), "from the peer".into()), "{stderr}");
}

#[test]
fn bind_reports_address_and_peer_and_relays_both_directions() {
    let server = Server::start(&[]);
    let proxy = server.addr().to_string();
    for peer in [&["-x", &proxy][..], &["-x", &proxy, "127.0.0.1"], &["-x", &proxy, "localhost"]] {
        let (client, at) = start_bind(peer);
        assert!(at.ip().is_loopback() && at.port() != 0, "{at}");
        let peer = TcpStream::connect(at).expect("the listener accepts");
        exchange_data(client, peer);
    }
}

#[test]
fn bind_accepts_expected_ipv6_peer() {
    let server = Server::start(&[]);
    let (client, at) = start_bind(&["-x", &server.addr().to_string(), "::1"]);
    assert!(at.is_ipv6(), "{at}");
    exchange_data(client, TcpStream::connect(at).expect("the listener accepts"));
}

#[test]
fn bind_prints_two_lines_on_stderr_and_only_data_on_stdout() {
    let server = Server::start(&[]);
    let (mut client, at) = start_bind(&["-x", &server.addr().to_string()]);
    let peer = TcpStream::connect(at).expect("the listener accepts");
    let from = peer.local_addr().expect("local address");
    drop(peer);
    let (status, stdout, stderr) = client.wait_exit(TIMEOUT);
    assert_eq!((status.code(), stdout.len()), (Some(0), 0), "{stderr}");
    assert_eq!(stderr, format!("bound {at}\naccepted {from}\n"));
}

#[test]
fn bind_rejects_other_peer_and_keeps_waiting() {
    let server = Server::start(&[]);
    let (mut client, at) = start_bind(&["-x", &server.addr().to_string(), "127.0.0.2"]);
    let mut other_peer = connect_from("127.0.0.3:0", at);
    let received = retry(|| other_peer.read(&mut [0; 1]));
    assert!(!matches!(received, Ok(1..)), "the other peer received data");
    assert!(client.is_running());
    assert!(!client.stderr(|_| true).contains("accepted"), "the other peer was accepted");
    exchange_data(client, connect_from("127.0.0.2:0", at));
}

#[test]
fn bind_timeout_of_the_server_has_status_106() {
    let server = Server::start(&["--bind-timeout", "200ms"]);
    let proxy = server.addr().to_string();
    let output = run(s5().args(["bind", "-x", &proxy]), b"", TIMEOUT);
    let stderr = text(&output.stderr);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(106), 0), "{stderr}");
    let line = format!("s5: proxy {proxy}: waiting for the peer: TTL expired (REP 6)");
    assert_eq!(stderr.lines().last(), Some(line.as_str()), "{stderr}");
}

#[test]
fn option_w_limits_the_wait_for_the_peer() {
    let server = Server::start(&[]);
    let (mut client, _) = start_bind(&["-w", "500ms", "-x", &server.addr().to_string(), "192.0.2.1"]);
    let (status, _, stderr) = client.wait_exit(TIMEOUT);
    let reason = "waiting for the peer, for 192.0.2.1:0: timed out after 500ms";
    assert_eq!(status.code(), Some(28), "{stderr}");
    assert_eq!(stderr.lines().last(), Some(&*format!("s5: proxy {}: {reason}", server.addr())));
}

#[test]
fn each_failure_of_the_second_reply_has_its_status() {
    let closed = "the proxy closed the connection";
    let table: [(Vec<Step>, i32, &str); 7] = [
        (vec![], 97, closed),
        (vec![send(&SUCCESS_REPLY[..6])], 97, closed),
        (vec![Step::Reset], 97, "connection reset by peer"),
        (vec![send(&[5, 2, 0, 1, 0, 0, 0, 0, 0, 0])], 102, "not allowed by ruleset (REP 2)"),
        (vec![send(&[5, 6])], 106, "TTL expired (REP 6)"),
        (vec![send(&[4, 0, 0, 1, 0, 0, 0, 0, 0, 0])], 97, "not a SOCKS5 server (first byte 0x04, SOCKS4?)"),
        (vec![send(&[5, 0, 0, 9, 0, 0, 0, 0, 0, 0])], 97, "not a SOCKS5 server (unknown address type 9)"),
    ];
    for (second, status, reason) in table {
        let first = success_reply(([127, 0, 0, 1], 4321).into());
        let proxy = ScriptedServer::start(reply_with(&first).into_iter().chain(second).collect());
        let output = run(s5().args(["bind", "-x", &proxy.url(), "192.0.2.1"]), b"", TIMEOUT);
        let line = format!("s5: proxy {}: waiting for the peer, for 192.0.2.1:0: {reason}", proxy.addr);
        let lines = format!("bound 127.0.0.1:4321\n{line}\n");
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(status), lines));
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn unspecified_bnd_is_replaced_by_proxy_address() {
    let proxy = ScriptedServer::start_at("127.0.0.7:0".parse().expect("valid address"), {
        let first = success_reply(([0, 0, 0, 0], 4321).into());
        let second = success_reply(([192, 0, 2, 1], 20).into());
        reply_with(&first).into_iter().chain([send(&second)]).collect()
    });
    let output = run(s5().args(["bind", "-x", &proxy.url()]), b"", TIMEOUT);
    assert_eq!(text(&output.stderr), "bound 127.0.0.7:4321\naccepted 192.0.2.1:20\n");
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn both_replies_and_first_data_in_one_segment_are_accepted() {
    let replies = [
        success_reply(([127, 0, 0, 1], 4321).into()),
        b"\x05\x00\x00\x03\x0bpeer.exampl\x00\x14".to_vec(),
        b"hello".to_vec(),
    ];
    let proxy = ScriptedServer::start(reply_with(&replies.concat()));
    let output = run(s5().args(["bind", "-x", &proxy.url()]), b"", TIMEOUT);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "hello".into()));
    assert_eq!(text(&output.stderr), "bound 127.0.0.1:4321\naccepted peer.exampl:20\n");
}

#[test]
fn stdin_is_not_sent_before_the_peer_connects() {
    let (sender, receiver) = std::sync::mpsc::channel();
    let wait = with_stream(move |mut stream| {
        stream.set_read_timeout(Some(std::time::Duration::from_millis(100))).expect("timeout set");
        let _ = sender.send(retry(|| stream.read(&mut [0; 1])).is_err());
        stream.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
        let _ = stream.write_all(SUCCESS_REPLY);
        let mut received = Vec::new();
        let _ = stream.read_to_end(&mut received);
        let _ = stream.write_all(&received);
    });
    let proxy = ScriptedServer::start(reply_with(SUCCESS_REPLY).into_iter().chain([wait]).collect());
    let output = run(s5().args(["bind", "-x", &proxy.url()]), b"for the peer", TIMEOUT);
    assert_eq!(receiver.recv_timeout(TIMEOUT), Ok(true), "data was sent before the peer connected");
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "for the peer".into()));
}

#[test]
fn bind_through_a_chain_is_sent_to_the_last_proxy() {
    let servers = [Server::start(&[]), Server::start(&[]), Server::start(&[])];
    let chain: Vec<String> = servers.iter().map(|server| server.addr().to_string()).collect();
    let (client, at) = start_bind(&["-x", &chain.join(",")]);
    exchange_data(client, TcpStream::connect(at).expect("the listener accepts"));
}
