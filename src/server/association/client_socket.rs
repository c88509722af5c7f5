//! The socket of an association to its client, the client's port, and the control connection.
//!
//! While the port is in use, the socket is connected to it, so that the kernel drops datagrams from all other senders.

use std::borrow::Cow;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures_lite::AsyncRead as _;

use super::super::local_addr::{bind_in_range, with_port};
use super::super::shared_ports::Membership;
use super::super::state::Session;
use crate::conn::{Conn, Protection};
use crate::net::{BatchSocket, GsoBatch, parse_literal, share_port};
use crate::proto::{Addr, Host, MAX_UDP4_PAYLOAD, PortRange};
use crate::reassembly::fragment;

/// Time without a valid datagram after which the client may use another port. A NAT that has removed its mapping
/// selects a new port. While the port is in use, no other sender can take over the association.
const PORT_SILENCE: Duration = Duration::from_secs(2);

/// Bytes on the control connection that are read and ignored. More end the association.
const MAX_CONTROL_BYTES: usize = 64 * 1024;

pub(super) struct ClientSocket {
    pub(super) socket: BatchSocket,
    /// The IP address of the control connection, and the port of the last valid datagram, or at first DST.PORT. Port 0:
    /// not known yet.
    addr: SocketAddr,
    /// Set while only `addr` may send. Otherwise, the next valid datagram sets the port.
    is_port_fixed: bool,
    /// Time of the last valid datagram.
    last_heard: Instant,
    /// The protection of the control connection also protects datagrams (RFC 1961 section 5).
    protection: Option<Protection>,
    /// Set if associations share the port.
    membership: Option<Membership>,
    /// Number of bytes on the control connection that were ignored.
    ignored: usize,
}

impl ClientSocket {
    pub(super) async fn bind(session: &Session, dst: &Addr) -> io::Result<Self> {
        let addr = expected_sender(session, dst);
        let local = session.control_addr().unwrap_or(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0));
        let (server, protection) = (session.server(), session.conn.protection().cloned());
        let ports = server.options.udp_ports.as_ref();
        let shared_port = ports.and_then(PortRange::single);
        let local = with_port(local, shared_port.unwrap_or(0));
        let (socket, membership) = match shared_port {
            Some(port) => {
                let join = || {
                    let count_socket = || server.limiter.count_descriptors(session.log.client_key(), 1);
                    let membership = server.shared_ports.join(local, addr, protection.is_some(), count_socket)?;
                    Ok((BatchSocket::bind(local, share_port)?, Some(membership)))
                };
                join().map_err(|error: io::Error| match error.kind() {
                    io::ErrorKind::AddrInUse => io::Error::other(format!(
                        "UDP port {port} is used by another program (choose another with --udp-ports)"
                    )),
                    _ => error,
                })?
            }
            None => {
                (bind_in_range(ports, "--udp-ports", local, |local| BatchSocket::bind(local, |_| Ok(()))).await?, None)
            }
        };
        // Connecting to port 0 filters by address only. A socket with a shared port is connected to itself, and
        // receives nothing, until the client's port is known.
        let is_port_fixed = addr.port() != 0;
        socket.get_ref().connect(if is_port_fixed || membership.is_none() { addr } else { local })?;
        Ok(Self { socket, addr, is_port_fixed, last_heard: Instant::now(), protection, membership, ignored: 0 })
    }

    /// Ready when the client closes the control connection, or with an error if it sends too much data on it.
    pub(super) fn poll_control_end(&mut self, control: &mut Conn, cx: &mut Context<'_>) -> Poll<Option<String>> {
        while let Ok(n @ 1..) = ready!(Pin::new(&mut *control).poll_read(cx, &mut [0; 256])) {
            self.ignored += n;
            if self.ignored > MAX_CONTROL_BYTES {
                return Poll::Ready(Some("too much data on the control connection".into()));
            }
        }
        Poll::Ready(None)
    }

    pub(super) fn has_port(&self) -> bool {
        self.addr.port() != 0
    }

    /// Records a valid datagram, which sets the client's port unless it is fixed.
    pub(super) fn record_valid(&mut self, from: SocketAddr, now: Instant) {
        self.last_heard = now;
        if self.is_port_fixed {
            return;
        }
        if self.has_port() && self.addr.port() != from.port() {
            log::debug!("udp: client {}: port {} replaces {}", from.ip(), from.port(), self.addr.port());
        }
        self.addr = from;
        self.set_shared_port(false);
        self.is_port_fixed = match self.socket.get_ref().connect(from) {
            Ok(()) => true,
            Err(error) => {
                log::debug!("udp: connect to {from}: {error}");
                false
            }
        };
    }

    /// Accepts datagrams from all ports of the client once its port is silent. Returns the time of the next call, if
    /// any. A loopback address keeps its first port: no NAT is involved, and other users share the address.
    pub(super) fn release_silent_port(&mut self, now: Instant) -> Option<Instant> {
        if !self.is_port_fixed || self.addr.ip().is_loopback() {
            return None;
        }
        let silent_at = self.last_heard + PORT_SILENCE;
        if now < silent_at {
            return Some(silent_at);
        }
        let any_port = with_port(self.addr, 0);
        self.is_port_fixed = self.membership.is_none() && self.socket.get_ref().connect(any_port).is_err();
        self.set_shared_port(true);
        None
    }

    /// Sets which datagrams are handed over to this association, if it shares its port.
    fn set_shared_port(&self, accepts_other_ports: bool) {
        if let Some(membership) = &self.membership {
            membership.set_port(self.addr.port(), accepts_other_ports);
        }
    }

    /// Returns the next datagram that was received by another socket with the shared port.
    pub(super) fn poll_handed_over(&mut self, cx: &mut Context<'_>) -> Option<(SocketAddr, Vec<u8>)> {
        self.membership.as_mut()?.poll_handed_over(cx)
    }

    /// Unwraps a received datagram. Returns `None` if it is not from the client, or if its protection is invalid.
    pub(super) fn accept<'a>(&self, from: SocketAddr, bytes: &'a [u8]) -> Option<Cow<'a, [u8]>> {
        // The socket may hold datagrams from other ports received before connect(2), and not every kernel filters a
        // socket that is connected to port 0.
        if from.ip() != self.addr.ip() || self.is_port_fixed && from.port() != self.addr.port() {
            return None;
        }
        let Some(protection) = &self.protection else { return Some(Cow::Borrowed(bytes)) };
        protection.unwrap_datagram(&mut bytes.to_vec()).map(Cow::Owned)
    }

    /// Hands over a datagram that was not accepted to the next association that shares the port, unless it is from the
    /// client of this one. Returns false if it is lost.
    pub(super) fn pass_on(&self, from: SocketAddr, bytes: &[u8]) -> bool {
        let is_from_client = self.is_port_fixed && from == self.addr;
        self.membership.as_ref().is_some_and(|membership| !is_from_client && membership.pass_on(from, bytes))
    }

    /// Returns the destination of answers: `None` for the address that the socket is connected to.
    fn destination(&self) -> Option<SocketAddr> {
        (!self.is_port_fixed).then_some(self.addr)
    }

    /// Returns whether an answer of this length, including its header, can be sent in a batch.
    pub(super) fn can_batch(&self, len: usize) -> bool {
        self.protection.is_none() && len <= MAX_UDP4_PAYLOAD
    }

    /// Sends and clears a batch of answers. Returns the number of payload bytes sent.
    pub(super) fn send_batch(&self, batch: &mut GsoBatch<'_>) -> usize {
        self.socket.send_batch(self.destination(), batch)
    }

    /// Sends one answer, protected, and in fragments if it is too long with its header. Returns false if it is lost.
    pub(super) fn send(&self, from: &Addr, data: &[u8]) -> bool {
        let overhead = self.protection.as_ref().map_or(0, Protection::max_overhead);
        let datagrams = fragment(from, data, MAX_UDP4_PAYLOAD.saturating_sub(overhead));
        let to = self.destination();
        datagrams.is_some_and(|datagrams| {
            datagrams.iter().all(|bytes| match &self.protection {
                Some(protection) => protection.wrap(bytes).and_then(|bytes| self.socket.send_bytes(to, &bytes)).is_ok(),
                None => self.socket.send_bytes(to, bytes).is_ok(),
            })
        })
    }
}

/// Returns the address that the client sends from: that of the control connection. The port is that of DST if DST is
/// this address, else 0. Behind NAT, a client does not know its address and port, and some clients send a target as
/// DST.
///
/// A client on a Unix socket can send only from 127.0.0.1, because the relay is there. So this is its address, and a
/// port that it announces keeps other users of this host away (RFC 1928 section 7).
fn expected_sender(session: &Session, dst: &Addr) -> SocketAddr {
    let addr = session.log.client().unwrap_or(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0));
    let dst_ip = match &dst.host {
        Host::Ip(ip) => Some(*ip),
        Host::Name(name) => parse_literal(name.as_str()),
    };
    let is_client = dst_ip.is_some_and(|ip| ip.to_canonical() == addr.ip().to_canonical());
    with_port(addr, if is_client { dst.port } else { 0 })
}
