//! The socket of an association to its client.

use std::borrow::Cow;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use super::super::local_addr::bind_in_range;
use super::super::state::Session;
use crate::conn::{Conn, Protection};
use crate::net::{BatchSocket, with_scope};
use crate::proto::{Addr, MAX_UDP4_PAYLOAD};
use crate::reassembly::fragment;

pub(super) struct ClientSocket {
    pub(super) socket: BatchSocket,
    /// The IP address of the control connection, and DST.PORT. The first datagram replaces a port of 0.
    addr: SocketAddr,
    /// The protection of the control connection also protects datagrams (RFC 1961 section 5).
    protection: Option<Protection>,
}

impl ClientSocket {
    /// `port` is DST.PORT. DST.ADDR is ignored. A client on a Unix socket sends from loopback.
    pub(super) async fn bind(session: &Session, control: &Conn, port: u16) -> io::Result<Self> {
        let mut addr = session.log.client().unwrap_or(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0));
        addr.set_port(port);
        if let Some(peer) = control.peer_addr() {
            addr = with_scope(addr, peer);
        }
        let mut local = control.local_addr().unwrap_or(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0));
        local.set_port(0);
        let socket =
            bind_in_range(session.server().options.udp_ports.as_ref(), "--udp-ports", local, BatchSocket::bind).await?;
        // Connecting to port 0 filters by address only.
        socket.get_ref().connect(addr)?;
        Ok(Self { socket, addr, protection: control.protection().cloned() })
    }

    pub(super) fn has_port(&self) -> bool {
        self.addr.port() != 0
    }

    /// Sets the client's port to that of its first datagram.
    pub(super) fn set_port(&mut self, from: SocketAddr) {
        if self.has_port() {
            return;
        }
        self.addr = from;
        if let Err(error) = self.socket.get_ref().connect(from) {
            log::debug!("udp: connect to {from}: {error}");
        }
    }

    /// Unwraps a received datagram. Returns `None` if it is not from the client, or if its protection is invalid.
    pub(super) fn accept<'a>(&self, from: SocketAddr, bytes: &'a [u8]) -> Option<Cow<'a, [u8]>> {
        // The socket may hold datagrams from other ports received before connect(2), and not every kernel filters a
        // socket that is connected to port 0.
        if from.ip() != self.addr.ip() || ![0, from.port()].contains(&self.addr.port()) {
            return None;
        }
        match &self.protection {
            Some(protection) => protection.unwrap_datagram(&mut bytes.to_vec()).map(Cow::Owned),
            None => Some(Cow::Borrowed(bytes)),
        }
    }

    /// Returns whether an answer of this length, including its header, can be sent in a batch.
    pub(super) fn can_batch(&self, len: usize) -> bool {
        self.protection.is_none() && len <= MAX_UDP4_PAYLOAD
    }

    /// Sends one answer, protected, and in fragments if it is too long with its header. Returns false if it is lost.
    pub(super) fn send(&self, from: &Addr, data: &[u8]) -> bool {
        let overhead = self.protection.as_ref().map_or(0, Protection::max_overhead);
        let datagrams = fragment(from, data, MAX_UDP4_PAYLOAD.saturating_sub(overhead));
        datagrams.is_some_and(|datagrams| {
            datagrams.iter().all(|bytes| match &self.protection {
                Some(protection) => {
                    protection.wrap(bytes).and_then(|bytes| self.socket.send_bytes(None, &bytes)).is_ok()
                }
                None => self.socket.send_bytes(None, bytes).is_ok(),
            })
        })
    }
}
