//! Accepts connections, and admits them as sessions.
//!
//! All workers wait on the same listeners. For a new connection, the kernel wakes an idle worker.

use std::io;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures_lite::FutureExt as _;
use smol::lock::SemaphoreGuard;

use super::counters::COUNTERS;
use super::limiter::warn;
use super::listen::Listener;
use super::session;
use super::session_log::request_from;
use super::state::{Server, Session};
use super::worker::{self, WorkerReport, panic_error};
use crate::net::{ACCEPT_RETRY_DELAY, Interest, Io, sleep, yield_now};

/// Accept attempts before the other tasks of the worker run.
const ACCEPTS_PER_TURN: usize = 32;

/// Starts one accept loop for each listener on the worker of this thread. They run until the shutdown.
pub(super) fn start(server: &Arc<Server>, listeners: &[Arc<Listener>]) -> io::Result<()> {
    for listener in listeners {
        let accept_loop = AcceptLoop { server: server.clone(), listener: Io::shared_listener(listener.clone())? };
        worker::spawn(async move {
            let workers = &accept_loop.server.workers;
            let accepting = accept_loop.run().or(workers.wait_stop_accepting());
            if AssertUnwindSafe(accepting).catch_unwind().await.is_err() {
                workers.report(WorkerReport::Failed(panic_error()));
            }
        });
    }
    Ok(())
}

/// Accepts the connections of one listener.
struct AcceptLoop {
    server: Arc<Server>,
    listener: Io<Arc<Listener>>,
}

impl AcceptLoop {
    async fn run(&self) {
        for attempts in 1_usize.. {
            // A permit is acquired only for a waiting connection: otherwise idle listeners would hold unused permits.
            self.listener.ready(Interest::Read).await;
            let permit = self.server.limiter.acquire_permit().await;
            match self.listener.try_with(Interest::Read, |listener| listener.accept()) {
                Ok((conn, client)) => {
                    if let Some(session) = self.admit(client, permit) {
                        match self.server.workers.less_loaded() {
                            Some(worker) => worker.send(move || session::start(session, conn)),
                            None => session::start(session, conn),
                        }
                    }
                }
                // Another worker has accepted the connection, or the client has closed it.
                Err(error) if is_transient(&error) => {}
                Err(error) => {
                    warn(|| format!("accept on {}: {error} (retrying)", self.listener.get_ref()));
                    sleep(ACCEPT_RETRY_DELAY).await;
                }
            }
            if attempts.is_multiple_of(ACCEPTS_PER_TURN) {
                yield_now().await;
            }
        }
    }

    /// Returns the session of a new connection, or `None` if the connection has to be closed.
    fn admit(&self, client: Option<SocketAddr>, permit: SemaphoreGuard<'_>) -> Option<Session> {
        let mut quota = None;
        if !self.server.limiter.admit_client(client, &mut quota) {
            COUNTERS.count_refused();
            return None;
        }
        permit.forget();
        let session = Session::new(self.server.clone(), client, quota);
        if let Err(denial) = session.policy.authorize(&request_from(client)) {
            COUNTERS.count_refused();
            session.log.set_error(denial);
            return None;
        }
        session.log.log_start();
        Some(session)
    }
}

/// Returns true if the next accept(2) may succeed at once.
fn is_transient(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, WouldBlock};
    let is_protocol_error = error.raw_os_error() == Some(rustix::io::Errno::PROTO.raw_os_error());
    is_protocol_error || matches!(error.kind(), WouldBlock | ConnectionAborted | ConnectionReset | Interrupted)
}
