//! An independent client with an open tunnel: which tokens the server accepts in a protected stream.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};

use crate::peer::{ABORT, ALL, AUTHENTICATION, DATA, LevelForm, Library, PROTECTION, Peer, has_python_gssapi, message};
use crate::support::realm::Realm;
use crate::support::{CONNECT, Server, StreamEnd, V4, accept, echo_server, listener, read_exact, retry, stream_end};
use crate::{bytes, realm, serve, wait_session};

struct Setup {
    _realm: Realm,
    library: Library,
    server: Server,
    listener: TcpListener,
    target: SocketAddr,
}

impl Setup {
    fn new() -> Option<Self> {
        if !has_python_gssapi() {
            return None;
        }
        let realm = realm()?;
        let (library, server) = (Library::start(&realm), serve(&realm, &[]));
        let (listener, target) = listener(V4);
        Some(Self { _realm: realm, library, server, listener, target })
    }

    /// Opens a tunnel at this level and sends a few bytes. Returns the client, the target's connection and its peer.
    fn tunnel(&self, level: u8) -> (Peer, TcpStream, SocketAddr) {
        let mut peer = Peer::connected(&self.library, &self.server, level, self.target);
        let (mut target, from) = accept(&self.listener);
        peer.send(b"begin");
        assert_eq!(read_exact(&mut target, 5), b"begin");
        (peer, target, from)
    }
}

/// Sends invalid data.
type SendInvalid = fn(&mut Peer, &mut TcpStream);

fn data(peer: &Peer, text: &[u8]) -> Vec<u8> {
    message(DATA, &peer.context.wrap(text, peer.should_encrypt))
}

fn send_changed(peer: &mut Peer, at: impl Fn(usize) -> usize) {
    let mut bytes = data(peer, b"evil evil evil");
    let at = at(bytes.len());
    bytes[at] ^= 0x40;
    peer.send_raw(&bytes);
}

/// Name, text in the log, and function that sends it.
const INVALID: [(&str, &str, SendInvalid); 20] = [
    ("a duplicate", "out of order", |peer, _| {
        let token = data(peer, b"good");
        peer.send_raw(&[&token[..], &token].concat());
    }),
    ("two tokens in the wrong order", "out of order", |peer, _| {
        let tokens = [data(peer, b"evil"), data(peer, b"evil")];
        peer.send_raw(&[&tokens[1][..], &tokens[0]].concat());
    }),
    ("a gap", "out of order", |peer, _| {
        data(peer, b"lost");
        peer.send(b"evil");
    }),
    ("an old token", "out of order", |peer, _| {
        let old = data(peer, b"good");
        peer.send_raw(&old);
        for _ in 0..100 {
            peer.send(b"");
        }
        peer.send_raw(&old);
    }),
    ("a reflected token of the server", "protection: ", |peer, target| {
        target.write_all(b"evil").expect("sent");
        let token = peer.receive_token(DATA);
        peer.send_token(DATA, &token);
    }),
    ("a token from another context", "protection: ", |peer, _| {
        let other = peer.context.other_context();
        peer.send_token(DATA, &other.wrap(b"evil", true));
    }),
    ("changed data", "protection: ", |peer, _| send_changed(peer, |_| 4 + 20)),
    ("changed checksum", "protection: ", |peer, _| send_changed(peer, |length| length - 1)),
    ("changed sequence number", "protection: ", |peer, _| send_changed(peer, |_| 4 + 15)),
    ("changed flags", "protection: ", |peer, _| send_changed(peer, |_| 4 + 2)),
    ("an empty token", "protection: ", |peer, _| peer.send_token(DATA, b"")),
    ("65535 invalid bytes", "protection: ", |peer, _| peer.send_token(DATA, &[5; 65_535])),
    ("clear text in a frame", "protection: ", |peer, _| peer.send_token(DATA, b"evil")),
    ("clear text", "protection: ", |peer, _| peer.send_raw(b"GET / HTTP/1.0\r\n\r\n")),
    ("clear text after a frame", "protection: ", |peer, _| {
        let good = data(peer, b"good");
        peer.send_raw(&[&good[..], b"\x01GET"].concat());
    }),
    ("a token in a message of type 1", "protection: ", |peer, _| {
        let token = peer.context.wrap(b"evil", true);
        peer.send_token(AUTHENTICATION, &token);
    }),
    ("a token in a message of type 2", "protection: ", |peer, _| {
        let token = peer.context.wrap(b"evil", true);
        peer.send_token(PROTECTION, &token);
    }),
    ("an unknown message type", "protection: ", |peer, _| peer.send_token(4, b"evil")),
    ("an abort", "protection: ", |peer, _| peer.send_raw(&ABORT)),
    ("another version", "protection: ", |peer, _| {
        let token = data(peer, b"evil");
        peer.send_raw(&[&[5], &token[1..]].concat());
    }),
];

/// Waits for the log line of the session that connected to the target from this address, with this error.
fn wait_session_error(setup: &Setup, target: SocketAddr, expected: &str) {
    wait_session(&setup.server, &[&format!("bnd={target} "), "error=\"", expected]);
}

#[test]
fn invalid_token_ends_the_tunnel_and_never_reaches_the_target() {
    let Some(setup) = Setup::new() else { return };
    for (case, expected, send_invalid) in INVALID {
        for level in [1, 2] {
            let (mut peer, mut target, from) = setup.tunnel(level);
            send_invalid(&mut peer, &mut target);
            let case = format!("{case}, at level {level}");
            let received = read_until_reset(&mut target, &case);
            assert!(received.is_empty() || received == b"good", "{case}: {received:?}");
            read_until_reset(&mut peer.stream, &case);
            wait_session_error(&setup, from, expected);
        }
    }
}

/// Reads until the connection is reset, which must happen.
fn read_until_reset(stream: &mut TcpStream, case: &str) -> Vec<u8> {
    let (mut all, mut byte) = (Vec::new(), [0; 1]);
    loop {
        match retry(|| stream.read(&mut byte)) {
            Ok(0) => panic!("{case}: closed without a reset"),
            Ok(_) => all.extend(byte),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return all,
            Err(error) => panic!("{case}: {error}"),
        }
    }
}

#[test]
fn unencrypted_token_is_rejected_at_confidentiality() {
    let Some(setup) = Setup::new() else { return };
    let (mut peer, mut target, from) = setup.tunnel(2);
    let token = peer.context.wrap(b"evil", false);
    peer.send_token(DATA, &token);
    assert_eq!(read_until_reset(&mut target, "not encrypted"), b"");
    wait_session_error(&setup, from, "token is not encrypted");
    // The same applies to a request.
    let mut peer = Peer::new(&setup.library, &setup.server, ALL);
    assert_eq!(peer.request_level(2, LevelForm::Rfc), 2);
    let token = peer.context.wrap(&crate::support::request(CONNECT, setup.target), false);
    peer.send_token(DATA, &token);
    let end = stream_end(&mut peer.stream);
    assert!(end == StreamEnd::Reset || end == StreamEnd::Closed(vec![]), "{end:?}");
    wait_session(&setup.server, &["command=- ", "rep=-", "token is not encrypted"]);
    setup.listener.set_nonblocking(true).expect("an option");
    assert!(setup.listener.accept().is_err(), "no connection");
}

#[test]
fn encrypted_token_is_accepted_at_integrity() {
    let Some(setup) = Setup::new() else { return };
    let (mut peer, mut target, _) = setup.tunnel(1);
    let token = peer.context.wrap(b"secret", true);
    peer.send_token(DATA, &token);
    assert_eq!(read_exact(&mut target, 6), b"secret");
    target.write_all(b"answer").expect("sent");
    assert_eq!(peer.receive(), b"answer");
}

#[test]
fn end_of_stream_within_a_frame_is_an_error() {
    let Some(setup) = Setup::new() else { return };
    let length = 4 + 60 + 4;
    for end in 0..=length {
        let (mut peer, mut target, from) = setup.tunnel(2);
        let bytes = data(&peer, b"last");
        assert_eq!(bytes.len(), length);
        peer.send_raw(&bytes[..end]);
        peer.shutdown();
        let case = format!("{end} bytes");
        match end {
            // The end between two frames is a half-close.
            0 => assert_eq!(stream_end(&mut target), StreamEnd::Closed(vec![])),
            68 => assert_eq!(stream_end(&mut target), StreamEnd::Closed(b"last".to_vec())),
            _ => assert_eq!(read_until_reset(&mut target, &case), b""),
        }
        if end % length > 0 {
            wait_session_error(&setup, from, "connection closed within a token");
        }
    }
}

#[test]
fn tokens_of_all_sizes_pass() {
    let Some(setup) = Setup::new() else { return };
    let echo = echo_server();
    for level in [1, 2] {
        let mut peer = Peer::connected(&setup.library, &setup.server, level, echo);
        let largest = peer.context.wrap_size_limit(level == 2);
        let token = peer.context.wrap(&bytes(largest), level == 2);
        assert!(token.len() > 65_535 - 32 && token.len() <= 65_535, "{}", token.len());
        peer.send_token(DATA, &token);
        assert!(peer.receive_all(largest) == bytes(largest), "level {level}");
        for length in [0, 1, 16_384, 16_385, 40_000] {
            peer.send(&bytes(length));
            assert!(peer.receive_all(length) == bytes(length), "{length} bytes at level {level}");
        }
    }
}

#[test]
fn tokens_pass_in_any_pieces() {
    let Some(setup) = Setup::new() else { return };
    let (mut peer, mut target, _) = setup.tunnel(2);
    let all: Vec<u8> = (0..300_usize).flat_map(|i| data(&peer, &bytes(i % 50))).collect();
    for piece in all.chunks(97) {
        peer.send_raw(piece);
    }
    peer.shutdown();
    let expected: Vec<u8> = (0..300_usize).flat_map(|i| bytes(i % 50)).collect();
    assert!(stream_end(&mut target) == StreamEnd::Closed(expected), "wrong data");
}
