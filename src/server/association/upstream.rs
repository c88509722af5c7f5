//! An association with a hop, through which datagrams of ours go.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Instant;

use super::super::Server;
use super::super::session::SessionError;
use crate::client::{Association, AssociationClosed};
use crate::proto::{Addr, Host};

pub(super) struct Upstream {
    /// The hop's.
    pub(super) hop_index: usize,
    /// Whether datagrams have gone to names.
    pub(super) has_sent_to_names: bool,
    association: Rc<Association>,
    ended: Pin<Box<dyn Future<Output = AssociationClosed>>>,
}

impl Upstream {
    pub(super) async fn open(server: &Server, hop_index: usize) -> Result<Self, SessionError> {
        let hop = server.hop(hop_index)?;
        let client = server.hop_client(&hop, Addr::UNSPECIFIED, Instant::now() + server.options.connect_timeout);
        let association = Rc::new(client.associate().await.map_err(SessionError::from_upstream)?);
        let control = association.clone();
        Ok(Self {
            hop_index,
            has_sent_to_names: false,
            association,
            ended: Box::pin(async move { control.closed().await }),
        })
    }

    /// Ready when the hop has ended its association.
    pub(super) fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<AssociationClosed> {
        self.ended.as_mut().poll(cx)
    }

    /// True when the datagram has been sent.
    pub(super) fn send(&mut self, dst: &Addr, data: &[u8]) -> bool {
        self.has_sent_to_names |= matches!(dst.host, Host::Name(_));
        self.association.try_send(dst, data).is_ok()
    }

    pub(super) fn poll_recv(&self, cx: &mut Context<'_>) -> Poll<io::Result<(Addr, Vec<u8>)>> {
        self.association.poll_recv(cx)
    }
}
