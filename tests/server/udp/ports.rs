//! `--udp-ports`: associations that share one port, and a range without a free port.

use super::association::{Association, assert_nothing_arrives, datagram, receive, socket};
use crate::guard::tools::associate;
use crate::*;

const ANY: SocketAddr = SocketAddr::new(V4, 0);

fn is_free(addr: SocketAddr) -> bool {
    UdpSocket::bind(addr).is_ok()
}

#[test]
fn udp_associations_share_one_port() {
    enter_namespace!("", "");
    let echo = udp_echo_server(V4);
    for (listen, ports) in [("127.0.0.1:0", "5000"), ("127.0.0.1:0", "5000-5000"), ("[::1]:0", "5000")] {
        let server = serve(listen, 1, &["--udp-ports", ports, "--threads", "4"]);
        let before = idle_descriptors(&server);
        // All have the same address, and no port yet.
        let mut associations: Vec<Association> = (0..20).map(|_| Association::new(&server)).collect();
        assert!(associations.iter().all(|association| association.bnd.port() == 5000));
        for round in [b"first round", b"second rnd."] {
            associations.iter().for_each(|association| association.send(echo, round));
            for association in &associations {
                assert_eq!(association.receive(), (echo, round.to_vec()));
            }
        }
        // The associations got their first datagrams in the order of their requests.
        associations.drain(..10);
        wait_until("ten sessions have ended", TIMEOUT, || session_lines(&server.log()).len() == 10);
        associations.extend((0..5).map(|_| Association::new(&server)));
        for association in &associations {
            association.ping(echo, b"after others have ended");
        }
        let bnd = associations[0].bnd;
        drop(associations);
        wait_until("the port is free", TIMEOUT, || is_free(bnd));
        wait_until("all descriptors are closed", TIMEOUT, || server.descriptors() == before);
        Association::new(&server).ping(echo, b"again");
    }
}

#[test]
fn udp_associations_on_a_shared_port_are_isolated() {
    enter_namespace!("", "");
    let server = Server::start(&["--udp-ports", "5000"]);
    let target = socket(V4);
    let dst = target.local_addr().expect("local address");
    let waiting = Association::new(&server);
    // DST announces the port, so its datagrams belong to this association although the other one is older.
    let announced = socket(V4);
    let announced = Association::with_dst(&server, announced.local_addr().expect("local address"), announced);
    announced.send(dst, b"announced");
    let (_, egress) = receive(&target);
    waiting.send(dst, b"waiting");
    let (_, other_egress) = receive(&target);
    assert_ne!(egress, other_egress);
    target.send_to(b"to the announced", egress).expect("datagram sent");
    target.send_to(b"to the waiting", other_egress).expect("datagram sent");
    assert_eq!(announced.receive().1, b"to the announced");
    assert_eq!(waiting.receive().1, b"to the waiting");
    // All associations of this address have a port.
    let unknown = socket(V4);
    let _ = unknown.send_to(&datagram(0, dst, b"unknown"), waiting.bnd);
    assert_nothing_arrives(&target);
    // Other programs cannot bind the port.
    assert!(!is_free(waiting.bnd));
    // Clients with other addresses.
    let others = ["127.0.0.5", "127.0.0.6", "127.0.0.6"]
        .map(|ip| associate(server.addr(), ip.parse().expect("an address"), None));
    for (number, other) in (0..3).zip(&others).rev() {
        assert_eq!(other.bnd, waiting.bnd);
        other.send(dst, &[number]);
        assert_eq!(receive(&target).0, [number]);
    }
    // A malformed datagram does not take up a new association.
    let new = Association::new(&server);
    unknown.send_to(b"malformed", new.bnd).expect("datagram sent");
    new.send(dst, b"new");
    assert_eq!(receive(&target).0, b"new");
}

#[test]
fn udp_burst_of_a_new_client_on_a_shared_port_arrives() {
    enter_namespace!("", "");
    let server = Server::start(&["--udp-ports", "5000", "--threads", "2"]);
    let target = socket(V4);
    let dst = target.local_addr().expect("local address");
    for _ in 0..20 {
        let associations = [Association::new(&server), Association::new(&server)];
        for number in 0..20 {
            associations.iter().for_each(|association| association.send(dst, &[number]));
        }
        let mut received: Vec<u8> = (0..40).map(|_| receive(&target).0[0]).collect();
        received.sort_unstable();
        assert_eq!(received, (0..20).flat_map(|number| [number, number]).collect::<Vec<_>>());
    }
}

#[test]
fn udp_ports_in_use_are_tried_in_limited_number() {
    enter_namespace!("", "");
    if !raise_fd_limit(3000) {
        return;
    }
    let server = Server::start(&["--udp-ports", "20000-21999"]);
    let mut used: Vec<UdpSocket> =
        (20000..22000).map(|port| UdpSocket::bind((V4, port)).expect("the port is free")).collect();
    assert_eq!(open(&server, UDP_ASSOCIATE, ANY).1, 1);
    server.wait_log(|log| log.contains("no free port in 20000-21999: 1024 tried (choose more ports with --udp-ports)"));
    // Free ports anywhere in the range are found.
    let mut at = 0;
    used.retain(|_| {
        at += 1;
        at % 50 != 0
    });
    Association::new(&server).ping(udp_echo_server(V4), b"hello");
}

#[test]
fn udp_shared_port_of_another_program_has_a_remedy() {
    let other = socket(V4);
    let port = other.local_addr().expect("local address").port();
    let server = Server::start(&["--udp-ports", &port.to_string()]);
    assert_eq!(open(&server, UDP_ASSOCIATE, ANY).1, 1);
    let error = format!("UDP port {port} is used by another program (choose another with --udp-ports)");
    server.wait_log(|log| log.contains(&error));
}
