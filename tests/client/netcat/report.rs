//! The JSON object that --json prints, parsed by Python.

use std::process::Command;

use crate::support::scripted::{ScriptedServer, Step, reply_with, send, text};
use crate::support::{Server, TIMEOUT, closed_port, echo_server, is_installed, run, s5};

/// Evaluates a Python expression on `o`, the object in the last line of stderr.
fn eval_json(stderr: &[u8], expression: &str) -> String {
    let line = text(stderr).lines().last().unwrap_or_default().to_owned();
    let script = "import json,sys\no=json.loads(sys.argv[1])\nprint(eval(sys.argv[2]))";
    let output = run(Command::new("python3").args(["-c", script, &line, expression]), b"", TIMEOUT);
    assert!(output.status.success(), "{line}: {}", text(&output.stderr));
    text(&output.stdout).trim_end().to_owned()
}

#[test]
fn json_reports_route_byte_counts_and_times() {
    if !is_installed("python3") {
        return;
    }
    let (first, second, echo) = (Server::start(&[]), Server::start(&[]), echo_server().to_string());
    let chain = format!("{},{}", first.addr(), second.addr());
    let output = run(s5().args(["connect", "--json", "-x", &chain, &echo]), b"seven..", TIMEOUT);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "seven..".into()));
    assert_eq!(text(&output.stderr).lines().count(), 1, "more than one line");
    let table = [
        ("o['proxy']", second.addr().to_string()),
        ("' '.join(o['hops'])", format!("{} {}", first.addr(), second.addr())),
        ("o['target']", echo),
        (
            "o['method'], o['rep'], o['up'], o['down'], o['tries'], o['status'], o['error'], o['peer']",
            "('none', 0, 7, 7, 1, 0, None, None)".into(),
        ),
        ("o['ended_first']", "local".into()),
        ("o['bnd'].startswith('127.0.0.1:')", "True".into()),
        ("sorted(o['ms'])", "['accept', 'first_byte', 'login', 'method', 'reply', 'resolve', 'tcp']".into()),
        ("all(0 < o['ms'][p] < 5000 for p in ('tcp', 'method', 'reply', 'first_byte'))", "True".into()),
        ("o['ms']['login'] == o['ms']['accept'] == 0", "True".into()),
    ];
    for (expression, expected) in table {
        assert_eq!(eval_json(&output.stderr, expression), expected, "{expression}: {}", text(&output.stderr));
    }
}

#[test]
fn json_contains_the_error_and_no_other_line_is_printed() {
    if !is_installed("python3") {
        return;
    }
    let hostile = [&[5, 0, 0, 3, 7][..], b"\"\\\xc3\xa9nam", &[0, 80]].concat();
    let down = closed_port().to_string();
    let cases: [(&[&str], Vec<Step>, &str, &str); 4] = [
        (
            &["-z"],
            reply_with(&[5, 5, 0, 1, 0, 0, 0, 0, 0, 0]),
            "o['status'], o['rep'], o['error'][-26:], o['bnd']",
            "(105, 5, 'connection refused (REP 5)', None)",
        ),
        (&[], vec![Step::Greeting, send(&[5, 0xff])], "o['status'], o['rep'], o['up']", "(67, None, 0)"),
        (&["-z"], reply_with(&hostile), "o['status'], o['rep']", "(0, 0)"),
        (&["-x", &down], vec![], "o['status'], o['method'], o['ended_first']", "(7, None, None)"),
    ];
    for (args, script, expression, expected) in cases {
        let mut command = s5();
        command.args(["connect", "--json"]).args(args);
        let proxy = ScriptedServer::start(script);
        if !args.contains(&"-x") {
            command.args(["-x", &proxy.url()]);
        }
        let output = run(command.arg("target.example:80"), b"", TIMEOUT);
        assert_eq!(text(&output.stderr).lines().count(), 1, "{}", text(&output.stderr));
        assert_eq!(eval_json(&output.stderr, expression), expected, "{}", text(&output.stderr));
    }
}

#[test]
fn json_reports_ended_first_and_tries() {
    if !is_installed("python3") {
        return;
    }
    let closes = crate::support::tcp_server([127, 0, 0, 1].into(), |mut stream| {
        let _ = std::io::Write::write_all(&mut stream, b"bye");
    });
    let mut client = crate::support::scripted::RunningProgram::start(s5().args([
        "connect",
        "--json",
        "--direct",
        &closes.to_string(),
    ]));
    let (status, stdout, stderr) = client.wait_exit(TIMEOUT);
    assert_eq!((status.code(), stdout), (Some(0), b"bye".to_vec()));
    assert_eq!(
        eval_json(stderr.as_bytes(), "o['ended_first'], o['proxy'], o['method'], o['down']"),
        "('remote', None, None, 3)"
    );
    let down = closed_port().to_string();
    let output = run(s5().args(["connect", "--json", "--retry", "300ms", "-x", &down, "a.example:1"]), b"", TIMEOUT);
    assert_eq!(eval_json(&output.stderr, "o['tries'] > 1, o['status']"), "(True, 7)");
    let server = Server::start(&[]);
    let args = ["udp", "--json", "-n", "1", "-x", &server.addr().to_string()];
    let echo = crate::support::udp_echo_server([127, 0, 0, 1].into()).to_string();
    let output = run(s5().args(args).arg(&echo), b"four\n", TIMEOUT);
    assert_eq!(eval_json(&output.stderr, "o['up'], o['down'], o['status'], o['bnd'][:10]"), "(4, 4, 0, '127.0.0.1:')");
}
