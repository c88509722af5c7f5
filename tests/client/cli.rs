//! The command line: help, usage errors, exit statuses, stdout and stderr, and the editing of users files.
//! Other files test the clients' errors about proxies.

mod listen;
mod manual;
mod users;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use crate::*;

#[test]
fn help_and_version_are_printed_on_stdout_with_status_0() {
    let table: [(&str, &[&str]); 6] = [
        ("--help", &["serve", "connect", "bind", "udp"]),
        ("help", &["serve", "connect", "bind", "udp"]),
        ("serve --help", &["--listen", "--users", "--add-user", "--bind-timeout", "--drain-timeout", "--threads"]),
        ("connect --help", &["--proxy", "-x", "-w", "S5_PROXY", "ALL_PROXY", "127.0.0.1:1080"]),
        ("bind --help", &["--proxy", "-x", "-w"]),
        ("udp --help", &["--proxy", "-x", "-w", "--raw"]),
    ];
    for (args, words) in table {
        let (status, stdout, stderr) = outcome(args, b"");
        assert_eq!((status, stderr.as_str()), (Some(0), ""), "{args}");
        assert!(words.iter().all(|word| stdout.contains(word)), "{args}: {words:?} are not all in {stdout}");
    }
    assert_eq!(outcome("--version", b""), crate::success(&format!("s5 {}\n", env!("CARGO_PKG_VERSION"))));
    let lacks = "GSSAPI: yes, if the library is installed\nnsswitch: yes\n";
    let target = format!("target: {}-linux-gnu, dynamic\n", std::env::consts::ARCH);
    let verbose = format!("s5 {}\n{target}{lacks}", env!("CARGO_PKG_VERSION"));
    for line in ["--version -v", "-v --version"] {
        assert_eq!(outcome(line, b""), crate::success(&verbose), "{line}");
    }
}

/// Runs a shell script in which `$0` is the path of s5.
fn shell(script: &str) -> crate::Outcome {
    outcome_of(Command::new("sh").args(["-c", script, env!("CARGO_BIN_EXE_s5")]), b"")
}

#[test]
fn help_to_a_closed_pipe_does_not_panic() {
    assert_eq!(shell("\"$0\" --help | true; \"$0\" serve --help | head -n 1").2, "");
}

#[test]
fn usage_error_names_the_word() {
    let unknown = ["server", "-x 127.0.0.1 connect", "--nonsense", "serve argument", "bind a surplus"];
    for (line, word) in unknown.into_iter().zip(["server", "-x", "--nonsense", "argument", "surplus"]) {
        assert_line(line, 2, &[word]);
    }
    assert_line_of(&mut s5(), 2, &["mode", "serve", "connect", "bind", "udp"]);
    for mode in ["serve", "connect", "bind", "udp"] {
        assert_line(&format!("{mode} --nonsense"), 2, &["--nonsense"]);
        assert_line(&format!("{mode} -Q"), 2, &["-Q"]);
    }
    // Options without a value, and given twice.
    for (line, option) in [
        ("serve --listen", "--listen"),
        ("connect a:1 -w", "-w"),
        ("udp a:1 --proxy", "--proxy"),
        ("connect -w 1 -w 2 a:1", "-w"),
        ("serve --drain-timeout 1 --drain-timeout 2", "--drain-timeout"),
    ] {
        assert_line(line, 2, &[option]);
    }
}

#[test]
fn error_names_invalid_target() {
    let required = "a target is required: HOST:PORT, or HOST and PORT";
    let long = format!(" {}:1", "a".repeat(256));
    for mode in ["connect", "udp"] {
        let table: [(&str, &[&str]); 16] = [
            ("", &[required]),
            (" a 1 2", &["expected HOST:PORT, or HOST and PORT"]),
            (" example.org", &["target", "example.org", "expected HOST:PORT"]),
            (" ::1", &["target", "::1", "expected HOST:PORT"]),
            (" [::1]", &["target", "[::1]", "expected HOST:PORT"]),
            (" example.org:htp", &["target", "htp"]),
            (" example.org 65536", &["target", "65536"]),
            (" example.org -1", &["-1"]),
            (" example.org:", &["target", "port"]),
            (" :80", &["target", "host"]),
            ("  80", &["target", "host"]),
            (" example.org:0", &["target", "port", "0"]),
            (" [example.org]:80", &["target", "[example.org]"]),
            (" 12345::67890::1 80", &["target", "12345::67890::1"]),
            (&long, &["target", "256 bytes"]),
            (" a:-1", &["target"]),
        ];
        for (target, words) in table {
            assert_line(&format!("{mode}{target}"), 2, words);
        }
        for target in ["[::1:22", "a b:1", "a@b:1", "a/b:1", "1::2:3"] {
            assert_line_of(s5().args([mode, target]), 2, &["target"]);
        }
    }
    assert_line("bind example.org:x", 2, &["peer", "x"]);
    assert_line("bind ", 2, &["peer"]);
}

#[test]
fn usage_error_has_a_remedy_or_refers_to_the_help() {
    let too_many = "too many operands: expected HOST:PORT, or HOST and PORT (see s5 connect --help)";
    let not_a_url = "target: expected HOST:PORT, not a URL (-x takes the URL of a proxy)";
    let no_path = "a proxy URL has no path (write unix:/PATH for a Unix socket, and %2F for / in a password)";
    let table = [
        ("connect -lk 9999 a:80", "-l 'k': expected [ADDR:]PORT (-l takes a value: write other options before it)"),
        ("udp -l x a:80", "-l 'x': expected [ADDR:]PORT (-l takes a value: write other options before it)"),
        ("connect -l 127.0.0.1 7001", "-l '127.0.0.1': expected [ADDR:]PORT (write 127.0.0.1:PORT)"),
        ("udp -l ::1 7001", "-l '::1': expected [ADDR:]PORT (write [::1]:PORT)"),
        ("connect -l localhost a:1", "-l 'localhost': expected [ADDR:]PORT (write localhost:PORT)"),
        ("connect -x host:0 a:1", "--proxy: the port of a proxy must not be 0 (see s5 connect --help)"),
        ("serve --via u:p@host:0", "--via: the port of a proxy must not be 0 (see s5 serve --help)"),
        ("bind -x socks://h:1/x", &format!("--proxy: {no_path}")),
        ("serve --hop a=h/x", &format!("--hop a: {no_path}")),
        ("serve --hop a=|x", "--hop a: empty URL before or after , or | (see s5 serve --help)"),
        ("serve --via x||y", "--via: empty URL before or after , or | (see s5 serve --help)"),
        (
            "serve --outbound eth0",
            "--outbound 'eth0': expected an IPv4 or IPv6 address, without a port (see s5 serve --help)",
        ),
        ("restart-helper", "only s5 itself runs restart-helper (see s5 --help)"),
        ("connect --proxy-auth :p a:1", "--proxy-auth: the user name is empty (see s5 connect --help)"),
        ("connect -P :p a:1", "--proxy-user: the user name is empty (see s5 connect --help)"),
        (
            "connect --wait=x a:1",
            "--wait 'x': expected a time such as 10, 500ms, 1m30s or 2h, at most one year (see s5 connect --help)",
        ),
        (
            "serve --drain x",
            "--drain 'x': expected a time such as 10, 500ms, 1m30s or 2h, at most one year (see s5 serve --help)",
        ),
        ("connect --wait 1 --wait 2 a:1", "--wait '2': duplicate values provided (see s5 connect --help)"),
        ("udp -n 0 a:1", "-n '0': must be greater than 0 (see s5 udp --help)"),
        ("connect -l 9999", "a target is required: HOST:PORT, or HOST and PORT (-l forwards to it)"),
        ("udp", "a target is required: HOST:PORT, or HOST and PORT (see s5 udp --help)"),
        ("connect a 80 b", too_many),
        ("connect example.org:80 extra", too_many),
        ("connect [::1]:80 extra", too_many),
        ("connect socks5h://u:secret@example.org", not_a_url),
        ("connect socks5h://u:secret@example.org 80", not_a_url),
        ("serve --prot 1080", "unrecognized option --prot (see s5 serve --help)"),
        ("connect --porxy a b:1", "unrecognized option --porxy (did you mean --proxy?)"),
        ("connect -k a:1", "-k requires -l (see s5 connect --help)"),
        ("bind -w", "-w requires a value (see s5 bind --help)"),
        ("--nonsense", "unrecognized option --nonsense (see s5 --help)"),
        ("s://a:top@secret@b", "unrecognized mode s://…@b (expected one of serve, connect, bind, udp)"),
        ("connect --s://a:top@secret@b", "unrecognized option --s://…@b (see s5 connect --help)"),
        ("serve a:top@secret@b", "unrecognized argument: …@b (see s5 serve --help)"),
        ("--man --man=1", "--man does not take a value (see s5 --help)"),
        ("connect a:70000", "target: expected a port up to 65535, found \"70000\" (see s5 connect --help)"),
        ("udp a +7", "target: expected a port up to 65535, found \"+7\" (see s5 udp --help)"),
        ("connect", "a target is required: HOST:PORT, or HOST and PORT (see s5 connect --help)"),
    ];
    for (line, expected) in table {
        assert_eq!(outcome(line, b"").2, format!("s5: {expected}\n"), "{line}");
    }
}

/// Fails unless each value of an option is an error that names the option and the value.
fn assert_invalid(mode: &str, option: &str, values: &[&str]) {
    for value in values {
        assert_line_of(s5().args([mode, option, value]), 2, &[option, value]);
    }
}

#[test]
fn error_names_invalid_value_of_an_option() {
    let times = ["", "x", "-1", "1.2.3", ".", "1d", "1e400", "inf", "NaN", "ms", "1 s", "99999999999h"];
    let ranges = ["", "0", "65536", "1-", "2-1", "0-5", "1-65536", "a-b", "1-2-3", "+1-2"];
    let addrs = ["", "host", "host:", "host:65536", "::1:1080", "[::1]", "[host]:1", "unix:", ":1080", "-1", "*"];
    for option in ["--handshake-timeout", "--connect-timeout", "--bind-timeout", "--idle-timeout", "--drain-timeout"] {
        assert_invalid("serve", option, &times);
    }
    for mode in ["connect", "bind", "udp"] {
        assert_invalid(mode, "-w", &times);
    }
    for (mode, option) in
        [("connect", "-w"), ("bind", "-w"), ("serve", "--connect-timeout"), ("serve", "--idle-timeout")]
    {
        assert_invalid(mode, option, &["0"]);
    }
    for (option, values) in [
        ("--listen", &addrs[..]),
        ("--threads", &["0", "-1", "x", ""]),
        ("--max-connections", &["0", "-1", "1.5"]),
        ("--bind-ports", &ranges),
        ("--udp-ports", &ranges),
        ("--advertise", &["", "host", "1.2.3", "127.0.0.1:1"]),
        ("--advertise-bind", &["host"]),
        ("--advertise-udp", &["host"]),
        ("--udp-filtering", &["", "endpoint", "none"]),
        ("--rate", &["", "0", "k", "-1", "1T", "1K", "1 k", "99999999999999999999"]),
    ] {
        assert_invalid("serve", option, values);
    }
    for option in ["--advertise", "--advertise-bind", "--advertise-udp"] {
        let args = format!("serve {option} 192.0.2.1 {option} 192.0.2.2");
        assert_line(&args, 2, &[&format!("{option}: at most one IPv4 and one IPv6 address")]);
    }
}

#[test]
fn errors_escape_control_characters() {
    for args in ["connect \x1b[2J:1\n", "\x1b[2J", "serve --listen \x1b[2J\n", "bind a\rb:1"] {
        assert_line(args, 2, &[]);
        let controls = outcome(args, b"").2.chars().filter(char::is_ascii_control).count();
        assert_eq!(controls, 1, "control characters before the line end: {args:?}");
    }
}

/// Characters that hide or reorder text: bidirectional controls, zero-width characters, separators, fillers, tags.
const INVISIBLE: &str = "\u{202e}\u{2066}\u{200b}\u{200f}\u{ad}\u{61c}\u{180e}\u{2028}\u{2029}\u{2060}\u{feff}\u{fff9}\u{3164}\u{e0041}\u{9b}";

#[test]
fn text_that_hides_or_reorders_other_text_is_escaped() {
    let dir = temp_dir();
    let rule = format!("allow to=a{INVISIBLE}b");
    let rules = write_file(dir.path(), "rules", &rule);
    let users = write_file(dir.path(), "users", "");
    let (named, unix) = (format!("{}/x{INVISIBLE}", dir.path().display()), format!("unix:/x{INVISIBLE}"));
    let client = ["connect", "bind", "udp"].map(|mode| vec![mode, "-v", "-x", &unix, "a:1"]);
    let zone = format!("[fe80::1%{INVISIBLE}]:80");
    let user = format!("al{INVISIBLE}:x@{unix}");
    let lines = [
        &[INVISIBLE][..],
        &["connect", &named],
        &["connect", "--json", &named],
        &["connect", "--direct", &zone],
        &["connect", "--json", "-x", &unix, "a:1"],
        &["connect", "-x", &user, "a:1"],
        &["udp", &format!("--{named}")],
        &["bind", "--address-file", &format!("{named}/y")],
        &["connect", "-e", &named, "a:1"],
        &["serve", "--listen", &named],
        &["serve", "--listen", &format!("unix:{named}/y")],
        &["serve", "--rules", &named],
        &["serve", "--rules", &rules],
        &["serve", "--rule", &rule],
        &["serve", "--rule", &format!("deny user=a{INVISIBLE}b"), "--show-rules"],
        &["serve", "--explain", &format!("to=example.org:80 user=a{INVISIBLE}b")],
        &["serve", "--via", &format!("al{INVISIBLE}@127.0.0.1:1")],
        &["serve", "--users", &users, "--remove-user", INVISIBLE],
    ];
    for args in lines.into_iter().chain(client.iter().map(Vec::as_slice)) {
        let (_, stdout, stderr) = outcome_of(s5().args(args), b"");
        let printed = stdout + &stderr;
        assert_eq!(printed.chars().find(|c| *c != '\n' && INVISIBLE.contains(*c)), None, "{args:?}: {printed:?}");
        assert!(!printed.is_empty(), "{args:?}");
    }
    let visible = "e\u{301}\u{e9}\u{4e2d}\u{939}\u{93f}\u{2026}\u{1f600}";
    let (_, _, stderr) = outcome_of(s5().args(["serve", "--rules", visible]), b"");
    assert!(stderr.contains(&visible.replace('\u{301}', "\\u{301}")), "{stderr}");
}

#[test]
fn argument_that_is_not_utf8_is_a_usage_error() {
    assert_line_of(s5().arg("connect").arg(OsStr::from_bytes(b"--\xff\xfe")), 2, &[]);
}

#[test]
fn closed_stderr_does_not_change_the_exit_status() {
    for (script, status) in [("nonsense 2>&-", 2), ("-x unix:/nonexistent a:1 2>/dev/full", 7)] {
        assert_eq!(shell(&format!("exec \"$0\" connect {script}")), crate::failure(status, ""));
    }
}

#[test]
fn output_of_server_and_clients_does_not_contain_passwords() {
    let (_dir, users) = users_file(&[("alice", "topsecret")]);
    let server = Server::start(&["-v", "--users", &users]);
    let target = echo_server();
    for (passwd, expected) in [("topsecret", 0), ("wrongsecret", 67)] {
        let args = format!("connect -v -x alice:{passwd}@{} {target}", server.addr());
        let (status, _, stderr) = outcome(&args, b"x");
        assert_eq!((status, stderr.contains("secret")), (Some(expected), false), "{stderr}");
    }
    let log = server.wait_log(|log| log.matches("session").count() >= 2);
    assert!(log.contains("alice") && !log.contains("secret") && !log.contains("$2"), "{log}");
}
