//! Other programs on loopback: clients of `s5 serve`, and servers for the clients of s5.
//!
//! The programs are those of Debian. A test whose program is missing is skipped, or fails if S5_TEST_STRICT=1.

mod curl;
mod dante;
mod netcat;
mod pysocks;
mod readme;
mod scenarios;
mod ssh;
#[path = "../support/mod.rs"]
mod support;

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Output};
use std::time::Duration;

use crate::support::{Server, is_installed, run, s5, write_file};
use rustix::process::{Pid, Signal, kill_process_group};

/// Time limit for a program that transfers much data on a busy machine.
const LONG_TIMEOUT: Duration = Duration::from_secs(60);

/// A child process with its process group. Drop kills the group.
struct ProcessGroup {
    child: Child,
    ended: bool,
}

impl ProcessGroup {
    fn start(command: &mut Command) -> Self {
        let spawned = command.process_group(0).spawn();
        Self { child: spawned.unwrap_or_else(|error| panic!("{command:?}: {error}")), ended: false }
    }

    fn has_ended(&mut self) -> bool {
        self.ended |= self.child.try_wait().expect("the child can be waited for").is_some();
        self.ended
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        // The group's id is the child's process id, which is not reused until the child has been waited for.
        if !self.ended {
            let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

/// Returns true if all these programs are installed.
fn has_all(programs: &[&str]) -> bool {
    programs.iter().all(|program| is_installed(program))
}

/// Returns `n` pseudo-random bytes.
fn bytes(n: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    // The bytes repeat after a prime period, so that a lost or duplicate buffer is detected.
    let block: Vec<u8> = (0..65_521).map(|_| next()).collect();
    block.into_iter().cycle().take(n).collect()
}

/// Runs a program and returns its stdout. Fails unless it exits with 0.
fn stdout(command: &mut Command, stdin: &[u8]) -> Vec<u8> {
    let output = run(command, stdin, LONG_TIMEOUT);
    assert!(output.status.success(), "{command:?}: {}: {}", output.status, text(&output.stderr));
    output.stdout
}

fn exit_code(output: &Output) -> i32 {
    output.status.code().expect("a signal did not kill it")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Like `assert_eq`, without printing the data.
fn assert_same(left: &[u8], right: &[u8]) {
    assert_eq!(left.len(), right.len(), "lengths differ");
    assert!(left == right, "bytes differ");
}

/// Waits until the server has logged a session with all these `key=value` pairs.
fn wait_for_session(server: &Server, values: &[&str]) {
    server.wait_log(|log| {
        let mut sessions = log.lines().filter(|line| line.contains("session client="));
        sessions.any(|line| values.iter().all(|value| line.contains(&format!(" {value} "))))
    });
}

/// Adds the user anna with the password `open sesame` to a users file with --add-user. Returns its path.
fn add_anna(dir: &Path) -> String {
    let path = dir.join("users").display().to_string();
    stdout(s5().args(["serve", "--users", &path, "--add-user", "anna"]), b"open sesame\n");
    path
}

/// Writes a users file with the user berta and the password `swordfish` with `htpasswd -B`. Returns its path.
fn htpasswd_berta(dir: &Path) -> String {
    let line = stdout(Command::new("htpasswd").args(["-nbB", "berta", "swordfish"]), b"");
    write_file(dir, "users", &text(&line))
}
