//! Protected streams of `s5::conn` with a simulated security context: framing, token sizes, order and end of stream.
//! tests/kerberos tests them with a Kerberos library.

use std::cell::Cell;

use futures_lite::future::{or, zip};
use futures_lite::{AsyncReadExt as _, AsyncWriteExt as _, FutureExt as _};
use proptest::collection::vec;
use proptest::prelude::*;
use s5::conn::{Conn, Protection, SecurityContext, TokenOrder, Unwrapped};
use s5::net::{ByteCounts, Io, RelayOptions, reactor, relay, sleep};
use s5::proto::{Addr, Command, Frame, Message as _, ProtectionLevel, Request};

use crate::*;

/// A security context whose tokens are a flag byte, a number byte and the data. Flag 1 means encrypted, which inverts
/// the data.
#[derive(Debug, Default)]
struct TestContext {
    sent: u8,
    received: u8,
}

impl SecurityContext for TestContext {
    fn wrap(&mut self, data: &[u8], should_encrypt: bool) -> Result<Vec<u8>, String> {
        self.sent = self.sent.wrapping_add(1);
        Ok(token(should_encrypt, self.sent, data))
    }

    fn unwrap(&mut self, token: &mut [u8]) -> Result<Unwrapped, String> {
        let [flag, number, ref data @ ..] = *token else { return Err("no token".into()) };
        let order = match number.wrapping_sub(self.received) {
            1 => TokenOrder::Next,
            2..=100 => TokenOrder::OutOfOrder,
            _ => TokenOrder::Duplicate,
        };
        self.received = number;
        let is_encrypted = flag == 1;
        Ok(Unwrapped {
            data: data.iter().map(|byte| if is_encrypted { !byte } else { *byte }).collect(),
            is_encrypted,
            order,
        })
    }

    fn wrap_size_limit(&self, _: bool) -> usize {
        65_533
    }
}

fn token(should_encrypt: bool, number: u8, data: &[u8]) -> Vec<u8> {
    let data = data.iter().map(|byte| if should_encrypt { !byte } else { *byte });
    [u8::from(should_encrypt), number].into_iter().chain(data).collect()
}

fn frame(should_encrypt: bool, number: u8, data: &[u8]) -> Vec<u8> {
    Frame::Data(token(should_encrypt, number, data)).encode()
}

fn protection(level: ProtectionLevel) -> Protection {
    Protection::new(TestContext::default(), level).expect("a level with protection")
}

fn conn(socket: UnixStream) -> Conn {
    socket.set_nonblocking(true).expect("option set");
    Conn::Unix(Io::new(socket.into()).expect("registered with the event loop"))
}

fn plain_pair() -> (Conn, Conn) {
    let (one, other) = UnixStream::pair().expect("socket pair created");
    (conn(one), conn(other))
}

/// Returns a protected connection and its other end, which is unprotected.
fn protected_and_plain(level: ProtectionLevel) -> (Conn, Conn) {
    let (protected, plain) = plain_pair();
    (protected.protect(protection(level)), plain)
}

fn protected_pair(level: ProtectionLevel) -> (Conn, Conn) {
    let (protected, plain) = protected_and_plain(level);
    (protected, plain.protect(protection(level)))
}

fn run<T>(future: impl Future<Output = T>) -> T {
    let timeout = async {
        // A relay of 12 MB takes 4 s of CPU in a debug build, and other tests run at the same time.
        sleep(Duration::from_secs(60)).await;
        panic!("took longer than 60 s")
    };
    reactor::run(or(future, timeout)).expect("reactor created")
}

/// Sends these pieces and closes. Returns the bytes that the other end reads and the error, if any.
fn transfer(mut from: Conn, mut to: Conn, pieces: &[&[u8]]) -> (Vec<u8>, Option<ErrorKind>) {
    let send = async {
        for piece in pieces {
            // The receiver can close early.
            let _ = from.write_all(piece).await;
            futures_lite::future::yield_now().await;
        }
        let _ = from.close().await;
    };
    let receive = async {
        let mut all = Vec::new();
        let end = to.read_to_end(&mut all).await.err().map(|error| error.kind());
        (all, end)
    };
    run(zip(send, receive)).1
}

/// Sends these bytes to a protected connection. Returns the data that it reads and the error, if any.
fn read_all(level: ProtectionLevel, bytes: &[u8]) -> (Vec<u8>, Option<ErrorKind>) {
    let (protected, plain) = protected_and_plain(level);
    transfer(plain, protected, &[bytes])
}

#[test]
fn level_none_creates_no_protection() {
    assert!(Protection::new(TestContext::default(), ProtectionLevel::None).is_none());
}

#[test]
fn messages_and_data_pass_at_both_levels() {
    for level in [ProtectionLevel::Integrity, ProtectionLevel::Confidentiality] {
        let (mut client, mut server) = protected_pair(level);
        assert_eq!(client.protection().map(Protection::level), Some(level));
        run(async {
            let request = Request { command: Command::Connect, dst: Addr::UNSPECIFIED };
            client.write_message(&request).await.expect("data sent");
            assert_eq!(server.read_message::<Request>().await.expect("request received"), request);
            server.write_all(b"hello").await.expect("data sent");
            server.close().await.expect("closed");
            let mut all = String::new();
            client.read_to_string(&mut all).await.expect("data received");
            assert_eq!(all, "hello");
        });
    }
}

#[test]
fn confidentiality_encrypts_the_data() {
    let (protected, plain) = protected_and_plain(ProtectionLevel::Confidentiality);
    assert_eq!(transfer(protected, plain, &[b"secret"]), (frame(true, 1, b"secret"), None));
}

#[test]
fn written_data_is_wrapped_into_tokens_of_at_most_16_kib() {
    let (protected, plain) = protected_and_plain(ProtectionLevel::Integrity);
    let data: Vec<u8> = (0..100_000_u32).map(|n| n.to_le_bytes()[1]).collect();
    let frames: Vec<u8> =
        (1..).zip(data.chunks(16_384)).flat_map(|(number, data)| frame(false, number, data)).collect();
    assert!(transfer(protected, plain, &[&data]) == (frames, None));
}

#[test]
fn tokens_of_any_size_are_read_and_empty_ones_are_skipped() {
    let longest = vec![7; 65_533];
    let bytes = [frame(true, 1, &longest), frame(true, 2, b""), frame(true, 3, b"x")].concat();
    let (all, end) = read_all(ProtectionLevel::Confidentiality, &bytes);
    assert_eq!((all.len(), end), (65_534, None));
    let empty: Vec<u8> = (1..=200).flat_map(|number| frame(true, number, b"")).collect();
    assert_eq!(read_all(ProtectionLevel::Confidentiality, &empty), (vec![], None));
}

#[test]
fn end_of_stream_within_a_frame_is_an_error() {
    let bytes = [frame(false, 1, b"one"), frame(false, 2, b"two")].concat();
    for end in 0..=bytes.len() {
        let expected = match end {
            0 => (vec![], None),
            9 => (b"one".to_vec(), None),
            18 => (b"onetwo".to_vec(), None),
            1..9 => (vec![], Some(ErrorKind::UnexpectedEof)),
            _ => (b"one".to_vec(), Some(ErrorKind::UnexpectedEof)),
        };
        assert_eq!(read_all(ProtectionLevel::Integrity, &bytes[..end]), expected, "{end} bytes");
    }
}

#[test]
fn invalid_token_ends_the_stream() {
    use ProtectionLevel::{Confidentiality, Integrity};
    let bad = Some(ErrorKind::InvalidData);
    let ok = frame(true, 1, b"ok");
    let table = [
        ("not encrypted at level 2", Confidentiality, frame(false, 2, b"x"), bad),
        ("encrypted at level 1", Integrity, frame(true, 2, b"x"), None),
        ("a duplicate", Confidentiality, frame(true, 1, b"x"), bad),
        ("an old token", Confidentiality, frame(true, 200, b"x"), bad),
        ("a gap", Confidentiality, frame(true, 3, b"x"), bad),
        ("an empty token", Confidentiality, vec![1, 3, 0, 0], bad),
        ("another message type", Confidentiality, vec![1, 1, 0, 1, 0], bad),
        ("an abort", Confidentiality, vec![1, 0xff], bad),
        ("another version", Confidentiality, vec![5, 0, 0, 1], bad),
        ("clear text", Confidentiality, b"GET / HTTP/1.0".to_vec(), bad),
    ];
    for (case, level, bytes, end) in table {
        let data = if end.is_none() { "okx" } else { "ok" };
        assert_eq!(read_all(level, &[ok.clone(), bytes].concat()), (data.into(), end), "{case}");
    }
}

#[test]
fn flood_of_empty_tokens_does_not_starve_other_tasks() {
    let (mut protected, mut plain) = protected_and_plain(ProtectionLevel::Integrity);
    let yields = Cell::new(0);
    let flood = async {
        for number in 0_u32.. {
            if plain.write_all(&frame(false, number.wrapping_add(1).to_le_bytes()[0], b"")).await.is_err() {
                break;
            }
        }
    };
    let read = async { drop(protected.read(&mut [0; 16]).await) };
    let other = async {
        while yields.get() < 100 {
            yields.set(yields.get() + 1);
            futures_lite::future::yield_now().await;
        }
    };
    run(flood.or(read).or(other));
    assert_eq!(yields.get(), 100);
}

#[test]
fn relay_between_protected_streams_loses_no_data() {
    let ((mut client, mut client_side), (mut target_side, mut target)) =
        (protected_pair(ProtectionLevel::Confidentiality), protected_pair(ProtectionLevel::Integrity));
    let data: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let byte_counts = ByteCounts::default();
    let endpoints = async {
        let send = async {
            client.write_all(&data).await.expect("data sent");
            client.close().await.expect("closed");
        };
        let receive = async {
            let mut all = Vec::new();
            target.read_to_end(&mut all).await.expect("data received");
            assert!(all == data, "{} bytes", all.len());
            target.write_all(b"done").await.expect("data sent");
            target.close().await.expect("closed");
        };
        zip(send, receive).await;
        let mut all = String::new();
        client.read_to_string(&mut all).await.expect("data received");
        assert_eq!(all, "done");
    };
    let options = RelayOptions::default();
    let relayed = async {
        relay(&mut client_side, &mut target_side, &options, &byte_counts, |_, _| true).await.expect("relay succeeds")
    };
    run(zip(endpoints, relayed));
}

#[test]
fn protected_stream_can_carry_another_protected_stream() {
    let (sender, receiver) = protected_pair(ProtectionLevel::Integrity);
    let [sender, receiver] = [sender, receiver].map(|conn| conn.protect(protection(ProtectionLevel::Confidentiality)));
    assert_eq!(transfer(sender, receiver, &[b"twice"]), (b"twice".to_vec(), None));
}

#[test]
fn relay_flushes_all_layers_of_a_stream_into_a_full_socket() {
    let ((near, far), (mut client, mut client_side)) = (UnixStream::pair().expect("socket pair created"), plain_pair());
    // A frame of 10 000 bytes is longer than this buffer, and fits into one frame of the inner layer.
    SockRef::from(&near).set_send_buffer_size(1).expect("option set");
    let layers = |socket| {
        let inner = conn(socket).protect(protection(ProtectionLevel::Integrity));
        inner.protect(protection(ProtectionLevel::Confidentiality))
    };
    let (mut target_side, mut target, byte_counts) = (layers(near), layers(far), ByteCounts::default());
    let options = RelayOptions::default();
    let exchange = async {
        client.write_all(&[7; 10_000]).await.expect("data sent");
        // Neither further data nor the end of the stream flushes these bytes.
        target.read_exact(&mut [0; 10_000]).await.expect("data received");
    };
    run(or(exchange, async {
        let end = relay(&mut client_side, &mut target_side, &options, &byte_counts, |_, _| true).await;
        panic!("the relay has ended: {end:?}")
    }));
}

#[test]
fn datagrams_may_be_missing_but_duplicates_are_dropped() {
    let open = |protection: &Protection, number, should_encrypt| {
        protection.unwrap_datagram(&mut frame(should_encrypt, number, b"x"))
    };
    let (sender, receiver) =
        (protection(ProtectionLevel::Confidentiality), protection(ProtectionLevel::Confidentiality));
    let wrapped = sender.wrap(b"hello").expect("wrapped");
    assert!(wrapped.len() <= b"hello".len() + sender.max_overhead());
    assert_eq!(receiver.unwrap_datagram(&mut wrapped.clone()).as_deref(), Some(&b"hello"[..]));
    assert_eq!(receiver.unwrap_datagram(&mut wrapped.clone()), None, "a duplicate");
    assert_eq!(open(&receiver, 5, true).as_deref(), Some(&b"x"[..]), "tokens 2 to 4 are missing");
    assert_eq!(open(&receiver, 6, false), None, "not encrypted");
    assert_eq!(receiver.unwrap_datagram(&mut [1, 3, 0, 9, 1]), None, "not a frame");
    assert!(sender.wrap(&vec![0; 65_536]).is_err(), "too large for a token");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn stream_reads_the_same_data_from_any_pieces(
        data in vec(vec(any::<u8>(), 0..300), 1..20),
        pieces in vec(1_usize..400, 1..40),
    ) {
        let bytes: Vec<u8> = (1..).zip(&data).flat_map(|(number, data)| frame(true, number, data)).collect();
        let (mut rest, mut written, mut pieces) = (&bytes[..], Vec::new(), pieces.into_iter().cycle());
        while !rest.is_empty() {
            let (piece, later) = rest.split_at(pieces.next().map_or(1, |length| length.min(rest.len())));
            written.push(piece);
            rest = later;
        }
        let (protected, plain) = protected_and_plain(ProtectionLevel::Confidentiality);
        prop_assert_eq!(transfer(plain, protected, &written), (data.concat(), None));
    }
}
