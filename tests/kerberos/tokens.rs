//! A peer that is not ours as the client, behind its request: what the server takes of a protected stream.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};

use crate::common::{Server, echo_server, read_exact};
use crate::kit::realm::Realm;
use crate::kit::{CONNECT, StreamEnd, V4, accept, listener, stream_end};
use crate::peer::{ABORT, ALL, AUTHENTICATION, DATA, Form, Library, PROTECTION, Peer, have_python, message};
use crate::{octets, realm, serve, session};

struct Scene {
    _realm: Realm,
    library: Library,
    server: Server,
    listener: TcpListener,
    target: SocketAddr,
}

impl Scene {
    fn new() -> Option<Self> {
        if !have_python() {
            return None;
        }
        let realm = realm()?;
        let (library, server) = (Library::start(&realm), serve(&realm, &[]));
        let (listener, target) = listener(V4);
        Some(Self { _realm: realm, library, server, listener, target })
    }

    /// A client at that level, the target that it is connected to, behind a few octets, and from where.
    fn tunnel(&self, level: u8) -> (Peer, TcpStream, SocketAddr) {
        let mut peer = Peer::connected(&self.library, &self.server, level, self.target);
        let (mut target, from) = accept(&self.listener);
        peer.send(b"begin");
        assert_eq!(read_exact(&mut target, 5), b"begin");
        (peer, target, from)
    }
}

/// Says something wrong.
type Fault = fn(&mut Peer, &mut TcpStream);

fn data(peer: &Peer, text: &[u8]) -> Vec<u8> {
    message(DATA, &peer.context.wrap(text, peer.seal))
}

fn changed(peer: &mut Peer, at: impl Fn(usize) -> usize) {
    let mut octets = data(peer, b"evil evil evil");
    let at = at(octets.len());
    octets[at] ^= 0x40;
    peer.say_raw(&octets);
}

/// What is wrong, what the log says of it, and how it comes about.
const FAULTS: [(&str, &str, Fault); 20] = [
    ("a duplicate", "out of order", |peer, _| {
        let token = data(peer, b"good");
        peer.say_raw(&[&token[..], &token].concat());
    }),
    ("two in the wrong order", "out of order", |peer, _| {
        let tokens = [data(peer, b"evil"), data(peer, b"evil")];
        peer.say_raw(&[&tokens[1][..], &tokens[0]].concat());
    }),
    ("one is missing", "out of order", |peer, _| {
        data(peer, b"lost");
        peer.send(b"evil");
    }),
    ("one from the beginning", "out of order", |peer, _| {
        let old = data(peer, b"good");
        peer.say_raw(&old);
        for _ in 0..100 {
            peer.send(b"");
        }
        peer.say_raw(&old);
    }),
    ("one of the server's own", "protection: ", |peer, target| {
        target.write_all(b"evil").expect("it is sent");
        let token = peer.hear(DATA);
        peer.say(DATA, &token);
    }),
    ("one of another context", "protection: ", |peer, _| {
        let other = peer.context.another();
        peer.say(DATA, &other.wrap(b"evil", true));
    }),
    ("changed in its data", "protection: ", |peer, _| changed(peer, |_| 4 + 20)),
    ("changed in its checksum", "protection: ", |peer, _| changed(peer, |length| length - 1)),
    ("changed in its number", "protection: ", |peer, _| changed(peer, |_| 4 + 15)),
    ("changed in its flags", "protection: ", |peer, _| changed(peer, |_| 4 + 2)),
    ("an empty one", "protection: ", |peer, _| peer.say(DATA, b"")),
    ("65535 octets that are none", "protection: ", |peer, _| peer.say(DATA, &[5; 65_535])),
    ("clear text in a frame", "protection: ", |peer, _| peer.say(DATA, b"evil")),
    ("clear text", "protection: ", |peer, _| peer.say_raw(b"GET / HTTP/1.0\r\n\r\n")),
    ("clear text behind a frame", "protection: ", |peer, _| {
        let good = data(peer, b"good");
        peer.say_raw(&[&good[..], b"\x01GET"].concat());
    }),
    ("in a message of the handshake", "protection: ", |peer, _| {
        let token = peer.context.wrap(b"evil", true);
        peer.say(AUTHENTICATION, &token);
    }),
    ("in a message about levels", "protection: ", |peer, _| {
        let token = peer.context.wrap(b"evil", true);
        peer.say(PROTECTION, &token);
    }),
    ("an unknown message", "protection: ", |peer, _| peer.say(4, b"evil")),
    ("an abort", "protection: ", |peer, _| peer.say_raw(&ABORT)),
    ("another version", "protection: ", |peer, _| {
        let token = data(peer, b"evil");
        peer.say_raw(&[&[5], &token[1..]].concat());
    }),
];

/// Waits for the log to say why the session with that address towards the target has ended.
fn ended_for(scene: &Scene, target: SocketAddr, why: &str) {
    session(&scene.server, &[&format!("bnd={target} "), "error=\"", why]);
}

#[test]
fn what_is_not_as_it_was_agreed_never_reaches_the_target_and_ends_the_tunnel() {
    let Some(scene) = Scene::new() else { return };
    for (what, why, fault) in FAULTS {
        for level in [1, 2] {
            let (mut peer, mut target, from) = scene.tunnel(level);
            fault(&mut peer, &mut target);
            let what = format!("{what}, at level {level}");
            let came = until_reset(&mut target, &what);
            assert!(came.is_empty() || came == b"good", "{what}: {came:?}");
            until_reset(&mut peer.stream, &what);
            ended_for(&scene, from, why);
        }
    }
}

/// What comes before a reset, which has to be the end.
fn until_reset(stream: &mut TcpStream, what: &str) -> Vec<u8> {
    let (mut all, mut octet) = (Vec::new(), [0; 1]);
    loop {
        match stream.read(&mut octet) {
            Ok(0) => panic!("{what}: closed as if all were well"),
            Ok(_) => all.extend(octet),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return all,
            Err(error) => panic!("{what}: {error}"),
        }
    }
}

#[test]
fn what_is_only_signed_does_not_pass_where_sealing_was_agreed() {
    let Some(scene) = Scene::new() else { return };
    let (mut peer, mut target, from) = scene.tunnel(2);
    let token = peer.context.wrap(b"evil", false);
    peer.say(DATA, &token);
    assert_eq!(until_reset(&mut target, "unsealed"), b"");
    ended_for(&scene, from, "token is not encrypted");
    // And neither does such a request.
    let mut peer = Peer::new(&scene.library, &scene.server, ALL);
    assert_eq!(peer.ask(2, Form::Rfc), 2);
    let token = peer.context.wrap(&crate::common::request(CONNECT, scene.target), false);
    peer.say(DATA, &token);
    let end = stream_end(&mut peer.stream);
    assert!(end == StreamEnd::Reset || end == StreamEnd::Closed(vec![]), "{end:?}");
    session(&scene.server, &["command=- ", "rep=-", "token is not encrypted"]);
    scene.listener.set_nonblocking(true).expect("an option");
    assert!(scene.listener.accept().is_err(), "nobody has connected");
}

#[test]
fn what_is_sealed_passes_where_signing_was_agreed() {
    let Some(scene) = Scene::new() else { return };
    let (mut peer, mut target, _) = scene.tunnel(1);
    let token = peer.context.wrap(b"sealed", true);
    peer.say(DATA, &token);
    assert_eq!(read_exact(&mut target, 6), b"sealed");
    target.write_all(b"signed").expect("it is sent");
    assert_eq!(peer.receive(), b"signed");
}

#[test]
fn an_end_inside_of_a_frame_is_none() {
    let Some(scene) = Scene::new() else { return };
    let length = 4 + 60 + 4;
    for end in 0..=length {
        let (mut peer, mut target, from) = scene.tunnel(2);
        let octets = data(&peer, b"last");
        assert_eq!(octets.len(), length);
        peer.say_raw(&octets[..end]);
        peer.shutdown();
        let what = format!("{end} octets");
        match end {
            // Between frames it is a half-close.
            0 => assert_eq!(stream_end(&mut target), StreamEnd::Closed(vec![])),
            68 => assert_eq!(stream_end(&mut target), StreamEnd::Closed(b"last".to_vec())),
            _ => assert_eq!(until_reset(&mut target, &what), b""),
        }
        if end % length > 0 {
            ended_for(&scene, from, "connection closed within a token");
        }
    }
}

#[test]
fn tokens_of_every_size_pass() {
    let Some(scene) = Scene::new() else { return };
    let echo = echo_server();
    for level in [1, 2] {
        let mut peer = Peer::connected(&scene.library, &scene.server, level, echo);
        let largest = peer.context.limit(level == 2);
        let token = peer.context.wrap(&octets(largest), level == 2);
        assert!(token.len() > 65_535 - 32 && token.len() <= 65_535, "{}", token.len());
        peer.say(DATA, &token);
        assert!(peer.receive_all(largest) == octets(largest), "level {level}");
        for length in [0, 1, 16_384, 16_385, 40_000] {
            peer.send(&octets(length));
            assert!(peer.receive_all(length) == octets(length), "{length} octets at level {level}");
        }
    }
}

#[test]
fn many_tokens_may_come_at_once_and_in_any_pieces() {
    let Some(scene) = Scene::new() else { return };
    let (mut peer, mut target, _) = scene.tunnel(2);
    let all: Vec<u8> = (0..300_usize).flat_map(|i| data(&peer, &octets(i % 50))).collect();
    for piece in all.chunks(97) {
        peer.say_raw(piece);
    }
    peer.shutdown();
    let expected: Vec<u8> = (0..300_usize).flat_map(|i| octets(i % 50)).collect();
    assert!(stream_end(&mut target) == StreamEnd::Closed(expected), "other octets");
}
