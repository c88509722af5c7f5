//! The log: each record is one line on stderr.
//!
//! Lines about sessions are logfmt, also messages of other modules while they work for a session. The other lines have
//! the form of simple_logger: time, level, module and text. In the journal, a priority replaces the time.

use log::{Level, LevelFilter, Log, Metadata, Record};
use simple_logger::SimpleLogger;
use time::OffsetDateTime;

use super::exit::{eprint_line, escape, journal_priority, plain_os_errors};
use crate::server::{LOGFMT_TARGET, admits_detail, current_session, flush};

/// Writes the records that the levels of `SimpleLogger` allow. `SimpleLogger` itself would block while stderr is not
/// read. It writes a line in two parts, between which another process can write, and panics if stderr is closed.
pub struct Logger(SimpleLogger);

impl Logger {
    /// Returns a logger for records of this level and the more severe ones.
    pub fn new(level: LevelFilter) -> Self {
        Self(SimpleLogger::new().with_level(level))
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.0.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        let is_detail = record.level() >= Level::Debug && record.target() != LOGFMT_TARGET;
        if self.enabled(record.metadata()) && (!is_detail || admits_detail()) {
            eprint_line(&escape(&line(record)));
        }
    }

    fn flush(&self) {
        flush();
    }
}

/// Returns the line of a record, without a line end.
fn line(record: &Record<'_>) -> String {
    let (level, target, mut text) = (record.level(), record.target(), plain_os_errors(record.args().to_string()));
    let name = level.as_str().to_ascii_lowercase();
    let session = current_session().filter(|_| target != LOGFMT_TARGET);
    if let Some(id) = session {
        text = format!("msg=detail id={id} module={target} text={text:?}");
    }
    match (target == LOGFMT_TARGET || session.is_some(), journal_priority(level)) {
        (true, "") => format!("ts={} level={name} {text}", now()),
        (true, priority) => format!("{priority}level={name} {text}"),
        (false, "") => format!("{} {level:<5} [{target}] {}", now(), text.replace('\n', " ")),
        (false, priority) => format!("{priority}{level:<5} [{target}] {}", text.replace('\n', " ")),
    }
}

// Not by `time::format`, which takes 20 KB: the code for all formats.
fn now() -> String {
    let now = OffsetDateTime::now_utc();
    let ((year, month, day), (hour, minute, second, milli)) = (now.to_calendar_date(), now.to_hms_milli());
    format!("{year:04}-{:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{milli:03}Z", u8::from(month))
}
