//! Reports to the service manager: NOTIFY_SOCKET and the watchdog.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{self as unix, UnixDatagram};

use crate::*;

/// The service manager's side.
struct Manager {
    socket: UnixDatagram,
    name: String,
    _dir: TempDir,
}

impl Manager {
    /// `prefix` is "@" for an abstract socket.
    fn new(prefix: &str) -> Self {
        let dir = temp_dir();
        let path = dir.path().join("notify").display().to_string();
        let addr = match prefix {
            "@" => unix::SocketAddr::from_abstract_name(&path),
            _ => unix::SocketAddr::from_pathname(&path),
        };
        let socket = UnixDatagram::bind_addr(&addr.expect("a name")).expect("bound");
        socket.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
        // For servers of other users.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("permissions set");
        if prefix.is_empty() {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).expect("permissions set");
        }
        Self { socket, name: format!("{prefix}{path}"), _dir: dir }
    }

    fn serve(&self, args: &[&str], variables: &[(&str, &str)]) -> Server {
        let mut command = s5();
        command.args(["serve", "--listen", "127.0.0.1:0"]).args(args).env("NOTIFY_SOCKET", &self.name);
        Server::start_with(command.envs(variables.iter().copied()), 1)
    }

    /// Returns the next report.
    fn next(&self) -> String {
        let mut buffer = [0; 4096];
        let n = retry(|| self.socket.recv(&mut buffer)).expect("a report");
        String::from_utf8(buffer[..n].to_vec()).expect("UTF-8")
    }

    /// Waits for a report that contains `word`.
    fn wait(&self, word: &str) -> String {
        let deadline = Instant::now() + TIMEOUT;
        let reports = std::iter::repeat_with(|| self.next()).take_while(|_| Instant::now() < deadline);
        reports.into_iter().find(|report| report.contains(word)).expect("the report")
    }

    fn has_report(&self) -> bool {
        self.socket.set_nonblocking(true).expect("flag set");
        let received = self.socket.recv(&mut [0; 4096]).is_ok();
        self.socket.set_nonblocking(false).expect("flag set");
        received
    }
}

#[test]
fn start_reload_and_shutdown_are_reported_from_the_sandbox() {
    let is_root = rustix::process::geteuid().is_root();
    for (prefix, args) in [("", &[][..]), ("@", &[]), ("@", &["--run-as", "nobody"])] {
        if !args.is_empty() && !is_root {
            continue;
        }
        let manager = Manager::new(prefix);
        let mut server = manager.serve(args, &[]);
        assert_eq!(manager.next(), "READY=1\nSTATUS=serving: 0 sessions open, 0 since the start");
        let before = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic).tv_sec;
        server.reload();
        let reloading = manager.next();
        let time = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").and_then(|time| time.parse::<i64>().ok());
        assert!(time.is_some_and(|time| (before..before + 20).contains(&(time / 1_000_000))), "{reloading}");
        assert!(manager.next().starts_with("READY=1\n"));
        server.signal("TERM");
        let stopping = manager.next();
        assert!(stopping.starts_with("STOPPING=1\nEXTEND_TIMEOUT_USEC=15000000\nSTATUS=draining: "), "{stopping}");
        assert!(server.wait(TIMEOUT).success());
        assert!(!server.log().contains("NOTIFY_SOCKET"), "{}", server.log());
    }
}

#[test]
fn status_has_the_number_of_sessions_and_is_reported_only_after_a_change() {
    let manager = Manager::new("");
    let server = manager.serve(&[], &[]);
    assert!(manager.next().starts_with("READY=1\n"));
    let first = tunnel(&server);
    // The first change is reported at once.
    assert_eq!(manager.next(), "STATUS=serving: 1 sessions open, 1 since the start");
    let others = [(); 2].map(|()| tunnel(&server));
    assert!(!manager.has_report(), "at most one report in 5 s");
    server.reload();
    assert!(manager.next().starts_with("RELOADING=1\n"));
    assert_eq!(manager.next(), "READY=1\nSTATUS=serving: 3 sessions open, 3 since the start");
    drop((first, others));
}

#[test]
fn watchdog_is_fed_until_a_worker_is_stuck() {
    if !is_installed("strace") {
        return;
    }
    let manager = Manager::new("");
    let server = manager.serve(&["--threads", "2"], &[("WATCHDOG_USEC", "200000")]);
    manager.wait("WATCHDOG=1");
    manager.wait("WATCHDOG=1");
    let _strace = stop_worker(&server);
    let mut last = Instant::now();
    wait_until("the watchdog is not fed", TIMEOUT, || {
        if manager.has_report() {
            last = Instant::now();
        }
        last.elapsed() > Duration::from_secs(1)
    });
}

/// Makes one event loop wait in the kernel, until the returned program ends.
pub fn stop_worker(server: &Server) -> RunningProgram {
    let tasks = fs::read_dir(format!("/proc/{}/task", server.pid())).expect("the server runs").flatten();
    let is_worker =
        |task: &fs::DirEntry| fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name == "s5-worker\n");
    let worker = tasks.into_iter().find(is_worker).expect("a worker").file_name();
    let mut strace = Command::new("strace");
    strace
        .args(["-e", "trace=epoll_wait,epoll_pwait,epoll_pwait2", "-e", "inject=all:delay_exit=60s", "-p"])
        .arg(worker);
    RunningProgram::start(&mut strace)
}

#[test]
fn watchdog_of_a_microsecond_is_fed_at_most_ten_times_a_second() {
    let manager = Manager::new("");
    let start = Instant::now();
    let _server = manager.serve(&[], &[("WATCHDOG_USEC", "1")]);
    (0..5).for_each(|_| drop(manager.wait("WATCHDOG=1")));
    assert!(start.elapsed() >= Duration::from_millis(500), "{:?}", start.elapsed());
}

#[test]
fn new_process_of_a_restart_feeds_the_watchdog() {
    let manager = Manager::new("");
    let mut command = Command::new("sh");
    command.args(["-c", "WATCHDOG_PID=$$ exec \"$0\" serve --listen 127.0.0.1:0"]).arg(s5().get_program());
    command.env("NOTIFY_SOCKET", &manager.name).env("WATCHDOG_USEC", "200000");
    let server = Server::start_with(&mut command, 1);
    manager.wait("WATCHDOG=1");
    let _successor = Successor::of(&server);
    manager.wait("READY=1");
    manager.wait("WATCHDOG=1");
}

#[test]
fn idle_server_without_a_watchdog_never_wakes_up() {
    let manager = Manager::new("");
    // The watchdog is for another process.
    let server = manager.serve(&[], &[("WATCHDOG_USEC", "100000"), ("WATCHDOG_PID", "1")]);
    let switches = || -> u64 {
        let tasks = fs::read_dir(format!("/proc/{}/task", server.pid())).expect("the server runs").flatten();
        let statuses = tasks.filter_map(|task| fs::read_to_string(task.path().join("status")).ok());
        let counts = statuses.filter_map(|status| {
            let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:").map(str::to_owned));
            line.and_then(|count| count.trim().parse::<u64>().ok())
        });
        counts.sum()
    };
    // The threads of the start may still end.
    let mut before = switches();
    let mut since = Instant::now();
    wait_until("no thread wakes up for a second", TIMEOUT, || {
        let now = switches();
        if std::mem::replace(&mut before, now) != now {
            since = Instant::now();
        }
        since.elapsed() > Duration::from_secs(1)
    });
    assert!(manager.next().starts_with("READY=1\n") && !manager.has_report());
}

#[test]
fn service_manager_that_does_not_read_delays_signals_by_one_second_at_most() {
    let manager = Manager::new("");
    let mut server = manager.serve(&[], &[]);
    let sender = UnixDatagram::unbound().expect("a socket");
    sender.set_nonblocking(true).expect("flag set");
    while sender.send_to(b"filler", &manager.name).is_ok() {}
    let start = Instant::now();
    (0..4).for_each(|_| drop(server.reload()));
    server.signal("TERM");
    assert_eq!(server.wait(TIMEOUT).code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
}

#[test]
fn notify_socket_that_is_gone_and_wrong_variables_are_one_warning() {
    let long = "/x".repeat(60);
    let table = [
        (
            "/nonexistent/notify",
            "",
            "NOTIFY_SOCKET /nonexistent/notify: no such file or directory (the service manager gets no reports)",
        ),
        ("vsock:2:1", "", "NOTIFY_SOCKET vsock:2:1: expected a path or an abstract name (@NAME)"),
        (&long, "", "/x: path must be shorter than 108 bytes (the service manager gets no reports)"),
        ("", "1s", "WATCHDOG_USEC: expected a number, found \"1s\" (the watchdog is not used)"),
    ];
    for (socket, watchdog, expected) in table {
        let mut command = s5();
        command.args(["serve", "--listen", "127.0.0.1:0"]);
        for (name, value) in [("NOTIFY_SOCKET", socket), ("WATCHDOG_USEC", watchdog)] {
            if !value.is_empty() {
                command.env(name, value);
            }
        }
        let server = Server::start_with(&mut command, 1);
        assert_eq!(server.log().matches(expected).count(), 1, "{}", server.log());
        greet(&server);
    }
    let manager = Manager::new("");
    let server = manager.serve(&[], &[("WATCHDOG_USEC", "100000")]);
    manager.wait("WATCHDOG=1");
    drop(manager);
    server.wait_log(|log| log.contains("NOTIFY_SOCKET /") && log.contains("/notify: connection refused (the"));
    server.reload();
    assert_eq!(server.log().matches("NOTIFY_SOCKET").count(), 1, "{}", server.log());
    greet(&server);
}
