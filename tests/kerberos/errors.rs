//! Kerberos errors: tickets, services and KDCs. Each error is reported in time and does not block other sessions.

use std::io::Write as _;
use std::net::TcpStream;
use std::process::Output;
use std::time::{Duration, Instant};

use crate::page::assert_explains;
use crate::support::realm::{Realm, kinit};
use crate::support::scripted::RunningProgram;
use crate::support::{Server, TIMEOUT, closed_port, echo_server, read_exact, retry, run, timed, wait_until};
use crate::{LONG_TIMEOUT, assert_fails_with, client, path, realm, serve, start, stdout, url};

/// An address without a listener. No test must reach it.
const UNUSED_ADDR: &str = "127.0.0.9:9";

/// Waits until a login with this ticket fails: the library accepts a ticket longer than klist shows.
fn wait_for_expiry(realm: &Realm, server: &Server, ccache: &str) {
    wait_until("the ticket expires", TIMEOUT, || connect_with_ccache(realm, server, ccache).status.code() == Some(67));
}

/// Runs a client that logs in with these tickets.
fn connect_with_ccache(realm: &Realm, server: &Server, ccache: &str) -> Output {
    let target = closed_port().to_string();
    run(&mut client(realm, "connect", &url(server), &["--ccache", ccache, &target]), b"", LONG_TIMEOUT)
}

/// Returns the directory of a realm.
fn dir(realm: &Realm) -> std::path::PathBuf {
    realm.file("")
}

#[test]
fn missing_ticket_names_kinit_and_ccache() {
    let Some(realm) = realm() else { return };
    let (server, none, target) = (serve(&realm, &[]), path(&realm.file("none")), closed_port().to_string());
    let message = "No credentials cache found";
    assert_fails_with(
        &connect_with_ccache(&realm, &server, &none),
        67,
        &["proxy localhost:", message, "kinit", "--ccache"],
    );
    let mut command = client(&realm, "connect", &url(&server), &[&target]);
    let output = run(command.env("KRB5CCNAME", format!("FILE:{none}")), b"", LONG_TIMEOUT);
    let message = "No Kerberos credentials available";
    assert_fails_with(&output, 67, &["proxy localhost:", message, &none, "kinit", "--ccache"]);
    assert_explains(message);
}

#[test]
fn expired_ticket_is_reported() {
    let Some(realm) = realm() else { return };
    let (server, ccache) = (serve(&realm, &[]), path(&realm.file("short")));
    kinit(&dir(&realm), "alice", "user.keytab", "short", "1s");
    wait_for_expiry(&realm, &server, &ccache);
    assert_fails_with(
        &connect_with_ccache(&realm, &server, &ccache),
        67,
        &["proxy localhost:", "login", "Ticket expired"],
    );
    assert_explains("Ticket expired");
}

#[test]
fn session_continues_after_its_ticket_expires() {
    let Some(realm) = realm() else { return };
    let (server, echo) = (serve(&realm, &[]), echo_server().to_string());
    let ccache = path(&realm.file("short"));
    kinit(&dir(&realm), "alice", "user.keytab", "short", "2s");
    let mut client =
        RunningProgram::start(&mut client(&realm, "connect", &url(&server), &["--ccache", &ccache, &echo]));
    client.write(b"before ");
    client.stdout(|all| all == b"before ");
    wait_for_expiry(&realm, &server, &ccache);
    client.write(b"and after");
    client.stdout(|all| all == b"before and after");
    client.close_stdin();
    assert!(client.wait_exit(TIMEOUT).0.success());
}

#[test]
fn unknown_service_is_named() {
    let Some(realm) = realm() else { return };
    let server = serve(&realm, &[]);
    let args = ["--gssapi-service", "nosuch", UNUSED_ADDR];
    let output = run(&mut client(&realm, "connect", &url(&server), &args), b"", LONG_TIMEOUT);
    let message = "not found in Kerberos database";
    assert_fails_with(&output, 67, &["login", &format!("Server nosuch/localhost@S5.TEST {message}")]);
    assert_explains(message);
}

#[test]
fn unreachable_kdc_is_reported_at_once() {
    let Some(mut realm) = realm() else { return };
    let server = serve(&realm, &[]);
    realm.stop();
    let mut client = client(&realm, "connect", &url(&server), &[UNUSED_ADDR]);
    let (time, output) = timed(|| run(&mut client, b"", LONG_TIMEOUT));
    let message = "Cannot contact any KDC";
    assert_fails_with(&output, 67, &["login", message, "S5.TEST"]);
    assert_explains(message);
    assert!(time < Duration::from_secs(5), "{time:?}");
}

#[test]
fn silent_kdc_times_out_after_timeout_option_or_10_s() {
    let Some(mut realm) = realm() else { return };
    let server = serve(&realm, &[]);
    realm.stop_answering();
    let started = Instant::now();
    let mut waiting = RunningProgram::start(&mut client(&realm, "connect", &url(&server), &[UNUSED_ADDR]));
    let output = run(&mut client(&realm, "connect", &url(&server), &["-w", "300ms", UNUSED_ADDR]), b"", TIMEOUT);
    assert_fails_with(&output, 28, &["proxy localhost:", "login", "timed out after 300ms"]);
    let output = run(&mut client(&realm, "udp", &url(&server), &["-w", "300ms", UNUSED_ADDR]), b"", TIMEOUT);
    assert_fails_with(&output, 28, &["login", "timed out after 300ms"]);
    let (status, _, stderr) = waiting.wait_exit(TIMEOUT);
    let time = started.elapsed();
    assert!(status.code() == Some(67) && stderr.contains("no answer from the KDC"), "{stderr}");
    assert!(time > Duration::from_secs(9) && time < Duration::from_secs(25), "{time:?}");
    assert_explains("no answer from the KDC");
}

/// Sends a CONNECT request without a login.
fn send_request(server: &Server, to: &str) -> TcpStream {
    let mut stream = crate::support::greet(server);
    stream.write_all(&crate::support::request(1, to.parse().expect("an address"))).expect("the request is sent");
    stream
}

#[test]
fn silent_kdc_does_not_block_other_sessions() {
    let Some(mut realm) = realm() else { return };
    let (hop, echo) = (serve(&realm, &[]), echo_server().to_string());
    let plain_hop = start(&realm, &[]);
    let (kerberos, plain) = (format!("kerberos={}", url(&hop)), format!("plain={}", url(&plain_hop)));
    let args = ["--hop", &kerberos, "--hop", &plain, "--allow", "to=127.0.0.9 via=kerberos"];
    let more = ["--allow", "to=localhost via=plain", "--connect-timeout", "5s", "--drain-timeout", "100ms"];
    let mut server = start(&realm, &[&args[..], &more].concat());
    realm.stop_answering();
    // 32 logins wait for the KDC until their deadline. The server refuses the other 8 after 1 s.
    let mut all: Vec<TcpStream> = (0..40).map(|_| send_request(&server, UNUSED_ADDR)).collect();
    let port = echo.rsplit_once(':').expect("an address").1;
    for target in [&echo, &format!("localhost:{port}")] {
        let mut command = crate::support::s5();
        let proxy = server.addr().to_string();
        let (time, received) = timed(|| stdout(command.args(["connect", "-x", &proxy, target]), b"hello"));
        assert_eq!(received, b"hello", "{target}");
        assert!(time < Duration::from_secs(2), "{target}: {time:?}");
    }
    let is_answered = |stream: &TcpStream| {
        stream.set_nonblocking(true).expect("an option");
        let is_answered = retry(|| stream.peek(&mut [0])).is_ok();
        stream.set_nonblocking(false).expect("an option");
        is_answered
    };
    wait_until("eight are refused", TIMEOUT, || all.iter().filter(|stream| is_answered(stream)).count() >= 8);
    assert_eq!(all.iter().filter(|stream| is_answered(stream)).count(), 8, "the others wait");
    for stream in &mut all {
        assert_eq!(read_exact(stream, 4), [5, 1, 0, 1], "REP 1");
    }
    drop(all);
    let log = server.wait_log(|log| log.matches("dst=\"127.0.0.9:9\"").count() == 40);
    assert_eq!(log.matches("login, for 127.0.0.9:9: timed out after").count(), 32, "{log}");
    // The shutdown does not wait for threads that are blocked in the library.
    server.signal("TERM");
    assert!(server.wait(TIMEOUT).success());
}
