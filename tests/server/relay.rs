//! The relay: exact bytes and counts, half-close, reset and timeouts. The same tests run over streams in memory and
//! over TCP. To test another relay, implement the traits in `relay/tunnel/mod.rs`.

mod tunnel;

use proptest::collection::vec;
use proptest::prelude::*;
use s5::conn::Conn;
use s5::net::{ByteCounts, Io, RateLimit, RelayError, RelayOp, RelayOptions, RelayStats, Side, TokenBucket, relay};
use tunnel::harness::{CAPACITY, Harness};
use tunnel::memory::MemoryTunnel;
use tunnel::sockets::SocketTunnel;
use tunnel::{Direction, Peer as _, Received, Tunnel};

use crate::*;

/// Generates tests from generic functions, one for each implementation of `Tunnel`.
macro_rules! for_each_relay {
    ($($test:ident)*) => {
        mod memory { $(#[test] fn $test() { super::$test::<super::MemoryTunnel>(); })* }
        mod sockets { $(#[test] fn $test() { super::$test::<super::SocketTunnel>(); })* }
    };
}

for_each_relay! {
    relay_copies_and_counts_bytes_in_both_directions
    half_close_is_forwarded_and_the_other_direction_stays_open
    reset_is_forwarded_as_a_reset
    stalled_sink_loses_no_bytes
    dropped_relay_resets_both_streams
    idle_timeout_resets_both_streams
    bytes_in_either_direction_restart_the_idle_timeout
    linger_timeout_after_the_end_of_down_ends_the_relay_without_error
    linger_timeout_does_not_apply_before_the_end_of_down
    rate_limit_holds_for_both_directions_together
}

#[derive(Clone, Debug)]
enum Action {
    Send(Direction, usize),
    Receive(Direction, usize),
    HalfClose(Direction),
    Reset(Direction),
    RunUntilIdle,
}

fn any_actions(resets: u32) -> impl Strategy<Value = Vec<Action>> {
    let direction = || prop_oneof![Just(Direction::Up), Just(Direction::Down)];
    let size = || prop_oneof![8 => 1_usize..300, 1 => 1_usize..200_000];
    let action = prop_oneof![
        60 => (direction(), size()).prop_map(|(direction, size)| Action::Send(direction, size)),
        40 => (direction(), size()).prop_map(|(direction, size)| Action::Receive(direction, size)),
        40 => Just(Action::RunUntilIdle),
        4 => direction().prop_map(Action::HalfClose),
        resets => direction().prop_map(Action::Reset),
    ];
    vec(action, 0..60)
}

/// Actions with writes that are large enough for a bulk transfer, and with stalls that leave bytes in its pipe.
fn any_bulk_actions() -> impl Strategy<Value = Vec<Action>> {
    let direction = || prop_oneof![3 => Just(Direction::Up), 1 => Just(Direction::Down)];
    let size = || 200_000_usize..900_000;
    let action = prop_oneof![
        40 => (direction(), size()).prop_map(|(direction, size)| Action::Send(direction, size)),
        30 => (direction(), size()).prop_map(|(direction, size)| Action::Receive(direction, size)),
        20 => Just(Action::RunUntilIdle),
        2 => direction().prop_map(Action::HalfClose),
        1 => direction().prop_map(Action::Reset),
    ];
    vec(action, 10..60)
}

fn any_capacity() -> impl Strategy<Value = usize> {
    prop_oneof![1_usize..10, 10_usize..2000, 60_000_usize..200_000]
}

fn run_actions<T: Tunnel>(capacity: usize, actions: &[Action]) {
    run_actions_with::<T>(capacity, RelayOptions::default(), actions);
}

fn run_actions_with<T: Tunnel>(capacity: usize, options: RelayOptions, actions: &[Action]) {
    let mut harness = Harness::<T>::new(capacity, options);
    for action in actions {
        match *action {
            Action::Send(direction, size) => {
                harness.send(direction, size);
            }
            Action::Receive(direction, size) => harness.receive(direction, size),
            Action::HalfClose(direction) => harness.half_close(direction),
            Action::Reset(from) => harness.reset(from),
            Action::RunUntilIdle => harness.tunnel.run_until_idle(),
        }
    }
    harness.finish();
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { failure_persistence: None, cases, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config(150))]

    #[test]
    fn writes_and_half_closes_are_relayed_exactly_in_memory(actions in any_actions(0), capacity in any_capacity()) {
        run_actions::<MemoryTunnel>(capacity, &actions);
    }

    #[test]
    fn reset_is_never_relayed_as_end_of_stream_in_memory(actions in any_actions(3), capacity in any_capacity()) {
        run_actions::<MemoryTunnel>(capacity, &actions);
    }
}

proptest! {
    #![proptest_config(config(30))]

    #[test]
    fn writes_and_half_closes_are_relayed_exactly_over_sockets(actions in any_actions(0)) {
        run_actions::<SocketTunnel>(CAPACITY, &actions);
    }

    #[test]
    fn reset_is_never_relayed_as_end_of_stream_over_sockets(actions in any_actions(3)) {
        run_actions::<SocketTunnel>(CAPACITY, &actions);
    }
}

proptest! {
    #![proptest_config(config(12))]

    #[test]
    fn bulk_transfer_is_relayed_exactly(actions in any_bulk_actions()) {
        run_actions::<SocketTunnel>(2 << 20, &actions);
    }

    #[test]
    fn bulk_transfer_is_relayed_exactly_after_moves_to_other_threads(actions in any_bulk_actions()) {
        run_actions_with::<SocketTunnel>(2 << 20, RelayOptions { stop_when_bulk: true, ..RelayOptions::default() }, &actions);
    }
}

/// The connection is full, so that the reset discards bytes which dst could not send yet. The relay notices the reset
/// by a write to dst, and the kernel reports it to that write only.
#[test]
fn reset_that_a_write_reports_is_not_relayed_as_end_of_stream() {
    let mut harness = Harness::<SocketTunnel>::new(CAPACITY, RelayOptions::default());
    harness.send(Direction::Down, 1 << 24);
    harness.tunnel.run_until_idle();
    harness.send(Direction::Down, 1 << 24);
    harness.send(Direction::Up, 100);
    harness.reset(Direction::Down);
    harness.drain();
    let down = harness.state(Direction::Down);
    assert!(down.received < down.sent, "the reset must discard bytes");
    harness.finish();
}

fn relay_copies_and_counts_bytes_in_both_directions<T: Tunnel>() {
    let mut harness = Harness::<T>::new(CAPACITY, RelayOptions::default());
    harness.transfer(Direction::Up, 100_000);
    harness.transfer(Direction::Down, 3);
    harness.transfer(Direction::Up, 1);
    // The peer may receive bytes before the relay's thread has counted them.
    wait_until("bytes are counted while the relay runs", TIMEOUT, || harness.tunnel.byte_counts() == (100_001, 3));
    assert!(harness.tunnel.outcome().is_none());
    harness.finish();
}

fn half_close_is_forwarded_and_the_other_direction_stays_open<T: Tunnel>() {
    for direction in [Direction::Up, Direction::Down] {
        let mut harness = Harness::<T>::new(CAPACITY, RelayOptions::default());
        assert_eq!(harness.send(direction, 1000), 1000);
        harness.half_close(direction);
        harness.tunnel.run_until_idle();
        harness.transfer(direction, usize::MAX);
        assert_eq!(harness.state(direction).end, Some(Received::End), "end of direction {direction:?}");
        harness.transfer(direction.other(), 100_000);
        assert!(harness.tunnel.outcome().is_none());
        harness.finish();
    }
}

fn reset_is_forwarded_as_a_reset<T: Tunnel>() {
    for (from, operation) in [(Direction::Up, RelayOp::ReadClient), (Direction::Down, RelayOp::ReadDst)] {
        let mut harness = Harness::<T>::new(CAPACITY, RelayOptions::default());
        harness.transfer(Direction::Up, 10);
        harness.transfer(Direction::Down, 10);
        harness.reset(from);
        harness.tunnel.wait_end();
        let outcome = harness.tunnel.outcome();
        assert!(matches!(outcome, Some(Err(RelayError::Io(at, _))) if *at == operation), "{outcome:?} after {from:?}");
        harness.tunnel.wait_until("the reset arrives", |tunnel| tunnel.sink(from).receive(1) == Received::Reset);
        harness.tunnel.check_invariants();
    }
}

fn stalled_sink_loses_no_bytes<T: Tunnel>() {
    for direction in [Direction::Up, Direction::Down] {
        let mut harness = Harness::<T>::new(1000, RelayOptions::default());
        let mut attempts = 0;
        while attempts < 100 {
            attempts = if harness.send(direction, 10_000) > 0 { 0 } else { attempts + 1 };
            harness.tunnel.run_until_idle();
        }
        harness.transfer(direction.other(), 10_000);
        harness.half_close(direction);
        harness.finish();
    }
}

fn dropped_relay_resets_both_streams<T: Tunnel>() {
    let mut harness = Harness::<T>::new(CAPACITY, RelayOptions::default());
    harness.transfer(Direction::Up, 10);
    harness.half_close(Direction::Down);
    harness.tunnel.wait_until("the half-close arrives", |tunnel| tunnel.client().receive(1) == Received::End);
    harness.tunnel.cancel();
    harness.tunnel.wait_until("dst is reset", |tunnel| tunnel.dst().receive(1) == Received::Reset);
    assert!(harness.tunnel.outcome().is_none());
    harness.tunnel.check_invariants();
}

fn idle_timeout_resets_both_streams<T: Tunnel>() {
    let idle = Duration::from_millis(60);
    let started = Instant::now();
    let mut harness = Harness::<T>::new(CAPACITY, RelayOptions { idle_timeout: Some(idle), ..RelayOptions::default() });
    harness.tunnel.wait_end();
    assert!(started.elapsed() >= idle, "after {:?}", started.elapsed());
    assert!(matches!(harness.tunnel.outcome(), Some(Err(RelayError::IdleTimeout))), "{:?}", harness.tunnel.outcome());
    harness.tunnel.wait_until("the client is reset", |tunnel| tunnel.client().receive(1) == Received::Reset);
    harness.tunnel.wait_until("dst is reset", |tunnel| tunnel.dst().receive(1) == Received::Reset);
    harness.tunnel.check_invariants();
}

/// Calls `step` for twice `limit`. Returns false if the machine was so slow that the tunnel may have been idle.
pub fn keep_busy(limit: Duration, mut step: impl FnMut()) -> bool {
    let (started, mut last, mut gap) = (Instant::now(), Instant::now(), Duration::ZERO);
    while started.elapsed() < limit * 2 {
        step();
        gap = gap.max(last.elapsed());
        last = Instant::now();
        std::thread::sleep(limit / 20);
    }
    gap.max(last.elapsed()) < limit / 2
}

fn bytes_in_either_direction_restart_the_idle_timeout<T: Tunnel>() {
    let idle = Duration::from_millis(80);
    for direction in [Direction::Up, Direction::Down] {
        let attempts = 10;
        let has_passed = (0..attempts).any(|_| {
            let mut harness =
                Harness::<T>::new(CAPACITY, RelayOptions { idle_timeout: Some(idle), ..RelayOptions::default() });
            let stayed_busy = keep_busy(idle, || harness.transfer(direction, 1));
            let last = Instant::now();
            let has_ended = harness.tunnel.outcome().is_some();
            if stayed_busy {
                assert!(!has_ended, "the relay ended while bytes were sent {direction:?}");
                harness.tunnel.wait_end();
                assert!(last.elapsed() < tunnel::TIMEOUT / 2, "the timeout no longer applies");
            }
            stayed_busy
        });
        assert!(has_passed, "the machine was too slow {attempts} times");
    }
}

fn linger_timeout_after_the_end_of_down_ends_the_relay_without_error<T: Tunnel>() {
    let linger = Duration::from_millis(60);
    let options = RelayOptions { idle_timeout: Some(tunnel::TIMEOUT), linger: Some(linger), ..RelayOptions::default() };
    let mut harness = Harness::<T>::new(CAPACITY, options);
    harness.transfer(Direction::Up, 10);
    harness.transfer(Direction::Down, 10);
    let started = Instant::now();
    harness.half_close(Direction::Down);
    harness.tunnel.wait_end();
    assert!(started.elapsed() >= linger, "after {:?}", started.elapsed());
    assert!(matches!(harness.tunnel.outcome(), Some(Ok(_))), "{:?}", harness.tunnel.outcome());
    harness.receive(Direction::Down, 1);
    assert_eq!(harness.state(Direction::Down).end, Some(Received::End));
    harness.tunnel.check_invariants();
}

fn linger_timeout_does_not_apply_before_the_end_of_down<T: Tunnel>() {
    for has_up_ended in [false, true] {
        let linger = Duration::from_millis(20);
        let mut harness = Harness::<T>::new(CAPACITY, RelayOptions { linger: Some(linger), ..RelayOptions::default() });
        harness.transfer(Direction::Up, 1);
        if has_up_ended {
            harness.half_close(Direction::Up);
        }
        let started = Instant::now();
        harness.tunnel.wait_until("three times the timeout passes", |_| started.elapsed() > linger * 3);
        assert!(harness.tunnel.outcome().is_none());
        harness.transfer(Direction::Down, 100);
        harness.finish();
    }
}

fn rate_limit_holds_for_both_directions_together<T: Tunnel>() {
    let begin = Instant::now();
    let mut rate_limit = RateLimit::default();
    rate_limit.add(TokenBucket::new(1_000_000, begin).into());
    let mut harness = Harness::<T>::new(CAPACITY, RelayOptions { rate_limit, ..RelayOptions::default() });
    for direction in [Direction::Up, Direction::Down] {
        harness.transfer(direction, 150_000);
        harness.half_close(direction);
    }
    assert!(begin.elapsed() > Duration::from_millis(250), "{:?}", begin.elapsed());
    harness.finish();
}

#[test]
fn relay_stats_record_the_first_byte_and_the_side_that_ended_first() {
    for (direction, side) in [(Direction::Up, Side::Client), (Direction::Down, Side::Dst)] {
        let stats = Arc::new(RelayStats::default());
        let options = RelayOptions { stats: Some(stats.clone()), ..RelayOptions::default() };
        let mut harness = Harness::<MemoryTunnel>::new(CAPACITY, options);
        harness.transfer(Direction::Up, 10);
        assert_eq!((stats.first_byte(), stats.ended_first()), (None, None));
        harness.transfer(Direction::Down, 10);
        assert!(stats.first_byte().is_some_and(|time| time < tunnel::TIMEOUT));
        harness.half_close(direction);
        harness.tunnel.run_until_idle();
        assert_eq!((stats.ended_first(), stats.is_up_done()), (Some(side), side == Side::Client));
        harness.finish();
        assert_eq!((stats.ended_first(), stats.is_up_done()), (Some(side), true));
    }
}

#[test]
fn dst_stays_open_after_the_end_of_the_client_if_required() {
    let mut harness =
        Harness::<MemoryTunnel>::new(CAPACITY, RelayOptions { keeps_dst_open: true, ..RelayOptions::default() });
    harness.half_close(Direction::Up);
    harness.transfer(Direction::Down, 10);
    assert_eq!(harness.tunnel.dst().receive(1), Received::WouldBlock);
}

#[test]
fn idle_relay_future_has_at_most_128_bytes() {
    let (client, dst) = std::os::unix::net::UnixStream::pair().expect("socket pair created");
    let [mut client, mut dst] = [client, dst].map(|stream| {
        stream.set_nonblocking(true).expect("option set");
        Conn::Unix(Io::new(stream.into()).expect("registered with the event loop"))
    });
    let counts = ByteCounts::default();
    let options = RelayOptions::default();
    let relay = relay(&mut client, &mut dst, &options, &counts, |_, _| true);
    // A server can have 100 000 idle relays.
    assert!(size_of_val(&relay) <= 128, "{}", size_of_val(&relay));
}

#[test]
fn linger_timeout_does_not_apply_while_bytes_for_dst_are_pending() {
    let linger = Duration::from_millis(20);
    let mut harness =
        Harness::<MemoryTunnel>::new(100, RelayOptions { linger: Some(linger), ..RelayOptions::default() });
    harness.send(Direction::Up, 100);
    harness.half_close(Direction::Down);
    harness.tunnel.run_until_idle();
    harness.send(Direction::Up, 100);
    let started = Instant::now();
    harness.tunnel.wait_until("three times the timeout passes", |_| started.elapsed() > linger * 3);
    assert!(harness.tunnel.outcome().is_none(), "{:?}", harness.tunnel.outcome());
    harness.transfer(Direction::Up, 200);
    harness.tunnel.wait_end();
    assert!(matches!(harness.tunnel.outcome(), Some(Ok(_))), "{:?}", harness.tunnel.outcome());
    harness.tunnel.check_invariants();
}

#[test]
fn bytes_from_the_client_restart_the_linger_timeout() {
    let linger = Duration::from_millis(80);
    let has_passed = (0..10).any(|_| {
        let mut harness =
            Harness::<MemoryTunnel>::new(CAPACITY, RelayOptions { linger: Some(linger), ..RelayOptions::default() });
        harness.half_close(Direction::Down);
        let stayed_busy = keep_busy(linger, || harness.transfer(Direction::Up, 1));
        assert!(!stayed_busy || harness.tunnel.outcome().is_none(), "the relay ended while bytes were sent");
        stayed_busy
    });
    assert!(has_passed, "the machine was too slow each time");
}

#[test]
fn idle_tunnel_without_timeouts_is_never_woken() {
    let mut tunnel = MemoryTunnel::open(CAPACITY, RelayOptions::default());
    tunnel.run_until_idle();
    let started = Instant::now();
    tunnel.wait_until("some time passes", |_| started.elapsed() > Duration::from_millis(30));
    assert!(!tunnel.poll() && tunnel.outcome().is_none());
}

#[test]
fn relay_of_endless_data_yields_to_other_tasks() {
    let mut tunnel = MemoryTunnel::open(CAPACITY, RelayOptions::default());
    tunnel.client().stream().is_endless = true;
    tunnel.dst().stream().is_endless = true;
    for turn in 1..=3 {
        assert!(tunnel.poll(), "the relay does not wake itself for poll {turn}");
        let (up, down) = tunnel.byte_counts();
        let max = turn * 4 * 1024 * 1024;
        assert!((turn..max).contains(&up) && (turn..max).contains(&down), "{up} and {down} bytes in {turn} polls");
    }
}

#[test]
fn bytes_from_dst_reach_the_client_after_writing_to_dst_has_failed() {
    let mut harness = Harness::<MemoryTunnel>::new(1000, RelayOptions::default());
    harness.transfer(Direction::Up, 10);
    harness.tunnel.dst().stream().fails_writes = true;
    assert_eq!(harness.send(Direction::Up, 500), 500);
    harness.tunnel.run_until_idle();
    assert!(harness.tunnel.outcome().is_none(), "the relay ended before its direction down");
    harness.transfer(Direction::Down, 100_000);
    harness.half_close(Direction::Down);
    harness.drain();
    assert_eq!(harness.state(Direction::Down).end, Some(Received::End));
    let outcome = harness.tunnel.outcome();
    assert!(matches!(outcome, Some(Err(RelayError::Undelivered(_)))), "{outcome:?}");
    assert_eq!(harness.tunnel.byte_counts(), (10, 100_000));
    // Checks that the client was not reset. A reset would discard the last bytes sent to it.
    harness.tunnel.check_invariants();
}

#[test]
fn silent_dst_that_accepts_no_bytes_ends_the_tunnel_within_seconds() {
    let mut harness = Harness::<MemoryTunnel>::new(1000, RelayOptions::default());
    harness.tunnel.dst().stream().fails_writes = true;
    harness.send(Direction::Up, 1);
    harness.tunnel.wait_end();
    let outcome = harness.tunnel.outcome();
    assert!(matches!(outcome, Some(Err(RelayError::Io(RelayOp::WriteDst, _)))), "{outcome:?}");
    harness.tunnel.check_invariants();
}

#[test]
fn relay_error_names_the_failed_operation() {
    type CauseFailure = fn(&mut Harness<MemoryTunnel>);
    let table: [(CauseFailure, RelayOp, &str); 5] = [
        (|harness| harness.tunnel.client().stream().fails_reads = true, RelayOp::ReadClient, "read from the client: "),
        (|harness| harness.tunnel.dst().stream().fails_reads = true, RelayOp::ReadDst, "read from dst: "),
        (|harness| harness.tunnel.client().stream().fails_writes = true, RelayOp::WriteClient, "write to the client: "),
        (
            |harness| harness.tunnel.client().stream().accepts_nothing = true,
            RelayOp::WriteClient,
            "write to the client: ",
        ),
        (|harness| harness.reset(Direction::Up), RelayOp::ReadClient, "read from the client: "),
    ];
    for (cause_failure, operation, text) in table {
        let mut harness = Harness::<MemoryTunnel>::new(CAPACITY, RelayOptions::default());
        harness.send(Direction::Up, 10);
        harness.send(Direction::Down, 10);
        cause_failure(&mut harness);
        harness.tunnel.wait_end();
        match harness.tunnel.outcome() {
            Some(Err(error @ RelayError::Io(at, _))) => {
                assert_eq!(*at, operation);
                assert!(error.to_string().starts_with(text), "{error}");
            }
            other => panic!("{other:?} instead of {operation:?}"),
        }
        harness.tunnel.check_invariants();
    }
    assert_eq!(RelayError::IdleTimeout.to_string(), "idle timeout");
    let closed = RelayError::Io(RelayOp::WriteClient, std::io::ErrorKind::NotConnected.into());
    assert_eq!(closed.to_string(), "the client closed the connection");
}
