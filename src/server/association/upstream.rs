//! The association of this server with a hop, for datagrams that the rules route through the hop.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Instant;

use super::super::reply::{SessionError, SessionResult};
use super::super::state::Server;
use crate::client::{Association, AssociationClosedError};
use crate::proto::{Addr, Host};

pub(super) struct Upstream {
    /// Index in `Options::hops`.
    pub(super) hop_index: usize,
    /// Set when a datagram has been sent to a name. The hop has resolved it, so its addresses are not known here.
    pub(super) has_sent_to_names: bool,
    association: Rc<Association>,
    closed: Pin<Box<dyn Future<Output = AssociationClosedError>>>,
}

impl Upstream {
    pub(super) async fn open(server: &Server, hop_index: usize) -> SessionResult<Self> {
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

    /// Ready when the hop has closed the control connection.
    pub(super) fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<AssociationClosedError> {
        self.closed.as_mut().poll(cx)
    }

    /// Sends a datagram, or drops it. Returns whether it was sent.
    pub(super) fn send(&mut self, dst: &Addr, data: &[u8]) -> bool {
        self.has_sent_to_names |= matches!(dst.host, Host::Name(_));
        self.association.try_send(dst, data).is_ok()
    }

    pub(super) fn poll_recv(&self, cx: &mut Context<'_>) -> Poll<io::Result<(Addr, Vec<u8>)>> {
        self.association.poll_recv(cx)
    }
}
