//! The terminal that the server was started on. When it is gone, SIGHUP ends the server instead of reloading its
//! policy: the window was closed, and nobody can see or stop the server any more.

use std::fs;

use async_signal::Signal;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::{self, Errno};

pub(super) struct Terminal {
    /// Set if the server ends with its terminal.
    is_bound: bool,
}

impl Terminal {
    /// Call it before SIGHUP is handled: a server that was started with SIGHUP ignored, as by nohup(1), outlives its
    /// terminal.
    pub(super) fn at_start() -> Self {
        Self { is_bound: open_terminal().is_ok() && !is_ignored(Signal::Hup as i32) }
    }

    /// Returns true if the server had a controlling terminal at its start, and has lost it.
    pub(super) fn is_gone(&self) -> bool {
        self.is_bound && matches!(open_terminal(), Err(Errno::NXIO | Errno::IO | Errno::NODEV | Errno::NOTTY))
    }
}

/// Opens the controlling terminal for a moment.
fn open_terminal() -> io::Result<()> {
    open("/dev/tty", OFlags::RDONLY | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()).map(drop)
}

/// Returns true if nohup(1) or a shell has set the process to ignore a signal. Call it before a handler is installed.
pub fn is_ignored(signal: i32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    // See proc_pid_status(5): signal N is bit N - 1.
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}
