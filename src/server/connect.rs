//! CONNECT (RFC 1928 sections 4 and 6): resolve, evaluate the rules, connect directly or through a hop, reply.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use futures_lite::FutureExt as _;

use super::options::Hop;
use super::reply::{SessionError, SessionResult, denial, denial_reason};
use super::state::{Server, Session};
use crate::conn::{Conn, HALF_CLOSED_GRACE};
use crate::net::{LocalAddr, dial, sleep};
use crate::policy::is_unicast;
use crate::policy::rules::{AccessRequest, Decision, Route};
use crate::proto::{Addr, Command, Rep};

/// The allowed target addresses, and the route to them.
enum ResolvedRoute {
    Direct(Vec<SocketAddr>),
    /// One request for each address, until one succeeds.
    Hop(Arc<Hop>, Vec<Addr>),
}

pub(super) async fn serve(session: &mut Session<'_>, client: &mut Conn, dst: &Addr) -> SessionResult<Conn> {
    let deadline = Instant::now() + session.server.options.connect_timeout;
    let route = session.cancellable(client, session.resolve_route(dst, deadline)).await?;
    if let ResolvedRoute::Hop(hop, _) = &route {
        session.log.via = Some(hop.clone());
    }
    let connecting = async {
        match route {
            ResolvedRoute::Direct(addrs) => {
                let target = dial(addrs, LocalAddr::default(), deadline).await;
                let target = target.map_err(|error| SessionError::from_dial(error, dst))?;
                let target = Conn::Tcp(target);
                let bnd = target.local_addr().ok_or_else(|| SessionError::general_failure("no local address"))?;
                Ok((target, bnd.into()))
            }
            ResolvedRoute::Hop(hop, targets) => Box::pin(connect_via(session.server, &hop, targets, deadline)).await,
        }
    };
    let (target, bnd) = session.cancellable(client, connecting).await?;
    let peer = target.peer_addr().filter(|_| session.log.via.is_none());
    session.reply_success(client, bnd, peer).await?;
    Ok(target)
}

/// Requests one target after the other from the hop, until one succeeds.
async fn connect_via(server: &Server, hop: &Hop, targets: Vec<Addr>, deadline: Instant) -> SessionResult<(Conn, Addr)> {
    let mut last_error = SessionError::general_failure("no target address");
    for dst in targets {
        let client = server.hop_client(hop, dst, deadline);
        match client.request(Command::Connect).await {
            Ok(connected) => return Ok(connected),
            Err(error) => last_error = SessionError::from_upstream(error),
        }
    }
    Err(last_error)
}

impl Session<'_> {
    /// Runs `work`, and cancels it when the client disconnects or a reloaded policy denies the session.
    async fn cancellable<T>(&self, client: &Conn, work: impl Future<Output = SessionResult<T>>) -> SessionResult<T> {
        let disconnected = async {
            client.wait_eof().await;
            sleep(HALF_CLOSED_GRACE).await;
            Err(SessionError::silent("client disconnected before the target was reached"))
        };
        let denied = async { Err(self.denied_by_reload().await) };
        work.or(disconnected).or(denied).await
    }

    /// Evaluates the rules for `dst` and, if the decision depends on them, for each of its addresses. Names that are
    /// denied, or that a hop resolves, are not resolved here.
    async fn resolve_route(&self, dst: &Addr, deadline: Instant) -> SessionResult<ResolvedRoute> {
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
            // Only addresses with the route of the first allowed one are used.
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
                    return Err(SessionError::with_rep(Rep::NETWORK_UNREACHABLE, "not a unicast address, or port 0"));
                }
                Ok(ResolvedRoute::Direct(addrs))
            }
        }
    }
}
