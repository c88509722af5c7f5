//! `--rate` and `--rate-per-user`: the rate is reached and not exceeded, no data is lost, and little CPU is used.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::login::{log_in, users_file};
use crate::support::{
    CONNECT, Server, TIMEOUT, UDP_ASSOCIATE, V4, check_pattern, echo_server, message_with_addr, open, ping, read_exact,
    read_reply, request, retry, send_pattern, tcp_server,
};
use crate::{ensure, lock_machine, try_three_times};

/// Minimum capacity of a token bucket. Above it, the capacity is the rate times a quarter of a second.
const MIN_BURST_BYTES: f64 = 65_536.0;

type Counter = Arc<AtomicU64>;

// Bits of directions: from the client, to the client.
const UP: u8 = 1;
const DOWN: u8 = 2;

/// Sends as fast as possible until the other side closes.
fn send_all(mut stream: TcpStream) {
    let bytes = vec![7; 1 << 16];
    while stream.write_all(&bytes).is_ok() {}
}

/// Counts received bytes until the other side closes.
fn count(mut stream: TcpStream, counter: &AtomicU64) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(n) = retry(|| stream.read(&mut buffer))
        && n > 0
    {
        counter.fetch_add(n as u64, Ordering::Relaxed);
    }
}

/// Counts received bytes on a thread. A sender also sends as fast as possible.
fn receive_and_send(stream: TcpStream, is_sender: bool, counter: &Counter) {
    let (other, counter) = (stream.try_clone().expect("cloned"), counter.clone());
    stream.set_read_timeout(None).expect("timeout set");
    thread::spawn(move || count(other, &counter));
    if is_sender {
        thread::spawn(move || send_all(stream));
    }
}

/// Starts a target that counts received bytes, and sends if `directions` has `DOWN`.
fn target(directions: u8, counter: &Counter) -> SocketAddr {
    let counter = counter.clone();
    tcp_server(V4, move |stream| receive_and_send(stream, directions & DOWN != 0, &counter))
}

/// A client that receives, and sends if `directions` has `UP`. Its connection is closed when dropped.
struct BusyClient(TcpStream);

impl BusyClient {
    fn new(stream: TcpStream, directions: u8, counter: &Counter) -> Self {
        receive_and_send(stream.try_clone().expect("cloned"), directions & UP != 0, counter);
        Self(stream)
    }
}

impl Drop for BusyClient {
    fn drop(&mut self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// Opens a busy tunnel. Returns its client and the counter of its bytes.
fn busy_tunnel(server: &Server, directions: u8) -> (BusyClient, Counter) {
    let counter = Counter::default();
    let (stream, rep, _) = open(server, CONNECT, target(directions, &counter));
    assert_eq!(rep, 0);
    (BusyClient::new(stream, directions, &counter), counter)
}

/// Opens a busy tunnel of a user, from the target to the client.
fn busy_tunnel_as(server: &Server, source: [u8; 4], (uname, passwd): (&str, &str)) -> (BusyClient, Counter) {
    let counter = Counter::default();
    let (mut stream, status) = log_in(server, source, uname.as_bytes(), passwd.as_bytes());
    assert_eq!(status, 0);
    stream.write_all(&request(CONNECT, target(DOWN, &counter))).expect("request sent");
    assert_eq!(read_reply(&mut stream).0, 0);
    (BusyClient::new(stream, DOWN, &counter), counter)
}

/// Measures bytes per second over `time`. Starts 0.5 s after `started`, when the initial bursts are used up.
fn rates(started: Instant, time: Duration, counters: &[Counter]) -> Vec<f64> {
    let read_counters = || counters.iter().map(|counter| counter.load(Ordering::Relaxed)).collect::<Vec<_>>();
    thread::sleep((started + Duration::from_millis(500)).saturating_duration_since(Instant::now()));
    let (start, before) = (Instant::now(), read_counters());
    thread::sleep(time);
    let (time, after) = (start.elapsed().as_secs_f64(), read_counters());
    before.iter().zip(after).map(|(before, after)| (after - before) as f64 / time).collect()
}

fn check_rate(what: &str, limit: f64, measured: f64) -> Result<(), String> {
    let share = measured / limit;
    eprintln!("{what}: {:.1} % of {limit}", share * 100.0);
    ensure((0.95..=1.05).contains(&share), || format!("{what}: {measured:.0} of {limit} bytes per second"))
}

/// Runs one session of each kind at the same time, and checks their rates. A kind has `--rate`, bytes per second, name
/// and directions.
fn check_sessions(kinds: &[(&str, f64, &str, u8)]) -> Result<(), String> {
    let server = |kind: &(&str, f64, &str, u8)| Server::start(&["--rate", kind.0]);
    let servers: Vec<Server> = kinds.iter().map(server).collect();
    let started = Instant::now();
    let (_tunnels, counters): (Vec<_>, Vec<_>) =
        servers.iter().zip(kinds).map(|(server, (.., directions))| busy_tunnel(server, *directions)).unzip();
    let rates = rates(started, Duration::from_millis(1250), &counters);
    for (((text, rate, what, _), counter), measured) in kinds.iter().zip(&counters).zip(rates) {
        check_rate(&format!("{text} {what}"), *rate, measured)?;
        let (max, all) = (started.elapsed().as_secs_f64() * rate * 1.05, counter.load(Ordering::Relaxed));
        let burst = (rate * 0.25).max(MIN_BURST_BYTES);
        ensure((all as f64) < max + burst, || format!("{text} {what}: {all} bytes since the start"))?;
    }
    Ok(())
}

#[test]
fn rate_limit_of_a_session_applies_to_the_sum_of_both_directions() {
    let _machine = lock_machine();
    let kinds = [("256k", 256e3), ("4M", 4e6), ("100M", 100e6)].map(|(text, rate)| {
        [("down", DOWN), ("up", UP), ("both directions", UP | DOWN)]
            .map(|(what, directions)| (text, rate, what, directions))
    });
    let [slow, medium, fast] = kinds;
    try_three_times(|| check_sessions(&[slow, medium].concat()));
    // One at a time, because together they would load the whole machine.
    fast.chunks(1).for_each(|kind| try_three_times(|| check_sessions(kind)));
}

#[test]
fn rate_limit_of_a_user_is_shared_by_the_sessions_of_that_user_only() {
    let _machine = lock_machine();
    let [alice, bob] = [("alice", "secret"), ("bob", "other")];
    let (_dir, users) = users_file(&[alice, bob]);
    try_three_times(|| {
        let server = Server::start(&["--users", &users, "--rate", "4M"]);
        let other = Server::start(&["--users", &users, "--rate", "1M", "--rate-per-user", "2M"]);
        let only_per_user = Server::start(&["--users", &users, "--rate-per-user", "1M"]);
        let started = Instant::now();
        let sessions = [(&server, alice), (&server, alice), (&server, alice), (&server, bob), (&other, bob)];
        let sessions = sessions.into_iter().chain([(&other, alice); 3]).chain([(&only_per_user, bob); 2]);
        let (_tunnels, counters): (Vec<_>, Vec<_>) =
            (1..).zip(sessions).map(|(n, (server, user))| busy_tunnel_as(server, [127, 0, 4, n], user)).unzip();
        let rates = rates(started, Duration::from_secs(2), &counters);
        check_rate("three sessions of alice", 4e6, rates[..3].iter().sum())?;
        check_rate("one session of bob", 4e6, rates[3])?;
        check_rate("one session of bob, with a higher rate per user", 1e6, rates[4])?;
        check_rate("three sessions of alice, with a rate per user", 2e6, rates[5..8].iter().sum())?;
        check_rate("two sessions of bob, with only a rate per user", 1e6, rates[8..].iter().sum())
    });
}

#[test]
fn rate_limit_of_a_user_starves_no_session() {
    let alice = ("alice", "secret");
    let (_dir, users) = users_file(&[alice]);
    let server = |threads| Server::start(&["--users", &users, "--rate", "4M", "--threads", threads]);
    let servers = ["1", "2"].map(server);
    let started = Instant::now();
    let each = servers.iter().flat_map(|server| [server; 4]).zip(1..);
    let (_tunnels, counters): (Vec<_>, Vec<_>) =
        each.map(|(server, n)| busy_tunnel_as(server, [127, 0, 5, n], alice)).unzip();
    let rates = rates(started, Duration::from_secs(1), &counters);
    // Each session gets at least a tenth of its fair share. Exact fairness is not required.
    assert!(rates.iter().all(|rate| *rate > 1e5), "four sessions with one thread, four with two: {rates:.0?}");
}

#[test]
fn rate_limit_starves_no_direction_of_a_session() {
    let servers = ["256k", "4M"].map(|rate| Server::start(&["--rate", rate]));
    let started = Instant::now();
    let each = servers.iter().map(|server| {
        let (up, down) = (Counter::default(), Counter::default());
        let (stream, rep, _) = open(server, CONNECT, target(DOWN, &up));
        assert_eq!(rep, 0);
        (BusyClient::new(stream, UP, &down), [up, down])
    });
    let (_tunnels, counters): (Vec<_>, Vec<_>) = each.unzip();
    let rates = rates(started, Duration::from_secs(1), counters.as_flattened());
    for up_and_down in rates.chunks(2) {
        let sum: f64 = up_and_down.iter().sum();
        assert!(up_and_down.iter().all(|rate| *rate > sum / 20.0), "up and down at 256k, at 4M: {rates:.0?}");
    }
}

/// Sends three times the rate limit of 400 kB/s through an association. Returns the number of bytes that arrive at the
/// target, plus the bytes of its answers that arrive at the client.
fn flood(server: &Server, answers: bool, time: Duration) -> u64 {
    let (socket, sink) = (UdpSocket::bind("127.0.0.1:0").expect("free port"), UdpSocket::bind("127.0.0.1:0"));
    let sink = sink.expect("free port");
    let (_control, rep, bnd) = open(server, UDP_ASSOCIATE, "0.0.0.0:0".parse().expect("valid address"));
    assert_eq!(rep, 0);
    let head = message_with_addr([0, 0, 0], sink.local_addr().expect("local address"));
    let datagram = [&head[..], &[7; 1000]].concat();
    let (received, is_over) = (AtomicU64::new(0), AtomicBool::new(false));
    let receive = |socket: &UdpSocket, head: usize, answers: bool| {
        socket.set_read_timeout(Some(Duration::from_millis(50))).expect("timeout set");
        let mut buffer = [0; 2048];
        while !is_over.load(Ordering::Relaxed) {
            let Ok((n, from)) = retry(|| socket.recv_from(&mut buffer)) else { continue };
            received.fetch_add((n - head) as u64, Ordering::Relaxed);
            if answers {
                socket.send_to(&buffer[..n], from).expect("datagram sent");
            }
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| receive(&sink, 0, answers));
        scope.spawn(|| receive(&socket, head.len(), false));
        let started = Instant::now();
        let mut sent = 0.0;
        while started.elapsed() < time {
            // 1200 datagrams of 1000 bytes per second.
            while sent < started.elapsed().as_secs_f64() * 1200.0 {
                socket.send_to(&datagram, bnd).expect("datagram sent");
                sent += 1.0;
            }
            thread::sleep(Duration::from_millis(1));
        }
        is_over.store(true, Ordering::Relaxed);
    });
    received.into_inner()
}

#[test]
fn udp_association_drops_datagrams_above_its_rate_limit() {
    let _machine = lock_machine();
    let server = &Server::start(&["--rate", "400k"]);
    let time = Duration::from_secs(2);
    let limit = 400e3 * time.as_secs_f64();
    try_three_times(|| {
        let passed = thread::scope(|scope| {
            let floods = [false, true].map(|answers| scope.spawn(move || flood(server, answers, time)));
            floods.map(|flood| flood.join().expect("the thread does not panic") as f64)
        });
        for (what, passed) in ["to a target", "to a target and back"].into_iter().zip(passed) {
            eprintln!("UDP {what}: {:.1} % of the limit", passed / limit * 100.0);
            let is_met = passed > 0.95 * limit && passed < 1.05 * limit + 100e3;
            ensure(is_met, || format!("{what}: {passed} of {limit} bytes"))?;
        }
        Ok(())
    });
}

/// Returns the number of voluntary context switches of the server's threads.
fn voluntary_switches(server: &Server) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", server.pid())).expect("the server runs");
    let switches = |task: std::path::PathBuf| {
        let status = std::fs::read_to_string(task.join("status")).expect("the thread runs");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))
            .expect("voluntary_ctxt_switches");
        line.trim().parse::<u64>().expect("valid number")
    };
    tasks.map(|task| switches(task.expect("directory entry").path())).sum()
}

#[test]
fn rate_limited_tunnel_wakes_once_per_reservation() {
    let _machine = lock_machine();
    let kinds = [("down", DOWN, 60.0), ("up", UP, 60.0), ("both directions", UP | DOWN, 120.0)];
    try_three_times(|| {
        let servers = kinds.map(|_| Server::start(&["--rate", "4M", "--threads", "1"]));
        let (_tunnels, counters): (Vec<_>, Vec<_>) =
            servers.iter().zip(kinds).map(|(server, (_, directions, _))| busy_tunnel(server, directions)).unzip();
        let (start, before) = (Instant::now(), servers.each_ref().map(voluntary_switches));
        thread::sleep(Duration::from_secs(3));
        let (time, after) = (start.elapsed().as_secs_f64(), servers.each_ref().map(voluntary_switches));
        let rates = before.iter().zip(after).map(|(before, after)| (after - before) as f64 / time).collect::<Vec<_>>();
        for (((what, _, max), rate), counter) in kinds.iter().zip(&rates).zip(&counters) {
            let bytes = counter.load(Ordering::Relaxed);
            ensure(rate < max, || format!("{what}: {rate:.0} wake-ups per second of {rates:.1?}"))?;
            ensure(bytes > 11_000_000, || format!("{what}: {bytes} bytes in {time} s"))?;
        }
        Ok(())
    });
}

#[test]
fn rate_limited_tunnel_loses_no_data_and_relays_half_close() {
    const TOTAL: usize = 1_500_000;
    let server = Server::start(&["--rate", "4M"]);
    let (mut stream, rep, _) = open(&server, CONNECT, echo_server());
    assert_eq!(rep, 0);
    let mut sending = stream.try_clone().expect("cloned");
    let started = Instant::now();
    let sender = thread::spawn(move || {
        send_pattern(&mut sending, TOTAL, |_| {});
        sending.shutdown(Shutdown::Write).expect("half-closed");
    });
    check_pattern(&mut stream, TOTAL);
    sender.join().expect("the thread does not panic");
    // 3 million bytes in both directions. The first million may be a burst.
    assert!(started.elapsed() > Duration::from_millis(450), "{:?}", started.elapsed());
    let log = server.wait_log(|log| log.contains("session client="));
    assert!(log.contains("up=1500000 down=1500000") && !log.contains("error="), "{log}");
}

#[test]
fn unused_rate_accumulates_for_a_quarter_of_a_second() {
    let _machine = lock_machine();
    try_three_times(|| {
        let server = Server::start(&["--rate", "1M"]);
        let counter = Counter::default();
        let (stream, rep, _) = open(&server, CONNECT, target(UP, &counter));
        assert_eq!(rep, 0);
        thread::sleep(Duration::from_millis(1200));
        let (start, _tunnel) = (Instant::now(), BusyClient::new(stream, UP, &Counter::default()));
        thread::sleep(Duration::from_millis(500));
        let (bytes, time) = (counter.load(Ordering::Relaxed) as f64, start.elapsed().as_secs_f64());
        let limit = 1e6 * (time + 0.25);
        ensure(bytes > 0.85 * limit && bytes < 1.05 * limit, || format!("{bytes} bytes in {time} s"))
    });
}

#[test]
fn idle_rate_limited_tunnels_use_no_cpu() {
    let server = Server::start(&["--rate", "1k", "--threads", "2"]);
    let dst = echo_server();
    let mut tunnels: Vec<TcpStream> = (0..50).map(|_| open(&server, CONNECT, dst).0).collect();
    // Some tunnels have used up their tokens, so that a timer was set once.
    for tunnel in &mut tunnels[..10] {
        ping(tunnel, b"twenty-five bytes or more");
    }
    let before = (voluntary_switches(&server), server.cpu_seconds());
    thread::sleep(Duration::from_millis(1500));
    let (wake_ups, cpu) = (voluntary_switches(&server) - before.0, server.cpu_seconds() - before.1);
    assert!(wake_ups <= 10 && cpu <= 0.011, "{wake_ups} wake-ups and {cpu} s of CPU");
    tunnels[0].set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    tunnels[0].write_all(b"still open now").expect("data sent");
    assert_eq!(read_exact(&mut tunnels[0], 14), b"still open now");
}
