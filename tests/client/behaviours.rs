//! What `s5 connect` makes of every behaviour of a proxy: its exit status, its one line, its stdout. And that all exit
//! statuses come about, each as the tables say.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

use s5::cmd::ExitStatus;

use crate::behaviour_table::{Behaviour, Ends, WAIT, behaviours};
use crate::common::{Server, TIMEOUT, closed_port, echo_server, in_namespace, run, s5, tcp_server, write_file};
use crate::scripted::{reset, text};

/// `s5 connect` as the row wants it.
fn client(row: &Behaviour, host: &str, port: u16) -> Command {
    let mut command = s5();
    let wait = if row.status == 28 && !row.is_idle { WAIT } else { "10" };
    command.env("CI", "true").args(["connect", "-w", wait, "-x", &format!("{}{host}:{port}", row.userinfo)]);
    if row.is_idle {
        command.args(["-i", WAIT]);
    }
    command.args(row.target.split(' '));
    command
}

fn check(row: &Behaviour) {
    let name = row.name;
    let outcome = row.play(TIMEOUT, client);
    assert_eq!(outcome.status, Some(row.status), "{name}: {}", outcome.stderr);
    if row.status == 2 {
        assert!(outcome.stderr.contains(&row.said), "{name}: {}", outcome.stderr);
        assert_eq!(outcome.stderr.lines().count(), 1, "{name}: {}", outcome.stderr);
    } else if row.said.is_empty() {
        assert_eq!(outcome.stderr, "", "{name}");
    } else {
        assert_eq!(outcome.stderr, format!("s5: proxy {}: {}\n", outcome.addr, row.said), "{name}");
    }
    if row.ends != Ends::ClosedStdout {
        assert_eq!(text(&outcome.stdout), text(&row.data), "{name}");
    }
    if let Some(asked) = &row.asked {
        assert_eq!(outcome.messages.last(), Some(asked), "{name}");
    }
}

#[test]
fn every_behaviour_of_a_proxy_has_its_status_and_its_line() {
    let rows = behaviours();
    let rows = &rows;
    let next = std::sync::atomic::AtomicUsize::new(0);
    // Most of them wait for something; a few at once keep their limits honest.
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
fn no_two_behaviours_have_one_name() {
    let rows = behaviours();
    let names: BTreeSet<&str> = rows.iter().map(|row| row.name).collect();
    assert_eq!(names.len(), rows.len());
}

/// A shell's word for `s5`, its arguments and whatever else belongs to the case; its status.
fn shell(script: &str) -> (i32, String) {
    let mut command = Command::new("sh");
    command.args(["-c", script]).env("S5", env!("CARGO_BIN_EXE_s5"));
    let output = run(&mut command, b"", TIMEOUT);
    (output.status.code().expect("it exits"), text(&output.stderr))
}

/// The statuses that no row of the behaviours has, each brought about.
fn others(folder: &Path) -> Vec<(u8, &'static str, String)> {
    let server = Server::start(&[]);
    let proxy = server.addr();
    let echo = echo_server();
    // Not before it has been sent something, and so not while it is still being connected to.
    let resets = tcp_server([127, 0, 0, 1].into(), |mut stream| {
        let _ = stream.read(&mut [0; 16]);
        reset(stream);
    });
    let down = closed_port();
    let plain = write_file(folder, "plain", "not a program");
    let folder = folder.display();
    let s5 = |args: String| format!("\"$S5\" {args}");
    let cases = vec![
        (0, "", s5(format!("connect -z -x {proxy} {echo}"))),
        (2, "is --proxy meant?", s5("connect --porxy a b".into())),
        (7, "direct: connecting, for", s5(format!("connect --direct {down}"))),
        (26, "read from stdin: Is a directory", s5(format!("connect -x {proxy} {echo} < {folder}"))),
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
        (55, "the limit is 65507 bytes", format!("head -c 65528 /dev/zero | {}", s5(format!("udp -x {proxy} {echo}")))),
        (
            56,
            "read error: Connection reset",
            format!("echo x | {}", s5(format!("connect --direct --no-shutdown {resets}"))),
        ),
        (126, "Permission denied", s5(format!("connect -x {proxy} -e {plain} {echo}"))),
        (127, "No such file", s5(format!("connect -x {proxy} -e {folder}/nothing {echo}"))),
        (141, "", format!("{{ yes | {}; echo $? >&2; }} | true", s5(format!("connect -x {proxy} {echo}")))),
    ];
    let mut found = Vec::new();
    for (status, said, script) in cases {
        let (code, stderr) = shell(&script);
        if status == 141 {
            assert_eq!(stderr.trim(), "141", "{script}");
        } else {
            assert_eq!(code, i32::from(status), "{script}: {stderr}");
            assert!(stderr.contains(said), "{script}: {stderr}");
            assert_eq!(stderr.lines().count(), usize::from(status != 0), "{script}: {stderr}");
        }
        found.push((status, said, script));
    }
    found
}

/// What is none of the others: the socket is to be handed to somebody who is gone.
fn nobody_takes_the_socket() -> u8 {
    let (stdout, gone) = UnixStream::pair().expect("a pair");
    drop(gone);
    let mut command = s5();
    command.args(["connect", "-F", "--direct", &echo_server().to_string()]).stdout(Stdio::from(OwnedFd::from(stdout)));
    let output = command.stderr(Stdio::piped()).spawn().and_then(Child::wait_with_output).expect("s5 runs");
    assert!(text(&output.stderr).contains("pass the socket: Broken pipe"), "{}", text(&output.stderr));
    output.status.code().and_then(|code| u8::try_from(code).ok()).expect("it exits")
}

#[test]
fn every_status_of_the_table_comes_about() {
    let hosts = "127.0.0.1 localhost\n";
    let resolv = "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n";
    if !in_namespace("behaviours::every_status_of_the_table_comes_about", hosts, resolv) {
        return;
    }
    let mut seen: BTreeSet<u8> = behaviours().iter().filter_map(|row| u8::try_from(row.status).ok()).collect();
    let folder = crate::common::temp_dir();
    seen.extend(others(folder.path()).iter().map(|(status, ..)| status));
    // Names, of which this namespace knows none.
    for (status, args) in [(5, "connect -x proxy.test a.test:80"), (6, "connect --direct a.test:80")] {
        let (code, said) = shell(&format!("\"$S5\" {args}"));
        assert_eq!(code, status, "{args}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        seen.extend(u8::try_from(status));
    }
    seen.insert(nobody_takes_the_socket());
    let table: BTreeSet<u8> = ExitStatus::ALL.iter().map(|(code, _)| *code).collect();
    assert_eq!(seen, table);
}

#[test]
fn the_readme_has_the_table_of_the_code() {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).expect("README.md");
    for (code, meaning) in ExitStatus::ALL {
        let row = format!("| {code} | {meaning} |");
        assert!(readme.contains(&row), "README.md has no row {row}");
    }
}
