//! Decides how the datagrams of an association reach their destinations. Nothing is sent here.

use std::net::SocketAddr;

use super::super::session_log::{with_addr, with_target};
use super::super::state::Session;
use crate::net::canonical;
use crate::policy::rules::{AccessRequest, Route};
use crate::proto::{Addr, Host, HostName};

/// The path of a datagram to its destination.
pub(super) enum Path {
    /// From a socket of this server.
    Direct(SocketAddr),
    /// Through the hop with this index in `Options::hops`. If the destination is a name, the hop resolves it.
    Hop(usize, Addr),
    /// Unknown until this name has been resolved. The port is that of the destination.
    Later(HostName, u16),
}

/// Returns the path to `dst`, or `None` if it is denied. Names that are denied, or that a hop resolves, are not resolved
/// here.
pub(super) fn route(session: &Session, dst: Addr) -> Option<Path> {
    if let Host::Ip(ip) = dst.host {
        return route_addr(session, canonical(ip, dst.port), None);
    }
    let route = session.policy.authorize(&with_target(session.log.client_request(), &dst)).ok()?;
    Some(match (route, dst) {
        (Some(Route::Hop(hop)), dst) => Path::Hop(hop, dst),
        (_, Addr { host: Host::Name(name), port }) => Path::Later(name, port),
        (_, Addr { host: Host::Ip(ip), port }) => Path::Direct(canonical(ip, port)),
    })
}

/// Returns the path to an address. `name` is the name that the client has sent to, if any. Returns `None` for denied
/// addresses, port 0, and multicast and broadcast without a rule that names them in `to`.
pub(super) fn route_addr(session: &Session, addr: SocketAddr, name: Option<&HostName>) -> Option<Path> {
    let request = AccessRequest { target_name: name, ..with_addr(session.log.client_request(), addr) };
    Some(match session.policy.authorize(&request).ok()?? {
        Route::Direct => Path::Direct(addr),
        Route::Hop(hop) => Path::Hop(hop, addr.into()),
    })
}

/// Returns whether the rules allow datagrams to `addr`, on any path.
pub(super) fn is_allowed(session: &Session, addr: &Addr) -> bool {
    session.policy.authorize(&with_target(session.log.client_request(), addr)).is_ok()
}

/// Returns the hops that the rules may select for a datagram.
pub(super) fn possible_hops(session: &Session) -> impl Iterator<Item = usize> + use<> {
    let routes = session.policy.policy.rules.possible_routes(&session.log.access_request());
    routes.into_iter().filter_map(|route| match route {
        Route::Direct => None,
        Route::Hop(hop) => Some(hop),
    })
}
