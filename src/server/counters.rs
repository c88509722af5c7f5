//! Counts of sessions and bytes since the start, which SIGUSR1 logs. A process has one server, so there is one set.

use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use smol::channel::{Receiver, Sender, bounded};

use super::free_memory::FREE_MEMORY;
use crate::net::ByteCounts;
use crate::proto::Rep;

pub(super) static COUNTERS: Counters = Counters::new();

pub(super) struct Counters {
    sessions: AtomicU64,
    ended_sessions: AtomicU64,
    /// Associations that are open now.
    associations: AtomicU64,
    /// Connections and requests that a rule or a limit has refused.
    refused: AtomicU64,
    /// Requests with any other failure reply.
    failed: AtomicU64,
    failed_logins: AtomicU64,
    /// Set if [`Counters::changes`] is used: receives a message when a session begins or ends, unless one waits.
    changed: OnceLock<Sender<()>>,
    /// Bytes of sessions that have ended.
    bytes: ByteCounts,
}

impl Counters {
    const fn new() -> Self {
        let [sessions, ended_sessions, associations, refused] = [const { AtomicU64::new(0) }; 4];
        let [failed, failed_logins, up, down] = [const { AtomicU64::new(0) }; 4];
        let bytes = ByteCounts { up, down };
        Self { sessions, ended_sessions, associations, refused, failed, failed_logins, changed: OnceLock::new(), bytes }
    }

    /// Counts a new session. Returns its number; after 2^32 sessions, the numbers repeat.
    pub(super) fn next_session(&self) -> u32 {
        FREE_MEMORY.count_session();
        let number = self.sessions.fetch_add(1, Relaxed) + 1;
        self.report_change();
        number as u32
    }

    /// Counts the end of a session, with the REP of its last reply.
    pub(super) fn count_end(&self, rep: Option<Rep>, bytes: &ByteCounts) {
        FREE_MEMORY.count_end();
        self.ended_sessions.fetch_add(1, Relaxed);
        self.report_change();
        self.bytes.up.fetch_add(bytes.up.load(Relaxed), Relaxed);
        self.bytes.down.fetch_add(bytes.down.load(Relaxed), Relaxed);
        let outcome = match rep {
            None | Some(Rep::SUCCEEDED) => return,
            Some(Rep::NOT_ALLOWED) => &self.refused,
            Some(_) => &self.failed,
        };
        outcome.fetch_add(1, Relaxed);
    }

    pub(super) fn count_failed_login(&self) {
        self.failed_logins.fetch_add(1, Relaxed);
    }

    /// Counts a connection that is closed at accept.
    pub(super) fn count_refused(&self) {
        self.refused.fetch_add(1, Relaxed);
    }

    /// Returns a channel that has a message if sessions have begun or ended since the last one was received.
    pub(super) fn changes(&self) -> Receiver<()> {
        let (changed, changes) = bounded(1);
        let _ = self.changed.set(changed);
        changes
    }

    fn report_change(&self) {
        if let Some(changed) = self.changed.get() {
            let _ = changed.try_send(());
        }
    }

    /// Returns the numbers of sessions for the service manager.
    pub(super) fn summary(&self) -> String {
        // First, so that the difference is not negative.
        let ended = self.ended_sessions.load(Relaxed);
        let sessions = self.sessions.load(Relaxed);
        format!("{} sessions open, {sessions} since the start", sessions.saturating_sub(ended))
    }

    /// Counts an association until the result is dropped.
    pub(super) fn count_association(&'static self) -> AssociationGuard {
        self.associations.fetch_add(1, Relaxed);
        AssociationGuard(&self.associations)
    }
}

pub(super) struct AssociationGuard(&'static AtomicU64);

impl Drop for AssociationGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// The fields of a log line.
impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // First, so that `open` is not negative.
        let ended = self.ended_sessions.load(Relaxed);
        let sessions = self.sessions.load(Relaxed);
        write!(f, "open={} associations={}", sessions.saturating_sub(ended), self.associations.load(Relaxed))?;
        write!(f, " sessions={sessions} refused={}", self.refused.load(Relaxed))?;
        write!(f, " failed={} failed_logins={}", self.failed.load(Relaxed), self.failed_logins.load(Relaxed))?;
        write!(f, " up={} down={}", self.bytes.up.load(Relaxed), self.bytes.down.load(Relaxed))
    }
}
