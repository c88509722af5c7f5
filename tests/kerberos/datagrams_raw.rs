//! A peer that is not ours as the client of an association: which datagrams the server takes, and what it makes of answers.

use std::net::{SocketAddr, UdpSocket};

use crate::common::{Server, udp_echo_server};
use crate::kit::realm::Realm;
use crate::kit::{UDP_ASSOCIATE, V4};
use crate::peer::{ALL, AUTHENTICATION, Context, DATA, Form, Library, Peer, have_python, message};
use crate::{octets, realm, serve};

/// The socket of an association, next to its control connection.
pub struct Udp<'a> {
    context: &'a Context,
    seal: bool,
    socket: UdpSocket,
}

impl<'a> Udp<'a> {
    pub fn new(control: &'a mut Peer, relay: SocketAddr) -> Self {
        let socket = UdpSocket::bind((V4, 0)).expect("a port");
        socket.connect(relay).expect("an address");
        socket.set_read_timeout(Some(crate::common::TIMEOUT)).expect("a timeout can be set");
        Self { context: &control.context, seal: control.seal, socket }
    }

    /// A datagram for the relay, wrapped.
    fn wrapped(&self, frag: u8, dst: SocketAddr, data: &[u8]) -> Vec<u8> {
        message(DATA, &self.context.wrap(&datagram(frag, dst, data), self.seal))
    }

    fn send_raw(&self, octets: &[u8]) {
        self.socket.send(octets).expect("it is sent");
    }

    fn send(&self, dst: SocketAddr, data: &[u8]) {
        self.send_raw(&self.wrapped(0, dst, data));
    }

    /// FRAG, sender and data of the next answer.
    fn receive_fragment(&self) -> (u8, SocketAddr, Vec<u8>) {
        let mut buffer = vec![0; 65_536];
        let n = self.socket.recv(&mut buffer).expect("an answer comes");
        let [1, DATA, high, low, token @ ..] = &buffer[..n] else { panic!("no frame: {:?}", &buffer[..n.min(16)]) };
        assert_eq!(usize::from(u16::from_be_bytes([*high, *low])), token.len(), "LEN is that of the datagram");
        let (octets, is_sealed) = self.context.unwrap(token);
        assert_eq!(is_sealed, self.seal, "sealed as agreed");
        let [0, 0, frag, 1, a, b, c, d, high, low, data @ ..] = &octets[..] else { panic!("{octets:?}") };
        (*frag, SocketAddr::from(([*a, *b, *c, *d], u16::from_be_bytes([*high, *low]))), data.to_vec())
    }

    fn receive(&self) -> (SocketAddr, Vec<u8>) {
        let (frag, from, data) = self.receive_fragment();
        assert_eq!(frag, 0);
        (from, data)
    }

    /// Sends, and expects the same back from there, before anything else.
    pub fn ping(&self, dst: SocketAddr, data: &[u8]) {
        self.send(dst, data);
        assert!(self.receive() == (dst, data.to_vec()), "{} octets", data.len());
    }
}

fn datagram(frag: u8, dst: SocketAddr, data: &[u8]) -> Vec<u8> {
    let mut octets = crate::common::message_with_addr([0, 0, frag], dst);
    octets.extend(data);
    octets
}

struct Scene {
    _realm: Realm,
    library: Library,
    server: Server,
    echo: SocketAddr,
}

impl Scene {
    fn new() -> Option<Self> {
        if !have_python() {
            return None;
        }
        let realm = realm()?;
        let (library, server) = (Library::start(&realm), serve(&realm, &[]));
        Some(Self { _realm: realm, library, server, echo: udp_echo_server(V4) })
    }

    /// A control connection at that level, and its relay.
    fn associate(&self, flags: u32, level: u8) -> (Peer, SocketAddr) {
        let mut peer = Peer::new(&self.library, &self.server, flags);
        assert_eq!(peer.ask(level, Form::Rfc), level);
        let (rep, relay) = peer.request(UDP_ASSOCIATE, SocketAddr::from(([0; 4], 0)));
        assert_eq!(rep, 0);
        (peer, relay)
    }
}

#[test]
fn what_is_not_as_it_was_agreed_is_dropped_and_the_association_lives_on() {
    let Some(scene) = Scene::new() else { return };
    for level in [1, 2] {
        let (mut control, relay) = scene.associate(ALL, level);
        let other = control.context.another();
        let udp = Udp::new(&mut control, relay);
        udp.ping(scene.echo, b"first");
        let evil = datagram(0, scene.echo, b"evil");
        let good = || udp.wrapped(0, scene.echo, b"evil");
        let change = |at: usize, to: u8| {
            let mut octets = good();
            octets[at] = to;
            octets
        };
        let whole = good();
        let mut faults = vec![
            ("clear", evil.clone()),
            ("clear in a frame", message(DATA, &evil)),
            ("of another context", message(DATA, &other.wrap(&evil, true))),
            ("another type", message(AUTHENTICATION, &udp.context.wrap(&evil, true))),
            ("another version", change(0, 5)),
            ("LEN is one more", change(3, whole[3] + 1)),
            ("LEN is one less", change(3, whole[3] - 1)),
            ("one octet behind", [&good()[..], &[0]].concat()),
            ("one octet short", whole[..whole.len() - 1].to_vec()),
            ("changed", change(4 + 25, 0)),
            ("two in one", [good(), good()].concat()),
            ("an empty token", message(DATA, &[])),
            ("half a header", vec![1, 3]),
            ("nothing", vec![]),
            ("something else inside", message(DATA, &udp.context.wrap(b"evil", true))),
            ("an abort", vec![1, 0xff]),
        ];
        if level == 2 {
            faults.push(("unsealed", message(DATA, &udp.context.wrap(&evil, false))));
        }
        for (what, octets) in faults {
            udp.send_raw(&octets);
            udp.send(scene.echo, what.as_bytes());
            // The next answer is to what was right.
            assert_eq!(udp.receive(), (scene.echo, what.as_bytes().to_vec()), "level {level}");
        }
    }
}

#[test]
fn datagrams_may_be_late_or_missing_but_are_taken_once() {
    let Some(scene) = Scene::new() else { return };
    for flags in [ALL, ALL & !crate::peer::SEQUENCE] {
        let (mut control, relay) = scene.associate(flags, 2);
        let udp = Udp::new(&mut control, relay);
        let all: Vec<Vec<u8>> = (0..6_u8).map(|i| udp.wrapped(0, scene.echo, &[i])).collect();
        for (i, is_new) in [(0, true), (2, true), (2, false), (1, true), (0, false), (1, false), (5, true), (3, true)] {
            udp.send_raw(&all[i]);
            if is_new {
                let expected = (scene.echo, vec![u8::try_from(i).expect("an octet")]);
                assert_eq!(udp.receive(), expected, "flags {flags}");
            }
        }
        // Whatever would have been answered twice would come before this.
        udp.ping(scene.echo, b"last");
    }
}

#[test]
fn an_answer_of_the_servers_own_is_not_taken_back() {
    let Some(scene) = Scene::new() else { return };
    let (mut control, relay) = scene.associate(ALL, 1);
    let udp = Udp::new(&mut control, relay);
    udp.send(scene.echo, b"once");
    let mut buffer = [0; 1024];
    let n = udp.socket.recv(&mut buffer).expect("an answer comes");
    udp.send_raw(&buffer[..n]);
    udp.context.unwrap(&buffer[4..n]);
    udp.ping(scene.echo, b"last");
}

#[test]
fn the_first_datagram_that_is_right_says_which_port_is_the_clients() {
    let Some(scene) = Scene::new() else { return };
    let (mut control, relay) = scene.associate(ALL, 2);
    // Anybody on the same host can send something.
    let stranger = UdpSocket::bind((V4, 0)).expect("a port");
    for octets in [&datagram(0, scene.echo, b"evil")[..], b"", b"\x01\x03\x00\x04evil"] {
        stranger.send_to(octets, relay).expect("it is sent");
    }
    Udp::new(&mut control, relay).ping(scene.echo, b"hello");
}

#[test]
fn fragments_are_wrapped_one_by_one() {
    let Some(scene) = Scene::new() else { return };
    for level in [1, 2] {
        let (mut control, relay) = scene.associate(ALL, level);
        let udp = Udp::new(&mut control, relay);
        for (frag, data) in [(1, &b"one "[..]), (2, b"two "), (0x83, b"three")] {
            udp.send_raw(&udp.wrapped(frag, scene.echo, data));
        }
        assert_eq!(udp.receive(), (scene.echo, b"one two three".to_vec()), "level {level}");
    }
}

#[test]
fn answers_are_whole_as_long_as_there_is_room_and_then_in_fragments() {
    let Some(scene) = Scene::new() else { return };
    for (level, whole) in [(1, 65_465), (2, 65_433)] {
        let (mut control, relay) = scene.associate(ALL, level);
        let udp = Udp::new(&mut control, relay);
        udp.ping(scene.echo, &octets(whole));
        // In halves there, and as the server likes it back.
        let (half, more) = (octets(whole / 2), octets(whole + 1 - whole / 2));
        udp.send_raw(&udp.wrapped(1, scene.echo, &half));
        udp.send_raw(&udp.wrapped(0x82, scene.echo, &more));
        let (frag, from, mut all) = udp.receive_fragment();
        assert_eq!((frag, from, all.len()), (1, scene.echo, whole), "level {level}");
        let (frag, _, rest) = udp.receive_fragment();
        assert_eq!((frag, rest.len()), (0x82, 1), "level {level}");
        all.extend(rest);
        assert!(all == [half, more].concat(), "other octets at level {level}");
    }
}
