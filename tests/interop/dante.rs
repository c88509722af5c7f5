//! danted as a proxy of the clients of s5, and as a client of `s5 serve`.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::process::{ChildStdin, Command, Stdio};

use crate::support::{
    Server, TIMEOUT, closed_port, echo_server, is_installed, run, s5, temp_dir, udp_echo_server, wait_until, write_file,
};
use crate::{LONG_TIMEOUT, ProcessGroup, assert_same, bytes, exit_code, stdout, text, wait_for_session};

const DANTED: &str = "/usr/sbin/danted";
// Exit statuses of s5: login refused, REP 2 and REP 5.
const LOGIN_REFUSED: i32 = 67;
const NOT_ALLOWED: i32 = 102;
const CONNECTION_REFUSED: i32 = 105;

/// A running danted, which listens on 127.0.0.1.
struct Danted {
    _process: ProcessGroup,
    dir: tempfile::TempDir,
    addr: SocketAddr,
}

/// Configuration of danted.
struct Setup<'a> {
    /// Set if a login is required. The only user is anna with the password `open sesame`.
    requires_login: bool,
    /// The commands that are allowed.
    commands: &'a str,
    /// Further lines of the configuration.
    more: &'a str,
}

const ALL_COMMANDS: Setup<'_> =
    Setup { requires_login: false, commands: "connect bind udpassociate bindreply udpreply", more: "" };

impl Danted {
    fn start(setup: &Setup<'_>) -> Self {
        // danted does not accept port 0, and another process may take a port that was free.
        (0..5).find_map(|_| Self::start_on(closed_port(), setup)).expect("danted listens")
    }

    fn start_on(addr: SocketAddr, setup: &Setup<'_>) -> Option<Self> {
        let dir = temp_dir();
        let (user, method) = match setup.requires_login {
            true => ("root".into(), "username"),
            false => (text(&stdout(Command::new("id").arg("-un"), b"")).trim().to_owned(), "none"),
        };
        let log = dir.path().join("log");
        let config = format!(
            "logoutput: {log}\ninternal: {ip} port = {port}\nexternal: 127.0.0.1\nclientmethod: none\n\
             socksmethod: {method}\nuser.privileged: {user}\nuser.unprivileged: {user}\n{more}\n\
             client pass {{\n  from: 0.0.0.0/0 to: 0.0.0.0/0\n}}\n\
             socks pass {{\n  from: 0.0.0.0/0 to: 0.0.0.0/0\n  command: {commands}\n  log: connect error\n}}\n",
            log = log.display(),
            ip = addr.ip(),
            port = addr.port(),
            more = setup.more,
            commands = setup.commands,
        );
        let config = write_file(dir.path(), "danted.conf", &config);
        let pid_file = write_file(dir.path(), "pid", "");
        let mut command = if setup.requires_login { danted_with_test_users(dir.path()) } else { Command::new(DANTED) };
        command.args(["-N", "1", "-f", &config, "-p", &pid_file]).env("TMPDIR", dir.path());
        let mut process = ProcessGroup::start(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()));
        let read_log = || std::fs::read_to_string(&log).unwrap_or_default();
        let mut ended = false;
        wait_until("danted is running", TIMEOUT, || {
            ended = process.has_ended();
            ended || read_log().contains(" running")
        });
        if ended {
            eprintln!("danted:\n{}", read_log());
            return None;
        }
        Some(Self { _process: process, dir, addr })
    }

    fn proxy(&self) -> String {
        format!("socks5h://{}", self.addr)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Waits until the log contains `what`.
    fn wait_for_log(&self, what: &str) {
        wait_until(what, TIMEOUT, || self.log().contains(what));
    }
}

impl Drop for Danted {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("danted's log:\n{}", self.log());
        }
    }
}

/// danted in a namespace with this test's /etc/passwd and /etc/shadow, because it only authenticates system users.
fn danted_with_test_users(dir: &std::path::Path) -> Command {
    // crypt(3) of `open sesame`.
    let shadow = "anna:\
                  $6$abcdefgh$CkjGkP7IIgZVUCNlt.Vi53LOYJLXZ5KzdpzEYCj01XGruA1hxZYJqccTU2zz68oJwAGsd1iPty5F7dHIatUTy/\
                  :19000::::::\n";
    let passwd = "root:x:0:0::/:/bin/false\nanna:x:0:0::/:/bin/false\n";
    let (passwd, shadow) = (write_file(dir, "passwd", passwd), write_file(dir, "shadow", shadow));
    let script = "mount --bind \"$1\" /etc/passwd && mount --bind \"$2\" /etc/shadow && shift 2 && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "--", "sh", "-c", script, "sh", &passwd, &shadow, DANTED]);
    command
}

fn connect(hops: &str, target: SocketAddr) -> Command {
    let mut command = s5();
    command.args(["connect", "-x", hops, &target.to_string()]);
    command
}

/// A running s5 client whose output is read while it runs.
struct RunningClient {
    process: ProcessGroup,
    dir: tempfile::TempDir,
}

impl RunningClient {
    fn start(args: &[&str]) -> Self {
        let dir = temp_dir();
        let file = |name: &str| File::create(dir.path().join(name)).expect("file created");
        let mut command = s5();
        command.args(args).stdin(Stdio::piped()).stdout(file("stdout")).stderr(file("stderr"));
        Self { process: ProcessGroup::start(&mut command), dir }
    }

    fn read_output(&self, name: &str) -> String {
        std::fs::read_to_string(self.dir.path().join(name)).expect("file read")
    }

    /// Waits for the line `word ADDR:PORT` on stderr.
    fn wait_for_addr(&mut self, word: &str) -> SocketAddr {
        let mut found = None;
        wait_until(word, TIMEOUT, || {
            let stderr = self.read_output("stderr");
            // Only complete lines.
            let mut lines = stderr.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
            found = lines.find_map(|line| line.strip_prefix(word)).map(str::to_owned);
            assert!(found.is_some() || !self.process.has_ended(), "the client exited: {stderr}");
            found.is_some()
        });
        found.and_then(|addr| addr.trim().parse().ok()).expect("valid address")
    }

    /// Writes to stdin and returns it. It is closed when dropped.
    fn write_stdin(&mut self, text: &str) -> ChildStdin {
        let mut stdin = self.process.child.stdin.take().expect("stdin is piped");
        stdin.write_all(text.as_bytes()).expect("the client reads");
        stdin
    }

    /// Waits for the client to succeed. Returns its stdout.
    fn output(&mut self) -> String {
        wait_until("the client exits", TIMEOUT, || self.process.has_ended());
        let status = self.process.child.wait().expect("the child can be waited for");
        assert!(status.success(), "{status}: {}", self.read_output("stderr"));
        self.read_output("stdout")
    }
}

/// Runs `s5 bind` through these hops, connects as the peer, and exchanges data in both directions.
fn bind_and_exchange(hops: &str) {
    let mut bind = RunningClient::start(&["bind", "-x", hops, "127.0.0.1"]);
    let mut peer = TcpStream::connect(bind.wait_for_addr("bound ")).expect("the proxy accepts the peer");
    peer.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    assert_eq!(bind.wait_for_addr("accepted "), peer.local_addr().expect("local address"));
    drop(bind.write_stdin("from the client"));
    let mut received = String::new();
    peer.read_to_string(&mut received).expect("the client sends and half-closes");
    assert_eq!(received, "from the client");
    peer.write_all(b"from the peer").expect("the proxy reads");
    drop(peer);
    assert_eq!(bind.output(), "from the peer");
}

/// Sends datagrams through these hops to an echo server, and waits for all answers.
fn udp_and_compare(hops: &str, echo: SocketAddr) {
    let lines = format!("one\n\n{}\n", "x".repeat(8000));
    let mut udp = RunningClient::start(&["udp", "-w", "0", "-x", hops, &echo.to_string()]);
    let stdin = udp.write_stdin(&lines);
    wait_until("all answers arrive", TIMEOUT, || {
        udp.read_output("stdout").len() >= lines.len() || udp.process.has_ended()
    });
    drop(stdin);
    assert_eq!(udp.output(), lines, "{hops}");
}

#[test]
fn connect_through_dante_round_trips() {
    if !is_installed("danted") {
        return;
    }
    let (danted, echo, data) = (Danted::start(&ALL_COMMANDS), echo_server(), bytes(4 << 20));
    assert_same(&stdout(&mut connect(&danted.proxy(), echo), &data), &data);
    danted.wait_for_log("tcp/connect");
    let name = stdout(s5().args(["connect", "-x", &danted.proxy(), "localhost", &echo.port().to_string()]), b"hello");
    assert_eq!(name, b"hello");
}

#[test]
fn connect_through_dante_reports_rep_2_and_rep_5() {
    if !is_installed("danted") {
        return;
    }
    let danted = Danted::start(&Setup { commands: "connect", ..ALL_COMMANDS });
    let target = closed_port();
    let output = run(&mut connect(&danted.proxy(), target), b"", LONG_TIMEOUT);
    let stderr = text(&output.stderr);
    assert_eq!(exit_code(&output), CONNECTION_REFUSED, "{stderr}");
    assert!(stderr.contains(&target.to_string()) && stderr.contains("refused (REP 5)"), "{stderr}");
    let output = run(s5().args(["bind", "-x", &danted.proxy(), "127.0.0.1"]), b"", LONG_TIMEOUT);
    assert_eq!(exit_code(&output), NOT_ALLOWED, "{}", text(&output.stderr));
    let output = run(s5().args(["udp", "-x", &danted.proxy(), &target.to_string()]), b"", LONG_TIMEOUT);
    assert_eq!(exit_code(&output), NOT_ALLOWED, "{}", text(&output.stderr));
}

#[test]
fn bind_through_dante_exchanges_data_with_peer() {
    if !is_installed("danted") {
        return;
    }
    let danted = Danted::start(&ALL_COMMANDS);
    bind_and_exchange(&danted.proxy());
    danted.wait_for_log("tcp/bindreply");
}

#[test]
fn udp_through_dante_gets_answers() {
    if !is_installed("danted") {
        return;
    }
    let (danted, echo) = (Danted::start(&ALL_COMMANDS), udp_echo_server(Ipv4Addr::LOCALHOST.into()));
    udp_and_compare(&danted.proxy(), echo);
    danted.wait_for_log("udp/udpassociate");
}

#[test]
fn s5_logs_in_to_dante_with_the_right_password_only() {
    if !is_installed("danted") || !is_installed("unshare") {
        return;
    }
    let (danted, echo) = (Danted::start(&Setup { requires_login: true, ..ALL_COMMANDS }), echo_server());
    let udp = udp_echo_server(Ipv4Addr::LOCALHOST.into());
    let proxy = |userinfo: &str| format!("socks5h://{userinfo}{}", danted.addr);
    assert_eq!(stdout(&mut connect(&proxy("anna:open%20sesame@"), echo), b"hello"), b"hello");
    udp_and_compare(&proxy("anna:open%20sesame@"), udp);
    bind_and_exchange(&proxy("anna:open%20sesame@"));
    for userinfo in ["anna:sesame@", "berta:open%20sesame@", ""] {
        let output = run(&mut connect(&proxy(userinfo), echo), b"", LONG_TIMEOUT);
        assert_eq!(exit_code(&output), LOGIN_REFUSED, "{userinfo}: {}", text(&output.stderr));
        assert!(!text(&output.stderr).contains("sesame"), "{}", text(&output.stderr));
    }
}

#[test]
fn connect_and_bind_pass_through_chains_of_dante_and_s5() {
    if !is_installed("danted") {
        return;
    }
    let (danted, first, last) = (Danted::start(&ALL_COMMANDS), Server::start(&[]), Server::start(&[]));
    let (echo, data) = (echo_server(), bytes(1 << 20));
    let hops = format!("{},{},{}", first.addr(), danted.addr, last.addr());
    assert_same(&stdout(&mut connect(&hops, echo), &data), &data);
    wait_for_session(&first, &["command=connect", &format!("dst=\"{}\"", danted.addr), "rep=0"]);
    wait_for_session(&last, &["command=connect", &format!("dst=\"{echo}\""), "rep=0"]);
    danted.wait_for_log(&format!("127.0.0.1.{}", last.addr().port()));
    bind_and_exchange(&format!("{},{}", first.addr(), danted.addr));
    bind_and_exchange(&format!("{},{}", danted.addr, last.addr()));
}

#[test]
fn udp_passes_through_chains_with_dante_first_or_last() {
    if !is_installed("danted") {
        return;
    }
    let (danted, server) = (Danted::start(&ALL_COMMANDS), Server::start(&[]));
    let echo = udp_echo_server(IpAddr::from(Ipv4Addr::LOCALHOST));
    udp_and_compare(&format!("{},{}", server.addr(), danted.addr), echo);
    udp_and_compare(&format!("{},{}", danted.addr, server.addr()), echo);
}

#[test]
fn dante_forwards_connect_to_s5() {
    if !is_installed("danted") {
        return;
    }
    let (server, echo, data) = (Server::start(&[]), echo_server(), bytes(1 << 20));
    let route = format!(
        "route {{\n  from: 0.0.0.0/0 to: 0.0.0.0/0 via: 127.0.0.1 port = {}\n  command: connect\n  \
         proxyprotocol: socks_v5\n  protocol: tcp\n  method: none\n}}",
        server.addr().port()
    );
    let danted = Danted::start(&Setup { more: &route, ..ALL_COMMANDS });
    assert_same(&stdout(&mut connect(&danted.proxy(), echo), &data), &data);
    wait_for_session(&server, &["command=connect", &format!("dst=\"{echo}\""), "rep=0"]);
}
