//! s5 clients with an independent server: what the clients send and accept, and how they exit on invalid messages.

use crate::peer::{
    ABORT, ALL, AUTHENTICATION, CONF, DATA, DELEG, INTEG, LEVEL_FORMS, LevelForm, Library, MUTUAL, PROTECTION, Peer,
    Proxy, REPLAY, SEQUENCE, SUCCESS, message, receive_token, set_up,
};
use crate::support::realm::Realm;
use crate::*;

/// Target of the clients. No test must reach it.
const TARGET: &str = "192.0.2.1:80";

struct Setup {
    realm: Realm,
    library: Library,
    proxy: Proxy,
}

impl Setup {
    fn new() -> Option<Self> {
        let (realm, library) = set_up()?;
        let proxy = Proxy::new(&library);
        Some(Self { realm, library, proxy })
    }

    fn client(&self, args: &[&str]) -> RunningProgram {
        RunningProgram::start(&mut client(&self.realm, "connect", &self.proxy.url(), &[args, &[TARGET]].concat()))
    }

    /// Starts a client and answers its request. Returns the client and its connection.
    fn tunnel(&self) -> (RunningProgram, Peer) {
        let (client, mut peer) = (self.client(&[]), self.proxy.accept_context());
        let (requested, form) = peer.receive_level();
        peer.grant_level(requested, form);
        peer.accept_request();
        (client, peer)
    }
}

/// Checks that a client sends data through its tunnel.
fn assert_sends(client: &mut RunningProgram, peer: &mut Peer, case: &str) {
    client.write(b"hello");
    assert_eq!(peer.receive(), b"hello", "{case}");
}

/// Checks that a client exits with status 67, and that it has sent nothing more.
fn assert_login_fails(mut client: RunningProgram, stream: &mut TcpStream, words: &[&str]) {
    client.close_stdin();
    let (ended, _, stderr) = client.wait_exit(TIMEOUT);
    assert_failed(ended.code(), &stderr, 67, &[&["login"], words].concat());
    // The connection is reset if the client did not read everything.
    let end = stream_end(stream);
    assert!(end == StreamEnd::Reset || end == StreamEnd::Closed(vec![]), "{words:?}: {end:?}");
}

#[test]
fn client_requests_all_flags_except_delegation() {
    let Some(setup) = Setup::new() else { return };
    // The ticket is forwardable.
    for args in [&[][..], &["--gssapi-protection", "integrity"]] {
        let _client = setup.client(args);
        let peer = setup.proxy.accept_context();
        let flags = peer.context.flags();
        assert_eq!(flags & (MUTUAL | REPLAY | SEQUENCE | INTEG), MUTUAL | REPLAY | SEQUENCE | INTEG, "{args:?}");
        assert_eq!(flags & DELEG, 0, "no delegation");
        assert_eq!(flags & CONF, if args.is_empty() { CONF } else { flags & CONF });
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
        let mut command = any_client(&setup.realm, "connect", url, &[args, &[TARGET]].concat());
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
            args.extend((form == LevelForm::Nec).then_some("--gssapi-nec"));
            let mut client = RunningProgram::start(&mut client(&setup.realm, "connect", &setup.proxy.url(), &args));
            let mut peer = setup.proxy.accept_context();
            assert_eq!(peer.receive_level(), (code, form));
            peer.grant_level(code, form);
            let request = request_by_name(CONNECT, "example.test", 80);
            if code == 0 {
                assert_eq!(read_exact(&mut peer.stream, request.len()), request, "{level}");
                peer.send_raw(&SUCCESS);
                client.write(b"hello");
                assert_eq!(read_exact(&mut peer.stream, 5), b"hello");
                peer.send_raw(b"there");
            } else {
                assert_eq!(peer.accept_request(), request, "{level}, in one token");
                assert_sends(&mut client, &mut peer, level);
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
    let unknown = "the server grants an unknown protection level";
    let too_low = |granted, required| format!("the server grants protection {granted}, required is {required}");
    let table: [(&[&str], u8, &str); 7] = [
        (&[], 0, &too_low("none", "integrity (see --gssapi-min)")),
        (&["--gssapi-min", "confidentiality"], 1, &too_low("integrity", "confidentiality")),
        (&["--gssapi-protection", "integrity"], 0, &too_low("none", "")),
        (&[], 3, unknown),
        (&[], 7, unknown),
        (&["--gssapi-min", "none"], 255, unknown),
        (&["--gssapi-nec"], 3, unknown),
    ];
    for (args, granted, expected) in table {
        let (client, mut peer) = (setup.client(args), setup.proxy.accept_context());
        let (_, form) = peer.receive_level();
        peer.grant_level(granted, form);
        assert_eq!(stream_end(&mut peer.stream), StreamEnd::Closed(vec![]), "no request, {args:?}");
        assert_login_fails(client, &mut peer.stream, &["proxy localhost:", expected]);
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
        let (mut client, mut peer) = (setup.client(args), setup.proxy.accept_context());
        let (_, form) = peer.receive_level();
        // A server without a further token sends an empty one (RFC 1961 section 3.6), which is ignored.
        peer.send_raw(&message(AUTHENTICATION, &[]));
        peer.grant_level(granted, form);
        peer.accept_request();
        assert_sends(&mut client, &mut peer, &args.concat());
    }
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
        let (client, (mut stream, _)) = (setup.client(&[]), setup.proxy.accept_greeting());
        receive_token(&mut stream, AUTHENTICATION);
        stream.write_all(bytes).unwrap_or_else(|error| panic!("{case}: {error}"));
        // The client can have disconnected already.
        let _ = stream.shutdown(std::net::Shutdown::Write);
        assert_login_fails(client, &mut stream, &["proxy localhost:", expected]);
    }
}

#[test]
fn invalid_server_level_is_reported() {
    let Some(setup) = Setup::new() else { return };
    type Answer = fn(&Peer) -> Vec<u8>;
    let invalid = "invalid message for the protection level";
    let table: [(&[&str], Answer, &str); 10] = [
        (&[], |_| ABORT.to_vec(), "refused"),
        (&[], |_| vec![], "closed"),
        // The answer must have the form of the request.
        (&[], |_| message(PROTECTION, &[2]), "GSSAPI"),
        (&["--gssapi-nec"], |peer| peer.context.message(PROTECTION, &[2], false), "unexpected GSSAPI message"),
        (&[], |peer| peer.context.message(PROTECTION, &[], false), invalid),
        (&[], |peer| peer.context.message(PROTECTION, &[2, 2], false), invalid),
        // This is not the first token.
        (&[], |peer| [(); 2].map(|()| peer.context.message(PROTECTION, &[2], false))[1].clone(), invalid),
        (&[], |peer| peer.context.message(DATA, &[2], false), "unexpected GSSAPI message"),
        (&[], |_| message(AUTHENTICATION, &[]).repeat(2), "GSSAPI"),
        // This one is changed.
        (
            &[],
            |peer| {
                let mut bytes = peer.context.message(PROTECTION, &[1], false);
                bytes[4 + 16] = 2;
                bytes
            },
            "GSSAPI",
        ),
    ];
    for (args, answer, expected) in table {
        let (client, mut peer) = (setup.client(args), setup.proxy.accept_context());
        peer.receive_level();
        let bytes = answer(&peer);
        peer.send_raw(&bytes);
        peer.shutdown();
        assert_login_fails(client, &mut peer.stream, &["proxy localhost:", expected]);
    }
}

#[test]
fn impostor_without_the_key_is_detected() {
    let Some(setup) = Setup::new() else { return };
    let mut python = Command::new(PYTHON);
    setup.realm.env(&mut python).env("KRB5_KTNAME", setup.realm.file("wrong.keytab"));
    let impostor = Proxy::new(&Library::start_with(&mut python));
    let client = RunningProgram::start(&mut client(&setup.realm, "connect", &impostor.url(), &[TARGET]));
    let (mut stream, _) = impostor.accept_greeting();
    receive_token(&mut stream, AUTHENTICATION);
    // The impostor can't decrypt the ticket. It can only replay an answer that was made for another login.
    let (answer, _) = setup.library.accept().step(&setup.library.init(ALL).step(&[]).0);
    stream.write_all(&message(AUTHENTICATION, &answer)).expect("sent");
    assert_login_fails(client, &mut stream, &["GSSAPI"]);
}

#[test]
fn invalid_data_ends_the_client_with_status_56() {
    let Some(setup) = Setup::new() else { return };
    type InvalidData = fn(&Peer) -> Vec<u8>;
    let table: [(&str, InvalidData, &str); 9] = [
        ("not encrypted", |peer| peer.context.message(DATA, b"evil", false), "token is not encrypted"),
        ("a gap", |peer| [(); 2].map(|()| peer.frame(b"evil"))[1].clone(), "out of order"),
        ("a duplicate", |peer| peer.frame(b"good").repeat(2), "out of order"),
        (
            "changed",
            |peer| {
                let mut bytes = peer.frame(b"evil");
                bytes[30] ^= 1;
                bytes
            },
            "protection: ",
        ),
        ("clear", |_| b"HTTP/1.0 200 OK".to_vec(), "protection: "),
        ("empty", |_| message(DATA, &[]), "protection: "),
        ("another message", |peer| peer.context.message(PROTECTION, b"evil", true), "protection: "),
        ("an end inside of a frame", |peer| peer.frame(b"evil")[..20].to_vec(), "connection closed within a token"),
        ("an abort", |_| ABORT.to_vec(), "protection: "),
    ];
    for (case, invalid, expected) in table {
        let (mut client, mut peer) = setup.tunnel();
        let bytes = invalid(&peer);
        peer.send_raw(&bytes);
        peer.shutdown();
        let (status, stdout, stderr) = client.wait_exit(TIMEOUT);
        assert_eq!(status.code(), Some(56), "{case}: {stderr}");
        assert!(stdout.is_empty() || stdout == b"good", "{case}: {}", text(&stdout));
        assert!(stderr.contains(expected) && stderr.lines().count() == 1, "{case}: {stderr}");
    }
    // The end of the stream between two frames is no error.
    let (mut client, peer) = setup.tunnel();
    peer.shutdown();
    client.close_stdin();
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
    client.close_stdin();
    let (status, stdout, stderr) = client.wait_exit(TIMEOUT);
    assert!(status.success(), "{stderr}");
    assert!(stdout == [bytes(largest), b"end".to_vec()].concat(), "{} bytes", stdout.len());
}

#[test]
fn client_drops_invalid_datagrams() {
    let Some(setup) = Setup::new() else { return };
    let mut client = RunningProgram::start(&mut client(&setup.realm, "udp", &setup.proxy.url(), &["192.0.2.9:9"]));
    let mut peer = setup.proxy.accept_context();
    let (requested, form) = peer.receive_level();
    peer.grant_level(requested, form);
    assert_eq!(peer.receive()[..4], [5, 3, 0, 1]);
    let relay = UdpSocket::bind((V4, 0)).expect("a port");
    relay.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    let addr = relay.local_addr().expect("an address");
    peer.send(&message_with_addr([5, 0, 0], addr));
    client.write(b"question\n");
    let mut buffer = [0; 2048];
    let (n, from) = retry(|| relay.recv_from(&mut buffer)).expect("a datagram comes");
    let [1, DATA, _, length, token @ ..] = &buffer[..n] else { panic!("no frame") };
    assert_eq!(usize::from(*length), token.len());
    let header = message_with_addr([0, 0, 0], SocketAddr::from(([192, 0, 2, 9], 9)));
    assert_eq!(peer.context.unwrap(token), ([&header[..], b"question"].concat(), true));
    let answer = |text: &str| peer.frame(&[&header[..], text.as_bytes()].concat());
    let [first, _lost, late] = ["first", "lost", "late"].map(answer);
    let clear = [&header[..], b"evil"].concat();
    let unencrypted = peer.context.message(DATA, &clear, false);
    let too_long = [&answer("evil")[..], &[0]].concat();
    let last = answer("last");
    for bytes in [&first, &first, &unencrypted, &clear, &too_long, &buffer[..n].to_vec(), &late, &late, &last] {
        relay.send_to(bytes, from).expect("sent");
    }
    client.stdout(|all| all.ends_with(b"last\n"));
    assert_eq!(text(&client.stdout(|_| true)), "first\nlate\nlast\n");
}
