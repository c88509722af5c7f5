//! BIND (RFC 1928 sections 4 and 6): listen for one expected peer, send two replies, relay.
//!
//! DST is the address of the expected peer. Its port is that of the primary connection, and the peer connects from
//! another one. Without an address, any peer may connect, and the port is where the client wishes the server to listen.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener};
use std::time::Instant;

use futures_lite::FutureExt as _;

use super::connect::hop_targets;
use super::hop_access::HopAccess;
use super::listen::listen_tcp;
use super::local_addr::{bind_in_range, reachable_addr, with_port};
use super::reply::{SessionError, SessionResult};
use super::session_log::with_addr;
use super::state::{Session, denied_by_reload, unless};
use crate::client::Client;
use crate::conn::{Conn, HALF_CLOSED_GRACE, to_canonical_addr};
use crate::net::{
    ACCEPT_RETRY_DELAY, DialError, Interest, Io, LocalAddr, Stream as _, accept, parse_literal, set_outbound_options,
    sleep, timeout_at, unspecified, with_scope,
};
use crate::policy::rules::{AccessRequest, Route};
use crate::proto::{Addr, Command, Host, PortRange, Rep};

/// Programs without privileges can bind this port and higher ones.
const FIRST_UNPRIVILEGED_PORT: u16 = 1024;

pub(super) async fn serve(session: &mut Session, dst: &Addr, route: Option<Route>) -> SessionResult<Conn> {
    let request = session.log.access_request();
    let is_name = request.target_name.is_some();
    let needs_addrs = is_name && route.is_none() && session.policy.policy.rules.depends_on_address(&request);
    let route = if route.is_none() && !needs_addrs { Some(session.bind_route(&request)?) } else { route };
    let deadline = Instant::now() + session.server().options.connect_timeout;
    let (route, addrs) = match route.filter(|_| !is_name) {
        Some(route) => (route, Vec::new()),
        None => session.cancellable(session.resolve_route(dst, route, deadline)).await?,
    };
    match session.hop_access(route)? {
        None => bind_directly(session, dst, addrs, route).await,
        Some(access) => bind_via_hop(session, dst, addrs, &access, route).await,
    }
}

async fn bind_directly(session: &mut Session, dst: &Addr, addrs: Vec<SocketAddr>, route: Route) -> SessionResult<Conn> {
    let share = session.server().limiter.bind_listeners.try_acquire(session.log.client_key());
    let limit_reached = "limit of BIND listeners reached, or of those of one client (see --bind-ports)";
    let share = share.ok_or_else(|| SessionError::general_failure(limit_reached))?;
    let expected = session.cancellable(ExpectedPeer::resolve(session, dst, addrs)).await?;
    let control = session.control_addr();
    let outbound = session.outbound(route);
    let unavailable = || SessionError::from_dial(DialError::FamilyUnavailable, dst);
    let (peer, ip) = expected.preferred_addr(control, outbound).ok_or_else(unavailable)?;
    let local = match ip.is_unspecified() {
        true => reachable_addr(control, peer)
            .map_err(|error| SessionError::from_dial(DialError::from_connect(&error, peer), dst))?,
        false => with_scope(SocketAddr::new(ip, 0), peer),
    };
    let listening = listen_for_peer(session, local, !ip.is_unspecified(), &expected).await;
    let (listener, bnd) = listening.map_err(|error| match error.kind() {
        io::ErrorKind::AddrNotAvailable => SessionError::from_dial(DialError::LocalAddr(local.ip()), dst),
        _ => SessionError::general_failure(error),
    })?;
    session.reply_success(bnd.into(), || None).await?;
    let accepted = session.wait_for_peer(async { Ok(session.accept(&listener, &expected, route).await) }).await;
    drop((listener, share));
    let (peer, addr) = accepted?;
    session.log_route(route, None, peer.local_addr());
    session.log.set_addr(addr);
    session.log.log_progress("connect");
    session.reply_success(addr.into(), || Some(addr)).await?;
    Ok(peer)
}

async fn bind_via_hop(
    session: &mut Session,
    dst: &Addr,
    addrs: Vec<SocketAddr>,
    access: &HopAccess,
    route: Route,
) -> SessionResult<Conn> {
    session.log_route(route, None, None);
    let deadline = Instant::now() + session.server().options.connect_timeout;
    let targets = hop_targets(dst, addrs);
    let request = async |proxy: &Client| proxy.request_first(Command::Bind, targets.clone()).await;
    let requested = access.open(Command::Bind, dst, deadline, request);
    let ((mut conn, bnd, _), proxy) = session.cancellable(requested).await?;
    session.log_route(route, Some(&proxy), conn.local_addr());
    session.reply_success(proxy.resolve_unspecified_bnd(bnd, &conn), || None).await?;
    let accepted = async { proxy.wait_for_peer(&mut conn, false).await.map_err(SessionError::from_upstream) };
    // The hop frees the port at once after a reset, and later after an orderly close.
    let peer = session.wait_for_peer(accepted).await.inspect_err(|_| conn.abort())?;
    let Host::Ip(ip) = peer.host else { return Err(SessionError::general_failure("the peer's address is a name")) };
    let addr = SocketAddr::new(ip.to_canonical(), peer.port);
    session.log.set_addr(addr);
    session.log.log_progress("connect");
    session.authorize(&with_addr(session.log.access_request(), addr))?;
    session.reply_success(peer, || Some(addr)).await?;
    Ok(conn)
}

impl Session {
    /// Returns the route to listen on if the rules need the peer's address: the only possible one, or else one without a
    /// hop. `accept` then closes the connections of peers that are denied or have another route.
    pub(super) fn bind_route(&self, request: &AccessRequest<'_>) -> SessionResult<Route> {
        let rules = &self.policy.policy.rules;
        let direct = || rules.possible_routes(request).into_iter().filter(|route| route.hop.is_none());
        let route = rules.only_route(request).or_else(|| direct().min_by_key(|route| route.outbound.is_some()));
        let unknown = || SessionError::not_allowed("DST must be the peer's address: the rules depend on it");
        route.ok_or_else(unknown)
    }

    /// Waits for `accept`. Fails at the timeout of BIND, if the client disconnects, or if a reloaded policy denies it. A
    /// client that may only have shut down its write side gets the second reply (RFC 1928 section 6).
    async fn wait_for_peer<T>(&self, accept: impl Future<Output = SessionResult<T>>) -> SessionResult<T> {
        let disconnected = async {
            self.conn.wait_peer_closed().await;
            let reason = "client disconnected before the peer connected";
            if self.conn.is_reset() {
                return SessionError::silent(reason);
            }
            sleep(HALF_CLOSED_GRACE).await;
            SessionError::with_rep(Rep::TTL_EXPIRED, reason)
        };
        let cancelled = disconnected.or(denied_by_reload(self.server(), &self.log));
        let timeout = self.server().options.bind_timeout;
        let timed_out = || SessionError::with_rep(Rep::TTL_EXPIRED, format!("peer did not connect within {timeout:?}"));
        let result = timeout_at(Instant::now() + timeout, unless(cancelled, accept)).await;
        result.unwrap_or_else(|| Err(timed_out()))
    }

    /// Accepts the expected peer. Connections of other peers are closed.
    async fn accept(&self, listener: &Io<TcpListener>, expected: &ExpectedPeer, route: Route) -> (Conn, SocketAddr) {
        loop {
            let accepted = listener.with(Interest::Read, accept).await;
            match accepted.and_then(|(socket, peer)| Ok((Io::new(socket.into())?, peer))) {
                Ok((stream, Some(peer))) => {
                    let peer = to_canonical_addr(peer);
                    let decide = || self.authorize(&with_addr(self.log.access_request(), peer));
                    if expected.includes(peer) && decide().is_ok_and(|decided| decided == Some(route)) {
                        return (Conn::Tcp(stream), peer);
                    }
                    self.log.log_other_peer(peer);
                }
                Ok((_, None)) => {}
                Err(_) => sleep(ACCEPT_RETRY_DELAY).await,
            }
        }
    }
}

/// The peers that may connect.
struct ExpectedPeer {
    /// All addresses of DST, canonical. The unspecified address stands for any.
    addrs: Vec<SocketAddr>,
    /// Port to listen on if it is free.
    wished_port: Option<u16>,
}

impl ExpectedPeer {
    /// `addrs` are those of DST if it is a name. Resolves the zone of an address.
    async fn resolve(session: &Session, dst: &Addr, mut addrs: Vec<SocketAddr>) -> SessionResult<Self> {
        let literal = match &dst.host {
            Host::Ip(ip) => Some(*ip),
            Host::Name(name) => parse_literal(name.as_str()).filter(|_| !name.is_zoned_address()),
        };
        if let Some(ip) = literal.map(|ip| ip.to_canonical()) {
            let wished_port = Some(dst.port).filter(|port| ip.is_unspecified() && *port >= FIRST_UNPRIVILEGED_PORT);
            return Ok(Self { addrs: vec![SocketAddr::new(ip, 0)], wished_port });
        }
        if addrs.is_empty() {
            let deadline = Instant::now() + session.server().options.connect_timeout;
            addrs = session.resolve(dst, deadline).await?;
        }
        Ok(Self { addrs, wished_port: None })
    }

    fn includes(&self, peer: SocketAddr) -> bool {
        let ip = peer.ip().to_canonical();
        self.addrs.iter().any(|expected| expected.ip().is_unspecified() || expected.ip() == ip)
    }

    /// Returns the address that selects family and address of the listener, and the IP address for outbound traffic to it.
    /// The family of the control connection is preferred.
    fn preferred_addr(&self, control: Option<SocketAddr>, outbound: LocalAddr) -> Option<(SocketAddr, IpAddr)> {
        let mut usable = self.addrs.iter().filter_map(|addr| Some((*addr, outbound.ip_to(addr.ip())?)));
        let is_same_family =
            |(addr, _): &(SocketAddr, _)| control.is_some_and(|control| control.is_ipv4() == addr.is_ipv4());
        // Any peer can have another family than DST.
        let is_any = self.addrs.iter().any(|addr| addr.ip().is_unspecified());
        let any = outbound.ips.into_iter().flatten().next().filter(|_| is_any);
        let any = any.map(|ip| (SocketAddr::new(unspecified(ip), 0), ip));
        usable.clone().find(is_same_family).or_else(|| usable.next()).or(any)
    }

    fn has_both_families(&self) -> bool {
        self.addrs.iter().any(SocketAddr::is_ipv4) && self.addrs.iter().any(SocketAddr::is_ipv6)
    }
}

/// Listens at `local`, an address that the peer can reach. Returns the listener and BND. Unless `local` is fixed, binds
/// all addresses if peers of both families are expected, or if BND is an advertised address, since this host may not
/// have it.
async fn listen_for_peer(
    session: &Session,
    mut local: SocketAddr,
    is_fixed: bool,
    expected: &ExpectedPeer,
) -> io::Result<(Io<TcpListener>, SocketAddr)> {
    let options = &session.server().options;
    let mut bnd = session.advertised_addr(&options.advertise_bind, local);
    let both_families = !is_fixed && expected.has_both_families();
    if both_families {
        local.set_ip(Ipv6Addr::UNSPECIFIED.into());
    } else if bnd != local && !is_fixed {
        local.set_ip(unspecified(local.ip()));
    }
    let listener = listen_on_port(local, !both_families, expected.wished_port, options.bind_ports.as_ref()).await?;
    bnd.set_port(listener.local_addr()?.port());
    Ok((Io::new(listener)?, bnd))
}

/// Listens on the wished port if it is one of `ports` and free, otherwise on any of `ports`.
async fn listen_on_port(
    local: SocketAddr,
    is_v6_only: bool,
    wished: Option<u16>,
    ports: Option<&PortRange>,
) -> io::Result<TcpListener> {
    // The backlog has room for other peers too, whose connections are accepted and closed.
    let bind = |local| listen_tcp(local, is_v6_only, Some(16), set_outbound_options);
    let wished = wished.filter(|port| ports.is_none_or(|ports| ports.0.contains(port)));
    match wished.and_then(|port| bind(with_port(local, port)).ok()) {
        Some(listener) => Ok(listener),
        None => bind_in_range(ports, "--bind-ports", local, bind).await,
    }
}
