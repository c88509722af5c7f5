//! Other programs on loopback: clients of `s5 serve`, and servers for the clients of s5.
//!
//! The programs are those of Debian. A test whose program is missing is skipped, or fails if S5_TEST_STRICT=1.

#![allow(unused_qualifications, reason = "the names of std that support exports may be written with their path")]

mod curl;
mod dante;
mod haproxy;
mod netcat;
mod pysocks;
mod readme;
mod scenarios;
mod ssh;
#[path = "../support/mod.rs"]
mod support;

use support::*;

/// Starts `s5 serve` for a test with these programs. Returns `None` if one of them is not installed.
fn serve_for(programs: &[&str]) -> Option<Server> {
    has_all(programs).then(|| Server::start(&[]))
}

fn exit_code(output: &Output) -> i32 {
    output.status.code().expect("a signal did not kill it")
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
