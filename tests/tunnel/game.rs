//! A tunnel and a test that plays with it: what goes in, what comes out, and what the relay owes at the end.

use std::time::Instant;

use s5::relay::{RelayError, RelayOptions};

use super::{Far as _, Received, SOON, Tunnel, Way};

pub const CAPACITY: usize = 64 * 1024;

/// The octet at a position: so that what is lost, doubled or in the wrong place shows.
pub fn octet(way: Way, position: usize) -> u8 {
    let [low, middle, high, ..] = position.to_le_bytes();
    low ^ middle.wrapping_mul(31) ^ high.wrapping_mul(37) ^ if way == Way::Up { 0 } else { 0x55 }
}

/// One direction, as the test has seen it so far.
#[derive(Default)]
pub struct Seen {
    pub sent: usize,
    pub received: usize,
    pub is_half_closed: bool,
    pub end: Option<Received>,
}

/// A tunnel, and what went in and came out.
pub struct Game<T> {
    pub tunnel: T,
    pub ways: [Seen; 2],
    /// Whether the client, or dst, has reset its connection.
    pub is_reset: [bool; 2],
}

impl<T: Tunnel> Game<T> {
    pub fn new(capacity: usize, limits: RelayOptions) -> Self {
        Self { tunnel: T::open(capacity, limits), ways: Default::default(), is_reset: [false; 2] }
    }

    pub fn seen(&mut self, way: Way) -> &mut Seen {
        &mut self.ways[way as usize]
    }

    pub fn send(&mut self, way: Way, most: usize) -> usize {
        let Seen { sent, is_half_closed: false, .. } = *self.seen(way) else { return 0 };
        let octets: Vec<u8> = (sent..sent + most).map(|position| octet(way, position)).collect();
        let n = self.tunnel.source(way).send(&octets);
        self.seen(way).sent += n;
        n
    }

    pub fn receive(&mut self, way: Way, most: usize) {
        if self.seen(way).end.is_some() || self.is_reset[way.other() as usize] {
            return;
        }
        match self.tunnel.sink(way).receive(most) {
            Received::Octets(octets) => {
                for got in octets {
                    let position = self.seen(way).received;
                    assert_eq!(got, octet(way, position), "octet {position} {way:?}");
                    self.seen(way).received += 1;
                }
                assert!(self.seen(way).received <= self.seen(way).sent, "more than was sent {way:?}");
            }
            Received::Nothing => {}
            end => {
                let Seen { sent, received, is_half_closed, .. } = *self.seen(way);
                let is_whole = is_half_closed && received == sent;
                assert!(end == Received::Reset || is_whole, "{way:?}: an end at {received} of {sent}");
                self.seen(way).end = Some(end);
            }
        }
    }

    pub fn half_close(&mut self, way: Way) {
        self.tunnel.source(way).half_close();
        self.seen(way).is_half_closed = true;
    }

    /// From the client for Up, from dst for Down.
    pub fn reset(&mut self, from: Way) {
        self.tunnel.source(from).reset();
        self.is_reset[from as usize] = true;
        self.seen(from).is_half_closed = true;
    }

    /// Half-closes what is open, takes all that comes, and holds the relay to its word.
    pub fn finish(mut self) {
        for way in [Way::Up, Way::Down] {
            if !self.seen(way).is_half_closed {
                self.half_close(way);
            }
        }
        self.drain();
        let is_broken = self.is_reset.contains(&true);
        match self.tunnel.ended() {
            Some(Ok(_)) => {}
            Some(Err(RelayError::Io(..) | RelayError::Undelivered(_))) => assert!(is_broken, "it broke by itself"),
            other => panic!("ended as {other:?}"),
        }
        if !is_broken {
            for Seen { sent, received, end, .. } in &self.ways {
                assert_eq!((received, end), (sent, &Some(Received::End)));
            }
            let sent = self.ways.each_ref().map(|seen| seen.sent as u64);
            assert_eq!(self.tunnel.moved(), sent.into());
        }
        self.tunnel.check_end();
    }

    /// Receives until the relay and whoever listens have come to their end.
    pub fn drain(&mut self) {
        let deadline = Instant::now() + SOON;
        loop {
            self.tunnel.settle();
            self.receive(Way::Up, CAPACITY);
            self.receive(Way::Down, CAPACITY);
            let [up, down] = self.ways.each_ref().map(|seen| seen.end.is_some());
            if self.tunnel.ended().is_some() && (up || self.is_reset[1]) && (down || self.is_reset[0]) {
                return;
            }
            assert!(Instant::now() < deadline, "it never ended; up {up}, down {down}, {:?}", self.tunnel.ended());
        }
    }

    /// Sends and receives until that many octets more have come out, or their end.
    pub fn transfer(&mut self, way: Way, octets: usize) {
        let goal = self.seen(way).received.saturating_add(octets);
        let deadline = Instant::now() + SOON;
        while self.seen(way).received < goal && self.seen(way).end.is_none() {
            let left = goal.saturating_sub(self.seen(way).sent);
            self.send(way, left.min(4096));
            self.tunnel.settle();
            self.receive(way, CAPACITY);
            assert!(Instant::now() < deadline, "stuck {way:?}");
        }
    }
}
