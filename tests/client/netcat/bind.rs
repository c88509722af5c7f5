//! `s5 bind` in scripts: --address-file, -z, and a program that serves the peer.

use crate::bind::bound_address;
use crate::*;

/// Waits until a file exists, and returns the address in it.
fn read_address(path: &Path) -> SocketAddr {
    let mut found = None;
    wait_until("the address is written", TIMEOUT, || {
        found = fs::read_to_string(path).ok();
        found.is_some()
    });
    let line = found.expect("the file exists");
    // The file is written atomically, so its first content is complete.
    line.strip_suffix('\n').and_then(|addr| addr.parse().ok()).unwrap_or_else(|| panic!("{line:?} is not an address"))
}

#[test]
fn address_file_has_only_the_address() {
    let ((_server, proxy), dir) = (serve(), temp_dir());
    let path = dir.path().join("address");
    let mut client = start(&format!("bind -x {proxy} --address-file {}", path.display()));
    let at = read_address(&path);
    assert_eq!(bound_address(&client), at);
    let mut peer = TcpStream::connect(at).expect("the listener accepts");
    peer.write_all(b"hello").expect("data sent");
    peer.shutdown(Shutdown::Write).expect("half-closed");
    client.close_stdin();
    assert_eq!(client.wait_exit(TIMEOUT).1, b"hello");
    let names: Vec<_> = fs::read_dir(dir.path()).expect("directory read").flatten().map(|e| e.file_name()).collect();
    assert_eq!(names, ["address"], "a temporary file is left");
}

#[test]
fn address_file_descriptor_gets_the_address_and_is_closed() {
    let (_server, proxy) = serve();
    // cat exits when s5 has closed the pipe, while s5 is still waiting for its peer.
    let script = format!("\"$0\" bind -x {proxy} --address-file fd:3 3>&1 >/dev/null 2>/dev/null & echo $! >&2");
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{{ {script}; exec 1>&-; }} | cat"), env!("CARGO_BIN_EXE_s5")]);
    let (_, address, pid) = outcome_of(&mut command, b"");
    let process = Path::new("/proc").join(pid.trim());
    assert!(process.exists(), "s5 has exited before its peer connects");
    drop(TcpStream::connect(address.trim()).expect("the listener accepts"));
    wait_until("the client exits", TIMEOUT, || !process.join("exe").exists());
}

#[test]
fn address_file_descriptor_gets_the_address() {
    let ((_server, proxy), dir) = (serve(), temp_dir());
    let path = dir.path().join("address");
    fs::write(&path, "before\n").expect("file written");
    let script = format!("exec \"$0\" bind -x {proxy} --address-file fd:3 3>>{}", path.display());
    let client = RunningProgram::start(Command::new("sh").args(["-c", &script, env!("CARGO_BIN_EXE_s5")]));
    let expected = format!("before\n{}\n", bound_address(&client));
    wait_until("the address is written", TIMEOUT, || fs::read_to_string(&path).is_ok_and(|text| text == expected));
}

#[test]
fn address_file_named_pipe_gets_the_address() {
    let ((_server, proxy), dir) = (serve(), temp_dir());
    let path = dir.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&path).status().expect("mkfifo runs").success());
    let _client = start(&format!("bind -x {proxy} --address-file {}", path.display()));
    let address = text(&run(Command::new("cat").arg(&path), b"", TIMEOUT).stdout);
    assert!(address.trim().parse::<SocketAddr>().is_ok(), "{address}");
}

#[test]
fn address_file_named_pipe_without_reader_is_named_as_the_cause() {
    let ((_server, proxy), dir) = (serve(), temp_dir());
    let path = dir.path().join("fifo").display().to_string();
    assert!(Command::new("mkfifo").arg(&path).status().expect("mkfifo runs").success());
    let args = format!("bind -x {proxy} --address-file {path}");
    let (status, _, stderr) = outcome(&format!("{args} -w 1s"), b"");
    let message = format!("s5: --address-file {path}: no reader has opened the pipe within 1s\n");
    assert_eq!((status, stderr.ends_with(&message)), (Some(28), true), "{stderr}");
    let (status, _, stderr) = outcome(&format!("{args} --json -m 1s"), b"");
    assert_eq!((status, stderr.contains("\"phase\":\"accept\"")), (Some(28), true), "{stderr}");
}

#[test]
fn address_file_fails_at_once_if_the_file_cannot_be_written() {
    let (_server, proxy) = serve();
    for (to, expected) in [("/nonexistent/address", 23), ("fd:77", 2), ("fd:x", 2), ("fd:1", 2)] {
        let (status, _, stderr) = outcome(&format!("bind -x {proxy} --address-file {to}"), b"");
        assert_eq!(status, Some(expected), "{to}: {stderr}");
        assert!(stderr.lines().last().is_some_and(|line| line.starts_with("s5: --address-file")), "{to}: {stderr}");
    }
}

#[test]
fn address_file_follows_symlinks_removes_old_address_and_obeys_umask() {
    let dir = temp_dir();
    let (path, link) = (dir.path().join("address"), dir.path().join("link"));
    let bind = |proxy: &str| start(&format!("bind -x {proxy} --address-file {}", link.display()));
    fs::write(&path, "127.0.0.1:1\n").expect("file written");
    symlink(&path, &link).expect("symlink created");
    // This proxy never replies, so no address is written.
    let silent = ScriptedServer::start("> {greeting}; > ...");
    let waiting = bind(&silent.url());
    silent.message();
    assert!(!path.exists(), "the address of an earlier run is still there");
    drop(waiting);
    fs::write(&path, "127.0.0.1:1\n").expect("file written");
    let (_server, proxy) = serve();
    let client = bind(&proxy);
    assert_eq!(bound_address(&client), read_address(&path));
    assert!(link.is_symlink(), "the symlink was replaced");
    let other = dir.path().join("other");
    fs::write(&other, "").expect("file written");
    let [mode, umask] = [&path, &other].map(|path| fs::metadata(path).expect("a file").permissions().mode() & 0o777);
    assert_eq!(mode, umask);
}

#[test]
fn address_file_descriptor_appends_at_its_position() {
    let ((_server, proxy), dir) = (serve(), temp_dir());
    let log = dir.path().join("log");
    fs::write(&log, "before\n").expect("file written");
    let script = format!("exec \"$0\" bind -x {proxy} --address-file fd:3 3>>\"$1\"");
    let mut command = Command::new("sh");
    let client = RunningProgram::start(command.args(["-c", &script, env!("CARGO_BIN_EXE_s5")]).arg(&log));
    let expected = format!("before\n{}\n", bound_address(&client));
    wait_until("the address is appended", TIMEOUT, || fs::read_to_string(&log).is_ok_and(|text| text == expected));
}

#[test]
fn text_that_is_no_address_does_not_get_out_of_a_reply() {
    let dir = temp_dir();
    let path = dir.path().join("address");
    for name in ["-e/bin/sh -x", "-x", "a b", "$(id)", "a;b", "../x", "a..b", "fe80::1%-x", "x@y", "\u{202e}x", "a:b"] {
        let bytes: String = name.bytes().map(|byte| format!(" {byte:02x}")).collect();
        let bnd = format!("05 00 00 03 {:02x}{bytes} 10 e1", name.len());
        for mode in ["bind -vv", "udp -vv"] {
            let proxy = ScriptedServer::start(&reply(&bnd));
            let file =
                if mode.starts_with("bind") { format!(" --address-file {}", path.display()) } else { String::new() };
            let (status, _, stderr) = outcome(&format!("{mode} -x {}{file} 127.0.0.1 80", proxy.addr), b"");
            assert_eq!((status, stderr.contains(name)), (Some(97), false), "{mode}: {stderr}");
            assert!(stderr.contains("no address, or port 0 in the reply to ") && !path.exists(), "{stderr}");
        }
        // CONNECT needs no BND.
        let proxy = ScriptedServer::start(&reply(&bnd));
        let mut command = command(&format!("connect -vv --json -x {} 127.0.0.1:80 -c", proxy.addr));
        let (status, _, stderr) = outcome_of(command.arg("echo \"BND $S5_BND\" >&2"), b"");
        assert_eq!(
            (status, stderr.contains("BND 0.0.0.0:0\n"), stderr.contains(name)),
            (Some(0), true, false),
            "{stderr}"
        );
        let via = ScriptedServer::start(&reply(&bnd)).addr.to_string();
        let server = Server::start(&["-v", "-v", "--via", &via]);
        assert_eq!(outcome(&format!("connect -z -x {} 127.0.0.1:80", server.addr()), b"").0, Some(0));
        let log = server.wait_log(|log| log.contains("msg=session "));
        assert!(!log.contains(name), "{log}");
    }
    for name in ["host", "_a-b.example.", "127.0.0.1", "fe80::1%eth0.1"] {
        let bytes: String = name.bytes().map(|byte| format!(" {byte:02x}")).collect();
        let second = format!("< 05 00 00 03 {:02x}{bytes} 10 e1", name.len());
        let proxy = ScriptedServer::start(&format!("{} {second}", reply(second.trim_start_matches("< "))));
        let (status, _, stderr) = outcome(&format!("bind -x {}", proxy.addr), b"");
        assert_eq!((status, stderr.matches(name).count()), (Some(0), 2), "{stderr}");
    }
}

#[test]
fn bind_z_exits_when_the_peer_connects() {
    let (_server, proxy) = serve();
    let mut client = start(&format!("bind -z -x {proxy}"));
    let at = bound_address(&client);
    assert!(client.is_running());
    let _peer = TcpStream::connect(at).expect("the listener accepts");
    assert_eq!(client.wait_exit(TIMEOUT).0.code(), Some(0));
}

#[test]
fn bind_exec_program_has_the_peer_as_stdin_and_stdout() {
    let (_server, proxy) = serve();
    let script = "read line; echo \"received $line at $S5_BND\"; exit 3";
    let mut client = RunningProgram::start(command(&format!("bind -x {proxy} -c")).arg(script));
    let at = bound_address(&client);
    let mut peer = TcpStream::connect(at).expect("the listener accepts");
    peer.write_all(b"hello\n").expect("data sent");
    let mut answer = String::new();
    peer.read_to_string(&mut answer).expect("the program answers");
    assert_eq!(answer, format!("received hello at {at}\n"));
    assert_eq!(client.wait_exit(TIMEOUT).0.code(), Some(3));
}

#[test]
fn bind_json_has_bnd_and_peer() {
    let replies = "05 00 00 01 c0 00 02 01 10 e1; < 05 00 00 01 c0 00 02 02 04 d2";
    let proxy = ScriptedServer::start(&reply(replies));
    let (_, _, stderr) = outcome(&format!("bind --json -x {}", proxy.addr), b"");
    let line = stderr.lines().last().unwrap_or_default();
    for part in ["\"bnd\":\"192.0.2.1:4321\"", "\"peer\":\"192.0.2.2:1234\"", "\"status\":0"] {
        assert!(line.contains(part), "{part}: {line}");
    }
}

#[test]
fn bind_ignores_no_proxy() {
    let (_server, proxy) = serve();
    let mut command = command("bind 127.0.0.1");
    bound_address(&RunningProgram::start(command.env("ALL_PROXY", proxy).env("NO_PROXY", "*")));
}

/// Runs the commands of the README: another machine sends a file back through the proxy.
#[test]
fn bind_example_of_readme_transfers_a_file() {
    if !is_installed("nc.openbsd") {
        return;
    }
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).expect("README.md");
    let line = |begin: &str| {
        let line = readme.lines().find(|line| line.starts_with(begin)).unwrap_or_else(|| panic!("no line {begin}"));
        line.split("  #").next().unwrap_or_default().trim().to_owned()
    };
    for listen in ["127.0.0.1:0", "[::1]:0"] {
        let (server, dir) = (crate::support::serve(listen, 1, &[]), temp_dir());
        let proxy = server.addr().to_string();
        let (here, there) = (dir.path(), dir.path().join("there"));
        let content: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_be_bytes).collect();
        fs::create_dir(&there).expect("directory created");
        fs::write(there.join("file"), &content).expect("file written");
        let shell = |script: &str, at: &Path| {
            let s5 = format!("'{}' ", env!("CARGO_BIN_EXE_s5"));
            let script = script.replace("s5 ", &s5).replace("nc -N", "nc.openbsd -N");
            let mut command = Command::new("sh");
            command.args(["-c", &script]).current_dir(at).env("S5_PROXY", &proxy).stdin(Stdio::null());
            command
        };
        let mut receiver = RunningProgram::start(&mut shell(&line("s5 bind --address-file address"), here));
        read_address(&here.join("address"));
        fs::copy(here.join("address"), there.join("address")).expect("the file is copied");
        let output = run(&mut shell(&line("nc -N $(sed"), &there), b"", 2 * TIMEOUT);
        assert!(output.status.success(), "{}", text(&output.stderr));
        receiver.close_stdin();
        assert_eq!(receiver.wait_exit(TIMEOUT).0.code(), Some(0));
        assert!(fs::read(here.join("received")).expect("file read") == content, "the received file differs");
    }
}
