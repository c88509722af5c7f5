//! Sends random bytes in random pieces to a connection with GSSAPI protection, and random datagrams. They must not
//! panic. Frames that the context accepts must arrive unchanged.

#![no_main]

mod support;

use std::os::unix::net::UnixStream;

use futures_lite::future::zip;
use futures_lite::{AsyncReadExt as _, AsyncWriteExt as _};
use libfuzzer_sys::fuzz_target;
use s5::conn::{Conn, Protection, SecurityContext, TokenOrder, Unwrapped};
use s5::net::{Io, reactor, yield_now};
use s5::proto::{ProtectionLevel, Request};

/// A context whose tokens are a flag byte, a number and the data.
#[derive(Debug, Default)]
struct TestContext {
    sent: u8,
    received: u8,
}

impl SecurityContext for TestContext {
    fn wrap(&mut self, data: &[u8], should_encrypt: bool) -> Result<Vec<u8>, String> {
        self.sent = self.sent.wrapping_add(1);
        Ok([&[u8::from(should_encrypt), self.sent], data].concat())
    }

    fn unwrap(&mut self, token: &mut [u8]) -> Result<Unwrapped, String> {
        let [flag, number, data @ ..] = token else { return Err("no token".into()) };
        let order = match number.wrapping_sub(self.received) {
            1 => TokenOrder::Next,
            2..=100 => TokenOrder::OutOfOrder,
            _ => TokenOrder::Duplicate,
        };
        self.received = *number;
        Ok(Unwrapped { data: data.to_vec(), is_encrypted: *flag == 1, order })
    }

    fn wrap_size_limit(&self, _: bool) -> usize {
        65_533
    }
}

fn protection(level: ProtectionLevel) -> Protection {
    Protection::new(TestContext::default(), level).expect("a level with protection")
}

fn pair() -> (Conn, Conn) {
    let conn = |socket: UnixStream| {
        socket.set_nonblocking(true).expect("option set");
        Conn::Unix(Io::new(socket.into()).expect("registered"))
    };
    let (one, other) = UnixStream::pair().expect("socket pair");
    (conn(one), conn(other))
}

fuzz_target!(|bytes: &[u8]| {
    let [kind, rest @ ..] = bytes else { return };
    let level = if kind & 1 == 0 { ProtectionLevel::Integrity } else { ProtectionLevel::Confidentiality };
    let _ = protection(level).unwrap_datagram(&mut rest.to_vec());
    let pieces = support::pieces(rest);
    let run = async {
        let (mut plain, protected) = pair();
        let mut protected = protected.protect(protection(level));
        let send = async {
            for piece in &pieces {
                let _ = plain.write_all(piece).await;
                yield_now().await;
            }
            drop(plain);
        };
        let receive = async {
            if kind & 2 != 0 {
                let _ = protected.read_message::<Request>().await;
            }
            let _ = protected.read_to_end(&mut Vec::new()).await;
            // After an error, the sender must not wait for room in the socket.
            drop(protected);
        };
        zip(send, receive).await;
        // The same data as frames of a peer.
        let (one, other) = pair();
        let (mut sender, mut receiver) = (one.protect(protection(level)), other.protect(protection(level)));
        let send = async {
            for piece in &pieces {
                sender.write_all(piece).await.expect("written");
                sender.flush().await.expect("flushed");
            }
            sender.close().await.expect("closed");
        };
        let mut received = Vec::new();
        let (_, read) = zip(send, receiver.read_to_end(&mut received)).await;
        read.expect("read");
        assert_eq!(received, pieces.concat());
    };
    reactor::run(run).expect("the event loop runs");
});
