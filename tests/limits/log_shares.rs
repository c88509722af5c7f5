//! The lines of the log that one client can cause: at most 20 a second, with the number of the others. Failed logins
//! and other clients keep their lines.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use crate::*;

const CLIENTS: usize = 300;

/// Returns the lines with `level=info` or `warn` about a client, and how many others there were.
fn lines_of(log: &str, from: &str) -> (usize, usize) {
    let client = format!(" from={from}");
    let of_client = |line: &&str| line.contains(&client) && !line.contains("msg=omitted");
    let omitted = log.lines().filter_map(|line| line.split_once(&format!("{client} lines="))?.1.parse::<usize>().ok());
    (log.lines().filter(of_client).count(), omitted.sum())
}

/// Fails unless the client has logged `sessions` lines since `started`, 20 of each second and the others as numbers.
fn assert_share(server: &Server, from: &str, prefix: &str, sessions: usize, started: Instant) {
    let log = server.wait_log(|log| lines_of(log, from).0 + lines_of(log, prefix).1 == sessions);
    let limit = 20 * (1 + started.elapsed().as_secs() as usize);
    let logged = lines_of(&log, from).0;
    assert!((20..=limit).contains(&logged), "{logged} lines of {from}: {log}");
}

/// Sends a request that is refused.
fn fail(mut stream: impl Read + Write) {
    stream.write_all(&[&[5, 1, 0][..], &request(CONNECT, closed_port())].concat()).expect("request sent");
    stream.read_exact(&mut [0; 12]).expect("a method and a reply");
}

#[test]
fn client_logs_at_most_20_sessions_a_second_and_others_log_all() {
    let dir = temp_dir();
    let path = dir.path().join("socket").display().to_string();
    let (_dir, users) = users_file(&[("alice", "secret")]);
    let args = ["--listen", &format!("unix:{path}"), "--auth", "password,none", "--users", &users];
    let server = serve("127.0.0.1:0", 2, &args);
    let started = Instant::now();
    for number in 0..CLIENTS {
        fail(connect_from_ip(&server, [127, 70, 0, 1]));
        fail(UnixStream::connect(&path).expect("the listener accepts"));
        if number % 30 == 29 {
            fail(connect_from_ip(&server, [127, 70, 0, 2]));
        }
    }
    // A client cannot hide a failed login.
    assert_ne!(log_in(&server, [127, 70, 0, 1], b"alice", b"wrong").1, 0);
    let log = server.wait_log(|log| log.contains("error=\"login refused\""));
    assert!(log.contains(" level=warn msg=session ") && log.contains(" from=127.70.0.1:"), "{log}");
    assert_share(&server, "127.70.0.1", "127.70.0.1", CLIENTS + 1, started - Duration::from_secs(1));
    assert_share(&server, "unix", "unix", CLIENTS, started);
    assert_eq!(lines_of(&server.log(), "127.70.0.2"), (10, 0));
}

#[test]
fn addresses_of_an_ipv6_network_share_their_lines() {
    enter_namespace!("", "");
    for number in 1..=4 {
        let addr = format!("fd09::{number}/64");
        let added = run(Command::new("ip").args(["-6", "addr", "add", &addr, "dev", "lo", "nodad"]), b"", TIMEOUT);
        assert!(added.status.success(), "{added:?}");
    }
    let server = serve("[fd09::1]:0", 1, &["--allow-open-relay"]);
    // A new address can be unreachable at first.
    let is_refused = |number| {
        let addr = (Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, number), server.addr().port());
        TcpStream::connect(addr).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
    };
    wait_until("the addresses are in use", TIMEOUT, || (2..=4).all(is_refused));
    let started = Instant::now();
    for number in 0..100 {
        fail(connect_from_ip(&server, Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, 1 + number % 4)));
    }
    assert_share(&server, "[fd09::", "fd09::/64", 100, started);
}

#[test]
fn connections_refused_at_accept_log_one_line_a_second_with_the_number_of_the_others() {
    let server = Server::start(&["--deny", "from=127.70.1.0/24"]);
    let started = Instant::now();
    for number in 0..CLIENTS {
        let mut stream = connect_from_ip(&server, [127, 70, 1, (number % 200) as u8]);
        assert!(matches!(stream_end(&mut stream), StreamEnd::Closed(_) | StreamEnd::Reset));
    }
    let refused = |log: &str| log.matches(" error=\"denied: --deny").count();
    let omitted = |log: &str| {
        let counts =
            log.lines().filter_map(|line| line.split_once("msg=omitted topic=refused lines=")?.1.parse::<usize>().ok());
        counts.sum::<usize>()
    };
    let log = server.wait_log(|log| refused(log) + omitted(log) == CLIENTS);
    assert!(refused(&log) as u64 <= 1 + started.elapsed().as_secs(), "{log}");
}

#[test]
fn connections_that_ask_for_nothing_are_logged_only_if_verbose() {
    for args in [&["-v"][..], &[]] {
        let server = Server::start(&[args, &["--handshake-timeout", "1s"]].concat());
        // A health check, a port scan, a client that stays silent, and checks of the port and of the proxy.
        drop(server.connect());
        reset(server.connect());
        let mut silent = server.connect();
        for check in [vec!["--direct", &*server.addr().to_string()], vec!["-x", &*server.addr().to_string()]] {
            let output = run(s5().args(["connect", "-z"]).args(&check), b"", TIMEOUT);
            assert!(output.status.success(), "{check:?}: {output:?}");
        }
        // An incomplete greeting is more than nothing.
        let mut slow = server.connect();
        slow.write_all(&[5]).expect("data sent");
        stream_end(&mut silent);
        stream_end(&mut slow);
        let log = server.wait_log(|log| log.contains(" level=info msg=session "));
        assert_eq!(log.matches(" level=info msg=session ").count(), 1, "{log}");
        assert_eq!(log.matches(" level=debug msg=session ").count(), if args.is_empty() { 0 } else { 5 }, "{log}");
    }
}

#[test]
fn escaped_names_are_cut_at_255_characters_and_followed_by_their_length() {
    let (_dir, users) = users_file(&[("alice", "secret")]);
    let server = Server::start(&["--auth", "password,none", "--users", &users]);
    assert_ne!(log_in(&server, [127, 70, 2, 1], &[0xFF; 255], b"wrong").1, 0);
    let rows = [("a".repeat(255), "a".repeat(255)), ("\u{202e}".repeat(85), "\\u{202e}".repeat(31) + "...(255 bytes)")];
    for (name, expected) in rows {
        open_by_name(&server, CONNECT, &name, 80);
        server.wait_log(|log| log.contains(&format!(" to=\"{expected}:80\" ")));
    }
    server.wait_log(|log| log.contains(&format!(" user=\"{}...(255 bytes)\" ", "\\xff".repeat(63))));
    let via = Server::start(&["--via", &format!("socks5://{}", closed_port())]);
    open_by_name(&via, CONNECT, &"\u{202e}".repeat(85), 80);
    let log = via.wait_log(|log| log.contains("connection refused"));
    assert!(log.lines().all(|line| line.len() < 600), "{log}");
}
