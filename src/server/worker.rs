//! One thread of the server: a reactor and an executor of its own, on which it accepts connections and runs their
//! sessions to the end.
//!
//! A session stays where it was accepted, since handing it on costs more than most sessions do: the kernel wakes a
//! worker that is idle. Two things are handed on: a connection that comes to a worker that has far more than another
//! one, and a tunnel that proves to be bulk, to the worker with the fewest of those.

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

use super::limiter::{AdmitError, SessionQuota};
use super::listen::Listener;
use super::policy_handle::denial_reason;
use super::rate_limit::RateLimit;
use super::session_log::{SessionLog, request_from};
use super::tunnel::{DetachedTunnel, Tunnel};
use super::{ACCEPT_RETRY_DELAY, Server, session};
use crate::conn::DetachedConn;
use crate::policy::rules::Decision;
use crate::reactor::{self, Interest, Io, sleep};
use crate::relay::{RelayOptions, RelayOutcome};

/// How many connections are accepted before those that are open get their turn.
const ACCEPTS_PER_TURN: usize = 32;
/// How many more sockets than twice those of another worker one has, before it hands a new connection to that.
const SOCKET_SURPLUS: usize = 64;

/// What all workers share.
pub(super) struct WorkerPool {
    server: Server,
    /// How many sessions there may be.
    limit: usize,
    permits: Semaphore,
    log: RateLimitedLog,
    peers: Vec<PeerWorker>,
    /// Closed when there is neither anybody who accepts nor a session.
    _alive: Sender<Infallible>,
}

/// A worker as the others see it.
struct PeerWorker {
    /// Holds sessions, of which there are at most `limit`, and at most one new law.
    inbox: Sender<WorkerMessage>,
    /// How many sockets it has.
    socket_count: Arc<AtomicUsize>,
    /// How many of its tunnels have proved to be bulk.
    bulk_count: AtomicUsize,
}

/// What one worker hands to another one.
enum WorkerMessage {
    Accepted(DetachedConn, Option<SocketAddr>, SessionPermit),
    Bulk(DetachedTunnel, SessionPermit, BulkGuard),
    /// There is a new law. Dropped when all sessions that could be asked have been.
    PolicyChanged {
        _done: Sender<Infallible>,
    },
}

impl WorkerPool {
    /// The worker to which a new connection goes rather than to this one.
    fn less_loaded(&self, this: u16) -> Option<&PeerWorker> {
        let sockets = |peer: &PeerWorker| peer.socket_count.load(Ordering::Relaxed);
        let least = self.peers.iter().min_by_key(|peer| sockets(peer))?;
        (sockets(self.peers.get(usize::from(this))?) > 2 * sockets(least) + SOCKET_SURPLUS).then_some(least)
    }

    /// The worker that should have a bulk tunnel of this one: this one itself, or one with fewer of them.
    fn fewest_bulk(&self, this: u16) -> u16 {
        let bulk = |peer: &PeerWorker| peer.bulk_count.load(Ordering::Relaxed);
        let least = (0..).zip(&self.peers).min_by_key(|(index, peer)| (bulk(peer), *index != this));
        least.map_or(this, |(index, _)| index)
    }
}

/// A log line that comes once a second at the most.
#[derive(Default)]
struct RateLimitedLog(Mutex<Option<Instant>>);

impl RateLimitedLog {
    fn warn(&self, text: impl FnOnce() -> String) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_none_or(|last| last.elapsed() >= Duration::from_secs(1)) {
            *last = Some(Instant::now());
            log::warn!("{}", text());
        }
    }
}

/// A session's slot, its share of what the server is, and what it takes up of its client's share; for as long as it
/// lives.
struct SessionPermit {
    pool: Arc<WorkerPool>,
    quota: Option<Box<SessionQuota>>,
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

/// All workers, as whoever has started them sees them.
/// They end without them.
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

    /// Has all sessions look at the law. Returns when they have, but for those that are in the middle of something that
    /// is neither a tunnel nor an association; they do it afterwards.
    pub(super) async fn recheck_all(&self) {
        let (done, all_done) = channel::bounded(1);
        for peer in &self.peers {
            // Fails when that worker has ended, and so everything does.
            let _ = peer.inbox.try_send(WorkerMessage::PolicyChanged { _done: done.clone() });
        }
        drop(done);
        let _ = all_done.recv().await;
    }
}

/// A bulk tunnel, as one of those of its worker, for as long as it lives; also on the way there.
struct BulkGuard(Arc<WorkerPool>, u16);

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

/// Accepts until `stop_accepting` is closed, and runs sessions until `stop_sessions` is.
pub(super) struct Worker {
    index: u16,
    pool: Arc<WorkerPool>,
    inbox: Receiver<WorkerMessage>,
    listeners: Vec<Arc<Listener>>,
    stop_accepting: Receiver<Infallible>,
    stop_sessions: Receiver<Infallible>,
}

/// What ends workers, and tells that they have ended.
pub(super) struct Shutdown {
    pub(super) stop_accepting: Receiver<Infallible>,
    pub(super) stop_sessions: Receiver<Infallible>,
    pub(super) alive: Sender<Infallible>,
}

impl Worker {
    /// `count` workers that together run at most `limit` sessions at once.
    pub(super) fn create_pool(
        count: u16,
        server: Server,
        listeners: Vec<Listener>,
        limit: usize,
        shutdown: Shutdown,
    ) -> (WorkerPoolHandle, Vec<Self>) {
        let (outs, ins): (Vec<_>, Vec<_>) = (0..count).map(|_| channel::unbounded()).unzip();
        let peer = |inbox| PeerWorker { inbox, socket_count: Arc::default(), bulk_count: AtomicUsize::new(0) };
        let pool = Arc::new(WorkerPool {
            server,
            limit,
            permits: Semaphore::new(limit),
            log: RateLimitedLog::default(),
            peers: outs.into_iter().map(peer).collect(),
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
        let workers = (0..).zip(ins).map(new_worker).collect();
        (WorkerPoolHandle(Arc::downgrade(&pool)), workers)
    }

    /// Blocks, until the end. Says `Ok` when it accepts.
    ///
    /// # Errors
    /// Those of the reactor.
    pub(super) fn run(self, report: &Sender<io::Result<()>>) -> io::Result<()> {
        let Self { index, pool, inbox, listeners, stop_accepting, stop_sessions } = self;
        reactor::run(async {
            // What is left at the end is dropped with it, and so cut.
            let executor = Rc::new(LocalExecutor::new());
            let worker = Rc::new(WorkerHandle { index, executor: Rc::downgrade(&executor) });
            if let Some(this) = pool.peers.get(usize::from(index)) {
                reactor::publish_socket_count(this.socket_count.clone());
            }
            let accept_loop = |listener| {
                let (pool, worker) = (pool.clone(), worker.clone());
                Io::shared_listener(listener).map(|listener| AcceptLoop { pool, listener, worker }.run())
            };
            let accept_loops: io::Result<Vec<_>> = listeners.into_iter().map(accept_loop).collect();
            let spawn_critical = |task| executor.spawn(report_panic(task, report.clone()));
            let accepting: Vec<_> =
                accept_loops?.into_iter().map(|accept_loop| spawn_critical(accept_loop.boxed_local())).collect();
            spawn_critical(worker.receive_messages(inbox.clone()).boxed_local()).detach();
            drop(pool);
            // Whoever started this waits for it.
            let _ = report.try_send(Ok(()));
            let end = async {
                let _ = stop_accepting.recv().await;
                drop(accepting);
                let _ = stop_sessions.recv().await;
            };
            // A session that panics ends, and nothing else: the executor catches it, and the panic has been said.
            executor.run(end).await;
            inbox.close();
            while inbox.try_recv().is_ok() {}
            Ok(())
        })?
    }
}

/// Runs what a worker is no good without; should it panic, that is said.
async fn report_panic(task: LocalBoxed<()>, report: Sender<io::Result<()>>) {
    if AssertUnwindSafe(task).catch_unwind().await.is_err() {
        let _ = report.try_send(Err(io::Error::other("one of them panicked; please report it")));
    }
}

type LocalBoxed<T> = Pin<Box<dyn Future<Output = T>>>;

/// A worker as its own sessions see it.
struct WorkerHandle {
    /// Small, since every tunnel knows it.
    index: u16,
    /// Not held, or it would hold itself by way of its tasks.
    executor: Weak<LocalExecutor<'static>>,
}

impl WorkerHandle {
    fn spawn(&self, session: impl Future<Output = ()> + 'static) {
        // Without an executor everything ends.
        if let Some(executor) = self.executor.upgrade() {
            executor.spawn(session).detach();
        }
    }

    /// Runs the sessions that other workers hand on.
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
                    // Tasks run in the order in which they are woken.
                    smol::future::yield_now().await;
                }
            }
        }
    }

    /// Begins a session: its handshake, and then its tunnel, as a task of its own and so without what the handshake
    /// held.
    fn start_session(self: &Rc<Self>, conn: DetachedConn, client: Option<SocketAddr>, mut permit: SessionPermit) {
        let conn = match conn.attach() {
            Ok(conn) => conn,
            Err(error) => return permit.pool.log.warn(|| format!("a connection could not be served: {error}")),
        };
        let worker = self.clone();
        self.spawn(async move {
            let SessionPermit { pool, quota } = &mut permit;
            let Some(mut tunnel) = session::run(&pool.server, conn, client, quota).await else { return };
            let index = worker.index;
            if permit.rate_limit().is_some() {
                return worker.spawn(Box::pin(relay_rate_limited(tunnel, permit)));
            }
            // Neither of the captured is moved in there: the future would have room for it twice.
            worker.spawn(async move {
                let server = permit.server();
                match tunnel.relay(server, &server.relay_options).await {
                    Ok(RelayOutcome::Finished) => {}
                    Ok(RelayOutcome::Bulk) => Box::pin(place_bulk(tunnel, permit, index)).await,
                    Err(broken) => Box::pin(tunnel.close_after_error(broken)).await,
                }
            });
        });
    }
}

/// Goes on with a bulk tunnel of the worker of that number where there are fewest of them.
async fn place_bulk(tunnel: Tunnel, permit: SessionPermit, index: u16) {
    let destination = permit.pool.fewest_bulk(index);
    let guard = BulkGuard::new(permit.pool.clone(), destination);
    if destination == index {
        return relay_bulk(tunnel, permit, guard).await;
    }
    let pool = permit.pool.clone();
    match (tunnel.detach(), pool.peers.get(usize::from(destination))) {
        // Fails when that worker has ended, and so everything does.
        (Ok(loose), Some(peer)) => drop(peer.inbox.try_send(WorkerMessage::Bulk(loose, permit, guard))),
        (Ok(_), None) => {}
        (Err(tunnel), _) => {
            drop(guard);
            relay_bulk(*tunnel, permit, BulkGuard::new(pool, index)).await;
        }
    }
}

/// Relays a bulk tunnel to its end.
async fn relay_bulk(mut tunnel: Tunnel, permit: SessionPermit, _guard: BulkGuard) {
    let limits = RelayOptions { stop_when_bulk: false, ..permit.server().relay_options };
    if let Err(broken) = tunnel.relay(permit.server(), &limits).await {
        tunnel.close_after_error(broken).await;
    }
}

/// Relays a tunnel that has a pace to its end.
async fn relay_rate_limited(mut tunnel: Tunnel, permit: SessionPermit) {
    if let Some(rate_limit) = permit.rate_limit()
        && let Err(broken) = tunnel.relay_rate_limited(rate_limit, permit.server()).await
    {
        tunnel.close_after_error(broken).await;
    }
}

/// Accepts the connections of one listener.
struct AcceptLoop {
    pool: Arc<WorkerPool>,
    listener: Io<Arc<Listener>>,
    worker: Rc<WorkerHandle>,
}

impl AcceptLoop {
    async fn run(self) {
        let mut attempts = 0_usize;
        loop {
            // A slot is taken only when somebody is there, or one idle listener would keep it from the others.
            if let Err(error) = self.listener.ready(Interest::Read).await {
                self.back_off(&error).await;
                continue;
            }
            let mut permit = self.acquire_permit().await;
            match self.listener.try_with(Interest::Read, |listener| listener.accept()) {
                Ok((conn, client)) => {
                    if let Some(quota) = self.admit(client) {
                        permit.quota = quota;
                        match self.pool.less_loaded(self.worker.index) {
                            // Fails when that worker has ended, and so everything does.
                            Some(peer) => drop(peer.inbox.try_send(WorkerMessage::Accepted(conn, client, permit))),
                            None => self.worker.start_session(conn, client, permit),
                        }
                    }
                }
                // Somebody else was faster, or the client has left again.
                Err(error) if is_transient(&error) => {}
                Err(error) => self.back_off(&error).await,
            }
            attempts += 1;
            if attempts.is_multiple_of(ACCEPTS_PER_TURN) {
                reactor::yield_now().await;
            }
        }
    }

    /// What the session of a client takes up, unless it is closed at once.
    fn admit(&self, client: Option<SocketAddr>) -> Option<Option<Box<SessionQuota>>> {
        let server = &self.pool.server;
        let address = || client.map_or_else(|| "unix".to_owned(), |client| client.ip().to_string());
        match server.limiter.admit_client(client) {
            Err(AdmitError::Blocked) => log::debug!("client {} is shut out: closed", address()),
            Err(AdmitError::TooManySessions(limit)) => {
                let text = || format!("client {} has {limit} connections, which is its limit: closed", address());
                self.pool.log.warn(text);
            }
            Ok(quota) => match server.policy.current().evaluate(&request_from(client)) {
                Decision::Deny(rule) => SessionLog::new(client).set_error(denial_reason(rule)),
                Decision::Allow(..) | Decision::Undecided(_) => return Some(quota),
            },
        }
        None
    }

    async fn acquire_permit(&self) -> SessionPermit {
        let permits = &self.pool.permits;
        let permit = match permits.try_acquire() {
            Some(permit) => permit,
            None => {
                let limit = self.pool.limit;
                self.pool.log.warn(|| format!("{limit} connections are open, which is the limit: waiting"));
                permits.acquire().await
            }
        };
        permit.forget();
        SessionPermit { pool: self.pool.clone(), quota: None }
    }

    async fn back_off(&self, error: &io::Error) {
        self.pool.log.warn(|| format!("{}: {error}: waiting", self.listener.get_ref()));
        sleep(ACCEPT_RETRY_DELAY).await;
    }
}

fn is_transient(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, WouldBlock};
    let is_protocol = error.raw_os_error() == Some(rustix::io::Errno::PROTO.raw_os_error());
    is_protocol || matches!(error.kind(), WouldBlock | ConnectionAborted | ConnectionReset | Interrupted)
}
