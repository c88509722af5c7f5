//! UDP through one or more proxies. The associations of several hops are nested: each hop sends the datagrams to the
//! relay of the next one. All traffic passes through every hop.

use std::cell::{Cell, RefCell};
use std::fs;
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::MetadataExt as _;
use std::task::{Context, Poll};
use std::time::Instant;

use super::peer_socket::{PeerSocket, ResolvedAddr};
use super::{Client, ClientError, ClientErrorKind, Phase};
use crate::conn::{Conn, Protection};
use crate::net::{DATAGRAM_BUFFER_SIZE, DialError, Interest, Io};
use crate::proto::{Addr, Command, Datagram, Host, MAX_UDP4_PAYLOAD, MAX_UDP6_PAYLOAD};
use crate::reassembly::{Reassembler, fragment};

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; DATAGRAM_BUFFER_SIZE]);
}

/// Nested associations with all hops, and the socket connected to the first relay or, without hops, to the target.
pub struct Association {
    /// Nearest first.
    hops: Vec<HopAssociation>,
    socket: PeerSocket,
    dst: Addr,
    /// The addresses of `dst` if this machine resolves them for the last hop.
    target: Option<ResolvedAddr>,
    /// Only `invalid` and `foreign` are counted here.
    losses: Cell<LossCounts>,
}

/// Counts of received datagrams that were lost on this machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LossCounts {
    /// Datagrams with missing fragments.
    pub incomplete: u64,
    /// Malformed datagrams, and datagrams that are not from the relay.
    pub invalid: u64,
    /// Datagrams that are not from the target.
    pub foreign: u64,
    /// Dropped by the kernel because the socket's receive buffer was full.
    pub overflowed: u64,
}

#[derive(Debug)]
struct HopAssociation {
    control: Conn,
    protection: Option<Protection>,
    proxy: String,
    relay: Addr,
    reassembler: RefCell<Reassembler>,
}

/// A received datagram is malformed, or is not from the relay.
struct DatagramError;

impl Client {
    /// Opens an association with each hop, through the hops before it.
    pub async fn associate(&self) -> Result<Association, ClientError> {
        self.within(self.deadline, async {
            let target = match self.resolves_for_hops()? {
                true => Some(ResolvedAddr::resolve(&self.dst, None, &self.options).await?),
                false => None,
            };
            let mut hops = Vec::new();
            for (hop, proxy) in self.hops.iter().enumerate() {
                let (mut control, protection) = self.open_hops(hop + 1).await?;
                let mut bnd = self.send_request(&mut control, Command::UdpAssociate, &Addr::UNSPECIFIED).await?;
                if self.options.proxy_is_udp_relay {
                    bnd.host = Addr::UNSPECIFIED.host;
                }
                let (proxy, relay) = (proxy.to_string(), self.resolve_unspecified_bnd(bnd, &control));
                hops.push(HopAssociation { control, protection, proxy, relay, reassembler: RefCell::default() });
            }
            let (peer, link) = match hops.first() {
                Some(first) => (&first.relay, first.control.peer_addr()),
                None => (&self.dst, None),
            };
            let open_socket = async {
                self.enter_phase_at(0, if hops.is_empty() { Phase::ResolveTarget } else { Phase::Request });
                let peer = ResolvedAddr::resolve(peer, link, &self.options).await?;
                if hops.is_empty() {
                    self.enter_phase(Phase::Connect);
                }
                Ok(PeerSocket::connect(peer)?)
            };
            // An error of the socket to a relay names the relay.
            let socket = open_socket.await.map_err(|kind| match kind {
                kind @ ClientErrorKind::Unreachable(DialError::LocalAddr(_) | DialError::OutboundInterface) => kind,
                ClientErrorKind::Unreachable(error) if !hops.is_empty() => ClientErrorKind::Relay(peer.clone(), error),
                kind => kind,
            })?;
            Ok(Association { hops, socket, dst: self.dst.clone(), target, losses: Cell::default() })
        })
        .await
    }
}

impl Association {
    /// Address of the last proxy's relay.
    pub fn relay(&self) -> Option<&Addr> {
        self.hops.last().map(|hop| &hop.relay)
    }

    /// Returns the address of this machine that the first proxy sees, unless that has a Unix socket.
    pub(crate) fn local_addr(&self) -> Option<SocketAddr> {
        self.hops.first()?.control.local_addr()
    }

    /// Returns the relay that the socket sends to, if it has another address than its proxy.
    pub fn relay_elsewhere(&self) -> Option<&Addr> {
        let first = self.hops.first()?;
        let proxy = first.control.peer_addr()?.ip();
        Some(&first.relay).filter(|relay| matches!(relay.host, Host::Ip(ip) if ip != proxy))
    }

    pub(crate) fn losses(&self) -> LossCounts {
        let incomplete = self.hops.iter().map(|hop| hop.reassembler.borrow().lost_count()).sum();
        let sockets = (0..).map_while(|i| self.socket.get(i));
        let overflowed = sockets.filter_map(|(_, socket)| kernel_drops(&socket)).sum();
        LossCounts { incomplete, overflowed, ..self.losses.get() }
    }

    /// Sends a datagram to the target of the client, in fragments if it is too long. Poll for answers after it.
    ///
    /// # Errors
    /// Errors from the socket; `InvalidInput` if the payload is larger than a UDP datagram.
    pub async fn send(&self, data: &[u8]) -> io::Result<()> {
        let resolved = self.target.as_ref().and_then(ResolvedAddr::select).map(Addr::from);
        for bytes in self.encapsulate(resolved.as_ref().unwrap_or(&self.dst), data)? {
            self.socket.send(&bytes).await?;
        }
        Ok(())
    }

    /// Returns true if a datagram from this address may be from the target, and counts it as lost otherwise. Only the
    /// proxy may know the addresses of a name, and those that 0.0.0.0 stands for.
    pub fn accept_sender(&self, from: &Addr) -> bool {
        let is_accepted = match (&self.target, &self.dst.host) {
            (Some(target), _) => target.contains(from),
            (None, Host::Ip(ip)) if !ip.to_canonical().is_unspecified() => *from == self.dst.clone().to_canonical(),
            _ => true,
        };
        self.losses.update(|n| LossCounts { foreign: n.foreign + u64::from(!is_accepted), ..n });
        is_accepted
    }

    /// Like [`Association::send`], but to `dst`, and does not wait for the socket.
    ///
    /// # Errors
    /// As [`Association::send`], and `WouldBlock` if the send buffer is full.
    pub fn try_send(&self, dst: &Addr, data: &[u8]) -> io::Result<()> {
        let mut datagrams = self.encapsulate(dst, data)?.into_iter();
        datagrams.try_for_each(|bytes| self.socket.try_send(&bytes))
    }

    /// Returns the datagram, or its fragments, to send to the first relay, with the headers of all hops.
    fn encapsulate(&self, dst: &Addr, data: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        let max_len = if matches!(dst.host, Host::Ip(IpAddr::V4(_))) { MAX_UDP4_PAYLOAD } else { MAX_UDP6_PAYLOAD };
        let too_large =
            || io::Error::new(io::ErrorKind::InvalidInput, format!("datagram too large: the limit is {max_len} bytes"));
        let payload = Some(data).filter(|data| data.len() <= max_len).ok_or_else(too_large)?;
        if self.hops.is_empty() {
            return Ok(vec![payload.to_vec()]);
        }
        let headers = self.hops.iter().skip(1).map(|hop| encode_datagram(&hop.relay, &[]).len()).sum::<usize>();
        let protections = self.hops.iter().filter_map(|hop| hop.protection.as_ref());
        let overhead = headers + protections.map(Protection::max_overhead).sum::<usize>();
        let mut datagrams = fragment(dst, payload, MAX_UDP4_PAYLOAD.saturating_sub(overhead)).ok_or_else(too_large)?;
        for bytes in &mut datagrams {
            for (i, hop) in self.hops.iter().enumerate().rev() {
                if let Some(protection) = &hop.protection {
                    *bytes = protection.wrap(bytes)?;
                }
                // The hop before this one sends it to this relay. To the first relay, the socket is connected.
                if i > 0 {
                    *bytes = encode_datagram(&hop.relay, bytes);
                }
            }
        }
        Ok(datagrams)
    }

    /// Receives the next datagram. Returns sender and payload.
    pub async fn recv(&self) -> io::Result<(Addr, Vec<u8>)> {
        poll_fn(|cx| self.poll_recv(cx)).await
    }

    pub(crate) fn poll_recv(&self, cx: &mut Context<'_>) -> Poll<io::Result<(Addr, Vec<u8>)>> {
        for resolved in self.target.iter().chain([&self.socket.peer]) {
            resolved.poll_lookup(cx);
        }
        loop {
            self.socket.take_new_socket();
            for (addr, socket) in (0..).map_while(|i| self.socket.get(i)) {
                while let Poll::Ready(answer) =
                    socket.poll_with(cx, Interest::Read, |socket| self.receive(addr, socket))
                {
                    if let Some(answer) = answer.transpose() {
                        return Poll::Ready(answer);
                    }
                }
            }
            // An ICMP error may have caused a datagram with a new socket.
            if !self.socket.take_new_socket() {
                return Poll::Pending;
            }
        }
    }

    /// Returns the next datagram that has already arrived, if there is one.
    pub fn try_recv(&self) -> Option<(Addr, Vec<u8>)> {
        (0..).map_while(|i| self.socket.get(i)).find_map(|(addr, socket)| {
            loop {
                let received = socket.try_with(Interest::Read, |socket| self.receive(addr, socket));
                if let Some(answer) = received.ok()? {
                    return Some(answer);
                }
            }
        })
    }

    /// Receives one datagram from `peer`. `None` if it is invalid, or completes no datagram.
    fn receive(&self, peer: SocketAddr, socket: &UdpSocket) -> io::Result<Option<(Addr, Vec<u8>)>> {
        BUFFER.with_borrow_mut(|buffer| {
            let n = self.socket.receive(peer, socket, buffer)?;
            let Ok(answer) = self.decapsulate(buffer.get(..n).unwrap_or_default()) else {
                self.losses.update(|n| LossCounts { invalid: n.invalid + 1, ..n });
                return Ok(None);
            };
            self.socket.peer.on_answer(peer);
            if let (Some(target), Some((Addr { host: Host::Ip(ip), port }, _))) = (&self.target, &answer) {
                target.on_answer(SocketAddr::new(*ip, *port));
            }
            Ok(answer)
        })
    }

    /// Removes the headers of all hops. `None` for a fragment of a datagram that is not yet complete.
    fn decapsulate(&self, bytes: &[u8]) -> Result<Option<(Addr, Vec<u8>)>, DatagramError> {
        let mut bytes = bytes.to_vec();
        let mut from = self.socket.peer.addr.clone().to_canonical();
        for (i, hop) in self.hops.iter().enumerate() {
            if let Some(protection) = &hop.protection {
                bytes = protection.unwrap_datagram(&mut bytes).ok_or(DatagramError)?;
            }
            let datagram = Datagram::decode(&bytes).map_err(|_| DatagramError)?;
            let payload = hop.reassembler.borrow_mut().push(Instant::now(), datagram);
            let Some((sender, data)) = payload else { return Ok(None) };
            let sender = sender.to_canonical();
            let next = self.hops.get(i + 1).map(|next| &next.relay);
            // The datagrams of a hop must be from the next relay. A relay that is known by name cannot be checked.
            if next.is_some_and(|next| matches!(next.host, Host::Ip(_)) && *next != sender) {
                return Err(DatagramError);
            }
            bytes = data.into_owned();
            from = sender;
        }
        Ok(Some((from, bytes)))
    }

    /// Waits until a proxy has closed its control connection, which ends the association. Returns its name.
    pub async fn closed<'a>(&'a self) -> String {
        let watch = |hop: &'a HopAssociation| (Box::pin(hop.control.wait_peer_closed()), hop);
        let mut watches: Vec<_> = self.hops.iter().map(watch).collect();
        poll_fn(|cx| {
            let closed = watches.iter_mut().find_map(|(watch, hop)| watch.as_mut().poll(cx).is_ready().then_some(hop));
            closed.map_or(Poll::Pending, |hop| Poll::Ready(hop.proxy.clone()))
        })
        .await
    }
}

/// Returns the number of datagrams that the kernel has dropped because the receive buffer was full (Linux).
fn kernel_drops(socket: &Io<UdpSocket>) -> Option<u64> {
    let inode = fs::metadata(format!("/proc/self/fd/{}", socket.as_fd().as_raw_fd())).ok()?.ino().to_string();
    let tables = ["/proc/net/udp", "/proc/net/udp6"].map(|table| fs::read_to_string(table).unwrap_or_default());
    let mut rows = tables.iter().flat_map(|table| table.lines()).map(str::split_ascii_whitespace);
    // The tenth column is the inode, the thirteenth and last the drops (proc_net_udp(5)).
    rows.find_map(|mut row| (row.nth(9)? == inode).then(|| row.last()).flatten())?.parse().ok()
}

fn encode_datagram(dst: &Addr, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(data.len() + Datagram::MAX_HEADER_LEN);
    Datagram { frag: 0, dst: dst.clone(), data }.encode_into(&mut out);
    out
}
