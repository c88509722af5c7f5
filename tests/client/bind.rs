//! `s5 bind` through `s5 serve`, and failures of the second reply.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

use crate::support::scripted::{RunningProgram, ScriptedServer, reply, text};
use crate::support::{Server, TIMEOUT};
use crate::{failure, outcome, start};

/// Waits for the bound address of `s5 bind`.
pub fn bound_address(client: &RunningProgram) -> SocketAddr {
    let is_line = |stderr: &str| stderr.lines().any(|line| line.starts_with("bound ")) && stderr.ends_with('\n');
    let stderr = client.stderr(is_line);
    let line = stderr.lines().find_map(|line| line.strip_prefix("bound ")).expect("a line with the bound address");
    line.parse().expect("valid address")
}

#[test]
fn bind_reports_address_and_peer_and_relays_both_directions() {
    let servers = [(); 3].map(|()| Server::start(&[]));
    let [one, two, three] = servers.each_ref().map(|server| server.addr().to_string());
    let chain = format!("{one},{two},{three}");
    for (proxy, peer) in [(&one, ""), (&one, " 127.0.0.1"), (&one, " localhost"), (&one, " ::1"), (&chain, "")] {
        let mut client = start(&format!("bind -x {proxy}{peer}"));
        let at = bound_address(&client);
        assert!(at.ip().is_loopback() && at.port() != 0 && at.is_ipv6() == peer.contains("::1"), "{at}");
        let mut peer = TcpStream::connect(at).expect("the listener accepts");
        let from = peer.local_addr().expect("local address");
        client.write(b"from the client");
        client.close_stdin();
        let mut received = Vec::new();
        peer.read_to_end(&mut received).expect("data received");
        assert_eq!(text(&received), "from the client");
        peer.write_all(b"from the peer").expect("data sent");
        drop(peer);
        let (status, stdout, stderr) = client.wait_exit(TIMEOUT);
        assert_eq!((status.code(), text(&stdout)), (Some(0), "from the peer".into()), "{stderr}");
        assert_eq!(stderr, format!("bound {at}\naccepted {from}\n"));
    }
}

#[test]
fn each_failure_of_the_second_reply_has_its_status() {
    let closed = "the proxy closed the connection";
    let table = [
        ("", 97, closed),
        ("< 05 00 00 01 00 00", 97, closed),
        ("reset", 97, "connection reset by peer"),
        ("< 05 02 00 01 00*6", 102, "not allowed by ruleset (REP 2)"),
        ("< 05 06", 106, "TTL expired (REP 6)"),
        ("< 04 00 00 01 00*6", 97, "not a SOCKS5 server (first byte 0x04, SOCKS4?)"),
        ("< 05 00 00 09 00*6", 97, "not a SOCKS5 server (unknown address type 9)"),
    ];
    for (second, status, reason) in table {
        let proxy = ScriptedServer::start(&(reply("05 00 00 01 7f 00 00 01 10 e1") + second));
        let line = format!("s5: proxy {}: waiting for the peer, for 192.0.2.1:0: {reason}", proxy.addr);
        let expected = failure(status, &format!("bound 127.0.0.1:4321\n{line}\n"));
        assert_eq!(outcome(&format!("bind -x {} 192.0.2.1", proxy.addr), b""), expected);
    }
}
