//! What a tunnel carries: octets, half-closes, resets, and nothing for ever.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{Server, TIMEOUT, echo_server, is_installed, open, s5, tcp_server, temp_dir, wait_until};
use crate::kit::{
    CONNECT, StreamEnd, V4, V6, accept, check_pattern, idle_descriptors, listener, ping, reset, resident_kib,
    send_pattern, session_lines, stream_end,
};

/// A tunnel: the server, the client's end and the target's.
fn tunnel(args: &[&str]) -> (Server, TcpStream, TcpStream) {
    let server = Server::start(args);
    let (client, target) = through(&server, V4);
    (server, client, target)
}

fn through(server: &Server, ip: std::net::IpAddr) -> (TcpStream, TcpStream) {
    let (target, dst) = listener(ip);
    let (client, rep, _) = open(server, CONNECT, dst);
    assert_eq!(rep, 0);
    (client, accept(&target).0)
}

#[test]
fn the_client_may_end_its_side_first() {
    let server = Server::start(&[]);
    for ip in [V4, V6] {
        let (mut client, mut target) = through(&server, ip);
        client.write_all(b"question").expect("it is sent");
        client.shutdown(Shutdown::Write).expect("half-close");
        assert_eq!(stream_end(&mut target), StreamEnd::Closed(b"question".to_vec()));
        target.write_all(b"answer").expect("the other way is open");
        drop(target);
        assert_eq!(stream_end(&mut client), StreamEnd::Closed(b"answer".to_vec()));
    }
}

#[test]
fn the_target_may_end_its_side_first() {
    let (server, mut client, mut target) = tunnel(&[]);
    target.write_all(b"bye").expect("it is sent");
    target.shutdown(Shutdown::Write).expect("half-close");
    assert_eq!(stream_end(&mut client), StreamEnd::Closed(b"bye".to_vec()));
    client.write_all(b"still here").expect("the other way is open");
    client.shutdown(Shutdown::Write).expect("half-close");
    assert_eq!(stream_end(&mut target), StreamEnd::Closed(b"still here".to_vec()));
    let log = server.wait_log(|log| !session_lines(log).is_empty());
    assert!(log.contains("up=10 down=3 "), "{log}");
    assert!(!log.contains("error="), "{log}");
}

#[test]
fn a_reset_of_either_side_is_a_reset_for_the_other() {
    let server = Server::start(&[]);
    let before = idle_descriptors(&server);
    let (client, mut target) = through(&server, V4);
    reset(client);
    assert_eq!(stream_end(&mut target), StreamEnd::Reset);
    let (mut client, target) = through(&server, V6);
    reset(target);
    assert_eq!(stream_end(&mut client), StreamEnd::Reset);
    wait_until("all is closed", TIMEOUT, || server.descriptors() == before);
}

#[test]
fn a_reset_after_a_half_close_is_still_a_reset() {
    let (_server, client, mut target) = tunnel(&[]);
    client.shutdown(Shutdown::Write).expect("half-close");
    assert_eq!(stream_end(&mut target), StreamEnd::Closed(vec![]));
    reset(client);
    // Only who writes or waits hears of it.
    wait_until("the target is cut off", TIMEOUT, || target.write_all(b"x").is_err());
}

#[test]
fn a_side_that_has_said_all_and_resets_ends_the_tunnel_while_the_other_is_silent() {
    for client_resets in [true, false] {
        let (server, client, target) = tunnel(&[]);
        let (first, mut other) = if client_resets { (client, target) } else { (target, client) };
        first.shutdown(Shutdown::Write).expect("half-close");
        assert_eq!(stream_end(&mut other), StreamEnd::Closed(vec![]));
        let open = server.descriptors();
        reset(first);
        wait_until("it is noticed", TIMEOUT, || server.descriptors() < open);
        // A client is given time to take what it was sent, unless it leaves.
        drop(other);
        let log = server.wait_log(|log| !session_lines(log).is_empty());
        assert!(log.contains("connection reset"), "{log}");
    }
}

#[test]
fn what_the_target_sent_before_it_closed_arrives_although_the_client_keeps_sending() {
    const TOTAL: usize = 1 << 20;
    let (_server, mut client, mut target) = tunnel(&[]);
    let mut sender = client.try_clone().expect("a second handle");
    thread::spawn(move || while sender.write_all(&[0; 1024]).is_ok() {});
    // Closing with unread octets resets; what was sent and acknowledged before must not be lost by that.
    send_pattern(&mut target, TOTAL, |_| {});
    target.shutdown(Shutdown::Write).expect("half-close");
    check_pattern(&mut client, TOTAL);
}

#[test]
fn a_client_that_resets_ends_the_tunnel_also_while_the_target_takes_nothing() {
    let (server, mut client, target) = tunnel(&[]);
    client.set_nonblocking(true).expect("non-blocking");
    let mut last = Instant::now();
    wait_until("the client is held back", TIMEOUT, || {
        while client.write(&[0; 65_536]).is_ok() {
            last = Instant::now();
        }
        last.elapsed() > Duration::from_millis(250)
    });
    reset(client);
    let log = server.wait_log(|log| !session_lines(log).is_empty());
    assert!(log.contains("error=\"reading from the client: connection reset\""), "{log}");
    drop(target);
}

#[test]
fn a_slow_client_gets_all_of_what_a_target_said_that_no_longer_listens() {
    slow_client(false);
}

#[test]
fn a_slow_client_that_has_said_all_gets_the_answer_of_a_target_that_did_not_listen() {
    slow_client(true);
}

fn slow_client(has_said_all: bool) {
    const TOTAL: usize = 512 << 10;
    let (_server, mut client, mut target) = tunnel(&[]);
    // Little fits into its own buffer, so that the rest is on the way when the target is gone.
    socket2::SockRef::from(&client).set_recv_buffer_size(65_536).expect("an option");
    // As an HTTP server answers 413: it says why, ends its side, and closes with the upload unread.
    client.write_all(&[0; 4096]).expect("an upload begins");
    send_pattern(&mut target, TOTAL, |_| {});
    target.shutdown(Shutdown::Write).expect("half-close");
    wait_until("all of it has left the target", TIMEOUT, || state_of(&target) == Some("05".into()));
    drop(target);
    // The first octets are answered with a reset, the next ones meet it; a client hears of neither before the end.
    if has_said_all {
        client.shutdown(Shutdown::Write).expect("half-close");
    }
    for _ in 0..20 {
        if !has_said_all {
            client.write_all(&[0; 1024]).expect("the upload goes on");
        }
        thread::sleep(Duration::from_millis(5));
    }
    check_pattern(&mut client, TOTAL);
}

#[test]
fn an_upload_that_the_target_no_longer_takes_is_cut_and_not_swallowed() {
    let (server, mut client, mut target) = tunnel(&[]);
    target.write_all(b"bye").expect("it is sent");
    drop(target);
    client.set_write_timeout(Some(TIMEOUT)).expect("a timeout can be set");
    let mut sent = 0_usize;
    while sent < 256 << 20 && client.write_all(&[0; 65_536]).is_ok() {
        sent += 65_536;
    }
    assert!(sent < 256 << 20, "{sent} octets went nowhere, and nobody said so");
    let log = server.wait_log(|log| !session_lines(log).is_empty());
    assert!(log.contains("error=\"writing to dst"), "{log}");
}

/// The state of a connection as /proc/net/tcp has it: 05 is FIN_WAIT2, when the other side has acknowledged the FIN.
fn state_of(stream: &TcpStream) -> Option<String> {
    let hex = |addr: SocketAddr| match addr.ip() {
        std::net::IpAddr::V4(ip) => format!("{:08X}:{:04X}", u32::from_ne_bytes(ip.octets()), addr.port()),
        std::net::IpAddr::V6(_) => panic!("not in /proc/net/tcp"),
    };
    let [local, peer] = [stream.local_addr(), stream.peer_addr()].map(|addr| hex(addr.expect("an address")));
    let table = std::fs::read_to_string("/proc/net/tcp").expect("/proc");
    let fields = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let ours = |fields: &Vec<&str>| fields.len() > 3 && fields[1] == local && fields[2] == peer;
    fields.into_iter().find(ours).map(|fields| fields[3].to_owned())
}

#[test]
fn a_gibibyte_arrives_whole_each_way_at_once() {
    const TOTAL: usize = 1 << 30;
    let (_server, mut client, mut target) = tunnel(&[]);
    let ends = [&client, &target].map(|end| end.try_clone().expect("a second handle"));
    let senders = ends.map(|mut end| {
        thread::spawn(move || {
            send_pattern(&mut end, TOTAL, |_| {});
            end.shutdown(Shutdown::Write).expect("half-close");
        })
    });
    let up = thread::spawn(move || check_pattern(&mut target, TOTAL));
    check_pattern(&mut client, TOTAL);
    up.join().expect("up is whole");
    for sender in senders {
        sender.join().expect("all is sent");
    }
}

#[test]
fn a_stalled_reader_loses_nothing_and_costs_no_memory() {
    const TOTAL: usize = 128 << 20;
    let server = Server::start(&[]);
    for client_stalls in [true, false] {
        let (client, target) = through(&server, V4);
        let (mut reader, mut sender) = if client_stalls { (client, target) } else { (target, client) };
        let before = resident_kib(&server);
        let sent = Arc::new(AtomicUsize::new(0));
        let count = sent.clone();
        let sending = thread::spawn(move || {
            send_pattern(&mut sender, TOTAL, |n| {
                count.fetch_add(n, Ordering::Relaxed);
            });
        });
        let mut last = (0, Instant::now());
        wait_until("the sender is held back", TIMEOUT, || {
            let now = sent.load(Ordering::Relaxed);
            if now != last.0 {
                last = (now, Instant::now());
            }
            now > 0 && last.1.elapsed() > Duration::from_millis(250)
        });
        assert!(last.0 < TOTAL, "somebody has taken it all");
        // Two directions of 64 KiB, and what the allocator makes of that.
        let grown = resident_kib(&server).saturating_sub(before);
        assert!(grown < 2048, "{grown} KiB");
        check_pattern(&mut reader, TOTAL);
        sending.join().expect("all is sent");
    }
}

#[test]
fn a_tunnel_without_a_word_is_reset_after_the_idle_timeout_and_a_busy_one_is_not() {
    let server = Server::start(&["--idle-timeout", "1s"]);
    let (mut client, mut target) = through(&server, V4);
    let (mut busy, rep, _) = open(&server, CONNECT, echo_server());
    assert_eq!(rep, 0);
    let started = Instant::now();
    while started.elapsed() < Duration::from_millis(1800) {
        ping(&mut busy, b"x");
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(stream_end(&mut client), StreamEnd::Reset);
    assert_eq!(stream_end(&mut target), StreamEnd::Reset);
    ping(&mut busy, b"still here");
    assert!(server.wait_log(|log| !session_lines(log).is_empty()).contains("idle for too long"));
}

#[test]
fn traffic_one_way_keeps_a_tunnel_open() {
    let (_server, mut client, mut target) = tunnel(&["--idle-timeout", "1s"]);
    let started = Instant::now();
    while started.elapsed() < Duration::from_millis(1500) {
        target.write_all(b"x").expect("it is sent");
        client.read_exact(&mut [0]).expect("it comes");
        thread::sleep(Duration::from_millis(20));
    }
    client.write_all(b"y").expect("the other way is open as well");
    target.read_exact(&mut [0]).expect("it comes");
}

#[test]
fn both_sockets_of_a_tunnel_have_nodelay_and_keepalive() {
    if !is_installed("strace") {
        return;
    }
    let folder = temp_dir();
    let trace = folder.path().join("trace");
    // -D: the server is the child, so that killing it ends both.
    let mut command = std::process::Command::new("strace");
    command.args(["-D", "-f", "-qq", "-e", "trace=setsockopt", "-o"]).arg(&trace);
    command.arg(s5().get_program()).args(["serve", "--listen", "127.0.0.1:0"]);
    let server = Server::start_with(&mut command, 1);
    let (_client, rep, _) = open(&server, CONNECT, echo_server());
    assert_eq!(rep, 0);
    let set = |option: &str| {
        let trace = std::fs::read_to_string(&trace).expect("the trace");
        let lines = trace.lines().filter(|line| line.contains(&format!("{option}, [1]")));
        let sockets: Vec<String> =
            lines.filter_map(|line| Some(line.split_once('(')?.1.split_once(',')?.0.into())).collect();
        sockets
    };
    wait_until("the trace is written", TIMEOUT, || set("TCP_NODELAY").len() >= 2 && set("SO_KEEPALIVE").len() >= 2);
    let (nodelay, keepalive) = (set("TCP_NODELAY"), set("SO_KEEPALIVE"));
    assert_ne!(nodelay[0], nodelay[1]);
    assert_eq!(nodelay, keepalive);
}

#[test]
fn many_tunnels_that_end_in_every_way_leave_nothing_behind() {
    let server = Server::start(&[]);
    let before = idle_descriptors(&server);
    let dst: SocketAddr = tcp_server(V4, |mut stream| {
        let mut octet = [0];
        let _ = stream.read_exact(&mut octet);
        match octet[0] {
            0 => reset(stream),
            1 => drop(stream),
            _ => while stream.read(&mut [0; 64]).is_ok_and(|n| n > 0) {},
        }
    });
    for round in 0..60 {
        let (mut stream, rep, _) = open(&server, CONNECT, dst);
        assert_eq!(rep, 0);
        stream.write_all(&[round % 4]).expect("it is sent");
        match round % 4 {
            2 => reset(stream),
            _ => drop(stream),
        }
    }
    wait_until("all is closed", TIMEOUT, || server.descriptors() == before);
    server.wait_log(|log| log.matches("command=connect").count() == 60);
}
