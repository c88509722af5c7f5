//! The sockets of an association to its targets, and its associations with the hops.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Instant;

use super::super::reply::{SessionError, SessionResult};
use super::super::state::Session;
use super::sent_to::SentTo;
use crate::client::Association;
use crate::net::{BatchSocket, GsoBatch, unspecified};
use crate::policy::rules::Route;
use crate::proto::{Addr, Host, HostName};

pub(super) struct Egress {
    /// IPv4 and IPv6, created when first used.
    pub(super) sockets: [Option<BatchSocket>; 2],
    pub(super) upstreams: Vec<Upstream>,
    pub(super) sent_to: SentTo,
}

impl Egress {
    /// Opens all hops that the rules may select: if one is down, the client receives an error instead of losing
    /// datagrams later.
    pub(super) async fn open(session: &mut Session) -> SessionResult<Self> {
        let mut upstreams = Vec::new();
        for index in possible_hops(session) {
            let hop = session.server().hop(index)?;
            session.log.via = Some(hop.clone());
            let deadline = Instant::now() + session.server().options.connect_timeout;
            let client = session.server().hop_client(&hop, Addr::UNSPECIFIED, deadline);
            let association = Rc::new(client.associate().await.map_err(SessionError::from_upstream)?);
            upstreams.push(Upstream { hop: index, has_sent_to_names: false, association });
        }
        Ok(Self { sockets: [None, None], upstreams, sent_to: SentTo::default() })
    }

    pub(super) fn has_hop(&self, hop: usize) -> bool {
        self.upstreams.iter().any(|upstream| upstream.hop == hop)
    }

    /// Sends one datagram to an address of `name`. Returns false if it is lost.
    pub(super) fn send(&mut self, addr: SocketAddr, name: &HostName, data: &[u8]) -> bool {
        self.sent_to.insert(addr.ip(), Some(name));
        let Ok(socket) = self.socket(addr) else { return false };
        socket.report_unreachable(addr.ip());
        socket.send_bytes(Some(addr), data).is_ok()
    }

    /// Sends one datagram to an address of `name` through a hop. Returns false if it is lost.
    pub(super) fn send_to_hop_by_addr(&mut self, hop: usize, addr: SocketAddr, name: &HostName, data: &[u8]) -> bool {
        self.sent_to.insert(addr.ip(), Some(name));
        self.send_to_hop(hop, &addr.into(), data)
    }

    /// Sends one datagram through a hop. Returns false if it is lost.
    pub(super) fn send_to_hop(&mut self, hop: usize, dst: &Addr, data: &[u8]) -> bool {
        let Some(upstream) = self.upstreams.iter_mut().find(|upstream| upstream.hop == hop) else { return false };
        upstream.has_sent_to_names |= matches!(dst.host, Host::Name(_));
        upstream.association.try_send(dst, data).is_ok()
    }

    /// Sends and clears a batch. Returns the number of bytes sent.
    pub(super) fn send_batch(&mut self, batch: &mut GsoBatch<'_>) -> usize {
        let Some(dst) = batch.peer().filter(|_| !batch.is_empty()) else { return 0 };
        self.sent_to.insert(dst.ip(), None);
        let sent = self.socket(dst).map_or(0, |socket| socket.send_batch(Some(dst), batch));
        batch.clear();
        sent
    }

    fn socket(&mut self, addr: SocketAddr) -> io::Result<&BatchSocket> {
        let [v4, v6] = &mut self.sockets;
        let socket = if addr.is_ipv4() { v4 } else { v6 };
        match socket {
            Some(socket) => Ok(socket),
            unset => Ok(unset.insert(BatchSocket::bind(SocketAddr::new(unspecified(addr.ip()), 0))?)),
        }
    }
}

/// The association of this server with a hop, for datagrams that the rules route through the hop.
pub(super) struct Upstream {
    /// Index in `Options::hops`.
    hop: usize,
    /// Set when a datagram has been sent to a name. The hop has resolved it, so its addresses are not known here.
    pub(super) has_sent_to_names: bool,
    pub(super) association: Rc<Association>,
}

/// Returns the hops that the rules may select for a datagram.
pub(super) fn possible_hops(session: &Session) -> impl Iterator<Item = usize> + use<> {
    let routes = session.policy.policy.rules.possible_routes(&session.log.access_request());
    routes.into_iter().filter_map(|route| match route {
        Route::Direct => None,
        Route::Hop(hop) => Some(hop),
    })
}
