//! `--max-connections`, and too few descriptors: new connections wait, the log reports it, and tunnels keep running.

use crate::*;

#[test]
fn connection_over_the_limit_waits_until_another_one_ends() {
    let server = Server::start(&["--max-connections", "2"]);
    let dst = echo_server();
    let [(mut first, ..), (second, ..)] = [(); 2].map(|()| open(&server, CONNECT, dst));
    let mut third = server.connect();
    third.write_all(&[5, 1, 0]).expect("greeting sent");
    server.wait_log(|log| log.contains("limit of 2 connections reached: new ones wait"));
    assert_no_data(&third, Duration::from_millis(100));
    ping(&mut first, b"not disturbed");
    drop(second);
    assert_eq!(read_exact(&mut third, 2), [5, 0]);
}

#[test]
fn connection_limit_is_logged_at_most_once_per_second() {
    let server = Server::start(&["--max-connections", "1"]);
    let started = Instant::now();
    for _ in 0..100 {
        let waiting = [(); 3].map(|()| server.connect());
        drop(waiting);
    }
    let log = server.wait_log(|log| log.contains(" msg=omitted topic=warning lines="));
    let lines = u64::try_from(log.matches("connections reached: new ones wait").count()).expect("64 bits suffice");
    assert!(lines >= 1, "the limit was never reached");
    assert!(lines <= 1 + started.elapsed().as_secs(), "{lines} log lines");
}

#[test]
fn idle_listener_holds_no_connection_permit() {
    let listen = ["--listen", "127.0.0.2:0", "--listen", "[::1]:0"];
    let server = serve("127.0.0.1:0", 3, &[&listen[..], &["--max-connections", "1"]].concat());
    for addr in &server.addrs {
        greet_at(*addr);
    }
}

/// Starts a server with these soft and hard limits of descriptors.
fn serve_with_descriptors(limits: &str) -> Server {
    let mut command = Command::new("prlimit");
    command.arg(format!("--nofile={limits}")).arg(s5().get_program());
    // Each thread has two descriptors.
    command.args(["serve", "--listen", "127.0.0.1:0", "--max-connections", "1000", "--threads", "2"]);
    Server::start_with(&mut command, 1)
}

#[test]
fn descriptor_exhaustion_keeps_tunnels_running_and_new_clients_waiting() {
    if !is_installed("prlimit") {
        return;
    }
    let server = serve_with_descriptors("40:40");
    // Their requests follow when no descriptor is free.
    let [mut late, mut late_name] = [(); 2].map(|()| greet(&server));
    let dst = echo_server();
    let mut tunnel = connect_to(&server, dst);
    let silent: Vec<TcpStream> = (0..60).map(|_| server.connect()).collect();
    server.wait_log(|log| log.contains("too many open files"));
    late.write_all(&request(CONNECT, dst)).expect("request sent");
    assert_eq!(read_reply(&mut late).0, 1);
    late_name.write_all(&name_request(dst.port())).expect("request sent");
    assert_eq!(read_reply(&mut late_name).0, 1);
    // The load is measured over at least 1.2 s.
    let (started, before) = (Instant::now(), server.cpu_seconds());
    while started.elapsed() < Duration::from_millis(1200) {
        ping(&mut tunnel, b"still open");
        std::thread::sleep(Duration::from_millis(20));
    }
    let load = (server.cpu_seconds() - before) / started.elapsed().as_secs_f64();
    assert!(load < 0.15, "{:.0} % of a core", load * 100.0);
    let lines = u64::try_from(server.log().matches("too many open files").count()).expect("64 bits suffice");
    assert!(lines <= 3 + started.elapsed().as_secs(), "{lines} log lines");
    let mut waiting = server.connect();
    waiting.write_all(&[5, 1, 0]).expect("greeting sent");
    drop(silent);
    let resumed = Instant::now();
    assert_eq!(read_exact(&mut waiting, 2), [5, 0]);
    assert!(resumed.elapsed() < Duration::from_secs(5), "{:?}", resumed.elapsed());
    ping(&mut tunnel, b"still open too");
    assert_eq!(open(&server, CONNECT, dst).1, 0);
    let mut client = greet(&server);
    client.write_all(&name_request(dst.port())).expect("request sent");
    assert_eq!(read_reply(&mut client).0, 0, "a name that was not found before");
}

/// A request to connect to localhost.
fn name_request(port: u16) -> Vec<u8> {
    [&[5, 1, 0, 3, 9][..], b"localhost", &port.to_be_bytes()].concat()
}

#[test]
fn soft_descriptor_limit_is_raised_to_the_hard_limit() {
    if !is_installed("prlimit") {
        return;
    }
    let server = serve_with_descriptors("64:1000");
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", server.pid())).expect("the server runs");
    let line = limits.lines().find(|line| line.starts_with("Max open files")).expect("the limit is listed");
    assert_eq!(line.split_whitespace().nth(3), Some("1000"), "{line}");
    let streams: Vec<TcpStream> = (0..100).map(|_| greet(&server)).collect();
    wait_until("all clients are served", TIMEOUT, || server.descriptors() > streams.len());
}

#[test]
fn metrics_and_restart_work_when_all_sessions_are_in_use() {
    if !is_installed("prlimit") {
        return;
    }
    for (descriptors, threads) in [(64, 1), (256, 40)] {
        let mut command = Command::new("prlimit");
        command.arg(format!("--nofile={descriptors}")).arg(s5().get_program());
        command.args(["serve", "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--threads"]);
        let server = Server::start_with(command.arg(threads.to_string()), 1);
        let metrics = server.log().split("metrics on ").nth(1).and_then(|log| addr(log.lines().next()?).into());
        let dst = echo_server();
        let limit = |log: &str| log.contains("connections reached: new ones wait");
        let open_one = |n: u8| {
            let mut stream = connect_from_ip(&server, [127, 0, 0, 2 + n % 4]);
            stream.write_all(&[&[5, 1, 0], &request(CONNECT, dst)[..]].concat()).expect("sent");
            stream.set_nonblocking(true).expect("option set");
            wait_until("it is served or waits", TIMEOUT, || stream.peek(&mut [0; 12]).is_ok() || limit(&server.log()));
            stream
        };
        let sessions: Vec<_> = (0..u8::MAX).map(open_one).take_while(|_| !limit(&server.log())).collect();
        assert!(sessions.len() > 8, "{} sessions", sessions.len());
        let metrics = crate::metrics::Metrics::scrape(metrics.expect("the address"));
        metrics.assert([("s5_sessions_open", sessions.len() as f64)]);
        drop(Successor::of(&server));
        assert!(!server.log().contains("too many open files"), "{}", server.log());
    }
}
