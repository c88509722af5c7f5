//! The log: each record is one line on stderr, or in the file of `--access-log`.
//!
//! Lines about sessions are logfmt, also messages of other modules while they work for a session. The other lines have
//! the form of simple_logger: time, level, module and text. With `--log-format json`, all lines are JSON objects. In the
//! journal, a priority replaces the time.

use std::env;
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use log::{Level, LevelFilter, Log, Metadata, Record, SetLoggerError};
use simple_logger::SimpleLogger;

use super::escape::{escape, plain_os_errors};
use super::logfmt::to_json;
use crate::server::{ACCESS_TARGET, LOGFMT_TARGET, access_line, admits_detail, current_session, eprint_line, flush};

/// Set if each line is a JSON object.
static IS_JSON: AtomicBool = AtomicBool::new(false);

/// Writes the records that the levels of `SimpleLogger` allow. `SimpleLogger` itself would block while stderr is not
/// read. It writes a line in two parts, between which another process can write, and panics if stderr is closed.
pub struct Logger {
    filter: SimpleLogger,
    /// Most verbose level of the lines of ended sessions.
    access_level: LevelFilter,
}

impl Logger {
    /// Returns a logger for records of this level and the more severe ones. With an access log, the lines of ended
    /// sessions are not left out.
    pub(in crate::cmd) fn new(level: LevelFilter, is_json: bool, has_access_log: bool) -> Self {
        IS_JSON.store(is_json, Ordering::Relaxed);
        let access_level = if has_access_log { level.max(LevelFilter::Info) } else { level };
        Self { filter: SimpleLogger::new().with_level(level), access_level }
    }

    /// Makes this the logger of the process.
    ///
    /// # Errors
    /// The process has a logger already.
    pub fn install(self) -> Result<(), SetLoggerError> {
        log::set_max_level(self.access_level);
        log::set_boxed_logger(Box::new(self))
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        match metadata.target() {
            ACCESS_TARGET => metadata.level() <= self.access_level,
            _ => self.filter.enabled(metadata),
        }
    }

    fn log(&self, record: &Record<'_>) {
        let is_detail = record.level() >= Level::Debug && !is_logfmt(record.target());
        if !self.enabled(record.metadata()) || (is_detail && !admits_detail()) {
            return;
        }
        if record.target() != ACCESS_TARGET || !access_line(|| line(record, "")) {
            eprint_line(&line(record, journal_priority(record.level())));
        }
    }

    fn flush(&self) {
        flush();
    }
}

fn is_logfmt(target: &str) -> bool {
    [LOGFMT_TARGET, ACCESS_TARGET].contains(&target)
}

/// Returns the line of a record, without a line end. It has a priority or a time.
fn line(record: &Record<'_>, priority: &str) -> String {
    let (level, target, text) = (record.level(), record.target(), plain_os_errors(record.args().to_string()));
    let fields = match current_session() {
        _ if is_logfmt(target) => text,
        Some(id) => format!("msg=detail id={id} module={target} text={text:?}"),
        None if IS_JSON.load(Ordering::Relaxed) => format!("msg=detail module={target} text={text:?}"),
        None => {
            let start = if priority.is_empty() { now() + " " } else { priority.into() };
            return escape(&format!("{start}{level:<5} [{target}] {}", text.replace('\n', " ")));
        }
    };
    with_start(priority, level, &fields)
}

/// Returns the line of an error that ends s5, without a line end.
pub(super) fn error_line(error: &str) -> String {
    let priority = journal_priority(Level::Error);
    match IS_JSON.load(Ordering::Relaxed) {
        true => with_start(priority, Level::Error, &format!("msg=detail module=s5 text={error:?}")),
        false => format!("{priority}s5: {error}"),
    }
}

/// Adds a priority or the time, and the level.
fn with_start(priority: &str, level: Level, fields: &str) -> String {
    let time = if priority.is_empty() { format!("ts={} ", now()) } else { String::new() };
    let fields = format!("{time}level={} {fields}", level.as_str().to_ascii_lowercase());
    match IS_JSON.load(Ordering::Relaxed) {
        true => format!("{priority}{}", to_json(&fields)),
        false => format!("{priority}{}", escape(&fields)),
    }
}

fn now() -> String {
    humantime::format_rfc3339_millis(SystemTime::now()).to_string()
}

/// Returns the start of a line that the journal of systemd reads as its priority (sd-daemon(3)), such as `<6>`. Empty
/// if stderr is not connected to the journal. A parent that has redirected stderr passes JOURNAL_STREAM
/// (systemd.exec(5)) on.
fn journal_priority(level: Level) -> &'static str {
    static IS_JOURNAL: OnceLock<bool> = OnceLock::new();
    let is_journal = || {
        let stat = rustix::fs::fstat(io::stderr()).map(|stat| format!("{}:{}", stat.st_dev, stat.st_ino));
        stat.is_ok_and(|stat| env::var("JOURNAL_STREAM") == Ok(stat))
    };
    match level {
        _ if !*IS_JOURNAL.get_or_init(is_journal) => "",
        Level::Error => "<3>",
        Level::Warn => "<4>",
        Level::Info => "<6>",
        Level::Debug | Level::Trace => "<7>",
    }
}
