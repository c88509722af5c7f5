//! Relaying of datagrams in both directions: names, large answers, many targets and associations. tests/wire has all
//! address types and sizes.

use super::association::{Association, datagram_name, receive, relayed, socket, target};
use super::bursts::while_stopped;
use crate::*;

#[test]
fn udp_name_is_resolved_once_per_association() {
    enter_namespace!("", dns::RESOLV);
    let queries = dns::start();
    let server = Server::start(&[]);
    let (first, second) = (udp_echo_server(V4), udp_echo_server(V4));
    let association = Association::new(&server);
    for dst in [first, first, second, first] {
        association.send_raw(&datagram_name(0, "known.example", dst.port(), b"x"));
        assert_eq!(association.receive(), (dst, b"x".to_vec()));
    }
    let queries = queries.lock().expect("not poisoned");
    // One query for A and one for AAAA.
    assert_eq!(*queries, ["known.example", "known.example"]);
}

#[test]
fn udp_datagrams_are_sent_after_their_lookup() {
    enter_namespace!("", dns::RESOLV);
    dns::start();
    let (_server, association, target, dst) = relayed();
    for number in 0..5 {
        association.send_raw(&datagram_name(0, "known.example", dst.port(), &[number]));
    }
    for number in 0..5 {
        assert_eq!(receive(&target).0, [number]);
    }
}

#[test]
fn udp_answer_too_large_with_its_header_is_fragmented() {
    let (_server, association, target, dst) = relayed();
    association.send(dst, b"request");
    let (_, egress) = receive(&target);
    let largest: Vec<u8> = (0..65_507).map(|i| u8::try_from(i % 251).expect("at most 255")).collect();
    target.send_to(&largest, egress).expect("datagram sent");
    let (first, last) = (association.receive_fragment(), association.receive_fragment());
    assert_eq!((first.0, first.1), (1, dst));
    assert_eq!((last.0, last.1), (0x82, dst));
    assert!([first.2, last.2].concat() == largest, "the data differs");
    association.ping(udp_echo_server(V4), b"not fragmented");
}

#[test]
fn udp_hundred_associations_are_isolated() {
    let server = Server::start(&[]);
    let before = idle_descriptors(&server);
    let echo = udp_echo_server(V4);
    let associations: Vec<Association> = (0..100).map(|_| Association::new(&server)).collect();
    for (number, association) in (0..100_u8).zip(&associations) {
        association.send(echo, &[number]);
    }
    for (number, association) in (0..100).zip(&associations) {
        assert_eq!(association.receive(), (echo, vec![number]));
    }
    drop(associations);
    wait_until("all descriptors are closed", TIMEOUT, || server.descriptors() == before);
}

#[test]
fn udp_two_hundred_targets_share_one_association() {
    let server = Server::start(&[]);
    let association = Association::new(&server);
    // The rules deny the port of the listener, which a UDP socket may get too.
    let targets = std::iter::repeat_with(target).filter(|(_, dst)| *dst != server.addr());
    let targets: Vec<_> = targets.take(200).collect();
    for (number, (_, dst)) in (0..200_u8).zip(&targets) {
        association.send(*dst, &[number]);
    }
    for (number, (target, dst)) in (0..200_u8).zip(&targets) {
        let (data, egress) = receive(target);
        assert_eq!(data, [number]);
        target.send_to(&[number, number], egress).expect("datagram sent");
        assert_eq!(association.receive(), (*dst, vec![number, number]));
    }
}

#[test]
fn udp_burst_of_400_is_echoed() {
    // With 100 bytes each, they fit into the buffers of 416 KiB that net.core.rmem_max = 212992 permits.
    const BURST: u16 = 400;
    let server = Server::start(&[]);
    let (target, dst) = target();
    thread::spawn(move || {
        loop {
            let (data, from) = receive(&target);
            let _ = target.send_to(&data, from);
        }
    });
    let association = Association::new(&server);
    association.socket.set_read_timeout(Some(Duration::from_millis(500))).expect("timeout set");
    let burst = |round: u8| {
        while_stopped(&server, || {
            for number in 0..BURST {
                let mut data = vec![round; 100];
                data[..2].copy_from_slice(&number.to_be_bytes());
                association.send(dst, &data);
            }
        });
        let (mut buffer, mut count) = ([0; 2048], 0);
        while count < BURST {
            let Ok((n, _)) = retry(|| association.socket.recv_from(&mut buffer)) else { break };
            let data = &buffer[10..n];
            assert!(data.len() == 100 && data[2..].iter().all(|byte| *byte == data[2]), "the data differs");
            count += u16::from(data[2] == round);
        }
        count
    };
    // UDP may lose datagrams on a busy machine. One of five bursts must arrive.
    let best = (0..5).map(burst).find(|count| *count >= BURST / 100 * 95);
    assert!(best.is_some(), "each burst lost more than 5 %");
}

#[test]
fn udp_association_of_a_unix_client_is_on_loopback() {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;
    let dir = temp_dir();
    let path = dir.path().join("s5.sock");
    let _server = serve(&format!("unix:{}", path.display()), 1, &[]);
    let mut control = UnixStream::connect(&path).expect("the listener accepts");
    control.write_all(&[5, 1, 0, 5, 3, 0, 1, 0, 0, 0, 0, 0, 0]).expect("data sent");
    let mut answers = [0; 12];
    control.read_exact(&mut answers).expect("both answers received");
    assert_eq!(answers[..10], [5, 0, 5, 0, 0, 1, 127, 0, 0, 1]);
    let bnd = SocketAddr::new(V4, u16::from_be_bytes([answers[10], answers[11]]));
    let client = socket(V4);
    let echo = udp_echo_server(V4);
    client.send_to(&super::association::datagram(0, echo, b"hello"), bnd).expect("datagram sent");
    assert_eq!(receive(&client), (super::association::datagram(0, echo, b"hello"), bnd));
}
