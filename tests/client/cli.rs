//! The command line: help, usage errors, exit statuses, stdout and stderr, and the editing of users files.
//! Other files test the clients' errors about proxies.

mod listen;
mod manual;
mod users;

use std::process::{Command, Output};

use crate::support::scripted::text;
use crate::support::{TIMEOUT, echo_server, run, s5, temp_dir, write_file};

fn run_s5(args: &[&str]) -> Output {
    run(s5().args(args), b"", TIMEOUT)
}

/// Fails unless s5 exits with 2 and prints only one line, on stderr, that contains all words.
fn assert_usage_error(args: &[&str], words: &[&str]) {
    let output = run_s5(args);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
    assert!(output.stdout.is_empty(), "{args:?}: {}", text(&output.stdout));
    assert!(
        stderr.starts_with("s5: ") && stderr.ends_with('\n') && stderr.lines().count() == 1,
        "{args:?}: {stderr:?}"
    );
    for word in words {
        assert!(stderr.contains(word), "{args:?}: {word:?} is missing in: {stderr}");
    }
}

#[test]
fn help_and_version_are_printed_on_stdout_with_status_0() {
    let table: [(&[&str], &[&str]); 7] = [
        (&["--help"], &["serve", "connect", "bind", "udp"]),
        (&["help"], &["serve", "connect", "bind", "udp"]),
        (
            &["serve", "--help"],
            &["--listen", "--users", "--add-user", "--bind-timeout", "--drain-timeout", "--threads"],
        ),
        (&["connect", "--help"], &["--proxy", "-x", "-w", "S5_PROXY", "ALL_PROXY", "127.0.0.1:1080"]),
        (&["bind", "--help"], &["--proxy", "-x", "-w"]),
        (&["udp", "--help"], &["--proxy", "-x", "-w", "--raw"]),
        (&["--version"], &[env!("CARGO_PKG_VERSION")]),
    ];
    for (args, words) in table {
        let output = run_s5(args);
        assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(0), ""), "{args:?}");
        let stdout = text(&output.stdout);
        for word in words {
            assert!(stdout.contains(word), "{args:?}: {word:?} is missing in {stdout}");
        }
    }
}

#[test]
fn version_is_one_line_with_the_program_name() {
    assert_eq!(text(&run_s5(&["--version"]).stdout), format!("s5 {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn help_to_a_closed_pipe_does_not_panic() {
    let script = "\"$0\" --help | true; \"$0\" serve --help | head -n 1";
    let output = Command::new("sh").args(["-c", script, env!("CARGO_BIN_EXE_s5")]).output().expect("sh runs");
    assert_eq!(text(&output.stderr), "");
}

#[test]
fn error_names_missing_or_unknown_mode() {
    assert_usage_error(&[], &["mode", "serve", "connect", "bind", "udp"]);
    assert_usage_error(&["server"], &["server"]);
    assert_usage_error(&["-x", "127.0.0.1", "connect"], &["-x"]);
}

#[test]
fn error_names_unknown_option() {
    for mode in ["serve", "connect", "bind", "udp"] {
        assert_usage_error(&[mode, "--nonsense"], &["--nonsense"]);
        assert_usage_error(&[mode, "-Q"], &["-Q"]);
    }
    assert_usage_error(&["--nonsense"], &["--nonsense"]);
    assert_usage_error(&["serve", "argument"], &["argument"]);
    assert_usage_error(&["bind", "a", "surplus"], &["surplus"]);
}

#[test]
fn error_names_option_without_value() {
    assert_usage_error(&["serve", "--listen"], &["--listen"]);
    assert_usage_error(&["connect", "a:1", "-w"], &["-w"]);
    assert_usage_error(&["udp", "a:1", "--proxy"], &["--proxy"]);
}

#[test]
fn error_names_option_given_twice() {
    assert_usage_error(&["connect", "-w", "1", "-w", "2", "a:1"], &["-w"]);
    assert_usage_error(&["serve", "--drain-timeout", "1", "--drain-timeout", "2"], &["--drain-timeout"]);
}

#[test]
fn error_names_invalid_target() {
    for mode in ["connect", "udp"] {
        assert_usage_error(&[mode], &["a target is required: HOST:PORT, or HOST and PORT"]);
        assert_usage_error(&[mode, "a", "1", "2"], &["expected HOST:PORT, or HOST and PORT"]);
        assert_usage_error(&[mode, "example.org"], &["target", "example.org", "expected HOST:PORT"]);
        assert_usage_error(&[mode, "::1"], &["target", "::1", "expected HOST:PORT"]);
        assert_usage_error(&[mode, "[::1]"], &["target", "[::1]", "expected HOST:PORT"]);
        assert_usage_error(&[mode, "example.org:http"], &["target", "http"]);
        assert_usage_error(&[mode, "example.org", "65536"], &["target", "65536"]);
        assert_usage_error(&[mode, "example.org", "-1"], &["-1"]);
        assert_usage_error(&[mode, "example.org:"], &["target", "port"]);
        assert_usage_error(&[mode, ":80"], &["target", "host"]);
        assert_usage_error(&[mode, "", "80"], &["target", "host"]);
        assert_usage_error(&[mode, "example.org:0"], &["target", "port", "0"]);
        assert_usage_error(&[mode, "[example.org]:80"], &["target", "[example.org]"]);
        assert_usage_error(&[mode, "12345::67890::1", "80"], &["target", "12345::67890::1"]);
        assert_usage_error(&[mode, &format!("{}:1", "a".repeat(256))], &["target", "256 bytes"]);
        for target in ["[::1:22", "a b:1", "a@b:1", "a/b:1", "a:-1", "1::2:3"] {
            assert_usage_error(&[mode, target], &["target"]);
        }
    }
    assert_usage_error(&["bind", "example.org:x"], &["peer", "x"]);
    assert_usage_error(&["bind", ""], &["peer"]);
}

#[test]
fn usage_error_has_a_remedy_or_refers_to_the_help() {
    let too_many = "too many operands: expected HOST:PORT, or HOST and PORT (see s5 connect --help)";
    let not_a_url = "target: expected HOST:PORT, not a URL (-x takes the URL of a proxy)";
    let table = [
        ("connect -lk 9999 a:80", "-l 'k': expected [ADDR:]PORT (-l takes a value: write other options before it)"),
        ("udp -l x a:80", "-l 'x': expected [ADDR:]PORT (-l takes a value: write other options before it)"),
        ("connect -l 9999", "a target is required: HOST:PORT, or HOST and PORT (-l forwards to it)"),
        ("udp", "a target is required: HOST:PORT, or HOST and PORT (see s5 udp --help)"),
        ("connect a 80 b", too_many),
        ("connect example.org:80 extra", too_many),
        ("connect [::1]:80 extra", too_many),
        ("connect http://example.org/", not_a_url),
        ("connect socks5h://u:secret@example.org 80", not_a_url),
        ("serve --port 1080", "unrecognized option --port (see s5 serve --help)"),
        ("connect --porxy a b:1", "unrecognized option --porxy (did you mean --proxy?)"),
        ("connect -k a:1", "-k requires -l (see s5 connect --help)"),
        ("bind -w", "-w requires a value (see s5 bind --help)"),
        ("--nonsense", "unrecognized option --nonsense (see s5 --help)"),
        ("s://a:secret@b", "unrecognized mode s://…@b (expected one of serve, connect, bind, udp)"),
        ("connect --s://a:secret@b", "unrecognized option --s://…@b (see s5 connect --help)"),
        ("serve a:secret@b", "unrecognized argument: …@b (see s5 serve --help)"),
        ("--man --man=1", "--man does not take a value (see s5 --help)"),
        ("connect", "a target is required: HOST:PORT, or HOST and PORT (see s5 connect --help)"),
    ];
    for (line, expected) in table {
        let args: Vec<&str> = line.split(' ').collect();
        assert_eq!(text(&run_s5(&args).stderr), format!("s5: {expected}\n"), "{line}");
    }
}

#[test]
fn error_names_invalid_time() {
    for time in ["", "x", "-1", "1.2.3", ".", "1d", "1e400", "inf", "NaN", "ms", "1 s", "99999999999h"] {
        for flag in ["--handshake-timeout", "--connect-timeout", "--bind-timeout", "--idle-timeout", "--drain-timeout"]
        {
            assert_usage_error(&["serve", flag, time], &[flag, time]);
        }
        for mode in ["connect", "bind", "udp"] {
            assert_usage_error(&[mode, "-w", time, "a:1"], &["-w", time]);
        }
    }
    for args in [["connect", "-w"], ["bind", "-w"], ["serve", "--connect-timeout"], ["serve", "--idle-timeout"]] {
        assert_usage_error(&[args[0], args[1], "0"], &[args[1], "0"]);
    }
}

#[test]
fn error_names_invalid_listen_address() {
    for addr in ["", "host", "host:", "host:65536", "::1:1080", "[::1]", "[host]:1", "unix:", ":1080", "-1", "*"] {
        assert_usage_error(&["serve", "--listen", addr], &["--listen", addr]);
    }
}

#[test]
fn error_names_invalid_numbers_ranges_and_keywords() {
    for (flag, values) in [
        ("--threads", &["0", "-1", "x", ""][..]),
        ("--max-connections", &["0", "-1", "1.5"]),
        ("--bind-ports", &["", "1", "2-1", "0-5", "1-65536", "a-b", "1-2-3", "+1-2"]),
        ("--udp-ports", &["", "1", "2-1", "0-5", "1-65536", "a-b", "1-2-3", "+1-2"]),
        ("--advertise", &["", "host", "1.2.3", "127.0.0.1:1"]),
        ("--udp-filtering", &["", "endpoint", "none"]),
        ("--rate", &["", "0", "k", "-1", "1T", "1K", "1 k", "99999999999999999999"]),
    ] {
        for value in values {
            assert_usage_error(&["serve", flag, value], &[flag, value]);
        }
    }
    assert_usage_error(&["serve", "--advertise", "192.0.2.1", "--advertise", "192.0.2.2"], &["--advertise", "one"]);
}

#[test]
fn errors_escape_control_characters() {
    for args in
        [&["connect", "\x1b[2J:1\n"][..], &["\x1b[2J"], &["serve", "--listen", "\x1b[2J\n"], &["bind", "a\rb:1"]]
    {
        let output = run_s5(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        let controls = output.stderr.iter().filter(|byte| byte.is_ascii_control()).count();
        assert_eq!(controls, 1, "control characters before the line end: {:?}", text(&output.stderr));
    }
}

#[test]
fn argument_that_is_not_utf8_is_a_usage_error() {
    use std::os::unix::ffi::OsStrExt as _;
    let word = std::ffi::OsStr::from_bytes(b"--\xff\xfe");
    let output = run(s5().arg("connect").arg(word), b"", TIMEOUT);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
    assert_eq!(text(&output.stderr).lines().count(), 1, "{}", text(&output.stderr));
}

#[test]
fn closed_stderr_does_not_change_the_exit_status() {
    let script = "exec \"$0\" connect nonsense 2>&-";
    let output = Command::new("sh").args(["-c", script, env!("CARGO_BIN_EXE_s5")]).output().expect("sh runs");
    assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0));
    let script = "exec \"$0\" connect -x unix:/nonexistent a:1 2>/dev/full";
    let output = Command::new("sh").args(["-c", script, env!("CARGO_BIN_EXE_s5")]).output().expect("sh runs");
    assert_eq!((output.status.code(), output.stdout.len()), (Some(7), 0));
}

#[test]
fn output_of_server_and_clients_does_not_contain_passwords() {
    let dir = temp_dir();
    let hash = bcrypt::hash("topsecret", 4).expect("password hashed");
    let users = write_file(dir.path(), "users", &format!("alice:{hash}\n"));
    let server = crate::support::Server::start(&["-v", "--users", &users]);
    let target = echo_server().to_string();
    for (passwd, status) in [("topsecret", 0), ("wrongsecret", 67)] {
        let proxy = format!("alice:{passwd}@{}", server.addr());
        let output = run(s5().args(["connect", "-v", "-x", &proxy, &target]), b"x", TIMEOUT);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{stderr}");
        assert!(!stderr.contains("secret"), "{stderr}");
    }
    let log = server.wait_log(|log| log.matches("session").count() >= 2);
    assert!(log.contains("alice") && !log.contains("secret") && !log.contains(&hash), "{log}");
}
