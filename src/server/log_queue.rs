//! Lines for stderr. A queue and a thread of its own let a stalled reader of stderr (a full pipe, a terminal after Ctrl-S)
//! stop neither sessions nor signals: it costs lines, which are counted.

use std::cell::Cell;
use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::session_log::LOGFMT_TARGET;

/// Further lines are dropped. A line has about 250 bytes.
const MAX_QUEUED_BYTES: usize = 1 << 20;
/// Pause after the lines that a wake-up has found, so that a busy server wakes the thread 100 times a second and not for
/// each line.
const PAUSE: Duration = Duration::from_millis(10);
/// Time to write the queued lines at the exit.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

static QUEUE: Mutex<Queue> =
    Mutex::new(Queue { lines: String::new(), dropped: 0, state: WriterState::None, is_flushing: false });
static CHANGED: Condvar = Condvar::new();

thread_local! {
    static IS_WRITER: Cell<bool> = const { Cell::new(false) };
}

struct Queue {
    lines: String,
    /// Lines that did not fit since the last report.
    dropped: u64,
    state: WriterState,
    is_flushing: bool,
}

#[derive(PartialEq)]
enum WriterState {
    /// There is no thread yet.
    None,
    /// It waits for a line.
    Idle,
    /// It writes, or pauses.
    Busy,
}

fn queue() -> MutexGuard<'static, Queue> {
    QUEUE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes a line to stderr: at once until the server runs, which may block, and then through the queue.
pub fn eprint_line(line: &str) {
    let mut queue = queue();
    if queue.state == WriterState::None || IS_WRITER.get() {
        drop(queue);
        // Nobody else could be told about an error.
        let _ = write_directly(&format!("{line}\n"));
        return;
    }
    if queue.lines.len() + line.len() >= MAX_QUEUED_BYTES {
        queue.dropped += 1;
        return;
    }
    queue.lines.push_str(line);
    queue.lines.push('\n');
    if queue.state == WriterState::Idle {
        queue.state = WriterState::Busy;
        CHANGED.notify_all();
    }
}

/// Waits until the queued lines are written, for at most a second.
pub fn flush() {
    let mut queue = queue();
    if queue.state != WriterState::None {
        queue.is_flushing = true;
        CHANGED.notify_all();
        let _ = CHANGED.wait_timeout_while(queue, FLUSH_TIMEOUT, |queue| queue.state == WriterState::Busy);
    }
}

/// Starts the thread.
pub(super) fn start() -> io::Result<()> {
    queue().state = WriterState::Busy;
    let started = std::thread::Builder::new().name("s5-log".into()).spawn(run);
    started.map(drop).inspect_err(|_| queue().state = WriterState::None)
}

fn run() {
    IS_WRITER.set(true);
    let mut lost: u64 = 0;
    loop {
        let mut queue = CHANGED
            .wait_while(queue(), |queue| {
                let is_idle = queue.lines.is_empty();
                if is_idle && queue.state != WriterState::Idle {
                    queue.state = WriterState::Idle;
                    CHANGED.notify_all();
                }
                is_idle
            })
            .unwrap_or_else(PoisonError::into_inner);
        // The lines that were dropped follow those in the queue.
        let (lines, dropped) = (std::mem::take(&mut queue.lines), std::mem::take(&mut queue.dropped));
        drop(queue);
        lost += dropped;
        let mut is_written = true;
        for line in lines.split_inclusive('\n') {
            is_written = write_directly(line).is_ok();
            lost += u64::from(!is_written);
        }
        if lost > 0 && is_written {
            // Not through the queue, because this is its thread.
            log::warn!(target: LOGFMT_TARGET, "msg=lost lines={lost} error=\"stderr was not read, or had an error\"");
            lost = 0;
        }
        // Before the pause, in which the memory is not needed.
        drop(lines);
        let _ = CHANGED.wait_timeout_while(self::queue(), PAUSE, |queue| !queue.is_flushing);
    }
}

/// Writes text to stderr in one write, since other processes may write there too.
fn write_directly(text: &str) -> io::Result<()> {
    let stderr = io::stderr();
    let mut rest = text.as_bytes();
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
