//! The JSON object that --json prints, parsed by Python.

use std::io::Write as _;
use std::process::Command;

use crate::support::scripted::{ScriptedServer, reply};
use crate::support::{TIMEOUT, V4, closed_port, echo_server, is_installed, tcp_server, udp_echo_server};
use crate::{TARGET, outcome, outcome_of, serve, start};

/// Evaluates a Python expression on `o`, the object in the last line of stderr.
fn eval_json(stderr: &str, expression: &str) -> String {
    let line = stderr.lines().last().unwrap_or_default();
    let script = "import json,sys\no=json.loads(sys.argv[1])\nprint(eval(sys.argv[2]))";
    let (status, stdout, error) = outcome_of(Command::new("python3").args(["-c", script, line, expression]), b"");
    assert_eq!(status, Some(0), "{line}: {error}");
    stdout.trim_end().to_owned()
}

#[test]
fn json_reports_route_byte_counts_and_times() {
    if !is_installed("python3") {
        return;
    }
    let ((_first, first), (_second, second), echo) = (serve(), serve(), echo_server());
    let (status, stdout, stderr) = outcome(&format!("connect --json -x {first},{second} {echo}"), b"seven..");
    assert_eq!((status, stdout.as_str(), stderr.lines().count()), (Some(0), "seven..", 1), "{stderr}");
    let all = "o['method'], o['rep'], o['up'], o['down'], o['tries'], o['status'], o['error'], o['peer']";
    let table = [
        ("o['proxy']", second.clone()),
        ("' '.join(o['hops'])", format!("{first} {second}")),
        ("o['target']", echo.to_string()),
        (all, "('none', 0, 7, 7, 1, 0, None, None)".into()),
        ("o['ended_first']", "local".into()),
        ("o['bnd'].startswith('127.0.0.1:')", "True".into()),
        ("sorted(o['ms'])", "['accept', 'first_byte', 'login', 'method', 'reply', 'resolve', 'tcp']".into()),
        ("all(0 < o['ms'][p] < 5000 for p in ('tcp', 'method', 'reply', 'first_byte'))", "True".into()),
        ("o['ms']['login'] == o['ms']['accept'] == 0", "True".into()),
    ];
    for (expression, expected) in table {
        assert_eq!(eval_json(&stderr, expression), expected, "{expression}: {stderr}");
    }
}

#[test]
fn json_contains_the_error_and_no_other_line_is_printed() {
    if !is_installed("python3") {
        return;
    }
    let hostile = reply("05 00 00 03 07 22 5c c3 a9 \"nam\" 00 50");
    let refused = "o['status'], o['rep'], o['error'][-26:], o['bnd']";
    let cases = [
        (" -z", Some(reply("05 05 00 01 00*6")), refused, "(105, 5, 'connection refused (REP 5)', None)"),
        ("", Some("> {greeting}; < 05 ff".into()), "o['status'], o['rep'], o['up']", "(67, None, 0)"),
        (" -z", Some(hostile), "o['status'], o['rep']", "(0, 0)"),
        ("", None, "o['status'], o['method'], o['ended_first']", "(7, None, None)"),
    ];
    for (option, script, expression, expected) in cases {
        let proxy = script.map_or_else(closed_port, |script| ScriptedServer::start(&script).addr);
        let (_, _, stderr) = outcome(&format!("connect --json{option} -x {proxy} {TARGET}"), b"");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert_eq!(eval_json(&stderr, expression), expected, "{stderr}");
    }
}

#[test]
fn json_reports_ended_first_and_tries() {
    if !is_installed("python3") {
        return;
    }
    let closes = tcp_server(V4, |mut stream| drop(stream.write_all(b"bye")));
    let mut client = start(&format!("connect --json --direct {closes}"));
    let (status, stdout, stderr) = client.wait_exit(TIMEOUT);
    assert_eq!((status.code(), stdout), (Some(0), b"bye".to_vec()));
    let ended = eval_json(&stderr, "o['ended_first'], o['proxy'], o['method'], o['down']");
    assert_eq!(ended, "('remote', None, None, 3)");
    let (_, _, stderr) = outcome(&format!("connect --json --retry 300ms -x {} {TARGET}", closed_port()), b"");
    assert_eq!(eval_json(&stderr, "o['tries'] > 1, o['status']"), "(True, 7)");
    let (_server, proxy) = serve();
    let (_, _, stderr) = outcome(&format!("udp --json -n 1 -x {proxy} {}", udp_echo_server(V4)), b"four\n");
    assert_eq!(eval_json(&stderr, "o['up'], o['down'], o['status'], o['bnd'][:10]"), "(4, 4, 0, '127.0.0.1:')");
}
