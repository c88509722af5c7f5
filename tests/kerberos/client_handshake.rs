//! s5 clients with an independent server: what the clients send and accept, and how they exit on invalid messages.

use std::io::Write as _;
use std::net::{SocketAddr, TcpStream, UdpSocket};

use crate::peer::{
    ABORT, ALL, AUTHENTICATION, CONF, DATA, DELEG, INTEG, LEVEL_FORMS, LevelForm, Library, MUTUAL, PROTECTION, Peer,
    Proxy, REPLAY, SEQUENCE, has_python_gssapi, message, receive_token,
};
use crate::support::realm::Realm;
use crate::support::scripted::{RunningProgram, text};
use crate::support::{StreamEnd, TIMEOUT, V4, closed_port, read_exact, retry, run, stream_end};
use crate::{ALICE, LONG_TIMEOUT, assert_fails_with, bytes, client, realm};

struct Setup {
    realm: Realm,
    proxy: Proxy,
}

/// A success reply with BND 0.0.0.0:0.
const SUCCESS: [u8; 10] = [5, 0, 0, 1, 0, 0, 0, 0, 0, 0];

impl Setup {
    fn new() -> Option<Self> {
        if !has_python_gssapi() {
            return None;
        }
        let realm = realm()?;
        let proxy = Proxy::new(&Library::start(&realm));
        Some(Self { realm, proxy })
    }

    fn client(&self, args: &[&str]) -> RunningProgram {
        RunningProgram::start(&mut client(&self.realm, "connect", &self.proxy.url(), args))
    }

    /// Starts a client and answers its request. Returns the client and its connection.
    fn tunnel(&self) -> (RunningProgram, Peer) {
        let client = self.client(&["192.0.2.1:80"]);
        let mut peer = self.proxy.accept_context();
        let (requested, form) = Proxy::receive_level(&mut peer);
        Proxy::grant_level(&mut peer, requested, form);
        peer.receive();
        peer.send(&SUCCESS);
        (client, peer)
    }
}

/// Checks that a client exits with this status and one line that contains these words.
fn assert_ends(mut client: RunningProgram, status: i32, words: &[&str]) {
    client.close_stdin();
    let (ended, _, stderr) = client.wait_exit(TIMEOUT);
    assert_eq!(ended.code(), Some(status), "{words:?}: {stderr}");
    assert!(stderr.starts_with("s5: ") && stderr.lines().count() == 1, "one line: {stderr:?}");
    for word in words {
        assert!(stderr.contains(word), "{word:?} is not in {stderr:?}");
    }
}

#[test]
fn client_requests_all_flags_except_delegation() {
    let Some(setup) = Setup::new() else { return };
    let forwardable = [&["192.0.2.1:80"][..], &["--gssapi-protection", "integrity", "192.0.2.1:80"]];
    for args in forwardable {
        let _client = setup.client(args);
        let peer = setup.proxy.accept_context();
        let flags = peer.context.flags();
        assert_eq!(flags & (MUTUAL | REPLAY | SEQUENCE | INTEG), MUTUAL | REPLAY | SEQUENCE | INTEG, "{args:?}");
        assert_eq!(flags & DELEG, 0, "no delegation");
        assert_eq!(flags & CONF, if args.len() == 1 { CONF } else { flags & CONF });
        assert_eq!(peer.context.initiator(), ALICE);
    }
}

#[test]
fn client_offers_methods_in_order_of_auth() {
    let Some(setup) = Setup::new() else { return };
    let with_password = setup.proxy.url().replace("localhost", "bob:secret@localhost");
    let table: [(&str, &[&str], &[u8]); 5] = [
        (&setup.proxy.url(), &[], &[0, 1]),
        (&with_password, &[], &[0, 2, 1]),
        (&with_password, &["--auth", "gssapi,password,none"], &[1, 2, 0]),
        (&with_password, &["--auth", "gssapi"], &[1]),
        (&setup.proxy.url(), &["--auth", "gssapi,password"], &[1]),
    ];
    for (url, args, methods) in table {
        let mut command = crate::support::s5();
        setup.realm.env(command.args(["connect", "-x", url]).args(args).arg("192.0.2.1:80"));
        let _client = RunningProgram::start(&mut command);
        assert_eq!(setup.proxy.accept_greeting().1, methods, "{args:?}");
    }
}

#[test]
fn every_level_is_requested_and_used_in_both_forms() {
    let Some(setup) = Setup::new() else { return };
    for (code, level) in (0_u8..).zip(crate::LEVELS) {
        for form in LEVEL_FORMS {
            let mut args = vec!["--gssapi-protection", level, "example.test:80"];
            if form == LevelForm::Nec {
                args.push("--gssapi-nec");
            }
            let mut client = setup.client(&args);
            let mut peer = setup.proxy.accept_context();
            assert_eq!(Proxy::receive_level(&mut peer), (code, form));
            Proxy::grant_level(&mut peer, code, form);
            let request = crate::support::request_by_name(crate::support::CONNECT, "example.test", 80);
            if code == 0 {
                assert_eq!(read_exact(&mut peer.stream, request.len()), request, "{level}");
                peer.send_raw(&SUCCESS);
                client.write(b"hello");
                assert_eq!(read_exact(&mut peer.stream, 5), b"hello");
                peer.send_raw(b"there");
            } else {
                assert_eq!(peer.receive(), request, "{level}, in one token");
                peer.send(&SUCCESS);
                client.write(b"hello");
                assert_eq!(peer.receive(), b"hello", "{level}");
                peer.send(b"there");
            }
            client.stdout(|all| all == b"there");
            client.close_stdin();
            assert_eq!(stream_end(&mut peer.stream), StreamEnd::Closed(vec![]), "{level}");
            drop(peer);
            assert!(client.wait_exit(TIMEOUT).0.success(), "{level}");
        }
    }
}

#[test]
fn too_low_or_unknown_level_is_refused_before_the_request() {
    let Some(setup) = Setup::new() else { return };
    let table: [(&[&str], u8, &str); 7] = [
        (&[], 0, "the server grants protection none, required is integrity"),
        (
            &["--gssapi-min", "confidentiality"],
            1,
            "the server grants protection integrity, required is confidentiality",
        ),
        (&["--gssapi-protection", "integrity"], 0, "the server grants protection none, required is"),
        (&[], 3, "the server grants an unknown protection level"),
        (&[], 7, "the server grants an unknown protection level"),
        (&["--gssapi-min", "none"], 255, "the server grants an unknown protection level"),
        (&["--gssapi-nec"], 3, "the server grants an unknown protection level"),
    ];
    for (args, granted, expected) in table {
        let client = setup.client(&[args, &["192.0.2.1:80"]].concat());
        let mut peer = setup.proxy.accept_context();
        let (_, form) = Proxy::receive_level(&mut peer);
        Proxy::grant_level(&mut peer, granted, form);
        assert_eq!(stream_end(&mut peer.stream), StreamEnd::Closed(vec![]), "no request, {args:?}");
        assert_ends(client, 67, &["proxy localhost:", "login", expected]);
    }
}

#[test]
fn sufficient_level_is_used_even_if_not_the_requested_one() {
    let Some(setup) = Setup::new() else { return };
    let table: [(&[&str], u8); 3] = [
        (&[], 1),
        (&["--gssapi-protection", "integrity"], 2),
        (&["--gssapi-min", "none", "--gssapi-protection", "none"], 2),
    ];
    for (args, granted) in table {
        let mut client = setup.client(&[args, &["192.0.2.1:80"]].concat());
        let mut peer = setup.proxy.accept_context();
        let (_, form) = Proxy::receive_level(&mut peer);
        Proxy::grant_level(&mut peer, granted, form);
        peer.receive();
        peer.send(&SUCCESS);
        client.write(b"hello");
        assert_eq!(peer.receive(), b"hello", "{args:?}");
    }
}

#[test]
fn empty_token_after_the_last_one_is_ignored() {
    let Some(setup) = Setup::new() else { return };
    let mut client = setup.client(&["192.0.2.1:80"]);
    let mut peer = setup.proxy.accept_context();
    let (requested, form) = Proxy::receive_level(&mut peer);
    // A server without a further token sends an empty one (RFC 1961 section 3.6).
    peer.send_token(AUTHENTICATION, &[]);
    Proxy::grant_level(&mut peer, requested, form);
    peer.receive();
    peer.send(&SUCCESS);
    client.write(b"hello");
    assert_eq!(peer.receive(), b"hello");
}

#[test]
fn invalid_server_token_is_reported() {
    let Some(setup) = Setup::new() else { return };
    let table: [(&str, &[u8], &str); 8] = [
        ("an abort", &ABORT, "refused"),
        ("an abort as others do it", &[1, 0xff, 0, 0], "refused"),
        ("nothing", &[], "closed"),
        ("half a message", &[1, 1, 0, 9, 1], "closed"),
        ("an empty token", &[1, 1, 0, 0], "unexpected GSSAPI message"),
        ("no token", &[1, 1, 0, 3, 1, 2, 3], "GSSAPI"),
        ("another version", &[5, 1, 0, 1, 0], "GSSAPI"),
        ("a level", &[1, 2, 0, 1, 2], "unexpected GSSAPI message"),
    ];
    for (case, bytes, expected) in table {
        let client = setup.client(&["192.0.2.1:80"]);
        let (mut stream, _) = setup.proxy.accept_greeting();
        receive_token(&mut stream, AUTHENTICATION);
        stream.write_all(bytes).expect("sent");
        // The client can have disconnected already.
        let _ = stream.shutdown(std::net::Shutdown::Write);
        assert_ends(client, 67, &["proxy localhost:", "login", expected]);
        // The connection is reset if the client did not read everything.
        let end = stream_end(&mut stream);
        assert!(end == StreamEnd::Reset || end == StreamEnd::Closed(vec![]), "{case}: {end:?}");
    }
}

#[test]
fn invalid_server_level_is_reported() {
    let Some(setup) = Setup::new() else { return };
    type Answer = fn(&Peer) -> Vec<u8>;
    let table: [(&str, Answer, &str); 9] = [
        ("an abort", |_| ABORT.to_vec(), "refused"),
        ("nothing", |_| vec![], "closed"),
        ("a plain byte", |_| message(PROTECTION, &[2]), "GSSAPI"),
        (
            "no byte",
            |peer| message(PROTECTION, &peer.context.wrap(&[], false)),
            "invalid message for the protection level",
        ),
        (
            "two bytes",
            |peer| message(PROTECTION, &peer.context.wrap(&[2, 2], false)),
            "invalid message for the protection level",
        ),
        (
            "one that is not the first",
            |peer| {
                peer.context.wrap(&[2], false);
                message(PROTECTION, &peer.context.wrap(&[2], false))
            },
            "invalid message for the protection level",
        ),
        ("one in a data frame", |peer| message(DATA, &peer.context.wrap(&[2], false)), "unexpected GSSAPI message"),
        ("two empty tokens", |_| [message(AUTHENTICATION, &[]), message(AUTHENTICATION, &[])].concat(), "GSSAPI"),
        (
            "a changed one",
            |peer| {
                let mut bytes = message(PROTECTION, &peer.context.wrap(&[1], false));
                bytes[4 + 16] = 2;
                bytes
            },
            "GSSAPI",
        ),
    ];
    for (case, answer, expected) in table {
        let client = setup.client(&["192.0.2.1:80"]);
        let mut peer = setup.proxy.accept_context();
        Proxy::receive_level(&mut peer);
        let bytes = answer(&peer);
        peer.send_raw(&bytes);
        peer.shutdown();
        assert_ends(client, 67, &["proxy localhost:", "login", expected]);
        let end = stream_end(&mut peer.stream);
        assert!(end == StreamEnd::Reset || end == StreamEnd::Closed(vec![]), "{case}: {end:?}");
    }
    // A client in NEC's variant requires an answer in this variant.
    let client = setup.client(&["--gssapi-nec", "192.0.2.1:80"]);
    let mut peer = setup.proxy.accept_context();
    Proxy::receive_level(&mut peer);
    Proxy::grant_level(&mut peer, 2, LevelForm::Rfc);
    assert_ends(client, 67, &["unexpected GSSAPI message"]);
}

#[test]
fn impostor_without_the_key_is_detected() {
    let Some(setup) = Setup::new() else { return };
    let mut python = std::process::Command::new(crate::peer::PYTHON);
    setup.realm.env(&mut python).env("KRB5_KTNAME", setup.realm.file("wrong.keytab"));
    let impostor = Proxy::new(&Library::start_with(&mut python));
    let client = RunningProgram::start(&mut client(&setup.realm, "connect", &impostor.url(), &["192.0.2.1:80"]));
    let (mut stream, _) = impostor.accept_greeting();
    let token = receive_token(&mut stream, AUTHENTICATION);
    // The impostor can't decrypt the ticket. It can only replay an answer that was made for another login.
    let honest = Library::start(&setup.realm).accept();
    let (answer, _) = honest.step(&Library::start(&setup.realm).init(ALL).step(&[]).0);
    assert!(!token.is_empty());
    stream.write_all(&message(AUTHENTICATION, &answer)).expect("sent");
    assert_ends(client, 67, &["login", "GSSAPI"]);
}

#[test]
fn invalid_data_ends_the_client_with_status_56() {
    let Some(setup) = Setup::new() else { return };
    type InvalidData = fn(&mut Peer) -> Vec<u8>;
    let table: [(&str, InvalidData, &str); 9] = [
        ("not encrypted", |peer| message(DATA, &peer.context.wrap(b"evil", false)), "token is not encrypted"),
        (
            "a gap",
            |peer| {
                peer.context.wrap(b"lost", true);
                message(DATA, &peer.context.wrap(b"evil", true))
            },
            "out of order",
        ),
        (
            "a duplicate",
            |peer| {
                let token = message(DATA, &peer.context.wrap(b"good", true));
                [&token[..], &token].concat()
            },
            "out of order",
        ),
        (
            "changed",
            |peer| {
                let mut bytes = message(DATA, &peer.context.wrap(b"evil", true));
                bytes[30] ^= 1;
                bytes
            },
            "protection: ",
        ),
        ("clear", |_| b"HTTP/1.0 200 OK".to_vec(), "protection: "),
        ("empty", |_| message(DATA, &[]), "protection: "),
        ("another message", |peer| message(PROTECTION, &peer.context.wrap(b"evil", true)), "protection: "),
        (
            "an end inside of a frame",
            |peer| message(DATA, &peer.context.wrap(b"evil", true))[..20].to_vec(),
            "connection closed within a token",
        ),
        ("an abort", |_| ABORT.to_vec(), "protection: "),
    ];
    for (case, invalid, expected) in table {
        let (client, mut peer) = setup.tunnel();
        let bytes = invalid(&mut peer);
        peer.send_raw(&bytes);
        peer.shutdown();
        let mut client = client;
        let (status, stdout, stderr) = client.wait_exit(TIMEOUT);
        assert_eq!(status.code(), Some(56), "{case}: {stderr}");
        assert!(stdout.is_empty() || stdout == b"good", "{case}: {}", text(&stdout));
        assert!(stderr.contains(expected) && stderr.lines().count() == 1, "{case}: {stderr}");
    }
    // The end of the stream between two frames is no error.
    let (mut client, peer) = setup.tunnel();
    peer.shutdown();
    assert!(client.wait_exit(TIMEOUT).0.success());
}

#[test]
fn largest_token_is_accepted() {
    let Some(setup) = Setup::new() else { return };
    let (mut client, mut peer) = setup.tunnel();
    let largest = peer.context.wrap_size_limit(true);
    peer.send(&bytes(largest));
    peer.send(&[]);
    peer.send(b"end");
    peer.shutdown();
    let (status, stdout, stderr) = client.wait_exit(TIMEOUT);
    assert!(status.success(), "{stderr}");
    assert!(stdout == [bytes(largest), b"end".to_vec()].concat(), "{} bytes", stdout.len());
}

#[test]
fn client_drops_invalid_datagrams() {
    let Some(setup) = Setup::new() else { return };
    let mut client = RunningProgram::start(&mut client(&setup.realm, "udp", &setup.proxy.url(), &["192.0.2.9:9"]));
    let mut peer = setup.proxy.accept_context();
    let (requested, form) = Proxy::receive_level(&mut peer);
    Proxy::grant_level(&mut peer, requested, form);
    assert_eq!(peer.receive()[..4], [5, 3, 0, 1]);
    let relay = UdpSocket::bind((V4, 0)).expect("a port");
    relay.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    let addr = relay.local_addr().expect("an address");
    peer.send(&crate::support::message_with_addr([5, 0, 0], addr));
    client.write(b"question\n");
    let mut buffer = [0; 2048];
    let (n, from) = retry(|| relay.recv_from(&mut buffer)).expect("a datagram comes");
    let [1, DATA, _, length, token @ ..] = &buffer[..n] else { panic!("no frame") };
    assert_eq!(usize::from(*length), token.len());
    let header = crate::support::message_with_addr([0, 0, 0], SocketAddr::from(([192, 0, 2, 9], 9)));
    assert_eq!(peer.context.unwrap(token), ([&header[..], b"question"].concat(), true));
    let answer = |text: &str| message(DATA, &peer.context.wrap(&[&header[..], text.as_bytes()].concat(), true));
    let (first, lost, late) = (answer("first"), answer("lost"), answer("late"));
    assert!(!lost.is_empty());
    let unencrypted = message(DATA, &peer.context.wrap(&[&header[..], b"evil"].concat(), false));
    let clear = [&header[..], b"evil"].concat();
    let too_long = [&answer("evil")[..], &[0]].concat();
    let last = answer("last");
    for bytes in [&first, &first, &unencrypted, &clear, &too_long, &buffer[..n].to_vec(), &late, &late, &last] {
        relay.send_to(bytes, from).expect("sent");
    }
    client.stdout(|all| all.ends_with(b"last\n"));
    assert_eq!(text(&client.stdout(|_| true)), "first\nlate\nlast\n");
}

#[test]
fn no_ticket_is_requested_for_a_server_without_gssapi() {
    let Some(realm) = realm() else { return };
    // The client must not request a ticket before the server has selected GSSAPI.
    let output = run(
        &mut client(&realm, "connect", &format!("localhost:{}", closed_port().port()), &["192.0.2.1:80"]),
        b"",
        LONG_TIMEOUT,
    );
    assert_fails_with(&output, 7, &["connection refused"]);
    let server = crate::start(&realm, &[]);
    let output = run(&mut client(&realm, "connect", &crate::url(&server), &["192.0.2.1:80"]), b"", LONG_TIMEOUT);
    assert_fails_with(&output, 67, &["no acceptable authentication method"]);
    assert!(TcpStream::connect(server.addr()).is_ok());
}
