//! Wakes an event loop from any thread.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::Wake;

use rustix::event::{EventfdFlags, eventfd};

/// State and eventfd of one event loop. The eventfd is registered edge-triggered, so it need not be read.
pub(super) struct LoopWaker {
    pub(super) eventfd: OwnedFd,
    state: AtomicU8,
}

/// The loop is running and checks the state before it waits.
const AWAKE: u8 = 0;
/// The main future must be polled.
const WOKEN: u8 = 1;
/// The loop waits in the kernel; waking it requires a write to the eventfd.
const ASLEEP: u8 = 2;

impl LoopWaker {
    pub(super) fn new() -> io::Result<Self> {
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { eventfd, state: AtomicU8::new(AWAKE) })
    }

    /// Clears the wake-up. Called before the future is polled.
    pub(super) fn clear(&self) {
        self.state.swap(AWAKE, Ordering::SeqCst);
    }

    pub(super) fn is_woken(&self) -> bool {
        self.state.load(Ordering::SeqCst) == WOKEN
    }

    /// Enters the sleeping state. Returns false if the loop has been woken.
    pub(super) fn try_sleep(&self) -> bool {
        self.state.compare_exchange(AWAKE, ASLEEP, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    pub(super) fn end_sleep(&self) {
        let _ = self.state.compare_exchange(ASLEEP, AWAKE, Ordering::SeqCst, Ordering::SeqCst);
    }
}

impl Wake for LoopWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.state.swap(WOKEN, Ordering::SeqCst) == ASLEEP {
            // Fails only if the counter overflows, after 2^64 writes.
            let _ = rustix::io::write(&self.eventfd, &1_u64.to_ne_bytes());
        }
    }
}
