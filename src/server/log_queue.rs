//! Writes the lines for stderr on another thread. So a reader of stderr that has stopped (a full pipe, a terminal after
//! Ctrl-S) stops neither sessions nor signals. Lines above the limit of the queue are lost and counted.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex};
use std::thread::{Builder, sleep};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::log_shares::LOGFMT_TARGET;
use super::shares::lock;

/// Maximum number of lines in the queue. A line has about 250 bytes.
const MAX_LINES: usize = 4096;
/// Pause after each batch of lines, so that a busy server wakes the thread 100 times a second and not for each line.
const PAUSE: Duration = Duration::from_millis(10);
/// Time to write the queued lines at the exit.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

// Not a channel of std, which takes 8 KB of code.
static QUEUE: Mutex<VecDeque<String>> = Mutex::new(VecDeque::new());
/// Notified of the first line in an empty queue.
static HAS_LINE: Condvar = Condvar::new();
static IS_STARTED: AtomicBool = AtomicBool::new(false);
/// Lines that are not written yet.
static WAITING: AtomicUsize = AtomicUsize::new(0);
/// Lines that were lost since the last report.
static LOST: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static IS_WRITER: Cell<bool> = const { Cell::new(false) };
}

/// Writes a line to stderr: through the queue while the server runs, otherwise directly, which may block.
pub fn eprint_line(line: &str) {
    let line = format!("{line}\n");
    if !IS_STARTED.load(Ordering::Acquire) || IS_WRITER.get() {
        // There is no other place to report an error.
        return drop(write(&line));
    }
    let mut queue = lock(&QUEUE);
    if queue.len() >= MAX_LINES {
        LOST.fetch_add(1, Ordering::Relaxed);
        return;
    }
    WAITING.fetch_add(1, Ordering::Relaxed);
    queue.push_back(line);
    // Only for the first one: a notification is a system call.
    if queue.len() == 1 {
        HAS_LINE.notify_one();
    }
}

/// Waits until the queued lines are written, for at most a second.
pub fn flush() {
    let deadline = Instant::now() + FLUSH_TIMEOUT;
    while WAITING.load(Ordering::Acquire) > 0 && Instant::now() < deadline {
        sleep(Duration::from_millis(1));
    }
}

/// Starts the thread.
pub(super) fn start() -> io::Result<()> {
    Builder::new().name("s5-log".into()).spawn(run)?;
    IS_STARTED.store(true, Ordering::Release);
    Ok(())
}

fn run() {
    IS_WRITER.set(true);
    loop {
        drop(HAS_LINE.wait_while(lock(&QUEUE), |queue| queue.is_empty()));
        let mut is_written = false;
        // As many as wait while the first one is written. Later ones follow the report of lost lines.
        for _ in 0..=MAX_LINES {
            let Some(line) = lock(&QUEUE).pop_front() else { break };
            is_written = write(&line).is_ok();
            LOST.fetch_add(u64::from(!is_written), Ordering::Relaxed);
            WAITING.fetch_sub(1, Ordering::Release);
        }
        if is_written && let lost @ 1.. = LOST.swap(0, Ordering::Relaxed) {
            // Not through the queue, because this is its thread.
            log::warn!(target: LOGFMT_TARGET, "msg=lost lines={lost} error=\"stderr was not read, or had an error\"");
        }
        sleep(PAUSE);
    }
}

/// Writes a line to stderr in one write, since other processes may write there too.
fn write(line: &str) -> io::Result<()> {
    let stderr = io::stderr();
    let mut rest = line.as_bytes();
    while !rest.is_empty() {
        match rustix::io::write(&stderr, rest) {
            Ok(n) => rest = rest.get(n..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            // Another process has made it non-blocking.
            Err(Errno::AGAIN) => drop(poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], None)),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
