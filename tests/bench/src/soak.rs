//! The soak: mixed load for a long time, while memory, descriptors, threads and the p99 of round trips stay flat and
//! nothing is lost.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use crate::chart::{self, Panel};
use crate::cpu::Tree;
use crate::load::Load;
use crate::measure::{Fault, median};
use crate::proxies::Proxy;
use crate::report;
use crate::target::Target;

/// How often is looked.
const SAMPLE: Duration = Duration::from_secs(5);
/// This part of the time is not judged: caches and pools fill.
const WARM_UP: f64 = 0.1;
/// What the last quarter may have more than the first: a factor, and this much besides.
const MEMORY: (f64, f64) = (1.05, 0.25);
const DESCRIPTORS: (f64, f64) = (1.02, 10.0);
const THREADS: (f64, f64) = (1.0, 2.0);
/// Microseconds; a machine with other work has p99s of its own.
const P99: (f64, f64) = (1.5, 100.0);
/// When everybody has gone, so have their descriptors, but for these.
const LEFT: u64 = 4;
/// How long the last sessions may take to end.
const LEAVING: Duration = Duration::from_secs(15);
/// The part of the datagrams that may be late by so much that they count as lost.
const LOST: f64 = 1e-4;

/// Minutes, and MiB, MiB, count, count, microseconds.
struct Sample {
    minute: f64,
    values: [f64; 5],
}

const NAMES: [(&str, (f64, f64)); 5] = [
    ("resident memory, MiB", MEMORY),
    ("private dirty memory, MiB", MEMORY),
    ("descriptors", DESCRIPTORS),
    ("threads", THREADS),
    ("p99 of a round trip, us", P99),
];

fn look(tree: &Tree, load: &Load, minute: f64) -> Sample {
    let mib = |octets: u64| octets as f64 / f64::from(1 << 20);
    let mut times = std::mem::take(&mut *load.times.lock().expect("no panic holds it"));
    let (resident, dirty) = (mib(tree.resident()), mib(tree.private_dirty()));
    let values = [resident, dirty, tree.descriptors() as f64, tree.threads() as f64, times.quantile(0.99)];
    Sample { minute, values }
}

/// Whether all was well.
pub fn run(s5: &Proxy, target: &Target, time: Duration, out: &Path) -> Result<bool, Fault> {
    let circumstances = report::circumstances();
    let running = s5.start()?;
    let tree = &running.tree;
    thread::sleep(Duration::from_millis(200));
    let at_start = tree.descriptors();
    let load = Load::new(&running, target)?;
    let samples = thread::scope(|scope| {
        load.start(scope);
        let samples = sample(tree, &load, time);
        load.end();
        samples
    });
    let left = wait_for_the_last(tree, at_start);
    let (verdicts, good) = judge(&load, &samples, at_start, left);
    let text = format!(
        "# Soak: {:.1} minutes of mixed load\n\n{circumstances}\n{}\n{verdicts}\n![soak](soak.svg)\n",
        time.as_secs_f64() / 60.0,
        done(&load)
    );
    let panel = |(at, (name, _)): (usize, &(&str, _))| {
        let points = samples.iter().filter(|sample| sample.values[at].is_finite());
        let points = points.map(|sample| (sample.minute, sample.values[at])).collect();
        Panel { title: (*name).into(), points }
    };
    let panels: Vec<_> = NAMES.iter().enumerate().map(panel).collect();
    fs::write(out.join("soak.md"), &text)?;
    fs::write(out.join("soak.svg"), chart::lines(&panels))?;
    println!("{text}");
    Ok(good)
}

fn sample(tree: &Tree, load: &Load, time: Duration) -> Vec<Sample> {
    let (began, every) = (Instant::now(), SAMPLE.min(time / 40));
    let mut samples: Vec<Sample> = Vec::new();
    while began.elapsed() < time {
        thread::sleep(every.min(time.saturating_sub(began.elapsed())));
        let minute = began.elapsed().as_secs_f64() / 60.0;
        let sample = look(tree, load, minute);
        if samples.last().is_none_or(|last| last.minute.floor() < minute.floor()) {
            let [resident, dirty, descriptors, threads, p99] = sample.values;
            eprintln!(
                "minute {minute:.0}: {resident:.1} MiB resident, {dirty:.1} private dirty, {descriptors} descriptors, \
                 {threads} threads, p99 {p99:.0} us, {} faults",
                load.counts.faults.load(Ordering::Relaxed)
            );
        }
        let is_gone = sample.values[2] == 0.0;
        samples.push(sample);
        if is_gone {
            break;
        }
    }
    samples
}

/// How many descriptors are left once everybody has gone.
fn wait_for_the_last(tree: &Tree, at_start: u64) -> u64 {
    let began = Instant::now();
    while tree.descriptors() > at_start + LEFT && began.elapsed() < LEAVING {
        thread::sleep(Duration::from_millis(100));
    }
    tree.descriptors()
}

fn done(load: &Load) -> String {
    let counts = &load.counts;
    let [trips, tunnels, octets, datagrams, misbehaved] =
        [&counts.trips, &counts.tunnels, &counts.octets, &counts.datagrams, &counts.misbehaved]
            .map(|count| count.load(Ordering::Relaxed));
    format!(
        "{trips} round trips, {tunnels} short tunnels, {:.1} GiB in bulk, {datagrams} datagrams there and back, all \
         octets compared; {misbehaved} clients that reset, stalled, or vanished in the handshake.\n",
        octets as f64 / f64::from(1 << 30)
    )
}

fn judge(load: &Load, samples: &[Sample], at_start: u64, left: u64) -> (String, bool) {
    let mut good = true;
    let mut say = |well: bool| {
        good &= well;
        if well { "flat" } else { "**grows**" }
    };
    let mut text = "| | first quarter | last quarter | |\n| --- | --: | --: | --- |\n".to_owned();
    let judged = &samples[(samples.len() as f64 * WARM_UP) as usize..];
    let quarter = (judged.len() / 4).max(1).min(judged.len());
    for (at, (name, allowed)) in NAMES.iter().enumerate() {
        let of = |samples: &[Sample]| {
            let values: Vec<_> = samples.iter().map(|sample| sample.values[at]).filter(|v| v.is_finite()).collect();
            median(&values)
        };
        let (first, last) = (of(&judged[..quarter]), of(&judged[judged.len() - quarter..]));
        let verdict = say(last <= first * allowed.0 + allowed.1);
        let _ = writeln!(text, "| {name} | {first:.1} | {last:.1} | {verdict} |");
    }
    let [faults, lost, datagrams] =
        [&load.counts.faults, &load.counts.lost, &load.counts.datagrams].map(|count| count.load(Ordering::Relaxed));
    let few = lost as f64 <= LOST * datagrams as f64;
    let gone = left > 0 && left <= at_start + LEFT;
    good &= faults == 0 && few && gone;
    let _ = writeln!(text, "\n- faults: {faults}\n- datagrams not back within 200 ms: {lost} of {datagrams}");
    let _ = writeln!(text, "- descriptors before: {at_start}, and when everybody had gone: {left}");
    for fault in load.faults.lock().expect("no panic holds it").iter() {
        let _ = writeln!(text, "- {fault}");
    }
    let _ = writeln!(text, "\n{}", if good { "All was well." } else { "**Not all was well.**" });
    (text, good)
}
