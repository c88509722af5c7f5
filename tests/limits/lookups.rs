//! Lookups and connection attempts: shares of the clients, cancelled work, and threads that end.

use crate::*;

/// A resolver that gives up after a second.
const RESOLV: &str = "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n";

/// Names of the threads of the server, and how often all of them have waited so far.
pub fn threads(server: &Server) -> (Vec<String>, u64) {
    let tasks = fs::read_dir(format!("/proc/{}/task", server.pid())).expect("the server runs");
    // A thread may have ended.
    let status = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("status")).ok());
    let of_thread = |status: String| {
        let field = |name| status.lines().find_map(|line| line.strip_prefix(name)).expect("a field").trim().to_owned();
        (field("Name:"), field("voluntary_ctxt_switches:").parse::<u64>().expect("a number"))
    };
    let (names, waits): (Vec<_>, Vec<_>) = status.map(of_thread).unzip();
    (names, waits.into_iter().sum())
}

/// Connects from `ip`, and sends a request by name.
fn request_from(server: &Server, ip: IpAddr, command: u8, name: &str, port: u16) -> TcpStream {
    let mut stream = greet_from(server, ip);
    stream.write_all(&request_by_name(command, name, port)).expect("request sent");
    stream
}

/// Opens an association from `ip`. Returns its control connection, a socket and the address to send to.
fn associate_from(server: &Server, ip: IpAddr) -> (TcpStream, UdpSocket, SocketAddr) {
    let mut control = request_from(server, ip, UDP_ASSOCIATE, "0.0.0.0", 0);
    let (rep, bnd) = read_reply(&mut control);
    assert_eq!(rep, 0);
    let socket = UdpSocket::bind((ip, 0)).expect("free port");
    socket.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    (control, socket, bnd)
}

/// Sends a datagram to a name.
fn send_to_name((_, socket, bnd): &(TcpStream, UdpSocket, SocketAddr), name: &str, port: u16) {
    let mut datagram = request_by_name(0, name, port);
    datagram[0] = 0;
    socket.send_to(&datagram, bnd).expect("datagram sent");
}

/// Uses names that no server answers for, from one of several addresses of one client. Returns what keeps the requests
/// alive.
type Flood = fn(&Server, &dyn Fn(usize) -> IpAddr) -> Vec<Box<dyn std::any::Any>>;

fn flood_with(server: &Server, ip: &dyn Fn(usize) -> IpAddr, command: u8) -> Vec<Box<dyn std::any::Any>> {
    (0..300).map(|n| Box::new(request_from(server, ip(n), command, &format!("silent.n{n}"), 9)) as _).collect()
}

const FLOODS: [(&str, Flood); 5] = [
    ("CONNECT", |server, ip| flood_with(server, ip, CONNECT)),
    ("BIND", |server, ip| flood_with(server, ip, BIND)),
    ("datagrams", |server, ip| {
        let associate = |n| {
            let association = associate_from(server, ip(n));
            (0..16).for_each(|name| send_to_name(&association, &format!("silent.n{n}.n{name}"), 9));
            Box::new(association) as _
        };
        (0..20).map(associate).collect()
    }),
    // Through a hop whose name has to be resolved.
    ("hops", |server, ip| {
        (0..300).map(|n| Box::new(request_from(server, ip(n), CONNECT, "127.0.0.9", 9)) as _).collect()
    }),
    ("clients that leave", |server, ip| {
        let leave = |n| reset(request_from(server, ip(n), CONNECT, &format!("silent.n{n}"), 9));
        (0..300).for_each(leave);
        Vec::new()
    }),
];

/// Fails unless a client at `ip` is served at once, with names and without.
fn assert_served_at_once(what: &str, server: &Server, ip: IpAddr, names: &[&str]) {
    let (target, target_udp) = (echo_server(), udp_echo_server(V4));
    for name in names {
        let (time, ()) = timed(|| {
            assert_eq!(read_reply(&mut request_from(server, ip, CONNECT, name, target.port())).0, 0, "{what}: {name}");
            assert_eq!(read_reply(&mut request_from(server, ip, BIND, name, 9)).0, 0, "{what}: {name}");
            let association = associate_from(server, ip);
            send_to_name(&association, name, target_udp.port());
            retry(|| association.1.recv(&mut [0; 64])).expect("an answer");
        });
        assert!(time < Duration::from_secs(2), "{what}: {name} from {ip} took {time:?}");
    }
}

fn distinct(queries: &dns::Queries) -> usize {
    queries.lock().expect("not poisoned").iter().collect::<BTreeSet<_>>().len()
}

#[test]
fn lookups_of_one_client_do_not_delay_other_clients() {
    enter_namespace!("", dns::RESOLV);
    let queries = dns::start();
    for (what, flood) in FLOODS {
        let hop = ["--hop", "h=silent.hop:1080", "--allow", "to=127.0.0.9 via=h"];
        let server = Server::start(&[&hop[..], &["--connect-timeout", "60"]].concat());
        queries.lock().expect("not poisoned").clear();
        let _flood = flood(&server, &|_| V4);
        wait_until("names are looked up", TIMEOUT, || queries.lock().expect("not poisoned").len() >= 8);
        assert_served_at_once(what, &server, [127, 0, 0, 2].into(), &["good.example", "127.0.0.1"]);
        // Addresses need no lookup, however they are written.
        assert_served_at_once(what, &server, V4, &["127.0.0.1", "127.1"]);
        // DST of UDP ASSOCIATE is not looked up either.
        assert_eq!(read_reply(&mut request_from(&server, V4, UDP_ASSOCIATE, "silent.dst", 9)).0, 0, "{what}");
        if what != "clients that leave" {
            server.wait_log(|log| log.contains("client 127.0.0.1: limit of DNS lookups reached: further ones wait"));
        }
    }
}

#[test]
fn lookups_of_one_ipv6_network_do_not_delay_other_networks() {
    enter_namespace!("", dns::RESOLV);
    let queries = dns::start();
    let own = |network: u16, host| IpAddr::from([0x2001, 0xdb8, 0, network, 0, 0, 0, host]);
    for ip in (1..9).map(|host| own(1, host)).chain([own(2, 1)]) {
        let added = Command::new("ip").args(["address", "add", &format!("{ip}/128"), "dev", "lo"]).status();
        assert!(added.expect("ip runs").success());
    }
    let server = serve("[::]:0", 1, &["--allow-open-relay", "--allow", "to=127.0.0.1", "--connect-timeout", "60"]);
    let _flood = flood_with(&server, &|n| own(1, u16::try_from(n % 8 + 1).expect("16 bits")), CONNECT);
    wait_until("names are looked up", TIMEOUT, || distinct(&queries) >= 8);
    let port = echo_server().port();
    let (time, (rep, _)) = timed(|| read_reply(&mut request_from(&server, own(2, 1), CONNECT, "good.example", port)));
    assert_eq!(rep, 0);
    assert!(time < Duration::from_secs(2), "{time:?}");
}

#[test]
fn lookups_that_wait_are_cancelled_when_the_client_leaves() {
    enter_namespace!("", RESOLV);
    let queries = dns::start();
    let server = Server::start(&["--connect-timeout", "60"]);
    let flood = flood_with(&server, &|_| V4, CONNECT);
    wait_until("names are looked up", TIMEOUT, || distinct(&queries) >= 8);
    // A reset ends a lookup at once, and a FIN after two seconds.
    flood.into_iter().for_each(|client| reset(*client.downcast().expect("a connection")));
    // Those that have begun end after a second.
    let target = echo_server();
    let mut stream = request_from(&server, V4, CONNECT, "good.example", target.port());
    assert_eq!(read_reply(&mut stream).0, 0);
    let looked_up = distinct(&queries);
    assert!(looked_up < 200, "{looked_up} names were looked up");
}

#[test]
fn threads_of_lookups_end_and_an_idle_server_does_not_wake_up() {
    enter_namespace!("", RESOLV);
    dns::start();
    let server = Server::start(&["--threads", "2"]);
    let names = (0..60).map(|n| format!("silent.n{n}"));
    for mut stream in names.map(|name| request_from(&server, V4, CONNECT, &name, 9)).collect::<Vec<_>>() {
        assert_eq!(read_reply(&mut stream).0, 1);
    }
    wait_until("all threads of lookups have ended", TIMEOUT, || {
        !threads(&server).0.iter().any(|name| name == "s5-blocking")
    });
    // Without connections, the last timers of the sessions have ended too.
    let mut waits = 0;
    wait_until("one second without a wake-up", TIMEOUT, || {
        waits = threads(&server).1;
        thread::sleep(Duration::from_secs(1));
        threads(&server).1 == waits
    });
}
