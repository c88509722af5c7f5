//! One session, top to bottom: negotiate, authenticate, read the request, dispatch.
//!
//! Each command sends its own success reply. Failure replies of all stages are sent only by [`run`], so that each
//! path replies exactly once.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::limiter::SessionQuota;
use super::login_throttle::MAX_DELAY;
use super::reply::{SessionError, SessionResult};
use super::session_log::{LOGIN_REFUSED, SessionLog};
use super::state::{Server, Session};
use super::tunnel::Tunnel;
use crate::conn::{Conn, Protection, ReadError};
use crate::gssapi::{self, Acceptor};
use crate::net::{sleep, timeout_at};
use crate::proto::{
    Credentials, Frame, Greeting, LoginStatus, Method, MethodSelection, OtherProtocol, ProtocolError, Request,
};

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
