//! Password guessing is slow for each client address, and locks nobody out: a right password is accepted at once, or
//! within seconds at an address that guesses.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicUsize};

use login_throttle::{FREE_FAILURES, LoginThrottle, Turn};

use crate::*;

#[path = "../../src/server/login_throttle.rs"]
#[allow(dead_code, unreachable_pub, reason = "part of the server")]
mod login_throttle;

/// Upper limit for the time of an answer without a delay. The shortest delay is 1 s.
const NO_DELAY: Duration = Duration::from_millis(900);
/// Time between two turns of a client that guesses, and some time for the hash.
const TURN: Duration = Duration::from_millis(4900);
/// Guesses of one client address in an hour, as the manual states it.
const GUESSES_PER_HOUR: usize = 910;

fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// Sends logins from one address. Returns the connections, which wait for the answers.
fn start_logins(server: &Server, source: [u8; 4], logins: impl Iterator<Item = (String, String)>) -> Vec<TcpStream> {
    let start = |(uname, passwd): (String, String)| {
        let mut stream = connect_from_ip(server, source);
        select_password(&mut stream);
        stream.write_all(&login_message(uname.as_bytes(), passwd.as_bytes())).expect("login sent");
        stream
    };
    logins.map(start).collect()
}

fn wrong_passwords(uname: &str, count: usize) -> impl Iterator<Item = (String, String)> {
    (0..count).map(move |n| (uname.into(), format!("wrong{n}")))
}

fn unknown_names(count: usize) -> impl Iterator<Item = (String, String)> {
    (0..count).map(|n| (format!("user{n}"), "wrong".into()))
}

/// Counts the connections with a refusal.
fn refusals(streams: &[TcpStream]) -> usize {
    let is_refused = |mut stream: &TcpStream| {
        stream.set_nonblocking(true).expect("option set");
        matches!(retry(|| stream.read(&mut [0; 2])), Ok(2))
    };
    streams.iter().filter(|stream| is_refused(stream)).count()
}

#[test]
fn refusals_have_a_doubling_delay_and_right_passwords_have_none() {
    let (_dir, users) = users_file(&[("alice", "secret"), ("bob", "other"), ("carol", "third")]);
    // The delays exceed the handshake timeout, which does not apply to them.
    let server = Server::start(&["--users", &users, "--handshake-timeout", "500ms"]);
    let guess =
        |uname: &str, passwd: &str| timed(|| log_in(&server, [127, 5, 0, 1], uname.as_bytes(), passwd.as_bytes()));
    assert_eq!(guess("carol", "third").1.1, 0);
    for n in 0..FREE_FAILURES {
        let (time, (_, status)) = guess("alice", "wrong");
        assert!(status != 0 && time < NO_DELAY, "{n}: {time:?}");
    }
    for (delay, uname) in [(1, "alice"), (2, "nobody"), (4, "alice")] {
        let (time, (mut stream, status)) = guess(uname, "wrong");
        assert!(status != 0 && time >= seconds(delay) && time < seconds(delay) + NO_DELAY, "{uname}: {time:?}");
        assert_eq!(stream_end(&mut stream), StreamEnd::Closed(vec![]));
        // The last turn was before the delay, so the next one is due. After it, a user needs no turn for 10 minutes.
        for (uname, passwd) in [("bob", "other"), ("alice", "secret"), ("carol", "third"), ("bob", "other")] {
            let (time, (mut stream, status)) = guess(uname, passwd);
            assert!(status == 0 && time < NO_DELAY, "{uname}: {status} after {time:?}");
            stream.write_all(&request(CONNECT, echo_server())).expect("request sent");
            assert_eq!(read_reply(&mut stream).0, 0);
            ping(&mut stream, b"hello");
        }
    }
    assert_eq!(server.log().matches("5 failed logins from 127.5.0.1 within a minute").count(), 1, "{}", server.log());
}

#[test]
fn flood_of_guesses_from_one_address_is_slow_and_delays_right_passwords_by_a_turn_at_most() {
    const GUESSES: usize = 1000;
    if !raise_fd_limit(4096) {
        return skip("too few descriptors");
    }
    let _machine = lock_machine();
    let (dir, text) = (temp_dir(), ["alice", "bob", "carol"].map(|name| bcrypt_line(name, name, 9)).concat());
    let users = write_file(dir.path(), "users", &text);
    let server = Server::start(&["--users", &users]);
    let guesser = [127, 6, 0, 1];
    let log_in = |source: [u8; 4], name: &str| timed(|| log_in(&server, source, name.as_bytes(), name.as_bytes()).1);
    let cpu = server.cpu_seconds();
    let (time, status) = log_in(guesser, "alice");
    assert_eq!(status, 0);
    let no_delay = NO_DELAY.max(time * 4);
    let one_hash = server.cpu_seconds() - cpu;
    let (cpu, started) = (server.cpu_seconds(), Instant::now());
    let logins = wrong_passwords("alice", GUESSES / 2).zip(unknown_names(GUESSES / 2));
    let logins = logins.flat_map(|(known, unknown)| [known, unknown]);
    let guesses = start_logins(&server, guesser, logins);
    for n in 1..=3 {
        let (time, status) = log_in([127, 6, 1, n], "bob");
        assert!(status == 0 && time < no_delay, "another address: {status} after {time:?}");
    }
    let (time, status) = log_in(guesser, "alice");
    assert!(status == 0 && time < no_delay, "verified before, from the same address: {status} after {time:?}");
    for name in ["bob", "carol"] {
        let (time, status) = log_in(guesser, name);
        assert!(status == 0 && time < TURN, "{name}, from the same address: {status} after {time:?}");
    }
    let other = [127, 6, 0, 2];
    let _others = start_logins(&server, other, wrong_passwords("bob", GUESSES / 10));
    let (time, status) = log_in(other, "bob");
    assert!(status == 0 && time < TURN, "with the name that is guessed: {status} after {time:?}");
    let (elapsed, cpu) = (started.elapsed().as_secs_f64(), server.cpu_seconds() - cpu);
    let (refusals, hashes) = (refusals(&guesses), cpu / one_hash);
    eprintln!("{refusals} refusals and the CPU time of {hashes:.1} hashes in {elapsed:.1} s");
    assert!(refusals <= 2 * FREE_FAILURES, "{refusals} refusals in {elapsed} s");
    assert!(hashes < GUESSES as f64 / 10.0, "{cpu} s of CPU, {one_hash} for a hash");
}

#[test]
fn guesses_from_many_addresses_delay_no_login_from_another_one() {
    const ADDRESSES: u8 = 50;
    let _machine = lock_machine();
    let (dir, text) = (temp_dir(), ["alice", "bob"].map(|name| bcrypt_line(name, name, 10)).concat());
    let users = write_file(dir.path(), "users", &text);
    let server = Server::start(&["--users", &users, "--handshake-timeout", "60"]);
    let guess = |count| -> Vec<TcpStream> {
        (0..ADDRESSES).flat_map(|n| start_logins(&server, [127, 8, 0, n], wrong_passwords("alice", count))).collect()
    };
    let (one_login, (_, status)) = timed(|| log_in(&server, [127, 8, 1, 1], b"alice", b"alice"));
    assert_eq!(status, 0);
    // From now on, these addresses have a failure.
    guess(1).iter_mut().for_each(|stream| assert_eq!(read_exact(stream, 2), [1, 1]));
    let _guesses = guess(4);
    let (time, (_, status)) = timed(|| log_in(&server, [127, 8, 1, 1], b"bob", b"bob"));
    assert!(status == 0 && time < NO_DELAY.max(one_login * 4), "{status} after {time:?}, {one_login:?} before");
}

#[test]
fn guesses_that_do_not_wait_for_the_answer_are_as_slow_and_do_not_delay_another_name() {
    let (_dir, users) = users_file(&[("alice", "secret"), ("bob", "other")]);
    let server = Server::start(&["--users", &users]);
    let (guesser, is_done) = ([127, 6, 2, 1], AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !is_done.load(Ordering::Relaxed) {
                let mut guesses = start_logins(&server, guesser, wrong_passwords("alice", 10).chain(unknown_names(10)));
                // Time to hash one, before all leave.
                guesses[0].set_read_timeout(Some(Duration::from_millis(50))).expect("timeout set");
                let _ = retry(|| guesses[0].read(&mut [0; 2]));
            }
        });
        server.wait_log(|log| log.contains("5 failed logins"));
        let (time, (_, status)) = timed(|| log_in(&server, guesser, b"bob", b"other"));
        is_done.store(true, Ordering::Relaxed);
        assert!(status == 0 && time < TURN, "{status} after {time:?}");
    });
    let log = server.log();
    let guesses = log.lines().filter(|line| line.contains("user=\"alice\"") && line.contains("login refused")).count();
    assert!((FREE_FAILURES..FREE_FAILURES + 6).contains(&guesses), "{guesses} guesses:\n{log}");
}

#[test]
fn addresses_of_one_ipv6_prefix_count_as_one_client_and_unix_sockets_too() {
    enter_namespace!("", "");
    for addr in ["2001:db8::1/64", "2001:db8::2/64", "2001:db8:0:1::1/64"] {
        run(Command::new("ip").args(["addr", "add", addr, "dev", "lo", "nodad"]), b"", TIMEOUT);
    }
    let (dir, users) = users_file(&[("alice", "secret")]);
    let path = dir.path().join("socket");
    let server = serve("[2001:db8::1]:0", 2, &["--listen", &format!("unix:{}", path.display()), "--users", &users]);
    let from = |ip: &str| {
        let ip = ip.parse().expect("an address");
        timed(|| log_in(&server, IpAddr::V6(ip), b"alice", b"wrong")).0
    };
    let on_unix_socket = || {
        let mut stream = UnixStream::connect(&path).expect("connected");
        let mut answer = [0; 4];
        stream.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
        stream.write_all(&[&[5, 1, 2][..], &login_message(b"alice", b"wrong")].concat()).expect("sent");
        timed(|| stream.read_exact(&mut answer).expect("an answer")).0
    };
    for n in 0..FREE_FAILURES {
        assert!(from(["2001:db8::1", "2001:db8::2"][n % 2]) < NO_DELAY);
        assert!(on_unix_socket() < NO_DELAY);
    }
    assert!(from("2001:db8::2") >= seconds(1));
    assert!(on_unix_socket() >= seconds(1));
    assert!(from("2001:db8:0:1::1") < NO_DELAY, "another prefix");
    for client in ["2001:db8::/64", "unix"] {
        assert!(server.log().contains(&format!("5 failed logins from {client} within a minute")), "{}", server.log());
    }
}

#[test]
fn refusals_of_unknown_names_take_as_long_as_those_of_known_ones_when_logins_wait() {
    // With cost 10, a hash takes longer than the tolerance.
    let (dir, line) = (temp_dir(), bcrypt_line("alice", "secret", 10));
    let users = write_file(dir.path(), "users", &line);
    let server = Server::start(&["--users", &users]);
    let refusal_times = &|source: [u8; 4], uname: &str| {
        let mut failures = start_logins(&server, source, wrong_passwords("alice", FREE_FAILURES));
        failures.iter_mut().for_each(|stream| assert_eq!(read_exact(stream, 2), [1, 1]));
        [(); 2].map(|()| timed(|| log_in(&server, source, uname.as_bytes(), b"wrong")).0.as_secs_f64())
    };
    let last = AtomicU8::new(0);
    try_three_times(|| {
        let n = last.fetch_add(1, Ordering::Relaxed);
        let [known, unknown] = thread::scope(|scope| {
            let times = |source, uname| scope.spawn(move || refusal_times(source, uname));
            let times = [times([127, 6, 3, n], "alice"), times([127, 6, 4, n], "nobody")];
            times.map(|thread| thread.join().expect("the thread does not panic"))
        });
        let is_same = known.iter().zip(&unknown).all(|(known, unknown)| (known - unknown).abs() < 0.03);
        ensure(is_same, || format!("known {known:?}, unknown {unknown:?}"))
    });
}

#[test]
fn number_of_guesses_in_an_hour_is_limited() {
    const STEP: Duration = Duration::from_millis(100);
    // Logins that wait for their refusals, for one name or for many, and logins that never wait for it.
    for (names, max_waiting) in [(1, 1), (1, 1000), (100, 1000), (100, 50)] {
        let (mut throttle, start) = (LoginThrottle::default(), Instant::now());
        let (mut now, mut hashed, mut refused, mut sent) = (start, 0, 0, 0_usize);
        let mut waiting = Vec::new();
        while now < start + seconds(3600) {
            while waiting.len() < max_waiting {
                if throttle.failures("a", now) < FREE_FAILURES {
                    throttle.record_failure("a", now);
                    hashed += 1;
                    continue;
                }
                sent += 1;
                waiting.push(throttle.wait("a", &[u8::try_from(sent % names).expect("a byte")], true, now));
            }
            throttle.take_turn("a", now);
            waiting.retain(|login| {
                let turns: Vec<Turn> = std::iter::from_fn(|| login.try_recv().ok()).collect();
                let is_refused = turns.iter().any(|turn| matches!(turn, Turn::Refuse(_)));
                hashed += turns.len() - usize::from(is_refused);
                refused += usize::from(is_refused);
                !is_refused
            });
            if max_waiting == 50 {
                waiting.remove(0);
            }
            now += STEP;
        }
        eprintln!("{names} names, {max_waiting} logins at once: {hashed} guesses and {refused} refusals in an hour");
        assert!(hashed <= GUESSES_PER_HOUR && hashed > 100, "{hashed}");
        assert!(refused <= 250, "{refused}");
    }
    let manual = include_str!("../../src/cmd/cli/s5.1");
    assert!(manual.contains(&format!("{GUESSES_PER_HOUR} guesses an hour")));
}

/// Returns the time from a wrong password to its answer.
fn refusal_time(server: &Server, source: [u8; 4], uname: &[u8]) -> Duration {
    let mut stream = connect_from_ip(server, source);
    stream.set_nodelay(true).expect("option set");
    select_password(&mut stream);
    let (time, status) = timed(|| send_login(&mut stream, uname, b"wrong"));
    assert_ne!(status, 0);
    time
}

#[test]
fn refusal_time_does_not_reveal_user_names() {
    const ATTEMPTS: usize = 400;
    let _machine = lock_machine();
    let names = ["alice", "bob", "carol", "dave", "erin"];
    let (dir, text) = (temp_dir(), names.map(|name| bcrypt_line(name, "secret", 4)).concat());
    let users = write_file(dir.path(), "users", &text);
    let server = Server::start(&["--users", &users]);
    let last = AtomicU32::new(0x7F10_0000);
    let source = || (last.fetch_add(1, Ordering::Relaxed) + 1).to_be_bytes();
    try_three_times(|| {
        let mut times = [Vec::new(), Vec::new()];
        for n in 0..ATTEMPTS {
            let known = names[n % names.len()];
            let unknown = format!("{}{}", ["alicia", "b", "mallory", "", "Dave"][n % 5], n);
            times[0].push(refusal_time(&server, source(), known.as_bytes()));
            times[1].push(refusal_time(&server, source(), unknown.as_bytes()));
        }
        let [known, unknown] = times.map(|mut times| {
            times.sort_unstable();
            times[ATTEMPTS / 2].as_secs_f64() * 1e6
        });
        eprintln!("medians of refusals: known {known:.0} us, unknown {unknown:.0} us");
        ensure((known - unknown).abs() < (0.03 * known).max(50.0), || {
            format!("known {known:.0} us, unknown {unknown:.0} us")
        })
    });
}

#[test]
fn guesses_from_20000_addresses_use_bounded_memory_and_evict_no_throttled_address() {
    const SOURCES: usize = 20_000;
    const THREADS: usize = 16;
    let _machine = lock_machine();
    let (_dir, users) = users_file(&[("alice", "secret"), ("bob", "other")]);
    let server = Server::start(&["--users", &users]);
    let guesser = [127, 7, 7, 7];
    for _ in 0..FREE_FAILURES {
        assert_ne!(log_in(&server, guesser, b"alice", b"wrong").1, 0);
    }
    let (next, started) = (AtomicUsize::new(0), Instant::now());
    // The number of guesses before it, and the size of the server.
    let guess_from_next_source = || {
        let n = next.fetch_add(1, Ordering::Relaxed);
        let source = u32::try_from(0x7F20_0001 + n).expect("32 bits suffice").to_be_bytes();
        assert_ne!(log_in(&server, source, format!("user{n}").as_bytes(), b"wrong").1, 0);
        n.is_multiple_of(100).then(|| (n, resident_kib(&server)))
    };
    let sizes = thread::scope(|scope| {
        let guesses = || (0..SOURCES / THREADS).filter_map(|_| guess_from_next_source()).collect::<Vec<_>>();
        let threads = [(); THREADS].map(|()| scope.spawn(guesses));
        threads.map(|thread| thread.join().expect("the thread does not panic")).concat()
    });
    let max_size = |quarter: usize| {
        let is_in_quarter = |n: usize| n * 4 / SOURCES == quarter;
        sizes.iter().filter(|(n, _)| is_in_quarter(*n)).map(|(_, size)| *size).max().expect("at least one size")
    };
    let (first, last) = (max_size(0), max_size(3));
    eprintln!("{SOURCES} guesses in {:?}: {first} KiB in the first quarter, {last} in the last", started.elapsed());
    assert!(last <= first + 512, "{first} KiB in the first quarter, {last} in the last");
    let (time, (_, status)) = timed(|| log_in(&server, guesser, b"alice", b"wrong"));
    assert!(status != 0 && time >= seconds(1), "the first guesser: {status} {time:?}");
}
