//! The built program at its edges: help, complaints, exit statuses, stdout against stderr, and the users file's upkeep.
//! What the clients say about proxies is in client.rs.

mod common;
#[path = "common/scripted.rs"]
mod scripted;

#[path = "cli/listen.rs"]
mod listen;
#[path = "cli/manual.rs"]
mod manual;
#[path = "cli/users.rs"]
mod users;

use std::process::{Command, Output};

use common::{TIMEOUT, echo_server, run, s5, temp_dir, write_file};
use scripted::text;

fn s5_with(args: &[&str]) -> Output {
    run(s5().args(args), b"", TIMEOUT)
}

/// Fails unless the program says one line on stderr with all of these words in it, nothing on stdout, and exits with 2.
fn is_usage_error(args: &[&str], words: &[&str]) {
    let output = s5_with(args);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
    assert!(output.stdout.is_empty(), "{args:?}: {}", text(&output.stdout));
    assert!(said.starts_with("s5: ") && said.ends_with('\n') && said.lines().count() == 1, "{args:?}: {said:?}");
    for word in words {
        assert!(said.contains(word), "{args:?}: {word:?} is not named: {said}");
    }
}

#[test]
fn help_and_version_go_to_stdout_and_are_a_success() {
    let table: [(&[&str], &[&str]); 7] = [
        (&["--help"], &["serve", "connect", "bind", "udp"]),
        (&["help"], &["serve", "connect", "bind", "udp"]),
        (&["serve", "--help"], &["--listen", "--users", "--add-user", "--bind-timeout", "--drain", "--threads"]),
        (&["connect", "--help"], &["--proxy", "-x", "-w", "S5_PROXY", "ALL_PROXY", "127.0.0.1:1080"]),
        (&["bind", "--help"], &["--proxy", "-x", "-w"]),
        (&["udp", "--help"], &["--proxy", "-x", "-w", "--raw"]),
        (&["--version"], &[env!("CARGO_PKG_VERSION")]),
    ];
    for (args, words) in table {
        let output = s5_with(args);
        assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(0), ""), "{args:?}");
        let said = text(&output.stdout);
        for word in words {
            assert!(said.contains(word), "{args:?}: {word:?} is missing in {said}");
        }
    }
}

#[test]
fn the_version_is_one_line_with_the_programs_name() {
    assert_eq!(text(&s5_with(&["--version"]).stdout), format!("s5 {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn help_into_a_closed_pipe_is_no_disaster() {
    let script = "\"$0\" --help | true; \"$0\" serve --help | head -n 1";
    let output = Command::new("sh").args(["-c", script, env!("CARGO_BIN_EXE_s5")]).output().expect("sh runs");
    assert_eq!(text(&output.stderr), "");
}

#[test]
fn a_missing_or_unknown_mode_is_named() {
    is_usage_error(&[], &["mode", "serve", "connect", "bind", "udp"]);
    is_usage_error(&["server"], &["server"]);
    is_usage_error(&["-x", "127.0.0.1", "connect"], &["-x"]);
}

#[test]
fn an_unknown_flag_is_named() {
    for mode in ["serve", "connect", "bind", "udp"] {
        is_usage_error(&[mode, "--nonsense"], &["--nonsense"]);
        is_usage_error(&[mode, "-Q"], &["-Q"]);
    }
    is_usage_error(&["--nonsense"], &["--nonsense"]);
    is_usage_error(&["serve", "argument"], &["argument"]);
    is_usage_error(&["bind", "a", "surplus"], &["surplus"]);
}

#[test]
fn a_flag_without_its_value_is_named() {
    is_usage_error(&["serve", "--listen"], &["--listen"]);
    is_usage_error(&["connect", "a:1", "-w"], &["-w"]);
    is_usage_error(&["udp", "a:1", "--proxy"], &["--proxy"]);
}

#[test]
fn a_flag_given_twice_is_named_where_once_is_all() {
    is_usage_error(&["connect", "-w", "1", "-w", "2", "a:1"], &["-w"]);
    is_usage_error(&["serve", "--drain", "1", "--drain", "2"], &["--drain"]);
}

#[test]
fn a_target_that_makes_no_sense_is_named() {
    for mode in ["connect", "udp"] {
        is_usage_error(&[mode], &["target", "host:port"]);
        is_usage_error(&[mode, "a", "1", "2"], &["host:port"]);
        is_usage_error(&[mode, "example.org"], &["target", "example.org", "no port"]);
        is_usage_error(&[mode, "::1"], &["target", "::1", "no port"]);
        is_usage_error(&[mode, "[::1]"], &["target", "[::1]", "no port"]);
        is_usage_error(&[mode, "example.org:http"], &["target", "http"]);
        is_usage_error(&[mode, "example.org", "65536"], &["target", "65536"]);
        is_usage_error(&[mode, "example.org", "-1"], &["-1"]);
        is_usage_error(&[mode, "example.org:"], &["target", "port"]);
        is_usage_error(&[mode, ":80"], &["target", "host"]);
        is_usage_error(&[mode, "", "80"], &["target", "host"]);
        is_usage_error(&[mode, "example.org:0"], &["target", "port", "0"]);
        is_usage_error(&[mode, "[example.org]:80"], &["target", "[example.org]"]);
        is_usage_error(&[mode, "12345::67890::1", "80"], &["target", "12345::67890::1"]);
    }
    is_usage_error(&["bind", "example.org:x"], &["peer", "x"]);
    is_usage_error(&["bind", ""], &["peer"]);
}

#[test]
fn a_time_that_makes_no_sense_is_named() {
    for time in ["", "x", "-1", "1d", "1e400", "inf", "NaN", "ms", "1 s", "99999999999h"] {
        for flags in ["--handshake-timeout", "--connect-timeout", "--bind-timeout", "--idle-timeout", "--drain"] {
            is_usage_error(&["serve", flags, time], &[flags, time]);
        }
        for mode in ["connect", "bind", "udp"] {
            is_usage_error(&[mode, "-w", time, "a:1"], &["-w", time]);
        }
    }
    for args in [["connect", "-w"], ["bind", "-w"], ["serve", "--connect-timeout"], ["serve", "--idle-timeout"]] {
        is_usage_error(&[args[0], args[1], "0"], &[args[1], "0"]);
    }
}

#[test]
fn a_listening_address_that_makes_no_sense_is_named() {
    for addr in ["", "host", "host:", "host:65536", "::1:1080", "[::1]", "[host]:1", "unix:", ":1080", "-1", "*"] {
        is_usage_error(&["serve", "--listen", addr], &["--listen", addr]);
    }
}

#[test]
fn numbers_ranges_and_words_that_make_no_sense_are_named() {
    for (flag, values) in [
        ("--threads", &["0", "-1", "x", ""][..]),
        ("--max-connections", &["0", "-1", "1.5"]),
        ("--bind-ports", &["", "1", "2-1", "0-5", "1-65536", "a-b"]),
        ("--udp-ports", &["", "1", "2-1", "0-5", "1-65536", "a-b"]),
        ("--advertise", &["", "host", "1.2.3", "127.0.0.1:1"]),
        ("--udp-filtering", &["", "endpoint", "none"]),
    ] {
        for value in values {
            is_usage_error(&["serve", flag, value], &[flag, value]);
        }
    }
    is_usage_error(&["serve", "--advertise", "192.0.2.1", "--advertise", "192.0.2.2"], &["--advertise", "one"]);
}

#[test]
fn complaints_can_not_drive_a_terminal() {
    for args in
        [&["connect", "\x1b[2J:1\n"][..], &["\x1b[2J"], &["serve", "--listen", "\x1b[2J\n"], &["bind", "a\rb:1"]]
    {
        let output = s5_with(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        let controls = output.stderr.iter().filter(|octet| octet.is_ascii_control()).count();
        assert_eq!(controls, 1, "only the end of the line: {:?}", text(&output.stderr));
    }
}

#[test]
fn an_argument_that_is_not_utf8_is_a_usage_error() {
    use std::os::unix::ffi::OsStrExt as _;
    let word = std::ffi::OsStr::from_bytes(b"--\xff\xfe");
    let output = run(s5().arg("connect").arg(word), b"", TIMEOUT);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
    assert_eq!(text(&output.stderr).lines().count(), 1, "{}", text(&output.stderr));
}

#[test]
fn a_closed_stderr_leaves_the_status_to_tell() {
    let script = "exec \"$0\" connect nonsense 2>&-";
    let output = Command::new("sh").args(["-c", script, env!("CARGO_BIN_EXE_s5")]).output().expect("sh runs");
    assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0));
    let script = "exec \"$0\" connect -x unix:/nonexistent a:1 2>/dev/full";
    let output = Command::new("sh").args(["-c", script, env!("CARGO_BIN_EXE_s5")]).output().expect("sh runs");
    assert_eq!((output.status.code(), output.stdout.len()), (Some(7), 0));
}

#[test]
fn no_password_is_in_any_output_of_server_and_clients() {
    let folder = temp_dir();
    let hash = bcrypt::hash("topsecret", 4).expect("a hash");
    let users = write_file(folder.path(), "users", &format!("alice:{hash}\n"));
    let server = common::Server::start(&["-v", "--users", &users]);
    let target = echo_server().to_string();
    for (passwd, status) in [("topsecret", 0), ("wrongsecret", 67)] {
        let proxy = format!("alice:{passwd}@{}", server.addr());
        let output = run(s5().args(["connect", "-v", "-x", &proxy, &target]), b"x", TIMEOUT);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{said}");
        assert!(!said.contains("secret"), "{said}");
    }
    let log = server.wait_log(|log| log.matches("session").count() >= 2);
    assert!(log.contains("alice") && !log.contains("secret") && !log.contains(&hash), "{log}");
}
