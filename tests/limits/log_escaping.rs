//! Values from clients, targets and hops are escaped in the log, and secrets are never logged.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};

use crate::support::login::{log_in, users_file};
use crate::support::{
    BIND, CONNECT, Server, TIMEOUT, UDP_ASSOCIATE, V4, closed_port, echo_server, greet, in_namespace, open, read_exact,
    run, s5, session_lines, stream_end, tcp_server, temp_dir, write_file,
};

/// Attacks on readers of the log: texts that end a line or a value, control a terminal, or reverse the following text.
const ATTACKS: [&[u8]; 26] = [
    b"\n",
    b"\r\n2026-11-23T23:30:48.827Z WARN  [s5::server::session_log] session client=1.2.3.4:5",
    b"\" error=\"login refused",
    b"\\",
    b"\\\"",
    b"\0",
    b"\x07",
    b"\x08",
    b"\x1b[2J",
    b"\x1b]0;title\x07",
    b"\x7f",
    b"\x80\x9b",
    b"\xff\xfe",
    "\u{85}".as_bytes(),
    "\u{9b}2J".as_bytes(),
    "\u{a0}".as_bytes(),
    "\u{ad}".as_bytes(),
    "\u{200b}".as_bytes(),
    "\u{200f}".as_bytes(),
    "\u{2028}".as_bytes(),
    "\u{202e}".as_bytes(),
    "\u{2066}".as_bytes(),
    "\u{feff}".as_bytes(),
    "\u{fff9}".as_bytes(),
    "\u{e0041}".as_bytes(),
    "\u{f8ff}".as_bytes(),
];

/// Returns a request for a domain name of arbitrary bytes.
fn request_bytes(command: u8, name: &[u8], port: u16) -> Vec<u8> {
    let length = u8::try_from(name.len()).expect("at most 255 bytes");
    [&[5, command, 0, 3, length], name, &port.to_be_bytes()].concat()
}

/// Fails unless all characters are letters or printable ASCII, and session lines have only `key=value` pairs.
fn assert_harmless(log: &str, session_count: usize) {
    for line in log.lines() {
        let harmful = line.chars().find(|c| !(c.is_ascii_graphic() || *c == ' ' || c.is_alphanumeric()));
        assert_eq!(harmful, None, "{line:?}");
        let (head, rest) = line.split_at("2026-11-23T23:30:48.827Z INFO  ".len());
        assert!(head.starts_with("20") && head.contains("Z ") && rest.starts_with("[s5"), "not a log line: {line}");
        if let Some((_, pairs)) = line.split_once("] session ") {
            assert_pairs(pairs);
        }
    }
    assert_eq!(session_lines(log).len(), session_count, "one line per session:\n{log}");
}

fn assert_pairs(line: &str) {
    let mut rest = line;
    let mut keys = Vec::new();
    while !rest.is_empty() {
        let (key, value) = rest.split_once('=').unwrap_or_else(|| panic!("no key: {line}"));
        assert!(key.bytes().all(|byte| byte.is_ascii_lowercase()), "{key}: {line}");
        let quoted = value.strip_prefix('"').map(|value| {
            let mut escaped = false;
            let end = value.bytes().position(|byte| {
                let is_end = byte == b'"' && !escaped;
                escaped = byte == b'\\' && !escaped;
                is_end
            });
            end.unwrap_or_else(|| panic!("no closing quote: {line}")) + 2
        });
        let value = value.split_at(quoted.or(value.find(' ')).unwrap_or(value.len()));
        keys.push(key);
        rest = value.1.strip_prefix(' ').unwrap_or(value.1);
    }
    let all = ["client", "user", "command", "dst", "bnd", "rep", "up", "down", "seconds"];
    keys.retain(|key| *key != "error" && *key != "via");
    assert_eq!(keys, all, "{line}");
}

/// Offers no authentication and sends a request.
fn send_request(server: &Server, request: &[u8]) -> TcpStream {
    let mut stream = greet(server);
    stream.write_all(request).expect("data sent");
    stream
}

/// Starts a hop that runs a script of steps: read a number of bytes, then write these bytes.
fn hop(script: Vec<(usize, Vec<u8>)>) -> String {
    let addr = tcp_server(V4, move |mut stream| {
        for (reads, writes) in &script {
            let mut ignored = vec![0; *reads];
            if stream.read_exact(&mut ignored).is_err() || stream.write_all(writes).is_err() {
                return;
            }
        }
        let _ = stream.read_to_end(&mut Vec::new());
    });
    addr.to_string()
}

/// Returns a reply with a domain name in BND.
fn reply_with_name(rep: u8, name: &[u8]) -> Vec<u8> {
    [&[5, rep, 0, 3, u8::try_from(name.len()).expect("at most 255")], name, &[0, 80]].concat()
}

#[test]
fn domain_names_are_escaped_for_every_command_and_outcome() {
    // In a namespace without a resolver.
    if !in_namespace("log_escaping::domain_names_are_escaped_for_every_command_and_outcome", "", "") {
        return;
    }
    let port = closed_port().port();
    for args in [&[][..], &["--deny", "to=.evil"], &["--deny", "command=bind", "--deny", "to=127.0.0.0/8"]] {
        let server = Server::start(&[&["-v", "-v", "--connect-timeout", "300ms"], args].concat());
        let mut count = 0;
        let mut streams = Vec::new();
        for attack in ATTACKS {
            let name = [b"a", attack, b"b.evil"].concat();
            for command in [CONNECT, BIND, UDP_ASSOCIATE, 9] {
                streams.push(send_request(&server, &request_bytes(command, &name, port)));
                // The same request from a client that closes at once.
                drop(send_request(&server, &request_bytes(command, &name, port)));
                count += 2;
            }
        }
        let (mut control, rep, bnd) = open(&server, UDP_ASSOCIATE, "0.0.0.0:0".parse().expect("valid address"));
        assert_eq!(rep, 0);
        let socket = UdpSocket::bind("127.0.0.1:0").expect("free port");
        for attack in ATTACKS {
            let name = request_bytes(0, &[attack, b".evil"].concat(), port);
            socket.send_to(&[&[0, 0], &name[2..], b"data"].concat(), bnd).expect("datagram sent");
        }
        for stream in &mut streams {
            read_exact(stream, 2);
        }
        drop(streams);
        control.shutdown(std::net::Shutdown::Write).expect("half-closed");
        stream_end(&mut control);
        let log = server.wait_log(|log| session_lines(log).len() > count);
        assert_harmless(&log, count + 1);
        let outcome = if args.is_empty() { "name not found" } else { "denied: --deny" };
        assert!(log.contains(outcome), "no request was processed:\n{log}");
    }
}

#[test]
fn hop_answers_are_escaped() {
    let unreachable = closed_port().to_string();
    let selection = |bytes: &[u8]| (3, bytes.to_vec());
    for attack in ATTACKS.iter().filter(|attack| std::str::from_utf8(attack).is_ok()) {
        let name = [b"a", *attack, b"b"].concat();
        let hops = [
            unreachable.clone(),
            hop(vec![selection(attack)]),
            hop(vec![selection(&[b"HTTP/1.1 400 ", *attack, b"\r\n\r\n"].concat())]),
            hop(vec![selection(b"\x05\xff")]),
            hop(vec![selection(b"\x05\x00"), (7, reply_with_name(0, &name))]),
            hop(vec![selection(b"\x05\x00"), (7, reply_with_name(5, &name))]),
            hop(vec![selection(b"\x05\x00"), (7, reply_with_name(0x9B, &name))]),
            hop(vec![selection(b"\x05\x00"), (7, [reply_with_name(0, b"x"), reply_with_name(0, &name)].concat())]),
        ];
        for via in hops {
            let server = Server::start(&["-v", "-v", "--via", &via, "--connect-timeout", "300ms"]);
            let streams =
                [CONNECT, BIND, UDP_ASSOCIATE].map(|command| send_request(&server, &request_bytes(command, &name, 80)));
            for mut stream in streams {
                read_exact(&mut stream, 2);
                drop(stream);
            }
            let log = server.wait_log(|log| session_lines(log).len() == 3);
            assert_harmless(&log, 3);
        }
    }
}

#[test]
fn user_names_are_escaped_in_success_and_failure() {
    let valid_name = "ren\u{e9} \u{202e}\" rep=0";
    let (_dir, users) = users_file(&[(valid_name, "secret")]);
    let server = Server::start(&["--users", &users, "-v", "-v", "--max-per-user", "1"]);
    for (attack, n) in ATTACKS.iter().zip(1..) {
        assert_ne!(log_in(&server, [127, 9, 0, n], attack, b"wrong").1, 0);
    }
    let mut open_streams = Vec::new();
    for n in 1..=3 {
        let (mut stream, status) = log_in(&server, [127, 9, 1, n], valid_name.as_bytes(), b"secret");
        assert_eq!(status, 0);
        stream.write_all(&crate::support::request(CONNECT, echo_server())).expect("data sent");
        read_exact(&mut stream, 2);
        open_streams.push(stream);
    }
    drop(open_streams);
    let count = ATTACKS.len() + 3;
    let log = server.wait_log(|log| session_lines(log).len() >= count);
    assert_harmless(&log, count);
    assert!(log.is_ascii(), "{log}");
    assert_eq!(log.matches(r#"user="ren\xc3\xa9 \xe2\x80\xae\" rep=0""#).count(), 3, "{log}");
}

#[track_caller]
fn assert_no_secret(text: &str, secrets: &[&str]) {
    for secret in secrets {
        assert!(!text.contains(secret), "{secret:?} in:\n{text}");
    }
}

#[test]
fn passwords_and_hashes_are_not_logged_at_trace_level() {
    let dir = temp_dir();
    let (_users, users) = users_file(&[("alice", "open-sesame")]);
    let text = std::fs::read_to_string(&users).expect("file read");
    let hash = text.trim().split_once(':').expect("an entry").1.to_owned();
    let secrets = ["sesame", &hash, &hash[7..29], &hash[29..]];
    let refusing = |status: u8| hop(vec![(4, vec![5, 2]), (6, vec![]), (19, vec![1, status])]);
    let unreachable = closed_port().to_string();
    let http = hop(vec![(4, b"HTTP/1.1 400 no\r\n\r\n".to_vec())]);
    for to in [unreachable, http, refusing(1), hop(vec![(4, vec![5, 2]), (6, vec![])])] {
        let via = format!("socks5h://hopper:hop%2Dsesame-two@{to}");
        let (named, rules) = (format!("other={via}"), write_file(dir.path(), "rules", "allow via=other port=81\n"));
        let args = ["-v", "-v", "--users", &users, "--via", &via, "--hop", &named, "--rules", &rules];
        let server = Server::start(&[&args[..], &["--connect-timeout", "300ms"]].concat());
        for (passwd, n) in ["wrong-sesame", "open-sesame", "open-sesame", "open-sesame-not", ""].iter().zip(1..) {
            let (mut stream, status) = log_in(&server, [127, 9, 2, n], b"alice", passwd.as_bytes());
            assert_eq!(status == 0, *passwd == "open-sesame");
            if status == 0 {
                let dst = SocketAddr::from((Ipv4Addr::new(192, 0, 2, 1), 79 + u16::from(n)));
                stream.write_all(&crate::support::request(CONNECT, dst)).expect("data sent");
                assert_eq!(read_exact(&mut stream, 2)[0], 5);
            }
        }
        server.wait_log(|log| session_lines(log).len() == 5);
        let good = std::fs::read_to_string(&users).expect("file read");
        for bad in [format!("{good}bob{hash}\n"), format!("{good}bob:{hash}!\n"), good.trim().into(), String::new()] {
            let before = server.log().matches("reload: ").count();
            std::fs::write(&users, bad).expect("file written");
            server.signal("HUP");
            server.wait_log(|log| log.matches("reload: ").count() > before);
        }
        std::fs::write(&users, good).expect("file written");
        assert_no_secret(&server.log(), &secrets);
    }
}

/// Returns the stderr of a server that must fail to start.
fn start_error(args: &[&str]) -> String {
    let output = run(s5().args(["serve", "--listen", "127.0.0.1:0", "-v", "-v"]).args(args), b"", TIMEOUT);
    assert_eq!(output.status.code(), Some(2), "{args:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn users_file_error_does_not_contain_hashes() {
    let dir = temp_dir();
    let bcrypt = bcrypt::hash("sesame", 4).expect("password hashed");
    let argon2 = s5::policy::users::new_entry("alice", b"sesame").expect("valid entry");
    let argon2 = argon2.split_once(':').expect("an entry").1;
    for (hash, salt) in [(bcrypt.as_str(), &bcrypt[7..29]), (argon2, argon2.split('$').nth(4).expect("a salt"))] {
        let end = &hash[hash.len() - 12..];
        let short = &hash[..hash.len() - 2];
        let wrong = [
            hash.to_owned(),
            format!("alice {hash}"),
            format!("alice{hash}"),
            format!("{hash}:alice"),
            format!("alice:{hash}!"),
            format!("alice:{hash}{hash}"),
            format!("alice:x{hash}"),
            format!("alice:{hash} "),
            format!("alice: {hash}"),
            format!("alice:{short}\u{1b}"),
            format!("alice:$9{hash}"),
            format!("alice:{hash}\nalice:{hash}\n"),
            format!("alice:{hash}\n{hash}\n"),
            format!("alice:{hash}\nb\x1b[2Job:{hash}\n"),
            format!("alice:{}", hash.replace('$', "%")),
            format!("alice\t{hash}"),
        ];
        for text in wrong {
            let users = write_file(dir.path(), "users", &text);
            // Some texts are valid, because spaces at the end are ignored.
            if s5::policy::users::Users::parse(&text).is_ok() {
                continue;
            }
            let stderr = start_error(&["--users", &users]);
            assert_no_secret(&stderr, &[hash, salt, end, "sesame", "\x1b"]);
            assert_eq!(stderr.lines().count(), 1, "{stderr}");
        }
    }
}

#[test]
fn users_file_error_does_not_contain_plain_passwords() {
    let dir = temp_dir();
    for text in ["alice:hunter2", "alice:hunter2:x", "alice:$hunter2", "alice:$hunter2$x", "alice:hunter2$x$y"] {
        let stderr = start_error(&["--users", &write_file(dir.path(), "users", text)]);
        assert_no_secret(&stderr, &["hunter2"]);
    }
}

#[test]
fn hop_error_does_not_contain_the_password() {
    for url in [
        "alice:hunter2@",
        "alice:hunter2@:x",
        "alice:hunter2@host:99999",
        "alice:hunter2@[::1",
        "alice:hunter2@host:1080x",
        "alice:hunter2@h ost",
        "http://alice:hunter2@host",
        "socks5://alice:hunter2/@host/x",
        "alice:hunter2,@host",
        "alice:hunter2@host,unix:/x",
        "alice:hunter2%@unix:",
        "alice:hunter2,hunter2@host:hunter2",
        "hunter2",
        ":hunter2@host",
    ] {
        let named = format!("name={url}");
        for args in [["--via", url], ["--hop", &named], ["--hop", url]] {
            // Some texts are valid URLs: a single word is a host name.
            if s5::client::parse_hops(url).is_ok() && args[1] != url {
                continue;
            }
            if args == ["--via", "hunter2"] {
                continue;
            }
            assert_no_secret(&start_error(&args), &["hunter2"]);
        }
    }
}
