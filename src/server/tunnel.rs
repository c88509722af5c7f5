//! A session after its success reply: two connections to relay, and the log line at the end.
//!
//! A tunnel runs as a separate task, so that it holds no memory of the handshake.

use std::io;

use super::session_log::SessionLog;
use super::state::{Session, SessionPermit};
use super::worker::{self, BoxedTask, BulkGuard, Priority, WorkerHandle};
use crate::conn::{Conn, DetachedConn};
use crate::net::{RelayError, RelayOptions, RelayOutcome, RelayResult, Stream, UNDELIVERED_GRACE, relay, sleep};

/// The state of a session that is relayed.
pub(super) struct Tunnel {
    client: Conn,
    target: Conn,
    log: SessionLog,
    permit: SessionPermit,
}

impl Tunnel {
    pub(super) fn new(session: Session, target: Conn) -> Self {
        let Session { permit, log, conn, .. } = session;
        Self { client: conn, target, log, permit }
    }

    /// Relays in a task on this thread. Without a rate limit, a bulk tunnel moves to a worker with fewer bulk tunnels.
    pub(super) fn start(mut self) {
        if self.permit.rate_limit().is_limited() {
            return worker::spawn(Priority::High, Box::pin(self.relay_here(None)) as BoxedTask);
        }
        // `self` is not moved to a variable inside the block: the future would reserve room for it twice.
        worker::spawn(Priority::High, async move {
            match self.relay(None).await {
                Ok(RelayOutcome::Finished) => {}
                Ok(RelayOutcome::Bulk) => Box::pin(self.relay_bulk()).await,
                result => Box::pin(self.finish(result)).await,
            }
        });
    }

    /// Relays until the tunnel ends, becomes bulk or is denied by a reload. `options` defaults to the server's.
    fn relay<'a>(&'a mut self, options: Option<&'a RelayOptions>) -> impl Future<Output = RelayResult> + 'a {
        let Self { client, target, log, permit } = self;
        let (log, permit) = (&*log, &*permit);
        let options = options.unwrap_or(&permit.server.relay_options);
        relay(client, target, options, &log.bytes, |_, target| is_still_allowed(permit, log, target))
    }

    /// Relays a bulk tunnel on the worker with the fewest bulk tunnels.
    async fn relay_bulk(self) {
        let server = self.permit.server.clone();
        let tunnel = match server.workers.fewest_bulk() {
            Some(worker) => match self.move_to(worker) {
                Ok(()) => return,
                Err(tunnel) => *tunnel,
            },
            None => self,
        };
        tunnel.relay_here(server.workers.this().map(WorkerHandle::bulk_guard)).await;
    }

    /// Relays to the end on this worker.
    async fn relay_here(mut self, _guard: Option<BulkGuard>) {
        let rate_limit = self.permit.rate_limit();
        let options = RelayOptions { stop_when_bulk: false, rate_limit, ..self.permit.server.relay_options.clone() };
        let result = self.relay(Some(&options)).await;
        self.finish(result).await;
    }

    /// Continues the tunnel on another worker. Returns it unchanged if no descriptor is available.
    fn move_to(self, worker: &WorkerHandle) -> Result<(), Box<Self>> {
        let (Ok(client), Ok(target)) = (self.client.detach(), self.target.detach()) else {
            return Err(Box::new(self));
        };
        for conn in [&self.client, &self.target] {
            // If the other worker ends before the tunnel arrives, both peers get a reset: the data is incomplete.
            conn.abort();
            conn.deregister();
        }
        let Self { log, permit, .. } = self;
        // Counted before it arrives, so that the next tunnel chooses another worker.
        let guard = worker.bulk_guard();
        worker.send(move || match attach(client, target) {
            Ok((client, target)) => {
                let tunnel = Self { client, target, log, permit };
                worker::spawn(Priority::High, Box::pin(tunnel.relay_here(Some(guard))) as BoxedTask);
            }
            Err(error) => log.set_error(error),
        });
        Ok(())
    }

    /// Logs an error. If data for the target was lost, the client is reset instead of closed.
    async fn finish(self, result: RelayResult) {
        let Err(error) = result else { return };
        self.log.set_error(&error);
        if let RelayError::Undelivered(_) = error {
            drop(self.target);
            // Further data from the client can't be delivered, so it is not read. The client may still have data to
            // read, even if it has shut down its write side.
            sleep(UNDELIVERED_GRACE).await;
            self.client.abort();
        }
    }
}

fn is_still_allowed(permit: &SessionPermit, log: &SessionLog, target: &Conn) -> bool {
    let peer = || target.peer_addr().filter(|_| log.is_direct());
    match permit.server.policy.recheck(log, &log.policy_generation, peer) {
        Some(reason) => {
            log.set_error(reason);
            false
        }
        None => true,
    }
}

/// Registers the connections of a tunnel with this thread. They close with a reset until both are registered.
fn attach(client: DetachedConn, target: DetachedConn) -> io::Result<(Conn, Conn)> {
    let (client, target) = (client.attach()?, target.attach()?);
    client.set_reset_on_close(false)?;
    target.set_reset_on_close(false)?;
    Ok((client, target))
}

// An idle tunnel holds this and the state of the relay, which tests/server/relay.rs measures.
const _: () = assert!(size_of::<Tunnel>() <= 232);
