//! `--rate` and `--rate-per-user`: all of what was set and no more, without losing anything, and without being busy.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{
    Server, TIMEOUT, echo_server, message_with_addr, open, read_exact, read_reply, request, tcp_server,
};
use crate::kit::login::{log_in, users_file};
use crate::kit::{CONNECT, UDP_ASSOCIATE, V4, check_pattern, ping, send_pattern};
use crate::{best_of_three, ensure, machine};

/// What a bucket holds when it was not used: a quarter of a second, but no less than this.
const LEAST_BURST: f64 = 65_536.0;

type Counter = Arc<AtomicU64>;

/// Which ways octets go, from the client's side.
const UP: u8 = 1;
const DOWN: u8 = 2;

/// Sends whatever it may until the other side closes.
fn pour(mut stream: TcpStream) {
    let octets = vec![7; 1 << 16];
    while stream.write_all(&octets).is_ok() {}
}

/// Counts what comes until the other side closes.
fn count(mut stream: TcpStream, counter: &AtomicU64) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(n) = stream.read(&mut buffer)
        && n > 0
    {
        counter.fetch_add(n as u64, Ordering::Relaxed);
    }
}

fn both_ends(stream: TcpStream, pours: bool, counter: &Counter) {
    let (other, counter) = (stream.try_clone().expect("a second handle"), counter.clone());
    stream.set_read_timeout(None).expect("an option");
    thread::spawn(move || count(other, &counter));
    if pours {
        thread::spawn(move || pour(stream));
    }
}

/// A target that sends when it is to, and counts what it gets.
fn target(ways: u8, counter: &Counter) -> SocketAddr {
    let counter = counter.clone();
    tcp_server(V4, move |stream| both_ends(stream, ways & DOWN != 0, &counter))
}

/// Keeps a tunnel as full as it may be; closed when dropped.
struct Busy(TcpStream);

impl Busy {
    fn new(stream: TcpStream, ways: u8, counter: &Counter) -> Self {
        both_ends(stream.try_clone().expect("a second handle"), ways & UP != 0, counter);
        Self(stream)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// A tunnel that is busy from now on, and what has gone through it.
fn busy(server: &Server, ways: u8) -> (Busy, Counter) {
    let counter = Counter::default();
    let (stream, rep, _) = open(server, CONNECT, target(ways, &counter));
    assert_eq!(rep, 0);
    (Busy::new(stream, ways, &counter), counter)
}

fn busy_as(server: &Server, source: [u8; 4], (uname, passwd): (&str, &str)) -> (Busy, Counter) {
    let counter = Counter::default();
    let (mut stream, status) = log_in(server, source, uname.as_bytes(), passwd.as_bytes());
    assert_eq!(status, 0);
    stream.write_all(&request(CONNECT, target(DOWN, &counter))).expect("the request is sent");
    assert_eq!(read_reply(&mut stream).0, 0);
    (Busy::new(stream, DOWN, &counter), counter)
}

/// Octets a second of each over `time`, when what buckets held at the beginning is gone.
fn rates(started: Instant, time: Duration, counters: &[Counter]) -> Vec<f64> {
    let all = || counters.iter().map(|counter| counter.load(Ordering::Relaxed)).collect::<Vec<_>>();
    // What is measured is a rate, so time must pass.
    thread::sleep((started + Duration::from_millis(500)).saturating_duration_since(Instant::now()));
    let (began, before) = (Instant::now(), all());
    thread::sleep(time);
    let (time, after) = (began.elapsed().as_secs_f64(), all());
    before.iter().zip(after).map(|(before, after)| (after - before) as f64 / time).collect()
}

fn check_rate(what: &str, set: f64, measured: f64) -> Result<(), String> {
    let share = measured / set;
    eprintln!("{what}: {:.1} % of {set}", share * 100.0);
    ensure((0.95..=1.05).contains(&share), || format!("{what}: {measured:.0} of {set} octets a second"))
}

/// One session of each kind at once, and then whether each had its rate.
fn check_sessions(kinds: &[(&str, f64, &str, u8)]) -> Result<(), String> {
    let server = |kind: &(&str, f64, &str, u8)| Server::start(&["--rate", kind.0]);
    let servers: Vec<Server> = kinds.iter().map(server).collect();
    let started = Instant::now();
    let (_tunnels, counters): (Vec<_>, Vec<_>) =
        servers.iter().zip(kinds).map(|(server, (.., ways))| busy(server, *ways)).unzip();
    let rates = rates(started, Duration::from_millis(1250), &counters);
    for (((text, rate, what, _), counter), measured) in kinds.iter().zip(&counters).zip(rates) {
        check_rate(&format!("{text} {what}"), *rate, measured)?;
        let (most, all) = (started.elapsed().as_secs_f64() * rate * 1.05, counter.load(Ordering::Relaxed));
        let burst = (rate * 0.25).max(LEAST_BURST);
        ensure((all as f64) < most + burst, || format!("{text} {what}: {all} with the beginning"))?;
    }
    Ok(())
}

#[test]
fn a_session_has_what_was_set_whichever_way_it_goes() {
    let _machine = machine();
    let kinds = [("256k", 256e3), ("4M", 4e6), ("100M", 100e6)].map(|(text, rate)| {
        [("down", DOWN), ("up", UP), ("both ways", UP | DOWN)].map(|(what, ways)| (text, rate, what, ways))
    });
    let [slow, middling, fast] = kinds;
    best_of_three(|| check_sessions(&[slow, middling].concat()));
    // Together these would be as much as the machine can do.
    fast.chunks(1).for_each(|kind| best_of_three(|| check_sessions(kind)));
}

#[test]
fn sessions_of_a_user_share_a_rate_and_another_user_has_his_own() {
    let _machine = machine();
    let [alice, bob] = [("alice", "secret"), ("bob", "other")];
    let (_folder, users) = users_file(&[alice, bob]);
    best_of_three(|| {
        let server = Server::start(&["--users", &users, "--rate", "4M"]);
        let other = Server::start(&["--users", &users, "--rate", "1M", "--rate-per-user", "2M"]);
        let only = Server::start(&["--users", &users, "--rate-per-user", "1M"]);
        let started = Instant::now();
        let who = [(&server, alice), (&server, alice), (&server, alice), (&server, bob), (&other, bob)];
        let who = who.into_iter().chain([(&other, alice); 3]).chain([(&only, bob); 2]);
        let (_tunnels, counters): (Vec<_>, Vec<_>) =
            (1..).zip(who).map(|(n, (server, user))| busy_as(server, [127, 0, 4, n], user)).unzip();
        let rates = rates(started, Duration::from_secs(2), &counters);
        check_rate("alice's three", 4e6, rates[..3].iter().sum())?;
        check_rate("bob's one", 4e6, rates[3])?;
        check_rate("bob's one of less than a user may", 1e6, rates[4])?;
        check_rate("alice's three with a rate per user", 2e6, rates[5..8].iter().sum())?;
        check_rate("bob's two with a rate per user only", 1e6, rates[8..].iter().sum())
    });
}

#[test]
fn no_session_of_a_user_is_left_without() {
    let alice = ("alice", "secret");
    let (_folder, users) = users_file(&[alice]);
    let server = |threads| Server::start(&["--users", &users, "--rate", "4M", "--threads", threads]);
    let servers = ["1", "2"].map(server);
    let started = Instant::now();
    let each = servers.iter().flat_map(|server| [server; 4]).zip(1..);
    let (_tunnels, counters): (Vec<_>, Vec<_>) = each.map(|(server, n)| busy_as(server, [127, 0, 5, n], alice)).unzip();
    let rates = rates(started, Duration::from_secs(1), &counters);
    // A tenth of a fair share, since it need not be fair to the octet.
    assert!(rates.iter().all(|rate| *rate > 1e5), "four with one thread, four with two: {rates:.0?}");
}

#[test]
fn neither_way_of_a_session_is_left_without() {
    let servers = ["256k", "4M"].map(|rate| Server::start(&["--rate", rate]));
    let started = Instant::now();
    let each = servers.iter().map(|server| {
        let (up, down) = (Counter::default(), Counter::default());
        let (stream, rep, _) = open(server, CONNECT, target(DOWN, &up));
        assert_eq!(rep, 0);
        (Busy::new(stream, UP, &down), [up, down])
    });
    let (_tunnels, counters): (Vec<_>, Vec<_>) = each.unzip();
    let rates = rates(started, Duration::from_secs(1), counters.as_flattened());
    for ways in rates.chunks(2) {
        let whole: f64 = ways.iter().sum();
        assert!(ways.iter().all(|rate| *rate > whole / 20.0), "up and down at 256k, at 4M: {rates:.0?}");
    }
}

/// What has passed through an association to a target, and back from it, when three times the rate is sent.
fn flood(server: &Server, answers: bool, time: Duration) -> u64 {
    let (socket, sink) = (UdpSocket::bind("127.0.0.1:0").expect("a port"), UdpSocket::bind("127.0.0.1:0"));
    let sink = sink.expect("a port");
    let (_control, rep, bnd) = open(server, UDP_ASSOCIATE, "0.0.0.0:0".parse().expect("an address"));
    assert_eq!(rep, 0);
    let head = message_with_addr([0, 0, 0], sink.local_addr().expect("an address"));
    let datagram = [&head[..], &[7; 1000]].concat();
    let (passed, over) = (AtomicU64::new(0), AtomicBool::new(false));
    let take = |socket: &UdpSocket, head: usize, answers: bool| {
        socket.set_read_timeout(Some(Duration::from_millis(50))).expect("an option");
        let mut buffer = [0; 2048];
        while !over.load(Ordering::Relaxed) {
            let Ok((n, from)) = socket.recv_from(&mut buffer) else { continue };
            passed.fetch_add((n - head) as u64, Ordering::Relaxed);
            if answers {
                socket.send_to(&buffer[..n], from).expect("it is sent");
            }
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| take(&sink, 0, answers));
        scope.spawn(|| take(&socket, head.len(), false));
        let started = Instant::now();
        let mut sent = 0.0;
        while started.elapsed() < time {
            // 1.2 M octets a second, where 400 k may pass.
            while sent < started.elapsed().as_secs_f64() * 1200.0 {
                socket.send_to(&datagram, bnd).expect("it is sent");
                sent += 1.0;
            }
            thread::sleep(Duration::from_millis(1));
        }
        over.store(true, Ordering::Relaxed);
    });
    passed.into_inner()
}

#[test]
fn an_association_keeps_to_its_rate_by_dropping() {
    let _machine = machine();
    let server = &Server::start(&["--rate", "400k"]);
    let time = Duration::from_secs(2);
    let whole = 400e3 * time.as_secs_f64();
    best_of_three(|| {
        let passed = thread::scope(|scope| {
            let floods = [false, true].map(|answers| scope.spawn(move || flood(server, answers, time)));
            floods.map(|flood| flood.join().expect("a flood") as f64)
        });
        for (what, passed) in ["to a target", "there and back"].into_iter().zip(passed) {
            eprintln!("UDP {what}: {:.1} % of what was set", passed / whole * 100.0);
            let is_so = passed > 0.95 * whole && passed < 1.05 * whole + 100e3;
            ensure(is_so, || format!("{what}: {passed} of {whole}"))?;
        }
        Ok(())
    });
}

/// How often the threads of a server have gone to sleep by themselves.
fn naps(server: &Server) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", server.pid())).expect("the server runs");
    let of_one = |task: std::path::PathBuf| {
        let status = std::fs::read_to_string(task.join("status")).expect("the thread runs");
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).expect("a line");
        line.trim().parse::<u64>().expect("a number")
    };
    tasks.map(|task| of_one(task.expect("a thread").path())).sum()
}

#[test]
fn a_paced_tunnel_wakes_up_for_its_slices_and_not_for_each_read() {
    let _machine = machine();
    let kinds = [("down", DOWN, 60.0), ("up", UP, 60.0), ("both ways", UP | DOWN, 120.0)];
    best_of_three(|| {
        let servers = kinds.map(|_| Server::start(&["--rate", "4M", "--threads", "1"]));
        let (_tunnels, counters): (Vec<_>, Vec<_>) =
            servers.iter().zip(kinds).map(|(server, (_, ways, _))| busy(server, ways)).unzip();
        let (began, before) = (Instant::now(), servers.each_ref().map(naps));
        thread::sleep(Duration::from_secs(3));
        let (time, after) = (began.elapsed().as_secs_f64(), servers.each_ref().map(naps));
        let rates = before.iter().zip(after).map(|(before, after)| (after - before) as f64 / time).collect::<Vec<_>>();
        for (((what, _, most), rate), counter) in kinds.iter().zip(&rates).zip(&counters) {
            let moved = counter.load(Ordering::Relaxed);
            ensure(rate < most, || format!("{what}: {rate:.0} a second of {rates:.1?}"))?;
            ensure(moved > 11_000_000, || format!("{what}: {moved} octets in {time} s"))?;
        }
        Ok(())
    });
}

#[test]
fn a_paced_tunnel_loses_nothing_and_hands_on_the_half_close() {
    const TOTAL: usize = 1_500_000;
    let server = Server::start(&["--rate", "4M"]);
    let (mut stream, rep, _) = open(&server, CONNECT, echo_server());
    assert_eq!(rep, 0);
    let mut sending = stream.try_clone().expect("a second handle");
    let started = Instant::now();
    let sender = thread::spawn(move || {
        send_pattern(&mut sending, TOTAL, |_| {});
        sending.shutdown(Shutdown::Write).expect("half-close");
    });
    check_pattern(&mut stream, TOTAL);
    sender.join().expect("all is sent");
    // 3 M octets in all, of which a million may come at once.
    assert!(started.elapsed() > Duration::from_millis(450), "{:?}", started.elapsed());
    let log = server.wait_log(|log| log.contains("session client="));
    assert!(log.contains("up=1500000 down=1500000") && !log.contains("error="), "{log}");
}

#[test]
fn what_was_not_used_is_kept_for_a_quarter_of_a_second_and_no_more() {
    let _machine = machine();
    best_of_three(|| {
        let server = Server::start(&["--rate", "1M"]);
        let counter = Counter::default();
        let (stream, rep, _) = open(&server, CONNECT, target(UP, &counter));
        assert_eq!(rep, 0);
        thread::sleep(Duration::from_millis(1200));
        let (began, _tunnel) = (Instant::now(), Busy::new(stream, UP, &Counter::default()));
        thread::sleep(Duration::from_millis(500));
        let (moved, time) = (counter.load(Ordering::Relaxed) as f64, began.elapsed().as_secs_f64());
        let whole = 1e6 * (time + 0.25);
        ensure(moved > 0.85 * whole && moved < 1.05 * whole, || format!("{moved} in {time} s"))
    });
}

#[test]
fn idle_paced_tunnels_cost_nothing() {
    let server = Server::start(&["--rate", "1k", "--threads", "2"]);
    let dst = echo_server();
    let mut tunnels: Vec<TcpStream> = (0..50).map(|_| open(&server, CONNECT, dst).0).collect();
    // Some have used up what they had, so that a timer was set once.
    for tunnel in &mut tunnels[..10] {
        ping(tunnel, b"twenty-five octets, more.");
    }
    let (naps, cpu) = (|| naps(&server), || server.cpu_seconds());
    let before = (naps(), cpu());
    // That nothing happens takes time to see.
    thread::sleep(Duration::from_millis(1500));
    let (naps, cpu) = (naps() - before.0, cpu() - before.1);
    assert!(naps <= 10 && cpu <= 0.011, "{naps} wake-ups and {cpu} s of CPU");
    tunnels[0].set_read_timeout(Some(TIMEOUT)).expect("an option");
    tunnels[0].write_all(b"and they go on").expect("it is sent");
    assert_eq!(read_exact(&mut tunnels[0], 14), b"and they go on");
}
