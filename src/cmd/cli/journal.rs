//! Priorities of lines in the journal of systemd: see sd-daemon(3) and JOURNAL_STREAM in systemd.exec(5).

use std::env;
use std::io;
use std::sync::OnceLock;

use log::Level;

/// Returns the start of a line that the journal reads as its priority, such as `<6>`. Empty if stderr is not connected
/// to the journal.
pub(super) fn priority(level: Level) -> &'static str {
    static IS_JOURNAL: OnceLock<bool> = OnceLock::new();
    match level {
        _ if !*IS_JOURNAL.get_or_init(is_journal) => "",
        Level::Error => "<3>",
        Level::Warn => "<4>",
        Level::Info => "<6>",
        Level::Debug | Level::Trace => "<7>",
    }
}

/// Compares stderr with JOURNAL_STREAM, because a parent that has redirected stderr passes the variable on.
fn is_journal() -> bool {
    let Ok(stream) = env::var("JOURNAL_STREAM") else { return false };
    rustix::fs::fstat(io::stderr()).is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}
