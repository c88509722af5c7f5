//! CONNECT (RFC 1928 sections 4 and 6): resolve, judge, dial or ask a hop, answer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_lite::FutureExt as _;

use super::policy_handle::{denial, denial_reason};
use super::session::{Refusal, Session};
use super::{Hop, Server};
use crate::client::Client;
use crate::conn::{Conn, until};
use crate::dial::{DialError, LocalAddr, dial};
use crate::policy::is_unicast;
use crate::policy::rules::{AccessRequest, Decision, Route};
use crate::proto::{Addr, Command, Rep};
use crate::reactor::sleep;

/// How long the dialling goes on when the client has closed its side and said nothing: it may only want to listen.
const LEAVE_GRACE: Duration = Duration::from_secs(2);

/// Where a request leads: the addresses that it may go to, and the way there.
enum Targets {
    Here(Vec<SocketAddr>),
    /// To be tried in turn.
    Through(Arc<Hop>, Vec<Addr>),
}

pub(super) async fn serve(session: &mut Session<'_>, client: &mut Conn, dst: &Addr) -> Result<Conn, Refusal> {
    let deadline = Instant::now() + session.server.options.connect_timeout;
    let targets = session.unless_in_vain(client, session.targets(dst, deadline)).await?;
    if let Targets::Through(hop, _) = &targets {
        session.log.via = Some(hop.clone());
    }
    let reached = async {
        match targets {
            Targets::Here(addrs) => {
                let target = dial(addrs, LocalAddr::default(), deadline)
                    .await
                    .map_err(|failure| Refusal::failure(failure, dst))?;
                let bnd = target.get_ref().local_addr().map_err(|error| Refusal::reply(Rep::GENERAL_FAILURE, error))?;
                Ok((Conn::Tcp(target), bnd.into()))
            }
            Targets::Through(hop, targets) => Box::pin(through(session.server, &hop, targets, deadline)).await,
        }
    };
    let (target, bnd) = session.unless_in_vain(client, reached).await?;
    let peer = target.peer_addr().filter(|_| session.log.via.is_none());
    session.succeed(client, bnd, peer).await?;
    Ok(target)
}

/// Asks the hop for one target after the other, until it has reached one.
async fn through(server: &Server, hop: &Hop, targets: Vec<Addr>, deadline: Instant) -> Result<(Conn, Addr), Refusal> {
    let mut last = Refusal::reply(Rep::GENERAL_FAILURE, "no time left for the hop");
    for dst in targets {
        let client = server.client(hop, dst, deadline);
        match client.request(Command::Connect).await {
            Ok(reached) => return Ok(reached),
            Err(error) => last = Refusal::hop(error),
        }
    }
    Err(last)
}

impl Server {
    /// A client of `hop` that has until `deadline`.
    pub(super) fn client(&self, hop: &Hop, dst: Addr, deadline: Instant) -> Client {
        let left = deadline.saturating_duration_since(Instant::now());
        Client::new(hop.proxies.clone(), dst, Some(left))
            .resolving_by(self.resolver.clone())
            .with_auth(self.options.hop_auth.clone())
    }

    /// The hop of that number.
    pub(super) fn hop(&self, number: usize) -> Result<Arc<Hop>, Refusal> {
        let hop = self.options.hops.get(number).cloned();
        hop.ok_or_else(|| Refusal::reply(Rep::GENERAL_FAILURE, "a hop that is not there"))
    }

    /// All addresses of `dst`.
    pub(super) async fn resolve(&self, dst: &Addr, deadline: Instant) -> Result<Vec<SocketAddr>, Refusal> {
        let found = until(deadline, self.resolver.lookup(dst)).await.unwrap_or(Err(DialError::Resolver));
        found.map_err(|failure| Refusal::failure(failure, dst))
    }
}

impl Session<'_> {
    /// Goes on with `work` as long as the client stays and the rules let it.
    async fn unless_in_vain<T>(
        &self,
        client: &Conn,
        work: impl Future<Output = Result<T, Refusal>>,
    ) -> Result<T, Refusal> {
        let left = async {
            client.left().await;
            sleep(LEAVE_GRACE).await;
            Err(Refusal::silent("the client left before the connection was made"))
        };
        let revoked = async { Err(self.revoked().await) };
        work.or(left).or(revoked).await
    }

    /// Judges `dst`, and all of its addresses when that is not enough. A name that is denied is not resolved, and one
    /// that a hop resolves is not resolved here.
    async fn targets(&self, dst: &Addr, deadline: Instant) -> Result<Targets, Refusal> {
        let question = self.log.access_request();
        match self.snapshot.evaluate(&question) {
            Decision::Deny(rule) => return Err(denial(rule)),
            Decision::Allow(_, Route::Hop(hop)) => {
                return Ok(Targets::Through(self.server.hop(hop)?, vec![dst.clone()]));
            }
            Decision::Allow(_, Route::Direct) | Decision::Undecided(_) => {}
        }
        let mut objection = None;
        let mut way = None;
        let mut addrs = self.server.resolve(dst, deadline).await?;
        let snapshot = self.current_snapshot();
        addrs.retain(|addr| match snapshot.evaluate(&AccessRequest { target_ip: Some(addr.ip()), ..question }) {
            // All go the way of the first one.
            Decision::Allow(_, route) => *way.get_or_insert(route) == route,
            Decision::Deny(rule) | Decision::Undecided(rule) => {
                objection.get_or_insert_with(|| denial_reason(rule));
                false
            }
        });
        match way {
            None => Err(Refusal::reply(Rep::NOT_ALLOWED, objection.unwrap_or_default())),
            Some(Route::Hop(hop)) => {
                Ok(Targets::Through(self.server.hop(hop)?, addrs.into_iter().map(Addr::from).collect()))
            }
            Some(Route::Direct) => {
                addrs.retain(|addr| addr.port() != 0 && is_unicast(addr.ip()));
                if addrs.is_empty() {
                    return Err(Refusal::reply(Rep::NETWORK_UNREACHABLE, "no address that one could connect to"));
                }
                Ok(Targets::Here(addrs))
            }
        }
    }
}
