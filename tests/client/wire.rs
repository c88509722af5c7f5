//! The bytes that clients send, as far as they are not in a transcript.

use crate::*;

/// Runs a client against a proxy that refuses its request. Returns the request. `scheme` is put before the address.
fn sent_request(mode: &str, scheme: &str) -> Vec<u8> {
    let proxy = ScriptedServer::start(&reply("05 01 00 01 00*6"));
    let (status, _, stderr) = outcome(&format!("{mode} -x {scheme}{}", proxy.addr), b"");
    assert_eq!(status, Some(101), "{stderr}");
    proxy.messages().swap_remove(1)
}

#[test]
fn oversized_fields_are_rejected_before_connecting() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("free port");
    let proxy = listener.local_addr().expect("local address");
    let long = "n".repeat(256);
    let table = [
        ("".into(), format!("{long}:80"), "the host name has 256 bytes"),
        (format!("{long}:p@"), "a:80".into(), "the user name has 256 bytes"),
        (format!("u:{long}@"), "a:80".into(), "the password has 256 bytes"),
        (":p@".into(), "a:80".into(), "the user name has 0 bytes"),
        ("".into(), "a\nb:80".into(), "invalid host name \"a\\nb\""),
    ];
    for (userinfo, target, message) in table {
        for mode in ["connect", "udp", "bind"] {
            assert_line(&format!("{mode} -x {userinfo}{proxy} {target}"), 2, &[message]);
        }
    }
    listener.set_nonblocking(true).expect("option set");
    assert!(listener.accept().is_err(), "a client has connected");
}

#[test]
fn target_name_is_not_resolved_locally() {
    let resolv = "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n";
    enter_namespace!("127.0.0.1 target.example\n", resolv);
    let resolver = UdpSocket::bind("127.0.0.1:53").expect("the port is free in this namespace");
    for name in ["target.example", "other.example", "localhost"] {
        for scheme in ["", "socks5://", "socks5h://"] {
            for (mode, cmd) in [("connect", 1), ("bind", 2)] {
                assert_eq!(sent_request(&format!("{mode} {name}:80"), scheme), request_by_name(cmd, name, 80));
            }
        }
    }
    resolver.set_nonblocking(true).expect("option set");
    assert!(retry(|| resolver.recv(&mut [0; 512])).is_err(), "the client resolved a name");
}

#[test]
fn each_message_is_sent_in_one_segment() {
    if !is_installed("ss") {
        return;
    }
    let (sender, receiver) = channel();
    // Counts while the connection is open: afterwards ss does not list it.
    let proxy = ScriptedServer::start_at("127.0.0.1:0", &format!("{LOGIN} > {{request}}"), move |mut stream| {
        let port = |addr: std::io::Result<std::net::SocketAddr>| addr.expect("address").port();
        let filter = format!("( sport = :{} and dport = :{} )", port(stream.local_addr()), port(stream.peer_addr()));
        let output = Command::new("ss").args(["-Htin", &filter]).output().expect("ss runs");
        let _ = sender.send(text(&output.stdout));
        let _ = stream.write_all(&[5, 1, 0, 1, 0, 0, 0, 0, 0, 0]);
    });
    outcome(&format!("connect -x alice:secret@{} {TARGET}", proxy.addr), b"not yet");
    let counted = receiver.recv_timeout(crate::TIMEOUT).expect("the script ends");
    let segments = counted.split_whitespace().find_map(|word| word.strip_prefix("data_segs_in:"));
    assert_eq!(segments, Some("3"), "greeting, login and request: {counted}");
}
