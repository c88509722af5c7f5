//! The report of `--json`, one JSON object (RFC 8259). It is formatted here: the object is nearly flat, and a library's
//! number formatting would add more code to the binary than this module.

use std::fmt::Write as _;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::client::{Client, Phase, PhaseTimes};
use crate::cmd::cli::exit::{CliError, ExitStatus};
use crate::net::{ByteCounts, Side};
use crate::proto::Addr;

/// The route and the tunnel of a client, in the terms of RFC 1928. `None` means "not reached".
#[derive(Debug, Default)]
pub(in crate::cmd) struct SessionReport {
    /// All proxies, nearest first.
    hops: Vec<String>,
    target: Option<String>,
    /// Method selected by the last proxy that was reached.
    method: Option<String>,
    /// REP of the last reply.
    rep: Option<u8>,
    bnd: Option<String>,
    /// BIND: the address of the peer that connected.
    peer: Option<String>,
    attempts: u32,
    /// Duration of each phase, in the attempt that the report describes.
    times: PhaseTimes,
    /// Time from the end of the handshake to the first byte from the target.
    first_byte: Option<Duration>,
    /// Bytes to the target.
    up: u64,
    /// Bytes from the target.
    down: u64,
    /// The side that ended first.
    ended_first: Option<Side>,
}

impl SessionReport {
    /// Returns the report of a client's handshake.
    pub(in crate::cmd) fn new(client: &Client, hops: Vec<String>, target: Option<&Addr>, attempts: u32) -> Self {
        Self {
            hops,
            target: target.map(ToString::to_string),
            method: client.method().map(|method| method.to_string()),
            rep: client.rep().map(|rep| rep.0),
            attempts,
            times: client.times(),
            ..Self::default()
        }
    }

    pub(in crate::cmd) fn set_bnd(&mut self, bnd: &Addr) {
        self.bnd = Some(bnd.to_string());
    }

    /// Adds the second reply to BIND. `peer` is `None` if it failed.
    pub(in crate::cmd) fn set_peer(&mut self, client: &Client, peer: Option<&Addr>) {
        self.peer = peer.map(ToString::to_string);
        self.rep = client.rep().map(|rep| rep.0);
        self.times = client.times();
    }

    pub(in crate::cmd) fn set_bytes(&mut self, counts: &ByteCounts) {
        self.up = counts.up.load(Ordering::Relaxed);
        self.down = counts.down.load(Ordering::Relaxed);
    }

    pub(in crate::cmd) fn set_stats(&mut self, first_byte: Option<Duration>, ended_first: Option<Side>) {
        self.first_byte = first_byte;
        self.ended_first = ended_first;
    }

    /// Returns the object as one line.
    pub(in crate::cmd) fn to_json(&self, result: &Result<(), CliError>) -> String {
        let time = |phase| format_millis(self.times.of(phase));
        let phases = [
            ("resolve", format_millis(self.times.of(Phase::ResolveProxy) + self.times.of(Phase::ResolveTarget))),
            ("tcp", time(Phase::Connect)),
            ("method", time(Phase::Greeting)),
            ("login", time(Phase::Login)),
            ("reply", time(Phase::Request)),
            ("accept", time(Phase::Accept)),
            ("first_byte", or_null(self.first_byte.map(format_millis))),
        ];
        let hops: Vec<String> = self.hops.iter().map(|hop| quote(hop)).collect();
        let text = |text: Option<&String>| or_null(text.map(|text| quote(text)));
        let ended_first = self.ended_first.map(|side| if side == Side::Client { "local" } else { "remote" });
        let error = result.as_ref().err();
        let message = error.map(ToString::to_string).filter(|message| !message.is_empty());
        object(&[
            ("proxy", text(self.hops.last())),
            ("hops", format!("[{}]", hops.join(","))),
            ("target", text(self.target.as_ref())),
            ("method", text(self.method.as_ref())),
            ("rep", or_null(self.rep)),
            ("bnd", text(self.bnd.as_ref())),
            ("peer", text(self.peer.as_ref())),
            ("tries", self.attempts.to_string()),
            ("ms", object(&phases)),
            ("up", self.up.to_string()),
            ("down", self.down.to_string()),
            ("ended_first", or_null(ended_first.map(quote))),
            ("status", error.map_or(ExitStatus::SUCCESS, |error| error.status).code().to_string()),
            ("error", text(message.as_ref())),
        ])
    }
}

/// Formats an object whose values are already JSON.
fn object(members: &[(&str, String)]) -> String {
    let members: Vec<String> = members.iter().map(|(name, value)| format!("{}:{value}", quote(name))).collect();
    format!("{{{}}}", members.join(","))
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
