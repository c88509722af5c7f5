//! A client of one association, and targets that remember who sent to them. Not a test.

use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use socket2::SockRef;

use crate::common::{Server, TIMEOUT, open};
use crate::kit::{UDP_ASSOCIATE, V4};

/// How long something may take to be dropped before the test goes on. Only where nothing later shows it.
const DROPPED: Duration = Duration::from_millis(150);

/// A client with its control connection and the socket that it sends from.
pub struct Association {
    pub control: TcpStream,
    pub socket: UdpSocket,
    /// Where the server relays.
    pub bnd: SocketAddr,
}

impl Association {
    /// Of a client that does not know its port yet.
    pub fn new(server: &Server) -> Self {
        let unknown = if server.addr().is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        Self::declare(server, unknown.parse().expect("an address"), socket(server.addr().ip()))
    }

    /// Of a client that says DST.
    pub fn declare(server: &Server, dst: SocketAddr, socket: UdpSocket) -> Self {
        let (control, rep, bnd) = open(server, UDP_ASSOCIATE, dst);
        assert_eq!(rep, 0);
        assert_ne!(bnd.port(), 0);
        Self { control, socket, bnd }
    }

    /// Sends octets as they are.
    pub fn send_raw(&self, octets: &[u8]) {
        self.socket.send_to(octets, self.bnd).expect("it is sent");
    }

    pub fn send(&self, dst: SocketAddr, data: &[u8]) {
        self.send_raw(&datagram(0, dst, data));
    }

    /// FRAG, whose it is and what it says.
    pub fn receive_fragment(&self) -> (u8, SocketAddr, Vec<u8>) {
        let (octets, from) = receive(&self.socket);
        assert_eq!(from, self.bnd, "the client hears from nobody else");
        parse(&octets)
    }

    pub fn receive(&self) -> (SocketAddr, Vec<u8>) {
        let (frag, from, data) = self.receive_fragment();
        assert_eq!(frag, 0);
        (from, data)
    }

    /// Sends, and expects the same back from there.
    pub fn ping(&self, dst: SocketAddr, data: &[u8]) {
        self.send(dst, data);
        let (from, answer) = self.receive();
        assert_eq!(from, dst, "whose answer it is");
        assert!(answer == data, "{} octets came back for {}", answer.len(), data.len());
    }
}

/// A socket with a read timeout and as much room for bursts as the system grants.
pub fn socket(ip: IpAddr) -> UdpSocket {
    let socket = UdpSocket::bind((ip, 0)).expect("a port");
    socket.set_read_timeout(Some(TIMEOUT)).expect("a timeout can be set");
    SockRef::from(&socket).set_recv_buffer_size(1 << 22).expect("an option");
    socket
}

/// As `socket` on 127.0.0.1, and its address.
pub fn target() -> (UdpSocket, SocketAddr) {
    let socket = socket(V4);
    let addr = socket.local_addr().expect("an address");
    (socket, addr)
}

pub fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = vec![0; 65_536];
    let (n, from) = socket.recv_from(&mut buffer).expect("a datagram comes");
    buffer.truncate(n);
    (buffer, from)
}

/// Fails when anything comes.
pub fn assert_nothing(socket: &UdpSocket) {
    socket.set_read_timeout(Some(DROPPED)).expect("a timeout can be set");
    let received = socket.recv_from(&mut [0; 64]);
    assert!(received.is_err(), "{received:?}");
    socket.set_read_timeout(Some(TIMEOUT)).expect("a timeout can be set");
}

pub fn datagram(frag: u8, dst: SocketAddr, data: &[u8]) -> Vec<u8> {
    let mut octets = crate::common::request(0, dst);
    octets[..3].copy_from_slice(&[0, 0, frag]);
    octets.extend(data);
    octets
}

pub fn datagram_name(frag: u8, name: &str, port: u16, data: &[u8]) -> Vec<u8> {
    let mut octets = crate::kit::request_by_name(0, name, port);
    octets[..3].copy_from_slice(&[0, 0, frag]);
    octets.extend(data);
    octets
}

fn parse(octets: &[u8]) -> (u8, SocketAddr, Vec<u8>) {
    assert_eq!(octets[..2], [0, 0], "RSV");
    let (ip, rest): (IpAddr, _) = match octets[3] {
        1 => (<[u8; 4]>::try_from(&octets[4..8]).expect("4 octets").into(), &octets[8..]),
        4 => (<[u8; 16]>::try_from(&octets[4..20]).expect("16 octets").into(), &octets[20..]),
        other => panic!("ATYP {other} of a sender"),
    };
    (octets[2], SocketAddr::new(ip, u16::from_be_bytes([rest[0], rest[1]])), rest[2..].to_vec())
}
