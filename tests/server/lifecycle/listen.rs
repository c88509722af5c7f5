//! `--listen`: every form of the address, the log line, and errors.

use crate::*;

/// A client of a Unix socket, which the server must serve.
fn greet_unix(path: &Path) -> UnixStream {
    let mut stream = UnixStream::connect(path).expect("the listener accepts");
    stream.write_all(&[5, 1, 0]).expect("greeting sent");
    let mut selection = [0; 2];
    stream.read_exact(&mut selection).expect("method selection received");
    assert_eq!(selection, [5, 0]);
    stream
}

/// Returns the last line on the stderr of a server that must fail to start.
fn start_error(args: &[&str]) -> String {
    let output = run(s5().arg("serve").args(args), b"", TIMEOUT);
    assert!(!output.status.success(), "{args:?}");
    let stderr = String::from_utf8(output.stderr).expect("UTF-8");
    let last = stderr.lines().last().unwrap_or_default().to_owned();
    assert!(last.starts_with("s5: "), "{args:?}: {stderr}");
    last
}

#[test]
fn listen_binds_loopback_all_addresses_or_only_the_given_one() {
    // The first --listen, more arguments, and the addresses in the log.
    let table: [(&str, &[&str], &[&str]); 3] = [
        ("0", &[], &["127.0.0.1", "::1"]),
        ("*:0", &["--allow-open-relay"], &["0.0.0.0", "::"]),
        ("[::1]:0", &["--listen", "127.0.0.2:0", "--listen", "127.0.0.1:0"], &["::1", "127.0.0.2", "127.0.0.1"]),
    ];
    for (listen, more, expected) in table {
        let server = serve(listen, expected.len(), more);
        let ips: Vec<String> = server.addrs.iter().map(|addr| addr.ip().to_string()).collect();
        assert_eq!(ips, expected, "{listen}");
        // An unspecified address is connected to as loopback.
        server.addrs.iter().for_each(|addr| drop(greet_at(*addr)));
        if expected.len() == 2 {
            assert_eq!(server.addrs[0].port(), server.addrs[1].port(), "ports differ");
            let other = TcpStream::connect(("127.0.0.2", server.addr().port()));
            assert_eq!(other.is_ok(), listen == "*:0", "another loopback address");
        }
    }
    let server = serve("localhost:0", 1, &[]);
    assert!(server.addr().ip().is_loopback());
    greet_at(server.addr());
}

#[test]
fn default_listens_on_loopback_of_each_family() {
    // In a namespace, so that no other process uses the port.
    enter_namespace!("", "");
    let connect = || {
        let output = run(s5().args(["connect", &echo_server().to_string()]), b"hello", TIMEOUT);
        assert_eq!(String::from_utf8_lossy(&output.stdout), "hello", "{}", String::from_utf8_lossy(&output.stderr));
    };
    let server = Server::start_with(s5().arg("serve"), 2);
    let addrs = server.addrs.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(addrs, ["127.0.0.1:1080", "[::1]:1080"]);
    server.addrs.iter().for_each(|addr| drop(greet_at(*addr)));
    connect();
    // An error names the address that cannot be bound, not the option's value.
    let error = start_error(&[]);
    assert!(error.starts_with("s5: listen on 127.0.0.1:1080: address already in use"), "{error}");
    drop(server);
    let taken = TcpListener::bind("[::1]:1080").expect("free port");
    let error = start_error(&[]);
    assert!(error.starts_with("s5: listen on [::1]:1080: address already in use"), "{error}");
    drop(taken);
    // A host without IPv6.
    let removed = run(Command::new("ip").args(["address", "del", "::1/128", "dev", "lo"]), b"", TIMEOUT);
    assert!(removed.status.success(), "{}", String::from_utf8_lossy(&removed.stderr));
    let server = Server::start_with(s5().arg("serve"), 1);
    connect();
    let log = server.log();
    assert!(log.matches("listening on").count() == 1 && log.contains("listening on 127.0.0.1:1080"), "{log}");
    assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
}

#[test]
fn listen_and_check_skip_addresses_of_other_hosts_with_a_warning() {
    enter_namespace!("10.99.0.1 mixed.test\n127.0.0.1 mixed.test\n2001:db8::1 mixed.test\n::1 mixed.test\n", "");
    // The second option has an IPv4-mapped address.
    let args = ["--listen", "mixed.test:1080", "--listen", "[::ffff:127.0.0.2]:1080"];
    let server = Server::start_with(s5().arg("serve").args(args), 3);
    let addrs: BTreeSet<String> = server.addrs.iter().map(ToString::to_string).collect();
    assert_eq!(addrs, ["127.0.0.1:1080", "127.0.0.2:1080", "[::1]:1080"].map(Into::into).into());
    let check = run(s5().args(["serve", "--check"]).args(args), b"", TIMEOUT);
    assert!(check.status.success(), "{check:?}");
    for log in [server.log(), text(&check.stderr)] {
        for ip in ["10.99.0.1", "2001:db8::1"] {
            assert!(log.contains(&format!("listen on {ip}: not an address of this host, so it is skipped\n")), "{log}");
        }
    }
}

#[test]
fn ipv6_wildcard_logs_that_it_accepts_no_ipv4() {
    let log_of = |listen: &str, count, more: &[&str]| {
        let server = serve(listen, count, &[&["--allow-open-relay"], more].concat());
        assert!(TcpStream::connect((V6, server.addrs[count - 1].port())).is_ok());
        (server.addr().port(), server.log())
    };
    let (port, log) = log_of("[::]:0", 1, &[]);
    assert!(log.contains(&format!("[::]:{port} accepts only IPv6 (for IPv4 too, use --listen *:{port})")), "{log}");
    assert!(!log_of("*:0", 2, &[]).1.contains("IPv6 alone"));
    assert!(!log_of("[::1]:0", 1, &[]).1.contains("IPv6 alone"));
}

#[test]
fn unix_socket_serves_clients_and_is_removed_at_exit() {
    let dir = temp_dir();
    let path = dir.path().join("s5.sock");
    let listen = format!("unix:{}", path.display());
    let mut server = serve(&listen, 1, &[]);
    assert!(server.log().contains(&format!("listening on {listen}")));
    let mut stream = greet_unix(&path);
    let dst = echo_server();
    stream.write_all(&request(CONNECT, dst)).expect("request sent");
    stream.write_all(b"hello").expect("data sent");
    let mut answer = [0; 15];
    stream.read_exact(&mut answer).expect("a reply and the echo");
    assert_eq!((&answer[..2], &answer[10..]), (&[5, 0][..], &b"hello"[..]));
    drop(stream);
    assert!(server.wait_log(|log| log.contains("msg=session ")).contains("from=unix "));
    server.signal("TERM");
    assert!(server.wait(TIMEOUT).success());
    assert!(!path.exists());
}

#[test]
fn stale_unix_socket_is_replaced_and_one_in_use_or_another_file_is_kept() {
    let dir = temp_dir();
    let path = dir.path().join("s5.sock");
    let listen = format!("unix:{}", path.display());
    // Dropping a listener does not remove its file.
    drop(UnixListener::bind(&path).expect("bound"));
    let _server = serve(&listen, 1, &[]);
    let file = write_file(dir.path(), "precious", "text");
    for in_use in [listen, format!("unix:{file}")] {
        let error = start_error(&["--listen", &in_use]);
        assert!(error.contains(&in_use), "{error}");
    }
    assert_eq!(std::fs::read_to_string(file).expect("file read"), "text");
    greet_unix(&path);
}

#[test]
fn listen_error_names_a_port_in_use_or_an_address_of_another_host() {
    let (_taken, addr) = listener(V4);
    let error = start_error(&["--listen", "127.0.0.1:0", "--listen", &addr.to_string()]);
    assert!(error.contains(&addr.to_string()) && error.contains("in use"), "{error}");
    assert!(error.ends_with("(choose another address with --listen)"), "{error}");
    let (_taken, addr) = listener(V6);
    let error = start_error(&["--listen", &addr.port().to_string()]);
    assert!(error.contains("in use"), "{error}");
    let error = start_error(&["--listen", "192.0.2.200:0"]);
    assert!(error.contains("192.0.2.200:0"), "{error}");
}

#[test]
fn killed_server_can_rebind_its_port_at_once() {
    // In a network namespace, so that no other program can take the port before the second server.
    enter_namespace!("", "");
    let server = Server::start(&[]);
    let addr = server.addr();
    let mut stream = connect_to(&server, echo_server());
    ping(&mut stream, b"hello");
    drop(server);
    let restarted = serve(&addr.to_string(), 1, &[]);
    greet_at(restarted.addr());
}

#[test]
fn one_and_four_threads_serve_all_tunnels() {
    for threads in ["1", "4"] {
        let server = Server::start(&["--threads", threads]);
        let dst = echo_server();
        let mut streams: Vec<TcpStream> = (0..50).map(|_| connect_to(&server, dst)).collect();
        for _ in 0..3 {
            streams.iter_mut().for_each(|stream| ping(stream, b"hello"));
        }
        let tasks = std::fs::read_dir(format!("/proc/{}/task", server.pid())).expect("the server runs");
        let workers = tasks.flatten().filter(|task| {
            std::fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim() == "s5-worker")
        });
        assert_eq!(workers.count().to_string(), threads);
    }
}
