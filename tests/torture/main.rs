//! Fault injection (`make torture`): sessions of all commands and modes, in which each system call of the server or of the
//! client fails once with each error that the kernel can return for it.
//!
//! A first run under strace lists the calls. Then each fault gets a run of its own, with a new server. A server must
//! survive each fault, release all descriptors, and serve the next client. A client must end with a status, and with a
//! message unless all data has arrived.

mod strace;
#[path = "../support/mod.rs"]
mod support;

use std::fs::read_to_string;
use std::os::unix::process::ExitStatusExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};

use rustix::process::{Pid, Signal, kill_process};

use crate::strace::{Call, Fault, faults, parse, start_of_main};
use support::bytes::poll_until;
use support::realm::Realm;
use support::*;

/// Fewest faults of one test. There are 16 tests, so `make torture` injects more than 300.
const MIN_FAULTS: usize = 25;
/// Time limit for a session with a fault. The time limits of the server and of the client are shorter.
const LIMIT: Duration = Duration::from_secs(30);
/// Time limit for a line of a program, which a fault can suppress.
const LINE_LIMIT: Duration = Duration::from_secs(3);
const HOSTS: &str = "127.0.0.1 localhost\n";
const RESOLV: &str = "nameserver 127.0.0.1\n";

/// What the test does while the client runs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Peer {
    /// Nothing: the target sends the data back.
    None,
    /// Connects to the address that the client prints after this word, and exchanges data.
    Tcp(&'static str),
    /// Sends datagrams to the address that the client prints, until one comes back. Then ends the client.
    Udp,
}

/// A session: a server, a client, and the other ends of their connections.
struct Session {
    server: Vec<String>,
    client: Vec<String>,
    peer: Peer,
    /// The client sends and receives this.
    data: Vec<u8>,
    realm: Option<Realm>,
    /// The upstream proxy.
    via: Option<Server>,
    dir: TempDir,
}

/// How a session ended for its client.
struct Outcome {
    status: Option<i32>,
    stderr: String,
    /// All data has arrived in both directions.
    is_complete: bool,
}

impl Session {
    /// `{proxy}` in the arguments of the client is the address of the server.
    fn new(server: &str, client: &str, peer: Peer) -> Self {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect();
        let limits = " --threads 1 --connect-timeout 3s --handshake-timeout 3s --bind-timeout 3s --idle-timeout 3s";
        Self {
            server: words(&(server.to_owned() + limits)),
            client: words(client),
            peer,
            data: b"hello\n".to_vec(),
            realm: None,
            via: None,
            dir: temp_dir(),
        }
    }

    fn env<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        match &self.realm {
            Some(realm) => realm.env(command),
            None => command,
        }
    }

    fn start_server(&self) -> Server {
        Server::start_with(self.env(s5().arg("serve").args(&self.server)), 1)
    }

    /// Runs the client with `command`, which is s5 or traces it. `log` is the log of the server.
    fn run(&self, log: &str, mut command: Command) -> Outcome {
        let proxy = log.split_once("listening on ").and_then(|(_, log)| log.lines().next()).expect("a line");
        // strace -e injects a fault, which can suppress every answer. Without a fault, an answer is only late.
        let tries = if command.get_args().any(|arg| arg == "-e") { 4 } else { 20 };
        let args = self.client.iter().map(|arg| arg.replace("{proxy}", proxy));
        let mut client = RunningProgram::start(self.env(command.args(args)));
        client.feed(&self.data);
        let exchanged = match self.peer {
            Peer::None => Some(true),
            // A client with -l whose first connection failed at accept waits for another one.
            Peer::Tcp(word) => address(&mut client, word).map(|at| self.exchange(at) || self.exchange(at)),
            Peer::Udp => address(&mut client, "listening on ").map(|at| self.exchange_datagrams(at, tries)),
        };
        if (self.peer == Peer::Udp || exchanged.is_none()) && client.is_running() {
            let _ = kill_process(pid(client.pid()), Signal::TERM);
        }
        let (status, stdout, stderr) = client.output(LIMIT);
        let status = status.unwrap_or_else(|| panic!("the client hangs: {stderr}\n{log}"));
        // With -l, the data goes to the local connection.
        let is_complete = exchanged == Some(true) && (stdout == self.data || self.client.contains(&"-l".into()));
        Outcome { status: status.code().or(status.signal().map(|signal| 128 + signal)), stderr, is_complete }
    }

    /// Sends the data to a TCP address and reads to the end. Returns true if it was the data.
    fn exchange(&self, at: SocketAddr) -> bool {
        let mut received = Vec::new();
        let result = TcpStream::connect(at).and_then(|mut stream| {
            stream.set_read_timeout(Some(LIMIT))?;
            stream.write_all(&self.data)?;
            stream.shutdown(Shutdown::Write)?;
            stream.read_to_end(&mut received)
        });
        result.is_ok() && received == self.data
    }

    /// Sends the data in a datagram until it comes back, `tries` times at most.
    fn exchange_datagrams(&self, at: SocketAddr, tries: usize) -> bool {
        let socket = UdpSocket::bind((V4, 0)).expect("free port");
        socket.set_read_timeout(Some(Duration::from_millis(300))).expect("timeout set");
        let mut answer = [0; 64];
        let mut is_echoed = || socket.recv(&mut answer).is_ok_and(|n| answer[..n] == self.data);
        (0..tries).any(|_| socket.send_to(&self.data, at).is_ok() && is_echoed())
    }

    /// Runs a session without a fault, which must succeed.
    fn assert_served(&self, log: &str) {
        let Outcome { status, stderr, is_complete } = self.run(log, s5());
        let is_killed = self.peer == Peer::Udp && status == Some(143);
        assert!(is_complete && (status == Some(0) || is_killed), "{status:?}: {stderr}");
    }
}

fn pid(pid: u32) -> Pid {
    Pid::from_raw(pid.try_into().expect("a positive number")).expect("not 0")
}

/// Waits until the client prints an address after this word. `None` if it does not, or exits.
fn address(client: &mut RunningProgram, word: &str) -> Option<SocketAddr> {
    let mut found = None;
    poll_until(LINE_LIMIT, || {
        let is_running = client.is_running();
        found = client.stderr_so_far().lines().find_map(|line| line.strip_prefix(word)?.parse().ok());
        found.is_some() || !is_running
    });
    found
}

/// Calls `check` with each fault. It returns false if the fault was not injected, and panics if s5 does not handle it.
fn inject(faults: BTreeSet<Fault>, check: impl Fn(&str) -> bool) {
    let (mut count, mut failed) = (0, Vec::new());
    for option in faults.iter().map(Fault::option) {
        match catch_unwind(AssertUnwindSafe(|| check(&option))) {
            Ok(was_injected) => count += usize::from(was_injected),
            Err(_) => failed.push(option),
        }
    }
    eprintln!("{count} faults");
    assert!(failed.is_empty(), "failed with {failed:#?}");
    assert!(count >= MIN_FAULTS, "{count} faults");
}

/// Injects faults into the server during a session.
fn server_session(session: &Session) {
    let trace = session.dir.path().join("trace");
    let run = |server: &Server, options: &[&str]| {
        let mut command = Command::new("strace");
        command.args(["-f", "-yy", "-p", &server.pid().to_string(), "-o"]).arg(&trace).args(options);
        let mut strace = RunningProgram::start(&mut command);
        strace.stderr(|stderr| stderr.contains(" attached"));
        let outcome = session.run(&server.log(), s5());
        let _ = kill_process(pid(strace.pid()), Signal::TERM);
        strace.wait_exit(TIMEOUT);
        (outcome, parse(&read_to_string(&trace).expect("file read")))
    };
    let server = session.start_server();
    let (outcome, calls) = run(&server, &[]);
    assert!(outcome.is_complete, "{:?}: {}", outcome.status, outcome.stderr);
    session.assert_served(&server.log());
    let before = server.descriptors();
    drop(server);
    inject(faults(&calls, 0), |option| {
        let mut server = session.start_server();
        let (Outcome { status, stderr, is_complete }, calls) = run(&server, &["-e", option]);
        if !is_injected(&calls) {
            return false;
        }
        eprintln!("{option}: {status:?} {}", stderr.trim_end());
        // A lost datagram is not repeated.
        assert!(status != Some(28) || session.client[0] == "udp", "the server hangs");
        // The client cannot know what its peer has not received, and a Unix socket has no reset.
        let is_known = session.peer == Peer::None && !server.addrs.is_empty();
        assert!(status != Some(0) || is_complete || !is_known, "data is lost, and the client reports success");
        session.assert_served(&server.log());
        wait_until("all descriptors are released", LIMIT, || server.descriptors() <= before);
        server.signal("TERM");
        assert_eq!(server.wait(TIMEOUT).code(), Some(0));
        assert!(!server.log().contains("panic"), "{}", server.log());
        true
    });
}

/// Starts s5 under strace, for a session that `run` runs. Returns the result and the calls.
fn traced<T>(session: &Session, options: &[&str], run: impl FnOnce(Command) -> T) -> (T, Vec<Call>) {
    let trace = session.dir.path().join("trace");
    let mut command = Command::new("strace");
    // With -D strace is a grandchild, and the child is s5.
    command.args(["-D", "-f", "-yy", "-o"]).arg(&trace).args(options).arg(s5().get_program());
    let result = run(command);
    let mut text = String::new();
    wait_until("strace has written everything", LIMIT, || {
        text = read_to_string(&trace).unwrap_or_default();
        ["+++ exited", "+++ killed"].iter().any(|end| text.lines().last().is_some_and(|line| line.contains(end)))
    });
    (result, parse(&text))
}

/// Returns whether there is a fault after the start of main, and none that the kernel would not return.
fn is_injected(calls: &[Call]) -> bool {
    let first = calls.iter().position(|call| call.injected.is_some());
    first.is_some_and(|first| first >= start_of_main(calls)) && calls.iter().all(Call::is_plausible)
}

fn assert_message(stderr: &str, calls: &[Call]) {
    let has_message = stderr.lines().last().is_some_and(|line| line.contains("s5: "));
    let is_stderr = calls.iter().any(|call| call.injected.is_some() && call.writes_to_stderr());
    assert!(has_message || is_stderr, "no message");
    // async-io panics if it cannot start, with the reason.
    assert!(!stderr.contains("panic") || stderr.contains("/async-io-"), "{stderr}");
}

/// Injects faults into the server from its start to its end.
fn server_lifetime(session: &Session) {
    let run = |mut command: Command| {
        let mut server = RunningProgram::start(session.env(command.arg("serve").args(&session.server)));
        let is_listening = |server: &RunningProgram| server.stderr_so_far().contains("listening on ");
        poll_until(LINE_LIMIT, || is_listening(&server) || !server.is_running());
        if is_listening(&server) {
            session.run(&server.stderr_so_far(), s5());
        }
        let _ = kill_process(pid(server.pid()), Signal::TERM);
        let (status, _, stderr) = server.output(LIMIT);
        (status.and_then(|status| status.code()), stderr)
    };
    let ((status, _), calls) = traced(session, &[], run);
    assert_eq!(status, Some(0));
    inject(faults(&calls, start_of_main(&calls)), |option| {
        let ((status, stderr), calls) = traced(session, &["-e", option], run);
        if !is_injected(&calls) {
            return false;
        }
        eprintln!("{option}: {status:?} {}", stderr.trim_end());
        match status {
            Some(0) => {}
            Some(_) => assert_message(&stderr, &calls),
            None => panic!("the server hangs, or was killed by a signal"),
        }
        true
    });
}

/// Injects faults into the client.
fn client(session: &Session) {
    let server = session.start_server();
    let run = |options: &[&str]| traced(session, options, |command| session.run(&server.log(), command));
    let (outcome, calls) = run(&[]);
    assert!(outcome.is_complete, "{:?}: {}", outcome.status, outcome.stderr);
    let before = server.descriptors();
    inject(faults(&calls, start_of_main(&calls)), |option| {
        let (Outcome { status, stderr, is_complete }, calls) = run(&["-e", option]);
        if !is_injected(&calls) {
            return false;
        }
        eprintln!("{option}: {status:?} {}", stderr.trim_end());
        match status {
            Some(0) => assert!(is_complete, "data is lost, and the client reports success"),
            // Nobody reads stdout any more.
            Some(141) => {}
            Some(143) if session.peer == Peer::Udp => {}
            _ => assert_message(&stderr, &calls),
        }
        wait_until("the server releases all descriptors", LIMIT, || server.descriptors() <= before);
        true
    });
    session.assert_served(&server.log());
}

/// Runs a test in a network namespace.
fn torture(test: &str, torture: fn(&Session), session: impl FnOnce() -> Session) {
    if is_installed("strace") && in_namespace(test, HOSTS, RESOLV) {
        torture(&session());
    }
}

const LOOPBACK: &str = "--listen 127.0.0.1:0";
const LOOPBACK_V6: &str = "--listen [::1]:0";
const CONNECT: &str = "connect -x {proxy} -w 6";

fn connect(server: &str) -> Session {
    Session::new(server, &format!("{CONNECT} {}", echo_server()), Peer::None)
}

/// Enough data for splice(2).
fn bulk() -> Session {
    Session { data: vec![b'x'; 1 << 20], ..connect(LOOPBACK) }
}

fn connect_unix() -> Session {
    let mut session = connect("");
    session.server.extend(["--listen".into(), format!("unix:{}", session.dir.path().join("socket").display())]);
    session
}

fn connect_via() -> Session {
    let mut session = connect(LOOPBACK);
    let via = Server::start(&[]);
    session.server.extend(["--via".into(), via.addr().to_string()]);
    session.via = Some(via);
    session
}

fn connect_with_password() -> Session {
    let mut session = connect(LOOPBACK);
    session.server.extend(["--users".into(), write_file(session.dir.path(), "users", &user_line("alice", "secret"))]);
    session.client.iter_mut().for_each(|arg| *arg = arg.replace("{proxy}", "alice:secret@{proxy}"));
    session
}

fn connect_with_gssapi() -> Session {
    let mut session = connect(&format!("{LOOPBACK} --auth gssapi"));
    session.client.extend(["--gssapi-host", "localhost", "--auth", "gssapi"].map(str::to_owned));
    session.realm = Some(Realm::start());
    session
}

fn connect_by_name() -> Session {
    let port = echo_server().port();
    Session::new(LOOPBACK, &format!("{CONNECT} localhost:{port}"), Peer::None)
}

fn bind(listen: &str) -> Session {
    Session::new(listen, "bind -x {proxy} -w 6", Peer::Tcp("bound "))
}

/// Starts a UDP echo server whose port is never one of a server: servers refuse datagrams to their own addresses.
fn udp_echo_at(ip: IpAddr) -> SocketAddr {
    udp_echo(UdpSocket::bind((ip, 7)).expect("the port is free in the namespace"))
}

fn udp(listen: &str, target: IpAddr) -> Session {
    Session::new(listen, &format!("udp -x {{proxy}} -n 1 -w 2 {}", udp_echo_at(target)), Peer::None)
}

fn forward() -> Session {
    Session::new(LOOPBACK, &format!("{CONNECT} -l 0 {}", echo_server()), Peer::Tcp("listening on "))
}

fn udp_forward() -> Session {
    Session::new(LOOPBACK, &format!("udp -x {{proxy}} -w 6 -l 0 {}", udp_echo_at(V4)), Peer::Udp)
}

macro_rules! tests {
    ($($name:ident: $torture:ident($session:expr);)*) => {
        $(
            #[test]
            #[ignore = "make torture"]
            fn $name() {
                torture(stringify!($name), $torture, || $session);
            }
        )*
    };
}

tests! {
    server_survives_faults_of_its_start_and_end: server_lifetime(connect(LOOPBACK));
    server_survives_faults_of_bulk: server_session(bulk());
    server_survives_faults_of_connect: server_session(connect(LOOPBACK));
    server_survives_faults_of_connect_by_name: server_session(connect_by_name());
    server_survives_faults_of_bind: server_session(bind(LOOPBACK));
    server_survives_faults_of_bind_over_ipv6: server_session(bind(LOOPBACK_V6));
    server_survives_faults_of_udp: server_session(udp(LOOPBACK, V4));
    server_survives_faults_of_udp_over_ipv6: server_session(udp(LOOPBACK_V6, V6));
    server_survives_faults_of_connect_on_a_unix_socket: server_session(connect_unix());
    server_survives_faults_of_connect_via_a_proxy: server_session(connect_via());
    server_survives_faults_of_password_login: server_session(connect_with_password());
    server_survives_faults_of_gssapi_login: server_session(connect_with_gssapi());
    client_reports_faults_of_connect: client(connect_by_name());
    client_reports_faults_of_bind: client(bind(LOOPBACK));
    client_reports_faults_of_udp: client(udp(LOOPBACK, V4));
    client_reports_faults_of_forward: client(forward());
    client_reports_faults_of_udp_forward: client(udp_forward());
    client_reports_faults_of_gssapi_login: client(connect_with_gssapi());
}
