//! Datagrams through an association, or through one inside another: with several hops, each relays the datagrams to
//! the next one's relay, so that nothing goes around a hop.

use std::cell::{Cell, RefCell};
use std::fs;
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::MetadataExt as _;
use std::pin::pin;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use super::{Client, ClientError, ClientErrorKind, Phase};
use crate::conn::{Conn, Protection};
use crate::dial::{DialError, unspecified};
use crate::proto::{Addr, Command, Datagram, Host, MAX_UDP4_PAYLOAD, MAX_UDP6_PAYLOAD};
use crate::reactor::{Interest, Io};
use crate::reassembly::{Reassembler, fragment};

/// More than any UDP datagram has, in octets.
const BUFFER_SIZE: usize = 65_536;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; BUFFER_SIZE]);
}

/// Associations with all hops, nested, and the socket towards the first one; or, without hops, towards the target.
#[derive(Debug)]
pub struct Association {
    /// Control connection, relay and fragments of each hop, nearest first.
    hops: Vec<HopAssociation>,
    socket: Io<UdpSocket>,
    /// Where the socket leads to.
    peer: Addr,
    /// Datagrams from a relay that are none of the protocol, or not for us.
    invalid: Cell<u64>,
}

/// Answers that were lost on the last part of their way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LossCounts {
    /// Of which fragments are missing.
    pub incomplete: u64,
    /// That are no datagrams of the protocol, or that no relay sent.
    pub invalid: u64,
    /// For which the socket had no room.
    pub overflowed: u64,
}

#[derive(Debug)]
struct HopAssociation {
    control: Conn,
    /// Of this hop; the control connection may be protected by those before it.
    protection: Option<Protection>,
    proxy: String,
    relay: Addr,
    reassembler: RefCell<Reassembler>,
}

impl HopAssociation {
    /// How many octets a datagram gets longer by being protected.
    fn overhead(&self) -> usize {
        self.protection.as_ref().map_or(0, Protection::max_overhead)
    }
}

/// No datagram of the protocol, or from somewhere else.
struct DatagramError;

/// A proxy has closed the control connection, and its association with it.
#[derive(Debug)]
pub struct AssociationClosed(pub String);

impl Client {
    /// Makes an association with each hop, the later ones through the earlier ones.
    ///
    /// # Errors
    /// Where and why it failed.
    pub async fn associate(&self) -> Result<Association, ClientError> {
        self.with_deadline(async {
            let mut hops = Vec::new();
            for (hop, proxy) in self.hops.iter().enumerate() {
                let (mut control, protection) = self.open_hops(hop + 1).await?;
                let bnd = self.send_request(&mut control, Command::UdpAssociate, &Addr::UNSPECIFIED).await?;
                let relay = self.resolve_unspecified_bnd(bnd, &control);
                if relay.port == 0 {
                    return Err(ClientErrorKind::Protocol("its relay has no port".into()));
                }
                hops.push(HopAssociation {
                    control,
                    protection,
                    proxy: proxy.to_string(),
                    relay,
                    reassembler: RefCell::default(),
                });
            }
            let peer = hops.first().map_or(&self.dst, |first| &first.relay).clone();
            self.enter_phase(if hops.is_empty() { Phase::ResolveTarget } else { Phase::Request });
            let relay = self
                .lookup(&peer)
                .await?
                .into_iter()
                .next()
                .ok_or(ClientErrorKind::Unreachable(DialError::NameNotFound))?;
            let socket = self.datagram_socket(relay).map_err(ClientErrorKind::Unreachable)?;
            Ok(Association { hops, socket, peer, invalid: Cell::default() })
        })
        .await
    }

    fn datagram_socket(&self, relay: SocketAddr) -> Result<Io<UdpSocket>, DialError> {
        let from = self.local.bind_addr(relay).unwrap_or(SocketAddr::new(unspecified(relay.ip()), 0));
        let socket = UdpSocket::bind(from).map_err(|_| DialError::LocalAddr)?;
        // From here on the kernel lets in what the relay sends, and nothing else.
        let connected = socket.set_nonblocking(true).and_then(|()| socket.connect(relay));
        connected.and_then(|()| Io::new(socket)).map_err(|error| DialError::from_connect(&error, relay))
    }
}

impl Association {
    /// The relay of the last proxy, where the datagrams leave from as far as the target is concerned.
    pub fn relay(&self) -> Option<&Addr> {
        self.hops.last().map(|hop| &hop.relay)
    }

    /// What was lost so far, as far as this machine can tell.
    pub fn losses(&self) -> LossCounts {
        let incomplete = self.hops.iter().map(|hop| hop.reassembler.borrow().lost_count(Instant::now())).sum();
        LossCounts {
            incomplete,
            invalid: self.invalid.get(),
            overflowed: kernel_drops(&self.socket).unwrap_or_default(),
        }
    }

    /// Sends one datagram to `dst`; in fragments when there is no room for the headers.
    ///
    /// # Errors
    /// Those of the socket; and when the payload is larger than UDP carries.
    pub async fn send(&self, dst: &Addr, data: &[u8]) -> io::Result<()> {
        for bytes in self.encapsulate(dst, data)? {
            self.socket.with(Interest::Write, |socket| send(socket, &bytes)).await?;
        }
        Ok(())
    }

    /// As [`Association::send`], without waiting for room.
    ///
    /// # Errors
    /// Those of the socket; and when the payload is larger than UDP carries.
    pub fn try_send(&self, dst: &Addr, data: &[u8]) -> io::Result<()> {
        let mut datagrams = self.encapsulate(dst, data)?.into_iter();
        datagrams.try_for_each(|bytes| self.socket.try_with(Interest::Write, |socket| send(socket, &bytes)))
    }

    /// A datagram as the first relay wants it, or several.
    fn encapsulate(&self, dst: &Addr, data: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        let max_len = if matches!(dst.host, Host::Ip(IpAddr::V4(_))) { MAX_UDP4_PAYLOAD } else { MAX_UDP6_PAYLOAD };
        let too_large = || {
            io::Error::new(io::ErrorKind::InvalidInput, format!("a datagram to there carries {max_len} octets at most"))
        };
        let payload = Some(data).filter(|data| data.len() <= max_len).ok_or_else(too_large)?;
        if self.hops.is_empty() {
            return Ok(vec![payload.to_vec()]);
        }
        let nested = self.hops.iter().skip(1).map(|hop| header_size(&hop.relay)).sum::<usize>();
        let overhead = nested + self.hops.iter().map(HopAssociation::overhead).sum::<usize>();
        let mut datagrams = fragment(dst, payload, MAX_UDP4_PAYLOAD.saturating_sub(overhead)).ok_or_else(too_large)?;
        for bytes in &mut datagrams {
            let mut inner: Option<&HopAssociation> = None;
            for hop in self.hops.iter().rev() {
                if let Some(inner) = inner {
                    *bytes = encode_datagram(&inner.relay, bytes);
                }
                if let Some(protection) = &hop.protection {
                    *bytes = protection.wrap(bytes)?;
                }
                inner = Some(hop);
            }
        }
        Ok(datagrams)
    }

    /// The next answer: who sent it, and what.
    ///
    /// # Errors
    /// Those of the socket.
    pub async fn recv(&self) -> io::Result<(Addr, Vec<u8>)> {
        poll_fn(|cx| self.poll_recv(cx)).await
    }

    /// As [`Association::recv`].
    ///
    /// # Errors
    /// Those of the socket.
    pub fn poll_recv(&self, cx: &mut Context<'_>) -> Poll<io::Result<(Addr, Vec<u8>)>> {
        loop {
            if let Some(answer) = ready!(self.socket.poll_with(cx, Interest::Read, |socket| self.receive(socket)))? {
                return Poll::Ready(Ok(answer));
            }
        }
    }

    /// An answer that is here already.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn try_recv(&self) -> io::Result<Option<(Addr, Vec<u8>)>> {
        loop {
            match self.socket.try_with(Interest::Read, |socket| self.receive(socket)) {
                Ok(Some(answer)) => return Ok(Some(answer)),
                // Not for us.
                Ok(None) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// What has come, if it is an answer.
    fn receive(&self, socket: &UdpSocket) -> io::Result<Option<(Addr, Vec<u8>)>> {
        BUFFER.with_borrow_mut(|buffer| {
            let n = receive(socket, buffer)?;
            Ok(self.decapsulate(buffer.get(..n).unwrap_or_default()).unwrap_or_else(|DatagramError| {
                self.invalid.set(self.invalid.get() + 1);
                None
            }))
        })
    }

    /// Takes the headers of all hops off; `None` for what is not whole yet.
    fn decapsulate(&self, bytes: &[u8]) -> Result<Option<(Addr, Vec<u8>)>, DatagramError> {
        let mut bytes = bytes.to_vec();
        let mut from = self.peer.clone();
        for (i, hop) in self.hops.iter().enumerate() {
            if let Some(protection) = &hop.protection {
                bytes = protection.unwrap_datagram(&mut bytes).ok_or(DatagramError)?;
            }
            let datagram = Datagram::decode(&bytes).map_err(|_| DatagramError)?;
            let payload = hop.reassembler.borrow_mut().push(Instant::now(), datagram);
            let Some((sender, data)) = payload else { return Ok(None) };
            let next = self.hops.get(i + 1).map(|next| &next.relay);
            // Inside of a hop only the next relay may speak; a relay known by name has whatever address it has.
            if next.is_some_and(|next| matches!(next.host, Host::Ip(_)) && *next != sender) {
                return Err(DatagramError);
            }
            bytes = data.into_owned();
            from = sender;
        }
        Ok(Some((from, bytes)))
    }

    /// Returns when a control connection has ended, and says whose.
    pub async fn closed<'a>(&'a self) -> AssociationClosed {
        let watch = |hop: &'a HopAssociation| (Box::pin(hop.control.wait_peer_closed()), hop);
        let mut watches: Vec<_> = self.hops.iter().map(watch).collect();
        let mut closed = pin!(poll_fn(move |cx| {
            for (watch, hop) in &mut watches {
                if watch.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(AssociationClosed(hop.proxy.clone()));
                }
            }
            Poll::Pending
        }));
        closed.as_mut().await
    }
}

/// The first try may only be told what ICMP said about an earlier datagram. A relay that is gone is no error here: the
/// control connection says that better.
fn send(socket: &UdpSocket, bytes: &[u8]) -> io::Result<()> {
    for _ in 0..2 {
        match socket.send(bytes) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            sent => return sent.map(drop),
        }
    }
    Ok(())
}

/// Skips what ICMP says about an earlier datagram.
fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match socket.recv(buffer) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            received => return received,
        }
    }
}

/// How many datagrams the kernel has dropped for want of room in the socket (Linux).
fn kernel_drops(socket: &Io<UdpSocket>) -> Option<u64> {
    let inode = fs::metadata(format!("/proc/self/fd/{}", socket.as_fd().as_raw_fd())).ok()?.ino().to_string();
    let tables = ["/proc/net/udp", "/proc/net/udp6"].map(|table| fs::read_to_string(table).unwrap_or_default());
    let mut rows = tables.iter().flat_map(|table| table.lines()).map(str::split_ascii_whitespace);
    // The tenth column is the inode, the thirteenth and last the drops (proc_net_udp(5)).
    rows.find_map(|mut row| (row.nth(9)? == inode).then(|| row.last()).flatten())?.parse().ok()
}

/// How long the header of a datagram to `dst` is.
fn header_size(dst: &Addr) -> usize {
    encode_datagram(dst, &[]).len()
}

fn encode_datagram(dst: &Addr, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(data.len() + Datagram::MAX_HEADER_LEN);
    Datagram { frag: 0, dst: dst.clone(), data }.encode_into(&mut out);
    out
}
