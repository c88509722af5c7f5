//! The end of the remote stream: stdin is read to its end, and a peer that is gone is noticed.

use std::fs::File;
use std::sync::mpsc::{Receiver, Sender};

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use socket2::Socket;

use crate::bind::bound_address;
use crate::netcat::forward::start_forward;
use crate::support::serve;
use crate::*;

/// Time after which a peer that has ended its stream and is gone must be noticed.
const MAX_LIMIT: Duration = Duration::from_secs(75);

/// Sends "one", ends the stream, reads to the end and reports the data.
fn ends_first(stream: &mut TcpStream, sender: &Sender<Vec<u8>>) {
    let _ = stream.write_all(b"one").and_then(|()| stream.shutdown(Shutdown::Write));
    let mut all = Vec::new();
    let _ = stream.read_to_end(&mut all);
    let _ = sender.send(all);
}

/// Starts a target that ends its stream first.
fn half_closing_target(ip: IpAddr) -> (SocketAddr, Receiver<Vec<u8>>) {
    let (sender, received) = channel();
    (tcp_server(ip, move |mut stream| ends_first(&mut stream, &sender)), received)
}

/// Waits for the end of stdout, and only then writes to stdin, as ssh does. The target must receive that data.
fn assert_stdin_is_delivered(client: &mut RunningProgram, received: &Receiver<Vec<u8>>) {
    assert_eq!(client.stdout_end(), b"one");
    client.write(b"two");
    client.close_stdin();
    assert_eq!(received.recv_timeout(TIMEOUT).as_deref(), Ok(&b"two"[..]));
    let (status, _, stderr) = client.wait_exit(TIMEOUT);
    assert_eq!(status.code(), Some(0), "{stderr}");
}

#[test]
fn stdin_is_read_to_its_end_after_the_remote_end() {
    let dir = temp_dir();
    let unix = format!("unix:{}/proxy", dir.path().display());
    let (far, _on_unix) = (serve("127.0.0.1:0", 1, &[]), serve(&unix, 1, &[]));
    let near = serve("127.0.0.1:0", 1, &["--via", &far.addr().to_string()]);
    for ip in [V4, V6] {
        let (target, received) = half_closing_target(ip);
        let chain = format!("{},{}", far.addr(), near.addr());
        for proxy in ["", &near.addr().to_string(), &chain, &unix] {
            // The empty string is no proxy.
            assert_stdin_is_delivered(&mut start(&format!("connect -x {proxy} {target}")), &received);
        }
    }
    let mut client = start(&format!("bind -x {}", far.addr()));
    let mut peer = TcpStream::connect(bound_address(&client)).expect("the listener accepts");
    let (sender, received) = channel();
    std::thread::spawn(move || ends_first(&mut peer, &sender));
    assert_stdin_is_delivered(&mut client, &received);
}

#[test]
fn stdin_that_is_a_file_or_the_same_socket_as_stdout_is_read_to_its_end() {
    let (dir, (target, received)) = (temp_dir(), half_closing_target(V4));
    let file = File::open(write_file(dir.path(), "input", &"two".repeat(1 << 20))).expect("file opened");
    let mut child = command(&format!("connect --direct {target}")).stdin(file).spawn().expect("s5 starts");
    assert_eq!(received.recv_timeout(TIMEOUT).map(|data| data.len()), Ok(3 << 20));
    assert!(child.wait().expect("the child can be waited for").success());

    let (client_end, mut test_end) = UnixStream::pair().expect("socket pair created");
    let stdout = OwnedFd::from(client_end.try_clone().expect("cloned"));
    let mut command = command(&format!("connect --direct {target}"));
    let mut child = command.stdin(OwnedFd::from(client_end)).stdout(stdout).spawn().expect("s5 starts");
    drop(command);
    let mut answer = Vec::new();
    test_end.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    test_end.read_to_end(&mut answer).expect("the end of the answer arrives");
    assert_eq!(answer, b"one");
    test_end.write_all(b"two").and_then(|()| test_end.shutdown(Shutdown::Write)).expect("data sent");
    assert_eq!(received.recv_timeout(TIMEOUT).as_deref(), Ok(&b"two"[..]));
    assert!(child.wait().expect("the child can be waited for").success());
}

#[test]
fn terminal_as_stdin_ends_with_the_remote_side() {
    if !is_installed("script") {
        return;
    }
    let (target, _received) = half_closing_target(V4);
    let client = format!("'{}' connect --direct {target}", env!("CARGO_BIN_EXE_s5"));
    let mut script = RunningProgram::start(Command::new("script").args(["-qec", &client, "/dev/null"]));
    assert_eq!(script.wait_exit(TIMEOUT).0.code(), Some(0));
}

/// Checks that a client exits with 0 although its stdin stays open.
fn assert_exits(client: &mut RunningProgram) {
    let (status, stdout, stderr) = client.wait_exit(TIMEOUT);
    assert_eq!((status.code(), stdout.as_slice()), (Some(0), &b"one"[..]), "{stderr}");
}

#[test]
fn linger_limits_the_wait_for_stdin() {
    let (server, (target, _received)) = (Server::start(&[]), half_closing_target(V4));
    let proxy = server.addr();
    let started = Instant::now();
    assert_exits(&mut start(&format!("connect --linger 300ms -x {proxy} {target}")));
    assert!(started.elapsed() >= Duration::from_millis(300));

    let mut client = start(&format!("bind --linger 300ms -x {proxy}"));
    let peer = TcpStream::connect(bound_address(&client)).expect("the listener accepts");
    (&peer).write_all(b"one").and_then(|()| peer.shutdown(Shutdown::Write)).expect("data sent");
    assert_exits(&mut client);

    // The program closes neither its output nor itself.
    let mut program = command(&format!("connect --linger 1s -x {proxy} {target} -c"));
    let mut client = RunningProgram::start(program.arg("cat >&2; exec 2>&-; exec sleep 5"));
    let (status, _, stderr) = client.wait_exit(TIMEOUT);
    assert_eq!((status.code(), stderr.as_str()), (Some(0), "one"));

    let (mut client, at) = start_forward(&format!("connect -l 0 --linger 300ms -x {proxy} {target}"));
    let mut local = TcpStream::connect(at).expect("the listener accepts");
    assert_eq!(stream_end(&mut local), StreamEnd::Closed(b"one".to_vec()));
    assert_eq!(client.wait_exit(TIMEOUT).0.code(), Some(0));
}

#[test]
fn tunnel_ends_before_a_program_that_outlives_it() {
    let (target, received) = half_closing_target(V4);
    let mut program = command(&format!("connect --linger 2s --direct {target} -c"));
    let mut client = RunningProgram::start(program.arg("exec sleep 6 2>&-"));
    assert_eq!(received.recv_timeout(TIMEOUT).as_deref(), Ok(&b""[..]));
    let ended = Instant::now();
    client.wait_exit(TIMEOUT);
    // The client then waits for the program, also for 2 s.
    assert!(ended.elapsed() > Duration::from_secs(1));
}

/// Starts a target that sends "one", ends its stream, reads `expected` bytes, and resets the connection when the test
/// says so.
fn resetting_target(expected: usize) -> (SocketAddr, Sender<()>) {
    let (sender, may_reset) = channel();
    let may_reset = std::sync::Mutex::new(may_reset);
    let target = tcp_server(V4, move |mut stream| {
        stream.write_all(b"one").and_then(|()| stream.shutdown(Shutdown::Write)).expect("data sent");
        stream.read_exact(&mut vec![0; expected]).expect("all bytes received");
        let _ = may_reset.lock().expect("not poisoned").recv_timeout(TIMEOUT);
        reset(stream);
    });
    (target, sender)
}

#[test]
fn reset_after_the_remote_end_is_an_error_only_if_data_may_be_lost() {
    let dir = temp_dir();
    let unix = format!("unix:{}/proxy", dir.path().display());
    let (server, _on_unix) = (Server::start(&[]), serve(&unix, 1, &[]));
    let proxies = ["", &server.addr().to_string(), &unix];
    let jobs =
        proxies.into_iter().flat_map(|proxy| [("", 0, ""), ("two", 55, "write error: ")].map(|case| (proxy, case)));
    run_all(jobs.collect(), |(proxy, (stdin, status, message))| {
        let (target, may_reset) = resetting_target(stdin.len());
        let mut client = start(&format!("connect -x {proxy} {target}"));
        client.stdout_end();
        client.write(stdin.as_bytes());
        may_reset.send(()).expect("the target runs");
        let (code, _, stderr) = client.wait_exit(TIMEOUT);
        assert!(code.code() == Some(status) && stderr.contains(message), "{proxy} {stdin:?}: {code} {stderr}");
        assert_eq!(stderr.is_empty(), status == 0, "{stderr}");
    });
}

/// Copies of the established TCP sockets of a process.
fn tcp_sockets(pid: u32) -> Vec<Socket> {
    let process = Pid::from_raw(i32::try_from(pid).expect("a pid")).expect("a pid");
    let process = pidfd_open(process, PidfdFlags::empty()).expect("the process runs");
    let names = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("the process runs").flatten();
    let numbers = names.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let files = numbers.filter_map(|number| pidfd_getfd(&process, number, PidfdGetfdFlags::empty()).ok());
    files.map(Socket::from).filter(|socket| socket.peer_addr().is_ok_and(|addr| addr.as_socket().is_some())).collect()
}

/// The time after which the kernel reports that the peer of a socket is gone; `None` without keepalive.
fn keepalive_limit(socket: &Socket) -> Option<Duration> {
    let socket = SockRef::from(socket);
    socket.keepalive().ok().filter(|is_set| *is_set)?;
    let (time, interval) = (socket.tcp_keepalive_time().ok()?, socket.tcp_keepalive_interval().ok()?);
    Some(time + interval * socket.tcp_keepalive_retries().ok()?)
}

/// Waits until one socket of a process is probed often enough to be closed within 75 s.
fn wait_short_keepalive(name: &str, pid: u32) {
    wait_until(name, TIMEOUT, || {
        let limits = tcp_sockets(pid);
        limits.iter().filter_map(keepalive_limit).any(|limit| limit <= MAX_LIMIT)
    });
}

#[test]
fn keepalive_is_short_after_the_end_of_a_stream_at_client_server_and_forward() {
    let (server, (target, _received)) = (Server::start(&[]), half_closing_target(V4));
    let proxy = server.addr();
    let silent = tcp_server(V4, |stream| {
        std::thread::sleep(TIMEOUT);
        drop(stream);
    });
    let open = start(&format!("connect --direct {silent}"));
    let mut client = start(&format!("connect -x {proxy} {target}"));
    wait_short_keepalive("client", client.pid());
    wait_short_keepalive("server", server.pid());
    client.close_stdin();
    client.wait_exit(TIMEOUT);
    let (forward, at) = start_forward(&format!("connect -l 0 -x {proxy} {target}"));
    let _local = TcpStream::connect(at).expect("the listener accepts");
    wait_short_keepalive("forward", forward.pid());

    let limits: Vec<Duration> = tcp_sockets(open.pid()).iter().filter_map(keepalive_limit).collect();
    assert!(!limits.is_empty() && limits.iter().all(|limit| *limit > MAX_LIMIT), "of an open tunnel: {limits:?}");
    // The client has ended its stream, and the target has not.
    let server = Server::start(&[]);
    let mut client = start(&format!("connect -x {} {silent}", server.addr()));
    client.close_stdin();
    wait_short_keepalive("server", server.pid());
}

/// Takes 7 s: the kernel must forget the closed connection, and then a probe is due 5 s after the end of the stream.
#[test]
fn client_exits_when_the_target_has_closed_completely() {
    enter_namespace!("127.0.0.1 localhost\n", "");
    std::fs::write("/proc/sys/net/ipv4/tcp_fin_timeout", "1").expect("a namespace of this test");
    let server = Server::start(&["-v"]);
    let target = tcp_server(V4, |mut stream| drop(stream.write_all(b"one")));
    let started = Instant::now();
    let clients =
        ["--direct".into(), format!("-x {}", server.addr())].map(|way| start(&format!("connect {way} {target}")));
    for mut client in clients {
        let (status, stdout, stderr) = client.wait_exit(TIMEOUT * 2);
        assert_eq!((status.code(), stdout.as_slice(), stderr.as_str()), (Some(0), &b"one"[..], ""));
    }
    assert!(started.elapsed() >= Duration::from_secs(1), "before the target was gone");
    let log = server.wait_log(|log| session_lines(log).len() == 1);
    assert!(log.contains("down=3") && log.contains("dst is gone after the end of its stream"), "{log}");
}
