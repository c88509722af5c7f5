//! What a relay is tested through, whichever it is: a tunnel between two streams of which a test holds the far ends.

use std::thread;
use std::time::{Duration, Instant};

use s5::relay::{RelayOptions, RelayResult};

pub mod game;
pub mod memory;
pub mod sockets;

/// How long anything may take that should happen at once.
pub const SOON: Duration = Duration::from_secs(10);

/// A running relay. To test another one, implement this and name it in `for_each_relay!`.
pub trait Tunnel: Sized {
    type Far: Far;

    /// A new tunnel; `capacity` is about how many octets a stream takes before it stalls.
    fn open(capacity: usize, limits: RelayOptions) -> Self;

    /// Lets the relay do what it can do now.
    fn settle(&mut self);

    /// The far end of the client's stream.
    fn client(&mut self) -> &mut Self::Far;

    /// The far end of dst's stream.
    fn dst(&mut self) -> &mut Self::Far;

    /// Octets moved, up and down.
    fn moved(&self) -> (u64, u64);

    /// How it ended, when it has.
    fn ended(&mut self) -> Option<&RelayResult>;

    /// Ends the relay from outside, without its consent.
    fn cancel(&mut self);

    /// What else has to hold at the end, and only this implementation can tell.
    fn check_end(&mut self) {}

    /// The far end whose octets go up, or down.
    fn source(&mut self, way: Way) -> &mut Self::Far {
        if way == Way::Up { self.client() } else { self.dst() }
    }

    fn sink(&mut self, way: Way) -> &mut Self::Far {
        self.source(way.other())
    }

    /// Lets it run until something is so.
    fn wait(&mut self, what: &str, mut is_so: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + SOON;
        loop {
            self.settle();
            if is_so(self) {
                return;
            }
            assert!(Instant::now() < deadline, "not within {SOON:?}: {what}");
            thread::sleep(Duration::from_micros(100));
        }
    }

    fn wait_end(&mut self) {
        self.wait("the relay ends", |tunnel| tunnel.ended().is_some());
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Up,
    Down,
}

impl Way {
    pub fn other(self) -> Self {
        if self == Self::Up { Self::Down } else { Self::Up }
    }
}

/// The end of a stream that is not the relay's. Nothing here waits.
pub trait Far {
    /// How many of the octets the stream took.
    fn send(&mut self, octets: &[u8]) -> usize;

    fn receive(&mut self, most: usize) -> Received;

    fn half_close(&mut self);

    fn reset(&mut self);
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Received {
    Octets(Vec<u8>),
    Nothing,
    End,
    Reset,
}
