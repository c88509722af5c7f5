//! One session from greeting to end, top to bottom: negotiate, authenticate, read the request, dispatch.
//!
//! A command answers success itself. Every refusal, of whatever stage, is said here and nowhere else, so that no
//! path answers twice or not at all.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use super::limiter::SessionQuota;
use super::login_throttle::MAX_DELAY;
use super::policy_handle::PolicySnapshot;
use super::session_log::{LOGIN_REFUSED, SessionLog};
use super::tunnel::Tunnel;
use super::{Server, association, bind, connect};
use crate::client::{ClientError, ClientErrorKind};
use crate::conn::{Conn, Protection, ReadError, timeout_at};
use crate::dial::DialError;
use crate::gssapi::{self, Acceptor};
use crate::proto::{
    Addr, Command, Credentials, Frame, Greeting, Host, LoginStatus, Message, Method, MethodSelection, OtherProtocol,
    ProtocolError, Rep, Reply, Request,
};
use crate::reactor::sleep;

/// Why a session ends before it has succeeded, and what the client is told.
#[derive(Debug)]
pub(super) struct SessionError {
    reply: Vec<u8>,
    rep: Option<Rep>,
    reason: String,
}

impl SessionError {
    /// A failure reply (RFC 1928 section 6).
    pub(super) fn with_rep(rep: Rep, reason: impl ToString) -> Self {
        let reply = Reply { rep, bnd: Addr::UNSPECIFIED }.encode();
        Self { reply, rep: Some(rep), reason: reason.to_string() }
    }

    pub(super) fn general_failure(reason: impl ToString) -> Self {
        Self::with_rep(Rep::GENERAL_FAILURE, reason)
    }

    pub(super) fn not_allowed(reason: impl ToString) -> Self {
        Self::with_rep(Rep::NOT_ALLOWED, reason)
    }

    /// The reply to a request for `dst` that failed.
    pub(super) fn from_dial(failure: DialError, dst: &Addr) -> Self {
        Self::with_rep(rep_for(failure, matches!(dst.host, Host::Name(_))), failure)
    }

    /// A hop that failed: its own REP is handed on, and all else is a general failure.
    pub(super) fn from_upstream(error: ClientError) -> Self {
        let rep = match error.kind {
            ClientErrorKind::Rep(rep) => rep,
            _ => Rep::GENERAL_FAILURE,
        };
        Self::with_rep(rep, error)
    }

    fn with_message(message: &impl Message, reason: impl ToString) -> Self {
        Self { reply: message.encode(), rep: None, reason: reason.to_string() }
    }

    /// There is nobody to answer, or no way to.
    pub(super) fn silent(reason: impl ToString) -> Self {
        Self { reply: Vec::new(), rep: None, reason: reason.to_string() }
    }
}

/// The one table from failures to REP.
fn rep_for(failure: DialError, dst_is_name: bool) -> Rep {
    match failure {
        DialError::LocalResources | DialError::LocalAddr | DialError::Resolver => Rep::GENERAL_FAILURE,
        DialError::Denied => Rep::NOT_ALLOWED,
        DialError::NetworkUnreachable => Rep::NETWORK_UNREACHABLE,
        DialError::HostUnreachable | DialError::NameNotFound => Rep::HOST_UNREACHABLE,
        DialError::Refused => Rep::CONNECTION_REFUSED,
        DialError::TimedOut => Rep::TTL_EXPIRED,
        // The client chose the family of an address, but not that of a name.
        DialError::FamilyUnavailable if dst_is_name => Rep::HOST_UNREACHABLE,
        DialError::FamilyUnavailable => Rep::ATYP_NOT_SUPPORTED,
    }
}

/// A session on its way to an answer.
pub(super) struct Session<'a> {
    pub(super) server: &'a Server,
    /// The policy that was in force when it was asked last; from the request on it is asked again where that matters.
    pub(super) snapshot: Arc<PolicySnapshot>,
    pub(super) log: SessionLog,
    /// Whether the order of octets is assured, as far as it should be.
    is_stream_allowed: bool,
    /// Whether a context is being established, which is ended by an abort (RFC 1961 section 3.8).
    is_context_pending: bool,
    /// What it takes up of its client's and its user's share.
    pub(super) quota: &'a mut Option<Box<SessionQuota>>,
}

/// Runs a session of `client`, which has no address on a Unix socket, and had one even if it is gone by now. What is
/// left of it when two ends are to be relayed is its tunnel.
pub(super) async fn run(
    server: &Server,
    mut conn: Conn,
    client: Option<SocketAddr>,
    quota: &mut Option<Box<SessionQuota>>,
) -> Option<Tunnel> {
    let mut session = Session {
        server,
        snapshot: server.policy.current(),
        log: SessionLog::new(client),
        is_stream_allowed: true,
        is_context_pending: false,
        quota,
    };
    let handshake;
    (conn, handshake) = session.handshake(conn).await;
    let outcome = match handshake {
        Ok(request) => session.dispatch(&mut conn, &request).await,
        Err(error) => Err(error),
    };
    let Session { mut log, .. } = session;
    match outcome {
        Ok(target) => Some(Tunnel { client: conn, target: target?, log }),
        Err(error) => {
            log.rep = error.rep.or(log.rep);
            log.set_error(error.reason);
            // Said in the log now, however long the client may take to leave.
            drop(log);
            if !error.reply.is_empty() {
                conn.close_gracefully(&error.reply).await;
            }
            None
        }
    }
}

/// A connection whose client may make a request; there is no other way to read one.
struct Authenticated<'a>(&'a mut Conn);

/// A client that has said all that it has to say to be let in.
struct Authentication {
    method: Method,
    is_valid: bool,
    /// How long the answer is held back.
    delay: Duration,
    /// What protects all that follows.
    protection: Option<Protection>,
}

impl Session<'_> {
    /// Everything up to the request, under one deadline; but the client does not answer for what the answer to its
    /// login is held back.
    async fn handshake(&mut self, mut conn: Conn) -> (Conn, Result<Request, SessionError>) {
        let deadline = Instant::now() + self.server.options.handshake_timeout;
        let timed_out = || SessionError::silent("the handshake took too long");
        let mut auth = match timeout_at(deadline, self.authenticate(&mut conn)).await {
            Some(Ok(auth)) => auth,
            Some(Err(error)) => return (conn, Err(error)),
            None if self.is_context_pending => {
                return (conn, Err(SessionError::with_message(&Frame::Abort, timed_out().reason)));
            }
            None => return (conn, Err(timed_out())),
        };
        if let Some(protection) = auth.protection.take() {
            conn = conn.protect(protection);
        }
        let delay = auth.delay;
        if !delay.is_zero() {
            sleep(delay).await;
        }
        let request = async { self.finish_authentication(&mut conn, auth).await?.request().await };
        let request = timeout_at(deadline + delay, request).await.unwrap_or_else(|| Err(timed_out()));
        if let Ok(request) = &request {
            self.log.command = Some(request.command);
            self.log.dst = Some(request.dst.clone());
        }
        (conn, request)
    }

    async fn authenticate(&mut self, conn: &mut Conn) -> Result<Authentication, SessionError> {
        let greeting: Greeting = conn.read_message().await.map_err(greeting_error)?;
        let Some(method) = self.snapshot.policy.select_method(&greeting.methods) else {
            let none = MethodSelection(Method::NO_ACCEPTABLE);
            return Err(SessionError::with_message(&none, "none of the methods that the client offers will do"));
        };
        conn.write_message(&MethodSelection(method)).await.map_err(SessionError::silent)?;
        match (method, &self.snapshot.policy.users, &self.server.options.gssapi_acceptor) {
            (Method::PASSWORD, Some(_), _) => self.verify_password(conn).await,
            // Boxed, so that all others do not have room for it.
            (Method::GSSAPI, _, Some(acceptor)) => Box::pin(self.accept_gssapi(conn, acceptor)).await,
            (Method::NONE, ..) => {
                Ok(Authentication { method, is_valid: true, delay: Duration::ZERO, protection: None })
            }
            _ => Err(SessionError::silent("a method that nothing is there for")),
        }
    }

    /// RFC 1929.
    async fn verify_password(&mut self, conn: &mut Conn) -> Result<Authentication, SessionError> {
        let credentials: Credentials = conn.read_message().await.map_err(login_error)?;
        // A password that was changed meanwhile is none any more.
        self.snapshot = self.server.policy.current();
        self.log.user = Some(credentials.uname.clone().into());
        let is_valid = match (self.server.limiter.login_delay(self.log.client()), &self.snapshot.policy.users) {
            (Some(_), Some(users)) => self.snapshot.passwords.verify(users, credentials).await,
            // Not worth a hash.
            (None, _) | (_, None) => false,
        };
        // Asked again: others may have failed meanwhile, and who is shut out does not get in by having been early.
        let delay = self.server.limiter.login_delay(self.log.client());
        let is_valid = is_valid && delay.is_some();
        if !is_valid {
            self.server.limiter.record_failed_login(self.log.client());
            self.log.set_error(LOGIN_REFUSED);
        }
        let delay = delay.unwrap_or(MAX_DELAY);
        Ok(Authentication { method: Method::PASSWORD, is_valid, delay, protection: None })
    }

    /// RFC 1961.
    async fn accept_gssapi(&mut self, conn: &mut Conn, acceptor: &Acceptor) -> Result<Authentication, SessionError> {
        self.is_context_pending = true;
        let accepted = acceptor.accept(conn).await.map_err(|error| match error {
            gssapi::Error::Refused(_) => SessionError::silent(error),
            _ => SessionError::with_message(&Frame::Abort, error),
        })?;
        self.log.user = Some(accepted.user.into());
        self.log.level = accepted.level;
        self.is_stream_allowed = accepted.is_ordered || accepted.protection.is_none();
        let (is_valid, protection) = (true, accepted.protection);
        Ok(Authentication { method: Method::GSSAPI, is_valid, delay: Duration::ZERO, protection })
    }

    async fn finish_authentication<'a>(
        &mut self,
        conn: &'a mut Conn,
        auth: Authentication,
    ) -> Result<Authenticated<'a>, SessionError> {
        if !auth.is_valid {
            return Err(SessionError::with_message(&LoginStatus::FAILURE, LOGIN_REFUSED));
        }
        self.log.method = Some(auth.method);
        if auth.method == Method::PASSWORD {
            conn.write_message(&LoginStatus::SUCCESS).await.map_err(SessionError::silent)?;
        }
        Ok(Authenticated(conn))
    }

    /// Does what was asked for; what comes of it, but for an association, is the connection to relay with.
    async fn dispatch(&mut self, conn: &mut Conn, request: &Request) -> Result<Option<Conn>, SessionError> {
        self.snapshot = self.server.policy.current();
        self.log.policy_generation.set(self.snapshot.generation);
        if let Some(reason) = self.snapshot.check(&self.log, &self.log.access_request()) {
            return Err(SessionError::not_allowed(reason));
        }
        if let Some(user) = &self.log.user
            && !self.server.limiter.admit_user(user, self.quota)
        {
            return Err(SessionError::not_allowed("as many sessions of this user as there may be"));
        }
        if !self.is_stream_allowed && request.command != Command::UdpAssociate {
            let reason =
                "the context would not notice octets in another order (RFC 1961 wants replay and sequence detection)";
            return Err(SessionError::not_allowed(reason));
        }
        let dst = &request.dst;
        match request.command {
            Command::Connect => connect::serve(self, conn, dst).await.map(Some),
            // The rarer commands are boxed, so that a session is not as large as the largest of them.
            Command::Bind => Box::pin(bind::serve(self, conn, dst)).await.map(Some),
            Command::UdpAssociate => Box::pin(association::serve(self, conn, dst)).await.map(|()| None),
        }
    }

    /// Returns when a new law forbids what the session is waiting for.
    pub(super) async fn denied_by_reload(&self) -> SessionError {
        // Whoever comes of the waiting is judged once more.
        let seen = self.log.policy_generation.clone();
        poll_fn(|_| match self.server.recheck(&self.log, &seen, || None) {
            Some(reason) => Poll::Ready(SessionError::not_allowed(reason)),
            None => Poll::Pending,
        })
        .await
    }

    /// The law of the day, where it counts for sessions that have made their request.
    pub(super) fn current_snapshot(&self) -> Arc<PolicySnapshot> {
        self.server.policy.newer_than(self.snapshot.generation).unwrap_or_else(|| self.snapshot.clone())
    }

    /// Answers success, unless that is no longer allowed. The record keeps the first BND, that of this server's socket.
    pub(super) async fn reply_success(
        &mut self,
        client: &mut Conn,
        bnd: Addr,
        peer: Option<SocketAddr>,
    ) -> Result<(), SessionError> {
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

impl Authenticated<'_> {
    async fn request(self) -> Result<Request, SessionError> {
        self.0.read_message().await.map_err(|error| match error {
            ReadError::Protocol(error, _) => SessionError::with_rep(error.rep(), error),
            other => SessionError::silent(other),
        })
    }
}

fn greeting_error(error: ReadError) -> SessionError {
    match error {
        ReadError::Protocol(ProtocolError::Version(first), _) => {
            let foreign = OtherProtocol(first);
            let reason = format!("not SOCKS5: the client began with {foreign}");
            SessionError { reply: foreign.rejection().to_vec(), rep: None, reason }
        }
        ReadError::Protocol(error, _) => SessionError::with_message(&MethodSelection(Method::NO_ACCEPTABLE), error),
        other => SessionError::silent(other),
    }
}

fn login_error(error: ReadError) -> SessionError {
    match error {
        ReadError::Protocol(error, _) => SessionError::with_message(&LoginStatus::FAILURE, error),
        other => SessionError::silent(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dial_error_has_its_rep() {
        let table = [
            (DialError::Refused, 5, 5),
            (DialError::NetworkUnreachable, 3, 3),
            (DialError::HostUnreachable, 4, 4),
            (DialError::TimedOut, 6, 6),
            (DialError::NameNotFound, 4, 4),
            (DialError::Resolver, 1, 1),
            (DialError::FamilyUnavailable, 8, 4),
            (DialError::Denied, 2, 2),
            (DialError::LocalResources, 1, 1),
        ];
        for (failure, by_address, by_name) in table {
            assert_eq!(rep_for(failure, false).0, by_address, "{failure:?}");
            assert_eq!(rep_for(failure, true).0, by_name, "{failure:?}");
        }
    }
}
