//! `s5 udp -l`: forwards datagrams to a local port through the proxy. Each local peer gets an association, which ends
//! after the idle timeout.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_lite::FutureExt as _;
use smol::LocalExecutor;
use smol::channel::{Receiver, Sender, bounded};

use super::{associate, association_end, print_losses, wait_until_idle};
use crate::client::{Association, RECV_BUFFER_SIZE};
use crate::cmd::cli::exit::CliError;
use crate::cmd::cli::exit::ExitStatus;
use crate::cmd::netcat::connector::{Connector, RetryOutcome};
use crate::cmd::netcat::forward::{Task, listen_error, run_with_tasks};
use crate::proto::{Addr, Host};
use crate::reactor::{Interest, Io, sleep, yield_now};
use crate::relay::ByteCounts;

/// Maximum number of queued datagrams of a peer. Further datagrams are dropped.
const MAX_QUEUED: usize = 64;
/// Size in bytes above which a datagram is large.
const LARGE_DATAGRAM: usize = 2048;
/// If this many datagrams of a peer are queued, large ones are dropped.
const MAX_QUEUED_LARGE: usize = 4;
/// Pause before the next attempt for a peer whose association could not be established.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Limits for local peers.
#[derive(Clone, Copy, Debug)]
pub(super) struct PeerLimits {
    pub(super) max_peers: usize,
    pub(super) idle_timeout: Duration,
}

/// The queue of datagrams of each peer, from its first datagram to the end of its association.
type PeerQueues = RefCell<HashMap<SocketAddr, Sender<Vec<u8>>>>;

/// Relays between a local port and the target until an error occurs.
pub(super) async fn run(connector: &Connector, addr: SocketAddr, limits: PeerLimits) -> Result<(), CliError> {
    let bound = UdpSocket::bind(addr).and_then(|socket| {
        socket.set_nonblocking(true)?;
        let addr = socket.local_addr()?;
        Ok((Io::new(socket)?, addr))
    });
    let (socket, addr) = bound.map_err(|error| listen_error(addr, &error))?;
    connector.print_line(&format!("listening on {addr}"));
    let peers = PeerQueues::default();
    let executor = LocalExecutor::new();
    let mut is_limit_reported = false;
    let accept_datagrams = async {
        let mut buffer = vec![0; RECV_BUFFER_SIZE];
        loop {
            let received = receive(&socket, &mut buffer).await;
            let (n, peer) = received.map_err(|error| connector.io_error(ExitStatus::RECEIVE_ERROR, &error))?;
            let data = buffer.get(..n).unwrap_or_default().to_vec();
            let queue = peers.borrow().get(&peer).cloned();
            let queue = match queue {
                Some(queue) => queue,
                None if peers.borrow().len() >= limits.max_peers => {
                    if !is_limit_reported {
                        let reason = "too many peers (raise --max-peers)";
                        connector.print_line(&format!("s5: dropping datagrams of {peer}: {reason}"));
                    }
                    is_limit_reported = true;
                    continue;
                }
                None => {
                    let (queue, datagrams) = bounded(MAX_QUEUED);
                    peers.borrow_mut().insert(peer, queue.clone());
                    let association = serve_peer(connector, &socket, &peers, peer, datagrams, limits.idle_timeout);
                    executor.spawn(Box::pin(association) as Task<'_>).detach();
                    queue
                }
            };
            // If the queue is full, the datagram is dropped.
            if data.len() <= LARGE_DATAGRAM || queue.len() < MAX_QUEUED_LARGE {
                let _ = queue.try_send(data);
            }
            yield_now().await;
        }
    };
    run_with_tasks(&executor, Box::pin(accept_datagrams)).await
}

/// Receives a datagram. Ignores ECONNREFUSED, which reports an ICMP error about an earlier answer.
async fn receive(socket: &Io<UdpSocket>, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
    loop {
        match socket.with(Interest::Read, |socket| socket.recv_from(buffer)).await {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            received => return received,
        }
    }
}

/// Serves one peer, from its first datagram to the end of its association.
async fn serve_peer(
    connector: &Connector,
    socket: &Io<UdpSocket>,
    peers: &PeerQueues,
    peer: SocketAddr,
    datagrams: Receiver<Vec<u8>>,
    idle_timeout: Duration,
) {
    let RetryOutcome { client, tries, result } = connector.retry(associate).await;
    let mut report = connector.report(&client, tries);
    let is_associated = result.is_ok();
    let result = match result {
        Ok((association, dst)) => {
            if let Some(relay) = association.relay() {
                report.set_bnd(relay);
                connector.print_verbose(&format!("UDP relay for {peer} to {dst} at {relay}"));
            }
            let transfer = PeerTransfer {
                connector,
                socket,
                peer,
                association: &association,
                dst: &dst,
                started: Instant::now(),
                first_answer: Cell::default(),
                last_activity: Cell::new(Instant::now()),
                counts: ByteCounts::default(),
            };
            let idle = async {
                wait_until_idle(&transfer.last_activity, idle_timeout).await;
                Ok(())
            };
            let ended = transfer
                .send(&datagrams)
                .or(transfer.receive())
                .or(idle)
                .or(association_end(connector, &association))
                .await;
            report.set_bytes(&transfer.counts);
            report.set_stats(transfer.first_answer.get(), None);
            print_losses(connector, &association);
            ended
        }
        Err(error) => Err(error),
    };
    connector.print_error(connector.finish(report, result));
    if !is_associated {
        // Without the pause, each further datagram of the peer would cause an attempt and an error message.
        sleep(RETRY_PAUSE).await;
    }
    peers.borrow_mut().remove(&peer);
}

struct PeerTransfer<'a> {
    connector: &'a Connector,
    socket: &'a Io<UdpSocket>,
    peer: SocketAddr,
    association: &'a Association,
    dst: &'a Addr,
    started: Instant,
    first_answer: Cell<Option<Duration>>,
    /// Time of the last datagram in either direction.
    last_activity: Cell<Instant>,
    counts: ByteCounts,
}

impl PeerTransfer<'_> {
    async fn send(&self, datagrams: &Receiver<Vec<u8>>) -> Result<(), CliError> {
        while let Ok(data) = datagrams.recv().await {
            self.last_activity.set(Instant::now());
            self.counts.up.fetch_add(data.len() as u64, Ordering::Relaxed);
            // A datagram that is too large is dropped.
            if let Err(error) = self.association.send(self.dst, &data).await {
                log::debug!("dropped a datagram from {}: {error}", self.peer);
            }
        }
        Ok(())
    }

    async fn receive(&self) -> Result<(), CliError> {
        loop {
            let received = self.association.recv().await;
            let (from, data) = received.map_err(|error| self.connector.io_error(ExitStatus::RECEIVE_ERROR, &error))?;
            // If the proxy resolves the target, its address is not known here.
            if matches!(self.dst.host, Host::Ip(_)) && from != *self.dst {
                log::debug!("dropped an answer from {from}: it is not from {}", self.dst);
                continue;
            }
            self.last_activity.set(Instant::now());
            self.first_answer.set(self.first_answer.get().or(Some(self.started.elapsed())));
            self.counts.down.fetch_add(data.len() as u64, Ordering::Relaxed);
            // Other peers share the socket: if its buffer is full, the answer is lost.
            if let Err(error) = self.socket.try_with(Interest::Write, |socket| socket.send_to(&data, self.peer)) {
                log::debug!("dropped an answer to {}: {error}", self.peer);
            }
            yield_now().await;
        }
    }
}
