//! Everything that a proxy, or what is taken for one, is known to do to a client, right or wrong: one table of scripts
//! with what `s5 connect` makes of each. Other clients can be put through the same.

use std::fs::OpenOptions;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{closed_port, echo_server};
use crate::scripted::{
    LOGIN_SUCCESS, SELECT_NO_AUTH, SELECT_PASSWORD, SUCCESS_REPLY, ScriptedServer, Step, reply_with, reset, send,
    success_reply, text, with_stream,
};

use Step::{Greeting, Login, Request, Reset, SendByteByByte, WaitForClose};

/// What is asked for, unless a row says otherwise.
pub const TARGET: &str = "target.example:80";
/// The limit of a row that runs into one.
pub const WAIT: &str = "500ms";

/// Who is behind the proxy's address.
pub enum Peer {
    /// A server with a script.
    Script(Box<dyn Fn() -> Vec<Step> + Send + Sync>),
    /// The same, given as `localhost`, of which another address may refuse.
    Localhost(Box<dyn Fn() -> Vec<Step> + Send + Sync>),
    /// Nobody.
    Down,
    /// Who says whatever is said to him.
    Echo,
    /// Who lets nobody in, nor sends anybody away.
    Hanging,
}

/// What the client's stdin and stdout are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ends {
    /// stdin has ended, stdout is read.
    Plain,
    /// stdin stays open.
    OpenStdin,
    /// The same, and stdout is /dev/full.
    FullStdout,
    /// The same, and stdout is read once and then closed.
    ClosedStdout,
}

/// One thing that happens to a client.
pub struct Behaviour {
    pub name: &'static str,
    pub userinfo: &'static str,
    pub target: String,
    pub peer: Peer,
    pub ends: Ends,
    /// Whether the client is told to give up after `WAIT` of silence on the tunnel.
    pub is_idle: bool,
    /// How s5 ends.
    pub status: i32,
    /// What s5 says behind `s5: proxy ADDR: `; nothing, when that is empty.
    pub said: String,
    /// What s5 writes to stdout.
    pub data: Vec<u8>,
    /// What the proxy was sent last, where that is the point.
    pub asked: Option<Vec<u8>>,
}

/// How a client ended.
#[derive(Debug)]
pub struct Outcome {
    pub addr: SocketAddr,
    /// None: not at all. Death by a signal is told as a shell does.
    pub status: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: String,
    /// What the script was sent.
    pub messages: Vec<Vec<u8>>,
}

impl Behaviour {
    /// Puts a client through it; `client` makes a command of the proxy's host and port.
    pub fn play(&self, limit: Duration, client: impl FnOnce(&Self, &str, u16) -> Command) -> Outcome {
        let script = |script: &(dyn Fn() -> Vec<Step> + Send + Sync)| {
            let proxy = ScriptedServer::start(script());
            (proxy.addr, Some(proxy))
        };
        let mut held = Vec::new();
        let (addr, proxy) = match &self.peer {
            Peer::Script(make) | Peer::Localhost(make) => script(make),
            Peer::Down => (closed_port(), None),
            Peer::Echo => (echo_server(), None),
            Peer::Hanging => (hanging(&mut held), None),
        };
        let host = if matches!(self.peer, Peer::Localhost(_)) { "localhost" } else { "127.0.0.1" };
        let mut command = client(self, host, addr.port());
        let full = || OpenOptions::new().write(true).open("/dev/full").expect("/dev/full").into();
        let stdout = if self.ends == Ends::FullStdout { full() } else { Stdio::piped() };
        let spawned = command.stdin(Stdio::piped()).stdout(stdout).stderr(Stdio::piped()).spawn();
        let mut child = spawned.unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let stdin = child.stdin.take().filter(|_| self.ends != Ends::Plain);
        let once = self.ends == Ends::ClosedStdout;
        let out = child.stdout.take().map(|mut out| thread::spawn(move || read(&mut out, once)));
        let err = child.stderr.take().map(|mut err| thread::spawn(move || read(&mut err, false)));
        let deadline = Instant::now() + limit;
        let status = loop {
            match child.try_wait().expect("it can be waited for") {
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
        let all = |reader: Option<thread::JoinHandle<Vec<u8>>>| reader.map(|reader| reader.join().expect("no panic"));
        let (stdout, stderr) = (all(out).unwrap_or_default(), text(&all(err).unwrap_or_default()));
        let messages = proxy.filter(|_| self.asked.is_some()).map(|proxy| proxy.messages()).unwrap_or_default();
        Outcome { addr, status, stdout, stderr, messages }
    }
}

fn read(pipe: &mut impl std::io::Read, once: bool) -> Vec<u8> {
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(n @ 1..) = pipe.read(&mut buffer) {
        all.extend(&buffer[..n]);
        if once {
            break;
        }
    }
    all
}

/// A backlog that is full drops what else comes.
fn hanging(held: &mut Vec<Box<dyn std::any::Any>>) -> SocketAddr {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).expect("a port");
    socket.listen(0).expect("it listens");
    let addr = socket.local_addr().ok().and_then(|addr| addr.as_socket()).expect("an address");
    while let Ok(stream) = TcpStream::connect_timeout(&addr, Duration::from_millis(100)) {
        held.push(Box::new(stream));
    }
    held.push(Box::new(socket));
    addr
}

fn row(name: &'static str, script: impl Fn() -> Vec<Step> + Send + Sync + 'static) -> Behaviour {
    Behaviour {
        name,
        userinfo: "",
        target: TARGET.into(),
        peer: Peer::Script(Box::new(script)),
        ends: Ends::Plain,
        is_idle: false,
        status: 0,
        said: String::new(),
        data: Vec::new(),
        asked: None,
    }
}

/// A script behind a greeting and a request without login.
fn replies(name: &'static str, script: impl Fn() -> Vec<Step> + Send + Sync + 'static) -> Behaviour {
    row(name, move || [Greeting, send(SELECT_NO_AUTH), Request].into_iter().chain(script()).collect())
}

/// A script behind the selection of user name and password.
fn logs_in(name: &'static str, script: impl Fn() -> Vec<Step> + Send + Sync + 'static) -> Behaviour {
    let script = move || [Greeting, send(SELECT_PASSWORD), Login].into_iter().chain(script()).collect();
    Behaviour { userinfo: "alice:secret@", ..row(name, script) }
}

/// A tunnel on which the script goes on.
fn opens(name: &'static str, last: fn(TcpStream)) -> Behaviour {
    row(name, move || reply_with(SUCCESS_REPLY).into_iter().chain([with_stream(last)]).collect())
}

impl Behaviour {
    /// It fails in the handshake: with this status, in this phase, for this reason.
    fn fails(self, status: i32, phase: &str, reason: &str) -> Self {
        let said = format!("{phase}, for {}: {reason}", self.target);
        Self { status, said, ..self }
    }

    fn breaks(self, status: i32, reason: &str) -> Self {
        self.fails(status, "transfer", reason)
    }

    fn gives(self, data: &[u8]) -> Self {
        Self { data: data.into(), ..self }
    }

    fn with(self, ends: Ends) -> Self {
        Self { ends, ..self }
    }

    fn asks(self, target: &str, asked: Vec<u8>) -> Self {
        Self { target: target.into(), asked: Some(asked), ..self }
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

/// All of them.
pub fn behaviours() -> Vec<Behaviour> {
    let mut all = failures_of_the_proxy();
    all.extend(silence_and_ends());
    all.extend(foreigners());
    all.extend(replies_of_all_kinds());
    all.extend(addresses_and_logins());
    all.extend(ends_of_streams());
    all
}

fn failures_of_the_proxy() -> Vec<Behaviour> {
    let no_method = "no acceptable authentication method (is a user:password@ or a Kerberos ticket missing?)";
    let refused = "user name or password refused";
    let down = |name| Behaviour { peer: Peer::Down, ..row(name, Vec::new) };
    let mut all = vec![
        down("the proxy is down").fails(7, "connecting to the proxy", "connection refused (is the proxy running?)"),
        row("no acceptable method", || vec![Greeting, send(&[5, 0xff])]).fails(67, "greeting", no_method),
        logs_in("wrong password", || vec![send(&[1, 1])]).fails(67, "login", refused),
        logs_in("wrong password, STATUS 255", || vec![send(&[1, 255])]).fails(67, "login", refused),
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
        all.push(replies(name(rep), script).fails(100 + i32::from(rep.min(9)), "request", &reason));
    }
    let refused = "connection refused (REP 5)";
    let cut = |name, reply: &'static [u8]| replies(name, move || vec![send(reply)]).fails(105, "request", refused);
    all.extend([
        cut("a refusal of two octets, and the end", &[5, 5]),
        cut("a refusal of three octets, and the end", &[5, 5, 0]),
        cut("a refusal cut in the address", &[5, 5, 0, 1, 127]),
        cut("a refusal without ATYP", &[5, 5, 0, 0, 0, 0, 0, 0]),
    ]);
    all
}

fn silence_and_ends() -> Vec<Behaviour> {
    let late = "timed out after 500ms";
    let closed = "the proxy closed the connection";
    let reset = "Connection reset by peer (os error 104)";
    let hanging = Behaviour { peer: Peer::Hanging, ..row("it never accepts", Vec::new) };
    let silent = [
        hanging.fails(28, "connecting to the proxy", late),
        row("silent from the start", || vec![WaitForClose]).fails(28, "greeting", late),
        row("silent inside of the selection", || vec![Greeting, send(&[5]), WaitForClose]).fails(28, "greeting", late),
        logs_in("silent at the login", || vec![WaitForClose]).fails(28, "login", late),
        logs_in("silent behind the login", || vec![send(LOGIN_SUCCESS), WaitForClose]).fails(28, "request", late),
        replies("silent behind the request", || vec![WaitForClose]).fails(28, "request", late),
        replies("silent inside of the reply", || vec![send(&[5, 0, 0, 3, 200, b'x']), WaitForClose])
            .fails(28, "request", late),
    ];
    let ends = [
        row("it closes at the greeting", || vec![Greeting]).fails(97, "greeting", closed),
        row("it closes inside of the selection", || vec![Greeting, send(&[5])]).fails(97, "greeting", closed),
        logs_in("it closes at the login", Vec::new).fails(97, "login", closed),
        logs_in("it closes behind the login", || vec![send(LOGIN_SUCCESS), Request]).fails(97, "request", closed),
        replies("it closes at the request", Vec::new).fails(97, "request", closed),
        replies("it closes inside of a success", || vec![send(&SUCCESS_REPLY[..9])]).fails(97, "request", closed),
        row("it resets at the greeting", || vec![Greeting, Reset]).fails(97, "greeting", reset),
        logs_in("it resets at the login", || vec![Reset]).fails(97, "login", reset),
        logs_in("it resets behind the login", || vec![send(LOGIN_SUCCESS), Request, Reset]).fails(97, "request", reset),
        replies("it resets at the request", || vec![Reset]).fails(97, "request", reset),
    ];
    silent.into_iter().chain(ends).collect()
}

fn foreigners() -> Vec<Behaviour> {
    let not = |what: &str| format!("not a SOCKS5 server ({what})");
    let says = |name, first: &'static [u8], what: &str| {
        row(name, move || vec![Greeting, send(first)]).fails(97, "greeting", &not(what))
    };
    let wrong = |name, reply: &'static [u8], what: &str| {
        replies(name, move || vec![send(reply)]).fails(97, "request", &not(what))
    };
    let echo = |name| Behaviour { peer: Peer::Echo, ..row(name, Vec::new) };
    let offered = "selected gssapi, which was not offered";
    let banner = row("an SSH server, which speaks first", || vec![send(b"SSH-2.0-OpenSSH_9.2\r\n"), WaitForClose]);
    vec![
        says("an HTTP server", b"HTTP/1.1 400 Bad Request\r\n\r\n", "first byte 0x48 'H', HTTP?"),
        says("a TLS server", &[0x15, 3, 1, 0, 2, 2, 70], "first byte 0x15, TLS?"),
        says("a SOCKS4 server", &[0, 0x5b, 0, 0, 0, 0, 0, 0], "first byte 0x00, SOCKS4?"),
        says("something else", &[0x1b, b'[', b'2', b'J'], "first byte 0x1b"),
        banner.fails(97, "greeting", &not("first byte 0x53 'S', SSH?")),
        echo("an echo server").fails(97, "greeting", &not(offered)),
        Behaviour { userinfo: "alice:secret@", ..echo("an echo server, with a password") }.fails(
            97,
            "login",
            &not("expected authentication version 1, found 0"),
        ),
        says("a selection with VER 4", &[4, 0], "first byte 0x04, SOCKS4?"),
        logs_in("a login answered with VER 5", || vec![send(&[5, 0])]).fails(
            97,
            "login",
            &not("expected authentication version 1, found 5"),
        ),
        wrong("a success with VER 4", &[4, 0, 0, 1, 0, 0, 0, 0, 0, 0], "first byte 0x04, SOCKS4?"),
        wrong("a success with ATYP 2", &[5, 0, 0, 2, 0, 0, 0, 0, 0, 0], "unknown address type 2"),
        says("it selects GSSAPI, which was not offered", &[5, 1], offered),
        says("it selects the password, which was not offered", &[5, 2], "selected password, which was not offered"),
        says("it selects a private method", &[5, 0x80], "selected method 0x80, which was not offered"),
    ]
}

fn replies_of_all_kinds() -> Vec<Behaviour> {
    let name = |length: u8| [&[5, 0, 0, 3, length][..], &vec![b'n'; length.into()], &[4, 56]].concat();
    let v6 = success_reply("[2001:db8::9]:1080".parse().expect("an address"));
    let with_reply = |what, reply: Vec<u8>| {
        let reply = [&reply[..], b"hello"].concat();
        replies(what, move || vec![send(&reply)]).gives(b"hello")
    };
    vec![
        replies("data behind the reply", || vec![send(SUCCESS_REPLY), send(b"hello")]).gives(b"hello"),
        with_reply("data in the segment of the reply", SUCCESS_REPLY.into()),
        with_reply("BND of IPv6", v6),
        with_reply("BND with a name", name(9)),
        with_reply("BND with a name of 255 octets", name(255)),
        with_reply("BND with a name of 0 octets", name(0)),
        with_reply("RSV is not 0", vec![5, 0, 7, 1, 192, 0, 2, 9, 4, 56]),
        row("all answers octet by octet", move || {
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
        .gives(b"hello")
        .for_alice(),
        row("it wants no password", || {
            vec![Greeting, send(SELECT_NO_AUTH), Request, send(SUCCESS_REPLY), send(b"hello")]
        })
        .gives(b"hello")
        .for_alice(),
    ]
}

impl Behaviour {
    fn for_alice(self) -> Self {
        Self { userinfo: "alice:secret@", ..self }
    }
}

fn addresses_and_logins() -> Vec<Behaviour> {
    let hello = |name| replies(name, || vec![send(SUCCESS_REPLY), send(b"hello")]).gives(b"hello");
    let login = |name| {
        logs_in(name, || vec![send(LOGIN_SUCCESS), Request, send(SUCCESS_REPLY), send(b"hello")]).gives(b"hello")
    };
    let request = |rest: &[u8]| [&[5, 1, 0][..], rest].concat();
    let v6 = request(&[&[4][..], &[0x20, 1, 0x0d, 0xb8], &[0; 11], &[7, 0, 80]].concat());
    let long = "n".repeat(255);
    let of_name =
        |name: &str| request(&[&[3, u8::try_from(name.len()).expect("short")], name.as_bytes(), &[0, 80]].concat());
    let nobody = |name, userinfo, target: &str| Behaviour {
        userinfo,
        target: target.into(),
        peer: Peer::Down,
        ..row(name, Vec::new)
    };
    let mut first_dead = hello("a proxy of which the first address is dead");
    if let Peer::Script(script) = first_dead.peer {
        first_dead.peer = Peer::Localhost(script);
    }
    vec![
        hello("a name goes to the proxy").asks("target.example:80", of_name("target.example")),
        hello("a name of 255 octets").asks(&format!("{long}:80"), of_name(&long)),
        nobody("a name of 256 octets", "", &format!("{long}n:80"))
            .usage("target: the host name has 256 bytes: SOCKS5 allows 255"),
        hello("an IPv4 target is ATYP 1").asks("192.0.2.7:80", request(&[1, 192, 0, 2, 7, 0, 80])),
        hello("an IPv6 target in brackets is ATYP 4").asks("[2001:db8::7]:80", v6.clone()),
        hello("a bare IPv6 target is ATYP 4").asks("2001:db8::7 80", v6),
        nobody("an empty password", "alice:@", TARGET).usage("the password has 0 bytes: SOCKS5 allows 1 to 255"),
        Behaviour { userinfo: "al%40ice:p%3A%40%25@", ..login("@, : and % in user and password") }.gives(b"hello"),
        nobody("a user without a password, and nobody to ask", "alice@", TARGET).refused_here(),
        first_dead,
    ]
}

impl Behaviour {
    /// It fails before any proxy is asked; `said` is then all of the line that matters.
    fn usage(self, said: &str) -> Self {
        Self { status: 2, said: said.into(), ..self }
    }

    fn refused_here(self) -> Self {
        let said = "login: no password for alice (use --proxy-auth-file or S5_PROXY_AUTH)";
        Self { status: 67, said: said.into(), ..self }
    }
}

fn ends_of_streams() -> Vec<Behaviour> {
    fn late(mut stream: TcpStream) {
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
    fn says_and_waits(mut stream: TcpStream) {
        let _ = stream.write_all(b"hello");
        let _ = stream.read_to_end(&mut Vec::new());
    }
    let full = "write to stdout: No space left on device (os error 28)";
    let idle = opens("silence on the tunnel, with a limit", says_and_waits);
    vec![
        opens("an answer behind the end of stdin", late).gives(b"late"),
        opens("the target closes, stdin stays open", closes).gives(b"hello").with(Ends::OpenStdin),
        opens("the target resets", resets)
            .breaks(56, "read error: Connection reset by peer (os error 104)")
            .gives(b"hello")
            .with(Ends::OpenStdin),
        Behaviour { status: 141, ..opens("nobody reads stdout any more", floods).with(Ends::ClosedStdout) },
        opens("stdout is full", says_and_waits).breaks(23, full).with(Ends::FullStdout),
        Behaviour { is_idle: true, ..idle }.breaks(28, "idle for 500ms").gives(b"hello").with(Ends::OpenStdin),
    ]
}
