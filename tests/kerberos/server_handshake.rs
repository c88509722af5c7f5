//! An independent client up to the negotiation of the level: the server answers all invalid messages with an abort.

use crate::peer::{
    ABORT, ALL, AUTHENTICATION, CONF, Context, DATA, DELEG, INTEG, LEVEL_FORMS, LevelForm, Library, MUTUAL, PROTECTION,
    Peer, REPLAY, SEQUENCE, greet, message, receive_token, set_up,
};
use crate::raw_datagrams::Udp;
use crate::*;

const ALL_LEVELS: [&str; 2] = ["--gssapi-protection", "none,integrity,confidentiality"];

/// Returns the first message of a client.
fn first_message(library: &Library) -> Vec<u8> {
    message(AUTHENTICATION, &library.init(ALL).step(&[]).0)
}

/// Selects GSSAPI and sends these bytes.
fn start_login(server: &Server, bytes: &[u8]) -> TcpStream {
    let mut stream = server.connect();
    greet(&mut stream);
    stream.write_all(bytes).expect("sent");
    stream
}

/// Checks that the server closes the connection after these bytes.
fn assert_closed(stream: &mut TcpStream, bytes: &[u8], case: &str) {
    assert_eq!(stream_end(stream), StreamEnd::Closed(bytes.to_vec()), "{case}");
}

/// Opens a tunnel through a connection without frames, at level none.
fn open_without_frames(mut peer: Peer) {
    peer.send_raw(&request(CONNECT, echo_server()));
    assert_eq!(read_reply(&mut peer.stream).0, 0);
    ping(&mut peer.stream, b"hello");
}

#[test]
fn all_levels_are_granted_in_both_forms() {
    let Some((realm, library)) = set_up() else { return };
    let (server, echo) = (serve(&realm, &ALL_LEVELS), echo_server());
    for form in LEVEL_FORMS {
        for level in [0, 1, 2] {
            let mut peer = Peer::new(&library, &server, ALL);
            assert_eq!(peer.request_level(level, form), level, "{form:?}");
            if level == 0 {
                open_without_frames(peer);
                continue;
            }
            assert_eq!(peer.request(CONNECT, echo).0, 0);
            peer.ping(b"hello");
            peer.shutdown();
            assert_closed(&mut peer.stream, b"", "half-close");
        }
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
    let token = library.init(ALL).step(&[]).0;
    let (mut changed, cut) = (token.clone(), &token[..token.len() - 9]);
    *changed.last_mut().expect("not empty") ^= 1;
    let table = [
        ("an empty token", message(AUTHENTICATION, &[])),
        ("not a token", message(AUTHENTICATION, b"hello")),
        ("a truncated token", message(AUTHENTICATION, cut)),
        ("a changed token", message(AUTHENTICATION, &changed)),
        ("65535 invalid bytes", message(AUTHENTICATION, &[0x60; 65_535])),
        ("a level instead", message(PROTECTION, &[1])),
        ("data instead", message(DATA, &token)),
        ("an unknown type", message(4, b"hello")),
        ("the version of SOCKS", vec![5, 1, 0, 1, 0]),
        ("version 0", vec![0, 1, 0, 1, 0]),
        ("version 2", vec![2, 1, 0, 1, 0]),
        ("an abort", ABORT.to_vec()),
    ];
    for (case, bytes) in &table {
        assert_closed(&mut start_login(&server, bytes), &ABORT, case);
    }
    // The server still serves this address, at once.
    Peer::at_level(&library, &server, ALL, 2);
    let log = server.wait_log(|log| session_lines(log).len() >= table.len());
    let refusals = log.lines().filter(|line| line.contains("level=warn") && line.contains("login refused (GSSAPI: "));
    assert_eq!(refusals.count(), table.len(), "{log}");
}

#[test]
fn invalid_level_request_is_aborted() {
    let Some((realm, library)) = set_up() else { return };
    type Message = fn(&Context) -> Vec<u8>;
    let server = serve(&realm, &[]);
    let table: [(&str, Message); 12] = [
        ("an empty token", |_| message(PROTECTION, &[])),
        ("two plain bytes", |_| message(PROTECTION, &[1, 2])),
        ("no byte in a token", |context| context.message(PROTECTION, &[], false)),
        ("two bytes in a token", |context| context.message(PROTECTION, &[1, 2], false)),
        ("a token that is not the first one", |context| {
            context.wrap(&[1], false);
            context.message(PROTECTION, &[2], false)
        }),
        ("a changed token", |context| {
            let mut bytes = context.message(PROTECTION, &[2], false);
            bytes[4 + 16] = 1;
            bytes
        }),
        ("an authentication token", |_| message(AUTHENTICATION, b"hello")),
        ("an empty authentication token", |_| message(AUTHENTICATION, &[])),
        ("data", |context| context.message(DATA, &[1], false)),
        ("an unknown type", |context| context.message(9, &[1], false)),
        ("a request in clear", |_| vec![5, 1, 0, 1, 127, 0, 0, 1, 0, 80]),
        ("an abort", |_| ABORT.to_vec()),
    ];
    for (case, bytes) in table {
        let mut peer = Peer::new(&library, &server, ALL);
        let bytes = bytes(&peer.context);
        peer.send_raw(&bytes);
        assert_closed(&mut peer.stream, &ABORT, case);
    }
    let log = server.wait_log(|log| session_lines(log).len() == 12);
    assert!(!log.contains(" rep="), "{log}");
    assert_eq!(log.matches("GSSAPI: ").count(), 12, "each reason is logged:\n{log}");
}

#[test]
fn truncated_handshake_closes_without_abort() {
    let Some((realm, library)) = set_up() else { return };
    let server = serve(&realm, &[]);
    let token = first_message(&library);
    for end in (0..8).chain([100, token.len() - 1]) {
        let mut stream = start_login(&server, &token[..end]);
        stream.shutdown(Shutdown::Write).expect("half-close");
        // The server sends no abort to a client that has closed.
        assert_closed(&mut stream, b"", &format!("{end} bytes"));
    }
    for end in [0, 1, 2, 3, 4, 5, 20, 32] {
        let mut peer = Peer::new(&library, &server, ALL);
        let level = peer.context.message(PROTECTION, &[2], false);
        assert_eq!(level.len(), 33);
        peer.send_raw(&level[..end]);
        peer.shutdown();
        assert_closed(&mut peer.stream, b"", &format!("{end} bytes of the level"));
    }
}

#[test]
fn handshake_works_in_single_bytes_and_in_one_write() {
    let Some((realm, library)) = set_up() else { return };
    let (server, echo) = (serve(&realm, &[]), echo_server());
    let mut stream = start_login(&server, b"");
    stream.set_nodelay(true).expect("an option");
    let context = library.init(ALL);
    for byte in message(AUTHENTICATION, &context.step(&[]).0) {
        stream.write_all(&[byte]).expect("sent");
    }
    assert!(context.step(&receive_token(&mut stream, AUTHENTICATION)).1);
    let mut peer = Peer { stream, context, should_encrypt: true };
    let request = request(CONNECT, echo);
    let (start, end) = request.split_at(4);
    let level = peer.context.message(PROTECTION, &[2], false);
    // A request in two tokens. The second one also contains data.
    let (first, second) = (peer.frame(start), peer.frame(&[end, b"hello"].concat()));
    peer.send_raw(&[level, first, second].concat());
    assert_eq!(peer.receive_level(), (2, LevelForm::Rfc));
    assert_eq!(peer.receive_reply().0, 0);
    assert_eq!(peer.receive(), b"hello");
}

#[test]
fn replayed_login_and_ticket_for_another_service_are_refused() {
    let Some((realm, library)) = set_up() else { return };
    let [server, other] = [(); 2].map(|()| serve(&realm, &[]));
    let token = first_message(&library);
    receive_token(&mut start_login(&server, &token), AUTHENTICATION);
    let nokey = message(AUTHENTICATION, &library.init_with("nokey@localhost", ALL).step(&[]).0);
    for (server, token, error) in [
        (&server, &token, "Request is a replay"),
        (&other, &token, "Request is a replay"),
        (&server, &nokey, "nokey/localhost@S5.TEST not found in keytab"),
    ] {
        assert_closed(&mut start_login(server, token), &ABORT, error);
        wait_session(server, &[" up=0 down=0 ", error]);
    }
    // The server accepts all keys of the keytab.
    let mut socks = Peer::establish(server.connect(), library.init_with("socks@localhost", ALL));
    assert_eq!(socks.request_level(2, LevelForm::Rfc), 2);
}

#[test]
fn without_mutual_authentication_server_sends_an_empty_token() {
    let Some((realm, library)) = set_up() else { return };
    let (server, echo, context) = (serve(&realm, &[]), echo_server(), library.init(ALL & !MUTUAL));
    let (token, is_complete) = context.step(&[]);
    assert!(is_complete);
    let stream = start_login(&server, &message(AUTHENTICATION, &token));
    let mut peer = Peer { stream, context, should_encrypt: false };
    assert_eq!(peer.receive_token(AUTHENTICATION), b"");
    assert_eq!(peer.request_level(2, LevelForm::Rfc), 2);
    assert_eq!(peer.request(CONNECT, echo).0, 0);
    peer.ping(b"hello");
}

#[test]
fn tcp_requires_replay_and_sequence_detection_but_udp_does_not() {
    let Some((realm, library)) = set_up() else { return };
    let (server, echo) = (serve(&realm, &ALL_LEVELS), echo_server());
    for (flags, level) in [(MUTUAL | REPLAY | INTEG | CONF, 2), (MUTUAL | SEQUENCE | INTEG, 1), (MUTUAL | INTEG, 2)] {
        for command in [CONNECT, BIND] {
            let mut peer = Peer::at_level(&library, &server, flags, level);
            assert_eq!(peer.request(command, echo).0, 2, "command {command} with flags {flags}");
            assert_closed(&mut peer.stream, b"", "after the reply");
        }
        let udp = Udp::new(Peer::at_level(&library, &server, flags, level));
        udp.ping(udp_echo_server(V4), b"hello");
    }
    // At level none, no detection is required.
    open_without_frames(Peer::at_level(&library, &server, MUTUAL | INTEG, 0));
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
    drop(peer);
    wait_session(&server, &[ALICE, "rep=0"]);
}

#[test]
fn handshake_timeout_applies_at_every_stage() {
    let Some((realm, library)) = set_up() else { return };
    let server = serve(&realm, &["--handshake-timeout", "2s"]);
    let token = first_message(&library);
    let (mut greeted, mut half) = (start_login(&server, b""), start_login(&server, &token[..token.len() / 2]));
    let mut established = Peer::new(&library, &server, ALL);
    let mut granted = Peer::at_level(&library, &server, ALL, 2);
    // Before the level is negotiated, the server sends an abort.
    for stream in [&mut greeted, &mut half, &mut established.stream] {
        assert_closed(stream, &ABORT, "a timeout");
    }
    let end = stream_end(&mut granted.stream);
    assert!(end == StreamEnd::Closed(vec![]) || end == StreamEnd::Reset, "{end:?}");
    let log = server.wait_log(|log| log.matches("handshake timed out").count() == 4);
    assert!(!log.contains(" rep="), "{log}");
}

#[test]
fn half_a_token_takes_as_much_memory_as_has_arrived() {
    const CLIENTS: usize = 100;
    let Some(realm) = realm() else { return };
    let server = serve(&realm, &[]);
    let private = || proc_kib(&server, "smaps_rollup", "Private_Dirty");
    // 34 of 64 KiB: a buffer of a power of two would have 64 KiB.
    let half = [&[5, 1, 1, 1, 1, 0xFF, 0xFF][..], &[0; 34 << 10]].concat();
    let send = || {
        let mut stream = server.connect();
        stream.write_all(&half).expect("data sent");
        assert_eq!(read_exact(&mut stream, 2), [5, 1]);
        stream
    };
    let _warm_up = send();
    let before = private();
    let _clients: Vec<TcpStream> = (0..CLIENTS).map(|_| send()).collect();
    wait_until("all data has been read", TIMEOUT, || private().saturating_sub(before) > CLIENTS * 34);
    let per_client = private().saturating_sub(before) / CLIENTS;
    assert!(per_client < 42, "{per_client} KiB");
}

/// A hash of the maximum cost. Its comparison takes several times the two seconds that a half-closed client has.
const SLOW_USER: &str = "alice:$2a$17$N9qo8uLOickgx2ZMRZoMyeIjZAgcfl7p92ldGxad68LJZdL17lhWy\n";

#[test]
fn login_that_waits_for_a_thread_is_cancelled_when_its_client_leaves() {
    let Some((realm, _)) = set_up() else { return };
    let dir = temp_dir();
    let users = write_file(dir.path(), "users", SLOW_USER);
    let server = serve(&realm, &["--users", &users]);
    // Passwords have all threads of this client.
    let passwords = [(); 2].map(|()| {
        let mut stream = server.connect();
        select_password(&mut stream);
        stream.write_all(&login_message(b"alice", b"wrong")).expect("sent");
        stream
    });
    let hashes = || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", server.pid())).expect("the server runs");
        let names = tasks.flatten().filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
        names.filter(|name| name == "s5-hash\n").count()
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    wait_until("the passwords are hashed", TIMEOUT, || hashes() == cores.min(2));
    drop(start_login(&server, &message(AUTHENTICATION, b"not a token")));
    // With a thread, the token would be refused.
    server.wait_log(|log| log.contains("GSSAPI: client disconnected before the reply"));
    drop(passwords);
}
