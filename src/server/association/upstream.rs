//! The associations of this server with its hops. Each is opened when the first datagram needs it.

use std::mem::take;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use super::super::hop_access::HopAccess;
use super::super::options::Hop;
use super::super::reply::{SessionError, SessionResult};
use super::super::shares::ExtraGuard;
use super::super::state::Session;
use crate::client::{Association, Client};
use crate::counters::{self, Counter};
use crate::policy::rules::Route;
use crate::proto::{Addr, Command, Host};

/// Time between the starts of two attempts to open the association with a hop.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);
/// Maximum size in bytes of the datagrams that wait until the association with a hop is open.
const MAX_WAITING_BYTES: usize = 64 * 1024;
/// Bytes added to the size of each waiting datagram, so that the number of empty ones is limited too.
const DATAGRAM_OVERHEAD: usize = 64;

/// The association with one hop, for datagrams that the rules route through it.
pub(super) struct Upstream {
    pub(super) route: Route,
    pub(super) hop: Arc<Hop>,
    state: UpstreamState,
    /// Earliest time of the next attempt to open it.
    next_attempt: Instant,
    /// Datagrams that wait until it is open.
    waiting: Vec<(Addr, Vec<u8>)>,
    /// Datagrams that were dropped because it was not open.
    pub(super) dropped: usize,
    /// Set when a datagram has been sent to a name. The hop has resolved it, so its addresses are not known here.
    pub(super) has_sent_to_names: bool,
    /// Guards of its descriptors. Empty for the only route: the association's guards include them.
    shares: Option<Vec<ExtraGuard>>,
}

enum UpstreamState {
    Closed,
    Opening(OpeningUpstream),
    Open { association: Rc<Association>, closed: Pin<Box<dyn Future<Output = String>>> },
}

type OpeningUpstream = Pin<Box<dyn Future<Output = SessionResult<(Association, Client)>>>>;

impl Upstream {
    pub(super) fn new(route: Route, hop: Arc<Hop>) -> Self {
        Self {
            route,
            hop,
            state: UpstreamState::Closed,
            next_attempt: Instant::now(),
            waiting: Vec::new(),
            dropped: 0,
            has_sent_to_names: false,
            shares: None,
        }
    }

    /// Opens an association with the hop within the connect timeout.
    pub(super) fn open(session: &Session, route: Route) -> OpeningUpstream {
        let deadline = Instant::now() + session.server().options.connect_timeout;
        let access = session.hop_access(route);
        Box::pin(async move {
            let access = access?.ok_or_else(|| SessionError::general_failure("not a hop"))?;
            let associate = async |proxy: &Client| proxy.associate().await;
            access.open(Command::UdpAssociate, &Addr::UNSPECIFIED, deadline, associate).await
        })
    }

    pub(super) fn set_open(&mut self, association: Association) {
        let association = Rc::new(association);
        let watched = association.clone();
        let closed = Box::pin(async move { watched.closed().await });
        self.state = UpstreamState::Open { association, closed };
    }

    /// Returns the association if it is open.
    pub(super) fn association(&self) -> Option<&Association> {
        match &self.state {
            UpstreamState::Open { association, .. } => Some(association),
            UpstreamState::Closed | UpstreamState::Opening(_) => None,
        }
    }

    /// Sends one datagram, or stores it until the association is open. Returns true if it has been sent.
    pub(super) fn send(&mut self, session: &Session, dst: &Addr, data: &[u8]) -> bool {
        if let Some(is_sent) = self.send_open(dst, data) {
            return is_sent;
        }
        let now = Instant::now();
        if matches!(self.state, UpstreamState::Closed) && now >= self.next_attempt {
            self.next_attempt = now + RETRY_INTERVAL;
            let (limiter, client, sockets) =
                (&session.server().limiter, session.log.client_key(), self.hop.association_sockets());
            self.shares = self.shares.take().or_else(|| limiter.count_descriptors(client, sockets).ok());
            if self.shares.is_some() {
                self.state = UpstreamState::Opening(Self::open(session, self.route));
            }
        }
        let waiting: usize = self.waiting.iter().map(|(_, data)| data.len() + DATAGRAM_OVERHEAD).sum();
        let is_opening = matches!(self.state, UpstreamState::Opening(_));
        if is_opening && waiting + data.len() <= MAX_WAITING_BYTES {
            self.waiting.push((dst.clone(), data.to_vec()));
        } else {
            self.drop_datagrams(1);
        }
        false
    }

    fn drop_datagrams(&mut self, count: usize) {
        self.dropped += count;
        counters::add(Counter::DropHop, count as u64);
    }

    /// Notices that the association has opened, or that it has failed or closed. Returns the number of payload bytes sent
    /// that have waited, and the client of the chain; or the error.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(usize, Client), String>> {
        let opened = match &mut self.state {
            UpstreamState::Closed => return Poll::Pending,
            UpstreamState::Opening(opening) => ready!(opening.as_mut().poll(cx)).map_err(|error| error.reason),
            UpstreamState::Open { closed, .. } => {
                Err(format!("proxy {} closed its association", ready!(closed.as_mut().poll(cx))))
            }
        };
        if opened.is_err() {
            self.state = UpstreamState::Closed;
            let waiting = take(&mut self.waiting).len();
            self.drop_datagrams(waiting);
        }
        Poll::Ready(opened.map(|(association, proxy)| {
            self.set_open(association);
            (self.send_waiting(), proxy)
        }))
    }

    /// Sends the waiting datagrams. Returns the number of their payload bytes.
    fn send_waiting(&mut self) -> usize {
        let waiting = take(&mut self.waiting);
        let sent = waiting.iter().filter(|(dst, data)| self.send_open(dst, data) == Some(true));
        sent.map(|(_, data)| data.len()).sum()
    }

    /// Sends one datagram if the association is open. Returns whether it was sent.
    fn send_open(&mut self, dst: &Addr, data: &[u8]) -> Option<bool> {
        let is_sent = self.association()?.try_send(dst, data).is_ok();
        self.has_sent_to_names |= matches!(dst.host, Host::Name(_));
        Some(is_sent)
    }
}

/// Opens the association with a hop if the rules allow no other route: if the hop fails, the client receives its error
/// instead of losing all datagrams. With several routes, each hop is opened when it is needed.
pub(super) async fn open_only_route(session: &mut Session) -> SessionResult<Vec<Upstream>> {
    let Some(route) = only_route(session) else { return Ok(Vec::new()) };
    let Some(HopAccess { hop, .. }) = session.hop_access(route)? else { return Ok(Vec::new()) };
    session.log_route(route, None, None);
    let opening = Upstream::open(session, route);
    let (association, proxy) = session.cancellable(opening).await?;
    session.log_route(route, Some(&proxy), association.local_addr());
    let mut upstream = Upstream { shares: Some(Vec::new()), ..Upstream::new(route, hop) };
    upstream.set_open(association);
    Ok(vec![upstream])
}

/// Returns the route of all datagrams, if the rules allow only one.
pub(super) fn only_route(session: &Session) -> Option<Route> {
    session.policy.policy.rules.only_route(&session.log.access_request())
}
