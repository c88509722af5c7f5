//! One session, top to bottom: negotiate, authenticate, read the request, dispatch.
//!
//! Each command sends its own success reply. Failure replies of all stages are sent only by [`run`], so that each
//! path replies exactly once.

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

pub(super) type SessionResult<T> = Result<T, SessionError>;

/// The reason why a session failed, and the reply to the client.
#[derive(Debug)]
pub(super) struct SessionError {
    /// The encoded message. Empty: the connection is closed without one.
    reply: Vec<u8>,
    rep: Option<Rep>,
    /// For the log.
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

    pub(super) fn from_dial(error: DialError, dst: &Addr) -> Self {
        Self::with_rep(rep_for(error, matches!(dst.host, Host::Name(_))), error)
    }

    /// Forwards the REP of an upstream proxy; its other errors are general failures.
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

    /// Closes the connection without a message.
    pub(super) fn silent(reason: impl ToString) -> Self {
        Self { reply: Vec::new(), rep: None, reason: reason.to_string() }
    }
}

/// Maps errors of a direct connection to REP (RFC 1928 section 6).
fn rep_for(error: DialError, is_name: bool) -> Rep {
    match error {
        DialError::LocalResources | DialError::LocalAddr | DialError::Resolver => Rep::GENERAL_FAILURE,
        DialError::Denied => Rep::NOT_ALLOWED,
        DialError::NetworkUnreachable => Rep::NETWORK_UNREACHABLE,
        DialError::HostUnreachable | DialError::NameNotFound => Rep::HOST_UNREACHABLE,
        DialError::Refused => Rep::CONNECTION_REFUSED,
        DialError::TimedOut => Rep::TTL_EXPIRED,
        // The client chose the family of an address, but not of a name.
        DialError::FamilyUnavailable if is_name => Rep::HOST_UNREACHABLE,
        DialError::FamilyUnavailable => Rep::ATYP_NOT_SUPPORTED,
    }
}

/// A session until its success reply.
pub(super) struct Session<'a> {
    pub(super) server: &'a Server,
    /// The policy of the last evaluation. `current_snapshot` and `recheck` use the current one.
    pub(super) snapshot: Arc<PolicySnapshot>,
    pub(super) log: SessionLog,
    /// False if a GSSAPI context protects messages, but can't detect replayed or reordered ones.
    is_stream_allowed: bool,
    /// Set during a GSSAPI handshake, which a timeout ends with an abort message (RFC 1961 section 3.8).
    is_context_pending: bool,
    pub(super) quota: &'a mut Option<Box<SessionQuota>>,
}

/// Runs a session until its tunnel can be relayed. Returns `None` when the session is over.
///
/// `client` is the address from accept(2), which is known even if the peer has disconnected; `None` on a Unix socket.
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
            // Logs the session now: closing can take seconds.
            drop(log);
            if !error.reply.is_empty() {
                conn.close_gracefully(&error.reply).await;
            }
            None
        }
    }
}

/// An authenticated connection: the only type that a request can be read from.
struct Authenticated<'a>(&'a mut Conn);

/// Result of the method's sub-negotiation, before it is sent to the client.
struct AuthOutcome {
    method: Method,
    is_valid: bool,
    /// Time until the client receives the result.
    delay: Duration,
    /// For all messages after it (RFC 1961 section 5).
    protection: Option<Protection>,
}

impl Session<'_> {
    /// Reads everything up to the request within the handshake timeout, which is extended by the delay of a login.
    async fn handshake(&mut self, mut conn: Conn) -> (Conn, SessionResult<Request>) {
        let timeout = self.server.options.handshake_timeout;
        let deadline = Instant::now() + timeout;
        let timed_out = || SessionError::silent(format!("handshake timed out after {timeout:?}"));
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
        let request = async { self.finish_login(&mut conn, auth).await?.request().await };
        let request = timeout_at(deadline + delay, request).await.unwrap_or_else(|| Err(timed_out()));
        if let Ok(request) = &request {
            self.log.command = Some(request.command);
            self.log.dst = Some(request.dst.clone());
        }
        (conn, request)
    }

    async fn authenticate(&mut self, conn: &mut Conn) -> SessionResult<AuthOutcome> {
        let greeting: Greeting = conn.read_message().await.map_err(greeting_error)?;
        let Some(method) = self.snapshot.policy.select_method(&greeting.methods) else {
            let none = MethodSelection(Method::NO_ACCEPTABLE);
            return Err(SessionError::with_message(&none, "no acceptable authentication method"));
        };
        conn.write_message(&MethodSelection(method)).await.map_err(SessionError::silent)?;
        match (method, &self.snapshot.policy.users, &self.server.options.gssapi_acceptor) {
            (Method::PASSWORD, Some(_), _) => self.verify_password(conn).await,
            // Boxed: other sessions need no room for its future.
            (Method::GSSAPI, _, Some(acceptor)) => Box::pin(self.accept_gssapi(conn, acceptor)).await,
            (Method::NONE, ..) => Ok(AuthOutcome { method, is_valid: true, delay: Duration::ZERO, protection: None }),
            _ => Err(SessionError::silent("the selected authentication method is not configured")),
        }
    }

    /// Reads and verifies a login (RFC 1929).
    async fn verify_password(&mut self, conn: &mut Conn) -> SessionResult<AuthOutcome> {
        let credentials: Credentials = conn.read_message().await.map_err(login_error)?;
        // The password may have changed since the greeting.
        self.snapshot = self.server.policy.current();
        self.log.user = Some(credentials.uname.clone().into());
        let is_valid = match (self.server.limiter.login_delay(self.log.client()), &self.snapshot.policy.users) {
            (Some(_), Some(users)) => self.snapshot.passwords.verify(users, credentials).await,
            // Throttled clients are refused without hashing.
            (None, _) | (_, None) => false,
        };
        // Parallel logins of this client may have failed during the hashing: a throttled client is refused even if
        // this password is valid.
        let delay = self.server.limiter.login_delay(self.log.client());
        let is_valid = is_valid && delay.is_some();
        if !is_valid {
            self.server.limiter.record_failed_login(self.log.client());
            self.log.set_error(LOGIN_REFUSED);
        }
        let delay = delay.unwrap_or(MAX_DELAY);
        Ok(AuthOutcome { method: Method::PASSWORD, is_valid, delay, protection: None })
    }

    /// Establishes a security context (RFC 1961).
    async fn accept_gssapi(&mut self, conn: &mut Conn, acceptor: &Acceptor) -> SessionResult<AuthOutcome> {
        self.is_context_pending = true;
        let accepted = acceptor.accept(conn).await.map_err(|error| match error {
            gssapi::GssapiError::Refused(_) => SessionError::silent(error),
            _ => SessionError::with_message(&Frame::Abort, error),
        })?;
        self.log.user = Some(accepted.user.into());
        self.log.level = accepted.level;
        self.is_stream_allowed = accepted.detects_reordering || accepted.protection.is_none();
        let protection = accepted.protection;
        Ok(AuthOutcome { method: Method::GSSAPI, is_valid: true, delay: Duration::ZERO, protection })
    }

    /// Sends the result of a login.
    async fn finish_login<'a>(&mut self, conn: &'a mut Conn, auth: AuthOutcome) -> SessionResult<Authenticated<'a>> {
        if !auth.is_valid {
            return Err(SessionError::with_message(&LoginStatus::FAILURE, LOGIN_REFUSED));
        }
        self.log.method = Some(auth.method);
        if auth.method == Method::PASSWORD {
            conn.write_message(&LoginStatus::SUCCESS).await.map_err(SessionError::silent)?;
        }
        Ok(Authenticated(conn))
    }

    /// Executes the request. Returns the connection to relay with, or `None` after an association.
    async fn dispatch(&mut self, conn: &mut Conn, request: &Request) -> SessionResult<Option<Conn>> {
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

impl Authenticated<'_> {
    async fn request(self) -> SessionResult<Request> {
        self.0.read_message().await.map_err(|error| match error {
            ReadError::Protocol(error, _) => SessionError::with_rep(error.rep(), error),
            other => SessionError::silent(other),
        })
    }
}

fn greeting_error(error: ReadError) -> SessionError {
    match error {
        ReadError::Protocol(ProtocolError::Version(first), _) => {
            let protocol = OtherProtocol(first);
            let reason = format!("not SOCKS5: the client's first byte is {protocol}");
            SessionError { reply: protocol.rejection().to_vec(), rep: None, reason }
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
        for (error, by_address, by_name) in table {
            assert_eq!(rep_for(error, false).0, by_address, "{error:?}");
            assert_eq!(rep_for(error, true).0, by_name, "{error:?}");
        }
    }
}
