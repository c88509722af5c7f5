//! Bursts of datagrams, which are relayed in batches: all datagrams arrive, in order and unchanged.
//!
//! Each burst fits into the socket buffers, so that UDP loses no datagram.

use std::io::IoSlice;

use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg};

use super::association::{
    Association, assert_nothing_arrives, datagram, datagram_name, receive, relayed, socket, target,
};
use crate::*;

/// Returns a payload of bytes that depend on number and position.
fn payload(number: usize, length: usize) -> Vec<u8> {
    (0..length).map(|at| u8::try_from((number * 7 + at * 13 + at / 256) % 256).expect("at most 255")).collect()
}

/// Lengths of the datagrams of several bursts: equal, and mixed so that batches end for each possible reason.
fn lengths(burst: usize) -> Vec<Vec<usize>> {
    let mixed = [100, 100, 0, 0, 100, 40, 40, 100, 1200, 1200, 3, 1472, 1473, 0, 1];
    vec![
        vec![512; burst],
        vec![0; burst],
        (0..burst).map(|number| mixed[number % mixed.len()]).collect(),
        // Increasing and decreasing.
        (0..burst).collect(),
        (0..burst).rev().collect(),
    ]
}

/// Runs `send` while the server is stopped, so that it receives all datagrams as one burst.
pub fn while_stopped(server: &Server, send: impl FnOnce()) {
    server.signal("STOP");
    wait_until("the server is stopped", TIMEOUT, || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", server.pid())).expect("the server runs");
        tasks.flatten().all(|task| {
            // A thread that has ended meanwhile has no status.
            let status = std::fs::read_to_string(task.path().join("status"));
            status.is_ok_and(|status| status.contains("State:\tT") || status.contains("State:\tt"))
        })
    });
    send();
    server.signal("CONT");
}

/// Sends a burst of these lengths through the association to the target, and back.
fn echo_burst(server: &Server, association: &Association, target: &UdpSocket, dst: SocketAddr, lengths: &[usize]) {
    let burst: Vec<Vec<u8>> = lengths.iter().enumerate().map(|(n, length)| payload(n, *length)).collect();
    while_stopped(server, || burst.iter().for_each(|data| association.send(dst, data)));
    let mut egress = None;
    for (number, data) in burst.iter().enumerate() {
        let (bytes, from) = receive(target);
        assert!(bytes == *data, "to the target, {number}: {} bytes, expected {}", bytes.len(), data.len());
        egress = Some(from);
    }
    let egress = egress.expect("at least one datagram");
    while_stopped(server, || {
        burst.iter().for_each(|data| target.send_to(data, egress).map(drop).expect("datagram sent"))
    });
    for (number, data) in burst.iter().enumerate() {
        let (from, bytes) = association.receive();
        assert_eq!(from, dst);
        assert!(bytes == *data, "to the client, {number}: {} bytes, expected {}", bytes.len(), data.len());
    }
}

#[test]
fn udp_bursts_of_all_sizes_arrive_in_order_in_both_directions() {
    let server = Server::start(&[]);
    for ip in [V4, V6] {
        let target = socket(ip);
        let dst = target.local_addr().expect("local address");
        let association = Association::new(&server);
        // After several single datagrams, the server uses another system call to receive.
        for burst in [1, 1, 1, 1, 2, 3, 16, 31, 32, 33, 64, 65, 100] {
            for lengths in lengths(burst) {
                echo_burst(&server, &association, &target, dst, &lengths);
            }
        }
    }
}

#[test]
fn udp_burst_of_large_datagrams_arrives() {
    let (server, association, target, dst) = relayed();
    // One to three of these datagrams fill a GSO batch exactly, or exceed it.
    for length in [21_825, 21_836, 32_700, 32_753, 32_754, 65_497] {
        echo_burst(&server, &association, &target, dst, &[length; 5]);
    }
}

#[test]
fn udp_burst_to_alternating_targets_reaches_each_target() {
    let server = Server::start(&[]);
    let targets = [target(), target(), target()];
    let association = Association::new(&server);
    let order = [0, 0, 1, 0, 2, 2, 2, 1, 1, 0];
    while_stopped(&server, || {
        for (number, to) in order.into_iter().cycle().take(100).enumerate() {
            association.send(targets[to].1, &payload(number, 200));
        }
    });
    let mut egress = None;
    for (number, to) in order.into_iter().cycle().take(100).enumerate() {
        let (bytes, from) = receive(&targets[to].0);
        assert!(bytes == payload(number, 200), "datagram {number}");
        egress = Some(from);
    }
    while_stopped(&server, || {
        for (number, by) in order.into_iter().cycle().take(100).enumerate() {
            targets[by]
                .0
                .send_to(&payload(number, 300), egress.expect("at least one datagram"))
                .expect("datagram sent");
        }
    });
    for (number, by) in order.into_iter().cycle().take(100).enumerate() {
        assert!(association.receive() == (targets[by].1, payload(number, 300)), "datagram {number}");
    }
}

#[test]
fn udp_burst_keeps_the_order_of_names_and_fragments() {
    let (server, association, target, dst) = relayed();
    // Later datagrams to the name need no lookup.
    association.send_raw(&datagram_name(0, "127.0.0.1", dst.port(), b"resolve"));
    assert_eq!(receive(&target).0, b"resolve");
    let mut sent = Vec::new();
    for round in 0..10_u8 {
        sent.extend([
            datagram(0, dst, &[round, 0]),
            datagram(0, dst, &[round, 1]),
            // An address that is sent as a name.
            datagram_name(0, "127.0.0.1", dst.port(), &[round, 2]),
            datagram(0, dst, &[round, 3]),
            datagram(1, dst, &[round]),
            datagram(0x82, dst, &[4]),
            datagram(0, dst, &[round, 5]),
        ]);
    }
    while_stopped(&server, || sent.iter().for_each(|bytes| association.send_raw(bytes)));
    for data in (0..10).flat_map(|round| (0..=5).map(move |number| [round, number])) {
        assert_eq!(receive(&target).0, data);
    }
}

/// Sends `bytes` with GSO. A local socket with GRO receives them as one aggregate.
fn send_gso(socket: &UdpSocket, to: SocketAddr, bytes: &[u8], segment_len: u16) {
    let to = SockaddrStorage::from(to);
    let control = [ControlMessage::UdpGsoSegments(&segment_len)];
    sendmsg(socket.as_raw_fd(), &[IoSlice::new(bytes)], &control, MsgFlags::empty(), Some(&to)).expect("datagram sent");
}

#[test]
fn udp_gro_aggregate_is_split_into_its_datagrams() {
    let (server, association, target, dst) = relayed();
    // The server enables GRO on a socket after it has received several datagrams with one call.
    for _ in 0..5 {
        echo_burst(&server, &association, &target, dst, &[64; 40]);
    }
    let aggregates = [(64, 500, 500), (40, 1200, 7), (3, 100, 1), (2, 30_000, 20_000), (1, 700, 700)];
    // Repeated, because the server changes the system call after several single messages.
    for (count, length, last) in aggregates.into_iter().cycle().take(20) {
        let lengths: Vec<usize> = (1..=count).map(|number| if number == count { last } else { length }).collect();
        let payloads: Vec<Vec<u8>> = lengths.iter().enumerate().map(|(n, length)| payload(n, *length)).collect();
        let datagrams: Vec<u8> = payloads.iter().flat_map(|data| datagram(0, dst, data)).collect();
        let segment_len = u16::try_from(length).expect("at most 65535");
        send_gso(&association.socket, association.bnd, &datagrams, segment_len + 10);
        let mut egress = None;
        for data in &payloads {
            let (bytes, from) = receive(&target);
            assert!(bytes == *data, "{} bytes, expected {}, of {count}", bytes.len(), data.len());
            egress = Some(from);
        }
        send_gso(&target, egress.expect("at least one datagram"), &payloads.concat(), segment_len);
        for data in &payloads {
            assert!(association.receive() == (dst, data.clone()), "{} bytes, of {count}", data.len());
        }
    }
}

#[test]
fn udp_burst_is_filtered_per_datagram() {
    let (server, association, target, dst) = relayed();
    let other = socket(V4);
    let unknown_sender = socket("127.0.0.3".parse().expect("valid address"));
    while_stopped(&server, || {
        for number in 0..20 {
            association.send(dst, &[number]);
            // The client's port is not set yet, so the server's socket receives datagrams of both ports.
            other.send_to(&datagram(0, dst, b"other"), association.bnd).expect("datagram sent");
            association.send_raw(&[0, 0, 0, 1, 127]);
            association.send(SocketAddr::new(V4, 0), b"port 0");
            association.send("224.0.0.1:9".parse().expect("valid address"), b"multicast");
        }
    });
    let mut egress = None;
    for number in 0..20 {
        let (bytes, from) = receive(&target);
        assert_eq!(bytes, [number]);
        egress = Some(from);
    }
    assert_nothing_arrives(&target);
    let egress = egress.expect("at least one datagram");
    while_stopped(&server, || {
        for number in 0..20 {
            target.send_to(&[number], egress).expect("datagram sent");
            unknown_sender.send_to(b"unsolicited", egress).expect("datagram sent");
        }
    });
    for number in 0..20 {
        assert_eq!(association.receive(), (dst, vec![number]));
    }
    assert_nothing_arrives(&association.socket);
    assert_nothing_arrives(&other);
}

#[test]
fn udp_session_log_counts_payload_bytes() {
    let (server, association, target, dst) = relayed();
    let lengths = [100, 100, 100, 40, 1200, 1200, 0];
    for _ in 0..10 {
        echo_burst(&server, &association, &target, dst, &lengths);
    }
    drop(association);
    wait_until("the session is logged", TIMEOUT, || !session_lines(&server.log()).is_empty());
    let log = server.log();
    let line = session_lines(&log)[0];
    assert!(line.contains(" up=27400 down=27400 "), "{line}");
}

#[test]
fn udp_bursts_of_datagrams_above_the_mtu_arrive() {
    enter_namespace!("", "");
    let mtu = Command::new("ip").args(["link", "set", "lo", "mtu", "1500"]).status().expect("ip runs");
    assert!(mtu.success());
    let (server, association, target, dst) = relayed();
    // A packet holds 1472 bytes, or 1462 bytes with the SOCKS header. Longer datagrams can't be sent with GSO, or are
    // fragmented.
    for _ in 0..2 {
        for length in [1200, 1462, 1463, 1472, 1473, 8000, 1200, 1472, 1473] {
            echo_burst(&server, &association, &target, dst, &[length; 20]);
        }
    }
}

#[test]
fn udp_bursts_arrive_after_icmp_errors() {
    // In a namespace, so that no other process can bind the port while it is closed.
    enter_namespace!("", "");
    let (server, association, target, dst) = relayed();
    let lengths = [200; 40];
    echo_burst(&server, &association, &target, dst, &lengths);
    let egress = {
        association.send(dst, b"find the egress address");
        receive(&target).1
    };
    // The client's port is closed while answers arrive. The ICMP messages are errors on the server's socket.
    let addr = association.socket.local_addr().expect("local address");
    let Association { control, socket: closed, bnd } = association;
    drop(closed);
    for number in 0..100 {
        target.send_to(&payload(number, 100), egress).expect("datagram sent");
    }
    let socket = UdpSocket::bind(addr).expect("free port");
    socket.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    // Answers that were still queued arrive first.
    target.send_to(b"marker", egress).expect("datagram sent");
    while !receive(&socket).0.ends_with(b"marker") {}
    let association = Association { control, socket, bnd };
    for _ in 0..3 {
        echo_burst(&server, &association, &target, dst, &lengths);
    }
}

#[test]
fn udp_gso_is_not_retried_after_eio() {
    if !is_installed("strace") {
        return;
    }
    let dir = temp_dir();
    let trace = dir.path().join("trace");
    let mut strace = Command::new("strace");
    strace.args(["-D", "-f", "-qq", "-e", "trace=sendmsg", "-e", "inject=sendmsg:error=EIO", "-o"]).arg(&trace);
    strace.arg(s5().get_program()).args(["serve", "--listen", "127.0.0.1:0"]);
    let server = Server::start_with(&mut strace, 1);
    let (target, dst) = target();
    let association = Association::new(&server);
    for _ in 0..10 {
        echo_burst(&server, &association, &target, dst, &[300; 50]);
    }
    let gso_calls = std::fs::read_to_string(&trace).expect("file read").matches("sendmsg").count();
    // One call on the socket to the target. Two calls on the client's socket, since its first error may be an ICMP
    // message.
    assert_eq!(gso_calls, 3);
}
