//! `--progress`: bytes, rate and time of a transfer on the terminal.

use std::future::pending;
use std::io::{self, Write as _};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::net::{ByteCounts, sleep};

const REDRAW_INTERVAL: Duration = Duration::from_millis(200);

/// Shows bytes, rate and time on stderr while it is polled, if `is_enabled` is set. Never returns.
pub(super) async fn show<T>(is_enabled: bool, counts: &ByteCounts) -> T {
    if !is_enabled {
        return pending().await;
    }
    let line = ProgressLine { started: Instant::now(), counts };
    loop {
        line.draw("");
        sleep(REDRAW_INTERVAL).await;
    }
}

/// The progress line. Dropping it draws the final values and ends the line.
struct ProgressLine<'a> {
    started: Instant,
    counts: &'a ByteCounts,
}

impl ProgressLine<'_> {
    /// Redraws the line. The control codes return to the first column and erase the line (ECMA-48).
    fn draw(&self, end: &str) {
        let bytes = self.counts.up.load(Ordering::Relaxed) + self.counts.down.load(Ordering::Relaxed);
        let elapsed = self.started.elapsed();
        let rate = u128::from(bytes) * 1000 / elapsed.as_millis().max(1);
        let (size, rate) = (format_size(bytes), format_size(u64::try_from(rate).unwrap_or(u64::MAX)));
        let seconds = elapsed.as_secs();
        let (minutes, seconds) = (seconds / 60, seconds % 60);
        let line = format!("\r\x1b[K{size} in {minutes}:{seconds:02}, {rate}/s{end}");
        // A single write: the reader of stdout, which is closed already, may print at the same time.
        let _ = io::stderr().write_all(line.as_bytes());
    }
}

impl Drop for ProgressLine<'_> {
    fn drop(&mut self) {
        self.draw("\n");
    }
}

/// Formats a size as `17 B`, `1.5 KiB` or `3.2 GiB`.
pub fn format_size(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    match units.into_iter().find(|(shift, _)| bytes >> shift > 0) {
        Some((shift, unit)) => {
            let tenths = ((bytes >> (shift - 10)) * 10) >> 10;
            format!("{}.{} {unit}", tenths / 10, tenths % 10)
        }
        None => format!("{bytes} B"),
    }
}
