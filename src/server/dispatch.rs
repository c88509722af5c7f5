//! Authorizes a request and executes its command.

use super::reply::{SessionError, SessionResult};
use super::state::Session;
use super::{association, bind, connect};
use crate::conn::Conn;
use crate::proto::{Command, Request};

impl Session<'_> {
    /// Executes the request. Returns the connection to relay with, or `None` after an association.
    pub(super) async fn dispatch(&mut self, conn: &mut Conn, request: &Request) -> SessionResult<Option<Conn>> {
        self.snapshot = self.server.policy.current();
        self.log.policy_generation.set(self.snapshot.generation);
        if let Some(reason) = self.snapshot.reason_to_refuse(&self.log, &self.log.access_request()) {
            return Err(SessionError::not_allowed(reason));
        }
        if let Some(user) = &self.log.user
            && !self.server.limiter.admit_user(user, self.quota)
        {
            return Err(SessionError::not_allowed("session limit of this user reached (raise --max-per-user)"));
        }
        if !self.is_stream_allowed && request.command != Command::UdpAssociate {
            let reason = "GSSAPI context has no replay and sequence detection (required by RFC 1961 for TCP)";
            return Err(SessionError::not_allowed(reason));
        }
        let dst = &request.dst;
        match request.command {
            Command::Connect => connect::serve(self, conn, dst).await.map(Some),
            // The rarer commands are boxed: their futures are larger than that of CONNECT.
            Command::Bind => Box::pin(bind::serve(self, conn, dst)).await.map(Some),
            Command::UdpAssociate => Box::pin(association::serve(self, conn, dst)).await.map(|()| None),
        }
    }
}
