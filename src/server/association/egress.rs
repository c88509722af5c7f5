//! The sockets of an association to its targets, and its associations with the hops.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};

use super::super::options::Hop;
use super::super::session_log::SessionLog;
use super::super::shares::ExtraGuard;
use super::super::state::Session;
use super::sent_to::SentTo;
use super::upstream::{Upstream, only_route};
use crate::client::Association;
use crate::counters::{self, Counter};
use crate::net::{BatchSocket, GsoBatch, set_outbound_options, wake_later, with_scope};
use crate::policy::rules::Route;
use crate::proto::{Addr, Host, HostName};

/// Sockets to targets that an association is counted with: one for each address family.
pub(super) const DIRECT_SOCKETS: usize = 2;

#[derive(Default)]
pub(super) struct Egress {
    /// Created when first used, one for each source address.
    pub(super) sockets: Vec<OutboundSocket>,
    /// Created when first used.
    pub(super) upstreams: Vec<Upstream>,
    pub(super) sent_to: SentTo,
}

pub(super) struct OutboundSocket {
    local: SocketAddr,
    pub(super) socket: BatchSocket,
    /// For its descriptor, if the association has [`DIRECT_SOCKETS`] without it.
    _shares: Vec<ExtraGuard>,
}

impl Egress {
    /// Sends one datagram to an address of `name`. Returns false if it is lost.
    pub(super) fn send(
        &mut self,
        session: &mut Session,
        route: Route,
        addr: SocketAddr,
        name: &HostName,
        data: &[u8],
    ) -> bool {
        if self.sent_to.insert(addr.ip(), Some(name)) {
            let dst = Addr { host: Host::Name(name.clone()), port: addr.port() };
            session.log.log_target(&dst, Some(addr), None);
        }
        let Ok(socket) = self.socket(session, route, addr) else { return false };
        socket.report_unreachable(addr.ip());
        socket.send_bytes(Some(addr), data).is_ok()
    }

    /// Returns the association with a hop, which may not be open yet.
    pub(super) fn upstream(&mut self, log: &mut SessionLog, route: Route, hop: &Arc<Hop>) -> Option<&mut Upstream> {
        if !self.upstreams.iter().any(|upstream| upstream.route == route) {
            log.add_via(hop, None);
            self.upstreams.push(Upstream::new(route, hop.clone()));
        }
        self.upstreams.iter_mut().find(|upstream| upstream.route == route)
    }

    /// Notices upstreams that have opened, failed or closed. Returns the number of waiting bytes sent. Fails if the
    /// only possible route could not be opened. The next datagram reopens an upstream that has closed.
    pub(super) fn poll_upstreams(&mut self, session: &mut Session, cx: &mut Context<'_>) -> Result<usize, String> {
        let mut sent = 0;
        for upstream in &mut self.upstreams {
            let was_open = upstream.association().is_some();
            match upstream.poll(cx) {
                Poll::Ready(Ok((bytes, proxy))) => {
                    let local = upstream.association().and_then(Association::local_addr);
                    session.log_route(upstream.route, Some(&proxy), local);
                    sent += bytes;
                    // It has not been polled for answers yet.
                    wake_later(cx);
                }
                Poll::Ready(Err(error)) if !was_open && only_route(session) == Some(upstream.route) => {
                    return Err(error);
                }
                Poll::Ready(Err(error)) => session.log.log_hop(&upstream.hop, upstream.dropped, &error),
                Poll::Pending => {}
            }
        }
        Ok(sent)
    }

    /// Sends and clears a batch. Returns the number of bytes sent.
    pub(super) fn send_batch(&mut self, session: &mut Session, route: Route, batch: &mut GsoBatch<'_>) -> usize {
        let Some(dst) = batch.peer().filter(|_| !batch.is_empty()) else { return 0 };
        if self.sent_to.insert(dst.ip(), None) {
            session.log.log_target(&dst, Some(dst), None);
        }
        let socket = self.socket(session, route, dst).inspect_err(|_| counters::count(Counter::DropUnsent));
        let sent = socket.map_or(0, |socket| socket.send_batch(Some(dst), batch));
        batch.clear();
        sent
    }

    fn socket(&mut self, session: &mut Session, route: Route, addr: SocketAddr) -> io::Result<&BatchSocket> {
        let ip = session.outbound(route).ip_to(addr.ip()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        let local = with_scope(SocketAddr::new(ip, 0), addr);
        let index = self.sockets.iter().position(|socket| socket.local == local);
        let index = index.unwrap_or(self.sockets.len());
        if index == self.sockets.len() {
            let count = usize::from(index >= DIRECT_SOCKETS);
            let shares = session.server().limiter.count_descriptors(session.log.client_key(), count)?;
            if !ip.is_unspecified() {
                session.log.add_outbound(ip);
            }
            let socket = BatchSocket::bind(local, set_outbound_options)?;
            self.sockets.push(OutboundSocket { local, socket, _shares: shares });
        }
        self.sockets.get(index).map(|socket| &socket.socket).ok_or(io::ErrorKind::NotFound.into())
    }
}
