//! stdin and stdout of `s5 connect`: no data is lost, and the exit status reports how the tunnel has ended.

use std::fs::OpenOptions;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Shutdown};
use std::os::unix::process::ExitStatusExt as _;
use std::process::Stdio;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use crate::support::scripted::{RunningProgram, ScriptedServer, open_tunnel, reset, text};
use crate::support::{Server, TIMEOUT, echo_server, run, s5, tcp_server, wait_until};

const TARGET: &str = "target.example:80";
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// For transfers of many megabytes.
const LONG_TIMEOUT: Duration = Duration::from_secs(60);

/// Pseudo-random bytes, so that swapped and repeated blocks are detected.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

#[test]
fn every_byte_value_passes_in_both_directions() {
    let server = Server::start(&[]);
    let bytes: Vec<u8> = (0..=255).cycle().take(3 * 256 + 7).collect();
    let (proxy, target) = (server.addr().to_string(), echo_server().to_string());
    let output = run(s5().args(["connect", "-x", &proxy, &target]), &bytes, TIMEOUT);
    assert_eq!((output.status.code(), output.stdout), (Some(0), bytes));
}

#[test]
fn transfer_of_64_mib_in_both_directions_at_once_is_complete() {
    let server = Server::start(&[]);
    let bytes = noise(64 << 20);
    let (proxy, target) = (server.addr().to_string(), echo_server().to_string());
    let output = run(s5().args(["connect", "-x", &proxy, &target]), &bytes, LONG_TIMEOUT);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(0), bytes.len()), "{}", text(&output.stderr));
    assert!(output.stdout == bytes, "the returned data differs from the sent data");
}

#[test]
fn end_of_stdin_is_forwarded_and_a_late_answer_arrives() {
    let proxy = ScriptedServer::start(open_tunnel(|mut stream| {
        let mut question = Vec::new();
        stream.read_to_end(&mut question).expect("the end of stdin arrives");
        // A client that waits only briefly after the end of stdin would miss the answer.
        thread::sleep(Duration::from_millis(700));
        let _ = stream.write_all(&question);
    }));
    let output = run(s5().args(["connect", "-x", &proxy.url(), TARGET]), b"question", TIMEOUT);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "question".into()));
}

#[test]
fn connect_exits_when_the_target_closes_although_stdin_is_open() {
    let proxy = ScriptedServer::start(open_tunnel(|mut stream| drop(stream.write_all(b"bye"))));
    let mut client = RunningProgram::start(s5().args(["connect", "-x", &proxy.url(), TARGET]));
    client.stdout(|bytes| bytes == b"bye");
    let (status, stdout, stderr) = client.wait_exit(Duration::from_secs(2));
    assert_eq!((status.code(), text(&stdout), stderr.as_str()), (Some(0), "bye".into(), ""));
}

#[test]
fn interactive_data_is_not_delayed() {
    let server = Server::start(&[]);
    let (proxy, target) = (server.addr().to_string(), echo_server().to_string());
    let mut client = RunningProgram::start(s5().args(["connect", "-x", &proxy, &target]));
    for round in 1..=20 {
        client.write(b"ping\n");
        client.stdout(|bytes| bytes.len() == 5 * round);
    }
    client.close_stdin();
    let (status, ..) = client.wait_exit(TIMEOUT);
    assert_eq!(status.code(), Some(0));
}

#[test]
fn early_half_close_of_the_target_loses_no_data_from_stdin() {
    let (sender, receiver) = channel();
    let target = tcp_server(LOOPBACK, move |mut stream| {
        stream.shutdown(Shutdown::Write).expect("half-closed");
        let mut all = Vec::new();
        let ended = stream.read_to_end(&mut all);
        let _ = sender.send((all, ended.is_ok()));
    });
    let server = Server::start(&[]);
    let bytes = noise(8 << 20);
    let (proxy, target) = (server.addr().to_string(), target.to_string());
    let output = run(s5().args(["connect", "-x", &proxy, &target]), &bytes, LONG_TIMEOUT);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let (all, ended) = receiver.recv_timeout(TIMEOUT).expect("the target reports its data");
    assert!(ended, "ended by a reset");
    assert!(all == bytes, "{} of {} bytes arrived", all.len(), bytes.len());
}

#[test]
fn large_answer_after_the_end_of_stdin_is_complete() {
    let bytes = noise(8 << 20);
    let answer = bytes.clone();
    let proxy = ScriptedServer::start(open_tunnel(move |mut stream| {
        stream.read_to_end(&mut Vec::new()).expect("the end of stdin arrives");
        let _ = stream.write_all(&answer);
    }));
    let output = run(s5().args(["connect", "-x", &proxy.url(), TARGET]), b"", LONG_TIMEOUT);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(output.stdout == bytes, "{} of {} bytes arrived", output.stdout.len(), bytes.len());
}

#[test]
fn reset_during_the_transfer_has_status_56() {
    let (sender, receiver) = channel();
    let proxy = ScriptedServer::start(open_tunnel(move |mut stream| {
        stream.write_all(b"half of").expect("data sent");
        receiver.recv_timeout(TIMEOUT).expect("the test continues");
        reset(stream);
    }));
    let mut client = RunningProgram::start(s5().args(["connect", "-x", &proxy.url(), TARGET]));
    client.stdout(|bytes| bytes == b"half of");
    sender.send(()).expect("the script continues");
    let (status, _, stderr) = client.wait_exit(TIMEOUT);
    assert_eq!(status.code(), Some(56), "{stderr}");
    let line = format!("s5: proxy {}: transfer, for {TARGET}: read error: ", proxy.addr);
    assert!(stderr.starts_with(&line) && stderr.lines().count() == 1, "{stderr}");
}

#[test]
fn reset_by_the_target_through_s5_serve_has_status_55_or_56() {
    let server = Server::start(&[]);
    let target = tcp_server(LOOPBACK, |mut stream| {
        stream.read_exact(&mut [0; 4]).expect("message received");
        reset(stream);
    });
    let mut client =
        RunningProgram::start(s5().args(["connect", "-x", &server.addr().to_string(), &target.to_string()]));
    client.write(b"word");
    let (status, _, stderr) = client.wait_exit(TIMEOUT);
    assert!(matches!(status.code(), Some(55 | 56)), "{status:?}: {stderr}");
}

#[test]
fn close_by_the_proxy_with_unread_data_has_status_55_or_56() {
    // A close with unread bytes sends a reset, since bytes are lost.
    let proxy = ScriptedServer::start(open_tunnel(|mut stream| {
        stream.read_exact(&mut [0; 1]).expect("all bytes received");
    }));
    let output = run(s5().args(["connect", "-x", &proxy.url(), TARGET]), &noise(8 << 20), TIMEOUT);
    assert!(matches!(output.status.code(), Some(55 | 56)), "{:?}: {}", output.status, text(&output.stderr));
    assert_eq!(text(&output.stderr).lines().count(), 1, "{}", text(&output.stderr));
}

#[test]
fn connect_exits_without_message_when_stdout_is_closed() {
    let proxy = ScriptedServer::start(open_tunnel(|mut stream| while stream.write_all(b"a line\n").is_ok() {}));
    let mut command = s5();
    command.args(["connect", "-x", &proxy.url(), TARGET]);
    // Like `head -n 1`, while stdin stays open.
    let mut client = RunningProgram::start_and_close_stdout_when(&mut command, |bytes| bytes.contains(&b'\n'));
    let (status, _, stderr) = client.wait_exit(TIMEOUT);
    let by_sigpipe = status.signal() == Some(13);
    assert!(by_sigpipe || status.code() == Some(141), "{status:?}: {stderr}");
    assert_eq!(stderr, "");
}

#[test]
fn full_disk_has_status_23() {
    for size in [1, 1 << 20] {
        let proxy = ScriptedServer::start(open_tunnel(move |mut stream| drop(stream.write_all(&noise(size)))));
        let full = OpenOptions::new().write(true).open("/dev/full").expect("/dev/full opened");
        let mut command = s5();
        command.args(["connect", "-x", &proxy.url(), TARGET]).stdin(Stdio::null()).stdout(full);
        let output = command.stderr(Stdio::piped()).output().expect("s5 runs");
        let reason = "transfer, for target.example:80: write to stdout: no space left on device";
        let line = format!("s5: proxy {}: {reason}\n", proxy.addr);
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(23), line));
    }
}

#[test]
fn unreadable_stdin_has_status_26() {
    let proxy = ScriptedServer::start(open_tunnel(|mut stream| drop(stream.read_to_end(&mut Vec::new()))));
    let mut command = s5();
    let dir = std::fs::File::open("/").expect("directory opened");
    command.args(["connect", "-x", &proxy.url(), TARGET]).stdin(dir);
    let output = command.output().expect("s5 runs");
    assert_eq!(output.status.code(), Some(26), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("read from stdin: "), "{}", text(&output.stderr));
}

#[test]
fn file_status_flags_of_stdin_and_stdout_are_unchanged() {
    // O_NONBLOCK would affect the other processes that share the open file description.
    let dir = crate::support::temp_dir();
    let input = crate::support::write_file(dir.path(), "input", "hello");
    let (reader, writer) = std::io::pipe().expect("pipe created");
    let (mut out_reader, out_writer) = std::io::pipe().expect("pipe created");
    let flags = |fd: &dyn std::os::fd::AsFd| {
        let info = format!("/proc/self/fdinfo/{}", std::os::fd::AsRawFd::as_raw_fd(&fd.as_fd()));
        let info = std::fs::read_to_string(info).expect("the descriptor is open");
        info.lines().find(|line| line.starts_with("flags:")).map(str::to_owned)
    };
    let before = [flags(&reader), flags(&out_writer)];
    let target = echo_server().to_string();
    let server = Server::start(&[]);
    let mut command = s5();
    command.args(["connect", "-x", &server.addr().to_string(), &target]);
    command.stdin(reader.try_clone().expect("cloned")).stdout(out_writer.try_clone().expect("cloned"));
    let mut child = command.spawn().expect("s5 starts");
    drop(command);
    let mut writer = writer;
    writer.write_all(&std::fs::read(input).expect("file read")).expect("data sent");
    let mut bytes = [0; 5];
    out_reader.read_exact(&mut bytes).expect("all bytes received");
    assert_eq!([flags(&reader), flags(&out_writer)], before);
    drop(writer);
    let mut status = None;
    wait_until("s5 exits", TIMEOUT, || {
        status = child.try_wait().expect("the child can be waited for");
        status.is_some()
    });
    assert!(status.is_some_and(|status| status.success()), "{status:?}");
}

#[test]
fn closed_stdin_is_treated_as_empty() {
    let server = Server::start(&[]);
    let target = tcp_server(LOOPBACK, |mut stream| drop(stream.write_all(b"hello")));
    let script = "exec \"$0\" connect -x \"$1\" \"$2\" <&-";
    let mut command = std::process::Command::new("sh");
    command.args(["-c", script, env!("CARGO_BIN_EXE_s5"), &server.addr().to_string(), &target.to_string()]);
    let output = command.output().expect("sh runs");
    // Rust's runtime opens /dev/null as a closed stdin.
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "hello".into()), "{}", text(&output.stderr));
}
