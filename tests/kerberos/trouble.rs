//! What goes wrong with Kerberos, and that it is told, in time, and holds up nothing else.

use std::io::Write as _;
use std::net::TcpStream;
use std::process::Output;
use std::time::{Duration, Instant};

use crate::common::{Server, TIMEOUT, closed_port, echo_server, read_exact, run, wait_until};
use crate::kit::realm::{Realm, kinit};
use crate::kit::timed;
use crate::page::assert_explains;
use crate::scripted::RunningProgram;
use crate::{LONG, assert_says, client, path, realm, serve, start, stdout, url};

/// Where nobody is, should anybody get that far.
const NOWHERE: &str = "127.0.0.9:9";

/// Until a login with that ticket is refused: the library takes one for some time longer than klist does.
fn wait_for_expiry(realm: &Realm, server: &Server, ccache: &str) {
    wait_until("the ticket expires", TIMEOUT, || as_of(realm, server, ccache).status.code() == Some(67));
}

/// A client that logs in with these tickets.
fn as_of(realm: &Realm, server: &Server, ccache: &str) -> Output {
    let target = closed_port().to_string();
    run(&mut client(realm, "connect", &url(server), &["--ccache", ccache, &target]), b"", LONG)
}

/// The folder of a realm.
fn folder(realm: &Realm) -> std::path::PathBuf {
    realm.file("")
}

#[test]
fn who_has_no_ticket_is_told_to_get_one() {
    let Some(realm) = realm() else { return };
    let (server, none, target) = (serve(&realm, &[]), path(&realm.file("none")), closed_port().to_string());
    let why = "No credentials cache found";
    assert_says(&as_of(&realm, &server, &none), 67, &["proxy localhost:", why, "kinit", "--ccache"]);
    let mut command = client(&realm, "connect", &url(&server), &[&target]);
    let output = run(command.env("KRB5CCNAME", format!("FILE:{none}")), b"", LONG);
    let why = "No Kerberos credentials available";
    assert_says(&output, 67, &["proxy localhost:", why, &none, "kinit", "--ccache"]);
    assert_explains(why);
}

#[test]
fn a_ticket_that_has_expired_is_told_as_such() {
    let Some(realm) = realm() else { return };
    let (server, ccache) = (serve(&realm, &[]), path(&realm.file("short")));
    kinit(&folder(&realm), "alice", "user.keytab", "short", "1s");
    wait_for_expiry(&realm, &server, &ccache);
    assert_says(&as_of(&realm, &server, &ccache), 67, &["proxy localhost:", "login", "Ticket expired"]);
    assert_explains("Ticket expired");
}

#[test]
fn a_session_lives_on_when_its_ticket_ends() {
    let Some(realm) = realm() else { return };
    let (server, echo) = (serve(&realm, &[]), echo_server().to_string());
    let ccache = path(&realm.file("short"));
    kinit(&folder(&realm), "alice", "user.keytab", "short", "2s");
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
fn a_service_that_the_kdc_does_not_know_is_named() {
    let Some(realm) = realm() else { return };
    let server = serve(&realm, &[]);
    let args = ["--gssapi-service", "nosuch", NOWHERE];
    let output = run(&mut client(&realm, "connect", &url(&server), &args), b"", LONG);
    let why = "not found in Kerberos database";
    assert_says(&output, 67, &["login", &format!("Server nosuch/localhost@S5.TEST {why}")]);
    assert_explains(why);
}

#[test]
fn a_kdc_that_is_gone_is_told_at_once() {
    let Some(mut realm) = realm() else { return };
    let server = serve(&realm, &[]);
    realm.stop();
    let mut client = client(&realm, "connect", &url(&server), &[NOWHERE]);
    let (time, output) = timed(|| run(&mut client, b"", LONG));
    let why = "Cannot contact any KDC";
    assert_says(&output, 67, &["login", why, "S5.TEST"]);
    assert_explains(why);
    assert!(time < Duration::from_secs(5), "{time:?}");
}

#[test]
fn a_kdc_that_is_silent_is_waited_for_as_long_as_the_user_says_and_no_longer_than_10_s() {
    let Some(mut realm) = realm() else { return };
    let server = serve(&realm, &[]);
    realm.stop_answering();
    let started = Instant::now();
    let mut patient = RunningProgram::start(&mut client(&realm, "connect", &url(&server), &[NOWHERE]));
    let output = run(&mut client(&realm, "connect", &url(&server), &["-w", "300ms", NOWHERE]), b"", TIMEOUT);
    assert_says(&output, 28, &["proxy localhost:", "login", "timed out after 300ms"]);
    let output = run(&mut client(&realm, "udp", &url(&server), &["-w", "300ms", NOWHERE]), b"", TIMEOUT);
    assert_says(&output, 28, &["login", "timed out after 300ms"]);
    let (status, _, said) = patient.wait_exit(TIMEOUT);
    let time = started.elapsed();
    assert!(status.code() == Some(67) && said.contains("no answer from the KDC"), "{said}");
    assert!(time > Duration::from_secs(9) && time < Duration::from_secs(25), "{time:?}");
    assert_explains("no answer from the KDC");
}

/// Asks a server for a tunnel without a login.
fn ask(server: &Server, to: &str) -> TcpStream {
    let mut stream = crate::kit::greet(server);
    stream.write_all(&crate::common::request(1, to.parse().expect("an address"))).expect("the request is sent");
    stream
}

#[test]
fn a_server_whose_kdc_is_silent_serves_others_meanwhile() {
    let Some(mut realm) = realm() else { return };
    let (hop, echo) = (serve(&realm, &[]), echo_server().to_string());
    let plain_hop = start(&realm, &[]);
    let (kerberos, plain) = (format!("kerberos={}", url(&hop)), format!("plain={}", url(&plain_hop)));
    let args = ["--hop", &kerberos, "--hop", &plain, "--allow", "to=127.0.0.9 via=kerberos"];
    let more = ["--allow", "to=localhost via=plain", "--connect-timeout", "5s", "--drain", "100ms"];
    let mut server = start(&realm, &[&args[..], &more].concat());
    realm.stop_answering();
    // More than may wait at once: some are told at once, and the rest at the deadline.
    let mut all: Vec<TcpStream> = (0..40).map(|_| ask(&server, NOWHERE)).collect();
    let port = echo.rsplit_once(':').expect("an address").1;
    for target in [&echo, &format!("localhost:{port}")] {
        let mut command = crate::common::s5();
        let proxy = server.addr().to_string();
        let (time, came) = timed(|| stdout(command.args(["connect", "-x", &proxy, target]), b"hello"));
        assert_eq!(came, b"hello", "{target}");
        assert!(time < Duration::from_secs(2), "{target}: {time:?}");
    }
    let is_answered = |stream: &TcpStream| {
        stream.set_nonblocking(true).expect("an option");
        let is_answered = stream.peek(&mut [0]).is_ok();
        stream.set_nonblocking(false).expect("an option");
        is_answered
    };
    wait_until("eight are told", TIMEOUT, || all.iter().filter(|stream| is_answered(stream)).count() >= 8);
    assert_eq!(all.iter().filter(|stream| is_answered(stream)).count(), 8, "the others wait");
    for stream in &mut all {
        assert_eq!(read_exact(stream, 4), [5, 1, 0, 1], "REP 1");
    }
    drop(all);
    let log = server.wait_log(|log| log.matches("dst=\"127.0.0.9:9\"").count() == 40);
    assert_eq!(log.matches("login, for 127.0.0.9:9: timed out after").count(), 32, "{log}");
    // Threads that the library holds are not waited for.
    server.signal("TERM");
    assert!(server.wait(TIMEOUT).success());
}
