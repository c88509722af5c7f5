//! Clients that stop during the handshake: each uses one descriptor and little memory until the timeout.

use crate::lookups::threads;
use crate::*;

const CLIENTS: usize = 2000;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(8);
/// Upper limit for memory per client, in bytes. It also holds for debug builds, whose futures are larger. Only a client
/// with a login comes near it: all of them waited for a hash at the same time.
const MAX_BYTES_PER_CLIENT: usize = 5632;

/// The stages: name, bytes that the client sends, and the server's answer.
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

/// Returns the private memory that the server has written to, in bytes, once the threads that hash passwords have
/// ended: their memory is not that of the clients.
fn dirty_bytes(server: &Server) -> usize {
    wait_until("the hashes are done", TIMEOUT, || !threads(server).0.iter().any(|name| name == "s5-hash"));
    proc_kib(server, "smaps_rollup", "Private_Dirty") * 1024
}

/// The clients that stopped at one stage, and their server.
struct StalledClients {
    stage: &'static str,
    server: Server,
    streams: Vec<TcpStream>,
    /// Descriptors of the server before the clients connected.
    descriptors: usize,
    started: Instant,
    bytes_per_client: usize,
}

fn open(server: &Server, count: usize, message: &[u8], answer: &[u8]) -> Vec<TcpStream> {
    let connect = |n: usize| {
        let [.., high, low] = n.to_be_bytes();
        let mut stream = connect_from_ip(server, [127, 8, high, low]);
        stream.write_all(message).expect("data sent");
        stream
    };
    let mut streams: Vec<TcpStream> = (0..count).map(connect).collect();
    for stream in &mut streams {
        assert_eq!(read_exact(stream, answer.len()), answer);
    }
    streams
}

/// Connects the clients. Fails unless each of them uses one descriptor.
fn stall(server: Server, (stage, message, answer): (&'static str, Vec<u8>, Vec<u8>)) -> StalledClients {
    const WARM_UP: usize = 20;
    // Excludes the first hash of alice's password and the first allocations of both threads from the measurement.
    drop(open(&server, WARM_UP, &message, &answer));
    server.wait_log(|log| session_lines(log).len() == WARM_UP);
    let mut descriptors = 0;
    wait_until("the number of descriptors is stable", TIMEOUT, || {
        let now = server.descriptors();
        std::mem::replace(&mut descriptors, now) == now
    });
    let (memory, started) = (dirty_bytes(&server), Instant::now());
    let streams = open(&server, CLIENTS, &message, &answer);
    wait_until("each client uses one descriptor", HANDSHAKE_TIMEOUT, || server.descriptors() == descriptors + CLIENTS);
    let bytes_per_client = (dirty_bytes(&server) - memory) / CLIENTS;
    assert_eq!(server.descriptors(), descriptors + CLIENTS, "{stage}");
    StalledClients { stage, server, streams, descriptors, started, bytes_per_client }
}

impl StalledClients {
    fn assert_closed_at_the_timeout(self) {
        let Self { stage, server, mut streams, descriptors, started, .. } = self;
        for stream in &mut streams {
            assert_eq!(stream_end(stream), StreamEnd::Closed(vec![]), "{stage}");
            assert!(started.elapsed() >= HANDSHAKE_TIMEOUT, "{stage}: closed after {:?}", started.elapsed());
        }
        assert!(started.elapsed() < HANDSHAKE_TIMEOUT + TIMEOUT, "{stage}: {:?}", started.elapsed());
        drop(streams);
        wait_until("all connections are closed", TIMEOUT, || server.descriptors() == descriptors);
        let log = server.wait_log(|log| log.matches("handshake timed out").count() >= CLIENTS);
        assert_eq!(log.matches("handshake timed out").count(), CLIENTS, "{stage}");
    }
}

#[test]
fn slow_handshake_uses_one_descriptor_and_little_memory_until_the_timeout_and_delays_no_other_client() {
    if !raise_fd_limit(15_000) {
        return skip("too few descriptors");
    }
    let (machine, target) = (lock_machine(), echo_server());
    let (_dir, users) = users_file(&[("alice", "secret")]);
    let timeout = format!("{}s", HANDSHAKE_TIMEOUT.as_secs());
    let args = ["--users", &users, "--handshake-timeout", &timeout];
    thread::scope(|scope| {
        // All stages at the same time, each with another server.
        let stalling = stages().map(|stage| scope.spawn(move || stall(Server::start(&args), stage)));
        let stalled = stalling.map(|thread| thread.join().expect("the thread does not panic"));
        for clients in &stalled {
            let open = || assert_eq!(open_with_login(&clients.server, ("alice", "secret"), CONNECT, target).1, 0);
            let fastest = fastest(open);
            assert!(fastest < Duration::from_millis(100), "{}: another client waits {fastest:?}", clients.stage);
        }
        // The measurement is over. Waiting does not disturb other tests.
        drop(machine);
        for clients in stalled {
            let (stage, bytes) = (clients.stage, clients.bytes_per_client);
            eprintln!("{stage}: {bytes} bytes per client");
            assert!(bytes < MAX_BYTES_PER_CLIENT, "{stage}: {bytes} bytes per client");
            scope.spawn(|| clients.assert_closed_at_the_timeout());
        }
    });
}
