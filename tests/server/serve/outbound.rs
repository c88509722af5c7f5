//! --outbound, --outbound-interface, --mark and --prefer, on a host with two networks and several addresses.

use crate::guard::hosts::{Host, server_addr, server_addr_v6};
use crate::guard::tools::{assert_accepts_peer, assert_no_datagram, associate, log_in, send_request, udp_target};
use crate::udp::association::receive;
use crate::*;

/// The addresses of a client, the server and a target, and the expected source address.
type Row = (&'static str, SocketAddr, &'static str, &'static str);

fn rows() -> [Row; 2] {
    [("10.9.0.2", server_addr(), "10.9.1.2", "10.9.1.5"), ("fd09::2", server_addr_v6(), "fd09:1::2", "fd09:1::5")]
}

/// Runs commands in a namespace, here that of the test.
fn sh(mut command: Command, script: &str) {
    let output = run(command.args(["-c", &format!("set -e; {script}")]), b"", TIMEOUT);
    assert!(output.status.success(), "{script}: {}", text(&output.stderr));
}

/// A host with the further addresses 10.9.1.5 and fd09:1::5.
fn host() -> Host {
    let host = Host::new();
    sh(host.command("sh"), "ip addr add 10.9.1.5/24 dev s1; ip addr add fd09:1::5/64 dev s1 nodad");
    host
}

/// Opens a session. Returns the connection, REP and BND.
fn session((client, server, ..): Row, command: u8, dst: &str) -> (TcpStream, u8, SocketAddr) {
    let mut stream = log_in(server, ip(client), None);
    let (rep, bnd) = send_request(&mut stream, command, dst);
    (stream, rep, bnd)
}

/// Checks the source address of a connection and of datagrams, and the listener of BIND.
fn assert_source(row: Row) {
    let (client, server, at, source) = row;
    let (target, dst) = listener(ip(at));
    let (_tunnel, rep, bnd) = session(row, CONNECT, &dst.to_string());
    assert_eq!((rep, bnd.ip()), (0, ip(source)), "{row:?}");
    assert_eq!(accept(&target).1, bnd);
    let (target, dst) = udp_target(at);
    let association = associate(server, ip(client), None);
    association.send(dst, b"hello");
    let (data, from) = receive(&target);
    assert_eq!((data.as_slice(), from.ip()), (&b"hello"[..], ip(source)));
    target.send_to(b"answer", from).expect("datagram sent");
    assert_eq!(association.receive(), (dst, b"answer".to_vec()));
    let (mut bound, rep, bnd) = session(row, BIND, &dst.to_string());
    assert_eq!((rep, bnd.ip()), (0, ip(source)), "{row:?}");
    assert_accepts_peer(&mut bound, bnd, SocketAddr::new(ip(at), 0));
}

#[test]
fn outbound_is_the_source_address_of_all_commands_and_of_connections_to_hops() {
    enter_namespace!("", "");
    let host = host();
    let args = ["--outbound", "10.9.1.5", "--outbound", "fd09:1::5"];
    let server = host.serve(&args);
    for row in rows() {
        assert_source(row);
        let any = if row.1.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        assert_eq!(session(row, BIND, any).2.ip(), ip(row.3));
    }
    drop(server);
    // BIND listens at the address also if BND has another one.
    let server = host.serve(&[&args[..], &["--advertise", "203.0.113.5"]].concat());
    let (mut bound, rep, mut bnd) = session(rows()[0], BIND, "10.9.1.2:0");
    assert_eq!((rep, bnd.ip()), (0, ip("203.0.113.5")));
    bnd.set_ip(ip("10.9.1.1"));
    assert!(TcpStream::connect(bnd).is_err(), "BIND listens at all addresses");
    bnd.set_ip(ip("10.9.1.5"));
    assert_accepts_peer(&mut bound, bnd, addr("10.9.1.2:0"));
    drop(server);
    for row in rows() {
        let at = SocketAddr::new(ip(row.2), 1080).to_string();
        let upstream = serve(&at, 1, &["--allow-open-relay"]);
        let server = host.serve(&[&args[..], &["--via", &at]].concat());
        let echo = echo_server_at(ip(row.2));
        ping(&mut session(row, CONNECT, &echo.to_string()).0, b"hello");
        associate(row.1, ip(row.0), None).ping(udp_echo_server(ip(row.2)), b"hello");
        let from = format!("from={}", SocketAddr::new(ip(row.3), 0).to_string().trim_end_matches('0'));
        upstream.wait_log(|log| session_lines(log).iter().filter(|line| line.contains(&from)).count() == 2);
        drop(server);
    }
}

#[test]
fn outbound_of_one_family_refuses_the_other_one() {
    enter_namespace!("fd09:1::2 both.test v6.test\n10.9.1.2 both.test\n", "");
    let host = host();
    let server = host.serve(&["--outbound", "10.9.1.5"]);
    let [v4, v6] = rows();
    let (target, dst) = listener(ip("10.9.1.2"));
    let _v6_target = TcpListener::bind((ip("fd09:1::2"), dst.port())).expect("free port");
    let rep = |command, dst: &str| session(v6, command, dst).1;
    assert_eq!([CONNECT, BIND].map(|command| rep(command, &format!("[fd09:1::2]:{}", dst.port()))), [8, 8]);
    assert_eq!(rep(CONNECT, &format!("v6.test:{}", dst.port())), 4);
    assert_eq!(rep(CONNECT, &format!("both.test:{}", dst.port())), 0);
    assert_eq!(accept(&target).1.ip(), ip("10.9.1.5"));
    assert_eq!(session(v6, BIND, "[::]:0").2.ip(), ip("10.9.1.5"));
    let ((denied, denied_addr), (target, dst)) = (udp_target("fd09:1::2"), udp_target("10.9.1.2"));
    let association = associate(v4.1, ip(v4.0), None);
    association.send(denied_addr, b"dropped");
    association.send(dst, b"relayed");
    assert_eq!(receive(&target).0, b"relayed");
    assert_no_datagram(&denied);
    drop((association, server));
    let server = host.serve(&["--outbound", "10.9.1.5", "--via", "[fd09:1::2]:1080"]);
    assert_eq!(rep(CONNECT, "both.test:9"), 1);
    server
        .wait_log(|log| log.contains("proxy [fd09:1::2]:1080: no source address of its family (add one to --outbound"));
    drop(server);
    // The system chooses the address of the other family.
    sh(host.command("sh"), "ip addr del fd09:1::5/64 dev s1");
    let _server = host.serve(&["--outbound", "10.9.1.5", "--outbound", "::"]);
    assert_source(v4);
    assert_source((v6.0, v6.1, v6.2, "fd09:1::1"));
}

#[test]
fn mark_and_interface_select_the_route_of_all_commands_and_of_hops() {
    enter_namespace!("", "");
    let host = host();
    let far = [("10.9.0.2", server_addr(), "198.51.100.7"), ("fd09::2", server_addr_v6(), "2001:db8::7")];
    // The other hosts drop packets of IPv4 that arrive on the wrong network.
    let filter = "echo 1 > /proc/sys/net/ipv4/conf/all/rp_filter";
    sh(Command::new("sh"), &format!("ip addr add 198.51.100.7 dev lo; ip addr add 2001:db8::7 dev lo nodad; {filter}"));
    // Marked packets, and those of interface s1, leave by s1. All others leave by s0.
    let routes = "for mark in '' 'table 100'; do
            [ \"$mark\" ] || { ip route add default via 10.9.0.2 metric 1; ip -6 route add default via fd09::2 metric 1; }
            ip route add default via 10.9.1.2 metric 2 $mark; ip -6 route add default via fd09:1::2 metric 2 $mark
        done
        ip rule add fwmark 42 table 100; ip -6 rule add fwmark 42 table 100
        ip addr del 10.9.1.5/24 dev s1; ip addr del fd09:1::5/64 dev s1
        ip -6 route add local 2001:db8::9 dev lo src fd09:1::1 table 100";
    sh(host.command("sh"), routes);
    let by = |sources: [&'static str; 2]| {
        far.into_iter()
            .zip(sources)
            .for_each(|((client, server, at), source)| assert_source((client, server, at, source)));
    };
    let args: [&[&str]; 3] = [&[], &["--mark", "0x2a"], &["--outbound-interface", "s1"]];
    for (args, sources) in
        args.into_iter().zip([["10.9.0.1", "fd09::1"], ["10.9.1.1", "fd09:1::1"], ["10.9.1.1", "fd09:1::1"]])
    {
        let server = host.serve(args);
        by(sources);
        if args == ["--mark", "0x2a"] {
            server.wait_log(|log| log.contains("sandbox: only CAP_NET_RAW, "));
            // Only marked packets reach this address of the host, and so its listener.
            assert_eq!(session(rows()[1], CONNECT, "[2001:db8::9]:1080").1, 2);
        }
        drop(server);
        for ((client, server_addr, at), source) in far.into_iter().zip(sources) {
            let hop = SocketAddr::new(ip(at), 1080).to_string();
            let upstream = serve(&hop, 1, &["--allow-open-relay"]);
            let _server = host.serve(&[args, &["--via", &hop]].concat());
            let association = associate(server_addr, ip(client), None);
            association.ping(udp_echo_server(ip(at)), b"hello");
            drop(association);
            let from = format!("from={}", SocketAddr::new(ip(source), 0).to_string().trim_end_matches('0'));
            upstream.wait_log(|log| session_lines(log).iter().any(|line| line.contains(&from)));
        }
    }
}

#[test]
fn one_source_address_serves_more_connections_than_it_has_ports() {
    enter_namespace!("", "");
    fs::write("/proc/sys/net/ipv4/ip_local_port_range", "20000 20099").expect("range set");
    let dir = temp_dir();
    let path = dir.path().join("s5");
    let args = ["--outbound", "127.0.0.2", "--outbound", "::1", "--max-connections", "1000"];
    let server = serve(&format!("unix:{}", path.display()), 1, &args);
    let mut open = Vec::new();
    for (at, source) in [(V4, "127.0.0.2"), (V6, "::1")] {
        let targets = [1, 2, 3, 4].map(|port| TcpListener::bind((at, port)).expect("free port"));
        let mut connect = |target: &TcpListener| {
            let mut client = UnixStream::connect(&path).expect("the server accepts");
            let dst = target.local_addr().expect("local address");
            client.write_all(&[&[5, 1, 0][..], &request(CONNECT, dst)].concat()).expect("request sent");
            let mut answer = [0; 4];
            client.read_exact(&mut answer).expect("answered");
            if answer == [5, 0, 5, 0] {
                let (target, peer) = accept(target);
                assert_eq!(peer.ip(), ip(source));
                open.push((client, target));
            }
            answer[3]
        };
        assert!(targets.iter().cycle().take(160).all(|target| connect(target) == 0));
        // Each target has 40 connections, and 60 ports are left.
        assert!((1..=61).any(|_| connect(&targets[0]) == 1));
        let error = format!("to=\"{}\" ", targets[0].local_addr().expect("local address"));
        let is_logged = |line: &&str| {
            line.contains(&error) && line.contains(&format!("source address {source}: not an address of this machine"))
        };
        server.wait_log(|log| session_lines(log).iter().any(is_logged));
    }
}

#[test]
fn sockets_for_source_addresses_count_against_the_client() {
    let rules = [1, 2, 3, 4].map(|n| format!("to=127.0.0.1{n} outbound=127.0.0.2{n}"));
    let rules: Vec<&str> = rules.iter().flat_map(|rule| ["--allow", rule]).collect();
    // One client may have 3 of the 4: its session, the association, and the third socket of that.
    let (server, metrics) = crate::metrics::start(&[&["--max-connections", "4"], &rules[..]].concat());
    let association = crate::udp::association::Association::new(&server);
    let [first, others @ .., last] = [1, 2, 3, 4].map(|n| udp_echo_server(ip(&format!("127.0.0.1{n}"))));
    for target in [first, others[0], others[1]] {
        association.ping(target, b"hello");
    }
    association.send(last, b"refused");
    association.ping(first, b"hello");
    crate::metrics::Metrics::scrape(metrics).assert([("s5_datagrams_dropped_total{reason=\"unsent\"}", 1.0)]);
}

#[test]
fn prefer_selects_the_first_family_of_a_name() {
    enter_namespace!("::1 both.test\n127.0.0.1 both.test\n", "");
    for (prefer, first) in [("4", V4), ("6", V6)] {
        let server = Server::start(&["--prefer", prefer]);
        let ([v4, v6], port) = udp_sockets([V4, V6]);
        let listeners = [V4, V6].map(|ip| TcpListener::bind((ip, port)).expect("free port"));
        let (_tunnel, rep, bnd) = open_by_name(&server, CONNECT, "both.test", port);
        assert_eq!((rep, bnd.ip()), (0, first));
        let association = udp::association::Association::new(&server);
        association.send_raw(&udp::association::datagram_name(0, "both.test", port, b"hello"));
        assert_eq!(receive(if first.is_ipv4() { &v4 } else { &v6 }).0, b"hello");
        drop(listeners);
    }
}

#[test]
fn rules_select_the_source_address_of_all_commands_and_of_connections_to_hops() {
    enter_namespace!("", "");
    let host = host();
    let dir = temp_dir();
    let text = "allow from=10.9.0.2,fd09::2 to=10.9.1.2 outbound=10.9.1.5\nallow to=10.9.1.3 outbound=10.9.1.6\n\
                allow to=fd09:1::2 outbound=fd09:1::5,10.9.1.5\nallow from=10.9.0.2,fd09::2\n";
    let rules = write_file(dir.path(), "rules", text);
    sh(host.command("sh"), "ip addr add 10.9.1.6/24 dev s1; ip addr add 10.9.1.7/24 dev s1");
    let server = host.serve(&["--rules", &rules, "--outbound", "10.9.1.7", "-v"]);
    let [v4, v6] = rows();
    let other = (v4.0, v4.1, "10.9.1.3", "10.9.1.6");
    for row in [v4, other, v6, (v4.0, v4.1, "10.9.0.3", "10.9.1.7")] {
        assert_source(row);
        let field = format!(" outbound={} ", row.3);
        let count = |log: &str| session_lines(log).iter().filter(|line| line.contains(&field)).count();
        server.wait_log(|log| count(log) == 3);
    }
    // An association has a socket for each source address, and answers arrive at all of them.
    let targets = ["10.9.1.2", "10.9.1.3", "10.9.0.3", "fd09:1::2"].map(|at| udp_echo_server(ip(at)));
    let association = associate(v4.1, ip(v4.0), None);
    for target in [targets, targets].concat() {
        association.ping(target, b"hello");
    }
    drop(association);
    server.wait_log(|log| log.contains(" outbound=10.9.1.5,10.9.1.6,10.9.1.7,fd09:1::5 "));
    // A rule without an address of the family of the target, after a reload.
    fs::write(&rules, "allow to=fd09:1::2 outbound=10.9.1.5\n").expect("file written");
    assert!(server.reload().contains("rules: 1"), "{}", server.log());
    assert_eq!([CONNECT, BIND].map(|command| session(v6, command, "[fd09:1::2]:9").1), [8, 8]);
    fs::write(&rules, "# none\nallow to=10.9.1.2 outbound=192.0.2.9\n").expect("file written");
    let line = server.reload();
    let words = [format!("{rules} line 2: outbound=192.0.2.9: "), "keeping the current configuration".into()];
    assert!(words.iter().all(|words| line.contains(words)), "{line}");
    drop(server);
    let upstream = serve("10.9.1.2:1080", 1, &["--allow-open-relay"]);
    let server = host.serve(&["--hop", "h=10.9.1.2:1080", "--allow", "via=h outbound=10.9.1.6"]);
    let dst = echo_server_at(ip("10.9.1.2"));
    ping(&mut session(v4, CONNECT, &dst.to_string()).0, b"hello");
    let (mut bound, rep, bnd) = session(v4, BIND, "10.9.1.2:0");
    assert_eq!(rep, 0);
    assert_accepts_peer(&mut bound, bnd, addr("10.9.1.2:0"));
    drop(bound);
    associate(v4.1, ip(v4.0), None).ping(udp_echo_server(ip("10.9.1.2")), b"hello");
    for (server, field) in [(&upstream, "from=10.9.1.6:"), (&server, " via=\"h\" outbound=10.9.1.6 ")] {
        let count = |log: &str| session_lines(log).iter().filter(|line| line.contains(field)).count();
        server.wait_log(|log| count(log) == 3);
    }
}

#[test]
fn explain_shows_the_source_address_of_a_rule() {
    let args = ["serve", "--hop", "h=192.0.2.1", "--allow", "to=192.0.2.9 via=h outbound=192.0.2.7,2001:db8::7"];
    let output = run(s5().args(args).args(["--explain", "to=192.0.2.9:80 outbound=1.1.1.1"]), b"", TIMEOUT);
    let expected = "allow 192.0.2.9 via h from 192.0.2.7 from 2001:db8::7: --allow (allow to=192.0.2.9 ";
    assert!(text(&output.stdout).contains(expected), "{}", text(&output.stdout));
    let args = ["serve", "--outbound", "192.0.2.8", "--outbound", "::", "--explain", "to=192.0.2.9:80"];
    let output = run(s5().args(args), b"", TIMEOUT);
    assert!(text(&output.stdout).contains("allow 192.0.2.9 from 192.0.2.8: "), "{}", text(&output.stdout));
}

#[test]
fn interface_or_source_address_that_is_gone_is_named_with_its_option() {
    enter_namespace!("", "");
    let host = host();
    sh(host.command("sh"), "ip link add gone0 type veth peer gone1");
    let table = [
        ("--outbound-interface", "gone0", "link del gone0", "--outbound-interface gone0: no such device\""),
        (
            "--outbound",
            "10.9.1.5",
            "addr del 10.9.1.5/24 dev s1",
            "source address 10.9.1.5: not an address of this machine, or no free port (set by --outbound, or outbound= of a \
             rule)\"",
        ),
    ];
    for (option, value, script, error) in table {
        let server = host.serve(&["--hop", "h=10.9.1.2:1080", "--allow", "to=10.9.1.3 via=h", option, value]);
        sh(host.command("sh"), &format!("ip {script}"));
        for (command, dst) in [(CONNECT, "10.9.1.2:9"), (BIND, "10.9.1.2:9"), (CONNECT, "10.9.1.3:9")] {
            assert_eq!(session(rows()[0], command, dst).1, 1, "{option} {command} {dst}");
        }
        server.wait_log(|log| session_lines(log).iter().filter(|line| line.contains(error)).count() == 3);
    }
}

#[test]
fn outbound_options_that_cannot_work_are_errors_at_the_start() {
    let unusable = "not a global, private or loopback address (choose an address of this host)";
    let rows: [(&[&str], &str); 15] = [
        (&["--outbound", "224.0.0.1"], unusable),
        (&["--outbound", "::ffff:127.0.0.1"], unusable),
        (&["--outbound", "fe80::1"], unusable),
        (&["--allow", "outbound=255.255.255.255"], unusable),
        (&["--outbound-interface", ""], "--outbound-interface \"\": expected 1 to 15 bytes"),
        (&["--outbound-interface", "wg-to-the-office"], "\"wg-to-the-office\": expected 1 to 15 bytes (ip link shows"),
        (&["--outbound-interface", "wg-to-the-offic"], "--outbound-interface wg-to-the-offic: no such device"),
        (&["--outbound", "192.0.2.1"], "--outbound 192.0.2.1: "),
        (&["--outbound", "127.0.0.1", "--outbound", "2001:db8::1"], "--outbound 2001:db8::1: "),
        (&["--outbound", "127.0.0.1", "--outbound", "127.0.0.2"], "--outbound: at most one IPv4 and one IPv6 address"),
        (&["--outbound", "localhost"], "--outbound"),
        (&["--outbound-interface", "nowhere0"], "--outbound-interface nowhere0: "),
        (&["--mark", "-1"], "--mark"),
        (&["--prefer", "5"], "expected 4 or 6"),
        (&["--allow", "outbound=192.0.2.1"], "--allow: outbound=192.0.2.1: "),
    ];
    for (args, words) in rows {
        let output = run(s5().args(["serve", "--listen", "127.0.0.1:0"]).args(args), b"", TIMEOUT);
        assert_fails_with(&output, 2, &[words]);
    }
    if !is_installed("setpriv") || !rustix::process::geteuid().is_root() {
        return;
    }
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-all", "--inh-caps=-all", s5().get_program().to_str().expect("UTF-8 path")]);
    let output = run(command.args(["serve", "--listen", "127.0.0.1:0", "--mark", "7"]), b"", TIMEOUT);
    assert_fails_with(
        &output,
        2,
        &["--mark: permission denied (start s5 as root, or with CAP_NET_RAW; before Linux 5.17, "],
    );
}

#[test]
fn server_of_another_user_keeps_only_the_capability_for_the_mark() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    for args in [&["--run-as", "nobody"][..], &["--run-as", "nobody", "--no-sandbox"], &[]] {
        let server = Server::start(&[&["--mark", "7"], args].concat());
        let (mut tunnel, rep, _) = open(&server, CONNECT, echo_server());
        assert_eq!(rep, 0, "{args:?}");
        ping(&mut tunnel, b"hello");
        for task in fs::read_dir(format!("/proc/{}/task", server.pid())).expect("the server runs").flatten() {
            let status = fs::read_to_string(task.path().join("status")).expect("status read");
            for set in ["Prm", "Eff"] {
                assert!(status.contains(&format!("\nCap{set}:\t0000000000002000\n")), "{args:?} {status}");
            }
        }
    }
}
