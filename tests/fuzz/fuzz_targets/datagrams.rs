//! Sends random datagrams to the relay of a server as its client, and to a client as its relay. They must not panic,
//! and a valid datagram must be relayed after each input. Run it in a network namespace: headers name random targets.

#![no_main]

mod support;

use std::cell::OnceCell;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use futures_lite::FutureExt as _;
use libfuzzer_sys::fuzz_target;
use s5::client::{Association, Client, ClientOptions, parse_hops};
use s5::net::{reactor, sleep};
use s5::proto::Datagram;

const DATA: &[u8] = b"s5 fuzz";
const LIMIT: Duration = Duration::from_secs(4);

thread_local! {
    static SERVER_SIDE: OnceCell<ServerSide> = const { OnceCell::new() };
    static CLIENT_SIDE: OnceCell<ClientSide> = const { OnceCell::new() };
}

fuzz_target!(|bytes: &[u8]| {
    let datagrams = support::pieces(bytes);
    SERVER_SIDE.with(|side| side.get_or_init(ServerSide::open).check(&datagrams));
    CLIENT_SIDE.with(|side| side.get_or_init(ClientSide::open).check(&datagrams));
});

fn socket() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("bound");
    socket.set_read_timeout(Some(Duration::from_secs(1))).expect("timeout set");
    socket
}

/// Repeats a call that a signal interrupts: libFuzzer has a timer.
fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

fn valid(from: SocketAddr) -> Vec<u8> {
    let mut bytes = Vec::new();
    Datagram { frag: 0, dst: from.into(), data: DATA }.encode_into(&mut bytes);
    bytes
}

/// An association with a server, and the target of a valid datagram.
struct ServerSide {
    _control: TcpStream,
    socket: UdpSocket,
    target: UdpSocket,
}

impl ServerSide {
    fn open() -> Self {
        let mut control = TcpStream::connect(support::server().1).expect("the server accepts");
        control.write_all(b"\x05\x01\0\x05\x03\0\x01\0\0\0\0\0\0").expect("sent");
        let mut reply = [0; 12];
        control.read_exact(&mut reply).expect("replied");
        assert_eq!(reply[..6], [5, 0, 5, 0, 0, 1]);
        let socket = socket();
        socket.connect(("127.0.0.1", u16::from_be_bytes([reply[10], reply[11]]))).expect("connected");
        Self { _control: control, socket, target: self::socket() }
    }

    fn check(&self, datagrams: &[&[u8]]) {
        for datagram in datagrams {
            let _ = self.socket.send(datagram);
        }
        self.socket.send(&valid(self.target.local_addr().expect("local address"))).expect("sent");
        let (mut buffer, mut from) = ([0; 2048], None);
        while from.is_none() {
            let (n, sender) = retry(|| self.target.recv_from(&mut buffer)).expect("a valid datagram arrives");
            from = (&buffer[..n] == DATA).then_some(sender);
        }
        self.target.send_to(DATA, from.expect("set")).expect("sent");
        while let n = retry(|| self.socket.recv(&mut buffer)).expect("the answer arrives")
            && !buffer[..n].ends_with(DATA)
        {}
    }
}

/// A client's association with a relay of this process.
struct ClientSide {
    association: Association,
    relay: UdpSocket,
    client: SocketAddr,
}

impl ClientSide {
    fn open() -> Self {
        let relay = socket();
        let [high, low] = relay.local_addr().expect("local address").port().to_be_bytes();
        let proxy = TcpListener::bind("127.0.0.1:0").expect("bound");
        let addr = proxy.local_addr().expect("local address");
        // The proxy sends its answers at once, and never closes the connection.
        thread::spawn(move || {
            let (mut stream, _) = proxy.accept().expect("accepted");
            stream.write_all(&[5, 0, 5, 0, 0, 1, 127, 0, 0, 1, high, low]).expect("sent");
            std::mem::forget(stream);
        });
        let hops = parse_hops(&addr.to_string()).expect("valid proxy");
        let client = Client::new(hops, addr.into(), Some(LIMIT), Arc::new(ClientOptions::default()));
        let opened = reactor::run(async {
            let association = client.associate().await.expect("associated");
            association.send(DATA).await.expect("sent");
            association
        });
        let (_, client) = retry(|| relay.recv_from(&mut [0; 64])).expect("received");
        Self { association: opened.expect("the event loop runs"), relay, client }
    }

    fn check(&self, datagrams: &[&[u8]]) {
        let from = self.relay.local_addr().expect("local address");
        for datagram in datagrams.iter().copied().chain([&*valid(from)]) {
            self.relay.send_to(datagram, self.client).expect("sent");
        }
        let received = async {
            while self.association.recv().await.expect("received").1 != DATA {}
            true
        };
        let timeout = async {
            sleep(LIMIT).await;
            false
        };
        assert!(reactor::run(received.or(timeout)).expect("the event loop runs"), "a valid datagram does not arrive");
    }
}
