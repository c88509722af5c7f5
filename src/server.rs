//! The server: listens, runs one session per connection, reloads its policy and shuts down.
//!
//! `policy` decides what a session may do; `conn` and `proto` turn bytes into messages.

mod accept;
mod args;
mod association;
mod bind;
mod connect;
mod handshakes;
mod health;
mod hop_access;
mod inherited;
mod limiter;
mod listen;
mod local_addr;
mod log_queue;
mod log_shares;
mod login_throttle;
mod logins;
mod metrics;
mod notify;
mod options;
pub(crate) mod output_file;
mod passwords;
mod policy_handle;
mod reply;
mod restart;
mod run_as;
mod sandbox;
mod session;
mod session_counts;
mod session_log;
mod shared_ports;
mod shares;
mod startup;
mod state;
mod terminal;
mod tunnel;
mod worker;

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use async_signal::{Signal, Signals};
use futures_lite::{FutureExt as _, StreamExt as _};
use log::Level;
use nix::sys::signal::{SigSet, Signal as Nix};
use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use smol::Timer;
use smol::channel::{self, Receiver};

use crate::net::RelayOptions;
use crate::policy::Policy;
pub use args::{RuleOption, ServeArgs};
use health::StartedServer;
pub use inherited::{inherited_listeners, is_successor};
use limiter::{DialShares, Limiter};
use listen::KEEP_SOCKET_FILES;
pub use listen::{ListenAddr, Listener};
pub use local_addr::is_local;
pub use log_queue::{access_line, eprint_line, flush, start_stderr_thread};
pub use log_shares::{ACCESS_TARGET, LOGFMT_TARGET, admits_detail, current_session};
use logins::Logins;
use notify::Notifier;
pub use options::{Chains, Hop, Options};
use output_file::append;
use policy_handle::PolicyHandle;
use restart::Restarter;
pub use restart::{RESTART_HELPER, report_failed_start, run_restart_helper};
pub use run_as::RunAs;
pub use sandbox::close_inherited_descriptors;
pub use shares::ClientKey;
pub use startup::{ServerError, check, set_server_addrs};
use startup::{check_open_relay, check_outbound, ipv6_only, open_listeners, open_metrics, prepare};
use state::Server;
use terminal::Terminal;
pub use terminal::is_ignored;
use worker::{Worker, WorkerPool, WorkerReport};

/// Descriptors of each process: standard streams, signals, timers, logs and the restart helper.
const PROCESS_DESCRIPTORS: u64 = 18;
/// Time limit for the end of the accept loops at a restart.
const RESTART_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum time that sessions get to finish after SIGQUIT. Meanwhile, new connections wait in the sockets of systemd.
const QUIT_DRAIN: Duration = Duration::from_secs(2);
const SIGNALS: [Signal; 6] = [Signal::Term, Signal::Int, Signal::Quit, Signal::Hup, Signal::Usr1, Signal::Usr2];
/// Upper limit of the default for [`ServeArgs::max_connections`].
const MAX_DEFAULT_CONNECTIONS: u64 = 500_000;

/// What a reload replaces: the policy, and the proxies of each hop with their passwords.
pub type Configuration = (Policy, Vec<Chains>);

/// Reads the configuration again from its files. The error names file, line and word.
pub type LoadConfiguration<'a> = dyn Fn() -> Result<Configuration, String> + 'a;

/// Runs until SIGTERM, SIGINT, SIGQUIT or the end of the terminal, then drains. Reloads at each other SIGHUP. Blocks.
pub fn run(mut options: Options, mut policy: Policy, load: &LoadConfiguration<'_>) -> Result<(), ServerError> {
    let terminal = Terminal::at_start();
    // From the time that the server can be reached until it handles signals. Handling them starts a thread.
    let waiting: SigSet = SIGNALS.iter().filter_map(|signal| Nix::try_from(*signal as i32).ok()).collect();
    waiting.thread_block().map_err(|error| ServerError::io("block signals")(error.into()))?;
    let descriptors = raise_descriptor_limit();
    let (dial_shares, dial_descriptors) = DialShares::new(descriptors);
    let notifier = Notifier::connect();
    let listeners: Vec<_> = open_listeners(&mut options)?.into_iter().map(Arc::new).collect();
    let metrics: Vec<_> = open_metrics(&options)?.into_iter().map(Arc::new).collect();
    // An event loop has two.
    let own = 2 * u64::from(options.threads) + listeners.len() as u64 + dial_descriptors;
    let own = own + health::descriptors(descriptors, metrics.len() as u64);
    let max_sessions = options.max_connections.unwrap_or_else(|| default_max_sessions(descriptors, own));
    policy.metrics_addrs = metrics.iter().flat_map(|listener| listener.addrs()).collect();
    // Before the sandbox.
    let restarter =
        Restarter::start(&options.command_line, options.successor_variable.as_ref(), notifier.watchdog.is_some());
    let log_sandbox = prepare(&mut policy, &options, listeners.iter().flat_map(|listener| listener.addrs()).collect())?;
    let addrs: Vec<String> = listeners.iter().map(ToString::to_string).collect();
    let is_restricted = !options.no_sandbox;
    // With the rights that it has at a reload.
    let access_log = options.access_log.clone().map(|path| match append(&path) {
        Ok(file) => Ok((path, file)),
        Err(error) => Err(ServerError::AccessLog(path, error)),
    });
    // From now on, a reader of stderr that stops reading stops neither sessions nor signals.
    log_queue::start(access_log.transpose()?).map_err(ServerError::io("start a thread for the log"))?;
    let started = StartedServer::default();
    for addr in ipv6_only(&policy.listen_addrs) {
        log::info!("{addr} accepts only IPv6 (for IPv4 too, use --listen *:{})", addr.port());
    }
    let signals = Signals::new(SIGNALS).map_err(ServerError::io("handle signals"))?;
    waiting.thread_unblock().map_err(|error| ServerError::io("unblock signals")(error.into()))?;
    let drain = options.drain_timeout;
    let relay_options = RelayOptions {
        idle_timeout: Some(options.idle_timeout),
        stop_when_bulk: options.threads > 1,
        ..RelayOptions::default()
    };
    metrics::set_last_reload(true);
    let (policy, limiter) = (PolicyHandle::new(policy, options.keep_sessions), Limiter::new(max_sessions, &options));
    let (pool, workers, reports) = WorkerPool::new(options.threads);
    let server = Arc::new(Server {
        options,
        policy,
        limiter,
        dial_shares,
        logins: Logins::default(),
        relay_options,
        workers: pool,
        shared_ports: Arc::default(),
    });
    let spare = RefCell::default();
    with_spare_descriptors(&spare, descriptors, || ());
    let passed_on = [&listeners, &metrics].map(|listeners| listeners.iter().map(Arc::downgrade).collect());
    let (is_replaced, replaced) = channel::bounded(1);
    health::start(&metrics, started.clone(), replaced).map_err(ServerError::io("start a thread for metrics"))?;
    let threads = start(&server, workers, listeners, &reports).map_err(ServerError::io("start worker threads"))?;
    // From now on, only the accept loops and the sessions keep the server alive.
    let server = Arc::downgrade(&{ server });
    let server = started.get_or_init(|| server);
    for addr in addrs {
        log::info!("listening on {addr}");
    }
    log_sandbox();
    notifier.ready();
    let reload = async || {
        notifier.reloading();
        log_queue::reopen_access_log();
        let loaded = with_spare_descriptors(&spare, descriptors, || {
            if is_restricted {
                sandbox::warn_unreadable_system_files();
            }
            load()
        });
        reload(server, loaded).await;
        notifier.ready();
    };
    let spawn =
        |restarter: &Restarter| with_spare_descriptors(&spare, descriptors, || restarter.start_successor(&passed_on));
    let restart = async || {
        let started = match &restarter {
            Ok(restarter) => restarter.wait_ready(spawn(restarter)).await,
            Err(error) => Err(error.to_string()),
        };
        let (pid, _successor) = started.map_err(|error| log::error!("restart: {error}; this process goes on")).ok()?;
        KEEP_SOCKET_FILES.store(true, Ordering::Relaxed);
        is_replaced.close();
        if let Some(server) = server.upgrade() {
            server.workers.stop_accepting();
            server.shared_ports.on_replaced();
            server.workers.wait_for_all().or(async { _ = Timer::after(RESTART_TIMEOUT).await }).await;
        }
        log_queue::FOLLOWS_PATH.store(true, Ordering::Relaxed);
        notifier.replaced_by(pid);
        log::info!("restart: process {pid} accepts connections from now on");
        // The successor accepts connections when the connection to it is closed.
        Some(())
    };
    let stop_accepting = |drain| {
        notifier.stopping(drain);
        server.upgrade().into_iter().for_each(|server| server.workers.stop_accepting());
    };
    let ended = run_until_shutdown(signals, &terminal, drain, reports, reload, restart, stop_accepting);
    let result = smol::block_on(ended.or(notifier.run(server)));
    if let Some(server) = server.upgrade() {
        server.workers.stop();
    }
    for thread in threads {
        // The panic of a worker is already reported.
        let _ = thread.join();
    }
    log_shares::report();
    result
}

/// Applies a configuration that was loaded again, and rechecks all sessions. Keeps the current configuration if
/// `loaded` is an error.
async fn reload(server: &Weak<Server>, loaded: Result<Configuration, String>) {
    let Some(server) = server.upgrade() else { return };
    let old = server.policy.current();
    let loaded = loaded.and_then(|(policy, hops)| {
        let policy = policy.with_listeners_of(&old.policy);
        let error = check_open_relay(&policy, &server.options).or_else(|| check_outbound(&policy, &server.options));
        error.map_or(Ok((policy, hops)), Err)
    });
    metrics::set_last_reload(loaded.is_ok());
    match loaded {
        Err(error) => {
            let remedy = sandbox::reload_remedy(&server.options.reload_files);
            log::error!("reload: {error}{remedy}; keeping the current configuration");
        }
        Ok((policy, hops)) => {
            for (hop, chains) in server.options.hops.iter().zip(hops) {
                hop.set_chains(chains);
            }
            let users = policy.users.as_ref().map_or(0, |users| users.names().len());
            let rules = policy.rules.user_rules().len();
            server.policy.replace(policy);
            // The sessions that wait recheck themselves now. A session in the middle of another step does it after
            // that.
            server.workers.wake_all().await;
            let closed = server.policy.closed_sessions.load(Ordering::Relaxed);
            log::info!("reload: users: {users}, rules: {rules}, sessions closed: {closed}");
        }
    }
}

/// Starts the threads, takes over from the old process, if there is one, and returns when all threads accept connections.
///
/// The kernel wakes one event loop for a connection. If that of the old process was woken, and then did not accept, the
/// connection would wait. Therefore the listeners are registered when they are registered there no more.
fn start(
    server: &Arc<Server>,
    workers: Vec<Worker>,
    listeners: Vec<Arc<Listener>>,
    reports: &Receiver<WorkerReport>,
) -> io::Result<Vec<JoinHandle<()>>> {
    let threads = workers.into_iter().map(Worker::spawn).collect::<io::Result<Vec<_>>>()?;
    let wait = || {
        threads.iter().try_for_each(|_| match reports.recv_blocking() {
            Ok(WorkerReport::Failed(error)) => Err(error),
            _ => Ok(()),
        })
    };
    wait()?;
    restart::take_over()?;
    let this = server.clone();
    server.workers.start_on_all(move || accept::start(&this, &listeners));
    wait()?;
    Ok(threads)
}

/// Returns the number of sessions that the descriptors suffice for: each has two, the client's connection and the
/// target's. `own`: those of the threads and listeners.
fn default_max_sessions(limit: u64, own: u64) -> usize {
    // As many as there are spare ones can be open for a short time, such as files.
    let by_descriptors = limit.saturating_sub(own + PROCESS_DESCRIPTORS + 2 * spare_count(limit)) / 2;
    usize::try_from(by_descriptors.clamp(1, MAX_DEFAULT_CONNECTIONS)).unwrap_or(usize::MAX)
}

/// Raises the soft limit of descriptors to the hard one, and returns the limit that is in effect then.
fn raise_descriptor_limit() -> u64 {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    match setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        Ok(()) => maximum,
        Err(_) => current,
    }
    .unwrap_or(u64::MAX)
}

/// Descriptors that a reload or restart can use even if sessions have all others. It needs one or two at a time; the
/// others are there because sessions may take some at that moment.
fn spare_count(limit: u64) -> u64 {
    (limit / 16).clamp(2, 16)
}

/// Runs `work`, which can use the spare descriptors, and opens these again.
fn with_spare_descriptors<T>(spare: &RefCell<Vec<OwnedFd>>, limit: u64, work: impl FnOnce() -> T) -> T {
    spare.take();
    let result = work();
    spare.replace((0..spare_count(limit)).map_while(|_| fcntl_dupfd_cloexec(io::stderr(), 3).ok()).collect());
    result
}

/// Handles signals until [`wait_end_signal`] returns. Then stops accepting, and returns when all sessions have ended,
/// after `drain`, or at a second signal of this kind. Returns the error of a worker that ends earlier, and of the stream
/// of signals: a supervisor would not notice a server that runs without one of its threads, or that no signal ends.
async fn run_until_shutdown(
    mut signals: Signals,
    terminal: &Terminal,
    drain: Duration,
    reports: Receiver<WorkerReport>,
    reload: impl AsyncFn(),
    restart: impl AsyncFn() -> Option<()>,
    stop_accepting: impl FnOnce(Duration),
) -> Result<(), ServerError> {
    let (requests, restarts) = channel::bounded(1);
    let is_restarting = Cell::new(false);
    let request_restart = || match is_restarting.replace(true) {
        true => log::warn!("restart: refused, because a restart is in progress"),
        false => drop(requests.try_send(())),
    };
    let end_signal = async {
        let hang_up = async || {
            let is_end = terminal.is_gone();
            if !is_end {
                reload().await;
            }
            is_end
        };
        wait_end_signal(&mut signals, hang_up, request_restart).await
    };
    let replaced = async {
        while restarts.recv().await.is_ok() && restart().await.is_none() {
            is_restarting.set(false);
        }
        Ok(Signal::Usr2)
    };
    // A report that all have ended precedes the error of the only worker.
    let worker_error = async {
        while let Ok(report) = reports.recv().await {
            if let WorkerReport::Failed(error) = report {
                return Err(ServerError::io("worker threads")(error));
            }
        }
        std::future::pending().await
    };
    let is_quick = end_signal.or(worker_error).or(replaced).await? == Signal::Quit;
    let drain = if is_quick { drain.min(QUIT_DRAIN) } else { drain };
    stop_accepting(drain);
    log::info!("shutting down: draining sessions for up to {drain:?}");
    let drained = async {
        while !matches!(reports.recv().await, Ok(WorkerReport::AllEnded) | Err(_)) {}
        Ok(())
    };
    let timeout = async {
        Timer::after(drain).await;
        log::info!("shutting down: drain time over, closing the remaining sessions");
        Ok(())
    };
    let second_signal = async {
        // When a terminal is closed, the shell and the kernel may both send SIGHUP.
        let refuse = || log::warn!("restart: refused, because this process is ending");
        let reopen = async || {
            log_queue::reopen_access_log();
            false
        };
        wait_end_signal(&mut signals, reopen, refuse).await?;
        log::info!("shutting down: second signal, closing the remaining sessions");
        Ok(())
    };
    drained.or(timeout).or(second_signal).await
}

/// Returns a signal that ends the server, or SIGHUP if `hang_up` returns true. Logs the counters at SIGUSR1, even with
/// `--quiet`: the line was asked for.
async fn wait_end_signal(
    signals: &mut Signals,
    hang_up: impl AsyncFn() -> bool,
    restart: impl Fn(),
) -> Result<Signal, ServerError> {
    while let Some(signal) = signals.next().await {
        match signal.map_err(ServerError::io("wait for a signal"))? {
            Signal::Usr1 => {
                let level = if log::log_enabled!(Level::Info) { Level::Info } else { Level::Warn };
                log::log!(target: LOGFMT_TARGET, level, "msg=counters {}", session_counts::fields());
            }
            Signal::Usr2 => restart(),
            Signal::Hup if !hang_up().await => {}
            signal => return Ok(signal),
        }
    }
    Err(ServerError::io("wait for a signal")(io::ErrorKind::UnexpectedEof.into()))
}
