//! The session log: one line per session. tests/limits checks the escaping of its values.

use crate::*;

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
    let line = log.lines().find(|line| line.contains("msg=session ")).expect("a session line");
    let expected = format!(
        " level=info msg=session id=1 from={client} method=none command=connect to=\"{dst}\" addr={dst} bnd={bnd} rep=0 \
         up=5 down=5 seconds="
    );
    let (time, seconds) = line.split_once(&expected).unwrap_or_else(|| panic!("{expected} is not in {line}"));
    assert!(time.starts_with("ts=20") && time.ends_with('Z') && time.len() == 27, "{line}");
    assert!(seconds.parse::<f64>().is_ok_and(|seconds| seconds < 60.0), "{line}");
}

#[test]
fn session_log_line_of_bind_has_the_address_of_the_peer() {
    let server = Server::start(&["-v"]);
    let (mut stream, rep, bnd) = open(&server, BIND, "127.0.0.1:0".parse().expect("valid address"));
    assert_eq!(rep, 0);
    let mut other = connect_from("127.0.0.2:0".parse().expect("valid address"), bnd);
    stream_end(&mut other);
    let peer = TcpStream::connect(bnd).expect("the listener accepts");
    assert_eq!(read_reply(&mut stream).0, 0);
    let addr = peer.local_addr().expect("local address");
    drop((stream, peer));
    let log = server.wait_log(|log| !session_lines(log).is_empty());
    let expected = format!(" command=bind to=\"127.0.0.1:0\" addr={addr} bnd={bnd} rep=0 ");
    assert!(session_lines(&log)[0].contains(&expected), "{expected} is not in {log}");
    let (other, steps) = (other.local_addr().expect("local address"), [steps(&log, "peer"), steps(&log, "connect")]);
    assert!(steps[0][0].contains(&format!(" peer={other} error=\"not the expected peer, or denied\"")), "{log}");
    assert_eq!((steps[0].len(), steps[1].len()), (1, 1), "{log}");
}

#[test]
fn steps_of_a_session_have_its_id_and_known_facts() {
    let (_dir, users) = users_file(&[("alice", "secret")]);
    let server = Server::start(&["--users", &users, "-v", "-v"]);
    let echo = echo_server();
    let (mut stream, status) = log_in(&server, V4, b"alice", b"secret");
    assert_eq!(status, 0);
    stream.write_all(&request_by_name(CONNECT, "localhost", echo.port())).expect("request sent");
    let (rep, bnd) = read_reply(&mut stream);
    assert_eq!(rep, 0);
    let client = stream.local_addr().expect("local address");
    drop(stream);
    let log = server.wait_log(|log| !session_lines(log).is_empty());
    let (start, to) = (format!("id=1 from={client}"), format!("to=\"localhost:{}\"", echo.port()));
    let login = format!("{start} user=\"alice\" method=password");
    let request = format!("{login} command=connect {to}");
    let expected = [
        ("debug", "start", start.clone()),
        ("trace", "greeting", format!("{start} offered=\"password\" selected=\"password\"")),
        ("debug", "login", login),
        ("trace", "request", request.clone()),
        ("debug", "connect", format!("{request} addr={echo}")),
        ("trace", "reply", format!("{request} addr={echo} rep=0 bnd=\"{bnd}\"")),
    ];
    for (level, step, line) in expected {
        assert_eq!(steps(&log, step), [line], "{step}");
        assert!(log.contains(&format!(" level={level} msg={step} ")), "{step} is not {level}: {log}");
    }
    let [lookup] = steps(&log, "lookup")[..] else { panic!("one lookup: {log}") };
    assert!(lookup.starts_with(&format!("{request} addrs=\"")) && lookup.contains(&echo.to_string()), "{lookup}");
    assert!(session_lines(&log)[0].starts_with(&format!("{request} addr={echo} bnd={bnd} rep=0 ")), "{log}");
}

#[test]
fn verbose_log_omits_the_handshake_and_the_default_log_all_steps() {
    for (args, expected) in [(&["-v"][..], ["start", "login", "connect"].as_slice()), (&[], &[])] {
        let server = Server::start(args);
        drop(open(&server, CONNECT, echo_server()));
        let log = server.wait_log(|log| !session_lines(log).is_empty());
        let all = ["start", "greeting", "login", "request", "lookup", "connect", "reply"];
        let logged: Vec<&str> = all.into_iter().filter(|step| !steps(&log, step).is_empty()).collect();
        assert_eq!(logged, expected, "{log}");
    }
}

#[test]
fn session_logs_one_line_for_each_kind_of_end() {
    let server = Server::start(&["-v"]);
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
    // Those of clients that asked for nothing: they connected, or only checked the method.
    assert_eq!(log.matches(" level=debug msg=session ").count(), 2, "{log}");
    let ended = session_lines(&log).join("\n");
    for (what, count) in [("command=connect", 2), ("command=bind", 1), ("command=udp", 1), ("rep=5", 1), ("rep=7", 1)] {
        assert_eq!(ended.matches(what).count(), count, "{what}: {log}");
    }
}

#[test]
fn quiet_server_logs_nothing() {
    // In a network namespace, so that no other program can take the port before the server.
    enter_namespace!("", "");
    // A quiet server does not log its port, so the test chooses it.
    let addr = closed_port().to_string();
    let mut child = s5().args(["serve", "-q", "--listen", &addr]).stderr(Stdio::piped()).spawn().expect("s5 starts");
    wait_until("the server listens", TIMEOUT, || TcpStream::connect(&addr).is_ok());
    child.kill().expect("the child can be killed");
    let output = child.wait_with_output().expect("the child can be waited for");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}
