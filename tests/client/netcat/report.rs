//! The JSON object that --json prints, parsed by Python.

use std::os::unix::process::ExitStatusExt as _;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::SIGINT;

use super::forward::{exchange, listening_address};
use crate::udp::socket;
use crate::*;

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
        ("o['ms']['login'] is o['ms']['accept'] is o['ms']['resolve'] is None", "True".into()),
        ("o['phase']", "transfer".into()),
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
    let times = "[name for name, time in o['ms'].items() if time is not None]";
    let cases = [
        (" -z", Some(reply("05 05 00 01 00*6")), refused, "(105, 5, 'connection refused (REP 5)', None)"),
        ("", Some("> {greeting}; < 05 ff".into()), "o['status'], o['rep'], o['up']", "(67, None, 0)"),
        (" -z", Some(hostile), "o['status'], o['rep']", "(0, 0)"),
        ("", None, "o['status'], o['method'], o['ended_first']", "(7, None, None)"),
        ("", None, "o['phase']", "tcp"),
        ("", None, times, "['tcp']"),
        ("", Some("> {greeting}; < 05 ff".into()), "o['phase']", "method"),
        (" --auth password -P a:b", Some("> {greeting}; < 05 02; > {login}; < 01 01".into()), "o['phase']", "login"),
        (" -z", Some(reply("05 05 00 01 00*6")), "o['phase']", "reply"),
        (" -z", Some(reply("05 05 00 01 00*6")), times, "['tcp', 'method', 'reply']"),
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
    let mut client = start(&format!("connect --json --linger 0 --direct {closes}"));
    let (status, stdout, stderr) = client.wait_exit(TIMEOUT);
    assert_eq!((status.code(), stdout), (Some(0), b"bye".to_vec()));
    let ended = eval_json(&stderr, "o['ended_first'], o['proxy'], o['method'], o['down']");
    assert_eq!(ended, "('remote', None, None, 3)");
    let (_, _, stderr) = outcome(&format!("connect --json --retry 1s -x {} {TARGET}", closed_port()), b"");
    assert_eq!(eval_json(&stderr, "o['tries'] > 1, o['status']"), "(True, 7)");
    let (_server, proxy) = serve();
    let (_, _, stderr) = outcome(&format!("udp --json -n 1 -x {proxy} {}", udp_echo_server(V4)), b"four\n");
    assert_eq!(eval_json(&stderr, "o['up'], o['down'], o['status'], o['bnd'][:10]"), "(4, 4, 0, '127.0.0.1:')");
}

#[test]
fn json_has_the_time_of_a_name_lookup_only_for_a_name() {
    let (server, echo) = (Server::start(&[]), echo_server());
    let dir = temp_dir();
    let unix = format!("unix:{}/proxy", dir.path().display());
    let _on_unix = crate::support::serve(&unix, 1, &[]);
    let ports = (server.addr().port(), echo.port());
    for (args, has_name) in [
        (format!("-x 127.0.0.1:{} 127.0.0.1:{}", ports.0, ports.1), false),
        (format!("-x localhost:{} 127.0.0.1:{}", ports.0, ports.1), true),
        (format!("-x 127.0.0.1:{} localhost:{}", ports.0, ports.1), false),
        (format!("-x 127.0.0.1:{} -R local localhost:{}", ports.0, ports.1), true),
        (format!("-x {unix} 127.0.0.1:{}", ports.1), false),
        (format!("--direct 127.0.0.1:{}", ports.1), false),
        (format!("--direct localhost:{}", ports.1), true),
    ] {
        let (_, _, stderr) = outcome(&format!("connect -z --json {args}"), b"");
        assert!(stderr.contains("\"ms\":{\"resolve\":"), "{stderr}");
        assert_eq!(!stderr.contains("\"resolve\":null"), has_name, "{args}: {stderr}");
    }
}

#[test]
fn json_replaces_usage_errors() {
    let (dir, taken) = (temp_dir(), listener(V4));
    let file = dir.path().join("object").display().to_string();
    for (args, status, word) in [
        ("connect --porxy a b", 2, "unrecognized option --porxy (did you mean --proxy?)"),
        ("connect -w x a:1", 2, "-w"),
        ("connect a:1 -w", 2, "-w requires a value"),
        ("connect", 2, "a target is required"),
        ("connect -z -F a:1", 2, "-z and -F cannot be combined"),
        ("connect -x host:port a:1", 2, "--proxy"),
        ("connect --proxy-auth-file /nonexistent a:1", 2, "/nonexistent"),
        ("bind a:1 b:1", 2, "too many operands"),
        ("bind -x 127.0.0.1:1 --address-file fd:77", 2, "fd:77"),
        ("udp --hex --raw a:1", 2, "cannot be combined"),
        (&format!("connect -l {} a:1", taken.1), 45, "listen on"),
        ("udp -l 192.0.2.9:1 a:1", 45, "listen on"),
    ] {
        let (mode, rest) = args.split_once(' ').unwrap_or((args, ""));
        let json = format!("{mode} --json {rest}");
        let (code, stdout, stderr) = outcome(json.trim(), b"");
        assert_eq!((code, stdout.as_str(), stderr.lines().count()), (Some(status), "", 1), "{args}: {stderr}");
        let expected = [format!("\"status\":{status},\"error\":\""), "\"phase\":null".into(), "\"tcp\":null".into()];
        assert!(expected.iter().all(|part| stderr.contains(part)) && stderr.contains(word), "{args}: {stderr}");
        assert!(stderr.starts_with("{\"proxy\":null,") && stderr.ends_with("}\n"), "{args}: {stderr}");
        // In a file, the object is there in addition to the message.
        let (_, _, stderr) = outcome(format!("{mode} --json={file} {rest}").trim(), b"");
        assert!(stderr.starts_with("s5: ") && stderr.contains(word), "{args}: {stderr}");
        let object = std::fs::read_to_string(&file).expect("the object is written");
        assert!(expected.iter().all(|part| object.contains(part)) && object.lines().count() == 1, "{args}: {object}");
    }
    let (_, _, stderr) = outcome("serve --json", b"");
    assert!(stderr.starts_with("s5: unrecognized option --json"), "{stderr}");
}

#[test]
fn json_is_all_that_bind_and_l_print_on_stderr() {
    let ((_server, proxy), dir, echo) = (serve(), temp_dir(), echo_server());
    let file = dir.path().join("address");
    let mut client = start(&format!("bind --json -x {proxy} --address-file {}", file.display()));
    let address = || std::fs::read_to_string(&file).unwrap_or_default();
    wait_until("the address is written", TIMEOUT, || address().ends_with('\n'));
    drop(TcpStream::connect(address().trim()).expect("the listener accepts"));
    client.close_stdin();
    let (_, _, stderr) = client.wait_exit(TIMEOUT);
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.contains("\"peer\":\"127.0.0.1:") && !stderr.contains("\"accept\":null"), "{stderr}");

    for options in ["", " -k"] {
        let at = closed_port();
        let mut client = start(&format!("connect --json -l {at}{options} -x {proxy} {echo}"));
        for _ in 0..if options.is_empty() { 1 } else { 2 } {
            let mut local = None;
            wait_until("the client listens", TIMEOUT, || {
                local = TcpStream::connect(at).ok();
                local.is_some()
            });
            let mut local = local.expect("connected");
            ping(&mut local, b"seven..");
        }
        let objects = if options.is_empty() { 1 } else { 2 };
        let stderr = client.stderr(|stderr| stderr.lines().count() >= objects && stderr.ends_with('\n'));
        assert_eq!(stderr.lines().count(), objects, "{stderr}");
        for line in stderr.lines() {
            let parts = ["\"phase\":\"transfer\"", "\"up\":7,\"down\":7,", "\"status\":0,"];
            assert!(parts.iter().all(|part| line.contains(part)), "{line}");
        }
        let is_running = client.is_running();
        assert!(is_running || options.is_empty(), "{stderr}");
    }
}

#[test]
fn json_can_be_written_to_a_file_or_a_descriptor() {
    if !is_installed("python3") {
        return;
    }
    let ((_server, proxy), dir) = (serve(), temp_dir());
    let (file, echo, down) = (dir.path().join("object"), echo_server(), closed_port());
    let object = || std::fs::read_to_string(&file).expect("the object is written");
    for (target, status, message) in [(echo, 0, ""), (down, 105, "connection refused (REP 5)\n")] {
        let args = format!("connect --json={} -x {proxy} {target}", file.display());
        let (code, _, stderr) = outcome(&args, b"seven..");
        assert!(code == Some(status) && stderr.ends_with(message) && stderr.is_empty() == (status == 0), "{stderr}");
        assert_eq!(object().lines().count(), 1, "the object of an earlier run is still there");
        assert_eq!(eval_json(&object(), "o['status'], o['target']"), format!("({status}, '{target}')"));
    }
    let script = format!("exec \"$0\" connect --json=fd:3 -x {proxy} {echo} 3>\"$1\"");
    let mut shell = Command::new("sh");
    shell.args(["-c", &script, env!("CARGO_BIN_EXE_s5")]).arg(&file);
    assert_eq!(outcome_of(&mut shell, b"seven.."), crate::success("seven.."));
    assert_eq!(eval_json(&object(), "o['status'], o['up']"), "(0, 7)");
    for (value, status) in [("/nonexistent/object", 23), ("fd:77", 2), ("fd:x", 2), ("fd:1", 2), ("", 23)] {
        assert_line(&format!("connect --json={value} -x {proxy} {echo}"), status, &[&format!("--json={value}: ")]);
    }
    assert_line(&format!("connect --json=/dev/full -x {proxy} {echo}"), 23, &["--json", "no space left on device"]);
}

fn send(signal: &str, client: &RunningProgram) {
    let pid = client.pid().to_string();
    assert!(Command::new("kill").args(["-s", signal, &pid]).status().expect("kill runs").success());
}

#[test]
fn client_that_was_started_with_signals_ignored_outlives_them() {
    let script = format!("trap '' INT TERM; exec \"$0\" connect --json --direct {}", echo_server());
    let mut client = RunningProgram::start(Command::new("sh").args(["-c", &script, env!("CARGO_BIN_EXE_s5")]));
    client.write(b"1");
    client.stdout(|stdout| stdout == b"1");
    ["INT", "TERM"].iter().for_each(|signal| send(signal, &client));
    client.write(b"2");
    client.stdout(|stdout| stdout == b"12");
    client.close_stdin();
    let (status, _, stderr) = client.wait_exit(TIMEOUT);
    assert!(status.success() && eval_json(&stderr, "o['up'], o['status'], o['error']") == "(2, 0, None)", "{stderr}");
}

#[test]
fn signal_ends_the_client_after_the_object_of_each_session() {
    // A shell that runs the tests in the background may ignore SIGINT. Programs inherit that, but no handler.
    let is_default = Arc::new(AtomicBool::new(true));
    signal_hook::flag::register_conditional_default(SIGINT, is_default).expect("signal handled");
    let (echo, udp_echo) = (echo_server(), udp_echo_server(V4));
    for (signal, number) in [("TERM", 15), ("INT", 2)] {
        let ends = |args: &str, count: usize, up: &str, prepare: &dyn Fn(&mut RunningProgram)| {
            let mut client = start(args);
            prepare(&mut client);
            send(signal, &client);
            let (status, _, stderr) = client.wait_exit(TIMEOUT);
            assert_eq!(status.signal(), Some(number), "{args}: {stderr}");
            let reported = stderr.lines().filter(|line| {
                let ended = format!("\"status\":{},\"error\":", 128 + number);
                line.contains(&ended) && line.contains(&format!(": ended by SIG{signal}\"")) && line.contains(up)
            });
            assert_eq!(reported.count(), count, "{args}: {stderr}");
            assert_eq!(stderr.lines().filter(|line| line.starts_with('{')).count(), count, "{args}: {stderr}");
        };
        let silent = ScriptedServer::start("> {greeting}; > ...");
        ends(&format!("connect --json -x {} a:1", silent.addr), 1, "\"phase\":\"method\"", &|_| drop(silent.message()));
        ends(&format!("connect --json --direct {echo}"), 1, "\"up\":5", &|client| {
            client.write(b"hello");
            client.stdout(|stdout| stdout == b"hello");
        });
        ends(&format!("udp --json --direct {udp_echo}"), 1, "\"up\":5", &|client| {
            client.write(b"hello\n");
            client.stdout(|stdout| stdout == b"hello\n");
        });
        ends(&format!("udp -l 0 --json -v --direct {udp_echo}"), 2, "\"up\":5", &|client| {
            let at = listening_address(client);
            [socket(), socket()].iter().for_each(|socket| exchange(socket, at, b"hello"));
        });
        let dir = temp_dir();
        let objects = dir.path().join("objects");
        let mut forward = start(&format!("connect --json={} -k -l 0 --direct {echo}", objects.display()));
        let listening = forward.stderr(|stderr| stderr.ends_with('\n'));
        let at = listening.trim_end().rsplit(' ').next().expect("an address");
        // More than an executor runs in a turn.
        let mut streams = [(); 150].map(|()| TcpStream::connect(at).expect("the listener accepts"));
        for stream in &mut streams {
            stream.write_all(b"hello").expect("data sent");
            assert_eq!(read_exact(stream, 5), b"hello");
        }
        send(signal, &forward);
        assert_eq!(forward.wait_exit(TIMEOUT).0.signal(), Some(number));
        let written = fs::read_to_string(&objects).expect("the file exists");
        assert_eq!(written.matches("\"up\":5,\"down\":5").count(), 150, "{written}");
        assert_eq!(written.lines().count(), 150, "{written}");
    }
    for (mode, has_message) in [("connect --json -k", false), ("connect --json=/dev/null", true), ("udp --json", false)]
    {
        let (status, _, stderr) = outcome(&format!("{mode} -l 0 -m 100ms --direct {echo}"), b"");
        let last = stderr.lines().last().unwrap_or_default();
        assert_eq!((status, last.ends_with(": timed out after 100ms")), (Some(28), has_message), "{stderr}");
        assert!(!stderr.contains('{'), "{stderr}");
    }
}
