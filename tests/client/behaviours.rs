//! `s5 connect` against every row of the behaviour table: exit status, message and stdout. Also: every exit status
//! occurs, and README.md in this directory has all rows.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

use s5::cmd::ExitStatus;

use crate::support::scripted::text;
use crate::support::{Server, TIMEOUT, closed_port, echo_server, in_namespace, reset, run, s5, tcp_server, write_file};
use crate::table::{Behaviour, SHORT_TIMEOUT, behaviours};

/// The command of s5 for a row.
pub fn client(row: &Behaviour, host: &str, port: u16) -> Command {
    let mut command = s5();
    let wait = if row.status == 28 && !row.has("idle") { SHORT_TIMEOUT } else { "10" };
    command.env("CI", "true").args(["connect", "-w", wait, "-x", &format!("{}{host}:{port}", row.userinfo)]);
    if row.has("idle") {
        command.args(["-i", SHORT_TIMEOUT]);
    }
    command.args(row.target.split(' '));
    command
}

fn check(row: &Behaviour) {
    let name = row.name;
    let outcome = row.run(TIMEOUT, client);
    assert_eq!(outcome.status, Some(row.status), "{name}: {}", outcome.stderr);
    if row.status == 2 {
        assert!(outcome.stderr.contains(&row.message), "{name}: {}", outcome.stderr);
        assert_eq!(outcome.stderr.lines().count(), 1, "{name}: {}", outcome.stderr);
    } else if row.message.is_empty() {
        assert_eq!(outcome.stderr, "", "{name}");
    } else {
        assert_eq!(outcome.stderr, format!("s5: proxy {}: {}\n", outcome.addr, row.message), "{name}");
    }
    if !row.has("closed") {
        assert_eq!(text(&outcome.stdout), row.stdout, "{name}");
    }
    if let Some(request) = &row.request {
        assert_eq!(outcome.messages.last(), Some(request), "{name}");
    }
}

#[test]
fn connect_has_the_status_and_message_of_every_table_row() {
    let rows = behaviours();
    let rows = &rows;
    let next = std::sync::atomic::AtomicUsize::new(0);
    // Most rows wait for timeouts. With more than 8 threads, a slow machine could miss them.
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while let Some(row) = rows.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) {
                    check(row);
                }
            });
        }
    });
}

#[test]
fn row_names_are_unique() {
    let rows = behaviours();
    let names: BTreeSet<&str> = rows.iter().map(|row| row.name).collect();
    assert_eq!(names.len(), rows.len());
}

/// Runs a shell script with `$S5` set to the program. Returns its status and stderr.
fn shell(script: &str) -> (i32, String) {
    let mut command = Command::new("sh");
    command.args(["-c", script]).env("S5", env!("CARGO_BIN_EXE_s5"));
    let output = run(&mut command, b"", TIMEOUT);
    (output.status.code().expect("a signal did not kill it"), text(&output.stderr))
}

/// Runs a command for each of the other statuses, which no row of the table has. Returns them.
fn run_other_statuses(dir: &Path) -> Vec<u8> {
    let server = Server::start(&[]);
    let proxy = server.addr();
    let echo = echo_server();
    // Resets after the first byte has arrived, and so not during connect(2).
    let resets = tcp_server([127, 0, 0, 1].into(), |mut stream| {
        let _ = stream.read(&mut [0; 16]);
        reset(stream);
    });
    let down = closed_port();
    let plain = write_file(dir, "plain", "not a program");
    let dir = dir.display();
    let s5 = |args: String| format!("\"$S5\" {args}");
    let cases = vec![
        (0, "", s5(format!("connect -z -x {proxy} {echo}"))),
        (2, "unrecognized option --porxy (did you mean --proxy?)", s5("connect --porxy a b".into())),
        (7, "direct: connecting to the target, for", s5(format!("connect --direct {down}"))),
        (26, "read from stdin: is a directory", s5(format!("connect -x {proxy} {echo} < {dir}"))),
        (26, "not hexadecimal", format!("echo xyz | {}", s5(format!("udp --hex -x {proxy} {echo}")))),
        (
            28,
            "received 0 of 1 answers in time",
            format!("echo x | {}", s5(format!("udp -n 1 -w 100ms -x {proxy} {down}"))),
        ),
        (
            45,
            "source address or port not available on this machine",
            s5(format!("connect -s 192.0.2.9 -x {proxy} {echo}")),
        ),
        (45, "listen on", s5(format!("connect -l 192.0.2.9:1 -x {proxy} {echo}"))),
        (
            55,
            "write error: datagram too large: the limit is 65507 bytes",
            format!("head -c 65528 /dev/zero | {}", s5(format!("udp -x {proxy} {echo}"))),
        ),
        (
            56,
            "read error: connection reset",
            format!("echo x | {}", s5(format!("connect --direct --no-shutdown {resets}"))),
        ),
        (126, "permission denied", s5(format!("connect -x {proxy} -e {plain} {echo}"))),
        (127, "no such file", s5(format!("connect -x {proxy} -e {dir}/nothing {echo}"))),
        (141, "", format!("{{ yes | {}; echo $? >&2; }} | true", s5(format!("connect -x {proxy} {echo}")))),
    ];
    let mut found = Vec::new();
    for (status, message, script) in cases {
        let (code, stderr) = shell(&script);
        if status == 141 {
            assert_eq!(stderr.trim(), "141", "{script}");
        } else {
            assert_eq!(code, i32::from(status), "{script}: {stderr}");
            assert!(stderr.contains(message), "{script}: {stderr}");
            assert_eq!(stderr.lines().count(), usize::from(status != 0), "{script}: {stderr}");
        }
        found.push(status);
    }
    found
}

/// Runs `s5 connect -F` after the receiver has closed its Unix socket. Returns the status.
fn pass_socket_to_closed_receiver() -> u8 {
    let (stdout, receiver) = UnixStream::pair().expect("socket pair created");
    drop(receiver);
    let mut command = s5();
    command.args(["connect", "-F", "--direct", &echo_server().to_string()]).stdout(Stdio::from(OwnedFd::from(stdout)));
    let output = command.stderr(Stdio::piped()).spawn().and_then(Child::wait_with_output).expect("s5 runs");
    assert!(text(&output.stderr).contains("pass the socket: broken pipe"), "{}", text(&output.stderr));
    output.status.code().and_then(|code| u8::try_from(code).ok()).expect("a signal did not kill it")
}

#[test]
fn every_exit_status_occurs() {
    let hosts = "127.0.0.1 localhost\n";
    let resolv = "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n";
    if !in_namespace("behaviours::every_exit_status_occurs", hosts, resolv) {
        return;
    }
    let mut seen: BTreeSet<u8> = behaviours().iter().filter_map(|row| u8::try_from(row.status).ok()).collect();
    let dir = crate::support::temp_dir();
    seen.extend(run_other_statuses(dir.path()));
    // No name except localhost resolves in this namespace.
    for (status, args) in [(5, "connect -x proxy.test a.test:80"), (6, "connect --direct a.test:80")] {
        let (code, stderr) = shell(&format!("\"$S5\" {args}"));
        assert_eq!(code, status, "{args}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        seen.extend(u8::try_from(status));
    }
    seen.insert(pass_socket_to_closed_receiver());
    let table: BTreeSet<u8> = ExitStatus::ALL.iter().map(|(code, _)| *code).collect();
    assert_eq!(seen, table);
}

#[test]
fn readme_table_has_every_row_with_the_status_of_s5() {
    let (_, table) = include_str!("README.md").split_once("| --- |").expect("a table");
    let rows: Vec<String> =
        table.lines().skip(1).map_while(|line| line.strip_prefix("| ").map(str::to_owned)).collect();
    let behaviours = behaviours();
    assert_eq!(rows.len(), behaviours.len(), "run `make compare-clients`");
    for (row, behaviour) in rows.iter().zip(&behaviours) {
        let status = if behaviour.status == 0 { "ok".into() } else { behaviour.status.to_string() };
        let expected = format!("{} | {status} |", behaviour.name);
        assert!(row.starts_with(&expected), "expected {expected:?}, found {row:?}: run `make compare-clients`");
    }
}
