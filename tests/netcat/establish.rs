//! Getting there: only that, again and again, from somewhere, by names looked up here.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use crate::common::{Server, TIMEOUT, closed_port, echo_server, in_namespace, run, s5, tcp_server};
use crate::kit::listener;
use crate::scripted::{SELECT_NO_AUTH, SUCCESS_REPLY, ScriptedServer, Step, reply_with, send, text};

fn status(args: &[&str]) -> (Option<i32>, String) {
    let output = run(s5().args(args), b"", TIMEOUT);
    assert!(output.stdout.is_empty(), "{args:?}: stdout is data");
    (output.status.code(), text(&output.stderr))
}

#[test]
fn z_is_silent_unless_asked_and_answers_by_its_status() {
    let (server, echo, down) = (Server::start(&[]), echo_server().to_string(), closed_port().to_string());
    let proxy = server.addr().to_string();
    for (target, expected) in [(&echo, 0), (&down, 105)] {
        assert_eq!(status(&["connect", "-z", "-x", &proxy, target]), (Some(expected), String::new()));
        let (code, said) = status(&["connect", "-zv", "-x", &proxy, target]);
        assert_eq!((code, said.lines().count()), (Some(expected), 1), "{said}");
    }
    assert_eq!(status(&["connect", "-z", "-x", &down, &echo]), (Some(7), String::new()));
    // What is wrong with the command line is said all the same.
    assert_eq!(status(&["connect", "-z", "nonsense"]).1.lines().count(), 1);
}

#[test]
fn z_without_a_target_asks_the_proxy_for_nothing_but_to_let_us_in() {
    for (userinfo, script, sent) in [
        ("", vec![Step::Greeting, send(SELECT_NO_AUTH), Step::Request], vec![vec![5, 1, 0]]),
        (
            "alice:secret@",
            vec![Step::Greeting, send(&[5, 2]), Step::Login, send(&[1, 0]), Step::Request],
            vec![vec![5, 2, 0, 2], [&[1, 5][..], b"alice", &[6], b"secret"].concat()],
        ),
    ] {
        let proxy = ScriptedServer::start(script);
        let (code, said) = status(&["connect", "-zv", "-x", &format!("{userinfo}{}", proxy.addr)]);
        assert_eq!((code, said.lines().count()), (Some(0), 1), "{said}");
        assert_eq!(proxy.messages(), sent, "it was asked for something");
    }
    let server = Server::start(&["--users", "/dev/null"]);
    assert_eq!(status(&["connect", "-z", "-x", &server.addr().to_string()]), (Some(67), String::new()));
    let (code, said) = status(&["connect", "-z", "--direct"]);
    assert_eq!((code, said.lines().count()), (Some(2), 1), "{said}");
}

#[test]
fn z_of_udp_says_whether_the_proxy_associates() {
    let server = Server::start(&[]);
    assert_eq!(status(&["udp", "-z", "-x", &server.addr().to_string()]), (Some(0), String::new()));
    let proxy = ScriptedServer::start(reply_with(&[5, 7, 0, 1, 0, 0, 0, 0, 0, 0]));
    assert_eq!(status(&["udp", "-z", "-x", &proxy.url()]), (Some(107), String::new()));
}

/// A proxy that fails so often, and then succeeds.
fn recovering(failures: usize) -> SocketAddr {
    let count = std::sync::atomic::AtomicUsize::new(0);
    tcp_server(Ipv4Addr::LOCALHOST.into(), move |mut stream| {
        use std::io::{Read as _, Write as _};
        if count.fetch_add(1, std::sync::atomic::Ordering::Relaxed) < failures {
            return;
        }
        let mut octets = [0; 64];
        let _ = stream.read(&mut octets).and_then(|_| stream.write_all(SELECT_NO_AUTH));
        let _ = stream.read(&mut octets).and_then(|_| stream.write_all(SUCCESS_REPLY));
        let _ = stream.read(&mut octets);
    })
}

#[test]
fn wait_tries_again_until_it_works() {
    let proxy = recovering(3).to_string();
    assert_eq!(status(&["connect", "-x", &proxy, "target.example:80"]).0, Some(97), "once is not enough");
    let (code, said) = status(&["connect", "--wait", "10", "-x", &proxy, "target.example:80"]);
    assert_eq!((code, said.as_str()), (Some(0), ""));
}

#[test]
fn wait_ends_when_its_time_is_over_with_what_failed_last() {
    let began = Instant::now();
    let down = closed_port().to_string();
    let (code, said) = status(&["connect", "--wait", "400ms", "-x", &down, "target.example:80"]);
    assert_eq!(code, Some(7), "{said}");
    assert!(said.contains("connection refused") && said.contains(" tries)"), "{said}");
    assert!((Duration::from_millis(350)..Duration::from_secs(3)).contains(&began.elapsed()), "{:?}", began.elapsed());
    // A last try that has no time left does not hide why the others failed.
    let proxy = ScriptedServer::start(vec![Step::WaitForClose]);
    let (code, said) = status(&["connect", "--wait", "300ms", "-x", &proxy.url(), "target.example:80"]);
    assert_eq!((code, said.contains("timed out after")), (Some(28), true), "{said}");
}

#[test]
fn wait_does_not_try_again_what_would_fail_again() {
    let cases: [(Vec<Step>, i32); 6] = [
        (vec![Step::Greeting, send(&[5, 0xff])], 67),
        (vec![Step::Greeting, send(b"HTTP/1.1 400")], 97),
        (vec![Step::Greeting, send(&[5, 1])], 97),
        (reply_with(&[5, 2, 0, 1, 0, 0, 0, 0, 0, 0]), 102),
        (reply_with(&[5, 7, 0, 1, 0, 0, 0, 0, 0, 0]), 107),
        (reply_with(&[5, 8, 0, 1, 0, 0, 0, 0, 0, 0]), 108),
    ];
    for (script, expected) in cases {
        // A second try would find nobody.
        let proxy = ScriptedServer::start(script);
        let (code, said) = status(&["connect", "--wait", "30", "-x", &proxy.url(), "target.example:80"]);
        assert_eq!(code, Some(expected), "{said}");
        assert!(!said.contains("tries"), "{said}");
    }
    let proxy = closed_port().to_string();
    assert_eq!(status(&["connect", "--wait", "30", "-s", "192.0.2.9", "-x", &proxy, "a.example:80"]).0, Some(45));
}

#[test]
fn each_try_has_its_own_limit() {
    let hanging = ScriptedServer::start(vec![Step::WaitForClose]);
    // Behind the first client nobody listens there.
    let args = ["connect", "--wait", "1s", "-w", "200ms", "-x", &hanging.url(), "target.example:80"];
    let (code, said) = status(&args);
    assert_eq!(code, Some(7), "{said}");
}

#[test]
fn source_address_and_port_are_those_of_the_connection_to_the_proxy() {
    let (listener, addr) = listener(Ipv4Addr::LOCALHOST.into());
    let port = closed_port().port().to_string();
    for args in [&["-s", "127.0.0.9"][..], &["-p", &port], &["-s", "127.0.0.9", "-p", &port]] {
        let mut command = s5();
        command.args(["connect", "-z", "-x", &addr.to_string()]).args(args).args(["-w", "5", "a.example:80"]);
        let client = std::thread::spawn(move || run(&mut command, b"", TIMEOUT));
        let (_, peer) = listener.accept().expect("it comes");
        client.join().expect("it ends");
        assert!(!args.contains(&"-s") || peer.ip() == Ipv4Addr::new(127, 0, 0, 9), "{args:?}: {peer}");
        assert!(!args.contains(&"-p") || peer.port().to_string() == port, "{args:?}: {peer}");
    }
    for args in [&["-4", "-6"][..], &["-4", "-s", "::1"], &["-p", "0"], &["-s", "localhost"]] {
        let (code, said) = status(&[&["connect", "a.example:80"], args].concat());
        assert_eq!((code, said.lines().count()), (Some(2), 1), "{args:?}: {said}");
    }
    let (code, _) = status(&["connect", "-4", "-x", "unix:/nonexistent", "a.example:80"]);
    assert_eq!(code, Some(2), "a Unix socket has no family of IP");
}

#[test]
fn one_family_alone_is_used_where_that_is_wanted() {
    // [::1] alone: with -4 there is nothing to connect to.
    let proxy = TcpListener::bind("[::1]:0").and_then(|listener| listener.local_addr()).expect("a port").to_string();
    let (code, said) = status(&["connect", "-4", "-x", &proxy, "a.example:80"]);
    assert_eq!(code, Some(5), "{said}");
    assert!(said.contains("no address of a usable family"), "{said}");
    assert_eq!(status(&["connect", "-6", "-x", &proxy, "a.example:80"]).0, Some(7));
}

#[test]
fn r_local_looks_up_the_target_here_and_tries_its_addresses_in_turn() {
    let hosts = "127.0.0.1 localhost\n127.0.0.2 pair.test\n127.0.0.3 pair.test\n";
    if !in_namespace(
        "establish::r_local_looks_up_the_target_here_and_tries_its_addresses_in_turn",
        hosts,
        "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n",
    ) {
        return;
    }
    let proxy = ScriptedServer::start(reply_with(SUCCESS_REPLY));
    let (code, said) = status(&["connect", "-z", "-R", "local", "-x", &proxy.url(), "localhost:80"]);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(proxy.messages()[1], [5, 1, 0, 1, 127, 0, 0, 1, 0, 80]);
    // A target of which one address alone accepts.
    let listener = TcpListener::bind("127.0.0.3:0").expect("a port");
    let server = Server::start(&[]);
    let target = format!("pair.test:{}", listener.local_addr().expect("an address").port());
    let (code, said) = status(&["connect", "-z", "-v", "-R", "local", "-x", &server.addr().to_string(), &target]);
    assert_eq!(code, Some(0), "{said}");
    server.wait_log(|log| log.contains("127.0.0.2:"));
    let (code, said) = status(&["connect", "-R", "local", "-x", &server.addr().to_string(), "unknown.test:80"]);
    assert_eq!(code, Some(6), "{said}");
    assert!(said.contains("resolving the target's name, for unknown.test:80"), "{said}");
}

#[test]
fn an_option_of_another_mode_is_refused_with_the_reason() {
    let table = [
        ("bind -l 1", "with bind, the proxy listens"),
        ("bind -k", "-k: "),
        ("bind --direct", "bind requires a proxy"),
        ("connect --bound-to f a:1", "only bind uses it"),
        ("connect -n 1 a:1", "only udp uses it"),
        ("connect --hex a:1", "only udp uses it"),
        ("udp -C a:1", "-C: "),
        ("udp -F a:1", "-F: "),
        ("udp -e cat a:1", "-e: "),
        ("udp -c cat a:1", "-c: "),
        ("udp -N a:1", "-N: "),
        ("udp --progress a:1", "--progress: "),
        ("connect -X 4 a:1", "only SOCKS5 is supported"),
        ("connect -X connect a:1", "only SOCKS5 is supported"),
        ("connect -k a:1", "-k requires -l"),
        ("connect -z -F a:1", "-z and -F"),
        ("connect -e x -c y a:1", "-e and -c"),
        ("connect -l 1 -z a:1", "-z and -l"),
        ("connect -z -q 1 a:1", "-q"),
        ("connect --direct -x p a:1", "--direct and --proxy"),
        ("udp --hex --raw a:1", "cannot be combined"),
        ("udp -l 1 -n 1 a:1", "-n"),
    ];
    for (line, reason) in table {
        let (code, said) = status(&line.split(' ').collect::<Vec<_>>());
        assert_eq!((code, said.lines().count()), (Some(2), 1), "{line}: {said}");
        assert!(said.contains(reason), "{line}: {said}");
    }
    // What hands write, and means nothing else here, is taken.
    let (server, echo) = (Server::start(&[]), echo_server().to_string());
    let args = ["connect", "-N", "-X", "5", "-x", &server.addr().to_string(), "-w3", &echo];
    assert_eq!(status(&args), (Some(0), String::new()));
}

#[test]
fn what_fails_before_the_first_octet_is_as_quiet_as_the_rest() {
    let ask = |args: &[&str]| {
        let mut command = s5();
        let output =
            run(command.env("CI", "true").args(["connect", "-P", "alice"]).args(args).arg("a.example:1"), b"", TIMEOUT);
        (output.status.code(), text(&output.stderr))
    };
    assert_eq!(ask(&["-z"]), (Some(67), String::new()));
    assert_eq!(ask(&["--quiet"]), (Some(67), String::new()));
    assert_eq!(status(&["connect", "--quiet", "-l", "192.0.2.9:1", "a.example:1"]), (Some(45), String::new()));
    let (code, said) = ask(&["--json"]);
    assert_eq!((code, said.lines().count()), (Some(67), 1), "{said}");
    assert!(said.starts_with('{') && said.contains("\"status\":67"), "{said}");
}

#[test]
fn a_host_may_be_called_as_it_likes() {
    for host in ["help", "connect", "serve"] {
        let proxy = ScriptedServer::start(reply_with(&[5, 4, 0, 1, 0, 0, 0, 0, 0, 0]));
        assert_eq!(status(&["connect", "-x", &proxy.url(), host, "80"]).0, Some(104), "{host}");
    }
}

#[test]
fn no_complaint_about_a_target_or_a_file_repeats_a_password() {
    for args in [
        &["connect", "alice:topsecret@proxy.test"][..],
        &["udp", "socks5h://alice:topsecret@proxy.test:80", "x"],
        &["connect", "--proxy-auth-file", "alice:topsecret", "a.example:1"],
    ] {
        let (code, said) = status(args);
        assert_eq!((code, said.lines().count()), (Some(2), 1), "{args:?}: {said}");
        assert!(!said.contains("topsecret"), "{said}");
    }
}

#[test]
fn a_relay_without_a_port_is_no_relay() {
    let proxy = ScriptedServer::start(reply_with(SUCCESS_REPLY));
    let (code, said) = status(&["udp", "-x", &proxy.url(), "192.0.2.7:7"]);
    assert_eq!(code, Some(97), "{said}");
    assert!(said.contains("its relay has no port"), "{said}");
}
