//! `--udp-ports`: a range without a free port.

use std::net::{SocketAddr, UdpSocket};

use super::association::Association;
use crate::support::{Server, UDP_ASSOCIATE, V4, in_namespace, open, raise_fd_limit, udp_echo_server};

const ANY: SocketAddr = SocketAddr::new(V4, 0);

#[test]
fn udp_ports_in_use_are_tried_in_limited_number() {
    if !in_namespace("udp::ports::udp_ports_in_use_are_tried_in_limited_number", "", "") || !raise_fd_limit(3000) {
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
