//! The form of the log: one write for each line, and priorities in the journal.

use std::io::Write as _;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};

use crate::support::programs::ProcessGroup;
use crate::support::{CONNECT, TIMEOUT, closed_port, greet_at, read_reply, request, retry, s5};

/// A server whose stderr is a datagram socket: each write is one datagram.
struct DatagramLog {
    _server: ProcessGroup,
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
        Self { _server: ProcessGroup::start(command), socket }
    }

    /// Returns the data of the next write.
    fn next(&self) -> String {
        let mut buffer = [0; 4096];
        let n = retry(|| self.socket.recv(&mut buffer)).expect("a line of the log");
        String::from_utf8(buffer[..n].to_vec()).expect("UTF-8")
    }
}

/// Runs one session of a very verbose server. Returns all writes.
fn writes_of_a_session(journal_stream: impl FnOnce(u64, u64) -> String) -> Vec<String> {
    let mut command = s5();
    let log = DatagramLog::start(command.args(["serve", "-vv", "--listen", "127.0.0.1:0"]), journal_stream);
    let mut writes = vec![log.next()];
    let addr: SocketAddr = writes[0].trim().rsplit(' ').next().and_then(|addr| addr.parse().ok()).expect("an address");
    let mut stream = greet_at(addr);
    stream.write_all(&request(CONNECT, closed_port())).expect("request sent");
    assert_eq!(read_reply(&mut stream).0, 5);
    while !writes.last().is_some_and(|line| line.contains("msg=session ")) {
        writes.push(log.next());
    }
    assert!(writes.len() > 4, "{writes:?}");
    assert!(writes.iter().all(|line| line.find('\n') == Some(line.len() - 1)), "a write is not a line: {writes:?}");
    writes
}

#[test]
fn journal_lines_have_a_priority_and_no_time() {
    let writes = writes_of_a_session(|device, inode| format!("{device}:{inode}"));
    assert!(writes[0].starts_with("<6>INFO  [s5::server] listening on "), "{writes:?}");
    assert!(writes.last().is_some_and(|line| line.starts_with("<6>level=info msg=session id=1 ")), "{writes:?}");
    for line in &writes[1..writes.len() - 1] {
        assert!(line.starts_with("<7>level=debug msg=") || line.starts_with("<7>level=trace msg="), "{line}");
    }
}

#[test]
fn lines_outside_of_the_journal_have_a_time_and_no_priority() {
    // A parent that redirects stderr passes its JOURNAL_STREAM on.
    for stream in [|_, inode| format!("0:{inode}"), |device, _| format!("{device}:0"), |_, _| String::new()] {
        let writes = writes_of_a_session(stream);
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
