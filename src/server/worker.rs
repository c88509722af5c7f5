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
use super::{Server, session};
use crate::conn::DetachedConn;
use crate::policy::rules::Decision;
use crate::reactor::{self, Interest, Io, sleep};
use crate::relay::{RelayOptions, RelayOutcome};

/// How long accepting rests when the system has no descriptor or memory left for a connection.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);
/// How many connections are accepted before those that are open get their turn.
const BATCH: usize = 32;
/// How many more sockets than twice those of another worker one has, before it hands a new connection to that.
const SURPLUS: usize = 64;

/// What all workers share.
pub(super) struct Shared {
    server: Server,
    /// How many sessions there may be.
    limit: usize,
    slots: Semaphore,
    complaint: Complaint,
    peers: Vec<Peer>,
    /// Closed when there is neither anybody who accepts nor a session.
    _alive: Sender<Infallible>,
}

/// A worker as the others see it.
struct Peer {
    /// Holds sessions, of which there are at most `limit`, and at most one new law.
    inbox: Sender<Handed>,
    /// How many sockets it has.
    sockets: Arc<AtomicUsize>,
    /// How many of its tunnels have proved to be bulk.
    bulk: AtomicUsize,
}

/// What one worker hands to another one.
enum Handed {
    Accepted(DetachedConn, Option<SocketAddr>, Slot),
    Bulk(DetachedTunnel, Slot, Counted),
    /// There is a new law. Dropped when all sessions that could be asked have been.
    PolicyChanged {
        _seen: Sender<Infallible>,
    },
}

impl Shared {
    /// The worker to which a new connection goes rather than to this one.
    fn idler(&self, this: u16) -> Option<&Peer> {
        let sockets = |peer: &Peer| peer.sockets.load(Ordering::Relaxed);
        let least = self.peers.iter().min_by_key(|peer| sockets(peer))?;
        (sockets(self.peers.get(usize::from(this))?) > 2 * sockets(least) + SURPLUS).then_some(least)
    }

    /// The worker that should have a bulk tunnel of this one: this one itself, or one with fewer of them.
    fn calmest(&self, this: u16) -> u16 {
        let bulk = |peer: &Peer| peer.bulk.load(Ordering::Relaxed);
        let least = (0..).zip(&self.peers).min_by_key(|(number, peer)| (bulk(peer), *number != this));
        least.map_or(this, |(number, _)| number)
    }
}

/// A log line that comes once a second at the most.
#[derive(Default)]
struct Complaint(Mutex<Option<Instant>>);

impl Complaint {
    fn log(&self, what: impl FnOnce() -> String) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_none_or(|last| last.elapsed() >= Duration::from_secs(1)) {
            *last = Some(Instant::now());
            log::warn!("{}", what());
        }
    }
}

/// A session's slot, its share of what the server is, and what it takes up of its client's share; for as long as it
/// lives.
struct Slot {
    shared: Arc<Shared>,
    quota: Option<Box<SessionQuota>>,
}

impl Slot {
    fn server(&self) -> &Server {
        &self.shared.server
    }

    fn rate_limit(&self) -> Option<&RateLimit> {
        self.quota.as_ref()?.rate_limit.as_ref()
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.shared.slots.add_permits(1);
    }
}

/// All workers, as whoever has started them sees them.
/// They end without them.
pub(super) struct Workers(std::sync::Weak<Shared>);

impl Workers {
    pub(super) fn shared(&self) -> Option<Arc<Shared>> {
        self.0.upgrade()
    }
}

impl Shared {
    pub(super) fn server(&self) -> &Server {
        &self.server
    }

    /// Has all sessions look at the law. Returns when they have, but for those that are in the middle of something that
    /// is neither a tunnel nor an association; they do it afterwards.
    pub(super) async fn recheck_all(&self) {
        let (seen, all_seen) = channel::bounded(1);
        for peer in &self.peers {
            // Fails when that worker has ended, and so everything does.
            let _ = peer.inbox.try_send(Handed::PolicyChanged { _seen: seen.clone() });
        }
        drop(seen);
        let _ = all_seen.recv().await;
    }
}

/// A bulk tunnel, as one of those of its worker, for as long as it lives; also on the way there.
struct Counted(Arc<Shared>, u16);

impl Counted {
    fn new(shared: Arc<Shared>, number: u16) -> Self {
        if let Some(peer) = shared.peers.get(usize::from(number)) {
            peer.bulk.fetch_add(1, Ordering::Relaxed);
        }
        Self(shared, number)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(peer) = self.0.peers.get(usize::from(self.1)) {
            peer.bulk.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Accepts until `closing` is closed, and runs sessions until `over` is.
pub(super) struct Worker {
    number: u16,
    shared: Arc<Shared>,
    inbox: Receiver<Handed>,
    listeners: Vec<Arc<Listener>>,
    closing: Receiver<Infallible>,
    over: Receiver<Infallible>,
}

/// What ends workers, and tells that they have ended.
pub(super) struct Ends {
    pub(super) closing: Receiver<Infallible>,
    pub(super) over: Receiver<Infallible>,
    pub(super) alive: Sender<Infallible>,
}

impl Worker {
    /// `count` workers that together run at most `limit` sessions at once.
    pub(super) fn several(
        count: u16,
        server: Server,
        listeners: Vec<Listener>,
        limit: usize,
        ends: Ends,
    ) -> (Workers, Vec<Self>) {
        let (outs, ins): (Vec<_>, Vec<_>) = (0..count).map(|_| channel::unbounded()).unzip();
        let peer = |inbox| Peer { inbox, sockets: Arc::default(), bulk: AtomicUsize::new(0) };
        let shared = Arc::new(Shared {
            server,
            limit,
            slots: Semaphore::new(limit),
            complaint: Complaint::default(),
            peers: outs.into_iter().map(peer).collect(),
            _alive: ends.alive,
        });
        let listeners: Vec<_> = listeners.into_iter().map(Arc::new).collect();
        let worker = |(number, inbox)| Self {
            number,
            shared: shared.clone(),
            inbox,
            listeners: listeners.clone(),
            closing: ends.closing.clone(),
            over: ends.over.clone(),
        };
        let crew = (0..).zip(ins).map(worker).collect();
        (Workers(Arc::downgrade(&shared)), crew)
    }

    /// Blocks, until the end. Says `Ok` when it accepts.
    ///
    /// # Errors
    /// Those of the reactor.
    pub(super) fn run(self, say: &Sender<io::Result<()>>) -> io::Result<()> {
        let Self { number, shared, inbox, listeners, closing, over } = self;
        reactor::run(async {
            // What is left at the end is dropped with it, and so cut.
            let executor = Rc::new(LocalExecutor::new());
            let home = Rc::new(Home { number, executor: Rc::downgrade(&executor) });
            if let Some(this) = shared.peers.get(usize::from(number)) {
                reactor::publish_socket_count(this.sockets.clone());
            }
            let acceptor = |listener| {
                let (shared, home) = (shared.clone(), home.clone());
                Io::shared_listener(listener).map(|listener| Acceptor { shared, listener, home }.run())
            };
            let acceptors: io::Result<Vec<_>> = listeners.into_iter().map(acceptor).collect();
            let vital = |task| executor.spawn(or_say(task, say.clone()));
            let accepting: Vec<_> = acceptors?.into_iter().map(|acceptor| vital(acceptor.boxed_local())).collect();
            vital(home.take_in(inbox.clone()).boxed_local()).detach();
            drop(shared);
            // Whoever started this waits for it.
            let _ = say.try_send(Ok(()));
            let end = async {
                let _ = closing.recv().await;
                drop(accepting);
                let _ = over.recv().await;
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
async fn or_say(task: LocalBoxed<()>, say: Sender<io::Result<()>>) {
    if AssertUnwindSafe(task).catch_unwind().await.is_err() {
        let _ = say.try_send(Err(io::Error::other("one of them panicked; please report it")));
    }
}

type LocalBoxed<T> = Pin<Box<dyn Future<Output = T>>>;

/// A worker as its own sessions see it.
struct Home {
    /// Small, since every tunnel knows it.
    number: u16,
    /// Not held, or it would hold itself by way of its tasks.
    executor: Weak<LocalExecutor<'static>>,
}

impl Home {
    fn spawn(&self, session: impl Future<Output = ()> + 'static) {
        // Without an executor everything ends.
        if let Some(executor) = self.executor.upgrade() {
            executor.spawn(session).detach();
        }
    }

    /// Runs the sessions that other workers hand on.
    async fn take_in(self: Rc<Self>, inbox: Receiver<Handed>) {
        while let Ok(handed) = inbox.recv().await {
            match handed {
                Handed::Accepted(conn, client, slot) => self.begin(conn, client, slot),
                Handed::Bulk(tunnel, slot, counted) => {
                    if let Some(tunnel) = tunnel.attach() {
                        self.spawn(bulk(tunnel, slot, counted));
                    }
                }
                Handed::PolicyChanged { _seen } => {
                    reactor::wake_all();
                    // Tasks run in the order in which they are woken.
                    smol::future::yield_now().await;
                }
            }
        }
    }

    /// Begins a session: its handshake, and then its tunnel, as a task of its own and so without what the handshake
    /// held.
    fn begin(self: &Rc<Self>, conn: DetachedConn, client: Option<SocketAddr>, mut slot: Slot) {
        let conn = match conn.attach() {
            Ok(conn) => conn,
            Err(error) => return slot.shared.complaint.log(|| format!("a connection could not be served: {error}")),
        };
        let home = self.clone();
        self.spawn(async move {
            let Slot { shared, quota } = &mut slot;
            let Some(mut tunnel) = session::run(&shared.server, conn, client, quota).await else { return };
            let number = home.number;
            if slot.rate_limit().is_some() {
                return home.spawn(Box::pin(paced(tunnel, slot)));
            }
            // Neither of the captured is moved in there: the future would have room for it twice.
            home.spawn(async move {
                let server = slot.server();
                match tunnel.relay(server, &server.relay_limits).await {
                    Ok(RelayOutcome::Finished) => {}
                    Ok(RelayOutcome::Bulk) => Box::pin(place(tunnel, slot, number)).await,
                    Err(broken) => Box::pin(tunnel.close_after_error(broken)).await,
                }
            });
        });
    }
}

/// Goes on with a bulk tunnel of the worker of that number where there are fewest of them.
async fn place(tunnel: Tunnel, slot: Slot, number: u16) {
    let there = slot.shared.calmest(number);
    let counted = Counted::new(slot.shared.clone(), there);
    if there == number {
        return bulk(tunnel, slot, counted).await;
    }
    let shared = slot.shared.clone();
    match (tunnel.detach(), shared.peers.get(usize::from(there))) {
        // Fails when that worker has ended, and so everything does.
        (Ok(loose), Some(peer)) => drop(peer.inbox.try_send(Handed::Bulk(loose, slot, counted))),
        (Ok(_), None) => {}
        (Err(tunnel), _) => {
            drop(counted);
            bulk(*tunnel, slot, Counted::new(shared, number)).await;
        }
    }
}

/// Relays a bulk tunnel to its end.
async fn bulk(mut tunnel: Tunnel, slot: Slot, _counted: Counted) {
    let limits = RelayOptions { stop_when_bulk: false, ..slot.server().relay_limits };
    if let Err(broken) = tunnel.relay(slot.server(), &limits).await {
        tunnel.close_after_error(broken).await;
    }
}

/// Relays a tunnel that has a pace to its end.
async fn paced(mut tunnel: Tunnel, slot: Slot) {
    if let Some(rate_limit) = slot.rate_limit()
        && let Err(broken) = tunnel.relay_rate_limited(rate_limit, slot.server()).await
    {
        tunnel.close_after_error(broken).await;
    }
}

/// Accepts the connections of one listener.
struct Acceptor {
    shared: Arc<Shared>,
    listener: Io<Arc<Listener>>,
    home: Rc<Home>,
}

impl Acceptor {
    async fn run(self) {
        let mut batch = 0_usize;
        loop {
            // A slot is taken only when somebody is there, or one idle listener would keep it from the others.
            if let Err(error) = self.listener.ready(Interest::Read).await {
                self.rest(&error).await;
                continue;
            }
            let mut slot = self.slot().await;
            match self.listener.try_with(Interest::Read, |listener| listener.accept()) {
                Ok((conn, client)) => {
                    if let Some(quota) = self.let_in(client) {
                        slot.quota = quota;
                        match self.shared.idler(self.home.number) {
                            // Fails when that worker has ended, and so everything does.
                            Some(peer) => drop(peer.inbox.try_send(Handed::Accepted(conn, client, slot))),
                            None => self.home.begin(conn, client, slot),
                        }
                    }
                }
                // Somebody else was faster, or the client has left again.
                Err(error) if is_passing(&error) => {}
                Err(error) => self.rest(&error).await,
            }
            batch += 1;
            if batch.is_multiple_of(BATCH) {
                reactor::yield_now().await;
            }
        }
    }

    /// What the session of a client takes up, unless it is closed at once.
    fn let_in(&self, client: Option<SocketAddr>) -> Option<Option<Box<SessionQuota>>> {
        let server = &self.shared.server;
        let who = || client.map_or_else(|| "unix".to_owned(), |client| client.ip().to_string());
        match server.limiter.admit_client(client) {
            Err(AdmitError::Blocked) => log::debug!("client {} is shut out: closed", who()),
            Err(AdmitError::TooManySessions(limit)) => {
                let what = || format!("client {} has {limit} connections, which is its limit: closed", who());
                self.shared.complaint.log(what);
            }
            Ok(quota) => match server.policy.current().evaluate(&request_from(client)) {
                Decision::Deny(rule) => SessionLog::new(client).set_error(denial_reason(rule)),
                Decision::Allow(..) | Decision::Undecided(_) => return Some(quota),
            },
        }
        None
    }

    async fn slot(&self) -> Slot {
        let slots = &self.shared.slots;
        let slot = match slots.try_acquire() {
            Some(slot) => slot,
            None => {
                let limit = self.shared.limit;
                self.shared.complaint.log(|| format!("{limit} connections are open, which is the limit: waiting"));
                slots.acquire().await
            }
        };
        slot.forget();
        Slot { shared: self.shared.clone(), quota: None }
    }

    async fn rest(&self, error: &io::Error) {
        self.shared.complaint.log(|| format!("{}: {error}: waiting", self.listener.get_ref()));
        sleep(EXHAUSTED_PAUSE).await;
    }
}

fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, WouldBlock};
    let is_protocol = error.raw_os_error() == Some(rustix::io::Errno::PROTO.raw_os_error());
    is_protocol || matches!(error.kind(), WouldBlock | ConnectionAborted | ConnectionReset | Interrupted)
}
