//! The client's port: announced as DST, set by the first datagram, or changed by a NAT.

use std::thread::sleep;

use super::association::{Association, assert_nothing_arrives, datagram, receive, socket};
use crate::*;

/// More than the silence after which another port of the client may take over.
const SILENCE: Duration = Duration::from_millis(2200);

#[test]
fn udp_port_of_dst_counts_if_dst_is_the_client() {
    for (listen, ips) in [("127.0.0.1:0", &["127.0.0.1", "::ffff:127.0.0.1"][..]), ("[::1]:0", &["::1"])] {
        let server = serve(listen, 1, &[]);
        for ip in ips {
            let (client, other, target) = (socket(server.addr().ip()), socket(server.addr().ip()), socket(V4));
            let (port, dst) = (client.local_addr().expect("address").port(), target.local_addr().expect("address"));
            let announced = SocketAddr::new(ip.parse().expect("valid address"), port);
            let association = Association::with_dst(&server, announced, client);
            let _ = other.send_to(&datagram(0, dst, b"other"), association.bnd);
            association.send(dst, b"client");
            assert_eq!(receive(&target).0, b"client", "{ip}");
        }
    }
}

#[test]
fn udp_port_of_dst_counts_for_a_unix_client_if_dst_is_127_0_0_1() {
    let dir = temp_dir();
    let path = dir.path().join("s5.sock");
    let _server = serve(&format!("unix:{}", path.display()), 1, &[]);
    let echo = udp_echo_server(V4);
    for announced in [None, Some("8.8.8.8:53"), Some("127.0.0.2:53"), Some("[::1]:53")] {
        let (client, other) = (socket(V4), socket(V4));
        let own = client.local_addr().expect("local address");
        let mut control = UnixStream::connect(&path).expect("the listener accepts");
        let request = request(UDP_ASSOCIATE, announced.map_or(own, addr));
        control.write_all(&[&[5, 1, 0][..], &request].concat()).expect("data sent");
        let mut answers = [0; 12];
        control.read_exact(&mut answers).expect("both answers received");
        let bnd = SocketAddr::new(V4, u16::from_be_bytes([answers[10], answers[11]]));
        let sent = datagram(0, echo, b"hello");
        // Another user of this host sends first.
        let first = if announced.is_none() { &other } else { &client };
        let _ = first.send_to(&sent, bnd);
        client.send_to(&sent, bnd).expect("datagram sent");
        assert_eq!(receive(&client), (sent, bnd), "{announced:?}");
    }
}

/// Opens an association of a client at `ip`, the address of the server too.
fn associate(server: &Server, ip: IpAddr, dst: &str) -> Association {
    let mut control = connect_from(SocketAddr::new(ip, 0), SocketAddr::new(ip, server.addr().port()));
    control.write_all(&[5, 1, 0]).expect("greeting sent");
    assert_eq!(read_exact(&mut control, 2), [5, 0]);
    control.write_all(&request(UDP_ASSOCIATE, addr(dst))).expect("request sent");
    let (rep, bnd) = read_reply(&mut control);
    assert_eq!(rep, 0);
    Association { control, socket: socket(ip), bnd }
}

/// A client that is not on loopback. The time without datagrams is waited for once, for all tests of ports.
#[test]
fn udp_association_follows_the_client_to_another_port_after_silence() {
    enter_namespace!("", "");
    let ips: [IpAddr; 2] = ["192.0.2.1", "2001:db8::1"].map(|ip| ip.parse().expect("valid address"));
    for ip in ips {
        let added = Command::new("ip").args(["addr", "add", &ip.to_string(), "dev", "lo"]).status().expect("ip runs");
        assert!(added.success());
        let is_routed = || UdpSocket::bind((ip, 0)).and_then(|socket| socket.connect((ip, 9))).is_ok();
        wait_until("the address is usable", TIMEOUT, is_routed);
    }
    let args: [&[&str]; 2] = [&[], &["--udp-ports", "5000"]];
    let servers = args.map(|args| serve("*:0", 2, &[&["--allow-open-relay"], args].concat()));
    let mut moving = Vec::new();
    for (server, ip) in servers.iter().flat_map(|server| ips.map(|ip| (server, ip))) {
        let target = socket(ip);
        let dst = target.local_addr().expect("local address");
        let association = associate(server, ip, "0.0.0.0:0");
        association.send(dst, b"first");
        let (_, egress) = receive(&target);
        // While the port is in use, datagrams from other ports are dropped.
        let other = socket(ip);
        let _ = other.send_to(&datagram(0, dst, b"too early"), association.bnd);
        association.send(dst, b"second");
        assert_eq!(receive(&target).0, b"second");
        moving.push((association, other, target, egress));
    }
    // DST announces a port that the client does not use.
    let announced = associate(&servers[0], ips[0], "192.0.2.1:9");
    announced.send(moving[0].2.local_addr().expect("local address"), b"too early");
    // On loopback, the first port is kept.
    let loopback = Association::new(&servers[0]);
    let loopback_echo = udp_echo_server(V4);
    loopback.ping(loopback_echo, b"first");
    sleep(SILENCE);
    for (mut association, other, target, egress) in moving {
        let dst = target.local_addr().expect("local address");
        // Answers go to the last port.
        target.send_to(b"answer", egress).expect("datagram sent");
        assert_eq!(association.receive(), (dst, b"answer".to_vec()));
        // A malformed datagram does not set the port.
        socket(dst.ip()).send_to(b"malformed", association.bnd).expect("datagram sent");
        let first = std::mem::replace(&mut association.socket, other);
        association.send(dst, b"other port");
        assert_eq!(receive(&target), (b"other port".to_vec(), egress));
        target.send_to(b"answer", egress).expect("datagram sent");
        assert_eq!(association.receive(), (dst, b"answer".to_vec()));
        let _ = first.send_to(&datagram(0, dst, b"first port"), association.bnd);
        association.send(dst, b"last");
        assert_eq!(receive(&target).0, b"last");
        assert_nothing_arrives(&first);
    }
    announced.ping(udp_echo_server(ips[0]), b"hello");
    let _ = socket(V4).send_to(&datagram(0, loopback_echo, b"other"), loopback.bnd);
    loopback.ping(loopback_echo, b"still the first");
}
