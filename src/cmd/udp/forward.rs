//! `s5 udp -l`: a local port that leads through the proxy; each local peer has an association of its own, as long as it
//! is used.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_lite::FutureExt as _;
use smol::LocalExecutor;
use smol::channel::{Receiver, Sender, bounded};

use super::{associate, association_end, io_error, print_losses, wait_for_silence};
use crate::client::Association;
use crate::cmd::CliError;
use crate::cmd::client::connector::{Attempt, Connector};
use crate::cmd::client::forward::{Task, listen_error, run_with_tasks};
use crate::cmd::client::report::Report;
use crate::cmd::exit_status::ExitStatus;
use crate::proto::{Addr, Host};
use crate::reactor::{Interest, Io, sleep, yield_now};
use crate::relay::ByteCounts;

/// How many datagrams of a peer wait for its association; more are dropped.
const MAX_QUEUED: usize = 64;
/// And of those with more octets than this, that many.
const LARGE_DATAGRAM: usize = 2048;
const MAX_QUEUED_LARGE: usize = 4;
/// How long a peer that got no association waits for the next attempt.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// More than any UDP datagram has, in octets.
const RECV_BUFFER_SIZE: usize = 65_536;

/// How many peers, and how long they may be silent.
#[derive(Clone, Copy, Debug)]
pub(super) struct PeerLimits {
    pub(super) max_peers: usize,
    pub(super) idle_timeout: Duration,
}

/// Those that have an association or are getting one, by their address: where their datagrams go.
type PeerQueues = RefCell<HashMap<SocketAddr, Sender<Vec<u8>>>>;

/// Relays between a local port and the target, without end.
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
            let (n, peer) = receive(&socket, &mut buffer)
                .await
                .map_err(|error| io_error(connector, ExitStatus::RECEIVE_ERROR, &error))?;
            let data = buffer.get(..n).unwrap_or_default().to_vec();
            let queue = peers.borrow().get(&peer).cloned();
            let queue = match queue {
                Some(queue) => queue,
                None if peers.borrow().len() >= limits.max_peers => {
                    if !is_limit_reported {
                        connector.print_line(&format!("s5: {peer} is one peer too many; see --max-peers"));
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
            // UDP may lose what comes too fast.
            if data.len() <= LARGE_DATAGRAM || queue.len() < MAX_QUEUED_LARGE {
                let _ = queue.try_send(data);
            }
            yield_now().await;
        }
    };
    run_with_tasks(&executor, Box::pin(accept_datagrams)).await
}

/// Skips what ICMP says about an earlier answer.
async fn receive(socket: &Io<UdpSocket>, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
    loop {
        match socket.with(Interest::Read, |socket| socket.recv_from(buffer)).await {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            received => return received,
        }
    }
}

/// One peer, from its first datagram until it has been silent for long enough.
async fn serve_peer(
    connector: &Connector,
    socket: &Io<UdpSocket>,
    peers: &PeerQueues,
    peer: SocketAddr,
    datagrams: Receiver<Vec<u8>>,
    idle_timeout: Duration,
) {
    let Attempt { client, tries, result } = connector.attempt(associate).await;
    let mut report = Report::new(connector, &client, tries);
    let is_associated = result.is_ok();
    let result = match result {
        Ok((association, dst)) => {
            if let Some(relay) = association.relay() {
                report.set_bnd(relay);
                connector.print_verbose(&format!("relays between {peer} and {dst} at {relay}"));
            }
            let transfer = Transfer {
                connector,
                socket,
                peer,
                association: &association,
                dst: &dst,
                started: Instant::now(),
                first_answer: Cell::default(),
                last_activity: Cell::new(Instant::now()),
                moved: ByteCounts::default(),
            };
            let idle = async {
                wait_for_silence(&transfer.last_activity, idle_timeout).await;
                Ok(())
            };
            let ended = transfer
                .send(&datagrams)
                .or(transfer.receive())
                .or(idle)
                .or(association_end(connector, &association))
                .await;
            report.set_bytes(&transfer.moved);
            report.set_transfer_stats(transfer.first_answer.get(), None);
            print_losses(connector, &association);
            ended
        }
        Err(failure) => Err(failure),
    };
    connector.print_error(connector.finish(report, result));
    if !is_associated {
        // A peer that goes on sending does not make an attempt, and a line, of each datagram.
        sleep(RETRY_PAUSE).await;
    }
    peers.borrow_mut().remove(&peer);
}

struct Transfer<'a> {
    connector: &'a Connector,
    socket: &'a Io<UdpSocket>,
    peer: SocketAddr,
    association: &'a Association,
    dst: &'a Addr,
    started: Instant,
    first_answer: Cell<Option<Duration>>,
    /// When a datagram moved last.
    last_activity: Cell<Instant>,
    moved: ByteCounts,
}

impl Transfer<'_> {
    async fn send(&self, datagrams: &Receiver<Vec<u8>>) -> Result<(), CliError> {
        while let Ok(data) = datagrams.recv().await {
            self.last_activity.set(Instant::now());
            self.moved.up.fetch_add(data.len() as u64, Ordering::Relaxed);
            // What is too large for one way or another is lost, as on any way.
            if let Err(error) = self.association.send(self.dst, &data).await {
                log::debug!("a datagram of {} was not sent: {error}", self.peer);
            }
        }
        Ok(())
    }

    async fn receive(&self) -> Result<(), CliError> {
        loop {
            let received = self.association.recv().await;
            let (from, data) = received.map_err(|error| io_error(self.connector, ExitStatus::RECEIVE_ERROR, &error))?;
            // A target known by name has whatever address it has.
            if matches!(self.dst.host, Host::Ip(_)) && from != *self.dst {
                log::debug!("an answer from {from} is not one of {}", self.dst);
                continue;
            }
            self.last_activity.set(Instant::now());
            self.first_answer.set(self.first_answer.get().or(Some(self.started.elapsed())));
            self.moved.down.fetch_add(data.len() as u64, Ordering::Relaxed);
            // Others wait for the socket as well; where there is no room, it is lost.
            if let Err(error) = self.socket.try_with(Interest::Write, |socket| socket.send_to(&data, self.peer)) {
                log::debug!("an answer to {} was not sent: {error}", self.peer);
            }
            yield_now().await;
        }
    }
}
