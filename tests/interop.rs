//! Real programs as peers, on loopback: what people use with `s5 serve`, and servers of others for our clients.
//!
//! Only programs as Debian packages them; a test whose program is missing is skipped, or fails when S5_TEST_STRICT=1.

mod common;
mod kit;
#[path = "common/scripted.rs"]
mod scripted;

#[path = "interop/curl.rs"]
mod curl;
#[path = "interop/dante.rs"]
mod dante;
#[path = "interop/netcat.rs"]
mod netcat;
#[path = "interop/pysocks.rs"]
mod pysocks;
#[path = "interop/ssh.rs"]
mod ssh;
#[path = "interop/uses.rs"]
mod uses;

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Output};
use std::time::Duration;

use common::{Server, is_installed, run, s5, write_file};
use rustix::process::{Pid, Signal, kill_process_group};

/// How long a program may take that does something of size, on a loaded machine.
const LONG: Duration = Duration::from_secs(60);

/// A child and its process group; killed when dropped.
struct Process {
    child: Child,
    ended: bool,
}

impl Process {
    fn start(command: &mut Command) -> Self {
        let spawned = command.process_group(0).spawn();
        Self { child: spawned.unwrap_or_else(|error| panic!("{command:?}: {error}")), ended: false }
    }

    fn has_ended(&mut self) -> bool {
        self.ended |= self.child.try_wait().expect("the child can be waited for").is_some();
        self.ended
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The group has the number of its first process, which is nobody else's until that has been waited for.
        if !self.ended {
            let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

/// Whether all these programs are there.
fn have(programs: &[&str]) -> bool {
    programs.iter().all(|program| is_installed(program))
}

/// Octets of all values, in an order that repeats late.
fn octets(n: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    // A prime, so that a buffer which is sent twice or left out does not go unnoticed.
    let block: Vec<u8> = (0..65_521).map(|_| next()).collect();
    block.into_iter().cycle().take(n).collect()
}

/// What a program wrote, when it ended well.
fn stdout(command: &mut Command, stdin: &[u8]) -> Vec<u8> {
    let output = run(command, stdin, LONG);
    assert!(output.status.success(), "{command:?}: {}: {}", output.status, text(&output.stderr));
    output.stdout
}

/// The exit status of a program.
fn code(output: &Output) -> i32 {
    output.status.code().expect("it was not killed")
}

fn text(octets: &[u8]) -> String {
    String::from_utf8_lossy(octets).into_owned()
}

/// Compares without a dump of both, which would fill the screen.
fn assert_same(left: &[u8], right: &[u8]) {
    assert_eq!(left.len(), right.len(), "as many octets");
    assert!(left == right, "the same octets");
}

/// Waits until the server has logged a session with all of these values.
fn session(server: &Server, values: &[&str]) {
    server.wait_log(|log| {
        let mut sessions = log.lines().filter(|line| line.contains("session client="));
        sessions.any(|line| values.iter().all(|value| line.contains(&format!(" {value} "))))
    });
}

/// Adds anna with `open sesame` to a users file, as its owner does.
fn add_anna(folder: &Path) -> String {
    let path = folder.join("users").display().to_string();
    stdout(s5().args(["serve", "--users", &path, "--add-user", "anna"]), b"open sesame\n");
    path
}

/// A users file as `htpasswd -B` writes it, of berta with `swordfish`.
fn htpasswd_berta(folder: &Path) -> String {
    let made = stdout(Command::new("htpasswd").args(["-nbB", "berta", "swordfish"]), b"");
    write_file(folder, "users", &text(&made))
}
