//! Kerberos errors: tickets, services and KDCs. Each error is reported in time and does not block other sessions.

use crate::page::assert_explains;
use crate::support::realm::{Realm, kinit};
use crate::*;

/// An address without a listener. No test must reach it.
const UNUSED_ADDR: &str = "127.0.0.9:9";

/// Waits until a login with this ticket fails: the library accepts a ticket longer than klist shows.
fn wait_for_expiry(realm: &Realm, server: &Server, ccache: &str) {
    let args = ["--ccache", ccache, UNUSED_ADDR];
    wait_until("the ticket expires", TIMEOUT, || connect(realm, &url(server), &args).status.code() == Some(67));
}

#[test]
fn missing_ticket_expired_ticket_and_unknown_service_are_named() {
    let Some(realm) = realm() else { return };
    let (server, none, short) = (serve(&realm, &[]), path(&realm.file("none")), path(&realm.file("short")));
    kinit(&realm.file(""), "alice", "user.keytab", "short", "1s");
    wait_for_expiry(&realm, &server, &short);
    let table: [([&str; 2], &[&str], &str); 3] = [
        (["--ccache", &none], &["kinit", "--ccache", &none], "No credentials cache found"),
        (["--ccache", &short], &["kinit", "--ccache"], "Ticket expired"),
        (
            ["--gssapi-service", "nosuch"],
            &["login", "Server nosuch/localhost@S5.TEST"],
            "not found in Kerberos database",
        ),
    ];
    for ([option, value], words, message) in table {
        let output = connect(&realm, &url(&server), &[option, value, UNUSED_ADDR]);
        assert_fails_with(&output, 67, &[&["proxy localhost:", message], words].concat());
        assert_explains(message);
    }
    let mut command = client(&realm, "connect", &url(&server), &[UNUSED_ADDR]);
    let output = hello(command.env("KRB5CCNAME", format!("FILE:{none}")));
    let message = "No Kerberos credentials available";
    assert_fails_with(&output, 67, &["proxy localhost:", message, &none, "kinit", "--ccache"]);
    assert_explains(message);
}

#[test]
fn unusable_gssapi_does_not_prevent_password_login() {
    let Some(realm) = realm() else { return };
    let ((_dir, users), echo) = (users_file(&[("bob", "secret")]), echo_server().to_string());
    let server = serve(&realm, &["--users", &users, "--auth", "gssapi,password"]);
    let (by_ip, by_name, short) = (server.addr().to_string(), url(&server), path(&realm.file("short")));
    kinit(&realm.file(""), "alice", "user.keytab", "short", "1s");
    wait_for_expiry(&realm, &server, &short);
    for (proxy, args) in [(&by_ip, &[][..]), (&by_name, &["--ccache", &short])] {
        let hop = format!("bob:secret@{proxy}");
        assert_hello(&hello(&mut any_client(&realm, "connect", &hop, &[args, &[&*echo]].concat())), &hop);
    }
    // Without a password, the error says why GSSAPI was not offered.
    let words = ["offered: none; add user:password@", "Kerberos needs the host name of the proxy", "URL"];
    assert_fails_with(&hello(&mut any_client(&realm, "connect", &by_ip, &[&echo])), 67, &words);
    let args = ["--auth", "password,gssapi", &echo];
    assert_fails_with(
        &hello(&mut any_client(&realm, "connect", &by_ip, &args)),
        67,
        &[&["offered: nothing"], &words[1..]].concat(),
    );
    let relay = start(&realm, &["--via", &format!("bob:secret@{by_ip}")]);
    assert_hello(&hello(s5().args(["connect", "-x", &relay.addr().to_string(), &echo])), "--via");
}

#[test]
fn client_uses_the_ticket_for_the_proxy_not_the_primary_ticket() {
    let Some(realm) = realm() else { return };
    let (any, server, echo) = (serve(&realm, &[]), serve_at(&realm, "integrity"), echo_server().to_string());
    let (dir, primary) = (realm.file("cc"), path(&realm.file("cc/tkt2")));
    std::fs::create_dir(&dir).expect("directory created");
    kinit(&realm.file(""), "alice", "user.keytab", "cc/tkt1", "1h");
    write_file(&dir, "primary", "tkt2\n");
    write_file(&realm.file(""), ".k5identity", &format!("{ALICE} host=localhost\n"));
    for lifetime in ["1h", "1s"] {
        kinit(&realm.file(""), "mallory", "mallory.keytab", "cc/tkt2", lifetime);
        if lifetime == "1s" {
            wait_for_expiry(&realm, &any, &primary);
        }
        let mut client = any_client(&realm, "connect", &url(&server), &["--gssapi-protection", "integrity", &echo]);
        client.env("KRB5CCNAME", format!("DIR:{}", dir.display())).env("HOME", realm.file(""));
        assert_hello(&hello(&mut client), lifetime);
    }
}

#[test]
fn session_continues_after_its_ticket_expires() {
    let Some(realm) = realm() else { return };
    let (server, echo, ccache) = (serve(&realm, &[]), echo_server().to_string(), path(&realm.file("short")));
    kinit(&realm.file(""), "alice", "user.keytab", "short", "2s");
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
fn unreachable_kdc_is_reported_at_once() {
    let Some(mut realm) = realm() else { return };
    let server = serve(&realm, &[]);
    realm.stop();
    let (time, output) = timed(|| connect(&realm, &url(&server), &[UNUSED_ADDR]));
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
    for mode in ["connect", "udp"] {
        let output = run(&mut client(&realm, mode, &url(&server), &["-w", "300ms", UNUSED_ADDR]), b"", TIMEOUT);
        assert_fails_with(&output, 28, &["proxy localhost:", "login", "timed out after 300ms"]);
    }
    let (status, _, stderr) = waiting.wait_exit(LONG_TIMEOUT);
    let time = started.elapsed();
    assert_failed(status.code(), &stderr, 67, &["no answer from the KDC"]);
    assert!(time > Duration::from_secs(9) && time < Duration::from_secs(25), "{time:?}");
    assert_explains("no answer from the KDC");
}

#[test]
fn silent_kdc_does_not_block_other_sessions() {
    let Some(mut realm) = realm() else { return };
    let (hop, plain_hop, echo) = (serve(&realm, &[]), start(&realm, &[]), echo_server());
    let (kerberos, plain) = (format!("kerberos={}", url(&hop)), format!("plain={}", url(&plain_hop)));
    let args = ["--hop", &kerberos, "--hop", &plain, "--allow", "to=127.0.0.9 via=kerberos"];
    let more = ["--allow", "to=localhost via=plain", "--connect-timeout", "5s", "--drain-timeout", "100ms"];
    let mut server = start(&realm, &[&args[..], &more].concat());
    realm.stop_answering();
    // 32 logins wait for the KDC until their deadline. The server refuses the other 8 after 1 s.
    let send_request = |_| {
        let mut stream = greet_from(&server, unused_client_ip());
        let request = request(CONNECT, UNUSED_ADDR.parse().expect("an address"));
        stream.write_all(&request).expect("the request is sent");
        stream
    };
    let mut all: Vec<TcpStream> = (0..40).map(send_request).collect();
    for target in [echo.to_string(), format!("localhost:{}", echo.port())] {
        let mut command = s5();
        command.args(["connect", "-x", &server.addr().to_string(), &target]);
        let (time, ()) = timed(|| assert_echoes(&mut command, b"hello"));
        assert!(time < Duration::from_secs(2), "{target}: {time:?}");
    }
    let is_answered = |stream: &&TcpStream| {
        stream.set_nonblocking(true).expect("an option");
        let is_answered = retry(|| stream.peek(&mut [0])).is_ok();
        stream.set_nonblocking(false).expect("an option");
        is_answered
    };
    wait_until("eight are refused", TIMEOUT, || all.iter().filter(is_answered).count() >= 8);
    assert_eq!(all.iter().filter(is_answered).count(), 8, "the others wait");
    for stream in &mut all {
        assert_eq!(read_exact(stream, 4), [5, 1, 0, 1], "REP 1");
    }
    drop(all);
    server.wait_log(|log| log.contains("login, for 127.0.0.9:9: timed out after"));
    // The shutdown does not wait for threads that are blocked in the library.
    server.signal("TERM");
    assert!(server.wait(TIMEOUT).success());
}

#[test]
fn no_ticket_is_requested_for_a_server_without_gssapi() {
    let Some(mut realm) = realm() else { return };
    // A request would wait for the KDC.
    realm.stop_answering();
    let closed = format!("localhost:{}", closed_port().port());
    assert_fails_with(&connect(&realm, &closed, &[UNUSED_ADDR]), 7, &["connection refused"]);
    let server = start(&realm, &[]);
    let output = connect(&realm, &url(&server), &["-w", "5s", UNUSED_ADDR]);
    assert_fails_with(&output, 67, &["no acceptable authentication method"]);
}
