//! `s5 connect` against every row of the behaviour table: exit status, message and stdout. Also: every exit status
//! occurs, and README.md in this directory has all rows.

use s5::cmd::ExitStatus;

use crate::table::{Behaviour, SHORT_TIMEOUT, behaviours};
use crate::*;

/// The command of s5 for a row.
pub fn client(row: &Behaviour, host: &str, port: u16) -> Command {
    let mut command = s5();
    let wait = if row.status == 28 && !row.has("idle") { SHORT_TIMEOUT } else { "10" };
    command.env("CI", "true").args(["connect", "-w", wait, "-x", &format!("{}{host}:{port}", row.userinfo)]);
    if row.has("idle") {
        command.args(["-i", SHORT_TIMEOUT]);
    }
    if row.has("linger") {
        command.args(["--linger", SHORT_TIMEOUT]);
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
    run_all(behaviours(), |row| check(&row));
}

#[test]
fn row_names_are_unique() {
    let rows = behaviours();
    let names: BTreeSet<&str> = rows.iter().map(|row| row.name).collect();
    assert_eq!(names.len(), rows.len());
}

/// Runs `s5 connect -F` after the receiver has closed its Unix socket. Returns the status.
fn pass_socket_to_closed_receiver() -> Option<i32> {
    let (stdout, receiver) = UnixStream::pair().expect("socket pair created");
    drop(receiver);
    let mut command = crate::command(&format!("connect -F --direct {}", echo_server()));
    let mut client = RunningProgram::start_with(&mut command, OwnedFd::from(stdout).into(), |_| false);
    let (status, _, stderr) = client.wait_exit(TIMEOUT);
    assert!(stderr.contains("pass the socket: broken pipe"), "{stderr}");
    status.code()
}

/// Statuses that no row of the table has, with a shell command and a part of its message.
const OTHER_STATUSES: [(i32, &str, &str); 15] = [
    (0, "$S5 connect -z -x $PROXY $ECHO", ""),
    (2, "$S5 connect --porxy a b", "unrecognized option --porxy (did you mean --proxy?)"),
    // No name except localhost resolves in the namespace.
    (5, "$S5 connect -x proxy.test a.test:80", ""),
    (6, "$S5 connect --direct a.test:80", ""),
    (7, "$S5 connect --direct $DOWN", "direct: connecting to the target, for"),
    (26, "$S5 connect -x $PROXY $ECHO < /", "read from stdin: is a directory"),
    (26, "echo xyz | $S5 udp --hex -x $PROXY $ECHO", "not hexadecimal"),
    (28, "echo x | $S5 udp -n 1 -q 100ms -x $PROXY $DOWN", "received 0 of 1 answers in time"),
    (
        45,
        "$S5 connect -s 192.0.2.9 -x $PROXY $ECHO",
        "source address 192.0.2.9: not an address of this machine, or no free port",
    ),
    (45, "$S5 connect -l 192.0.2.9:1 -x $PROXY $ECHO", "listen on"),
    (
        55,
        "head -c 65528 /dev/zero | $S5 udp -x $PROXY $ECHO",
        "write error: datagram too large: the limit is 65507 bytes",
    ),
    (56, "echo x | $S5 connect --direct --no-shutdown $RESETS", "read error: connection reset"),
    (126, "$S5 connect -x $PROXY -e $PLAIN $ECHO", "permission denied"),
    (127, "$S5 connect -x $PROXY -e /nonexistent $ECHO", "no such file"),
    // The shell prints the status of the client, and nothing else is on stderr.
    (141, "{ yes | $S5 connect -x $PROXY $ECHO; echo $? >&2; } | true; exit 141", "141\n"),
];

#[test]
fn every_exit_status_occurs() {
    let resolv = "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n";
    enter_namespace!("127.0.0.1 localhost\n", resolv);
    let ((_server, proxy), dir) = (serve(), temp_dir());
    // Resets after the first byte has arrived, and so not during connect(2).
    let resets = tcp_server(V4, |mut stream| {
        let _ = stream.read(&mut [0; 16]);
        reset(stream);
    });
    let mut seen: BTreeSet<i32> = behaviours().iter().map(|row| row.status).collect();
    let (echo, down) = (echo_server().to_string(), closed_port().to_string());
    let plain = write_file(dir.path(), "plain", "not a program");
    for (status, script, message) in OTHER_STATUSES {
        let mut shell = Command::new("sh");
        shell.args(["-c", script]).env("S5", env!("CARGO_BIN_EXE_s5")).env("PROXY", &proxy).env("PLAIN", &plain);
        shell.env("ECHO", &echo).env("DOWN", &down).env("RESETS", resets.to_string());
        let (code, _, stderr) = outcome_of(&mut shell, b"");
        assert_eq!(code, Some(status), "{script}: {stderr}");
        assert!(stderr.contains(message), "{script}: {stderr}");
        assert_eq!(stderr.lines().count(), usize::from(status != 0), "{script}: {stderr}");
        seen.insert(status);
    }
    seen.extend(pass_socket_to_closed_receiver());
    assert_eq!(seen, ExitStatus::ALL.iter().map(|(code, _)| i32::from(*code)).collect());
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
