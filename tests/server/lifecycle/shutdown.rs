//! SIGTERM, SIGINT and SIGQUIT: new connections are refused, open sessions are drained, a second signal ends the drain.
//! Also: the server keeps running if the reader of its log closes the pipe.

use crate::*;

#[test]
fn sigterm_and_sigint_drain_open_tunnels_and_accept_no_new_ones() {
    for signal in ["TERM", "INT"] {
        let mut server = Server::start(&["--drain-timeout", "60"]);
        let mut stream = connect_to(&server, echo_server());
        server.signal(signal);
        server.wait_log(|log| log.contains("shutting down: draining sessions"));
        let addr = server.addr();
        wait_until("new connections are refused", TIMEOUT, || TcpStream::connect(addr).is_err());
        ping(&mut stream, b"draining");
        stream.shutdown(std::net::Shutdown::Write).expect("half-closed");
        assert_eq!(stream_end(&mut stream), StreamEnd::Closed(vec![]), "closed, not reset");
        assert_eq!(server.wait(TIMEOUT).code(), Some(0), "{signal}");
        let log = server.wait_log(|log| log.contains("command=connect"));
        // A probe above may have been accepted just before the listener was closed; its line has an error.
        let tunnel = log.lines().find(|line| line.contains("command=connect")).unwrap_or_default();
        assert!(!tunnel.contains("error=") && !log.contains("closing the remaining sessions"), "{log}");
    }
}

#[test]
fn idle_server_and_drain_of_zero_end_at_once() {
    for (drain, has_tunnel) in [("60", false), ("0", true)] {
        let mut server = Server::start(&["--drain-timeout", drain]);
        let mut tunnel = has_tunnel.then(|| tunnel(&server));
        server.signal("TERM");
        assert_eq!(server.wait(TIMEOUT).code(), Some(0));
        assert!(tunnel.iter_mut().all(|(client, _)| stream_end(client) == StreamEnd::Reset));
    }
}

#[test]
fn drain_timeout_resets_the_remaining_tunnels() {
    for threads in ["1", "4"] {
        let mut server = Server::start(&["--drain-timeout", "300ms", "--threads", threads]);
        let mut tunnels = [(); 8].map(|()| tunnel(&server));
        for (client, target) in &mut tunnels {
            client.write_all(b"half of a").expect("data sent");
            assert_eq!(read_exact(target, 9), b"half of a");
        }
        let (time, status) = timed(|| {
            server.signal("TERM");
            server.wait(TIMEOUT)
        });
        assert_eq!(status.code(), Some(0));
        assert!(time >= Duration::from_millis(300), "{time:?}");
        for (client, target) in &mut tunnels {
            let ends = [stream_end(client), stream_end(target)];
            assert_eq!(ends, [StreamEnd::Reset, StreamEnd::Reset], "{threads} threads");
        }
        let log = server.wait_log(|log| session_lines(log).len() == 8);
        let is_cut = |line: &&str| line.contains(" up=9 ") && line.ends_with(" error=\"cut at shutdown\"");
        assert!(session_lines(&log).iter().all(is_cut), "{log}");
        assert!(log.contains("drain time over, closing the remaining sessions"), "{log}");
    }
}

#[test]
fn sigquit_drains_for_two_seconds_at_most() {
    for (option, time) in [("60", "2s"), ("1s", "1s")] {
        let mut server = Server::start(&["--drain-timeout", option]);
        let mut tunnel = connect_to(&server, echo_server());
        server.signal("QUIT");
        server.wait_log(|log| log.contains(&format!("draining sessions for up to {time}\n")));
        ping(&mut tunnel, b"draining");
        assert_eq!(server.wait(TIMEOUT).code(), Some(0));
        assert_eq!(stream_end(&mut tunnel), StreamEnd::Reset);
    }
}

#[test]
fn drain_timeout_closes_waiting_binds_and_udp_associations() {
    let mut server = Server::start(&["--drain-timeout", "100ms"]);
    let any: SocketAddr = "0.0.0.0:0".parse().expect("valid address");
    let (_bind, rep, bnd) = open(&server, BIND, any);
    assert_eq!(rep, 0);
    let (_association, rep, _) = open(&server, UDP_ASSOCIATE, any);
    assert_eq!(rep, 0);
    let _handshake = greet(&server);
    server.signal("TERM");
    assert_eq!(server.wait(TIMEOUT).code(), Some(0));
    assert!(TcpStream::connect(bnd).is_err());
    let log = server.wait_log(|log| session_lines(log).len() == 3);
    assert_eq!(log.matches(" error=\"cut at shutdown\"\n").count(), 3, "{log}");
}

#[test]
fn log_has_the_drain_time_with_its_unit() {
    for (option, time) in [("300ms", "300ms"), ("1m30s", "90s")] {
        let server = Server::start(&["--drain-timeout", option]);
        server.signal("TERM");
        server.wait_log(|log| log.contains(&format!("draining sessions for up to {time}\n")));
    }
}

#[test]
fn second_signal_ends_the_drain() {
    for signals in [["TERM", "TERM"], ["INT", "TERM"]] {
        let mut server = Server::start(&["--drain-timeout", "60"]);
        let mut stream = connect_to(&server, echo_server());
        server.signal(signals[0]);
        server.wait_log(|log| log.contains("shutting down: draining sessions"));
        assert_no_data(&stream, Duration::from_millis(50));
        server.signal(signals[1]);
        assert_eq!(server.wait(TIMEOUT).code(), Some(0));
        assert_eq!(stream_end(&mut stream), StreamEnd::Reset);
    }
}

#[test]
fn server_survives_a_closed_log_pipe() {
    let mut command = s5();
    command.args(["serve", "--listen", "127.0.0.1:0", "-v"]);
    let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().expect("s5 starts");
    let mut log = BufReader::new(child.stderr.take().expect("stderr is piped"));
    let mut line = String::new();
    log.read_line(&mut line).expect("line read");
    let addr: SocketAddr = line.trim().rsplit(' ').next().and_then(|addr| addr.parse().ok()).expect("valid address");
    drop(log);
    let result = std::panic::catch_unwind(|| {
        for _ in 0..20 {
            greet_at(addr);
        }
    });
    let is_running = child.try_wait().expect("the child can be waited for").is_none();
    child.kill().expect("the child can be killed");
    child.wait().expect("the child can be waited for");
    assert!(result.is_ok() && is_running);
}

#[test]
fn signal_that_cannot_be_read_ends_the_server_with_status_1() {
    if !is_installed("strace") {
        return;
    }
    for is_draining in [false, true] {
        let mut server = Server::start(&["--drain-timeout", "60"]);
        let _tunnel = tunnel(&server);
        if is_draining {
            server.signal("TERM");
            server.wait_log(|log| log.contains("shutting down: draining sessions"));
        }
        // Only the main thread is traced, which reads the number of the signal from a socket.
        let mut strace = Command::new("strace");
        strace.args(["-e", "trace=recvfrom", "-e", "inject=recvfrom:error=EIO", "-p", &server.pid().to_string()]);
        let strace = RunningProgram::start(&mut strace);
        strace.stderr(|text| text.contains("attached"));
        server.signal("USR1");
        assert_eq!(server.wait(TIMEOUT).code(), Some(1), "draining: {is_draining}");
        server.wait_log(|log| log.contains("s5: wait for a signal: input/output error\n"));
    }
}
