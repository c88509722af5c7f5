//! What passes, both ways: every kind of target, every size, many of each at once.

use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use crate::association::{Association, datagram_name, receive, socket, target};
use crate::common::{Server, TIMEOUT, in_namespace, temp_dir, udp_echo_server, wait_until};
use crate::kit::{V4, V6, dns, idle_descriptors, serve};

#[test]
fn an_answer_comes_with_its_senders_address() {
    let (v4, v6) = (udp_echo_server(V4), udp_echo_server(V6));
    for listen in ["127.0.0.1:0", "[::1]:0"] {
        let server = serve(listen, 1, &[]);
        let association = Association::new(&server);
        assert_eq!(association.bnd.ip(), server.addr().ip(), "BND is where the client can send to");
        association.ping(v4, b"by IPv4");
        association.ping(v6, b"by IPv6");
        association.send_raw(&datagram_name(0, "127.0.0.1", v4.port(), b"by name"));
        assert_eq!(association.receive(), (v4, b"by name".to_vec()));
    }
}

#[test]
fn the_answer_to_a_first_datagram_by_name_comes_at_once() {
    let server = Server::start(&[]);
    let echo = udp_echo_server(V4);
    let association = Association::new(&server);
    association.send_raw(&datagram_name(0, "127.0.0.1", echo.port(), b"by name"));
    assert_eq!(association.receive(), (echo, b"by name".to_vec()));
}

#[test]
fn a_name_is_looked_up_once_an_association() {
    if !in_namespace("relay::a_name_is_looked_up_once_an_association", "", dns::RESOLV) {
        return;
    }
    let asked = dns::start();
    let server = Server::start(&[]);
    let (first, second) = (udp_echo_server(V4), udp_echo_server(V4));
    let association = Association::new(&server);
    for dst in [first, first, second, first] {
        association.send_raw(&datagram_name(0, "known.example", dst.port(), b"x"));
        assert_eq!(association.receive(), (dst, b"x".to_vec()));
    }
    let asked = asked.lock().expect("no panic");
    // Once for A and once for AAAA.
    assert_eq!(*asked, ["known.example", "known.example"]);
}

#[test]
fn datagrams_that_wait_for_a_look_up_are_not_lost() {
    if !in_namespace("relay::datagrams_that_wait_for_a_look_up_are_not_lost", "", dns::RESOLV) {
        return;
    }
    dns::start();
    let server = Server::start(&[]);
    let (target, dst) = target();
    let association = Association::new(&server);
    for number in 0..5 {
        association.send_raw(&datagram_name(0, "known.example", dst.port(), &[number]));
    }
    for number in 0..5 {
        assert_eq!(receive(&target).0, [number]);
    }
}

#[test]
fn payloads_of_every_size_come_back_whole() {
    let server = Server::start(&[]);
    let echo = udp_echo_server(V4);
    let association = Association::new(&server);
    // The last one fills a datagram, header included.
    for size in [0, 1, 1472, 8192, 65_000, 65_507 - 10] {
        let data: Vec<u8> = (0..size).map(|i| u8::try_from(i % 251).expect("small")).collect();
        association.ping(echo, &data);
    }
}

#[test]
fn an_answer_without_room_for_its_header_comes_in_two_fragments() {
    let server = Server::start(&[]);
    let (target, dst) = target();
    let association = Association::new(&server);
    association.send(dst, b"the largest, please");
    let (_, relay) = receive(&target);
    let largest: Vec<u8> = (0..65_507).map(|i| u8::try_from(i % 251).expect("small")).collect();
    target.send_to(&largest, relay).expect("it is sent");
    let (first, last) = (association.receive_fragment(), association.receive_fragment());
    assert_eq!((first.0, first.1), (1, dst));
    assert_eq!((last.0, last.1), (0x82, dst));
    assert!([first.2, last.2].concat() == largest, "other octets");
    association.ping(udp_echo_server(V4), b"and the next one is whole");
}

#[test]
fn a_hundred_associations_keep_apart() {
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
    wait_until("all descriptors are free", TIMEOUT, || server.descriptors() == before);
}

#[test]
fn two_hundred_targets_of_one_association_are_told_apart() {
    let server = Server::start(&[]);
    let association = Association::new(&server);
    let targets: Vec<_> = (0..200).map(|_| target()).collect();
    for (number, (_, dst)) in (0..200_u8).zip(&targets) {
        association.send(*dst, &[number]);
    }
    for (number, (target, dst)) in (0..200_u8).zip(&targets) {
        let (data, relay) = receive(target);
        assert_eq!(data, [number]);
        target.send_to(&[number, number], relay).expect("it is sent");
        assert_eq!(association.receive(), (*dst, vec![number, number]));
    }
}

#[test]
fn a_burst_comes_back() {
    const BURST: u16 = 500;
    let server = Server::start(&[]);
    let (target, dst) = target();
    thread::spawn(move || {
        loop {
            let (data, from) = receive(&target);
            let _ = target.send_to(&data, from);
        }
    });
    let association = Association::new(&server);
    let receiver = association.socket.try_clone().expect("a second handle");
    receiver.set_read_timeout(Some(Duration::from_millis(500))).expect("a timeout can be set");
    let burst = |round: u8| {
        let receiver = receiver.try_clone().expect("a second handle");
        let counting = thread::spawn(move || {
            let (mut buffer, mut count) = ([0; 2048], 0);
            while count < BURST {
                let Ok((n, _)) = receiver.recv_from(&mut buffer) else { break };
                let data = &buffer[10..n];
                assert!(data.len() == 1200 && data[2..].iter().all(|octet| *octet == data[2]), "other octets");
                count += u16::from(data[2] == round);
            }
            count
        });
        for number in 0..BURST {
            let mut data = vec![round; 1200];
            data[..2].copy_from_slice(&number.to_be_bytes());
            association.send(dst, &data);
        }
        counting.join().expect("nothing is mangled")
    };
    // UDP may lose some, and on a machine that is busy with other things it does: the best of a few counts.
    let best = (0..5).map(burst).find(|count| *count >= BURST / 100 * 95);
    assert!(best.is_some(), "never 95 % of a burst");
}

#[test]
fn a_client_over_a_unix_socket_has_its_association_on_loopback() {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;
    let folder = temp_dir();
    let path = folder.path().join("s5.sock");
    let _server = serve(&format!("unix:{}", path.display()), 1, &[]);
    let mut control = UnixStream::connect(&path).expect("it listens");
    control.write_all(&[5, 1, 0, 5, 3, 0, 1, 0, 0, 0, 0, 0, 0]).expect("it is sent");
    let mut answers = [0; 12];
    control.read_exact(&mut answers).expect("both answers");
    assert_eq!(answers[..10], [5, 0, 5, 0, 0, 1, 127, 0, 0, 1]);
    let bnd = SocketAddr::new(V4, u16::from_be_bytes([answers[10], answers[11]]));
    let client = socket(V4);
    let echo = udp_echo_server(V4);
    client.send_to(&crate::association::datagram(0, echo, b"hello"), bnd).expect("it is sent");
    assert_eq!(receive(&client), (crate::association::datagram(0, echo, b"hello"), bnd));
}
