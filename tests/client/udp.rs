//! `s5 udp` through `s5 serve`, and with a relay that is part of the test.

use std::os::unix::process::ExitStatusExt as _;

use crate::*;

pub fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = vec![0; 65_536];
    let (n, from) = retry(|| socket.recv_from(&mut buffer)).expect("datagram received");
    buffer.truncate(n);
    (buffer, from)
}

/// A UDP socket with a read timeout.
pub fn socket() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("free port");
    socket.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    socket
}

/// The header of a datagram (RFC 1928 section 7) for or from `192.0.2.7:7`, and a payload.
pub fn datagram(payload: &[u8]) -> Vec<u8> {
    [&[0, 0, 0, 1, 192, 0, 2, 7, 0, 7][..], payload].concat()
}

/// A proxy that keeps an association open until the client closes it. The test acts as its relay.
pub fn associating_proxy() -> ScriptedServer {
    ScriptedServer::start(&reply("05 00 00 {relay}; > ..."))
}

#[test]
fn udp_raw_sends_each_read_as_one_datagram() {
    let proxy = associating_proxy();
    let mut client = start(&format!("udp --raw -x {} 192.0.2.7:7", proxy.addr));
    for round in 0..200_u8 {
        client.write(&[round; 10_000]);
        assert!(receive(&proxy.relay).0 == datagram(&[round; 10_000]), "datagram {round}");
    }
}

#[test]
fn udp_raw_datagram_of_maximum_size_passes_in_both_directions() {
    let ((_server, proxy), target) = (serve(), socket());
    let payload: Vec<u8> = (b'a'..=b'z').cycle().take(65_000).collect();
    let mut raw = start(&format!("udp --raw -x {proxy} {}", target.local_addr().expect("local address")));
    raw.write(&payload);
    let (bytes, from) = receive(&target);
    assert!(bytes == payload, "a datagram of {} bytes arrived", bytes.len());
    target.send_to(&bytes, from).expect("datagram sent");
    assert!(raw.stdout(|bytes| bytes.len() >= payload.len()) == payload, "the returned data differs");
}

#[test]
fn udp_prints_answers_while_stdin_has_unlimited_data() {
    let (_server, proxy) = serve();
    let lines: String = (0..20_000).map(|n| format!("{n}\n")).collect();
    let args = format!("udp -q 1s -x {proxy} {}", udp_echo_server(V4));
    let output = run(&mut command(&args), lines.as_bytes(), TIMEOUT);
    // UDP may lose datagrams. A client that only sends would receive those that fit into the four socket
    // buffers on the way: fewer than 1200.
    let answers = text(&output.stdout).lines().count();
    assert!(answers > 2000, "{answers} of 20000");
}

#[test]
fn udp_icmp_error_does_not_end_the_client() {
    let (_server, proxy) = serve();
    let addr = socket().local_addr().expect("local address");
    let mut client = start(&format!("udp -x {proxy} {addr}"));
    client.write(b"lost\nlost too\n");
    // Datagrams are relayed to a target that starts later.
    let Ok(target) = UdpSocket::bind(addr) else { return };
    target.set_read_timeout(Some(Duration::from_millis(50))).expect("timeout set");
    let deadline = Instant::now() + TIMEOUT;
    let from = loop {
        client.write(b"hello\n");
        match retry(|| target.recv_from(&mut [0; 64])) {
            Ok((_, from)) => break from,
            Err(_) => assert!(Instant::now() < deadline, "no datagram arrives"),
        }
    };
    target.send_to(b"here", from).expect("datagram sent");
    client.stdout(|bytes| bytes.ends_with(b"here\n"));
}

#[test]
fn udp_exits_without_message_when_stdout_is_closed() {
    let (_server, proxy) = serve();
    let mut command = command(&format!("udp -x {proxy} {}", udp_echo_server(V4)));
    let mut client = RunningProgram::start_with(&mut command, Stdio::piped(), |_| true);
    client.write_until_exit(b"x\n");
    let (status, _, stderr) = client.wait_exit(TIMEOUT);
    assert!(status.signal() == Some(13) || status.code() == Some(141), "{status:?}: {stderr}");
    assert_eq!(stderr, "");
}

#[test]
fn udp_through_a_chain_of_three_servers_round_trips() {
    let servers = [(); 3].map(|()| Server::start(&[]));
    let [one, two, three] = servers.each_ref().map(Server::addr);
    let mut client = start(&format!("udp -w 10 -x {one},{two},{three} {}", udp_echo_server(V4)));
    client.write(b"through all\n\n");
    client.stdout(|bytes| bytes == b"through all\n\n");
    // 65000 bytes and three headers still fit into one datagram.
    let long = [&(b'a'..=b'z').cycle().take(65_000).collect::<Vec<u8>>(), &b"\n"[..]].concat();
    client.write(&long);
    assert!(client.stdout(|bytes| bytes.len() >= 13 + long.len())[13..] == long, "the returned data differs");
    drop(client);
    for server in &servers {
        server.wait_log(|log| log.contains("command="));
    }
    assert!(servers[2].log().contains("udp"), "{}", servers[2].log());
}

#[test]
fn udp_relay_address_of_a_later_hop_may_be_ipv4_mapped() {
    let first = Server::start(&[]);
    for bnd in ["04 00*10 ff ff 7f 00 00 01", "04 00*10 ff ff 00*4"] {
        for is_server in [false, true] {
            let proxy = ScriptedServer::start(&reply(&format!("05 00 00 {bnd} {{relay:port}}; > ...")));
            let chain = format!("{},[::ffff:127.0.0.1]:{}", first.addr(), proxy.addr.port());
            let server = is_server.then(|| Server::start(&["--via", &chain]));
            let mut client = start(&format!(
                "udp -x {} 192.0.2.7:7",
                server.as_ref().map_or(chain, |server| server.addr().to_string())
            ));
            client.write(b"hello\n");
            let (bytes, from) = receive(&proxy.relay);
            proxy.relay.send_to(&bytes, from).expect("datagram sent");
            client.stdout(|bytes| bytes == b"hello\n");
        }
    }
}

#[test]
fn udp_relay_address_that_is_a_name_is_resolved() {
    enter_namespace!("127.0.0.1 relay.example\n", "");
    let proxy = ScriptedServer::start(&reply("05 00 00 03 0d \"relay.example\" {relay:port}; > ..."));
    let mut client = start(&format!("udp -x {} 192.0.2.7:7", proxy.addr));
    client.write(b"found\n");
    assert_eq!(receive(&proxy.relay).0, datagram(b"found"));
}

#[test]
fn udp_relay_that_cannot_be_reached_is_named() {
    enter_namespace!("127.0.0.1 localhost\n", "");
    let hint = "--udp-relay proxy uses the address of the proxy itself";
    let relays = [
        ("01 c0 00 02 09 13 88", "192.0.2.9:5000: network unreachable"),
        ("04 20 01 0d b8 00*11 09 13 88", "[2001:db8::9]:5000: network unreachable"),
        ("03 0a \"relay.test\" 13 88", "relay.test:5000: "),
    ];
    for (bnd, reason) in relays {
        for option in ["", "-v ", "-z -v "] {
            let proxy = ScriptedServer::start(&reply(&format!("05 00 00 {bnd}; > ...")));
            let (status, _, stderr) = outcome(&format!("udp {option}-x {} 192.0.2.7:7", proxy.addr), b"x\n");
            let expected = format!("s5: proxy {}: request, for 192.0.2.7:7: UDP relay {reason}", proxy.addr);
            assert_eq!((status, stderr.starts_with(&expected)), (Some(7), true), "{stderr}");
            assert!(stderr.ends_with(&format!(" ({hint})\n")), "{stderr}");
        }
    }
    // No ICMP error arrives from an address where nothing listens, or it is about an earlier datagram.
    let proxy = ScriptedServer::start(&reply("05 00 00 01 7f 00 00 02 {relay:port}; > ..."));
    let (status, _, stderr) = outcome(&format!("udp -n 1 -q 200ms -x {} 192.0.2.7:7", proxy.addr), b"x\n");
    let relay = format!("127.0.0.2:{}", proxy.relay.local_addr().expect("local address").port());
    let expected = format!("received 0 of 1 answers in time (the UDP relay is {relay}; {hint})\n");
    assert_eq!((status, stderr.ends_with(&expected)), (Some(28), true), "{stderr}");
    // In a chain, only the first relay is reached by the client; a server names that of its upstream in the log.
    let (first, second) = (Server::start(&["--advertise", "192.0.2.9"]), Server::start(&[]));
    let (status, _, stderr) = outcome(&format!("udp -x {},{} 192.0.2.7:7", first.addr(), second.addr()), b"x\n");
    let expected = format!("s5: proxy {}: request, for 192.0.2.7:7: UDP relay 192.0.2.9:", first.addr());
    assert_eq!((status, stderr.starts_with(&expected)), (Some(7), true), "{stderr}");
}

#[test]
fn udp_relay_proxy_replaces_the_address_of_each_reply() {
    let proxy = ScriptedServer::start(&reply("05 00 00 01 c0 00 02 09 {relay:port}; > ..."));
    let mut client = start(&format!("udp --udp-relay proxy -x {} 192.0.2.7:7", proxy.addr));
    client.write(b"found\n");
    assert_eq!(receive(&proxy.relay).0, datagram(b"found"));
    let servers = [(); 3].map(|()| Server::start(&["--advertise", "192.0.2.9"]));
    let [one, two, three] = servers.each_ref().map(Server::addr);
    let echo = udp_echo_server(V4);
    for chain in [format!("{one}"), format!("{one},{two},{three}")] {
        let args = format!("udp --udp-relay proxy -n 1 -w 5 -x {chain} {echo}");
        assert_eq!(outcome(&args, b"hello\n"), success("hello\n"), "{chain}");
    }
    for hop in [&["--via", &one.to_string()][..], &["--hop", &format!("h={one},{two}"), "--allow", "via=h"]] {
        let server = Server::start(&[hop, &["--hop-udp-relay", "proxy"]].concat());
        let args = format!("udp -n 1 -w 5 -x {} {echo}", server.addr());
        assert_eq!(outcome(&args, b"hello\n"), success("hello\n"), "{hop:?}");
    }
    let (status, _, stderr) = outcome("connect --udp-relay proxy a:1", b"");
    assert_eq!((status, stderr.contains("only udp uses it")), (Some(2), true), "{stderr}");
}
