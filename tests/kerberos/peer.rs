//! An independent peer for the tests: GSSAPI is Debian's python3-gssapi in a separate process; the test chooses the
//! messages, valid or invalid. Not a test itself.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use crate::support::realm::Realm;
use crate::support::{CONNECT, Server, StreamEnd, TIMEOUT, is_installed, read_exact, request, skip, stream_end};

/// Debian's Python, which has Debian's modules. The first Python in PATH can be another one.
pub const PYTHON: &str = "/usr/bin/python3";
const SCRIPT: &str = include_str!("peer.py");

/// Flags of an initiator, with the values of RFC 2744.
pub const DELEG: u32 = 1;
pub const MUTUAL: u32 = 2;
pub const REPLAY: u32 = 4;
pub const SEQUENCE: u32 = 8;
pub const CONF: u32 = 16;
pub const INTEG: u32 = 32;
pub const ALL: u32 = MUTUAL | REPLAY | SEQUENCE | CONF | INTEG;

pub const ABORT: [u8; 2] = [1, 0xff];
/// Message types of RFC 1961.
pub const AUTHENTICATION: u8 = 1;
pub const PROTECTION: u8 = 2;
pub const DATA: u8 = 3;

/// Returns whether python3-gssapi is installed, like `is_installed`.
pub fn has_python_gssapi() -> bool {
    if !Path::new(PYTHON).exists() {
        return is_installed(PYTHON);
    }
    let imported = Command::new(PYTHON).args(["-c", "import gssapi"]).output().expect("Python runs");
    if !imported.status.success() {
        skip("python3-gssapi is not installed");
    }
    imported.status.success()
}

/// A process that runs the GSSAPI calls.
#[derive(Clone)]
pub struct Library(Arc<Mutex<Process>>, Arc<AtomicUsize>);

struct Process {
    child: Child,
    stdin: ChildStdin,
    answers: Receiver<String>,
}

impl Library {
    pub fn start(realm: &Realm) -> Self {
        Self::start_with(realm.env(&mut Command::new(PYTHON)))
    }

    /// Starts the process with the environment of `python`.
    pub fn start_with(python: &mut Command) -> Self {
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

    fn try_call(&self, words: &[&str]) -> Result<String, String> {
        let mut process = self.0.lock().expect("no panic");
        process.stdin.write_all(format!("{}\n", words.join(" ")).as_bytes()).expect("Python reads");
        let answer = process.answers.recv_timeout(TIMEOUT).expect("Python answers");
        match answer.strip_prefix("error ") {
            Some(error) => Err(error.into()),
            None => Ok(answer),
        }
    }

    fn call(&self, words: &[&str]) -> String {
        self.try_call(words).unwrap_or_else(|error| panic!("{}: {error}", words[0]))
    }

    fn new_name(&self) -> String {
        self.1.fetch_add(1, Ordering::Relaxed).to_string()
    }

    /// Returns an initiator's context for `rcmd@localhost` with these flags.
    pub fn init(&self, flags: u32) -> Context {
        self.init_with("rcmd@localhost", flags)
    }

    pub fn init_with(&self, service: &str, flags: u32) -> Context {
        let name = self.new_name();
        self.call(&["init", &name, service, &flags.to_string()]);
        Context { library: self.clone(), name }
    }

    /// Returns an acceptor's context.
    pub fn accept(&self) -> Context {
        let name = self.new_name();
        self.call(&["accept", &name]);
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
    /// Processes a token. Returns the answer, and whether the context is established.
    pub fn step(&self, token: &[u8]) -> (Vec<u8>, bool) {
        let answer = self.library.call(&["step", &self.name, &to_hex(token)]);
        let (token, state) = answer.split_once(' ').expect("two words");
        (from_hex(token), state == "complete")
    }

    pub fn wrap(&self, data: &[u8], should_encrypt: bool) -> Vec<u8> {
        from_hex(&self.library.call(&["wrap", &self.name, if should_encrypt { "1" } else { "0" }, &to_hex(data)]))
    }

    /// Returns the data in a token, and whether it was encrypted.
    pub fn unwrap(&self, token: &[u8]) -> (Vec<u8>, bool) {
        let answer = self.library.call(&["unwrap", &self.name, &to_hex(token)]);
        let (data, protection) = answer.split_once(' ').expect("two words");
        (from_hex(data), protection == "encrypted")
    }

    /// Returns how much data fits into a token of 65535 bytes, in bytes.
    pub fn wrap_size_limit(&self, should_encrypt: bool) -> usize {
        self.library.call(&["limit", &self.name, if should_encrypt { "1" } else { "0" }]).parse().expect("a number")
    }

    /// Returns the flags of the established context.
    pub fn flags(&self) -> u32 {
        self.library.call(&["flags", &self.name]).parse().expect("a number")
    }

    /// Returns another context for the same service that can wrap.
    pub fn other_context(&self) -> Self {
        let other = self.library.init(ALL & !MUTUAL);
        assert!(other.step(&[]).1, "without mutual authentication one token suffices");
        other
    }

    /// Returns the principal of the initiator.
    pub fn initiator(&self) -> String {
        self.library.call(&["name", &self.name])
    }
}

/// LevelForm of the messages that negotiate the level: wrapped (RFC 1961), or a plain byte (NEC).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LevelForm {
    Rfc,
    Nec,
}

pub const LEVEL_FORMS: [LevelForm; 2] = [LevelForm::Rfc, LevelForm::Nec];

/// A connection with its security context.
pub struct Peer {
    pub stream: TcpStream,
    pub context: Context,
    /// Set to encrypt sent data and require encryption of received data.
    pub should_encrypt: bool,
}

impl Peer {
    /// Connects to the server and establishes a context.
    pub fn new(library: &Library, server: &Server, flags: u32) -> Self {
        Self::establish(server.connect(), library.init(flags))
    }

    /// Establishes this context on a connection.
    pub fn establish(stream: TcpStream, context: Context) -> Self {
        let mut peer = Self { stream, context, should_encrypt: false };
        peer.greet();
        let (token, is_complete) = peer.context.step(&[]);
        peer.send_token(AUTHENTICATION, &token);
        let answer = peer.receive_token(AUTHENTICATION);
        if !is_complete {
            assert_eq!(peer.context.step(&answer), (vec![], true));
        }
        peer
    }

    /// Offers only GSSAPI. Checks that the server selects it.
    pub fn greet(&mut self) {
        greet(&mut self.stream);
    }

    /// Requests a level as a client. Returns the granted level.
    pub fn request_level(&mut self, level: u8, form: LevelForm) -> u8 {
        let request = if form == LevelForm::Nec { vec![level] } else { self.context.wrap(&[level], false) };
        self.send_token(PROTECTION, &request);
        let answer = self.receive_token(PROTECTION);
        let granted = match form {
            LevelForm::Nec => answer,
            LevelForm::Rfc => {
                let (granted, is_encrypted) = self.context.unwrap(&answer);
                assert!(!is_encrypted, "levels are not encrypted");
                granted
            }
        };
        assert_eq!(granted.len(), 1, "a level is one byte");
        self.should_encrypt = granted[0] == 2;
        granted[0]
    }

    /// Connects to the server at this level and completes a CONNECT request.
    pub fn connected(library: &Library, server: &Server, level: u8, dst: SocketAddr) -> Self {
        let mut peer = Self::new(library, server, ALL);
        assert_eq!(peer.request_level(level, LevelForm::Rfc), level);
        assert_eq!(peer.request(CONNECT, dst).0, 0);
        peer
    }

    /// Sends a request in one token. Returns REP and BND.
    pub fn request(&mut self, command: u8, dst: SocketAddr) -> (u8, SocketAddr) {
        self.send(&request(command, dst));
        self.receive_reply()
    }

    /// Receives a reply in one token. Returns REP and BND.
    pub fn receive_reply(&mut self) -> (u8, SocketAddr) {
        let reply = self.receive();
        let [5, rep, 0, 1, a, b, c, d, high, low] = reply[..] else { panic!("a reply: {reply:?}") };
        (rep, SocketAddr::from(([a, b, c, d], u16::from_be_bytes([high, low]))))
    }

    /// Sends data in one token.
    pub fn send(&mut self, data: &[u8]) {
        let token = self.context.wrap(data, self.should_encrypt);
        self.send_token(DATA, &token);
    }

    /// Receives the data of the next token.
    pub fn receive(&mut self) -> Vec<u8> {
        let token = self.receive_token(DATA);
        let (data, is_encrypted) = self.context.unwrap(&token);
        assert_eq!(is_encrypted, self.should_encrypt, "encrypted as negotiated");
        data
    }

    /// Receives tokens with `length` bytes of data.
    pub fn receive_all(&mut self, length: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < length {
            all.extend(self.receive());
        }
        assert_eq!(all.len(), length);
        all
    }

    /// Sends data and receives it from an echo server.
    pub fn ping(&mut self, data: &[u8]) {
        self.send(data);
        assert_eq!(self.receive_all(data.len()), data);
    }

    /// Sends a message with this token.
    pub fn send_token(&mut self, mtyp: u8, token: &[u8]) {
        self.send_raw(&message(mtyp, token));
    }

    /// Sends unprotected bytes.
    pub fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("sent");
    }

    /// Receives a message of this type. Returns its token.
    pub fn receive_token(&mut self, mtyp: u8) -> Vec<u8> {
        receive_token(&mut self.stream, mtyp)
    }

    /// Shuts down the write side. Ignores the error if the peer has disconnected.
    pub fn shutdown(&self) {
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// Checks that the server sends the two bytes of an abort and closes.
    pub fn assert_aborted(&mut self, case: &str) {
        assert_eq!(stream_end(&mut self.stream), StreamEnd::Closed(ABORT.to_vec()), "{case}");
    }
}

/// Offers only GSSAPI. Checks that the server selects it.
pub fn greet(stream: &mut TcpStream) {
    stream.write_all(&[5, 1, 1]).expect("the greeting is sent");
    assert_eq!(read_exact(stream, 2), [5, 1]);
}

/// Encodes a message.
pub fn message(mtyp: u8, token: &[u8]) -> Vec<u8> {
    let length = u16::try_from(token.len()).expect("a token of at most 65535 bytes").to_be_bytes();
    [&[1, mtyp], &length[..], token].concat()
}

/// Receives a message of this type. Returns its token.
pub fn receive_token(stream: &mut TcpStream, mtyp: u8) -> Vec<u8> {
    let head = read_exact(stream, 2);
    assert_eq!(head, [1, mtyp], "VER and MTYP");
    let length = read_exact(stream, 2);
    read_exact(stream, u16::from_be_bytes([length[0], length[1]]).into())
}

/// A SOCKS5 server on 127.0.0.1 that the test controls.
pub struct Proxy {
    listener: TcpListener,
    pub addr: SocketAddr,
    library: Library,
}

impl Proxy {
    pub fn new(library: &Library) -> Self {
        let (listener, addr) = crate::support::listener(crate::support::V4);
        Self { listener, addr, library: library.clone() }
    }

    /// Returns the URL for `-x`.
    pub fn url(&self) -> String {
        format!("localhost:{}", self.addr.port())
    }

    /// Accepts a client and selects GSSAPI. Returns the connection and the offered methods.
    pub fn accept_greeting(&self) -> (TcpStream, Vec<u8>) {
        let (mut stream, _) = crate::support::accept(&self.listener);
        let head = read_exact(&mut stream, 2);
        assert_eq!(head[0], 5, "VER");
        let methods = read_exact(&mut stream, head[1].into());
        assert!(methods.contains(&1), "{methods:?}");
        stream.write_all(&[5, 1]).expect("sent");
        (stream, methods)
    }

    /// Accepts a client and establishes a context.
    pub fn accept_context(&self) -> Peer {
        let (mut stream, _) = self.accept_greeting();
        let context = self.library.accept();
        let token = receive_token(&mut stream, AUTHENTICATION);
        let (answer, is_complete) = context.step(&token);
        assert!(is_complete, "Kerberos needs one token");
        let mut peer = Peer { stream, context, should_encrypt: false };
        peer.send_token(AUTHENTICATION, &answer);
        peer
    }

    /// Receives the level that a client requests, and its form.
    pub fn receive_level(peer: &mut Peer) -> (u8, LevelForm) {
        let token = peer.receive_token(PROTECTION);
        if token.len() == 1 {
            return (token[0], LevelForm::Nec);
        }
        let (level, is_encrypted) = peer.context.unwrap(&token);
        assert!(!is_encrypted && level.len() == 1, "a level is one byte and not encrypted");
        (level[0], LevelForm::Rfc)
    }

    /// Grants a level.
    pub fn grant_level(peer: &mut Peer, level: u8, form: LevelForm) {
        let answer = if form == LevelForm::Nec { vec![level] } else { peer.context.wrap(&[level], false) };
        peer.send_token(PROTECTION, &answer);
        peer.should_encrypt = level == 2;
    }
}

/// Reads until the connection is closed.
pub fn read_until_closed(stream: &mut TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).expect("closed");
    all
}

fn to_hex(bytes: &[u8]) -> String {
    match bytes {
        [] => "-".into(),
        _ => bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
    }
}

fn from_hex(hex: &str) -> Vec<u8> {
    let hex = hex.trim_start_matches('-');
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hexadecimal")).collect()
}
