//! `--rate` and `--rate-per-user`: the rate is reached and not exceeded, no data is lost, and little CPU is used.

use crate::*;

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

/// Makes a tunnel busy. Returns its client, and the counters of the bytes to the target and to the client.
fn busy_tunnel(directions: u8, open: impl FnOnce(SocketAddr) -> (TcpStream, u8)) -> (BusyClient, [Counter; 2]) {
    let counters = [Counter::default(), Counter::default()];
    let (stream, rep) = open(target(directions, &counters[0]));
    assert_eq!(rep, 0);
    (BusyClient::new(stream, directions, &counters[1]), counters)
}

/// Opens a busy tunnel of a client without a login.
fn anonymous_tunnel(server: &Server, directions: u8) -> (BusyClient, [Counter; 2]) {
    busy_tunnel(directions, |dst| {
        let (stream, rep, _) = open(server, CONNECT, dst);
        (stream, rep)
    })
}

/// Measures bytes per second to and from the target over `time`. Starts 0.5 s after `started`, when the initial bursts
/// are used up.
fn rates(started: Instant, time: Duration, counters: &[[Counter; 2]]) -> Vec<[f64; 2]> {
    let read = |counters: &[Counter; 2]| counters.each_ref().map(|counter| counter.load(Ordering::Relaxed) as f64);
    thread::sleep((started + Duration::from_millis(500)).saturating_duration_since(Instant::now()));
    let (start, before) = (Instant::now(), counters.iter().map(read).collect::<Vec<_>>());
    thread::sleep(time);
    let (time, after) = (start.elapsed().as_secs_f64(), counters.iter().map(read));
    before.iter().zip(after).map(|(before, after)| [0, 1].map(|i| (after[i] - before[i]) / time)).collect()
}

fn check_rate(what: &str, limit: f64, measured: f64) -> Result<(), String> {
    let share = measured / limit;
    eprintln!("{what}: {:.1} % of {limit}", share * 100.0);
    ensure((0.9..=1.05).contains(&share), || format!("{what}: {measured:.0} of {limit} bytes per second"))
}

/// A kind of session: `--rate`, bytes per second, name and directions.
type Kind = (&'static str, f64, &'static str, u8);

/// Runs one session of each kind at the same time, and checks their rates.
fn check_sessions(kinds: &[Kind], time: Duration) -> Result<(), String> {
    let servers: Vec<Server> = kinds.iter().map(|kind| Server::start(&["--rate", kind.0])).collect();
    let started = Instant::now();
    let (_tunnels, counters): (Vec<_>, Vec<_>) =
        servers.iter().zip(kinds).map(|(server, (.., directions))| anonymous_tunnel(server, *directions)).unzip();
    let rates = rates(started, time, &counters);
    for (((text, rate, what, directions), counters), measured) in kinds.iter().zip(&counters).zip(rates) {
        let sum: f64 = measured.iter().sum();
        check_rate(&format!("{text} {what}"), *rate, sum)?;
        let is_starved = *directions == UP | DOWN && measured.iter().any(|rate| *rate < sum / 20.0);
        ensure(!is_starved, || format!("{text}: up and down: {measured:.0?}"))?;
        let max = started.elapsed().as_secs_f64() * rate * 1.05 + (rate * 0.25).max(MIN_BURST_BYTES);
        let all: u64 = counters.iter().map(|counter| counter.load(Ordering::Relaxed)).sum();
        ensure((all as f64) < max, || format!("{text} {what}: {all} bytes since the start"))?;
    }
    Ok(())
}

#[test]
fn rate_limit_of_a_session_applies_to_the_sum_of_both_directions_and_starves_none() {
    let _machine = lock_machine();
    let [slow, medium, fast] = [("256k", 256e3), ("4M", 4e6), ("100M", 100e6)].map(|(text, rate)| {
        [("down", DOWN), ("up", UP), ("both directions", UP | DOWN)]
            .map(|(what, directions)| (text, rate, what, directions))
    });
    try_three_times(|| check_sessions(&[slow, medium].concat(), Duration::from_millis(1250)));
    // One at a time, because together they would load the whole machine.
    fast.chunks(1).for_each(|kind| try_three_times(|| check_sessions(kind, Duration::from_millis(800))));
}

#[test]
fn rate_limit_of_a_user_is_shared_by_the_sessions_of_that_user_only_and_starves_none() {
    let _machine = lock_machine();
    let [alice, bob] = [("alice", "secret"), ("bob", "other")];
    let (_dir, users) = users_file(&[alice, bob]);
    try_three_times(|| {
        let start = |args: &[&str]| Server::start(&[&["--users", &users], args].concat());
        let server = start(&["--rate", "4M", "--threads", "2"]);
        let other = start(&["--rate", "1M", "--rate-per-user", "2M", "--threads", "1"]);
        let only_per_user = start(&["--rate-per-user", "1M"]);
        let started = Instant::now();
        // Sessions of the same user, their limit, and whether they share it.
        let groups: [(&str, &Server, _, usize, f64); 5] = [
            ("alice", &server, alice, 4, 4e6),
            ("bob", &server, bob, 1, 4e6),
            ("bob, with a higher rate per user", &other, bob, 1, 1e6),
            ("alice, with a rate per user", &other, alice, 4, 2e6),
            ("bob, with only a rate per user", &only_per_user, bob, 2, 1e6),
        ];
        let sessions = groups.iter().flat_map(|(_, server, user, count, _)| vec![(*server, *user); *count]);
        let busy = |(server, user)| busy_tunnel(DOWN, |dst| open_with_login(server, user, CONNECT, dst));
        let (_tunnels, counters): (Vec<_>, Vec<_>) = sessions.map(busy).unzip();
        let mut rates = rates(started, Duration::from_millis(1250), &counters).into_iter().map(|[_, down]| down);
        for (what, _, _, count, limit) in groups {
            let rates: Vec<f64> = rates.by_ref().take(count).collect();
            check_rate(&format!("{count} sessions of {what}"), limit, rates.iter().sum())?;
            // Each session gets at least a tenth of its fair share. Exact fairness is not required.
            let min = limit / (10 * count) as f64;
            ensure(rates.iter().all(|rate| *rate > min), || format!("sessions of {what}: {rates:.0?}"))?;
        }
        Ok(())
    });
}

/// Sends three times the rate limit of 400 kB/s through an association. Returns the number of bytes that arrive at the
/// target, plus the bytes of its answers that arrive at the client.
fn flood(server: &Server, answers: bool, time: Duration) -> u64 {
    let bind = || UdpSocket::bind("127.0.0.1:0").expect("free port");
    let (socket, sink) = (bind(), bind());
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
    let time = Duration::from_secs(1);
    let limit = 400e3 * time.as_secs_f64();
    try_three_times(|| {
        let passed = thread::scope(|scope| {
            let floods = [false, true].map(|answers| scope.spawn(move || flood(server, answers, time)));
            floods.map(|flood| flood.join().expect("the thread does not panic") as f64)
        });
        let is_met = |passed: &f64| *passed > 0.95 * limit && *passed < 1.05 * limit + 100e3;
        let what = "bytes to a target, and to a target and back";
        ensure(passed.iter().all(is_met), || format!("{what}: {passed:?}, limit {limit}"))
    });
}

/// Returns the number of voluntary context switches of the server's threads.
fn voluntary_switches(server: &Server) -> u64 {
    crate::lookups::threads(server).1
}

#[test]
fn rate_limited_tunnel_wakes_once_per_reservation() {
    let _machine = lock_machine();
    let kinds = [("down", DOWN, 60.0), ("up", UP, 60.0), ("both directions", UP | DOWN, 120.0)];
    try_three_times(|| {
        let servers = kinds.map(|_| Server::start(&["--rate", "4M", "--threads", "1"]));
        let (_tunnels, counters): (Vec<_>, Vec<_>) =
            servers.iter().zip(kinds).map(|(server, (_, directions, _))| anonymous_tunnel(server, directions)).unzip();
        let (start, before) = (Instant::now(), servers.each_ref().map(voluntary_switches));
        thread::sleep(Duration::from_millis(1500));
        let (time, after) = (start.elapsed().as_secs_f64(), servers.each_ref().map(voluntary_switches));
        let rates = before.iter().zip(after).map(|(before, after)| (after - before) as f64 / time).collect::<Vec<_>>();
        for (((what, _, max), rate), counters) in kinds.iter().zip(&rates).zip(&counters) {
            let bytes: u64 = counters.iter().map(|counter| counter.load(Ordering::Relaxed)).sum();
            ensure(rate < max, || format!("{what}: {rate:.0} wake-ups per second of {rates:.1?}"))?;
            ensure(bytes > 5_500_000, || format!("{what}: {bytes} bytes in {time} s"))?;
        }
        Ok(())
    });
}

#[test]
fn rate_limited_tunnel_loses_no_data_and_relays_half_close() {
    const TOTAL: usize = 1_500_000;
    let server = Server::start(&["--rate", "4M"]);
    let mut stream = connect_to(&server, echo_server());
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
    let log = server.wait_log(|log| log.contains("msg=session "));
    assert!(log.contains("up=1500000 down=1500000") && !log.contains("error="), "{log}");
}

#[test]
fn unused_rate_accumulates_for_a_quarter_of_a_second() {
    let _machine = lock_machine();
    try_three_times(|| {
        let server = Server::start(&["--rate", "1M"]);
        let counter = Counter::default();
        let stream = connect_to(&server, target(UP, &counter));
        thread::sleep(Duration::from_millis(800));
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
    thread::sleep(Duration::from_millis(200));
    let before = (voluntary_switches(&server), server.cpu_seconds());
    thread::sleep(Duration::from_millis(1500));
    let (wake_ups, cpu) = (voluntary_switches(&server) - before.0, server.cpu_seconds() - before.1);
    assert!(wake_ups <= 10 && cpu <= 0.021, "{wake_ups} wake-ups and {cpu} s of CPU");
    tunnels[0].set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    tunnels[0].write_all(b"still open now").expect("data sent");
    assert_eq!(read_exact(&mut tunnels[0], 14), b"still open now");
}
