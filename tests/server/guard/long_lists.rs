//! A block list of 200 000 names: memory, time to load, and time of sessions and datagrams.

use crate::udp::association::{Association, datagram_name, receive};
use crate::*;

const NAMES: usize = 200_000;
/// An unoptimised build needs about 20 times as long as a release build.
const LOAD_LIMIT: Duration = Duration::from_secs(if cfg!(debug_assertions) { 60 } else { 1 });
const MAX_KIB: usize = 40 << 10;

/// Returns names of 12 to 31 bytes.
fn name(i: usize) -> String {
    format!("{}{i}.blocked.example", &"tracker-ads"[..i % 11])
}

/// Returns rules without a name that the test sends to.
fn rules(count: usize) -> String {
    (0..count).fold(String::new(), |mut text, i| {
        writeln!(text, "deny to={}", name(i)).expect("formatted");
        text
    })
}

/// Returns the shortest time of a job.
fn fastest(mut job: impl FnMut()) -> Duration {
    let times = (0..30).map(|_| {
        let started = Instant::now();
        job();
        started.elapsed()
    });
    times.min().expect("several times")
}

#[test]
fn two_hundred_thousand_names_cost_little() {
    enter_namespace!("127.0.0.1 one.test\n", "");
    let (tcp, udp) = (echo_server(), udp_echo_server(V4));
    let dir = temp_dir();
    let file = write_file(dir.path(), "rules", &rules(10));
    let server = Server::start(&["--rules", &file]);
    let sessions = || {
        [("one.test", 0), (&name(9), 2)].map(|(name, rep)| {
            fastest(|| assert_eq!(open_by_name(&server, CONNECT, name, tcp.port()).1, rep, "{name}"))
        })
    };
    let datagrams = || {
        let association = Association::new(&server);
        let datagram = datagram_name(0, "one.test", udp.port(), b"ping");
        fastest(|| {
            association.send_raw(&datagram);
            receive(&association.socket);
        })
    };
    let measure = || {
        let [allowed, denied] = sessions();
        [("allowed", allowed), ("denied", denied), ("datagram", datagrams())]
    };
    let (few, memory_before) = (measure(), proc_kib(&server, "status", "VmRSS"));
    std::fs::write(&file, rules(NAMES)).expect("file written");
    server.signal("HUP");
    wait_until("the server has loaded the list", LOAD_LIMIT, || server.log().contains(", rules: 200000,"));
    for field in ["VmRSS", "VmHWM"] {
        let used = proc_kib(&server, "status", field) - memory_before;
        assert!(used <= MAX_KIB, "{field}: {NAMES} names take {used} KiB");
    }
    let is_as_fast = |_| few.iter().zip(measure()).all(|((_, few), (_, many))| many < 3 * *few);
    assert!((0..5).any(is_as_fast), "{few:?} with 10 names, {:?} with {NAMES}", measure());
    assert_ne!(open_by_name(&server, CONNECT, &name(NAMES), tcp.port()).1, 2, "the name is not in the list");
    // The log names the rule of the list, at the latest when this client has logged less than 20 lines in a second.
    wait_until("the rule is in the log", TIMEOUT, || {
        assert_eq!(open_by_name(&server, CONNECT, &name(NAMES - 1), tcp.port()).1, 2);
        server.log().contains(&format!("{file} line {NAMES} (deny to={})", name(NAMES - 1)))
    });
}
