//! A session after its success reply: two connections to relay, and the log line at the end.
//!
//! A tunnel runs as a separate task, so that it holds no memory of the handshake.

use std::future::Future;
use std::sync::Arc;

use super::session_log::SessionLog;
use super::state::Server;
use crate::conn::{Conn, DetachedConn};
use crate::net::{
    RateLimit, RelayError, RelayOptions, RelayRateLimit, RelayResult, Stream, UNDELIVERED_GRACE, relay, sleep,
};

/// The state of a session that is relayed.
#[derive(Debug)]
pub(super) struct Tunnel {
    pub(super) client: Conn,
    pub(super) target: Conn,
    pub(super) log: SessionLog,
}

impl Tunnel {
    /// Relays until the tunnel ends, `options` stop it, or a reloaded policy denies it.
    pub(super) fn relay<'a>(
        &'a mut self,
        server: &'a Server,
        options: &'a RelayOptions,
    ) -> impl Future<Output = RelayResult> + 'a {
        let Self { client, target, log } = self;
        let log = &*log;
        relay(client, target, options, &log.bytes, |_, target| is_still_allowed(server, log, target))
    }

    /// Like [`Tunnel::relay`], at the rate of `rate_limit`.
    pub(super) async fn relay_rate_limited(&mut self, rate_limit: &RateLimit, server: &Server) -> RelayResult {
        let options = RelayOptions {
            stop_when_bulk: false,
            rate_limit: Some(Arc::new(RelayRateLimit::new(rate_limit))),
            ..server.relay_options.clone()
        };
        self.relay(server, &options).await
    }

    /// Prepares the tunnel for another thread. Returns it unchanged if no descriptor is available.
    pub(super) fn detach(self) -> Result<DetachedTunnel, Box<Self>> {
        let (Ok(client), Ok(target)) = (self.client.detach(), self.target.detach()) else {
            return Err(Box::new(self));
        };
        for conn in [&self.client, &self.target] {
            // If the tunnel is lost before `attach`, both peers get a reset: the data is incomplete.
            conn.abort();
            conn.deregister();
        }
        Ok(DetachedTunnel { client, target, log: self.log })
    }

    /// Logs the error. If data for the target was lost, the client is reset instead of closed.
    pub(super) async fn close_after_error(self, error: RelayError) {
        self.log.set_error(&error);
        if let RelayError::Undelivered(_) = error {
            drop(self.target);
            // Further data from the client is not read: it can't be delivered. The client gets this time even if it has
            // shut down its write side, since it may not have read everything yet.
            sleep(UNDELIVERED_GRACE).await;
            self.client.abort();
        }
    }
}

fn is_still_allowed(server: &Server, log: &SessionLog, target: &Conn) -> bool {
    let peer = || target.peer_addr().filter(|_| log.via.is_none());
    match server.recheck(log, &log.policy_generation, peer) {
        Some(reason) => {
            log.set_error(reason);
            false
        }
        None => true,
    }
}

/// A tunnel that is handed to another thread.
pub(super) struct DetachedTunnel {
    client: DetachedConn,
    target: DetachedConn,
    log: SessionLog,
}

impl DetachedTunnel {
    /// Registers the tunnel with this thread. On failure the tunnel ends, and the error is logged.
    pub(super) fn attach(self) -> Option<Tunnel> {
        let Self { client, target, log } = self;
        let attached = client.attach().and_then(|client| Ok((client, target.attach()?)));
        let result = attached.and_then(|(client, target)| {
            client.set_reset_on_close(false)?;
            target.set_reset_on_close(false)?;
            Ok((client, target))
        });
        match result {
            Ok((client, target)) => Some(Tunnel { client, target, log }),
            Err(error) => {
                log.set_error(error);
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tunnel_state_is_at_most_224_bytes() {
        // An idle tunnel holds this and the state of the relay, which tests/relay.rs measures.
        assert!(size_of::<Tunnel>() <= 224, "{}", size_of::<Tunnel>());
    }
}
