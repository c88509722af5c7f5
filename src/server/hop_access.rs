//! The way of a session through an upstream: its chains of proxies, one after the other until one works.

use std::future::pending;
use std::sync::Arc;
use std::time::Instant;

use futures_lite::FutureExt as _;

use super::limiter::warn;
use super::options::{FAILED_CHAIN_PAUSE, Hop};
use super::passwords::Login;
use super::reply::{SessionError, SessionResult};
use super::state::Session;
use crate::client::{Client, ClientError, ClientOptions};
use crate::net::sleep;
use crate::policy::rules::Route;
use crate::proto::{Addr, Command};

/// The facts about a session that connections through a hop depend on.
pub(super) struct HopAccess {
    pub(super) hop: Arc<Hop>,
    options: Arc<ClientOptions>,
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
        let (limits, common) = (Some(Arc::new(self.dial_limits()) as _), &self.server().options.hop_options);
        let options = ClientOptions { limits, local: self.outbound(route), ..(**common).clone() };
        Ok(Some(HopAccess { hop: hop.clone(), options: options.into(), login: self.login.clone() }))
    }
}

impl HopAccess {
    /// Calls `attempt` with a client for one chain after the other, until one succeeds or the session's client is at
    /// fault. A chain that is not the last has its share of the time until it waits for that client. Also returns the
    /// client of the chain.
    pub(super) async fn open<T>(
        &self,
        command: Command,
        dst: &Addr,
        deadline: Instant,
        attempt: impl AsyncFn(&Client) -> Result<T, ClientError>,
    ) -> SessionResult<(T, Client)> {
        let mut last_error = SessionError::general_failure("no proxy");
        let mut chains = self.hop.in_order(Instant::now()).into_iter();
        while let Some((index, mut proxies)) = chains.next() {
            for proxy in proxies.iter_mut().filter(|proxy| proxy.forwards_login) {
                proxy.credentials = self.login.as_ref().map(|login| login.credentials.clone());
            }
            let remaining = deadline.saturating_duration_since(Instant::now());
            let client = Client::new(proxies, dst.clone(), Some(remaining), self.options.clone());
            let others = u32::try_from(chains.len()).unwrap_or(u32::MAX);
            let share = remaining / others.saturating_add(1);
            let too_slow = async {
                sleep(share).await;
                // The client itself ends at the deadline.
                if others == 0 || client.waits_for_client(command) {
                    pending().await
                } else {
                    Err(client.timed_out(share))
                }
            };
            let result = attempt(&client).or(too_slow).await;
            let is_broken = result.as_ref().is_err_and(|error| client.is_at_fault(error, command));
            let has_worked = self.hop.set_failed(index, is_broken);
            match result {
                Ok(value) => return Ok((value, client)),
                Err(error) => last_error = SessionError::from_upstream(error),
            }
            if is_broken && has_worked && others > 0 {
                let (hop, reason) = (&self.hop.name, &last_error.reason);
                warn(|| format!("hop {hop}: {reason} (the others are tried first for {FAILED_CHAIN_PAUSE:?})"));
            }
            if !is_broken {
                break;
            }
        }
        Err(last_error)
    }
}
