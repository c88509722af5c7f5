//! A peer that is not ours as the server: what our clients say to it, take from it, and how they end when they don't.

use std::io::Write as _;
use std::net::{SocketAddr, TcpStream, UdpSocket};

use crate::common::{TIMEOUT, closed_port, read_exact, run};
use crate::kit::realm::Realm;
use crate::kit::{StreamEnd, V4, stream_end};
use crate::peer::{
    ABORT, ALL, AUTHENTICATION, CONF, DATA, DELEG, FORMS, Form, INTEG, Library, MUTUAL, PROTECTION, Peer, Proxy,
    REPLAY, SEQUENCE, have_python, hear, message,
};
use crate::scripted::{RunningProgram, text};
use crate::{ALICE, LONG, assert_says, client, octets, realm};

struct Scene {
    realm: Realm,
    proxy: Proxy,
}

/// What a proxy without an address to tell says to a request.
const SUCCESS: [u8; 10] = [5, 0, 0, 1, 0, 0, 0, 0, 0, 0];

impl Scene {
    fn new() -> Option<Self> {
        if !have_python() {
            return None;
        }
        let realm = realm()?;
        let proxy = Proxy::new(&Library::start(&realm));
        Some(Self { realm, proxy })
    }

    fn client(&self, args: &[&str]) -> RunningProgram {
        RunningProgram::start(&mut client(&self.realm, "connect", &self.proxy.url(), args))
    }

    /// A client whose request has been answered, and its connection.
    fn tunnel(&self) -> (RunningProgram, Peer) {
        let client = self.client(&["192.0.2.1:80"]);
        let mut peer = self.proxy.established();
        let (asked, form) = Proxy::asked(&mut peer);
        Proxy::grant(&mut peer, asked, form);
        peer.receive();
        peer.send(&SUCCESS);
        (client, peer)
    }
}

/// Fails unless a client of ours ends with this status, and one line with these words.
fn ends(mut client: RunningProgram, status: i32, words: &[&str]) {
    client.close_stdin();
    let (ended, _, said) = client.wait_exit(TIMEOUT);
    assert_eq!(ended.code(), Some(status), "{words:?}: {said}");
    assert!(said.starts_with("s5: ") && said.lines().count() == 1, "one line: {said:?}");
    for word in words {
        assert!(said.contains(word), "{word:?} is not in {said:?}");
    }
}

#[test]
fn what_is_asked_for_is_all_but_delegation() {
    let Some(scene) = Scene::new() else { return };
    let forwardable = [&["192.0.2.1:80"][..], &["--gssapi-protection", "integrity", "192.0.2.1:80"]];
    for args in forwardable {
        let _client = scene.client(args);
        let peer = scene.proxy.established();
        let flags = peer.context.flags();
        assert_eq!(flags & (MUTUAL | REPLAY | SEQUENCE | INTEG), MUTUAL | REPLAY | SEQUENCE | INTEG, "{args:?}");
        assert_eq!(flags & DELEG, 0, "nobody's ticket is handed over");
        assert_eq!(flags & CONF, if args.len() == 1 { CONF } else { flags & CONF });
        assert_eq!(peer.context.initiator(), ALICE);
    }
}

#[test]
fn methods_are_offered_as_the_user_says() {
    let Some(scene) = Scene::new() else { return };
    let with_password = scene.proxy.url().replace("localhost", "bob:secret@localhost");
    let table: [(&str, &[&str], &[u8]); 5] = [
        (&scene.proxy.url(), &[], &[0, 1]),
        (&with_password, &[], &[0, 2, 1]),
        (&with_password, &["--auth", "gssapi,password,none"], &[1, 2, 0]),
        (&with_password, &["--auth", "gssapi"], &[1]),
        (&scene.proxy.url(), &["--auth", "gssapi,password"], &[1]),
    ];
    for (url, args, methods) in table {
        let mut command = crate::common::s5();
        scene.realm.env(command.args(["connect", "-x", url]).args(args).arg("192.0.2.1:80"));
        let _client = RunningProgram::start(&mut command);
        assert_eq!(scene.proxy.greeted().1, methods, "{args:?}");
    }
}

#[test]
fn every_level_is_asked_for_and_used_in_both_forms() {
    let Some(scene) = Scene::new() else { return };
    for (code, level) in (0_u8..).zip(crate::LEVELS) {
        for form in FORMS {
            let mut args = vec!["--gssapi-protection", level, "example.test:80"];
            if form == Form::Nec {
                args.push("--gssapi-nec");
            }
            let mut client = scene.client(&args);
            let mut peer = scene.proxy.established();
            assert_eq!(Proxy::asked(&mut peer), (code, form));
            Proxy::grant(&mut peer, code, form);
            let request = crate::kit::request_by_name(crate::kit::CONNECT, "example.test", 80);
            if code == 0 {
                assert_eq!(read_exact(&mut peer.stream, request.len()), request, "{level}");
                peer.say_raw(&SUCCESS);
                client.write(b"hello");
                assert_eq!(read_exact(&mut peer.stream, 5), b"hello");
                peer.say_raw(b"there");
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
fn a_level_that_is_too_low_or_none_is_refused_before_anything_is_said() {
    let Some(scene) = Scene::new() else { return };
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
    for (args, granted, why) in table {
        let client = scene.client(&[args, &["192.0.2.1:80"]].concat());
        let mut peer = scene.proxy.established();
        let (_, form) = Proxy::asked(&mut peer);
        Proxy::grant(&mut peer, granted, form);
        assert_eq!(stream_end(&mut peer.stream), StreamEnd::Closed(vec![]), "no request, {args:?}");
        ends(client, 67, &["proxy localhost:", "login", why]);
    }
}

#[test]
fn a_level_that_is_lower_or_higher_than_asked_for_but_enough_is_used() {
    let Some(scene) = Scene::new() else { return };
    let table: [(&[&str], u8); 3] = [
        (&[], 1),
        (&["--gssapi-protection", "integrity"], 2),
        (&["--gssapi-min", "none", "--gssapi-protection", "none"], 2),
    ];
    for (args, granted) in table {
        let mut client = scene.client(&[args, &["192.0.2.1:80"]].concat());
        let mut peer = scene.proxy.established();
        let (_, form) = Proxy::asked(&mut peer);
        Proxy::grant(&mut peer, granted, form);
        peer.receive();
        peer.send(&SUCCESS);
        client.write(b"hello");
        assert_eq!(peer.receive(), b"hello", "{args:?}");
    }
}

#[test]
fn an_empty_token_behind_the_last_one_is_nothing() {
    let Some(scene) = Scene::new() else { return };
    let mut client = scene.client(&["192.0.2.1:80"]);
    let mut peer = scene.proxy.established();
    let (asked, form) = Proxy::asked(&mut peer);
    // Where a server has nothing more to say, it says that (RFC 1961 section 3.6).
    peer.say(AUTHENTICATION, &[]);
    Proxy::grant(&mut peer, asked, form);
    peer.receive();
    peer.send(&SUCCESS);
    client.write(b"hello");
    assert_eq!(peer.receive(), b"hello");
}

#[test]
fn what_a_server_says_instead_of_its_token_is_told() {
    let Some(scene) = Scene::new() else { return };
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
    for (what, octets, why) in table {
        let client = scene.client(&["192.0.2.1:80"]);
        let (mut stream, _) = scene.proxy.greeted();
        hear(&mut stream, AUTHENTICATION);
        stream.write_all(octets).expect("it is sent");
        // It may have left already.
        let _ = stream.shutdown(std::net::Shutdown::Write);
        ends(client, 67, &["proxy localhost:", "login", why]);
        // A reset, where it has left something unread.
        let end = stream_end(&mut stream);
        assert!(end == StreamEnd::Reset || end == StreamEnd::Closed(vec![]), "{what}: it just closes: {end:?}");
    }
}

#[test]
fn what_a_server_says_instead_of_its_level_is_told() {
    let Some(scene) = Scene::new() else { return };
    type Answer = fn(&Peer) -> Vec<u8>;
    let table: [(&str, Answer, &str); 9] = [
        ("an abort", |_| ABORT.to_vec(), "refused"),
        ("nothing", |_| vec![], "closed"),
        ("an octet as it is", |_| message(PROTECTION, &[2]), "GSSAPI"),
        (
            "no octet",
            |peer| message(PROTECTION, &peer.context.wrap(&[], false)),
            "invalid message for the protection level",
        ),
        (
            "two octets",
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
                let mut octets = message(PROTECTION, &peer.context.wrap(&[1], false));
                octets[4 + 16] = 2;
                octets
            },
            "GSSAPI",
        ),
    ];
    for (what, answer, why) in table {
        let client = scene.client(&["192.0.2.1:80"]);
        let mut peer = scene.proxy.established();
        Proxy::asked(&mut peer);
        let octets = answer(&peer);
        peer.say_raw(&octets);
        peer.shutdown();
        ends(client, 67, &["proxy localhost:", "login", why]);
        let end = stream_end(&mut peer.stream);
        assert!(end == StreamEnd::Reset || end == StreamEnd::Closed(vec![]), "{what}: it just closes: {end:?}");
    }
    // Who speaks as NEC does wants such an answer, too.
    let client = scene.client(&["--gssapi-nec", "192.0.2.1:80"]);
    let mut peer = scene.proxy.established();
    Proxy::asked(&mut peer);
    Proxy::grant(&mut peer, 2, Form::Rfc);
    ends(client, 67, &["unexpected GSSAPI message"]);
}

#[test]
fn a_server_that_is_another_one_is_found_out() {
    let Some(scene) = Scene::new() else { return };
    let mut python = std::process::Command::new(crate::peer::PYTHON);
    scene.realm.env(&mut python).env("KRB5_KTNAME", scene.realm.file("wrong.keytab"));
    let impostor = Proxy::new(&Library::with(&mut python));
    let client = RunningProgram::start(&mut client(&scene.realm, "connect", &impostor.url(), &["192.0.2.1:80"]));
    let (mut stream, _) = impostor.greeted();
    let token = hear(&mut stream, AUTHENTICATION);
    // It can't read the ticket; the best that it can do is to give an answer of somebody else's.
    let honest = Library::start(&scene.realm).accept();
    let (answer, _) = honest.step(&Library::start(&scene.realm).init(ALL).step(&[]).0);
    assert!(!token.is_empty());
    stream.write_all(&message(AUTHENTICATION, &answer)).expect("it is sent");
    ends(client, 67, &["login", "GSSAPI"]);
}

#[test]
fn faults_in_what_comes_end_the_client_with_a_status() {
    let Some(scene) = Scene::new() else { return };
    type Fault = fn(&mut Peer) -> Vec<u8>;
    let table: [(&str, Fault, &str); 9] = [
        ("unsealed", |peer| message(DATA, &peer.context.wrap(b"evil", false)), "token is not encrypted"),
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
                let mut octets = message(DATA, &peer.context.wrap(b"evil", true));
                octets[30] ^= 1;
                octets
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
    for (what, fault, why) in table {
        let (client, mut peer) = scene.tunnel();
        let octets = fault(&mut peer);
        peer.say_raw(&octets);
        peer.shutdown();
        let mut client = client;
        let (status, stdout, said) = client.wait_exit(TIMEOUT);
        assert_eq!(status.code(), Some(56), "{what}: {said}");
        assert!(stdout.is_empty() || stdout == b"good", "{what}: {}", text(&stdout));
        assert!(said.contains(why) && said.lines().count() == 1, "{what}: {said}");
    }
    // An end between frames is a good one.
    let (mut client, peer) = scene.tunnel();
    peer.shutdown();
    assert!(client.wait_exit(TIMEOUT).0.success());
}

#[test]
fn tokens_of_the_largest_size_are_taken() {
    let Some(scene) = Scene::new() else { return };
    let (mut client, mut peer) = scene.tunnel();
    let largest = peer.context.limit(true);
    peer.send(&octets(largest));
    peer.send(&[]);
    peer.send(b"end");
    peer.shutdown();
    let (status, stdout, said) = client.wait_exit(TIMEOUT);
    assert!(status.success(), "{said}");
    assert!(stdout == [octets(largest), b"end".to_vec()].concat(), "{} octets", stdout.len());
}

#[test]
fn answers_that_are_not_as_agreed_are_dropped_by_our_client() {
    let Some(scene) = Scene::new() else { return };
    let mut client = RunningProgram::start(&mut client(&scene.realm, "udp", &scene.proxy.url(), &["192.0.2.9:9"]));
    let mut peer = scene.proxy.established();
    let (asked, form) = Proxy::asked(&mut peer);
    Proxy::grant(&mut peer, asked, form);
    assert_eq!(peer.receive()[..4], [5, 3, 0, 1]);
    let relay = UdpSocket::bind((V4, 0)).expect("a port");
    relay.set_read_timeout(Some(TIMEOUT)).expect("a timeout can be set");
    let addr = relay.local_addr().expect("an address");
    peer.send(&crate::common::message_with_addr([5, 0, 0], addr));
    client.write(b"question\n");
    let mut buffer = [0; 2048];
    let (n, from) = relay.recv_from(&mut buffer).expect("a datagram comes");
    let [1, DATA, _, length, token @ ..] = &buffer[..n] else { panic!("no frame") };
    assert_eq!(usize::from(*length), token.len());
    let header = crate::common::message_with_addr([0, 0, 0], SocketAddr::from(([192, 0, 2, 9], 9)));
    assert_eq!(peer.context.unwrap(token), ([&header[..], b"question"].concat(), true));
    let answer = |text: &str| message(DATA, &peer.context.wrap(&[&header[..], text.as_bytes()].concat(), true));
    let (first, lost, late) = (answer("first"), answer("lost"), answer("late"));
    assert!(!lost.is_empty());
    let unsealed = message(DATA, &peer.context.wrap(&[&header[..], b"evil"].concat(), false));
    let clear = [&header[..], b"evil"].concat();
    let behind = [&answer("evil")[..], &[0]].concat();
    let last = answer("last");
    for octets in [&first, &first, &unsealed, &clear, &behind, &buffer[..n].to_vec(), &late, &late, &last] {
        relay.send_to(octets, from).expect("it is sent");
    }
    client.stdout(|all| all.ends_with(b"last\n"));
    assert_eq!(text(&client.stdout(|_| true)), "first\nlate\nlast\n");
}

#[test]
fn a_server_that_wants_no_gssapi_is_not_told_of_it() {
    let Some(realm) = realm() else { return };
    // A context would take a ticket for a service that is not there.
    let output = run(
        &mut client(&realm, "connect", &format!("localhost:{}", closed_port().port()), &["192.0.2.1:80"]),
        b"",
        LONG,
    );
    assert_says(&output, 7, &["connection refused"]);
    let server = crate::start(&realm, &[]);
    let output = run(&mut client(&realm, "connect", &crate::url(&server), &["192.0.2.1:80"]), b"", LONG);
    assert_says(&output, 67, &["no acceptable authentication method"]);
    assert!(TcpStream::connect(server.addr()).is_ok());
}
