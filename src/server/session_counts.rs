//! Counts of sessions: those that begin and end, and their results by command, method and REP, a fixed number of
//! combinations. When half of the sessions have ended, their memory is returned to the kernel.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::Relaxed};
use std::sync::{LazyLock, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use smol::channel::{Receiver, Sender, bounded};

use crate::counters::{self, Counter, RESULTS};
use crate::gssapi::ffi;
use crate::proto::{Command, Method, Rep};

/// The names in the order of their codes. `-`: the session ended before.
const COMMANDS: [&str; 4] = ["-", "connect", "bind", "udp"];
const METHODS: [&str; 4] = ["-", "none", "gssapi", "password"];
/// A proxy may reply with any code.
const REPS: [&str; 11] = ["-", "0", "1", "2", "3", "4", "5", "6", "7", "8", "other"];

const _: () = assert!(COMMANDS.len() * METHODS.len() * REPS.len() == RESULTS);

/// Minimum number of ended sessions. Fewer do not have enough memory to be worth the time.
const MIN_ENDED: usize = 64;
/// Time from the end of a session to the return of memory: more sessions may end in it. The return can take
/// milliseconds.
const FREE_DELAY: Duration = Duration::from_secs(1);

/// Number of open sessions, and the maximum since memory was returned last.
static OPEN: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
/// Set while a thread returns memory.
static IS_FREEING: AtomicBool = AtomicBool::new(false);

/// Set if [`changes`] is used: receives a message when a session begins or ends, unless one waits.
static CHANGED: OnceLock<Sender<()>> = OnceLock::new();

/// Counts a new session. Returns its number; after 2^32 sessions, the numbers repeat.
pub(super) fn begin() -> u32 {
    static LAST: AtomicU32 = AtomicU32::new(0);
    PEAK.fetch_max(OPEN.fetch_add(1, Relaxed) + 1, Relaxed);
    counters::count(Counter::Sessions);
    counters::count(Counter::OpenSessions);
    report_change();
    LAST.fetch_add(1, Relaxed).wrapping_add(1)
}

/// Returns the time since the first call, in microseconds.
pub(super) fn uptime_us() -> u64 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    u64::try_from(START.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// Counts the end of a session.
pub(super) fn end() {
    counters::add(Counter::OpenSessions, u64::MAX);
    report_change();
    let open = OPEN.fetch_sub(1, Relaxed) - 1;
    let ended = PEAK.load(Relaxed).saturating_sub(open);
    if ended >= open.max(MIN_ENDED) && !IS_FREEING.swap(true, Relaxed) {
        // Without a thread, the next end of a session tries again.
        let thread = thread::Builder::new().name("s5-free-memory".into()).spawn(free_memory);
        IS_FREEING.fetch_and(thread.is_ok(), Relaxed);
    }
}

/// Returns the memory of ended sessions to the kernel. The allocator keeps free memory below any block that is in use.
/// Otherwise most memory of many sessions would stay with the process after their end.
fn free_memory() {
    thread::sleep(FREE_DELAY);
    PEAK.store(OPEN.load(Relaxed), Relaxed);
    IS_FREEING.store(false, Relaxed);
    ffi::release_free_memory();
}

fn report_change() {
    if let Some(changed) = CHANGED.get() {
        let _ = changed.try_send(());
    }
}

/// Returns a channel that has a message if sessions have begun or ended since the last one was received.
pub(super) fn changes() -> Receiver<()> {
    let (changed, changes) = bounded(1);
    let _ = CHANGED.set(changed);
    changes
}

/// Counts the result of a session if it is a success, or at its end if it is none. `has_addr`: its peer is known.
pub(super) fn count_result(is_end: bool, has_addr: bool, result: (Option<Command>, Option<Method>, Option<Rep>)) {
    let (command, method, rep) = result;
    // BIND has succeeded when its peer has connected, and not after the first reply.
    let is_success = rep == Some(Rep::SUCCEEDED) && (command != Some(Command::Bind) || has_addr);
    if is_success == is_end {
        return;
    }
    let command = command.map_or(0, |command| command as usize);
    let method = method.map_or(0, |method| 1 + usize::from(method.0)).min(METHODS.len() - 1);
    let rep = rep.map_or(0, |rep| 1 + usize::from(rep.0)).min(REPS.len() - 1);
    counters::count_result((command * METHODS.len() + method) * REPS.len() + rep);
}

/// Returns command, method, REP and number of sessions of each result that has occurred.
pub(super) fn results() -> impl Iterator<Item = ([&'static str; 3], u64)> {
    let names = COMMANDS.iter().flat_map(|command| {
        METHODS.iter().flat_map(move |method| REPS.iter().map(move |rep| [*command, *method, *rep]))
    });
    names.zip(counters::results()).filter(|(_, count)| *count > 0)
}

/// Returns the numbers of sessions for the service manager.
pub(super) fn summary() -> String {
    let [open, sessions] = [Counter::OpenSessions, Counter::Sessions].map(counters::sum);
    format!("{open} sessions open, {sessions} since the start")
}

/// Returns the fields of the line of counters, which SIGUSR1 logs.
pub(super) fn fields() -> String {
    use Counter::{BytesDown, BytesUp, FailedLogins, OpenAssociations, OpenSessions, Refused, Sessions};
    let total = |is_counted: fn(&str) -> bool| -> u64 {
        results().filter_map(|([.., rep], count)| is_counted(rep).then_some(count)).sum()
    };
    let (refused, failed) = (total(|rep| rep == "2"), total(|rep| !["-", "0", "2"].contains(&rep)));
    let [open, associations, sessions, closed, failed_logins, up, down] =
        [OpenSessions, OpenAssociations, Sessions, Refused, FailedLogins, BytesUp, BytesDown].map(counters::sum);
    format!(
        "open={open} associations={associations} sessions={sessions} refused={} failed={failed} \
         failed_logins={failed_logins} up={up} down={down}",
        closed + refused
    )
}
