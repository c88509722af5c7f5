//! `s5 bind` in scripts: the address on its way to whoever is to connect, a wait that ends, a program for the peer.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::common::{Server, TIMEOUT, is_installed, run, s5, temp_dir, wait_until};
use crate::scripted::{RunningProgram, ScriptedServer, reply_with, success_reply, text, with_stream};

/// The address in a file, once it is there.
fn address(path: &Path) -> SocketAddr {
    let mut found = None;
    wait_until("the address is written", TIMEOUT, || {
        found = std::fs::read_to_string(path).ok();
        found.is_some()
    });
    let line = found.expect("it is there");
    // Written whole: the first thing that is seen is all of it.
    line.strip_suffix('\n').and_then(|addr| addr.parse().ok()).unwrap_or_else(|| panic!("{line:?} is no address"))
}

#[test]
fn the_bound_address_alone_is_written_to_a_file_whole() {
    let (server, folder) = (Server::start(&[]), temp_dir());
    let path = folder.path().join("address");
    std::fs::write(&path, "127.0.0.1:1\n of an earlier run").expect("a file");
    std::fs::remove_file(&path).expect("it can go");
    let mut command = s5();
    command.args(["bind", "-x", &server.addr().to_string(), "--bound-to"]).arg(&path);
    let mut client = RunningProgram::start(&mut command);
    let at = address(&path);
    assert!(client.stderr(|said| said.contains("bound ")).contains(&at.to_string()));
    let mut peer = TcpStream::connect(at).expect("the proxy listens there");
    peer.write_all(b"hello").expect("it is sent");
    peer.shutdown(Shutdown::Write).expect("it can be");
    client.close_stdin();
    assert_eq!(client.end(TIMEOUT).1, b"hello");
    let names: Vec<_> =
        std::fs::read_dir(folder.path()).expect("a folder").flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(names, ["address"], "nothing else is left there");
}

#[test]
fn a_descriptor_gets_the_address_and_is_closed() {
    let server = Server::start(&[]);
    // cat ends when all that write into the pipe have closed it; s5 itself still waits for its peer then.
    let script = "\"$0\" bind -x \"$1\" --bound-to fd:3 3>&1 >/dev/null 2>/dev/null & echo $! >&2; exec 1>&-";
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{{ {script}; }} | cat"), env!("CARGO_BIN_EXE_s5"), &server.addr().to_string()]);
    let output = run(&mut command, b"", TIMEOUT);
    let at: SocketAddr = text(&output.stdout).trim().parse().expect("an address");
    let pid = text(&output.stderr).trim().to_owned();
    assert!(Path::new("/proc").join(&pid).exists(), "it waits for its peer");
    drop(TcpStream::connect(at).expect("the proxy listens there"));
    wait_until("it ends", TIMEOUT, || !Path::new("/proc").join(&pid).join("exe").exists());
}

#[test]
fn a_named_pipe_stays_one() {
    let (server, folder) = (Server::start(&[]), temp_dir());
    let path = folder.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&path).status().expect("mkfifo runs").success());
    let mut command = s5();
    command.args(["bind", "-x", &server.addr().to_string(), "--bound-to"]).arg(&path);
    let _client = RunningProgram::start(&mut command);
    let output = run(Command::new("cat").arg(&path), b"", TIMEOUT);
    assert!(text(&output.stdout).trim().parse::<SocketAddr>().is_ok(), "{}", text(&output.stdout));
}

#[test]
fn where_the_address_can_not_be_written_nothing_is_waited_for() {
    let server = Server::start(&[]);
    for (to, status) in [("/nonexistent/address", 23), ("fd:77", 2), ("fd:x", 2), ("fd:1", 2)] {
        let output = run(s5().args(["bind", "-x", &server.addr().to_string(), "--bound-to", to]), b"", TIMEOUT);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{to}: {said}");
        assert!(said.lines().last().is_some_and(|line| line.starts_with("s5: --bound-to")), "{to}: {said}");
    }
}

#[test]
fn z_waits_for_the_peer_and_no_longer() {
    let server = Server::start(&[]);
    let mut client = RunningProgram::start(s5().args(["bind", "-z", "-x", &server.addr().to_string()]));
    let said = client.stderr(|said| said.contains("bound "));
    let at: SocketAddr = said.trim().trim_start_matches("bound ").parse().expect("an address");
    assert!(client.is_running());
    let peer = TcpStream::connect(at).expect("the proxy listens there");
    assert_eq!(client.end(TIMEOUT).0.code(), Some(0));
    drop(peer);
}

#[test]
fn a_program_has_the_peer_as_stdin_and_stdout() {
    let server = Server::start(&[]);
    let args =
        ["bind", "-x", &server.addr().to_string(), "-c", "read line; echo \"you said $line to $S5_BND\"; exit 3"];
    let mut client = RunningProgram::start(s5().args(args));
    let said = client.stderr(|said| said.contains("bound "));
    let at = said.trim().trim_start_matches("bound ").to_owned();
    let mut peer = TcpStream::connect(&at).expect("the proxy listens there");
    peer.write_all(b"hello\n").expect("it is sent");
    let mut answer = String::new();
    peer.read_to_string(&mut answer).expect("it answers");
    assert_eq!(answer, format!("you said hello to {at}\n"));
    assert_eq!(client.end(TIMEOUT).0.code(), Some(3));
}

#[test]
fn json_tells_both_addresses() {
    if !is_installed("python3") {
        return;
    }
    let first = success_reply(([192, 0, 2, 1], 4321).into());
    let second = success_reply(([192, 0, 2, 2], 1234).into());
    let script = reply_with(&first).into_iter().chain([crate::scripted::send(&second), with_stream(drop)]).collect();
    let proxy = ScriptedServer::start(script);
    let output = run(s5().args(["bind", "--json", "-x", &proxy.url()]), b"", TIMEOUT);
    let line = text(&output.stderr).lines().last().unwrap_or_default().to_owned();
    for part in ["\"bnd\":\"192.0.2.1:4321\"", "\"peer\":\"192.0.2.2:1234\"", "\"status\":0"] {
        assert!(line.contains(part), "{part}: {line}");
    }
}

/// The example of the README: a file comes back through a proxy from a machine that can reach only that.
#[test]
fn a_file_is_sent_back_through_the_proxy_as_the_readme_has_it() {
    if !is_installed("nc.openbsd") {
        return;
    }
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).expect("README.md");
    let line = |begin: &str| {
        let line = readme.lines().find(|line| line.starts_with(begin)).unwrap_or_else(|| panic!("no line {begin}"));
        line.split("  #").next().unwrap_or_default().trim().to_owned()
    };
    let (here, there) = (line("s5 bind --bound-to address"), line("nc -N $(tr"));
    let (server, folder) = (Server::start(&[]), temp_dir());
    let content: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_be_bytes).collect();
    std::fs::create_dir(folder.path().join("there")).expect("a folder");
    std::fs::write(folder.path().join("there/file"), &content).expect("a file");
    let shell = |script: &str, at: &Path| {
        let mut command = Command::new("sh");
        let script =
            script.replace("s5 ", &format!("'{}' ", env!("CARGO_BIN_EXE_s5"))).replace("nc -N", "nc.openbsd -N");
        command.args(["-c", &script]).current_dir(at).env("S5_PROXY", server.addr().to_string()).stdin(Stdio::null());
        command
    };
    let mut receiver = RunningProgram::start(&mut shell(&here, folder.path()));
    address(&folder.path().join("address"));
    std::fs::copy(folder.path().join("address"), folder.path().join("there/address")).expect("it is handed on");
    let output = run(&mut shell(&there, &folder.path().join("there")), b"", Duration::from_secs(20));
    assert!(output.status.success(), "{}", text(&output.stderr));
    receiver.close_stdin();
    assert_eq!(receiver.end(TIMEOUT).0.code(), Some(0));
    assert!(std::fs::read(folder.path().join("file")).expect("the file came") == content, "it is another one");
}

#[test]
fn a_link_is_followed_an_old_address_is_gone_and_others_may_read_the_new_one() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = temp_dir();
    let (path, link) = (folder.path().join("address"), folder.path().join("link"));
    std::fs::write(&path, "127.0.0.1:1\n").expect("a file");
    std::os::unix::fs::symlink(&path, &link).expect("a link");
    // A proxy that never answers: what is seen meanwhile is what was there before.
    let silent = ScriptedServer::start(vec![crate::scripted::Step::Greeting, crate::scripted::Step::WaitForClose]);
    let mut command = s5();
    command.args(["bind", "-x", &silent.url(), "--bound-to"]).arg(&link);
    let waiting = RunningProgram::start(&mut command);
    silent.message();
    assert!(!path.exists(), "an address of an earlier run could be taken for ours");
    drop(waiting);
    std::fs::write(&path, "127.0.0.1:1\n").expect("a file");
    let server = Server::start(&[]);
    let mut command = s5();
    command.args(["bind", "-x", &server.addr().to_string(), "--bound-to"]).arg(&link);
    let client = RunningProgram::start(&mut command);
    client.stderr(|said| said.contains("bound "));
    address(&path);
    assert!(link.is_symlink(), "the link is what it was");
    let mode = std::fs::metadata(&path).expect("a file").permissions().mode() & 0o777;
    let usual = folder.path().join("usual");
    std::fs::write(&usual, "").expect("a file");
    assert_eq!(mode, std::fs::metadata(&usual).expect("a file").permissions().mode() & 0o777);
}

#[test]
fn whom_a_proxy_waits_for_is_no_exception() {
    let server = Server::start(&[]);
    let mut command = s5();
    command.env("ALL_PROXY", server.addr().to_string()).env("NO_PROXY", "*").args(["bind", "127.0.0.1"]);
    RunningProgram::start(&mut command).stderr(|said| said.starts_with("bound "));
}

#[test]
fn a_descriptor_goes_on_where_it_is() {
    let (server, folder) = (Server::start(&[]), temp_dir());
    let log = folder.path().join("log");
    std::fs::write(&log, "before\n").expect("a file");
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$0\" bind -x \"$1\" --bound-to fd:3 3>>\"$2\"", env!("CARGO_BIN_EXE_s5")]);
    let client = RunningProgram::start(command.arg(server.addr().to_string()).arg(&log));
    let said = client.stderr(|said| said.contains("bound "));
    let bound = said.trim().trim_start_matches("bound ");
    let expected = format!("before\n{bound}\n");
    wait_until("it is added", TIMEOUT, || std::fs::read_to_string(&log).is_ok_and(|text| text == expected));
}
