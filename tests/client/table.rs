//! The behaviour table in `behaviours.txt`, and a client's run against one of its rows.

use std::fs::OpenOptions;
use std::os::unix::process::ExitStatusExt as _;

use crate::support::bytes::Placeholders;
use crate::support::transcript::items;
use crate::*;

/// Timeout of the client in rows that expect a timeout.
pub const SHORT_TIMEOUT: &str = "1500ms";

/// Time from the start of the client to its input in rows with late input. Shorter than the timeouts of the clients.
const LATE: Duration = Duration::from_millis(600);

/// One row of the table.
#[derive(Default)]
pub struct Behaviour {
    pub name: &'static str,
    options: Vec<&'static str>,
    script: &'static str,
    pub userinfo: &'static str,
    pub target: String,
    /// Exit status of s5.
    pub status: i32,
    /// Output of s5 on stdout.
    pub stdout: &'static str,
    /// Message of s5 after `s5: proxy ADDR: `; empty if s5 prints none.
    pub message: String,
    /// Set if the proxy must receive this request.
    pub request: Option<Vec<u8>>,
}

/// Result of a client's run.
#[derive(Debug)]
pub struct Outcome {
    pub addr: SocketAddr,
    /// Exit status, or 128 plus the signal's number. `None` if the client exceeded its time limit and was killed.
    pub status: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: String,
    /// Messages that the scripted server received.
    pub messages: Vec<Vec<u8>>,
}

/// The whole table.
pub fn behaviours() -> Vec<Behaviour> {
    include_str!("behaviours.txt").lines().filter(|line| !line.starts_with('#')).map(row).collect()
}

fn row(line: &'static str) -> Behaviour {
    let columns: Vec<&str> = line.split('|').map(str::trim).collect();
    let [name, options, script, status, stdout, message] = columns[..] else { panic!("not a row: {line}") };
    let options: Vec<&str> = options.split(' ').collect();
    let value = |key: &str| options.iter().find_map(|option| option.strip_prefix(key));
    let userinfo = if options.contains(&"login") { "alice:secret@" } else { value("userinfo=").unwrap_or_default() };
    let target = value("target=").unwrap_or("target.example:80").replace("{n*255}", &"n".repeat(255)).replace('_', " ");
    let message = message.replace("{target}", &target);
    let bytes = |text: &str| Placeholders::default().bytes(&items(&text.replace('_', " "))?);
    let request = value("request=").map(|text| bytes(text).expect("bytes"));
    let status = status.parse().expect("a status");
    Behaviour { name, options, script, userinfo, target, status, stdout, message, request }
}

impl Behaviour {
    pub fn has(&self, option: &str) -> bool {
        self.options.contains(&option)
    }

    /// Runs a client against the proxy. `client` creates its command from the proxy's host and port.
    pub fn run(&self, limit: Duration, client: impl FnOnce(&Self, &str, u16) -> Command) -> Outcome {
        let (mut proxy, mut backlog) = (None, None);
        let addr = if self.has("down") {
            closed_port()
        } else if self.has("echo") {
            echo_server()
        } else if self.has("unresponsive") {
            backlog.insert(FullBacklog::new()).addr
        } else {
            proxy.insert(ScriptedServer::start(self.script)).addr
        };
        let host = if self.has("localhost") { "localhost" } else { "127.0.0.1" };
        let full = || OpenOptions::new().write(true).open("/dev/full").expect("/dev/full").into();
        let stdout = if self.has("full") { full() } else { Stdio::piped() };
        let enough = if self.has("closed") { |bytes: &[u8]| !bytes.is_empty() } else { |_: &[u8]| false };
        let mut program = RunningProgram::start_with(&mut client(self, host, addr.port()), stdout, enough);
        if self.has("late") {
            // A client that does not wait for stdin has exited by then.
            thread::sleep(LATE);
            program.write(b"two");
        }
        if !self.has("stdin") {
            program.close_stdin();
        }
        let (status, stdout, stderr) = program.output(limit);
        let status = status.and_then(|status| status.code().or(status.signal().map(|signal| 128 + signal)));
        let messages = proxy.filter(|_| self.request.is_some()).map(|proxy| proxy.messages()).unwrap_or_default();
        Outcome { addr, status, stdout, stderr, messages }
    }
}
