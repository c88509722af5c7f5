//! One timer for whoever keeps moving its deadline: it is not set anew when the deadline moves away, only when it comes
//! nearer, and fires too early instead. So an octet that moves costs no timer.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use smol::Timer;

/// A timer and what it is set to.
#[derive(Debug)]
pub struct Alarm {
    timer: Timer,
    set: Option<Instant>,
}

impl Default for Alarm {
    fn default() -> Self {
        Self { timer: Timer::never(), set: None }
    }
}

impl Alarm {
    /// Ready at `due`, or at an earlier deadline that it was set to before: look at the clock, and poll again.
    pub fn poll(&mut self, cx: &mut Context<'_>, due: Instant) -> Poll<()> {
        if self.set.is_none_or(|set| due < set) {
            self.timer.set_at(due);
            self.set = Some(due);
        }
        ready!(Pin::new(&mut self.timer).poll(cx));
        self.set = None;
        Poll::Ready(())
    }
}
