//! Establishing a tunnel: -z, retries, source addresses and local name resolution. Also: invalid options.

use crate::bind::bound_address;
use crate::*;

#[test]
fn z_prints_nothing_without_v_and_exits_with_the_result() {
    let ((_server, proxy), echo, down) = (serve(), echo_server(), closed_port());
    for (target, expected) in [(echo, 0), (down, 105)] {
        assert_eq!(outcome(&format!("connect -z -x {proxy} {target}"), b""), failure(expected, ""));
        assert_line(&format!("connect -zv -x {proxy} {target}"), expected, &[]);
    }
    assert_eq!(outcome(&format!("connect -z -x {down} {echo}"), b""), failure(7, ""));
    let server = Server::start(&["--users", "/dev/null"]);
    assert_eq!(outcome(&format!("connect -z -x {}", server.addr()), b""), failure(67, ""));
    // A series of attempts that fails is worth a line.
    let lines = [
        (format!("connect -x {down} {echo}"), 7, "connection refused"),
        (format!("connect -x {proxy} {down}"), 105, "(REP 5)"),
        (format!("connect -x {down}"), 7, "connection refused"),
        (format!("udp -x {down}"), 7, "connection refused"),
        (format!("bind -x {down}"), 7, "connection refused"),
    ];
    let jobs = ["--retry", "--wait"].into_iter().flat_map(|option| lines.iter().map(move |line| (option, line)));
    run_all(jobs.collect(), |(option, (line, status, reason))| {
        assert_line(&format!("{line} -z {option} 1s"), *status, &[reason, " attempts)"]);
    });
    assert_eq!(outcome(&format!("connect -z --retry 1s --quiet -x {down} {echo}"), b""), failure(7, ""));
    // Usage errors are printed even with -z.
    assert_line("connect -z nonsense", 2, &[]);
    assert_line("connect -z --direct", 2, &[]);
}

#[test]
fn vv_prints_the_offered_and_the_selected_method() {
    let (_server, proxy) = serve();
    for (userinfo, offered) in [("", "none"), ("u:p@", "none, password")] {
        let (status, _, stderr) = outcome(&format!("connect -zvv -x {userinfo}{proxy}"), b"");
        let line = format!("proxy {proxy} selected method none (offered: {offered})\n");
        assert!(status == Some(0) && stderr.contains(&line), "{stderr}");
    }
}

/// A proxy that closes the first `failures` connections, and then succeeds.
fn recovering_proxy(failures: usize) -> SocketAddr {
    let count = AtomicUsize::new(0);
    tcp_server(V4, move |mut stream| {
        if count.fetch_add(1, Ordering::Relaxed) < failures {
            return;
        }
        for answer in [&[5, 0][..], &[5, 0, 0, 1, 0, 0, 0, 0, 0, 0], &[]] {
            let _ = stream.read(&mut [0; 64]).and_then(|_| stream.write_all(answer));
        }
    })
}

#[test]
fn retry_repeats_until_success() {
    let proxy = recovering_proxy(3);
    let status = outcome(&format!("connect -x {proxy} {TARGET}"), b"").0;
    assert_eq!(status, Some(97), "without --retry there is one try");
    assert_eq!(outcome(&format!("connect --retry 10 -x {proxy} {TARGET}"), b""), success(""));
}

#[test]
fn retry_exits_with_the_last_error_at_its_time_limit() {
    let started = Instant::now();
    let words = ["connection refused", " attempts)"];
    assert_line(&format!("connect --retry 1s -x {} {TARGET}", closed_port()), 7, &words);
    let time = started.elapsed();
    assert!((Duration::from_millis(950)..Duration::from_secs(4)).contains(&time), "{time:?}");
    // The time limit also ends an attempt that hangs.
    let proxy = ScriptedServer::start("> ...");
    assert_line(&format!("connect --retry 300ms -x {} {TARGET}", proxy.addr), 28, &["timed out after"]);
}

#[test]
fn retry_does_not_retry_final_errors() {
    let cases = [
        ("> {greeting}; < 05 ff".into(), 67),
        ("> {greeting}; < \"HTTP/1.1 400\"".into(), 97),
        ("> {greeting}; < 05 01".into(), 97),
        (reply("05 02 00 01 00*6"), 102),
        (reply("05 07 00 01 00*6"), 107),
        (reply("05 08 00 01 00*6"), 108),
    ];
    for (script, expected) in cases {
        // The proxy accepts one connection, so a second attempt would fail with another status.
        let proxy = ScriptedServer::start(&script);
        let (status, _, stderr) = outcome(&format!("connect --retry 30 -x {} {TARGET}", proxy.addr), b"");
        assert_eq!((status, stderr.contains("attempts")), (Some(expected), false), "{stderr}");
    }
    let args = format!("connect --retry 30 -s 192.0.2.9 -x {} {TARGET}", closed_port());
    assert_eq!(outcome(&args, b"").0, Some(45));
}

#[test]
fn timeout_applies_to_each_try() {
    // After the first connection, the proxy no longer listens.
    let silent = ScriptedServer::start("> ...");
    assert_line(&format!("connect --retry 1s -w 200ms -x {} {TARGET}", silent.addr), 7, &[]);
}

#[test]
fn source_options_apply_to_the_connection_to_the_proxy() {
    // No other process takes the port.
    enter_namespace!("", "");
    let (listener, addr) = listener(V4);
    let port = closed_port().port();
    for (args, ip, port) in [
        ("-s 127.0.0.9".into(), 9, None),
        (format!("-p {port}"), 1, Some(port)),
        (format!("-s 127.0.0.9 -p {port}"), 9, Some(port)),
    ] {
        let mut command = command(&format!("connect -z -x {addr} {args} -w 5 {TARGET}"));
        let client = std::thread::spawn(move || outcome_of(&mut command, b""));
        let (_, peer) = listener.accept().expect("connection accepted");
        client.join().expect("the thread does not panic");
        assert_eq!(peer.ip(), Ipv4Addr::new(127, 0, 0, ip), "{args}");
        assert!(port.is_none_or(|port| peer.port() == port), "{args}: {peer}");
    }
    for args in ["-4 -6", "-4 -s ::1", "-p 0", "-s localhost", "-4 -x unix:/nonexistent"] {
        assert_line(&format!("connect {TARGET} {args}"), 2, &[]);
    }
}

#[test]
fn ipv4_and_ipv6_options_restrict_the_family() {
    // With -R local, the family of an address of the target is restricted too.
    for (options, target, text) in [
        ("-4 -R local", "::1 80", "target [::1]:80: not an IPv4 address, as -4 or -s requires"),
        ("-6 -R local", "[::ffff:127.0.0.1]:80", "not an IPv6 address, as -6 or -s requires"),
    ] {
        for mode in ["connect", "udp", "bind"] {
            let server = if options.starts_with("-4") { "127.0.0.1:0" } else { "[::1]:0" };
            let server = crate::support::serve(server, 1, &[]);
            assert_line(&format!("{mode} {options} -x {} {target}", server.addr()), 6, &[text]);
            // Any peer has no family.
            bound_address(&start(&format!("bind {options} -x {}", server.addr())));
        }
    }
    // The proxy has only the address ::1, so -4 leaves no address.
    let proxy = TcpListener::bind("[::1]:0").and_then(|listener| listener.local_addr()).expect("free port");
    let line = format!("s5: proxy {proxy}: not an IPv4 address, as -4 or -s requires\n");
    assert_eq!(outcome(&format!("connect -4 -x {proxy} {TARGET}"), b""), failure(5, &line));
    let line = "s5: target 127.0.0.1:80: not an IPv6 address, as -6 or -s requires\n";
    assert_eq!(outcome("connect -6 --direct 127.0.0.1:80", b""), failure(6, line));
    assert_eq!(outcome(&format!("connect -6 -x {proxy} {TARGET}"), b"").0, Some(7));
}

#[test]
fn resolve_local_tries_all_addresses_of_the_target() {
    let hosts = "127.0.0.1 localhost\n127.0.0.2 pair.test\n127.0.0.3 pair.test\n";
    let resolv = "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n";
    enter_namespace!(hosts, resolv);
    let proxy = ScriptedServer::start(&format!("{NO_AUTH} {SUCCESS}"));
    assert_eq!(outcome(&format!("connect -z -R local -x {} localhost:80", proxy.addr), b""), success(""));
    assert_eq!(proxy.messages()[1], [5, 1, 0, 1, 127, 0, 0, 1, 0, 80]);
    // Only one address of the target accepts connections.
    let listener = TcpListener::bind("127.0.0.3:0").expect("free port");
    let port = listener.local_addr().expect("local address").port();
    let (server, proxy) = serve();
    assert_eq!(outcome(&format!("connect -z -v -R local -x {proxy} pair.test:{port}"), b"").0, Some(0));
    server.wait_log(|log| log.contains("127.0.0.2:"));
    let words = ["resolving the target's name, for unknown.test:80"];
    assert_line(&format!("connect -R local -x {proxy} unknown.test:80"), 6, &words);
}

#[test]
fn option_of_another_mode_is_a_usage_error_with_reason() {
    let table = [
        ("bind -l 1", "with bind, the proxy listens"),
        ("bind -k", "bind does not support -k: "),
        ("bind --direct", "bind requires a proxy"),
        ("connect --address-file f a:1", "only bind uses it"),
        ("connect --count 1 a:1", "only udp uses it"),
        ("connect --hex a:1", "only udp uses it"),
        ("udp -C a:1", "udp does not support -C: "),
        ("udp -F a:1", "udp does not support -F: "),
        ("udp -e cat a:1", "udp does not support -e: "),
        ("udp -c cat a:1", "udp does not support -c: "),
        ("udp -N a:1", "udp does not support -N: "),
        ("udp --progress a:1", "udp does not support --progress: "),
        ("connect -X 4 a:1", "only SOCKS5 is supported"),
        ("connect -X connect a:1", "only SOCKS5 is supported"),
        ("connect -k a:1", "-k requires -l"),
        ("bind a:1 b:1", "too many operands: expected one peer, found also \"b:1\""),
        ("connect -z -F a:1", "-z and -F"),
        ("connect -e x -c y a:1", "-e and -c cannot be combined"),
        ("connect -l 1 -z a:1", "-z and -l"),
        ("connect -z -q 1 a:1", "-q"),
        ("connect --direct -x p a:1", "--direct and --proxy"),
        ("udp --hex --raw a:1", "cannot be combined"),
        ("udp -l 1 -n 1 a:1", "-n"),
    ];
    for (line, reason) in table {
        assert_line(line, 2, &[reason]);
    }
    // Options of nc that have no effect here are accepted.
    let (_server, proxy) = serve();
    assert_eq!(outcome(&format!("connect -N -X 5 -x {proxy} -w3 {}", echo_server()), b""), success(""));
}

#[test]
fn errors_before_connecting_respect_quiet_z_and_json() {
    let without_password = |option: &str| {
        let mut command = command(&format!("connect -P alice {option} a.example:1"));
        outcome_of(command.env("CI", "true"), b"")
    };
    assert_eq!(without_password("-z"), failure(67, ""));
    assert_eq!(without_password("--quiet"), failure(67, ""));
    assert_eq!(outcome("connect --quiet -l 192.0.2.9:1 a.example:1", b""), failure(45, ""));
    let (status, _, stderr) = without_password("--json");
    assert_eq!((status, stderr.lines().count()), (Some(67), 1), "{stderr}");
    assert!(stderr.starts_with('{') && stderr.contains("\"status\":67"), "{stderr}");
}

#[test]
fn target_host_can_have_the_name_of_a_mode() {
    for host in ["help", "connect", "serve"] {
        let proxy = ScriptedServer::start(&reply("05 04 00 01 00*6"));
        assert_eq!(outcome(&format!("connect -x {} {host} 80", proxy.addr), b"").0, Some(104), "{host}");
    }
}

#[test]
fn usage_errors_do_not_contain_passwords() {
    for args in [
        "connect alice:topsecret@proxy.test",
        "connect alice:a@topsecret@proxy.test",
        "udp socks5h://alice:topsecret@proxy.test:80 x",
        "connect --proxy-auth-file alice:topsecret a.example:1",
    ] {
        assert_line(args, 2, &[]);
        assert!(!outcome(args, b"").2.contains("topsecret"), "{args}");
    }
}
