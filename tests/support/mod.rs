//! Helpers of the tests: `s5 serve` as a child process, target servers, waits with a timeout, skipped tests.
//! `connections` is part of this module; the others are for some tests only.

#![allow(dead_code, unused_imports, reason = "each test binary uses its own part")]

pub mod bytes;
mod connections;
pub mod dns;
mod load;
pub mod login;
pub mod programs;
pub mod realm;
pub mod scripted;
pub mod transcript;

// All that most tests need, so that they import it with one line.
pub use socket2::SockRef;
pub use std::collections::{BTreeMap, BTreeSet, HashMap};
pub use std::fmt::Write as _;
pub use std::io::{self, BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
pub use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
pub use std::os::fd::{AsRawFd as _, OwnedFd};
pub use std::os::unix::fs::{PermissionsExt as _, symlink};
pub use std::os::unix::net::{UnixListener, UnixStream};
pub use std::path::{Path, PathBuf};
use std::process::ExitStatus;
pub use std::process::{Child, Command, Output, Stdio};
pub use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
pub use std::sync::mpsc::channel;
pub use std::sync::{Arc, Mutex, OnceLock, mpsc};
pub use std::time::{Duration, Instant};
pub use std::{fs, thread};
pub use tempfile::TempDir;

pub use connections::*;
pub use load::*;
pub use login::*;
pub use programs::*;
pub use scripted::*;

/// Time limit for operations that should complete immediately.
pub const TIMEOUT: Duration = Duration::from_secs(10);

/// Environment variables that s5 reads. [`s5`] removes them; tests may set them.
const CLIENT_VARIABLES: [&str; 25] = [
    "S5_USER",
    "S5_PASSWORD",
    "S5_PROXY",
    "all_proxy",
    "ALL_PROXY",
    "SOCKS5_SERVER",
    "SOCKS_SERVER",
    "https_proxy",
    "HTTPS_PROXY",
    "http_proxy",
    "HTTP_PROXY",
    "no_proxy",
    "NO_PROXY",
    "S5_PROXY_AUTH",
    "NCAT_PROXY_AUTH",
    "SOCKS5_USER",
    "SOCKS5_PASSWORD",
    "SOCKS5_PASSWD",
    "SOCKS_USERNAME",
    "SOCKS_PASSWORD",
    "SSH_ASKPASS",
    "SSH_ASKPASS_REQUIRE",
    "DISPLAY",
    "WAYLAND_DISPLAY",
    "CI",
];

/// The built program, in an environment without [`CLIENT_VARIABLES`].
pub fn s5() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_s5"));
    for variable in CLIENT_VARIABLES {
        command.env_remove(variable);
    }
    command
}

/// `s5 serve` as a child process; killed when dropped.
pub struct Server {
    program: RunningProgram,
    /// The TCP addresses that the server listens on, in the order of its log.
    pub addrs: Vec<SocketAddr>,
}

impl Server {
    /// Starts `s5 serve --listen 127.0.0.1:0` with additional arguments.
    pub fn start(args: &[&str]) -> Self {
        let all: Vec<&str> = ["--listen", "127.0.0.1:0"].iter().chain(args).copied().collect();
        Self::start_with(s5().arg("serve").args(all), 1)
    }

    /// Starts a command that runs `s5 serve`, and waits until it listens on `count` addresses.
    pub fn start_with(command: &mut Command, count: usize) -> Self {
        let mut program = RunningProgram::start(command);
        program.close_stdin();
        let mut server = Self { program, addrs: Vec::new() };
        let text = server.wait_log(|log| log.matches("listening on ").count() >= count);
        let listening = text.lines().filter_map(|line| line.split_once("listening on "));
        server.addrs =
            listening.filter_map(|(_, addr)| addr.trim_end_matches('}').trim_end_matches('"').parse().ok()).collect();
        server
    }

    /// The first address that the server listens on.
    pub fn addr(&self) -> SocketAddr {
        *self.addrs.first().expect("the server listens on TCP")
    }

    /// Connects to the server. The connection has a read timeout.
    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.addr()).expect("the server accepts");
        stream.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
        stream
    }

    pub fn pid(&self) -> u32 {
        self.program.pid()
    }

    /// The log so far.
    pub fn log(&self) -> String {
        complete_lines(&self.program.stderr_so_far()).into()
    }

    /// Waits until the log satisfies `done`, and returns the log.
    pub fn wait_log(&self, done: impl Fn(&str) -> bool) -> String {
        complete_lines(&self.program.stderr(|log| done(complete_lines(log)))).into()
    }

    /// Number of open descriptors of the server.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("the server runs").count()
    }

    /// CPU time that the server has used, in seconds.
    pub fn cpu_seconds(&self) -> f64 {
        cpu_seconds(self.pid())
    }

    pub fn signal(&self, signal: &str) {
        let pid = self.pid().to_string();
        assert!(Command::new("kill").args(["-s", signal, &pid]).status().expect("kill runs").success());
    }

    /// Sends SIGHUP and returns the log line of the reload.
    pub fn reload(&self) -> String {
        let reloads = |log: &str| log.matches("] reload: ").count();
        let before = reloads(&self.log());
        self.signal("HUP");
        let log = self.wait_log(|log| reloads(log) > before);
        log.lines().rfind(|line| line.contains("] reload: ")).expect("a log line of the reload").to_owned()
    }

    /// Waits until the server exits.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        self.program.wait_exit(limit).0
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the server's log:\n{}", self.log());
        }
    }
}

/// CPU time that a process has used, in seconds.
pub fn cpu_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process runs");
    let fields: Vec<&str> =
        stat.rsplit_once(')').expect("a process name in parentheses").1.split_whitespace().collect();
    // utime and stime, fields 14 and 15 of proc(5), in ticks of 10 ms.
    [11, 12].iter().map(|i| fields[*i].parse::<f64>().expect("ticks")).sum::<f64>() / 100.0
}

/// Text without its last line if that has no end yet.
fn complete_lines(text: &str) -> &str {
    text.rfind('\n').map_or("", |end| &text[..=end])
}

/// Waits until `condition` is true, checking every 5 ms. Panics after `limit`.
pub fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Runs all jobs on 8 threads. With more threads, a slow machine could miss timeouts.
pub fn run_all<J: Send>(jobs: Vec<J>, run: impl Fn(J) + Sync) {
    let jobs = Mutex::new(jobs.into_iter());
    let next = || jobs.lock().expect("not poisoned").next();
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| std::iter::from_fn(next).for_each(&run));
        }
    });
}

/// A TCP server that runs `serve` on a thread for each connection.
pub fn tcp_server(ip: IpAddr, serve: impl Fn(TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind((ip, 0)).expect("free port");
    let addr = listener.local_addr().expect("local address");
    let serve = Arc::new(serve);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let serve = serve.clone();
            thread::spawn(move || serve(stream));
        }
    });
    addr
}

/// Starts a TCP echo server on 127.0.0.1.
pub fn echo_server() -> SocketAddr {
    echo_server_at(Ipv4Addr::LOCALHOST.into())
}

/// Starts a TCP echo server, which half-closes after the client has.
pub fn echo_server_at(ip: IpAddr) -> SocketAddr {
    tcp_server(ip, |mut stream| {
        let mut other = stream.try_clone().expect("cloned");
        let _ = io::copy(&mut stream, &mut other);
        let _ = other.shutdown(Shutdown::Write);
    })
}

/// Starts a UDP echo server.
pub fn udp_echo_server(ip: IpAddr) -> SocketAddr {
    udp_echo(UdpSocket::bind((ip, 0)).expect("free port"))
}

/// Sends each datagram back, on a new thread. Returns the address of the socket.
pub fn udp_echo(socket: UdpSocket) -> SocketAddr {
    let addr = socket.local_addr().expect("local address");
    socket.set_read_timeout(None).expect("timeout removed");
    thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        while let Ok((n, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..n], from);
        }
    });
    addr
}

/// UDP sockets with the same port at several addresses. For tests in a namespace, where all ports are free.
pub fn udp_sockets<const N: usize>(ips: [IpAddr; N]) -> ([UdpSocket; N], u16) {
    let mut port = 0;
    let sockets = ips.map(|ip| {
        let socket = UdpSocket::bind((ip, port)).expect("free port");
        socket.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
        port = socket.local_addr().expect("local address").port();
        socket
    });
    (sockets, port)
}

/// Returns true if a datagram arrives within 20 ms. Drops it.
pub fn arrives(socket: &UdpSocket) -> bool {
    let before = socket.read_timeout().expect("timeout read");
    socket.set_read_timeout(Some(Duration::from_millis(20))).expect("timeout set");
    let arrives = retry(|| socket.recv(&mut [0; 64])).is_ok();
    socket.set_read_timeout(before).expect("timeout set");
    arrives
}

/// A port on 127.0.0.1 without a listener.
pub fn closed_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("free port")
}

/// Repeats a call that a signal interrupted. A socket with a timeout returns EINTR even if only this process was
/// stopped and continued (signal(7)); `read_exact` and the like repeat the call themselves.
pub fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Reads exactly `n` bytes.
pub fn read_exact(stream: &mut TcpStream, n: usize) -> Vec<u8> {
    let mut bytes = vec![0; n];
    stream.read_exact(&mut bytes).expect("all bytes received");
    bytes
}

/// A request with an IPv4 or IPv6 address in it.
pub fn request(command: u8, dst: SocketAddr) -> Vec<u8> {
    message_with_addr([5, command, 0], dst)
}

/// A request or a reply: three bytes and an address.
pub fn message_with_addr(head: [u8; 3], addr: SocketAddr) -> Vec<u8> {
    let mut bytes = head.to_vec();
    match addr.ip() {
        IpAddr::V4(ip) => {
            bytes.push(1);
            bytes.extend(ip.octets());
        }
        IpAddr::V6(ip) => {
            bytes.push(4);
            bytes.extend(ip.octets());
        }
    }
    bytes.extend(addr.port().to_be_bytes());
    bytes
}

/// Reads a reply: REP and BND.
pub fn read_reply(stream: &mut TcpStream) -> (u8, SocketAddr) {
    let head = read_exact(stream, 4);
    assert_eq!((head[0], head[2]), (5, 0), "VER and RSV of a reply");
    let ip: IpAddr = match head[3] {
        1 => <[u8; 4]>::try_from(read_exact(stream, 4)).expect("4 bytes").into(),
        4 => <[u8; 16]>::try_from(read_exact(stream, 16)).expect("16 bytes").into(),
        other => panic!("ATYP {other} in a reply"),
    };
    let port = u16::from_be_bytes(read_exact(stream, 2).try_into().expect("2 bytes"));
    (head[1], SocketAddr::new(ip, port))
}

/// Connects, offers no authentication and sends a request. Returns the connection, REP and BND.
pub fn open(server: &Server, command: u8, dst: SocketAddr) -> (TcpStream, u8, SocketAddr) {
    let mut stream = server.connect();
    stream.write_all(&[5, 1, 0]).expect("greeting sent");
    assert_eq!(read_exact(&mut stream, 2), [5, 0]);
    stream.write_all(&request(command, dst)).expect("request sent");
    let (rep, bnd) = read_reply(&mut stream);
    (stream, rep, bnd)
}

/// Returns true if a program is installed. Otherwise records that the calling test is skipped, see [`skip`]. With
/// S5_TEST_PROGRAMS=none every program counts as missing.
pub fn is_installed(program: &str) -> bool {
    if std::env::var_os("S5_TEST_PROGRAMS").is_some_and(|programs| programs == "none") {
        skip(&format!("{program} is not to be used"));
        return false;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut dirs: Vec<PathBuf> = std::env::split_paths(&path).collect();
    dirs.extend(["/usr/sbin", "/sbin"].map(PathBuf::from));
    if dirs.iter().any(|dir| dir.join(program).is_file()) {
        return true;
    }
    skip(&format!("{program} is not installed"));
    false
}

/// Fails if S5_TEST_STRICT=1, and otherwise records that the calling test is skipped; tests/zz_skipped.rs reports it.
pub fn skip(why: &str) {
    assert!(!is_strict(), "{why}");
    record_skip(why);
}

/// Returns true if each test must run, because `make test` has installed the programs.
pub fn is_strict() -> bool {
    std::env::var_os("S5_TEST_STRICT").is_some_and(|strict| strict == "1")
}

/// Records that the calling test is skipped, also if S5_TEST_STRICT=1: for what `make test` cannot provide.
pub fn record_skip(why: &str) {
    let test = thread::current().name().unwrap_or_default().to_owned();
    let crate_name = std::env::current_exe().ok().and_then(|path| Some(path.file_stem()?.to_str()?.to_owned()));
    let line = format!("{}::{test}: {why}\n", crate_name.unwrap_or_default());
    let file = fs::OpenOptions::new().create(true).append(true).open(skipped_tests_file());
    file.and_then(|mut file| file.write_all(line.as_bytes())).expect("the skipped test is recorded");
}

/// The file that records the skipped tests of this run of `cargo test`, which is the parent of all test processes.
pub fn skipped_tests_file() -> PathBuf {
    let run = std::env::var("S5_TEST_RUN").unwrap_or_else(|_| std::os::unix::process::parent_id().to_string());
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("skipped-{run}"))
}

/// Runs the rest of the calling test in a new network namespace without routes, with these files as /etc/hosts and
/// /etc/resolv.conf.
#[allow(unused_macros, reason = "as above")]
macro_rules! enter_namespace {
    ($hosts:expr, $resolv:expr) => {
        fn here() {}
        if !$crate::support::in_namespace($crate::support::test_name(here), $hosts, $resolv) {
            return;
        }
    };
}
pub(crate) use enter_namespace;

/// Returns the name of the test that a function is nested in.
pub fn test_name(nested: impl Fn()) -> &'static str {
    let path = std::any::type_name_of_val(&nested).trim_end_matches("::here");
    path.split_once("::").expect("the name of the crate").1
}

/// Runs the calling test again in a new network namespace without routes, with these files as /etc/hosts and
/// /etc/resolv.conf. Returns true inside; outside, false once the inner run has passed.
pub fn in_namespace(test: &str, hosts: &str, resolv: &str) -> bool {
    if std::env::var_os("S5_TEST_NAMESPACE").is_some() {
        return true;
    }
    if !is_installed("unshare") || !is_installed("ip") {
        return false;
    }
    let dir = tempfile::tempdir().expect("temporary directory");
    let file = |name: &str, text: &str| -> PathBuf {
        let path = dir.path().join(name);
        fs::write(&path, text).expect("file written");
        path
    };
    let (hosts, resolv) = (file("hosts", hosts), file("resolv.conf", resolv));
    // Independent of the machine's nsswitch.conf.
    let nsswitch = file("nsswitch.conf", "hosts: files dns\n");
    let script = "ip link set lo up && mount --bind \"$1\" /etc/hosts && mount --bind \"$2\" /etc/resolv.conf \
                  && mount --bind \"$3\" /etc/nsswitch.conf && shift 3 && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "--net", "--", "sh", "-c", script, "sh"]);
    command
        .args([hosts.as_path(), resolv.as_path(), nsswitch.as_path()])
        .arg(std::env::current_exe().expect("path of this test"));
    command.args(["--exact", test, "--nocapture", "--include-ignored"]).env("S5_TEST_NAMESPACE", "1");
    command.env("S5_TEST_RUN", std::os::unix::process::parent_id().to_string());
    let output = run(&mut command, b"", Duration::from_secs(280));
    let output_text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && output_text.contains("1 passed"), "inside the namespace:\n{output_text}");
    false
}

/// Creates a temporary directory, which is deleted when dropped.
pub fn temp_dir() -> TempDir {
    tempfile::tempdir().expect("temporary directory")
}

/// Writes a file and returns its path.
pub fn write_file(dir: &Path, name: &str, text: &str) -> String {
    let path = dir.join(name);
    fs::write(&path, text).expect("file written");
    path.to_str().expect("UTF-8 path").to_owned()
}
