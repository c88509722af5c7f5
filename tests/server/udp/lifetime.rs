//! Ends of associations, and the address of their socket. tests/wire has ends of the control connection.

use super::association::{Association, receive, socket, target};
use crate::relay::keep_busy;
use crate::*;

/// Time for the server to close the UDP port after the control connection has ended.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(2);

fn is_free(addr: SocketAddr) -> bool {
    UdpSocket::bind(addr).is_ok()
}

#[test]
fn udp_association_ignores_64_kib_of_data_on_its_control_connection() {
    let server = Server::start(&[]);
    let echo = udp_echo_server(V4);
    let mut association = Association::new(&server);
    association.control.write_all(b"unexpected data").expect("data sent");
    association.ping(echo, b"still open");
    // More than 64 KiB end the association.
    while association.control.write_all(&[0; 4096]).is_ok() {}
    wait_until("the port is free", RELEASE_TIMEOUT, || is_free(association.bnd));
}

#[test]
fn udp_association_ends_at_the_idle_timeout() {
    const IDLE: Duration = Duration::from_secs(1);
    let echo = udp_echo_server(V4);
    let has_passed = (0..3).any(|_| {
        let server = Server::start(&["--idle-timeout", "1s"]);
        let mut idle = Association::new(&server);
        let busy = Association::new(&server);
        // Without an answer, it does not stay busy.
        busy.socket.set_read_timeout(Some(IDLE)).expect("timeout set");
        let stayed_busy = keep_busy(IDLE, || {
            busy.send(echo, b"x");
            let _ = retry(|| busy.socket.recv(&mut [0; 64]));
        });
        let end = stream_end(&mut idle.control);
        assert!(end == StreamEnd::Closed(vec![]) || end == StreamEnd::Reset, "{end:?}");
        wait_until("the port is free", RELEASE_TIMEOUT, || is_free(idle.bnd));
        stayed_busy
    });
    assert!(has_passed, "the busy association has ended, or the machine was too slow each time");
}

#[test]
fn udp_association_ends_with_the_server() {
    let mut server = Server::start(&["--drain-timeout", "100ms"]);
    let association = Association::new(&server);
    server.signal("TERM");
    assert!(server.wait(TIMEOUT).success());
    assert!(is_free(association.bnd));
}

#[test]
fn udp_bnd_is_the_address_that_the_client_connected_to() {
    let server = serve("*:0", 2, &["--allow-open-relay"]);
    let server_addr = SocketAddr::new(addr("127.0.0.3:0").ip(), server.addr().port());
    let mut control = connect_from(addr("127.0.0.5:0"), server_addr);
    control.write_all(&[5, 1, 0]).expect("greeting sent");
    assert_eq!(read_exact(&mut control, 2), [5, 0]);
    control.write_all(&request(UDP_ASSOCIATE, addr("0.0.0.0:0"))).expect("request sent");
    let (rep, bnd) = read_reply(&mut control);
    assert_eq!((rep, bnd.ip()), (0, server_addr.ip()));
    // The client's IP address is that of the control connection.
    let association = Association { control, socket: socket(addr("127.0.0.5:0").ip()), bnd };
    association.ping(udp_echo_server(V4), b"hello");
}

#[test]
fn udp_ports_limits_the_ports_of_associations() {
    enter_namespace!("", "");
    let server = Server::start(&["--udp-ports", "20000-20002"]);
    let echo = udp_echo_server(V4);
    let mut associations: Vec<Association> = (0..3).map(|_| Association::new(&server)).collect();
    let mut ports: Vec<u16> = associations.iter().map(|association| association.bnd.port()).collect();
    ports.sort_unstable();
    assert_eq!(ports, [20000, 20001, 20002]);
    for association in &associations {
        association.ping(echo, b"hello");
    }
    assert_eq!(open(&server, UDP_ASSOCIATE, addr("0.0.0.0:0")).1, 1, "all ports are in use");
    let freed = associations.remove(0).bnd;
    wait_until("the port is free", RELEASE_TIMEOUT, || is_free(freed));
    assert_eq!(Association::new(&server).bnd, freed);
}

#[test]
fn udp_bnd_is_the_advertised_address_of_its_family() {
    let server = serve("127.0.0.1:0", 2, &["--listen", "[::1]:0", "--advertise", "192.0.2.9"]);
    let (target, dst) = target();
    let mut association = Association::new(&server);
    assert_eq!(association.bnd.ip(), addr("192.0.2.9:0").ip());
    association.bnd.set_ip(V4);
    association.send(dst, b"hello");
    assert_eq!(receive(&target).0, b"hello");
    // The advertised address is IPv4. An IPv6 client receives the address of the socket.
    let mut control = TcpStream::connect(server.addrs[1]).expect("the server accepts");
    control.write_all(&[5, 1, 0]).expect("greeting sent");
    control.write_all(&request(UDP_ASSOCIATE, addr("[::]:0"))).expect("request sent");
    assert_eq!(read_exact(&mut control, 2), [5, 0]);
    assert_eq!(read_reply(&mut control).1.ip(), V6);
}
