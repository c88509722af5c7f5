//! Dante's server: what our clients do with a server that is not ours, and what it does as a client of ours.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::process::{ChildStdin, Command, Stdio};

use crate::common::{
    Server, TIMEOUT, closed_port, echo_server, is_installed, run, s5, temp_dir, udp_echo_server, wait_until, write_file,
};
use crate::{LONG, Process, assert_same, code, octets, session, stdout, text};

const DANTED: &str = "/usr/sbin/danted";
/// What our clients exit with: login refused, and REP 2 and 5.
const LOGIN: i32 = 67;
const NOT_ALLOWED: i32 = 102;
const REFUSED: i32 = 105;

/// A server of Dante's, which listens on 127.0.0.1.
struct Danted {
    _process: Process,
    folder: tempfile::TempDir,
    addr: SocketAddr,
}

/// How it is set up.
struct Setup<'a> {
    /// With system users, of which there is one: anna with `open sesame`.
    login: bool,
    /// The commands that it lets through.
    commands: &'a str,
    /// More lines of its configuration.
    more: &'a str,
}

const ALL: Setup<'_> = Setup { login: false, commands: "connect bind udpassociate bindreply udpreply", more: "" };

impl Danted {
    fn start(setup: &Setup<'_>) -> Self {
        // It takes no port 0, and somebody may be faster to take a port that was free.
        (0..5).find_map(|_| Self::start_on(closed_port(), setup)).expect("danted listens")
    }

    fn start_on(addr: SocketAddr, setup: &Setup<'_>) -> Option<Self> {
        let folder = temp_dir();
        let (user, method) = match setup.login {
            true => ("root".into(), "username"),
            false => (text(&stdout(Command::new("id").arg("-un"), b"")).trim().to_owned(), "none"),
        };
        let log = folder.path().join("log");
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
        let config = write_file(folder.path(), "danted.conf", &config);
        let pid_file = write_file(folder.path(), "pid", "");
        let mut command = if setup.login { with_users_of_its_own(folder.path()) } else { Command::new(DANTED) };
        command.args(["-N", "1", "-f", &config, "-p", &pid_file]).env("TMPDIR", folder.path());
        let mut process = Process::start(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()));
        let read_log = || std::fs::read_to_string(&log).unwrap_or_default();
        let mut ended = false;
        wait_until("danted runs", TIMEOUT, || {
            ended = process.has_ended();
            ended || read_log().contains(" running")
        });
        if ended {
            eprintln!("danted:\n{}", read_log());
            return None;
        }
        Some(Self { _process: process, folder, addr })
    }

    fn proxy(&self) -> String {
        format!("socks5h://{}", self.addr)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Waits until the log has a line with this in it.
    fn logged(&self, what: &str) {
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

/// Dante logs in users of the system alone, so this gives it other files of them, in a namespace of its own.
fn with_users_of_its_own(folder: &std::path::Path) -> Command {
    // crypt(3) of `open sesame`.
    let shadow = "anna:\
                  $6$abcdefgh$CkjGkP7IIgZVUCNlt.Vi53LOYJLXZ5KzdpzEYCj01XGruA1hxZYJqccTU2zz68oJwAGsd1iPty5F7dHIatUTy/\
                  :19000::::::\n";
    let passwd = "root:x:0:0::/:/bin/false\nanna:x:0:0::/:/bin/false\n";
    let (passwd, shadow) = (write_file(folder, "passwd", passwd), write_file(folder, "shadow", shadow));
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

/// A client of ours that is watched while it runs.
struct Client {
    process: Process,
    folder: tempfile::TempDir,
}

impl Client {
    fn start(args: &[&str]) -> Self {
        let folder = temp_dir();
        let file = |name: &str| File::create(folder.path().join(name)).expect("a file");
        let mut command = s5();
        command.args(args).stdin(Stdio::piped()).stdout(file("stdout")).stderr(file("stderr"));
        Self { process: Process::start(&mut command), folder }
    }

    fn wrote(&self, name: &str) -> String {
        std::fs::read_to_string(self.folder.path().join(name)).expect("the file is there")
    }

    /// Waits for the line `word ADDR:PORT` on stderr.
    fn says(&mut self, word: &str) -> SocketAddr {
        let mut found = None;
        wait_until(word, TIMEOUT, || {
            let said = self.wrote("stderr");
            // Not a line that is half written.
            let mut lines = said.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
            found = lines.find_map(|line| line.strip_prefix(word)).map(str::to_owned);
            assert!(found.is_some() || !self.process.has_ended(), "it ended: {said}");
            found.is_some()
        });
        found.and_then(|addr| addr.trim().parse().ok()).expect("an address")
    }

    /// Writes to its stdin, all that there will be once this is dropped.
    fn tell(&mut self, what: &str) -> ChildStdin {
        let mut stdin = self.process.child.stdin.take().expect("stdin is piped");
        stdin.write_all(what.as_bytes()).expect("it reads");
        stdin
    }

    /// Waits for its end, which must be a good one, and gives what it wrote to stdout.
    fn output(&mut self) -> String {
        wait_until("the client ends", TIMEOUT, || self.process.has_ended());
        let status = self.process.child.wait().expect("it has ended");
        assert!(status.success(), "{status}: {}", self.wrote("stderr"));
        self.wrote("stdout")
    }
}

/// Binds through these hops, comes as the peer, and talks both ways.
fn bind_and_talk(hops: &str) {
    let mut bind = Client::start(&["bind", "-x", hops, "127.0.0.1"]);
    let mut peer = TcpStream::connect(bind.says("bound ")).expect("the proxy accepts the peer");
    peer.set_read_timeout(Some(TIMEOUT)).expect("a timeout can be set");
    assert_eq!(bind.says("accepted "), peer.local_addr().expect("an address"));
    drop(bind.tell("from the client"));
    let mut heard = String::new();
    peer.read_to_string(&mut heard).expect("the client speaks and half-closes");
    assert_eq!(heard, "from the client");
    peer.write_all(b"from the peer").expect("the proxy reads");
    drop(peer);
    assert_eq!(bind.output(), "from the peer");
}

/// Sends datagrams through these hops to an echo, and waits for all of them.
fn udp_and_compare(hops: &str, echo: SocketAddr) {
    let lines = format!("one\n\n{}\n", "x".repeat(8000));
    let mut udp = Client::start(&["udp", "-w", "0", "-x", hops, &echo.to_string()]);
    let stdin = udp.tell(&lines);
    wait_until("all answers", TIMEOUT, || udp.wrote("stdout").len() >= lines.len() || udp.process.has_ended());
    drop(stdin);
    assert_eq!(udp.output(), lines, "{hops}");
}

#[test]
fn connect_through_dante_gets_back_what_it_sends() {
    if !is_installed("danted") {
        return;
    }
    let (danted, echo, data) = (Danted::start(&ALL), echo_server(), octets(4 << 20));
    assert_same(&stdout(&mut connect(&danted.proxy(), echo), &data), &data);
    danted.logged("tcp/connect");
    let name = stdout(s5().args(["connect", "-x", &danted.proxy(), "localhost", &echo.port().to_string()]), b"hello");
    assert_eq!(name, b"hello");
}

#[test]
fn connect_through_dante_tells_a_refusal_from_a_rule() {
    if !is_installed("danted") {
        return;
    }
    let danted = Danted::start(&Setup { commands: "connect", ..ALL });
    let target = closed_port();
    let output = run(&mut connect(&danted.proxy(), target), b"", LONG);
    let said = text(&output.stderr);
    assert_eq!(code(&output), REFUSED, "{said}");
    assert!(said.contains(&target.to_string()) && said.contains("refused (REP 5)"), "{said}");
    let output = run(s5().args(["bind", "-x", &danted.proxy(), "127.0.0.1"]), b"", LONG);
    assert_eq!(code(&output), NOT_ALLOWED, "{}", text(&output.stderr));
    let output = run(s5().args(["udp", "-x", &danted.proxy(), &target.to_string()]), b"", LONG);
    assert_eq!(code(&output), NOT_ALLOWED, "{}", text(&output.stderr));
}

#[test]
fn bind_through_dante_talks_to_its_peer() {
    if !is_installed("danted") {
        return;
    }
    let danted = Danted::start(&ALL);
    bind_and_talk(&danted.proxy());
    danted.logged("tcp/bindreply");
}

#[test]
fn udp_through_dante_gets_its_answers() {
    if !is_installed("danted") {
        return;
    }
    let (danted, echo) = (Danted::start(&ALL), udp_echo_server(Ipv4Addr::LOCALHOST.into()));
    udp_and_compare(&danted.proxy(), echo);
    danted.logged("udp/udpassociate");
}

#[test]
fn dante_logs_in_who_has_the_right_password() {
    if !is_installed("danted") || !is_installed("unshare") {
        return;
    }
    let (danted, echo) = (Danted::start(&Setup { login: true, ..ALL }), echo_server());
    let udp = udp_echo_server(Ipv4Addr::LOCALHOST.into());
    let proxy = |userinfo: &str| format!("socks5h://{userinfo}{}", danted.addr);
    assert_eq!(stdout(&mut connect(&proxy("anna:open%20sesame@"), echo), b"hello"), b"hello");
    udp_and_compare(&proxy("anna:open%20sesame@"), udp);
    bind_and_talk(&proxy("anna:open%20sesame@"));
    for userinfo in ["anna:sesame@", "berta:open%20sesame@", ""] {
        let output = run(&mut connect(&proxy(userinfo), echo), b"", LONG);
        assert_eq!(code(&output), LOGIN, "{userinfo}: {}", text(&output.stderr));
        assert!(!text(&output.stderr).contains("sesame"), "{}", text(&output.stderr));
    }
}

#[test]
fn chains_lead_through_dante_and_servers_of_ours() {
    if !is_installed("danted") {
        return;
    }
    let (danted, first, last) = (Danted::start(&ALL), Server::start(&[]), Server::start(&[]));
    let (echo, data) = (echo_server(), octets(1 << 20));
    let hops = format!("{},{},{}", first.addr(), danted.addr, last.addr());
    assert_same(&stdout(&mut connect(&hops, echo), &data), &data);
    session(&first, &["command=connect", &format!("dst=\"{}\"", danted.addr), "rep=0"]);
    session(&last, &["command=connect", &format!("dst=\"{echo}\""), "rep=0"]);
    danted.logged(&format!("127.0.0.1.{}", last.addr().port()));
    bind_and_talk(&format!("{},{}", first.addr(), danted.addr));
    bind_and_talk(&format!("{},{}", danted.addr, last.addr()));
}

#[test]
fn datagrams_pass_chains_with_dante_in_either_place() {
    if !is_installed("danted") {
        return;
    }
    let (danted, server) = (Danted::start(&ALL), Server::start(&[]));
    let echo = udp_echo_server(IpAddr::from(Ipv4Addr::LOCALHOST));
    udp_and_compare(&format!("{},{}", server.addr(), danted.addr), echo);
    udp_and_compare(&format!("{},{}", danted.addr, server.addr()), echo);
}

#[test]
fn dante_forwards_to_our_server_as_its_client() {
    if !is_installed("danted") {
        return;
    }
    let (server, echo, data) = (Server::start(&[]), echo_server(), octets(1 << 20));
    let route = format!(
        "route {{\n  from: 0.0.0.0/0 to: 0.0.0.0/0 via: 127.0.0.1 port = {}\n  command: connect\n  \
         proxyprotocol: socks_v5\n  protocol: tcp\n  method: none\n}}",
        server.addr().port()
    );
    let danted = Danted::start(&Setup { more: &route, ..ALL });
    assert_same(&stdout(&mut connect(&danted.proxy(), echo), &data), &data);
    session(&server, &["command=connect", &format!("dst=\"{echo}\""), "rep=0"]);
}
