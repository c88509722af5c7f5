//! The state of the server, which all sessions share, and the state of one session until its success reply.

use std::cell::Cell;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Instant;

use super::limiter::{Limiter, SessionQuota};
use super::options::{Hop, Options};
use super::policy_handle::{PolicyHandle, PolicySnapshot};
use super::reply::{SessionError, SessionResult};
use super::session_log::SessionLog;
use crate::client::{Client, lookup};
use crate::conn::Conn;
use crate::net::{DialError, RelayOptions, Resolver, timeout_at};
use crate::policy::rules::AccessRequest;
use crate::proto::{Addr, Host, Rep, Reply};

/// State that all sessions share.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) options: Options,
    pub(super) policy: PolicyHandle,
    pub(super) limiter: Limiter,
    pub(super) resolver: Resolver,
    pub(super) relay_options: RelayOptions,
}

impl Server {
    /// Returns the BND address for a socket at `local`: that of [`Options::advertise`] if one of its family is set.
    pub(super) fn advertised_addr(&self, local: SocketAddr) -> SocketAddr {
        let ip = self.options.advertise.iter().find(|ip| ip.is_ipv4() == local.is_ipv4());
        ip.map_or(local, |ip| SocketAddr::new(*ip, local.port()))
    }

    /// Returns a client that requests `dst` through `hop`.
    pub(super) fn hop_client(&self, hop: &Hop, dst: Addr, deadline: Instant) -> Client {
        let remaining = deadline.saturating_duration_since(Instant::now());
        Client::new(hop.proxies.clone(), dst, Some(remaining))
            .with_resolver(self.resolver.clone())
            .with_auth(self.options.hop_auth.clone())
    }

    /// Returns a hop by its index in `Options::hops`.
    pub(super) fn hop(&self, index: usize) -> SessionResult<Arc<Hop>> {
        let hop = self.options.hops.get(index).cloned();
        hop.ok_or_else(|| SessionError::general_failure(format!("hop {index} is not configured")))
    }

    pub(super) async fn resolve(&self, dst: &Addr, deadline: Instant) -> SessionResult<Vec<SocketAddr>> {
        let addrs = timeout_at(deadline, lookup(&self.resolver, dst)).await.unwrap_or(Err(DialError::Resolver));
        addrs.map_err(|error| SessionError::from_dial(error, dst))
    }

    /// Rechecks a session after a policy change, once per generation. Returns the reason if it is now denied.
    /// `seen` is the last generation that the session was checked with; `peer` returns its target address if known.
    pub(super) fn recheck(
        &self,
        log: &SessionLog,
        seen: &Cell<u32>,
        peer: impl FnOnce() -> Option<SocketAddr>,
    ) -> Option<String> {
        let snapshot = self.policy.newer_than(seen.get())?;
        seen.set(snapshot.generation);
        let mut request = log.access_request();
        if let Some(peer) = peer() {
            request = AccessRequest { target_ip: Some(peer.ip()), target_port: Some(peer.port()), ..request };
        }
        let denial = snapshot.reason_to_refuse(log, &request);
        if denial.is_some() {
            self.policy.closed_sessions.fetch_add(1, Ordering::Relaxed);
        }
        denial
    }
}

/// A session until its success reply.
pub(super) struct Session<'a> {
    pub(super) server: &'a Server,
    /// The policy of the last evaluation. `current_snapshot` and `recheck` use the current one.
    pub(super) snapshot: Arc<PolicySnapshot>,
    pub(super) log: SessionLog,
    /// False if a GSSAPI context protects messages, but can't detect replayed or reordered ones.
    pub(super) is_stream_allowed: bool,
    /// Set during a GSSAPI handshake, which a timeout ends with an abort message (RFC 1961 section 3.8).
    pub(super) is_context_pending: bool,
    pub(super) quota: &'a mut Option<Box<SessionQuota>>,
}

impl Session<'_> {
    /// Waits until a reloaded policy denies this session.
    pub(super) async fn denied_by_reload(&self) -> SessionError {
        // A copy, because `reply_success` has to recheck this generation again: then the address of the peer is known.
        let seen = self.log.policy_generation.clone();
        poll_fn(|_| match self.server.recheck(&self.log, &seen, || None) {
            Some(reason) => Poll::Ready(SessionError::not_allowed(reason)),
            None => Poll::Pending,
        })
        .await
    }

    /// Returns the current policy, or that of the request if existing sessions are kept over a reload.
    pub(super) fn current_snapshot(&self) -> Arc<PolicySnapshot> {
        self.server.policy.newer_than(self.snapshot.generation).unwrap_or_else(|| self.snapshot.clone())
    }

    /// Sends a success reply, unless a reloaded policy denies the session. `peer` is the other end of a direct
    /// connection. The log keeps the first BND, which is the address of this server's socket.
    pub(super) async fn reply_success(
        &mut self,
        client: &mut Conn,
        bnd: Addr,
        peer: Option<SocketAddr>,
    ) -> SessionResult<()> {
        if let Some(reason) = self.server.recheck(&self.log, &self.log.policy_generation, || peer) {
            return Err(SessionError::not_allowed(reason));
        }
        if let Host::Ip(ip) = bnd.host {
            self.log.set_bnd(SocketAddr::new(ip, bnd.port));
        }
        client.write_message(&Reply { rep: Rep::SUCCEEDED, bnd }).await.map_err(SessionError::silent)?;
        self.log.rep = Some(Rep::SUCCEEDED);
        Ok(())
    }
}
