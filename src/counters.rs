//! Counts of events, for metrics. Each thread counts in memory of its own, so that threads do not slow each other down,
//! and the reader adds them up. A process has one server, so there is one set.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

macro_rules! table {
    ($type:ident $table:ident $($variant:ident $name:literal $label:literal $help:literal)*) => {
        #[derive(Clone, Copy, Debug)]
        pub(crate) enum $type { $($variant),* }
        /// Name, label and help of the metric of each. A metric with several labels has the help of the first one.
        pub(crate) const $table: &[($type, &str, &str, &str)] = &[$(($type::$variant, $name, $label, $help)),*];
    };
}

// `Open…` decreases too.
table! { Counter COUNTERS
    Sessions "s5_sessions_started_total" "" "Connections that became sessions."
    OpenSessions "s5_sessions_open" "" "Open sessions."
    OpenAssociations "s5_associations_open" "" "Open UDP associations."
    Refused "s5_connections_refused_total" "" "Connections closed at accept, by a rule or the limit of a client."
    BytesUp "s5_relayed_bytes_total" "direction=\"up\"" "Bytes from clients (up) and to clients (down)."
    BytesDown "s5_relayed_bytes_total" "direction=\"down\"" ""
    FailedLogins "s5_login_failures_total" "" "Logins with a wrong password or ticket."
    Delayed "s5_login_refusals_delayed_total" "" "Refusals of logins that were delayed."
    DropSender "s5_datagrams_dropped_total" "reason=\"sender\"" "Datagrams that were not relayed."
    DropMalformed "s5_datagrams_dropped_total" "reason=\"malformed\"" ""
    DropFragment "s5_datagrams_dropped_total" "reason=\"fragment\"" ""
    DropDenied "s5_datagrams_dropped_total" "reason=\"denied\"" ""
    DropRate "s5_datagrams_dropped_total" "reason=\"rate\"" ""
    DropLookup "s5_datagrams_dropped_total" "reason=\"lookup\"" ""
    DropHop "s5_datagrams_dropped_total" "reason=\"hop\"" ""
    DropUnsent "s5_datagrams_dropped_total" "reason=\"unsent\"" ""
    LostLines "s5_log_lines_dropped_total" "reason=\"unwritten\"" "Lines that are missing in the log."
    OmittedLines "s5_log_lines_dropped_total" "reason=\"limit\"" ""
    OpenPipes "s5_pipes_open" "" "Pipes of bulk transfers."
}

table! { Histogram HISTOGRAMS
    Handshake "s5_handshake_seconds" "" "Time from accept to the request."
    Lookup "s5_lookup_seconds" "" "Time of a name lookup, also if it failed."
    Connect "s5_connect_seconds" "" "Time to connect to a target or proxy, also if it failed."
    LoopLag "s5_event_loop_lag_seconds" "" "Time until all workers had run a task, measured every second."
}

/// Upper limits of the buckets of all histograms, in microseconds.
pub(crate) const BUCKETS: [u64; 8] = [250, 1_000, 5_000, 25_000, 100_000, 500_000, 2_500_000, 10_000_000];
/// A bucket for longer times, and the sum.
const CELLS_PER_HISTOGRAM: usize = BUCKETS.len() + 2;
const FIRST_RESULT: usize = COUNTERS.len() + HISTOGRAMS.len() * CELLS_PER_HISTOGRAM;
pub(crate) const RESULTS: usize = 176;

/// Number of threads with memory of their own. Further workers share it, and all other threads have the first one.
const BLOCKS: usize = 64;

/// The counts of one thread, in cache lines of its own.
#[repr(align(128))]
struct Block([AtomicU64; FIRST_RESULT + RESULTS]);

static ALL: [Block; BLOCKS] = [const { Block([const { AtomicU64::new(0) }; FIRST_RESULT + RESULTS]) }; BLOCKS];

thread_local! {
    static THIS: Cell<usize> = const { Cell::new(0) };
}

/// Makes this thread, which is the worker with this index, count separately.
pub(crate) fn set_worker(index: usize) {
    THIS.set(1 + index % (BLOCKS - 1));
}

fn add_to(cell: usize, n: u64) {
    if let Some(cell) = ALL.get(THIS.get()).and_then(|block| block.0.get(cell)) {
        cell.fetch_add(n, Relaxed);
    }
}

fn sum_of(cell: usize) -> u64 {
    let sum = ALL.iter().filter_map(|block| block.0.get(cell)).fold(0, |sum, n| n.load(Relaxed).wrapping_add(sum));
    // Negative for a moment, if a thread ends what another one has begun.
    if sum > u64::MAX / 2 { 0 } else { sum }
}

/// Adds `n` to a counter. `u64::MAX` subtracts 1.
pub(crate) fn add(counter: Counter, n: u64) {
    add_to(counter as usize, n);
}

pub(crate) fn count(counter: Counter) {
    add(counter, 1);
}

pub(crate) fn sum(counter: Counter) -> u64 {
    sum_of(counter as usize)
}

/// Counts the result of a session, a number below [`RESULTS`].
pub(crate) fn count_result(result: usize) {
    add_to(FIRST_RESULT + result, 1);
}

pub(crate) fn results() -> impl Iterator<Item = u64> {
    (0..RESULTS).map(|result| sum_of(FIRST_RESULT + result))
}

impl Histogram {
    fn cell(self, i: usize) -> usize {
        COUNTERS.len() + self as usize * CELLS_PER_HISTOGRAM + i
    }

    pub(crate) fn observe(self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let bucket = BUCKETS.iter().position(|limit| micros <= *limit).unwrap_or(BUCKETS.len());
        add_to(self.cell(bucket), 1);
        add_to(self.cell(BUCKETS.len() + 1), micros);
    }

    /// Returns the number of durations in each bucket, with the longest last, and the sum in microseconds.
    pub(crate) fn distribution(self) -> (impl Iterator<Item = u64>, u64) {
        ((0..=BUCKETS.len()).map(move |i| sum_of(self.cell(i))), sum_of(self.cell(BUCKETS.len() + 1)))
    }
}

/// Counts one thing of an `Open…` counter until it is dropped.
pub(crate) struct OpenGuard(Counter);

impl OpenGuard {
    pub(crate) fn new(counter: Counter) -> Self {
        count(counter);
        Self(counter)
    }
}

impl Drop for OpenGuard {
    fn drop(&mut self) {
        add(self.0, u64::MAX);
    }
}

/// Adds the time until its drop to [`Histogram::Connect`]. Small, because each session that connects has one.
pub(crate) struct ConnectTimer(pub(crate) Instant);

impl Drop for ConnectTimer {
    fn drop(&mut self) {
        Histogram::Connect.observe(self.0.elapsed());
    }
}
