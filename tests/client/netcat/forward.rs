//! `s5 connect -l` and `s5 udp -l`: local ports forwarded through the proxy.

use std::thread::sleep;

use crate::credentials::as_s5;
use crate::udp::{associating_proxy, datagram, receive, socket};
use crate::*;

/// The address that a client with -l listens on.
pub fn listening_address(client: &RunningProgram) -> SocketAddr {
    let stderr = client.stderr(|stderr| stderr.lines().any(|line| line.starts_with("listening on ")));
    let line = stderr.lines().find_map(|line| line.strip_prefix("listening on ")).expect("the address is printed");
    line.parse().expect("valid address")
}

/// Starts a client with -l. Returns it and the address that it listens on.
pub fn start_forward(args: &str) -> (RunningProgram, SocketAddr) {
    let client = start(args);
    let at = listening_address(&client);
    (client, at)
}

#[test]
fn forward_without_k_serves_one_connection() {
    let (_server, proxy) = serve();
    let (mut client, at) = start_forward(&format!("connect -l 0 -x {proxy} {}", echo_server()));
    assert_eq!(at.ip(), V4, "-l PORT does not listen on loopback");
    let mut local = TcpStream::connect(at).expect("the listener accepts");
    local.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    ping(&mut local, b"hello");
    assert!(TcpStream::connect(at).is_err(), "a second connection is accepted");
    local.shutdown(Shutdown::Write).expect("half-closed");
    assert_eq!(stream_end(&mut local), StreamEnd::Closed(Vec::new()));
    assert_eq!(client.wait_exit(TIMEOUT).0.code(), Some(0));
}

#[test]
fn forward_without_k_exits_with_the_status_of_its_tunnel() {
    let (_server, proxy) = serve();
    let (mut client, at) = start_forward(&format!("connect -l 127.0.0.7:0 -x {proxy} {}", closed_port()));
    assert_eq!(at.ip().to_string(), "127.0.0.7");
    let mut local = TcpStream::connect(at).expect("the listener accepts");
    assert_eq!(stream_end(&mut local), StreamEnd::Reset, "a FIN would be an empty answer");
    let (status, _, stderr) = client.wait_exit(TIMEOUT);
    assert_eq!(status.code(), Some(105), "{stderr}");
    assert!(stderr.ends_with("connection refused (REP 5)\n"), "{stderr}");
}

#[test]
fn forward_k_serves_many_connections_that_fail_independently() {
    let (server, proxy) = serve();
    let count = AtomicUsize::new(0);
    let target = tcp_server(V4, move |mut stream| {
        let n = count.fetch_add(1, Ordering::Relaxed);
        let mut other = stream.try_clone().expect("cloned");
        if n % 3 == 2 {
            let _ = stream.read_exact(&mut [0]);
            reset(stream);
        } else {
            let _ = std::io::copy(&mut stream, &mut other);
        }
    });
    let (mut client, at) = start_forward(&format!("connect -l 0 -k -x {proxy} {target}"));
    let mut locals: Vec<TcpStream> = (0..30).map(|_| TcpStream::connect(at).expect("the listener accepts")).collect();
    let mut resets = 0;
    for local in &mut locals {
        local.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
        let mut byte = [0];
        match local.write_all(b"x").and_then(|()| local.read_exact(&mut byte)) {
            Ok(()) => assert_eq!(byte, *b"x"),
            Err(_) => resets += 1,
        }
    }
    assert_eq!(resets, 10);
    assert!(client.is_running());
    // The other connections are still open.
    let open = locals.iter_mut().filter_map(|local| local.write_all(b"y").ok()).count();
    assert!(open >= 20, "{open}");
    drop(locals);
    server.wait_log(|log| ended_sessions(log) >= 30);
    let count = |stderr: &str| stderr.matches("read error: connection reset").count();
    let stderr = client.stderr(|stderr| count(stderr) >= 10);
    assert_eq!(count(&stderr), 10, "{stderr}");
}

#[test]
fn forward_aborts_handshake_when_local_client_disconnects() {
    let proxy = ScriptedServer::start("> {greeting}; > ...");
    let (mut client, at) = start_forward(&format!("connect -l 0 -x {} {TARGET}", proxy.addr));
    let local = TcpStream::connect(at).expect("the listener accepts");
    proxy.message();
    // s5 waits before it aborts, since a local client may close its sending side and still read.
    drop(local);
    let (status, _, stderr) = client.wait_exit(TIMEOUT);
    assert_eq!(status.code(), Some(56), "{stderr}");
    assert!(stderr.contains("the local client disconnected"), "{stderr}");
}

#[test]
fn forward_recovers_from_descriptor_exhaustion() {
    let (_server, proxy) = serve();
    let script = format!("ulimit -n 24; exec \"$0\" connect -l 0 -k -x {proxy} {}", echo_server());
    let mut client = RunningProgram::start(Command::new("sh").args(["-c", &script, env!("CARGO_BIN_EXE_s5")]));
    let at = listening_address(&client);
    let locals: Vec<TcpStream> = (0..30).map(|_| TcpStream::connect(at).expect("the listener accepts")).collect();
    client.stderr(|stderr| stderr.contains("too many open files"));
    drop(locals);
    wait_until("connections are forwarded again", TIMEOUT, || {
        let mut local = TcpStream::connect(at).expect("the listener accepts");
        local.set_read_timeout(Some(Duration::from_millis(500))).expect("timeout set");
        local.write_all(b"x").is_ok() && retry(|| local.read(&mut [0])).is_ok_and(|n| n == 1)
    });
    assert!(client.is_running());
}

#[test]
fn forward_goes_on_while_stderr_is_not_read() {
    let ((_server, proxy), dir) = (serve(), temp_dir());
    let pipe = dir.path().join("pipe").display().to_string();
    assert!(Command::new("mkfifo").arg(&pipe).status().expect("mkfifo runs").success());
    let objects = fs::File::options().read(true).write(true).open(&pipe).expect("pipe opened");
    rustix::pipe::fcntl_setpipe_size(&objects, 4096).expect("size set");
    let options = ["connect -l 0 -k --json -v", "connect -l 0 -k -v", "connect -l 0 -k --json=fd:3", "udp -l 0 -v"];
    for args in options {
        let (reader, writer) = io::pipe().expect("pipe opened");
        rustix::pipe::fcntl_setpipe_size(&writer, 4096).expect("size set");
        let target = if args.starts_with("udp") { udp_echo_server(V4) } else { echo_server() };
        let script = format!("exec \"$S5\" {args} -x {proxy} {target} 3>{pipe}");
        let mut command = as_s5("sh");
        let mut client = ProcessGroup::start(command.args(["-c", &script]).stdin(Stdio::null()).stderr(writer));
        let mut line = String::new();
        BufReader::with_capacity(64, reader.try_clone().expect("cloned")).read_line(&mut line).expect("line read");
        let at = line.trim_end().strip_prefix("listening on ").expect("the address is printed").parse().expect("valid");
        let open = || {
            let local = TcpStream::connect(at).expect("the listener accepts");
            local.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
            local
        };
        let mut first = (!args.starts_with("udp")).then(open);
        for _ in 0..120 {
            match &mut first {
                Some(first) => [&mut open(), first].into_iter().for_each(|stream| ping(stream, b"x")),
                None => exchange(&socket(), at, b"x"),
            }
        }
        rustix::process::kill_process(client.pid(), rustix::process::Signal::TERM).expect("the client runs");
        wait_until("a signal ends the client", TIMEOUT, || client.has_ended());
        drop(reader);
    }
}

#[test]
fn invalid_listen_address_or_port_in_use_is_an_error() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("free port");
    let at = taken.local_addr().expect("local address").to_string();
    for (listen, status) in [("x", 2), ("host:1", 2), ("70000", 2), ("", 2), (at.as_str(), 45)] {
        assert_line(&format!("connect -l {listen} {TARGET}"), status, &[]);
    }
}

/// Sends a datagram, and expects it back.
pub fn exchange(socket: &UdpSocket, at: SocketAddr, data: &[u8]) {
    socket.send_to(data, at).expect("datagram sent");
    assert_eq!(receive(socket), (data.to_vec(), at));
}

/// Starts `s5 udp -l` through a proxy, to an echo server.
fn start_udp_forward(proxy: &str, options: &str) -> (RunningProgram, SocketAddr) {
    start_forward(&format!("udp -l 0{options} -x {proxy} {}", udp_echo_server(V4)))
}

#[test]
fn udp_forward_opens_one_association_for_each_peer_until_idle() {
    let (server, proxy) = serve();
    let (_client, at) = start_udp_forward(&proxy, " -i 1500ms");
    let (one, two) = (socket(), socket());
    exchange(&one, at, b"from 1");
    exchange(&two, at, b"from 2");
    exchange(&one, at, b"from 1 again");
    assert_eq!(session_lines(&server.log()).len(), 0, "an association has ended");
    let log = server.wait_log(|log| session_lines(log).len() >= 2);
    assert!(log.contains("up=18") && log.contains("up=6"), "{log}");
    exchange(&one, at, b"a new association");
}

#[test]
fn udp_forward_queues_datagrams_until_the_association_is_open() {
    let (_server, proxy) = serve();
    let (_client, at) = start_udp_forward(&proxy, "");
    let socket = socket();
    for n in 0..20_u8 {
        socket.send_to(&[n], at).expect("datagram sent");
    }
    for n in 0..20_u8 {
        assert_eq!(receive(&socket).0, [n]);
    }
}

#[test]
fn udp_forward_limits_peers() {
    let (_server, proxy) = serve();
    let (client, at) = start_udp_forward(&proxy, " --max-peers 2");
    let (one, two) = (socket(), socket());
    exchange(&one, at, b"one");
    exchange(&two, at, b"two");
    overload_peers(&client, at, socket);
}

/// Sends from new sockets until s5 reports dropped datagrams, and omitted lines about them.
fn overload_peers(client: &RunningProgram, at: SocketAddr, socket: impl Fn() -> UdpSocket) {
    wait_until("dropped datagrams are counted", TIMEOUT, || {
        socket().send_to(b"dropped", at).expect("datagram sent");
        client.stderr_so_far().contains("too many peers (raise --max-peers) (omitted lines: ")
    });
}

/// Repeats a datagram until it is echoed, because the peer has a slot.
fn exchange_until_answered(socket: &UdpSocket, at: SocketAddr) {
    socket.set_read_timeout(Some(Duration::from_millis(50))).expect("timeout set");
    wait_until("the peer has a slot", TIMEOUT, || {
        socket.send_to(b"x", at).expect("datagram sent");
        retry(|| socket.recv(&mut [0; 16])).is_ok()
    });
}

#[test]
fn udp_forward_replaces_the_peer_that_is_idle_longest() {
    let (_server, proxy) = serve();
    let (client, at) = start_udp_forward(&proxy, " --max-peers 5 -v");
    let associations = |stderr: &str, peer: &UdpSocket| {
        stderr.matches(&format!("UDP relay for {} to", peer.local_addr().expect("local address"))).count()
    };
    let [other, third] = ["127.0.0.2:0", "127.0.0.3:0"].map(|addr| UdpSocket::bind(addr).expect("free port"));
    let begun = Instant::now();
    exchange_until_answered(&other, at);
    // One address has at most four slots, and its further peers do not get that of another address.
    let sockets = [(); 5].map(|()| socket());
    sockets.iter().for_each(|socket| exchange_until_answered(socket, at));
    assert!(begun.elapsed() > Duration::from_secs(2), "an active peer has lost its slot");
    (0..8).for_each(|_| assert!(socket().send_to(b"x", at).is_ok()));
    exchange_until_answered(&other, at);
    // All five slots are in use: a new address gets one of the address with most.
    exchange_until_answered(&third, at);
    exchange_until_answered(&sockets[0], at);
    let stderr = client.stderr(|stderr| associations(stderr, &sockets[0]) == 2);
    assert_eq!([&other, &third].map(|peer| associations(&stderr, peer)), [1, 1], "{stderr}");
}

#[test]
fn udp_forward_leaves_peers_for_other_addresses() {
    let (_server, proxy) = serve();
    let (client, at) = start_udp_forward(&proxy, " --max-peers 10");
    let sockets = [(); 8].map(|()| socket());
    sockets.iter().for_each(|socket| exchange(socket, at, b"first"));
    overload_peers(&client, at, socket);
    assert!(client.stderr_so_far().lines().count() < 5, "{}", client.stderr_so_far());
    for socket in [(); 2].map(|()| UdpSocket::bind("127.0.0.2:0").expect("free port")) {
        socket.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
        exchange(&socket, at, b"has a slot");
    }
}

#[test]
fn udp_forward_counts_ipv6_peers_by_prefix() {
    enter_namespace!("", "");
    for addr in ["2001:db8::1/64", "2001:db8::2/64", "2001:db8:0:1::1/64"] {
        run(Command::new("ip").args(["addr", "add", addr, "dev", "lo", "nodad"]), b"", TIMEOUT);
    }
    let (_server, proxy) = serve();
    let target = udp_echo_server(V4);
    let (client, at) = start_forward(&format!("udp -l [2001:db8::1]:0 --max-peers 5 -x {proxy} {target}"));
    let socket = |ip: &str| {
        let socket = UdpSocket::bind((ip, 0)).expect("bound");
        socket.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
        socket
    };
    for ip in ["2001:db8::1", "2001:db8::2", "2001:db8::1", "2001:db8::2"] {
        // The kernel may drop the first datagrams to a new address.
        exchange_until_answered(&socket(ip), at);
    }
    overload_peers(&client, at, || socket("2001:db8::2"));
    exchange(&socket("2001:db8:0:1::1"), at, b"another prefix");
}

#[test]
fn udp_forward_limits_associations_that_the_proxy_ends() {
    let count = Arc::new(AtomicUsize::new(0));
    let (counter, relay) = (count.clone(), udp_echo_server(V4));
    let proxy = tcp_server(V4, move |mut stream| {
        // Two errors alternate.
        let rep = u8::from(counter.fetch_add(1, Ordering::Relaxed) % 2 == 1);
        let _ = stream.read_exact(&mut [0; 3]);
        let _ = stream.write_all(&[5, 0]);
        let _ = stream.read_exact(&mut [0; 10]);
        let _ = stream.write_all(&message_with_addr([5, rep, 0], relay));
    });
    let (client, at) = start_forward(&format!("udp -l 0 -x {proxy} 192.0.2.7:7"));
    let (sockets, begun) = ([socket(), socket(), socket()], Instant::now());
    wait_until("errors are counted", TIMEOUT, || {
        sockets.iter().for_each(|socket| assert!(socket.send_to(b"x", at).is_ok()));
        client.stderr_so_far().contains(" (omitted lines: ") && count.load(Ordering::Relaxed) > 3
    });
    let (count, stderr) = (count.load(Ordering::Relaxed), client.stderr_so_far());
    let seconds = usize::try_from(begun.elapsed().as_secs()).expect("a few seconds");
    assert!(count <= sockets.len() * (seconds + 1), "{count} in {seconds} s");
    assert!(stderr.lines().count() <= seconds + 2, "{stderr}");
}

#[test]
fn udp_forward_reports_lost_association_and_opens_a_new_one() {
    let (disconnect, disconnected) = std::sync::mpsc::channel::<()>();
    let script = crate::support::scripted::reply("05 00 00 {relay}");
    let proxy = ScriptedServer::start_at("127.0.0.1:0", &script, move |_stream| {
        let _ = disconnected.recv();
    });
    let (mut client, at) = start_forward(&format!("udp -l 0 -x {} 192.0.2.7:7", proxy.addr));
    let socket = socket();
    socket.send_to(b"x", at).expect("datagram sent");
    receive(&proxy.relay);
    drop(disconnect);
    client.stderr(|stderr| stderr.contains("the proxy ended the association"));
    assert!(client.is_running());
    wait_until("the next error is reported", TIMEOUT, || {
        socket.send_to(b"y", at).expect("datagram sent");
        client.stderr_so_far().contains("connection refused (is the proxy running?)")
    });
    assert!(client.is_running());
}

#[test]
fn udp_forward_drops_and_counts_answers_from_other_addresses() {
    let proxy = associating_proxy();
    let (client, at) = start_forward(&format!("udp -l 0 -i 500ms -x {} 192.0.2.7:7", proxy.addr));
    let socket = socket();
    socket.send_to(b"x", at).expect("datagram sent");
    let (_, from) = receive(&proxy.relay);
    let mut evil = datagram(b"evil");
    evil[7] = 8;
    for bytes in [evil, datagram(b"good")] {
        proxy.relay.send_to(&bytes, from).expect("datagram sent");
    }
    assert_eq!(receive(&socket).0, b"good");
    let message = "transfer, for 192.0.2.7:7: answers dropped: not from the target (1)\n";
    client.stderr(|stderr| stderr.ends_with(message));
}

#[test]
fn udp_forward_accepts_other_forms_of_the_target_as_sender() {
    let mapped = [&[0, 0, 0, 4][..], &[0; 10], &[0xff, 0xff, 192, 0, 2, 7, 0, 7], b"x"].concat();
    let answers = [datagram(b"x"), mapped];
    for target in ["192.0.2.7:7", "[::ffff:192.0.2.7]:7", "0.0.0.0:7", "[::]:7", "[::ffff:0.0.0.0]:7"] {
        for answer in &answers {
            let proxy = associating_proxy();
            let (_client, at) = start_forward(&format!("udp -l 0 -x {} {target}", proxy.addr));
            let socket = socket();
            socket.send_to(b"x", at).expect("datagram sent");
            proxy.relay.send_to(answer, receive(&proxy.relay).1).expect("datagram sent");
            receive(&socket);
        }
    }
    for target in ["[::ffff:127.0.0.1]", "0.0.0.0"] {
        let (port, (_server, proxy)) = (udp_echo_server(V4).port(), serve());
        for route in [format!("-x {proxy}"), "--direct".into()] {
            exchange(&socket(), start_forward(&format!("udp -l 0 {route} {target}:{port}")).1, b"x");
        }
    }
}

#[test]
fn forward_serves_local_client_that_only_reads() {
    let (_server, proxy) = serve();
    let target = tcp_server(V4, |mut stream| drop(stream.write_all(b"banner")));
    let (mut client, at) = start_forward(&format!("connect -l 0 -x {proxy} {target}"));
    let mut local = TcpStream::connect(at).expect("the listener accepts");
    local.shutdown(Shutdown::Write).expect("half-closed");
    assert_eq!(stream_end(&mut local), StreamEnd::Closed(b"banner".to_vec()));
    assert_eq!(client.wait_exit(TIMEOUT).0.code(), Some(0));
}

#[test]
fn udp_forward_limits_tries_to_reach_a_proxy_that_is_down() {
    let (client, at) = start_udp_forward(&closed_port().to_string(), "");
    let (socket, begun) = (socket(), Instant::now());
    for _ in 0..200 {
        socket.send_to(b"x", at).expect("datagram sent");
        sleep(Duration::from_millis(1));
    }
    let stderr = client.stderr(|stderr| stderr.contains("connection refused"));
    let seconds = usize::try_from(begun.elapsed().as_secs()).expect("a few seconds");
    assert!(stderr.lines().count() <= seconds + 2, "{stderr}");
}

#[test]
fn udp_forward_json_reports_each_association() {
    let (_server, proxy) = serve();
    let (client, at) = start_udp_forward(&proxy, " -i 300ms --json -v");
    exchange(&socket(), at, b"seven..");
    let stderr = client.stderr(|stderr| stderr.contains("\"up\":"));
    assert!(stderr.contains("\"up\":7,\"down\":7") && !stderr.contains("\"first_byte\":null"), "{stderr}");
}
