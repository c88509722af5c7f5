//! Targets for the transcripts, and the addresses of their placeholders.

use socket2::{Domain, Socket, Type};

use crate::support::bytes::encode_addr;
use crate::*;

/// Targets that all transcripts share. They run until the tests end.
pub struct Fixtures {
    pub named: Vec<(&'static str, SocketAddr)>,
    /// Bound, but not listening. They keep the closed ports reserved.
    _closed: [Socket; 2],
    _closed_udp: UdpSocket,
}

/// Returns the shared fixtures. Starts them at the first call.
pub fn fixtures() -> &'static Fixtures {
    static FIXTURES: OnceLock<Fixtures> = OnceLock::new();
    FIXTURES.get_or_init(Fixtures::start)
}

impl Fixtures {
    fn start() -> Self {
        let (v4, v6) = (IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST));
        let closed = [v4, v6].map(|ip| bound(SocketAddr::new(ip, 0)));
        let closed_udp = UdpSocket::bind((v4, 0)).expect("free port");
        // Connected to an unused address, so that the kernel answers other senders with ICMP port unreachable.
        closed_udp.connect(("127.0.0.9", 9)).expect("connected");
        let named = vec![
            ("echo", tcp_server(v4, echo)),
            ("echo6", tcp_server(v6, echo)),
            ("whoami", tcp_server(v4, send_peer_addr)),
            ("whoami6", tcp_server(v6, send_peer_addr)),
            ("banner", tcp_server(v4, send_banner)),
            ("counter", tcp_server(v4, send_byte_count)),
            ("resetter", tcp_server(v4, reset_after_first_byte)),
            ("closed", addr_of(&closed[0])),
            ("closed6", addr_of(&closed[1])),
            ("udp", udp_echo_server(v4)),
            ("udp6", udp_echo_server(v6)),
            ("three-answers", three_answers()),
            ("closed-udp", closed_udp.local_addr().expect("local address")),
            ("any", SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0)),
            ("any6", SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 0)),
        ];
        Self { named, _closed: closed, _closed_udp: closed_udp }
    }

    /// Returns the address with this name.
    pub fn addr(&self, name: &str) -> Option<SocketAddr> {
        self.named.iter().find(|(key, _)| *key == name).map(|(_, addr)| *addr)
    }
}

/// Returns a TCP socket that is bound and does not listen.
pub fn bound(addr: SocketAddr) -> Socket {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None).expect("socket created");
    socket.bind(&addr.into()).expect("free port");
    socket
}

/// Returns the local address of a socket.
pub fn addr_of(socket: &Socket) -> SocketAddr {
    socket.local_addr().ok().and_then(|addr| addr.as_socket()).expect("local address")
}

fn echo(mut stream: TcpStream) {
    let mut other = stream.try_clone().expect("cloned");
    let _ = std::io::copy(&mut stream, &mut other);
    let _ = other.shutdown(Shutdown::Write);
}

/// Sends the peer's address, encoded as in a reply.
fn send_peer_addr(mut stream: TcpStream) {
    let peer = stream.peer_addr().expect("peer address");
    let _ = stream.write_all(&encode_addr(peer));
}

/// Sends a banner, half-closes, and reads until EOF.
fn send_banner(mut stream: TcpStream) {
    let _ = stream.write_all(b"220 welcome\r\n");
    let _ = stream.shutdown(Shutdown::Write);
    let _ = stream.read_to_end(&mut Vec::new());
}

/// Reads until EOF, then sends the number of bytes as text.
fn send_byte_count(mut stream: TcpStream) {
    let mut all = Vec::new();
    if stream.read_to_end(&mut all).is_ok() {
        let _ = write!(stream, "{} bytes", all.len());
    }
}

/// Resets the connection after the first byte.
fn reset_after_first_byte(mut stream: TcpStream) {
    let _ = stream.read(&mut [0]);
    let _ = socket2::SockRef::from(&stream).set_linger(Some(std::time::Duration::ZERO));
}

/// Answers each datagram from another IP address, then from another port, then from the address it was sent to.
fn three_answers() -> SocketAddr {
    let bind = |ip| UdpSocket::bind((ip, 0)).expect("free port");
    let (target, other_port, other_ip) = (bind("127.0.0.1"), bind("127.0.0.1"), bind("127.0.0.3"));
    let addr = target.local_addr().expect("local address");
    thread::spawn(move || {
        while let Ok((_, from)) = target.recv_from(&mut [0; 2048]) {
            for (socket, text) in [(&other_ip, "other ip"), (&other_port, "other port"), (&target, "target")] {
                let _ = socket.send_to(text.as_bytes(), from);
            }
        }
    });
    addr
}
