//! Throughput of one, two and three nodes. All of them share the cores of this machine with HAProxy, the clients and the
//! target, so the figures show the cost of each part, and that the nodes do not wait for each other.

use std::sync::Barrier;

use super::clients::session;
use super::*;

/// Time of each measurement, and before it.
const TIME: Duration = Duration::from_secs(2);
const WARM_UP: Duration = Duration::from_millis(500);
/// Sessions, or streams, at once.
const CLIENTS: usize = 24;
/// Rate of the limited link of each node, for each direction.
const LINK: &str = "100mbit";
const GIB: f64 = (1 << 30) as f64;

/// What the clients have done, and the CPU time of the nodes and of HAProxy.
struct Sample {
    count: u64,
    seconds: f64,
    node_cpu: f64,
    haproxy_cpu: f64,
}

impl Sample {
    /// Runs clients on client1. Each calls `open` once, and then `work` repeatedly, which returns what it has done.
    fn take<T>(lab: &Lab, open: impl Fn() -> T + Sync, work: impl Fn(&mut T) -> u64 + Sync) -> Self {
        let (count, is_over, opened) = (AtomicU64::new(0), AtomicBool::new(false), Barrier::new(CLIENTS + 1));
        let client = || {
            let mut state = open();
            opened.wait();
            while !is_over.load(Ordering::Relaxed) {
                count.fetch_add(work(&mut state), Ordering::Relaxed);
            }
        };
        let state = || {
            let node_cpu = lab.nodes.values().map(Server::cpu_seconds).sum::<f64>();
            (Instant::now(), count.load(Ordering::Relaxed), node_cpu, cpu_seconds(lab.haproxy_worker()))
        };
        thread::scope(|scope| {
            on("client1", || (0..CLIENTS).for_each(|_| drop(scope.spawn(client))));
            opened.wait();
            thread::sleep(WARM_UP);
            let before = state();
            thread::sleep(TIME);
            let after = state();
            is_over.store(true, Ordering::Relaxed);
            Self {
                count: after.1 - before.1,
                seconds: (after.0 - before.0).as_secs_f64(),
                node_cpu: after.2 - before.2,
                haproxy_cpu: after.3 - before.3,
            }
        })
    }

    fn sessions(lab: &Lab) -> Self {
        let session = |(): &mut ()| {
            session().expect("a session");
            1
        };
        Self::take(lab, || (), session)
    }

    /// Counts bytes.
    fn streams(lab: &Lab) -> Self {
        let read = |(stream, buffer): &mut (TcpStream, Vec<u8>)| {
            let n = retry(|| stream.read(buffer)).expect("data of the target");
            assert!(n > 0, "the target has not ended");
            n as u64
        };
        Self::take(lab, || (connect(SOURCE), vec![0; 1 << 18]), read)
    }

    /// A row of the table: rate and CPU time, in these units.
    fn row(&self, unit: f64, cpu_unit: f64) -> String {
        assert!(self.count > 0, "sessions, or bytes");
        let cpu = |seconds: f64| seconds / self.count as f64 * unit * cpu_unit;
        let rate = self.count as f64 / self.seconds / unit;
        format!("{rate:.3} | {:.2} | {:.2}", cpu(self.node_cpu), cpu(self.haproxy_cpu))
    }
}

/// Limits the link of each node, in both directions.
fn limit_links() {
    for node in NODES {
        let limit = |namespace: &[&str], device: &str| {
            let mut command = Command::new("tc");
            command.args(namespace).args(["qdisc", "add", "dev", device, "root", "tbf", "rate", LINK]);
            stdout(command.args(["burst", "256kb", "latency", "50ms"]), b"");
        };
        limit(&[], node);
        limit(&["-n", node], "eth0");
    }
}

/// Makes HAProxy use only the first nodes.
fn use_nodes(lab: &Lab, count: usize) {
    for (i, node) in NODES.into_iter().enumerate() {
        let (command, state) = if i < count { ("ready", "UP") } else { ("maint", "MAINT") };
        lab.haproxy(&format!("set server s5/{node} state {command}"));
        lab.wait_state(node, state);
    }
}

/// Fails if a session of a full load fails. Writes the table of tests/bench/README.md to target/tmp/cluster.md.
#[test]
#[ignore = "make test-system"]
fn throughput_of_one_two_and_three_nodes() {
    if !has_all(&["tc"]) {
        return;
    }
    let lab = open_lab!(&NODES, "");
    let mut table = "| | nodes | rate | CPU of s5 | CPU of HAProxy |\n| --- | --: | --: | --: | --: |\n".to_owned();
    let mut measure = |what: &str, sample: &dyn Fn() -> String| {
        for count in 1..=NODES.len() {
            use_nodes(&lab, count);
            writeln!(table, "| {what} | {count} | {} |", sample()).expect("text");
        }
    };
    let streams = format!("{CLIENTS} streams, GiB/s, s/GiB");
    measure("short sessions, per second, µs", &|| Sample::sessions(&lab).row(1.0, 1e6));
    measure(&streams, &|| Sample::streams(&lab).row(GIB, 1.0));
    limit_links();
    measure(&format!("{streams}, links of {LINK}/s"), &|| Sample::streams(&lab).row(GIB, 1.0));
    write_file(Path::new(env!("CARGO_TARGET_TMPDIR")), "cluster.md", &table);
}
