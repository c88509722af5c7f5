//! An independent client up to the negotiation of the level: the server answers all invalid messages with an abort.

use std::io::Write as _;
use std::net::SocketAddr;

use crate::peer::{
    ABORT, ALL, AUTHENTICATION, CONF, Context, DATA, DELEG, INTEG, LEVEL_FORMS, LevelForm, Library, MUTUAL, PROTECTION,
    Peer, REPLAY, SEQUENCE, greet, has_python_gssapi, message, read_until_closed, receive_token,
};
use crate::support::realm::Realm;
use crate::support::{BIND, CONNECT, StreamEnd, UDP_ASSOCIATE, V4, echo_server, stream_end, udp_echo_server};
use crate::{ALICE, realm, serve, wait_session};

fn set_up() -> Option<(Realm, Library)> {
    if !has_python_gssapi() {
        return None;
    }
    let realm = realm()?;
    let library = Library::start(&realm);
    Some((realm, library))
}

fn wrapped(context: &Context, level: &[u8]) -> Vec<u8> {
    message(PROTECTION, &context.wrap(level, false))
}

/// Returns the first token of a client.
fn first_token(library: &Library) -> Vec<u8> {
    library.init(ALL).step(&[]).0
}

#[test]
fn all_levels_are_granted_in_both_forms() {
    let Some((realm, library)) = set_up() else { return };
    let (server, echo) = (serve(&realm, &["--gssapi-protection", "none,integrity,confidentiality"]), echo_server());
    for form in LEVEL_FORMS {
        for level in [1, 2] {
            let mut peer = Peer::new(&library, &server, ALL);
            assert_eq!(peer.request_level(level, form), level, "{form:?}");
            assert_eq!(peer.request(CONNECT, echo).0, 0);
            peer.ping(b"hello");
            peer.shutdown();
            assert_eq!(read_until_closed(&mut peer.stream), b"", "{form:?}: half-close");
        }
        let mut peer = Peer::new(&library, &server, ALL);
        assert_eq!(peer.request_level(0, form), 0, "{form:?}");
        peer.send_raw(&crate::support::request(CONNECT, echo));
        assert_eq!(crate::support::read_reply(&mut peer.stream).0, 0, "{form:?}: without frames");
        crate::support::ping(&mut peer.stream, b"hello");
    }
}

#[test]
fn disallowed_level_is_replaced_by_the_strongest_allowed() {
    let Some((realm, library)) = set_up() else { return };
    let table: [(&str, &[(u8, u8)]); 5] = [
        ("integrity,confidentiality", &[(0, 2), (3, 2), (7, 2), (255, 2), (1, 1)]),
        ("integrity", &[(0, 1), (2, 1), (3, 1)]),
        ("confidentiality", &[(0, 2), (1, 2)]),
        ("none", &[(1, 0), (2, 0), (3, 0)]),
        ("none,integrity", &[(2, 1), (0, 0)]),
    ];
    for (levels, cases) in table {
        let server = serve(&realm, &["--gssapi-protection", levels]);
        for form in LEVEL_FORMS {
            for (requested, granted) in cases {
                let answer = Peer::new(&library, &server, ALL).request_level(*requested, form);
                assert_eq!(answer, *granted, "requested {requested}, allowed {levels}, {form:?}");
            }
        }
    }
}

#[test]
fn invalid_authentication_token_is_aborted() {
    let Some((realm, library)) = set_up() else { return };
    let server = serve(&realm, &[]);
    let mut changed = first_token(&library);
    *changed.last_mut().expect("not empty") ^= 1;
    let mut cut = first_token(&library);
    cut.truncate(cut.len() - 9);
    let table = [
        ("an empty token", message(AUTHENTICATION, &[])),
        ("not a token", message(AUTHENTICATION, b"hello")),
        ("a truncated token", message(AUTHENTICATION, &cut)),
        ("a changed token", message(AUTHENTICATION, &changed)),
        ("65535 invalid bytes", message(AUTHENTICATION, &[0x60; 65_535])),
        ("a level instead", message(PROTECTION, &[1])),
        ("data instead", message(DATA, &first_token(&library))),
        ("an unknown type", message(4, b"hello")),
        ("the version of SOCKS", vec![5, 1, 0, 1, 0]),
        ("version 0", vec![0, 1, 0, 1, 0]),
        ("version 2", vec![2, 1, 0, 1, 0]),
        ("an abort", ABORT.to_vec()),
    ];
    for (case, bytes) in table {
        let mut stream = server.connect();
        greet(&mut stream);
        stream.write_all(&bytes).expect("sent");
        assert_eq!(stream_end(&mut stream), StreamEnd::Closed(ABORT.to_vec()), "{case}");
    }
    // The server still serves other clients.
    assert_eq!(Peer::new(&library, &server, ALL).request_level(2, LevelForm::Rfc), 2);
}

#[test]
fn invalid_level_request_is_aborted() {
    let Some((realm, library)) = set_up() else { return };
    type Message = fn(&Context) -> Vec<u8>;
    let server = serve(&realm, &[]);
    let table: [(&str, Message); 12] = [
        ("an empty token", |_| message(PROTECTION, &[])),
        ("two plain bytes", |_| message(PROTECTION, &[1, 2])),
        ("no byte in a token", |context| wrapped(context, &[])),
        ("two bytes in a token", |context| wrapped(context, &[1, 2])),
        ("a token that is not the first one", |context| {
            context.wrap(&[1], false);
            wrapped(context, &[2])
        }),
        ("a changed token", |context| {
            let mut bytes = wrapped(context, &[2]);
            bytes[4 + 16] = 1;
            bytes
        }),
        ("an authentication token", |_| message(AUTHENTICATION, b"hello")),
        ("an empty authentication token", |_| message(AUTHENTICATION, &[])),
        ("data", |context| message(DATA, &context.wrap(&[1], false))),
        ("an unknown type", |context| message(9, &context.wrap(&[1], false))),
        ("a request in clear", |_| vec![5, 1, 0, 1, 127, 0, 0, 1, 0, 80]),
        ("an abort", |_| ABORT.to_vec()),
    ];
    for (case, bytes) in table {
        let mut peer = Peer::new(&library, &server, ALL);
        let bytes = bytes(&peer.context);
        peer.send_raw(&bytes);
        peer.assert_aborted(case);
    }
    let log = server.wait_log(|log| crate::support::session_lines(log).len() == 12);
    assert_eq!(log.matches("rep=-").count(), 12, "{log}");
    assert_eq!(log.matches("GSSAPI: ").count(), 12, "each reason is logged:\n{log}");
}

#[test]
fn truncated_handshake_closes_without_abort() {
    let Some((realm, library)) = set_up() else { return };
    let server = serve(&realm, &[]);
    let token = message(AUTHENTICATION, &first_token(&library));
    for end in (0..8).chain([100, token.len() - 1]) {
        let mut stream = server.connect();
        greet(&mut stream);
        stream.write_all(&token[..end]).expect("sent");
        stream.shutdown(std::net::Shutdown::Write).expect("half-close");
        // The server sends no abort to a client that has closed.
        assert_eq!(stream_end(&mut stream), StreamEnd::Closed(vec![]), "{end} bytes");
    }
    for end in [0, 1, 2, 3, 4, 5, 20, 32] {
        let mut peer = Peer::new(&library, &server, ALL);
        let level = message(PROTECTION, &peer.context.wrap(&[2], false));
        assert_eq!(level.len(), 33);
        peer.send_raw(&level[..end]);
        peer.shutdown();
        assert_eq!(stream_end(&mut peer.stream), StreamEnd::Closed(vec![]), "{end} bytes of the level");
    }
}

#[test]
fn handshake_works_in_single_bytes_and_in_one_write() {
    let Some((realm, library)) = set_up() else { return };
    let (server, echo) = (serve(&realm, &[]), echo_server());
    let mut stream = server.connect();
    greet(&mut stream);
    stream.set_nodelay(true).expect("an option");
    let context = library.init(ALL);
    for byte in message(AUTHENTICATION, &context.step(&[]).0) {
        stream.write_all(&[byte]).expect("sent");
    }
    assert!(context.step(&receive_token(&mut stream, AUTHENTICATION)).1);
    let mut peer = Peer { stream, context, should_encrypt: true };
    let request = crate::support::request(CONNECT, echo);
    let (start, end) = request.split_at(4);
    let level = message(PROTECTION, &peer.context.wrap(&[2], false));
    // A request in two tokens. The second one also contains data.
    let first = message(DATA, &peer.context.wrap(start, true));
    let second = message(DATA, &peer.context.wrap(&[end, b"hello"].concat(), true));
    peer.send_raw(&[level, first, second].concat());
    let granted = peer.receive_token(PROTECTION);
    assert_eq!(peer.context.unwrap(&granted), (vec![2], false));
    assert_eq!(peer.receive_reply().0, 0);
    assert_eq!(peer.receive(), b"hello");
}

#[test]
fn replayed_login_is_refused() {
    let Some((realm, library)) = set_up() else { return };
    let [server, other] = [(); 2].map(|()| serve(&realm, &[]));
    let token = message(AUTHENTICATION, &first_token(&library));
    let mut first = server.connect();
    greet(&mut first);
    first.write_all(&token).expect("sent");
    receive_token(&mut first, AUTHENTICATION);
    for server in [&server, &other] {
        let mut second = server.connect();
        greet(&mut second);
        second.write_all(&token).expect("sent");
        assert_eq!(stream_end(&mut second), StreamEnd::Closed(ABORT.to_vec()));
        drop(second);
        wait_session(server, &["rep=-", "Request is a replay"]);
    }
}

#[test]
fn ticket_for_another_service_is_refused() {
    let Some((realm, library)) = set_up() else { return };
    let server = serve(&realm, &[]);
    let mut peer =
        Peer { stream: server.connect(), context: library.init_with("nokey@localhost", ALL), should_encrypt: false };
    peer.greet();
    let token = peer.context.step(&[]).0;
    peer.send_token(AUTHENTICATION, &token);
    peer.assert_aborted("nokey/localhost");
    drop(peer);
    wait_session(&server, &["rep=-", "nokey/localhost@S5.TEST not found in keytab"]);
    // The server accepts all keys of the keytab.
    let socks =
        Peer::establish(server.connect(), library.init_with("socks@localhost", ALL)).request_level(2, LevelForm::Rfc);
    assert_eq!(socks, 2);
}

#[test]
fn without_mutual_authentication_server_sends_an_empty_token() {
    let Some((realm, library)) = set_up() else { return };
    let (server, echo) = (serve(&realm, &[]), echo_server());
    let mut peer = Peer { stream: server.connect(), context: library.init(ALL & !MUTUAL), should_encrypt: false };
    peer.greet();
    let (token, is_complete) = peer.context.step(&[]);
    assert!(is_complete);
    peer.send_token(AUTHENTICATION, &token);
    assert_eq!(peer.receive_token(AUTHENTICATION), b"");
    assert_eq!(peer.request_level(2, LevelForm::Rfc), 2);
    assert_eq!(peer.request(CONNECT, echo).0, 0);
    peer.ping(b"hello");
}

#[test]
fn tcp_requires_replay_and_sequence_detection_but_udp_does_not() {
    let Some((realm, library)) = set_up() else { return };
    let (server, echo) = (serve(&realm, &["--gssapi-protection", "none,integrity,confidentiality"]), echo_server());
    for (flags, level) in [(MUTUAL | REPLAY | INTEG | CONF, 2), (MUTUAL | SEQUENCE | INTEG, 1), (MUTUAL | INTEG, 2)] {
        for command in [CONNECT, BIND] {
            let mut peer = Peer::new(&library, &server, flags);
            assert_eq!(peer.request_level(level, LevelForm::Rfc), level);
            assert_eq!(peer.request(command, echo).0, 2, "command {command} with flags {flags}");
            assert_eq!(read_until_closed(&mut peer.stream), b"");
        }
        let mut peer = Peer::new(&library, &server, flags);
        assert_eq!(peer.request_level(level, LevelForm::Rfc), level);
        let (rep, relay) = peer.request(UDP_ASSOCIATE, SocketAddr::from(([0; 4], 0)));
        assert_eq!(rep, 0, "flags {flags}");
        let udp = crate::raw_datagrams::Udp::new(&mut peer, relay);
        udp.ping(udp_echo_server(V4), b"hello");
    }
    // At level none, no detection is required.
    let mut peer = Peer::new(&library, &server, MUTUAL | INTEG);
    assert_eq!(peer.request_level(0, LevelForm::Rfc), 0);
    peer.send_raw(&crate::support::request(CONNECT, echo));
    assert_eq!(crate::support::read_reply(&mut peer.stream).0, 0);
    wait_session(&server, &[ALICE, "rep=2", "RFC 1961"]);
}

#[test]
fn delegated_ticket_is_ignored() {
    let Some((realm, library)) = set_up() else { return };
    let (server, echo) = (serve(&realm, &[]), echo_server());
    let mut peer = Peer::new(&library, &server, ALL | DELEG);
    assert_eq!(peer.context.flags() & DELEG, DELEG, "the client delegates its ticket");
    assert_eq!(peer.request_level(2, LevelForm::Rfc), 2);
    assert_eq!(peer.request(CONNECT, echo).0, 0);
    peer.ping(b"hello");
    end_session(&server, peer);
}

/// Disconnects, and waits for the log line of a successful session.
fn end_session(server: &crate::support::Server, peer: Peer) {
    drop(peer);
    wait_session(server, &[ALICE, "rep=0"]);
}

#[test]
fn handshake_timeout_applies_at_every_stage() {
    let Some((realm, library)) = set_up() else { return };
    let server = serve(&realm, &["--handshake-timeout", "300ms"]);
    let (mut greeted, mut half) = (server.connect(), server.connect());
    greet(&mut greeted);
    greet(&mut half);
    let token = message(AUTHENTICATION, &first_token(&library));
    half.write_all(&token[..token.len() / 2]).expect("sent");
    let mut established = Peer::new(&library, &server, ALL);
    let mut granted = Peer::new(&library, &server, ALL);
    granted.request_level(2, LevelForm::Rfc);
    // Before the level is negotiated, the server sends an abort.
    for stream in [&mut greeted, &mut half, &mut established.stream] {
        assert_eq!(stream_end(stream), StreamEnd::Closed(vec![1, 0xff]));
    }
    let end = stream_end(&mut granted.stream);
    assert!(end == StreamEnd::Closed(vec![]) || end == StreamEnd::Reset, "{end:?}");
    let log = server.wait_log(|log| log.matches("handshake timed out").count() == 4);
    assert_eq!(log.matches("rep=-").count(), 4, "{log}");
}
