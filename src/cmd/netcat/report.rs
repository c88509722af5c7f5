//! The report of `--json`, one JSON object (RFC 8259). It is formatted here: the object is nearly flat, and a library's
//! number formatting would add more code to the binary than this module.

use std::fmt::Write as _;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::client::{Client, Phase};
use crate::cmd::cli::exit::{CliError, ExitStatus};
use crate::net::{ByteCounts, Side};
use crate::proto::Addr;

/// The route and the tunnel of a client, in the terms of RFC 1928. `None` means "not reached".
#[derive(Debug, Default)]
pub(crate) struct SessionReport<'a> {
    /// The client of the attempt that the report describes.
    client: Option<&'a Client>,
    attempts: u32,
    pub(crate) bnd: Option<Addr>,
    /// BIND: the address of the peer that connected.
    pub(crate) peer: Option<Addr>,
    /// Time from the end of the handshake to the first byte from the target.
    first_byte: Option<Duration>,
    /// Bytes to the target.
    up: u64,
    /// Bytes from the target.
    down: u64,
    /// The side that ended first.
    ended_first: Option<Side>,
}

impl<'a> SessionReport<'a> {
    /// Returns the report of a client's handshake.
    pub(crate) fn new(client: &'a Client, attempts: u32) -> Self {
        Self { client: Some(client), attempts, ..Self::default() }
    }

    /// Adds the results of a relay.
    pub(crate) fn set_relayed(&mut self, counts: &ByteCounts, first_byte: Option<Duration>, ended_first: Option<Side>) {
        (self.up, self.down) = (counts.up.load(Ordering::Relaxed), counts.down.load(Ordering::Relaxed));
        (self.first_byte, self.ended_first) = (first_byte, ended_first);
    }

    /// Returns the object as one line.
    pub(crate) fn to_json(&self, result: &Result<(), CliError>) -> String {
        let client = self.client;
        let times = client.map(Client::times).unwrap_or_default();
        let time = |phase| format_millis(times.of(phase));
        let phases = [
            ("resolve", format_millis(times.of(Phase::ResolveProxy) + times.of(Phase::ResolveTarget))),
            ("tcp", time(Phase::Connect)),
            ("method", time(Phase::Greeting)),
            ("login", time(Phase::Login)),
            ("reply", time(Phase::Request)),
            ("accept", time(Phase::Accept)),
            ("first_byte", or_null(self.first_byte.map(format_millis))),
        ];
        let hops = client.map(Client::hops).unwrap_or_default();
        let hops: Vec<String> = hops.iter().map(|hop| quote(&hop.to_string())).collect();
        let ended_first = self.ended_first.map(|side| if side == Side::Client { "local" } else { "remote" });
        let error = result.as_ref().err();
        let message = error.map(ToString::to_string).filter(|message| !message.is_empty());
        object(&[
            ("proxy", or_null(hops.last())),
            ("hops", format!("[{}]", hops.join(","))),
            ("target", text(client.and_then(Client::dst))),
            ("method", text(client.and_then(Client::method))),
            ("rep", or_null(client.and_then(Client::rep).map(|rep| rep.0))),
            ("bnd", text(self.bnd.as_ref())),
            ("peer", text(self.peer.as_ref())),
            ("tries", self.attempts.to_string()),
            ("ms", object(&phases)),
            ("up", self.up.to_string()),
            ("down", self.down.to_string()),
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

fn format_millis(time: Duration) -> String {
    format!("{}.{:03}", time.as_millis(), time.subsec_micros() % 1000)
}

fn quote(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c < ' ' => drop(write!(out, "\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out + "\""
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quote_escapes_quotes_backslashes_and_control_characters() {
        assert_eq!(quote("a\"b\\c\nd\x1be"), r#""a\"b\\c\u000ad\u001be""#);
        assert_eq!(format_millis(Duration::from_micros(12_034_056)), "12034.056");
    }
}
