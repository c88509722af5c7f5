//! `--via`, `--hop` and `via=`: sessions go through the upstream proxies, and never bypass them.

use super::tools::{
    alice_and_bob, assert_accepts_peer, assert_no_connection, assert_no_datagram, associate_anonymously, bind,
    is_closed, open_as, open_ok, rep, udp_target,
};
use crate::support::dns::Answer;
use crate::udp::association::datagram_name;
use crate::*;

/// Returns the number of logged sessions of a server that contain `what`.
fn logged_sessions(server: &Server, what: &str) -> usize {
    server.log().lines().filter(|line| line.contains("msg=session ") && line.contains(what)).count()
}

#[test]
fn all_commands_pass_through_one_and_several_hops() {
    let dir = temp_dir();
    let users = write_file(dir.path(), "users", &user_line("anna", "open sesame"));
    let unix = format!("unix:{}", dir.path().join("hop").display());
    let (plain, closed) = (Server::start(&[]), Server::start(&["--users", &users]));
    let by_unix = serve(&unix, 1, &[]);
    let [plain_url, closed_url] =
        [format!("{}", plain.addr()), format!("socks5h://anna:open%20sesame@{}", closed.addr())];
    let rows = [
        (plain_url.clone(), &plain),
        (closed_url.clone(), &closed),
        (unix.clone(), &by_unix),
        (format!("{plain_url},{closed_url}"), &closed),
        (format!("{closed_url},{plain_url}"), &plain),
        (format!("{unix},{closed_url},{plain_url}"), &plain),
    ];
    for (url, last) in rows {
        // The sessions of an earlier chain may end now, so only those to this target are counted. They are of CONNECT.
        let echo = echo_server();
        let rows = [format!("command=connect to=\"{echo}\" "), "command=bind ".into(), "command=udp ".into()];
        let before = rows.each_ref().map(|what| logged_sessions(last, what));
        let server = Server::start(&["--via", &url]);
        ping(&mut open_ok(&server, None, CONNECT, &echo.to_string()).0, b"connect");
        let (mut client, bnd) = bind(&server, None, "127.0.0.1:0");
        assert_accepts_peer(&mut client, bnd, addr("127.0.0.1:0"));
        drop(client);
        associate_anonymously(&server).ping(udp_echo_server(V4), b"udp");
        for (what, before) in rows.into_iter().zip(before) {
            wait_until("the last hop logs the session", TIMEOUT, || logged_sessions(last, &what) == before + 1);
            server.wait_log(|log| log.lines().any(|line| line.contains(&what) && line.contains(" via=\"--via\" ")));
        }
    }
    // The first hop sees only the address of the next hop.
    let next_hop = format!("to=\"{}\"", closed.addr());
    wait_until("the first hop logs a session", TIMEOUT, || logged_sessions(&by_unix, &next_hop) > 0);
}

#[test]
fn rules_select_route() {
    let [a, b, c] = [(); 3].map(|()| Server::start(&[]));
    let dir = temp_dir();
    let rules = "allow to=127.0.0.2 via=a\nallow to=127.0.0.3,127.0.0.5 via=b\nallow to=127.0.0.4 via=direct\n\
                 deny to=127.0.0.6\n";
    let rules = write_file(dir.path(), "rules", rules);
    let [at_a, at_b, at_c] = [("a=", &a), ("b=", &b), ("", &c)].map(|(name, hop)| format!("{name}{}", hop.addr()));
    let server = Server::start(&["--hop", &at_a, "--hop", &at_b, "--via", &at_c, "--rules", &rules]);
    let rows = [
        ("127.0.0.2", Some(&a), " via=\"a\" "),
        ("127.0.0.3", Some(&b), " via=\"b\" "),
        ("127.0.0.4", None, ""),
        ("127.0.0.5", Some(&b), " via=\"b\" "),
        ("127.0.0.1", Some(&c), " via=\"--via\" "),
    ];
    let mut addrs = Vec::new();
    for (at, hop, via) in rows {
        let echo = echo_server_at(ip(at));
        ping(&mut open_ok(&server, None, CONNECT, &echo.to_string()).0, b"hello");
        let dst = format!("to=\"{echo}\"");
        let log = server.wait_log(|log| log.contains(&dst));
        let line = log.lines().find(|line| line.contains(&dst)).expect("the session is logged");
        assert_eq!((line.contains(via), line.contains(" via=")), (true, hop.is_some()), "{line}");
        for other in [&a, &b, &c] {
            let is_selected = hop.is_some_and(|hop| std::ptr::eq(hop, other));
            wait_until("the hop logs the session", TIMEOUT, || !is_selected || logged_sessions(other, &dst) == 1);
            assert_eq!(logged_sessions(other, &dst), usize::from(is_selected), "{at}");
        }
        addrs.push(udp_echo_server(ip(at)));
    }
    let (denied, denied_addr) = udp_target("127.0.0.6");
    assert_eq!(rep(&server, CONNECT, "127.0.0.6:9"), 2);
    // Each datagram of an association is routed separately.
    let association = associate_anonymously(&server);
    for _ in 0..2 {
        for addr in &addrs {
            association.send(denied_addr, b"denied");
            association.ping(*addr, b"udp");
        }
    }
    assert_no_datagram(&denied);
    drop(association);
    for (hop, ups) in [(&a, "up=6 down=6"), (&b, "up=12 down=12"), (&c, "up=6 down=6")] {
        hop.wait_log(|log| log.lines().any(|line| line.contains("command=udp") && line.contains(ups)));
    }
}

/// Starts a server with this /etc/hosts, in a mount namespace.
fn with_hosts(hosts: &str, args: &[&str]) -> (tempfile::TempDir, Server) {
    let dir = temp_dir();
    let hosts = write_file(dir.path(), "hosts", hosts);
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", "mount --bind \"$1\" /etc/hosts && shift && exec \"$@\"", "sh", &hosts]);
    command.args([env!("CARGO_BIN_EXE_s5"), "serve", "--listen", "127.0.0.1:0"]).args(args);
    (dir, Server::start_with(&mut command, 1))
}

/// A hop whose /etc/hosts contains known.inside.test, a resolver that the hop does not need, and echo servers.
struct InsideHop {
    queries: dns::Queries,
    _dir: tempfile::TempDir,
    hop: Server,
    echo: SocketAddr,
    udp: SocketAddr,
}

impl InsideHop {
    fn new() -> Self {
        // Outside of the hop, the name resolves to an unused address.
        let queries = dns::start_with(|_, _| Answer::addrs(["127.0.0.9".parse().expect("valid address")]));
        let (_dir, hop) = with_hosts("127.0.0.1 known.inside.test\n", &[]);
        Self { queries, _dir, hop, echo: echo_server(), udp: udp_echo_server(V4) }
    }

    fn queries(&self) -> Vec<String> {
        std::mem::take(&mut *self.queries.lock().expect("not poisoned"))
    }

    /// Runs all commands by name, and checks that s5 resolves nothing.
    fn all_commands(&self, args: &[&str]) {
        let server = Server::start(args);
        let dst = format!("known.inside.test:{}", self.echo.port());
        ping(&mut open_ok(&server, None, CONNECT, &dst).0, b"hello");
        let association = associate_anonymously(&server);
        association.send_raw(&datagram_name(0, "known.inside.test", self.udp.port(), b"by name"));
        assert_eq!(association.receive(), (self.udp, b"by name".to_vec()), "{args:?}");
        let (mut client, bnd) = bind(&server, None, "known.inside.test:0");
        assert_accepts_peer(&mut client, bnd, addr("127.0.0.1:0"));
        assert_eq!(self.queries(), Vec::<String>::new(), "{args:?}");
    }
}

#[test]
fn hop_resolves_names_unless_address_rule_precedes() {
    enter_namespace!("", dns::RESOLV);
    let inside = InsideHop::new();
    let (url, named) = (inside.hop.addr().to_string(), format!("in={}", inside.hop.addr()));
    let rows: [&[&str]; 6] = [
        &["--via", &url],
        &["--via", &url, "--deny", "port=1"],
        &["--via", &url, "--allow", "to=.inside.test"],
        &["--hop", &named, "--allow", "to=.inside.test via=in"],
        &["--hop", &named, "--allow", "via=in"],
        &["--via", &url, "--deny", "port=1", "--allow", ""],
    ];
    rows.into_iter().for_each(|args| inside.all_commands(args));
    // A rule has an address, so s5 resolves the name and sends the address to the hop.
    for (rule, expected) in [("to=127.0.0.3", 5), ("to=127.0.0.9", 2)] {
        let server = Server::start(&["--via", &url, "--deny", rule]);
        let dst = format!("known.inside.test:{}", inside.echo.port());
        assert_eq!(rep(&server, CONNECT, &dst), expected, "{rule}");
        assert_eq!(inside.queries().first().map(String::as_str), Some("known.inside.test"));
        let dst = format!("to=\"127.0.0.9:{}\"", inside.echo.port());
        wait_until("the hop gets the address", TIMEOUT, || logged_sessions(&inside.hop, &dst) == 1);
    }
    assert_eq!(logged_sessions(&inside.hop, "127.0.0.9"), 1);
}

/// Starts a hop that answers the greeting with `selection` and the request with `reply`, then stays silent.
fn scripted(selection: Vec<u8>, reply: Vec<u8>) -> SocketAddr {
    tcp_server(V4, move |mut stream| {
        let mut greeting = [0; 3];
        let _ = stream.read_exact(&mut greeting).and_then(|()| stream.write_all(&selection));
        let _ = stream.read_exact(&mut [0; 10]).and_then(|()| stream.write_all(&reply));
        let _ = stream.read(&mut [0; 64]);
    })
}

#[test]
fn rep_of_hop_is_returned_to_client() {
    let denying = Server::start(&["--deny", "to=127.0.0.3"]);
    let server = Server::start(&["--via", &denying.addr().to_string()]);
    assert_eq!([CONNECT, BIND].map(|command| rep(&server, command, "127.0.0.3:9")), [2, 2]);
    assert_eq!(rep(&server, CONNECT, &closed_port().to_string()), 5);
    assert_eq!(rep(&server, CONNECT, "a b:9"), 4, "a name that the hop cannot resolve");
    let (target, dst) = listener(V4);
    for expected in (1..=8).chain([0x42]) {
        let hop = scripted(vec![5, 0], vec![5, expected, 0, 1, 0, 0, 0, 0, 0, 0]);
        let server = Server::start(&["--via", &hop.to_string()]);
        for command in [CONNECT, BIND, UDP_ASSOCIATE] {
            let (mut stream, rep, _) = open_as(&server, None, command, &dst.to_string());
            assert_eq!(rep, expected, "{command}");
            assert!(is_closed(&mut stream));
        }
    }
    assert_no_connection(&target);
}

#[test]
fn failing_hop_is_never_bypassed() {
    let dir = temp_dir();
    let users = write_file(dir.path(), "users", alice_and_bob());
    let locked = Server::start(&["--users", &users]);
    let silent = TcpListener::bind("127.0.0.1:0").expect("free port");
    let silent_url = silent.local_addr().expect("local address").to_string();
    let fake = |selection: &[u8], reply: &[u8]| scripted(selection.to_vec(), reply.to_vec()).to_string();
    let good = Server::start(&[]);
    // tests/client has all errors of the handshake.
    let hops = [
        closed_port().to_string(),
        format!("unix:{}", dir.path().join("missing").display()),
        silent_url.clone(),
        tcp_server(V4, drop).to_string(),
        fake(b"HTTP/1.0 400 Bad Request\r\n\r\n", b""),
        fake(&[5, 0xFF], b""),
        fake(&[5, 0], b""),
        fake(&[5, 0], &[4, 0, 0, 1, 0, 0, 0, 0, 0, 0]),
        format!("alice:wrong@{}", locked.addr()),
        // The second hop of a chain fails.
        format!("{},alice:wrong@{}", good.addr(), locked.addr()),
        format!("{},{silent_url}", good.addr()),
    ];
    let (target, dst) = listener(V4);
    for hop in &hops {
        let named = format!("h={hop}");
        let by_rule = ["--hop", &named, "--allow", "via=h"];
        for args in [&["--via", hop][..], &by_rule] {
            let server = Server::start(&[args, &["--connect-timeout", "200ms"]].concat());
            for command in [CONNECT, BIND, UDP_ASSOCIATE] {
                let (time, (mut stream, rep, _)) = timed(|| open_as(&server, None, command, &dst.to_string()));
                assert_eq!(rep, 1, "{hop}: {command}");
                assert!(time < TIMEOUT / 4, "{hop}: {command}: {time:?}");
                assert!(is_closed(&mut stream));
            }
            server.wait_log(|log| log.matches(" rep=1 up=0 down=0 ").count() == 3);
        }
    }
    assert_no_connection(&target);
    assert_eq!(rep(&Server::start(&["--via", &hops[0]]), CONNECT, &format!("localhost:{}", dst.port())), 1);
    assert_no_connection(&target);
}

#[test]
fn sessions_end_with_their_hop() {
    let (first, second) = (Server::start(&[]), Server::start(&[]));
    for is_first_killed in [true, false] {
        let mut hops = [Server::start(&[]), Server::start(&[])].map(Some);
        let url = hops.iter().flatten().map(|hop| hop.addr().to_string()).collect::<Vec<_>>().join(",");
        let server = Server::start(&["--via", &url, "-v"]);
        let (mut tunnel, _) = open_ok(&server, None, CONNECT, &echo_server().to_string());
        ping(&mut tunnel, b"hello");
        let mut association = associate_anonymously(&server);
        association.ping(udp_echo_server(V4), b"hello");
        let (mut waiting, _) = bind(&server, None, "127.0.0.1:0");
        hops[usize::from(!is_first_killed)].take();
        assert!(is_closed(&mut tunnel), "the tunnel is still open");
        // The next datagram needs the hop again.
        server.wait_log(|log| log.contains("closed its association"));
        association.send(closed_port(), b"lost");
        assert!(is_closed(&mut association.control), "the association is still open");
        assert_ne!(read_reply(&mut waiting).0, 0, "BIND at the killed hop succeeded");
        drop((tunnel, association, waiting));
        let log = server.wait_log(|log| session_lines(log).len() == 3);
        let line =
            *session_lines(&log).iter().find(|line| line.contains("command=udp")).expect("the session is logged");
        assert!(line.contains("connection refused") || line.contains("REP "), "{line}");
        assert_eq!(rep(&server, CONNECT, &closed_port().to_string()), 1);
    }
    // Sessions through other hops continue.
    let [at_first, at_second] = [("a=", &first), ("b=", &second)].map(|(name, hop)| format!("{name}{}", hop.addr()));
    let rules = ["--allow", "to=127.0.0.2 command=connect via=a", "--allow", "command=connect via=b"];
    let server = Server::start(&[&["--hop", &at_first, "--hop", &at_second][..], &rules].concat());
    let (mut tunnel, _) = open_ok(&server, None, CONNECT, &echo_server().to_string());
    drop(first);
    ping(&mut tunnel, b"still open");
}

#[test]
fn passwords_of_hops_are_neither_printed_nor_logged() {
    let dir = temp_dir();
    let users = write_file(dir.path(), "users", &user_line("anna", "open sesame"));
    let hop = Server::start(&["--users", &users]);
    let good = format!("anna:open%20sesame@{}", hop.addr());
    let named = format!("far=anna:not%20sesame@{}", hop.addr());
    let rules = write_file(dir.path(), "rules", "allow to=127.0.0.2 via=far\n");
    let args = ["-v", "-v", "--via", &good, "--hop", &named, "--rules", &rules];
    let server = Server::start(&args);
    assert_eq!(rep(&server, CONNECT, &echo_server().to_string()), 0);
    assert_eq!(rep(&server, CONNECT, &closed_port().to_string()), 5);
    assert_eq!(rep(&server, CONNECT, "127.0.0.2:9"), 1);
    let association = associate_anonymously(&server);
    association.send(addr("127.0.0.2:9"), b"dropped");
    server.wait_log(|log| log.contains(" hop=\"far\" "));
    drop((association, hop));
    assert_eq!(rep(&server, CONNECT, &closed_port().to_string()), 1);
    let printed = ["to=127.0.0.1:80", "to=127.0.0.2:80"].map(|request| {
        let output = run(s5().arg("serve").args(args).args(["--explain", request]), b"", TIMEOUT);
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    });
    std::fs::write(&rules, "allow to=127.0.0.2 via=near\n").expect("file written");
    server.reload();
    let log = server.wait_log(|log| log.matches("msg=session ").count() == 5);
    assert!(!log.contains("sesame") && !printed.concat().contains("sesame"), "{log}{printed:?}");
}

#[test]
fn errors_about_hops_do_not_contain_the_password() {
    let dir = temp_dir();
    let bad = [
        "http://anna:sesame@192.0.2.1:1080",
        "anna:sesame@192.0.2.1:99999",
        "anna:sesame@",
        "anna:sesame@[::1",
        "anna:open/sesame@a/b",
        "anna:sesame@a b",
        "socks5://anna:sesame@192.0.2.1:1080,anna:sesame@unix:/socket",
        "anna:,sesame@192.0.2.1",
        "sesame://anna@192.0.2.1:99999",
        "anna:ses@ame:sesame@192.0.2.1:x",
    ];
    let mut args: Vec<[String; 2]> = Vec::new();
    for url in bad {
        args.push(["--via".into(), url.into()]);
        args.extend([format!("a={url}"), format!("{url}=192.0.2.1"), url.into()].map(|hop| ["--hop".into(), hop]));
    }
    let hops = ["direct=anna:sesame@192.0.2.1", "=anna:sesame@192.0.2.1", "anna:sesame@192.0.2.1"];
    args.extend(hops.map(|hop| ["--hop".into(), hop.into()]));
    let rules = write_file(dir.path(), "rules", "deny port=1\nallow via=anna:sesame@192.0.2.1:1080\n");
    args.push(["--rules".into(), rules]);
    args.push(["--allow".into(), "via=socks5h://anna:sesame@192.0.2.1".into()]);
    for [option, value] in &args {
        let command = &mut s5();
        let output = run(command.args(["serve", "--listen", "127.0.0.1:0", "-v", "-v", option, value]), b"", TIMEOUT);
        let shown = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), shown.lines().count()), (Some(2), 1), "{option} {value}: {shown}");
        let subject = if value.contains("via=") { "via=" } else { option };
        assert!(shown.contains(subject) || option == "--rules" && shown.contains("via="), "{option} {value}: {shown}");
        // A scheme is no secret.
        assert!(!shown.contains("ame@") && (!shown.contains("sesame") || value.contains("sesame:")), "{shown}");
    }
}

#[test]
fn hop_gets_the_allowed_addresses_of_the_peer_of_bind_if_rules_depend_on_them() {
    enter_namespace!(
        "127.0.0.1 localhost\n127.0.0.3 bad.test two.test\n127.0.0.2 good.test two.test\n\
                      127.0.0.4 both.test\n127.0.0.5 both.test\n",
        ""
    );
    let hop = Server::start(&[]);
    let via = hop.addr().to_string();
    // Two possible routes, and a rule that depends on the port of the peer.
    let rules = ["deny to=127.0.0.3", "deny to=127.0.0.2 port=1", "allow to=127.0.0.9 outbound=127.0.0.1"];
    let args: Vec<&str> = ["--via", &via].into_iter().chain(rules.iter().flat_map(|rule| ["--rule", rule])).collect();
    let server = Server::start(&args);
    for (dst, expected) in [("bad.test:0", 2), ("bad.test:80", 2), ("good.test:0", 0), ("two.test:80", 0)] {
        let request = format!("command=bind to={dst}");
        let explained = run(s5().arg("serve").args(&args).args(["--explain", &request]), b"", TIMEOUT);
        assert_eq!(explained.status.success(), expected == 0, "{dst}: {explained:?}");
        let (mut client, rep, bnd) = open_as(&server, None, BIND, dst);
        assert_eq!(rep, expected, "{dst}");
        if rep == 0 {
            assert_accepts_peer(&mut client, bnd, addr("127.0.0.2:0"));
            drop(client);
            let port = dst.rsplit(':').next().expect("a port");
            let sent = format!(" command=bind to=\"127.0.0.2:{port}\" ");
            hop.wait_log(|log| session_lines(log).last().is_some_and(|line| line.contains(&sent)));
        }
    }
    // If all addresses are allowed, the hop accepts a peer from each of them.
    for from in ["127.0.0.4:0", "127.0.0.5:0"] {
        let (mut client, bnd) = bind(&server, None, "both.test:0");
        assert_accepts_peer(&mut client, bnd, addr(from));
    }
    // Without such rules, the hop resolves the name.
    let unresolved = ["--via", &via, "--deny", "port=1", "--explain", "command=bind to=unknown.test:0"];
    assert!(run(s5().arg("serve").args(unresolved), b"", TIMEOUT).status.success());
}
