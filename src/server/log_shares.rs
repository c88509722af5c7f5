//! Limits the lines of the log per second, for each client and topic. So a client can neither fill the disk nor hide a
//! line among others. The lines that are left out are counted, and at the end of the second a line has their number.

use std::cell::Cell;
use std::collections::HashMap;
use std::future::poll_fn;
use std::mem::replace;
use std::sync::{LazyLock, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use log::Level;

use super::shares::{ClientKey, lock};
use super::worker::{self, Priority};
use crate::counters::{self, Counter};
use crate::net::sleep_until;

/// Target of records in logfmt. The logger adds time and level as further fields.
pub const LOGFMT_TARGET: &str = "s5::session";
/// Target of records in logfmt about ended sessions, for `--access-log`.
pub const ACCESS_TARGET: &str = "s5::access";
const INTERVAL: Duration = Duration::from_secs(1);
/// Maximum number of clients that are counted separately in an interval. All further clients are counted together.
const MAX_CLIENTS: usize = 4096;

/// What a line is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Topic {
    /// A session that has ended.
    Session,
    /// A failed login, for fail2ban. Counted separately, so that no client can hide its guesses among other sessions.
    Login,
    /// A step of a session, or a connection without a request.
    Step,
    /// Connections that a rule has refused at accept.
    Refused,
    /// A limit that was reached, or an error of accept(2), which may repeat.
    Warning,
}

impl Topic {
    pub(super) fn level(self) -> Level {
        match self {
            Self::Session | Self::Refused => Level::Info,
            Self::Login | Self::Warning => Level::Warn,
            Self::Step => Level::Debug,
        }
    }

    fn target(self) -> &'static str {
        match self {
            Self::Session | Self::Login | Self::Refused => ACCESS_TARGET,
            Self::Step | Self::Warning => LOGFMT_TARGET,
        }
    }

    /// Maximum number of lines in [`INTERVAL`], of each client and of all: a flood from many addresses must not fill the
    /// disk either.
    fn limits(self) -> (u32, u32) {
        match self {
            Self::Session | Self::Login => (20, 2000),
            Self::Step => (200, 20_000),
            Self::Refused | Self::Warning => (1, 1),
        }
    }
}

type Key = (Topic, Option<ClientKey>);

/// The lines of the current interval.
struct Shares {
    /// The number of lines of each topic that were logged.
    logged: [u32; Topic::Warning as usize + 1],
    since: Instant,
    /// The numbers of lines that were logged, and of those that were left out.
    lines: HashMap<Key, (u32, u32)>,
    /// Set when a line was left out, and a task reports it at the end of the interval.
    has_task: bool,
}

impl Shares {
    fn new(since: Instant) -> Self {
        Self { since, logged: Default::default(), lines: HashMap::new(), has_task: false }
    }

    /// Begins an interval. Returns the lines of the one before.
    fn restart(&mut self, now: Instant) -> HashMap<Key, (u32, u32)> {
        replace(self, Self::new(now)).lines
    }

    /// Counts a line. Returns whether it may be logged.
    fn admit(&mut self, topic: Topic, client: Option<ClientKey>) -> bool {
        let (limit, limit_of_all) = topic.limits();
        let all = self.logged.get_mut(topic as usize).filter(|all| **all < limit_of_all);
        // At the limit of all, one line reports what all of them have left out.
        let is_known = self.lines.len() < MAX_CLIENTS || self.lines.contains_key(&(topic, client));
        let client = client.filter(|_| all.is_some() && is_known);
        let (logged, left_out) = self.lines.entry((topic, client)).or_default();
        match all.filter(|_| *logged < limit) {
            Some(all) => (*all, *logged) = (*all + 1, *logged + 1),
            None => {
                *left_out += 1;
                return false;
            }
        }
        true
    }
}

fn shares() -> MutexGuard<'static, Shares> {
    static SHARES: LazyLock<Mutex<Shares>> = LazyLock::new(|| Mutex::new(Shares::new(Instant::now())));
    lock(&SHARES)
}

/// Returns whether a line may be logged, and counts it. `client` is `None` for a topic that all clients share.
pub(super) fn admit(topic: Topic, client: Option<ClientKey>) -> bool {
    if !log::log_enabled!(target: topic.target(), topic.level()) {
        return false;
    }
    let mut shares = shares();
    let now = Instant::now();
    // The task may be late, or its worker may have ended.
    let is_over = now >= shares.since + INTERVAL * if shares.has_task { 2 } else { 1 };
    let ended = if is_over { shares.restart(now) } else { HashMap::new() };
    let is_within = shares.admit(topic, client);
    counters::add(Counter::OmittedLines, u64::from(!is_within));
    // When the workers end, `report` follows.
    if !is_within && !shares.has_task && !worker::is_ending() {
        shares.has_task = true;
        let end = shares.since + INTERVAL;
        worker::spawn_boxed(Priority::Normal, async move {
            sleep_until(end).await;
            report();
        });
    }
    drop(shares);
    log_left_out(ended);
    is_within
}

/// Logs the numbers of lines that were left out, and begins the next interval.
pub(super) fn report() {
    let ended = shares().restart(Instant::now());
    log_left_out(ended);
}

fn log_left_out(lines: HashMap<Key, (u32, u32)>) {
    for ((topic, client), (_, left_out)) in lines.into_iter().filter(|(_, (_, left_out))| *left_out > 0) {
        let from = client.map_or(String::new(), |client| format!(" from={client}"));
        let name = format!("{topic:?}").to_ascii_lowercase();
        log::log!(target: topic.target(), topic.level(), "msg=omitted topic={name}{from} lines={left_out}");
    }
}

thread_local! {
    static CURRENT: Cell<Option<(u32, ClientKey)>> = const { Cell::new(None) };
}

/// Returns the `id=` of the session whose task runs on this thread, for records of modules that know no sessions.
pub fn current_session() -> Option<u32> {
    CURRENT.get().map(|(id, _)| id)
}

/// Returns whether the share of the client of [`current_session`] has room for a line.
pub fn admits_detail() -> bool {
    CURRENT.get().is_none_or(|(_, client)| admit(Topic::Step, Some(client)))
}

/// Runs the task of a session up to its tunnel, so that [`current_session`] returns its id.
pub(super) fn in_session(
    id: u32,
    client: ClientKey,
    task: impl Future<Output = ()> + 'static,
) -> impl Future<Output = ()> {
    struct Leave;
    impl Drop for Leave {
        fn drop(&mut self) {
            CURRENT.set(None);
        }
    }
    // Boxed, because an async fn would store the task twice.
    let mut task = Box::pin(task);
    poll_fn(move |cx| {
        CURRENT.set(Some((id, client)));
        let _leave = Leave;
        task.as_mut().poll(cx)
    })
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn all_clients_together_log_2000_sessions_and_2000_failed_logins_in_a_second() {
        let mut shares = Shares::new(Instant::now());
        let mut admitted = |topic, clients: u32| {
            let client = |n| Some(ClientKey::new(Some(Ipv4Addr::from_bits(n).into())));
            let lines = (1..=clients).flat_map(|n| [client(n); 30]);
            lines.filter(|client| shares.admit(topic, *client)).count()
        };
        assert_eq!(admitted(Topic::Session, 50), 50 * 20);
        assert_eq!(admitted(Topic::Session, 150), 1000);
        assert_eq!(admitted(Topic::Login, 150), 2000, "sessions hide no failed login");
        let left_out: Vec<u32> = shares.restart(Instant::now()).into_values().map(|(_, left_out)| left_out).collect();
        assert_eq!(left_out.iter().sum::<u32>(), (50 + 150 + 150) * 30 - 4000);
        assert!(left_out.len() <= 2 * 101, "the lines with these numbers are limited too: {}", left_out.len());
        assert!(shares.admit(Topic::Session, None), "in the next second");
    }
}
