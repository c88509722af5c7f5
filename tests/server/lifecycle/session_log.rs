//! The session log: one line per session, of key=value pairs, with input of the client quoted and no passwords.

use std::io::Write as _;
use std::net::Shutdown;

use crate::support::{
    CONNECT, Server, StreamEnd, closed_port, echo_server, greet, in_namespace, open, open_by_name, read_exact,
    request_by_name, session_lines, stream_end, temp_dir, write_file,
};

/// Returns the keys and values of a session line. Quoted values keep their quotes.
fn pairs(line: &str) -> Vec<(&str, &str)> {
    let mut rest = line.split_once("session ").expect("a session line").1;
    let mut pairs = Vec::new();
    while !rest.is_empty() {
        let (key, value) = rest.split_once('=').unwrap_or_else(|| panic!("no key in {rest}"));
        assert!(key.bytes().all(|byte| byte.is_ascii_lowercase()), "{key} in {line}");
        let length = if value.starts_with('"') { quoted_length(value) } else { value.find(' ').unwrap_or(value.len()) };
        pairs.push((key, &value[..length]));
        rest = &value[length..];
        rest = rest.strip_prefix(' ').unwrap_or(rest);
    }
    pairs
}

fn quoted_length(value: &str) -> usize {
    let mut escaped = false;
    let end = value.bytes().skip(1).position(|byte| {
        let ends = byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        ends
    });
    end.expect("a closing quote") + 2
}

/// Returns the value of a key. Fails unless the key occurs once.
fn value<'a>(line: &'a str, key: &str) -> &'a str {
    let values: Vec<&str> = pairs(line).into_iter().filter(|pair| pair.0 == key).map(|pair| pair.1).collect();
    assert_eq!(values.len(), 1, "{key} in {line}");
    values[0]
}

fn lines(log: &str) -> Vec<&str> {
    log.lines().filter(|line| line.contains("session client=")).collect()
}

#[test]
fn session_log_line_has_all_keys_and_values() {
    let server = Server::start(&[]);
    let dst = echo_server();
    let (mut stream, _, bnd) = open(&server, CONNECT, dst);
    let client = stream.local_addr().expect("local address");
    stream.write_all(b"hello").expect("data sent");
    stream.shutdown(Shutdown::Write).expect("half-closed");
    assert_eq!(stream_end(&mut stream), StreamEnd::Closed(b"hello".to_vec()));
    let log = server.wait_log(|log| !session_lines(log).is_empty());
    let line = lines(&log)[0];
    assert!(line.contains("INFO"), "{line}");
    let expected = [
        ("client", client.to_string()),
        ("user", "-".into()),
        ("command", "connect".into()),
        ("dst", format!("\"{dst}\"")),
        ("bnd", bnd.to_string()),
        ("rep", "0".into()),
        ("up", "5".into()),
        ("down", "5".into()),
    ];
    for (key, expected) in expected {
        assert_eq!(value(line, key), expected, "{key} in {line}");
    }
    assert!(value(line, "seconds").parse::<f64>().is_ok_and(|seconds| seconds < 60.0), "{line}");
    assert!(!line.contains("error="), "{line}");
}

#[test]
fn session_logs_one_line_for_each_kind_of_end() {
    let server = Server::start(&[]);
    let echo = echo_server();
    drop(server.connect());
    drop(greet(&server));
    drop(open(&server, CONNECT, echo));
    drop(open(&server, CONNECT, closed_port()));
    drop(open(&server, 3, "0.0.0.0:0".parse().expect("valid address")));
    drop(open(&server, 2, "0.0.0.0:0".parse().expect("valid address")));
    drop(open(&server, 9, echo));
    crate::support::reset(greet(&server));
    let log = server.wait_log(|log| session_lines(log).len() >= 8);
    let commands = ["connect", "bind", "associate"].map(|command| log.matches(&format!("command={command}")).count());
    assert_eq!(session_lines(&log).len(), 8, "{log}");
    assert_eq!(commands[..2], [2, 1], "{log}");
    assert_eq!(log.matches("rep=5").count(), 1, "{log}");
    assert_eq!(log.matches("rep=7").count(), 1, "{log}");
}

#[test]
fn domain_name_cannot_forge_a_log_line() {
    let server = Server::start(&[]);
    for name in ["a\" rep=0 x=\"b", "a\\\" rep=0", "a b=c", "\u{202e}evil", "\u{9b}2J"] {
        let (_, rep, _) = open_by_name(&server, CONNECT, name, 80);
        assert!(rep == 4 || rep == 1, "{name:?}: {rep}");
    }
    let log = server.wait_log(|log| session_lines(log).len() == 5);
    for line in lines(&log) {
        assert_ne!(value(line, "rep"), "0", "{line}");
        assert!(!line.contains(['\u{202e}', '\u{9b}']), "{line:?}");
    }
    // The lines are in the order in which the sessions end.
    assert!(lines(&log).iter().any(|line| value(line, "dst") == r#""a\" rep=0 x=\"b:80""#), "{log}");
}

#[test]
fn control_bytes_of_domain_and_user_names_are_escaped() {
    let dir = temp_dir();
    let users = write_file(dir.path(), "users", "");
    let server = Server::start(&["--users", &users]);
    let uname = b"a\r\n\x1b[2J\"\0\xff rep=0";
    let mut all = vec![5, 1, 2, 1, u8::try_from(uname.len()).expect("at most 255")];
    all.extend(uname);
    all.extend([6, b's', b'e', b'c', b'r', b'e', b't']);
    let mut stream = server.connect();
    stream.write_all(&all).expect("data sent");
    assert_eq!(stream_end(&mut stream), StreamEnd::Closed(vec![5, 2, 1, 1]));
    drop(stream);
    let log = server.wait_log(|log| !session_lines(log).is_empty());
    let line = lines(&log)[0];
    assert_eq!(value(line, "user"), r#""a\r\n\x1b[2J\"\x00\xff rep=0""#);
    assert_eq!(value(line, "rep"), "-");

    let server = Server::start(&[]);
    for name in ["a\nb", "a\x1b[2Jb", "a\0b"] {
        let mut stream = greet(&server);
        stream.write_all(&request_by_name(CONNECT, name, 80)).expect("data sent");
        assert_eq!(read_exact(&mut stream, 2), [5, 1], "{name:?}");
    }
    let log = server.wait_log(|log| session_lines(log).len() == 3);
    assert!(!log.contains(['\x1b', '\0']), "{log:?}");
    assert_eq!(log.lines().count(), 4, "{log}");
}

#[test]
fn password_and_hash_are_not_logged_with_verbose() {
    let dir = temp_dir();
    let hash = bcrypt::hash("open-sesame", 4).expect("password hashed");
    let users = write_file(dir.path(), "users", &format!("alice:{hash}\n"));
    let server = Server::start(&["--users", &users, "-v"]);
    for passwd in ["open-sesame", "wrong-sesame"] {
        let mut stream = server.connect();
        let mut all = vec![5, 1, 2, 1, 5];
        all.extend(b"alice");
        all.push(u8::try_from(passwd.len()).expect("at most 255"));
        all.extend(passwd.as_bytes());
        stream.write_all(&all).expect("data sent");
        assert_eq!(read_exact(&mut stream, 3), [5, 2, 1]);
    }
    let log = server.wait_log(|log| session_lines(log).len() == 2);
    assert!(!log.contains("sesame") && !log.contains(&hash), "{log}");
    assert_eq!(log.matches("user=\"alice\"").count(), 2, "{log}");
}

#[test]
fn quiet_server_logs_nothing() {
    // In a network namespace, so that no other program can take the port before the server.
    if !in_namespace("lifecycle::session_log::quiet_server_logs_nothing", "", "") {
        return;
    }
    // A quiet server does not log its port, so the test chooses it.
    let addr = closed_port().to_string();
    let mut child = crate::support::s5()
        .args(["serve", "-q", "--listen", &addr])
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("s5 starts");
    crate::support::wait_until("the server listens", crate::support::TIMEOUT, || {
        std::net::TcpStream::connect(&addr).is_ok()
    });
    child.kill().expect("the child can be killed");
    let output = child.wait_with_output().expect("the child can be waited for");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}
