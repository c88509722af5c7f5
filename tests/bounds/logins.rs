//! What guessing passwords costs the one who guesses, and nobody else.

use std::io::Write as _;
use std::net::TcpStream;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{Server, echo_server, read_exact, read_reply, request};
use crate::kit::login::{
    connect_from_ip, log_in, login_message, select_password, send_login, users_file, users_file_with_cost,
};
use crate::kit::{CONNECT, StreamEnd, ping, resident_kib, stream_end, timed};
use crate::{best_of_three, ensure, machine};

/// How many failures within a minute are free.
const FREE: usize = 5;
/// How many are answered late behind these; then nobody answers.
const DELAYED: usize = 6;
/// What an answer that is not held back may take: less than the shortest time for which one is.
const AT_ONCE: Duration = Duration::from_millis(900);

fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn wait_up_to(stream: &TcpStream, n: u64) {
    stream.set_read_timeout(Some(seconds(n))).expect("a timeout can be set");
}

#[test]
fn answers_take_twice_as_long_each_time_and_nobody_else_waits() {
    let (_folder, users) = users_file(&[("alice", "secret")]);
    // The delays are longer than what a handshake may take.
    let server = Server::start(&["--users", &users, "--handshake-timeout", "500ms"]);
    let guess = |passwd: &[u8]| timed(|| log_in(&server, [127, 5, 0, 1], b"alice", passwd));
    for n in 0..FREE {
        let (time, (_, status)) = guess(b"wrong");
        assert!(status != 0 && time < AT_ONCE, "{n}: {time:?}");
    }
    for delay in [1, 2] {
        let (time, (mut stream, status)) = guess(b"wrong");
        assert!(time >= seconds(delay) && time < seconds(delay) + AT_ONCE, "{delay} s: {time:?}");
        assert_ne!(status, 0);
        assert_eq!(stream_end(&mut stream), StreamEnd::Closed(vec![]));
    }
    thread::scope(|scope| {
        // The right password too, or an answer that comes at once would tell it.
        let right = scope.spawn(|| guess(b"secret"));
        for n in 1..=3 {
            let (time, (_, status)) = timed(|| log_in(&server, [127, 5, 1, n], b"alice", b"secret"));
            assert!(status == 0 && time < AT_ONCE, "somebody else: {time:?}");
        }
        let (time, (mut stream, status)) = right.join().expect("a login");
        assert!(status == 0 && time >= seconds(4) && time < seconds(4) + AT_ONCE, "{status} {time:?}");
        // What was left of the time for the handshake is left.
        stream.write_all(&request(CONNECT, echo_server())).expect("the request is sent");
        assert_eq!(read_reply(&mut stream).0, 0);
        ping(&mut stream, b"hello");
        // The time that was not the client's is not given to it.
        let (mut idler, status) = guess(b"secret").1;
        assert_eq!(status, 0);
        let (time, end) = timed(|| stream_end(&mut idler));
        assert!(end == StreamEnd::Closed(vec![]) && time < AT_ONCE, "{end:?} after {time:?}");
    });
    assert!(!server.log().contains("too many failed logins"), "{}", server.log());
}

#[test]
fn a_door_is_shut_behind_the_last_delayed_failure() {
    const UNDER_WAY: u8 = 12;
    let guesser = [127, 6, 0, 1];
    // Dear enough for a hash to be seen.
    let (_folder, users) = users_file_with_cost(9, &[("alice", "secret")]);
    let server = Server::start(&["--users", &users, "--handshake-timeout", "40", "-v"]);
    let greeted = || {
        let mut stream = connect_from_ip(&server, guesser);
        select_password(&mut stream);
        wait_up_to(&stream, 40);
        stream
    };
    let mut under_way: Vec<TcpStream> = (0..UNDER_WAY).map(|_| greeted()).collect();
    let mut guesses: Vec<TcpStream> = (0..FREE + DELAYED).map(|_| greeted()).collect();
    let cpu = server.cpu_seconds();
    for (guess, n) in guesses.iter_mut().zip(0..) {
        assert!(!server.log().contains("too many"), "shut before attempt {n}");
        guess.write_all(&login_message(b"alice", &[b'x', n])).expect("it is sent");
    }
    let said = "too many failed logins from 127.6.0.1: closing its connections for 600 s";
    server.wait_log(|log| log.contains(said));
    let hashes = server.cpu_seconds() - cpu;
    let cpu = server.cpu_seconds();
    for (stream, n) in under_way.iter_mut().zip(0..) {
        // Right ones among them: none is even looked at.
        let passwd: &[u8] = if n % 4 == 0 { b"secret" } else { &[b'y', n] };
        stream.write_all(&login_message(b"alice", passwd)).expect("it is sent");
    }
    for _ in 0..3 {
        let (time, end) = timed(|| stream_end(&mut connect_from_ip(&server, guesser)));
        assert!(end == StreamEnd::Closed(vec![]) && time < AT_ONCE, "{end:?} after {time:?}");
    }
    let (mut other, status) = log_in(&server, [127, 6, 0, 2], b"alice", b"secret");
    assert_eq!(status, 0, "somebody else");
    other.write_all(&request(CONNECT, echo_server())).expect("the request is sent");
    assert_eq!(read_reply(&mut other).0, 0);
    for mut guess in guesses {
        assert_eq!(read_exact(&mut guess, 2), [1, 1], "each guess is answered");
    }
    for (mut stream, n) in under_way.into_iter().zip(0..) {
        assert_eq!(read_exact(&mut stream, 2), [1, 1], "the one under way, {n}");
        assert_eq!(stream_end(&mut stream), StreamEnd::Closed(vec![]));
    }
    // One hash, that of the somebody else, is less than the eleven before.
    let later = server.cpu_seconds() - cpu;
    assert!(later < hashes / 2.0, "{hashes} s before and {later} s after the door was shut");
    let refusals = usize::from(UNDER_WAY) + FREE + DELAYED;
    let log = server.wait_log(|log| log.matches("login refused").count() >= refusals);
    assert_eq!(log.matches(said).count(), 1, "{log}");
    assert_eq!(log.matches(": blocked, connection closed").count(), 3, "{log}");
}

/// The time between a wrong password and the answer to it.
fn refusal(server: &Server, source: [u8; 4], uname: &[u8]) -> Duration {
    let mut stream = connect_from_ip(server, source);
    stream.set_nodelay(true).expect("an option");
    select_password(&mut stream);
    let (time, status) = timed(|| send_login(&mut stream, uname, b"wrong"));
    assert_ne!(status, 0);
    time
}

#[test]
fn the_time_of_a_refusal_does_not_tell_who_is_a_user() {
    const EACH: usize = 1000;
    let _machine = machine();
    let names = ["alice", "bob", "carol", "dave", "erin"];
    let (_folder, users) = users_file(&names.map(|name| (name, "secret")));
    let server = Server::start(&["--users", &users]);
    let last = AtomicU32::new(0x7F10_0000);
    let source = || (last.fetch_add(1, Ordering::Relaxed) + 1).to_be_bytes();
    best_of_three(|| {
        let mut times = [Vec::new(), Vec::new()];
        for n in 0..EACH {
            let known = names[n % names.len()];
            let unknown = format!("{}{}", ["alicia", "b", "mallory", "", "Dave"][n % 5], n);
            times[0].push(refusal(&server, source(), known.as_bytes()));
            times[1].push(refusal(&server, source(), unknown.as_bytes()));
        }
        let [known, unknown] = times.map(|mut times| {
            times.sort_unstable();
            times[EACH / 2].as_secs_f64() * 1e6
        });
        eprintln!("medians of refusals: known {known:.0} us, unknown {unknown:.0} us");
        ensure((known - unknown).abs() < 50.0, || format!("known {known:.0} us, unknown {unknown:.0} us"))
    });
}

#[test]
fn a_flood_of_guesses_from_everywhere_takes_no_memory_and_covers_for_nobody() {
    const SOURCES: usize = 20_000;
    const AT_ONCE: usize = 16;
    let _machine = machine();
    let (_folder, users) = users_file(&[("alice", "secret"), ("bob", "other")]);
    let server = Server::start(&["--users", &users]);
    let offender = [127, 7, 7, 7];
    for _ in 0..FREE {
        assert_ne!(log_in(&server, offender, b"alice", b"wrong").1, 0);
    }
    let (next, started) = (AtomicUsize::new(0), Instant::now());
    let sizes = thread::scope(|scope| {
        let guessing: Vec<_> = (0..AT_ONCE)
            .map(|_| {
                scope.spawn(|| {
                    let mut sizes = Vec::new();
                    loop {
                        let n = next.fetch_add(1, Ordering::Relaxed);
                        if n >= SOURCES {
                            return sizes;
                        }
                        let source = u32::try_from(0x7F20_0001 + n).expect("an address").to_be_bytes();
                        assert_ne!(log_in(&server, source, format!("user{n}").as_bytes(), b"wrong").1, 0);
                        if n % 100 == 0 {
                            sizes.push((n, resident_kib(&server)));
                        }
                    }
                })
            })
            .collect();
        guessing.into_iter().flat_map(|guesses| guesses.join().expect("guesses")).collect::<Vec<_>>()
    });
    let most = |quarter: usize| {
        let within = |n: usize| n * 4 / SOURCES == quarter;
        sizes.iter().filter(|(n, _)| within(*n)).map(|(_, size)| *size).max().expect("sizes")
    };
    eprintln!(
        "{SOURCES} guesses in {:?}: {} KiB in the first quarter, {} in the last",
        started.elapsed(),
        most(0),
        most(3)
    );
    assert!(most(3) <= most(0) + 512, "{} KiB in the first quarter, {} in the last", most(0), most(3));
    let (time, (_, status)) = timed(|| log_in(&server, offender, b"alice", b"secret"));
    assert!(status == 0 && time >= seconds(1), "the offender of before: {status} {time:?}");
}
