//! What those cost who begin a handshake and do not go on: a descriptor, little memory, and that until the deadline.

use std::io::Write as _;
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{Server, TIMEOUT, read_exact, skip, wait_until};
use crate::kit::login::{connect_from_ip, login_message, users_file};
use crate::kit::{StreamEnd, raise_fd_limit, session_lines, stream_end};
use crate::machine;

const SLOW: usize = 2000;
const DEADLINE: Duration = Duration::from_secs(8);
/// What one may cost in octets; also in a debug build, whose futures are larger.
const MOST: usize = 4096;

/// What is said, and what comes until the server waits for more.
fn stages() -> [(&'static str, Vec<u8>, Vec<u8>); 5] {
    let login = login_message(&[b'n'; 255], &[b'p'; 255]);
    [
        ("half a greeting", [&[5, 255], &[1; 100][..]].concat(), vec![]),
        ("a greeting", vec![5, 1, 2], vec![5, 2]),
        ("half a login", [&[5, 1, 2], &login[..300]].concat(), vec![5, 2]),
        ("a login and no request", [vec![5, 1, 2], login_message(b"alice", b"secret")].concat(), vec![5, 2, 1, 0]),
        (
            "half a request",
            [vec![5, 1, 2], login_message(b"alice", b"secret"), vec![5, 1, 0, 3, 255], vec![b'x'; 200]].concat(),
            vec![5, 2, 1, 0],
        ),
    ]
}

/// Private memory that has been written to, in octets.
fn dirty(server: &Server) -> usize {
    let path = format!("/proc/{}/smaps_rollup", server.pid());
    let text = std::fs::read_to_string(path).expect("the server runs");
    let line = text.lines().find_map(|line| line.strip_prefix("Private_Dirty:")).expect("a line");
    line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") * 1024
}

/// 2000 of a stage that come no further, and their server.
struct Crowd {
    stage: &'static str,
    server: Server,
    streams: Vec<TcpStream>,
    /// How many descriptors the server had before.
    descriptors: usize,
    began: Instant,
    /// What each costs in memory, in octets.
    cost: usize,
}

fn open(server: &Server, count: usize, said: &[u8], answer: &[u8]) -> Vec<TcpStream> {
    let come = |n: usize| {
        let [.., high, low] = n.to_be_bytes();
        let mut stream = connect_from_ip(server, [127, 8, high, low]);
        stream.write_all(said).expect("it is sent");
        stream
    };
    let mut streams: Vec<TcpStream> = (0..count).map(come).collect();
    for stream in &mut streams {
        assert_eq!(read_exact(stream, answer.len()), answer);
    }
    streams
}

/// Fails when it is not one descriptor each.
fn crowd(server: Server, (stage, said, answer): (&'static str, Vec<u8>, Vec<u8>)) -> Crowd {
    const FIRST: usize = 20;
    // What is set up once is no one's cost: the password of alice is hashed, and both threads have worked.
    drop(open(&server, FIRST, &said, &answer));
    server.wait_log(|log| session_lines(log).len() == FIRST);
    let mut descriptors = 0;
    wait_until("they have gone", TIMEOUT, || {
        let now = server.descriptors();
        std::mem::replace(&mut descriptors, now) == now
    });
    let (memory, began) = (dirty(&server), Instant::now());
    let streams = open(&server, SLOW, &said, &answer);
    wait_until("one descriptor each", DEADLINE, || server.descriptors() == descriptors + SLOW);
    let cost = (dirty(&server) - memory) / SLOW;
    assert_eq!(server.descriptors(), descriptors + SLOW, "{stage}");
    Crowd { stage, server, streams, descriptors, began, cost }
}

impl Crowd {
    fn ends_at_the_deadline(self) {
        let Self { stage, server, mut streams, descriptors, began, .. } = self;
        for stream in &mut streams {
            assert_eq!(stream_end(stream), StreamEnd::Closed(vec![]), "{stage}");
            assert!(began.elapsed() >= DEADLINE, "{stage}: closed after {:?}", began.elapsed());
        }
        assert!(began.elapsed() < DEADLINE + TIMEOUT, "{stage}: {:?}", began.elapsed());
        drop(streams);
        wait_until("all are gone", TIMEOUT, || server.descriptors() == descriptors);
        let log = server.wait_log(|log| log.matches("handshake timed out").count() >= SLOW);
        assert_eq!(log.matches("handshake timed out").count(), SLOW, "{stage}");
    }
}

#[test]
fn a_slow_handshake_costs_a_descriptor_and_little_memory_and_ends_at_the_deadline() {
    if !raise_fd_limit(15_000) {
        return skip("too few descriptors");
    }
    let machine = machine();
    let (_folder, users) = users_file(&[("alice", "secret")]);
    let timeout = format!("{}s", DEADLINE.as_secs());
    let args = ["--users", &users, "--handshake-timeout", &timeout];
    thread::scope(|scope| {
        // All stages at once, each with a server of its own.
        let opening = stages().map(|stage| scope.spawn(move || crowd(Server::start(&args), stage)));
        let crowds = opening.map(|crowd| crowd.join().expect("a crowd"));
        // From now on it is waited for, which disturbs nobody.
        drop(machine);
        for crowd in crowds {
            eprintln!("{}: {} octets", crowd.stage, crowd.cost);
            assert!(crowd.cost < MOST, "{}: {} octets", crowd.stage, crowd.cost);
            scope.spawn(|| crowd.ends_at_the_deadline());
        }
    });
}
