//! Reports to the service manager: see sd_notify(3). A process without NOTIFY_SOCKET reports nothing, and never wakes up
//! for it.
//!
//! The socket is connected before the sandbox is entered, which allows no new connections to abstract sockets.

use std::cell::{Cell, RefCell};
use std::env;
use std::ffi::{OsStr, OsString};
use std::future::pending;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Weak;
use std::time::Duration;

use futures_lite::FutureExt as _;
use rustix::time::{ClockId, clock_gettime};
use smol::Timer;

use super::inherited::{is_successor, number};
use super::session_counts;
use super::state::Server;

/// Minimum time between two reports of the number of sessions.
const STATUS_INTERVAL: Duration = Duration::from_secs(5);
/// Time limit of the first report that the service manager does not read.
const SEND_TIMEOUT: Duration = Duration::from_secs(1);
/// Minimum time between two reports to the watchdog, because each of them waits for a task of all workers.
const MIN_WATCHDOG_INTERVAL: Duration = Duration::from_millis(100);
/// Time from the end of the drain time to the exit, at most.
const EXIT_TIME: Duration = Duration::from_secs(10);

#[derive(Default)]
pub(super) struct Notifier {
    /// The socket of the service manager, with its name.
    socket: Option<(OsString, UnixDatagram)>,
    /// Set when a report has failed, which is logged once.
    has_failed: Cell<bool>,
    /// Time between two reports to the watchdog, if it is enabled.
    pub(super) watchdog: Option<Duration>,
    is_draining: Cell<bool>,
    is_replaced: Cell<bool>,
    last_status: RefCell<String>,
}

impl Notifier {
    pub(super) fn connect() -> Self {
        let socket = env::var_os("NOTIFY_SOCKET").and_then(|name| {
            let socket = connect(&name).map_err(|error| warn(&name, error)).ok()?;
            Some((name, socket))
        });
        let watchdog = watchdog_interval().inspect_err(|error| log::warn!("{error} (the watchdog is not used)"));
        Self { socket, watchdog: watchdog.unwrap_or_default(), ..Self::default() }
    }

    /// Reports that the server accepts connections and has loaded its files.
    pub(super) fn ready(&self) {
        let main_pid = if is_successor() { format!("MAINPID={}\n", std::process::id()) } else { String::new() };
        self.send_with_status(&format!("{main_pid}READY=1\n"));
    }

    /// Reports that a reload begins.
    pub(super) fn reloading(&self) {
        let time = clock_gettime(ClockId::Monotonic);
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={}", time.tv_sec * 1_000_000 + time.tv_nsec / 1000));
    }

    /// Reports that the server accepts no more connections, and ends after `drain` at the latest.
    pub(super) fn stopping(&self, drain: Duration) {
        self.is_draining.set(true);
        let limit = drain.saturating_add(EXIT_TIME).as_micros();
        self.send_with_status(&format!("STOPPING=1\nEXTEND_TIMEOUT_USEC={limit}\n"));
    }

    /// Reports that another process has taken over. That one makes all further reports.
    pub(super) fn replaced_by(&self, pid: u32) {
        self.send(&format!("MAINPID={pid}"));
        self.is_replaced.set(true);
    }

    /// Reports the number of sessions and feeds the watchdog.
    pub(super) async fn run<T>(&self, server: &Weak<Server>) -> T {
        if self.socket.is_none() {
            return pending().await;
        }
        self.feed_watchdog(server).or(self.report_sessions()).await
    }

    async fn feed_watchdog<T>(&self, server: &Weak<Server>) -> T {
        let Some(interval) = self.watchdog else { return pending().await };
        loop {
            Timer::after(interval).await;
            if let Some(server) = server.upgrade() {
                // Does not return if a worker is stuck.
                server.workers.wait_for_all().await;
            }
            self.send("WATCHDOG=1");
        }
    }

    async fn report_sessions<T>(&self) -> T {
        let changes = session_counts::changes();
        loop {
            if self.status() != *self.last_status.borrow() {
                self.send_with_status("");
                Timer::after(STATUS_INTERVAL).await;
            }
            let _ = changes.recv().await;
        }
    }

    fn status(&self) -> String {
        let state = if self.is_draining.get() { "draining" } else { "serving" };
        format!("STATUS={state}: {}", session_counts::summary())
    }

    fn send_with_status(&self, report: &str) {
        let status = self.status();
        self.send(&format!("{report}{status}"));
        self.last_status.replace(status);
    }

    fn send(&self, report: &str) {
        if let Some((name, socket)) = self.socket.as_ref().filter(|_| !self.is_replaced.get())
            && let Err(error) = socket.send(report.as_bytes())
            && !self.has_failed.replace(true)
        {
            // Waiting for it again would only delay signals.
            let _ = socket.set_nonblocking(true);
            warn(name, error);
        }
    }
}

fn warn(name: &OsStr, error: io::Error) {
    log::warn!("NOTIFY_SOCKET {}: {error} (the service manager gets no reports)", name.display());
}

fn connect(name: &OsStr) -> io::Result<UnixDatagram> {
    let addr = match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        [b'/', ..] => SocketAddr::from_pathname(name)?,
        _ => return Err(io::Error::other("expected a path or an abstract name (@NAME)")),
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&addr)?;
    socket.set_write_timeout(Some(SEND_TIMEOUT))?;
    Ok(socket)
}

/// Returns half of the time after which the service manager regards the server as stuck.
fn watchdog_interval() -> Result<Option<Duration>, String> {
    let is_other = number("WATCHDOG_PID")?.is_some_and(|pid: u32| pid != std::process::id());
    let limit = number("WATCHDOG_USEC")?.filter(|limit| *limit > 0 && !is_other);
    Ok(limit.map(|limit| MIN_WATCHDOG_INTERVAL.max(Duration::from_micros(limit) / 2)))
}
