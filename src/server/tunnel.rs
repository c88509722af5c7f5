//! A session that is past its reply: two ends to be relayed, and what is to be said of it at its end.
//!
//! It is a task of its own, so that an idle tunnel holds nothing of the handshake.

use std::future::Future;
use std::time::Duration;

use super::Server;
use super::rate_limit::{RateLimit, RateLimitedStream};
use super::session_log::SessionLog;
use crate::conn::{Conn, DetachedConn};
use crate::reactor::sleep;
use crate::relay::{RelayError, RelayOptions, RelayOutcome, Stream, relay};

/// How long a client whose target has closed and takes no more may take for the last of what it was sent.
const UNDELIVERED_GRACE: Duration = Duration::from_secs(2);

/// What is left of a session when its handshake is over.
#[derive(Debug)]
pub(super) struct Tunnel {
    pub(super) client: Conn,
    pub(super) target: Conn,
    pub(super) log: SessionLog,
}

impl Tunnel {
    /// Relays between the client and the target until the tunnel ends, or `options` say so, or the law does.
    pub(super) fn relay<'a>(
        &'a mut self,
        server: &'a Server,
        options: &'a RelayOptions,
    ) -> impl Future<Output = Result<RelayOutcome, RelayError>> + 'a {
        let Self { client, target, log } = self;
        let log = &*log;
        relay(client, target, options, &log.bytes, |_, target| is_still_allowed(server, log, target))
    }

    /// The same, at a pace.
    pub(super) async fn relay_rate_limited(
        &mut self,
        rate_limit: &RateLimit,
        server: &Server,
    ) -> Result<RelayOutcome, RelayError> {
        let Self { client, target, log } = self;
        let (log, options) = (&*log, RelayOptions { stop_when_bulk: false, ..server.relay_options });
        let mut client = RateLimitedStream::new(client, rate_limit);
        let mut client: &mut dyn Stream = &mut client;
        relay(&mut client, target, &options, &log.bytes, |_, target| is_still_allowed(server, log, target)).await
    }

    /// The tunnel for another thread; or as it was, when there are no descriptors for that.
    pub(super) fn detach(self) -> Result<DetachedTunnel, Box<Self>> {
        let (Ok(client), Ok(target)) = (self.client.detach(), self.target.detach()) else {
            return Err(Box::new(self));
        };
        for conn in [&self.client, &self.target] {
            // Should it be lost on the way, nobody is to take what he got for the whole.
            conn.abort();
            conn.deregister();
        }
        Ok(DetachedTunnel { client, target, log: self.log })
    }

    /// Says what is left to be said when it did not end well.
    pub(super) async fn close_after_error(self, error: RelayError) {
        self.log.set_error(&error);
        if let RelayError::Undelivered(_) = error {
            drop(self.target);
            // What it goes on to send is not read, since it is lost, and the client should not think otherwise. That it
            // has closed its side does not say that it has read all.
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

/// A tunnel on its way to another thread.
pub(super) struct DetachedTunnel {
    client: DetachedConn,
    target: DetachedConn,
    log: SessionLog,
}

impl DetachedTunnel {
    /// The tunnel for this thread. When it can't be had, it is over, and its log line says why.
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
    fn an_idle_tunnel_is_small() {
        // Its future has this, what the relay adds, and a few words more; see tests/relay.rs.
        assert!(size_of::<Tunnel>() <= 224, "{}", size_of::<Tunnel>());
    }
}
