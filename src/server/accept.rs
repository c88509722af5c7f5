//! Accepts connections, and admits them as sessions.
//!
//! All workers wait on the same listeners. For a new connection, the kernel wakes an idle worker.

use std::io;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures_lite::FutureExt as _;
use rustix::event::{PollFd, PollFlags, Timespec};

use super::limiter::warn;
use super::listen::Listener;
use super::session;
use super::state::Server;
use super::worker::{self, WorkerReport, panic_error};
use crate::net::{ACCEPT_RETRY_DELAY, Interest, Io, sleep, yield_now};

/// Accept attempts before the other tasks of the worker run.
const ACCEPTS_PER_TURN: usize = 32;

/// Starts one accept loop for each listener on the worker of this thread. They run until the shutdown.
pub(super) fn start(server: &Arc<Server>, listeners: &[Arc<Listener>]) -> io::Result<()> {
    for listener in listeners {
        let accept_loop = AcceptLoop { server: server.clone(), listener: Io::shared_listener(listener.clone())? };
        worker::spawn_boxed(async move {
            let workers = &accept_loop.server.workers;
            let accepting = accept_loop.run().or(workers.wait_stop_accepting());
            let ended = AssertUnwindSafe(accepting).catch_unwind().await;
            // Other processes can have the socket. Their event loops must be woken for new connections, not this one.
            accept_loop.listener.deregister();
            if ended.is_err() {
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
            // Only for a connection that may be waiting: otherwise idle listeners would hold unused reservations.
            self.listener.ready(Interest::Read).await;
            let Some(mut reserved) = self.server.limiter.reserve(|| self.has_waiting()).await else { continue };
            match self.listener.try_with(Interest::Read, |listener| listener.accept()) {
                Ok((conn, client)) => {
                    // The client of a load balancer is not known yet.
                    let is_known = !self.server.options.is_balancer(client);
                    if is_known && !self.server.limiter.admit_client(&mut reserved, client) {
                        continue;
                    }
                    let server = self.server.clone();
                    let start = move || session::start(server, client, reserved, conn);
                    match self.server.workers.less_loaded() {
                        Some(worker) => worker.send(start),
                        None => start(),
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

    /// Returns whether a connection waits to be accepted. If not, the next event of the listener reports one.
    fn has_waiting(&self) -> bool {
        let is_readable = |listener: &Arc<Listener>| {
            let mut fds = [PollFd::new(listener, PollFlags::IN)];
            let ready = rustix::event::poll(&mut fds, Some(&Timespec::default()))?;
            if ready == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        };
        self.listener.try_with(Interest::Read, is_readable).is_ok()
    }
}

/// Returns true if the next accept(2) may succeed at once.
fn is_transient(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, WouldBlock};
    let is_protocol_error = error.raw_os_error() == Some(rustix::io::Errno::PROTO.raw_os_error());
    is_protocol_error || matches!(error.kind(), WouldBlock | ConnectionAborted | ConnectionReset | Interrupted)
}
