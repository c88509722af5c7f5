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
use super::worker::{self, Priority, WorkerReport, panic_error};
use crate::net::{ACCEPT_RETRY_DELAY, Interest, Io, sleep, yield_now};

/// Accept attempts before the other tasks of the worker run.
const ACCEPTS_PER_TURN: usize = 32;

/// Starts one accept loop for each listener on the worker of this thread. They run until the shutdown.
pub(super) fn start(server: &Arc<Server>, listeners: &[Arc<Listener>]) -> io::Result<()> {
    for listener in listeners {
        let (server, listener) = (server.clone(), Io::shared_listener(listener.clone())?);
        worker::spawn_boxed(Priority::Normal, async move {
            let accepting = accept_all(&server, &listener).or(server.workers.wait_stop_accepting());
            let ended = AssertUnwindSafe(accepting).catch_unwind().await;
            // Other processes can have the socket. Their event loops must be woken for new connections, not this one.
            listener.deregister();
            if ended.is_err() {
                server.workers.report(WorkerReport::Failed(panic_error()));
            }
        });
    }
    Ok(())
}

/// Accepts the connections of one listener.
async fn accept_all(server: &Arc<Server>, listener: &Io<Arc<Listener>>) {
    for attempts in 1_usize.. {
        // Only for a connection that may be waiting: otherwise idle listeners would hold unused reservations.
        listener.ready(Interest::Read).await;
        let has_waiting = || listener.try_with(Interest::Read, check_readable).is_ok();
        let Some(mut reserved) = server.limiter.reserve(has_waiting).await else { continue };
        match listener.try_with(Interest::Read, |listener| listener.accept()) {
            Ok((conn, client)) => {
                // The client of a load balancer is not known yet.
                let is_known = !server.options.is_balancer(client);
                if !is_known || server.limiter.admit_client(&server.options, &mut reserved, client) {
                    let this = server.clone();
                    let start = move || session::start(this, client, reserved, conn);
                    match server.workers.less_loaded() {
                        Some(worker) => worker.send(start),
                        None => start(),
                    }
                }
            }
            // Another worker has accepted the connection, or the client has closed it.
            Err(error) if is_transient(&error) => {}
            Err(error) => {
                warn(|| format!("accept on {}: {error} (retrying)", listener.get_ref()));
                sleep(ACCEPT_RETRY_DELAY).await;
            }
        }
        if attempts.is_multiple_of(ACCEPTS_PER_TURN) {
            yield_now().await;
        }
    }
}

/// Returns an error if no connection waits to be accepted. Then the next event of the listener reports one.
fn check_readable(listener: &Arc<Listener>) -> io::Result<()> {
    let mut fds = [PollFd::new(listener, PollFlags::IN)];
    let ready = rustix::event::poll(&mut fds, Some(&Timespec::default()))?;
    if ready == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
}

/// Returns true if the next accept(2) may succeed at once.
fn is_transient(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, WouldBlock};
    let is_protocol_error = error.raw_os_error() == Some(rustix::io::Errno::PROTO.raw_os_error());
    is_protocol_error || matches!(error.kind(), WouldBlock | ConnectionAborted | ConnectionReset | Interrupted)
}
