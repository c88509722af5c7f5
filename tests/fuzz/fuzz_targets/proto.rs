//! Any octets as every message of RFC 1928, RFC 1929 and RFC 1961: no panic, nothing asked for behind the longest message, what
//! was read can be written and read again, and no more is allocated than is there.

#![no_main]

use std::alloc::System;
use std::fmt::Debug;

use libfuzzer_sys::fuzz_target;
use s5::proto::{Credentials, Datagram, Frame, Greeting, Message, Reply, Request, MethodSelection, LoginStatus, DecodeError};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

fuzz_target!(|octets: &[u8]| {
    check::<Greeting>(octets);
    check::<MethodSelection>(octets);
    check::<Credentials>(octets);
    check::<LoginStatus>(octets);
    check::<Request>(octets);
    check::<Reply>(octets);
    check::<Frame>(octets);
    check_datagram(octets);
});

/// Runs `decode`, which may allocate as many octets as there are at the most.
fn bounded<T>(octets: &[u8], decode: impl FnOnce() -> T) -> T {
    let region = Region::new(ALLOCATOR);
    let result = decode();
    let allocated = region.change().bytes_allocated;
    assert!(allocated <= octets.len(), "{allocated} octets allocated for {}", octets.len());
    result
}

fn check<M: Message + Debug + PartialEq>(octets: &[u8]) {
    let decoded = bounded(octets, || M::decode(octets));
    let have = octets.len();
    match decoded {
        Ok(message) => {
            let again = message.encode();
            assert!((M::MIN_LEN..=M::MAX_LEN).contains(&again.len()));
            assert_eq!(M::decode(&again), Ok(message));
        }
        Err(DecodeError::Incomplete(n)) => {
            assert!(n >= 1 && have + n <= M::MAX_LEN, "{n} octets asked for behind {have}");
            check_prefix::<M>(octets);
        }
        Err(DecodeError::Invalid(error)) => {
            assert!(!error.to_string().is_empty());
            assert_eq!(M::decode(&[octets, &[0; 8]].concat()), Err(DecodeError::Invalid(error)), "an error is final");
        }
    }
}

/// What is a prefix of a message now was one an octet ago.
fn check_prefix<M: Message + Debug>(octets: &[u8]) {
    if let Some((_, shorter)) = octets.split_last() {
        let stop = M::decode(shorter).expect_err("no message yet");
        assert!(matches!(stop, DecodeError::Incomplete(_)), "{stop:?} an octet ago");
    }
}

fn check_datagram(octets: &[u8]) {
    let decoded = bounded(octets, || Datagram::decode(octets));
    if let Ok(datagram) = decoded {
        let mut again = Vec::new();
        datagram.encode_into(&mut again);
        assert_eq!(again.get(2..), octets.get(2..));
        assert!(again.len() - datagram.data.len() <= Datagram::MAX_HEADER_LEN);
    }
}
