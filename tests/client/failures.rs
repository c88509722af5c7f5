//! Handshake failures that are neither rows of the table in `behaviours.txt` nor transcripts.

use s5::client::{ClientError, ClientErrorKind, Phase};
use s5::proto::Method;

use crate::*;

#[test]
fn slow_bytes_do_not_extend_the_handshake_timeout() {
    let name = "05 00 00 03 ff \"x\"*255 00 50 ".repeat(20);
    let proxy = ScriptedServer::start(&format!("{NO_AUTH} slowly< {name}"));
    let started = Instant::now();
    assert_eq!(outcome(&format!("bind -w 200ms -x {}", proxy.addr), b"").0, Some(28));
    assert!(started.elapsed() >= Duration::from_millis(200));
}

#[test]
fn immediate_reset_by_the_proxy_has_status_7_or_97() {
    let proxy = ScriptedServer::start("reset");
    let (status, _, stderr) = outcome(&format!("connect -x {} {TARGET}", proxy.addr), b"");
    // The reset may arrive during connect(2) or after it.
    assert!(matches!(status, Some(7 | 97)) && stderr.lines().count() == 1, "{status:?}: {stderr}");
}

#[test]
fn missing_unix_socket_has_status_7() {
    let words = ["s5: proxy unix:/nonexistent/s5.sock: connecting to the proxy, for"];
    assert_line(&format!("connect -x unix:/nonexistent/s5.sock {TARGET}"), 7, &words);
}

#[test]
fn unresolvable_proxy_name_has_status_5() {
    let resolv = "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n";
    enter_namespace!("127.0.0.1 localhost\n", resolv);
    for (name, reason) in [("proxy.example", "temporary failure in name resolution"), ("a..b", "name not found")] {
        let line = format!("s5: proxy {name}:1080: resolving the proxy's name, for {TARGET}: {reason}\n");
        assert_eq!(outcome(&format!("connect -x {name} {TARGET}"), b""), failure(5, &line));
    }
}

#[test]
fn verbose_client_leaves_out_a_bnd_without_port() {
    for bnd in ["01 00*6", "04 00*18", "03 00 00 00"] {
        let addr = ScriptedServer::start(&reply(&format!("05 00 00 {bnd}"))).addr;
        let line = format!("s5: proxy {addr}: connected to {TARGET}\n");
        assert_eq!(outcome(&format!("connect -v -z -x {addr} {TARGET}"), b""), failure(0, &line));
    }
}

#[test]
fn refused_methods_are_named_with_what_may_help() {
    let refuse = "> {greeting}; < 05 ff";
    let (login, auth) = ("add user:password@ to the proxy's URL", "allow more methods with --auth or --hop-auth");
    let cases = [
        ("", "", format!("(offered: none; {login}, or run kinit)")),
        ("a:b@", "", "(offered: none, password; run kinit)".into()),
        ("a:b@", " --auth password", format!("(offered: password; run kinit, or {auth})")),
    ];
    for (userinfo, auth, remedy) in cases {
        let addr = ScriptedServer::start(refuse).addr;
        let line = format!("s5: proxy {addr}: greeting, for {TARGET}: no acceptable authentication method {remedy}\n");
        assert_eq!(outcome(&format!("connect -x {userinfo}{addr} {TARGET}{auth}"), b""), failure(67, &line));
    }
    let via = format!("a:b@{}", ScriptedServer::start(refuse).addr);
    let server = Server::start(&["--via", &via, "--hop-auth", "password"]);
    assert_eq!(outcome(&format!("connect -x {} {TARGET}", server.addr()), b"").0, Some(101));
    server.wait_log(|log| log.contains("(offered: password; run kinit, or allow more methods with"));
    let (none, password, gssapi) = (Method::NONE, Method::PASSWORD, Method::GSSAPI);
    for (offered, remedy) in [
        (vec![none, gssapi], format!("(offered: none, gssapi; {login})")),
        (vec![none, password, gssapi], "(offered: none, password, gssapi)".into()),
        (vec![], format!("(offered: nothing; {login}, or run kinit, or {auth})")),
    ] {
        let kind = ClientErrorKind::NoAcceptableMethod(offered, None);
        let error = ClientError { proxy: None, target: None, phase: Phase::Greeting, kind };
        assert_eq!(error.to_string(), format!("direct: greeting: no acceptable authentication method {remedy}"));
    }
}

#[test]
fn all_modes_report_the_same_failures() {
    let denied = "greeting, for TARGET: the proxy closed the connection (its rules or limits may deny this client)";
    let down = "connecting to the proxy, for TARGET: connection refused (is the proxy running?)";
    let cases = [
        (Some(reply("05 02 00 01 00*6")), 102, "request, for TARGET: not allowed by ruleset (REP 2)"),
        (Some("> {greeting}".into()), 97, denied),
        (None, 7, down),
    ];
    for mode in ["connect", "bind", "udp"] {
        for (script, status, reason) in &cases {
            let addr = script.as_ref().map_or_else(closed_port, |script| ScriptedServer::start(script).addr);
            let line = format!("s5: proxy {addr}: {}\n", reason.replace("TARGET", TARGET));
            assert_eq!(outcome(&format!("{mode} -x {addr} {TARGET}"), b""), failure(*status, &line), "{mode}");
        }
    }
}
