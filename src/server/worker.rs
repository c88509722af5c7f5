//! One thread of the server. It has its own event loop and executor, accepts connections and runs their sessions.
//!
//! All workers listen, and the kernel wakes an idle one. A session stays on the worker that accepted it, because a move
//! costs more than most sessions. There are two exceptions. A worker with far more sockets than another one passes new
//! connections to it. A tunnel with bulk data moves to the worker with the fewest such tunnels.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_lite::FutureExt as _;
use smol::LocalExecutor;
use smol::channel::{self, Receiver, Sender};
use smol::lock::Semaphore;

use super::limiter::SessionQuota;
use super::listen::Listener;
use super::session;
use super::state::Server;
use super::tunnel::{DetachedTunnel, Tunnel};
use crate::conn::DetachedConn;
use crate::net::{Io, RateLimit, RelayOptions, RelayOutcome, reactor};

/// Error text for a panic in a worker thread.
pub(super) const WORKER_PANIC: &str = "a thread panicked; please report it";
/// A worker passes new connections to another one if it has more than twice as many sockets and this many in addition.
const SOCKET_SURPLUS: usize = 64;

/// State that all workers share. Each worker, accept loop and session holds a reference.
pub(super) struct WorkerPool {
    pub(super) server: Server,
    /// Maximum number of concurrent sessions.
    pub(super) limit: usize,
    /// One permit per session that can still start.
    pub(super) permits: Semaphore,
    pub(super) log: RateLimitedLog,
    peers: Vec<PeerWorker>,
    /// Closes when the last accept loop and the last session have ended.
    _alive: Sender<Infallible>,
}

/// The part of a worker that the other workers use.
pub(super) struct PeerWorker {
    /// Unbounded, but holds at most `limit` sessions and one policy change.
    pub(super) inbox: Sender<WorkerMessage>,
    socket_count: Arc<AtomicUsize>,
    /// Tunnels with bulk data.
    bulk_count: AtomicUsize,
}

/// A message to another worker.
pub(super) enum WorkerMessage {
    Accepted(DetachedConn, Option<SocketAddr>, SessionPermit),
    Bulk(DetachedTunnel, SessionPermit, BulkGuard),
    /// Dropped once the waiting sessions of this worker have rechecked themselves.
    PolicyChanged {
        _done: Sender<Infallible>,
    },
}

impl WorkerPool {
    /// Returns the worker that should take a new connection instead of `this` one.
    pub(super) fn less_loaded(&self, this: u16) -> Option<&PeerWorker> {
        let sockets = |peer: &PeerWorker| peer.socket_count.load(Ordering::Relaxed);
        let least = self.peers.iter().min_by_key(|peer| sockets(peer))?;
        (sockets(self.peers.get(usize::from(this))?) > 2 * sockets(least) + SOCKET_SURPLUS).then_some(least)
    }

    /// Returns the worker with the fewest bulk tunnels, `this` one if several have as few.
    fn fewest_bulk(&self, this: u16) -> u16 {
        let bulk = |peer: &PeerWorker| peer.bulk_count.load(Ordering::Relaxed);
        let least = (0..).zip(&self.peers).min_by_key(|(index, peer)| (bulk(peer), *index != this));
        least.map_or(this, |(index, _)| index)
    }
}

/// Logs at most one warning per second and drops the others.
#[derive(Default)]
pub(super) struct RateLimitedLog(Mutex<Option<Instant>>);

impl RateLimitedLog {
    pub(super) fn warn(&self, text: impl FnOnce() -> String) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_none_or(|last| last.elapsed() >= Duration::from_secs(1)) {
            *last = Some(Instant::now());
            log::warn!("{}", text());
        }
    }
}

/// Counts a session against all limits while it runs, and gives it access to the server.
pub(super) struct SessionPermit {
    pub(super) pool: Arc<WorkerPool>,
    pub(super) quota: Option<Box<SessionQuota>>,
}

impl SessionPermit {
    fn server(&self) -> &Server {
        &self.pool.server
    }

    fn rate_limit(&self) -> Option<&RateLimit> {
        self.quota.as_ref()?.rate_limit.as_ref()
    }
}

impl Drop for SessionPermit {
    fn drop(&mut self) {
        self.pool.permits.add_permits(1);
    }
}

/// Weak handle to the workers; does not keep them alive.
pub(super) struct WorkerPoolHandle(std::sync::Weak<WorkerPool>);

impl WorkerPoolHandle {
    pub(super) fn upgrade(&self) -> Option<Arc<WorkerPool>> {
        self.0.upgrade()
    }
}

impl WorkerPool {
    pub(super) fn server(&self) -> &Server {
        &self.server
    }

    /// Wakes all sessions, so that they recheck themselves against the new policy. Returns when all tunnels and UDP
    /// associations have done so. A session in the middle of another step does it after that step.
    pub(super) async fn recheck_all(&self) {
        let (done, all_done) = channel::bounded(1);
        for peer in &self.peers {
            // Fails only if that worker has ended, and then the server ends.
            let _ = peer.inbox.try_send(WorkerMessage::PolicyChanged { _done: done.clone() });
        }
        drop(done);
        let _ = all_done.recv().await;
    }
}

/// Counts a bulk tunnel against its worker, from the decision to move it until it ends.
pub(super) struct BulkGuard(Arc<WorkerPool>, u16);

impl BulkGuard {
    fn new(pool: Arc<WorkerPool>, index: u16) -> Self {
        if let Some(peer) = pool.peers.get(usize::from(index)) {
            peer.bulk_count.fetch_add(1, Ordering::Relaxed);
        }
        Self(pool, index)
    }
}

impl Drop for BulkGuard {
    fn drop(&mut self) {
        if let Some(peer) = self.0.peers.get(usize::from(self.1)) {
            peer.bulk_count.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// A worker before its thread starts.
pub(super) struct Worker {
    index: u16,
    pool: Arc<WorkerPool>,
    inbox: Receiver<WorkerMessage>,
    listeners: Vec<Arc<Listener>>,
    stop_accepting: Receiver<Infallible>,
    stop_sessions: Receiver<Infallible>,
}

/// The signals between the server and its workers. Nothing is sent: each of them is the close of a channel.
pub(super) struct Shutdown {
    /// Closes when workers have to stop accepting.
    pub(super) stop_accepting: Receiver<Infallible>,
    /// Closes when workers have to end the remaining sessions.
    pub(super) stop_sessions: Receiver<Infallible>,
    /// Closes, by drop, when no worker accepts or has a session.
    pub(super) alive: Sender<Infallible>,
}

impl Worker {
    /// Creates `count` workers that together run at most `limit` sessions at a time.
    pub(super) fn create_pool(
        count: u16,
        server: Server,
        listeners: Vec<Listener>,
        limit: usize,
        shutdown: Shutdown,
    ) -> (WorkerPoolHandle, Vec<Self>) {
        let (senders, receivers): (Vec<_>, Vec<_>) = (0..count).map(|_| channel::unbounded()).unzip();
        let peer = |inbox| PeerWorker { inbox, socket_count: Arc::default(), bulk_count: AtomicUsize::new(0) };
        let pool = Arc::new(WorkerPool {
            server,
            limit,
            permits: Semaphore::new(limit),
            log: RateLimitedLog::default(),
            peers: senders.into_iter().map(peer).collect(),
            _alive: shutdown.alive,
        });
        let listeners: Vec<_> = listeners.into_iter().map(Arc::new).collect();
        let new_worker = |(index, inbox)| Self {
            index,
            pool: pool.clone(),
            inbox,
            listeners: listeners.clone(),
            stop_accepting: shutdown.stop_accepting.clone(),
            stop_sessions: shutdown.stop_sessions.clone(),
        };
        let workers = (0..).zip(receivers).map(new_worker).collect();
        (WorkerPoolHandle(Arc::downgrade(&pool)), workers)
    }

    /// Runs until `stop_sessions` closes. Blocks. Reports `Ok` once it accepts connections. `accept` is the accept loop
    /// of one listener.
    ///
    /// # Errors
    /// Those of the event loop.
    pub(super) fn run<F: Future<Output = ()> + 'static>(
        self,
        report: &Sender<io::Result<()>>,
        accept: impl Fn(Arc<WorkerPool>, Io<Arc<Listener>>, Rc<WorkerHandle>) -> F,
    ) -> io::Result<()> {
        let Self { index, pool, inbox, listeners, stop_accepting, stop_sessions } = self;
        reactor::run(async {
            // Dropping it closes the remaining sessions at the end.
            let executor = Rc::new(LocalExecutor::new());
            let worker = Rc::new(WorkerHandle { index, executor: Rc::downgrade(&executor) });
            if let Some(this) = pool.peers.get(usize::from(index)) {
                reactor::publish_socket_count(this.socket_count.clone());
            }
            let accept_loop = |listener| {
                let (pool, worker) = (pool.clone(), worker.clone());
                Io::shared_listener(listener).map(|listener| accept(pool, listener, worker))
            };
            let accept_loops: io::Result<Vec<_>> = listeners.into_iter().map(accept_loop).collect();
            let spawn_critical = |task| executor.spawn(report_panic(task, report.clone()));
            let accepting: Vec<_> =
                accept_loops?.into_iter().map(|accept_loop| spawn_critical(accept_loop.boxed_local())).collect();
            spawn_critical(worker.receive_messages(inbox.clone()).boxed_local()).detach();
            drop(pool);
            let _ = report.try_send(Ok(()));
            let end = async {
                let _ = stop_accepting.recv().await;
                drop(accepting);
                let _ = stop_sessions.recv().await;
            };
            // A panic ends only its own session: the executor catches it, and the panic hook has logged it.
            executor.run(end).await;
            inbox.close();
            while inbox.try_recv().is_ok() {}
            Ok(())
        })?
    }
}

/// Runs a task that its worker depends on. Reports a panic of the task, which ends the server.
async fn report_panic(task: LocalBoxed<()>, report: Sender<io::Result<()>>) {
    if AssertUnwindSafe(task).catch_unwind().await.is_err() {
        let _ = report.try_send(Err(io::Error::other(WORKER_PANIC)));
    }
}

type LocalBoxed<T> = Pin<Box<dyn Future<Output = T>>>;

/// Handle to the worker of this thread.
pub(super) struct WorkerHandle {
    /// 16 bits, because every tunnel stores it.
    pub(super) index: u16,
    /// Weak, because the executor owns the tasks that hold this handle.
    executor: Weak<LocalExecutor<'static>>,
}

impl WorkerHandle {
    fn spawn(&self, session: impl Future<Output = ()> + 'static) {
        // The executor is gone only when the worker ends.
        if let Some(executor) = self.executor.upgrade() {
            executor.spawn(session).detach();
        }
    }

    async fn receive_messages(self: Rc<Self>, inbox: Receiver<WorkerMessage>) {
        while let Ok(message) = inbox.recv().await {
            match message {
                WorkerMessage::Accepted(conn, client, permit) => self.start_session(conn, client, permit),
                WorkerMessage::Bulk(tunnel, permit, guard) => {
                    if let Some(tunnel) = tunnel.attach() {
                        self.spawn(relay_bulk(tunnel, permit, guard));
                    }
                }
                WorkerMessage::PolicyChanged { _done } => {
                    reactor::wake_all();
                    // Tasks run in the order of their wake-ups, so this one continues after all of them.
                    smol::future::yield_now().await;
                }
            }
        }
    }

    /// Spawns a session: a task for its handshake, and after that one for its tunnel, without the handshake's memory.
    pub(super) fn start_session(
        self: &Rc<Self>,
        conn: DetachedConn,
        client: Option<SocketAddr>,
        mut permit: SessionPermit,
    ) {
        let conn = match conn.attach() {
            Ok(conn) => conn,
            Err(error) => return permit.pool.log.warn(|| format!("new connection closed: {error}")),
        };
        let worker = self.clone();
        self.spawn(async move {
            let SessionPermit { pool, quota } = &mut permit;
            let Some(mut tunnel) = session::run(&pool.server, conn, client, quota).await else { return };
            let index = worker.index;
            if permit.rate_limit().is_some() {
                return worker.spawn(Box::pin(relay_rate_limited(tunnel, permit)));
            }
            // Neither captured value is moved inside: the future would reserve room for it twice.
            worker.spawn(async move {
                let server = permit.server();
                match tunnel.relay(server, &server.relay_options).await {
                    Ok(RelayOutcome::Finished) => {}
                    Ok(RelayOutcome::Bulk) => Box::pin(place_bulk(tunnel, permit, index)).await,
                    Err(error) => Box::pin(tunnel.close_after_error(error)).await,
                }
            });
        });
    }
}

/// Relays a bulk tunnel of worker `index` on the worker with the fewest bulk tunnels.
async fn place_bulk(tunnel: Tunnel, permit: SessionPermit, index: u16) {
    let destination = permit.pool.fewest_bulk(index);
    let guard = BulkGuard::new(permit.pool.clone(), destination);
    if destination == index {
        return relay_bulk(tunnel, permit, guard).await;
    }
    let pool = permit.pool.clone();
    match (tunnel.detach(), pool.peers.get(usize::from(destination))) {
        // Fails only if that worker has ended, and then the server ends.
        (Ok(detached), Some(peer)) => drop(peer.inbox.try_send(WorkerMessage::Bulk(detached, permit, guard))),
        (Ok(_), None) => {}
        (Err(tunnel), _) => {
            drop(guard);
            relay_bulk(*tunnel, permit, BulkGuard::new(pool, index)).await;
        }
    }
}

async fn relay_bulk(mut tunnel: Tunnel, permit: SessionPermit, _guard: BulkGuard) {
    let options = RelayOptions { stop_when_bulk: false, ..permit.server().relay_options.clone() };
    if let Err(error) = tunnel.relay(permit.server(), &options).await {
        tunnel.close_after_error(error).await;
    }
}

async fn relay_rate_limited(mut tunnel: Tunnel, permit: SessionPermit) {
    if let Some(rate_limit) = permit.rate_limit()
        && let Err(error) = tunnel.relay_rate_limited(rate_limit, permit.server()).await
    {
        tunnel.close_after_error(error).await;
    }
}
