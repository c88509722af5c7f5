//! `s5::conn`'s protected streams with a toy for a security context: framing, sizes, order, and where they end. What a
//! real library makes of it is tests/kerberos.rs.

use std::cell::Cell;
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use futures_lite::future::or;
use futures_lite::{AsyncReadExt as _, AsyncWriteExt as _, FutureExt as _};
use proptest::collection::vec;
use proptest::prelude::*;
use s5::conn::{Conn, Protection, SecurityContext, TokenOrder, Unwrapped};
use s5::proto::{Addr, Command, Frame, Message as _, ProtectionLevel, Request};
use s5::reactor::Io;
use s5::relay::{ByteCounts, RelayOptions, relay};

/// Numbers its tokens, and turns their octets around to seal them: `seal number data`.
#[derive(Debug, Default)]
struct Toy {
    sent: u8,
    received: u8,
}

impl SecurityContext for Toy {
    fn wrap(&mut self, data: &[u8], encrypt: bool) -> Result<Vec<u8>, String> {
        self.sent = self.sent.wrapping_add(1);
        Ok(token(encrypt, self.sent, data))
    }

    fn unwrap(&mut self, token: &mut [u8]) -> Result<Unwrapped, String> {
        let [encrypt, number, ref data @ ..] = *token else { return Err("no token".into()) };
        let order = match number.wrapping_sub(self.received) {
            1 => TokenOrder::Next,
            2..=100 => TokenOrder::OutOfOrder,
            _ => TokenOrder::Duplicate,
        };
        self.received = number;
        let is_encrypted = encrypt == 1;
        Ok(Unwrapped {
            data: data.iter().map(|octet| if is_encrypted { !octet } else { *octet }).collect(),
            is_encrypted,
            order,
        })
    }

    fn wrap_size_limit(&self, _: bool) -> usize {
        65_533
    }
}

fn token(encrypt: bool, number: u8, data: &[u8]) -> Vec<u8> {
    let data = data.iter().map(|octet| if encrypt { !octet } else { *octet });
    [u8::from(encrypt), number].into_iter().chain(data).collect()
}

fn frame(encrypt: bool, number: u8, data: &[u8]) -> Vec<u8> {
    Frame::Data(token(encrypt, number, data)).encode()
}

fn protection(level: ProtectionLevel) -> Protection {
    Protection::new(Toy::default(), level).expect("a level that protects")
}

fn conn(socket: UnixStream) -> Conn {
    socket.set_nonblocking(true).expect("a socket");
    Conn::Unix(Io::new(socket).expect("a socket that can be waited for"))
}

/// A protected connection, and its other end as it is.
fn half(level: ProtectionLevel) -> (Conn, Conn) {
    let (near, far) = UnixStream::pair().expect("a pair of sockets");
    (conn(near).protect(protection(level)), conn(far))
}

fn both(level: ProtectionLevel) -> (Conn, Conn) {
    let (near, far) = half(level);
    (near, far.protect(protection(level)))
}

fn soon<T>(future: impl Future<Output = T>) -> T {
    smol::block_on(or(future, async {
        smol::Timer::after(Duration::from_secs(10)).await;
        panic!("not within 10 s")
    }))
}

/// What a protected connection makes of these octets: what it reads, and how that ends.
fn read_all(level: ProtectionLevel, octets: &[u8]) -> (Vec<u8>, Option<ErrorKind>) {
    let (mut near, mut far) = half(level);
    soon(async {
        let send = async {
            let _ = far.write_all(octets).await;
            let _ = far.close().await;
        };
        let receive = async {
            let mut all = Vec::new();
            let end = near.read_to_end(&mut all).await.err().map(|error| error.kind());
            (all, end)
        };
        futures_lite::future::zip(send, receive).await.1
    })
}

#[test]
fn level_none_protects_nothing() {
    assert!(Protection::new(Toy::default(), ProtectionLevel::None).is_none());
}

#[test]
fn messages_and_streams_go_through_at_either_level() {
    for level in [ProtectionLevel::Integrity, ProtectionLevel::Confidentiality] {
        let (mut near, mut far) = both(level);
        assert_eq!(near.protection().map(Protection::level), Some(level));
        soon(async {
            let request = Request { command: Command::Connect, dst: Addr::UNSPECIFIED };
            near.write_message(&request).await.expect("it is sent");
            assert_eq!(far.read_message::<Request>().await.expect("a request"), request);
            far.write_all(b"hello").await.expect("it is sent");
            far.close().await.expect("it is closed");
            let mut all = String::new();
            near.read_to_string(&mut all).await.expect("it is read");
            assert_eq!(all, "hello");
        });
    }
}

#[test]
fn nothing_can_be_read_of_what_is_sealed() {
    let (mut near, mut far) = half(ProtectionLevel::Confidentiality);
    soon(async {
        near.write_all(b"secret").await.expect("it is sent");
        near.close().await.expect("it is closed");
        let mut all = Vec::new();
        far.read_to_end(&mut all).await.expect("it is read");
        assert_eq!(all, frame(true, 1, b"secret"));
    });
}

#[test]
fn what_is_sent_comes_in_tokens_of_at_most_16_kib() {
    let (mut near, mut far) = half(ProtectionLevel::Integrity);
    let data: Vec<u8> = (0..100_000_u32).map(|n| n.to_le_bytes()[1]).collect();
    soon(async {
        let send = async {
            near.write_all(&data).await.expect("it is sent");
            near.close().await.expect("it is closed");
        };
        let receive = async {
            let (mut all, mut sizes) = (Vec::<u8>::new(), Vec::new());
            while let Ok(Frame::Data(token)) = far.read_message().await {
                sizes.push(token.len() - 2);
                all.extend(&token[2..]);
            }
            assert_eq!(sizes, [16_384, 16_384, 16_384, 16_384, 16_384, 16_384, 1696]);
            assert!(all == data);
        };
        futures_lite::future::zip(send, receive).await;
    });
}

#[test]
fn tokens_of_any_size_are_taken_and_empty_ones_are_nothing() {
    let longest = vec![7; 65_533];
    let octets = [frame(true, 1, &longest), frame(true, 2, b""), frame(true, 3, b"x")].concat();
    let (all, end) = read_all(ProtectionLevel::Confidentiality, &octets);
    assert_eq!((all.len(), end), (65_534, None));
    let empty: Vec<u8> = (1..=200).flat_map(|number| frame(true, number, b"")).collect();
    assert_eq!(read_all(ProtectionLevel::Confidentiality, &empty), (vec![], None));
}

#[test]
fn an_end_between_frames_is_one_and_an_end_inside_of_one_is_a_fault() {
    let octets = [frame(false, 1, b"one"), frame(false, 2, b"two")].concat();
    for end in 0..=octets.len() {
        let expected = match end {
            0 => (vec![], None),
            9 => (b"one".to_vec(), None),
            18 => (b"onetwo".to_vec(), None),
            1..9 => (vec![], Some(ErrorKind::UnexpectedEof)),
            _ => (b"one".to_vec(), Some(ErrorKind::UnexpectedEof)),
        };
        assert_eq!(read_all(ProtectionLevel::Integrity, &octets[..end]), expected, "{end} octets");
    }
}

#[test]
fn what_is_not_as_it_was_agreed_ends_the_stream() {
    use ProtectionLevel::{Confidentiality, Integrity};
    let bad = Some(ErrorKind::InvalidData);
    let ok = frame(true, 1, b"ok");
    let table = [
        ("unsealed at level 2", Confidentiality, frame(false, 2, b"x"), bad),
        ("sealed at level 1", Integrity, frame(true, 2, b"x"), None),
        ("a duplicate", Confidentiality, frame(true, 1, b"x"), bad),
        ("an old one", Confidentiality, frame(true, 200, b"x"), bad),
        ("a gap", Confidentiality, frame(true, 3, b"x"), bad),
        ("an empty token", Confidentiality, vec![1, 3, 0, 0], bad),
        ("another message type", Confidentiality, vec![1, 1, 0, 1, 0], bad),
        ("an abort", Confidentiality, vec![1, 0xff], bad),
        ("another version", Confidentiality, vec![5, 0, 0, 1], bad),
        ("clear text", Confidentiality, b"GET / HTTP/1.0".to_vec(), bad),
    ];
    for (what, level, octets, end) in table {
        let data = if end.is_none() { "okx" } else { "ok" };
        assert_eq!(read_all(level, &[ok.clone(), octets].concat()), (data.into(), end), "{what}");
    }
}

#[test]
fn a_flood_of_nothing_lets_others_have_their_turn() {
    let (mut near, mut far) = half(ProtectionLevel::Integrity);
    let turns = Cell::new(0);
    let flood = async {
        for number in 0_u32.. {
            if far.write_all(&frame(false, number.wrapping_add(1).to_le_bytes()[0], b"")).await.is_err() {
                break;
            }
        }
    };
    let read = async { drop(near.read(&mut [0; 16]).await) };
    let other = async {
        while turns.get() < 100 {
            turns.set(turns.get() + 1);
            futures_lite::future::yield_now().await;
        }
    };
    soon(flood.or(read).or(other));
    assert_eq!(turns.get(), 100);
}

#[test]
fn a_relay_between_protected_streams_loses_nothing() {
    let ((mut client, mut near), (mut server, mut far)) =
        (both(ProtectionLevel::Confidentiality), both(ProtectionLevel::Integrity));
    let data: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let moved = ByteCounts::default();
    let play = async {
        let send = async {
            client.write_all(&data).await.expect("it is sent");
            client.close().await.expect("it is closed");
        };
        let receive = async {
            let mut all = Vec::new();
            far.read_to_end(&mut all).await.expect("it is read");
            assert!(all == data, "{} octets", all.len());
            far.write_all(b"done").await.expect("it is sent");
            far.close().await.expect("it is closed");
        };
        futures_lite::future::zip(send, receive).await;
        let mut all = String::new();
        client.read_to_string(&mut all).await.expect("it is read");
        assert_eq!(all, "done");
    };
    let limits = RelayOptions::default();
    let relayed = async { relay(&mut near, &mut server, &limits, &moved, |_, _| true).await.expect("it ends well") };
    soon(futures_lite::future::zip(play, relayed));
}

#[test]
fn one_protected_stream_can_carry_another() {
    let (near, far) = both(ProtectionLevel::Integrity);
    let (mut near, mut far) = (
        near.protect(protection(ProtectionLevel::Confidentiality)),
        far.protect(protection(ProtectionLevel::Confidentiality)),
    );
    soon(async {
        near.write_all(b"twice").await.expect("it is sent");
        near.flush().await.expect("it is sent");
        let mut all = [0; 5];
        far.read_exact(&mut all).await.expect("it is read");
        assert_eq!(&all, b"twice");
    });
}

#[test]
fn datagrams_may_be_late_or_missing_and_are_taken_once() {
    let open = |protection: &Protection, number, encrypt| protection.unwrap_datagram(&mut frame(encrypt, number, b"x"));
    let (sender, receiver) =
        (protection(ProtectionLevel::Confidentiality), protection(ProtectionLevel::Confidentiality));
    let wrapped = sender.wrap(b"hello").expect("it is wrapped");
    assert!(wrapped.len() <= b"hello".len() + sender.max_overhead());
    assert_eq!(receiver.unwrap_datagram(&mut wrapped.clone()).as_deref(), Some(&b"hello"[..]));
    assert_eq!(receiver.unwrap_datagram(&mut wrapped.clone()), None, "a duplicate");
    assert_eq!(open(&receiver, 5, true).as_deref(), Some(&b"x"[..]), "some are missing");
    assert_eq!(open(&receiver, 6, false), None, "unsealed");
    assert_eq!(receiver.unwrap_datagram(&mut [1, 3, 0, 9, 1]), None, "no frame");
    assert!(sender.wrap(&vec![0; 65_536]).is_err(), "too large for a token");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn however_frames_are_cut_the_same_octets_come_out(
        data in vec(vec(any::<u8>(), 0..300), 1..20),
        pieces in vec(1_usize..400, 1..40),
    ) {
        let mut octets = Vec::new();
        for (number, data) in (1..).zip(&data) {
            octets.extend(frame(true, number, data));
        }
        let (mut near, mut far) = half(ProtectionLevel::Confidentiality);
        let all = soon(async {
            let send = async {
                let mut rest = &octets[..];
                for piece in pieces.iter().cycle() {
                    if rest.is_empty() {
                        break;
                    }
                    let (now, later) = rest.split_at((*piece).min(rest.len()));
                    far.write_all(now).await.expect("it is sent");
                    futures_lite::future::yield_now().await;
                    rest = later;
                }
                far.close().await.expect("it is closed");
            };
            let receive = async {
                let mut all = Vec::new();
                near.read_to_end(&mut all).await.expect("it is read");
                all
            };
            futures_lite::future::zip(send, receive).await.1
        });
        prop_assert_eq!(all, data.concat());
    }
}
