//! GSSAPI (RFC 1961) end to end, with Kerberos: in a throw-away realm, by programs of ours, by peers that are not.
//!
//! A test whose programs are missing is skipped, or fails when S5_TEST_STRICT=1. What a toy context shows of the frames
//! is protected.rs.

mod common;
mod kit;
#[path = "common/scripted.rs"]
mod scripted;

#[path = "kerberos/capture.rs"]
mod capture;
#[path = "kerberos/chains.rs"]
mod chains;
#[path = "kerberos/dante.rs"]
mod dante;
#[path = "kerberos/datagrams.rs"]
mod datagrams;
#[path = "kerberos/datagrams_raw.rs"]
mod datagrams_raw;
#[path = "kerberos/demands.rs"]
mod demands;
#[path = "kerberos/foreign.rs"]
mod foreign;
#[path = "kerberos/handshake.rs"]
mod handshake;
#[path = "kerberos/library.rs"]
mod library;
#[path = "kerberos/options.rs"]
mod options;
#[path = "kerberos/page.rs"]
mod page;
#[path = "kerberos/peer.rs"]
mod peer;
#[path = "kerberos/proxies.rs"]
mod proxies;
#[path = "kerberos/rules.rs"]
mod rules;
#[path = "kerberos/streams.rs"]
mod streams;
#[path = "kerberos/tokens.rs"]
mod tokens;
#[path = "kerberos/trouble.rs"]
mod trouble;

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use common::{Server, run, s5};
use kit::realm::{self, Realm};
use scripted::text;

/// How long a program may take that does something of size, on a loaded machine.
const LONG: Duration = Duration::from_secs(60);
const ALICE: &str = "alice@S5.TEST";
const LEVELS: [&str; 3] = ["none", "integrity", "confidentiality"];

/// A realm, where one can be started; as `has`.
fn realm() -> Option<Realm> {
    realm::can_start().then(Realm::start)
}

/// A server in the realm with these arguments.
fn start(realm: &Realm, args: &[&str]) -> Server {
    Server::start_with(realm.env(s5().args(["serve", "--listen", "127.0.0.1:0"]).args(args)), 1)
}

/// A server in the realm that takes GSSAPI, with the keys of both services.
fn serve(realm: &Realm, args: &[&str]) -> Server {
    start(realm, &[&["--keytab", &path(&realm.file("service.keytab"))], args].concat())
}

/// As `serve`, where only sessions of alice at that level may do anything.
fn serve_at(realm: &Realm, level: &str) -> Server {
    let rule = format!("user={ALICE} method=gssapi protection={level}");
    serve(realm, &["--gssapi-protection", level, "--allow", &rule, "--deny", ""])
}

/// A server as `-x` takes it, by the name that Kerberos knows.
fn url(server: &Server) -> String {
    format!("localhost:{}", server.addr().port())
}

/// A client of ours in the realm, that offers GSSAPI and nothing else.
fn client(realm: &Realm, mode: &str, proxy: &str, args: &[&str]) -> Command {
    let mut command = s5();
    realm.env(command.args([mode, "-x", proxy, "--auth", "gssapi"]).args(args));
    command
}

/// As `client`, that asks for this level.
fn client_at(realm: &Realm, mode: &str, proxy: &str, level: &str, args: &[&str]) -> Command {
    client(realm, mode, proxy, &[&["--gssapi-protection", level], args].concat())
}

/// What a program wrote, when it ended well.
fn stdout(command: &mut Command, stdin: &[u8]) -> Vec<u8> {
    let output = run(command, stdin, LONG);
    assert!(output.status.success(), "{command:?}: {}: {}", output.status, text(&output.stderr));
    output.stdout
}

/// Fails unless a program has ended with this status, and one line on stderr with all of these words.
fn assert_says(output: &Output, status: i32, words: &[&str]) {
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{said}");
    assert!(said.starts_with("s5: ") && said.lines().count() == 1, "one line: {said:?}");
    for word in words {
        assert!(said.contains(word), "{word:?} is not in {said:?}");
    }
}

/// Waits for a line of a session with all of these words.
fn session(server: &Server, words: &[&str]) {
    server.wait_log(|log| kit::session_lines(log).iter().any(|line| words.iter().all(|word| line.contains(word))));
}

fn path(path: &Path) -> String {
    path.to_str().expect("a path of text").to_owned()
}

/// Octets of all values, in an order that repeats late.
fn octets(length: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    // A prime, so that a buffer which is sent twice or left out does not go unnoticed.
    let block: Vec<u8> = (0..65_521).map(|_| next()).collect();
    block.into_iter().cycle().take(length).collect()
}
