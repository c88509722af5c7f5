//! CONNECT (RFC 1928 sections 4 and 6): resolve, judge, dial or ask a hop, answer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_lite::FutureExt as _;

use super::policy_handle::{denial, denial_reason};
use super::session::{Session, SessionError};
use super::{Hop, Server};
use crate::client::Client;
use crate::conn::{Conn, timeout_at};
use crate::dial::{DialError, LocalAddr, dial};
use crate::policy::is_unicast;
use crate::policy::rules::{AccessRequest, Decision, Route};
use crate::proto::{Addr, Command, Rep};
use crate::reactor::sleep;

/// How long the dialling goes on when the client has closed its side and said nothing: it may only want to listen.
const HALF_CLOSE_GRACE: Duration = Duration::from_secs(2);

/// Where a request leads: the addresses that it may go to, and the way there.
enum ResolvedRoute {
    Direct(Vec<SocketAddr>),
    /// To be tried in turn.
    Hop(Arc<Hop>, Vec<Addr>),
}

pub(super) async fn serve(session: &mut Session<'_>, client: &mut Conn, dst: &Addr) -> Result<Conn, SessionError> {
    let deadline = Instant::now() + session.server.options.connect_timeout;
    let route = session.while_wanted(client, session.resolve_route(dst, deadline)).await?;
    if let ResolvedRoute::Hop(hop, _) = &route {
        session.log.via = Some(hop.clone());
    }
    let connected = async {
        match route {
            ResolvedRoute::Direct(addrs) => {
                let target = dial(addrs, LocalAddr::default(), deadline)
                    .await
                    .map_err(|failure| SessionError::from_dial(failure, dst))?;
                let bnd = target.get_ref().local_addr().map_err(SessionError::general_failure)?;
                Ok((Conn::Tcp(target), bnd.into()))
            }
            ResolvedRoute::Hop(hop, targets) => {
                Box::pin(connect_via_hop(session.server, &hop, targets, deadline)).await
            }
        }
    };
    let (target, bnd) = session.while_wanted(client, connected).await?;
    let peer = target.peer_addr().filter(|_| session.log.via.is_none());
    session.reply_success(client, bnd, peer).await?;
    Ok(target)
}

/// Asks the hop for one target after the other, until it has reached one.
async fn connect_via_hop(
    server: &Server,
    hop: &Hop,
    targets: Vec<Addr>,
    deadline: Instant,
) -> Result<(Conn, Addr), SessionError> {
    let mut last_error = SessionError::general_failure("no time left for the hop");
    for dst in targets {
        let client = server.hop_client(hop, dst, deadline);
        match client.request(Command::Connect).await {
            Ok(connected) => return Ok(connected),
            Err(error) => last_error = SessionError::from_upstream(error),
        }
    }
    Err(last_error)
}

impl Server {
    /// A client of `hop` that has until `deadline`.
    pub(super) fn hop_client(&self, hop: &Hop, dst: Addr, deadline: Instant) -> Client {
        let remaining = deadline.saturating_duration_since(Instant::now());
        Client::new(hop.proxies.clone(), dst, Some(remaining))
            .with_resolver(self.resolver.clone())
            .with_auth(self.options.hop_auth.clone())
    }

    /// The hop of that number.
    pub(super) fn hop(&self, number: usize) -> Result<Arc<Hop>, SessionError> {
        let hop = self.options.hops.get(number).cloned();
        hop.ok_or_else(|| SessionError::general_failure("a hop that is not there"))
    }

    /// All addresses of `dst`.
    pub(super) async fn resolve(&self, dst: &Addr, deadline: Instant) -> Result<Vec<SocketAddr>, SessionError> {
        let found = timeout_at(deadline, self.resolver.lookup(dst)).await.unwrap_or(Err(DialError::Resolver));
        found.map_err(|failure| SessionError::from_dial(failure, dst))
    }
}

impl Session<'_> {
    /// Goes on with `work` as long as the client stays and the rules let it.
    async fn while_wanted<T>(
        &self,
        client: &Conn,
        work: impl Future<Output = Result<T, SessionError>>,
    ) -> Result<T, SessionError> {
        let client_gone = async {
            client.wait_eof().await;
            sleep(HALF_CLOSE_GRACE).await;
            Err(SessionError::silent("the client left before the connection was made"))
        };
        let denied = async { Err(self.denied_by_reload().await) };
        work.or(client_gone).or(denied).await
    }

    /// Judges `dst`, and all of its addresses when that is not enough. A name that is denied is not resolved, and one
    /// that a hop resolves is not resolved here.
    async fn resolve_route(&self, dst: &Addr, deadline: Instant) -> Result<ResolvedRoute, SessionError> {
        let request = self.log.access_request();
        match self.snapshot.evaluate(&request) {
            Decision::Deny(rule) => return Err(denial(rule)),
            Decision::Allow(_, Route::Hop(hop)) => {
                return Ok(ResolvedRoute::Hop(self.server.hop(hop)?, vec![dst.clone()]));
            }
            Decision::Allow(_, Route::Direct) | Decision::Undecided(_) => {}
        }
        let mut first_denial = None;
        let mut first_route = None;
        let mut addrs = self.server.resolve(dst, deadline).await?;
        let snapshot = self.current_snapshot();
        addrs.retain(|addr| match snapshot.evaluate(&AccessRequest { target_ip: Some(addr.ip()), ..request }) {
            // All go the way of the first one.
            Decision::Allow(_, route) => *first_route.get_or_insert(route) == route,
            Decision::Deny(rule) | Decision::Undecided(rule) => {
                first_denial.get_or_insert_with(|| denial_reason(rule));
                false
            }
        });
        match first_route {
            None => Err(SessionError::not_allowed(first_denial.unwrap_or_default())),
            Some(Route::Hop(hop)) => {
                Ok(ResolvedRoute::Hop(self.server.hop(hop)?, addrs.into_iter().map(Addr::from).collect()))
            }
            Some(Route::Direct) => {
                addrs.retain(|addr| addr.port() != 0 && is_unicast(addr.ip()));
                if addrs.is_empty() {
                    return Err(SessionError::with_rep(
                        Rep::NETWORK_UNREACHABLE,
                        "no address that one could connect to",
                    ));
                }
                Ok(ResolvedRoute::Direct(addrs))
            }
        }
    }
}
