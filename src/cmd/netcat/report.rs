//! The report of `--json`: one JSON object (RFC 8259) per line, on stderr, in a file, or to an inherited descriptor. It
//! is formatted here: it is nearly flat, and a library's number formatting would add more code to the binary.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::descriptor;
use crate::client::{Client, Phase};
use crate::cmd::cli::escape::quote;
use crate::cmd::cli::exit::{CliError, CliResult, ExitStatus, eprint_line};
use crate::cmd::cli::syntax::OPTIONAL_VALUE;
use crate::net::{ByteCounts, RelayStats, Side};
use crate::proto::Addr;
use crate::server::output_file;

/// Where to write one object per line.
#[derive(Clone, Default)]
pub(crate) enum JsonOutput {
    #[default]
    Disabled,
    Stderr,
    /// Sessions share the file if the flag is set. Then a write does not wait for the reader of a pipe.
    File(Rc<File>, bool),
}

impl JsonOutput {
    /// Opens the output that the value of `--json` names. A file of an earlier run is emptied.
    ///
    /// # Errors
    /// The file cannot be written, or the descriptor is not open.
    pub(crate) fn open(value: Option<&str>, is_shared: bool) -> CliResult<Self> {
        let text = match value {
            None => return Ok(Self::Disabled),
            Some(text) if text == OPTIONAL_VALUE.1 => return Ok(Self::Stderr),
            Some(text) => text,
        };
        CliError::usage_if(text == "-", "--json=-: stdout is for data (use --json for stderr, or a file)")?;
        let file_error = |status| move |error: io::Error| CliError::new(status, format!("--json={text}: {error}"));
        let file = match descriptor::fd_number(text) {
            Some(number) => descriptor::take_fd(number).map_err(file_error(ExitStatus::USAGE))?,
            None => output_file::open(Path::new(text), File::options().write(true).create(true).truncate(true))
                .map_err(file_error(ExitStatus::WRITE_STDOUT))?,
        };
        Ok(Self::File(Rc::new(file), is_shared))
    }

    /// Opens the output of a command line that could not be parsed.
    pub(crate) fn of_invalid_args(args: &[String]) -> Self {
        let (option, default) = OPTIONAL_VALUE;
        let mut options = args.iter().take_while(|arg| *arg != "--").filter_map(|arg| arg.strip_prefix(option));
        let value = options.find_map(|rest| if rest.is_empty() { Some(default) } else { rest.strip_prefix('=') });
        Self::open(value, false).unwrap_or_default()
    }

    /// Writes the report of a session and returns its result.
    pub(crate) fn report(&self, report: &SessionReport<'_>, result: CliResult) -> CliResult {
        match result {
            Ok(()) => self
                .write(&report.to_json(None))
                .map_err(|error| CliError::new(ExitStatus::WRITE_STDOUT, format!("--json: {error}"))),
            Err(error) => Err(self.report_error(report, error)),
        }
    }

    /// Writes the report of an error unless it is reported. Removes its message if the object on stderr replaces it.
    pub(crate) fn report_error(&self, report: &SessionReport<'_>, error: CliError) -> CliError {
        if error.is_reported || matches!(self, Self::Disabled) {
            return error;
        }
        // If the write fails, the error of the session is still the more important one.
        let _ = self.write(&report.to_json(Some(&error)));
        let message = if matches!(self, Self::Stderr) { String::new() } else { error.message };
        CliError { message, is_reported: true, ..error }
    }

    fn write(&self, object: &str) -> io::Result<()> {
        match self {
            Self::Disabled => {}
            Self::Stderr => eprint_line(object),
            Self::File(file, true)
                if poll(&mut [PollFd::new(file, PollFlags::OUT)], Some(&Timespec::default())) != Ok(1) =>
            {
                return Err(io::Error::other("the reader has stopped, so the object is lost"));
            }
            Self::File(file, _) => file.as_ref().write_all(format!("{object}\n").as_bytes())?,
        }
        Ok(())
    }
}

/// The route and the tunnel of a client, in the terms of RFC 1928. `None` means "not reached".
#[derive(Debug, Default)]
pub(crate) struct SessionReport<'a> {
    client: Option<&'a Client>,
    attempts: u32,
    pub(crate) bnd: Option<Addr>,
    /// BIND: the address of the peer that connected.
    pub(crate) peer: Option<Addr>,
    /// Bytes and events of the relay, which begins at the end of the handshake.
    relay: Option<(Arc<ByteCounts>, Arc<RelayStats>)>,
}

impl<'a> SessionReport<'a> {
    pub(crate) fn new(client: &'a Client, attempts: u32) -> Self {
        Self { client: Some(client), attempts, ..Self::default() }
    }

    /// Begins the relay. Returns where to record its bytes and events, which the report has even if the relay is cut.
    pub(crate) fn start_relay(&mut self) -> (Arc<ByteCounts>, Arc<RelayStats>) {
        self.relay.insert(Default::default()).clone()
    }

    pub(crate) fn has_relay(&self) -> bool {
        self.relay.is_some()
    }

    fn phase(&self) -> Option<&'static str> {
        if self.has_relay() {
            return Some("transfer");
        }
        Some(match self.client?.progress().phase {
            Phase::ResolveProxy | Phase::ResolveTarget => "resolve",
            Phase::Connect => "tcp",
            Phase::Greeting => "method",
            Phase::Login => "login",
            Phase::Request => "reply",
            Phase::Accept => "accept",
        })
    }

    pub(crate) fn to_json(&self, error: Option<&CliError>) -> String {
        let client = self.client;
        let progress = client.map(Client::progress);
        let times = progress.map(|progress| progress.times).unwrap_or_default();
        let time = |phase| or_null(times.of(phase).map(format_millis));
        let resolve = [Phase::ResolveProxy, Phase::ResolveTarget].into_iter().filter_map(|phase| times.of(phase));
        let (counts, stats) = self.relay.clone().unwrap_or_default();
        let phases = [
            ("resolve", or_null(resolve.reduce(|a, b| a + b).map(format_millis))),
            ("tcp", time(Phase::Connect)),
            ("method", time(Phase::Greeting)),
            ("login", time(Phase::Login)),
            ("reply", time(Phase::Request)),
            ("accept", time(Phase::Accept)),
            ("first_byte", or_null(stats.first_byte().map(format_millis))),
        ];
        let hops = client.map(Client::hops).unwrap_or_default();
        let hops: Vec<String> = hops.iter().map(|hop| quote(&hop.to_string())).collect();
        let ended_first = stats.ended_first().map(|side| if side == Side::Client { "local" } else { "remote" });
        let message = error.map(ToString::to_string).filter(|message| !message.is_empty());
        object(&[
            ("proxy", or_null(hops.last())),
            ("hops", format!("[{}]", hops.join(","))),
            ("target", text(client.and_then(Client::dst))),
            ("method", text(progress.and_then(|progress| progress.method))),
            ("rep", or_null(progress.and_then(|progress| progress.rep).map(|rep| rep.0))),
            ("bnd", text(self.bnd.as_ref())),
            ("peer", text(self.peer.as_ref())),
            ("tries", self.attempts.to_string()),
            ("phase", text(self.phase())),
            ("ms", object(&phases)),
            ("up", counts.up.load(Ordering::Relaxed).to_string()),
            ("down", counts.down.load(Ordering::Relaxed).to_string()),
            ("ended_first", text(ended_first)),
            ("status", error.map_or(ExitStatus::SUCCESS, |error| error.status).code().to_string()),
            ("error", text(message)),
        ])
    }
}

/// Formats an object whose values are already JSON.
fn object(members: &[(&str, String)]) -> String {
    let members: Vec<String> = members.iter().map(|(name, value)| format!("{}:{value}", quote(name))).collect();
    format!("{{{}}}", members.join(","))
}

fn text(value: Option<impl ToString>) -> String {
    or_null(value.map(|value| quote(&value.to_string())))
}

fn or_null(value: Option<impl ToString>) -> String {
    value.map_or("null".into(), |value| value.to_string())
}

/// Formats a time in milliseconds, with microseconds as decimals.
pub fn format_millis(time: Duration) -> String {
    format!("{}.{:03}", time.as_millis(), time.subsec_micros() % 1000)
}
