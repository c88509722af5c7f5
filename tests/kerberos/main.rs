//! GSSAPI (RFC 1961) with Kerberos, end to end: a temporary realm, the programs of s5, and independent peers.
//!
//! Tests whose programs are not installed are skipped, or fail if S5_TEST_STRICT=1. tests/wire/protected.rs tests the
//! framing with a simulated security context.

#![allow(unused_qualifications, reason = "the names of std that support exports may be written with their path")]

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

use support::realm::Realm;
use support::*;

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

/// Returns a client command in the realm.
fn any_client(realm: &Realm, mode: &str, proxy: &str, args: &[&str]) -> Command {
    let mut command = s5();
    realm.env(command.args([mode, "-x", proxy]).args(args));
    command
}

/// Returns a client command in the realm that offers only GSSAPI.
fn client(realm: &Realm, mode: &str, proxy: &str, args: &[&str]) -> Command {
    any_client(realm, mode, proxy, &[&["--auth", "gssapi"], args].concat())
}

/// Like [`client`], but requests this level.
fn client_at(realm: &Realm, mode: &str, proxy: &str, level: &str, args: &[&str]) -> Command {
    client(realm, mode, proxy, &[&["--gssapi-protection", level], args].concat())
}

/// Runs a client that offers only GSSAPI and sends `hello`.
fn connect(realm: &Realm, proxy: &str, args: &[&str]) -> Output {
    hello(&mut client(realm, "connect", proxy, args))
}

/// Runs a program with `hello` on stdin.
fn hello(command: &mut Command) -> Output {
    run(command, b"hello\n", LONG_TIMEOUT)
}

/// Checks the output of a client that has sent `hello` to an echo server.
fn assert_hello(output: &Output, case: &str) {
    assert_eq!(text(&output.stdout), "hello\n", "{case}: {}", text(&output.stderr));
}

/// Starts `s5 udp` and sends datagrams of these lengths to an echo server, each one after the echo of the last one.
fn exchange_datagrams(command: &mut Command, lengths: &[usize]) -> RunningProgram {
    let mut client = RunningProgram::start(command);
    let mut expected = Vec::new();
    for length in lengths {
        let letters = (b'a'..=b'z').cycle().enumerate().map(|(i, letter)| letter ^ (u8::from(i % 7 == 0) << 5));
        let line: Vec<u8> = letters.take(*length).chain([b'\n']).collect();
        client.write(&line);
        expected.extend(line);
        let all = client.stdout(|all| all.len() >= expected.len());
        assert!(all == expected, "{command:?}: {length} bytes");
    }
    client
}

fn path(path: &Path) -> String {
    path.to_str().expect("UTF-8").to_owned()
}
