//! Fragmentation and reassembly of datagrams (RFC 1928 section 7) with a simulated clock: single cases, and random
//! datagrams compared with a reference model.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use s5::proto::{Addr, Datagram, Host, HostName, MAX_UDP6_PAYLOAD};
use s5::reassembly::{REASSEMBLY_TIMEOUT, Reassembler, fragment};

use crate::*;

/// Bit of FRAG that marks the last fragment.
const LAST: u8 = 0x80;

fn dst(port: u16) -> Addr {
    SocketAddr::from(([192, 0, 2, 1], port)).into()
}

/// Pushes datagrams for one DST at one time. Returns the data of the completed ones.
fn push_all(queue: &mut Reassembler, now: Instant, datagrams: &[(u8, &str)]) -> Vec<String> {
    let push = |(frag, data): &(u8, &str)| {
        let (addr, complete) = queue.push(now, Datagram { frag: *frag, dst: dst(53), data: data.as_bytes() })?;
        assert_eq!(addr, dst(53));
        Some(String::from_utf8(complete.into_owned()).expect("UTF-8"))
    };
    datagrams.iter().filter_map(push).collect()
}

#[test]
fn sequence_is_complete_at_its_last_fragment_or_dropped() {
    // Datagrams of an empty queue, the completed ones, and whether the queue is empty then.
    type Case<'a> = (&'a [(u8, &'a str)], &'a [&'a str], bool);
    let table: [Case<'_>; 26] = [
        // FRAG 0 is complete, and empties the queue.
        (&[(0, "a"), (0, ""), (0, "b"), (0, "b")], &["a", "", "b", "b"], true),
        (&[(1, "a"), (0, "alone"), (2 | LAST, "b")], &["alone"], true),
        // Fragments in order.
        (&[(1, "a"), (2, "b"), (3 | LAST, "c")], &["abc"], true),
        (&[(1, "a"), (2, "b")], &[], false),
        (&[(1, "a"), (2, ""), (3 | LAST, "")], &["a"], true),
        (&[(1, "a"), (2 | LAST, "b"), (1, "c"), (2 | LAST, "d")], &["ab", "cd"], true),
        (&[(1 | LAST, "one")], &["one"], true),
        (&[(1, "a"), (2, "b"), (1 | LAST, "one")], &["one"], true),
        // The last fragment without the first.
        (&[(2 | LAST, "b")], &[], true),
        (&[(2 | LAST, "b"), (1, "a")], &[], false),
        (&[(3 | LAST, "c"), (2, "b"), (1, "a")], &[], false),
        (&[(2, "b"), (3 | LAST, "c")], &[], true),
        // A lower FRAG empties the queue; FRAG 1 starts a new sequence.
        (&[(1, "a"), (2, "b"), (3, "c"), (2, "b"), (4 | LAST, "d")], &[], true),
        (&[(1, "a"), (2, "b"), (3, "c"), (2, "b"), (3, "c"), (4 | LAST, "d")], &[], true),
        (&[(1, "a"), (2, "b"), (1, "c"), (2 | LAST, "d")], &["cd"], true),
        (&[(1, "a"), (1, "c"), (2 | LAST, "d")], &["cd"], true),
        (&[(1, "a"), (2, "b"), (1, "c"), (3 | LAST, "d")], &[], true),
        // A duplicate of the last fragment is ignored.
        (&[(1, "a"), (1, "a"), (2, "b"), (2, "b"), (2, "b"), (3 | LAST, "c")], &["abc"], true),
        (&[(1, "a"), (2, ""), (2, ""), (3 | LAST, "c")], &["ac"], true),
        (&[(1, "a"), (2 | LAST, "b"), (2 | LAST, "b")], &["ab"], true),
        // The same FRAG with other data, and a gap, empty the queue.
        (&[(1, "a"), (2, "b"), (2, "x"), (3 | LAST, "c")], &[], true),
        (&[(1, "a"), (2, "b"), (2, "ab"), (3 | LAST, "c")], &[], true),
        (&[(1, "a"), (3 | LAST, "c")], &[], true),
        (&[(1, "a"), (3, "c"), (2, "b"), (3, "c"), (4 | LAST, "d")], &[], true),
        // Position 0 with the end flag is dropped, and empties the queue.
        (&[(LAST, "nothing")], &[], true),
        (&[(1, "a"), (LAST, "nothing"), (2 | LAST, "b")], &[], true),
    ];
    for (datagrams, complete, is_empty) in table {
        let (mut queue, now) = (Reassembler::default(), Instant::now());
        assert_eq!(push_all(&mut queue, now, datagrams), complete, "{datagrams:?}");
        assert_eq!(queue.deadline().is_none(), is_empty, "{datagrams:?}: {:?}", queue.deadline());
        let next = push_all(&mut queue, now, &[(1, "ne"), (2 | LAST, "w")]);
        assert_eq!((next, queue.deadline()), (vec!["new".into()], None), "after {datagrams:?}");
    }
}

#[test]
fn fragment_for_an_address_written_as_a_name_empties_the_queue() {
    let (mut queue, now) = (Reassembler::default(), Instant::now());
    let by_name = Addr { host: Host::Name(HostName::new(b"192.0.2.1").expect("valid host name")), port: 53 };
    assert_eq!(queue.push(now, Datagram { frag: 1, dst: dst(53), data: b"x" }), None);
    assert_eq!(queue.push(now, Datagram { frag: 2 | LAST, dst: by_name, data: b"x" }), None);
    assert_eq!(queue.deadline(), None);
}

#[test]
fn sequence_has_at_most_127_fragments() {
    let (mut queue, now) = (Reassembler::default(), Instant::now());
    for position in 1..=126 {
        assert_eq!(queue.push(now, Datagram { frag: position, dst: dst(1), data: &[position] }), None);
    }
    let (_, complete) = queue.push(now, Datagram { frag: 127 | LAST, dst: dst(1), data: &[127] }).expect("complete");
    assert_eq!(*complete, (1..=127).collect::<Vec<u8>>());

    for position in 1..=127 {
        assert_eq!(queue.push(now, Datagram { frag: position, dst: dst(1), data: &[position] }), None);
    }
    for frag in [0xff, 0x80, 1] {
        assert_eq!(queue.push(now, Datagram { frag, dst: dst(1), data: b"x" }), None, "no fragment follows 127");
    }
}

#[test]
fn timeout_is_at_least_5_seconds_and_exact() {
    const { assert!(REASSEMBLY_TIMEOUT.as_secs() >= 5) };
    let start = Instant::now();
    let just_before = start + REASSEMBLY_TIMEOUT - Duration::from_nanos(1);

    let mut queue = Reassembler::default();
    assert_eq!(queue.deadline(), None);
    assert!(push_all(&mut queue, start, &[(1, "a")]).is_empty());
    assert_eq!(queue.deadline(), Some(start + REASSEMBLY_TIMEOUT));
    assert_eq!(push_all(&mut queue, just_before, &[(2 | LAST, "b")]), ["ab"]);

    assert!(push_all(&mut queue, start, &[(1, "a")]).is_empty());
    assert!(push_all(&mut queue, start + REASSEMBLY_TIMEOUT, &[(2 | LAST, "b")]).is_empty());
    assert_eq!(queue.deadline(), None);

    assert!(push_all(&mut queue, start, &[(1, "a")]).is_empty());
    queue.expire(just_before);
    assert!(queue.deadline().is_some());
    queue.expire(start + REASSEMBLY_TIMEOUT);
    assert_eq!(queue.deadline(), None);
}

#[test]
fn timeout_starts_at_the_first_fragment_and_is_never_extended() {
    let (mut queue, start) = (Reassembler::default(), Instant::now());
    let half = REASSEMBLY_TIMEOUT / 2;
    assert!(push_all(&mut queue, start, &[(1, "a")]).is_empty());
    assert!(push_all(&mut queue, start + half, &[(1, "a"), (2, "b"), (2, "b")]).is_empty());
    assert_eq!(queue.deadline(), Some(start + REASSEMBLY_TIMEOUT));
    assert!(push_all(&mut queue, start + half, &[(1, "anew")]).is_empty());
    assert_eq!(queue.deadline(), Some(start + half + REASSEMBLY_TIMEOUT));
    assert_eq!(push_all(&mut queue, start + REASSEMBLY_TIMEOUT, &[(2 | LAST, "!")]), ["anew!"]);

    assert!(push_all(&mut queue, start, &[(1, "a")]).is_empty());
    assert!(push_all(&mut queue, start + REASSEMBLY_TIMEOUT, &[(1, "a")]).is_empty(), "not a duplicate");
    assert_eq!(queue.deadline(), Some(start + 2 * REASSEMBLY_TIMEOUT));
}

#[test]
fn queue_holds_at_most_one_udp_payload() {
    let (mut queue, now) = (Reassembler::default(), Instant::now());
    let data = vec![7; MAX_UDP6_PAYLOAD];
    let push = |queue: &mut Reassembler, frag, length: usize| {
        let complete = queue.push(now, Datagram { frag, dst: dst(1), data: &data[..length] });
        complete.map(|(_, complete)| complete.len())
    };
    assert_eq!(push(&mut queue, 1, MAX_UDP6_PAYLOAD - 1), None);
    assert_eq!(push(&mut queue, 2 | LAST, 1), Some(65_527));

    assert_eq!(push(&mut queue, 1, MAX_UDP6_PAYLOAD - 1), None);
    assert_eq!(push(&mut queue, 2, 1), None);
    assert!(queue.deadline().is_some(), "the queue is empty before the limit");
    assert_eq!(push(&mut queue, 3, 1), None);
    assert_eq!(queue.deadline(), None, "the queue keeps one byte too many");
    assert_eq!(push(&mut queue, 4 | LAST, 0), None);

    assert_eq!(push(&mut queue, 1, MAX_UDP6_PAYLOAD), None);
    assert_eq!(push(&mut queue, 2 | LAST, 1), None, "too long with the last fragment");
    assert_eq!(push(&mut queue, 0, MAX_UDP6_PAYLOAD), Some(MAX_UDP6_PAYLOAD), "a datagram without fragments");
}

/// Reference model of RFC 1928 section 7: keeps all fragments and scans them each time.
#[derive(Default)]
struct Model {
    kept: Vec<(Addr, Vec<u8>)>,
    since: Option<Instant>,
}

impl Model {
    fn push(&mut self, now: Instant, frag: u8, dst: &Addr, data: &[u8]) -> Option<(Addr, Vec<u8>)> {
        if self.since.is_some_and(|since| now.saturating_duration_since(since) >= REASSEMBLY_TIMEOUT) {
            self.clear();
        }
        if frag == 0 {
            self.clear();
            return Some((dst.clone(), data.into()));
        }
        let (position, kept) = (usize::from(frag % 128), self.kept.len());
        let fragment = (dst.clone(), data.to_vec());
        if kept > 0 && position == kept && self.kept[kept - 1] == fragment {
            return None;
        }
        let follows = position == kept + 1 && self.kept.iter().all(|(other, _)| other == dst);
        if !follows {
            self.clear();
        }
        if follows || position == 1 {
            self.since.get_or_insert(now);
            self.kept.push(fragment);
        }
        let complete: Vec<u8> = self.kept.iter().flat_map(|(_, data)| data.iter().copied()).collect();
        if complete.len() > 65_507 {
            self.clear();
        }
        if frag < 128 || self.kept.is_empty() {
            return None;
        }
        self.clear();
        Some((dst.clone(), complete))
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}

/// Datagrams: FRAG, port of DST, data, and milliseconds since the previous datagram. Valid sequences are likely.
fn any_datagrams() -> impl Strategy<Value = Vec<(u8, u16, Vec<u8>, u64)>> {
    let position = prop_oneof![8 => 1_u8..5, 1 => Just(0), 1 => any::<u8>()];
    let frag = (position, prop_oneof![3 => Just(0), 1 => Just(LAST)]).prop_map(|(position, last)| position | last);
    let dst = prop_oneof![9 => Just(53_u16), 1 => Just(54)];
    let data = prop_oneof![9 => vec(0_u8..2, 0..2), 1 => Just(vec![0; 40_000])];
    let pause = prop_oneof![9 => Just(0_u64), 1 => 0_u64..9000];
    vec((frag, dst, data, pause), 0..40)
}

/// Sequences in order, some with repeated, missing or late fragments. Same fields as in [`any_datagrams`].
fn any_sequences() -> impl Strategy<Value = Vec<(u8, u16, Vec<u8>, u64)>> {
    let one = (0_u8..12, any::<bool>(), vec(any::<u8>(), 0..2), prop_oneof![6 => Just(0_u64), 1 => 0_u64..4000]);
    vec(one, 0..60).prop_map(|steps| {
        let mut position = 0;
        let mut datagrams = Vec::new();
        for (step, is_last, data, pause) in steps {
            position = match step {
                0 => position,
                1 => position + 2,
                2 => 0,
                _ => position + 1,
            } % 128;
            let frag = if is_last && step > 8 { position | LAST } else { position };
            datagrams.push((frag, 53, data, pause));
            position = if frag >= LAST { 0 } else { position };
        }
        datagrams
    })
}

/// Pushes datagrams to the queue and to the model, and compares the results.
fn compare(datagrams: Vec<(u8, u16, Vec<u8>, u64)>) -> Result<(), TestCaseError> {
    let (mut queue, mut model, mut now) = (Reassembler::default(), Model::default(), Instant::now());
    for (frag, port, data, pause) in datagrams {
        now += Duration::from_millis(pause);
        let complete = queue.push(now, Datagram { frag, dst: dst(port), data: &data });
        let complete = complete.map(|(to, data)| (to, data.into_owned()));
        prop_assert!(complete.as_ref().is_none_or(|(_, data)| data.len() <= MAX_UDP6_PAYLOAD));
        prop_assert_eq!(complete, model.push(now, frag, &dst(port), &data));
        prop_assert_eq!(queue.deadline(), model.since.map(|since| since + REASSEMBLY_TIMEOUT));
    }
    queue.expire(now + REASSEMBLY_TIMEOUT);
    prop_assert_eq!(queue.deadline(), None);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn random_datagrams_match_the_model(datagrams in prop_oneof![any_datagrams(), any_sequences()]) {
        compare(datagrams)?;
    }

    #[test]
    fn fragmented_payload_is_reassembled(
        name in option::of("[a-z]{1,255}"),
        length in prop_oneof![1 => Just(0), 4 => 0_usize..3000, 2 => 0..=MAX_UDP6_PAYLOAD],
        limit in prop_oneof![0_usize..700, 11..=MAX_UDP6_PAYLOAD],
    ) {
        let named = |name: String| Host::Name(HostName::new(name.as_bytes()).expect("valid host name"));
        check_fragment(&name.map_or(dst(53), |name| Addr { host: named(name), port: 53 }), length, limit)?;
    }
}

/// Fragments a payload and reassembles it. If it is not fragmented, checks that it needs more than 127 fragments.
fn check_fragment(dst: &Addr, length: usize, limit: usize) -> Result<(), TestCaseError> {
    let data: Vec<u8> = (0..length).map(|i| i.to_le_bytes()[0]).collect();
    let mut header = Vec::new();
    Datagram { frag: 0, dst: dst.clone(), data: &[] }.encode_into(&mut header);
    let max_data = limit.checked_sub(header.len());
    let Some(parts) = fragment(dst, &data, limit) else {
        let fits = max_data.is_some_and(|max| length <= 127 * max);
        prop_assert!(!fits, "{} bytes fit into 127 fragments of {}", length, limit);
        return Ok(());
    };
    prop_assert!((1..=127).contains(&parts.len()));
    for part in &parts {
        prop_assert!(part.len() <= limit, "{} bytes with a limit of {}", part.len(), limit);
    }
    if max_data.is_some_and(|max| length <= max) {
        prop_assert_eq!(parts.len(), 1, "a payload that fits is fragmented");
        prop_assert_eq!(parts[0][2], 0);
    }
    let (mut queue, now) = (Reassembler::default(), Instant::now());
    let (last, front) = parts.split_last().expect("at least one fragment");
    for part in front {
        prop_assert_eq!(queue.push(now, Datagram::decode(part).expect("valid datagram")), None);
    }
    let (to, complete) =
        queue.push(now, Datagram::decode(last).expect("valid datagram")).expect("complete at the last fragment");
    prop_assert_eq!((&to, &*complete), (dst, &data[..]));
    prop_assert_eq!(queue.deadline(), None);
    Ok(())
}

#[test]
fn payload_is_split_into_at_most_127_fragments() {
    let header = 10;
    let sizes = |length| {
        let parts = fragment(&dst(53), &vec![1; length], header + 100)?;
        Some((parts.len(), parts.last().map(|part| (part[2], part.len() - header))))
    };
    assert_eq!(sizes(100), Some((1, Some((0, 100)))));
    assert_eq!(sizes(101), Some((2, Some((2 | LAST, 1)))));
    assert_eq!(sizes(12_700), Some((127, Some((127 | LAST, 100)))));
    assert_eq!(sizes(12_701), None);
    assert_eq!(fragment(&dst(53), b"x", header), None, "no space after the header");
    assert_eq!(fragment(&dst(53), b"", header).map(|parts| parts.len()), Some(1));
    assert_eq!(fragment(&dst(53), b"", header - 1), None, "no space for the header");
}
