//! The state of the server, which all sessions share, and the state of one session until its success reply.

use std::future::poll_fn;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use futures_lite::FutureExt as _;
use pin_project_lite::pin_project;

use super::limiter::{DialShares, Limiter, SessionQuota, session_quota};
use super::local_addr::route_source;
use super::log_shares::Topic;
use super::logins::Logins;
use super::options::Options;
use super::passwords::Login;
use super::policy_handle::{PolicyHandle, PolicySnapshot};
use super::reply::{SessionError, SessionResult};
use super::session_log::SessionLog;
use super::shared_ports::SharedPorts;
use super::shares::ShareGuard;
use super::worker::WorkerPool;
use crate::client::{Client, lookup};
use crate::conn::{Conn, HALF_CLOSED_GRACE};
use crate::counters::{self, Counter};
use crate::net::{DialError, LocalAddr, RateLimit, RelayOptions, sleep, timeout_at};
use crate::policy::rules::{AccessRequest, Route};
use crate::proto::{Addr, Host, Rep, Reply};

/// State that all sessions share.
pub(super) struct Server {
    pub(super) options: Options,
    pub(super) policy: PolicyHandle,
    pub(super) limiter: Limiter,
    pub(super) dial_shares: DialShares,
    pub(super) logins: Logins,
    pub(super) relay_options: RelayOptions,
    pub(super) workers: WorkerPool,
    pub(super) shared_ports: Arc<SharedPorts>,
}

/// Counts a session against all limits until it is dropped, and gives it access to the server.
pub(super) struct SessionPermit {
    pub(super) server: Arc<Server>,
    pub(super) share: ShareGuard,
    quota: Option<Box<SessionQuota>>,
}

impl SessionPermit {
    /// Counts the session against the limits of its user. Returns false if the user has too many sessions.
    pub(super) fn admit_user(&mut self, user: &[u8]) -> bool {
        self.server.limiter.admit_user(&self.server.options, user, &mut self.quota)
    }

    pub(super) fn rate_limit(&self) -> RateLimit {
        self.quota.as_ref().map(|quota| quota.rate_limit.clone()).unwrap_or_default()
    }
}

/// A session from accept to its success reply.
pub(super) struct Session {
    pub(super) permit: SessionPermit,
    pub(super) log: SessionLog,
    /// The connection of the client.
    pub(super) conn: Conn,
    /// End of the handshake timeout, extended by the delay of the login.
    pub(super) deadline: Instant,
    /// User and password of the client, if a hop may need them.
    pub(super) login: Option<Arc<Login>>,
    /// The policy at accept. Replaced at a password login, at the request, and by a UDP association after a reload.
    pub(super) policy: Arc<PolicySnapshot>,
}

impl Session {
    pub(super) fn new(server: Arc<Server>, log: SessionLog, share: ShareGuard, conn: Conn) -> Self {
        let (policy, quota) = (server.policy.current(), session_quota(&server.options));
        let deadline = Instant::now() + server.options.handshake_timeout;
        Self { permit: SessionPermit { server, share, quota }, log, conn, deadline, login: None, policy }
    }

    pub(super) fn server(&self) -> &Server {
        &self.permit.server
    }

    /// Checks the rules about the client when it is known: at accept, or after the header of a load balancer.
    pub(super) fn check_client(&self) -> SessionResult<()> {
        if let Err(denial) = self.authorize(&self.log.client_request()) {
            counters::count(Counter::Refused);
            return Err(SessionError { topic: Topic::Refused, ..SessionError::silent(denial.reason) });
        }
        self.log.log_progress("start");
        Ok(())
    }

    /// Returns the address that the client has connected to; `None` on a Unix socket. If this is a load balancer's
    /// connection, whose address the client cannot reach, returns the one on the route to the client.
    pub(super) fn control_addr(&self) -> Option<SocketAddr> {
        let local = self.conn.local_addr();
        let client = self.log.client().filter(|_| self.log.is_forwarded());
        let cannot_reach = |client: &SocketAddr| {
            let is_loopback = |addr: SocketAddr| addr.ip().is_loopback();
            local.is_none_or(|local| local.is_ipv4() != client.is_ipv4() || is_loopback(local) && !is_loopback(*client))
        };
        client.filter(cannot_reach).and_then(|client| route_source(client).ok()).or(local)
    }

    /// Returns BND for a socket at `local`: an address of its family in `advertised` replaces the IP address. Clients
    /// and peers on this host use loopback, unless the server listens on loopback only: then its clients are forwarded.
    pub(super) fn advertised_addr(&self, advertised: &[IpAddr], local: SocketAddr) -> SocketAddr {
        let has_remote_clients = || self.policy.policy.listen_addrs.iter().any(|addr| !addr.ip().is_loopback());
        if local.ip().is_loopback() && has_remote_clients() {
            return local;
        }
        let ip = advertised.iter().find(|ip| ip.is_ipv4() == local.is_ipv4());
        ip.map_or(local, |ip| SocketAddr::new(*ip, local.port()))
    }

    /// Returns the source addresses on this route.
    pub(super) fn outbound(&self, route: Route) -> LocalAddr {
        route.outbound.map_or(self.server().options.outbound, |ips| LocalAddr { ips, port: 0 })
    }

    /// Logs the chain of a hop that works, and the source address of a connection, unless the system has chosen it.
    pub(super) fn log_route(&mut self, route: Route, proxy: Option<&Client>, local: Option<SocketAddr>) {
        if let Some(hop) = route.hop.and_then(|hop| self.permit.server.options.hops.get(hop)) {
            self.log.add_via(hop, proxy);
        }
        let is_fixed = self.outbound(route).ips.iter().flatten().any(|ip| !ip.is_unspecified());
        local.filter(|_| is_fixed).iter().for_each(|local| self.log.add_outbound(local.ip()));
    }

    /// Returns the limits of lookups and connection attempts for the client.
    pub(super) fn dial_limits(&self) -> DialShares {
        self.server().dial_shares.of(self.log.client_key())
    }

    pub(super) async fn resolve(&self, dst: &Addr, deadline: Instant) -> SessionResult<Vec<SocketAddr>> {
        let limits = self.dial_limits();
        let found = timeout_at(deadline, lookup(dst, &limits)).await;
        let found = found.unwrap_or(Err(DialError::Resolver));
        if let Host::Name(_) = dst.host {
            self.log.log_lookup(None, &found);
        }
        found.map_err(|error| SessionError::from_dial(error, dst))
    }

    /// Decides a request by the current policy, or by that of the session if reloads do not affect sessions. `None`:
    /// the rules depend on an address that is not known yet.
    pub(super) fn authorize(&self, request: &AccessRequest<'_>) -> SessionResult<Option<Route>> {
        let newer = self.server().policy.newer_than(self.policy.generation);
        Ok(newer.as_ref().unwrap_or(&self.policy).authorize(request)?)
    }

    /// Runs `work`, and cancels it when the client disconnects or a reloaded policy denies the session.
    pub(super) fn cancellable<T>(
        &self,
        work: impl Future<Output = SessionResult<T>>,
    ) -> impl Future<Output = SessionResult<T>> {
        unless(disconnected(&self.conn).or(denied_by_reload(self.server(), &self.log)), work)
    }

    /// Sends a success reply, unless a reloaded policy denies the session. `peer` returns the peer of a direct
    /// connection. The log keeps the first BND, which is the address of this server's socket.
    pub(super) async fn reply_success(
        &mut self,
        bnd: Addr,
        peer: impl FnOnce() -> Option<SocketAddr>,
    ) -> SessionResult<()> {
        if let Some(reason) = self.server().policy.recheck(&self.log, &self.log.policy_generation, peer) {
            return Err(SessionError::not_allowed(reason));
        }
        self.log.log_reply(Rep::SUCCEEDED, &bnd);
        if let Host::Ip(ip) = bnd.host {
            self.log.set_bnd(SocketAddr::new(ip, bnd.port));
        }
        let sent = self.conn.write_message(&Reply { rep: Rep::SUCCEEDED, bnd }).await.map_err(SessionError::silent);
        if sent.is_ok() {
            self.log.rep = Some(Rep::SUCCEEDED);
        }
        self.log.count_result(false);
        sent
    }
}

// These are not generic: the compiler would repeat their code for each use.
pub(super) async fn disconnected(client: &Conn) -> SessionError {
    client.wait_eof().await;
    if !client.is_reset() {
        sleep(HALF_CLOSED_GRACE).await;
    }
    SessionError::silent("client disconnected before the reply")
}

/// Waits until a reloaded policy denies this session, and returns the error.
pub(super) async fn denied_by_reload(server: &Server, log: &SessionLog) -> SessionError {
    // A copy: `reply_success` checks this generation again, because it also knows the address of the peer.
    let seen = log.policy_generation.clone();
    poll_fn(|_| match server.policy.recheck(log, &seen, || None) {
        Some(reason) => Poll::Ready(SessionError::not_allowed(reason)),
        None => Poll::Pending,
    })
    .await
}

/// Runs `work` until `cancelled` returns an error.
pub(super) fn unless<T>(
    cancelled: impl Future<Output = SessionError>,
    work: impl Future<Output = SessionResult<T>>,
) -> impl Future<Output = SessionResult<T>> {
    Cancellable { work, cancelled }
}

pin_project! {
    /// A struct, because an async block would have both futures twice: as its arguments, and where it polls them.
    struct Cancellable<W, C> {
        #[pin]
        work: W,
        #[pin]
        cancelled: C,
    }
}

impl<T, W: Future<Output = SessionResult<T>>, C: Future<Output = SessionError>> Future for Cancellable<W, C> {
    type Output = SessionResult<T>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        match this.work.poll(cx) {
            Poll::Ready(result) => Poll::Ready(result),
            Poll::Pending => this.cancelled.poll(cx).map(Err),
        }
    }
}
