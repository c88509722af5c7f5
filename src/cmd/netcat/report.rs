//! The report of `--json`, one JSON object (RFC 8259). It is formatted here: the object is nearly flat, and a library's
//! number formatting would add more code to the binary than this module.

use std::fmt::Write as _;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::client::{Client, Phase};
use crate::cmd::cli::exit::{CliError, ExitStatus};
use crate::proto::Addr;
use crate::relay::ByteCounts;

/// The route and the tunnel of a client, in the terms of RFC 1928. `None` means "not reached".
#[derive(Debug, Default)]
pub(in crate::cmd) struct Report {
    /// The last proxy.
    proxy: Option<String>,
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
    tries: u32,
    phases: PhaseDurations,
    /// Bytes to the target.
    up: u64,
    /// Bytes from the target.
    down: u64,
    /// Which side ended first: `local` or `remote`.
    ended_first: Option<&'static str>,
    status: u8,
    error: Option<String>,
}

/// Duration of each phase, in the try that the report describes.
#[derive(Debug, Default)]
struct PhaseDurations {
    resolve: Duration,
    tcp: Duration,
    method: Duration,
    login: Duration,
    reply: Duration,
    /// BIND: from the first reply to the second.
    accept: Duration,
    /// From the end of the handshake to the first byte from the target.
    first_byte: Option<Duration>,
}

impl Report {
    /// Returns the report of a client's handshake.
    pub(in crate::cmd) fn new(client: &Client, hops: Vec<String>, target: Option<&Addr>, tries: u32) -> Self {
        let times = client.times();
        Self {
            proxy: hops.last().cloned(),
            hops,
            target: target.map(ToString::to_string),
            method: client.method().map(|method| method.to_string()),
            rep: client.rep().map(|rep| rep.0),
            tries,
            phases: PhaseDurations {
                resolve: times.of(Phase::ResolveProxy) + times.of(Phase::ResolveTarget),
                tcp: times.of(Phase::Connect),
                method: times.of(Phase::Greeting),
                login: times.of(Phase::Login),
                reply: times.of(Phase::Request),
                accept: times.of(Phase::Accept),
                first_byte: None,
            },
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
        self.phases.accept = client.times().of(Phase::Accept);
    }

    pub(in crate::cmd) fn set_bytes(&mut self, counts: &ByteCounts) {
        self.up = counts.up.load(Ordering::Relaxed);
        self.down = counts.down.load(Ordering::Relaxed);
    }

    pub(in crate::cmd) fn set_stats(&mut self, first_byte: Option<Duration>, ended_first: Option<&'static str>) {
        self.phases.first_byte = first_byte;
        self.ended_first = ended_first;
    }

    /// Returns the object as one line.
    pub(in crate::cmd) fn into_json(mut self, result: &Result<(), CliError>) -> String {
        if let Err(error) = result {
            self.status = error.status.code();
            self.error = Some(error.to_string()).filter(|message| !message.is_empty());
        } else {
            self.status = ExitStatus::SUCCESS.code();
        }
        self.to_json()
    }

    fn to_json(&self) -> String {
        let PhaseDurations { resolve, tcp, method, login, reply, accept, first_byte } = &self.phases;
        let phases = [
            ("resolve", format_millis(*resolve)),
            ("tcp", format_millis(*tcp)),
            ("method", format_millis(*method)),
            ("login", format_millis(*login)),
            ("reply", format_millis(*reply)),
            ("accept", format_millis(*accept)),
            ("first_byte", or_null(first_byte.map(format_millis))),
        ];
        let hops: Vec<String> = self.hops.iter().map(|hop| quote(hop)).collect();
        let text = |text: &Option<String>| or_null(text.as_deref().map(quote));
        object(&[
            ("proxy", text(&self.proxy)),
            ("hops", format!("[{}]", hops.join(","))),
            ("target", text(&self.target)),
            ("method", text(&self.method)),
            ("rep", or_null(self.rep)),
            ("bnd", text(&self.bnd)),
            ("peer", text(&self.peer)),
            ("tries", self.tries.to_string()),
            ("ms", object(&phases)),
            ("up", self.up.to_string()),
            ("down", self.down.to_string()),
            ("ended_first", or_null(self.ended_first.map(quote))),
            ("status", self.status.to_string()),
            ("error", text(&self.error)),
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
