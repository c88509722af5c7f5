//! The soak: mixed load for a long time. Memory, descriptors, threads and the p99 of round trips must not grow, and no
//! data may be lost.

use crate::*;

/// Time between two samples.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(5);
/// Fraction of the time that is not evaluated, because caches and pools still grow.
const WARM_UP: f64 = 0.1;
/// Limit for the last quarter, in MiB: the value of the first quarter times a factor, plus an amount.
const MEMORY: (f64, f64) = (1.05, 0.25);
const DESCRIPTORS: (f64, f64) = (1.02, 10.0);
const THREADS: (f64, f64) = (1.0, 2.0);
/// Limit in microseconds. Other work on the machine changes the p99.
const P99: (f64, f64) = (1.5, 100.0);
/// Descriptors that may be open in addition to those at the start, after all clients have disconnected.
const MAX_LEFT_OPEN: u64 = 4;
/// Time for the last sessions to end.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(15);
/// Maximum fraction of lost datagrams. A datagram counts as lost after 200 ms.
const MAX_LOSS: f64 = 1e-4;

struct Sample {
    minute: f64,
    /// In the order of `NAMES`.
    values: [f64; 5],
}

const NAMES: [(&str, (f64, f64)); 5] = [
    ("resident memory, MiB", MEMORY),
    ("private dirty memory, MiB", MEMORY),
    ("descriptors", DESCRIPTORS),
    ("threads", THREADS),
    ("p99 of a round trip, us", P99),
];

fn take_sample(tree: &Tree, load: &Load, minute: f64) -> Sample {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let mut times = std::mem::take(&mut *load.times.lock().expect("not poisoned"));
    let (resident, dirty) = (mib(tree.resident()), mib(tree.private_dirty()));
    let values = [resident, dirty, tree.descriptors() as f64, tree.threads() as f64, times.quantile(0.99)];
    Sample { minute, values }
}

/// Runs the soak and writes the report. Returns true if all checks have passed.
pub fn run(s5: &Proxy, target: &Target, time: Duration, out: &Path) -> Result<bool, BenchError> {
    let environment = report::environment();
    let running = s5.start()?;
    let tree = &running.tree;
    thread::sleep(Duration::from_millis(200));
    let descriptors_at_start = tree.descriptors();
    let load = Load::new(&running, target)?;
    let samples = thread::scope(|scope| {
        load.start(scope);
        let samples = sample(tree, &load, time);
        load.end();
        samples
    });
    let left = wait_for_close(tree, descriptors_at_start);
    let (table, is_good) = evaluate(&load, &samples, descriptors_at_start, left);
    let text = format!(
        "# Soak: {:.1} minutes of mixed load\n\n{environment}\n{}\n{table}\n",
        time.as_secs_f64() / 60.0,
        summary(&load)
    );
    fs::write(out.join("soak.md"), &text)?;
    println!("{text}");
    Ok(is_good)
}

fn sample(tree: &Tree, load: &Load, time: Duration) -> Vec<Sample> {
    let (started, interval) = (Instant::now(), SAMPLE_INTERVAL.min(time / 40));
    let mut samples: Vec<Sample> = Vec::new();
    while started.elapsed() < time {
        thread::sleep(interval.min(time.saturating_sub(started.elapsed())));
        let minute = started.elapsed().as_secs_f64() / 60.0;
        let sample = take_sample(tree, load, minute);
        if samples.last().is_none_or(|last| last.minute.floor() < minute.floor()) {
            let [resident, dirty, descriptors, threads, p99] = sample.values;
            eprintln!(
                "minute {minute:.0}: {resident:.1} MiB resident, {dirty:.1} private dirty, {descriptors} descriptors, \
                 {threads} threads, p99 {p99:.0} us, {} errors",
                load.counts.errors.load(Ordering::Relaxed)
            );
        }
        let has_exited = sample.values[2] == 0.0;
        samples.push(sample);
        if has_exited {
            break;
        }
    }
    samples
}

/// Waits until the sessions have ended. Returns the number of open descriptors.
fn wait_for_close(tree: &Tree, descriptors_at_start: u64) -> u64 {
    let started = Instant::now();
    while tree.descriptors() > descriptors_at_start + MAX_LEFT_OPEN && started.elapsed() < CLOSE_TIMEOUT {
        thread::sleep(Duration::from_millis(100));
    }
    tree.descriptors()
}

fn summary(load: &Load) -> String {
    let counts = &load.counts;
    let [trips, tunnels, bytes, datagrams, misbehaved] =
        [&counts.trips, &counts.tunnels, &counts.bytes, &counts.datagrams, &counts.misbehaved]
            .map(|count| count.load(Ordering::Relaxed));
    format!(
        "{trips} round trips, {tunnels} short tunnels, {:.1} GiB in bulk, {datagrams} datagrams echoed, all \
         bytes compared; {misbehaved} clients that reset, stalled, or disconnected during the handshake.\n",
        bytes as f64 / f64::from(1 << 30)
    )
}

fn evaluate(load: &Load, samples: &[Sample], descriptors_at_start: u64, left: u64) -> (String, bool) {
    let mut is_good = true;
    let mut result_of = |is_flat: bool| {
        is_good &= is_flat;
        if is_flat { "flat" } else { "**grows**" }
    };
    let mut text = "| | first quarter | last quarter | |\n| --- | --: | --: | --- |\n".to_owned();
    let counted = &samples[(samples.len() as f64 * WARM_UP) as usize..];
    let quarter = (counted.len() / 4).max(1).min(counted.len());
    for (at, (name, allowed)) in NAMES.iter().enumerate() {
        let median_of = |samples: &[Sample]| {
            let values: Vec<_> = samples.iter().map(|sample| sample.values[at]).filter(|v| v.is_finite()).collect();
            median(&values)
        };
        let (first, last) = (median_of(&counted[..quarter]), median_of(&counted[counted.len() - quarter..]));
        let result = result_of(last <= first * allowed.0 + allowed.1);
        let _ = writeln!(text, "| {name} | {first:.1} | {last:.1} | {result} |");
    }
    let [errors, lost, datagrams] =
        [&load.counts.errors, &load.counts.lost, &load.counts.datagrams].map(|count| count.load(Ordering::Relaxed));
    let is_loss_low = lost as f64 <= MAX_LOSS * datagrams as f64;
    let is_closed = left > 0 && left <= descriptors_at_start + MAX_LEFT_OPEN;
    is_good &= errors == 0 && is_loss_low && is_closed;
    let _ = writeln!(text, "\n- errors: {errors}\n- datagrams not echoed within 200 ms: {lost} of {datagrams}");
    let _ = writeln!(text, "- descriptors: {descriptors_at_start} at the start, {left} after all clients disconnected");
    for error in load.errors.lock().expect("not poisoned").iter() {
        let _ = writeln!(text, "- {error}");
    }
    let _ = writeln!(text, "\n{}", if is_good { "All checks passed." } else { "**A check failed.**" });
    (text, is_good)
}
