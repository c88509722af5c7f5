//! An independent client with an open tunnel: which tokens the server accepts in a protected stream.
//! tests/wire/protected.rs has its pieces and its end.

use crate::peer::{ABORT, ALL, AUTHENTICATION, DATA, Library, PROTECTION, Peer, message, set_up};
use crate::support::realm::Realm;
use crate::*;

struct Setup {
    _realm: Realm,
    library: Library,
    server: Server,
    listener: TcpListener,
    target: SocketAddr,
}

impl Setup {
    fn new() -> Option<Self> {
        let (realm, library) = set_up()?;
        let (server, (listener, target)) = (serve(&realm, &[]), listener(V4));
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

/// Returns invalid data. Can send valid data before.
type Invalid = fn(&mut Peer, &mut TcpStream) -> Vec<u8>;

fn changed(peer: &Peer, at: impl Fn(usize) -> usize) -> Vec<u8> {
    let mut bytes = peer.frame(b"evil evil evil");
    let at = at(bytes.len());
    bytes[at] ^= 0x40;
    bytes
}

/// Name, text in the log, and data.
const INVALID: [(&str, &str, Invalid); 20] = [
    ("a duplicate", "out of order", |peer, _| peer.frame(b"good").repeat(2)),
    ("two tokens in the wrong order", "out of order", |peer, _| {
        let tokens = [peer.frame(b"evil"), peer.frame(b"evil")];
        [&tokens[1][..], &tokens[0]].concat()
    }),
    ("a gap", "out of order", |peer, _| {
        peer.frame(b"lost");
        peer.frame(b"evil")
    }),
    ("an old token", "out of order", |peer, _| {
        let old = peer.frame(b"good");
        peer.send_raw(&old);
        (0..100).for_each(|_| peer.send(b""));
        old
    }),
    ("a reflected token of the server", "protection: ", |peer, target| {
        target.write_all(b"evil").expect("sent");
        message(DATA, &peer.receive_token(DATA))
    }),
    ("a token from another context", "protection: ", |peer, _| {
        peer.context.other_context().message(DATA, b"evil", true)
    }),
    ("changed data", "protection: ", |peer, _| changed(peer, |_| 4 + 20)),
    ("changed checksum", "protection: ", |peer, _| changed(peer, |length| length - 1)),
    ("changed sequence number", "protection: ", |peer, _| changed(peer, |_| 4 + 15)),
    ("changed flags", "protection: ", |peer, _| changed(peer, |_| 4 + 2)),
    ("an empty token", "protection: ", |_, _| message(DATA, b"")),
    ("65535 invalid bytes", "protection: ", |_, _| message(DATA, &[5; 65_535])),
    ("clear text in a frame", "protection: ", |_, _| message(DATA, b"evil")),
    ("clear text", "protection: ", |_, _| b"GET / HTTP/1.0\r\n\r\n".to_vec()),
    ("clear text after a frame", "protection: ", |peer, _| [&peer.frame(b"good")[..], b"\x01GET"].concat()),
    ("a token in a message of type 1", "protection: ", |peer, _| peer.context.message(AUTHENTICATION, b"evil", true)),
    ("a token in a message of type 2", "protection: ", |peer, _| peer.context.message(PROTECTION, b"evil", true)),
    ("an unknown message type", "protection: ", |_, _| message(4, b"evil")),
    ("an abort", "protection: ", |_, _| ABORT.to_vec()),
    ("another version", "protection: ", |peer, _| [&[5], &peer.frame(b"evil")[1..]].concat()),
];

/// Waits for the log line of the session that connected to the target from this address, with this error.
fn wait_session_error(setup: &Setup, target: SocketAddr, expected: &str) {
    wait_session(&setup.server, &[&format!("bnd={target} "), "error=\"", expected]);
}

#[test]
fn invalid_token_ends_the_tunnel_and_never_reaches_the_target() {
    // A server logs 20 lines a second about a client.
    for cases in INVALID.chunks(10) {
        let Some(setup) = Setup::new() else { return };
        for (case, expected, invalid) in cases {
            for level in [1, 2] {
                let (mut peer, mut target, from) = setup.tunnel(level);
                let invalid = invalid(&mut peer, &mut target);
                peer.send_raw(&invalid);
                let case = format!("{case}, at level {level}");
                let received = read_until_reset(&mut target, &case);
                assert!(received.is_empty() || received == b"good", "{case}: {received:?}");
                read_until_reset(&mut peer.stream, &case);
                wait_session_error(&setup, from, expected);
            }
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
    let token = peer.context.message(DATA, b"evil", false);
    peer.send_raw(&token);
    assert_eq!(read_until_reset(&mut target, "not encrypted"), b"");
    wait_session_error(&setup, from, "token is not encrypted");
    // The same applies to a request.
    let mut peer = Peer::at_level(&setup.library, &setup.server, ALL, 2);
    let token = peer.context.message(DATA, &request(CONNECT, setup.target), false);
    peer.send_raw(&token);
    let end = stream_end(&mut peer.stream);
    assert!(end == StreamEnd::Reset || end == StreamEnd::Closed(vec![]), "{end:?}");
    wait_session(&setup.server, &["protection=confidentiality up=0 ", "token is not encrypted"]);
    setup.listener.set_nonblocking(true).expect("an option");
    assert!(setup.listener.accept().is_err(), "no connection");
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
        peer.send_raw(&message(DATA, &token));
        assert!(peer.receive_all(largest) == bytes(largest), "level {level}");
        for length in [0, 1, 16_384, 16_385, 40_000] {
            peer.send(&bytes(length));
            assert!(peer.receive_all(length) == bytes(length), "{length} bytes at level {level}");
        }
    }
}
