//! Attempts to connect to names with many addresses. Each test runs in a new network namespace with an /etc/hosts.

use crate::*;

/// Addresses of the name `many`.
const ADDRS: u8 = 32;
/// Limits of README.md and of the manual: attempts at once and addresses tried of one connection, and attempts of one
/// client in addition to the first ones.
const MAX_ATTEMPTS: usize = 4;
const MAX_ADDRS_TRIED: usize = 16;
const CLIENT_SHARE: usize = 64;

fn many(n: u8) -> IpAddr {
    [127, 0, 1, n].into()
}

fn hosts() -> String {
    (1..=ADDRS).map(|n| format!("{} many\n", many(n))).collect()
}

/// Listeners at all addresses of `many` that accept nothing, on one port.
fn silent_addrs() -> (Vec<FullBacklog>, u16) {
    let first = FullBacklog::at(SocketAddr::new(many(1), 0));
    let port = first.addr.port();
    let others = (2..=ADDRS).map(|n| FullBacklog::at(SocketAddr::new(many(n), port)));
    (others.chain([first]).collect(), port)
}

/// The addresses with an attempt that is running, of all processes of the namespace.
fn attempts(port: u16) -> Vec<String> {
    const SYN_SENT: &str = "02";
    let table = fs::read_to_string("/proc/net/tcp").expect("a table of connections");
    let rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let rows = rows.filter(|row| row[3] == SYN_SENT && row[2].ends_with(&format!(":{port:04X}")));
    rows.map(|row| row[2].to_owned()).collect()
}

fn request_many(server: &Server, ip: IpAddr, port: u16) -> TcpStream {
    let mut stream = connect_from_ip(server, ip);
    stream.write_all(&[5, 1, 0]).expect("greeting sent");
    assert_eq!(read_exact(&mut stream, 2), [5, 0]);
    stream.write_all(&request_by_name(CONNECT, "many", port)).expect("request sent");
    stream
}

#[test]
fn addresses_of_a_name_are_tried_in_limited_number_on_every_route() {
    const PORT: u16 = 7000;
    enter_namespace!(&hosts(), "");
    let direct = Server::start(&[]);
    let hop = format!("h={}", direct.addr());
    let through_hop = Server::start(&["--hop", &hop, "--allow", "to=127.0.1.0/24 via=h"]);
    let by_server = |server| read_reply(&mut request_many(server, V4, PORT)).0 == 0;
    let by_client =
        |args: &[&str]| s5().args(["connect", "-z", &format!("many:{PORT}")]).args(args).status().expect("s5 runs");
    let proxy = direct.addr().to_string();
    let connects: [(&str, &dyn Fn() -> bool); 4] = [
        ("s5 serve", &|| by_server(&direct)),
        ("s5 serve --hop", &|| by_server(&through_hop)),
        ("s5 connect --direct", &|| by_client(&["--direct"]).success()),
        ("s5 connect -x", &|| by_client(&["-x", &proxy, "--resolve", "local"]).success()),
    ];
    for (what, connect) in connects {
        // Only one address listens. The order of the others is unknown.
        let reached = (1..=ADDRS).filter(|n| {
            let _listener = TcpListener::bind((many(*n), PORT)).expect("free port");
            connect()
        });
        assert_eq!(reached.count(), MAX_ADDRS_TRIED, "{what}");
    }
}

#[test]
fn attempts_of_a_connection_are_limited_and_the_oldest_is_closed_for_the_next() {
    enter_namespace!(&hosts(), "");
    let (_silent, port) = silent_addrs();
    let server = Server::start(&["--connect-timeout", "60"]);
    let watch = || {
        let mut tried = BTreeSet::new();
        wait_until("two attempts are closed", TIMEOUT, || {
            let now = attempts(port);
            // The table is not read at once, so that an attempt and its successor may both be in it.
            assert!(now.len() <= MAX_ATTEMPTS || attempts(port).len() <= MAX_ATTEMPTS, "{now:?}");
            tried.extend(now);
            tried.len() >= MAX_ATTEMPTS + 2
        });
    };
    let request = request_many(&server, V4, port);
    watch();
    reset(request);
    // Without the time that a client gets after it has ended its stream.
    wait_until("all attempts are cancelled", Duration::from_millis(1500), || attempts(port).is_empty());
    let client = RunningProgram::start(s5().args(["connect", "--direct", &format!("many:{port}")]));
    watch();
    drop(client);
}

/// Returns the number of connections that this namespace has begun.
fn connections_opened() -> usize {
    let counters = std::fs::read_to_string("/proc/net/snmp").expect("file read");
    let tcp = counters.lines().filter(|line| line.starts_with("Tcp:")).nth(1).expect("values of TCP");
    tcp.split(' ').nth(5).and_then(|opened| opened.parse().ok()).expect("ActiveOpens")
}

#[test]
fn attempts_of_one_client_are_limited_and_do_not_delay_other_clients() {
    const REQUESTS: usize = 100;
    let hosts = hosts() + "127.0.0.2 pair\n127.0.0.3 pair\n";
    enter_namespace!(&hosts, "");
    let (_silent, port) = silent_addrs();
    let server = Server::start(&["--connect-timeout", "60"]);
    let idle = idle_descriptors(&server);
    let requests: Vec<_> = (0..REQUESTS).map(|_| request_many(&server, V4, port)).collect();
    let (started, opened) = (Instant::now(), connections_opened());
    // A replaced attempt and its successor may both be counted, because the descriptors are not listed at once.
    let descriptors = || (0..3).map(|_| server.descriptors()).min().expect("three counts");
    while started.elapsed() < Duration::from_millis(1500) {
        let now = descriptors();
        assert!(now <= idle + 2 * REQUESTS + CLIENT_SHARE, "{now} descriptors, {idle} when idle");
    }
    // Most sessions have one attempt at a time: the second one after 250 ms, and then one each second.
    let (opened, seconds) = (connections_opened() - opened, started.elapsed().as_secs_f64());
    assert!(opened as f64 <= REQUESTS as f64 * (1.0 + 2.0 * seconds), "{opened} attempts in {seconds} s");
    // One of the two addresses is silent. Another client tries the other one after 250 ms.
    for (silent, listening) in [("127.0.0.2", "127.0.0.3"), ("127.0.0.3", "127.0.0.2")] {
        let silent = FullBacklog::at(SocketAddr::new(silent.parse().expect("an address"), 0));
        let _target = TcpListener::bind((listening, silent.addr.port())).expect("free port");
        let mut stream = connect_from_ip(&server, [127, 0, 0, 2]);
        let request = request_by_name(CONNECT, "pair", silent.addr.port());
        let (time, (rep, _)) = timed(|| {
            stream.write_all(&[&[5, 1, 0][..], &request].concat()).expect("request sent");
            assert_eq!(read_exact(&mut stream, 2), [5, 0]);
            read_reply(&mut stream)
        });
        assert_eq!(rep, 0);
        assert!(time < Duration::from_secs(2), "{time:?}");
    }
    requests.into_iter().for_each(reset);
    wait_until("all descriptors are closed", TIMEOUT, || server.descriptors() == idle);
}
