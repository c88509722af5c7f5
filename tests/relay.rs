//! The two-way pump: exact to the octet, half-close and reset carried over, and its limits. The same tests run over
//! streams in memory and over TCP; `tunnel/mod.rs` says how another relay is put to them.

mod tunnel;

use std::time::{Duration, Instant};

use proptest::collection::vec;
use proptest::prelude::*;
use s5::conn::Conn;
use s5::reactor::Io;
use s5::relay::{ByteCounts, RelayError, RelayOp, RelayOptions, relay};
use tunnel::game::{CAPACITY, Game};
use tunnel::memory::Memory;
use tunnel::sockets::{EdgeSockets, Sockets};
use tunnel::{Far as _, Received, Tunnel, Way};

/// Makes tests of generic functions, one for each relay there is.
macro_rules! for_each_relay {
    ($($test:ident)*) => {
        mod memory { $(#[test] fn $test() { super::$test::<super::Memory>(); })* }
        mod sockets { $(#[test] fn $test() { super::$test::<super::Sockets>(); })* }
        mod edge { $(#[test] fn $test() { super::$test::<super::EdgeSockets>(); })* }
    };
}

for_each_relay! {
    octets_go_both_ways_and_are_counted
    a_half_close_is_carried_over_and_the_other_way_stays_open
    a_reset_is_carried_over_as_a_reset
    a_sink_that_stalls_loses_nothing
    a_relay_that_is_dropped_resets_both_ends
    silence_for_the_idle_limit_resets_both_ends
    octets_either_way_put_the_idle_limit_off
    when_down_has_ended_silence_for_the_linger_limit_ends_it_cleanly
    the_linger_limit_does_not_count_before_down_has_ended
}

const NO_LIMITS: RelayOptions = RelayOptions { idle_timeout: None, linger: None, stop_when_bulk: false };

#[derive(Clone, Debug)]
enum Act {
    Send(Way, usize),
    Receive(Way, usize),
    HalfClose(Way),
    Reset(Way),
    Settle,
}

fn any_acts(resets: u32) -> impl Strategy<Value = Vec<Act>> {
    let way = || prop_oneof![Just(Way::Up), Just(Way::Down)];
    let size = || prop_oneof![8 => 1_usize..300, 1 => 1_usize..200_000];
    let act = prop_oneof![
        60 => (way(), size()).prop_map(|(way, size)| Act::Send(way, size)),
        40 => (way(), size()).prop_map(|(way, size)| Act::Receive(way, size)),
        40 => Just(Act::Settle),
        4 => way().prop_map(Act::HalfClose),
        resets => way().prop_map(Act::Reset),
    ];
    vec(act, 0..60)
}

/// Enough at a time for a direction to be bulk, and stalls that leave octets in its pipe.
fn any_bulk_acts() -> impl Strategy<Value = Vec<Act>> {
    let way = || prop_oneof![3 => Just(Way::Up), 1 => Just(Way::Down)];
    let size = || 200_000_usize..900_000;
    let act = prop_oneof![
        40 => (way(), size()).prop_map(|(way, size)| Act::Send(way, size)),
        30 => (way(), size()).prop_map(|(way, size)| Act::Receive(way, size)),
        20 => Just(Act::Settle),
        2 => way().prop_map(Act::HalfClose),
        1 => way().prop_map(Act::Reset),
    ];
    vec(act, 10..60)
}

fn any_capacity() -> impl Strategy<Value = usize> {
    prop_oneof![1_usize..10, 10_usize..2000, 60_000_usize..200_000]
}

fn play<T: Tunnel>(capacity: usize, acts: &[Act]) {
    play_with::<T>(capacity, NO_LIMITS, acts);
}

fn play_with<T: Tunnel>(capacity: usize, limits: RelayOptions, acts: &[Act]) {
    let mut game = Game::<T>::new(capacity, limits);
    for act in acts {
        match *act {
            Act::Send(way, size) => {
                game.send(way, size);
            }
            Act::Receive(way, size) => game.receive(way, size),
            Act::HalfClose(way) => game.half_close(way),
            Act::Reset(from) => game.reset(from),
            Act::Settle => game.tunnel.settle(),
        }
    }
    game.finish();
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { failure_persistence: None, cases, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config(150))]

    #[test]
    fn any_writes_half_closes_and_stalls_are_relayed_exactly(acts in any_acts(0), capacity in any_capacity()) {
        play::<Memory>(capacity, &acts);
    }

    #[test]
    fn any_resets_among_them_never_pass_for_an_end(acts in any_acts(3), capacity in any_capacity()) {
        play::<Memory>(capacity, &acts);
    }
}

proptest! {
    #![proptest_config(config(30))]

    #[test]
    fn any_writes_half_closes_and_stalls_are_relayed_exactly_by_sockets(acts in any_acts(0)) {
        play::<Sockets>(CAPACITY, &acts);
    }

    #[test]
    fn any_writes_half_closes_and_stalls_are_relayed_exactly_with_a_reactor(acts in any_acts(0)) {
        play::<EdgeSockets>(CAPACITY, &acts);
    }

    #[test]
    fn any_resets_among_them_never_pass_for_an_end_with_a_reactor(acts in any_acts(3)) {
        play::<EdgeSockets>(CAPACITY, &acts);
    }

    #[test]
    fn any_resets_among_them_never_pass_for_an_end_on_sockets(acts in any_acts(3)) {
        play::<Sockets>(CAPACITY, &acts);
    }
}

proptest! {
    #![proptest_config(config(12))]

    #[test]
    fn any_bulk_is_relayed_exactly_with_a_reactor(acts in any_bulk_acts()) {
        play::<EdgeSockets>(2 << 20, &acts);
    }

    #[test]
    fn any_bulk_that_is_handed_over_again_and_again_is_relayed_exactly(acts in any_bulk_acts()) {
        play_with::<EdgeSockets>(2 << 20, RelayOptions { stop_when_bulk: true, ..NO_LIMITS }, &acts);
        play_with::<Sockets>(1 << 20, RelayOptions { stop_when_bulk: true, ..NO_LIMITS }, &acts);
    }
}

fn octets_go_both_ways_and_are_counted<T: Tunnel>() {
    let mut game = Game::<T>::new(CAPACITY, NO_LIMITS);
    game.transfer(Way::Up, 100_000);
    game.transfer(Way::Down, 3);
    game.transfer(Way::Up, 1);
    assert_eq!(game.tunnel.moved(), (100_001, 3), "counted while it runs");
    assert!(game.tunnel.ended().is_none());
    game.finish();
}

fn a_half_close_is_carried_over_and_the_other_way_stays_open<T: Tunnel>() {
    for way in [Way::Up, Way::Down] {
        let mut game = Game::<T>::new(CAPACITY, NO_LIMITS);
        assert_eq!(game.send(way, 1000), 1000);
        game.half_close(way);
        game.tunnel.settle();
        game.transfer(way, usize::MAX);
        assert_eq!(game.seen(way).end, Some(Received::End), "it arrives behind the last octet");
        game.transfer(way.other(), 100_000);
        assert!(game.tunnel.ended().is_none());
        game.finish();
    }
}

fn a_reset_is_carried_over_as_a_reset<T: Tunnel>() {
    for (from, place) in [(Way::Up, RelayOp::ReadClient), (Way::Down, RelayOp::ReadDst)] {
        let mut game = Game::<T>::new(CAPACITY, NO_LIMITS);
        game.transfer(Way::Up, 10);
        game.transfer(Way::Down, 10);
        game.reset(from);
        game.tunnel.wait_end();
        let ended = game.tunnel.ended();
        assert!(matches!(ended, Some(Err(RelayError::Io(at, _))) if *at == place), "{ended:?} after {from:?}");
        game.tunnel.wait("the reset arrives", |tunnel| tunnel.sink(from).receive(1) == Received::Reset);
        game.tunnel.check_end();
    }
}

fn a_sink_that_stalls_loses_nothing<T: Tunnel>() {
    for way in [Way::Up, Way::Down] {
        let mut game = Game::<T>::new(1000, NO_LIMITS);
        let mut tries = 0;
        while tries < 100 {
            tries = if game.send(way, 10_000) > 0 { 0 } else { tries + 1 };
            game.tunnel.settle();
        }
        game.transfer(way.other(), 10_000);
        game.half_close(way);
        game.finish();
    }
}

fn a_relay_that_is_dropped_resets_both_ends<T: Tunnel>() {
    let mut game = Game::<T>::new(CAPACITY, NO_LIMITS);
    game.transfer(Way::Up, 10);
    game.half_close(Way::Down);
    game.tunnel.wait("the half-close arrives", |tunnel| tunnel.client().receive(1) == Received::End);
    game.tunnel.cancel();
    game.tunnel.wait("dst is reset", |tunnel| tunnel.dst().receive(1) == Received::Reset);
    assert!(game.tunnel.ended().is_none());
    game.tunnel.check_end();
}

fn silence_for_the_idle_limit_resets_both_ends<T: Tunnel>() {
    let idle = Duration::from_millis(60);
    let before = Instant::now();
    let mut game =
        Game::<T>::new(CAPACITY, RelayOptions { idle_timeout: Some(idle), linger: None, ..RelayOptions::default() });
    game.tunnel.wait_end();
    assert!(before.elapsed() >= idle, "after {:?}", before.elapsed());
    assert!(matches!(game.tunnel.ended(), Some(Err(RelayError::IdleTimeout))), "{:?}", game.tunnel.ended());
    game.tunnel.wait("the client is reset", |tunnel| tunnel.client().receive(1) == Received::Reset);
    game.tunnel.wait("dst is reset", |tunnel| tunnel.dst().receive(1) == Received::Reset);
    game.tunnel.check_end();
}

/// Calls `step` for longer than `limit`. False when the machine was so slow that the tunnel may have fallen silent.
fn busy(limit: Duration, mut step: impl FnMut()) -> bool {
    let (begin, mut last, mut gap) = (Instant::now(), Instant::now(), Duration::ZERO);
    while begin.elapsed() < limit * 2 {
        step();
        gap = gap.max(last.elapsed());
        last = Instant::now();
        std::thread::sleep(limit / 20);
    }
    gap.max(last.elapsed()) < limit / 2
}

fn octets_either_way_put_the_idle_limit_off<T: Tunnel>() {
    let idle = Duration::from_millis(80);
    for way in [Way::Up, Way::Down] {
        let tries = 10;
        let went_on = (0..tries).any(|_| {
            let mut game = Game::<T>::new(
                CAPACITY,
                RelayOptions { idle_timeout: Some(idle), linger: None, ..RelayOptions::default() },
            );
            let was_busy = busy(idle, || game.transfer(way, 1));
            let last = Instant::now();
            let has_ended = game.tunnel.ended().is_some();
            if was_busy {
                assert!(!has_ended, "ended while octets went {way:?}");
                game.tunnel.wait_end();
                assert!(last.elapsed() < tunnel::SOON / 2, "the limit still holds");
            }
            was_busy
        });
        assert!(went_on, "the machine was too slow {tries} times");
    }
}

fn when_down_has_ended_silence_for_the_linger_limit_ends_it_cleanly<T: Tunnel>() {
    let linger = Duration::from_millis(60);
    let limits = RelayOptions { idle_timeout: Some(tunnel::SOON), linger: Some(linger), ..RelayOptions::default() };
    let mut game = Game::<T>::new(CAPACITY, limits);
    game.transfer(Way::Up, 10);
    game.transfer(Way::Down, 10);
    let before = Instant::now();
    game.half_close(Way::Down);
    game.tunnel.wait_end();
    assert!(before.elapsed() >= linger, "after {:?}", before.elapsed());
    assert!(matches!(game.tunnel.ended(), Some(Ok(_))), "{:?}", game.tunnel.ended());
    game.receive(Way::Down, 1);
    assert_eq!(game.seen(Way::Down).end, Some(Received::End));
    game.tunnel.check_end();
}

fn the_linger_limit_does_not_count_before_down_has_ended<T: Tunnel>() {
    for has_up_ended in [false, true] {
        let linger = Duration::from_millis(20);
        let mut game = Game::<T>::new(
            CAPACITY,
            RelayOptions { idle_timeout: None, linger: Some(linger), ..RelayOptions::default() },
        );
        game.transfer(Way::Up, 1);
        if has_up_ended {
            game.half_close(Way::Up);
        }
        let begin = Instant::now();
        game.tunnel.wait("three times the limit passes", |_| begin.elapsed() > linger * 3);
        assert!(game.tunnel.ended().is_none());
        game.transfer(Way::Down, 100);
        game.finish();
    }
}

#[test]
fn an_idle_relay_is_small() {
    let (client, dst) = std::os::unix::net::UnixStream::pair().expect("a pair");
    let [mut client, mut dst] = [client, dst].map(|stream| {
        stream.set_nonblocking(true).expect("it can be set");
        Conn::Unix(Io::new(stream).expect("it waits"))
    });
    let moved = ByteCounts::default();
    let relay = relay(&mut client, &mut dst, &NO_LIMITS, &moved, |_, _| true);
    // There may be 100 000 of them.
    assert!(size_of_val(&relay) <= 128, "{}", size_of_val(&relay));
}

#[test]
fn octets_that_dst_has_not_taken_yet_keep_the_linger_limit_away() {
    let linger = Duration::from_millis(20);
    let mut game =
        Game::<Memory>::new(100, RelayOptions { idle_timeout: None, linger: Some(linger), ..RelayOptions::default() });
    game.send(Way::Up, 100);
    game.half_close(Way::Down);
    game.tunnel.settle();
    game.send(Way::Up, 100);
    let begin = Instant::now();
    game.tunnel.wait("three times the limit passes", |_| begin.elapsed() > linger * 3);
    assert!(game.tunnel.ended().is_none(), "{:?}", game.tunnel.ended());
    game.transfer(Way::Up, 200);
    game.tunnel.wait_end();
    assert!(matches!(game.tunnel.ended(), Some(Ok(_))), "{:?}", game.tunnel.ended());
    game.tunnel.check_end();
}

#[test]
fn octets_up_put_the_linger_limit_off() {
    let linger = Duration::from_millis(80);
    let went_on = (0..10).any(|_| {
        let mut game = Game::<Memory>::new(
            CAPACITY,
            RelayOptions { idle_timeout: None, linger: Some(linger), ..RelayOptions::default() },
        );
        game.half_close(Way::Down);
        let was_busy = busy(linger, || game.transfer(Way::Up, 1));
        assert!(!was_busy || game.tunnel.ended().is_none(), "ended while octets went up");
        was_busy
    });
    assert!(went_on, "the machine was too slow each time");
}

#[test]
fn without_limits_a_silent_tunnel_is_never_woken() {
    let mut tunnel = Memory::open(CAPACITY, NO_LIMITS);
    tunnel.settle();
    let begin = Instant::now();
    tunnel.wait("some time passes", |_| begin.elapsed() > Duration::from_millis(30));
    assert!(!tunnel.poll() && tunnel.ended().is_none());
}

#[test]
fn a_tunnel_that_could_go_on_for_ever_lets_the_others_have_their_turn() {
    let mut tunnel = Memory::open(CAPACITY, NO_LIMITS);
    tunnel.client().stream().is_endless = true;
    tunnel.dst().stream().is_endless = true;
    for turn in 1..=3 {
        assert!(tunnel.poll(), "it wakes itself for turn {turn}");
        let (up, down) = tunnel.moved();
        let most = turn * 4 * 1024 * 1024;
        assert!((turn..most).contains(&up) && (turn..most).contains(&down), "{up} and {down} in {turn} turns");
    }
}

#[test]
fn what_dst_said_last_reaches_a_client_that_dst_no_longer_listens_to() {
    let mut game = Game::<Memory>::new(1000, NO_LIMITS);
    game.transfer(Way::Up, 10);
    game.tunnel.dst().stream().is_deaf = true;
    assert_eq!(game.send(Way::Up, 500), 500);
    game.tunnel.settle();
    assert!(game.tunnel.ended().is_none(), "down goes on");
    game.transfer(Way::Down, 100_000);
    game.half_close(Way::Down);
    game.drain();
    assert_eq!(game.seen(Way::Down).end, Some(Received::End));
    let ended = game.tunnel.ended();
    assert!(matches!(ended, Some(Err(RelayError::Undelivered(_)))), "{ended:?}");
    assert_eq!(game.tunnel.moved(), (10, 100_000));
    // Its last octets may still be on their way, which a reset would overtake.
    game.tunnel.check_end();
}

#[test]
fn a_dst_that_neither_listens_nor_speaks_ends_the_tunnel_within_seconds() {
    let mut game = Game::<Memory>::new(1000, NO_LIMITS);
    game.tunnel.dst().stream().is_deaf = true;
    game.send(Way::Up, 1);
    game.tunnel.wait_end();
    let ended = game.tunnel.ended();
    assert!(matches!(ended, Some(Err(RelayError::Io(RelayOp::WriteDst, _)))), "{ended:?}");
    game.tunnel.check_end();
}

#[test]
fn each_failure_names_its_place() {
    type Break = fn(&mut Game<Memory>);
    let table: [(Break, RelayOp, &str); 5] = [
        (|game| game.tunnel.client().stream().is_unreadable = true, RelayOp::ReadClient, "reading from the client: "),
        (|game| game.tunnel.dst().stream().is_unreadable = true, RelayOp::ReadDst, "reading from dst: "),
        (|game| game.tunnel.client().stream().is_deaf = true, RelayOp::WriteClient, "writing to the client: "),
        (|game| game.tunnel.client().stream().is_stuck = true, RelayOp::WriteClient, "writing to the client: "),
        (|game| game.reset(Way::Up), RelayOp::ReadClient, "reading from the client: "),
    ];
    for (break_it, place, text) in table {
        let mut game = Game::<Memory>::new(CAPACITY, NO_LIMITS);
        game.send(Way::Up, 10);
        game.send(Way::Down, 10);
        break_it(&mut game);
        game.tunnel.wait_end();
        match game.tunnel.ended() {
            Some(Err(broken @ RelayError::Io(at, _))) => {
                assert_eq!(*at, place);
                assert!(broken.to_string().starts_with(text), "{broken}");
            }
            other => panic!("{other:?} instead of {place:?}"),
        }
        game.tunnel.check_end();
    }
    assert_eq!(RelayError::IdleTimeout.to_string(), "idle for too long");
}
