//! `s5 bind` in scripts: --address-file, -z, and a program that serves the peer.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::support::scripted::{RunningProgram, ScriptedServer, reply_with, success_reply, text, with_stream};
use crate::support::{Server, TIMEOUT, is_installed, run, s5, temp_dir, wait_until};

/// Waits until a file exists, and returns the address in it.
fn read_address(path: &Path) -> SocketAddr {
    let mut found = None;
    wait_until("the address is written", TIMEOUT, || {
        found = std::fs::read_to_string(path).ok();
        found.is_some()
    });
    let line = found.expect("the file exists");
    // The file is written atomically, so its first content is complete.
    line.strip_suffix('\n').and_then(|addr| addr.parse().ok()).unwrap_or_else(|| panic!("{line:?} is not an address"))
}

#[test]
fn address_file_has_only_the_address() {
    let (server, dir) = (Server::start(&[]), temp_dir());
    let path = dir.path().join("address");

    let mut command = s5();
    command.args(["bind", "-x", &server.addr().to_string(), "--address-file"]).arg(&path);
    let mut client = RunningProgram::start(&mut command);
    let at = read_address(&path);
    assert!(client.stderr(|stderr| stderr.contains("bound ")).contains(&at.to_string()));
    let mut peer = TcpStream::connect(at).expect("the listener accepts");
    peer.write_all(b"hello").expect("data sent");
    peer.shutdown(Shutdown::Write).expect("half-closed");
    client.close_stdin();
    assert_eq!(client.wait_exit(TIMEOUT).1, b"hello");
    let names: Vec<_> =
        std::fs::read_dir(dir.path()).expect("directory read").flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(names, ["address"], "a temporary file is left");
}

#[test]
fn address_file_descriptor_gets_the_address_and_is_closed() {
    let server = Server::start(&[]);
    // cat exits when s5 has closed the pipe, while s5 is still waiting for its peer.
    let script = "\"$0\" bind -x \"$1\" --address-file fd:3 3>&1 >/dev/null 2>/dev/null & echo $! >&2; exec 1>&-";
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{{ {script}; }} | cat"), env!("CARGO_BIN_EXE_s5"), &server.addr().to_string()]);
    let output = run(&mut command, b"", TIMEOUT);
    let at: SocketAddr = text(&output.stdout).trim().parse().expect("valid address");
    let pid = text(&output.stderr).trim().to_owned();
    assert!(Path::new("/proc").join(&pid).exists(), "s5 has exited before its peer connects");
    drop(TcpStream::connect(at).expect("the listener accepts"));
    wait_until("the client exits", TIMEOUT, || !Path::new("/proc").join(&pid).join("exe").exists());
}

#[test]
fn address_file_named_pipe_gets_the_address() {
    let (server, dir) = (Server::start(&[]), temp_dir());
    let path = dir.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&path).status().expect("mkfifo runs").success());
    let mut command = s5();
    command.args(["bind", "-x", &server.addr().to_string(), "--address-file"]).arg(&path);
    let _client = RunningProgram::start(&mut command);
    let output = run(Command::new("cat").arg(&path), b"", TIMEOUT);
    assert!(text(&output.stdout).trim().parse::<SocketAddr>().is_ok(), "{}", text(&output.stdout));
}

#[test]
fn address_file_fails_at_once_if_the_file_cannot_be_written() {
    let server = Server::start(&[]);
    for (to, status) in [("/nonexistent/address", 23), ("fd:77", 2), ("fd:x", 2), ("fd:1", 2)] {
        let output = run(s5().args(["bind", "-x", &server.addr().to_string(), "--address-file", to]), b"", TIMEOUT);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{to}: {stderr}");
        assert!(stderr.lines().last().is_some_and(|line| line.starts_with("s5: --address-file")), "{to}: {stderr}");
    }
}

#[test]
fn bind_z_exits_when_the_peer_connects() {
    let server = Server::start(&[]);
    let mut client = RunningProgram::start(s5().args(["bind", "-z", "-x", &server.addr().to_string()]));
    let stderr = client.stderr(|stderr| stderr.contains("bound "));
    let at: SocketAddr = stderr.trim().trim_start_matches("bound ").parse().expect("valid address");
    assert!(client.is_running());
    let peer = TcpStream::connect(at).expect("the listener accepts");
    assert_eq!(client.wait_exit(TIMEOUT).0.code(), Some(0));
    drop(peer);
}

#[test]
fn bind_exec_program_has_the_peer_as_stdin_and_stdout() {
    let server = Server::start(&[]);
    let args =
        ["bind", "-x", &server.addr().to_string(), "-c", "read line; echo \"received $line at $S5_BND\"; exit 3"];
    let mut client = RunningProgram::start(s5().args(args));
    let stderr = client.stderr(|stderr| stderr.contains("bound "));
    let at = stderr.trim().trim_start_matches("bound ").to_owned();
    let mut peer = TcpStream::connect(&at).expect("the listener accepts");
    peer.write_all(b"hello\n").expect("data sent");
    let mut answer = String::new();
    peer.read_to_string(&mut answer).expect("the program answers");
    assert_eq!(answer, format!("received hello at {at}\n"));
    assert_eq!(client.wait_exit(TIMEOUT).0.code(), Some(3));
}

#[test]
fn bind_json_has_bnd_and_peer() {
    if !is_installed("python3") {
        return;
    }
    let first = success_reply(([192, 0, 2, 1], 4321).into());
    let second = success_reply(([192, 0, 2, 2], 1234).into());
    let script =
        reply_with(&first).into_iter().chain([crate::support::scripted::send(&second), with_stream(drop)]).collect();
    let proxy = ScriptedServer::start(script);
    let output = run(s5().args(["bind", "--json", "-x", &proxy.url()]), b"", TIMEOUT);
    let line = text(&output.stderr).lines().last().unwrap_or_default().to_owned();
    for part in ["\"bnd\":\"192.0.2.1:4321\"", "\"peer\":\"192.0.2.2:1234\"", "\"status\":0"] {
        assert!(line.contains(part), "{part}: {line}");
    }
}

/// Runs the commands of the README: another machine sends a file back through the proxy.
#[test]
fn bind_example_of_readme_transfers_a_file() {
    if !is_installed("nc.openbsd") {
        return;
    }
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).expect("README.md");
    let line = |begin: &str| {
        let line = readme.lines().find(|line| line.starts_with(begin)).unwrap_or_else(|| panic!("no line {begin}"));
        line.split("  #").next().unwrap_or_default().trim().to_owned()
    };
    let (receive, send) = (line("s5 bind --address-file address"), line("nc -N $(tr"));
    let (server, dir) = (Server::start(&[]), temp_dir());
    let content: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_be_bytes).collect();
    std::fs::create_dir(dir.path().join("there")).expect("directory created");
    std::fs::write(dir.path().join("there/file"), &content).expect("file written");
    let shell = |script: &str, at: &Path| {
        let mut command = Command::new("sh");
        let script =
            script.replace("s5 ", &format!("'{}' ", env!("CARGO_BIN_EXE_s5"))).replace("nc -N", "nc.openbsd -N");
        command.args(["-c", &script]).current_dir(at).env("S5_PROXY", server.addr().to_string()).stdin(Stdio::null());
        command
    };
    let mut receiver = RunningProgram::start(&mut shell(&receive, dir.path()));
    read_address(&dir.path().join("address"));
    std::fs::copy(dir.path().join("address"), dir.path().join("there/address")).expect("the file is copied");
    let output = run(&mut shell(&send, &dir.path().join("there")), b"", Duration::from_secs(20));
    assert!(output.status.success(), "{}", text(&output.stderr));
    receiver.close_stdin();
    assert_eq!(receiver.wait_exit(TIMEOUT).0.code(), Some(0));
    assert!(std::fs::read(dir.path().join("received")).expect("file read") == content, "the received file differs");
}

#[test]
fn address_file_follows_symlinks_removes_old_address_and_obeys_umask() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = temp_dir();
    let (path, link) = (dir.path().join("address"), dir.path().join("link"));
    std::fs::write(&path, "127.0.0.1:1\n").expect("file written");
    std::os::unix::fs::symlink(&path, &link).expect("symlink created");
    // This proxy never replies, so no address is written.
    let silent = ScriptedServer::start(vec![
        crate::support::scripted::Step::Greeting,
        crate::support::scripted::Step::WaitForClose,
    ]);
    let mut command = s5();
    command.args(["bind", "-x", &silent.url(), "--address-file"]).arg(&link);
    let waiting = RunningProgram::start(&mut command);
    silent.message();
    assert!(!path.exists(), "the address of an earlier run is still there");
    drop(waiting);
    std::fs::write(&path, "127.0.0.1:1\n").expect("file written");
    let server = Server::start(&[]);
    let mut command = s5();
    command.args(["bind", "-x", &server.addr().to_string(), "--address-file"]).arg(&link);
    let client = RunningProgram::start(&mut command);
    client.stderr(|stderr| stderr.contains("bound "));
    read_address(&path);
    assert!(link.is_symlink(), "the symlink was replaced");
    let mode = std::fs::metadata(&path).expect("the file exists").permissions().mode() & 0o777;
    let other = dir.path().join("other");
    std::fs::write(&other, "").expect("file written");
    assert_eq!(mode, std::fs::metadata(&other).expect("the file exists").permissions().mode() & 0o777);
}

#[test]
fn bind_ignores_no_proxy() {
    let server = Server::start(&[]);
    let mut command = s5();
    command.env("ALL_PROXY", server.addr().to_string()).env("NO_PROXY", "*").args(["bind", "127.0.0.1"]);
    RunningProgram::start(&mut command).stderr(|stderr| stderr.starts_with("bound "));
}

#[test]
fn address_file_descriptor_appends_at_its_position() {
    let (server, dir) = (Server::start(&[]), temp_dir());
    let log = dir.path().join("log");
    std::fs::write(&log, "before\n").expect("file written");
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$0\" bind -x \"$1\" --address-file fd:3 3>>\"$2\"", env!("CARGO_BIN_EXE_s5")]);
    let client = RunningProgram::start(command.arg(server.addr().to_string()).arg(&log));
    let stderr = client.stderr(|stderr| stderr.contains("bound "));
    let bound = stderr.trim().trim_start_matches("bound ");
    let expected = format!("before\n{bound}\n");
    wait_until("the address is appended", TIMEOUT, || std::fs::read_to_string(&log).is_ok_and(|text| text == expected));
}
