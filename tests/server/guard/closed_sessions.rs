//! Sessions that a reload closes: tunnels are reset on both sides, busy or idle. Allowed sessions are not disturbed.

use std::thread::{self, JoinHandle};

use super::tools::{
    ALICE, BOB, Login, Setup, assert_accepts_peer, assert_no_datagram, associate, bind, is_closed, log_in, only_bob,
    open_ok, send_request, try_log_in, tunnel, udp_target,
};
use crate::udp::association::{Association, datagram};
use crate::*;

/// Time limit for closing a session on both sides.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// More bytes than a direction copies before it is spliced.
const BULK: usize = 8 << 20;

/// A session of one of the tested kinds.
enum LiveSession {
    /// No traffic.
    Idle(TcpStream, TcpStream),
    /// The client has half-closed.
    Half(TcpStream, TcpStream),
    /// Continuous traffic; one thread for each end.
    Busy([JoinHandle<(ErrorKind, Instant)>; 2], Arc<AtomicUsize>),
    /// A BIND that waits for a peer at this address.
    Bind(TcpStream, SocketAddr),
    Udp(Association),
}

/// Repeats an action until it fails, and returns the error and its time.
fn repeat_until_error(
    mut action: impl FnMut() -> std::io::Result<()> + Send + 'static,
) -> JoinHandle<(ErrorKind, Instant)> {
    thread::spawn(move || {
        loop {
            if let Err(error) = action() {
                return (error.kind(), Instant::now());
            }
        }
    })
}

fn writer(mut stream: TcpStream) -> JoinHandle<(ErrorKind, Instant)> {
    repeat_until_error(move || stream.write_all(&[7; 1 << 16]))
}

fn reader(mut stream: TcpStream, received: Arc<AtomicUsize>) -> JoinHandle<(ErrorKind, Instant)> {
    let mut buffer = vec![0; 1 << 18];
    repeat_until_error(move || {
        let n = retry(|| stream.read(&mut buffer))?;
        received.fetch_add(n, Ordering::Relaxed);
        if n == 0 { Err(ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    })
}

fn echo(mut stream: TcpStream, sends_first: bool, received: Arc<AtomicUsize>) -> JoinHandle<(ErrorKind, Instant)> {
    let mut bytes = [7; 64];
    if sends_first {
        stream.write_all(&bytes).expect("data sent");
    }
    repeat_until_error(move || {
        stream.read_exact(&mut bytes)?;
        // Counted as 64 KiB, to reach the limit of `assert_busy` as soon as the bulk transfers.
        received.fetch_add(1 << 16, Ordering::Relaxed);
        stream.write_all(&bytes)
    })
}

/// Opens a session of each kind.
fn sessions_of_each_kind(server: &Server, login: Login<'_>) -> Vec<LiveSession> {
    let busy = |kind: &str| {
        let ((client, target), received) = (tunnel(server, login), Arc::new(AtomicUsize::new(0)));
        let ends = match kind {
            "up" => [writer(client), reader(target, received.clone())],
            "down" => [reader(client, received.clone()), writer(target)],
            _ => [echo(client, true, received.clone()), echo(target, false, received.clone())],
        };
        LiveSession::Busy(ends, received)
    };
    let (client, target) = tunnel(server, login);
    let (half, mut half_target) = tunnel(server, login);
    half.shutdown(Shutdown::Write).expect("half-closed");
    assert_eq!(retry(|| half_target.read(&mut [0])).expect("data received"), 0);
    let (bind, bnd) = bind(server, login, "127.0.0.1:0");
    let association = associate(server.addr(), V4, login);
    association.ping(udp_echo_server(V4), b"hello");
    let mut all = vec![
        LiveSession::Idle(client, target),
        LiveSession::Half(half, half_target),
        LiveSession::Bind(bind, bnd),
        LiveSession::Udp(association),
    ];
    all.extend(["up", "down", "both"].map(busy));
    all.iter().for_each(assert_busy);
    all
}

/// Waits until a busy session has transferred enough to be spliced.
fn assert_busy(live: &LiveSession) {
    if let LiveSession::Busy(_, received) = live {
        let before = received.load(Ordering::Relaxed);
        wait_until("bytes are transferred", TIMEOUT, || received.load(Ordering::Relaxed) > before + BULK);
    }
}

fn is_reset(stream: &mut TcpStream) -> bool {
    stream.set_read_timeout(Some(CLOSE_TIMEOUT)).expect("timeout set");
    retry(|| stream.read(&mut [0])).is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
}

fn assert_closed(live: LiveSession, since: Instant) {
    match live {
        LiveSession::Idle(mut client, mut target) => assert!(is_reset(&mut client) && is_reset(&mut target)),
        // After its end of stream, a socket reports the reset only when it writes.
        LiveSession::Half(mut client, mut target) => {
            assert!(is_reset(&mut client));
            wait_until("the target side is reset", CLOSE_TIMEOUT, || target.write_all(b"x").is_err());
        }
        LiveSession::Busy(ends, _) => {
            for end in ends {
                let (kind, when) = end.join().expect("the thread does not panic");
                assert!(matches!(kind, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{kind}");
                assert!(when < since + CLOSE_TIMEOUT, "{:?}", when - since);
            }
        }
        LiveSession::Bind(mut client, bnd) => {
            assert_eq!(read_reply(&mut client).0, 2);
            assert!(is_closed(&mut client));
            assert!(TcpStream::connect(bnd).is_err(), "the port still accepts connections");
        }
        LiveSession::Udp(mut association) => {
            assert!(is_closed(&mut association.control));
            let (target, addr) = udp_target("127.0.0.1");
            let _ = association.socket.send_to(&datagram(0, addr, b"late"), association.bnd);
            assert_no_datagram(&target);
        }
    }
    assert!(since.elapsed() < CLOSE_TIMEOUT, "{:?}", since.elapsed());
}

fn assert_alive(live: LiveSession) {
    assert_busy(&live);
    match live {
        LiveSession::Idle(mut client, mut target) => {
            client.write_all(b"up").and_then(|()| target.write_all(b"down")).expect("data sent");
            assert_eq!(read_exact(&mut target, 2), b"up");
            assert_eq!(read_exact(&mut client, 4), b"down");
        }
        LiveSession::Half(mut client, mut target) => {
            target.write_all(b"down").expect("data sent");
            assert_eq!(read_exact(&mut client, 4), b"down");
        }
        LiveSession::Busy(ends, _) => assert!(!ends.iter().any(JoinHandle::is_finished)),
        LiveSession::Bind(mut client, bnd) => {
            assert_accepts_peer(&mut client, bnd, addr("127.0.0.1:0"));
        }
        LiveSession::Udp(association) => association.ping(udp_echo_server(V4), b"hello"),
    }
}

/// Content of the new files.
enum Change {
    RemoveAlice,
    DenyAlice,
}

fn check_sessions_of_alice(args: &[&str], change: &Change, keeps_sessions: bool) {
    let setup = Setup::new(args);
    let alice_sessions = sessions_of_each_kind(&setup.server, ALICE);
    let bob_sessions = sessions_of_each_kind(&setup.server, BOB);
    let since = Instant::now();
    let line = match change {
        Change::RemoveAlice => setup.reload_users(only_bob()),
        Change::DenyAlice => setup.reload_rules("deny user=alice\n"),
    };
    let count = if keeps_sessions { 0 } else { alice_sessions.len() };
    assert!(line.ends_with(&format!(", sessions closed: {count}")), "{args:?}: {line}");
    if keeps_sessions {
        alice_sessions.into_iter().for_each(assert_alive);
    } else {
        alice_sessions.into_iter().for_each(|live| assert_closed(live, since));
        let error = match change {
            Change::RemoveAlice => "error=\"this login is no longer valid\"".into(),
            Change::DenyAlice => format!("error=\"denied: {} line 1 (deny user=alice)\"", setup.rules),
        };
        setup.server.wait_log(|log| log.matches(&error).count() == count);
    }
    bob_sessions.into_iter().for_each(assert_alive);
    // New sessions are checked against the new policy.
    let alice = try_log_in(setup.server.addr(), unused_client_ip(), ALICE);
    assert_eq!(alice.is_some(), matches!(change, Change::DenyAlice));
    // A second reload closes no session.
    assert!(setup.reload().ends_with("sessions closed: 0"));
}

#[test]
fn sessions_of_removed_user_are_closed() {
    check_sessions_of_alice(&["--threads", "1"], &Change::RemoveAlice, false);
    // A rate that is never reached, so that no datagram is dropped.
    check_sessions_of_alice(&["--threads", "2", "--rate", "1000G"], &Change::RemoveAlice, false);
}

#[test]
fn sessions_denied_by_new_rules_are_closed() {
    check_sessions_of_alice(&["--threads", "2"], &Change::DenyAlice, false);
    let hop = Server::start(&[]);
    check_sessions_of_alice(&["--threads", "1", "--via", &hop.addr().to_string()], &Change::DenyAlice, false);
}

#[test]
fn keep_sessions_keeps_denied_sessions() {
    check_sessions_of_alice(&["--threads", "1", "--keep-sessions"], &Change::RemoveAlice, true);
    check_sessions_of_alice(&["--threads", "2", "--keep-sessions"], &Change::DenyAlice, true);
}

#[test]
fn recheck_uses_connected_address_of_tunnel() {
    let hosts = "127.0.0.1 one.test\n127.0.0.3 three.test\n";
    enter_namespace!(hosts, "");
    let setup = Setup::new(&[]);
    let targets = ["127.0.0.1", "127.0.0.3"].map(|at| listener(ip(at)));
    let port = |n: usize| targets[n].1.port();
    let open = |n: usize, dst: &str| {
        let (client, _) = open_ok(&setup.server, ALICE, CONNECT, &format!("{dst}:{}", port(n)));
        (client, accept(&targets[n].0).0)
    };
    let denied = ["127.0.0.3", "three.test", "[::ffff:127.0.0.3]", "=127.0.0.3"].map(|dst| open(1, dst));
    let kept = ["127.0.0.1", "one.test", "[::ffff:127.0.0.1]"].map(|dst| open(0, dst));
    let (mut waiting_bind, _) = bind(&setup.server, ALICE, "127.0.0.3:0");
    assert!(setup.reload_rules("deny to=192.0.2.0/24\n").ends_with("sessions closed: 0"));
    let line = setup.reload_rules("deny to=127.0.0.3\n");
    assert!(line.ends_with("sessions closed: 5"), "{line}");
    for (mut client, mut target) in denied {
        assert!(is_reset(&mut client) && is_reset(&mut target));
    }
    assert_eq!(read_reply(&mut waiting_bind).0, 2);
    kept.into_iter().for_each(|(client, target)| assert_alive(LiveSession::Idle(client, target)));
    // A rule with a name closes the sessions that were requested by name.
    let (mut by_name, _target) = open(0, "one.test");
    let (by_address, target) = open(0, "127.0.0.1");
    let line = setup.reload_rules("deny to=.test\n");
    assert!(is_reset(&mut by_name), "{line}");
    assert_alive(LiveSession::Idle(by_address, target));
}

#[test]
fn waiting_bind_checks_peer_by_new_rules() {
    let hop = Server::start(&[]);
    for via in [&[][..], &["--via", &hop.addr().to_string()]] {
        let setup = Setup::new(via);
        let (mut client, bnd) = bind(&setup.server, ALICE, "0.0.0.0:0");
        // Other peers are still allowed, so BIND keeps waiting.
        assert!(setup.reload_rules("deny command=bind to=127.0.0.3\n").ends_with("sessions closed: 0"));
        assert_no_data(&client, Duration::from_millis(20));
        let mut denied = connect_from(addr("127.0.0.3:0"), bnd);
        if via.is_empty() {
            assert!(is_closed(&mut denied), "a peer that the new rules deny is accepted");
            assert_accepts_peer(&mut client, bnd, addr("127.0.0.2:0"));
        } else {
            assert_eq!(read_reply(&mut client).0, 2, "the rules of s5 do not apply to the peer that the hop accepts");
        }
    }
}

#[test]
fn reload_closes_sessions_by_client_address() {
    let setup = Setup::new(&[]);
    let dst = echo_server().to_string();
    let mut tunnels = ["127.0.0.2", "127.0.0.3"].map(|from| {
        let mut stream = log_in(setup.server.addr(), ip(from), ALICE);
        assert_eq!(send_request(&mut stream, CONNECT, &dst).0, 0);
        stream
    });
    let line = setup.reload_rules("deny from=127.0.0.2\n");
    assert!(line.ends_with("sessions closed: 1"), "{line}");
    assert!(is_reset(&mut tunnels[0]));
    ping(&mut tunnels[1], b"still open");
    // An allow with from= denies the other client.
    assert!(setup.reload_rules("allow from=127.0.0.2\n").ends_with("sessions closed: 1"));
    assert!(is_reset(&mut tunnels[1]));
}
