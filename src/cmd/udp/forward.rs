//! `s5 udp -l`: forwards datagrams from a local port to the target through the proxy. Each local peer gets an
//! association, which ends after the idle timeout, or when a new peer needs its slot.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

use smol::LocalExecutor;
use smol::channel::{Receiver, Sender, bounded};

use super::transfer::{self, Transfer};
use crate::cmd::cli::exit::{CliResult, ExitStatus};
use crate::cmd::netcat::connector::{Connector, ModeFuture};
use crate::cmd::netcat::forward::{Task, listen};
use crate::net::{DATAGRAM_BUFFER_SIZE, Interest, Io, retry_refused, sleep_until, yield_now};
use crate::server::ClientKey;

/// Maximum number of queued datagrams of a peer. Further datagrams are dropped.
const MAX_QUEUED: usize = 64;
/// Size in bytes above which a datagram is large.
const LARGE_DATAGRAM: usize = 2048;
/// If this many datagrams of a peer are queued, large ones are dropped.
const MAX_QUEUED_LARGE: usize = 4;
/// Minimum time between two attempts for a peer after an error, and between two lines.
const MIN_INTERVAL: Duration = Duration::from_secs(1);
/// Default idle timeout of a peer's association, as RFC 4787 section 4.3 recommends for the mappings of a NAT.
const DEFAULT_IDLE_TIMEOUT: Duration = Duration::from_secs(5 * 60);

/// One IP address (IPv6: a /64) has at most this many peers for each peer that is still possible. If `--max-peers` is 5
/// or more, a single address has at most about 4/5 of all, and others find a slot.
const PEERS_PER_FREE_SLOT: usize = 4;

/// Idle time after which a peer can be replaced: many programs, such as dig, send each request from another port.
const MIN_IDLE_TIME: Duration = Duration::from_secs(2);

/// All peers, each from its first datagram to the end of its association.
type Peers = HashMap<SocketAddr, Peer>;

struct Peer {
    /// Its datagrams. The association ends when the peer is removed, which closes the queue.
    queue: Sender<Vec<u8>>,
    /// Time of the last datagram in either direction, while the association is open.
    last_activity: Weak<Cell<Instant>>,
}

/// Prints at most one line per `MIN_INTERVAL`. The value is the time of the last line, and the number of lines that were
/// omitted after it.
#[derive(Default)]
struct LimitedLines(Cell<Option<(Instant, u64)>>);

impl LimitedLines {
    fn print(&self, connector: &Connector, line: &str) {
        let omitted = match self.0.get() {
            Some((at, n)) if at.elapsed() < MIN_INTERVAL => return self.0.set(Some((at, n + 1))),
            Some((_, n @ 1..)) => format!(" (omitted lines: {n})"),
            _ => String::new(),
        };
        connector.print_line(&format!("s5: {line}{omitted}"));
        self.0.set(Some((Instant::now(), 0)));
    }
}

/// Relays between a local port and the target until an error occurs.
pub(super) async fn run(connector: &Connector, addr: SocketAddr) -> CliResult {
    let socket = listen(connector, addr, UdpSocket::bind)?;
    let (peers, errors, drops) = (RefCell::<Peers>::default(), LimitedLines::default(), LimitedLines::default());
    let executor = LocalExecutor::new();
    let accept_datagrams: ModeFuture<'_> = Box::pin(async {
        let mut buffer = vec![0; DATAGRAM_BUFFER_SIZE];
        loop {
            let received = socket.with(Interest::Read, |socket| retry_refused(|| socket.recv_from(&mut buffer))).await;
            let (n, peer) = received.map_err(|error| connector.io_error(ExitStatus::RECEIVE_ERROR, &error))?;
            let data = buffer.get(..n).unwrap_or_default().to_vec();
            let queue = peers.borrow().get(&peer).map(|peer| peer.queue.clone());
            let queue = match queue {
                Some(queue) => queue,
                None if !make_room(&mut peers.borrow_mut(), peer.ip(), connector.args.max_peers) => {
                    drops.print(connector, "dropping datagrams of new peers: too many peers (raise --max-peers)");
                    continue;
                }
                None => {
                    let (queue, datagrams) = bounded(MAX_QUEUED);
                    peers.borrow_mut().insert(peer, Peer { queue: queue.clone(), last_activity: Weak::new() });
                    let association = serve_peer(connector, &socket, &peers, &errors, peer, datagrams);
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
    });
    executor.run(accept_datagrams).await
}

/// Returns true if there is a slot for a new peer with this IP address. If necessary, removes the peer that is idle
/// longest: one of this address, or, if there are `max_peers`, of the address with most.
fn make_room(peers: &mut Peers, ip: IpAddr, max_peers: usize) -> bool {
    let mut counts: HashMap<ClientKey, usize> = HashMap::new();
    peers.keys().for_each(|peer| *counts.entry(ClientKey::new(Some(peer.ip()))).or_default() += 1);
    let count = |key| counts.get(&key).copied().unwrap_or(0);
    let (key, free) = (ClientKey::new(Some(ip)), max_peers.saturating_sub(peers.len()));
    if free > 0 && count(key) < free.saturating_mul(PEERS_PER_FREE_SLOT) {
        return true;
    }
    let idle = peers.iter().filter_map(|(addr, peer)| {
        let (other, idle) = (ClientKey::new(Some(addr.ip())), peer.last_activity.upgrade()?.get().elapsed());
        let is_replaceable = idle > MIN_IDLE_TIME && (other == key || free == 0 && count(other) > count(key));
        is_replaceable.then_some((count(other), idle, *addr))
    });
    idle.max().is_some_and(|(_, _, addr)| peers.remove(&addr).is_some())
}

/// Opens an association for a peer, and after an error another one if the peer sends again.
async fn serve_peer(
    connector: &Connector,
    socket: &Io<UdpSocket>,
    peers: &RefCell<Peers>,
    errors: &LimitedLines,
    peer: SocketAddr,
    datagrams: Receiver<Vec<u8>>,
) {
    let idle_timeout = connector.args.max_idle_time().unwrap_or(DEFAULT_IDLE_TIMEOUT);
    loop {
        let begun = Instant::now();
        let relay = async |transfer: &Transfer<'_>| {
            let last_activity = Rc::downgrade(&transfer.last_activity);
            peers.borrow_mut().entry(peer).and_modify(|entry| entry.last_activity = last_activity);
            let (send, receive) = (send(transfer, &datagrams, peer), receive(transfer, socket, peer));
            match transfer.run(send, receive, Some(idle_timeout)).await {
                Err(error) if error.status == ExitStatus::TIMED_OUT => Ok(()),
                ended => ended,
            }
        };
        let session = connector.open_sessions.clone();
        let Err(error) = transfer::run(connector, Some(peer), relay).await else { break };
        drop(session);
        if !error.message.is_empty() {
            errors.print(connector, &error.to_string());
        }
        // Without the pause, each further datagram of the peer could cause an attempt.
        while datagrams.try_recv().is_ok() {}
        sleep_until(begun + MIN_INTERVAL).await;
        if datagrams.is_empty() || connector.is_cut() {
            break;
        }
    }
    // After the queue was closed, the entry may be that of a new peer with the same address.
    if !datagrams.is_closed() {
        peers.borrow_mut().remove(&peer);
    }
}

async fn send(transfer: &Transfer<'_>, datagrams: &Receiver<Vec<u8>>, peer: SocketAddr) -> CliResult {
    while let Ok(data) = datagrams.recv().await {
        // A datagram that is too large is dropped.
        if let Err(error) = transfer.send(&data).await {
            log::debug!("dropped a datagram from {peer}: {error}");
        }
    }
    Ok(())
}

async fn receive(transfer: &Transfer<'_>, socket: &Io<UdpSocket>, peer: SocketAddr) -> CliResult {
    loop {
        let (from, data) = transfer.recv().await?;
        if !transfer.association.accept_sender(&from) {
            log::debug!("dropped an answer from {from}: it is not from the target");
            continue;
        }
        transfer.count_answer(&data);
        // Other peers share the socket: if its buffer is full, the answer is lost.
        if let Err(error) = socket.try_with(Interest::Write, |socket| socket.send_to(&data, peer)) {
            log::debug!("dropped an answer to {peer}: {error}");
        }
        yield_now().await;
    }
}
