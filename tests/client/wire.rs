//! The bytes that clients send, and the valid answers that they accept.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener};
use std::process::Command;

use crate::support::scripted::{
    LOGIN_SUCCESS, SELECT_PASSWORD, SUCCESS_REPLY, ScriptedServer, Step, open_tunnel, reply_with, send, success_reply,
    text, with_stream,
};
use crate::support::{TIMEOUT, echo_server, in_namespace, is_installed, retry, run, s5};

use Step::{Greeting, Login, Request};

/// Runs a client against a proxy that refuses its request. Returns the messages it sent. `prefix` is put before the
/// proxy's address.
fn sent_messages(mode: &[&str], prefix: &str) -> Vec<Vec<u8>> {
    let refusal = [5, 1, 0, 1, 0, 0, 0, 0, 0, 0];
    let script = if prefix.contains('@') {
        vec![Greeting, send(SELECT_PASSWORD), Login, send(LOGIN_SUCCESS), Request, send(&refusal)]
    } else {
        reply_with(&refusal)
    };
    let proxy = ScriptedServer::start(script);
    let url = format!("{prefix}{}", proxy.url());
    let output = run(s5().args(mode).args(["-x", &url]), b"", TIMEOUT);
    assert_eq!(output.status.code(), Some(101), "{}", text(&output.stderr));
    proxy.messages()
}

#[test]
fn only_no_authentication_is_offered_without_credentials() {
    assert_eq!(sent_messages(&["connect", "127.0.0.1:1"], "")[0], [5, 1, 0]);
}

#[test]
fn password_method_is_offered_with_credentials() {
    let messages = sent_messages(&["connect", "127.0.0.1:1"], "alice:secret@");
    assert_eq!(messages[0], [5, 2, 0, 2]);
    assert_eq!(messages[1], b"\x01\x05alice\x06secret");
}

#[test]
fn password_is_not_sent_unless_its_method_is_selected() {
    let proxy = ScriptedServer::start(reply_with(&[5, 1, 0, 1, 0, 0, 0, 0, 0, 0]));
    let url = format!("alice:secret@{}", proxy.addr);
    run(s5().args(["connect", "127.0.0.1:1", "-x", &url]), b"", TIMEOUT);
    let messages = proxy.messages();
    assert_eq!(messages.len(), 2, "a greeting and a request");
    assert!(messages.iter().all(|message| !text(message).contains("secret")));
}

#[test]
fn userinfo_is_percent_decoded() {
    let messages = sent_messages(&["connect", "127.0.0.1:1"], "al%40ice:p%3Aa%2Fs%25s%00%ff:@");
    assert_eq!(messages[1], b"\x01\x06al@ice\x0ap:a/s%s\x00\xff:");
}

#[test]
fn user_name_and_password_of_255_bytes_are_sent() {
    let userinfo = format!("{}:{}@", "u".repeat(255), "p".repeat(255));
    let expected = [&[1, 255][..], &[b'u'; 255], &[255], &[b'p'; 255]].concat();
    assert_eq!(sent_messages(&["connect", "127.0.0.1:1"], &userinfo)[1], expected);
}

#[test]
fn each_target_form_is_sent_with_its_atyp() {
    let name = [&[5, 1, 0, 3, 14][..], b"target.example", &[0x1f, 0x90]].concat();
    let longest = "n".repeat(255);
    let long_name = [&[5, 1, 0, 3, 255][..], longest.as_bytes(), &[0, 80]].concat();
    let v6 = [&[5, 1, 0, 4, 0x20, 1, 0x0d, 0xb8][..], &[0; 11], &[1, 0, 22]].concat();
    let mapped = [&[5, 1, 0, 4][..], &[0; 10], &[255, 255, 192, 0, 2, 1, 0, 22]].concat();
    let longest_target = format!("{longest}:80");
    let table: [(&[&str], &[u8]); 9] = [
        (&["192.0.2.1:80"], &[5, 1, 0, 1, 192, 0, 2, 1, 0, 80]),
        (&["192.0.2.1", "65535"], &[5, 1, 0, 1, 192, 0, 2, 1, 255, 255]),
        (&["[2001:db8::1]:22"], &v6),
        (&["2001:db8::1", "22"], &v6),
        (&["[2001:db8::1]", "22"], &v6),
        (&["::ffff:192.0.2.1", "22"], &mapped),
        (&["target.example:8080"], &name),
        (&["target.example", "8080"], &name),
        (&[&longest_target], &long_name),
    ];
    for (target, request) in table {
        let mode: Vec<&str> = ["connect"].iter().chain(target).copied().collect();
        assert_eq!(sent_messages(&mode, "")[1], request, "{target:?}");
    }
}

#[test]
fn each_mode_sends_its_cmd_and_dst() {
    let zeros = [0, 1, 0, 0, 0, 0, 0, 0];
    let table: [(&[&str], &[u8]); 4] = [
        (&["bind"], &[&[5, 2][..], &zeros].concat()),
        (&["bind", "192.0.2.1"], &[5, 2, 0, 1, 192, 0, 2, 1, 0, 0]),
        (&["bind", "192.0.2.1:20"], &[5, 2, 0, 1, 192, 0, 2, 1, 0, 20]),
        // RFC 1928 section 4: zeros from a client that does not know its UDP address yet.
        (&["udp", "192.0.2.1:53"], &[&[5, 3][..], &zeros].concat()),
    ];
    for (mode, request) in table {
        assert_eq!(sent_messages(mode, "")[1], request, "{mode:?}");
    }
}

#[test]
fn oversized_fields_are_rejected_before_connecting() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("free port");
    let proxy = listener.local_addr().expect("local address").to_string();
    let long = "n".repeat(256);
    let table = [
        (proxy.clone(), format!("{long}:80"), "the host name has 256 bytes"),
        (format!("{long}:p@{proxy}"), "a:80".into(), "the user name has 256 bytes"),
        (format!("u:{long}@{proxy}"), "a:80".into(), "the password has 256 bytes"),
        (format!("u:@{proxy}"), "a:80".into(), "the password has 0 bytes"),
        (format!(":p@{proxy}"), "a:80".into(), "the user name has 0 bytes"),
        (proxy, "a\nb:80".into(), "invalid host name \"a\\nb\""),
    ];
    for (proxy, target, message) in table {
        for mode in ["connect", "udp", "bind"] {
            let output = run(s5().args([mode, "-x", &proxy, &target]), b"", TIMEOUT);
            let stderr = text(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{stderr}");
            assert!(stderr.contains(message) && stderr.lines().count() == 1, "{stderr}");
        }
    }
    listener.set_nonblocking(true).expect("option set");
    assert!(listener.accept().is_err(), "a client has connected");
}

#[test]
fn target_name_is_not_resolved_locally() {
    if !in_namespace(
        "wire::target_name_is_not_resolved_locally",
        "127.0.0.1 target.example\n",
        "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n",
    ) {
        return;
    }
    let resolver = std::net::UdpSocket::bind("127.0.0.1:53").expect("the port is free in this namespace");
    let request = |cmd: u8, name: &str| {
        let name = name.as_bytes();
        let length = u8::try_from(name.len()).expect("at most 255");
        [&[5, cmd, 0, 3, length][..], name, &[0, 80]].concat()
    };
    for name in ["target.example", "other.example", "localhost"] {
        for scheme in ["", "socks5://", "socks5h://"] {
            let target = format!("{name}:80");
            assert_eq!(sent_messages(&["connect", &target], scheme)[1], request(1, name));
            assert_eq!(sent_messages(&["bind", &target], scheme)[1], request(2, name));
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
    let (sender, receiver) = std::sync::mpsc::channel();
    // Counts while the connection is open: afterwards ss does not list it.
    let count = with_stream(move |mut stream| {
        let (local, remote) =
            (stream.local_addr().expect("local address").port(), stream.peer_addr().expect("peer address").port());
        let filter = format!("( sport = :{local} and dport = :{remote} )");
        let output = Command::new("ss").args(["-Htin", &filter]).output().expect("ss runs");
        let _ = sender.send(text(&output.stdout));
        let _ = stream.write_all(&[5, 1, 0, 1, 0, 0, 0, 0, 0, 0]);
    });
    let proxy =
        ScriptedServer::start(vec![Greeting, send(SELECT_PASSWORD), Login, send(LOGIN_SUCCESS), Request, count]);
    let url = format!("alice:secret@{}", proxy.addr);
    run(s5().args(["connect", "-x", &url, "target.example:80"]), b"not yet", TIMEOUT);
    let counted = receiver.recv_timeout(TIMEOUT).expect("the script ends");
    let segments = counted.split_whitespace().find_map(|word| word.strip_prefix("data_segs_in:"));
    assert_eq!(segments, Some("3"), "greeting, login and request: {counted}");
}

#[test]
fn client_waits_for_each_answer_before_the_next_message() {
    // A read after each message would return the next one if it were sent too early.
    let check = |stream: &mut std::net::TcpStream| {
        let wait = Some(std::time::Duration::from_millis(50));
        stream.set_read_timeout(wait).expect("timeout set");
        assert!(retry(|| stream.read(&mut [0; 1])).is_err(), "sent before the answer");
        stream.set_read_timeout(None).expect("timeout set");
    };
    let (sender, receiver) = std::sync::mpsc::channel();
    let proxy = ScriptedServer::start(vec![with_stream(move |mut stream| {
        for (length, reply) in [(4, SELECT_PASSWORD), (14, LOGIN_SUCCESS), (10, SUCCESS_REPLY)] {
            let mut message = vec![0; length];
            stream.read_exact(&mut message).expect("message received");
            check(&mut stream);
            stream.write_all(reply).expect("data sent");
        }
        let _ = sender.send(());
    })]);
    let url = format!("alice:secret@{}", proxy.addr);
    run(s5().args(["connect", "-x", &url, "192.0.2.1:80"]), b"", TIMEOUT);
    receiver.recv_timeout(TIMEOUT).expect("all messages arrived in order");
}

/// Receives "hello" through a scripted proxy. Returns the output of `-v`.
fn hello(script: Vec<Step>) -> String {
    let proxy = ScriptedServer::start(script);
    let output = run(s5().args(["connect", "-v", "-x", &proxy.url(), "target.example:80"]), b"", TIMEOUT);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "hello".into()), "{}", text(&output.stderr));
    text(&output.stderr)
}

#[test]
fn bnd_of_any_atyp_is_accepted() {
    let name = [&[5, 0, 0, 3, 9][..], b"far.local", &[4, 56]].concat();
    let longest = [&[5, 0, 0, 3, 255][..], &[b'n'; 255], &[4, 56]].concat();
    let empty_name = [5, 0, 0, 3, 0, 4, 56];
    let table = [
        (success_reply(([192, 0, 2, 9], 1080).into()), "192.0.2.9:1080"),
        (success_reply("[2001:db8::9]:1080".parse().expect("valid address")), "[2001:db8::9]:1080"),
        (name, "far.local:1080"),
        (longest, "nnn:1080"),
        (empty_name.to_vec(), "0.0.0.0:0"),
        // RSV is not checked.
        (vec![5, 0, 7, 1, 192, 0, 2, 9, 4, 56], "192.0.2.9:1080"),
    ];
    for (reply, bnd) in table {
        let stderr = hello(reply_with(&reply).into_iter().chain([send(b"hello")]).collect());
        assert!(stderr.contains(bnd), "{stderr}");
    }
}

#[test]
fn verbose_reports_proxy_and_target_on_stderr_only() {
    let stderr = hello(reply_with(SUCCESS_REPLY).into_iter().chain([send(b"hello")]).collect());
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(
        stderr.starts_with("s5: proxy 127.0.0.1:") && stderr.contains("connected to target.example:80"),
        "{stderr}"
    );
}

#[test]
fn success_prints_nothing_without_verbose() {
    let proxy = ScriptedServer::start(open_tunnel(|stream| drop(stream.shutdown(Shutdown::Both))));
    let output = run(s5().args(["connect", "-x", &proxy.url(), "target.example:80"]), b"", TIMEOUT);
    assert_eq!((output.status.code(), output.stdout.len(), output.stderr.len()), (Some(0), 0, 0));
}

#[test]
fn data_through_s5_serve_to_an_echo_server_returns() {
    let server = crate::support::Server::start(&[]);
    let target = echo_server();
    let (proxy, ip, port) = (server.addr().to_string(), target.ip().to_string(), target.port().to_string());
    for target in [&[target.to_string()][..], &[ip, port.clone()], &["localhost".into(), port]] {
        let output = run(s5().args(["connect", "-x", &proxy]).args(target), b"x\n", TIMEOUT);
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "x\n".into()), "{}", text(&output.stderr));
    }
}
