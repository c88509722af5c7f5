//! The session log: one line per session. tests/limits checks the escaping of its values.

use std::io::Write as _;
use std::net::{Shutdown, TcpStream};
use std::process::Stdio;

use crate::support::{
    BIND, CONNECT, Server, StreamEnd, TIMEOUT, UDP_ASSOCIATE, closed_port, echo_server, greet, in_namespace, open,
    reset, s5, session_lines, stream_end, wait_until,
};

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
    let line = log.lines().find(|line| line.contains("session client=")).expect("a session line");
    let expected =
        format!("session client={client} user=- command=connect dst=\"{dst}\" bnd={bnd} rep=0 up=5 down=5 seconds=");
    let (head, seconds) = line.split_once(&expected).unwrap_or_else(|| panic!("{expected} is not in {line}"));
    assert!(head.contains("INFO") && seconds.parse::<f64>().is_ok_and(|seconds| seconds < 60.0), "{line}");
}

#[test]
fn session_logs_one_line_for_each_kind_of_end() {
    let server = Server::start(&[]);
    let echo = echo_server();
    drop(server.connect());
    drop(greet(&server));
    drop(open(&server, CONNECT, echo));
    drop(open(&server, CONNECT, closed_port()));
    let any = "0.0.0.0:0".parse().expect("valid address");
    for (command, dst) in [(UDP_ASSOCIATE, any), (BIND, any), (9, echo)] {
        drop(open(&server, command, dst));
    }
    reset(greet(&server));
    let log = server.wait_log(|log| session_lines(log).len() >= 8);
    assert_eq!(session_lines(&log).len(), 8, "{log}");
    for (what, count) in [("command=connect", 2), ("command=bind", 1), ("command=udp", 1), ("rep=5", 1), ("rep=7", 1)] {
        assert_eq!(log.matches(what).count(), count, "{what}: {log}");
    }
}

#[test]
fn quiet_server_logs_nothing() {
    // In a network namespace, so that no other program can take the port before the server.
    if !in_namespace("lifecycle::session_log::quiet_server_logs_nothing", "", "") {
        return;
    }
    // A quiet server does not log its port, so the test chooses it.
    let addr = closed_port().to_string();
    let mut child = s5().args(["serve", "-q", "--listen", &addr]).stderr(Stdio::piped()).spawn().expect("s5 starts");
    wait_until("the server listens", TIMEOUT, || TcpStream::connect(&addr).is_ok());
    child.kill().expect("the child can be killed");
    let output = child.wait_with_output().expect("the child can be waited for");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}
