//! Throttling of password guesses: logins are delayed and then blocked, but only for the guesser's address.

use std::sync::atomic::AtomicU32;

use crate::*;

/// Failures within a minute that are answered without a delay.
const FREE_FAILURES: usize = 5;
/// Number of delayed failures. After the last one the address is blocked.
const DELAYED_FAILURES: usize = 6;
/// Upper limit for the time of an answer without a delay. The shortest delay is 1 s.
const NO_DELAY: Duration = Duration::from_millis(900);

fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn set_timeout_seconds(stream: &TcpStream, n: u64) {
    stream.set_read_timeout(Some(seconds(n))).expect("timeout set");
}

#[test]
fn login_delay_doubles_and_other_addresses_are_not_delayed() {
    let (_dir, users) = users_file(&[("alice", "secret")]);
    // The delays exceed the handshake timeout, which does not apply to them.
    let server = Server::start(&["--users", &users, "--handshake-timeout", "500ms"]);
    let guess = |passwd: &[u8]| timed(|| log_in(&server, [127, 5, 0, 1], b"alice", passwd));
    for n in 0..FREE_FAILURES {
        let (time, (_, status)) = guess(b"wrong");
        assert!(status != 0 && time < NO_DELAY, "{n}: {time:?}");
    }
    let (time, (mut stream, status)) = guess(b"wrong");
    assert!(status != 0 && time >= seconds(1) && time < seconds(1) + NO_DELAY, "{time:?}");
    assert_eq!(stream_end(&mut stream), StreamEnd::Closed(vec![]));
    thread::scope(|scope| {
        // The right password is delayed too. Otherwise the time of the answer would reveal it.
        let right = scope.spawn(|| guess(b"secret"));
        for n in 1..=3 {
            let (time, (_, status)) = timed(|| log_in(&server, [127, 5, 1, n], b"alice", b"secret"));
            assert!(status == 0 && time < NO_DELAY, "another address: {time:?}");
        }
        let (time, (mut stream, status)) = right.join().expect("the thread does not panic");
        assert!(status == 0 && time >= seconds(2) && time < seconds(2) + NO_DELAY, "{status} {time:?}");
        // The delay does not count against the handshake timeout.
        stream.write_all(&request(CONNECT, echo_server())).expect("request sent");
        assert_eq!(read_reply(&mut stream).0, 0);
        ping(&mut stream, b"hello");
        // For the request, only the remaining handshake timeout is left.
        let (mut silent, status) = guess(b"secret").1;
        assert_eq!(status, 0);
        let (time, end) = timed(|| stream_end(&mut silent));
        assert!(end == StreamEnd::Closed(vec![]) && time < NO_DELAY, "{end:?} after {time:?}");
    });
    assert!(!server.log().contains("too many failed logins"), "{}", server.log());
}

#[test]
fn guesser_is_blocked_after_the_last_delayed_failure() {
    const PENDING: u8 = 12;
    let guesser = [127, 6, 0, 1];
    // With cost 9 the CPU time of a hash is measurable.
    let dir = temp_dir();
    let users = write_file(dir.path(), "users", &bcrypt_line("alice", "secret", 9));
    let server = Server::start(&["--users", &users, "--handshake-timeout", "40", "-v"]);
    let connect = || {
        let mut stream = connect_from_ip(&server, guesser);
        select_password(&mut stream);
        set_timeout_seconds(&stream, 40);
        stream
    };
    let mut pending: Vec<TcpStream> = (0..PENDING).map(|_| connect()).collect();
    let mut guesses: Vec<TcpStream> = (0..FREE_FAILURES + DELAYED_FAILURES).map(|_| connect()).collect();
    let cpu = server.cpu_seconds();
    for (guess, n) in guesses.iter_mut().zip(0..) {
        assert!(!server.log().contains("too many"), "blocked before attempt {n}");
        guess.write_all(&login_message(b"alice", &[b'x', n])).expect("data sent");
    }
    let block_line = "too many failed logins from 127.6.0.1: blocked for 600 s";
    server.wait_log(|log| log.contains(block_line));
    let hashes = server.cpu_seconds() - cpu;
    let cpu = server.cpu_seconds();
    for (stream, n) in pending.iter_mut().zip(0..) {
        // Some passwords are right. None is verified.
        let passwd: &[u8] = if n % 4 == 0 { b"secret" } else { &[b'y', n] };
        stream.write_all(&login_message(b"alice", passwd)).expect("data sent");
    }
    for _ in 0..3 {
        let (time, end) = timed(|| stream_end(&mut connect_from_ip(&server, guesser)));
        assert!(end == StreamEnd::Closed(vec![]) && time < NO_DELAY, "{end:?} after {time:?}");
    }
    assert_eq!(open_with_login(&server, ("alice", "secret"), CONNECT, echo_server()).1, 0, "another address");
    for mut guess in guesses {
        assert_eq!(read_exact(&mut guess, 2), [1, 1], "a guess before the block");
    }
    for (mut stream, n) in pending.into_iter().zip(0..) {
        assert_eq!(read_exact(&mut stream, 2), [1, 1], "pending login {n}");
        assert_eq!(stream_end(&mut stream), StreamEnd::Closed(vec![]));
    }
    // After the block one password is hashed, for the other address. Before it, eleven were.
    let later = server.cpu_seconds() - cpu;
    assert!(later < hashes / 2.0, "{hashes} s before and {later} s after the block");
    let refusals = usize::from(PENDING) + FREE_FAILURES + DELAYED_FAILURES;
    let log = server.wait_log(|log| log.matches("login refused").count() >= refusals);
    assert_eq!(log.matches(block_line).count(), 1, "{log}");
    assert_eq!(log.matches(": refused: blocked after failed logins").count(), 3, "{log}");
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
        ensure((known - unknown).abs() < 50.0, || format!("known {known:.0} us, unknown {unknown:.0} us"))
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
    let (time, (_, status)) = timed(|| log_in(&server, guesser, b"alice", b"secret"));
    assert!(status == 0 && time >= seconds(1), "the first guesser: {status} {time:?}");
}
