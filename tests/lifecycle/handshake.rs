//! Those who say nothing, too little, or something else than SOCKS5.

use std::io::Write as _;
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{Server, TIMEOUT, echo_server, open, request, wait_until};
use crate::kit::{CONNECT, StreamEnd, fastest, greet, idle_descriptors, ping, session_lines, stream_end, timed};

/// Sends this and reads to the end.
fn answer_to(server: &Server, octets: &[u8]) -> Vec<u8> {
    let mut stream = server.connect();
    stream.write_all(octets).expect("it is sent");
    match stream_end(&mut stream) {
        StreamEnd::Closed(answer) => answer,
        StreamEnd::Reset => panic!("reset after {octets:02x?}"),
    }
}

#[test]
fn who_says_nothing_is_closed_when_the_time_is_over() {
    let server = Server::start(&["--handshake-timeout", "300ms"]);
    let stages: [&[u8]; 4] = [b"", &[5], &[5, 1, 0], &[5, 1, 0, 5, 1, 0, 1, 127]];
    let streams = stages.map(|stage| {
        let mut stream = server.connect();
        stream.write_all(stage).expect("it is sent");
        stream
    });
    for mut stream in streams {
        let (time, end) = timed(|| stream_end(&mut stream));
        assert!(matches!(&end, StreamEnd::Closed(said) if said.is_empty() || *said == [5, 0]), "{end:?}");
        assert!(time < Duration::from_secs(5), "{time:?}");
    }
    let log = server.wait_log(|log| session_lines(log).len() == 4);
    assert_eq!(log.matches("handshake timed out").count(), 4, "{log}");
}

#[test]
fn a_drip_does_not_renew_the_time() {
    let server = Server::start(&["--handshake-timeout", "600ms"]);
    let mut stream = server.connect();
    let started = Instant::now();
    let mut dripping = stream.try_clone().expect("a second handle");
    let drip = thread::spawn(move || {
        // 255 methods, and never the last of them.
        let _ = dripping.write_all(&[5, 255]);
        for _ in 0..200 {
            if dripping.write_all(&[1]).is_err() {
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
    drip.join().expect("the drip ends");
}

#[test]
fn the_time_is_for_the_handshake_and_not_for_the_tunnel() {
    let server = Server::start(&["--handshake-timeout", "300ms"]);
    let (mut stream, rep, _) = open(&server, CONNECT, echo_server());
    assert_eq!(rep, 0);
    let started = Instant::now();
    while started.elapsed() < Duration::from_millis(600) {
        ping(&mut stream, b"still here");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn hundreds_who_are_silent_hold_up_nobody() {
    let server = Server::start(&[]);
    let dst = echo_server();
    let silent: Vec<TcpStream> =
        (0..300).map(|number| if number % 2 == 0 { server.connect() } else { greet(&server) }).collect();
    let fastest = fastest(|| assert_eq!(open(&server, CONNECT, dst).1, 0));
    assert!(fastest < Duration::from_millis(100), "{fastest:?}");
    drop(silent);
    wait_until("all are gone", TIMEOUT, || session_lines(&server.log()).len() == 308);
}

#[test]
fn http_is_answered_in_words() {
    let server = Server::start(&[]);
    for request in ["GET / HTTP/1.1\r\nHost: x\r\n\r\n", "CONNECT x:443 HTTP/1.1\r\n\r\n", "POST / HTTP/1.0\r\n\r\n"] {
        let answer = String::from_utf8(answer_to(&server, request.as_bytes())).expect("text");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
        assert!(head.starts_with("HTTP/1.") && head.lines().next().expect("a line").contains(" 501 "), "{head}");
        let length =
            head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ").map(str::to_owned));
        assert!(length.is_none_or(|length| length == body.len().to_string()), "{answer}");
        assert!(body.contains("SOCKS5"), "{body}");
    }
}

#[test]
fn socks4_is_refused_in_its_own_way() {
    let server = Server::start(&[]);
    let answer = answer_to(&server, &[4, 1, 0, 80, 127, 0, 0, 1, 0]);
    assert_eq!(answer.len(), 8);
    assert_eq!(answer[..2], [0, 0x5b]);
}

#[test]
fn tls_and_noise_are_closed_without_a_word() {
    let server = Server::start(&[]);
    let foreign: [&[u8]; 3] = [&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xFC, 3, 3], &[0, 0, 0], &[0xFF; 100]];
    for octets in foreign {
        let mut stream = server.connect();
        stream.write_all(octets).expect("it is sent");
        // There is no answer that a reset could lose.
        let end = stream_end(&mut stream);
        assert!(end == StreamEnd::Closed(vec![]) || end == StreamEnd::Reset, "{end:?}");
    }
    let log = server.wait_log(|log| session_lines(log).len() == 3);
    assert_eq!(log.matches("not SOCKS5: the client's first byte is").count(), 3, "{log}");
    assert!(log.contains("TLS"), "{log}");
}

#[test]
fn a_refused_greeting_is_answered_though_more_is_on_its_way() {
    let server = Server::start(&[]);
    // Unread octets at the close would make it a reset, and the answer could be lost.
    let mut all = vec![5, 1, 2];
    all.extend([0; 32 * 1024]);
    let mut stream = server.connect();
    stream.write_all(&all).expect("it is sent");
    stream.shutdown(std::net::Shutdown::Write).expect("half-close");
    assert_eq!(stream_end(&mut stream), StreamEnd::Closed(vec![5, 0xFF]));
}

#[test]
fn clients_that_leave_at_every_octet_leave_nothing_behind() {
    let server = Server::start(&[]);
    let before = idle_descriptors(&server);
    let mut whole = vec![5, 1, 0];
    whole.extend(request(CONNECT, echo_server()));
    for length in 0..=whole.len() {
        for leave in [drop as fn(TcpStream), crate::kit::reset] {
            let mut stream = server.connect();
            stream.write_all(&whole[..length]).expect("it is sent");
            leave(stream);
        }
    }
    wait_until("all are gone", TIMEOUT, || server.descriptors() == before);
    let expected = 2 * (whole.len() + 1);
    // A reset before accept(2) may leave no session at all.
    wait_until("all are logged", TIMEOUT, || session_lines(&server.log()).len() >= expected - whole.len() - 1);
}
