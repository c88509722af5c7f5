//! `s5 udp -l`: forwards datagrams from a local port to the target through the proxy. Each local peer gets an
//! association, which ends after the idle timeout.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::rc::Rc;
use std::time::{Duration, Instant};

use smol::LocalExecutor;
use smol::channel::{Receiver, Sender, bounded};

use super::transfer::{self, Transfer};
use crate::cmd::cli::exit::{CliResult, ExitStatus};
use crate::cmd::netcat::connector::{Connector, ModeFuture};
use crate::cmd::netcat::forward::{Task, listen};
use crate::net::{DATAGRAM_BUFFER_SIZE, Interest, Io, retry_refused, sleep_until, yield_now};

/// Maximum number of queued datagrams of a peer. Further datagrams are dropped.
const MAX_QUEUED: usize = 64;
/// Size in bytes above which a datagram is large.
const LARGE_DATAGRAM: usize = 2048;
/// If this many datagrams of a peer are queued, large ones are dropped.
const MAX_QUEUED_LARGE: usize = 4;
/// Minimum time between two attempts for a peer after an error, and between two equal lines.
const MIN_INTERVAL: Duration = Duration::from_secs(1);
/// Default idle timeout of a peer's association, as RFC 4787 section 4.3 recommends for the mappings of a NAT.
const DEFAULT_IDLE_TIMEOUT: Duration = Duration::from_secs(5 * 60);

/// A local peer, from its first datagram to the end of its association.
struct Peer {
    queue: Sender<Vec<u8>>,
    /// Time of the last datagram of its association. `None`: the association is not open.
    last_activity: Option<Rc<Cell<Instant>>>,
}

/// The peers of each IP address.
#[derive(Default)]
struct Peers(HashMap<IpAddr, HashMap<SocketAddr, Peer>>);

impl Peers {
    fn get_mut(&mut self, addr: SocketAddr) -> Option<&mut Peer> {
        self.0.get_mut(&addr.ip())?.get_mut(&addr)
    }

    /// Returns true if there is room for a peer of `ip`. If there is none, the address with the most peers loses the one
    /// that was idle for the longest time, unless `ip` has about as many.
    fn make_room(&mut self, ip: IpAddr, max_peers: usize) -> bool {
        let counts = || self.0.values().map(HashMap::len);
        if counts().sum::<usize>() < max_peers {
            return true;
        }
        let (own, most) = (self.0.get(&ip).map_or(0, HashMap::len), counts().max().unwrap_or_default());
        let largest = self.0.values().filter(|peers| peers.len() == most && (own == 0 || most > own + 1)).flatten();
        let idle = largest.filter_map(|(addr, peer)| Some((peer.last_activity.as_ref()?.get().elapsed(), *addr)));
        let longest = idle.max().filter(|(idle, _)| most > 1 || *idle >= MIN_INTERVAL);
        longest.map(|(_, addr)| self.remove(addr)).is_some()
    }

    fn remove(&mut self, addr: SocketAddr) {
        self.0.retain(|_, peers| {
            peers.remove(&addr);
            !peers.is_empty()
        });
    }
}

/// Prints lines, but an equal one only after `MIN_INTERVAL`, with the number of those that were left out before it.
#[derive(Default)]
struct LimitedLines {
    last: RefCell<Option<(String, Instant)>>,
    omitted: Cell<u64>,
}

impl LimitedLines {
    fn print(&self, connector: &Connector, line: &str) {
        let is_recent = |(last, at): &(String, Instant)| last == line && at.elapsed() < MIN_INTERVAL;
        if self.last.borrow().as_ref().is_some_and(is_recent) {
            return self.omitted.set(self.omitted.get() + 1);
        }
        let omitted = Some(self.omitted.take()).filter(|n| *n > 0).map(|n| format!(" ({n} more before)"));
        connector.print_line(&format!("s5: {line}{}", omitted.unwrap_or_default()));
        self.last.replace(Some((line.into(), Instant::now())));
    }
}

/// Relays between a local port and the target until an error occurs.
pub(super) async fn run(connector: &Connector, addr: SocketAddr) -> CliResult {
    let socket = listen(connector, addr, UdpSocket::bind)?;
    let (peers, errors, drops) = (RefCell::new(Peers::default()), LimitedLines::default(), LimitedLines::default());
    let executor = LocalExecutor::new();
    let accept_datagrams: ModeFuture<'_> = Box::pin(async {
        let mut buffer = vec![0; DATAGRAM_BUFFER_SIZE];
        loop {
            let received = socket.with(Interest::Read, |socket| retry_refused(|| socket.recv_from(&mut buffer))).await;
            let (n, peer) = received.map_err(|error| connector.io_error(ExitStatus::RECEIVE_ERROR, &error))?;
            let data = buffer.get(..n).unwrap_or_default().to_vec();
            let queue = peers.borrow_mut().get_mut(peer).map(|peer| peer.queue.clone());
            let queue = match queue {
                Some(queue) => queue,
                None if !peers.borrow_mut().make_room(peer.ip(), connector.args.max_peers) => {
                    drops.print(connector, "dropping datagrams of new peers: too many peers (raise --max-peers)");
                    continue;
                }
                None => {
                    let (queue, datagrams) = bounded(MAX_QUEUED);
                    let new = Peer { queue: queue.clone(), last_activity: None };
                    peers.borrow_mut().0.entry(peer.ip()).or_default().insert(peer, new);
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

/// Opens an association for a peer, and after an error another one if the peer sends again. When the peer has to give
/// way, `datagrams` is closed.
async fn serve_peer(
    connector: &Connector,
    socket: &Io<UdpSocket>,
    peers: &RefCell<Peers>,
    errors: &LimitedLines,
    peer: SocketAddr,
    datagrams: Receiver<Vec<u8>>,
) {
    let idle_timeout = connector.args.max_idle_time().unwrap_or(DEFAULT_IDLE_TIMEOUT);
    let set_activity = |time: Option<&Rc<Cell<Instant>>>| {
        peers.borrow_mut().get_mut(peer).into_iter().for_each(|peer| peer.last_activity = time.cloned());
    };
    loop {
        let begun = Instant::now();
        let relay = async |transfer: &Transfer<'_>| {
            set_activity(Some(&transfer.last_activity));
            let (send, receive) = (send(transfer, &datagrams, peer), receive(transfer, socket, peer));
            match transfer.run(send, receive, Some(idle_timeout)).await {
                Err(error) if error.status == ExitStatus::TIMED_OUT => Ok(()),
                ended => ended,
            }
        };
        let ended = transfer::run(connector, Some(peer), relay).await;
        if datagrams.is_closed() {
            return;
        }
        let Err(error) = ended else { break };
        if !error.message.is_empty() {
            errors.print(connector, &error.to_string());
        }
        // Without the pause, each further datagram of the peer could cause an attempt.
        set_activity(None);
        while datagrams.try_recv().is_ok() {}
        sleep_until(begun + MIN_INTERVAL).await;
        if datagrams.is_empty() {
            break;
        }
    }
    peers.borrow_mut().remove(peer);
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
        if !transfer.association.is_from_target(&from) {
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
