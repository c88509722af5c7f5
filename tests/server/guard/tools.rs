//! Helpers: sessions of any user from any loopback address, and checks that no traffic has arrived.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, Ordering};

use tempfile::TempDir;

use crate::support::{
    Server, UDP_ASSOCIATE, connect_from, read_exact, read_reply, request, request_by_name, retry, temp_dir, write_file,
};
use crate::udp::association::{Association, socket};

/// Name and password; `None` for a server without users.
pub type Login<'a> = Option<(&'a str, &'a str)>;

pub const ALICE: Login<'_> = Some(("alice", "secret"));
pub const BOB: Login<'_> = Some(("bob@corp", "secret"));

pub fn ip(text: &str) -> IpAddr {
    text.parse().expect("valid address")
}

pub fn addr(text: &str) -> SocketAddr {
    text.parse().expect("valid address")
}

/// Returns an entry of a users file: bcrypt with the lowest cost, because debug builds are slow.
pub fn user_line(name: &str, passwd: &str) -> String {
    format!("{name}:{}\n", bcrypt::hash(passwd, 4).expect("password hashed"))
}

/// Returns a users file with alice and bob.
pub fn alice_and_bob() -> &'static str {
    static USERS: OnceLock<String> = OnceLock::new();
    USERS.get_or_init(|| user_line("alice", "secret") + &user_line("bob@corp", "secret"))
}

/// Returns a loopback address that no client has used yet, because logins after repeated failures are delayed.
pub fn unused_client_ip() -> IpAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let [high, low] = NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    IpAddr::from([127, 1, high, low])
}

/// A server with a users file and a rules file that tests rewrite.
pub struct Setup {
    _dir: TempDir,
    pub users: String,
    pub rules: String,
    pub server: Server,
}

impl Setup {
    pub fn start(users: &str, rules: &str, more: &[&str]) -> Self {
        let dir = temp_dir();
        let [users, rules] =
            [("users", users), ("rules", rules)].map(|(name, text)| write_file(dir.path(), name, text));
        let server = Server::start(&[&["--users", &users, "--rules", &rules], more].concat());
        Self { _dir: dir, users, rules, server }
    }

    /// Sends SIGHUP and returns the log line of the reload.
    pub fn reload(&self) -> String {
        reload(&self.server)
    }

    /// Rewrites the users file and reloads.
    pub fn reload_users(&self, users: &str) -> String {
        std::fs::write(&self.users, users).expect("file written");
        self.reload()
    }

    /// Rewrites the rules file and reloads.
    pub fn reload_rules(&self, rules: &str) -> String {
        std::fs::write(&self.rules, rules).expect("file written");
        self.reload()
    }
}

/// Sends SIGHUP to a server and returns the log line of the reload.
pub fn reload(server: &Server) -> String {
    let reloads = |log: &str| log.matches("] reload: ").count();
    let before = reloads(&server.log());
    server.signal("HUP");
    let log = server.wait_log(|log| reloads(log) > before);
    log.lines().rfind(|line| line.contains("] reload: ")).expect("a log line of the reload").to_owned()
}

pub fn greeting(login: Login<'_>) -> [u8; 3] {
    [5, 1, if login.is_some() { 2 } else { 0 }]
}

pub fn credentials((name, passwd): (&str, &str)) -> Vec<u8> {
    let length = |field: &str| u8::try_from(field.len()).expect("at most 255 bytes");
    [&[1, length(name)], name.as_bytes(), &[length(passwd)], passwd.as_bytes()].concat()
}

/// Connects and logs in. Returns `None` if the login is refused.
pub fn try_log_in(server: SocketAddr, from: IpAddr, login: Login<'_>) -> Option<TcpStream> {
    let mut stream = connect_from(SocketAddr::new(from, 0), server);
    stream.write_all(&greeting(login)).expect("greeting sent");
    assert_eq!(read_exact(&mut stream, 2), [5, greeting(login)[2]]);
    if let Some(login) = login {
        stream.write_all(&credentials(login)).expect("login sent");
        if read_exact(&mut stream, 2) != [1, 0] {
            return None;
        }
    }
    Some(stream)
}

pub fn log_in(server: SocketAddr, from: IpAddr, login: Login<'_>) -> TcpStream {
    try_log_in(server, from, login).expect("login accepted")
}

/// Encodes a request for `dst`, an address or name with a port. After a `=`, an address is sent as a name.
pub fn request_for(command: u8, dst: &str) -> Vec<u8> {
    dst.parse().map_or_else(
        |_| {
            let (name, port) = dst.trim_start_matches('=').rsplit_once(':').expect("a name and a port");
            request_by_name(command, name, port.parse().expect("valid port"))
        },
        |dst| request(command, dst),
    )
}

/// Sends a request; returns REP and BND.
pub fn send_request(stream: &mut TcpStream, command: u8, dst: &str) -> (u8, SocketAddr) {
    stream.write_all(&request_for(command, dst)).expect("request sent");
    read_reply(stream)
}

/// Opens a session and sends a request; returns the stream, REP and BND.
pub fn open_as(server: &Server, login: Login<'_>, command: u8, dst: &str) -> (TcpStream, u8, SocketAddr) {
    let mut stream = log_in(server.addr(), server.addr().ip(), login);
    let (rep, bnd) = send_request(&mut stream, command, dst);
    (stream, rep, bnd)
}

/// Opens a UDP association of a client at `from`.
pub fn associate(server: SocketAddr, from: IpAddr, login: Login<'_>) -> Association {
    let mut control = log_in(server, from, login);
    let (rep, bnd) = send_request(&mut control, UDP_ASSOCIATE, "0.0.0.0:0");
    assert_eq!(rep, 0);
    Association { control, socket: socket(from), bnd }
}

/// Fails if a connection has arrived. Does not wait: the server connects before it replies.
pub fn assert_no_connection(listener: &TcpListener) {
    listener.set_nonblocking(true).expect("option set");
    let result = listener.accept();
    listener.set_nonblocking(false).expect("option set");
    assert!(
        result.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock),
        "a connection arrived: {result:?}"
    );
}

/// Fails if a datagram has arrived. Does not wait: the server sends in order, and tests have received a later datagram.
pub fn assert_no_datagram(socket: &UdpSocket) {
    socket.set_nonblocking(true).expect("option set");
    let result = retry(|| socket.recv_from(&mut [0; 64]));
    socket.set_nonblocking(false).expect("option set");
    assert!(
        result.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock),
        "a datagram arrived: {result:?}"
    );
}

/// Returns true if the other side has closed or reset the connection without sending a byte.
pub fn is_closed(stream: &mut TcpStream) -> bool {
    match retry(|| stream.read(&mut [0])) {
        Ok(n) => n == 0,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}
