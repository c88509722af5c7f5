//! Bulk tunnels: they are spliced through a pipe and distributed over the threads. Their data arrives unchanged even if
//! splice(2) or pipe2(2) fails.

use crate::*;

/// Bytes of a bulk transfer: more than all buffers and pipes of a tunnel hold.
const BULK: usize = 48 << 20;

/// Returns the number of pipe ends that the server has open. Some are inherited, such as stderr.
fn open_pipes(server: &Server) -> usize {
    let fds = fs::read_dir(format!("/proc/{}/fd", server.pid())).expect("the server runs");
    let links = fds.flatten().filter_map(|fd| fs::read_link(fd.path()).ok());
    links.filter(|link| link.to_string_lossy().starts_with("pipe:")).count()
}

/// Starts a bulk transfer. Its receiver stops reading when the server uses a pipe, so that the pipe fills up. Returns
/// the thread of the sender, which ends after a half-close, the receiver, and the data received so far.
fn start_stalled_transfer(
    server: &Server,
    inherited: usize,
    is_upload: bool,
) -> (thread::JoinHandle<TcpStream>, TcpStream, Vec<u8>) {
    wait_until("no other tunnel has a pipe", TIMEOUT, || open_pipes(server) == inherited);
    let (client, target) = tunnel(server);
    let (mut writer, mut reader) = if is_upload { (client, target) } else { (target, client) };
    let sending = thread::spawn(move || {
        send_pattern(&mut writer, BULK, |_| {});
        writer.shutdown(Shutdown::Write).expect("half-closed");
        writer
    });
    let (mut read, mut piece) = (Vec::new(), vec![0; 1 << 20]);
    wait_until("a pipe is open", TIMEOUT, || {
        if open_pipes(server) == inherited {
            let n = retry(|| reader.read(&mut piece)).expect("data received");
            read.extend_from_slice(&piece[..n]);
        }
        open_pipes(server) > inherited
    });
    (sending, reader, read)
}

#[test]
fn bulk_tunnel_uses_a_pipe_and_releases_it_when_idle() {
    for threads in ["1", "2"] {
        let server = Server::start(&["--threads", threads]);
        let before = open_pipes(&server);
        let (client, target) = tunnel(&server);
        for (mut from, mut to) in [(&client, &target), (&target, &client)] {
            let mut max_pipes = 0;
            let mut bytes = vec![0; 1 << 20];
            let mut writer = from.try_clone().expect("cloned");
            let sending = thread::spawn(move || send_pattern(&mut writer, BULK, |_| {}));
            let mut total = 0;
            while total < BULK {
                total += retry(|| to.read(&mut bytes)).expect("data received");
                max_pipes = max_pipes.max(open_pipes(&server));
            }
            sending.join().expect("the thread does not panic");
            assert!(max_pipes >= before + 2, "at most {max_pipes} pipe ends, {before} before");
            wait_until("the pipe is closed", TIMEOUT, || open_pipes(&server) == before);
            // The tunnel continues without a pipe.
            from.write_all(b"x").expect("data sent");
            to.read_exact(&mut [0]).expect("all bytes received");
        }
    }
}

#[test]
fn bulk_data_in_a_pipe_waits_for_a_stalled_reader() {
    let server = Server::start(&[]);
    let inherited = open_pipes(&server);
    for is_upload in [true, false] {
        let (sending, mut reader, read) = start_stalled_transfer(&server, inherited, is_upload);
        // An empty pipe would be closed after 2 s. This one holds data.
        thread::sleep(Duration::from_millis(2200));
        assert!(open_pipes(&server) > inherited, "the pipe is still open");
        check_pattern(&mut (&read[..]).chain(&mut reader), BULK);
        // The other direction is still open.
        let mut writer = sending.join().expect("the thread does not panic");
        reader.write_all(b"answer").expect("data sent");
        drop(reader);
        assert_eq!(stream_end(&mut writer), StreamEnd::Closed(b"answer".to_vec()));
    }
}

#[test]
fn bulk_tunnel_forwards_a_reset_with_data_in_its_pipe() {
    let server = Server::start(&[]);
    let (before, inherited) = (idle_descriptors(&server), open_pipes(&server));
    for is_upload in [true, false] {
        // The receiver stops reading and resets. The sender must receive the reset.
        let (client, target) = tunnel(&server);
        let (mut writer, reader) = if is_upload { (client, target) } else { (target, client) };
        let sending = thread::spawn(move || {
            let bytes = vec![0; 1 << 16];
            loop {
                if let Err(error) = writer.write_all(&bytes) {
                    return error.kind();
                }
            }
        });
        let mut bytes = vec![0; 1 << 20];
        wait_until("a pipe is open", TIMEOUT, || {
            let _ = retry(|| (&reader).read(&mut bytes)).expect("data received");
            open_pipes(&server) > inherited
        });
        reset(reader);
        let error = sending.join().expect("the thread does not panic");
        assert!(matches!(error, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{error}");
        wait_until("all descriptors are closed", TIMEOUT, || server.descriptors() == before);
    }
}

/// Starts a server under strace with an injected fault. Returns `None` without strace.
fn start_with_fault(inject: &str) -> Option<Server> {
    if !is_installed("strace") {
        return None;
    }
    let mut command = Command::new("strace");
    // With -D strace is a grandchild, so that killing the child kills the server.
    command.args(["-D", "-f", "-qq", "-e", "trace=splice,pipe2", "-e", &format!("inject={inject}"), "-o", "/dev/null"]);
    command.arg(s5().get_program()).args(["serve", "--listen", "127.0.0.1:0", "--threads", "1"]);
    Some(Server::start_with(&mut command, 1))
}

#[test]
fn bulk_is_copied_if_splice_fails() {
    let faults = [
        // Each call, starting with the first one, which reads into the pipe.
        "splice:error=EINVAL",
        // The second call, while the pipe holds data for the sink.
        "splice:error=EINVAL:when=2",
        "splice:error=EINVAL:when=17+",
        "splice:error=ENOSYS:when=4",
        // No pipe is available.
        "pipe2:error=EMFILE",
        "pipe2:error=ENFILE:when=1+2",
    ];
    for fault in faults {
        let Some(server) = start_with_fault(fault) else { return };
        let (client, target) = tunnel(&server);
        let directions = [(client.try_clone(), target.try_clone()), (target.try_clone(), client.try_clone())];
        let transfers = directions.map(|(from, to)| {
            let (mut from, mut to) = (from.expect("cloned"), to.expect("cloned"));
            let sending = thread::spawn(move || {
                send_pattern(&mut from, 8 << 20, |_| {});
                from.shutdown(Shutdown::Write).expect("half-closed");
            });
            (sending, thread::spawn(move || check_pattern(&mut to, 8 << 20)))
        });
        for (sending, checking) in transfers {
            sending.join().unwrap_or_else(|_| panic!("sending, with {fault}"));
            checking.join().unwrap_or_else(|_| panic!("checking, with {fault}"));
        }
        let log = server.wait_log(|log| log.contains("command=connect"));
        assert!(log.contains(&format!("up={0} down={0} ", 8 << 20)) && !log.contains("error="), "{fault}: {log}");
    }
}

#[test]
fn bulk_pipes_leave_descriptors_for_new_sessions() {
    if !is_installed("prlimit") {
        return;
    }
    // Too few descriptors for a pipe in each of 20 tunnels.
    let mut command = Command::new("prlimit");
    command.arg("--nofile=128").arg(s5().get_program());
    command.args(["serve", "--listen", "127.0.0.1:0", "--threads", "2"]);
    let server = Server::start_with(&mut command, 1);
    let tunnels: Vec<_> = (0..20).map(|_| tunnel(&server)).collect();
    let transfers: Vec<_> = tunnels
        .into_iter()
        .map(|(mut client, mut target)| {
            let sending = thread::spawn(move || {
                send_pattern(&mut client, 8 << 20, |_| {});
                client
            });
            (
                sending,
                thread::spawn(move || {
                    let mut bytes = vec![0; 8 << 20];
                    target.read_exact(&mut bytes).expect("all bytes received");
                    target
                }),
            )
        })
        .collect();
    let mut late = connect_to(&server, echo_server());
    ping(&mut late, b"accepted");
    let ends: Vec<_> = transfers
        .into_iter()
        .map(|(sending, receiving)| {
            (sending.join().expect("the thread does not panic"), receiving.join().expect("the thread does not panic"))
        })
        .collect();
    assert_eq!(ends.len(), 20);
}

#[test]
fn bulk_tunnel_relays_urgent_bytes_as_normal_data() {
    let server = Server::start(&[]);
    let (client, mut target) = tunnel(&server);
    let sending = thread::spawn(move || {
        let piece = vec![b'.'; 1 << 20];
        for _ in 0..16 {
            (&client).write_all(&piece).expect("data sent");
            SockRef::from(&client).send_out_of_band(b"!").expect("data sent");
        }
        client.shutdown(Shutdown::Write).expect("half-closed");
        client
    });
    SockRef::from(&target).set_out_of_band_inline(true).expect("option set");
    let mut bytes = Vec::new();
    target.read_to_end(&mut bytes).expect("data received");
    assert_eq!(bytes.len(), 16 * ((1 << 20) + 1));
    assert_eq!(bytes.iter().filter(|byte| **byte == b'!').count(), 16);
    drop(sending.join().expect("the thread does not panic"));
}

/// Returns the number of sockets registered with each thread of the server, without listeners and wakers.
fn sockets_by_thread(server: &Server) -> Vec<usize> {
    let fds = fs::read_dir(format!("/proc/{}/fd", server.pid())).expect("the server runs");
    let epolls = fds
        .flatten()
        .filter(|fd| fs::read_link(fd.path()).is_ok_and(|link| link.to_string_lossy().contains("[eventpoll]")));
    let count = |fd: fs::DirEntry| {
        let info = format!("/proc/{}/fdinfo/{}", server.pid(), fd.file_name().to_string_lossy());
        let info = fs::read_to_string(info).unwrap_or_default();
        // Registered as in src/reactor/epoll.rs: readable, writable, urgent, hang-up, edge-triggered.
        info.lines().filter(|line| line.starts_with("tfd:") && line.contains("events: 8000201f")).count()
    };
    let mut counts: Vec<_> = epolls.map(count).collect();
    counts.sort_unstable();
    // The epoll instance of smol, which waits for signals.
    counts.remove(0);
    counts
}

#[test]
fn bulk_tunnels_are_distributed_over_the_threads() {
    let server = Server::start(&["--threads", "2"]);
    let ends: Vec<_> = (0..4).map(|_| tunnel(&server)).collect();
    // Both directions at once, and each byte is compared.
    let transfer = |from: &TcpStream, to: &TcpStream| {
        let (mut from, mut to) = (from.try_clone().expect("cloned"), to.try_clone().expect("cloned"));
        let sending = thread::spawn(move || send_pattern(&mut from, BULK, |_| {}));
        let checking = thread::spawn(move || check_pattern(&mut (&mut to).take(BULK as u64), BULK));
        [sending, checking]
    };
    let transfers: Vec<_> = ends
        .iter()
        .flat_map(|(client, target)| [transfer(client, target), transfer(target, client)])
        .flatten()
        .collect();
    for thread in transfers {
        thread.join().expect("the thread does not panic");
    }
    assert_eq!(sockets_by_thread(&server), [4, 4]);
    for (mut client, mut target) in ends {
        target.write_all(b"last").expect("data sent");
        drop(target);
        assert_eq!(stream_end(&mut client), StreamEnd::Closed(b"last".to_vec()));
    }
    let log = server.wait_log(|log| log.matches("command=connect").count() == 4);
    assert_eq!(log.matches(&format!("up={BULK} down={} ", BULK + 4)).count(), 4, "{log}");
}

#[test]
fn tunnels_are_distributed_over_the_threads() {
    let server = Server::start(&["--threads", "2"]);
    let echo = echo_server();
    let mut streams: Vec<_> = (0..200).map(|_| connect_to(&server, echo)).collect();
    let counts = sockets_by_thread(&server);
    assert_eq!(counts.iter().sum::<usize>(), 400);
    assert!(counts[1] <= 2 * counts[0] + 66, "{counts:?}");
    streams.iter_mut().for_each(|stream| ping(stream, b"ping"));
}

#[test]
fn bulk_tunnel_does_not_delay_other_sessions_of_its_thread() {
    let server = Server::start(&["--threads", "1"]);
    let mut other = connect_to(&server, echo_server());
    let (client, target) = tunnel(&server);
    for (from, to) in [(&client, &target), (&target, &client)] {
        let (mut from, mut to) = (from.try_clone().expect("cloned"), to.try_clone().expect("cloned"));
        thread::spawn(move || while from.write_all(&[0; 1 << 16]).is_ok() {});
        thread::spawn(move || while retry(|| to.read(&mut [0; 1 << 16])).is_ok_and(|n| n > 0) {});
    }
    let echo = echo_server();
    let mut times: Vec<_> = (0..40)
        .map(|_| {
            timed(|| {
                ping(&mut other, b"x");
                let mut new = connect_to(&server, echo);
                ping(&mut new, b"y");
            })
            .0
        })
        .collect();
    times.sort_unstable();
    // Without fair scheduling it would take seconds. The limit allows for a busy machine.
    assert!(times[20] < Duration::from_millis(250), "{:?}", times[20]);
    drop(client.shutdown(Shutdown::Both));
    drop(target.shutdown(Shutdown::Both));
}
