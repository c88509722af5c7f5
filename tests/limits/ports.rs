//! `--udp-ports` and `--bind-ports`: a range without a free port.

use crate::*;

/// So many ports that a server which tries all of them at once delays its other sessions noticeably.
const PORTS: std::ops::Range<u16> = 10_000..26_000;
const ANY: SocketAddr = SocketAddr::new(V4, 0);

/// Binds all ports.
fn take_ports(kind: socket2::Type) -> Vec<socket2::Socket> {
    let bind = |port| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, kind, None).expect("socket created");
        socket.bind(&SocketAddr::new(V4, port).into()).expect("free port");
        socket
    };
    PORTS.map(bind).collect()
}

/// Median time of an answer through an open tunnel.
fn median_round_trip(stream: &mut TcpStream) -> Duration {
    let mut times: Vec<Duration> = (0..51).map(|_| timed(|| ping(stream, b"ping")).0).collect();
    times.sort_unstable();
    times[times.len() / 2]
}

#[test]
fn refusals_without_a_free_port_do_not_delay_other_sessions() {
    enter_namespace!("", "");
    if !raise_fd_limit(u64::from(PORTS.end - PORTS.start) + 1000) {
        return;
    }
    let _machine = lock_machine();
    let range = format!("{}-{}", PORTS.start, PORTS.end - 1);
    for (command, option, kind) in
        [(UDP_ASSOCIATE, "--udp-ports", socket2::Type::DGRAM), (BIND, "--bind-ports", socket2::Type::STREAM)]
    {
        let _taken = take_ports(kind);
        let server = Server::start(&[option, &range, "--threads", "1"]);
        let mut tunnel = connect_to(&server, echo_server());
        let is_done = AtomicBool::new(false);
        thread::scope(|scope| {
            let refused = || {
                while !is_done.load(Ordering::Relaxed) {
                    assert_eq!(open(&server, command, ANY).1, 1);
                }
            };
            let clients = [(); 4].map(|()| scope.spawn(refused));
            // The best of three, because other programs may disturb a measurement.
            let median = (0..3).map(|_| median_round_trip(&mut tunnel)).min().expect("three measurements");
            is_done.store(true, Ordering::Relaxed);
            clients.into_iter().for_each(|client| client.join().expect("all requests are refused"));
            eprintln!("{option}: round trip {median:?}");
            assert!(median < Duration::from_millis(15), "{option}: {median:?}");
        });
    }
}
