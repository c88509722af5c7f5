//! Unit tests of the private items of `src/gssapi.rs`.

use std::io::Read as _;
use std::os::unix::net::UnixStream;

use super::*;
use crate::net::Io;

#[test]
fn token_that_len_cannot_express_is_an_error_and_is_not_sent() {
    let (near, mut far) = UnixStream::pair().expect("socket pair created");
    near.set_nonblocking(true).expect("option set");
    let sent = crate::net::reactor::run(async {
        let mut conn = Conn::Unix(Io::new(near.into()).expect("socket registered"));
        let too_long = send_frame(&mut conn, Frame::Authentication(vec![0; 65_536])).await;
        (too_long, send_frame(&mut conn, Frame::Authentication(vec![7])).await)
    });
    let (too_long, next) = sent.expect("the reactor runs");
    let error = too_long.expect_err("too long").to_string();
    assert_eq!(error, "GSSAPI: token of 65536 bytes is too long (at most 65535)");
    next.expect("sent");
    let mut received = Vec::new();
    far.read_to_end(&mut received).expect("read");
    assert_eq!(received, [1, 1, 0, 1, 7]);
}
