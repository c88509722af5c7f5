//! CONNECT (RFC 1928 sections 4 and 6): resolve, evaluate the rules, connect directly or through a hop, reply.

use std::net::SocketAddr;
use std::time::Instant;

use super::reply::{SessionError, SessionResult};
use super::state::Session;
use crate::client::Client;
use crate::conn::Conn;
use crate::net::dial;
use crate::policy::rules::{AccessRequest, Route};
use crate::proto::{Addr, Command, Host};

pub(super) async fn serve(session: &mut Session, dst: &Addr, route: Option<Route>) -> SessionResult<Conn> {
    let deadline = Instant::now() + session.server().options.connect_timeout;
    let (route, addrs) = session.cancellable(session.resolve_route(dst, route, deadline)).await?;
    let hop = session.hop_access(route)?;
    session.log_route(route, None, None);
    if let [only] = *addrs {
        session.log.set_addr(only);
    }
    let connecting = async {
        let Some(access) = &hop else {
            let dialed = dial(addrs, session.outbound(route), &session.dial_limits(), deadline).await;
            let (target, addr) = dialed.map_err(|error| SessionError::from_dial(error, dst))?;
            let target = Conn::Tcp(target);
            let bnd = target.local_addr().ok_or_else(|| SessionError::general_failure("no local address"))?;
            return Ok((target, bnd.into(), Some(addr), None));
        };
        let targets = hop_targets(dst, addrs);
        let request = async |client: &Client| client.request_first(Command::Connect, targets.clone()).await;
        let opening = access.open(Command::Connect, dst, deadline, request);
        let ((target, bnd, dst), client) = Box::pin(opening).await?;
        let addr = if let Host::Ip(ip) = dst.host { Some(SocketAddr::new(ip, dst.port)) } else { None };
        Ok((target, bnd, addr, Some(client)))
    };
    let (target, bnd, addr, proxy) = session.cancellable(connecting).await?;
    session.log_route(route, proxy.as_ref(), target.local_addr());
    if let Some(addr) = addr {
        session.log.set_addr(addr);
    }
    session.log.log_progress("connect");
    session.reply_success(bnd, || target.peer_addr().filter(|_| hop.is_none())).await?;
    Ok(target)
}

/// Returns the targets for a hop: the addresses that were resolved here, or `dst`.
pub(super) fn hop_targets(dst: &Addr, addrs: Vec<SocketAddr>) -> Vec<Addr> {
    if addrs.is_empty() { vec![dst.clone()] } else { addrs.into_iter().map(Addr::from).collect() }
}

impl Session {
    /// Resolves `dst` of CONNECT or BIND, and authorizes each of its addresses. Returns the route and the allowed
    /// addresses. If the route is a hop, and it may get the name instead, there are none.
    pub(super) async fn resolve_route(
        &self,
        dst: &Addr,
        route: Option<Route>,
        deadline: Instant,
    ) -> SessionResult<(Route, Vec<SocketAddr>)> {
        if let Some(route) = route.filter(|route| route.hop.is_some()) {
            return Ok((route, Vec::new()));
        }
        let mut addrs = self.resolve(dst, deadline).await?;
        let no_address = || SessionError::not_allowed("no allowed address");
        let is_bind = self.log.access_request().command == Some(Command::Bind);
        let (count, mut first_denial, mut first_route) = (addrs.len(), None, None);
        addrs.retain(|addr| {
            let request = AccessRequest { target_ip: Some(addr.ip()), ..self.log.access_request() };
            let undecided = || if is_bind { self.bind_route(&request) } else { Err(no_address()) };
            match self.authorize(&request).and_then(|route| route.map_or_else(undecided, Ok)) {
                // Only addresses with the route of the first allowed one are used.
                Ok(route) => *first_route.get_or_insert(route) == route,
                Err(denial) => {
                    first_denial.get_or_insert(denial);
                    false
                }
            }
        });
        // A hop accepts a peer from each of several addresses only if it gets the name.
        let has_several = count > 1 && addrs.len() == count;
        if is_bind && has_several && first_route.is_some_and(|route| route.hop.is_some()) {
            addrs.clear();
        }
        first_route.map(|route| (route, addrs)).ok_or_else(|| first_denial.unwrap_or_else(no_address))
    }
}
