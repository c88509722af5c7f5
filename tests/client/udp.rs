//! `s5 udp`, through `s5 serve` and against scripted proxies.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::os::unix::process::ExitStatusExt as _;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use crate::support::scripted::{RunningProgram, ScriptedServer, reply_with, success_reply, text, with_stream};
use crate::support::{Server, TIMEOUT, in_namespace, retry, run, s5, udp_echo_server};

const TARGET: &str = "192.0.2.7:7";
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A UDP socket with a read timeout.
fn socket(at: &str) -> UdpSocket {
    let socket = UdpSocket::bind(at).expect("free port");
    socket.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    socket
}

fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = vec![0; 65_536];
    let (n, from) = retry(|| socket.recv_from(&mut buffer)).expect("datagram received");
    buffer.truncate(n);
    (buffer, from)
}

/// The header of a datagram (RFC 1928 section 7) for or from `192.0.2.7:7`, and a payload.
fn datagram(payload: &[u8]) -> Vec<u8> {
    [&[0, 0, 0, 1, 192, 0, 2, 7, 0, 7][..], payload].concat()
}

/// A function that ends a control connection.
type ControlEnd = fn(TcpStream);

/// A proxy that replies with `bnd` as its relay. The returned sender ends the control connection.
fn associating_proxy(bnd: SocketAddr) -> (ScriptedServer, Sender<ControlEnd>) {
    let (sender, receiver) = channel::<ControlEnd>();
    let hold = with_stream(move |stream| {
        if let Ok(end) = receiver.recv() {
            end(stream);
        }
    });
    (ScriptedServer::start(reply_with(&success_reply(bnd)).into_iter().chain([hold]).collect()), sender)
}

/// Starts a client. The test acts as its relay.
fn start(args: &[&str], target: &str) -> (RunningProgram, UdpSocket, Sender<ControlEnd>) {
    let relay = socket("127.0.0.1:0");
    let (proxy, control) = associating_proxy(relay.local_addr().expect("local address"));
    let client = RunningProgram::start(s5().arg("udp").args(args).args(["-x", &proxy.url(), target]));
    (client, relay, control)
}

#[test]
fn udp_sends_each_line_as_a_datagram_and_prints_each_answer_as_a_line() {
    let server = Server::start(&[]);
    let proxy = server.addr().to_string();
    for ip in [LOOPBACK, Ipv6Addr::LOCALHOST.into()] {
        let target = udp_echo_server(ip).to_string();
        let lines = b"one\ntwo\n\nbinary \x00\xff\r\nno end";
        let mut client = RunningProgram::start(s5().args(["udp", "-w", "10", "-x", &proxy, &target]));
        client.write(lines);
        client.close_stdin();
        let received = client.stdout(|bytes| bytes.len() > lines.len());
        assert_eq!(text(&received), text(b"one\ntwo\n\nbinary \x00\xff\r\nno end\n"), "{ip}");
        assert!(client.is_running(), "the client ended while waiting for answers");
    }
}

#[test]
fn udp_header_has_the_address_of_the_target() {
    let v6 = [&[0, 0, 0, 4][..], &[0; 15], &[1, 0, 7]].concat();
    let name = [&[0, 0, 0, 3, 14][..], b"target.example", &[0, 7]].concat();
    for (target, header) in [(TARGET, datagram(b"")), ("[::1]:7", v6), ("target.example:7", name)] {
        let (mut client, relay, _control) = start(&[], target);
        client.write(b"payload\n\n");
        assert_eq!(receive(&relay).0, [&header[..], b"payload"].concat());
        // An empty line is a datagram too.
        assert_eq!(receive(&relay).0, header);
    }
}

#[test]
fn udp_prints_an_empty_answer_as_an_empty_line() {
    let (mut client, relay, _control) = start(&[], TARGET);
    client.write(b"x\n");
    let (_, from) = receive(&relay);
    for payload in [&b""[..], b"two\nlines", b""] {
        relay.send_to(&datagram(payload), from).expect("datagram sent");
    }
    client.stdout(|bytes| bytes == b"\ntwo\nlines\n\n");
}

#[test]
fn udp_raw_writes_answers_unchanged() {
    let (mut client, relay, _control) = start(&["--raw"], TARGET);
    client.write(b"x\ny\n");
    let (bytes, from) = receive(&relay);
    assert_eq!(bytes, datagram(b"x\ny\n"));
    for payload in [&b"\x00\xff"[..], b"", b"two\nlines", b"."] {
        relay.send_to(&datagram(payload), from).expect("datagram sent");
    }
    client.stdout(|bytes| bytes == b"\x00\xfftwo\nlines.");
}

#[test]
fn udp_raw_sends_each_read_as_one_datagram() {
    let (mut client, relay, _control) = start(&["--raw"], TARGET);
    for round in 0..200_u8 {
        client.write(&[round; 10_000]);
        assert_eq!(receive(&relay).0.len(), datagram(&[round; 10_000]).len(), "datagram {round}");
    }
}

#[test]
fn udp_datagram_of_maximum_size_passes_in_both_directions() {
    let server = Server::start(&[]);
    let (proxy, target) = (server.addr().to_string(), udp_echo_server(LOOPBACK).to_string());
    let payload: Vec<u8> = (0..65_000_u32).map(|i| b'a' + u8::try_from(i % 26).expect("at most 255")).collect();
    let line = [&payload[..], b"\n"].concat();
    let mut lines = RunningProgram::start(s5().args(["udp", "-x", &proxy, &target]));
    lines.write(&line);
    assert!(lines.stdout(|bytes| bytes.len() >= line.len()) == line, "the returned data differs from the sent data");
    let target = socket("127.0.0.1:0");
    let addr = target.local_addr().expect("local address").to_string();
    let mut raw = RunningProgram::start(s5().args(["udp", "--raw", "-x", &proxy, &addr]));
    raw.write(&payload);
    let (bytes, from) = receive(&target);
    assert!(bytes == payload, "a datagram of {} bytes arrived", bytes.len());
    target.send_to(&bytes, from).expect("datagram sent");
    assert!(
        raw.stdout(|bytes| bytes.len() >= payload.len()) == payload,
        "the returned data differs from the sent data"
    );
}

#[test]
fn udp_line_larger_than_a_datagram_is_an_error() {
    let (mut client, _relay, _control) = start(&[], TARGET);
    client.write(&[&[b'x'; 65_528][..], b"\n"].concat());
    let (status, stdout, stderr) = client.wait_exit(TIMEOUT);
    assert_eq!((status.code(), stdout.len()), (Some(55), 0), "{stderr}");
    assert!(
        stderr.contains(&format!("transfer, for {TARGET}: write error: datagram too large: the limit is 65507 bytes")),
        "{stderr}"
    );
}

#[test]
fn udp_waits_for_answers_after_the_end_of_stdin() {
    let (mut client, relay, _control) = start(&["-w", "300ms"], TARGET);
    let started = Instant::now();
    client.write(b"x\n");
    receive(&relay);
    client.close_stdin();
    let (status, stdout, stderr) = client.wait_exit(TIMEOUT);
    assert_eq!((status.code(), stdout.len(), stderr.as_str()), (Some(0), 0, ""));
    assert!(started.elapsed() >= Duration::from_millis(300), "the client ended too early");

    let (mut client, relay, _control) = start(&["-w", "10"], TARGET);
    client.write(b"x\n");
    client.close_stdin();
    let (_, from) = receive(&relay);
    std::thread::sleep(Duration::from_millis(300));
    relay.send_to(&datagram(b"late"), from).expect("datagram sent");
    client.stdout(|bytes| bytes == b"late\n");
}

#[test]
fn udp_wait_of_zero_is_accepted() {
    let relay = socket("127.0.0.1:0");
    let (proxy, _control) = associating_proxy(relay.local_addr().expect("local address"));
    let output = run(s5().args(["udp", "-w", "0", "-x", &proxy.url(), TARGET]), b"x\n", TIMEOUT);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(receive(&relay).0, datagram(b"x"));
}

#[test]
fn udp_unspecified_relay_address_is_replaced_by_proxy_address() {
    for zeros in [IpAddr::V4(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()] {
        let at = "127.0.0.8:0";
        let relay = socket(at);
        let bnd = SocketAddr::new(zeros, relay.local_addr().expect("local address").port());
        let at = at.parse().expect("valid address");
        let proxy = ScriptedServer::start_at(
            at,
            reply_with(&success_reply(bnd)).into_iter().chain([with_stream(hold)]).collect(),
        );
        let mut client = RunningProgram::start(s5().args(["udp", "-x", &proxy.url(), TARGET]));
        client.write(b"found\n");
        assert_eq!(receive(&relay).0, datagram(b"found"));
    }
}

/// Keeps a control connection open until the client closes it.
fn hold(mut stream: TcpStream) {
    let _ = std::io::copy(&mut stream, &mut std::io::sink());
}

#[test]
fn udp_datagram_from_another_sender_is_ignored() {
    let (mut client, relay, _control) = start(&[], TARGET);
    client.write(b"x\n");
    let (_, from) = receive(&relay);
    for stranger in ["127.0.0.1:0", "127.0.0.2:0"] {
        // The kernel may already reject the datagram here.
        let _ = socket(stranger).send_to(&datagram(b"from a stranger"), from);
    }
    relay.send_to(&datagram(b"from the relay"), from).expect("datagram sent");
    assert_eq!(text(&client.stdout(|bytes| bytes.ends_with(b"relay\n"))), "from the relay\n");
}

#[test]
fn udp_invalid_datagram_is_ignored() {
    let (mut client, relay, _control) = start(&[], TARGET);
    client.write(b"x\n");
    let (_, from) = receive(&relay);
    let broken: [&[u8]; 7] = [
        b"",
        &[0],
        &[0, 0, 0],
        &[0, 0, 0, 1, 192, 0, 2],
        &[0, 0, 0, 9, 192, 0, 2, 7, 0, 7, b'x'],
        &[0, 0, 0, 3, 200, b'x'],
        // A fragment without the last one.
        &[0, 0, 1, 1, 192, 0, 2, 7, 0, 7, b'x'],
    ];
    for bytes in broken {
        relay.send_to(bytes, from).expect("datagram sent");
    }
    relay.send_to(&datagram(b"whole"), from).expect("datagram sent");
    assert_eq!(text(&client.stdout(|bytes| bytes.ends_with(b"whole\n"))), "whole\n");
}

#[test]
fn udp_fragmented_answer_is_reassembled() {
    let (mut client, relay, _control) = start(&[], TARGET);
    client.write(b"x\n");
    let (_, from) = receive(&relay);
    for (frag, payload) in [(1, &b"one "[..]), (2, b"two "), (0x83, b"three")] {
        let mut bytes = datagram(payload);
        bytes[2] = frag;
        relay.send_to(&bytes, from).expect("datagram sent");
    }
    client.stdout(|bytes| bytes == b"one two three\n");
}

#[test]
fn udp_exits_with_status_56_when_the_control_connection_closes() {
    let ends: [ControlEnd; 3] =
        [drop, crate::support::scripted::reset, |stream| drop(stream.shutdown(Shutdown::Write).map(|()| hold(stream)))];
    for end in ends {
        let relay = socket("127.0.0.1:0");
        let (proxy, control) = associating_proxy(relay.local_addr().expect("local address"));
        let mut client = RunningProgram::start(s5().args(["udp", "-x", &proxy.url(), TARGET]));
        client.write(b"x\n");
        let (_, from) = receive(&relay);
        relay.send_to(&datagram(b"answer"), from).expect("datagram sent");
        control.send(end).expect("the script continues");
        let (status, stdout, stderr) = client.wait_exit(Duration::from_secs(2));
        let reason = format!("transfer, for {TARGET}: the proxy ended the association");
        let line = format!("s5: proxy {}: {reason}\n", proxy.addr);
        assert_eq!((status.code(), stderr), (Some(56), line));
        assert_eq!(text(&stdout), "answer\n", "answers received before the end are lost");
    }
}

#[test]
fn udp_prints_answers_while_stdin_has_unlimited_data() {
    let server = Server::start(&[]);
    let echo = udp_echo_server([127, 0, 0, 1].into());
    let lines: String = (0..2000).map(|n| format!("{n}\n")).collect();
    let args = ["udp", "-w", "300ms", "-x", &server.addr().to_string(), &echo.to_string()];
    let output = run(s5().args(args), lines.as_bytes(), TIMEOUT);
    // UDP may lose datagrams. A client that only sends would receive the few hundred that fit into its socket buffer.
    let answers = text(&output.stdout).lines().count();
    assert!(answers > 400, "{answers} of 2000");
}

#[test]
fn udp_icmp_error_does_not_end_the_client() {
    let server = Server::start(&[]);
    let target = socket("127.0.0.1:0");
    let addr = target.local_addr().expect("local address");
    drop(target);
    let mut client = RunningProgram::start(s5().args(["udp", "-x", &server.addr().to_string(), &addr.to_string()]));
    client.write(b"lost\nlost too\n");
    // Datagrams are relayed to a target that starts later.
    let Ok(target) = UdpSocket::bind(addr) else { return };
    target.set_read_timeout(Some(Duration::from_millis(50))).expect("timeout set");
    let deadline = Instant::now() + TIMEOUT;
    let mut buffer = [0; 64];
    let from = loop {
        client.write(b"hello\n");
        match retry(|| target.recv_from(&mut buffer)) {
            Ok((_, from)) => break from,
            Err(_) => assert!(Instant::now() < deadline, "no datagram arrives"),
        }
    };
    target.send_to(b"here", from).expect("datagram sent");
    client.stdout(|bytes| bytes.ends_with(b"here\n"));
}

#[test]
fn udp_exits_without_message_when_stdout_is_closed() {
    let server = Server::start(&[]);
    let target = udp_echo_server(LOOPBACK).to_string();
    let mut command = s5();
    command.args(["udp", "-x", &server.addr().to_string(), &target]);
    let mut client = RunningProgram::start_and_close_stdout_when(&mut command, |_| true);
    client.write_until_exit(b"x\n");
    let (status, _, stderr) = client.wait_exit(TIMEOUT);
    assert!(status.signal() == Some(13) || status.code() == Some(141), "{status:?}: {stderr}");
    assert_eq!(stderr, "");
}

#[test]
fn udp_through_a_chain_of_three_servers_round_trips() {
    let servers = [Server::start(&[]), Server::start(&[]), Server::start(&[])];
    let chain: Vec<String> = servers.iter().map(|server| server.addr().to_string()).collect();
    let target = udp_echo_server(LOOPBACK).to_string();
    let mut client = RunningProgram::start(s5().args(["udp", "-w", "10", "-x", &chain.join(","), &target]));
    client.write(b"through all\n\n");
    client.stdout(|bytes| bytes == b"through all\n\n");
    // 65000 bytes and three headers still fit into one datagram.
    let long = [&[b'x'; 65_000][..], b"\n"].concat();
    client.write(&long);
    assert_eq!(client.stdout(|bytes| bytes.len() >= 13 + long.len()).len(), 13 + long.len());
    drop(client);
    for server in &servers {
        server.wait_log(|log| log.matches("dst=").count() >= 1);
    }
    let log = servers[2].log();
    assert!(log.contains("udp"), "{log}");
}

#[test]
fn udp_relay_address_that_is_a_name_is_resolved() {
    if !in_namespace("udp::udp_relay_address_that_is_a_name_is_resolved", "127.0.0.1 relay.example\n", "") {
        return;
    }
    let relay = socket("127.0.0.1:0");
    let port = relay.local_addr().expect("local address").port();
    let reply = [&[5, 0, 0, 3, 13][..], b"relay.example", &port.to_be_bytes()].concat();
    let proxy = ScriptedServer::start(reply_with(&reply).into_iter().chain([with_stream(hold)]).collect());
    let mut client = RunningProgram::start(s5().args(["udp", "-x", &proxy.url(), TARGET]));
    client.write(b"found\n");
    assert_eq!(receive(&relay).0, datagram(b"found"));
}
