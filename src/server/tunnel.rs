//! A session that is past its reply: two ends to be relayed, and what is to be said of it at its end.
//!
//! It is a task of its own, so that an idle tunnel holds nothing of the handshake.

use std::future::Future;
use std::time::Duration;

use super::Server;
use super::record::Record;
use crate::conn::Conn;
use crate::reactor::sleep;
use crate::relay::{Broken, Stream as _, relay};

/// How long a client whose target has closed and takes no more may take for the last of what it was sent.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What is left of a session when its handshake is over.
#[derive(Debug)]
pub(super) struct Tunnel {
    pub(super) client: Conn,
    pub(super) target: Conn,
    pub(super) record: Record,
}

impl Tunnel {
    /// Relays between the client and the target until the tunnel ends.
    pub(super) fn relay<'a>(&'a mut self, server: &'a Server) -> impl Future<Output = Result<(), Broken>> + 'a {
        relay(&mut self.client, &mut self.target, &server.relay_limits, &self.record.moved)
    }

    /// Says what is left to be said when it did not end well.
    pub(super) async fn break_off(mut self, broken: Broken) {
        self.record.error = Some(broken.to_string().into());
        if let Broken::Unsent(_) = broken {
            drop(self.target);
            // What it goes on to send is not read, since it is lost, and the client should not think otherwise. That it
            // has closed its side does not say that it has read all.
            sleep(LAST_WORDS).await;
            self.client.abort();
        }
    }
}
