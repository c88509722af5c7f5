//! An independent client of a UDP association: which datagrams the server accepts, and how it wraps answers.

use crate::peer::{ALL, AUTHENTICATION, DATA, Library, Peer, SEQUENCE, message, set_up};
use crate::support::bytes::hex;
use crate::support::realm::Realm;
use crate::*;

/// The client of an association.
pub struct Udp {
    control: Peer,
    relay: SocketAddr,
    socket: UdpSocket,
}

impl Udp {
    pub fn new(control: Peer) -> Self {
        Self::with_dst(control, SocketAddr::from(([0; 4], 0)))
    }

    fn with_dst(mut control: Peer, dst: SocketAddr) -> Self {
        let (rep, relay) = control.request(UDP_ASSOCIATE, dst);
        assert_eq!(rep, 0);
        let socket = UdpSocket::bind((V4, 0)).expect("a port");
        socket.connect(relay).expect("an address");
        socket.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
        Self { control, relay, socket }
    }

    /// Returns a wrapped datagram for the relay.
    fn wrapped(&self, frag: u8, dst: SocketAddr, data: &[u8]) -> Vec<u8> {
        self.control.frame(&datagram(frag, dst, data))
    }

    fn send_raw(&self, bytes: &[u8]) {
        self.socket.send(bytes).expect("sent");
    }

    /// Receives an answer. Returns FRAG, sender and data.
    fn receive_fragment(&self) -> (u8, SocketAddr, Vec<u8>) {
        let mut buffer = vec![0; 65_536];
        let n = retry(|| self.socket.recv(&mut buffer)).expect("an answer");
        let [1, DATA, high, low, token @ ..] = &buffer[..n] else { panic!("not a frame: {:?}", &buffer[..n.min(16)]) };
        assert_eq!(usize::from(u16::from_be_bytes([*high, *low])), token.len(), "LEN matches the datagram");
        let (bytes, is_encrypted) = self.control.context.unwrap(token);
        assert_eq!(is_encrypted, self.control.should_encrypt, "encrypted as negotiated");
        let [0, 0, frag, 1, a, b, c, d, high, low, data @ ..] = &bytes[..] else { panic!("{bytes:?}") };
        (*frag, SocketAddr::from(([*a, *b, *c, *d], u16::from_be_bytes([*high, *low]))), data.to_vec())
    }

    fn receive(&self) -> (SocketAddr, Vec<u8>) {
        let (frag, from, data) = self.receive_fragment();
        assert_eq!(frag, 0);
        (from, data)
    }

    /// Sends data to an echo server. Checks that the next datagram is the echo.
    pub fn ping(&self, dst: SocketAddr, data: &[u8]) {
        self.send_raw(&self.wrapped(0, dst, data));
        let (from, received) = self.receive();
        assert!((from, &received[..]) == (dst, data), "{} bytes, sent {}", received.len(), hex(data));
    }
}

fn datagram(frag: u8, dst: SocketAddr, data: &[u8]) -> Vec<u8> {
    let mut bytes = message_with_addr([0, 0, frag], dst);
    bytes.extend(data);
    bytes
}

struct Setup {
    _realm: Realm,
    library: Library,
    server: Server,
    echo: SocketAddr,
}

impl Setup {
    fn new() -> Option<Self> {
        let (realm, library) = set_up()?;
        let server = serve(&realm, &[]);
        Some(Self { _realm: realm, library, server, echo: udp_echo_server(V4) })
    }

    fn associate(&self, flags: u32, level: u8) -> Udp {
        Udp::new(Peer::at_level(&self.library, &self.server, flags, level))
    }
}

#[test]
fn protected_associations_share_one_port() {
    let Some((realm, library)) = set_up() else { return };
    let free = UdpSocket::bind((V4, 0)).and_then(|socket| socket.local_addr()).expect("a port").port();
    let server = serve(&realm, &["--udp-ports", &free.to_string()]);
    let echo = udp_echo_server(V4);
    // DST is a target, as some clients send it.
    let peer = || Peer::at_level(&library, &server, ALL, 2);
    let associate = || Udp::with_dst(peer(), SocketAddr::from(([8; 4], 53)));
    // An idle association does not block later ones, which begin in any order.
    let idle = associate();
    let associations = [(); 3].map(|()| associate());
    associations.iter().rev().for_each(|udp| (0..10).for_each(|i| udp.send_raw(&udp.wrapped(0, echo, &[i]))));
    for udp in &associations {
        assert_eq!(udp.relay.port(), free);
        let mut received: Vec<u8> = (0..10).map(|_| udp.receive().1[0]).collect();
        received.sort_unstable();
        assert_eq!(received, Vec::from_iter(0..10));
    }
    // A datagram of another context, or of none, does not take up a new association.
    let new = associate();
    let other = UdpSocket::bind((V4, 0)).expect("a port");
    for evil in [associations[0].wrapped(0, echo, b"evil"), message(DATA, b"evil")] {
        other.send_to(&evil, new.relay).expect("sent");
    }
    for udp in [&new, &idle].into_iter().chain(&associations) {
        udp.ping(echo, b"hello");
    }
    // 16 associations try to unwrap a datagram, which may be forged, and others the next one.
    let _idle = Vec::from_iter((0..40).map(|_| associate()));
    let new = associate();
    new.socket.set_read_timeout(Some(Duration::from_millis(50))).expect("timeout set");
    let mut sent = 0;
    wait_until("an answer arrives", TIMEOUT, || {
        new.send_raw(&new.wrapped(0, echo, b"repeated"));
        sent += 1;
        retry(|| new.socket.recv(&mut [0; 512])).is_ok()
    });
    assert!(sent > 2, "more than 16 associations have tried to unwrap a datagram");
}

#[test]
fn invalid_datagrams_are_dropped_and_association_continues() {
    let Some(setup) = Setup::new() else { return };
    for level in [1, 2] {
        let udp = setup.associate(ALL, level);
        let context = &udp.control.context;
        udp.ping(setup.echo, b"first");
        let evil = datagram(0, setup.echo, b"evil");
        let valid_token = || udp.wrapped(0, setup.echo, b"evil");
        let change = |at: usize, to: u8| {
            let mut bytes = valid_token();
            bytes[at] = to;
            bytes
        };
        let valid = valid_token();
        let mut changed = valid_token();
        changed[4 + 25] ^= 1;
        let mut invalid = vec![
            ("clear", evil.clone()),
            ("clear in a frame", message(DATA, &evil)),
            ("from another context", context.other_context().message(DATA, &evil, true)),
            ("another type", context.message(AUTHENTICATION, &evil, true)),
            ("another version", change(0, 5)),
            ("LEN is one more", change(3, valid[3] + 1)),
            ("LEN is one less", change(3, valid[3] - 1)),
            ("one extra byte", [&valid_token()[..], &[0]].concat()),
            ("one missing byte", valid[..valid.len() - 1].to_vec()),
            ("changed", changed),
            ("two in one", [valid_token(), valid_token()].concat()),
            ("an empty token", message(DATA, &[])),
            ("half a header", vec![1, 3]),
            ("nothing", vec![]),
            ("not a datagram in a token", context.message(DATA, b"evil", true)),
            ("an abort", vec![1, 0xff]),
        ];
        if level == 2 {
            invalid.push(("not encrypted", context.message(DATA, &evil, false)));
        }
        for (case, bytes) in invalid {
            udp.send_raw(&bytes);
            // The next answer is that to the valid datagram.
            udp.ping(setup.echo, format!("{case}, at level {level}").as_bytes());
        }
    }
}

#[test]
fn datagrams_can_be_late_or_missing_but_are_relayed_once() {
    let Some(setup) = Setup::new() else { return };
    for flags in [ALL, ALL & !SEQUENCE] {
        let udp = setup.associate(flags, 2);
        let all: Vec<Vec<u8>> = (0..6_u8).map(|i| udp.wrapped(0, setup.echo, &[i])).collect();
        for (i, is_new) in [(0, true), (2, true), (2, false), (1, true), (0, false), (1, false), (5, true), (3, true)] {
            udp.send_raw(&all[i]);
            if is_new {
                let expected = (setup.echo, vec![u8::try_from(i).expect("below 6")]);
                assert_eq!(udp.receive(), expected, "flags {flags}");
            }
        }
        // A second answer would arrive before this one.
        udp.ping(setup.echo, b"last");
    }
}

#[test]
fn reflected_datagram_of_the_server_is_dropped() {
    let Some(setup) = Setup::new() else { return };
    let udp = setup.associate(ALL, 1);
    udp.send_raw(&udp.wrapped(0, setup.echo, b"once"));
    let mut buffer = [0; 1024];
    let n = retry(|| udp.socket.recv(&mut buffer)).expect("an answer");
    udp.send_raw(&buffer[..n]);
    udp.control.context.unwrap(&buffer[4..n]);
    udp.ping(setup.echo, b"last");
}

#[test]
fn client_port_is_that_of_the_first_valid_datagram() {
    let Some(setup) = Setup::new() else { return };
    let udp = setup.associate(ALL, 2);
    // Another program on the same host sends invalid datagrams.
    let stranger = UdpSocket::bind((V4, 0)).expect("a port");
    for bytes in [&datagram(0, setup.echo, b"evil")[..], b"", b"\x01\x03\x00\x04evil"] {
        stranger.send_to(bytes, udp.relay).expect("sent");
    }
    udp.ping(setup.echo, b"hello");
}

#[test]
fn each_fragment_is_wrapped() {
    let Some(setup) = Setup::new() else { return };
    for level in [1, 2] {
        let udp = setup.associate(ALL, level);
        for (frag, data) in [(1, &b"one "[..]), (2, b"two "), (0x83, b"three")] {
            udp.send_raw(&udp.wrapped(frag, setup.echo, data));
        }
        assert_eq!(udp.receive(), (setup.echo, b"one two three".to_vec()), "level {level}");
    }
}

#[test]
fn answers_are_fragmented_only_if_too_long_for_one_datagram() {
    let Some(setup) = Setup::new() else { return };
    for (level, max) in [(1, 65_465), (2, 65_433)] {
        let udp = setup.associate(ALL, level);
        udp.ping(setup.echo, &bytes(max));
        // The request is sent in two halves; the server fragments the answer by itself.
        let (half, more) = (bytes(max / 2), bytes(max + 1 - max / 2));
        udp.send_raw(&udp.wrapped(1, setup.echo, &half));
        udp.send_raw(&udp.wrapped(0x82, setup.echo, &more));
        let (frag, from, mut all) = udp.receive_fragment();
        assert_eq!((frag, from, all.len()), (1, setup.echo, max), "level {level}");
        let (frag, _, rest) = udp.receive_fragment();
        assert_eq!((frag, rest.len()), (0x82, 1), "level {level}");
        all.extend(rest);
        assert!(all == [half, more].concat(), "wrong data at level {level}");
    }
}
