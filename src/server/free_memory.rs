//! Returns the memory of ended sessions to the kernel. The allocator keeps free memory below any block that is in use.
//! Otherwise most memory of many sessions would stay with the process after their end.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use crate::gssapi::ffi;

/// Minimum number of ended sessions. Fewer do not have enough memory to be worth the time.
const MIN_ENDED: usize = 64;
/// Time from the end of a session to the return of memory: more sessions may end in it. The return can take
/// milliseconds.
const DELAY: Duration = Duration::from_secs(1);

pub(super) static FREE_MEMORY: FreeMemory =
    FreeMemory { open: AtomicUsize::new(0), peak: AtomicUsize::new(0), is_pending: AtomicBool::new(false) };

/// Returns free memory to the system when half of the sessions have ended.
pub(super) struct FreeMemory {
    /// Number of open sessions, and the maximum since memory was returned last.
    open: AtomicUsize,
    peak: AtomicUsize,
    is_pending: AtomicBool,
}

impl FreeMemory {
    pub(super) fn count_session(&self) {
        self.peak.fetch_max(self.open.fetch_add(1, Relaxed) + 1, Relaxed);
    }

    pub(super) fn count_end(&'static self) {
        let open = self.open.fetch_sub(1, Relaxed) - 1;
        let ended = self.peak.load(Relaxed).saturating_sub(open);
        if ended < open.max(MIN_ENDED) || self.is_pending.swap(true, Relaxed) {
            return;
        }
        let release = || {
            thread::sleep(DELAY);
            self.peak.store(self.open.load(Relaxed), Relaxed);
            self.is_pending.store(false, Relaxed);
            ffi::release_free_memory();
        };
        // Without a thread, the next end of a session tries again.
        if thread::Builder::new().name("s5-free-memory".into()).spawn(release).is_err() {
            self.is_pending.store(false, Relaxed);
        }
    }
}
