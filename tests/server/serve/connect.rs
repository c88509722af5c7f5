//! CONNECT up to its reply: timing, and clients that disconnect or send data early. tests/wire has REP and BND.

use crate::*;

#[test]
fn connect_success_is_not_sent_before_the_target_accepts() {
    let server = Server::start(&["--connect-timeout", "400ms"]);
    let target = FullBacklog::new();
    let (time, (mut stream, rep, _)) = timed(|| open(&server, CONNECT, target.addr));
    assert_eq!(rep, 6, "the target does not accept");
    assert!(time >= Duration::from_millis(400), "{time:?}");
    assert_eq!(stream_end(&mut stream), StreamEnd::Closed(vec![]));
}

#[test]
fn connect_relays_data_and_half_close_sent_before_the_reply() {
    let server = Server::start(&[]);
    let mut stream = greet(&server);
    stream.write_all(&request(CONNECT, echo_server())).expect("request sent");
    stream.write_all(b"all data").expect("data sent");
    stream.shutdown(std::net::Shutdown::Write).expect("half-closed");
    assert_eq!(read_reply(&mut stream).0, 0);
    assert_eq!(stream_end(&mut stream), StreamEnd::Closed(b"all data".to_vec()));
}

#[test]
fn connect_failure_reply_arrives_while_the_client_keeps_sending() {
    let server = Server::start(&[]);
    let mut stream = greet(&server);
    stream.write_all(&request(CONNECT, closed_port())).expect("request sent");
    let mut sender = stream.try_clone().expect("cloned");
    let started = Instant::now();
    let flood = thread::spawn(move || {
        let bytes = vec![0xAA; 16 * 1024];
        while sender.write_all(&bytes).is_ok() {}
        started.elapsed()
    });
    assert_eq!(read_reply(&mut stream).0, 5);
    // RFC 1928 section 6: the server closes within 10 seconds after the failure.
    let ended = flood.join().expect("the thread does not panic");
    assert!(ended < Duration::from_secs(10), "{ended:?}");
    wait_until("the session is logged", TIMEOUT, || server.log().contains("rep=5"));
}

#[test]
fn connect_is_cancelled_when_the_client_disconnects() {
    let server = Server::start(&["--connect-timeout", "60"]);
    let target = FullBacklog::new();
    let before = idle_descriptors(&server);
    let disconnect: [fn(TcpStream); 2] = [drop, reset];
    for disconnect in disconnect {
        let mut stream = greet(&server);
        stream.write_all(&request(CONNECT, target.addr)).expect("request sent");
        wait_until("both sockets are open", TIMEOUT, || server.descriptors() == before + 2);
        disconnect(stream);
        wait_until("both sockets are closed", TIMEOUT, || server.descriptors() == before);
    }
}

#[test]
fn connect_to_any_address_of_a_wildcard_listener_is_rep_02() {
    let server = serve("*:0", 2, &["--allow-open-relay"]);
    let port = server.addr().port();
    let local = SocketAddr::new(V4, port);
    let refused = |request: &[u8]| {
        let mut stream = connect_from(SocketAddr::new(V4, 0), local);
        stream.write_all(&[5, 1, 0]).expect("greeting sent");
        assert_eq!(read_exact(&mut stream, 2), [5, 0]);
        stream.write_all(request).expect("request sent");
        read_reply(&mut stream).0 == 2
    };
    for ip in ["127.0.0.1", "127.0.0.2", "127.9.9.9", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1"] {
        let dst = SocketAddr::new(ip.parse().expect("valid address"), port);
        assert!(refused(&request(CONNECT, dst)), "{dst}");
    }
    assert!(refused(&request_by_name(CONNECT, "localhost", port)));
}

#[test]
fn connect_two_thousand_tunnels_are_isolated() {
    const TUNNELS: u32 = 2000;
    if !raise_fd_limit(8192) {
        return skip("too few descriptors for 2000 tunnels");
    }
    let server = Server::start(&[]);
    let before = idle_descriptors(&server);
    let (target, dst) = listener(V4);
    let target = Arc::new(target);
    let accepting = target.clone();
    let accepted = thread::spawn(move || (0..TUNNELS).map(|_| accept(&accepting).0).collect::<Vec<_>>());
    let mut clients: Vec<TcpStream> = Vec::new();
    for number in 0..TUNNELS {
        let mut stream = connect_to(&server, dst);
        stream.write_all(&number.to_be_bytes()).expect("data sent");
        clients.push(stream);
    }
    // Each target echoes its number.
    let mut targets = accepted.join().expect("the thread does not panic");
    for target in &mut targets {
        let number = read_exact(target, 4);
        target.write_all(&number).expect("data sent");
    }
    for (number, client) in (0..TUNNELS).zip(&mut clients) {
        assert_eq!(read_exact(client, 4), number.to_be_bytes());
    }
    drop((clients, targets));
    wait_until("all descriptors are closed", TIMEOUT, || server.descriptors() == before);
}
