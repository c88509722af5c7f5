//! Names that this machine resolves for datagrams, and the sockets of an association to its first relay or its target.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use super::ClientOptions;
use crate::name_addrs::NameAddrs;
use crate::net::{DialError, Interest, Io, LocalAddr, bind_outbound, timeout_at, unspecified, with_scope};
use crate::proto::{Addr, Host};

/// Time limit of a lookup that repeats an earlier one.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);
/// Sockets that are open at the same time.
const MAX_SOCKETS: usize = 2;

type Lookup = Pin<Box<dyn Future<Output = Option<Result<Vec<SocketAddr>, DialError>>>>>;

/// An address of a message, and the IP addresses of its host. Names are looked up again in the background.
pub(super) struct ResolvedAddr {
    pub(super) addr: Addr,
    link: Option<SocketAddr>,
    options: Arc<ClientOptions>,
    addrs: RefCell<NameAddrs>,
    lookup: RefCell<Option<Lookup>>,
}

impl ResolvedAddr {
    /// Resolves `addr`. The caller limits the time. If `addr` is link-local, it is on the link of the address `link`.
    pub(super) async fn resolve(
        addr: &Addr,
        link: Option<SocketAddr>,
        options: &Arc<ClientOptions>,
    ) -> Result<Self, DialError> {
        let (now, options) = (Instant::now(), options.clone());
        let addrs = lookup(&options, addr, link).await?;
        let addrs = RefCell::new(NameAddrs::new(now, &addrs));
        Ok(Self { addr: addr.clone(), link, options, addrs, lookup: RefCell::default() })
    }

    /// Returns the address for the next datagram.
    pub(super) fn select(&self) -> Option<SocketAddr> {
        let (mut addrs, now) = (self.addrs.borrow_mut(), Instant::now());
        if matches!(self.addr.host, Host::Name(_)) && addrs.start_lookup(now) {
            let (options, addr, link) = (self.options.clone(), self.addr.clone(), self.link);
            let found = async move { timeout_at(now + LOOKUP_TIMEOUT, lookup(&options, &addr, link)).await };
            *self.lookup.borrow_mut() = Some(Box::pin(found));
        }
        addrs.select(now, self.addr.port)
    }

    /// Polls the lookup that [`ResolvedAddr::select`] has started.
    pub(super) fn poll_lookup(&self, cx: &mut Context<'_>) {
        let mut lookup = self.lookup.borrow_mut();
        if let Some(Poll::Ready(result)) = lookup.as_mut().map(|lookup| lookup.as_mut().poll(cx)) {
            *lookup = None;
            // After a failure, the known addresses stay.
            self.addrs.borrow_mut().update(&result.and_then(Result::ok).unwrap_or_default());
        }
    }

    /// Records that a datagram was not delivered. Returns true if there is another address.
    fn fail(&self, addr: SocketAddr) -> bool {
        self.addrs.borrow_mut().fail(addr)
    }

    pub(super) fn on_answer(&self, from: SocketAddr) {
        self.addrs.borrow_mut().on_answer(from);
    }

    pub(super) fn contains(&self, from: &Addr) -> bool {
        from.port == self.addr.port && matches!(from.host, Host::Ip(ip) if self.addrs.borrow().contains(ip))
    }
}

async fn lookup(options: &ClientOptions, addr: &Addr, link: Option<SocketAddr>) -> Result<Vec<SocketAddr>, DialError> {
    let addrs = options.lookup(addr).await?;
    Ok(addrs.into_iter().map(|addr| link.map_or(addr, |link| with_scope(addr, link))).collect())
}

/// Sockets connected to the addresses of one host. The kernel drops datagrams from other senders.
pub(super) struct PeerSocket {
    pub(super) peer: ResolvedAddr,
    /// Each with its peer, the newest last. An older one receives late answers.
    sockets: RefCell<VecDeque<(SocketAddr, Rc<Io<UdpSocket>>)>>,
    /// Set when a socket was opened that has not been polled yet.
    has_new_socket: Cell<bool>,
    /// The last datagram to an address that has not answered.
    unanswered: RefCell<Option<(SocketAddr, Vec<u8>)>>,
}

impl PeerSocket {
    /// Opens a socket to the first address of `peer` that has a route.
    pub(super) fn connect(peer: ResolvedAddr) -> Result<Self, DialError> {
        let socket =
            Self { peer, sockets: RefCell::default(), has_new_socket: Cell::default(), unanswered: RefCell::default() };
        socket.current()?;
        Ok(socket)
    }

    pub(super) fn get(&self, index: usize) -> Option<(SocketAddr, Rc<Io<UdpSocket>>)> {
        self.sockets.borrow().get(index).cloned()
    }

    /// Returns true if a socket was opened since the last call.
    pub(super) fn take_new_socket(&self) -> bool {
        self.has_new_socket.take()
    }

    /// Returns the socket for the next datagram. A new socket receives only after the caller has polled it.
    fn current(&self) -> Result<(SocketAddr, Rc<Io<UdpSocket>>), DialError> {
        let mut result = Err(DialError::NameNotFound);
        while let Some(addr) = self.peer.select() {
            result = self.socket_to(addr).map(|socket| (addr, socket));
            if result.is_ok() || !self.peer.fail(addr) {
                break;
            }
        }
        result
    }

    fn socket_to(&self, addr: SocketAddr) -> Result<Rc<Io<UdpSocket>>, DialError> {
        let (mut sockets, local) = (self.sockets.borrow_mut(), self.peer.options.local);
        if let Some((_, socket)) = sockets.iter().find(|(peer, _)| *peer == addr) {
            return Ok(socket.clone());
        }
        // Only one socket can have the requested port.
        let max_others = if local.port == 0 { MAX_SOCKETS - 1 } else { 0 };
        while sockets.len() > max_others {
            sockets.pop_front();
        }
        let socket = Rc::new(datagram_socket(addr, local)?);
        sockets.push_back((addr, socket.clone()));
        self.has_new_socket.set(true);
        Ok(socket)
    }

    /// Sends a datagram without waiting. After an ICMP error about an earlier one, sends both to the next address.
    ///
    /// # Errors
    /// `WouldBlock` if the send buffer is full, and other errors from the socket.
    pub(super) fn try_send(&self, bytes: &[u8]) -> io::Result<()> {
        let mut result = Ok(());
        for _ in 0..2 {
            let (addr, socket) = self.current().map_err(|error| io::Error::other(error.to_string()))?;
            let sent = socket.try_with(Interest::Write, |socket| socket.send(bytes));
            result = match sent.as_ref().map_err(io::Error::kind) {
                // The control connection shows that a relay has ended.
                Err(io::ErrorKind::ConnectionRefused) => Ok(()),
                Err(io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable) => sent.map(drop),
                _ => {
                    let is_kept = sent.is_ok() && self.peer.addrs.borrow().is_uncertain(addr);
                    self.unanswered.replace(is_kept.then(|| (addr, bytes.to_vec())));
                    return sent.map(drop);
                }
            };
            self.on_unreachable(addr);
        }
        result
    }

    /// Uses the next address after an ICMP error. Sends the last datagram again, because it has not been delivered.
    fn on_unreachable(&self, addr: SocketAddr) {
        let lost = self.unanswered.take().filter(|(to, _)| *to == addr);
        if self.peer.fail(addr)
            && let Some((_, bytes)) = lost
            && let Err(error) = self.try_send(&bytes)
        {
            log::debug!("cannot send a datagram again: {error}");
        }
    }

    /// Sends a datagram as [`PeerSocket::try_send`], when the send buffer has room.
    pub(super) async fn send(&self, bytes: &[u8]) -> io::Result<()> {
        loop {
            match self.try_send(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if let Ok((_, socket)) = self.current() {
                        socket.ready(Interest::Write).await;
                    }
                }
                sent => return sent,
            }
        }
    }

    /// Receives a datagram with the socket of `addr`, after any number of ICMP errors.
    pub(super) fn receive(&self, addr: SocketAddr, socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match socket.recv(buffer) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => self.on_unreachable(addr),
                received => return received,
            }
        }
    }
}

fn datagram_socket(peer: SocketAddr, local: LocalAddr) -> Result<Io<UdpSocket>, DialError> {
    let from = local.bind_addr(peer).unwrap_or(SocketAddr::new(unspecified(peer.ip()), 0));
    let socket = bind_outbound(from).map_err(|error| match error.kind() {
        io::ErrorKind::AddrNotAvailable | io::ErrorKind::AddrInUse => DialError::LocalAddr(from.ip()),
        _ => DialError::from_connect(&error, peer),
    })?;
    let connected = socket.set_nonblocking(true).and_then(|()| socket.connect(peer));
    connected.and_then(|()| Io::new(socket)).map_err(|error| DialError::from_connect(&error, peer))
}
