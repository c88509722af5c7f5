//! Decodes random bytes as a header of the PROXY protocol, whole and in pieces. Decoding must not panic or allocate, must
//! not request more than the longest header, and must not depend on the pieces or on the bytes after the header.

#![no_main]

use std::alloc::System;

use libfuzzer_sys::fuzz_target;
use s5::proto::{DecodeError, Message, ProxyHeader};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    // Most random bytes begin no header.
    let start: &[u8] = match kind % 4 {
        0 => b"PROXY TCP4 ",
        1 => b"PROXY TCP6 ",
        2 => b"\r\n\r\n\0\r\nQUIT\n\x21",
        _ => b"",
    };
    let bytes = &[start, bytes].concat()[..];
    let region = Region::new(ALLOCATOR);
    let whole = ProxyHeader::decode_prefix(bytes);
    // A port is formatted to find leading zeros.
    assert!(region.change().bytes_allocated <= 64);
    let first = (0..=bytes.len()).map(|n| &bytes[..n]).find_map(|piece| match ProxyHeader::decode(piece) {
        Err(DecodeError::Incomplete(n)) => {
            assert!(n >= 1 && piece.len() + n <= ProxyHeader::MAX_LEN, "{n} bytes requested after {}", piece.len());
            None
        }
        done => Some((piece.len(), done)),
    });
    match (whole, first) {
        (Err(DecodeError::Incomplete(_)), None) => {}
        (Err(DecodeError::Invalid(_)), Some((_, Err(error)))) => assert_eq!(ProxyHeader::decode(bytes), Err(error)),
        (Ok((header, rest)), Some((len, Ok(in_pieces)))) => {
            assert_eq!((header, bytes.len() - rest.len()), (in_pieces, len));
            assert!(header.client.is_none_or(|client| client.port() != 0 && !client.ip().is_unspecified()));
        }
        other => panic!("{other:?}"),
    }
});
