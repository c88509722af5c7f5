//! An independent peer for the tests: GSSAPI is Debian's python3-gssapi in a separate process; the test chooses the
//! messages, valid or invalid. Not a test itself.

use std::process::ChildStdin;
use std::sync::mpsc::Receiver;

use crate::support::realm::Realm;
use crate::*;

const SCRIPT: &str = include_str!("peer.py");

/// Flags of an initiator, with the values of RFC 2744.
pub const DELEG: u32 = 1;
pub const MUTUAL: u32 = 2;
pub const REPLAY: u32 = 4;
pub const SEQUENCE: u32 = 8;
pub const CONF: u32 = 16;
pub const INTEG: u32 = 32;
pub const ALL: u32 = MUTUAL | REPLAY | SEQUENCE | CONF | INTEG;

/// A success reply with BND 0.0.0.0:0.
pub const SUCCESS: [u8; 10] = [5, 0, 0, 1, 0, 0, 0, 0, 0, 0];
pub const ABORT: [u8; 2] = [1, 0xff];
/// Message types of RFC 1961.
pub const AUTHENTICATION: u8 = 1;
pub const PROTECTION: u8 = 2;
pub const DATA: u8 = 3;

/// Starts a realm, and a library in it. Returns `None` if their programs are not installed.
pub fn set_up() -> Option<(Realm, Library)> {
    let realm = has_python_module("gssapi", "python3-gssapi").then(crate::realm)??;
    let library = Library::start(&realm);
    Some((realm, library))
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

    fn call(&self, words: &[&str]) -> String {
        let mut process = self.0.lock().expect("no panic");
        process.stdin.write_all(format!("{}\n", words.join(" ")).as_bytes()).expect("Python reads");
        let answer = process.answers.recv_timeout(TIMEOUT).expect("Python answers");
        assert!(!answer.starts_with("error "), "{}: {answer}", words[0]);
        answer
    }

    /// Returns an initiator's context for `rcmd@localhost` with these flags.
    pub fn init(&self, flags: u32) -> Context {
        self.init_with("rcmd@localhost", flags)
    }

    pub fn init_with(&self, service: &str, flags: u32) -> Context {
        self.new_context("init", &[service, &flags.to_string()])
    }

    /// Returns an acceptor's context.
    pub fn accept(&self) -> Context {
        self.new_context("accept", &[])
    }

    fn new_context(&self, command: &str, args: &[&str]) -> Context {
        let name = self.1.fetch_add(1, Ordering::Relaxed).to_string();
        self.call(&[&[command, &*name], args].concat());
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

    /// Returns a message whose token has this data.
    pub fn message(&self, mtyp: u8, data: &[u8], should_encrypt: bool) -> Vec<u8> {
        message(mtyp, &self.wrap(data, should_encrypt))
    }

    /// Returns a message with this level, as a client requests it and a server grants it.
    fn level_message(&self, level: u8, form: LevelForm) -> Vec<u8> {
        match form {
            LevelForm::Rfc => self.message(PROTECTION, &[level], false),
            LevelForm::Nec => message(PROTECTION, &[level]),
        }
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
        greet(&mut peer.stream);
        let (token, is_complete) = peer.context.step(&[]);
        peer.send_raw(&message(AUTHENTICATION, &token));
        let answer = peer.receive_token(AUTHENTICATION);
        if !is_complete {
            assert_eq!(peer.context.step(&answer), (vec![], true));
        }
        peer
    }

    /// Like [`Peer::new`], and negotiates this level.
    pub fn at_level(library: &Library, server: &Server, flags: u32, level: u8) -> Self {
        let mut peer = Self::new(library, server, flags);
        assert_eq!(peer.request_level(level, LevelForm::Rfc), level);
        peer
    }

    /// Connects to the server at this level and completes a CONNECT request.
    pub fn connected(library: &Library, server: &Server, level: u8, dst: SocketAddr) -> Self {
        let mut peer = Self::at_level(library, server, ALL, level);
        assert_eq!(peer.request(CONNECT, dst).0, 0);
        peer
    }

    /// Requests a level as a client. Returns the granted level.
    pub fn request_level(&mut self, level: u8, form: LevelForm) -> u8 {
        let request = self.context.level_message(level, form);
        self.send_raw(&request);
        let (granted, answered_form) = self.receive_level();
        assert_eq!(answered_form, form);
        self.should_encrypt = granted == 2;
        granted
    }

    /// Receives the level that the other side requests or grants, and its form.
    pub fn receive_level(&mut self) -> (u8, LevelForm) {
        let token = self.receive_token(PROTECTION);
        if token.len() == 1 {
            return (token[0], LevelForm::Nec);
        }
        let (level, is_encrypted) = self.context.unwrap(&token);
        assert!(!is_encrypted && level.len() == 1, "a level is one byte and not encrypted");
        (level[0], LevelForm::Rfc)
    }

    /// Grants a level as a server.
    pub fn grant_level(&mut self, level: u8, form: LevelForm) {
        let answer = self.context.level_message(level, form);
        self.send_raw(&answer);
        self.should_encrypt = level == 2;
    }

    /// Receives a request as a server, and sends a success reply.
    pub fn accept_request(&mut self) -> Vec<u8> {
        let request = self.receive();
        self.send(&SUCCESS);
        request
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

    /// Returns a message with this data.
    pub fn frame(&self, data: &[u8]) -> Vec<u8> {
        self.context.message(DATA, data, self.should_encrypt)
    }

    /// Sends data in one token.
    pub fn send(&mut self, data: &[u8]) {
        let frame = self.frame(data);
        self.send_raw(&frame);
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
        let (listener, addr) = listener(V4);
        Self { listener, addr, library: library.clone() }
    }

    /// Returns the URL for `-x`.
    pub fn url(&self) -> String {
        format!("localhost:{}", self.addr.port())
    }

    /// Accepts a client and selects GSSAPI. Returns the connection and the offered methods.
    pub fn accept_greeting(&self) -> (TcpStream, Vec<u8>) {
        let (mut stream, _) = accept(&self.listener);
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
        peer.send_raw(&message(AUTHENTICATION, &answer));
        peer
    }
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
