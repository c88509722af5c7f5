//! The behaviour table: scripts of proxies, and of servers that are not proxies, with the exit status, message and
//! output that `s5 connect` must have. Other clients can be run against the same table.

use std::fs::OpenOptions;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::scripted::{
    LOGIN_SUCCESS, SELECT_NO_AUTH, SELECT_PASSWORD, SUCCESS_REPLY, ScriptedServer, Step, reply_with, reset, send,
    success_reply, text, with_stream,
};
use crate::support::{closed_port, echo_server};

use Step::{Greeting, Login, Request, Reset, SendByteByByte, WaitForClose};

/// Target of the request, unless a row has another.
pub const TARGET: &str = "target.example:80";
/// Timeout of the client in rows that expect a timeout.
pub const SHORT_TIMEOUT: &str = "500ms";

/// The server at the proxy's address.
pub enum Proxy {
    /// A scripted server.
    Script(Box<dyn Fn() -> Vec<Step> + Send + Sync>),
    /// A scripted server at `localhost`, whose IPv6 address may refuse connections.
    Localhost(Box<dyn Fn() -> Vec<Step> + Send + Sync>),
    /// No server: connections are refused.
    Down,
    /// An echo server.
    Echo,
    /// A listener whose accept queue is full: connections are never established.
    Unresponsive,
}

/// State of the client's stdin and stdout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StdioSetup {
    /// stdin is empty, stdout is read.
    Plain,
    /// stdin stays open.
    OpenStdin,
    /// stdin stays open, stdout is /dev/full.
    FullStdout,
    /// stdin stays open, stdout is closed after one read.
    ClosedStdout,
}

/// One row of the table.
pub struct Behaviour {
    pub name: &'static str,
    pub userinfo: &'static str,
    pub target: String,
    pub proxy: Proxy,
    pub stdio: StdioSetup,
    /// Set if the client has an idle timeout of `SHORT_TIMEOUT`.
    pub has_idle_timeout: bool,
    /// Exit status of s5.
    pub status: i32,
    /// Message of s5 after `s5: proxy ADDR: `; empty if s5 prints none.
    pub message: String,
    /// Output of s5 on stdout.
    pub stdout: Vec<u8>,
    /// Set if the proxy must receive this request.
    pub request: Option<Vec<u8>>,
}

/// Result of a client's run.
#[derive(Debug)]
pub struct Outcome {
    pub addr: SocketAddr,
    /// Exit status, or 128 plus the signal's number. `None` if the client exceeded its time limit and was killed.
    pub status: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: String,
    /// Messages that the scripted server received.
    pub messages: Vec<Vec<u8>>,
}

impl Behaviour {
    /// Runs a client against the proxy. `client` creates its command from the proxy's host and port.
    pub fn run(&self, limit: Duration, client: impl FnOnce(&Self, &str, u16) -> Command) -> Outcome {
        let script = |script: &(dyn Fn() -> Vec<Step> + Send + Sync)| {
            let proxy = ScriptedServer::start(script());
            (proxy.addr, Some(proxy))
        };
        let mut kept_open = Vec::new();
        let (addr, proxy) = match &self.proxy {
            Proxy::Script(make) | Proxy::Localhost(make) => script(make),
            Proxy::Down => (closed_port(), None),
            Proxy::Echo => (echo_server(), None),
            Proxy::Unresponsive => (unresponsive_listener(&mut kept_open), None),
        };
        let host = if matches!(self.proxy, Proxy::Localhost(_)) { "localhost" } else { "127.0.0.1" };
        let mut command = client(self, host, addr.port());
        let full = || OpenOptions::new().write(true).open("/dev/full").expect("/dev/full").into();
        let stdout = if self.stdio == StdioSetup::FullStdout { full() } else { Stdio::piped() };
        let spawned = command.stdin(Stdio::piped()).stdout(stdout).stderr(Stdio::piped()).spawn();
        let mut child = spawned.unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let stdin = child.stdin.take().filter(|_| self.stdio != StdioSetup::Plain);
        let reads_once = self.stdio == StdioSetup::ClosedStdout;
        let out = child.stdout.take().map(|mut out| thread::spawn(move || read_pipe(&mut out, reads_once)));
        let err = child.stderr.take().map(|mut err| thread::spawn(move || read_pipe(&mut err, false)));
        let deadline = Instant::now() + limit;
        let status = loop {
            match child.try_wait().expect("the child can be waited for") {
                Some(status) => {
                    break status.code().or(std::os::unix::process::ExitStatusExt::signal(&status).map(|n| n + 128));
                }
                None if Instant::now() >= deadline => {
                    let _ = child.kill();
                    let _ = child.wait();
                    break None;
                }
                None => thread::sleep(Duration::from_millis(2)),
            }
        };
        drop(stdin);
        let all = |reader: Option<thread::JoinHandle<Vec<u8>>>| {
            reader.map(|reader| reader.join().expect("the thread does not panic"))
        };
        let (stdout, stderr) = (all(out).unwrap_or_default(), text(&all(err).unwrap_or_default()));
        let messages = proxy.filter(|_| self.request.is_some()).map(|proxy| proxy.messages()).unwrap_or_default();
        Outcome { addr, status, stdout, stderr, messages }
    }
}

fn read_pipe(pipe: &mut impl std::io::Read, reads_once: bool) -> Vec<u8> {
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(n @ 1..) = pipe.read(&mut buffer) {
        all.extend(&buffer[..n]);
        if reads_once {
            break;
        }
    }
    all
}

/// A listener whose accept queue is full, so that the kernel drops each SYN.
fn unresponsive_listener(kept_open: &mut Vec<Box<dyn std::any::Any>>) -> SocketAddr {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("socket created");
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).expect("free port");
    socket.listen(0).expect("listening");
    let addr = socket.local_addr().ok().and_then(|addr| addr.as_socket()).expect("local address");
    while let Ok(stream) = TcpStream::connect_timeout(&addr, Duration::from_millis(100)) {
        kept_open.push(Box::new(stream));
    }
    kept_open.push(Box::new(socket));
    addr
}

fn behaviour(name: &'static str, script: impl Fn() -> Vec<Step> + Send + Sync + 'static) -> Behaviour {
    Behaviour {
        name,
        userinfo: "",
        target: TARGET.into(),
        proxy: Proxy::Script(Box::new(script)),
        stdio: StdioSetup::Plain,
        has_idle_timeout: false,
        status: 0,
        message: String::new(),
        stdout: Vec::new(),
        request: None,
    }
}

/// A row whose script starts after the request, without login.
fn after_request(name: &'static str, script: impl Fn() -> Vec<Step> + Send + Sync + 'static) -> Behaviour {
    behaviour(name, move || [Greeting, send(SELECT_NO_AUTH), Request].into_iter().chain(script()).collect())
}

/// A row whose script starts after the user name and password.
fn at_login(name: &'static str, script: impl Fn() -> Vec<Step> + Send + Sync + 'static) -> Behaviour {
    let script = move || [Greeting, send(SELECT_PASSWORD), Login].into_iter().chain(script()).collect();
    Behaviour { userinfo: "alice:secret@", ..behaviour(name, script) }
}

/// A row whose proxy opens a tunnel; `target` acts as the target.
fn on_tunnel(name: &'static str, target: fn(TcpStream)) -> Behaviour {
    behaviour(name, move || reply_with(SUCCESS_REPLY).into_iter().chain([with_stream(target)]).collect())
}

impl Behaviour {
    /// Expects a failure with this status, in this phase, for this reason.
    fn fails(self, status: i32, phase: &str, reason: &str) -> Self {
        let message = format!("{phase}, for {}: {reason}", self.target);
        Self { status, message, ..self }
    }

    fn transfer_fails(self, status: i32, reason: &str) -> Self {
        self.fails(status, "transfer", reason)
    }

    fn writes(self, stdout: &[u8]) -> Self {
        Self { stdout: stdout.into(), ..self }
    }

    fn with_stdio(self, stdio: StdioSetup) -> Self {
        Self { stdio, ..self }
    }

    fn requests(self, target: &str, request: Vec<u8>) -> Self {
        Self { target: target.into(), request: Some(request), ..self }
    }
}

const REPS: [&str; 9] = [
    "general SOCKS server failure",
    "not allowed by ruleset",
    "network unreachable",
    "host unreachable",
    "connection refused",
    "TTL expired",
    "command not supported",
    "address type not supported",
    "unassigned reply code",
];

/// The whole table.
pub fn behaviours() -> Vec<Behaviour> {
    let mut all = failure_replies();
    all.extend(timeouts_and_closes());
    all.extend(other_protocols());
    all.extend(success_replies());
    all.extend(targets_and_credentials());
    all.extend(transfers());
    all
}

fn failure_replies() -> Vec<Behaviour> {
    let no_method = "no acceptable authentication method (add user:password@ to the proxy's URL, or run kinit)";
    let refused = "user name or password refused";
    let down = |name| Behaviour { proxy: Proxy::Down, ..behaviour(name, Vec::new) };
    let mut all = vec![
        down("the proxy is down").fails(7, "connecting to the proxy", "connection refused (is the proxy running?)"),
        behaviour("no acceptable authentication method", || vec![Greeting, send(&[5, 0xff])])
            .fails(67, "greeting", no_method),
        at_login("wrong password", || vec![send(&[1, 1])]).fails(67, "login", refused),
        at_login("wrong password, STATUS 255", || vec![send(&[1, 255])]).fails(67, "login", refused),
    ];
    let name = |rep: u8| {
        [
            "REP 1",
            "REP 2",
            "REP 3",
            "REP 4",
            "REP 5",
            "REP 6",
            "REP 7",
            "REP 8",
            "REP 9, unassigned",
            "REP 255, unassigned",
        ][usize::from(rep.min(10)) - 1]
    };
    for rep in (1..=9).chain([255_u8]) {
        let script = move || vec![send(&[5, rep, 0, 1, 0, 0, 0, 0, 0, 0]), WaitForClose];
        let reason = format!("{} (REP {rep})", REPS[usize::from(rep.min(9)) - 1]);
        all.push(after_request(name(rep), script).fails(100 + i32::from(rep.min(9)), "request", &reason));
    }
    let refused = "connection refused (REP 5)";
    let truncated =
        |name, reply: &'static [u8]| after_request(name, move || vec![send(reply)]).fails(105, "request", refused);
    all.extend([
        truncated("failure reply truncated after 2 bytes", &[5, 5]),
        truncated("failure reply truncated after 3 bytes", &[5, 5, 0]),
        truncated("failure reply truncated in the address", &[5, 5, 0, 1, 127]),
        truncated("failure reply with ATYP 0", &[5, 5, 0, 0, 0, 0, 0, 0]),
    ]);
    all
}

fn timeouts_and_closes() -> Vec<Behaviour> {
    let timed_out = "timed out after 500ms";
    let closed = "the proxy closed the connection";
    let denied = "the proxy closed the connection (its rules or limits may deny this client)";
    let reset = "connection reset by peer";
    let reset_denied = "connection reset by peer (its rules or limits may deny this client)";
    let unresponsive =
        Behaviour { proxy: Proxy::Unresponsive, ..behaviour("the proxy never accepts the connection", Vec::new) };
    let timeouts = [
        unresponsive.fails(28, "connecting to the proxy", timed_out),
        behaviour("no answer to the greeting", || vec![WaitForClose]).fails(28, "greeting", timed_out),
        behaviour("method selection stalls after 1 byte", || vec![Greeting, send(&[5]), WaitForClose])
            .fails(28, "greeting", timed_out),
        at_login("no answer to user name and password", || vec![WaitForClose]).fails(28, "login", timed_out),
        at_login("no answer to the request, after a login", || vec![send(LOGIN_SUCCESS), WaitForClose])
            .fails(28, "request", timed_out),
        after_request("no answer to the request", || vec![WaitForClose]).fails(28, "request", timed_out),
        after_request("reply stalls in the address", || vec![send(&[5, 0, 0, 3, 200, b'x']), WaitForClose])
            .fails(28, "request", timed_out),
    ];
    let closes = [
        behaviour("closes after the greeting", || vec![Greeting]).fails(97, "greeting", denied),
        behaviour("closes in the method selection", || vec![Greeting, send(&[5])]).fails(97, "greeting", denied),
        at_login("closes after user name and password", Vec::new).fails(97, "login", closed),
        at_login("closes after the request, after a login", || vec![send(LOGIN_SUCCESS), Request])
            .fails(97, "request", closed),
        after_request("closes after the request", Vec::new).fails(97, "request", closed),
        after_request("closes in a success reply", || vec![send(&SUCCESS_REPLY[..9])]).fails(97, "request", closed),
        behaviour("resets after the greeting", || vec![Greeting, Reset]).fails(97, "greeting", reset_denied),
        at_login("resets after user name and password", || vec![Reset]).fails(97, "login", reset),
        at_login("resets after the request, after a login", || vec![send(LOGIN_SUCCESS), Request, Reset])
            .fails(97, "request", reset),
        after_request("resets after the request", || vec![Reset]).fails(97, "request", reset),
    ];
    timeouts.into_iter().chain(closes).collect()
}

fn other_protocols() -> Vec<Behaviour> {
    let not_socks5 = |what: &str| format!("not a SOCKS5 server ({what})");
    let sends = |name, first: &'static [u8], what: &str| {
        behaviour(name, move || vec![Greeting, send(first)]).fails(97, "greeting", &not_socks5(what))
    };
    let replies = |name, reply: &'static [u8], what: &str| {
        after_request(name, move || vec![send(reply)]).fails(97, "request", &not_socks5(what))
    };
    let echo = |name| Behaviour { proxy: Proxy::Echo, ..behaviour(name, Vec::new) };
    let gssapi = "selected gssapi, which was not offered";
    let banner = behaviour("an SSH server, which sends its banner first", || {
        vec![send(b"SSH-2.0-OpenSSH_9.2\r\n"), WaitForClose]
    });
    vec![
        sends("an HTTP server", b"HTTP/1.1 400 Bad Request\r\n\r\n", "first byte 0x48 'H', HTTP?"),
        sends("a TLS server", &[0x15, 3, 1, 0, 2, 2, 70], "first byte 0x15, TLS?"),
        sends("a SOCKS4 server", &[0, 0x5b, 0, 0, 0, 0, 0, 0], "first byte 0x00, SOCKS4?"),
        sends("another protocol", &[0x1b, b'[', b'2', b'J'], "first byte 0x1b"),
        banner.fails(97, "greeting", &not_socks5("first byte 0x53 'S', SSH?")),
        echo("an echo server").fails(97, "greeting", &not_socks5(gssapi)),
        Behaviour { userinfo: "alice:secret@", ..echo("an echo server, with user name and password") }.fails(
            97,
            "login",
            &not_socks5("expected authentication version 1, found 0"),
        ),
        sends("method selection with VER 4", &[4, 0], "first byte 0x04, SOCKS4?"),
        at_login("login status with VER 5", || vec![send(&[5, 0])]).fails(
            97,
            "login",
            &not_socks5("expected authentication version 1, found 5"),
        ),
        replies("success reply with VER 4", &[4, 0, 0, 1, 0, 0, 0, 0, 0, 0], "first byte 0x04, SOCKS4?"),
        replies("success reply with ATYP 2", &[5, 0, 0, 2, 0, 0, 0, 0, 0, 0], "unknown address type 2"),
        sends("selects GSSAPI, which was not offered", &[5, 1], gssapi),
        sends(
            "selects password authentication, which was not offered",
            &[5, 2],
            "selected password, which was not offered",
        ),
        sends(
            "selects a private method, which was not offered",
            &[5, 0x80],
            "selected method 0x80, which was not offered",
        ),
    ]
}

fn success_replies() -> Vec<Behaviour> {
    let name = |length: u8| [&[5, 0, 0, 3, length][..], &vec![b'n'; length.into()], &[4, 56]].concat();
    let v6 = success_reply("[2001:db8::9]:1080".parse().expect("valid address"));
    let with_reply = |what, reply: Vec<u8>| {
        let reply = [&reply[..], b"hello"].concat();
        after_request(what, move || vec![send(&reply)]).writes(b"hello")
    };
    vec![
        after_request("data after the reply", || vec![send(SUCCESS_REPLY), send(b"hello")]).writes(b"hello"),
        with_reply("data in the same segment as the reply", SUCCESS_REPLY.into()),
        with_reply("BND is an IPv6 address", v6),
        with_reply("BND is a name", name(9)),
        with_reply("BND is a name of 255 bytes", name(255)),
        with_reply("BND is a name of 0 bytes", name(0)),
        with_reply("RSV is not 0", vec![5, 0, 7, 1, 192, 0, 2, 9, 4, 56]),
        behaviour("all answers are sent byte by byte", move || {
            let reply = [&name(9)[..], b"hello"].concat();
            vec![
                Greeting,
                SendByteByByte(SELECT_PASSWORD.into()),
                Login,
                SendByteByByte(LOGIN_SUCCESS.into()),
                Request,
                SendByteByByte(reply),
            ]
        })
        .writes(b"hello")
        .with_password(),
        behaviour("the proxy does not require the offered password", || {
            vec![Greeting, send(SELECT_NO_AUTH), Request, send(SUCCESS_REPLY), send(b"hello")]
        })
        .writes(b"hello")
        .with_password(),
    ]
}

impl Behaviour {
    fn with_password(self) -> Self {
        Self { userinfo: "alice:secret@", ..self }
    }
}

fn targets_and_credentials() -> Vec<Behaviour> {
    let hello = |name| after_request(name, || vec![send(SUCCESS_REPLY), send(b"hello")]).writes(b"hello");
    let login = |name| {
        at_login(name, || vec![send(LOGIN_SUCCESS), Request, send(SUCCESS_REPLY), send(b"hello")]).writes(b"hello")
    };
    let request = |rest: &[u8]| [&[5, 1, 0][..], rest].concat();
    let v6 = request(&[&[4][..], &[0x20, 1, 0x0d, 0xb8], &[0; 11], &[7, 0, 80]].concat());
    let long = "n".repeat(255);
    let of_name = |name: &str| {
        request(&[&[3, u8::try_from(name.len()).expect("at most 255")], name.as_bytes(), &[0, 80]].concat())
    };
    let without_proxy = |name, userinfo, target: &str| Behaviour {
        userinfo,
        target: target.into(),
        proxy: Proxy::Down,
        ..behaviour(name, Vec::new)
    };
    let mut first_refuses = hello("first address of the proxy's name refuses connections");
    if let Proxy::Script(script) = first_refuses.proxy {
        first_refuses.proxy = Proxy::Localhost(script);
    }
    vec![
        hello("the target's name is sent to the proxy").requests("target.example:80", of_name("target.example")),
        hello("target name of 255 bytes").requests(&format!("{long}:80"), of_name(&long)),
        without_proxy("target name of 256 bytes", "", &format!("{long}n:80"))
            .usage_error("target: the host name has 256 bytes: SOCKS5 allows 255"),
        hello("IPv4 target is sent as ATYP 1").requests("192.0.2.7:80", request(&[1, 192, 0, 2, 7, 0, 80])),
        hello("IPv6 target in brackets is sent as ATYP 4").requests("[2001:db8::7]:80", v6.clone()),
        hello("IPv6 target without brackets is sent as ATYP 4").requests("2001:db8::7 80", v6),
        without_proxy("empty password", "alice:@", TARGET)
            .usage_error("the password has 0 bytes: SOCKS5 allows 1 to 255"),
        Behaviour { userinfo: "al%40ice:p%3A%40%25@", ..login("`@`, `:` and `%` in user name and password") }
            .writes(b"hello"),
        without_proxy("user name without a password, and no terminal for a prompt", "alice@", TARGET)
            .password_is_missing(),
        first_refuses,
    ]
}

impl Behaviour {
    /// Expects a failure before connecting to the proxy, with a line that contains `message`.
    fn usage_error(self, message: &str) -> Self {
        Self { status: 2, message: message.into(), ..self }
    }

    fn password_is_missing(self) -> Self {
        let message = "login: no password for alice (use --proxy-auth-file or S5_PROXY_AUTH)";
        Self { status: 67, message: message.into(), ..self }
    }
}

fn transfers() -> Vec<Behaviour> {
    fn answers_late(mut stream: TcpStream) {
        let _ = stream.read_to_end(&mut Vec::new());
        thread::sleep(Duration::from_millis(300));
        let _ = stream.write_all(b"late");
    }
    fn closes(mut stream: TcpStream) {
        let _ = stream.write_all(b"hello");
        let _ = stream.shutdown(Shutdown::Both);
    }
    fn resets(mut stream: TcpStream) {
        let _ = stream.write_all(b"hello");
        thread::sleep(Duration::from_millis(100));
        reset(stream);
    }
    fn floods(mut stream: TcpStream) {
        while stream.write_all(&[b'x'; 4096]).is_ok() {}
    }
    fn sends_and_waits(mut stream: TcpStream) {
        let _ = stream.write_all(b"hello");
        let _ = stream.read_to_end(&mut Vec::new());
    }
    let full = "write to stdout: no space left on device";
    let idle = on_tunnel("no traffic on the tunnel, with an idle timeout", sends_and_waits);
    vec![
        on_tunnel("answer after the end of stdin", answers_late).writes(b"late"),
        on_tunnel("the target closes, stdin stays open", closes).writes(b"hello").with_stdio(StdioSetup::OpenStdin),
        on_tunnel("the target resets the connection", resets)
            .transfer_fails(56, "read error: connection reset by peer")
            .writes(b"hello")
            .with_stdio(StdioSetup::OpenStdin),
        Behaviour {
            status: 141,
            ..on_tunnel("stdout is closed by its reader", floods).with_stdio(StdioSetup::ClosedStdout)
        },
        on_tunnel("stdout is on a full disk", sends_and_waits)
            .transfer_fails(23, full)
            .with_stdio(StdioSetup::FullStdout),
        Behaviour { has_idle_timeout: true, ..idle }
            .transfer_fails(28, "idle for 500ms")
            .writes(b"hello")
            .with_stdio(StdioSetup::OpenStdin),
    ]
}
