//! CONNECT by name: several addresses (RFC 8305), and resolvers that fail or do not answer. Each test runs in a new
//! network namespace with an /etc/hosts and a resolver.

use crate::*;

fn at(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().expect("valid address"), port)
}

const PAIR: [&str; 2] = ["127.0.0.2", "127.0.0.3"];

#[test]
fn connect_tries_the_next_address_at_once_after_a_refusal() {
    let hosts = "127.0.0.2 pair\n127.0.0.3 pair\n::1 dual\n127.0.0.1 dual\n";
    enter_namespace!(hosts, "");
    let server = Server::start(&[]);
    // The resolver's order is unknown. In one of the rounds the refusing address is first.
    for (name, ip) in [("pair", PAIR[0]), ("pair", PAIR[1]), ("dual", "::1"), ("dual", "127.0.0.1")] {
        let target = TcpListener::bind((ip, 0)).expect("free port");
        let port = target.local_addr().expect("local address").port();
        let time = fastest(|| {
            let (_stream, rep, bnd) = open_by_name(&server, CONNECT, name, port);
            assert_eq!((rep, bnd), (0, accept(&target).1), "{name} at {ip}");
        });
        assert!(time < Duration::from_millis(200), "{name} at {ip}: took {time:?}");
    }
}

/// An NSS module that is loaded in the sandbox, and lists the addresses of the machine by netlink.
#[test]
fn name_is_resolved_by_another_nss_module() {
    enter_namespace!("", "");
    let mut dirs = fs::read_dir("/usr/lib").expect("libraries").flatten();
    if !dirs.any(|dir| dir.path().join("libnss_myhostname.so.2").exists()) {
        return skip("libnss-myhostname is not installed");
    }
    let dir = temp_dir();
    let nsswitch = write_file(dir.path(), "nsswitch.conf", "hosts: files myhostname\n");
    let mounted = Command::new("mount").args(["--bind", &nsswitch, "/etc/nsswitch.conf"]).status();
    assert!(mounted.expect("mount runs").success());
    let name = fs::read_to_string("/proc/sys/kernel/hostname").expect("the name of this machine");
    let server = Server::start(&[]);
    // 127.0.0.2 and ::1 on a machine without other addresses.
    let target = TcpListener::bind("127.0.0.2:0").expect("free port");
    let port = target.local_addr().expect("local address").port();
    assert_eq!(open_by_name(&server, CONNECT, name.trim(), port).1, 0, "{}", server.log());
}

#[test]
fn connect_tries_the_next_address_after_250_ms_of_silence() {
    let hosts = "127.0.0.2 pair\n127.0.0.3 pair\n";
    enter_namespace!(hosts, "");
    let server = Server::start(&[]);
    let times = [[PAIR[0], PAIR[1]], [PAIR[1], PAIR[0]]].map(|[silent, listening]| {
        let silent = FullBacklog::at(at(silent, 0));
        let target = TcpListener::bind(at(listening, silent.addr.port())).expect("free port");
        fastest(|| {
            assert_eq!(open_by_name(&server, CONNECT, "pair", silent.addr.port()).1, 0);
            accept(&target);
        })
    });
    // In one of the two rounds the silent address is first.
    let [fast, slow] = if times[0] < times[1] { times } else { [times[1], times[0]] };
    assert!(fast < Duration::from_millis(240), "{fast:?}");
    assert!(slow >= Duration::from_millis(245) && slow < Duration::from_secs(2), "{slow:?}");
}

#[test]
fn connect_rep_is_the_most_specific_error_of_all_addresses() {
    let hosts = "::1 dual\n127.0.0.1 dual\n\
                 2001:db8::1 mixed\n127.0.0.1 mixed\n\
                 192.0.2.1 away\n2001:db8::1 away\n\
                 192.0.2.1 slow\n127.0.0.2 slow\n\
                 224.0.0.1 many\n";
    enter_namespace!(hosts, "");
    let server = Server::start(&["--connect-timeout", "300ms"]);
    let rep = |name, port| open_by_name(&server, CONNECT, name, port).1;
    let closed = closed_port().port();
    assert_eq!(rep("dual", closed), 5, "both refuse");
    assert_eq!(rep("mixed", closed), 5, "one has no route, one refuses");
    assert_eq!(rep("away", closed), 3, "both have no route");
    let silent = FullBacklog::at(at("127.0.0.2", 0));
    assert_eq!(rep("slow", silent.addr.port()), 6, "one has no route, one is silent");
    assert_eq!(rep("many", closed), 3, "multicast");
    assert_eq!(rep("127.0.0.1", closed), 5, "an address as a name");
    for dst in ["192.0.2.1:9", "[2001:db8::1]:9"] {
        assert_eq!(open(&server, CONNECT, dst.parse().expect("valid address")).1, 3, "{dst}");
    }
}

#[test]
fn connect_by_name_skips_addresses_of_the_server() {
    let hosts = "127.0.0.2 pair\n127.0.0.1 pair\n127.0.0.1 here\n";
    enter_namespace!(hosts, "");
    let server = Server::start(&[]);
    let port = server.addr().port();
    assert_eq!(open_by_name(&server, CONNECT, "here", port).1, 2);
    assert_eq!(open_by_name(&server, CONNECT, "pair", port).1, 5, "the port of the other address is closed");
    let target = TcpListener::bind(at("127.0.0.2", port)).expect("free port");
    let (_stream, rep, bnd) = open_by_name(&server, CONNECT, "pair", port);
    assert_eq!((rep, bnd), (0, accept(&target).1));
}

#[test]
fn connect_rep_depends_on_the_resolver_error() {
    enter_namespace!("", dns::RESOLV);
    let queries = dns::start();
    let server = Server::start(&["--connect-timeout", "300ms"]);
    let rep = |name| open_by_name(&server, CONNECT, name, 9).1;
    assert_eq!(rep("nx.example"), 4, "not found");
    assert_eq!(rep("servfail.example"), 1, "a resolver that fails");
    let (time, rep_of_silent) = timed(|| rep("silent.example"));
    assert_eq!(rep_of_silent, 1, "a silent resolver");
    assert!(time >= Duration::from_millis(290) && time < Duration::from_secs(3), "{time:?}");
    // Invalid host names are not sent to the resolver.
    queries.lock().expect("not poisoned").clear();
    let long_label = format!("{}.example", "a".repeat(64));
    let long_name = "a.".repeat(127) + "a";
    for name in ["a..b", ".example", "a b", "a/b", "a%b", "$(id)", "a:b", &long_label, &long_name] {
        assert_eq!(rep(name), 4, "{name}");
    }
    let queries = queries.lock().expect("not poisoned");
    assert!(queries.is_empty(), "{queries:?}");
}

#[test]
fn lookup_is_cancelled_when_the_client_disconnects() {
    enter_namespace!("", dns::RESOLV);
    let queries = dns::start();
    for (command, name) in [(CONNECT, "connect"), (BIND, "bind")] {
        let server = Server::start(&["--connect-timeout", "60"]);
        let mut stream = greet(&server);
        stream.write_all(&request_by_name(command, "silent.example", 9)).expect("request sent");
        wait_until("the resolver is queried", TIMEOUT, || !queries.lock().expect("not poisoned").is_empty());
        drop(stream);
        let log = server.wait_log(|log| log.contains("client disconnected"));
        assert!(log.contains(&format!("command={name} to=\"silent.example:9\"")), "{log}");
        queries.lock().expect("not poisoned").clear();
    }
}
