//! Tunnels: relaying of data, resets, memory, and the idle timeout. tests/wire has half-closes.

use crate::relay::keep_busy;
use crate::*;

/// Returns a server with one tunnel: the client's connection and the target's.
fn serve_tunnel(args: &[&str]) -> (Server, TcpStream, TcpStream) {
    let server = Server::start(args);
    let (client, target) = tunnel(&server);
    (server, client, target)
}

#[test]
fn tunnel_forwards_resets_in_both_directions() {
    let server = Server::start(&[]);
    let before = idle_descriptors(&server);
    let (client, mut target) = tunnel(&server);
    reset(client);
    assert_eq!(stream_end(&mut target), StreamEnd::Reset);
    let (mut client, target) = tunnel_at(&server, V6);
    reset(target);
    assert_eq!(stream_end(&mut client), StreamEnd::Reset);
    wait_until("all descriptors are closed", TIMEOUT, || server.descriptors() == before);
}

#[test]
fn tunnel_forwards_a_reset_after_a_half_close() {
    let (_server, client, mut target) = serve_tunnel(&[]);
    client.shutdown(Shutdown::Write).expect("half-closed");
    assert_eq!(stream_end(&mut target), StreamEnd::Closed(vec![]));
    reset(client);
    // A target that has read the end of the stream sees the reset when it writes.
    wait_until("the target is reset", TIMEOUT, || target.write_all(b"x").is_err());
}

#[test]
fn tunnel_ends_at_a_reset_after_a_half_close_while_the_other_side_is_idle() {
    for client_resets in [true, false] {
        let (server, client, target) = serve_tunnel(&[]);
        let (first, mut other) = if client_resets { (client, target) } else { (target, client) };
        first.shutdown(Shutdown::Write).expect("half-closed");
        assert_eq!(stream_end(&mut other), StreamEnd::Closed(vec![]));
        let open = server.descriptors();
        reset(first);
        wait_until("the reset is detected", TIMEOUT, || server.descriptors() < open);
        // The server gives a client time to read its data, unless it disconnects.
        drop(other);
        let log = server.wait_log(|log| !session_lines(log).is_empty());
        assert!(log.contains("connection reset"), "{log}");
    }
}

#[test]
fn tunnel_delivers_the_targets_data_while_the_client_keeps_sending() {
    const TOTAL: usize = 1 << 20;
    let (_server, mut client, mut target) = serve_tunnel(&[]);
    let mut sender = client.try_clone().expect("cloned");
    thread::spawn(move || while sender.write_all(&[0; 1024]).is_ok() {});
    // The server closes with unread data, which sends a reset. Data that was acknowledged before must not be lost.
    send_pattern(&mut target, TOTAL, |_| {});
    target.shutdown(Shutdown::Write).expect("half-closed");
    check_pattern(&mut client, TOTAL);
}

#[test]
fn tunnel_ends_at_a_client_reset_while_the_target_reads_nothing() {
    let (server, mut client, target) = serve_tunnel(&[]);
    client.set_nonblocking(true).expect("option set");
    let mut last = Instant::now();
    wait_until("the client's socket buffer is full", TIMEOUT, || {
        while client.write(&[0; 65_536]).is_ok() {
            last = Instant::now();
        }
        last.elapsed() > Duration::from_millis(250)
    });
    reset(client);
    let log = server.wait_log(|log| !session_lines(log).is_empty());
    assert!(log.contains("error=\"read from the client: connection reset\""), "{log}");
    drop(target);
}

#[test]
fn tunnel_delivers_all_data_to_a_slow_uploading_client_after_the_target_closes() {
    check_slow_client(false);
}

#[test]
fn tunnel_delivers_all_data_to_a_slow_half_closed_client_after_the_target_closes() {
    check_slow_client(true);
}

fn check_slow_client(is_half_closed: bool) {
    const TOTAL: usize = 512 << 10;
    let (_server, mut client, mut target) = serve_tunnel(&[]);
    // With a small buffer, the tunnel still holds data when the target closes.
    socket2::SockRef::from(&client).set_recv_buffer_size(65_536).expect("option set");
    // Like an HTTP server that answers 413: it sends a response, half-closes, and closes without reading the upload.
    client.write_all(&[0; 4096]).expect("data sent");
    send_pattern(&mut target, TOTAL, |_| {});
    target.shutdown(Shutdown::Write).expect("half-closed");
    wait_until("the data of the target is acknowledged", TIMEOUT, || state_of(&target) == Some("05".into()));
    drop(target);
    // The first upload is answered with a reset, and the next one fails. The client notices neither before it has read
    // all data.
    if is_half_closed {
        client.shutdown(Shutdown::Write).expect("half-closed");
    }
    for _ in 0..20 {
        if !is_half_closed {
            client.write_all(&[0; 1024]).expect("data sent");
        }
        thread::sleep(Duration::from_millis(5));
    }
    check_pattern(&mut client, TOTAL);
}

#[test]
fn tunnel_delivers_all_data_to_a_slow_client_before_it_forwards_the_reset_of_a_target_that_has_ended() {
    const TOTAL: usize = 512 << 10;
    let (server, mut client, mut target) = serve_tunnel(&[]);
    socket2::SockRef::from(&client).set_recv_buffer_size(65_536).expect("option set");
    send_pattern(&mut target, TOTAL, |_| {});
    target.shutdown(Shutdown::Write).expect("half-closed");
    wait_until("the data of the target is acknowledged", TIMEOUT, || state_of(&target) == Some("05".into()));
    reset(target);
    let log = server.wait_log(|log| !session_lines(log).is_empty());
    assert!(log.contains("error=\"dst is gone after the end of its stream: connection reset\""), "{log}");
    check_pattern(&mut client, TOTAL);
    // The client has received all data; now its connection is closed in both directions.
    wait_until("the client is reset", TIMEOUT, || client.take_error().is_ok_and(|error| error.is_some()));
}

#[test]
fn tunnel_resets_an_upload_that_the_target_does_not_read() {
    let (server, mut client, mut target) = serve_tunnel(&[]);
    target.write_all(b"bye").expect("data sent");
    drop(target);
    client.set_write_timeout(Some(TIMEOUT)).expect("timeout set");
    let mut sent = 0_usize;
    while sent < 256 << 20 && client.write_all(&[0; 65_536]).is_ok() {
        sent += 65_536;
    }
    assert!(sent < 256 << 20, "{sent} bytes were discarded silently");
    let log = server.wait_log(|log| !session_lines(log).is_empty());
    assert!(log.contains("error=\"write to dst"), "{log}");
}

/// Returns the state of a connection in /proc/net/tcp: 05 is FIN_WAIT2, after the peer has acknowledged the FIN.
fn state_of(stream: &TcpStream) -> Option<String> {
    let hex = |addr: SocketAddr| match addr.ip() {
        std::net::IpAddr::V4(ip) => format!("{:08X}:{:04X}", u32::from_ne_bytes(ip.octets()), addr.port()),
        std::net::IpAddr::V6(_) => panic!("not in /proc/net/tcp"),
    };
    let [local, peer] = [stream.local_addr(), stream.peer_addr()].map(|addr| hex(addr.expect("socket address")));
    let table = std::fs::read_to_string("/proc/net/tcp").expect("file read");
    let fields = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let is_stream = |fields: &Vec<&str>| fields.len() > 3 && fields[1] == local && fields[2] == peer;
    fields.into_iter().find(is_stream).map(|fields| fields[3].to_owned())
}

#[test]
fn tunnel_to_a_stalled_reader_loses_no_data_and_uses_little_memory() {
    const TOTAL: usize = 128 << 20;
    let server = Server::start(&[]);
    for client_stalls in [true, false] {
        let (client, target) = tunnel(&server);
        let (mut reader, mut sender) = if client_stalls { (client, target) } else { (target, client) };
        let before = resident_kib(&server);
        let sent = Arc::new(AtomicUsize::new(0));
        let count = sent.clone();
        let sending = thread::spawn(move || {
            send_pattern(&mut sender, TOTAL, |n| {
                count.fetch_add(n, Ordering::Relaxed);
            });
        });
        let mut last = (0, Instant::now());
        wait_until("the sender's socket buffer is full", TIMEOUT, || {
            let now = sent.load(Ordering::Relaxed);
            if now != last.0 {
                last = (now, Instant::now());
            }
            now > 0 && last.1.elapsed() > Duration::from_millis(250)
        });
        assert!(last.0 < TOTAL, "the sender was never stopped");
        // Buffers of 64 KiB in two directions, and overhead of the allocator.
        let grown = resident_kib(&server).saturating_sub(before);
        assert!(grown < 2048, "{grown} KiB");
        check_pattern(&mut reader, TOTAL);
        sending.join().expect("the thread does not panic");
    }
}

#[test]
fn tunnel_is_reset_at_the_idle_timeout_only_without_traffic() {
    let has_passed = (0..3).any(|_| {
        let server = Server::start(&["--idle-timeout", "1s"]);
        let (mut client, mut target) = tunnel(&server);
        let (mut busy, mut is_open) = (connect_to(&server, echo_server()), true);
        let stayed_busy = keep_busy(Duration::from_secs(1), || {
            is_open &= busy.write_all(b"x").and_then(|()| busy.read_exact(&mut [0])).is_ok();
        });
        assert!(is_open || !stayed_busy, "the busy tunnel has ended");
        assert_eq!(stream_end(&mut client), StreamEnd::Reset);
        assert_eq!(stream_end(&mut target), StreamEnd::Reset);
        assert!(server.wait_log(|log| !session_lines(log).is_empty()).contains("error=\"idle timeout\""));
        stayed_busy
    });
    assert!(has_passed, "the machine was too slow each time");
}

#[test]
fn tunnel_sockets_have_nodelay_and_keepalive() {
    if !is_installed("strace") {
        return;
    }
    let dir = temp_dir();
    let trace = dir.path().join("trace");
    // With -D strace is a grandchild, so that killing the child kills the server.
    let mut command = std::process::Command::new("strace");
    command.args(["-D", "-f", "-qq", "-e", "trace=setsockopt", "-o"]).arg(&trace);
    command.arg(s5().get_program()).args(["serve", "--listen", "127.0.0.1:0"]);
    let server = Server::start_with(&mut command, 1);
    let (client, _target) = tunnel(&server);
    // A half-closed tunnel is checked after a second, and the target gets keepalive at the first check.
    client.shutdown(Shutdown::Write).expect("half-closed");
    let sockets_with = |option: &str| {
        let trace = std::fs::read_to_string(&trace).expect("file read");
        let lines = trace.lines().filter(|line| line.contains(&format!("{option}, [1]")));
        let sockets: Vec<String> =
            lines.filter_map(|line| Some(line.split_once('(')?.1.split_once(',')?.0.into())).collect();
        sockets
    };
    wait_until("both options are traced", TIMEOUT, || {
        sockets_with("TCP_NODELAY").len() >= 2 && sockets_with("SO_KEEPALIVE").len() >= 2
    });
    let (nodelay, keepalive) = (sockets_with("TCP_NODELAY"), sockets_with("SO_KEEPALIVE"));
    assert_ne!(nodelay[0], nodelay[1]);
    assert_eq!(nodelay, keepalive);
}

#[test]
fn tunnel_leaves_no_descriptors_open_at_each_kind_of_end() {
    let server = Server::start(&[]);
    let before = idle_descriptors(&server);
    let dst: SocketAddr = tcp_server(V4, |mut stream| {
        let mut byte = [0];
        let _ = stream.read_exact(&mut byte);
        match byte[0] {
            0 => reset(stream),
            1 => drop(stream),
            _ => while retry(|| stream.read(&mut [0; 64])).is_ok_and(|n| n > 0) {},
        }
    });
    for round in 0..60 {
        let mut stream = connect_to(&server, dst);
        stream.write_all(&[round % 4]).expect("data sent");
        match round % 4 {
            2 => reset(stream),
            _ => drop(stream),
        }
    }
    wait_until("all descriptors are closed", TIMEOUT, || server.descriptors() == before);
    server.wait_log(|log| ended_sessions(log) == 60);
}
