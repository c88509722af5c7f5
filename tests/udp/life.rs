//! How long an association lasts, and where it is.

use std::io::Write as _;
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use crate::association::{Association, receive, socket, target};
use crate::common::{
    Server, TIMEOUT, in_namespace, open, read_exact, read_reply, request, udp_echo_server, wait_until,
};
use crate::kit::{StreamEnd, UDP_ASSOCIATE, V4, V6, connect_from, idle_descriptors, reset, serve, stream_end};

/// How long the port may outlive its control connection.
const FREED: Duration = Duration::from_secs(2);

fn addr(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

fn is_free(addr: SocketAddr) -> bool {
    UdpSocket::bind(addr).is_ok()
}

#[test]
fn it_ends_with_its_control_connection_in_every_way() {
    for listen in ["127.0.0.1:0", "[::1]:0"] {
        let server = serve(listen, 1, &[]);
        let before = idle_descriptors(&server);
        let echo = udp_echo_server(V4);
        let leave: [fn(TcpStream); 3] = [drop, reset, |mut control| {
            control.shutdown(Shutdown::Write).expect("half-close");
            assert_eq!(stream_end(&mut control), StreamEnd::Closed(vec![]));
        }];
        for leave in leave {
            for used in [true, false] {
                let association = Association::new(&server);
                if used {
                    association.ping(echo, b"hello");
                }
                assert!(!is_free(association.bnd));
                leave(association.control);
                wait_until("the port is free", FREED, || is_free(association.bnd));
                wait_until("the descriptors are free", FREED, || server.descriptors() == before);
            }
        }
    }
}

#[test]
fn words_on_the_control_connection_are_ignored_up_to_a_bound() {
    let server = Server::start(&[]);
    let echo = udp_echo_server(V4);
    let mut association = Association::new(&server);
    association.control.write_all(b"are you still there?").expect("it is sent");
    association.ping(echo, b"yes");
    // A flood is a mistake of the client, and ends it.
    while association.control.write_all(&[0; 4096]).is_ok() {}
    wait_until("the port is free", FREED, || is_free(association.bnd));
}

#[test]
fn it_ends_when_nothing_is_sent_for_the_idle_timeout() {
    let server = Server::start(&["--idle-timeout", "1s"]);
    let echo = udp_echo_server(V4);
    let mut idle = Association::new(&server);
    let busy = Association::new(&server);
    let started = Instant::now();
    while started.elapsed() < Duration::from_millis(1800) {
        busy.ping(echo, b"x");
        std::thread::sleep(Duration::from_millis(20));
    }
    let end = stream_end(&mut idle.control);
    assert!(end == StreamEnd::Closed(vec![]) || end == StreamEnd::Reset, "{end:?}");
    wait_until("the port is free", FREED, || is_free(idle.bnd));
    busy.ping(echo, b"still there");
}

#[test]
fn a_server_that_ends_takes_its_associations_along() {
    let mut server = Server::start(&["--drain", "100ms"]);
    let association = Association::new(&server);
    server.signal("TERM");
    assert!(server.wait(TIMEOUT).success());
    assert!(is_free(association.bnd));
}

#[test]
fn bnd_is_on_the_address_that_the_client_connected_to() {
    let server = serve("*:0", 2, &["--open"]);
    let through = SocketAddr::new(addr("127.0.0.3:0").ip(), server.addr().port());
    let mut control = connect_from(addr("127.0.0.5:0"), through);
    control.write_all(&[5, 1, 0]).expect("the greeting is sent");
    assert_eq!(read_exact(&mut control, 2), [5, 0]);
    control.write_all(&request(UDP_ASSOCIATE, addr("0.0.0.0:0"))).expect("the request is sent");
    let (rep, bnd) = read_reply(&mut control);
    assert_eq!((rep, bnd.ip()), (0, through.ip()));
    // The client is who the control connection comes from.
    let association = Association { control, socket: socket(addr("127.0.0.5:0").ip()), bnd };
    association.ping(udp_echo_server(V4), b"hello");
}

#[test]
fn udp_ports_limits_the_ports() {
    if !in_namespace("life::udp_ports_limits_the_ports", "", "") {
        return;
    }
    let server = Server::start(&["--udp-ports", "20000-20002"]);
    let echo = udp_echo_server(V4);
    let mut associations: Vec<Association> = (0..3).map(|_| Association::new(&server)).collect();
    let mut ports: Vec<u16> = associations.iter().map(|association| association.bnd.port()).collect();
    ports.sort_unstable();
    assert_eq!(ports, [20000, 20001, 20002]);
    for association in &associations {
        association.ping(echo, b"hello");
    }
    assert_eq!(open(&server, UDP_ASSOCIATE, addr("0.0.0.0:0")).1, 1, "all are taken");
    let gone = associations.remove(0).bnd;
    wait_until("the port is free", FREED, || is_free(gone));
    assert_eq!(Association::new(&server).bnd, gone);
}

#[test]
fn advertise_is_what_bnd_says() {
    let server = serve("127.0.0.1:0", 2, &["--listen", "[::1]:0", "--advertise", "192.0.2.9"]);
    let (target, dst) = target();
    let mut association = Association::new(&server);
    assert_eq!(association.bnd.ip(), addr("192.0.2.9:0").ip());
    association.bnd.set_ip(V4);
    association.send(dst, b"hello");
    assert_eq!(receive(&target).0, b"hello");
    // It is an IPv4 address: clients by IPv6 hear where their association really is.
    let mut control = TcpStream::connect(server.addrs[1]).expect("the server accepts");
    control.write_all(&[5, 1, 0]).expect("the greeting is sent");
    control.write_all(&request(UDP_ASSOCIATE, addr("[::]:0"))).expect("the request is sent");
    assert_eq!(read_exact(&mut control, 2), [5, 0]);
    assert_eq!(read_reply(&mut control).1.ip(), V6);
}
