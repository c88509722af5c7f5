//! Helpers for tests of UDP: a client with one association, targets, and datagrams.

use crate::*;

/// Time after which a datagram counts as dropped. Used only if no later datagram proves it.
const DROP_WAIT: Duration = Duration::from_millis(150);

/// A client: its control connection, and the socket that it sends from.
pub struct Association {
    pub control: TcpStream,
    pub socket: UdpSocket,
    /// Address of the server's socket for the client.
    pub bnd: SocketAddr,
}

impl Association {
    /// Opens an association with zeros as DST.
    pub fn new(server: &Server) -> Self {
        let unknown = if server.addr().is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        Self::with_dst(server, unknown.parse().expect("valid address"), socket(server.addr().ip()))
    }

    /// Opens an association with this DST.
    pub fn with_dst(server: &Server, dst: SocketAddr, socket: UdpSocket) -> Self {
        Self::with_control(greet(server), dst, socket)
    }

    /// Opens an association with this DST after the handshake of `control`.
    pub fn with_control(mut control: TcpStream, dst: SocketAddr, socket: UdpSocket) -> Self {
        control.write_all(&request(UDP_ASSOCIATE, dst)).expect("request sent");
        let (rep, bnd) = read_reply(&mut control);
        assert_eq!(rep, 0);
        assert_ne!(bnd.port(), 0);
        Self { control, socket, bnd }
    }

    /// Sends a datagram without adding a header.
    pub fn send_raw(&self, bytes: &[u8]) {
        self.socket.send_to(bytes, self.bnd).expect("datagram sent");
    }

    pub fn send(&self, dst: SocketAddr, data: &[u8]) {
        self.send_raw(&datagram(0, dst, data));
    }

    /// Receives FRAG, sender and data.
    pub fn receive_fragment(&self) -> (u8, SocketAddr, Vec<u8>) {
        let (bytes, from) = receive(&self.socket);
        assert_eq!(from, self.bnd, "datagram from another address than BND");
        parse(&bytes)
    }

    pub fn receive(&self) -> (SocketAddr, Vec<u8>) {
        let (frag, from, data) = self.receive_fragment();
        assert_eq!(frag, 0);
        (from, data)
    }

    /// Sends `data` to `dst`, which must send it back.
    pub fn ping(&self, dst: SocketAddr, data: &[u8]) {
        self.send(dst, data);
        let (from, answer) = self.receive();
        assert_eq!(from, dst, "sender of the answer");
        assert!(answer == data, "received {} bytes, expected {}", answer.len(), data.len());
    }
}

/// Returns a socket with a read timeout and a receive buffer that holds bursts.
pub fn socket(ip: IpAddr) -> UdpSocket {
    let socket = UdpSocket::bind((ip, 0)).expect("free port");
    socket.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    SockRef::from(&socket).set_recv_buffer_size(1 << 22).expect("option set");
    socket
}

/// Returns a socket on 127.0.0.1 and its address.
pub fn target() -> (UdpSocket, SocketAddr) {
    let socket = socket(V4);
    let addr = socket.local_addr().expect("local address");
    (socket, addr)
}

/// Starts a server with one association. Returns both, and a target with its address.
pub fn relayed() -> (Server, Association, UdpSocket, SocketAddr) {
    let server = Server::start(&[]);
    let (association, (target, dst)) = (Association::new(&server), target());
    (server, association, target, dst)
}

pub fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = vec![0; 65_536];
    let (n, from) = retry(|| socket.recv_from(&mut buffer)).expect("datagram received");
    buffer.truncate(n);
    (buffer, from)
}

/// Fails if a datagram arrives within [`DROP_WAIT`].
pub fn assert_nothing_arrives(socket: &UdpSocket) {
    socket.set_read_timeout(Some(DROP_WAIT)).expect("timeout set");
    let received = retry(|| socket.recv_from(&mut [0; 64]));
    assert!(received.is_err(), "{received:?}");
    socket.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
}

pub fn datagram(frag: u8, dst: SocketAddr, data: &[u8]) -> Vec<u8> {
    let mut bytes = crate::support::request(0, dst);
    bytes[..3].copy_from_slice(&[0, 0, frag]);
    bytes.extend(data);
    bytes
}

pub fn datagram_name(frag: u8, name: &str, port: u16, data: &[u8]) -> Vec<u8> {
    let mut bytes = crate::support::request_by_name(0, name, port);
    bytes[..3].copy_from_slice(&[0, 0, frag]);
    bytes.extend(data);
    bytes
}

fn parse(bytes: &[u8]) -> (u8, SocketAddr, Vec<u8>) {
    assert_eq!(bytes[..2], [0, 0], "RSV");
    let (ip, rest): (IpAddr, _) = match bytes[3] {
        1 => (<[u8; 4]>::try_from(&bytes[4..8]).expect("4 bytes").into(), &bytes[8..]),
        4 => (<[u8; 16]>::try_from(&bytes[4..20]).expect("16 bytes").into(), &bytes[20..]),
        other => panic!("ATYP {other} of a sender"),
    };
    (bytes[2], SocketAddr::new(ip, u16::from_be_bytes([rest[0], rest[1]])), rest[2..].to_vec())
}
