//! HAProxy in front of `s5 serve`, with the PROXY protocol and health checks.

use crate::*;

/// Starts HAProxy, which forwards connections to `server` with these options of its `server` line.
fn haproxy(server: &str, options: &str) -> OtherServer {
    OtherServer::start(|dir, addr| {
        let config = format!(
            "defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 30s\n  timeout server 30s\n\
             listen socks\n  bind {addr}\n  server s5 {server} {options} inter 20ms\n"
        );
        let mut command = Command::new("haproxy");
        command.args(["-db", "-f", &write_file(dir, "haproxy.cfg", &config)]);
        command
    })
}

#[test]
fn sessions_through_haproxy_have_their_clients_and_health_checks_are_not_logged() {
    if !has_all(&["haproxy"]) {
        return;
    }
    let target = echo_server();
    let dir = temp_dir();
    let path = dir.path().join("s5.sock").display().to_string();
    let args =
        ["--listen", &format!("unix:{path}"), "--proxy-protocol-from", "127.0.0.1,unix", "--allow-open-relay", "-v"];
    let server = Server::start_with(s5().args(["serve", "--listen", "127.0.0.1:0"]).args(args), 2);
    for at in [server.addr().to_string(), format!("unix@{path}")] {
        for options in ["send-proxy check", "send-proxy-v2 check", "send-proxy-v2-ssl-cn check no-check-send-proxy"] {
            let haproxy = haproxy(&at, options);
            let ended = || steps(&server.log(), "session").len();
            let before = ended();
            wait_until("health checks", TIMEOUT, || ended() > before + 2);
            let mut client = connect_from("127.0.0.7:0".parse().expect("an address"), haproxy.addr);
            let own = client.local_addr().expect("local address");
            client.write_all(&[&[5, 1, 0], &request(CONNECT, target)[..], b"hello"].concat()).expect("data sent");
            assert_eq!(read_exact(&mut client, 17)[12..], *b"hello", "{at} {options}");
            drop(client);
            let balancer = if at.starts_with("unix") { "unix" } else { "127.0.0.1:" };
            wait_session(&server, &[&format!("from={own} proxy={balancer}"), "up=5 down=5"]);
        }
    }
    let is_logged_check =
        |line: &&str| !line.contains("level=debug") && line.contains("msg=session") && !line.contains("up=5");
    assert_eq!(server.log().lines().find(is_logged_check), None, "a health check was logged");
}
