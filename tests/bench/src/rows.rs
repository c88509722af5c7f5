//! The rows of the report: their measurements, labels and units.

use std::sync::Barrier;

use crate::*;
use Goal::{AtLeast, AtMost, AtMostValue, OfDirect};

/// Time for background work to finish before CPU time and memory are read.
const SETTLE_TIME: Duration = Duration::from_millis(100);
const GIB: f64 = (1 << 30) as f64;

/// One figure of a row.
#[derive(Clone, Copy, Debug)]
pub struct Figure {
    pub id: &'static str,
    pub label: &'static str,
    pub unit: &'static str,
    pub is_higher_better: bool,
    pub digits: usize,
    /// Goals for s5.
    pub goals: &'static [Goal],
}

type Text = &'static str;
type Goals = &'static [Goal];

const fn higher(id: Text, label: Text, unit: Text, digits: usize, goals: Goals) -> Figure {
    Figure { id, label, unit, is_higher_better: true, digits, goals }
}

const fn lower(id: Text, label: Text, unit: Text, digits: usize, goals: Goals) -> Figure {
    Figure { is_higher_better: false, ..higher(id, label, unit, digits, goals) }
}

/// A goal for a figure of s5.
#[derive(Clone, Copy, Debug)]
pub enum Goal {
    /// At most this factor of the best peer's figure.
    AtMost(f64),
    /// At least this factor of the best peer's figure.
    AtLeast(f64),
    /// At most this value, in the unit of the figure.
    AtMostValue(f64),
    /// At least this factor of the figure without a proxy, which is the library alone for GSSAPI.
    OfDirect(f64),
}

impl Goal {
    pub fn text(self, unit: &str) -> String {
        match self {
            Self::AtMost(1.0) | Self::AtLeast(1.0) => "no worse than the best peer".into(),
            Self::AtMost(factor) => format!("at most {factor:.2} of the best peer"),
            Self::AtLeast(factor) => format!("at least {factor:.2} times the best peer"),
            Self::OfDirect(factor) => format!("at least {factor:.2} of the library alone"),
            Self::AtMostValue(max) => format!("at most {max} {unit}"),
        }
    }

    pub fn is_met(self, got: f64, best: Option<f64>) -> Option<bool> {
        match self {
            Self::AtMost(factor) => best.map(|best| got <= factor * best),
            Self::AtLeast(factor) | Self::OfDirect(factor) => best.map(|best| got >= factor * best),
            Self::AtMostValue(max) => Some(got <= max),
        }
    }
}

/// Figures that are measured together, on a proxy started for the row.
pub struct Row {
    /// For `--only`.
    pub name: &'static str,
    /// Name of the chart.
    pub group: &'static str,
    pub figures: &'static [Figure],
    run: RunFn,
}

/// Returns the figures in order, with NaN for missing ones.
type RunFn = fn(&mut Bench, &Proxy) -> Result<Vec<f64>, BenchError>;

const fn row(name: &'static str, group: &'static str, figures: &'static [Figure], run: RunFn) -> Row {
    Row { name, group, figures, run }
}

/// The figures of rows that differ only in their names.
macro_rules! figures {
    (bulk $id:literal, $label:literal, $rate:literal, $cpu:literal) => {
        &[
            higher(concat!($id, ".rate"), $label, "GiB/s", 2, &[AtLeast($rate)]),
            lower(concat!($id, ".cpu"), concat!($label, ", CPU"), "s/GiB", 3, &[AtMost($cpu)]),
        ]
    };
    (trips $id:literal, $label:literal, $goals:expr) => {
        &[
            lower(concat!($id, ".cpu"), concat!("64-byte round trip, ", $label, ", CPU"), "us", 1, $goals),
            lower(concat!($id, ".p50"), concat!("64-byte round trip, ", $label, ", p50"), "us", 0, $goals),
            lower(concat!($id, ".p99"), concat!("64-byte round trip, ", $label, ", p99"), "us", 0, $goals),
        ]
    };
    (udp $id:literal, $label:literal) => {
        &[
            lower(concat!($id, ".cpu"), concat!("UDP round trip, ", $label, ", CPU"), "us", 1, &[AtMost(0.65)]),
            lower(concat!($id, ".p50"), concat!("UDP round trip, ", $label, ", p50"), "us", 0, &[]),
            lower(concat!($id, ".lost"), concat!("UDP round trip, ", $label, ", lost"), "%", 3, &[]),
        ]
    };
    (gssapi $id:literal, $label:literal) => {
        &[
            higher(
                concat!($id, ".rate"),
                concat!("GSSAPI, 1 stream up, ", $label),
                "MiB/s",
                1,
                &[AtLeast(1.5), OfDirect(0.8)],
            ),
            higher(concat!($id, ".thread"), concat!("GSSAPI, ", $label, ", both sides on one thread"), "MiB/s", 1, &[]),
        ]
    };
    (flood $id:literal, $label:literal) => {
        &[higher(
            $id,
            concat!("UDP one-way, ", $label, ", highest rate without loss"),
            "datagrams/s",
            0,
            &[AtLeast(1.0)],
        )]
    };
}

const SHORT: &[Figure] = &[
    higher("short.rate", "short tunnels, 32 at once", "tunnels/s", 0, &[AtLeast(1.15)]),
    lower("short.cpu", "short tunnels, CPU", "us", 1, &[AtMost(0.80)]),
    lower("short.p50", "short tunnels, p50", "ms", 2, &[]),
    lower("short.p99", "short tunnels, p99", "ms", 2, &[AtMost(1.0)]),
];
const IDLE: &[Figure] = &[
    lower("idle.memory", "memory per idle tunnel", "bytes", 0, &[AtMostValue(600.0)]),
    // The goal is zero within the resolution of the clock.
    lower("idle.cpu", "CPU in 3 s with idle tunnels only", "ms", 2, &[AtMostValue(0.1)]),
    lower("growth.few", "short tunnel with 10 idle tunnels, CPU", "us", 1, &[]),
    lower("growth.many", "short tunnel with all idle tunnels, CPU", "us", 1, &[]),
    lower("growth", "growth: CPU with all idle tunnels / with 10", "times", 2, &[AtMostValue(1.15)]),
];
const START: &[Figure] = &[
    lower("start.time", "start: exec to first answered greeting", "ms", 2, &[AtMostValue(10.0)]),
    lower("start.resident", "memory after start, resident", "MiB", 2, &[AtMostValue(3.0)]),
    lower("start.dirty", "memory after start, private dirty", "MiB", 2, &[]),
];
const LOGINS: &[Figure] = &[higher("logins", "GSSAPI logins, 8 at once", "logins/s", 0, &[OfDirect(0.8)])];
/// Goal of the round trips of tunnels.
const AS_PEERS: &[Goal] = &[AtMost(1.0)];

pub static ROWS: &[Row] = &[
    row("down", "bulk", figures!(bulk "down", "1 stream down", 1.35, 0.60), |b, p| b.bulk(p, 1, false)),
    row("up", "bulk", figures!(bulk "up", "1 stream up", 1.35, 0.60), |b, p| b.bulk(p, 1, true)),
    row("down8", "bulk", figures!(bulk "down8", "8 streams down", 1.15, 0.50), |b, p| b.bulk(p, 8, false)),
    row("short", "short", SHORT, Bench::short),
    row("trips1", "round-trips", figures!(trips "trips1", "1 tunnel", AS_PEERS), |b, p| b.trips(p, 1, 0)),
    row("trips32", "round-trips", figures!(trips "trips32", "32 tunnels", AS_PEERS), |b, p| b.trips(p, 32, 0)),
    row("trips1000", "round-trips", figures!(trips "trips1000", "1000 tunnels", AS_PEERS), |b, p| b.trips(p, 1000, 0)),
    row("idle", "idle", IDLE, Bench::idle),
    row("udp512", "udp", figures!(udp "udp512", "512 bytes"), |b, p| b.udp(p, 512, 1, 1)),
    row("udp512w16", "udp", figures!(udp "udp512w16", "512 bytes, 16 in flight"), |b, p| b.udp(p, 512, 1, 16)),
    row("udp512x64", "udp", figures!(udp "udp512x64", "512 bytes, 64 associations"), |b, p| b.udp(p, 512, 64, 1)),
    row("udp1200", "udp", figures!(udp "udp1200", "1200 bytes"), |b, p| b.udp(p, 1200, 1, 1)),
    row("udp1200w16", "udp", figures!(udp "udp1200w16", "1200 bytes, 16 in flight"), |b, p| b.udp(p, 1200, 1, 16)),
    row("udp1200x64", "udp", figures!(udp "udp1200x64", "1200 bytes, 64 associations"), |b, p| b.udp(p, 1200, 64, 1)),
    row("flood512", "flood", figures!(flood "flood512", "512 bytes"), |b, p| b.flood(p, 512)),
    row("flood1200", "flood", figures!(flood "flood1200", "1200 bytes"), |b, p| b.flood(p, 1200)),
    row("start", "start", START, Bench::start),
    row("gssapi1", "gssapi", figures!(gssapi "gssapi1", "integrity"), |b, p| b.protected(p, 1)),
    row("gssapi2", "gssapi", figures!(gssapi "gssapi2", "confidentiality"), |b, p| b.protected(p, 2)),
    row("logins", "gssapi", LOGINS, Bench::logins),
    row("busy1", THREADS, figures!(trips "busy1", "1 busy tunnel", &[]), |b, p| b.trips(p, 1, 0)),
    row("busy8", THREADS, figures!(trips "busy8", "8 busy tunnels", &[]), |b, p| b.trips(p, 8, 0)),
    row("busy32", THREADS, figures!(trips "busy32", "32 busy tunnels", &[]), |b, p| b.trips(p, 32, 0)),
    row("busy500", THREADS, figures!(trips "busy500", "500 busy tunnels", &[]), |b, p| b.trips(p, 500, 0)),
    row("busy5000", THREADS, figures!(trips "busy5000", "5000 busy tunnels", &[]), |b, p| b.trips(p, 5000, 0)),
    row("few5000", THREADS, figures!(trips "few5000", "8 busy among 5000", &[]), |b, p| b.trips(p, 8, 4992)),
];

/// The group of rows for choosing the number of threads. They run only with `--only`.
pub const THREADS: &str = "threads";

/// State shared by all rows.
pub struct Bench {
    pub target: Target,
    pub quick: bool,
    /// Descriptor limit of a process.
    pub descriptors: u64,
    /// Started at its first use.
    pub realm: Option<Realm>,
}

impl Row {
    pub fn measure(&self, bench: &mut Bench, proxy: &Proxy) -> Result<Vec<f64>, BenchError> {
        (self.run)(bench, proxy)
    }
}

impl Bench {
    fn scaled(&self, millis: u64) -> Duration {
        Duration::from_millis(if self.quick { millis / 5 } else { millis })
    }

    pub fn max_idle_tunnels(&self) -> usize {
        if self.quick { 1000 } else { 9000 }
    }

    /// Returns the number of idle tunnels that the descriptor limit allows. The proxy needs other descriptors too.
    pub fn idle_tunnels(&self, proxy: &Proxy) -> usize {
        let max = (self.descriptors.saturating_sub(1500) / proxy.descriptors_per_tunnel()) as usize;
        max.min(self.max_idle_tunnels())
    }

    /// Transfers data in both directions, and compares all of it.
    pub fn compare(&self, proxy: &Proxy) -> Result<(), BenchError> {
        let running = proxy.start()?;
        let limit = TransferLimit::for_bytes(if self.quick { 16 << 20 } else { 128 << 20 });
        for is_upload in [false, true] {
            let stream = socks::connect(running.via, self.target.bulk)?;
            let bytes = target::transfer(&stream, is_upload, limit, true)?;
            if bytes != limit.bytes {
                return Err(corrupt(format!("received {bytes} bytes, expected {}", limit.bytes)));
            }
        }
        Ok(())
    }

    fn bulk(&mut self, proxy: &Proxy, streams: usize, is_upload: bool) -> Result<Vec<f64>, BenchError> {
        let running = proxy.start()?;
        let limit = TransferLimit::for_time(self.scaled(2000));
        let sockets =
            (0..streams).map(|_| socks::connect(running.via, self.target.bulk)).collect::<Result<Vec<_>, _>>()?;
        let (before, started, go) = (running.tree.cpu(), Instant::now(), Barrier::new(streams));
        let transfer = |stream: &TcpStream| {
            go.wait();
            target::transfer(stream, is_upload, limit, false)
        };
        let bytes = sum_of_threads(sockets.iter().map(|stream| move || transfer(stream)))?;
        let (elapsed, cpu) = (started.elapsed().as_secs_f64(), running.tree.cpu() - before);
        let gib = bytes as f64 / GIB;
        Ok(vec![gib / elapsed, unless_direct(&running, cpu / gib)])
    }

    fn short(&mut self, proxy: &Proxy) -> Result<Vec<f64>, BenchError> {
        let running = proxy.start()?;
        tunnels::short_tunnels(running.via, self.target.echo, 32, self.scaled(300))?;
        let (mut times, rate, cpu) = self.measure_short(&running, self.scaled(2000))?;
        Ok(vec![rate, unless_direct(&running, cpu), times.quantile(0.5) / 1e3, times.quantile(0.99) / 1e3])
    }

    /// Returns times, tunnels per second, and microseconds of CPU per tunnel.
    fn measure_short(&self, running: &RunningProxy, time: Duration) -> Result<(Times, f64, f64), BenchError> {
        thread::sleep(SETTLE_TIME);
        let (before, started) = (running.tree.cpu(), Instant::now());
        let times = tunnels::short_tunnels(running.via, self.target.echo, 32, time)?;
        let elapsed = started.elapsed().as_secs_f64();
        thread::sleep(SETTLE_TIME);
        let (count, cpu) = (times.len() as f64, running.tree.cpu() - before);
        Ok((times, count / elapsed, cpu * 1e6 / count))
    }

    fn trips(&mut self, proxy: &Proxy, count: usize, idle: usize) -> Result<Vec<f64>, BenchError> {
        let running = proxy.start()?;
        let _idle = tunnels::open(running.via, self.target.echo, idle)?;
        let open = tunnels::open(running.via, self.target.echo, count)?;
        tunnels::round_trips(&open, self.scaled(300))?;
        let before = running.tree.cpu();
        let mut times = tunnels::round_trips(&open, self.scaled(2000))?;
        let cpu = (running.tree.cpu() - before) * 1e6 / times.len() as f64;
        Ok(vec![unless_direct(&running, cpu), times.quantile(0.5), times.quantile(0.99)])
    }

    fn idle(&mut self, proxy: &Proxy) -> Result<Vec<f64>, BenchError> {
        let running = proxy.start()?;
        let Via::Socks(_) = running.via else { return Err(BenchError::Unsupported) };
        tunnels::short_tunnels(running.via, self.target.echo, 1, Duration::ZERO)?;
        thread::sleep(SETTLE_TIME);
        let (all, before) = (self.idle_tunnels(proxy), running.tree.private_dirty() as f64);
        let mut open = tunnels::open(running.via, self.target.echo, 10)?;
        let (_, _, few) = self.measure_short(&running, self.scaled(1500))?;
        open.extend(tunnels::open(running.via, self.target.echo, all - open.len())?);
        thread::sleep(self.scaled(1000));
        let memory = (running.tree.private_dirty() as f64 - before) / all as f64;
        let cpu = running.tree.cpu();
        thread::sleep(self.scaled(3000));
        let idle = (running.tree.cpu() - cpu) * 3.0 / self.scaled(3000).as_secs_f64();
        let (_, _, many) = self.measure_short(&running, self.scaled(1500))?;
        // Verifies that the idle tunnels still work.
        tunnels::round_trips(&open, Duration::ZERO)?;
        tunnels::close(open)?;
        Ok(vec![memory, idle * 1e3, few, many, many / few])
    }

    fn udp(&mut self, proxy: &Proxy, size: usize, count: usize, window: usize) -> Result<Vec<f64>, BenchError> {
        if !proxy.has_udp() {
            return Err(BenchError::Unsupported);
        }
        let running = proxy.start()?;
        let open = |_| Association::open(running.via, self.target.udp_echo);
        let mut all = (0..count).map(open).collect::<Result<Vec<_>, _>>()?;
        udp::round_trips(&mut all, size, window, self.scaled(200))?;
        let before = running.tree.cpu();
        let mut trips = udp::round_trips(&mut all, size, window, self.scaled(1500))?;
        let (cpu, echoed) = (running.tree.cpu() - before, trips.times.len() as f64);
        let lost = 100.0 * trips.lost as f64 / (echoed + trips.lost as f64);
        Ok(vec![unless_direct(&running, cpu * 1e6 / echoed), trips.times.quantile(0.5), lost])
    }

    fn flood(&mut self, proxy: &Proxy, size: usize) -> Result<Vec<f64>, BenchError> {
        if !proxy.has_udp() {
            return Err(BenchError::Unsupported);
        }
        let running = proxy.start()?;
        let (factor, attempts) = if self.quick { (1.6, 1) } else { (1.25, 3) };
        let flood = Flood { size, time: self.scaled(500), factor, attempts };
        Ok(vec![flood.rate(running.via, &mut self.target)?])
    }

    fn realm(&mut self) -> Result<&Realm, BenchError> {
        let realm = self.realm.take().map_or_else(Realm::start, Ok)?;
        Ok(self.realm.insert(realm))
    }

    fn protected(&mut self, proxy: &Proxy, level: usize) -> Result<Vec<f64>, BenchError> {
        let (bulk, time) = (self.target.bulk, self.scaled(4000));
        self.realm()?.stream(proxy, bulk, level, time)
    }

    fn logins(&mut self, proxy: &Proxy) -> Result<Vec<f64>, BenchError> {
        let (echo, time) = (self.target.echo, self.scaled(2000));
        Ok(vec![self.realm()?.logins(proxy, echo, time)?])
    }

    fn start(&mut self, proxy: &Proxy) -> Result<Vec<f64>, BenchError> {
        let mut times = Vec::new();
        let mut memory = (0.0, 0.0);
        // The first start loads the program into memory.
        for round in 0..if self.quick { 5 } else { 21 } {
            let (time, running) = proxy.timed_start()?;
            if round > 0 {
                times.push(time.as_secs_f64() * 1e3);
            }
            if round == 1 {
                thread::sleep(SETTLE_TIME);
                memory = (running.tree.resident() as f64, running.tree.private_dirty() as f64);
            }
        }
        Ok(vec![median(&times), memory.0 / f64::from(1 << 20), memory.1 / f64::from(1 << 20)])
    }
}

/// Returns `value`, or NaN for a direct connection, which has no proxy to measure.
fn unless_direct(running: &RunningProxy, value: f64) -> f64 {
    match running.via {
        Via::Direct => f64::NAN,
        Via::Socks(_) => value,
    }
}
