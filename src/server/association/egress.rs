//! The sockets of an association to its targets, and its associations with the hops.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::Context;

use super::super::options::Hop;
use super::super::session_log::SessionLog;
use super::super::state::Session;
use super::sent_to::SentTo;
use super::upstream::{Upstream, UpstreamEvent, only_route};
use crate::net::{BatchSocket, GsoBatch, LocalAddr, set_outbound_options, with_scope};
use crate::policy::rules::Route;
use crate::proto::{Addr, Host, HostName};

pub(super) struct Egress {
    outbound: LocalAddr,
    /// IPv4 and IPv6, created when first used.
    pub(super) sockets: [Option<BatchSocket>; 2],
    /// Created when first used.
    pub(super) upstreams: Vec<Upstream>,
    pub(super) sent_to: SentTo,
}

impl Egress {
    pub(super) fn new(outbound: LocalAddr, upstreams: Vec<Upstream>) -> Self {
        Self { outbound, sockets: [None, None], upstreams, sent_to: SentTo::default() }
    }

    /// Sends one datagram to an address of `name`. Returns false if it is lost.
    pub(super) fn send(&mut self, log: &SessionLog, addr: SocketAddr, name: &HostName, data: &[u8]) -> bool {
        if self.sent_to.insert(addr.ip(), Some(name)) {
            let dst = Addr { host: Host::Name(name.clone()), port: addr.port() };
            log.log_target(&dst, Some(addr), None);
        }
        let Ok(socket) = self.socket(addr) else { return false };
        socket.report_unreachable(addr.ip());
        socket.send_bytes(Some(addr), data).is_ok()
    }

    /// Returns the association with a hop, which may not be open yet.
    pub(super) fn upstream(&mut self, log: &mut SessionLog, index: usize, hop: &Arc<Hop>) -> Option<&mut Upstream> {
        if !self.upstreams.iter().any(|upstream| upstream.index == index) {
            log.add_via(hop);
            self.upstreams.push(Upstream::new(index, hop.clone()));
        }
        self.upstreams.iter_mut().find(|upstream| upstream.index == index)
    }

    /// Notices upstreams that have opened, failed or closed. Returns the number of waiting bytes sent if one has
    /// opened, and an error if the only possible route has closed.
    pub(super) fn poll_upstreams(&mut self, session: &Session, cx: &mut Context<'_>) -> Result<Option<usize>, String> {
        let mut sent = None;
        for upstream in &mut self.upstreams {
            match upstream.poll(cx) {
                Some(UpstreamEvent::Opened(bytes)) => sent = Some(sent.unwrap_or_default() + bytes),
                Some(UpstreamEvent::Closed(error)) if only_route(session) == Some(Route::Hop(upstream.index)) => {
                    return Err(error);
                }
                Some(UpstreamEvent::Failed(error) | UpstreamEvent::Closed(error)) => {
                    session.log.log_hop(&upstream.hop, upstream.dropped, &error);
                }
                None => {}
            }
        }
        Ok(sent)
    }

    /// Sends and clears a batch. Returns the number of bytes sent.
    pub(super) fn send_batch(&mut self, log: &SessionLog, batch: &mut GsoBatch<'_>) -> usize {
        let Some(dst) = batch.peer().filter(|_| !batch.is_empty()) else { return 0 };
        if self.sent_to.insert(dst.ip(), None) {
            log.log_target(&dst, Some(dst), None);
        }
        let sent = self.socket(dst).map_or(0, |socket| socket.send_batch(Some(dst), batch));
        batch.clear();
        sent
    }

    fn socket(&mut self, addr: SocketAddr) -> io::Result<&BatchSocket> {
        let [v4, v6] = &mut self.sockets;
        let socket = if addr.is_ipv4() { v4 } else { v6 };
        match socket {
            Some(socket) => Ok(socket),
            unset => {
                let local = self.outbound.ip_to(addr.ip()).ok_or(io::ErrorKind::AddrNotAvailable)?;
                let local = with_scope(SocketAddr::new(local, 0), addr);
                Ok(unset.insert(BatchSocket::bind(local, set_outbound_options)?))
            }
        }
    }
}
