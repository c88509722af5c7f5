//! Upstream proxies of UDP associations: opened when needed, failing, closed, changed by a reload; and clients that
//! leave while a proxy is silent.

use super::tools::{Setup, assert_no_datagram, associate, associate_anonymously, request_for, udp_target};
use crate::udp::association::{Association, datagram_name, receive};
use crate::udp::bursts::while_stopped;
use crate::*;

/// Starts a server that uses a hop for 127.0.0.2 and for `.onion` names.
fn with_hop(hop: SocketAddr, more: &[&str]) -> Server {
    let args = ["--hop", &format!("h={hop}"), "--allow", "to=127.0.0.2,.onion via=h", "-v", "-v"];
    Server::start(&[&args, more].concat())
}

/// Sends to `dst` until an answer from there arrives. The hop may drop datagrams while it is not open.
pub(super) fn ping_until_answered(association: &Association, dst: SocketAddr) {
    association.socket.set_read_timeout(Some(Duration::from_millis(50))).expect("timeout set");
    wait_until("an answer arrives", TIMEOUT, || {
        association.send(dst, b"through the hop");
        retry(|| association.socket.recv_from(&mut [0; 64])).is_ok()
    });
    // Answers to earlier attempts.
    while retry(|| association.socket.recv_from(&mut [0; 64])).is_ok() {}
    association.socket.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
}

#[test]
fn udp_datagrams_on_other_routes_do_not_need_the_hop() {
    let silent = TcpListener::bind("127.0.0.1:0").expect("free port");
    let without_udp = tcp_server(V4, |mut stream| {
        let _ = stream.write_all(&[5, 0, 5, 7, 0, 1, 0, 0, 0, 0, 0, 0]);
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    });
    let (echo, (target, behind_hop)) = (udp_echo_server(V4), udp_target("127.0.0.2"));
    for (hop, error) in [
        (closed_port(), "connection refused"),
        (without_udp, "REP 7"),
        (silent.local_addr().expect("local address"), "timed out"),
    ] {
        let server = with_hop(hop, &["--connect-timeout", "500ms"]);
        let association = associate_anonymously(&server);
        association.ping(echo, b"first");
        association.send(behind_hop, b"dropped");
        association.send_raw(&datagram_name(0, "service.onion", 9, b"dropped"));
        association.ping(echo, b"second");
        let log = server.wait_log(|log| !steps(log, "hop").is_empty());
        let line = steps(&log, "hop")[0];
        assert!(line.contains(" hop=\"h\" ") && line.contains(error), "{line}");
        // Without the microseconds that have passed before.
        let limit = line.split("timed out after ").nth(1).and_then(|limit| limit.split("ms").next());
        assert!(limit.is_none_or(|limit| limit.parse::<u32>().is_ok()), "{line}");
        association.ping(echo, b"third");
        drop(association);
        let log = server.wait_log(|log| !session_lines(log).is_empty());
        assert!(steps(&log, "hop").last().is_some_and(|line| line.contains(" dropped=2 ")), "{log}");
        assert!(session_lines(&log)[0].contains(" up=16 down=16 "), "{log}");
    }
    assert_no_datagram(&target);
}

#[test]
fn udp_hop_is_tried_again_after_a_pause() {
    // No other process takes the port while the hop does not run.
    enter_namespace!("", "");
    let hop_addr = closed_port();
    let server = with_hop(hop_addr, &[]);
    let echo = udp_echo_server(V4);
    let behind_hop = udp_echo_server(addr("127.0.0.2:0").ip());
    let association = associate_anonymously(&server);
    // Many datagrams cause one attempt.
    for _ in 0..20 {
        association.send(behind_hop, b"dropped");
        association.ping(echo, b"direct");
    }
    assert!(server.log().matches("connection refused").count() <= 1, "{}", server.log());
    let hop = serve(&hop_addr.to_string(), 1, &[]);
    ping_until_answered(&association, behind_hop);
    // The hop closes its association, and is then opened again.
    drop(hop);
    server.wait_log(|log| log.contains("closed its association"));
    association.ping(echo, b"direct");
    let _hop = serve(&hop_addr.to_string(), 1, &[]);
    ping_until_answered(&association, behind_hop);
    association.ping(echo, b"direct");
}

#[test]
fn udp_datagrams_wait_in_limited_number_until_their_hop_is_open() {
    let hop = Server::start(&[]);
    let server = with_hop(hop.addr(), &[]);
    let (target, behind_hop) = udp_target("127.0.0.2");
    let echo = udp_echo_server(V4);
    let association = associate_anonymously(&server);
    while_stopped(&hop, || {
        for number in 0..100 {
            association.send(behind_hop, &[&[number][..], &[0; 999]].concat());
        }
        association.ping(echo, b"not delayed by the hop");
    });
    let numbers = std::iter::from_fn(|| {
        association.send(behind_hop, b"last");
        Some(receive(&target).0).filter(|data| data.len() == 1000).map(|data| data[0])
    });
    let numbers: Vec<u8> = numbers.collect();
    assert_eq!(numbers, (0..61).collect::<Vec<_>>(), "64 KiB wait");
}

#[test]
fn udp_reload_adds_and_removes_hops_of_an_association() {
    let hop = Server::start(&[]);
    let named = format!("h={}", hop.addr());
    let users = user_line("alice", "secret");
    let setup = Setup::start(&users, "# none\n", &["--hop", &named]);
    let association = associate(setup.server.addr(), V4, super::tools::ALICE);
    let (target, dst) = udp_target("127.0.0.2");
    association.send(dst, b"direct");
    let (_, direct) = receive(&target);
    assert!(setup.reload_rules("allow to=127.0.0.2 via=h\n").ends_with("sessions closed: 0"));
    association.send(dst, b"through the hop");
    let (data, by_hop) = receive(&target);
    assert_eq!((data.as_slice(), by_hop == direct), (&b"through the hop"[..], false));
    target.send_to(b"answer", by_hop).expect("datagram sent");
    assert_eq!(association.receive(), (dst, b"answer".to_vec()));
    // An association with a hop that the rules no longer use ends.
    assert!(setup.reload_rules("# none\n").ends_with("sessions closed: 0"));
    hop.wait_log(|log| log.contains("command=udp"));
    association.send(dst, b"direct again");
    assert_eq!(receive(&target), (b"direct again".to_vec(), direct));
}

/// Opens a session whose request waits for a silent hop, and checks that it ends when the client leaves.
fn assert_ends_with_client(server: &Server, silent: &TcpListener, send: &[u8]) {
    let before = idle_descriptors(server);
    for leave in [drop::<TcpStream>, reset] {
        let mut control = greet(server);
        control.write_all(send).expect("request sent");
        let (mut hop_end, _) = crate::support::accept(silent);
        leave(control);
        assert!(matches!(stream_end(&mut hop_end), StreamEnd::Reset | StreamEnd::Closed(_)));
        wait_until("all descriptors are closed", TIMEOUT, || server.descriptors() == before);
    }
    server.wait_log(|log| log.matches("client disconnected").count() >= 2);
}

#[test]
fn client_that_leaves_while_a_hop_is_silent_is_noticed() {
    let (silent, silent_addr) = listener(V4);
    let hop = silent_addr.to_string();
    let server = Server::start(&["--via", &hop, "--connect-timeout", "60"]);
    for command in [CONNECT, BIND, UDP_ASSOCIATE] {
        assert_ends_with_client(&server, &silent, &request_for(command, "127.0.0.1:0"));
    }
    // A hop that is opened for the first datagram.
    let server = with_hop(silent_addr, &["--connect-timeout", "60"]);
    let before = idle_descriptors(&server);
    let association = associate_anonymously(&server);
    association.send(addr("127.0.0.2:9"), b"waits");
    let (mut hop_end, _) = crate::support::accept(&silent);
    drop(association);
    assert!(matches!(stream_end(&mut hop_end), StreamEnd::Reset | StreamEnd::Closed(_)));
    wait_until("all descriptors are closed", TIMEOUT, || server.descriptors() == before);
}
