//! Helpers: sessions of any user from any loopback address, and checks that no traffic has arrived.

use crate::udp::association::{Association, socket};
use crate::*;

/// Name and password; `None` for a server without users.
pub type Login<'a> = Option<(&'a str, &'a str)>;

pub const ALICE: Login<'_> = Some(("alice", "secret"));
pub const BOB: Login<'_> = Some(("bob@corp", "secret"));

/// Returns a users file with alice and bob.
pub fn alice_and_bob() -> &'static str {
    static USERS: OnceLock<String> = OnceLock::new();
    USERS.get_or_init(|| user_line("alice", "secret") + &user_line("bob@corp", "secret"))
}

pub fn only_alice() -> &'static str {
    alice_and_bob().split_inclusive('\n').next().expect("alice's line")
}

pub fn only_bob() -> &'static str {
    alice_and_bob().split_inclusive('\n').nth(1).expect("bob's line")
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

    /// Starts a server with alice and bob, and without rules.
    pub fn new(more: &[&str]) -> Self {
        Self::start(alice_and_bob(), "# none\n", more)
    }

    /// Sends SIGHUP and returns the log line of the reload.
    pub fn reload(&self) -> String {
        self.server.reload()
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

/// Connects and logs in. Returns `None` if the login is refused.
pub fn try_log_in(server: SocketAddr, from: IpAddr, login: Login<'_>) -> Option<TcpStream> {
    let mut stream = connect_from(SocketAddr::new(from, 0), server);
    let Some((uname, passwd)) = login else {
        stream.write_all(&[5, 1, 0]).expect("greeting sent");
        assert_eq!(read_exact(&mut stream, 2), [5, 0]);
        return Some(stream);
    };
    select_password(&mut stream);
    (send_login(&mut stream, uname.as_bytes(), passwd.as_bytes()) == 0).then_some(stream)
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

/// Returns the REP of a client without a login.
pub fn rep(server: &Server, command: u8, dst: &str) -> u8 {
    open_as(server, None, command, dst).1
}

/// Opens a session that must succeed; returns the stream and BND.
pub fn open_ok(server: &Server, login: Login<'_>, command: u8, dst: &str) -> (TcpStream, SocketAddr) {
    let (stream, rep, bnd) = open_as(server, login, command, dst);
    assert_eq!(rep, 0, "command {command} to {dst}");
    (stream, bnd)
}

/// Opens a tunnel; returns its two ends.
pub fn tunnel(server: &Server, login: Login<'_>) -> (TcpStream, TcpStream) {
    let (listener, dst) = listener(V4);
    (open_ok(server, login, CONNECT, &dst.to_string()).0, accept(&listener).0)
}

/// Opens a BIND that must succeed; returns the stream and BND.
pub fn bind(server: &Server, login: Login<'_>, dst: &str) -> (TcpStream, SocketAddr) {
    open_ok(server, login, BIND, dst)
}

/// Connects a peer to a BIND, and checks the second reply and the tunnel.
pub fn assert_accepts_peer(client: &mut TcpStream, bnd: SocketAddr, from: SocketAddr) {
    let mut peer = connect_from(from, bnd);
    assert_eq!(read_reply(client), (0, peer.local_addr().expect("local address")), "peer {from}");
    peer.write_all(b"hello").expect("data sent");
    assert_eq!(read_exact(client, 5), b"hello", "peer {from}");
}

/// Opens a UDP association of a client at `from`.
pub fn associate(server: SocketAddr, from: IpAddr, login: Login<'_>) -> Association {
    let mut control = log_in(server, from, login);
    let (rep, bnd) = send_request(&mut control, UDP_ASSOCIATE, "0.0.0.0:0");
    assert_eq!(rep, 0);
    Association { control, socket: socket(from), bnd }
}

/// Opens a UDP association of a client on 127.0.0.1 without a login.
pub fn associate_anonymously(server: &Server) -> Association {
    associate(server.addr(), V4, None)
}

/// A UDP socket at an address, and its address.
pub fn udp_target(at: &str) -> (UdpSocket, SocketAddr) {
    let socket = socket(ip(at));
    let addr = socket.local_addr().expect("local address");
    (socket, addr)
}

/// Fails if a connection has arrived. Does not wait: the server connects before it replies.
pub fn assert_no_connection(listener: &TcpListener) {
    listener.set_nonblocking(true).expect("option set");
    assert_would_block(listener.accept());
    listener.set_nonblocking(false).expect("option set");
}

/// Fails if a datagram has arrived. Does not wait: the server sends in order, and tests have received a later datagram.
pub fn assert_no_datagram(socket: &UdpSocket) {
    socket.set_nonblocking(true).expect("option set");
    assert_would_block(retry(|| socket.recv_from(&mut [0; 64])));
    socket.set_nonblocking(false).expect("option set");
}

fn assert_would_block<T: std::fmt::Debug>(result: std::io::Result<T>) {
    let is_empty = result.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock);
    assert!(is_empty, "arrived: {result:?}");
}

/// Returns true if the other side has closed or reset the connection without sending a byte.
pub fn is_closed(stream: &mut TcpStream) -> bool {
    match retry(|| stream.read(&mut [0])) {
        Ok(n) => n == 0,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}
