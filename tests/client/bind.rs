//! `s5 bind` through `s5 serve`, and failures of the second reply.

use crate::*;

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
fn error_says_that_the_proxy_stopped_waiting_and_how_to_wait_longer() {
    let server = Server::start(&["--bind-timeout", "500ms"]);
    let proxy = server.addr().to_string();
    // The peer's time limit of a server applies also to the proxy that it uses.
    let via = Server::start(&["--via", &proxy]);
    let first = Server::start(&[]);
    for (chain, last) in [
        (proxy.clone(), server.addr()),
        (format!("{},{proxy}", first.addr()), server.addr()),
        (via.addr().to_string(), via.addr()),
    ] {
        for json in ["", "--json "] {
            let (status, _, stderr) = outcome(&format!("bind {json}-w 1m -x {chain} 127.0.0.1"), b"");
            assert_eq!(status, Some(106), "{stderr}");
            let line = stderr.lines().last().unwrap_or_default();
            let begin = format!(
                "proxy {last}: waiting for the peer, for 127.0.0.1:0: the proxy stopped waiting for the peer after "
            );
            let (_, rest) = line.split_once(&begin).unwrap_or_else(|| panic!("{stderr}"));
            let (time, rest) = rest.split_once(" s (REP 6) ").unwrap_or_else(|| panic!("{stderr}"));
            assert!(time.parse::<f32>().is_ok_and(|time| (0.2..5.0).contains(&time)), "{stderr}");
            let remedy = "(to wait longer, raise the limit of the proxy: --bind-timeout of s5 serve)";
            assert!(rest.starts_with(remedy), "{stderr}");
        }
    }
    let log = via.wait_log(|log| log.contains("rep=6"));
    assert!(log.contains(&format!("proxy {proxy}: waiting for the peer")), "{log}");
    assert!(log.contains("stopped waiting for the peer after 0."), "{log}");
}
