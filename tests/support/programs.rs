//! Other programs: run them, keep servers in the background, and check how programs and sessions end.

use std::fs::File;
use std::os::unix::process::CommandExt as _;

use rustix::process::{Pid, Signal, kill_process, kill_process_group, test_kill_process, test_kill_process_group};

use super::*;

/// Time limit of a program that transfers much data, on a loaded machine.
pub const LONG_TIMEOUT: Duration = Duration::from_secs(60);
/// Debian's Python, which has Debian's modules. The first Python in PATH can be another one.
pub const PYTHON: &str = "/usr/bin/python3";

/// Returns true if all these programs are installed.
pub fn has_all(programs: &[&str]) -> bool {
    programs.iter().all(|program| is_installed(program))
}

/// Returns true if Debian's Python has this module. Otherwise records that the calling test is skipped.
pub fn has_python_module(name: &str, package: &str) -> bool {
    if !Path::new(PYTHON).exists() {
        return is_installed(PYTHON);
    }
    let imported = Command::new(PYTHON).args(["-c", &format!("import {name}")]).output().expect("Python runs");
    if !imported.status.success() {
        skip(&format!("{package} is not installed"));
    }
    imported.status.success()
}

/// Runs a program that must succeed, and returns its stdout.
pub fn stdout(command: &mut Command, stdin: &[u8]) -> Vec<u8> {
    let output = run(command, stdin, LONG_TIMEOUT);
    assert!(output.status.success(), "{command:?}: {}: {}", output.status, text(&output.stderr));
    output.stdout
}

/// Runs a program that must succeed and return its stdin.
pub fn assert_echoes(command: &mut Command, data: &[u8]) {
    let echoed = stdout(command, data);
    // assert_eq would print all bytes.
    assert!(echoed == data, "{command:?}: {} bytes, or others than the {} sent", echoed.len(), data.len());
}

/// Checks that s5 failed with this status and one line on stderr that contains all of these words.
pub fn assert_fails_with(output: &Output, status: i32, words: &[&str]) {
    assert_failed(output.status.code(), &text(&output.stderr), status, words);
}

/// Like [`assert_fails_with`], for the end of a [`RunningProgram`](crate::support::scripted::RunningProgram).
pub fn assert_failed(ended: Option<i32>, stderr: &str, status: i32, words: &[&str]) {
    assert_eq!(ended, Some(status), "{words:?}: {stderr}");
    assert!(stderr.starts_with("s5: ") && stderr.lines().count() == 1, "one line: {stderr:?}");
    for word in words {
        assert!(stderr.contains(word), "{word:?} is not in {stderr:?}");
    }
}

/// Waits for the log line of a session that contains all of these words.
pub fn wait_session(server: &Server, words: &[&str]) {
    server.wait_log(|log| session_lines(log).iter().any(|line| words.iter().all(|word| line.contains(word))));
}

/// Writes an executable script. Another process does it: one that a thread of this process starts meanwhile would have
/// the open file too, and then the script cannot run (ETXTBSY).
pub fn write_script(path: &Path, text: &str) {
    let script = "rm -f \"$1\" && printf %s \"$2\" > \"$1\" && chmod 755 \"$1\"";
    let written = Command::new("sh").args(["-c", script, "sh"]).arg(path).arg(text).status();
    assert!(written.expect("sh runs").success());
}

/// A child process with its process group. Drop kills the group.
pub struct ProcessGroup {
    child: Child,
    ended: bool,
}

impl ProcessGroup {
    pub fn start(command: &mut Command) -> Self {
        let spawned = command.process_group(0).spawn();
        Self { child: spawned.unwrap_or_else(|error| panic!("{command:?}: {error}")), ended: false }
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn has_ended(&mut self) -> bool {
        self.ended |= self.child.try_wait().expect("the child can be waited for").is_some();
        self.ended
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        // The group's id is the child's process id, which is not reused until the child has been waited for.
        let group = Pid::from_child(&self.child);
        if !self.ended {
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.child.wait();
        // The others of the group still have their ports. Another process waits for them, which may take its time.
        let deadline = Instant::now() + Duration::from_secs(1);
        while test_kill_process_group(group).is_ok() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A process that is not a child of the test; killed when dropped.
pub struct Successor(pub Pid);

impl Successor {
    /// Sends SIGUSR2 to the server, and waits until the new process accepts connections.
    pub fn of(server: &Server) -> Self {
        server.signal("USR2");
        Self::after_signal(server)
    }

    pub fn after_signal(server: &Server) -> Self {
        let accepts = " accepts connections from now on\n";
        let log = server.wait_log(|log| log.contains(accepts));
        let pid = log.split_once(accepts).and_then(|(before, _)| before.rsplit(' ').next()?.parse().ok());
        Self(pid.and_then(Pid::from_raw).unwrap_or_else(|| panic!("no new process: {log}")))
    }

    pub fn is_running(&self) -> bool {
        test_kill_process(self.0).is_ok()
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::KILL);
    }
}

/// A server that does not accept port 0, with its files in a temporary directory.
pub struct OtherServer {
    _process: ProcessGroup,
    pub dir: TempDir,
    pub addr: SocketAddr,
}

impl OtherServer {
    /// Starts a server that listens at the given address, and waits until it accepts.
    pub fn start(command: impl Fn(&Path, SocketAddr) -> Command) -> Self {
        // Another process may take a port that was free.
        (0..5).find_map(|_| Self::start_on(closed_port(), &command)).expect("the server listens")
    }

    fn start_on(addr: SocketAddr, command: impl Fn(&Path, SocketAddr) -> Command) -> Option<Self> {
        let dir = temp_dir();
        let mut command = command(dir.path(), addr);
        let log = File::create(dir.path().join("log")).expect("file created");
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("cloned")).stderr(log);
        let mut process = ProcessGroup::start(&mut command);
        let mut ended = false;
        wait_until("the server listens", LONG_TIMEOUT, || {
            ended = process.has_ended();
            ended || TcpStream::connect(addr).is_ok()
        });
        let server = Self { _process: process, dir, addr };
        if ended {
            eprintln!("{command:?}:\n{}", server.log());
        }
        (!ended).then_some(server)
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Waits until the log contains `what`.
    pub fn wait_log(&self, what: &str) {
        wait_until(what, LONG_TIMEOUT, || self.log().contains(what));
    }
}

impl Drop for OtherServer {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the log of the server at {}:\n{}", self.addr, self.log());
        }
    }
}

/// Configuration of Dante's server. Each value has further lines of its part of the file.
#[derive(Default)]
pub struct Dante<'a> {
    pub method: &'a str,
    /// The user that Dante runs as. Default: the current one.
    pub user: Option<&'a str>,
    pub global: &'a str,
    pub client_rule: &'a str,
    pub socks_rule: &'a str,
}

impl Dante<'_> {
    /// Adds the arguments of a server at `addr` with this configuration, which is written to `dir`.
    pub fn configure(&self, dir: &Path, addr: SocketAddr, mut command: Command) -> Command {
        let Self { method, user, global, client_rule, socks_rule } = self;
        let current = text(&stdout(Command::new("id").arg("-un"), b""));
        let user = user.unwrap_or(current.trim());
        let config = format!(
            "logoutput: stderr\ninternal: {} port = {}\nexternal: 127.0.0.1\nclientmethod: none\n\
             socksmethod: {method}\nuser.privileged: {user}\nuser.unprivileged: {user}\n{global}\n\
             client pass {{\n  from: 0.0.0.0/0 to: 0.0.0.0/0\n  {client_rule}\n}}\n\
             socks pass {{\n  from: 0.0.0.0/0 to: 0.0.0.0/0\n  {socks_rule}\n}}\n",
            addr.ip(),
            addr.port(),
        );
        let (config, pid_file) = (write_file(dir, "dante.conf", &config), write_file(dir, "pid", ""));
        command.args(["-N", "1", "-f", &config, "-p", &pid_file]).env("TMPDIR", dir);
        command
    }
}
