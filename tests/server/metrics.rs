//! Metrics and health checks: the text format, the counts of each kind of event, the limits of the HTTP server.

mod prometheus;

use crate::lifecycle::notify::stop_worker;
use crate::udp::association::{Association, datagram, datagram_name, receive, socket};
use crate::udp::bursts::while_stopped;
use crate::*;

/// A server with metrics on loopback, and the address of these.
pub fn start(args: &[&str]) -> (Server, SocketAddr) {
    let server = Server::start(&[&["--metrics", "127.0.0.1:0"], args].concat());
    let log = server.wait_log(|log| log.contains("metrics on "));
    let metrics = log.lines().find_map(|line| line.split_once("metrics on ")).expect("a line").1;
    (server, addr(metrics))
}

/// Sends bytes to the metrics port. Returns all bytes of the answer.
fn exchange(metrics: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(metrics).expect("the metrics port accepts");
    stream.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    // The server may close the connection before it has read everything.
    let _ = stream.write_all(bytes);
    read_answer(stream)
}

fn read_answer(mut stream: impl io::Read) -> String {
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    text(&answer)
}

/// Requests a path. Returns status and body.
fn get(metrics: SocketAddr, path: &str) -> (u16, String) {
    let answer = exchange(metrics, format!("GET {path} HTTP/1.1\r\nHost: s5\r\n\r\n").as_bytes());
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no end of the header: {answer:?}"));
    assert!(head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())), "{head}");
    (head["HTTP/1.1 ".len()..][..3].parse().expect("a status"), body.to_owned())
}

/// All samples by name and labels. Fails unless the text is in the format of Prometheus.
pub struct Metrics(BTreeMap<String, f64>);

impl Metrics {
    pub fn scrape(metrics: SocketAddr) -> Self {
        let (status, text) = get(metrics, "/metrics");
        assert_eq!(status, 200);
        Self::parse(&text)
    }

    fn parse(text: &str) -> Self {
        let (mut samples, mut names, mut current) = (BTreeMap::new(), BTreeSet::new(), (String::new(), String::new()));
        let mut lines = text.strip_suffix('\n').expect("a line end").lines();
        while let Some(line) = lines.next() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, help) = help.split_once(' ').expect("name and help");
                let kind =
                    lines.next().and_then(|line| line.strip_prefix(&format!("# TYPE {name} "))).expect("the type");
                assert!(names.insert(name.to_owned()) && !help.is_empty(), "{line}");
                assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
                current = (name.to_owned(), kind.to_owned());
                continue;
            }
            let (series, value) = line.rsplit_once(' ').expect("series and value");
            let (name, labels) = series.split_once('{').map_or((series, ""), |(name, labels)| {
                (name, labels.strip_suffix('}').expect("the end of the labels"))
            });
            let suffix = name.strip_prefix(&current.0).unwrap_or_else(|| panic!("{line} after {current:?}"));
            let suffixes: &[&str] = if current.1 == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
            assert!(suffixes.contains(&suffix), "{line}");
            let quotes = labels.replace("\\\\", "").replace("\\\"", "").matches('"').count();
            assert!(
                quotes % 2 == 0 && labels.is_empty() == (quotes == 0) && labels.matches("=\"").count() >= quotes / 2
            );
            let value: f64 = value.parse().unwrap_or_else(|_| panic!("{line}"));
            assert!(samples.insert(series.to_owned(), value).is_none(), "twice: {line}");
        }
        Self(samples)
    }

    /// The value of a series; 0 if there is none.
    pub fn get(&self, series: &str) -> f64 {
        self.0.get(series).copied().unwrap_or_default()
    }

    /// Fails unless these series have these values.
    pub fn assert<'a>(&self, expected: impl IntoIterator<Item = (&'a str, f64)>) {
        for (series, value) in expected {
            assert_eq!(self.get(series), value, "{series} in {:#?}", self.0);
        }
    }
}

fn result(command: &str, method: &str, rep: &str) -> String {
    format!("s5_sessions_total{{command=\"{command}\",method=\"{method}\",rep=\"{rep}\"}}")
}

/// Takes more than 10 s, the time after which a worker counts as stuck.
#[test]
fn healthz_is_503_while_a_worker_is_stuck() {
    if !is_installed("strace") {
        return;
    }
    let (server, metrics) = start(&["--threads", "2"]);
    assert_eq!(get(metrics, "/healthz"), (200, "ok\n".into()));
    let since = Instant::now();
    let strace = stop_worker(&server);
    wait_until("healthz has noticed", Duration::from_secs(25), || get(metrics, "/healthz").0 == 503);
    assert!(since.elapsed() > Duration::from_secs(9), "{:?}", since.elapsed());
    assert_eq!(get(metrics, "/healthz").1, "a worker is stuck\n");
    assert_eq!([get(metrics, "/metrics").0, get(metrics, "/readyz").0], [200, 200]);
    drop(strace);
    wait_until("the worker runs again", TIMEOUT, || get(metrics, "/healthz").0 == 200);
}

#[test]
fn metrics_count_sessions_by_result_bytes_logins_and_denials() {
    let (dir, users) = users_file(&[("alice", "secret")]);
    let rules = write_file(dir.path(), "ru\"les", "# a comment\ndeny port=9\n");
    let (server, metrics) =
        start(&["--auth", "none,password", "--users", &users, "--rules", &rules, "--deny", "port=10"]);
    let (mut client, mut target) = tunnel(&server);
    let association = Association::new(&server);
    for (port, rep) in [(9, 2), (10, 2), (9, 2), (closed_port().port(), 5)] {
        assert_eq!(open(&server, CONNECT, SocketAddr::new(V4, port)).1, rep);
    }
    let (mut control, rep, bnd) = open(&server, BIND, addr("0.0.0.0:0"));
    assert_eq!(rep, 0);
    // The name contains a label, and a line end.
    assert_ne!(log_in(&server, unused_client_ip(), b"a\"} 1\nb", b"wrong").1, 0);
    server.wait_log(|log| ended_sessions(log) == 5);
    let (bind, at) = (result("bind", "none", "0"), |line| {
        format!("s5_denials_total{{rule=\"{}ru\\\"les line {line}\"}}", dir.path().join("").display())
    });
    let before = Metrics::scrape(metrics);
    before.assert([(bind.as_str(), 0.0), (&at(2), 2.0), ("s5_denials_total{rule=\"--deny (deny port=10)\"}", 1.0)]);
    let _peer = TcpStream::connect(bnd).expect("BIND accepts");
    assert_eq!(read_reply(&mut control).0, 0);
    client.write_all(b"hello").expect("data sent");
    assert_eq!(read_exact(&mut target, 5), b"hello");
    target.write_all(b"hello world").expect("data sent");
    assert_eq!(read_exact(&mut client, 11), b"hello world");
    // The end of a session does not count it again.
    drop((client, target));
    server.wait_log(|log| ended_sessions(log) == 6);
    let after = Metrics::scrape(metrics);
    after.assert([
        (result("connect", "none", "0").as_str(), 1.0),
        (&result("udp", "none", "0"), 1.0),
        (&bind, 1.0),
        (&result("connect", "none", "2"), 3.0),
        (&result("connect", "none", "5"), 1.0),
        (&result("-", "-", "-"), 1.0),
        ("s5_sessions_started_total", 8.0),
        ("s5_sessions_open", 2.0),
        ("s5_associations_open", 1.0),
        ("s5_relayed_bytes_total{direction=\"up\"}", 5.0),
        ("s5_relayed_bytes_total{direction=\"down\"}", 11.0),
        ("s5_login_failures_total", 1.0),
        ("s5_login_refusals_delayed_total", 0.0),
        ("s5_handshake_seconds_count", 7.0),
        ("s5_connect_seconds_count", 2.0),
        ("s5_lookup_seconds_count", 0.0),
        ("s5_last_reload_successful", 1.0),
        (concat!("s5_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"}"), 1.0),
    ]);
    assert!(
        after.get("s5_handshake_seconds_bucket{le=\"+Inf\"}") == 7.0 && after.get("s5_handshake_seconds_sum") > 0.0
    );
    // The connection of the scrape counts too, and others of the server can have closed since.
    let open = server.descriptors() as f64;
    assert!((after.get("process_open_fds") - open).abs() <= 4.0, "{open}: {:#?}", after.0);
    assert!(after.get("process_max_fds") >= open && after.get("s5_sessions_limit") > 1.0);
    drop(association);
}

#[test]
fn refusals_of_logins_count_as_delayed_after_five_failures() {
    let (_dir, users) = users_file(&[("alice", "secret")]);
    let (server, metrics) = start(&["--users", &users]);
    let client = unused_client_ip();
    let delayed = || Metrics::scrape(metrics).get("s5_login_refusals_delayed_total");
    for _ in 0..5 {
        assert_ne!(log_in(&server, client, b"alice", b"wrong").1, 0);
    }
    assert_eq!(delayed(), 0.0);
    let mut stream = connect_from_ip(&server, client);
    select_password(&mut stream);
    stream.write_all(&login_message(b"alice", b"wrong")).expect("login sent");
    wait_until("the refusal is delayed", TIMEOUT, || delayed() == 1.0);
    // Without its refusal, it is a failure too.
    drop(stream);
    wait_until("all failures count", TIMEOUT, || Metrics::scrape(metrics).get("s5_login_failures_total") == 6.0);
}

#[test]
fn bytes_and_pipes_of_an_open_tunnel_count_while_it_copies_splices_and_moves() {
    // More than all buffers of the kernel hold.
    const TOTAL: usize = 24 << 20;
    for args in [&["--threads", "1"][..], &["--threads", "2"], &["--rate", "1G"]] {
        let (server, metrics) = start(args);
        let (client, target) = tunnel(&server);
        let (mut sender, is_spliced) = (client.try_clone().expect("cloned"), args[0] == "--threads");
        let sending = thread::spawn(move || send_pattern(&mut sender, TOTAL, |_| {}));
        let pipes = || Metrics::scrape(metrics).get("s5_pipes_open");
        wait_until("a pipe is full", TIMEOUT, || pipes() == f64::from(u8::from(is_spliced)));
        check_pattern(&mut (&target).take(TOTAL as u64), TOTAL);
        sending.join().expect("data sent");
        let up = "s5_relayed_bytes_total{direction=\"up\"}";
        wait_until("all bytes count", TIMEOUT, || Metrics::scrape(metrics).get(up) == TOTAL as f64);
        let after = Metrics::scrape(metrics);
        assert!(after.get("s5_sessions_open") == 1.0 && after.get("s5_pipes_open") <= f64::from(u8::from(is_spliced)));
        drop((client, target));
        wait_until("the pipe is closed", TIMEOUT, || pipes() == 0.0);
        Metrics::scrape(metrics).assert([(up, TOTAL as f64)]);
    }
}

#[test]
fn dropped_datagrams_count_by_reason() {
    enter_namespace!("127.0.0.1 localhost\n192.0.2.2 no-route.test\n", "");
    let dst = udp_echo_server(V4);
    let hop = format!("--hop=gone={}", closed_port());
    let (server, metrics) = start(&["--deny", "port=9", &hop, "--rule", "allow to=127.0.0.9 via=gone"]);
    let association = Association::new(&server);
    // Received together with the first datagram of the client, which sets its port.
    while_stopped(&server, || {
        association.send(dst, b"hello");
        let other_port = datagram(0, dst, b"sender");
        socket(V4).send_to(&other_port, association.bnd).expect("datagram sent");
    });
    assert_eq!(association.receive(), (dst, b"hello".to_vec()));
    association.send(addr("127.0.0.1:9"), b"denied");
    association.send_raw(b"malformed");
    association.send_raw(&datagram(2, dst, b"not the first fragment"));
    association.send_raw(&datagram_name(0, "no.test", 7, b"lookup"));
    association.send(addr("127.0.0.9:7"), b"hop");
    association.send(addr("192.0.2.1:7"), b"unsent");
    association.send_raw(&datagram_name(0, "no-route.test", 7, b"unsent"));
    association.ping(dst, b"hello");
    // An answer of a stranger.
    let (target, stranger) = (socket(V4), socket(ip("127.0.0.9")));
    association.send(target.local_addr().expect("an address"), b"hello");
    stranger.send_to(b"not asked", receive(&target).1).expect("datagram sent");
    let reason = |reason: &str| format!("s5_datagrams_dropped_total{{reason=\"{reason}\"}}");
    for (expected, count) in [
        ("sender", 1.0),
        ("denied", 2.0),
        ("malformed", 1.0),
        ("fragment", 1.0),
        ("lookup", 1.0),
        ("hop", 1.0),
        ("unsent", 2.0),
    ] {
        wait_until(expected, TIMEOUT, || Metrics::scrape(metrics).get(&reason(expected)) == count);
    }
    let after = Metrics::scrape(metrics);
    after.assert([
        ("s5_relayed_bytes_total{direction=\"up\"}", 15.0),
        ("s5_relayed_bytes_total{direction=\"down\"}", 10.0),
        ("s5_lookup_seconds_count", 2.0),
        (&reason("rate"), 0.0),
    ]);
    let (server, metrics) = start(&["--rate", "1"]);
    let association = Association::new(&server);
    association.send(dst, &[0; 60_000]);
    association.send(dst, &[0; 60_000]);
    wait_until("dropped above the rate", TIMEOUT, || Metrics::scrape(metrics).get(&reason("rate")) >= 1.0);
}

#[test]
fn reload_restarts_the_counts_of_denials_and_records_its_result() {
    let dir = temp_dir();
    let rules = write_file(dir.path(), "rules", "deny port=9\n");
    let (server, metrics) = start(&["--rules", &rules]);
    let denied = || open(&server, CONNECT, addr("127.0.0.1:9")).1;
    let series = format!("s5_denials_total{{rule=\"{rules} line 1\"}}");
    let state = || {
        let metrics = Metrics::scrape(metrics);
        (metrics.get(&series), metrics.get("s5_last_reload_successful"))
    };
    assert_eq!((denied(), state()), (2, (1.0, 1.0)));
    fs::write(&rules, "alow\n").expect("written");
    server.reload();
    assert_eq!((denied(), state()), (2, (2.0, 0.0)));
    fs::write(&rules, "deny port=9\n").expect("written");
    server.reload();
    assert_eq!((state(), denied(), state()), ((0.0, 1.0), 2, (1.0, 1.0)));
    let time = Metrics::scrape(metrics).get("s5_last_reload_timestamp_seconds");
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().expect("after 1970").as_secs_f64();
    assert!((now - 60.0..=now).contains(&time), "{time}");
}

#[test]
fn requests_that_are_not_valid_get_their_status_and_are_logged() {
    let (server, metrics) = start(&[]);
    let long = format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(20_000));
    let table = [
        ("GET /nothing HTTP/1.1\r\nHost: s5\r\n\r\n", "404 Not Found"),
        ("GET /metrics/ HTTP/1.1\r\nHost: s5\r\n\r\n", "404 Not Found"),
        (
            "POST /metrics HTTP/1.1\r\nHost: s5\r\nContent-Length: 1\r\n\r\nx",
            "405 Method Not Allowed\r\nAllow: GET, HEAD",
        ),
        ("GET /metrics\r\n\r\n", "400 Bad Request"),
        ("GET metrics HTTP/1.1\r\nHost: s5\r\n\r\n", "400 Bad Request"),
        ("GET  /metrics HTTP/1.1\r\nHost: s5\r\n\r\n", "400 Bad Request"),
        ("GET /metrics HTTP/2.0\r\n\r\n", "400 Bad Request"),
        ("\x16\x03\x01\x02", "400 Bad Request"),
        ("\x05\x01\x00", "400 Bad Request"),
        ("GET /\u{fffd} HTTP/1.1\r\nHost: s5\r\n\r\n", "404 Not Found"),
        (&long, "431 Request Header Fields Too Large"),
        ("GET /healthz?x=1 HTTP/1.1\r\nHost: s5\r\n\r\n", "200 OK"),
        ("GET /readyz HTTP/1.0\n\n", "200 OK"),
        ("GET http://s5:9080/healthz?x HTTP/1.1\r\nAccept: */*\r\nHost: s5\r\n\r\n", "200 OK"),
        ("GET HTTP://s5/healthz HTTP/1.1\nhost:\n\n", "200 OK"),
        ("GET ftp://s5/healthz HTTP/1.1\r\nHost: s5\r\n\r\n", "400 Bad Request"),
        ("GET /healthz HTTP/1.1\r\nX: Host: s5\r\n\r\nHost: s5\r\n", "400 Bad Request"),
        ("GET /healthz HTTP/1.1\r\nHost: s5\r\nHost: s5\r\n\r\n", "400 Bad Request"),
    ];
    for (request, status) in table {
        let answer = exchange(metrics, request.as_bytes());
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{request:?}: {answer:?}");
        assert!(answer.contains("\r\nConnection: close\r\n") && !answer.ends_with("\r\n\r\n"), "{answer:?}");
    }
    let head = exchange(metrics, b"HEAD /metrics HTTP/1.1\r\nHost: s5\r\n\r\n");
    assert!(
        head.starts_with("HTTP/1.1 200 OK\r\n")
            && head.ends_with("\r\n\r\n")
            && !head.contains("\r\nContent-Length: 0")
    );
    server.wait_log(|log| log.contains("metrics: client 127.0.0.1: 404 Not Found: use /metrics, /healthz or /readyz"));
}

#[test]
fn readiness_ends_with_the_drain_and_metrics_of_a_unix_socket_stay() {
    let dir = temp_dir();
    let path = dir.path().join("metrics");
    let unix = format!("unix:{}", path.display());
    let mut server = Server::start(&["--metrics", &unix, "--drain-timeout", "60"]);
    let ask = |what: &str| {
        let mut stream = UnixStream::connect(&path).expect("the socket accepts");
        stream.write_all(format!("GET /{what} HTTP/1.0\r\n\r\n").as_bytes()).expect("request sent");
        read_answer(stream)
    };
    server.wait_log(|log| log.contains(&format!("metrics on {unix}\n")));
    assert!(ask("readyz").starts_with("HTTP/1.1 200 OK\r\n") && ask("healthz").ends_with("\r\n\r\nok\n"));
    let (client, target) = tunnel(&server);
    server.signal("TERM");
    server.wait_log(|log| log.contains("draining sessions"));
    let answer = ask("readyz");
    assert!(answer.starts_with("HTTP/1.1 503 Service Unavailable\r\n") && answer.ends_with("\r\n\r\ndraining\n"));
    assert!(ask("healthz").starts_with("HTTP/1.1 200 OK\r\n") && ask("metrics").contains("\ns5_sessions_open 1\n"));
    drop((client, target));
    assert_eq!(server.wait(TIMEOUT).code(), Some(0));
    assert!(!path.exists());
}

#[test]
fn lag_of_the_event_loops_is_measured() {
    let (server, metrics) = start(&["--threads", "2"]);
    // A check whether the port is open is not logged.
    drop(TcpStream::connect(metrics));
    let lag = |le: &str| Metrics::scrape(metrics).get(&format!("s5_event_loop_lag_seconds_bucket{{le=\"{le}\"}}"));
    wait_until("it was measured", TIMEOUT, || lag("10") >= 1.0);
    assert_eq!(get(metrics, "/healthz"), (200, "ok\n".into()));
    assert!(!server.log().contains("metrics: client"), "{}", server.log());
}

#[test]
fn refused_connections_and_omitted_lines_count() {
    let (server, metrics) = start(&["--deny", "from=127.0.0.66", "--max-per-client", "1"]);
    for _ in 0..20 {
        stream_end(&mut connect_from_ip(&server, [127, 0, 0, 66]));
    }
    let omitted = || Metrics::scrape(metrics).get("s5_log_lines_dropped_total{reason=\"limit\"}") as usize;
    server.wait_log(|log| omitted() > 0 && log.matches("denied: --deny").count() + omitted() == 20);
    let _only = greet(&server);
    stream_end(&mut server.connect());
    Metrics::scrape(metrics).assert([("s5_connections_refused_total", 21.0)]);
}

#[test]
fn denials_of_the_first_thousand_rules_count_separately() {
    let dir = temp_dir();
    let rules: String = (2000..3001).map(|port| format!("deny port={port}\n")).collect();
    let (server, metrics) = start(&["--rules", &write_file(dir.path(), "rules", &rules)]);
    let (association, echo) = (Association::new(&server), udp_echo_server(V4));
    for port in (2000..3001).chain([2000, 3000]) {
        association.send(SocketAddr::new(V4, port), b"denied");
        // So that no buffer is full.
        association.ping(echo, b"hello");
    }
    let denials = Metrics::scrape(metrics);
    let of = |rule: &str| denials.get(&format!("s5_denials_total{{rule=\"{rule}\"}}"));
    let first = dir.path().join("rules").display().to_string() + " line 1";
    assert_eq!((of(&first), of("others")), (2.0, 2.0));
    assert_eq!(denials.0.keys().filter(|series| series.starts_with("s5_denials_total{")).count(), 1001);
}

#[test]
fn metrics_need_an_option_for_other_hosts_and_are_not_reachable_through_the_server() {
    for any in ["0.0.0.0:0", "[::]:0"] {
        let output = run(s5().args(["serve", "--listen", "127.0.0.1:0", "--metrics", any]), b"", TIMEOUT);
        assert_fails_with(&output, 2, &["or --allow-remote-metrics"]);
    }
    let (_in_use, taken) = listener(V4);
    let output = run(s5().args(["serve", "--listen", "127.0.0.1:0", "--metrics", &taken.to_string()]), b"", TIMEOUT);
    assert!(text(&output.stderr).contains("address already in use (choose another address with --metrics)"));
    let server = Server::start(&["--metrics", "*:0", "--allow-remote-metrics"]);
    let log = server.wait_log(|log| log.matches("metrics on ").count() == 2);
    let v4 = log.lines().find_map(|line| line.split_once("metrics on 0.0.0.0:")).expect("IPv4").1;
    let metrics = SocketAddr::new(V4, v4.parse().expect("a port"));
    assert_eq!((get(metrics, "/readyz").0, get(SocketAddr::new(V6, metrics.port()), "/readyz").0), (200, 200));
    assert_eq!(open(&server, CONNECT, metrics).1, 2);
}

#[test]
fn slow_huge_and_many_requests_disturb_neither_sessions_nor_scrapes_of_others() {
    let (server, metrics) = start(&["--threads", "1"]);
    let idle = server.descriptors();
    let (mut client, mut target) = tunnel(&server);
    let connect = |ip: &str| connect_from(SocketAddr::new(addr(ip).ip(), 0), metrics);
    // The oldest connections end for new ones, and a scrape is done before that.
    let slow: Vec<_> = (0..80).map(|n| connect(&format!("127.0.0.{}:0", 7 + n % 8))).collect();
    slow.iter().for_each(|mut stream| drop(stream.write_all(b"GET /metrics HT")));
    let (is_done, start) = (AtomicBool::new(false), Instant::now());
    thread::scope(|scope| {
        for attack in [&b"GET /metrics HTTP/1.0\r\n\r\n"[..], &[b'G'; 1 << 20], &[0; 1000], b"GET / HTTP/1.1\r\n"] {
            scope.spawn(|| {
                while !is_done.load(Ordering::Relaxed) && start.elapsed() < TIMEOUT {
                    let mut stream = connect("127.0.0.8:0");
                    let _ = stream.write_all(attack);
                    let _ = stream.read(&mut [0; 100]);
                }
            });
        }
        for _ in 0..50 {
            client.write_all(b"ping").expect("data sent");
            assert_eq!(read_exact(&mut target, 4), b"ping");
            assert_eq!(get(metrics, "/readyz").0, 200);
            assert_eq!(open(&server, CONNECT, closed_port()).1, 5);
        }
        is_done.store(true, Ordering::Relaxed);
    });
    let answers = slow.into_iter().map(read_answer);
    assert!(answers.filter(|answer| answer.starts_with("HTTP/1.1 400 Bad Request\r\n")).count() <= 32);
    drop((client, target));
    wait_until("all connections are closed", TIMEOUT, || server.descriptors() <= idle);
    server.wait_log(|log| log.contains(": closed for a newer connection: too many connections"));
}

#[test]
fn manual_has_every_metric() {
    let manual = text(&run(s5().arg("--man"), b"", TIMEOUT).stdout).replace("\\-", "-");
    let section = manual.split("\n.SH METRICS\n").nth(1).expect("a section").split("\n.SH ").next().expect("its text");
    let (_server, metrics) = start(&[]);
    let (_, text) = get(metrics, "/metrics");
    let names = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    for name in names {
        assert!(section.split(['\n', ' ', ',', '\\']).any(|word| word == name), "{name}");
    }
}
