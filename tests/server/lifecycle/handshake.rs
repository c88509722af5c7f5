//! Clients that send nothing, an incomplete handshake, or another protocol.

use std::io::Write as _;
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::{
    CONNECT, Server, StreamEnd, TIMEOUT, echo_server, fastest, greet, idle_descriptors, open, ping, request, reset,
    session_lines, stream_end, timed, wait_until,
};

#[test]
fn handshake_timeout_closes_clients_that_stop_at_any_stage() {
    let server = Server::start(&["--handshake-timeout", "300ms"]);
    let stages: [&[u8]; 4] = [b"", &[5], &[5, 1, 0], &[5, 1, 0, 5, 1, 0, 1, 127]];
    let streams = stages.map(|stage| {
        let mut stream = server.connect();
        stream.write_all(stage).expect("data sent");
        stream
    });
    for mut stream in streams {
        let (time, end) = timed(|| stream_end(&mut stream));
        assert!(matches!(&end, StreamEnd::Closed(answer) if answer.is_empty() || *answer == [5, 0]), "{end:?}");
        assert!(time < Duration::from_secs(5), "{time:?}");
    }
    let log = server.wait_log(|log| session_lines(log).len() == 4);
    assert_eq!(log.matches("handshake timed out").count(), 4, "{log}");
}

#[test]
fn handshake_timeout_is_not_extended_by_single_bytes_and_does_not_apply_to_the_tunnel() {
    let server = Server::start(&["--handshake-timeout", "600ms"]);
    let (mut tunnel, rep, _) = open(&server, CONNECT, echo_server());
    assert_eq!(rep, 0);
    let mut stream = server.connect();
    let started = Instant::now();
    let mut sending = stream.try_clone().expect("cloned");
    let sender = thread::spawn(move || {
        // The greeting announces 255 methods; the last of them is never sent.
        let _ = sending.write_all(&[5, 255]);
        for _ in 0..200 {
            if sending.write_all(&[1]).is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(50));
        }
    });
    let end = stream_end(&mut stream);
    let time = started.elapsed();
    assert!(end == StreamEnd::Closed(vec![]) || end == StreamEnd::Reset, "{end:?}");
    assert!(time >= Duration::from_millis(550) && time < Duration::from_secs(5), "{time:?}");
    drop(stream);
    sender.join().expect("the thread does not panic");
    ping(&mut tunnel, b"still open");
}

#[test]
fn three_hundred_silent_clients_do_not_delay_others() {
    let server = Server::start(&[]);
    let dst = echo_server();
    let silent: Vec<TcpStream> = (0..300).map(|n| if n % 2 == 0 { server.connect() } else { greet(&server) }).collect();
    let fastest = fastest(|| assert_eq!(open(&server, CONNECT, dst).1, 0));
    assert!(fastest < Duration::from_millis(100), "{fastest:?}");
    drop(silent);
    wait_until("all sessions are logged", TIMEOUT, || session_lines(&server.log()).len() == 308);
}

#[test]
fn http_request_gets_a_501_page_that_names_socks5() {
    let server = Server::start(&[]);
    for request in ["GET / HTTP/1.1\r\nHost: x\r\n\r\n", "CONNECT x:443 HTTP/1.1\r\n\r\n", "POST / HTTP/1.0\r\n\r\n"] {
        let mut stream = server.connect();
        stream.write_all(request.as_bytes()).expect("data sent");
        let StreamEnd::Closed(answer) = stream_end(&mut stream) else { panic!("reset after {request}") };
        let answer = String::from_utf8(answer).expect("UTF-8");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
        assert!(head.starts_with("HTTP/1.0 501 ") && body.contains("SOCKS5"), "{answer}");
        let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
        assert!(length.is_none_or(|length| length == body.len().to_string()), "{answer}");
    }
}

#[test]
fn refusal_of_a_greeting_arrives_despite_unread_data() {
    let server = Server::start(&[]);
    // close(2) with unread bytes would send a reset, which can discard the answer.
    let mut all = vec![5, 1, 2];
    all.extend([0; 32 * 1024]);
    let mut stream = server.connect();
    stream.write_all(&all).expect("data sent");
    stream.shutdown(std::net::Shutdown::Write).expect("half-closed");
    assert_eq!(stream_end(&mut stream), StreamEnd::Closed(vec![5, 0xFF]));
}

#[test]
fn clients_that_close_after_any_byte_leak_no_descriptor() {
    let server = Server::start(&[]);
    let before = idle_descriptors(&server);
    let mut message = vec![5, 1, 0];
    message.extend(request(CONNECT, echo_server()));
    for length in 0..=message.len() {
        for end in [drop as fn(TcpStream), reset] {
            let mut stream = server.connect();
            stream.write_all(&message[..length]).expect("data sent");
            end(stream);
        }
    }
    wait_until("all connections are closed", TIMEOUT, || server.descriptors() == before);
    let expected = 2 * (message.len() + 1);
    // A connection that is reset before accept(2) may have no session.
    wait_until("all sessions are logged", TIMEOUT, || {
        session_lines(&server.log()).len() >= expected - message.len() - 1
    });
}
