//! Readers of stderr that stop reading, or are gone. They cost lines of the log, but neither a session nor a signal.

use std::fs::File;
use std::io::{Read, pipe};

use rustix::fs::{OFlags, fcntl_setfl};
use rustix::process::{Signal, kill_process};

use crate::*;

/// More than fit into a pipe or the buffer of a socket, each with several lines.
const SESSIONS: u16 = 1000;

/// A server whose log the test can read later. Its stderr is full.
struct StalledServer {
    program: ProcessGroup,
    addr: SocketAddr,
}

impl StalledServer {
    /// Call it in a namespace, where no other process takes the port.
    fn start(stderr: impl Into<OwnedFd>, flags: OFlags, args: &[&str]) -> Self {
        let mut stderr = File::from(stderr.into());
        fcntl_setfl(&stderr, OFlags::NONBLOCK).expect("flags set");
        while stderr.write(b"earlier output of another process\n").is_ok() {}
        fcntl_setfl(&stderr, flags).expect("flags set");
        let addr = closed_port();
        let mut command = s5();
        command.args(["serve", "--listen", &addr.to_string()]).args(args).stdin(Stdio::null()).stderr(stderr);
        let program = ProcessGroup::start(&mut command);
        wait_until("the server listens", TIMEOUT, || TcpStream::connect(addr).is_ok());
        Self { program, addr }
    }

    /// Returns the REP of a session. Each number has a client address of its own.
    fn session(&self, number: u16, request: &[u8]) -> u8 {
        let [high, low] = number.to_be_bytes();
        let mut stream = connect_from((Ipv4Addr::new(127, 60, high, low), 0).into(), self.addr);
        stream.write_all(&[&[5, 1, 0], request].concat()).expect("request sent");
        read_exact(&mut stream, 2);
        read_reply(&mut stream).0
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.program.pid(), signal).expect("the server runs");
    }
}

/// Lets a server with this stderr serve sessions, reload, and end.
fn assert_sessions_and_signals_work(stderr: impl Into<OwnedFd>) {
    let dir = temp_dir();
    let rules = write_file(dir.path(), "rules", "# none\n");
    let mut server =
        StalledServer::start(stderr, OFlags::empty(), &["-vv", "--drain-timeout", "60", "--rules", &rules]);
    let dst = closed_port();
    (0..SESSIONS).for_each(|number| assert_eq!(server.session(number, &request(CONNECT, dst)), 5));
    let echo = crate::support::echo_server();
    let mut open = crate::support::greet_at(server.addr);
    open.write_all(&request(CONNECT, echo)).expect("request sent");
    assert_eq!(read_reply(&mut open).0, 0);
    server.signal(Signal::USR1);
    write_file(dir.path(), "rules", &format!("deny port={}\n", dst.port()));
    server.signal(Signal::HUP);
    wait_until("the rules are read again", TIMEOUT, || server.session(0, &request(CONNECT, dst)) == 2);
    server.signal(Signal::TERM);
    wait_until("the server stops listening", TIMEOUT, || TcpStream::connect(server.addr).is_err());
    ping(&mut open, b"still open");
    let signalled = Instant::now();
    server.signal(Signal::TERM);
    wait_until("the server ends", TIMEOUT, || server.program.has_ended());
    assert!(signalled.elapsed() < Duration::from_secs(3), "{:?}", signalled.elapsed());
}

#[test]
fn full_pipe_as_stderr_stops_neither_sessions_nor_signals() {
    enter_namespace!("", "");
    let (_reader, stderr) = pipe().expect("pipe created");
    assert_sessions_and_signals_work(stderr);
}

#[test]
fn full_socket_as_stderr_stops_neither_sessions_nor_signals() {
    enter_namespace!("", "");
    let (_reader, stderr) = UnixStream::pair().expect("socket pair created");
    assert_sessions_and_signals_work(stderr);
}

#[test]
fn closed_reader_of_stderr_stops_neither_sessions_nor_signals() {
    enter_namespace!("", "");
    let (reader, stderr) = UnixStream::pair().expect("socket pair created");
    drop(reader);
    assert_sessions_and_signals_work(stderr);
}

/// Reads until the log satisfies `done`.
fn read_log(reader: &mut impl Read, done: impl Fn(&str) -> bool) -> String {
    let mut log = String::new();
    let mut buffer = [0; 65_536];
    while !done(&log) {
        let n = crate::support::retry(|| reader.read(&mut buffer)).expect("the log is read in time");
        log.push_str(std::str::from_utf8(&buffer[..n]).expect("ASCII"));
    }
    log
}

#[test]
fn lines_that_a_stalled_reader_costs_are_counted_when_it_reads_again() {
    enter_namespace!("", "");
    let (mut reader, stderr) = UnixStream::pair().expect("socket pair created");
    reader.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    // Another process has made it non-blocking.
    let metrics = closed_port();
    let args = ["-vv", "--deny", "to=.test", "--metrics", &metrics.to_string()];
    let server = StalledServer::start(stderr, OFlags::NONBLOCK, &args);
    // Long lines, so that they do not fit into the queue.
    let request = request_by_name(CONNECT, &format!("{}.test", "a".repeat(250)), 80);
    (0..SESSIONS).for_each(|number| assert_eq!(server.session(number, &request), 2));
    let log = read_log(&mut reader, |log| log.contains(" msg=lost lines=") && log.ends_with('\n'));
    let lost: usize = log
        .split_once(" msg=lost lines=")
        .and_then(|(_, text)| text.split(' ').next()?.parse().ok())
        .expect("a number");
    let counted = crate::metrics::Metrics::scrape(metrics).get("s5_log_lines_dropped_total{reason=\"unwritten\"}");
    assert_eq!(counted as usize, lost);
    // Further sessions have all of their lines.
    server.session(0, &request);
    let last = read_log(&mut reader, |log| !session_lines(log).is_empty());
    let per_session = last.lines().filter(|line| line.contains(" id=")).count();
    let logged = log.lines().filter(|line| line.contains(" id=") && !line.contains("from=127.0.0.1:")).count();
    // The connection that showed that the server listens has lines too.
    let expected = per_session * usize::from(SESSIONS);
    assert!((expected..expected + 4).contains(&(logged + lost)), "{logged} + {lost} of {expected}");
}

/// Returns how often the thread of the log has been woken.
fn wakeups(server: &Server) -> usize {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", server.pid())).expect("the server runs");
    let read = |file: &str, task: &std::path::Path| std::fs::read_to_string(task.join(file)).expect("file read");
    let task = tasks.map(|task| task.expect("a task").path()).find(|task| read("comm", task) == "s5-log\n");
    let status = read("status", &task.expect("the thread of the log"));
    let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).expect("a count");
    count.trim().parse().expect("a number")
}

#[test]
fn thread_of_the_log_wakes_neither_at_rest_nor_for_each_line() {
    let server = Server::start(&["-vv"]);
    let before = wakeups(&server);
    let started = Instant::now();
    for number in 0..500 {
        let mut stream =
            crate::support::login::connect_from_ip(&server, [127, 61, (number / 250) as u8, (number % 250) as u8]);
        stream.write_all(&[5, 1, 9]).expect("greeting sent");
        read_exact(&mut stream, 2);
    }
    let log = server.wait_log(|log| session_lines(log).len() == 500);
    let woken = wakeups(&server) - before;
    // A wake-up and a pause of 10 ms in turn.
    let limit = 10 + started.elapsed().as_millis() as usize / 5;
    assert!(woken <= limit && woken < steps(&log, "start").len() * 2, "{woken} of {limit}");
    wait_until("the thread waits", TIMEOUT, || {
        let before = wakeups(&server);
        thread::sleep(Duration::from_millis(200));
        wakeups(&server) == before
    });
    drop(tunnel(&server));
}
