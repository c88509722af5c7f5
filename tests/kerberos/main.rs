//! GSSAPI (RFC 1961) with Kerberos, end to end: a temporary realm, the programs of s5, and independent peers.
//!
//! Tests whose programs are not installed are skipped, or fail if S5_TEST_STRICT=1. tests/wire/protected.rs tests the
//! framing with a simulated security context.

mod capture;
mod chains;
mod client_handshake;
mod curl;
mod dante;
mod datagrams;
mod errors;
mod gssapi_ffi;
mod library;
mod options;
mod page;
mod peer;
mod raw_datagrams;
mod raw_streams;
mod required_protection;
mod rules;
mod server_handshake;
mod streams;
#[path = "../support/mod.rs"]
mod support;

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use crate::support::realm::{self, Realm};
use crate::support::scripted::text;
use crate::support::{Server, run, s5, session_lines};

/// Time limit of a program that transfers much data, on a loaded machine.
const LONG_TIMEOUT: Duration = Duration::from_secs(60);
const ALICE: &str = "alice@S5.TEST";
const LEVELS: [&str; 3] = ["none", "integrity", "confidentiality"];

/// Starts a realm. Returns `None` if its programs are not installed.
fn realm() -> Option<Realm> {
    realm::can_start().then(Realm::start)
}

/// Starts a server in the realm.
fn start(realm: &Realm, args: &[&str]) -> Server {
    Server::start_with(realm.env(s5().args(["serve", "--listen", "127.0.0.1:0"]).args(args)), 1)
}

/// Starts a server in the realm that accepts GSSAPI and has the keys of both services.
fn serve(realm: &Realm, args: &[&str]) -> Server {
    start(realm, &[&["--keytab", &path(&realm.file("service.keytab"))], args].concat())
}

/// Like [`serve`], but permits only sessions of alice at this level.
fn serve_at(realm: &Realm, level: &str) -> Server {
    let rule = format!("user={ALICE} method=gssapi protection={level}");
    serve(realm, &["--gssapi-protection", level, "--allow", &rule, "--deny", ""])
}

/// Returns the server's URL for `-x`, with the host name that is in its principal.
fn url(server: &Server) -> String {
    format!("localhost:{}", server.addr().port())
}

/// Returns a client command in the realm that offers only GSSAPI.
fn client(realm: &Realm, mode: &str, proxy: &str, args: &[&str]) -> Command {
    let mut command = s5();
    realm.env(command.args([mode, "-x", proxy, "--auth", "gssapi"]).args(args));
    command
}

/// Like [`client`], but requests this level.
fn client_at(realm: &Realm, mode: &str, proxy: &str, level: &str, args: &[&str]) -> Command {
    client(realm, mode, proxy, &[&["--gssapi-protection", level], args].concat())
}

/// Runs a program that must succeed, and returns its stdout.
fn stdout(command: &mut Command, stdin: &[u8]) -> Vec<u8> {
    let output = run(command, stdin, LONG_TIMEOUT);
    assert!(output.status.success(), "{command:?}: {}: {}", output.status, text(&output.stderr));
    output.stdout
}

/// Checks that a program failed with this status and one line on stderr that contains all of these words.
fn assert_fails_with(output: &Output, status: i32, words: &[&str]) {
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{stderr}");
    assert!(stderr.starts_with("s5: ") && stderr.lines().count() == 1, "one line: {stderr:?}");
    for word in words {
        assert!(stderr.contains(word), "{word:?} is not in {stderr:?}");
    }
}

/// Waits for the log line of a session that contains all of these words.
fn wait_session(server: &Server, words: &[&str]) {
    server.wait_log(|log| session_lines(log).iter().any(|line| words.iter().all(|word| line.contains(word))));
}

fn path(path: &Path) -> String {
    path.to_str().expect("UTF-8").to_owned()
}

/// Returns pseudorandom bytes with a long period.
fn bytes(length: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    // The period is prime, so that a lost or repeated buffer changes the data.
    let block: Vec<u8> = (0..65_521).map(|_| next()).collect();
    block.into_iter().cycle().take(length).collect()
}
