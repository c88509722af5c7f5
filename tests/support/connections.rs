//! Connections to the server: requests by name, chosen source addresses, ends of connections, targets that never
//! accept, and a byte pattern.

use std::io::Read;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{Domain, Socket, Type};

use super::*;

pub const CONNECT: u8 = 1;
pub const BIND: u8 = 2;
pub const UDP_ASSOCIATE: u8 = 3;

pub const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
pub const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

pub fn ip(text: &str) -> IpAddr {
    text.parse().expect("valid address")
}

pub fn addr(text: &str) -> SocketAddr {
    text.parse().expect("valid address")
}

/// Starts `s5 serve --listen` and waits until it listens on `count` addresses.
pub fn serve(listen: &str, count: usize, args: &[&str]) -> Server {
    Server::start_with(s5().args(["serve", "--listen", listen]).args(args), count)
}

/// Connects and offers no authentication. Fails unless the server selects it.
pub fn greet(server: &Server) -> TcpStream {
    greet_at(server.addr())
}

/// Like [`greet`], from a loopback address.
pub fn greet_from(server: &Server, source: impl Into<IpAddr>) -> TcpStream {
    greet_on(connect_from_ip(server, source))
}

/// Like [`greet`], with one of several addresses of a server.
pub fn greet_at(addr: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(addr).unwrap_or_else(|error| panic!("{addr}: {error}"));
    stream.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    greet_on(stream)
}

fn greet_on(mut stream: TcpStream) -> TcpStream {
    stream.write_all(&[5, 1, 0]).expect("greeting sent");
    assert_eq!(read_exact(&mut stream, 2), [5, 0]);
    stream
}

/// A request with a name in it.
pub fn request_by_name(command: u8, name: &str, port: u16) -> Vec<u8> {
    let length = u8::try_from(name.len()).expect("a name of at most 255 bytes");
    let mut bytes = vec![5, command, 0, 3, length];
    bytes.extend(name.as_bytes());
    bytes.extend(port.to_be_bytes());
    bytes
}

/// Like `open`, by name.
pub fn open_by_name(server: &Server, command: u8, name: &str, port: u16) -> (TcpStream, u8, SocketAddr) {
    let mut stream = greet(server);
    stream.write_all(&request_by_name(command, name, port)).expect("request sent");
    let (rep, bnd) = read_reply(&mut stream);
    (stream, rep, bnd)
}

/// A listener on a port chosen by the kernel. `accept` fails after `TIMEOUT`.
pub fn listener(ip: IpAddr) -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((ip, 0)).expect("free port");
    SockRef::from(&listener).set_read_timeout(Some(TIMEOUT)).expect("option set");
    let addr = listener.local_addr().expect("local address");
    (listener, addr)
}

/// Accepts one connection and sets its read timeout.
pub fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    let (stream, peer) = listener.accept().expect("connection accepted");
    stream.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    (stream, peer)
}

/// Connects from a chosen address. With port 0 the kernel chooses the port.
pub fn connect_from(source: SocketAddr, to: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).expect("socket created");
    socket.set_reuse_address(true).expect("option set");
    socket.bind(&source.into()).expect("the source address is local");
    socket.connect(&to.into()).expect("the listener accepts");
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    stream
}

/// Opens a tunnel to a new target. Returns the client's and the target's connection.
pub fn tunnel(server: &Server) -> (TcpStream, TcpStream) {
    tunnel_at(server, V4)
}

/// Opens a tunnel to a target with this IP address. Returns its two ends.
pub fn tunnel_at(server: &Server, ip: IpAddr) -> (TcpStream, TcpStream) {
    let (target, dst) = listener(ip);
    (connect_to(server, dst), accept(&target).0)
}

/// Opens a tunnel. Returns the client's end.
pub fn connect_to(server: &Server, dst: SocketAddr) -> TcpStream {
    let (stream, rep, _) = open(server, CONNECT, dst);
    assert_eq!(rep, 0, "CONNECT to {dst}");
    stream
}

/// A listener that never accepts: its accept queue is full, so Linux drops each SYN.
pub struct FullBacklog {
    pub addr: SocketAddr,
    listener: TcpListener,
    queued: TcpStream,
}

impl FullBacklog {
    pub fn at(addr: SocketAddr) -> Self {
        let listener = Socket::new(Domain::for_address(addr), Type::STREAM, None).expect("socket created");
        listener.bind(&addr.into()).expect("free port");
        listener.listen(0).expect("listening");
        let addr = listener.local_addr().ok().and_then(|addr| addr.as_socket()).expect("local address");
        // A backlog of 0 holds one connection.
        let queued = TcpStream::connect(addr).expect("the first one is queued");
        Self { addr, listener: listener.into(), queued }
    }

    pub fn new() -> Self {
        Self::at(SocketAddr::new(V4, 0))
    }

    /// Accepts the connection after the queued one. Linux has dropped its first SYN and retransmits it after a second.
    pub fn accept(self) -> TcpStream {
        drop(self.queued);
        accept(&self.listener);
        accept(&self.listener).0
    }
}

/// Returns the number of open descriptors of a server without sessions. Makes one connection first, since files are
/// open for a moment while the server starts.
pub fn idle_descriptors(server: &Server) -> usize {
    let session = greet(server);
    let idle = server.descriptors() - 1;
    drop(session);
    wait_until("the connection is closed", TIMEOUT, || server.descriptors() == idle);
    idle
}

/// How a connection ended.
#[derive(Debug, PartialEq, Eq)]
pub enum StreamEnd {
    /// By FIN, after these bytes.
    Closed(Vec<u8>),
    Reset,
}

/// Reads to the end and returns how the connection ended.
pub fn stream_end(stream: &mut TcpStream) -> StreamEnd {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => StreamEnd::Closed(bytes),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => StreamEnd::Reset,
        Err(error) => panic!("neither closed nor reset: {error}"),
    }
}

/// Closes the connection with an RST.
pub fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("option set");
}

/// Sends bytes and expects them back.
pub fn ping(stream: &mut TcpStream, bytes: &[u8]) {
    stream.write_all(bytes).expect("data sent");
    assert_eq!(read_exact(stream, bytes.len()), bytes);
}

/// Fails if any data arrives within `time`.
pub fn assert_no_data(stream: &TcpStream, time: Duration) {
    stream.set_read_timeout(Some(time)).expect("timeout set");
    let error = retry(|| stream.peek(&mut [0])).expect_err("no data arrives");
    assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
    stream.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
}

/// Resident memory of the server in KiB.
pub fn resident_kib(server: &Server) -> usize {
    proc_kib(server, "status", "VmRSS")
}

/// A size in KiB from a file of the server in /proc.
pub fn proc_kib(server: &Server, file: &str, field: &str) -> usize {
    let text = fs::read_to_string(format!("/proc/{}/{file}", server.pid())).expect("the server runs");
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).expect("a field of the file");
    line.trim().trim_end_matches(" kB").parse().expect("valid number")
}

/// The log lines of ended sessions, from `id=` on.
pub fn session_lines(log: &str) -> Vec<&str> {
    steps(log, "session")
}

/// Number of sessions that have ended, also those whose lines are only counted.
pub fn ended_sessions(log: &str) -> usize {
    let omitted = log.lines().filter_map(|line| line.split_once(" msg=omitted topic=session ")?.1.split_once("lines="));
    session_lines(log).len() + omitted.map(|(_, count)| count.parse::<usize>().expect("a number")).sum::<usize>()
}

/// The log lines with `msg=` and this step of a session, from `id=` on.
pub fn steps<'a>(log: &'a str, step: &str) -> Vec<&'a str> {
    let start = format!(" msg={step} id=");
    let lines = log.lines().filter_map(|line| Some((line, line.find(&start)?)));
    // A quoted value of another line can contain this text too.
    let lines = lines.filter(|(line, at)| !line[..*at].contains('"'));
    lines.map(|(line, at)| line[at..].split_at(start.len() - "id=".len()).1).collect()
}

/// Raises the descriptor limit of this process to the hard limit. Returns false if that is less than `wanted`.
pub fn raise_fd_limit(wanted: u64) -> bool {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).expect("the hard limit is allowed");
    maximum.is_none_or(|maximum| maximum >= wanted)
}

/// Pseudo-random bytes, repeated after a length that is not a multiple of a buffer size.
pub fn pattern() -> &'static [u8] {
    static PATTERN: OnceLock<Vec<u8>> = OnceLock::new();
    PATTERN.get_or_init(|| {
        let mut state = 0x9E37_79B9_7F4A_7C15_u64;
        let mut bytes = Vec::with_capacity(1 << 20);
        while bytes.len() < (1 << 20) - 3 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend(state.to_le_bytes());
        }
        bytes.truncate((1 << 20) - 3);
        bytes
    })
}

/// Returns the first `length` bytes of the pattern.
pub fn bytes(length: usize) -> Vec<u8> {
    pattern().iter().copied().cycle().take(length).collect()
}

/// Sends the first `total` bytes of the pattern. `sent` is called with the size of each piece.
pub fn send_pattern(stream: &mut TcpStream, total: usize, sent: impl Fn(usize)) {
    let mut left = total;
    while left > 0 {
        // Larger than a relay's buffer, so that reads fill it even on a slow machine.
        for piece in pattern()[..left.min(pattern().len())].chunks(1 << 18) {
            stream.write_all(piece).expect("data sent");
            left -= piece.len();
            sent(piece.len());
        }
    }
}

/// Reads to the end. Fails unless the data is the first `total` bytes of the pattern.
pub fn check_pattern(stream: &mut impl Read, total: usize) {
    let mut buffer = vec![0; 1 << 18];
    let mut at = 0;
    loop {
        let n = retry(|| stream.read(&mut buffer)).expect("data received");
        if n == 0 {
            break;
        }
        let mut rest = &buffer[..n];
        while !rest.is_empty() {
            let expected = &pattern()[at % pattern().len()..];
            let length = rest.len().min(expected.len());
            // assert_eq would print all bytes.
            assert!(rest[..length] == expected[..length], "wrong bytes at or after offset {at}");
            rest = &rest[length..];
            at += length;
        }
    }
    assert_eq!(at, total, "number of received bytes");
}

/// Returns the time that `what` took, and its result.
pub fn timed<T>(what: impl FnOnce() -> T) -> (Duration, T) {
    let started = Instant::now();
    let result = what();
    (started.elapsed(), result)
}

/// Returns the shortest time of 8 runs. The longer times depend on the load of the machine.
pub fn fastest(mut what: impl FnMut()) -> Duration {
    (0..8).map(|_| timed(&mut what).0).min().expect("8 runs")
}
