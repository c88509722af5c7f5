//! A tunnel connected to stdin and stdout, to one of them, or to a program; and when the client exits.

use std::sync::mpsc::Receiver;
use std::thread::sleep;

use s5::net::receive_descriptors;

use crate::programs::LONG_TIMEOUT;
use crate::prompts::on_a_terminal;
use crate::*;

/// Starts a target that reads to the end, reports the data to the test, and sends `answer`.
fn collecting_target(answer: &'static [u8]) -> (SocketAddr, Receiver<Vec<u8>>) {
    let (sender, received) = channel();
    let addr = tcp_server(V4, move |mut stream| {
        let mut all = Vec::new();
        let _ = stream.read_to_end(&mut all);
        let _ = sender.send(all);
        let _ = stream.write_all(answer);
    });
    (addr, received)
}

/// Waits for the data that a target reports.
fn data(received: &Receiver<Vec<u8>>) -> Vec<u8> {
    received.recv_timeout(TIMEOUT).expect("the target reports its data")
}

/// Starts a target that sends data until the client closes.
fn flood() -> SocketAddr {
    tcp_server(V4, |mut stream| while stream.write_all(&[b'x'; 4096]).is_ok() {})
}

#[test]
fn crlf_converts_line_ends() {
    let ((_server, proxy), (target, received)) = (serve(), collecting_target(b""));
    let args = format!("connect -C -x {proxy} {target}");
    let table: [(&[u8], &[u8]); 6] = [
        (b"EHLO a\nQUIT\n", b"EHLO a\r\nQUIT\r\n"),
        (b"a\r\nb\n", b"a\r\nb\r\n"),
        (b"\n\n\r\n", b"\r\n\r\n\r\n"),
        (b"no end", b"no end"),
        (b"", b""),
        // A buffer of line ends grows to twice its size.
        (&[b'\n'; 200_000], &b"\r\n".repeat(200_000)),
    ];
    for (stdin, expected) in table {
        assert_eq!(outcome(&args, stdin), success(""));
        assert!(data(&received) == expected, "{}", text(stdin));
    }
    // CR LF that is split between two reads is not changed.
    let mut client = start(&args);
    client.write(b"a\r");
    sleep(Duration::from_millis(50));
    client.write(b"\nb");
    client.close_stdin();
    assert_eq!(data(&received), b"a\r\nb");
}

#[test]
fn end_of_stdin_is_hidden_from_the_target_by_some_options() {
    let (_server, proxy) = serve();
    let target = tcp_server(V4, move |mut stream| {
        stream.set_read_timeout(Some(Duration::from_millis(300))).expect("timeout set");
        let is_open = stream.read_to_end(&mut Vec::new()).is_err();
        let _ = stream.write_all(if is_open { b"open" } else { b"closed" });
    });
    // With -d, stdin is not read.
    let table = [("-d", "", "open"), ("-d", "not read", "open"), ("--no-shutdown", "x", "open")];
    for (option, stdin, end) in table.into_iter().chain([("--shutdown", "x", "closed")]) {
        let outcome = outcome(&format!("connect {option} -x {proxy} {target}"), stdin.as_bytes());
        assert_eq!(outcome, success(end), "{option}");
    }
}

#[test]
fn send_only_writes_nothing_and_waits_for_the_target() {
    let ((_server, proxy), (target, received)) = (serve(), collecting_target(b"an unwanted answer"));
    assert_eq!(outcome(&format!("connect --send-only -x {proxy} {target}"), b"data"), success(""));
    assert_eq!(data(&received), b"data");
}

#[test]
fn send_only_waits_while_the_target_accepts_data() {
    let (sender, received) = channel();
    // Sends all the time, so that a close of the client would reset the connection.
    let slow = tcp_server(V4, move |mut stream| {
        let mut output = stream.try_clone().expect("cloned");
        std::thread::spawn(move || {
            while output.write_all(b"noise").is_ok() {
                sleep(Duration::from_millis(20));
            }
        });
        sleep(Duration::from_millis(5700));
        let mut all = Vec::new();
        let ended = stream.read_to_end(&mut all);
        let _ = sender.send((all.len(), ended.is_ok()));
        let _ = stream.shutdown(Shutdown::Both);
    });
    let stuck = tcp_server(V4, |_stream| sleep(LONG_TIMEOUT));
    let args = |target: SocketAddr| format!("connect --direct --send-only {target}");
    run_all(vec![(args(slow), 0), (args(stuck), 55)], |(args, status)| {
        let output = run(&mut command(&args), &[b'x'; 300_000], LONG_TIMEOUT);
        let stderr = text(&output.stderr);
        assert_eq!(
            (output.status.code(), stderr.contains("the last bytes may be lost")),
            (Some(status), status == 55),
            "{stderr}"
        );
    });
    assert_eq!(received.recv_timeout(TIMEOUT), Ok((300_000, true)));
}

#[test]
fn transfer_without_dev_null_succeeds() {
    enter_namespace!("127.0.0.1 localhost\n", "");
    let mounted = Command::new("mount").args(["-t", "tmpfs", "none", "/dev"]).status();
    assert!(mounted.expect("mount runs").success());
    assert_eq!(outcome(&format!("connect --direct {}", echo_server()), b"data"), success("data"));
}

#[test]
fn quit_after_counts_from_end_of_stdin() {
    let (_server, proxy) = serve();
    let target = tcp_server(V4, |mut stream| {
        let _ = stream.write_all(b"hello");
        let _ = stream.read_to_end(&mut Vec::new());
    });
    // The end of stdin is passed on all the same.
    let late = tcp_server(V4, |mut stream| {
        let _ = stream.read_to_end(&mut Vec::new()).and_then(|_| stream.write_all(b"bye"));
    });
    assert_eq!(outcome(&format!("connect -q 10s -x {proxy} {late}"), b"data"), success("bye"));
    // Without a half-close the target never closes the connection.
    let started = Instant::now();
    assert_eq!(outcome(&format!("connect --no-shutdown -q 1s -x {proxy} {target}"), b""), success("hello"));
    assert!(started.elapsed() >= Duration::from_secs(1));
    let mut waiting = start(&format!("connect -q 0 -x {proxy} {target}"));
    waiting.stdout(|bytes| bytes == b"hello");
    assert!(waiting.is_running(), "exited although stdin is open");
    waiting.close_stdin();
    assert_eq!(waiting.wait_exit(TIMEOUT).0.code(), Some(0));
}

#[test]
fn idle_timeout_exits_with_28_and_traffic_restarts_it() {
    let ((_server, proxy), echo) = (serve(), echo_server());
    let mut client = start(&format!("connect -i 1500ms -x {proxy} {echo}"));
    for _ in 0..5 {
        client.write(b".");
        sleep(Duration::from_millis(400));
    }
    assert!(client.is_running(), "exited despite traffic");
    let (status, stdout, stderr) = client.wait_exit(TIMEOUT);
    assert_eq!((status.code(), text(&stdout).as_str()), (Some(28), "....."), "{stderr}");
    assert!(stderr.ends_with(&format!("transfer, for {echo}: idle for 1.5s\n")), "{stderr}");
}

/// Runs a program on a tunnel to `target`, with option -c or -e.
fn exec(proxy: &str, option: &str, program: &str, target: SocketAddr) -> Outcome {
    let mut command = command(&format!("connect -x {proxy} {target} {option}"));
    outcome_of(command.arg(program), b"not read")
}

#[test]
fn exec_program_has_tunnel_as_stdin_and_stdout() {
    let ((_server, proxy), echo) = (serve(), echo_server());
    let outcome = exec(&proxy, "-c", "printf 'one\\ntwo\\n'; exec >&-; cat >&2", echo);
    assert_eq!(outcome, (Some(0), String::new(), "one\ntwo\n".into()), "stdout is not that of s5");
    assert_eq!(exec(&proxy, "-e", "printf hello\\nworld", echo), success(""));
    let (target, received) = collecting_target(b"");
    exec(&proxy, "-e", "printf one-%s two", target);
    assert_eq!(text(&data(&received)), "one-two");
}

#[test]
fn exec_exits_with_the_status_of_the_program() {
    let ((_server, proxy), echo) = (serve(), echo_server());
    for (program, status) in [("exit 7", 7), ("kill -9 $$", 137), ("true", 0), ("exit 200", 200)] {
        assert_eq!(exec(&proxy, "-c", program, echo), crate::failure(status, ""), "{program}");
    }
}

#[test]
fn exec_program_gets_addresses_and_no_password() {
    let (_dir, users) = users_file(&[("alice", "secret")]);
    let server = Server::start(&["--users", &users]);
    let target = format!("localhost:{}", echo_server().port());
    let script = "echo \"$S5_TARGET $S5_PROXY_ADDR\" >&2; case \"$S5_BND\" in 127.0.0.1:*) echo bnd >&2;; esac";
    let mut command = command(&format!("connect -x alice:secret@{} {target} -c", server.addr()));
    let (_, _, stderr) = outcome_of(command.arg(script), b"");
    assert_eq!(stderr, format!("{target} {}\nbnd\n", server.addr()));
}

#[test]
fn exec_program_that_closes_stdin_or_exits_ends_the_tunnel() {
    let (_server, proxy) = serve();
    let outcome = exec(&proxy, "-c", "head -c 3 >&2", flood());
    assert_eq!(outcome, (Some(0), String::new(), "xxx".into()));
    // The program still sends all data after the target has half-closed.
    let (sender, received) = channel();
    let target = tcp_server(V4, move |mut stream: TcpStream| {
        let _ = stream.shutdown(Shutdown::Write);
        let mut all = Vec::new();
        let _ = stream.read_to_end(&mut all);
        let _ = sender.send(all.len());
    });
    let script = "cat > /dev/null; sleep 0.5; head -c 1000000 /dev/zero";
    assert_eq!(exec(&proxy, "-c", script, target), success(""));
    assert_eq!(received.recv_timeout(TIMEOUT), Ok(1_000_000));
}

#[test]
fn progress_is_shown_only_on_a_terminal() {
    let ((_server, proxy), echo) = (serve(), echo_server());
    let args = format!("connect --progress -x {proxy} {echo}");
    assert_eq!(outcome(&args, b"data"), success("data"));
    if !is_installed("script") {
        return;
    }
    let command = format!("head -c 300000 /dev/zero | '{}' {args} | wc -c", env!("CARGO_BIN_EXE_s5"));
    let (_, stdout, _) = outcome_of(Command::new("script").args(["-qec", &command, "/dev/null"]), b"");
    assert!(stdout.contains("300000") && stdout.contains("585.9 KiB in 0:0"), "{stdout:?}");
}

/// Starts a client whose stdout is a non-blocking socket. Returns the client and the other end of the socket.
fn with_socket_as_stdout(args: &str) -> (Child, UnixStream) {
    let (client_end, test_end) = UnixStream::pair().expect("socket pair created");
    client_end.set_nonblocking(true).expect("option set");
    let mut command = command(args);
    command.stdin(Stdio::piped()).stdout(Stdio::from(OwnedFd::from(client_end)));
    (command.spawn().expect("s5 starts"), test_end)
}

#[test]
fn non_blocking_stdout_receives_all_data() {
    let (_server, proxy) = serve();
    let target = tcp_server(V4, |mut stream| drop(stream.write_all(&[b'x'; 4 << 20])));
    let (mut client, mut test_end) = with_socket_as_stdout(&format!("connect -x {proxy} {target}"));
    sleep(Duration::from_millis(300));
    let mut all = Vec::new();
    test_end.read_to_end(&mut all).expect("data received");
    assert_eq!((all.len(), client.wait().expect("the child can be waited for").code()), (4 << 20, Some(0)));
}

#[test]
fn passed_socket_has_the_data_that_arrived_with_the_reply() {
    let second_reply = "< 05 00 00 01 7f 00 00 01 00 50 05 00 00 03 04 \"peer\" 00 50";
    let second_hop = format!("{NO_AUTH} {SUCCESS} > {{greeting}}; < 05 00; > {{request}};");
    for (mode, hops, handshake) in [
        ("connect", 1, format!("{NO_AUTH} < 05 00 00 03 04 \"name\" 00 50")),
        ("connect", 2, format!("{second_hop} < 05 00 00 01 00*6")),
        ("bind", 1, format!("{NO_AUTH} {second_reply}")),
    ] {
        let proxy = ScriptedServer::start(&format!("{handshake} \"banner\";"));
        let proxies = vec![proxy.url(); hops].join(",");
        let (mut client, test_end) = with_socket_as_stdout(&format!("{mode} -F -x {proxies} {TARGET}"));
        let socket = receive_descriptors(&test_end).expect("a message arrives").pop().expect("a socket arrives");
        let mut data = String::new();
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(TIMEOUT)).expect("option set");
        stream.read_to_string(&mut data).expect("data until the end");
        assert_eq!((data.as_str(), client.wait().expect("s5 runs").code()), ("banner", Some(0)), "{mode}, {hops}");
    }
}

#[test]
fn unread_stdout_does_not_delay_exit_at_a_timeout() {
    let ((_server, proxy), flood) = (serve(), flood());
    for (option, status) in [("-q", 0), ("-i", 28)] {
        let (mut client, _unread) = with_socket_as_stdout(&format!("connect {option} 300ms -x {proxy} {flood}"));
        drop(client.stdin.take());
        let mut ended = None;
        wait_until("the client exits", TIMEOUT, || {
            ended = client.try_wait().expect("the child can be waited for");
            ended.is_some()
        });
        assert_eq!(ended.and_then(|status| status.code()), Some(status), "{option}");
    }
}

#[test]
fn one_end_of_file_of_a_terminal_ends_stdin() {
    if !is_installed("script") {
        return;
    }
    let (echo, udp_echo) = (echo_server(), udp_echo_server(V4));
    for (mode, target) in [("connect", echo), ("connect -C", echo), ("udp", udp_echo), ("udp --raw", udp_echo)] {
        let args = format!("{mode} --direct {target}");
        let dir = temp_dir();
        let mut terminal =
            RunningProgram::start(&mut on_a_terminal(dir.path(), &format!("stty -echo; exec $S5 {args}")));
        terminal.write(b"line\n");
        terminal.stdout(|shown| text(shown).contains("line"));
        // Ctrl-D
        terminal.write(b"\x04");
        let (status, shown, _) = terminal.wait_exit(TIMEOUT);
        assert_eq!(status.code(), Some(0), "{args}: {}", text(&shown));
    }
}

#[test]
fn stdin_and_stdout_without_a_thread_are_an_error() {
    let target = tcp_server(V4, |mut stream| drop(stream.write_all(b"hello")));
    for (args, status, operation) in [
        ("udp --direct 127.0.0.1:9".into(), 26, "read from stdin"),
        (format!("connect --direct {target}"), 23, "write to stdout"),
    ] {
        let (stdout, _test_end) = UnixStream::pair().expect("socket pair created");
        let mut command = command(&args);
        // No thread can have a stack of this size.
        command.env("RUST_MIN_STACK", (1_u64 << 60).to_string());
        let mut client = RunningProgram::start_with(&mut command, OwnedFd::from(stdout).into(), |_| false);
        let (ended, _, stderr) = client.wait_exit(TIMEOUT);
        assert_eq!(ended.code(), Some(status), "{stderr}");
        let reason = format!("{operation}: no thread can be started (raise the limit of processes, ulimit -u)\n");
        assert!(stderr.ends_with(&reason), "{stderr}");
    }
}
