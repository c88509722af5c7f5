//! Fragmentation and reassembly of datagrams (RFC 1928 section 7) with a simulated clock: single cases, and random
//! datagrams compared with a reference model.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use proptest::collection::vec;
use proptest::prelude::*;
use s5::proto::{Addr, Datagram, Host, HostName, MAX_UDP6_PAYLOAD};
use s5::reassembly::{REASSEMBLY_TIMEOUT, Reassembler, fragment};

/// Bit of FRAG that marks the last fragment.
const LAST: u8 = 0x80;

fn config() -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::default() }
}

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

/// Pushes `datagrams` to an empty queue. Checks the completed datagrams and whether the queue `is_empty` after them.
/// Then checks that it reassembles the next sequence.
fn check(datagrams: &[(u8, &str)], complete: &[&str], is_empty: bool) {
    let (mut queue, now) = (Reassembler::default(), Instant::now());
    assert_eq!(push_all(&mut queue, now, datagrams), complete, "{datagrams:?}");
    assert_eq!(queue.deadline().is_none(), is_empty, "{datagrams:?}: {:?}", queue.deadline());
    assert_eq!(
        push_all(&mut queue, now, &[(1, "ne"), (2 | LAST, "w")]),
        ["new"],
        "the next sequence after {datagrams:?}"
    );
    assert_eq!(queue.deadline(), None);
}

#[test]
fn frag_0_is_a_complete_datagram() {
    check(&[(0, "alone")], &["alone"], true);
    check(&[(0, "")], &[""], true);
    check(&[(0, "a"), (0, "b"), (0, "b")], &["a", "b", "b"], true);
}

#[test]
fn fragments_in_order_are_complete_at_the_last_fragment() {
    check(&[(1, "a"), (2, "b"), (3 | LAST, "c")], &["abc"], true);
    check(&[(1, "a"), (2, "b")], &[], false);
    check(&[(1, "a"), (2, ""), (3 | LAST, "")], &["a"], true);
    check(&[(1, "a"), (2 | LAST, "b"), (1, "c"), (2 | LAST, "d")], &["ab", "cd"], true);
}

#[test]
fn single_fragment_with_end_flag_is_complete() {
    check(&[(1 | LAST, "one")], &["one"], true);
    check(&[(1, "a"), (2, "b"), (1 | LAST, "one")], &["one"], true);
}

#[test]
fn last_fragment_without_first_is_dropped() {
    check(&[(2 | LAST, "b")], &[], true);
    check(&[(2 | LAST, "b"), (1, "a")], &[], false);
    check(&[(3 | LAST, "c"), (2, "b"), (1, "a")], &[], false);
    check(&[(2, "b"), (3 | LAST, "c")], &[], true);
}

#[test]
fn lower_frag_empties_the_queue() {
    check(&[(1, "a"), (2, "b"), (3, "c"), (2, "b"), (4 | LAST, "d")], &[], true);
    check(&[(1, "a"), (2, "b"), (3, "c"), (2, "b"), (3, "c"), (4 | LAST, "d")], &[], true);
}

#[test]
fn frag_1_starts_a_new_sequence() {
    check(&[(1, "a"), (2, "b"), (1, "c"), (2 | LAST, "d")], &["cd"], true);
    check(&[(1, "a"), (1, "c"), (2 | LAST, "d")], &["cd"], true);
    check(&[(1, "a"), (2, "b"), (1, "c"), (3 | LAST, "d")], &[], true);
}

#[test]
fn frag_0_passes_and_empties_the_queue() {
    check(&[(1, "a"), (0, "alone"), (2 | LAST, "b")], &["alone"], true);
}

#[test]
fn duplicate_of_the_last_fragment_is_ignored() {
    check(&[(1, "a"), (1, "a"), (2, "b"), (2, "b"), (2, "b"), (3 | LAST, "c")], &["abc"], true);
    check(&[(1, "a"), (2, ""), (2, ""), (3 | LAST, "c")], &["ac"], true);
    check(&[(1, "a"), (2 | LAST, "b"), (2 | LAST, "b")], &["ab"], true);
}

#[test]
fn same_frag_with_other_data_empties_the_queue() {
    check(&[(1, "a"), (2, "b"), (2, "x"), (3 | LAST, "c")], &[], true);
    check(&[(1, "a"), (2, "b"), (2, "ab"), (3 | LAST, "c")], &[], true);
}

#[test]
fn gap_empties_the_queue() {
    check(&[(1, "a"), (3 | LAST, "c")], &[], true);
    check(&[(1, "a"), (3, "c"), (2, "b"), (3, "c"), (4 | LAST, "d")], &[], true);
}

#[test]
fn position_0_with_end_flag_is_dropped() {
    check(&[(LAST, "nothing")], &[], true);
    check(&[(1, "a"), (LAST, "nothing"), (2 | LAST, "b")], &[], true);
}

#[test]
fn fragment_for_another_dst_empties_the_queue() {
    let (mut queue, now) = (Reassembler::default(), Instant::now());
    let datagram = |port, frag| Datagram { frag, dst: dst(port), data: b"x" };
    assert_eq!(queue.push(now, datagram(53, 1)), None);
    assert_eq!(queue.push(now, datagram(54, 2)), None);
    assert_eq!(queue.deadline(), None);
    assert_eq!(queue.push(now, datagram(53, 2 | LAST)), None);

    assert_eq!(queue.push(now, datagram(53, 1)), None);
    assert_eq!(queue.push(now, datagram(54, 1)), None, "a new sequence");
    let (to, complete) = queue.push(now, datagram(54, 2 | LAST)).expect("complete");
    assert_eq!((to, &*complete), (dst(54), &b"xx"[..]));

    let name = HostName::new(b"192.0.2.1").expect("valid host name");
    assert_eq!(queue.push(now, datagram(53, 1)), None);
    let by_name = Datagram { dst: Addr { host: Host::Name(name), port: 53 }, ..datagram(53, 2 | LAST) };
    assert_eq!(queue.push(now, by_name), None, "an address written as a name is another DST");
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
}

#[test]
fn repeated_first_fragment_after_timeout_starts_a_new_sequence() {
    let (mut queue, start) = (Reassembler::default(), Instant::now());
    assert!(push_all(&mut queue, start, &[(1, "a")]).is_empty());
    assert!(push_all(&mut queue, start + REASSEMBLY_TIMEOUT, &[(1, "a")]).is_empty());
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
    Ok(())
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn random_datagrams_match_the_model(datagrams in any_datagrams()) {
        compare(datagrams)?;
    }

    #[test]
    fn sequences_with_faults_match_the_model(datagrams in any_sequences()) {
        compare(datagrams)?;
    }

    #[test]
    fn random_bytes_never_panic_or_exceed_one_udp_payload(all in vec(vec(any::<u8>(), 0..40), 0..40)) {
        let (mut queue, now) = (Reassembler::default(), Instant::now());
        for bytes in &all {
            let header = [&[0, 0], &bytes[..]].concat();
            if let Ok(datagram) = Datagram::decode(&header) {
                let complete = queue.push(now, datagram);
                prop_assert!(complete.is_none_or(|(_, complete)| complete.len() <= MAX_UDP6_PAYLOAD));
            }
        }
        queue.expire(now + REASSEMBLY_TIMEOUT);
        prop_assert_eq!(queue.deadline(), None);
    }

    #[test]
    fn fragmented_payload_is_reassembled(
        length in prop_oneof![0_usize..2000, 0..=MAX_UDP6_PAYLOAD],
        limit in prop_oneof![11_usize..600, 11..=MAX_UDP6_PAYLOAD],
    ) {
        check_fragment(&dst(53), length, limit)?;
    }

    #[test]
    fn fragmented_payload_for_a_host_name_is_reassembled(
        name in "[a-z]{1,255}",
        length in prop_oneof![1 => Just(0_usize), 4 => 0_usize..3000],
        limit in 0_usize..700,
    ) {
        let host = Host::Name(HostName::new(name.as_bytes()).expect("valid host name"));
        check_fragment(&Addr { host, port: 53 }, length, limit)?;
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
}

#[test]
fn header_over_the_limit_is_refused_even_without_data() {
    assert_eq!(fragment(&dst(53), b"", 10).map(|parts| parts.len()), Some(1));
    assert_eq!(fragment(&dst(53), b"", 9), None);
}
