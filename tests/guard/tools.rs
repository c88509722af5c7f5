//! Sessions of anybody from anywhere, and targets that tell whether somebody came. Not a test.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, Ordering};

use tempfile::TempDir;

use crate::association::{Association, socket};
use crate::common::{Server, read_exact, read_reply, request, temp_dir, write_file};
use crate::kit::{UDP_ASSOCIATE, connect_from, request_by_name};

/// Name and password; none for a server without users.
pub type Login<'a> = Option<(&'a str, &'a str)>;

pub const ALICE: Login<'_> = Some(("alice", "secret"));
pub const BOB: Login<'_> = Some(("bob@corp", "secret"));

pub fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

pub fn addr(text: &str) -> SocketAddr {
    text.parse().expect("an address and a port")
}

/// A line of a users file; bcrypt of the least cost, since debug builds are slow.
pub fn user_line(name: &str, passwd: &str) -> String {
    format!("{name}:{}\n", bcrypt::hash(passwd, 4).expect("a hash"))
}

/// A users file with alice and bob.
pub fn alice_and_bob() -> &'static str {
    static USERS: OnceLock<String> = OnceLock::new();
    USERS.get_or_init(|| user_line("alice", "secret") + &user_line("bob@corp", "secret"))
}

/// An address that nobody has come from yet, since one that fails to log in again and again is held back.
pub fn unused_client_ip() -> IpAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let [high, low] = NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    IpAddr::from([127, 1, high, low])
}

/// A server with a users file and a rules file that are written anew.
pub struct TestServer {
    _folder: TempDir,
    pub users: String,
    pub rules: String,
    pub server: Server,
}

impl TestServer {
    pub fn start(users: &str, rules: &str, more: &[&str]) -> Self {
        let folder = temp_dir();
        let [users, rules] =
            [("users", users), ("rules", rules)].map(|(name, text)| write_file(folder.path(), name, text));
        let server = Server::start(&[&["--users", &users, "--rules", &rules], more].concat());
        Self { _folder: folder, users, rules, server }
    }

    /// Has the server read its files again, and gives what it logs about that.
    pub fn reload(&self) -> String {
        reload(&self.server)
    }

    /// The same with other users.
    pub fn reload_users(&self, users: &str) -> String {
        std::fs::write(&self.users, users).expect("the file can be written");
        self.reload()
    }

    /// The same with other rules.
    pub fn reload_rules(&self, rules: &str) -> String {
        std::fs::write(&self.rules, rules).expect("the file can be written");
        self.reload()
    }
}

pub fn reload(server: &Server) -> String {
    let reloads = |log: &str| log.matches("] reload: ").count();
    let before = reloads(&server.log());
    server.signal("HUP");
    let log = server.wait_log(|log| reloads(log) > before);
    log.lines().rfind(|line| line.contains("] reload: ")).expect("a line").to_owned()
}

pub fn greeting(login: Login<'_>) -> [u8; 3] {
    [5, 1, if login.is_some() { 2 } else { 0 }]
}

pub fn credentials((name, passwd): (&str, &str)) -> Vec<u8> {
    let length = |field: &str| u8::try_from(field.len()).expect("at most 255 bytes");
    [&[1, length(name)], name.as_bytes(), &[length(passwd)], passwd.as_bytes()].concat()
}

/// A connection that may make its request; none when the login is refused.
pub fn try_log_in(server: SocketAddr, from: IpAddr, login: Login<'_>) -> Option<TcpStream> {
    let mut stream = connect_from(SocketAddr::new(from, 0), server);
    stream.write_all(&greeting(login)).expect("the greeting is sent");
    assert_eq!(read_exact(&mut stream, 2), [5, greeting(login)[2]]);
    if let Some(login) = login {
        stream.write_all(&credentials(login)).expect("the login is sent");
        if read_exact(&mut stream, 2) != [1, 0] {
            return None;
        }
    }
    Some(stream)
}

pub fn log_in(server: SocketAddr, from: IpAddr, login: Login<'_>) -> TcpStream {
    try_log_in(server, from, login).expect("the login is right")
}

/// A request for `dst`, an address or a name with a port; behind a `=` it is a name, whatever it looks like.
pub fn request_for(command: u8, dst: &str) -> Vec<u8> {
    dst.parse().map_or_else(
        |_| {
            let (name, port) = dst.trim_start_matches('=').rsplit_once(':').expect("a port");
            request_by_name(command, name, port.parse().expect("a port"))
        },
        |dst| request(command, dst),
    )
}

/// Makes a request: REP and BND.
pub fn send_request(stream: &mut TcpStream, command: u8, dst: &str) -> (u8, SocketAddr) {
    stream.write_all(&request_for(command, dst)).expect("the request is sent");
    read_reply(stream)
}

/// A whole session up to its reply, of a client on this machine.
pub fn open_as(server: &Server, login: Login<'_>, command: u8, dst: &str) -> (TcpStream, u8, SocketAddr) {
    let mut stream = log_in(server.addr(), server.addr().ip(), login);
    let (rep, bnd) = send_request(&mut stream, command, dst);
    (stream, rep, bnd)
}

/// An association of a client at `from`.
pub fn associate(server: SocketAddr, from: IpAddr, login: Login<'_>) -> Association {
    let mut control = log_in(server, from, login);
    let (rep, bnd) = send_request(&mut control, UDP_ASSOCIATE, "0.0.0.0:0");
    assert_eq!(rep, 0);
    Association { control, socket: socket(from), bnd }
}

/// Fails when somebody has connected. Whoever dials says so before he replies, so nobody is waited for.
pub fn assert_no_connection(listener: &TcpListener) {
    listener.set_nonblocking(true).expect("an option");
    let came = listener.accept();
    listener.set_nonblocking(false).expect("an option");
    assert!(came.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock), "somebody came: {came:?}");
}

/// Fails when a datagram has come. The server sends them in order, so one that came by another way is enough to wait
/// for.
pub fn assert_no_datagram(socket: &UdpSocket) {
    socket.set_nonblocking(true).expect("an option");
    let came = socket.recv_from(&mut [0; 64]);
    socket.set_nonblocking(false).expect("an option");
    assert!(came.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock), "a datagram came: {came:?}");
}

/// Whether the other side has closed or reset a connection, without an byte before that.
pub fn is_closed(stream: &mut TcpStream) -> bool {
    match stream.read(&mut [0]) {
        Ok(n) => n == 0,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}
