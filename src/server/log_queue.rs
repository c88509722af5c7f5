//! Writes the lines for stderr, and those for `--access-log`, each on another thread. So a reader of stderr that has
//! stopped (a full pipe, a terminal after Ctrl-S) or a disk that does not answer stops neither sessions nor signals.
//! Lines above the limit of a queue, or for which the disk has no space, are lost and counted.

use std::cell::Cell;
use std::collections::VecDeque;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, OnceLock};
use std::thread::{Builder, sleep};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{fstat, ftruncate, tell};
use rustix::io::Errno;

use super::log_shares::LOGFMT_TARGET;
use super::output_file::append;
use super::shares::lock;
use crate::counters::{self, Counter};

/// Maximum number of lines in a queue. A line has about 250 bytes.
const MAX_LINES: usize = 4096;
/// Pause after each batch of lines, so that a busy server wakes the thread 100 times a second and not for each line.
const PAUSE: Duration = Duration::from_millis(10);
/// Pause after a line about lost lines, because a disk can become full many times a second.
const PAUSE_AFTER_REPORT: Duration = Duration::from_millis(200);
/// Time to write the queued lines at the exit: of the access log, and of both. The difference is more than a pause.
const FLUSH_TIMEOUTS: [Duration; 2] = [Duration::from_millis(700), Duration::from_secs(1)];

static STDERR: Queue = Queue::new();
static ACCESS_LOG: Queue = Queue::new();
/// Set when the access log is to be opened again.
static REOPEN: AtomicBool = AtomicBool::new(false);
/// Set when another process gets the signals. Then the access log is opened again if another file is at its path.
pub(super) static FOLLOWS_PATH: AtomicBool = AtomicBool::new(false);

thread_local! {
    static WRITES_STDERR: Cell<bool> = const { Cell::new(false) };
}

/// The lines for a thread.
// Not a channel of std, which takes 8 KB of code.
struct Queue {
    lines: Mutex<VecDeque<String>>,
    /// Notified of the first line in an empty queue.
    has_line: Condvar,
    is_started: AtomicBool,
    /// Lines that are not written yet.
    waiting: AtomicUsize,
    /// Lines that were lost since the last report.
    lost: AtomicU64,
    /// Path of the file, unless it is stderr.
    path: OnceLock<String>,
}

impl Queue {
    const fn new() -> Self {
        Self {
            lines: Mutex::new(VecDeque::new()),
            has_line: Condvar::new(),
            is_started: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
            lost: AtomicU64::new(0),
            path: OnceLock::new(),
        }
    }

    /// Starts the thread. It writes to stderr if there is no file.
    fn start(&'static self, name: &str, mut file: Option<(PathBuf, File)>) -> io::Result<()> {
        file.iter().for_each(|(path, _)| drop(self.path.set(path.display().to_string())));
        Builder::new().name(name.into()).spawn(move || self.run(&mut file))?;
        self.is_started.store(true, Ordering::Release);
        Ok(())
    }

    fn push(&self, line: String) {
        let mut lines = lock(&self.lines);
        if lines.len() >= MAX_LINES {
            self.lost.fetch_add(1, Ordering::Relaxed);
            return counters::count(Counter::LostLines);
        }
        self.waiting.fetch_add(1, Ordering::Relaxed);
        lines.push_back(line);
        // Only for the first one: a notification is a system call.
        if lines.len() == 1 {
            self.has_line.notify_one();
        }
    }

    fn run(&self, file: &mut Option<(PathBuf, File)>) {
        WRITES_STDERR.set(file.is_none());
        let mut error = None;
        loop {
            let is_idle =
                |lines: &mut VecDeque<_>| lines.is_empty() && (WRITES_STDERR.get() || !REOPEN.load(Ordering::Relaxed));
            drop(self.has_line.wait_while(lock(&self.lines), is_idle));
            file.iter_mut().for_each(|(path, file)| reopen(path, file));
            let (mut is_written, had_error) = (false, error.is_some());
            // As many as wait while the first one is written. Later ones follow the report of lost lines.
            for _ in 0..=MAX_LINES {
                let Some(line) = lock(&self.lines).pop_front() else { break };
                let written = match file {
                    Some((_, file)) => write(file, &line),
                    None => write(io::stderr(), &line),
                };
                is_written = written.is_ok();
                self.lost.fetch_add(u64::from(!is_written), Ordering::Relaxed);
                counters::add(Counter::LostLines, u64::from(!is_written));
                self.waiting.fetch_sub(1, Ordering::Release);
                error = written.err().or(error);
            }
            let is_reported = match (self.path.get(), &error) {
                (None, _) if is_written => self.report("stderr was not read, or had an error"),
                (Some(_), None) => self.report("the disk was too slow"),
                (Some(_), Some(error)) if is_written => self.report(&error.to_string()),
                (Some(path), Some(error)) if !had_error => {
                    log::error!("--access-log {path}: {error}; lines are lost until it can be written");
                    true
                }
                _ => false,
            };
            error = error.filter(|_| !is_written);
            sleep(if is_reported { PAUSE_AFTER_REPORT } else { PAUSE });
        }
    }

    /// Logs the number of lines that were lost since the last report. Returns whether there were any.
    fn report(&self, error: &str) -> bool {
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let file = self.path.get().map(|path| format!(" file={path:?}")).unwrap_or_default();
            log::warn!(target: LOGFMT_TARGET, "msg=lost lines={lost}{file} error={error:?}");
        }
        lost > 0
    }

    /// Waits until the queued lines are written, but not after the deadline.
    fn flush(&self, deadline: Instant) {
        while self.waiting.load(Ordering::Acquire) > 0 && Instant::now() < deadline {
            sleep(Duration::from_millis(1));
        }
    }
}

/// Opens the file again after [`reopen_access_log`], or if another process has created a new one at the path. After
/// an error, the lines still go to the old file.
fn reopen(path: &Path, file: &mut File) {
    let id = |file: Metadata| (file.dev(), file.ino());
    let is_other = |there| file.metadata().is_ok_and(|open| id(open) != id(there));
    let is_moved = || FOLLOWS_PATH.load(Ordering::Relaxed) && fs::metadata(path).is_ok_and(is_other);
    if REOPEN.swap(false, Ordering::Acquire) || is_moved() {
        match append(path) {
            Ok(new) => *file = new,
            Err(error) => {
                // Logged once, and not for each line.
                FOLLOWS_PATH.store(false, Ordering::Relaxed);
                let is_denied = error.kind() == io::ErrorKind::PermissionDenied;
                let remedy = if is_denied { " (see SANDBOX in the manual)" } else { "" };
                log::error!("--access-log {}: {error}{remedy}; keeping the open file", path.display());
            }
        }
    }
}

/// Writes a line to stderr: through the queue if its thread runs, otherwise directly, which may block.
pub fn eprint_line(line: &str) {
    let line = format!("{line}\n");
    if STDERR.is_started.load(Ordering::Acquire) && !WRITES_STDERR.get() {
        STDERR.push(line);
    } else {
        // There is no other place to report an error.
        drop(write(io::stderr(), &line));
    }
}

/// Writes a line to the access log. Returns false if there is none.
pub fn access_line(line: impl FnOnce() -> String) -> bool {
    let is_started = ACCESS_LOG.is_started.load(Ordering::Acquire);
    if is_started {
        ACCESS_LOG.push(line() + "\n");
    }
    is_started
}

/// Opens the access log again before the next line, so that another program can rename it.
pub(super) fn reopen_access_log() {
    let _lines = lock(&ACCESS_LOG.lines);
    REOPEN.store(true, Ordering::Release);
    ACCESS_LOG.has_line.notify_one();
}

/// Waits until the queued lines are written, for at most a second.
pub fn flush() {
    let [access_log_deadline, deadline] = FLUSH_TIMEOUTS.map(|timeout| Instant::now() + timeout);
    ACCESS_LOG.flush(access_log_deadline);
    // The process may end before the others are written.
    ACCESS_LOG.lost.fetch_add(ACCESS_LOG.waiting.load(Ordering::Acquire) as u64, Ordering::Relaxed);
    ACCESS_LOG.report("the access log could not be written");
    STDERR.flush(deadline);
}

/// Starts the thread for stderr.
pub fn start_stderr_thread() -> io::Result<()> {
    STDERR.start("s5-log", None)
}

/// Starts the threads.
pub(super) fn start(access_log: Option<(PathBuf, File)>) -> io::Result<()> {
    start_stderr_thread()?;
    access_log.map_or(Ok(()), |log| ACCESS_LOG.start("s5-access-log", Some(log)))
}

/// Writes a line in one write, since other processes may write to the same file.
fn write(file: impl AsFd, line: &str) -> io::Result<()> {
    let mut rest = line.as_bytes();
    while !rest.is_empty() {
        match rustix::io::write(&file, rest) {
            Ok(n) => rest = rest.get(n..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            // Another process has made it non-blocking.
            Err(Errno::AGAIN) => drop(poll(&mut [PollFd::new(&file, PollFlags::OUT)], None)),
            Err(error) => {
                remove_end(file, line.len() - rest.len());
                return Err(error.into());
            }
        }
    }
    Ok(())
}

/// Removes the start of a line that the disk has no space for, unless another process has written after it.
fn remove_end(file: impl AsFd, len: usize) {
    let (len, end) = (len as u64, tell(&file).unwrap_or_default());
    if len > 0 && fstat(&file).is_ok_and(|stat| u64::try_from(stat.st_size).is_ok_and(|size| size == end)) {
        let _ = ftruncate(&file, end.saturating_sub(len));
    }
}
