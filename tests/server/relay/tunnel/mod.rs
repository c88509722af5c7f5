//! Test interface of a relay: a tunnel between two streams. The test controls the peers of both.

use s5::net::{RelayOptions, RelayResult};

use crate::*;

pub mod harness;
pub mod memory;
pub mod sockets;

/// Time limit for operations that should complete immediately.
pub const TIMEOUT: Duration = Duration::from_secs(10);

/// A running relay. To test another implementation, implement this trait and add it to `for_each_relay!`.
pub trait Tunnel: Sized {
    type Peer: Peer;

    /// Opens a tunnel. Each stream accepts about `capacity` bytes before it stalls.
    fn open(capacity: usize, options: RelayOptions) -> Self;

    /// Runs the relay until it waits.
    fn run_until_idle(&mut self);

    /// The client.
    fn client(&mut self) -> &mut Self::Peer;

    /// The destination.
    fn dst(&mut self) -> &mut Self::Peer;

    /// Bytes relayed, up and down.
    fn byte_counts(&self) -> (u64, u64);

    /// The relay's result, once it has ended.
    fn outcome(&mut self) -> Option<&RelayResult>;

    /// Drops the relay.
    fn cancel(&mut self);

    /// Checks the final state of this implementation.
    fn check_invariants(&mut self) {}

    /// The peer that sends in this direction.
    fn source(&mut self, direction: Direction) -> &mut Self::Peer {
        if direction == Direction::Up { self.client() } else { self.dst() }
    }

    /// The peer that receives in this direction.
    fn sink(&mut self, direction: Direction) -> &mut Self::Peer {
        self.source(direction.other())
    }

    /// Runs the relay until `condition` is true. Panics after [`TIMEOUT`].
    fn wait_until(&mut self, what: &str, mut condition: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            self.run_until_idle();
            if condition(self) {
                return;
            }
            assert!(Instant::now() < deadline, "not within {TIMEOUT:?}: {what}");
            thread::sleep(Duration::from_micros(100));
        }
    }

    fn wait_end(&mut self) {
        self.wait_until("the relay ends", |tunnel| tunnel.outcome().is_some());
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Up,
    Down,
}

impl Direction {
    pub fn other(self) -> Self {
        if self == Self::Up { Self::Down } else { Self::Up }
    }
}

/// The test's end of a stream. No method blocks.
pub trait Peer {
    /// Returns the number of bytes that the stream accepted.
    fn send(&mut self, bytes: &[u8]) -> usize;

    fn receive(&mut self, max: usize) -> Received;

    fn half_close(&mut self);

    fn reset(&mut self);
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Received {
    Bytes(Vec<u8>),
    WouldBlock,
    End,
    Reset,
}
