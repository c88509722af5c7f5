//! A tunnel with checks: every received byte is compared with the sent byte, and the final state with the events.

use s5::net::{RelayError, RelayOptions};

use super::{Direction, Peer as _, Received, TIMEOUT, Tunnel};
use crate::*;

pub const CAPACITY: usize = 64 * 1024;

/// The byte sent at a position, so that lost, repeated and misplaced bytes are detected.
pub fn byte_at(direction: Direction, position: usize) -> u8 {
    let [low, middle, high, ..] = position.to_le_bytes();
    low ^ middle.wrapping_mul(31) ^ high.wrapping_mul(37) ^ if direction == Direction::Up { 0 } else { 0x55 }
}

/// One direction as observed by the test.
#[derive(Default)]
pub struct DirectionState {
    pub sent: usize,
    pub received: usize,
    pub is_half_closed: bool,
    pub end: Option<Received>,
}

/// A tunnel with the state of both directions.
pub struct Harness<T> {
    pub tunnel: T,
    pub directions: [DirectionState; 2],
    /// Set if the client (first) or dst has reset its connection.
    pub is_reset: [bool; 2],
}

impl<T: Tunnel> Harness<T> {
    pub fn new(capacity: usize, options: RelayOptions) -> Self {
        Self { tunnel: T::open(capacity, options), directions: Default::default(), is_reset: [false; 2] }
    }

    pub fn state(&mut self, direction: Direction) -> &mut DirectionState {
        &mut self.directions[direction as usize]
    }

    pub fn send(&mut self, direction: Direction, max: usize) -> usize {
        let DirectionState { sent, is_half_closed: false, .. } = *self.state(direction) else { return 0 };
        let bytes: Vec<u8> = (sent..sent + max).map(|position| byte_at(direction, position)).collect();
        let n = self.tunnel.source(direction).send(&bytes);
        self.state(direction).sent += n;
        n
    }

    pub fn receive(&mut self, direction: Direction, max: usize) {
        if self.state(direction).end.is_some() || self.is_reset[direction.other() as usize] {
            return;
        }
        match self.tunnel.sink(direction).receive(max) {
            Received::Bytes(bytes) => {
                for byte in bytes {
                    let position = self.state(direction).received;
                    assert_eq!(byte, byte_at(direction, position), "byte {position} {direction:?}");
                    self.state(direction).received += 1;
                }
                assert!(
                    self.state(direction).received <= self.state(direction).sent,
                    "received more than was sent, {direction:?}"
                );
            }
            Received::WouldBlock => {}
            end => {
                let DirectionState { sent, received, is_half_closed, .. } = *self.state(direction);
                let is_complete = is_half_closed && received == sent;
                assert!(end == Received::Reset || is_complete, "{direction:?}: end after {received} of {sent}");
                self.state(direction).end = Some(end);
            }
        }
    }

    pub fn half_close(&mut self, direction: Direction) {
        self.tunnel.source(direction).half_close();
        self.state(direction).is_half_closed = true;
    }

    /// Resets the client's connection for `Up`, dst's for `Down`.
    pub fn reset(&mut self, from: Direction) {
        self.tunnel.source(from).reset();
        self.is_reset[from as usize] = true;
        self.state(from).is_half_closed = true;
    }

    /// Half-closes both directions, receives all data, and checks outcome and counts.
    pub fn finish(mut self) {
        for direction in [Direction::Up, Direction::Down] {
            if !self.state(direction).is_half_closed {
                self.half_close(direction);
            }
        }
        self.drain();
        let is_broken = self.is_reset.contains(&true);
        match self.tunnel.outcome() {
            Some(Ok(_)) => {}
            Some(Err(RelayError::Io(..) | RelayError::Undelivered(_) | RelayError::DstGone)) => {
                assert!(is_broken, "the relay failed without a reset")
            }
            other => panic!("ended as {other:?}"),
        }
        if !is_broken {
            for DirectionState { sent, received, end, .. } in &self.directions {
                assert_eq!((received, end), (sent, &Some(Received::End)));
            }
            let sent = self.directions.each_ref().map(|state| state.sent as u64);
            assert_eq!(self.tunnel.byte_counts(), sent.into());
        }
        self.tunnel.check_invariants();
    }

    /// Receives until the relay and both directions have ended.
    pub fn drain(&mut self) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            self.tunnel.run_until_idle();
            self.receive(Direction::Up, CAPACITY);
            self.receive(Direction::Down, CAPACITY);
            let [up, down] = self.directions.each_ref().map(|state| state.end.is_some());
            if self.tunnel.outcome().is_some() && (up || self.is_reset[1]) && (down || self.is_reset[0]) {
                return;
            }
            assert!(Instant::now() < deadline, "not ended: up {up}, down {down}, {:?}", self.tunnel.outcome());
        }
    }

    /// Sends and receives until `bytes` more bytes have been received, or the end of the stream.
    pub fn transfer(&mut self, direction: Direction, bytes: usize) {
        let goal = self.state(direction).received.saturating_add(bytes);
        let deadline = Instant::now() + TIMEOUT;
        while self.state(direction).received < goal && self.state(direction).end.is_none() {
            let left = goal.saturating_sub(self.state(direction).sent);
            self.send(direction, left.min(4096));
            self.tunnel.run_until_idle();
            self.receive(direction, CAPACITY);
            assert!(Instant::now() < deadline, "no progress {direction:?}");
        }
    }
}
