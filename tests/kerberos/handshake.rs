//! A peer that is not ours as the client, up to the level: what the server takes, and that it refuses all else with the two
//! octets of an abort.

use std::io::Write as _;
use std::net::SocketAddr;

use crate::common::{echo_server, udp_echo_server};
use crate::kit::realm::Realm;
use crate::kit::{BIND, CONNECT, StreamEnd, UDP_ASSOCIATE, V4, stream_end};
use crate::peer::{
    ABORT, ALL, AUTHENTICATION, CONF, Context, DATA, DELEG, FORMS, Form, INTEG, Library, MUTUAL, PROTECTION, Peer,
    REPLAY, SEQUENCE, greet, have_python, hear, message, rest,
};
use crate::{ALICE, realm, serve, session};

fn set_up() -> Option<(Realm, Library)> {
    if !have_python() {
        return None;
    }
    let realm = realm()?;
    let library = Library::start(&realm);
    Some((realm, library))
}

fn wrapped(context: &Context, level: &[u8]) -> Vec<u8> {
    message(PROTECTION, &context.wrap(level, false))
}

/// The first token of a client.
fn first_token(library: &Library) -> Vec<u8> {
    library.init(ALL).step(&[]).0
}

#[test]
fn all_levels_are_granted_in_both_forms() {
    let Some((realm, library)) = set_up() else { return };
    let (server, echo) = (serve(&realm, &["--gssapi-protection", "none,integrity,confidentiality"]), echo_server());
    for form in FORMS {
        for level in [1, 2] {
            let mut peer = Peer::new(&library, &server, ALL);
            assert_eq!(peer.ask(level, form), level, "{form:?}");
            assert_eq!(peer.request(CONNECT, echo).0, 0);
            peer.ping(b"hello");
            peer.shutdown();
            assert_eq!(rest(&mut peer.stream), b"", "{form:?}: a half-close comes back as one");
        }
        let mut peer = Peer::new(&library, &server, ALL);
        assert_eq!(peer.ask(0, form), 0, "{form:?}");
        peer.say_raw(&crate::common::request(CONNECT, echo));
        assert_eq!(crate::common::read_reply(&mut peer.stream).0, 0, "{form:?}: without frames");
        crate::kit::ping(&mut peer.stream, b"hello");
    }
}

#[test]
fn a_level_that_is_not_to_be_had_gets_the_strongest_that_is() {
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
        for form in FORMS {
            for (asked, granted) in cases {
                let answer = Peer::new(&library, &server, ALL).ask(*asked, form);
                assert_eq!(answer, *granted, "{asked} of {levels}, {form:?}");
            }
        }
    }
}

#[test]
fn what_is_no_token_is_answered_with_an_abort() {
    let Some((realm, library)) = set_up() else { return };
    let server = serve(&realm, &[]);
    let mut changed = first_token(&library);
    *changed.last_mut().expect("octets") ^= 1;
    let mut cut = first_token(&library);
    cut.truncate(cut.len() - 9);
    let table = [
        ("an empty token", message(AUTHENTICATION, &[])),
        ("no token at all", message(AUTHENTICATION, b"hello")),
        ("a token that is cut", message(AUTHENTICATION, &cut)),
        ("a token that was changed", message(AUTHENTICATION, &changed)),
        ("65535 octets that are none", message(AUTHENTICATION, &[0x60; 65_535])),
        ("a level instead", message(PROTECTION, &[1])),
        ("data instead", message(DATA, &first_token(&library))),
        ("an unknown type", message(4, b"hello")),
        ("the version of SOCKS", vec![5, 1, 0, 1, 0]),
        ("version 0", vec![0, 1, 0, 1, 0]),
        ("version 2", vec![2, 1, 0, 1, 0]),
        ("an abort", ABORT.to_vec()),
    ];
    for (what, octets) in table {
        let mut stream = server.connect();
        greet(&mut stream);
        stream.write_all(&octets).expect("it is sent");
        assert_eq!(stream_end(&mut stream), StreamEnd::Closed(ABORT.to_vec()), "{what}");
    }
    // After all of that others are served.
    assert_eq!(Peer::new(&library, &server, ALL).ask(2, Form::Rfc), 2);
}

#[test]
fn what_is_no_level_is_answered_with_an_abort() {
    let Some((realm, library)) = set_up() else { return };
    type Message = fn(&Context) -> Vec<u8>;
    let server = serve(&realm, &[]);
    let table: [(&str, Message); 12] = [
        ("an empty token", |_| message(PROTECTION, &[])),
        ("two octets as they are", |_| message(PROTECTION, &[1, 2])),
        ("no octet in a token", |context| wrapped(context, &[])),
        ("two octets in a token", |context| wrapped(context, &[1, 2])),
        ("one that is not the first", |context| {
            context.wrap(&[1], false);
            wrapped(context, &[2])
        }),
        ("one that was changed", |context| {
            let mut octets = wrapped(context, &[2]);
            octets[4 + 16] = 1;
            octets
        }),
        ("another token", |_| message(AUTHENTICATION, b"hello")),
        ("an empty one of them", |_| message(AUTHENTICATION, &[])),
        ("data", |context| message(DATA, &context.wrap(&[1], false))),
        ("an unknown type", |context| message(9, &context.wrap(&[1], false))),
        ("a request in clear", |_| vec![5, 1, 0, 1, 127, 0, 0, 1, 0, 80]),
        ("an abort", |_| ABORT.to_vec()),
    ];
    for (what, octets) in table {
        let mut peer = Peer::new(&library, &server, ALL);
        let octets = octets(&peer.context);
        peer.say_raw(&octets);
        peer.assert_aborted(what);
    }
    let log = server.wait_log(|log| crate::kit::session_lines(log).len() == 12);
    assert_eq!(log.matches("rep=-").count(), 12, "{log}");
    assert_eq!(log.matches("GSSAPI: ").count(), 12, "each is told why:\n{log}");
}

#[test]
fn a_handshake_that_is_broken_off_anywhere_is_over() {
    let Some((realm, library)) = set_up() else { return };
    let server = serve(&realm, &[]);
    let whole = message(AUTHENTICATION, &first_token(&library));
    for end in (0..8).chain([100, whole.len() - 1]) {
        let mut stream = server.connect();
        greet(&mut stream);
        stream.write_all(&whole[..end]).expect("it is sent");
        stream.shutdown(std::net::Shutdown::Write).expect("half-close");
        // Whoever has closed has nobody left to abort for.
        assert_eq!(stream_end(&mut stream), StreamEnd::Closed(vec![]), "{end} octets");
    }
    for end in [0, 1, 2, 3, 4, 5, 20, 32] {
        let mut peer = Peer::new(&library, &server, ALL);
        let level = message(PROTECTION, &peer.context.wrap(&[2], false));
        assert_eq!(level.len(), 33);
        peer.say_raw(&level[..end]);
        peer.shutdown();
        assert_eq!(stream_end(&mut peer.stream), StreamEnd::Closed(vec![]), "{end} octets of the level");
    }
}

#[test]
fn octets_may_come_one_by_one_or_all_at_once() {
    let Some((realm, library)) = set_up() else { return };
    let (server, echo) = (serve(&realm, &[]), echo_server());
    let mut stream = server.connect();
    greet(&mut stream);
    stream.set_nodelay(true).expect("an option");
    let context = library.init(ALL);
    for octet in message(AUTHENTICATION, &context.step(&[]).0) {
        stream.write_all(&[octet]).expect("it is sent");
    }
    assert!(context.step(&hear(&mut stream, AUTHENTICATION)).1);
    let mut peer = Peer { stream, context, seal: true };
    let request = crate::common::request(CONNECT, echo);
    let (before, behind) = request.split_at(4);
    let level = message(PROTECTION, &peer.context.wrap(&[2], false));
    // A request in two tokens, of which the second has data behind it.
    let first = message(DATA, &peer.context.wrap(before, true));
    let second = message(DATA, &peer.context.wrap(&[behind, b"hello"].concat(), true));
    peer.say_raw(&[level, first, second].concat());
    let granted = peer.hear(PROTECTION);
    assert_eq!(peer.context.unwrap(&granted), (vec![2], false));
    assert_eq!(peer.reply().0, 0);
    assert_eq!(peer.receive(), b"hello");
}

#[test]
fn a_login_that_was_recorded_is_of_no_use() {
    let Some((realm, library)) = set_up() else { return };
    let [server, other] = [(); 2].map(|()| serve(&realm, &[]));
    let token = message(AUTHENTICATION, &first_token(&library));
    let mut first = server.connect();
    greet(&mut first);
    first.write_all(&token).expect("it is sent");
    hear(&mut first, AUTHENTICATION);
    for server in [&server, &other] {
        let mut second = server.connect();
        greet(&mut second);
        second.write_all(&token).expect("it is sent");
        assert_eq!(stream_end(&mut second), StreamEnd::Closed(ABORT.to_vec()));
        drop(second);
        session(server, &["rep=-", "Request is a replay"]);
    }
}

#[test]
fn a_ticket_for_another_service_is_not_taken() {
    let Some((realm, library)) = set_up() else { return };
    let server = serve(&realm, &[]);
    let mut peer = Peer { stream: server.connect(), context: library.init_with("nokey@localhost", ALL), seal: false };
    peer.greet();
    let token = peer.context.step(&[]).0;
    peer.say(AUTHENTICATION, &token);
    peer.assert_aborted("nokey/localhost");
    drop(peer);
    session(&server, &["rep=-", "nokey/localhost@S5.TEST not found in keytab"]);
    // Any key of the keytab will do.
    let socks = Peer::establish(server.connect(), library.init_with("socks@localhost", ALL)).ask(2, Form::Rfc);
    assert_eq!(socks, 2);
}

#[test]
fn a_client_that_wants_no_proof_of_the_server_gets_an_empty_token() {
    let Some((realm, library)) = set_up() else { return };
    let (server, echo) = (serve(&realm, &[]), echo_server());
    let mut peer = Peer { stream: server.connect(), context: library.init(ALL & !MUTUAL), seal: false };
    peer.greet();
    let (token, is_complete) = peer.context.step(&[]);
    assert!(is_complete);
    peer.say(AUTHENTICATION, &token);
    assert_eq!(peer.hear(AUTHENTICATION), b"");
    assert_eq!(peer.ask(2, Form::Rfc), 2);
    assert_eq!(peer.request(CONNECT, echo).0, 0);
    peer.ping(b"hello");
}

#[test]
fn streams_need_a_context_that_notices_another_order_and_datagrams_do_not() {
    let Some((realm, library)) = set_up() else { return };
    let (server, echo) = (serve(&realm, &["--gssapi-protection", "none,integrity,confidentiality"]), echo_server());
    for (flags, level) in [(MUTUAL | REPLAY | INTEG | CONF, 2), (MUTUAL | SEQUENCE | INTEG, 1), (MUTUAL | INTEG, 2)] {
        for command in [CONNECT, BIND] {
            let mut peer = Peer::new(&library, &server, flags);
            assert_eq!(peer.ask(level, Form::Rfc), level);
            assert_eq!(peer.request(command, echo).0, 2, "command {command} with flags {flags}");
            assert_eq!(rest(&mut peer.stream), b"");
        }
        let mut peer = Peer::new(&library, &server, flags);
        assert_eq!(peer.ask(level, Form::Rfc), level);
        let (rep, relay) = peer.request(UDP_ASSOCIATE, SocketAddr::from(([0; 4], 0)));
        assert_eq!(rep, 0, "flags {flags}");
        let udp = crate::datagrams_raw::Udp::new(&mut peer, relay);
        udp.ping(udp_echo_server(V4), b"hello");
    }
    // Where nothing is protected, there is nothing to notice.
    let mut peer = Peer::new(&library, &server, MUTUAL | INTEG);
    assert_eq!(peer.ask(0, Form::Rfc), 0);
    peer.say_raw(&crate::common::request(CONNECT, echo));
    assert_eq!(crate::common::read_reply(&mut peer.stream).0, 0);
    session(&server, &[ALICE, "rep=2", "RFC 1961"]);
}

#[test]
fn a_ticket_that_is_handed_over_is_left_alone() {
    let Some((realm, library)) = set_up() else { return };
    let (server, echo) = (serve(&realm, &[]), echo_server());
    let mut peer = Peer::new(&library, &server, ALL | DELEG);
    assert_eq!(peer.context.flags() & DELEG, DELEG, "the ticket can be handed over");
    assert_eq!(peer.ask(2, Form::Rfc), 2);
    assert_eq!(peer.request(CONNECT, echo).0, 0);
    peer.ping(b"hello");
    session_of(&server, peer);
}

/// Ends a session well.
fn session_of(server: &crate::common::Server, peer: Peer) {
    drop(peer);
    session(server, &[ALICE, "rep=0"]);
}

#[test]
fn who_takes_too_long_is_cut_off_at_every_stage() {
    let Some((realm, library)) = set_up() else { return };
    let server = serve(&realm, &["--handshake-timeout", "300ms"]);
    let (mut greeted, mut half) = (server.connect(), server.connect());
    greet(&mut greeted);
    greet(&mut half);
    let token = message(AUTHENTICATION, &first_token(&library));
    half.write_all(&token[..token.len() / 2]).expect("it is sent");
    let mut established = Peer::new(&library, &server, ALL);
    let mut granted = Peer::new(&library, &server, ALL);
    granted.ask(2, Form::Rfc);
    // As long as the context is not agreed upon, it is refused.
    for stream in [&mut greeted, &mut half, &mut established.stream] {
        assert_eq!(stream_end(stream), StreamEnd::Closed(vec![1, 0xff]));
    }
    let end = stream_end(&mut granted.stream);
    assert!(end == StreamEnd::Closed(vec![]) || end == StreamEnd::Reset, "{end:?}");
    let log = server.wait_log(|log| log.matches("handshake timed out").count() == 4);
    assert_eq!(log.matches("rep=-").count(), 4, "{log}");
}
