//! Hops with several proxies, of which the first one that works is used, and proxies that get the client's login.

use super::tools::{
    ALICE, BOB, Setup, alice_and_bob, assert_accepts_peer, associate, associate_anonymously, bind, open_as, open_ok,
    rep,
};
use super::udp_hops::ping_until_answered;
use crate::*;

/// A proxy that answers the greeting and the request with these bytes, and counts its connections.
fn scripted(selection: &'static [u8], reply: &'static [u8]) -> (SocketAddr, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    let addr = tcp_server(V4, move |mut stream| {
        counted.fetch_add(1, Ordering::Relaxed);
        let _ = stream.read(&mut [0; 64]).and_then(|_| stream.write_all(selection));
        let _ = stream.read(&mut [0; 64]).and_then(|_| stream.write_all(reply));
        let _ = stream.read(&mut [0; 64]);
    });
    (addr, count)
}

/// Runs all commands, and checks which proxy the log names.
fn assert_all_commands_by(server: &Server, hop: &str, proxy: SocketAddr) {
    let via = format!(" via=\"{hop}={proxy}\" ");
    let used = |log: &str| session_lines(log).iter().filter(|line| line.contains(&via)).count();
    let before = used(&server.log());
    ping(&mut open_ok(server, None, CONNECT, &echo_server().to_string()).0, b"connect");
    let (mut client, bnd) = bind(server, None, "127.0.0.1:0");
    assert_accepts_peer(&mut client, bnd, addr("127.0.0.1:0"));
    drop(client);
    associate_anonymously(server).ping(udp_echo_server(V4), b"udp");
    server.wait_log(|log| used(log) == before + 3);
}

#[test]
fn next_proxy_of_a_hop_is_used_if_one_fails_and_the_failed_one_is_skipped() {
    // No other process takes a port of a proxy that does not run.
    enter_namespace!("", "");
    let dir = temp_dir();
    let users = write_file(dir.path(), "users", alice_and_bob());
    let (good, locked) = (Server::start(&[]), Server::start(&["--users", &users]));
    let (silent, silent_addr) = listener(V4);
    let (full, _) = scripted(&[5, 0xFF], b"");
    let (http, _) = scripted(b"HTTP/1.0 400 Bad Request\r\n\r\n", b"");
    let (broken, broken_count) = scripted(&[5, 0], &[5, 1, 0, 1, 0, 0, 0, 0, 0, 0]);
    let failing = [
        closed_port().to_string(),
        format!("unix:{}", dir.path().join("missing").display()),
        silent_addr.to_string(),
        full.to_string(),
        http.to_string(),
        format!("alice:wrong@{}", locked.addr()),
        // The second proxy of a chain fails.
        format!("{},{}", good.addr(), closed_port()),
        broken.to_string(),
    ];
    for failing in failing {
        let url = format!("{failing}|{}", good.addr());
        let server = Server::start(&["--via", &url, "--connect-timeout", "3"]);
        assert_all_commands_by(&server, "--via", good.addr());
        let warnings = server.log().matches(" (the others are tried first for 10s)").count();
        assert_eq!(warnings, 1, "{}", server.log());
    }
    assert_eq!(broken_count.load(Ordering::Relaxed), 1, "the failed proxy is skipped");
    drop(silent);
}

#[test]
fn failure_of_the_target_does_not_fail_over() {
    let good = Server::start(&[]);
    for expected in [2, 3, 4, 5, 6, 7, 8, 0x42] {
        let reply: &'static [u8] = vec![5, expected, 0, 1, 0, 0, 0, 0, 0, 0].leak();
        let (proxy, count) = scripted(&[5, 0], reply);
        let server = Server::start(&["--hop", &format!("h={proxy}|{}", good.addr()), "--allow", "via=h"]);
        assert_eq!([CONNECT, BIND].map(|command| rep(&server, command, "127.0.0.1:9")), [expected; 2]);
        assert_eq!(count.load(Ordering::Relaxed), 2, "REP {expected}");
    }
    // A slow target has the whole time: the proxy has logged the client in.
    let slow = FullBacklog::new();
    let (first, second) = (Server::start(&["-vv"]), Server::start(&[]));
    let server =
        Server::start(&["--via", &format!("{}|{1}|{1}|{1}", first.addr(), second.addr()), "--connect-timeout", "3"]);
    let mut client = greet(&server);
    client.write_all(&request(CONNECT, slow.addr)).expect("request sent");
    first.wait_log(|log| !steps(log, "request").is_empty());
    let _target = slow.accept();
    assert_eq!(read_reply(&mut client).0, 0);
    assert!(!second.log().contains("msg=session"), "{}", second.log());
}

#[test]
fn proxy_that_does_not_answer_bind_or_udp_is_replaced_after_its_share_of_the_time() {
    let good = Server::start(&[]);
    for command in [BIND, UDP_ASSOCIATE] {
        let (stuck, count) = scripted(&[5, 0], b"");
        let url = format!("{stuck}|{}", good.addr());
        let server = Server::start(&["--via", &url, "--connect-timeout", "3"]);
        for _ in 0..2 {
            assert_eq!(open_as(&server, None, command, "0.0.0.0:0").1, 0, "{command}");
        }
        assert_eq!(count.load(Ordering::Relaxed), 1, "the stuck proxy is skipped");
    }
}

#[test]
fn failed_proxies_are_used_if_all_have_failed_and_again_after_a_reload() {
    // No other process takes a port of a proxy that does not run.
    enter_namespace!("", "");
    let [first, second] = [(); 2].map(|()| closed_port());
    let server = Server::start(&["--via", &format!("{first}|{second}")]);
    assert_eq!(rep(&server, CONNECT, "127.0.0.1:9"), 1);
    let by_second = serve(&second.to_string(), 1, &[]);
    assert_all_commands_by(&server, "--via", second);
    let by_first = serve(&first.to_string(), 1, &[]);
    // Only the second one is known to work, so it is used until it fails too.
    assert_all_commands_by(&server, "--via", second);
    drop(by_second);
    assert_all_commands_by(&server, "--via", first);
    let _by_second = serve(&second.to_string(), 1, &[]);
    assert_all_commands_by(&server, "--via", first);
    drop(by_first);
    assert_all_commands_by(&server, "--via", second);
    let _by_first = serve(&first.to_string(), 1, &[]);
    server.reload();
    assert_all_commands_by(&server, "--via", first);
}

#[test]
fn failed_proxy_is_tried_again_by_one_session_after_ten_seconds() {
    let (silent, silent_addr) = listener(V4);
    silent.set_nonblocking(true).expect("option set");
    let (good, echo) = (Server::start(&[]), echo_server().to_string());
    let via = format!("{silent_addr}|{}", good.addr());
    let server = Server::start(&["--via", &via, "--connect-timeout", "4"]);
    let start = Instant::now();
    assert_eq!(rep(&server, CONNECT, &echo), 0);
    let (mut attempts, sessions, is_over) = (Vec::new(), AtomicUsize::new(0), AtomicBool::new(false));
    let mut count_attempts = || {
        attempts.extend(std::iter::from_fn(|| silent.accept().ok()));
        attempts.len()
    };
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) && start.elapsed() < LONG_TIMEOUT {
                    assert_eq!(rep(&server, CONNECT, &echo), 0);
                    sessions.fetch_add(1, Ordering::Relaxed);
                    thread::sleep(Duration::from_millis(50));
                }
            });
        }
        wait_until("it is tried again", 3 * TIMEOUT, || count_attempts() > 1);
        // While that session waits for the proxy, the others do not.
        let enough = sessions.load(Ordering::Relaxed) + 20;
        wait_until("other sessions run", TIMEOUT, || sessions.load(Ordering::Relaxed) > enough);
        is_over.store(true, Ordering::Relaxed);
    });
    assert_eq!(count_attempts(), 2);
    assert!(start.elapsed() > Duration::from_secs(10), "{:?}", start.elapsed());
}

#[test]
fn association_fails_over_when_its_proxy_ends() {
    // Descriptors that are counted twice exceed the limit.
    for (name, rule, limit) in [("h", "to=127.0.0.2 via=h", "4"), ("h", "via=h", "3"), ("--via", "", "3")] {
        let [first, second] = [(); 2].map(|()| Server::start(&[]));
        let chains = format!("{}|{}", first.addr(), second.addr());
        let hop = format!("h={chains}");
        let route = if rule.is_empty() { vec!["--via", &chains] } else { vec!["--hop", &hop, "--allow", rule] };
        let server = Server::start(&[&route[..], &["-v", "--max-connections", limit]].concat());
        let echo = udp_echo_server(ip("127.0.0.2"));
        let association = associate_anonymously(&server);
        association.ping(echo, b"first");
        let addr = first.addr();
        drop(first);
        server.wait_log(|log| log.contains("closed its association"));
        ping_until_answered(&association, echo);
        drop(association);
        let via = format!(" via=\"{name}={addr},{name}={}\" ", second.addr());
        server.wait_log(|log| session_lines(log).iter().any(|line| line.contains(&via)));
    }
}

#[test]
fn login_of_the_client_is_forwarded_and_required() {
    let dir = temp_dir();
    let [both, only_bob] = [("both", alice_and_bob()), ("bob", super::tools::only_bob())]
        .map(|(name, text)| write_file(dir.path(), name, text));
    let (upstream, of_bob) = (Server::start(&["--users", &both]), Server::start(&["--users", &only_bob]));
    let via = format!("h=socks5h://{}?user=client", upstream.addr());
    let chain = format!("b={}/?user=client,alice:secret@{}|{}", of_bob.addr(), upstream.addr(), closed_port());
    let rules = "allow to=127.0.0.2 via=b\nallow via=h\n";
    let args = ["--hop", &via, "--hop", &chain, "--auth", "password,none", "-v", "-v"];
    let setup = Setup::start(alice_and_bob(), rules, &args);
    let echo = echo_server().to_string();
    for (login, user) in [(ALICE, "alice"), (BOB, "bob@corp")] {
        ping(&mut open_ok(&setup.server, login, CONNECT, &echo).0, b"hello");
        let (mut bound, bnd) = bind(&setup.server, login, "127.0.0.1:0");
        assert_accepts_peer(&mut bound, bnd, addr("127.0.0.1:0"));
        drop(bound);
        associate(setup.server.addr(), V4, login).ping(udp_echo_server(V4), b"udp");
        let field = format!(" user=\"{user}\" method=password ");
        upstream.wait_log(|log| session_lines(log).iter().filter(|line| line.contains(&field)).count() == 3);
    }
    let far = echo_server_at(ip("127.0.0.2")).to_string();
    // A refused login is a failure of the client, and not of the first proxy.
    assert_eq!([ALICE, BOB].map(|login| open_as(&setup.server, login, CONNECT, &far).1), [1, 0]);
    setup.server.wait_log(|log| log.contains(&format!(" via=\"b={},{}\" ", of_bob.addr(), upstream.addr())));
    // Only the proxies with the parameter get the login.
    wait_session(&upstream, &[" user=\"alice\" ", &format!(" to=\"{far}\" ")]);
    // Nor is one whose refusal is late.
    let (slow, count) = scripted(&[5, 2], b"");
    let url = format!("{slow}?user=client|{}?user=client", upstream.addr());
    let server = Server::start(&["--users", &both, "--via", &url, "--connect-timeout", "500ms"]);
    assert_eq!([ALICE, BOB].map(|login| open_as(&server, login, CONNECT, &echo).1), [1; 2]);
    assert_eq!(count.load(Ordering::Relaxed), 2);
    // A client without a password is refused, and not forwarded.
    assert_eq!([CONNECT, BIND].map(|command| rep(&setup.server, command, &echo)), [2, 2]);
    let association = associate_anonymously(&setup.server);
    association.send(udp_echo_server(V4), b"dropped");
    let reason = "hop h: ?user=client requires a login with user name and password";
    let log = setup.server.wait_log(|log| log.matches(reason).count() == 3);
    assert!(!log.contains("secret"), "{log}");
    assert_eq!(open_as(&setup.server, None, UDP_ASSOCIATE, "0.0.0.0:0").1, 0);
}

#[test]
fn urls_of_hops_that_cannot_work_are_errors_at_the_start() {
    let forwarding = "?user=client requires passwords of clients (use --users FILE), and password in --hop-auth";
    let rows: [(&[&str], &[&str]); 7] = [
        (&["--via", "192.0.2.1|"], &["--via: "]),
        (&["--hop", "h=|192.0.2.1"], &["--hop h: "]),
        (&["--hop", "h=192.0.2.1|u:secret@192.0.2.2?user=client"], &["--hop h: ", "?user=client and a user"]),
        (&["--via", "192.0.2.1?user=server"], &["--via: ", "no parameters but ?user=client"]),
        (&["--via", "unix:/run/s5?user=server"], &["--via: ", "no parameters but ?user=client"]),
        (&["--via", "u:sec|ret@192.0.2.1"], &["--via: ", "%7C", " | "]),
        (&["--via", "192.0.2.1?user=client"], &["--via: ", forwarding]),
    ];
    for (args, words) in rows {
        let output = run(s5().args(["serve", "--listen", "127.0.0.1:0"]).args(args), b"", TIMEOUT);
        assert_fails_with(&output, 2, words);
        assert!(!text(&output.stderr).contains("secret"), "{}", text(&output.stderr));
    }
    let port = closed_port();
    let via = format!("192.0.2.1|{port}");
    let output = run(s5().args(["serve", "--listen", &port.to_string(), "--via", &via]), b"", TIMEOUT);
    assert_fails_with(&output, 2, &["hop --via: proxy ", "is this server itself (choose another)"]);
    let output = run(s5().args(["connect", "-x", "192.0.2.1?user=client", "-z"]), b"", TIMEOUT);
    assert_fails_with(&output, 2, &["?user=client in the URL of a proxy is only for s5 serve"]);
}
