//! Handshake failures that are not rows of the table in `support/behaviours.rs`.

use std::time::{Duration, Instant};

use crate::support::scripted::{SELECT_NO_AUTH, SUCCESS_REPLY, ScriptedServer, Step, reply_with, send, text};
use crate::support::{TIMEOUT, closed_port, in_namespace, run, s5};

use Step::{Greeting, Request, Reset};

const TARGET: &str = "target.example:80";

#[test]
fn slow_bytes_do_not_extend_the_handshake_timeout() {
    let name = [&[5, 0, 0, 3, 255][..], &[b'x'; 255], &[0, 80]].concat();
    let script = vec![Greeting, send(SELECT_NO_AUTH), Request, Step::SendByteByByte(name.repeat(20))];
    let proxy = ScriptedServer::start(script);
    let started = Instant::now();
    let output = run(s5().args(["bind", "-w", "200ms", "-x", &proxy.url()]), b"", TIMEOUT);
    assert_eq!(output.status.code(), Some(28), "{}", text(&output.stderr));
    assert!(started.elapsed() >= Duration::from_millis(200));
}

#[test]
fn immediate_reset_by_the_proxy_has_status_7_or_97() {
    let proxy = ScriptedServer::start(vec![Reset]);
    let output = run(s5().args(["connect", "-x", &proxy.url(), TARGET]), b"", TIMEOUT);
    // The reset may arrive during connect(2) or after it.
    assert!(matches!(output.status.code(), Some(7 | 97)), "{:?}", output.status);
    assert_eq!(text(&output.stderr).lines().count(), 1, "{}", text(&output.stderr));
}

#[test]
fn proxy_that_is_down_has_status_7() {
    let proxy = closed_port().to_string();
    for mode in [&["connect", TARGET][..], &["bind", TARGET], &["udp", TARGET]] {
        let output = run(s5().args(mode).args(["-x", &proxy]), b"", TIMEOUT);
        let reason = "connection refused (is the proxy running?)";
        let line = format!("s5: proxy {proxy}: connecting to the proxy, for {TARGET}: {reason}\n");
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(7), line));
    }
}

#[test]
fn missing_unix_socket_has_status_7() {
    let output = run(s5().args(["connect", "-x", "unix:/nonexistent/s5.sock", TARGET]), b"", TIMEOUT);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(7), "{stderr}");
    assert!(stderr.starts_with("s5: proxy unix:/nonexistent/s5.sock: connecting to the proxy, for"), "{stderr}");
}

#[test]
fn unresolvable_proxy_name_has_status_5() {
    if !in_namespace(
        "failures::unresolvable_proxy_name_has_status_5",
        "127.0.0.1 localhost\n",
        "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n",
    ) {
        return;
    }
    for (name, reason) in [("proxy.example", "temporary failure in name resolution"), ("a..b", "name not found")] {
        let output = run(s5().args(["connect", "-x", name, TARGET]), b"", TIMEOUT);
        let line = format!("s5: proxy {name}:1080: resolving the proxy's name, for {TARGET}: {reason}\n");
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(5), line));
    }
}

#[test]
fn failure_at_the_second_hop_names_the_second_hop() {
    let closed = closed_port();
    let first = ScriptedServer::start(reply_with(&[5, 5, 0, 1, 0, 0, 0, 0, 0, 0]));
    let chain = format!("{},{closed}", first.addr);
    let output = run(s5().args(["connect", "-x", &chain, TARGET]), b"", TIMEOUT);
    let line = format!("s5: proxy {}: request, for {closed}: connection refused (REP 5)\n", first.addr);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(7), line));

    // The second hop is not a proxy.
    let first =
        ScriptedServer::start(reply_with(SUCCESS_REPLY).into_iter().chain([Greeting, send(b"HTTP/1.1 400")]).collect());
    let chain = format!("{},second.example:99", first.addr);
    let output = run(s5().args(["connect", "-x", &chain, TARGET]), b"", TIMEOUT);
    let reason = "not a SOCKS5 server (first byte 0x48 'H', HTTP?)";
    let line = format!("s5: proxy second.example:99: greeting, for {TARGET}: {reason}\n");
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(97), line));
}

#[test]
fn control_characters_from_a_proxy_are_not_printed() {
    // The proxy chooses the peer's name in the second reply to BIND.
    let hostile = b"\x1b[2Jowned";
    let name = [&[5, 0, 0, 3, 9][..], hostile, &[0, 80]].concat();
    let proxy = ScriptedServer::start(reply_with(SUCCESS_REPLY).into_iter().chain([send(&name)]).collect());
    let output = run(s5().args(["bind", "-v", "-x", &proxy.url()]), b"", TIMEOUT);
    assert!(!output.stderr.contains(&0x1b), "{:?}", text(&output.stderr));
    assert!(text(&output.stderr).ends_with("accepted 0.0.0.0:0\n"), "{:?}", text(&output.stderr));
}

#[test]
fn all_modes_report_the_same_failures() {
    for mode in [&["connect", TARGET][..], &["bind", TARGET], &["udp", TARGET]] {
        let cases = [
            (reply_with(&[5, 2, 0, 1, 0, 0, 0, 0, 0, 0]), 102, "request", "not allowed by ruleset (REP 2)"),
            (
                vec![Greeting],
                97,
                "greeting",
                "the proxy closed the connection (its rules or limits may deny this client)",
            ),
        ];
        for (script, status, phase, reason) in cases {
            let proxy = ScriptedServer::start(script);
            let output = run(s5().args(mode).args(["-x", &proxy.url()]), b"", TIMEOUT);
            let line = format!("s5: proxy {}: {phase}, for {TARGET}: {reason}\n", proxy.addr);
            assert_eq!((output.status.code(), text(&output.stderr)), (Some(status), line), "{mode:?}");
            assert!(output.stdout.is_empty());
        }
    }
}
