//! The way of a session through an upstream: its chains of proxies, one after the other until one works.

use std::future::pending;
use std::sync::Arc;
use std::time::Instant;

use futures_lite::FutureExt as _;

use super::options::Hop;
use super::passwords::Login;
use super::reply::{SessionError, SessionResult};
use super::shares::ClientKey;
use super::state::{Server, Session};
use crate::client::{Client, ClientError, ClientOptions, Proxy};
use crate::net::{LocalAddr, sleep};
use crate::policy::rules::Route;
use crate::proto::Addr;

/// The facts about a session that connections through a hop depend on.
pub(super) struct HopAccess {
    server: Arc<Server>,
    pub(super) hop: Arc<Hop>,
    client: ClientKey,
    local: LocalAddr,
    login: Option<Arc<Login>>,
}

impl Session {
    /// Returns the access to the hop of a route, if it has one. Fails if the hop requires the client's password, and the
    /// client has not logged in with one.
    pub(super) fn hop_access(&self, route: Route) -> SessionResult<Option<HopAccess>> {
        let Some(index) = route.hop else { return Ok(None) };
        let hop = self.server().options.hops.get(index);
        let hop = hop.ok_or_else(|| SessionError::general_failure("this hop is not configured"))?;
        if hop.forwards_login && self.login.is_none() {
            let reason = format!("hop {}: ?user=client requires a login with user name and password", hop.name);
            return Err(SessionError::not_allowed(reason));
        }
        let (server, client) = (self.permit.server.clone(), self.log.client_key());
        Ok(Some(HopAccess { server, hop: hop.clone(), client, local: self.outbound(route), login: self.login.clone() }))
    }
}

impl HopAccess {
    /// Calls `attempt` with a client for one chain after the other, until one succeeds or the target is at fault. A chain
    /// that is not the last has its share of the time to reach its last proxy. Also returns the client.
    pub(super) async fn open<T>(
        &self,
        dst: &Addr,
        deadline: Instant,
        attempt: impl AsyncFn(&Client) -> Result<T, ClientError>,
    ) -> SessionResult<(T, Client)> {
        let mut last_error = SessionError::general_failure("no proxy");
        let mut chains = self.hop.in_order(Instant::now()).into_iter();
        while let Some((index, proxies)) = chains.next() {
            let client = self.client(proxies, dst, deadline);
            let others = u32::try_from(chains.len()).unwrap_or(u32::MAX);
            let share = deadline.saturating_duration_since(Instant::now()) / others.saturating_add(1);
            let too_slow = async |client: &Client| {
                sleep(share).await;
                if client.has_opened() { pending().await } else { Err(client.timed_out(share)) }
            };
            let result = match others {
                0 => attempt(&client).await,
                _ => attempt(&client).or(too_slow(&client)).await,
            };
            let is_broken = result.as_ref().is_err_and(|error| client.is_at_fault(error));
            self.hop.set_failed(index, is_broken);
            match result {
                Ok(value) => return Ok((value, client)),
                Err(error) => last_error = SessionError::from_upstream(error),
            }
            if !is_broken {
                break;
            }
        }
        Err(last_error)
    }

    /// Returns a client for a chain, with the shares of the session's client.
    fn client(&self, mut proxies: Vec<Proxy>, dst: &Addr, deadline: Instant) -> Client {
        for proxy in proxies.iter_mut().filter(|proxy| proxy.forwards_login) {
            proxy.credentials = self.login.as_ref().map(|login| login.credentials.clone());
        }
        let limits = Some(Arc::new(self.server.dial_shares.of(self.client)) as _);
        let options = ClientOptions { limits, local: self.local, ..(*self.server.options.hop_options).clone() };
        let remaining = deadline.saturating_duration_since(Instant::now());
        Client::new(proxies, dst.clone(), Some(remaining), Arc::new(options))
    }
}
