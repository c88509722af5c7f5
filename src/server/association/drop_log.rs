//! Reports the datagrams that an association drops, if the server is verbose: at most one line a second.

use std::cell::Cell;
use std::fmt;
use std::time::{Duration, Instant};

use super::super::session_log::SessionLog;
use crate::proto::Addr;

const INTERVAL: Duration = Duration::from_secs(1);

/// Counts the dropped datagrams since the last line.
#[derive(Default)]
pub(super) struct DropLog {
    count: Cell<u32>,
    next_line: Cell<Option<Instant>>,
}

impl DropLog {
    /// Counts a datagram to `dst`. `None`: the reason says what is known of it.
    pub(super) fn record(&self, log: &SessionLog, dst: Option<&Addr>, reason: impl fmt::Display) {
        if !SessionLog::logs_steps() {
            return;
        }
        self.count.set(self.count.get().saturating_add(1));
        let now = Instant::now();
        if self.next_line.get().is_none_or(|next| now >= next) {
            self.next_line.set(Some(now + INTERVAL));
            log.log_drop(self.count.take(), dst, &reason);
        }
    }
}
