//! Tunnels that prove to be bulk: they are spliced through a pipe while they last, and spread over the threads. What
//! they carry is exact whatever happens to them.

use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::process::Command;
use std::thread;
use std::time::Duration;

use socket2::SockRef;

use crate::common::{Server, TIMEOUT, echo_server, is_installed, open, s5, wait_until};
use crate::kit::{
    CONNECT, StreamEnd, V4, accept, check_pattern, idle_descriptors, listener, ping, reset, send_pattern, stream_end,
    timed,
};

/// More than all buffers on the way, pipes included, hold.
const MUCH: usize = 48 << 20;

fn through(server: &Server) -> (TcpStream, TcpStream) {
    let (target, dst) = listener(V4);
    let (client, rep, _) = open(server, CONNECT, dst);
    assert_eq!(rep, 0);
    (client, accept(&target).0)
}

/// How many pipe ends the server has open; its stderr is one, and there may be others that it was given.
fn pipes(server: &Server) -> usize {
    let fds = fs::read_dir(format!("/proc/{}/fd", server.pid())).expect("the server runs");
    let links = fds.flatten().filter_map(|fd| fs::read_link(fd.path()).ok());
    links.filter(|link| link.to_string_lossy().starts_with("pipe:")).count()
}

/// A tunnel that is bulk in one direction and has come to a stop with a full pipe, since nobody reads on: who sends,
/// until all is sent and the half-close behind it; who should read; and what it has read to let it prove itself.
fn stalled(server: &Server, quiet: usize, up: bool) -> (thread::JoinHandle<TcpStream>, TcpStream, Vec<u8>) {
    wait_until("no other tunnel has a pipe", TIMEOUT, || pipes(server) == quiet);
    let (client, target) = through(server);
    let (mut writer, mut reader) = if up { (client, target) } else { (target, client) };
    let sending = thread::spawn(move || {
        send_pattern(&mut writer, MUCH, |_| {});
        writer.shutdown(Shutdown::Write).expect("half-close");
        writer
    });
    let (mut read, mut piece) = (Vec::new(), vec![0; 1 << 20]);
    wait_until("it is spliced", TIMEOUT, || {
        if pipes(server) == quiet {
            let n = reader.read(&mut piece).expect("it comes");
            read.extend_from_slice(&piece[..n]);
        }
        pipes(server) > quiet
    });
    (sending, reader, read)
}

#[test]
fn bulk_goes_through_a_pipe_which_is_given_back_when_it_is_quiet() {
    for threads in ["1", "2"] {
        let server = Server::start(&["--threads", threads]);
        let before = pipes(&server);
        let (client, target) = through(&server);
        for (mut from, mut to) in [(&client, &target), (&target, &client)] {
            let mut most = 0;
            let mut octets = vec![0; 1 << 20];
            let mut writer = from.try_clone().expect("a descriptor");
            let sending = thread::spawn(move || send_pattern(&mut writer, MUCH, |_| {}));
            let mut total = 0;
            while total < MUCH {
                total += to.read(&mut octets).expect("it comes");
                most = most.max(pipes(&server));
            }
            sending.join().expect("all is sent");
            assert!(most >= before + 2, "{most} pipe ends at the most, {before} before");
            wait_until("the pipe is given back", TIMEOUT, || pipes(&server) == before);
            // And goes on as before.
            from.write_all(b"x").expect("it is sent");
            to.read_exact(&mut [0]).expect("it comes");
        }
    }
}

#[test]
fn what_waits_in_a_pipe_for_a_reader_is_all_there_when_it_reads() {
    let server = Server::start(&[]);
    let quiet = pipes(&server);
    for up in [true, false] {
        let (sending, mut reader, read) = stalled(&server, quiet, up);
        // For longer than an idle pipe is kept, were it taken for one.
        thread::sleep(Duration::from_millis(2200));
        assert!(pipes(&server) > quiet, "the pipe is still there");
        check_pattern(&mut (&read[..]).chain(&mut reader), MUCH);
        // The other way is open still.
        let mut writer = sending.join().expect("all is sent");
        reader.write_all(b"answer").expect("it is sent");
        drop(reader);
        assert_eq!(stream_end(&mut writer), StreamEnd::Closed(b"answer".to_vec()));
    }
}

#[test]
fn a_reset_with_octets_in_a_pipe_is_a_reset() {
    let server = Server::start(&[]);
    let (before, quiet) = (idle_descriptors(&server), pipes(&server));
    for up in [true, false] {
        // Of the one that does not read, which the sender hears of.
        let (client, target) = through(&server);
        let (mut writer, reader) = if up { (client, target) } else { (target, client) };
        let sending = thread::spawn(move || {
            let octets = vec![0; 1 << 16];
            loop {
                if let Err(error) = writer.write_all(&octets) {
                    return error.kind();
                }
            }
        });
        let mut octets = vec![0; 1 << 20];
        wait_until("it is spliced", TIMEOUT, || {
            let _ = (&reader).read(&mut octets).expect("it comes");
            pipes(&server) > quiet
        });
        reset(reader);
        let error = sending.join().expect("no panic");
        assert!(matches!(error, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{error}");
        wait_until("all is closed", TIMEOUT, || server.descriptors() == before);
    }
}

/// A server under strace with these faults, and the trace; none without strace.
fn with_fault(inject: &str) -> Option<Server> {
    if !is_installed("strace") {
        return None;
    }
    let mut command = Command::new("strace");
    // -D: the server is the child, so that killing it ends both.
    command.args(["-D", "-f", "-qq", "-e", "trace=splice,pipe2", "-e", &format!("inject={inject}"), "-o", "/dev/null"]);
    command.arg(s5().get_program()).args(["serve", "--listen", "127.0.0.1:0", "--threads", "1"]);
    Some(Server::start_with(&mut command, 1))
}

#[test]
fn where_the_kernel_refuses_to_splice_all_is_copied() {
    let faults = [
        // From the first on: reading into the pipe is refused.
        "splice:error=EINVAL",
        // The second: the pipe holds octets that the sink does not take.
        "splice:error=EINVAL:when=2",
        "splice:error=EINVAL:when=17+",
        "splice:error=ENOSYS:when=4",
        // There is no pipe to be had.
        "pipe2:error=EMFILE",
        "pipe2:error=ENFILE:when=1+2",
    ];
    for fault in faults {
        let Some(server) = with_fault(fault) else { return };
        let (client, target) = through(&server);
        let there = [(client.try_clone(), target.try_clone()), (target.try_clone(), client.try_clone())];
        let transfers = there.map(|(from, to)| {
            let (mut from, mut to) = (from.expect("a descriptor"), to.expect("a descriptor"));
            let sending = thread::spawn(move || {
                send_pattern(&mut from, 8 << 20, |_| {});
                from.shutdown(Shutdown::Write).expect("half-close");
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
fn pipes_leave_descriptors_for_new_sessions() {
    // Few descriptors: 20 tunnels that all get a pipe would take them all.
    let mut command = Command::new("prlimit");
    command.arg("--nofile=72").arg(s5().get_program()).args(["serve", "--listen", "127.0.0.1:0"]);
    let server = Server::start_with(&mut command, 1);
    let tunnels: Vec<_> = (0..20).map(|_| through(&server)).collect();
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
                    let mut octets = vec![0; 8 << 20];
                    target.read_exact(&mut octets).expect("all comes");
                    target
                }),
            )
        })
        .collect();
    let (mut late, rep, _) = open(&server, CONNECT, echo_server());
    assert_eq!(rep, 0);
    ping(&mut late, b"there is room");
    let ends: Vec<_> = transfers
        .into_iter()
        .map(|(sending, receiving)| (sending.join().expect("sent"), receiving.join().expect("received")))
        .collect();
    assert_eq!(ends.len(), 20);
}

#[test]
fn an_urgent_octet_among_bulk_is_one_of_the_others() {
    let server = Server::start(&[]);
    let (client, mut target) = through(&server);
    let sending = thread::spawn(move || {
        let piece = vec![b'.'; 1 << 20];
        for _ in 0..16 {
            (&client).write_all(&piece).expect("it is sent");
            SockRef::from(&client).send_out_of_band(b"!").expect("it is sent");
        }
        client.shutdown(Shutdown::Write).expect("half-close");
        client
    });
    SockRef::from(&target).set_out_of_band_inline(true).expect("an option");
    let mut octets = Vec::new();
    target.read_to_end(&mut octets).expect("it ends");
    assert_eq!(octets.len(), 16 * ((1 << 20) + 1));
    assert_eq!(octets.iter().filter(|octet| **octet == b'!').count(), 16);
    drop(sending.join().expect("all is sent"));
}

/// How many sockets each thread of the server waits for, its listener and its own waker left out.
fn sockets_by_thread(server: &Server) -> Vec<usize> {
    let fds = fs::read_dir(format!("/proc/{}/fd", server.pid())).expect("the server runs");
    let epolls = fds
        .flatten()
        .filter(|fd| fs::read_link(fd.path()).is_ok_and(|link| link.to_string_lossy().contains("[eventpoll]")));
    let count = |fd: fs::DirEntry| {
        let info = format!("/proc/{}/fdinfo/{}", server.pid(), fd.file_name().to_string_lossy());
        let info = fs::read_to_string(info).unwrap_or_default();
        // Registered as in src/reactor/edge.rs: readable, writable, urgent, hang-up, edge-triggered.
        info.lines().filter(|line| line.starts_with("tfd:") && line.contains("events: 8000201f")).count()
    };
    let mut counts: Vec<_> = epolls.map(count).collect();
    counts.sort_unstable();
    // The runtime has one of its own, for signals and the like.
    counts.remove(0);
    counts
}

#[test]
fn a_few_bulk_tunnels_are_spread_over_the_threads() {
    let server = Server::start(&["--threads", "2"]);
    let ends: Vec<_> = (0..4).map(|_| through(&server)).collect();
    // Both ways at once, and each octet looked at.
    let transfer = |from: &TcpStream, to: &TcpStream| {
        let (mut from, mut to) = (from.try_clone().expect("a descriptor"), to.try_clone().expect("a descriptor"));
        let sending = thread::spawn(move || send_pattern(&mut from, MUCH, |_| {}));
        let checking = thread::spawn(move || check_pattern(&mut (&mut to).take(MUCH as u64), MUCH));
        [sending, checking]
    };
    let transfers: Vec<_> = ends
        .iter()
        .flat_map(|(client, target)| [transfer(client, target), transfer(target, client)])
        .flatten()
        .collect();
    for thread in transfers {
        thread.join().expect("all is sent, and comes as it was sent");
    }
    assert_eq!(sockets_by_thread(&server), [4, 4]);
    for (mut client, mut target) in ends {
        target.write_all(b"back").expect("it is sent");
        drop(target);
        assert_eq!(stream_end(&mut client), StreamEnd::Closed(b"back".to_vec()));
    }
    let log = server.wait_log(|log| log.matches("command=connect").count() == 4);
    assert_eq!(log.matches(&format!("up={MUCH} down={} ", MUCH + 4)).count(), 4, "{log}");
}

#[test]
fn many_tunnels_never_end_up_all_on_one_thread() {
    let server = Server::start(&["--threads", "2"]);
    let echo = echo_server();
    let mut streams: Vec<_> = (0..200)
        .map(|_| {
            let (stream, rep, _) = open(&server, CONNECT, echo);
            assert_eq!(rep, 0);
            stream
        })
        .collect();
    let counts = sockets_by_thread(&server);
    assert_eq!(counts.iter().sum::<usize>(), 400);
    assert!(counts[1] <= 2 * counts[0] + 66, "{counts:?}");
    streams.iter_mut().for_each(|stream| ping(stream, b"all the same"));
}

#[test]
fn one_busy_tunnel_leaves_its_thread_time_for_the_others() {
    let server = Server::start(&["--threads", "1"]);
    let (mut neighbour, rep, _) = open(&server, CONNECT, echo_server());
    assert_eq!(rep, 0);
    let (client, target) = through(&server);
    for (from, to) in [(&client, &target), (&target, &client)] {
        let (mut from, mut to) = (from.try_clone().expect("a descriptor"), to.try_clone().expect("a descriptor"));
        thread::spawn(move || while from.write_all(&[0; 1 << 16]).is_ok() {});
        thread::spawn(move || while to.read(&mut [0; 1 << 16]).is_ok_and(|n| n > 0) {});
    }
    let echo = echo_server();
    let mut times: Vec<_> = (0..40)
        .map(|_| {
            timed(|| {
                ping(&mut neighbour, b"x");
                let (mut newcomer, rep, _) = open(&server, CONNECT, echo);
                assert_eq!(rep, 0);
                ping(&mut newcomer, b"y");
            })
            .0
        })
        .collect();
    times.sort_unstable();
    // Far from what a turn without an end would make of it, and room for a machine that has other work.
    assert!(times[20] < Duration::from_millis(250), "{:?}", times[20]);
    drop(client.shutdown(Shutdown::Both));
    drop(target.shutdown(Shutdown::Both));
}
