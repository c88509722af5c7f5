//! The sockets of an association to its targets, and its associations with the hops.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Instant;

use super::super::reply::{SessionError, SessionResult};
use super::super::state::{Server, Session};
use super::routes::{Path, possible_hops};
use super::sent_to::SentTo;
use crate::client::Association;
use crate::net::{BatchSocket, GsoBatch, unspecified};
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
        for hop in possible_hops(session) {
            session.log.via = Some(session.server().hop(hop)?);
            upstreams.push(Upstream::open(session.server(), hop).await?);
        }
        Ok(Self { sockets: [None, None], upstreams, sent_to: SentTo::default() })
    }

    pub(super) fn has_hop(&self, hop: usize) -> bool {
        self.upstreams.iter().any(|upstream| upstream.hop_index == hop)
    }

    /// Returns an error if a hop has closed its association.
    pub(super) fn poll_closed(&mut self, cx: &mut Context<'_>) -> Option<String> {
        let closed = self.upstreams.iter_mut().find_map(|upstream| match upstream.closed.as_mut().poll(cx) {
            Poll::Ready(proxy) => Some(proxy),
            Poll::Pending => None,
        });
        closed.map(|proxy| format!("proxy {proxy} closed its association"))
    }

    /// Sends one datagram. `name` is the name that the client has sent it to, if any. Returns false if it is lost.
    pub(super) fn send(&mut self, path: &Path, name: Option<&HostName>, data: &[u8]) -> bool {
        match path {
            Path::Direct(addr) => {
                self.sent_to.insert(addr.ip(), name);
                self.socket(*addr).and_then(|socket| socket.send_bytes(Some(*addr), data)).is_ok()
            }
            Path::Hop(hop, dst) => {
                let upstream = self.upstreams.iter_mut().find(|upstream| upstream.hop_index == *hop);
                upstream.is_some_and(|upstream| {
                    upstream.has_sent_to_names |= matches!(dst.host, Host::Name(_));
                    upstream.association.try_send(dst, data).is_ok()
                })
            }
            Path::Later(..) => false,
        }
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
    hop_index: usize,
    /// Set when a datagram has been sent to a name. The hop has resolved it, so its addresses are not known here.
    pub(super) has_sent_to_names: bool,
    association: Rc<Association>,
    closed: Pin<Box<dyn Future<Output = String>>>,
}

impl Upstream {
    async fn open(server: &Server, hop_index: usize) -> SessionResult<Self> {
        let hop = server.hop(hop_index)?;
        let client = server.hop_client(&hop, Addr::UNSPECIFIED, Instant::now() + server.options.connect_timeout);
        let association = Rc::new(client.associate().await.map_err(SessionError::from_upstream)?);
        let closing = association.clone();
        Ok(Self {
            hop_index,
            has_sent_to_names: false,
            association,
            closed: Box::pin(async move { closing.closed().await }),
        })
    }

    pub(super) fn poll_recv(&self, cx: &mut Context<'_>) -> Poll<io::Result<(Addr, Vec<u8>)>> {
        self.association.poll_recv(cx)
    }
}
