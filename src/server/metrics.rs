//! Metrics in the text format of Prometheus. No client chooses the value of a label, so the number of series is limited.

use std::fmt::{Display, Write as _};
use std::fs;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::time::SystemTime;

use rustix::process::{Resource, getrlimit};

use super::session_counts;
use super::shares::lock;
use super::state::Server;
use crate::counters::{self, BUCKETS, COUNTERS, HISTOGRAMS, Histogram};

/// Unix time of the last reload, or else of the start. Negative if it failed.
static LAST_RELOAD: AtomicI64 = AtomicI64::new(0);

/// Records a reload that ends now.
pub(super) fn set_last_reload(is_successful: bool) {
    let now = SystemTime::UNIX_EPOCH.elapsed().map_or(1, |time| time.as_secs().cast_signed());
    LAST_RELOAD.store(if is_successful { now } else { -now }, Relaxed);
}

/// Returns all metrics. Those of `server` are left out until it accepts connections.
pub(super) fn text(server: Option<&Server>) -> String {
    let mut out = String::new();
    for rows in COUNTERS.chunk_by(|(_, one, ..), (_, other, ..)| one == other) {
        let Some((_, name, _, help)) = rows.first() else { continue };
        add(&mut out, name, help, rows.iter().map(|(counter, _, label, _)| (*label, counters::sum(*counter))));
    }
    let results = session_counts::results().map(|([command, method, rep], count)| {
        (format!("command=\"{command}\",method=\"{method}\",rep=\"{rep}\""), count)
    });
    add(&mut out, "s5_sessions_total", "Sessions by result: at their success, or at their end.", results);
    HISTOGRAMS.iter().for_each(|(histogram, name, _, help)| add_histogram(&mut out, name, help, *histogram));
    if let Some(server) = server {
        let denials = lock(&server.policy.current().denials).clone();
        let help = "Decisions to deny since the last reload: connections, requests, addresses and datagrams.";
        let escape = |rule: &str| rule.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let denials = denials.iter().map(|(rule, count)| (format!("rule=\"{}\"", escape(rule)), count));
        add(&mut out, "s5_denials_total", help, denials);
        add(&mut out, "s5_sessions_limit", "Limit of open sessions.", [("", server.limiter.max_sessions)]);
    }
    let reload = LAST_RELOAD.load(Relaxed);
    let help = "Time of the last reload, or of the start.";
    add(&mut out, "s5_last_reload_timestamp_seconds", help, [("", reload.unsigned_abs())]);
    let help = "1, or 0 if the last reload failed.";
    add(&mut out, "s5_last_reload_successful", help, [("", u8::from(reload > 0))]);
    add(&mut out, "process_open_fds", "Open descriptors.", open_descriptors().map(|count| ("", count)));
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    add(&mut out, "process_max_fds", "Limit of open descriptors.", [("", limit)]);
    add(&mut out, "s5_build_info", "Version of s5.", [(concat!("version=\"", env!("CARGO_PKG_VERSION"), "\""), 1)]);
    // Every body gets its last line end later.
    out.pop();
    out
}

/// Adds a metric with its samples: each has labels and a value.
fn add<L: Display, V: Display>(out: &mut String, name: &str, help: &str, samples: impl IntoIterator<Item = (L, V)>) {
    let kind = if name.ends_with("_total") { "counter" } else { "gauge" };
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
    for (labels, value) in samples {
        let labels = labels.to_string();
        let (begin, end) = if labels.is_empty() { ("", "") } else { ("{", "}") };
        let _ = writeln!(out, "{name}{begin}{labels}{end} {value}");
    }
}

fn add_histogram(out: &mut String, name: &str, help: &str, histogram: Histogram) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
    let (counts, micros) = histogram.distribution();
    let mut total = 0;
    for (limit, count) in BUCKETS.iter().map(|limit| seconds(*limit)).chain(["+Inf".into()]).zip(counts) {
        total += count;
        let _ = writeln!(out, "{name}_bucket{{le=\"{limit}\"}} {total}");
    }
    let _ = writeln!(out, "{name}_sum {}\n{name}_count {total}", seconds(micros));
}

fn seconds(micros: u64) -> String {
    format!("{}.{:06}", micros / 1_000_000, micros % 1_000_000).trim_end_matches('0').trim_end_matches('.').into()
}

/// Counts the descriptors of this process. `None` without /proc.
fn open_descriptors() -> Option<u64> {
    // Linux 6.2 reports their number as the size, without a list of a million names.
    let size = fs::metadata("/proc/self/fd").ok()?.len();
    if size > 0 { Some(size) } else { u64::try_from(fs::read_dir("/proc/self/fd").ok()?.count()).ok() }
}
