//! Decodes random bytes as every message of RFC 1928, RFC 1929 and RFC 1961. Decoding must not panic, request more than
//! the longest message, or allocate more than its input. A decoded message must encode to bytes that decode to it.

#![no_main]

use std::alloc::System;
use std::fmt::Debug;

use libfuzzer_sys::fuzz_target;
use s5::proto::{
    Credentials, Datagram, DecodeError, Frame, Greeting, LoginStatus, Message, MethodSelection, Reply, Request,
};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

fuzz_target!(|bytes: &[u8]| {
    check::<Greeting>(bytes);
    check::<MethodSelection>(bytes);
    check::<Credentials>(bytes);
    check::<LoginStatus>(bytes);
    check::<Request>(bytes);
    check::<Reply>(bytes);
    check::<Frame>(bytes);
    check_datagram(bytes);
});

/// Runs `decode`. Fails if it allocates more than the length of its input.
fn with_bounded_memory<T>(bytes: &[u8], decode: impl FnOnce() -> T) -> T {
    let region = Region::new(ALLOCATOR);
    let result = decode();
    let allocated = region.change().bytes_allocated;
    assert!(allocated <= bytes.len(), "{allocated} bytes allocated for {}", bytes.len());
    result
}

fn check<M: Message + Debug + PartialEq>(bytes: &[u8]) {
    let decoded = with_bounded_memory(bytes, || M::decode(bytes));
    let given = bytes.len();
    match decoded {
        Ok(message) => {
            let encoded = message.encode();
            assert!((M::MIN_LEN..=M::MAX_LEN).contains(&encoded.len()));
            assert_eq!(M::decode(&encoded), Ok(message));
        }
        Err(DecodeError::Incomplete(n)) => {
            assert!(n >= 1 && given + n <= M::MAX_LEN, "{n} bytes requested after {given}");
            check_prefix::<M>(bytes);
        }
        Err(DecodeError::Invalid(error)) => {
            assert!(!error.to_string().is_empty());
            assert_eq!(
                M::decode(&[bytes, &[0; 8]].concat()),
                Err(DecodeError::Invalid(error)),
                "more bytes changed the error"
            );
        }
    }
}

/// Checks that a prefix of an incomplete message is incomplete.
fn check_prefix<M: Message + Debug>(bytes: &[u8]) {
    if let Some((_, shorter)) = bytes.split_last() {
        let error = M::decode(shorter).expect_err("incomplete");
        assert!(matches!(error, DecodeError::Incomplete(_)), "{error:?} one byte before");
    }
}

fn check_datagram(bytes: &[u8]) {
    let decoded = with_bounded_memory(bytes, || Datagram::decode(bytes));
    if let Ok(datagram) = decoded {
        let mut encoded = Vec::new();
        datagram.encode_into(&mut encoded);
        assert_eq!(encoded.get(2..), bytes.get(2..));
        assert!(encoded.len() - datagram.data.len() <= Datagram::MAX_HEADER_LEN);
    }
}
