//! Accepts connections, and admits them as sessions.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use super::limiter::{AdmitError, SessionQuota};
use super::listen::Listener;
use super::reply::denial_reason;
use super::session_log::{SessionLog, request_from};
use super::worker::{SessionPermit, WorkerHandle, WorkerMessage, WorkerPool};
use crate::net::{ACCEPT_RETRY_DELAY, Interest, Io, sleep, yield_now};
use crate::policy::rules::Decision;

/// Accept attempts in a row before the open sessions get their turn.
const ACCEPTS_PER_TURN: usize = 32;

pub(super) async fn run(pool: Arc<WorkerPool>, listener: Io<Arc<Listener>>, worker: Rc<WorkerHandle>) {
    AcceptLoop { pool, listener, worker }.run().await;
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
            // A permit is acquired only for a waiting connection: an idle listener would keep it from the others.
            self.listener.ready(Interest::Read).await;
            let mut permit = self.acquire_permit().await;
            match self.listener.try_with(Interest::Read, |listener| listener.accept()) {
                Ok((conn, client)) => {
                    if let Some(quota) = self.admit(client) {
                        permit.quota = quota;
                        match self.pool.less_loaded(self.worker.index) {
                            // Fails only if that worker has ended, and then the server ends.
                            Some(peer) => drop(peer.inbox.try_send(WorkerMessage::Accepted(conn, client, permit))),
                            None => self.worker.start_session(conn, client, permit),
                        }
                    }
                }
                // Another worker has accepted it, or the client has closed it.
                Err(error) if is_transient(&error) => {}
                Err(error) => self.back_off(&error).await,
            }
            attempts += 1;
            if attempts.is_multiple_of(ACCEPTS_PER_TURN) {
                yield_now().await;
            }
        }
    }

    /// Returns the quota of a new session, or `None` if its connection has to be closed.
    fn admit(&self, client: Option<SocketAddr>) -> Option<Option<Box<SessionQuota>>> {
        let server = &self.pool.server;
        let address = || client.map_or_else(|| "unix".to_owned(), |client| client.ip().to_string());
        match server.limiter.admit_client(client) {
            Err(AdmitError::Blocked) => log::debug!("client {}: refused: blocked after failed logins", address()),
            Err(AdmitError::AtLimit(limit)) => self.pool.log.warn(|| {
                format!("client {}: refused: limit of {limit} connections reached (raise --max-per-client)", address())
            }),
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
                self.pool
                    .log
                    .warn(|| format!("limit of {limit} connections reached: new ones wait (raise --max-connections)"));
                permits.acquire().await
            }
        };
        permit.forget();
        SessionPermit { pool: self.pool.clone(), quota: None }
    }

    async fn back_off(&self, error: &io::Error) {
        self.pool.log.warn(|| format!("accept on {}: {error} (retrying)", self.listener.get_ref()));
        sleep(ACCEPT_RETRY_DELAY).await;
    }
}

/// Returns true if the next accept(2) may succeed at once.
fn is_transient(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, WouldBlock};
    let is_protocol_error = error.raw_os_error() == Some(rustix::io::Errno::PROTO.raw_os_error());
    is_protocol_error || matches!(error.kind(), WouldBlock | ConnectionAborted | ConnectionReset | Interrupted)
}
