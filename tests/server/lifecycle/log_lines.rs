//! The form of the log: one write for each line, priorities in the journal, and the counters.

use std::os::unix::net::UnixDatagram;

use crate::*;

/// A server whose stderr is a datagram socket: each write is one datagram.
struct DatagramLog {
    server: ProcessGroup,
    socket: UnixDatagram,
}

impl DatagramLog {
    /// `journal_stream` returns JOURNAL_STREAM for the device and inode of stderr.
    fn start(command: &mut Command, journal_stream: impl FnOnce(u64, u64) -> String) -> Self {
        let (socket, stderr) = UnixDatagram::pair().expect("socket pair created");
        socket.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
        let stat = rustix::fs::fstat(&stderr).expect("status of a socket");
        command.env("JOURNAL_STREAM", journal_stream(stat.st_dev, stat.st_ino));
        command.stdin(Stdio::null()).stderr(OwnedFd::from(stderr));
        Self { server: ProcessGroup::start(command), socket }
    }

    /// Returns the data of the next write.
    fn next(&self) -> String {
        let mut buffer = [0; 4096];
        let n = retry(|| self.socket.recv(&mut buffer)).expect("a line of the log");
        String::from_utf8(buffer[..n].to_vec()).expect("UTF-8")
    }
}

/// Runs one session of a very verbose server. Returns all writes.
fn writes_of_a_session(format: &str, journal_stream: impl FnOnce(u64, u64) -> String) -> Vec<String> {
    let mut command = s5();
    command.args(["serve", "-vv", "--listen", "127.0.0.1:0", "--log-format", format]);
    let log = DatagramLog::start(&mut command, journal_stream);
    let mut writes = vec![log.next()];
    let addr = writes[0].trim().trim_end_matches("\"}").rsplit(' ').next().and_then(|addr| addr.parse().ok());
    let addr: SocketAddr = addr.expect("an address");
    let sandbox = log.next();
    assert!(sandbox.contains("sandbox: "), "{sandbox}");
    let mut stream = greet_at(addr);
    stream.write_all(&request(CONNECT, closed_port())).expect("request sent");
    assert_eq!(read_reply(&mut stream).0, 5);
    while !writes.last().is_some_and(|line| line.contains("session") && line.contains("seconds")) {
        writes.push(log.next());
    }
    assert!(writes.len() > 4, "{writes:?}");
    assert!(writes.iter().all(|line| line.find('\n') == Some(line.len() - 1)), "a write is not a line: {writes:?}");
    writes
}

#[test]
fn journal_lines_have_a_priority_and_no_time() {
    let writes = writes_of_a_session("logfmt", |device, inode| format!("{device}:{inode}"));
    assert!(writes[0].starts_with("<6>INFO  [s5::server] listening on "), "{writes:?}");
    assert!(writes.last().is_some_and(|line| line.starts_with("<6>level=info msg=session id=1 ")), "{writes:?}");
    for line in &writes[1..writes.len() - 1] {
        assert!(line.starts_with("<7>level=debug msg=") || line.starts_with("<7>level=trace msg="), "{line}");
    }
}

#[test]
fn json_lines_in_the_journal_have_a_priority_and_no_time() {
    let writes = writes_of_a_session("json", |device, inode| format!("{device}:{inode}"));
    let start = "<6>{\"level\":\"info\",\"msg\":\"detail\",\"module\":\"s5::server\",\"text\":\"listening on ";
    assert!(writes[0].starts_with(start), "{writes:?}");
    let start = "<6>{\"level\":\"info\",\"msg\":\"session\",\"id\":1,";
    assert!(writes.last().is_some_and(|line| line.starts_with(start)), "{writes:?}");
    assert!(writes.iter().all(|line| line.ends_with("}\n") && !line.contains("\"ts\"")), "{writes:?}");
}

#[test]
fn lines_outside_of_the_journal_have_a_time_and_no_priority() {
    // A parent that redirects stderr passes its JOURNAL_STREAM on.
    for stream in [|_, inode| format!("0:{inode}"), |device, _| format!("{device}:0"), |_, _| String::new()] {
        let writes = writes_of_a_session("logfmt", stream);
        assert!(writes[0].starts_with("20") && writes[0].contains("Z INFO  [s5::server] listening on "), "{writes:?}");
        assert!(writes[1..].iter().all(|line| line.starts_with("ts=20") && line.contains("Z level=")), "{writes:?}");
    }
}

#[test]
fn journal_shows_an_error_at_the_start_with_its_priority() {
    let mut command = s5();
    let command = command.args(["serve", "--rules", "/nonexistent"]);
    let log = DatagramLog::start(command, |device, inode| format!("{device}:{inode}"));
    let line = log.next();
    assert!(line.starts_with("<3>s5: --rules /nonexistent: ") && line.ends_with('\n'), "{line}");
}

/// Sends SIGUSR1 and returns the line of the counters, from `open=` on.
fn counters(server: &Server) -> String {
    let lines = |log: &str| log.matches(" msg=counters ").count();
    let before = lines(&server.log());
    server.signal("USR1");
    let log = server.wait_log(|log| lines(log) > before);
    let line = log.lines().filter_map(|line| line.split_once(" msg=counters ")).next_back();
    line.expect("a line of counters").1.into()
}

#[test]
fn sigusr1_logs_the_counters_and_ends_neither_server_nor_sessions() {
    let (_dir, users) = users_file(&[("alice", "secret")]);
    let rules = ["--auth", "none,password", "--users", &users, "--deny", "port=9", "--drain-timeout", "60"];
    let mut server = Server::start(&rules);
    let zeros = "open=0 associations=0 sessions=0 refused=0 failed=0 failed_logins=0 up=0 down=0";
    assert_eq!(counters(&server), zeros);
    let (mut client, mut target) = tunnel(&server);
    let association = open(&server, UDP_ASSOCIATE, "0.0.0.0:0".parse().expect("valid address"));
    assert_eq!(open(&server, CONNECT, "127.0.0.1:9".parse().expect("valid address")).1, 2);
    assert_eq!(open(&server, CONNECT, closed_port()).1, 5);
    assert_ne!(log_in(&server, unused_client_ip(), b"alice", b"wrong").1, 0);
    let (mut ended, ..) = open(&server, CONNECT, echo_server());
    ended.write_all(b"hello").expect("data sent");
    ended.shutdown(std::net::Shutdown::Write).expect("half-closed");
    stream_end(&mut ended);
    server.wait_log(|log| session_lines(log).len() == 4);
    let expected = "open=2 associations=1 sessions=6 refused=1 failed=1 failed_logins=1 up=5 down=5";
    assert_eq!(counters(&server), expected);
    // Also while the open sessions are drained.
    server.signal("TERM");
    server.wait_log(|log| log.contains("draining sessions"));
    drop(association);
    server.wait_log(|log| session_lines(log).len() == 5);
    assert!(counters(&server).starts_with("open=1 associations=0 "));
    client.write_all(b"still open").expect("data sent");
    assert_eq!(crate::support::read_exact(&mut target, 10), b"still open");
    drop((client, target));
    assert_eq!(server.wait(TIMEOUT).code(), Some(0));
}

#[test]
fn sigusr1_logs_the_counters_of_a_quiet_server() {
    // No other process takes the port of the server.
    enter_namespace!("", "");
    let mut command = s5();
    let (addr, dir) = (closed_port(), temp_dir());
    let file = dir.path().join("access.log").display().to_string();
    command.args(["serve", "-q", "--listen", &addr.to_string(), "--access-log", &file]);
    let log = DatagramLog::start(&mut command, |device, inode| format!("{device}:{inode}"));
    crate::support::wait_until("the server listens", TIMEOUT, || TcpStream::connect(addr).is_ok());
    rustix::process::kill_process(log.server.pid(), rustix::process::Signal::USR1).expect("the server runs");
    assert!(log.next().starts_with("<4>level=warn msg=counters open="));
    // A file has times, and no priorities.
    let mut stream = greet_at(addr);
    stream.write_all(&request(CONNECT, closed_port())).expect("request sent");
    assert_eq!(read_reply(&mut stream).0, 5);
    wait_until("the session is logged", TIMEOUT, || {
        fs::read_to_string(&file).is_ok_and(|log| log.starts_with("ts=20"))
    });
}
