//! Clients that speak another protocol or send more than the handshake. tests/wire has interrupted handshakes and other
//! protocols, tests/limits has slow ones.

use crate::*;

#[test]
fn handshake_timeout_does_not_apply_to_the_tunnel() {
    let server = Server::start(&["--handshake-timeout", "300ms"]);
    let mut stream = connect_to(&server, echo_server());
    thread::sleep(Duration::from_millis(500));
    ping(&mut stream, b"still open");
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
