//! Bursts, which are relayed many datagrams at a time: all of them arrive, in order, each as it was sent.
//!
//! Each burst fits into the buffers of the sockets that it passes, so that UDP loses none of it.

use std::io::IoSlice;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::process::Command;

use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg};

use crate::association::{Association, assert_nothing, datagram, datagram_name, receive, socket, target};
use crate::common::{Server, TIMEOUT, in_namespace, is_installed, s5, temp_dir, wait_until};
use crate::kit::{V4, V6, session_lines};

/// Octets that tell datagrams apart: by number and by position.
fn payload(number: usize, length: usize) -> Vec<u8> {
    (0..length).map(|at| u8::try_from((number * 7 + at * 13 + at / 256) % 256).expect("an octet")).collect()
}

/// The lengths of the datagrams of a burst: of one length, and of several that end a run in each way there is.
fn lengths(burst: usize) -> Vec<Vec<usize>> {
    let mixed = [100, 100, 0, 0, 100, 40, 40, 100, 1200, 1200, 3, 1472, 1473, 0, 1];
    vec![
        vec![512; burst],
        vec![0; burst],
        (0..burst).map(|number| mixed[number % mixed.len()]).collect(),
        // Longer and longer, shorter and shorter.
        (0..burst).collect(),
        (0..burst).rev().collect(),
    ]
}

/// Does it while the server is stopped, so that it finds all of it at once.
fn at_once(server: &Server, what: impl FnOnce()) {
    server.signal("STOP");
    wait_until("the server is stopped", TIMEOUT, || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", server.pid())).expect("it runs");
        tasks.flatten().all(|task| {
            let status = std::fs::read_to_string(task.path().join("status")).expect("it runs");
            status.contains("State:\tT") || status.contains("State:\tt")
        })
    });
    what();
    server.signal("CONT");
}

/// Sends all of it through the association, and all of it back.
fn there_and_back(server: &Server, association: &Association, target: &UdpSocket, dst: SocketAddr, lengths: &[usize]) {
    let burst: Vec<Vec<u8>> = lengths.iter().enumerate().map(|(n, length)| payload(n, *length)).collect();
    at_once(server, || burst.iter().for_each(|data| association.send(dst, data)));
    let mut relay = None;
    for (number, data) in burst.iter().enumerate() {
        let (octets, from) = receive(target);
        assert!(octets == *data, "{number}. to the target: {} octets for {}", octets.len(), data.len());
        relay = Some(from);
    }
    let relay = relay.expect("a burst of some");
    at_once(server, || burst.iter().for_each(|data| target.send_to(data, relay).map(drop).expect("it is sent")));
    for (number, data) in burst.iter().enumerate() {
        let (from, octets) = association.receive();
        assert_eq!(from, dst);
        assert!(octets == *data, "{number}. to the client: {} octets for {}", octets.len(), data.len());
    }
}

#[test]
fn bursts_of_all_sizes_pass_both_ways_in_order() {
    let server = Server::start(&[]);
    for ip in [V4, V6] {
        let target = socket(ip);
        let dst = target.local_addr().expect("an address");
        let association = Association::new(&server);
        for burst in [1, 2, 3, 16, 31, 32, 33, 64, 65, 100] {
            for lengths in lengths(burst) {
                there_and_back(&server, &association, &target, dst, &lengths);
            }
        }
    }
}

#[test]
fn a_burst_of_large_datagrams_passes() {
    let server = Server::start(&[]);
    let (target, dst) = target();
    let association = Association::new(&server);
    // One, two and three of these are as much as goes at once, or more.
    for length in [21_825, 21_836, 32_700, 32_753, 32_754, 65_497] {
        there_and_back(&server, &association, &target, dst, &[length; 5]);
    }
}

#[test]
fn targets_in_turn_are_told_apart() {
    let server = Server::start(&[]);
    let targets = [target(), target(), target()];
    let association = Association::new(&server);
    let order = [0, 0, 1, 0, 2, 2, 2, 1, 1, 0];
    at_once(&server, || {
        for (number, to) in order.into_iter().cycle().take(100).enumerate() {
            association.send(targets[to].1, &payload(number, 200));
        }
    });
    let mut relay = None;
    for (number, to) in order.into_iter().cycle().take(100).enumerate() {
        let (octets, from) = receive(&targets[to].0);
        assert!(octets == payload(number, 200), "{number}.");
        relay = Some(from);
    }
    at_once(&server, || {
        for (number, by) in order.into_iter().cycle().take(100).enumerate() {
            targets[by].0.send_to(&payload(number, 300), relay.expect("it is known")).expect("it is sent");
        }
    });
    for (number, by) in order.into_iter().cycle().take(100).enumerate() {
        assert!(association.receive() == (targets[by].1, payload(number, 300)), "{number}.");
    }
}

#[test]
fn what_is_not_ordinary_keeps_its_place_in_a_burst() {
    let server = Server::start(&[]);
    let (target, dst) = target();
    let association = Association::new(&server);
    // What is looked up once is known.
    association.send_raw(&datagram_name(0, "127.0.0.1", dst.port(), b"known"));
    assert_eq!(receive(&target).0, b"known");
    let mut sent = Vec::new();
    for round in 0..10_u8 {
        sent.extend([
            datagram(0, dst, &[round, 0]),
            datagram(0, dst, &[round, 1]),
            // An address sent as a name goes the way of the names.
            datagram_name(0, "127.0.0.1", dst.port(), &[round, 2]),
            datagram(0, dst, &[round, 3]),
            datagram(1, dst, &[round]),
            datagram(0x82, dst, &[4]),
            datagram(0, dst, &[round, 5]),
        ]);
    }
    at_once(&server, || sent.iter().for_each(|octets| association.send_raw(octets)));
    for data in (0..10).flat_map(|round| (0..=5).map(move |number| [round, number])) {
        assert_eq!(receive(&target).0, data);
    }
}

/// Sends these as one, which the kernel hands on as one to whoever takes aggregates.
fn send_aggregate(socket: &UdpSocket, to: SocketAddr, octets: &[u8], stride: u16) {
    let to = SockaddrStorage::from(to);
    let control = [ControlMessage::UdpGsoSegments(&stride)];
    sendmsg(socket.as_raw_fd(), &[IoSlice::new(octets)], &control, MsgFlags::empty(), Some(&to)).expect("it is sent");
}

#[test]
fn an_aggregate_is_split_where_its_datagrams_end() {
    let server = Server::start(&[]);
    let (target, dst) = target();
    let association = Association::new(&server);
    // The server takes aggregates on a socket where several datagrams have been at once.
    for _ in 0..5 {
        there_and_back(&server, &association, &target, dst, &[64; 40]);
    }
    let aggregates = [(64, 500, 500), (40, 1200, 7), (3, 100, 1), (2, 30_000, 20_000), (1, 700, 700)];
    // Again and again, since what comes alone is received in another way after a while.
    for (count, length, last) in aggregates.into_iter().cycle().take(20) {
        let lengths: Vec<usize> = (1..=count).map(|number| if number == count { last } else { length }).collect();
        let payloads: Vec<Vec<u8>> = lengths.iter().enumerate().map(|(n, length)| payload(n, *length)).collect();
        let datagrams: Vec<u8> = payloads.iter().flat_map(|data| datagram(0, dst, data)).collect();
        let stride = u16::try_from(length).expect("short");
        send_aggregate(&association.socket, association.bnd, &datagrams, stride + 10);
        let mut relay = None;
        for data in &payloads {
            let (octets, from) = receive(&target);
            assert!(octets == *data, "{} octets for {}, of {count}", octets.len(), data.len());
            relay = Some(from);
        }
        send_aggregate(&target, relay.expect("it is known"), &payloads.concat(), stride);
        for data in &payloads {
            assert!(association.receive() == (dst, data.clone()), "{} octets, of {count}", data.len());
        }
    }
}

#[test]
fn each_datagram_of_a_burst_is_judged_by_itself() {
    let server = Server::start(&[]);
    let (target, dst) = target();
    let association = Association::new(&server);
    let stranger = socket(V4);
    let stray = socket("127.0.0.3".parse().expect("an address"));
    at_once(&server, || {
        for number in 0..20 {
            association.send(dst, &[number]);
            // Which port is the client's is not decided yet, so that both wait in the socket.
            stranger.send_to(&datagram(0, dst, b"stranger"), association.bnd).expect("it is sent");
            association.send_raw(&[0, 0, 0, 1, 127]);
            association.send(SocketAddr::new(V4, 0), b"port 0");
            association.send("224.0.0.1:9".parse().expect("an address"), b"multicast");
        }
    });
    let mut relay = None;
    for number in 0..20 {
        let (octets, from) = receive(&target);
        assert_eq!(octets, [number]);
        relay = Some(from);
    }
    assert_nothing(&target);
    let relay = relay.expect("it is known");
    at_once(&server, || {
        for number in 0..20 {
            target.send_to(&[number], relay).expect("it is sent");
            stray.send_to(b"nobody asked", relay).expect("it is sent");
        }
    });
    for number in 0..20 {
        assert_eq!(association.receive(), (dst, vec![number]));
    }
    assert_nothing(&association.socket);
    assert_nothing(&stranger);
}

#[test]
fn what_went_is_counted_by_its_payload() {
    let server = Server::start(&[]);
    let (target, dst) = target();
    let association = Association::new(&server);
    let lengths = [100, 100, 100, 40, 1200, 1200, 0];
    for _ in 0..10 {
        there_and_back(&server, &association, &target, dst, &lengths);
    }
    drop(association);
    wait_until("the session is logged", TIMEOUT, || !session_lines(&server.log()).is_empty());
    let log = server.log();
    let line = session_lines(&log)[0];
    assert!(line.contains(" up=27400 down=27400 "), "{line}");
}

#[test]
fn datagrams_longer_than_the_mtu_pass() {
    if !in_namespace("bursts::datagrams_longer_than_the_mtu_pass", "", "") {
        return;
    }
    let mtu = Command::new("ip").args(["link", "set", "lo", "mtu", "1500"]).status().expect("ip runs");
    assert!(mtu.success());
    let server = Server::start(&[]);
    let (target, dst) = target();
    let association = Association::new(&server);
    // At 1462 and 1472 the header of SOCKS and of IP make up a packet; what follows is refused as a run, or fragmented.
    for _ in 0..2 {
        for length in [1200, 1462, 1463, 1472, 1473, 8000, 1200, 1472, 1473] {
            there_and_back(&server, &association, &target, dst, &[length; 20]);
        }
    }
}

#[test]
fn a_peer_that_is_gone_for_a_moment_costs_nothing_later() {
    // Where nobody else takes the port meanwhile.
    if !in_namespace("bursts::a_peer_that_is_gone_for_a_moment_costs_nothing_later", "", "") {
        return;
    }
    let server = Server::start(&[]);
    let (target, dst) = target();
    let association = Association::new(&server);
    let lengths = [200; 40];
    there_and_back(&server, &association, &target, dst, &lengths);
    let relay = {
        association.send(dst, b"where are you?");
        receive(&target).1
    };
    // The client's port is closed while answers come: its ICMP messages are errors on the socket of the relay.
    let addr = association.socket.local_addr().expect("an address");
    let Association { control, socket: closed, bnd } = association;
    drop(closed);
    for number in 0..100 {
        target.send_to(&payload(number, 100), relay).expect("it is sent");
    }
    let socket = UdpSocket::bind(addr).expect("the port is ours again");
    socket.set_read_timeout(Some(TIMEOUT)).expect("a timeout can be set");
    // Answers that were still under way come first.
    target.send_to(b"mark", relay).expect("it is sent");
    while !receive(&socket).0.ends_with(b"mark") {}
    let association = Association { control, socket, bnd };
    for _ in 0..3 {
        there_and_back(&server, &association, &target, dst, &lengths);
    }
}

#[test]
fn a_device_that_can_not_segment_is_asked_once() {
    if !is_installed("strace") {
        return;
    }
    let folder = temp_dir();
    let trace = folder.path().join("trace");
    let mut strace = Command::new("strace");
    strace.args(["-D", "-f", "-qq", "-e", "trace=sendmsg", "-e", "inject=sendmsg:error=EIO", "-o"]).arg(&trace);
    strace.arg(s5().get_program()).args(["serve", "--listen", "127.0.0.1:0"]);
    let server = Server::start_with(&mut strace, 1);
    let (target, dst) = target();
    let association = Association::new(&server);
    for _ in 0..10 {
        there_and_back(&server, &association, &target, dst, &[300; 50]);
    }
    let asked = std::fs::read_to_string(&trace).expect("a file").matches("sendmsg").count();
    // Once by the socket towards targets; twice by the one towards the client, whose first error may be ICMP's.
    assert_eq!(asked, 3);
}
