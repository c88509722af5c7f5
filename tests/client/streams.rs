//! stdin and stdout of `s5 connect`: no data is lost, and the exit status reports how the tunnel has ended.

use std::fs::OpenOptions;
use std::os::fd::AsFd;

use rustix::process::{Pid, Signal, kill_process};

use crate::*;

/// For transfers of many megabytes.
const LONG_TIMEOUT: Duration = Duration::from_secs(60);

/// Pseudo-random bytes, so that swapped and repeated blocks are detected.
fn noise(length: usize) -> Vec<u8> {
    pattern().iter().copied().cycle().take(length).collect()
}

#[test]
fn data_to_every_target_form_returns() {
    let (_server, proxy) = serve();
    let echo = echo_server();
    for target in [echo.to_string(), format!("{} {}", echo.ip(), echo.port()), format!("localhost {}", echo.port())] {
        assert_eq!(crate::outcome(&format!("connect -x {proxy} {target}"), b"x\n"), success("x\n"));
    }
}

#[test]
fn transfer_of_64_mib_in_both_directions_at_once_is_complete() {
    let (_server, proxy) = serve();
    let bytes = noise(64 << 20);
    let output = run(&mut command(&format!("connect -x {proxy} {}", echo_server())), &bytes, LONG_TIMEOUT);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(0), bytes.len()), "{}", text(&output.stderr));
    assert!(output.stdout == bytes, "the returned data differs from the sent data");
}

#[test]
fn interactive_data_is_not_delayed() {
    let (_server, proxy) = serve();
    let mut client = start(&format!("connect -x {proxy} {}", echo_server()));
    for round in 1..=20 {
        client.write(b"ping\n");
        client.stdout(|bytes| bytes.len() == 5 * round);
    }
    client.close_stdin();
    assert_eq!(client.wait_exit(TIMEOUT).0.code(), Some(0));
}

#[test]
fn sigusr1_does_not_end_a_client() {
    let (_server, proxy) = serve();
    let echo = echo_server();
    for args in [format!("connect -x {proxy} {echo}"), format!("udp -x {proxy} {}", udp_echo_server(V4))] {
        let mut client = start(&args);
        for line in [b"1\n", b"2\n"] {
            client.write(line);
            client.stdout(|bytes| bytes.ends_with(line));
            let pid = Pid::from_raw(client.pid().try_into().expect("a process id")).expect("not 0");
            kill_process(pid, Signal::USR1).expect("the client runs");
        }
        assert!(client.is_running(), "{args}");
    }
}

#[test]
fn early_half_close_of_the_target_loses_no_data_from_stdin() {
    let (sender, receiver) = channel();
    let target = tcp_server(V4, move |mut stream| {
        stream.shutdown(Shutdown::Write).expect("half-closed");
        let mut all = Vec::new();
        let ended = stream.read_to_end(&mut all);
        let _ = sender.send((all, ended.is_ok()));
    });
    let (_server, proxy) = serve();
    let bytes = noise(8 << 20);
    let output = run(&mut command(&format!("connect -x {proxy} {target}")), &bytes, LONG_TIMEOUT);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let (all, ended) = receiver.recv_timeout(TIMEOUT).expect("the target reports its data");
    assert!(ended, "ended by a reset");
    assert!(all == bytes, "{} of {} bytes arrived", all.len(), bytes.len());
}

#[test]
fn large_answer_after_the_end_of_stdin_is_complete() {
    let bytes = noise(8 << 20);
    let answer = bytes.clone();
    let proxy = ScriptedServer::open_tunnel(move |mut stream| {
        stream.read_to_end(&mut Vec::new()).expect("the end of stdin arrives");
        let _ = stream.write_all(&answer);
    });
    let output = run(&mut command(&format!("connect -x {} {TARGET}", proxy.addr)), b"", LONG_TIMEOUT);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(output.stdout == bytes, "{} of {} bytes arrived", output.stdout.len(), bytes.len());
}

#[test]
fn close_by_the_proxy_with_unread_data_has_status_55_or_56() {
    // A close with unread bytes sends a reset, since bytes are lost.
    let proxy = ScriptedServer::open_tunnel(|mut stream| stream.read_exact(&mut [0; 1]).expect("a byte arrives"));
    let (status, _, stderr) = outcome_of(&mut command(&format!("connect -x {} {TARGET}", proxy.addr)), &noise(8 << 20));
    assert!(matches!(status, Some(55 | 56)) && stderr.lines().count() == 1, "{status:?}: {stderr}");
}

#[test]
fn full_disk_has_status_23_also_for_bulk() {
    let proxy = ScriptedServer::open_tunnel(|mut stream| drop(stream.write_all(&noise(1 << 20))));
    let full = OpenOptions::new().write(true).open("/dev/full").expect("/dev/full opened");
    let mut command = command(&format!("connect -x {} {TARGET}", proxy.addr));
    let (status, _, stderr) = RunningProgram::start_with(&mut command, full.into(), |_| false).wait_exit(TIMEOUT);
    let reason = "transfer, for target.example:80: write to stdout: no space left on device";
    assert_eq!((status.code(), stderr), (Some(23), format!("s5: proxy {}: {reason}\n", proxy.addr)));
}

#[test]
fn file_status_flags_of_stdin_and_stdout_are_unchanged() {
    // O_NONBLOCK would affect the other processes that share the open file description.
    let (reader, mut writer) = std::io::pipe().expect("pipe created");
    let (mut out_reader, out_writer) = std::io::pipe().expect("pipe created");
    let flags = |fd: &dyn AsFd| {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd()));
        info.expect("the descriptor is open").lines().find(|line| line.starts_with("flags:")).map(str::to_owned)
    };
    let before = [flags(&reader), flags(&out_writer)];
    let (_server, proxy) = serve();
    let mut command = command(&format!("connect -x {proxy} {}", echo_server()));
    command.stdin(reader.try_clone().expect("cloned")).stdout(out_writer.try_clone().expect("cloned"));
    let mut child = command.stderr(Stdio::null()).spawn().expect("s5 starts");
    drop(command);
    writer.write_all(b"hello").expect("data sent");
    out_reader.read_exact(&mut [0; 5]).expect("all bytes received");
    assert_eq!([flags(&reader), flags(&out_writer)], before);
    drop(writer);
    assert!(child.wait().expect("the child can be waited for").success());
}

#[test]
fn closed_stdin_is_treated_as_empty() {
    let (_server, proxy) = serve();
    let target = tcp_server(V4, |mut stream| drop(stream.write_all(b"hello")));
    let script = format!("exec \"$0\" connect -x {proxy} {target} <&-");
    // Rust's runtime opens /dev/null as a closed stdin.
    let mut shell = Command::new("sh");
    assert_eq!(outcome_of(shell.args(["-c", &script, env!("CARGO_BIN_EXE_s5")]), b""), success("hello"));
}
