//! A peer that is not ours: its GSSAPI is Debian's python3-gssapi, in a process of its own; what it says with that, right
//! or wrong, is the test's. Not a test.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use crate::common::{Server, TIMEOUT, is_installed, read_exact, request, skip};
use crate::kit::realm::Realm;
use crate::kit::{CONNECT, StreamEnd, stream_end};

/// Debian's, whatever other Python the path has first: that one has Debian's modules.
pub const PYTHON: &str = "/usr/bin/python3";
const SCRIPT: &str = include_str!("peer.py");

/// What an initiator asks for, as RFC 2744 numbers it.
pub const DELEG: u32 = 1;
pub const MUTUAL: u32 = 2;
pub const REPLAY: u32 = 4;
pub const SEQUENCE: u32 = 8;
pub const CONF: u32 = 16;
pub const INTEG: u32 = 32;
pub const ALL: u32 = MUTUAL | REPLAY | SEQUENCE | CONF | INTEG;

pub const ABORT: [u8; 2] = [1, 0xff];
/// The types of messages.
pub const AUTHENTICATION: u8 = 1;
pub const PROTECTION: u8 = 2;
pub const DATA: u8 = 3;

/// Whether python3-gssapi is there; as `has`.
pub fn have_python() -> bool {
    if !Path::new(PYTHON).exists() {
        return is_installed(PYTHON);
    }
    let imported = Command::new(PYTHON).args(["-c", "import gssapi"]).output().expect("Python runs");
    if !imported.status.success() {
        skip("python3-gssapi is not installed");
    }
    imported.status.success()
}

/// A process that establishes contexts, wraps and unwraps.
#[derive(Clone)]
pub struct Library(Arc<Mutex<Process>>, Arc<AtomicUsize>);

struct Process {
    child: Child,
    stdin: ChildStdin,
    answers: Receiver<String>,
}

impl Library {
    pub fn start(realm: &Realm) -> Self {
        Self::with(realm.env(&mut Command::new(PYTHON)))
    }

    /// With the environment of that command.
    pub fn with(python: &mut Command) -> Self {
        let python = python.args(["-c", SCRIPT]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = python.spawn().expect("Python starts");
        let stdin = child.stdin.take().expect("stdin is piped");
        let stdout = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let (sender, answers) = channel();
        thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Self(Arc::new(Mutex::new(Process { child, stdin, answers })), Arc::default())
    }

    fn try_ask(&self, words: &[&str]) -> Result<String, String> {
        let mut process = self.0.lock().expect("no panic holds it");
        process.stdin.write_all(format!("{}\n", words.join(" ")).as_bytes()).expect("Python reads");
        let answer = process.answers.recv_timeout(TIMEOUT).expect("Python answers");
        match answer.strip_prefix("error ") {
            Some(error) => Err(error.into()),
            None => Ok(answer),
        }
    }

    fn ask(&self, words: &[&str]) -> String {
        self.try_ask(words).unwrap_or_else(|error| panic!("{}: {error}", words[0]))
    }

    fn name(&self) -> String {
        self.1.fetch_add(1, Ordering::Relaxed).to_string()
    }

    /// A context with `rcmd@localhost` that asks for these flags.
    pub fn init(&self, flags: u32) -> Context {
        self.init_with("rcmd@localhost", flags)
    }

    pub fn init_with(&self, service: &str, flags: u32) -> Context {
        let name = self.name();
        self.ask(&["init", &name, service, &flags.to_string()]);
        Context { library: self.clone(), name }
    }

    /// A context with whoever comes.
    pub fn accept(&self) -> Context {
        let name = self.name();
        self.ask(&["accept", &name]);
        Context { library: self.clone(), name }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A security context of the library.
pub struct Context {
    library: Library,
    name: String,
}

impl Context {
    /// The next token, and whether this was the last one that was needed.
    pub fn step(&self, token: &[u8]) -> (Vec<u8>, bool) {
        let answer = self.library.ask(&["step", &self.name, &hex(token)]);
        let (token, state) = answer.split_once(' ').expect("two words");
        (octets(token), state == "complete")
    }

    pub fn wrap(&self, data: &[u8], seal: bool) -> Vec<u8> {
        octets(&self.library.ask(&["wrap", &self.name, if seal { "1" } else { "0" }, &hex(data)]))
    }

    /// What is in a token, and whether it was sealed.
    pub fn unwrap(&self, token: &[u8]) -> (Vec<u8>, bool) {
        let answer = self.library.ask(&["unwrap", &self.name, &hex(token)]);
        let (data, how) = answer.split_once(' ').expect("two words");
        (octets(data), how == "sealed")
    }

    /// How much fits into a token of 65535 octets.
    pub fn limit(&self, seal: bool) -> usize {
        self.library.ask(&["limit", &self.name, if seal { "1" } else { "0" }]).parse().expect("a number")
    }

    /// What the context has, once it is complete.
    pub fn flags(&self) -> u32 {
        self.library.ask(&["flags", &self.name]).parse().expect("a number")
    }

    /// One with the same server that has not got far, but can wrap.
    pub fn another(&self) -> Self {
        let other = self.library.init(ALL & !MUTUAL);
        assert!(other.step(&[]).1, "without mutual authentication one token is enough");
        other
    }

    /// Who has initiated it.
    pub fn initiator(&self) -> String {
        self.library.ask(&["name", &self.name])
    }
}

/// How a level is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Rfc,
    Nec,
}

pub const FORMS: [Form; 2] = [Form::Rfc, Form::Nec];

/// A connection on which RFC 1961 is spoken, and the context that it has.
pub struct Peer {
    pub stream: TcpStream,
    pub context: Context,
    /// Whether what is sent is sealed, and what comes has to be.
    pub seal: bool,
}

impl Peer {
    /// A client that has established a context with the server.
    pub fn new(library: &Library, server: &Server, flags: u32) -> Self {
        Self::establish(server.connect(), library.init(flags))
    }

    /// A client with that context, which is established on the connection.
    pub fn establish(stream: TcpStream, context: Context) -> Self {
        let mut peer = Self { stream, context, seal: false };
        peer.greet();
        let (token, is_complete) = peer.context.step(&[]);
        peer.say(AUTHENTICATION, &token);
        let answer = peer.hear(AUTHENTICATION);
        if !is_complete {
            assert_eq!(peer.context.step(&answer), (vec![], true));
        }
        peer
    }

    /// Offers GSSAPI and nothing else, which is taken.
    pub fn greet(&mut self) {
        greet(&mut self.stream);
    }

    /// As a client: asks for a level, and gives what is granted.
    pub fn ask(&mut self, level: u8, form: Form) -> u8 {
        let asked = if form == Form::Nec { vec![level] } else { self.context.wrap(&[level], false) };
        self.say(PROTECTION, &asked);
        let answer = self.hear(PROTECTION);
        let granted = match form {
            Form::Nec => answer,
            Form::Rfc => {
                let (granted, is_sealed) = self.context.unwrap(&answer);
                assert!(!is_sealed, "levels are signed, not sealed");
                granted
            }
        };
        assert_eq!(granted.len(), 1, "a level is one octet");
        self.seal = granted[0] == 2;
        granted[0]
    }

    /// A client that has made its request at that level, with success.
    pub fn connected(library: &Library, server: &Server, level: u8, dst: SocketAddr) -> Self {
        let mut peer = Self::new(library, server, ALL);
        assert_eq!(peer.ask(level, Form::Rfc), level);
        assert_eq!(peer.request(CONNECT, dst).0, 0);
        peer
    }

    /// Makes a request in a token: REP and BND.
    pub fn request(&mut self, command: u8, dst: SocketAddr) -> (u8, SocketAddr) {
        self.send(&request(command, dst));
        self.reply()
    }

    /// A reply, alone in its token: REP and BND.
    pub fn reply(&mut self) -> (u8, SocketAddr) {
        let reply = self.receive();
        let [5, rep, 0, 1, a, b, c, d, high, low] = reply[..] else { panic!("a reply: {reply:?}") };
        (rep, SocketAddr::from(([a, b, c, d], u16::from_be_bytes([high, low]))))
    }

    /// Sends octets in a token.
    pub fn send(&mut self, data: &[u8]) {
        let token = self.context.wrap(data, self.seal);
        self.say(DATA, &token);
    }

    /// What is in the next token.
    pub fn receive(&mut self) -> Vec<u8> {
        let token = self.hear(DATA);
        let (data, is_sealed) = self.context.unwrap(&token);
        assert_eq!(is_sealed, self.seal, "sealed as agreed");
        data
    }

    /// The octets of the next tokens, as many as they have to be.
    pub fn receive_all(&mut self, length: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < length {
            all.extend(self.receive());
        }
        assert_eq!(all.len(), length);
        all
    }

    /// Sends octets, and expects them back.
    pub fn ping(&mut self, data: &[u8]) {
        self.send(data);
        assert_eq!(self.receive_all(data.len()), data);
    }

    /// Sends a message with any token.
    pub fn say(&mut self, mtyp: u8, token: &[u8]) {
        self.say_raw(&message(mtyp, token));
    }

    /// Sends octets as they are.
    pub fn say_raw(&mut self, octets: &[u8]) {
        self.stream.write_all(octets).expect("it is sent");
    }

    /// The token of the next message, which has to be of that type.
    pub fn hear(&mut self, mtyp: u8) -> Vec<u8> {
        hear(&mut self.stream, mtyp)
    }

    /// Says that no more comes; the other side may have left already.
    pub fn shutdown(&self) {
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// Fails unless the server aborts with its two octets, no more, and then closes.
    pub fn assert_aborted(&mut self, what: &str) {
        assert_eq!(stream_end(&mut self.stream), StreamEnd::Closed(ABORT.to_vec()), "{what}");
    }
}

/// Offers GSSAPI and nothing else, which is taken.
pub fn greet(stream: &mut TcpStream) {
    stream.write_all(&[5, 1, 1]).expect("the greeting is sent");
    assert_eq!(read_exact(stream, 2), [5, 1]);
}

/// A message with a token.
pub fn message(mtyp: u8, token: &[u8]) -> Vec<u8> {
    let length = u16::try_from(token.len()).expect("a token of at most 65535 octets").to_be_bytes();
    [&[1, mtyp], &length[..], token].concat()
}

/// The token of the next message, which has to be of that type.
pub fn hear(stream: &mut TcpStream, mtyp: u8) -> Vec<u8> {
    let head = read_exact(stream, 2);
    assert_eq!(head, [1, mtyp], "VER and MTYP");
    let length = read_exact(stream, 2);
    read_exact(stream, u16::from_be_bytes([length[0], length[1]]).into())
}

/// A SOCKS5 server of this peer, on 127.0.0.1.
pub struct Proxy {
    listener: TcpListener,
    pub addr: SocketAddr,
    library: Library,
}

impl Proxy {
    pub fn new(library: &Library) -> Self {
        let (listener, addr) = crate::kit::listener(crate::kit::V4);
        Self { listener, addr, library: library.clone() }
    }

    /// As `-x` takes it.
    pub fn url(&self) -> String {
        format!("localhost:{}", self.addr.port())
    }

    /// The next client, which has offered GSSAPI and been told to use it: its connection, and what it offered.
    pub fn greeted(&self) -> (TcpStream, Vec<u8>) {
        let (mut stream, _) = crate::kit::accept(&self.listener);
        let head = read_exact(&mut stream, 2);
        assert_eq!(head[0], 5, "VER");
        let methods = read_exact(&mut stream, head[1].into());
        assert!(methods.contains(&1), "{methods:?}");
        stream.write_all(&[5, 1]).expect("it is sent");
        (stream, methods)
    }

    /// The next client, with which a context has been established.
    pub fn established(&self) -> Peer {
        let (mut stream, _) = self.greeted();
        let context = self.library.accept();
        let token = hear(&mut stream, AUTHENTICATION);
        let (answer, is_complete) = context.step(&token);
        assert!(is_complete, "Kerberos takes one round");
        let mut peer = Peer { stream, context, seal: false };
        peer.say(AUTHENTICATION, &answer);
        peer
    }

    /// The level that a client asks for, in which form.
    pub fn asked(peer: &mut Peer) -> (u8, Form) {
        let token = peer.hear(PROTECTION);
        if token.len() == 1 {
            return (token[0], Form::Nec);
        }
        let (level, is_sealed) = peer.context.unwrap(&token);
        assert!(!is_sealed && level.len() == 1, "levels are one octet, and signed");
        (level[0], Form::Rfc)
    }

    /// Grants a level.
    pub fn grant(peer: &mut Peer, level: u8, form: Form) {
        let answer = if form == Form::Nec { vec![level] } else { peer.context.wrap(&[level], false) };
        peer.say(PROTECTION, &answer);
        peer.seal = level == 2;
    }
}

/// All octets that come until the connection is closed.
pub fn rest(stream: &mut TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).expect("it is closed");
    all
}

fn hex(octets: &[u8]) -> String {
    match octets {
        [] => "-".into(),
        _ => octets.iter().map(|octet| format!("{octet:02x}")).collect(),
    }
}

fn octets(hex: &str) -> Vec<u8> {
    let hex = hex.trim_start_matches('-');
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hexadecimal")).collect()
}
