//! SIGUSR2: a new process takes over the listening sockets.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{self as unix, UnixDatagram};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use crate::udp::association::{Association, socket};
use crate::*;

/// Waits until the old process has ended. It stays a zombie, because the new process has its stderr open.
fn wait_end(server: &Server) {
    let stat = format!("/proc/{}/stat", server.pid());
    let is_zombie = || fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") Z "));
    wait_until("the old process ends", TIMEOUT, is_zombie);
}

/// Waits until a restart has failed. Returns the line of the log.
fn failure(server: &Server) -> String {
    let log = server.wait_log(|log| log.contains("; this process goes on\n"));
    let line = log.lines().rfind(|line| line.contains("; this process goes on"));
    line.and_then(|line| line.split_once("] restart: ")).expect("a line of the restart").1.to_owned()
}

/// Connections per second of the load.
const RATE: u32 = 500;

#[test]
fn restart_under_load_loses_no_connection_and_no_tunnel() {
    // A busy machine may not reach the rate at once.
    let has_rate = |rate| restart_under_load(rate).has_rate(rate);
    assert!([RATE, RATE, RATE / 2].into_iter().any(has_rate), "fewer than {RATE} connections per second");
}

fn restart_under_load(rate: u32) -> LoadReport {
    let (dir, target) = (temp_dir(), echo_server());
    let path = dir.path().join("s5.sock");
    let unix = format!("unix:{}", path.display());
    let mut command = s5();
    command.args(["serve", "--listen", "127.0.0.1:0", "--listen", "[::1]:0", "--listen", &unix]);
    command.args(["--drain-timeout", "60", "--threads", "2", "--metrics", "127.0.0.1:0"]);
    let mut server = Server::start_with(&mut command, 3);
    let mut tunnel = connect_to(&server, target);
    let addrs = server.addrs.clone();
    let session = |n: usize| match addrs.get(n % 3) {
        Some(addr) => use_once(connect_for_load(*addr)?, target),
        None => use_once(UnixStream::connect(&path)?, target),
    };
    let mut successor = None;
    let report = Load::run(rate, session, |load| {
        load.wait(100);
        successor = Some(Successor::of(&server));
        load.wait(300);
    });
    let successor = successor.expect("a new process");
    assert!(report.errors.is_empty(), "{:#?}\n{}", report.errors, server.log());
    // Health checks reach the new process, while the old one drains.
    let log = server.wait_log(|log| log.matches("metrics on ").count() == 2);
    let metrics = log.split("metrics on ").nth(1).and_then(|rest| rest.lines().next()).expect("the address");
    for _ in 0..10 {
        let mut stream = TcpStream::connect(metrics).expect("the new process accepts");
        stream.write_all(b"GET /readyz HTTP/1.0\r\n\r\n").expect("request sent");
        let mut response = String::new();
        stream.read_to_string(&mut response).expect("response received");
        assert!(response.starts_with("HTTP/1.1 200 OK\r\n"), "{response}");
    }
    // The tunnel ends with its client, and with it the old process.
    ping(&mut tunnel, b"after the restart");
    drop(tunnel);
    wait_end(&server);
    assert!(successor.is_running() && path.exists());
    use_once(UnixStream::connect(&path).expect("the new process accepts"), target).expect("the new process serves");
    // The new process can be replaced too, and at its end it removes the file.
    kill_process(successor.0, Signal::TERM).expect("the new process runs");
    assert!(server.wait(TIMEOUT).success(), "status of the old process");
    assert!(!path.exists());
    report
}

#[test]
fn restart_runs_the_program_that_is_now_at_the_path_and_keeps_options_and_user() {
    let dir = temp_dir();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("permissions set");
    let (link, upgraded) = (dir.path().join("s5"), dir.path().join("upgraded"));
    symlink(s5().get_program(), &link).expect("link created");
    let real = s5().get_program().display().to_string();
    write_script(&upgraded, &format!("#!/bin/sh\necho upgraded >&2\nexec {real} \"$@\"\n"));
    let run_as = if rustix::process::geteuid().is_root() { &["--run-as", "nobody"][..] } else { &[] };
    let target = echo_server();
    let name = dir.path().join("notify").display().to_string();
    let addr = unix::SocketAddr::from_abstract_name(&name).expect("a name");
    let manager = UnixDatagram::bind_addr(&addr).expect("bound");
    manager.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    let mut command = Command::new("s5");
    let path = std::env::var("PATH").expect("PATH is set");
    command.env("PATH", format!("{}:{path}", dir.path().display())).env("NOTIFY_SOCKET", format!("@{name}"));
    command.args(["serve", "--listen", "127.0.0.1:0", "--deny", "port=1", "-v"]).args(run_as);
    let mut server = Server::start_with(&mut command, 1);
    fs::remove_file(&link).and_then(|()| fs::rename(&upgraded, &link)).expect("replaced");
    let successor = Successor::of(&server);
    assert!(server.log().contains("upgraded\n"), "{}", server.log());
    wait_end(&server);
    use_once(server.connect(), target).expect("served");
    assert_eq!(open(&server, CONNECT, SocketAddr::new(V4, 1)).1, 2, "the rule is in force");
    let uid = fs::read_to_string(format!("/proc/{}/status", successor.0.as_raw_nonzero())).expect("it runs");
    assert!(run_as.is_empty() || uid.contains("\nUid:\t65534\t65534\t65534\t65534\n"), "{uid}");
    let mut reports = String::new();
    while !reports.contains("READY=1\nSTATUS") || reports.matches("READY=1").count() < 2 {
        let mut buffer = [0; 4096];
        let n = retry(|| manager.recv(&mut buffer)).expect("a report");
        reports += &format!("{}\n", String::from_utf8_lossy(&buffer[..n]));
    }
    let pid = successor.0.as_raw_nonzero();
    assert_eq!(reports.matches(&format!("MAINPID={pid}\n")).count(), 2, "{reports}");
    assert!(!reports.contains("STOPPING"), "{reports}");
    drop(successor);
    assert!(server.wait(TIMEOUT).success());
}

#[test]
fn server_continues_if_the_new_process_fails_and_logs_what_it_said() {
    let dir = temp_dir();
    let rules = write_file(dir.path(), "rules", "allow\n");
    let program = dir.path().join("s5");
    symlink(s5().get_program(), &program).expect("link created");
    let mut command = Command::new(&program);
    let unix_path = dir.path().join("socket");
    command.args(["serve", "--listen", "127.0.0.1:0", "--rules", &rules]);
    command.arg("--listen").arg(format!("unix:{}", unix_path.display()));
    let server = Server::start_with(&mut command, 2);
    let fails = |expected: &str| {
        let failures = |log: &str| log.matches("; this process goes on\n").count();
        let before = failures(&server.log());
        server.signal("USR2");
        server.wait_log(|log| failures(log) > before);
        let line = failure(&server);
        assert!(line.starts_with(&format!("{}: ", program.display())) && line.contains(expected), "{line}");
        use_once(server.connect(), echo_server()).expect("still served");
        use_once(unix::UnixStream::connect(&unix_path).expect("still there"), echo_server()).expect("still served");
    };
    fs::write(&rules, "alow\n").expect("written");
    fails(&format!(": {rules}: line 1: expected \"allow\" or \"deny\""));
    assert!(failure(&server).contains(" (exit status: 2); this process goes on"));
    fs::remove_file(&program).expect("removed");
    fails(": no such file or directory; ");
    write_script(&program, "#!/bin/sh\nkill -SEGV $$\n");
    fails(": signal: 11 (SIGSEGV)");
    write_script(&program, "#!/bin/sh\nexit 0\n");
    fails(": exit status: 0; ");
    // A restart that succeeds after all.
    fs::remove_file(&program).and_then(|()| symlink(s5().get_program(), &program)).expect("link created");
    fs::write(&rules, "allow\n").expect("written");
    server.signal("USR2");
    drop(Successor::after_signal(&server));
}

#[test]
fn restart_is_refused_if_the_passwords_of_proxies_came_from_stdin() {
    let dir = temp_dir();
    let auth = write_file(dir.path(), "auth", "alice:secret\n");
    for (file, shell) in [("-", "<"), ("fd:5", "5<")] {
        let mut command = Command::new("sh");
        let script =
            format!("exec \"$0\" serve --listen 127.0.0.1:0 --proxy-auth-file {file} --via 127.0.0.1:1 {shell} {auth}");
        let server = Server::start_with(command.args(["-c", &script]).arg(s5().get_program()), 1);
        server.signal("USR2");
        let line = failure(&server);
        let expected = "--proxy-auth-file: a restart cannot read stdin or a descriptor (use a file) (exit status: 2); ";
        assert!(line.contains(expected) && !line.contains("secret"), "{line}");
        greet(&server);
    }
}

#[test]
fn second_restart_is_refused_while_one_is_in_progress_and_sigterm_ends_it() {
    let dir = temp_dir();
    let program = dir.path().join("s5");
    symlink(s5().get_program(), &program).expect("link created");
    let mut server = Server::start_with(Command::new(&program).args(["serve", "--listen", "127.0.0.1:0"]), 1);
    write_script(&program, "#!/bin/sh\necho started $$ >&2\nexec sleep 60\n");
    server.signal("USR2");
    let log = server.wait_log(|log| log.contains("started "));
    let pid = log.split_once("started ").and_then(|(_, rest)| rest.lines().next()?.parse().ok());
    let pid = pid.and_then(Pid::from_raw).expect("a process id");
    server.signal("USR2");
    server.wait_log(|log| log.contains("restart: refused, because a restart is in progress"));
    server.signal("TERM");
    assert!(server.wait(TIMEOUT).success());
    wait_until("the new process is killed", TIMEOUT, || test_kill_process(pid).is_err());
}

#[test]
fn associations_on_a_shared_port_work_in_both_processes_after_a_restart() {
    enter_namespace!("", "");
    let echo = udp_echo_server(V4);
    let server = Server::start(&["--udp-ports", "5000", "--drain-timeout", "60"]);
    let old = [(); 5].map(|()| Association::new(&server));
    old.iter().for_each(|association| association.ping(echo, b"before"));
    let in_handshake = greet(&server);
    let _successor = Successor::of(&server);
    let late = Association::with_control(in_handshake, addr("0.0.0.0:0"), socket(V4));
    late.ping(echo, b"after");
    // The sockets for new ports are connected to port 0.
    let udp = || fs::read_to_string("/proc/thread-self/net/udp").expect("readable");
    wait_until("the old process leaves new ports", TIMEOUT, || !udp().contains(":1388 0100007F:0000 "));
    let new = [(); 20].map(|()| Association::new(&server));
    new.iter().chain(&old).for_each(|association| association.ping(echo, b"after"));
}

#[test]
fn restart_needs_no_device_and_names_proc_if_it_is_missing() {
    enter_namespace!("", "");
    let server = Server::start(&["--threads", "1"]);
    // The server has no capabilities, so it cannot open a file with this mode.
    let script = "touch $0 && chmod 0 $0 && mount --bind $0 /dev/null";
    let file = temp_dir();
    let mount = |script: &str| {
        let status = Command::new("sh").args(["-c", script]).arg(file.path().join("null")).status();
        assert!(status.expect("sh runs").success());
    };
    mount(script);
    let successor = Successor::of(&server);
    wait_end(&server);
    use_once(server.connect(), echo_server()).expect("the new process serves");
    assert!(successor.is_running());
    // Without /proc, the program is not known.
    mount("mount -t tmpfs none /proc");
    let server = Server::start(&["--threads", "1"]);
    server.signal("USR2");
    let expected = "/proc/self/exe: no such file or directory (mount /proc); this process goes on";
    assert_eq!(failure(&server), expected);
}
