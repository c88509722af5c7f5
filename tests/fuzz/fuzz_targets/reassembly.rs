//! Pushes random datagrams at random times to a reassembly queue. The queue must not panic, hold or return more than
//! one UDP payload, or hold memory after its timeout. Also fragments and reassembles random payloads with random
//! limits.

#![no_main]

use std::alloc::System;
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use s5::proto::{Datagram, MAX_UDP6_PAYLOAD};
use s5::reassembly::{REASSEMBLY_TIMEOUT, Reassembler, fragment};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Upper limit for the memory of the queue in bytes. A vector grows by doubling, and 1024 bytes are for DST.
const MAX_HELD: usize = 2 * MAX_UDP6_PAYLOAD + 1024;

fuzz_target!(|bytes: &[u8]| {
    let region = Region::new(ALLOCATOR);
    let held = || region.change().bytes_allocated.saturating_sub(region.change().bytes_deallocated);
    let (mut queue, mut now) = (Reassembler::default(), Instant::now());
    let mut rest = bytes;
    // The input is a sequence of: pause in 1/64 s, padding in units of 256 bytes, length of a datagram, datagram.
    while let [pause, padding, length, tail @ ..] = rest {
        now += Duration::from_millis(u64::from(*pause) * 1000 / 64);
        let (raw, tail) = tail.split_at(usize::from(*length).min(tail.len()));
        rest = tail;
        push(&mut queue, now, raw, usize::from(*padding) * 256);
        assert!(held() <= MAX_HELD, "{} bytes held", held());
    }
    queue.expire(now + REASSEMBLY_TIMEOUT);
    assert_eq!(queue.deadline(), None);
    assert!(held() <= 64, "{} bytes held by an empty queue", held());
    check_fragment(bytes);
});

/// Pushes a datagram with `padding` bytes appended to its data.
fn push(queue: &mut Reassembler, now: Instant, raw: &[u8], padding: usize) {
    let bytes = [raw, &vec![0; padding]].concat();
    let Ok(datagram) = Datagram::decode(&bytes) else { return };
    let frag = datagram.frag;
    let complete = queue.push(now, datagram);
    assert!(frag & 0x7f != 0 || complete.is_some() == (frag == 0), "FRAG {frag}");
    assert!(frag == 0 || frag >= 0x80 || complete.is_none(), "complete after FRAG {frag}");
    assert!(complete.is_none_or(|(_, data)| data.len() <= MAX_UDP6_PAYLOAD));
}

/// Fragments the payload of a datagram and reassembles it.
fn check_fragment(bytes: &[u8]) {
    let Ok(datagram) = Datagram::decode(bytes) else { return };
    let limit = usize::from(datagram.frag) * 4;
    let Some(parts) = fragment(&datagram.dst, datagram.data, limit) else { return };
    assert!(parts.len() <= 127);
    let (mut queue, now) = (Reassembler::default(), Instant::now());
    let mut complete = None;
    for part in &parts {
        assert!(part.len() <= limit && complete.is_none());
        complete = queue.push(now, Datagram::decode(part).expect("valid datagram"));
    }
    let (dst, data) = complete.expect("complete at the last fragment");
    assert_eq!((dst, &*data), (datagram.dst, datagram.data));
}
