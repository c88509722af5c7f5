//! Sends random bytes in random pieces to a server, as a client does. The server must not panic or end. A client that
//! is well-behaved must be served after each input. Run it in a network namespace: requests name random targets.

#![no_main]

mod support;

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;

/// Beginnings of sessions: none, a greeting, a greeting with a login, and those with the begin of a request.
const PREFIXES: [&[u8]; 6] = [
    b"",
    b"\x05\x01\0",
    b"\x05\x01\x02\x01\x01u\x01p",
    b"\x05\x01\0\x05\x01\0",
    b"\x05\x01\0\x05\x02\0",
    b"\x05\x01\0\x05\x03\0",
];

fuzz_target!(|bytes: &[u8]| {
    let [prefix, rest @ ..] = bytes else { return };
    let mut client = connect();
    // A server that closes early makes a write fail.
    let _ = client.write_all(PREFIXES[usize::from(*prefix) % PREFIXES.len()]);
    for piece in support::pieces(rest) {
        let _ = client.write_all(piece);
    }
    if prefix & 0x80 == 0 {
        let _ = client.shutdown(Shutdown::Write);
        // Failed logins are answered late.
        client.set_read_timeout(Some(Duration::from_millis(20))).expect("timeout set");
        let _ = client.read_to_end(&mut Vec::new());
    }
    drop(client);
    check_served();
});

fn connect() -> UnixStream {
    let stream = UnixStream::connect(&support::server().0).expect("the server accepts");
    stream.set_read_timeout(Some(Duration::from_secs(4))).expect("timeout set");
    stream
}

/// Requests a command that does not exist: X'07'.
fn check_served() {
    let (mut client, mut reply) = (connect(), [0; 12]);
    client.write_all(b"\x05\x01\0\x05\x09\0\x01\0\0\0\0\0\0").expect("sent");
    client.read_exact(&mut reply).expect("a well-behaved client is served");
    assert_eq!(reply[..4], [5, 0, 5, 7]);
}
