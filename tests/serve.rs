//! The server end to end, on loopback.

mod common;

use std::io::{Read as _, Write as _};

use common::{Server, echo_server, open};

#[test]
fn connect_relays_both_ways() {
    let server = Server::start(&[]);
    let (mut stream, rep, _) = open(&server, 1, echo_server());
    assert_eq!(rep, 0);
    stream.write_all(b"hello").expect("it is sent");
    stream.shutdown(std::net::Shutdown::Write).expect("half-close");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("it comes back");
    assert_eq!(answer, b"hello");
}
