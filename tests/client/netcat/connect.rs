//! Establishing a tunnel: -z, retries, source addresses and local name resolution. Also: invalid options.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use crate::support::scripted::{SELECT_NO_AUTH, SUCCESS_REPLY, ScriptedServer, Step, reply_with, send, text};
use crate::support::{Server, TIMEOUT, closed_port, echo_server, in_namespace, listener, run, s5, tcp_server};

/// Runs s5 and returns its exit status and stderr.
fn run_status(args: &[&str]) -> (Option<i32>, String) {
    let output = run(s5().args(args), b"", TIMEOUT);
    assert!(output.stdout.is_empty(), "{args:?}: output on stdout");
    (output.status.code(), text(&output.stderr))
}

#[test]
fn z_prints_nothing_without_v_and_exits_with_the_result() {
    let (server, echo, down) = (Server::start(&[]), echo_server().to_string(), closed_port().to_string());
    let proxy = server.addr().to_string();
    for (target, expected) in [(&echo, 0), (&down, 105)] {
        assert_eq!(run_status(&["connect", "-z", "-x", &proxy, target]), (Some(expected), String::new()));
        let (code, stderr) = run_status(&["connect", "-zv", "-x", &proxy, target]);
        assert_eq!((code, stderr.lines().count()), (Some(expected), 1), "{stderr}");
    }
    assert_eq!(run_status(&["connect", "-z", "-x", &down, &echo]), (Some(7), String::new()));
    // Usage errors are printed even with -z.
    assert_eq!(run_status(&["connect", "-z", "nonsense"]).1.lines().count(), 1);
}

#[test]
fn z_without_target_sends_no_request() {
    for (userinfo, script, sent) in [
        ("", vec![Step::Greeting, send(SELECT_NO_AUTH), Step::Request], vec![vec![5, 1, 0]]),
        (
            "alice:secret@",
            vec![Step::Greeting, send(&[5, 2]), Step::Login, send(&[1, 0]), Step::Request],
            vec![vec![5, 2, 0, 2], [&[1, 5][..], b"alice", &[6], b"secret"].concat()],
        ),
    ] {
        let proxy = ScriptedServer::start(script);
        let (code, stderr) = run_status(&["connect", "-zv", "-x", &format!("{userinfo}{}", proxy.addr)]);
        assert_eq!((code, stderr.lines().count()), (Some(0), 1), "{stderr}");
        assert_eq!(proxy.messages(), sent, "messages to the proxy");
    }
    let server = Server::start(&["--users", "/dev/null"]);
    assert_eq!(run_status(&["connect", "-z", "-x", &server.addr().to_string()]), (Some(67), String::new()));
    let (code, stderr) = run_status(&["connect", "-z", "--direct"]);
    assert_eq!((code, stderr.lines().count()), (Some(2), 1), "{stderr}");
}

#[test]
fn vv_prints_the_offered_and_the_selected_method() {
    let server = Server::start(&[]);
    for (userinfo, offered) in [("", "none"), ("u:p@", "none, password")] {
        let (code, stderr) = run_status(&["connect", "-zvv", "-x", &format!("{userinfo}{}", server.addr())]);
        let line = format!("proxy {} selected method none (offered: {offered})\n", server.addr());
        assert!(code == Some(0) && stderr.contains(&line), "{stderr}");
    }
}

#[test]
fn udp_z_reports_whether_association_succeeds() {
    let server = Server::start(&[]);
    assert_eq!(run_status(&["udp", "-z", "-x", &server.addr().to_string()]), (Some(0), String::new()));
    let proxy = ScriptedServer::start(reply_with(&[5, 7, 0, 1, 0, 0, 0, 0, 0, 0]));
    assert_eq!(run_status(&["udp", "-z", "-x", &proxy.url()]), (Some(107), String::new()));
}

/// A proxy that closes the first `failures` connections, and then succeeds.
fn recovering_proxy(failures: usize) -> SocketAddr {
    let count = std::sync::atomic::AtomicUsize::new(0);
    tcp_server(Ipv4Addr::LOCALHOST.into(), move |mut stream| {
        use std::io::{Read as _, Write as _};
        if count.fetch_add(1, std::sync::atomic::Ordering::Relaxed) < failures {
            return;
        }
        let mut bytes = [0; 64];
        let _ = stream.read(&mut bytes).and_then(|_| stream.write_all(SELECT_NO_AUTH));
        let _ = stream.read(&mut bytes).and_then(|_| stream.write_all(SUCCESS_REPLY));
        let _ = stream.read(&mut bytes);
    })
}

#[test]
fn retry_repeats_until_success() {
    let proxy = recovering_proxy(3).to_string();
    assert_eq!(
        run_status(&["connect", "-x", &proxy, "target.example:80"]).0,
        Some(97),
        "without --retry there is one try"
    );
    let (code, stderr) = run_status(&["connect", "--retry", "10", "-x", &proxy, "target.example:80"]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
}

#[test]
fn retry_exits_with_the_last_error_at_its_time_limit() {
    let started = Instant::now();
    let down = closed_port().to_string();
    let (code, stderr) = run_status(&["connect", "--retry", "400ms", "-x", &down, "target.example:80"]);
    assert_eq!(code, Some(7), "{stderr}");
    assert!(stderr.contains("connection refused") && stderr.contains(" attempts)"), "{stderr}");
    assert!(
        (Duration::from_millis(350)..Duration::from_secs(3)).contains(&started.elapsed()),
        "{:?}",
        started.elapsed()
    );
    // The time limit also ends an attempt that hangs.
    let proxy = ScriptedServer::start(vec![Step::WaitForClose]);
    let (code, stderr) = run_status(&["connect", "--retry", "300ms", "-x", &proxy.url(), "target.example:80"]);
    assert_eq!((code, stderr.contains("timed out after")), (Some(28), true), "{stderr}");
}

#[test]
fn retry_does_not_retry_final_errors() {
    let cases: [(Vec<Step>, i32); 6] = [
        (vec![Step::Greeting, send(&[5, 0xff])], 67),
        (vec![Step::Greeting, send(b"HTTP/1.1 400")], 97),
        (vec![Step::Greeting, send(&[5, 1])], 97),
        (reply_with(&[5, 2, 0, 1, 0, 0, 0, 0, 0, 0]), 102),
        (reply_with(&[5, 7, 0, 1, 0, 0, 0, 0, 0, 0]), 107),
        (reply_with(&[5, 8, 0, 1, 0, 0, 0, 0, 0, 0]), 108),
    ];
    for (script, expected) in cases {
        // The proxy accepts one connection, so a second attempt would fail with another status.
        let proxy = ScriptedServer::start(script);
        let (code, stderr) = run_status(&["connect", "--retry", "30", "-x", &proxy.url(), "target.example:80"]);
        assert_eq!(code, Some(expected), "{stderr}");
        assert!(!stderr.contains("attempts"), "{stderr}");
    }
    let proxy = closed_port().to_string();
    assert_eq!(run_status(&["connect", "--retry", "30", "-s", "192.0.2.9", "-x", &proxy, "a.example:80"]).0, Some(45));
}

#[test]
fn timeout_applies_to_each_try() {
    let silent = ScriptedServer::start(vec![Step::WaitForClose]);
    // After the first connection, the proxy no longer listens.
    let args = ["connect", "--retry", "1s", "-w", "200ms", "-x", &silent.url(), "target.example:80"];
    let (code, stderr) = run_status(&args);
    assert_eq!(code, Some(7), "{stderr}");
}

#[test]
fn source_options_apply_to_the_connection_to_the_proxy() {
    let (listener, addr) = listener(Ipv4Addr::LOCALHOST.into());
    let port = closed_port().port().to_string();
    for args in [&["-s", "127.0.0.9"][..], &["-p", &port], &["-s", "127.0.0.9", "-p", &port]] {
        let mut command = s5();
        command.args(["connect", "-z", "-x", &addr.to_string()]).args(args).args(["-w", "5", "a.example:80"]);
        let client = std::thread::spawn(move || run(&mut command, b"", TIMEOUT));
        let (_, peer) = listener.accept().expect("connection accepted");
        client.join().expect("the thread does not panic");
        assert!(!args.contains(&"-s") || peer.ip() == Ipv4Addr::new(127, 0, 0, 9), "{args:?}: {peer}");
        assert!(!args.contains(&"-p") || peer.port().to_string() == port, "{args:?}: {peer}");
    }
    for args in [&["-4", "-6"][..], &["-4", "-s", "::1"], &["-p", "0"], &["-s", "localhost"]] {
        let (code, stderr) = run_status(&[&["connect", "a.example:80"], args].concat());
        assert_eq!((code, stderr.lines().count()), (Some(2), 1), "{args:?}: {stderr}");
    }
    let (code, _) = run_status(&["connect", "-4", "-x", "unix:/nonexistent", "a.example:80"]);
    assert_eq!(code, Some(2), "-4 with a Unix socket");
}

#[test]
fn ipv4_and_ipv6_options_restrict_the_family() {
    // The proxy has only the address ::1, so -4 leaves no address.
    let proxy = TcpListener::bind("[::1]:0").and_then(|listener| listener.local_addr()).expect("free port").to_string();
    let (code, stderr) = run_status(&["connect", "-4", "-x", &proxy, "a.example:80"]);
    assert_eq!(code, Some(5), "{stderr}");
    assert_eq!(stderr, format!("s5: proxy {proxy}: not an IPv4 address, as -4 or -s requires\n"));
    let (code, stderr) = run_status(&["connect", "-6", "--direct", "127.0.0.1:80"]);
    assert_eq!((code, &*stderr), (Some(6), "s5: target 127.0.0.1:80: not an IPv6 address, as -6 or -s requires\n"));
    assert_eq!(run_status(&["connect", "-6", "-x", &proxy, "a.example:80"]).0, Some(7));
}

#[test]
fn resolve_local_tries_all_addresses_of_the_target() {
    let hosts = "127.0.0.1 localhost\n127.0.0.2 pair.test\n127.0.0.3 pair.test\n";
    if !in_namespace(
        "netcat::connect::resolve_local_tries_all_addresses_of_the_target",
        hosts,
        "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n",
    ) {
        return;
    }
    let proxy = ScriptedServer::start(reply_with(SUCCESS_REPLY));
    let (code, stderr) = run_status(&["connect", "-z", "-R", "local", "-x", &proxy.url(), "localhost:80"]);
    assert_eq!(code, Some(0), "{stderr}");
    assert_eq!(proxy.messages()[1], [5, 1, 0, 1, 127, 0, 0, 1, 0, 80]);
    // Only one address of the target accepts connections.
    let listener = TcpListener::bind("127.0.0.3:0").expect("free port");
    let server = Server::start(&[]);
    let target = format!("pair.test:{}", listener.local_addr().expect("local address").port());
    let (code, stderr) = run_status(&["connect", "-z", "-v", "-R", "local", "-x", &server.addr().to_string(), &target]);
    assert_eq!(code, Some(0), "{stderr}");
    server.wait_log(|log| log.contains("127.0.0.2:"));
    let (code, stderr) = run_status(&["connect", "-R", "local", "-x", &server.addr().to_string(), "unknown.test:80"]);
    assert_eq!(code, Some(6), "{stderr}");
    assert!(stderr.contains("resolving the target's name, for unknown.test:80"), "{stderr}");
}

#[test]
fn option_of_another_mode_is_a_usage_error_with_reason() {
    let table = [
        ("bind -l 1", "with bind, the proxy listens"),
        ("bind -k", "bind does not support -k: "),
        ("bind --direct", "bind requires a proxy"),
        ("connect --address-file f a:1", "only bind uses it"),
        ("connect -n 1 a:1", "only udp uses it"),
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
        let (code, stderr) = run_status(&line.split(' ').collect::<Vec<_>>());
        assert_eq!((code, stderr.lines().count()), (Some(2), 1), "{line}: {stderr}");
        assert!(stderr.contains(reason), "{line}: {stderr}");
    }
    // Options of nc that have no effect here are accepted.
    let (server, echo) = (Server::start(&[]), echo_server().to_string());
    let args = ["connect", "-N", "-X", "5", "-x", &server.addr().to_string(), "-w3", &echo];
    assert_eq!(run_status(&args), (Some(0), String::new()));
}

#[test]
fn errors_before_connecting_respect_quiet_z_and_json() {
    let run_without_password = |args: &[&str]| {
        let mut command = s5();
        let output =
            run(command.env("CI", "true").args(["connect", "-P", "alice"]).args(args).arg("a.example:1"), b"", TIMEOUT);
        (output.status.code(), text(&output.stderr))
    };
    assert_eq!(run_without_password(&["-z"]), (Some(67), String::new()));
    assert_eq!(run_without_password(&["--quiet"]), (Some(67), String::new()));
    assert_eq!(run_status(&["connect", "--quiet", "-l", "192.0.2.9:1", "a.example:1"]), (Some(45), String::new()));
    let (code, stderr) = run_without_password(&["--json"]);
    assert_eq!((code, stderr.lines().count()), (Some(67), 1), "{stderr}");
    assert!(stderr.starts_with('{') && stderr.contains("\"status\":67"), "{stderr}");
}

#[test]
fn target_host_can_have_the_name_of_a_mode() {
    for host in ["help", "connect", "serve"] {
        let proxy = ScriptedServer::start(reply_with(&[5, 4, 0, 1, 0, 0, 0, 0, 0, 0]));
        assert_eq!(run_status(&["connect", "-x", &proxy.url(), host, "80"]).0, Some(104), "{host}");
    }
}

#[test]
fn usage_errors_do_not_contain_passwords() {
    for args in [
        &["connect", "alice:topsecret@proxy.test"][..],
        &["udp", "socks5h://alice:topsecret@proxy.test:80", "x"],
        &["connect", "--proxy-auth-file", "alice:topsecret", "a.example:1"],
    ] {
        let (code, stderr) = run_status(args);
        assert_eq!((code, stderr.lines().count()), (Some(2), 1), "{args:?}: {stderr}");
        assert!(!stderr.contains("topsecret"), "{stderr}");
    }
}

#[test]
fn udp_relay_with_port_0_is_a_protocol_error() {
    let proxy = ScriptedServer::start(reply_with(SUCCESS_REPLY));
    let (code, stderr) = run_status(&["udp", "-x", &proxy.url(), "192.0.2.7:7"]);
    assert_eq!(code, Some(97), "{stderr}");
    assert!(stderr.contains("port 0 in the reply to UDP ASSOCIATE"), "{stderr}");
}
