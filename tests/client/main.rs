//! The client modes end to end, against scripted proxies and against `s5 serve`. `README.md` lists the files. What one
//! proxy sees and one client prints is in the transcripts tests/wire/client-*.txt.

#![allow(unused_qualifications, reason = "the names of std that support exports may be written with their path")]

mod arguments;
mod behaviours;
mod bind;
mod cli;
mod compare;
mod credentials;
mod failures;
mod netcat;
mod output_files;
mod prompts;
mod proxies;
mod streams;
#[path = "../support/mod.rs"]
mod support;
mod table;
mod texts;
mod udp;
mod udp_names;
mod wire;
mod zones;

use support::*;

/// Target of the requests to scripted proxies.
const TARGET: &str = "target.example:80";

/// s5 with these arguments, which are separated by spaces.
fn command(args: &str) -> Command {
    let mut command = s5();
    command.args(args.split(' '));
    command
}

/// Starts s5 with these arguments.
fn start(args: &str) -> RunningProgram {
    RunningProgram::start(&mut command(args))
}

/// Exit status, stdout and stderr of a command.
type Outcome = (Option<i32>, String, String);

fn outcome_of(command: &mut Command, stdin: &[u8]) -> Outcome {
    let output = run(command, stdin, TIMEOUT);
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// Runs s5 with these arguments.
fn outcome(args: &str, stdin: &[u8]) -> Outcome {
    outcome_of(&mut command(args), stdin)
}

/// What a client prints that succeeds.
fn success(stdout: &str) -> Outcome {
    (Some(0), stdout.into(), String::new())
}

/// What a client prints that fails.
fn failure(status: i32, stderr: &str) -> Outcome {
    (Some(status), String::new(), stderr.into())
}

/// Fails unless a command has this status, and has printed only one line, on stderr, that contains all words.
fn assert_line_in((code, stdout, stderr): Outcome, status: i32, words: &[&str]) {
    assert_eq!((code, stdout.as_str(), stderr.lines().count()), (Some(status), "", 1), "{words:?}: {stderr}");
    assert!(stderr.starts_with("s5: ") && stderr.ends_with('\n') && !stderr.contains("topsecret"), "{stderr}");
    assert!(words.iter().all(|word| stderr.contains(word)), "{words:?} are not all in: {stderr}");
}

/// Runs a command, and checks its only line.
fn assert_line_of(command: &mut Command, status: i32, words: &[&str]) {
    assert_line_in(outcome_of(command, b""), status, words);
}

/// Runs s5 with these arguments, and checks its only line.
fn assert_line(args: &str, status: i32, words: &[&str]) {
    assert_line_of(&mut command(args), status, words);
}

/// Starts `s5 serve`. Returns it and its address.
fn serve() -> (Server, String) {
    let server = Server::start(&[]);
    let addr = server.addr().to_string();
    (server, addr)
}
