//! What a tunnel is used for: stdin and stdout in part, a program, and when that ends.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use crate::common::{Server, TIMEOUT, echo_server, is_installed, run, s5, tcp_server, wait_until};
use crate::scripted::{RunningProgram, text};

fn proxy() -> (Server, String) {
    let server = Server::start(&[]);
    let addr = server.addr().to_string();
    (server, addr)
}

/// A target that tells all that it was sent, once that has ended, and then answers.
fn listening(answer: &'static [u8]) -> (SocketAddr, std::sync::mpsc::Receiver<Vec<u8>>) {
    let (tell, told) = channel();
    let addr = tcp_server(Ipv4Addr::LOCALHOST.into(), move |mut stream| {
        let mut all = Vec::new();
        let _ = stream.read_to_end(&mut all);
        let _ = tell.send(all);
        let _ = stream.write_all(answer);
    });
    (addr, told)
}

/// A target that says hello and then only waits.
fn greeting() -> SocketAddr {
    tcp_server(Ipv4Addr::LOCALHOST.into(), |mut stream| {
        let _ = stream.write_all(b"hello");
        let _ = stream.read_to_end(&mut Vec::new());
    })
}

#[test]
fn ends_of_lines_become_cr_lf() {
    let (_server, proxy) = proxy();
    let table: [(&[u8], &[u8]); 5] = [
        (b"EHLO a\nQUIT\n", b"EHLO a\r\nQUIT\r\n"),
        (b"a\r\nb\n", b"a\r\nb\r\n"),
        (b"\n\n\r\n", b"\r\n\r\n\r\n"),
        (b"no end", b"no end"),
        (b"", b""),
    ];
    for (stdin, expected) in table {
        let (target, told) = listening(b"");
        let output = run(s5().args(["connect", "-C", "-x", &proxy, &target.to_string()]), stdin, TIMEOUT);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        assert_eq!(text(&told.recv_timeout(TIMEOUT).expect("it was sent")), text(expected));
    }
    // An end of a line that comes in two reads is one.
    let (target, told) = listening(b"");
    let mut client = RunningProgram::start(s5().args(["connect", "-C", "-x", &proxy, &target.to_string()]));
    client.write(b"a\r");
    std::thread::sleep(Duration::from_millis(50));
    client.write(b"\nb");
    client.close_stdin();
    assert_eq!(told.recv_timeout(TIMEOUT).expect("it was sent"), b"a\r\nb");
    // A buffer full of them grows to twice its size.
    let (target, told) = listening(b"");
    run(s5().args(["connect", "-C", "-x", &proxy, &target.to_string()]), &[b'\n'; 200_000], TIMEOUT);
    assert!(told.recv_timeout(TIMEOUT).expect("it was sent") == b"\r\n".repeat(200_000));
}

#[test]
fn without_stdin_it_ends_when_the_other_side_does() {
    let (_server, proxy) = proxy();
    let target = tcp_server(Ipv4Addr::LOCALHOST.into(), |mut stream| {
        stream.set_read_timeout(Some(Duration::from_millis(300))).expect("it can be set");
        let end = stream.read(&mut [0; 16]);
        let _ = stream.write_all(if end.is_err() { b"open" } else { b"closed" });
    });
    for stdin in [&b""[..], b"not read"] {
        let output = run(s5().args(["connect", "-d", "-x", &proxy, &target.to_string()]), stdin, TIMEOUT);
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "open".into()));
    }
}

#[test]
fn who_only_sends_writes_nothing_and_waits_for_the_other_side_to_take_it() {
    let (_server, proxy) = proxy();
    let (target, told) = listening(b"an answer that nobody wants");
    let output = run(s5().args(["connect", "--send-only", "-x", &proxy, &target.to_string()]), b"data", TIMEOUT);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(0), 0), "{}", text(&output.stderr));
    assert_eq!(told.recv_timeout(TIMEOUT).expect("it was sent"), b"data");
}

#[test]
fn q_ends_it_behind_the_end_of_stdin() {
    let (_server, proxy) = proxy();
    let target = greeting().to_string();
    // That target would never close by itself without a half-close.
    let args = ["connect", "--no-shutdown", "-q", "300ms", "-x", &proxy, &target];
    let began = Instant::now();
    let output = run(s5().args(args), b"", TIMEOUT);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "hello".into()), "{}", text(&output.stderr));
    assert!(began.elapsed() >= Duration::from_millis(300));
    let mut waiting = RunningProgram::start(s5().args(["connect", "-q", "0", "-x", &proxy, &target]));
    waiting.stdout(|octets| octets == b"hello");
    assert!(waiting.is_running(), "stdin is still open");
    waiting.close_stdin();
    assert_eq!(waiting.end(TIMEOUT).0.code(), Some(0));
}

#[test]
fn without_shutdown_the_other_side_sees_no_end() {
    let (_server, proxy) = proxy();
    let (tell, told) = channel();
    let target = tcp_server(Ipv4Addr::LOCALHOST.into(), move |mut stream| {
        stream.set_read_timeout(Some(Duration::from_millis(300))).expect("it can be set");
        let mut all = Vec::new();
        let _ = tell.send(stream.read_to_end(&mut all).is_err());
        let _ = stream.write_all(b"late");
    });
    for (option, is_open) in [("--no-shutdown", true), ("--shutdown", false)] {
        let output = run(s5().args(["connect", option, "-x", &proxy, &target.to_string()]), b"x", TIMEOUT);
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "late".into()), "{option}");
        assert_eq!(told.recv_timeout(TIMEOUT), Ok(is_open), "{option}");
    }
}

#[test]
fn silence_for_too_long_is_a_time_out_and_octets_renew_it() {
    let (_server, proxy) = proxy();
    let echo = echo_server().to_string();
    let mut client = RunningProgram::start(s5().args(["connect", "-i", "700ms", "-x", &proxy, &echo]));
    for _ in 0..5 {
        client.write(b".");
        std::thread::sleep(Duration::from_millis(250));
    }
    assert!(client.is_running(), "octets went both ways");
    let (status, stdout, said) = client.end(TIMEOUT);
    assert_eq!((status.code(), text(&stdout).as_str()), (Some(28), "....."), "{said}");
    assert!(said.ends_with(&format!("transfer, for {echo}: idle for 700ms\n")), "{said}");
}

#[test]
fn a_program_has_the_tunnel_as_stdin_and_stdout() {
    let (_server, proxy) = proxy();
    let echo = echo_server().to_string();
    let connect = |args: &[&str]| run(s5().args(["connect", "-x", &proxy]).args(args), b"not for it", TIMEOUT);
    let output = connect(&["-c", "printf 'one\\ntwo\\n'; exec >&-; cat >&2", &echo]);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), "one\ntwo\n".into()));
    assert!(output.stdout.is_empty(), "stdout is the program's tunnel");
    let output = connect(&["-e", "printf hello\\nworld", &echo]);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));
    let (target, told) = listening(b"");
    connect(&["-e", "printf one-%s two", &target.to_string()]);
    assert_eq!(text(&told.recv_timeout(TIMEOUT).expect("it was sent")), "one-two");
}

#[test]
fn a_programs_status_is_ours() {
    let (_server, proxy) = proxy();
    let echo = echo_server().to_string();
    for (command, status) in [("exit 7", 7), ("kill -9 $$", 137), ("true", 0), ("exit 200", 200)] {
        let output = run(s5().args(["connect", "-x", &proxy, "-c", command, &echo]), b"", TIMEOUT);
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(status), String::new()), "{command}");
    }
}

#[test]
fn a_program_is_told_where_it_is_and_no_secret() {
    let folder = crate::common::temp_dir();
    let users = crate::common::write_file(
        folder.path(),
        "users",
        &format!("alice:{}\n", bcrypt::hash("secret", 4).expect("a hash")),
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
fn a_program_that_hears_no_more_or_is_gone_does_not_keep_the_tunnel() {
    let (_server, proxy) = proxy();
    let flood = tcp_server(Ipv4Addr::LOCALHOST.into(), |mut stream| while stream.write_all(&[b'x'; 4096]).is_ok() {});
    let output = run(s5().args(["connect", "-x", &proxy, "-c", "head -c 3 >&2", &flood.to_string()]), b"", TIMEOUT);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), "xxx".into()));
    // It says all that it has to say to a target that has nothing more to say itself.
    let (tell, told) = channel();
    let target = tcp_server(Ipv4Addr::LOCALHOST.into(), move |mut stream: TcpStream| {
        let _ = stream.shutdown(Shutdown::Write);
        let mut all = Vec::new();
        let _ = stream.read_to_end(&mut all);
        let _ = tell.send(all.len());
    });
    let script = "cat > /dev/null; sleep 0.5; head -c 1000000 /dev/zero";
    let output = run(s5().args(["connect", "-x", &proxy, "-c", script, &target.to_string()]), b"", TIMEOUT);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(told.recv_timeout(TIMEOUT), Ok(1_000_000));
}

#[test]
fn progress_is_shown_on_a_terminal_and_nowhere_else() {
    let (_server, proxy) = proxy();
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
    let said = text(&output.stdout);
    assert!(said.contains("300000") && said.contains("585.9 KiB in 0:0"), "{said:?}");
}

/// A client whose stdout is a socket, which is ours and non-blocking, and our end of it.
fn with_socket_as_stdout(args: &[&str]) -> (std::process::Child, UnixStream) {
    let (theirs, ours) = UnixStream::pair().expect("a pair");
    theirs.set_nonblocking(true).expect("it can be set");
    let mut command = s5();
    command.arg("connect").args(args).stdin(Stdio::piped()).stdout(Stdio::from(OwnedFd::from(theirs)));
    (command.spawn().expect("s5 starts"), ours)
}

#[test]
fn a_stdout_that_somebody_made_non_blocking_is_waited_for() {
    let (_server, proxy) = proxy();
    let target = tcp_server(Ipv4Addr::LOCALHOST.into(), |mut stream| drop(stream.write_all(&[b'x'; 4 << 20])));
    let (mut client, mut ours) = with_socket_as_stdout(&["-x", &proxy, &target.to_string()]);
    std::thread::sleep(Duration::from_millis(300));
    let mut all = Vec::new();
    ours.read_to_end(&mut all).expect("it comes");
    assert_eq!((all.len(), client.wait().expect("it ends").code()), (4 << 20, Some(0)));
}

#[test]
fn who_does_not_read_does_not_keep_it_from_ending_when_its_time_is_over() {
    let (_server, proxy) = proxy();
    let flood = tcp_server(Ipv4Addr::LOCALHOST.into(), |mut stream| while stream.write_all(&[b'x'; 4096]).is_ok() {});
    for (args, status) in [(["-q", "300ms"], 0), (["-i", "300ms"], 28)] {
        let (mut client, _unread) = with_socket_as_stdout(&[&args[..], &["-x", &proxy, &flood.to_string()]].concat());
        drop(client.stdin.take());
        let mut ended = None;
        wait_until("it ends", TIMEOUT, || {
            ended = client.try_wait().expect("it can be waited for");
            ended.is_some()
        });
        assert_eq!(ended.and_then(|status| status.code()), Some(status), "{args:?}");
    }
}
