//! A tunnel connected to stdin and stdout, to one of them, or to a program; and when the client exits.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use crate::support::scripted::{RunningProgram, text};
use crate::support::{Server, TIMEOUT, echo_server, is_installed, retry, run, s5, tcp_server, wait_until};

fn start_proxy() -> (Server, String) {
    let server = Server::start(&[]);
    let addr = server.addr().to_string();
    (server, addr)
}

/// Starts a target that reads to the end, reports the data to the test, and sends `answer`.
fn collecting_target(answer: &'static [u8]) -> (SocketAddr, std::sync::mpsc::Receiver<Vec<u8>>) {
    let (sender, received) = channel();
    let addr = tcp_server(Ipv4Addr::LOCALHOST.into(), move |mut stream| {
        let mut all = Vec::new();
        let _ = stream.read_to_end(&mut all);
        let _ = sender.send(all);
        let _ = stream.write_all(answer);
    });
    (addr, received)
}

/// Starts a target that sends hello and waits until the client closes.
fn greeting_target() -> SocketAddr {
    tcp_server(Ipv4Addr::LOCALHOST.into(), |mut stream| {
        let _ = stream.write_all(b"hello");
        let _ = stream.read_to_end(&mut Vec::new());
    })
}

#[test]
fn crlf_converts_line_ends() {
    let (_server, proxy) = start_proxy();
    let table: [(&[u8], &[u8]); 5] = [
        (b"EHLO a\nQUIT\n", b"EHLO a\r\nQUIT\r\n"),
        (b"a\r\nb\n", b"a\r\nb\r\n"),
        (b"\n\n\r\n", b"\r\n\r\n\r\n"),
        (b"no end", b"no end"),
        (b"", b""),
    ];
    for (stdin, expected) in table {
        let (target, received) = collecting_target(b"");
        let output = run(s5().args(["connect", "-C", "-x", &proxy, &target.to_string()]), stdin, TIMEOUT);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        assert_eq!(text(&received.recv_timeout(TIMEOUT).expect("the target reports its data")), text(expected));
    }
    // CR LF that is split between two reads is not changed.
    let (target, received) = collecting_target(b"");
    let mut client = RunningProgram::start(s5().args(["connect", "-C", "-x", &proxy, &target.to_string()]));
    client.write(b"a\r");
    std::thread::sleep(Duration::from_millis(50));
    client.write(b"\nb");
    client.close_stdin();
    assert_eq!(received.recv_timeout(TIMEOUT).expect("the target reports its data"), b"a\r\nb");
    // A buffer of line ends grows to twice its size.
    let (target, received) = collecting_target(b"");
    run(s5().args(["connect", "-C", "-x", &proxy, &target.to_string()]), &[b'\n'; 200_000], TIMEOUT);
    assert!(received.recv_timeout(TIMEOUT).expect("the target reports its data") == b"\r\n".repeat(200_000));
}

#[test]
fn recv_only_exits_when_the_target_closes() {
    let (_server, proxy) = start_proxy();
    let target = tcp_server(Ipv4Addr::LOCALHOST.into(), |mut stream| {
        stream.set_read_timeout(Some(Duration::from_millis(300))).expect("timeout set");
        let end = retry(|| stream.read(&mut [0; 16]));
        let _ = stream.write_all(if end.is_err() { b"open" } else { b"closed" });
    });
    for stdin in [&b""[..], b"not read"] {
        let output = run(s5().args(["connect", "-d", "-x", &proxy, &target.to_string()]), stdin, TIMEOUT);
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "open".into()));
    }
}

#[test]
fn send_only_writes_nothing_and_waits_for_the_target() {
    let (_server, proxy) = start_proxy();
    let (target, received) = collecting_target(b"an unwanted answer");
    let output = run(s5().args(["connect", "--send-only", "-x", &proxy, &target.to_string()]), b"data", TIMEOUT);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(0), 0), "{}", text(&output.stderr));
    assert_eq!(received.recv_timeout(TIMEOUT).expect("the target reports its data"), b"data");
}

#[test]
fn quit_after_counts_from_end_of_stdin() {
    let (_server, proxy) = start_proxy();
    let target = greeting_target().to_string();
    // Without a half-close the target never closes the connection.
    let args = ["connect", "--no-shutdown", "-q", "300ms", "-x", &proxy, &target];
    let started = Instant::now();
    let output = run(s5().args(args), b"", TIMEOUT);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "hello".into()), "{}", text(&output.stderr));
    assert!(started.elapsed() >= Duration::from_millis(300));
    let mut waiting = RunningProgram::start(s5().args(["connect", "-q", "0", "-x", &proxy, &target]));
    waiting.stdout(|bytes| bytes == b"hello");
    assert!(waiting.is_running(), "exited although stdin is open");
    waiting.close_stdin();
    assert_eq!(waiting.wait_exit(TIMEOUT).0.code(), Some(0));
}

#[test]
fn no_shutdown_hides_end_of_stdin_from_the_target() {
    let (_server, proxy) = start_proxy();
    let (sender, received) = channel();
    let target = tcp_server(Ipv4Addr::LOCALHOST.into(), move |mut stream| {
        stream.set_read_timeout(Some(Duration::from_millis(300))).expect("timeout set");
        let mut all = Vec::new();
        let _ = sender.send(stream.read_to_end(&mut all).is_err());
        let _ = stream.write_all(b"late");
    });
    for (option, is_open) in [("--no-shutdown", true), ("--shutdown", false)] {
        let output = run(s5().args(["connect", option, "-x", &proxy, &target.to_string()]), b"x", TIMEOUT);
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "late".into()), "{option}");
        assert_eq!(received.recv_timeout(TIMEOUT), Ok(is_open), "{option}");
    }
}

#[test]
fn idle_timeout_exits_with_28_and_traffic_restarts_it() {
    let (_server, proxy) = start_proxy();
    let echo = echo_server().to_string();
    let mut client = RunningProgram::start(s5().args(["connect", "-i", "700ms", "-x", &proxy, &echo]));
    for _ in 0..5 {
        client.write(b".");
        std::thread::sleep(Duration::from_millis(250));
    }
    assert!(client.is_running(), "exited despite traffic");
    let (status, stdout, stderr) = client.wait_exit(TIMEOUT);
    assert_eq!((status.code(), text(&stdout).as_str()), (Some(28), "....."), "{stderr}");
    assert!(stderr.ends_with(&format!("transfer, for {echo}: idle for 700ms\n")), "{stderr}");
}

#[test]
fn exec_program_has_tunnel_as_stdin_and_stdout() {
    let (_server, proxy) = start_proxy();
    let echo = echo_server().to_string();
    let connect = |args: &[&str]| run(s5().args(["connect", "-x", &proxy]).args(args), b"not read", TIMEOUT);
    let output = connect(&["-c", "printf 'one\\ntwo\\n'; exec >&-; cat >&2", &echo]);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), "one\ntwo\n".into()));
    assert!(output.stdout.is_empty(), "the program's output is on the stdout of s5");
    let output = connect(&["-e", "printf hello\\nworld", &echo]);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));
    let (target, received) = collecting_target(b"");
    connect(&["-e", "printf one-%s two", &target.to_string()]);
    assert_eq!(text(&received.recv_timeout(TIMEOUT).expect("the target reports its data")), "one-two");
}

#[test]
fn exec_exits_with_the_status_of_the_program() {
    let (_server, proxy) = start_proxy();
    let echo = echo_server().to_string();
    for (command, status) in [("exit 7", 7), ("kill -9 $$", 137), ("true", 0), ("exit 200", 200)] {
        let output = run(s5().args(["connect", "-x", &proxy, "-c", command, &echo]), b"", TIMEOUT);
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(status), String::new()), "{command}");
    }
}

#[test]
fn exec_program_gets_addresses_and_no_password() {
    let dir = crate::support::temp_dir();
    let users = crate::support::write_file(
        dir.path(),
        "users",
        &format!("alice:{}\n", bcrypt::hash("secret", 4).expect("password hashed")),
    );
    let server = Server::start(&["--users", &users]);
    let echo = echo_server();
    let url = format!("alice:secret@{}", server.addr());
    let target = format!("localhost:{}", echo.port());
    let script = "echo \"$S5_TARGET $S5_PROXY_ADDR\" >&2; case \"$S5_BND\" in 127.0.0.1:*) echo bnd >&2;; esac";
    let output = run(s5().args(["connect", "-x", &url, "-c", script, &target]), b"", TIMEOUT);
    assert_eq!(text(&output.stderr), format!("{target} {}\nbnd\n", server.addr()));
}

#[test]
fn exec_program_that_closes_stdin_or_exits_ends_the_tunnel() {
    let (_server, proxy) = start_proxy();
    let flood = tcp_server(Ipv4Addr::LOCALHOST.into(), |mut stream| while stream.write_all(&[b'x'; 4096]).is_ok() {});
    let output = run(s5().args(["connect", "-x", &proxy, "-c", "head -c 3 >&2", &flood.to_string()]), b"", TIMEOUT);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), "xxx".into()));
    // The program still sends all data after the target has half-closed.
    let (sender, received) = channel();
    let target = tcp_server(Ipv4Addr::LOCALHOST.into(), move |mut stream: TcpStream| {
        let _ = stream.shutdown(Shutdown::Write);
        let mut all = Vec::new();
        let _ = stream.read_to_end(&mut all);
        let _ = sender.send(all.len());
    });
    let script = "cat > /dev/null; sleep 0.5; head -c 1000000 /dev/zero";
    let output = run(s5().args(["connect", "-x", &proxy, "-c", script, &target.to_string()]), b"", TIMEOUT);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(received.recv_timeout(TIMEOUT), Ok(1_000_000));
}

#[test]
fn progress_is_shown_only_on_a_terminal() {
    let (_server, proxy) = start_proxy();
    let echo = echo_server().to_string();
    let output = run(s5().args(["connect", "--progress", "-x", &proxy, &echo]), b"data", TIMEOUT);
    assert_eq!((text(&output.stdout), text(&output.stderr)), ("data".into(), String::new()));
    if !is_installed("script") {
        return;
    }
    let command = format!(
        "head -c 300000 /dev/zero | '{}' connect --progress -x {proxy} {echo} | wc -c",
        env!("CARGO_BIN_EXE_s5")
    );
    let output = run(Command::new("script").args(["-qec", &command, "/dev/null"]), b"", TIMEOUT);
    let stdout = text(&output.stdout);
    assert!(stdout.contains("300000") && stdout.contains("585.9 KiB in 0:0"), "{stdout:?}");
}

/// Starts a client whose stdout is a non-blocking socket. Returns the client and the other end of the socket.
fn with_socket_as_stdout(args: &[&str]) -> (std::process::Child, UnixStream) {
    let (client_end, test_end) = UnixStream::pair().expect("socket pair created");
    client_end.set_nonblocking(true).expect("option set");
    let mut command = s5();
    command.arg("connect").args(args).stdin(Stdio::piped()).stdout(Stdio::from(OwnedFd::from(client_end)));
    (command.spawn().expect("s5 starts"), test_end)
}

#[test]
fn non_blocking_stdout_receives_all_data() {
    let (_server, proxy) = start_proxy();
    let target = tcp_server(Ipv4Addr::LOCALHOST.into(), |mut stream| drop(stream.write_all(&[b'x'; 4 << 20])));
    let (mut client, mut test_end) = with_socket_as_stdout(&["-x", &proxy, &target.to_string()]);
    std::thread::sleep(Duration::from_millis(300));
    let mut all = Vec::new();
    test_end.read_to_end(&mut all).expect("data received");
    assert_eq!((all.len(), client.wait().expect("the child can be waited for").code()), (4 << 20, Some(0)));
}

#[test]
fn unread_stdout_does_not_delay_exit_at_a_timeout() {
    let (_server, proxy) = start_proxy();
    let flood = tcp_server(Ipv4Addr::LOCALHOST.into(), |mut stream| while stream.write_all(&[b'x'; 4096]).is_ok() {});
    for (args, status) in [(["-q", "300ms"], 0), (["-i", "300ms"], 28)] {
        let (mut client, _unread) = with_socket_as_stdout(&[&args[..], &["-x", &proxy, &flood.to_string()]].concat());
        drop(client.stdin.take());
        let mut ended = None;
        wait_until("the client exits", TIMEOUT, || {
            ended = client.try_wait().expect("the child can be waited for");
            ended.is_some()
        });
        assert_eq!(ended.and_then(|status| status.code()), Some(status), "{args:?}");
    }
}
