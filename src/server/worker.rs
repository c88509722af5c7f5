//! One thread of the server: a reactor and an executor of its own, on which it accepts connections and runs their
//! sessions to the end.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use futures_lite::FutureExt as _;
use smol::LocalExecutor;
use smol::channel::{Receiver, Sender};
use smol::lock::Semaphore;

use super::listen::Listener;
use super::{Server, session};
use crate::conn::Conn;
use crate::reactor::{self, Io, Way, sleep};

/// How long accepting rests when the system has no descriptor or memory left for a connection.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);
/// How many connections are accepted before those that are open get their turn.
const BATCH: usize = 32;

/// What all workers share.
pub(super) struct Shared {
    server: Server,
    /// How many sessions there may be.
    limit: usize,
    slots: Semaphore,
    complaint: Complaint,
    /// Closed when there is neither anybody who accepts nor a session.
    _alive: Sender<Infallible>,
}

impl Shared {
    pub(super) fn new(server: Server, limit: usize, alive: Sender<Infallible>) -> Self {
        Self { server, limit, slots: Semaphore::new(limit), complaint: Complaint::default(), _alive: alive }
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

/// Accepts until `closing` is closed, and runs sessions until `over` is.
#[derive(Clone)]
pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) listeners: Vec<Arc<Listener>>,
    pub(super) closing: Receiver<Infallible>,
    pub(super) over: Receiver<Infallible>,
}

impl Worker {
    /// Blocks. Says once through `ready` whether it accepts.
    pub(super) fn run(self, ready: &mpsc::Sender<io::Result<()>>) {
        let Self { shared, listeners, closing, over } = self;
        let ended = reactor::run(async {
            // What is left at the end is dropped with it, and so cut.
            let executor = Rc::new(LocalExecutor::new());
            let acceptor = |listener| {
                let (shared, executor) = (shared.clone(), Rc::downgrade(&executor));
                Io::shared(listener).map(|listener| Acceptor { shared, listener, executor }.run())
            };
            let acceptors: io::Result<Vec<_>> = listeners.into_iter().map(acceptor).collect();
            let accepting: Vec<_> = acceptors?.into_iter().map(|acceptor| executor.spawn(acceptor)).collect();
            drop(shared);
            // Whoever started this waits for it.
            let _ = ready.send(Ok(()));
            let mut end = pin!(async {
                let _ = closing.recv().await;
                drop(accepting);
                let _ = over.recv().await;
            });
            // A panic ends its own session, and nothing else.
            while AssertUnwindSafe(executor.run(end.as_mut())).catch_unwind().await.is_err() {
                log::error!("a session ended in a panic; please report it");
            }
            Ok(())
        });
        if let Err(error) = ended.unwrap_or_else(Err) {
            let _ = ready.send(Err(error));
        }
    }
}

/// Accepts the connections of one listener.
struct Acceptor {
    shared: Arc<Shared>,
    listener: Io<Arc<Listener>>,
    /// Not held, or it would hold itself by way of its tasks.
    executor: Weak<LocalExecutor<'static>>,
}

impl Acceptor {
    async fn run(self) {
        let mut batch = 0_usize;
        loop {
            // A slot is taken only when somebody is there, or one idle listener would keep it from the others.
            if let Err(error) = self.listener.ready(Way::Read).await {
                self.rest(&error).await;
                continue;
            }
            let slot = self.slot().await;
            match self.listener.try_with(Way::Read, |listener| listener.accept()) {
                Ok((conn, client)) => self.spawn(conn, client, slot),
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

    /// Runs a session on this thread: first its handshake, then its tunnel, as a task of its own and so without what
    /// the handshake held.
    fn spawn(&self, conn: Conn, client: Option<SocketAddr>, slot: Slot) {
        let executor = self.executor.clone();
        let session = async move {
            let tunnel = session::run(&slot.0.server, conn, client).await;
            let Some((mut tunnel, executor)) = tunnel.zip(executor.upgrade()) else { return };
            // Neither tunnel nor slot are moved in there: the future would have room for them twice.
            let relay = async move {
                if let Err(broken) = tunnel.relay(&slot.0.server).await {
                    Box::pin(tunnel.break_off(broken)).await;
                }
            };
            executor.spawn(relay).detach();
        };
        // Without an executor everything ends.
        if let Some(executor) = self.executor.upgrade() {
            executor.spawn(session).detach();
        }
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
        Slot(self.shared.clone())
    }

    async fn rest(&self, error: &io::Error) {
        self.shared.complaint.log(|| format!("{}: {error}: waiting", self.listener.get_ref()));
        sleep(EXHAUSTED_PAUSE).await;
    }
}

/// A session's slot, and its share of what the server is, for as long as it lives.
struct Slot(Arc<Shared>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.slots.add_permits(1);
    }
}

fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, WouldBlock};
    let is_protocol = error.raw_os_error() == Some(rustix::io::Errno::PROTO.raw_os_error());
    is_protocol || matches!(error.kind(), WouldBlock | ConnectionAborted | ConnectionReset | Interrupted)
}
