//! One session, top to bottom: log the client in, read the request, dispatch it, relay.
//!
//! Each command sends its own success reply. Failure replies of all stages are sent only by [`end`], so that each
//! path replies exactly once.

use std::cell::Cell;
use std::future::pending;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use futures_lite::{AsyncReadExt as _, FutureExt as _};

use super::handshakes::HandshakeGuard;
use super::log_shares::{Topic, in_session};
use super::passwords::Login;
use super::reply::{LOGIN_REFUSED, SessionError, SessionResult};
use super::session_log::SessionLog;
use super::shares::ShareGuard;
use super::state::{Server, Session, SessionPermit, denied_by_reload, disconnected, unless};
use super::tunnel::Tunnel;
use super::worker::{self, Priority};
use super::{association, bind, connect};
use crate::conn::{Conn, DetachedConn, Protection, ReadError};
use crate::counters::Histogram;
use crate::gssapi::GssapiError;
use crate::net::timeout_at;
use crate::proto::{
    Command, Credentials, Frame, Greeting, LoginStatus, Method, MethodSelection, OtherProtocol, ProtocolError,
    ProxyHeader, Request,
};

/// Starts a session on the worker of this thread. The client of a load balancer is not known yet.
pub(super) fn start(server: Arc<Server>, client: Option<SocketAddr>, share: ShareGuard, conn: DetachedConn) {
    let log = SessionLog::new(client);
    let conn = match conn.attach() {
        Ok(conn) => conn,
        Err(error) => return log.set_error(error),
    };
    let is_known = !server.options.is_balancer(client);
    let mut session = Session::new(server, log, share, conn);
    if is_known && let Err(denial) = session.check_client() {
        return session.log.set_error_of(denial.topic, denial.reason);
    }
    let (id, client) = (session.log.id, session.log.client_key());
    let handshake = session.server().limiter.handshakes.begin(is_known.then_some(client));
    if is_known {
        return serve(session, handshake);
    }
    let task = in_session(id, client, async move {
        match unless(replaced(Some(&handshake)), session.identify_client(&handshake)).await {
            Ok(()) => serve(session, handshake),
            Err(error) => end(session, Some(handshake), error).await,
        }
    });
    worker::spawn_boxed(Priority::Normal, task);
}

/// Serves a client. One task runs the handshake. Another one runs the tunnel after that, without the memory of the
/// handshake.
fn serve(mut session: Session, handshake: HandshakeGuard) {
    let (id, client) = (session.log.id, session.log.client_key());
    let priority = if session.permit.share.has_many() { Priority::Low } else { Priority::Normal };
    let task = in_session(id, client, async move {
        let mut handshake = Some(handshake);
        let result = match unless(replaced(handshake.as_ref()), session.log_in()).await {
            Ok(mut login) => {
                if let Some(protection) = login.protection.take() {
                    session.conn = session.conn.protect(protection);
                }
                match unless(replaced(handshake.as_ref()), login.read_request(&mut session)).await {
                    Ok(request) => {
                        handshake = None;
                        session.serve_request(&request, login.is_stream_allowed).await
                    }
                    Err(error) => Err(error),
                }
            }
            Err(error) => Err(error),
        };
        match result {
            Ok(Some(target)) => Tunnel::new(session, target).start(),
            Ok(None) => {}
            Err(error) => end(session, handshake, error).await,
        }
    });
    worker::spawn(priority, task);
}

/// Ends a session with an error.
async fn end(mut session: Session, handshake: Option<HandshakeGuard>, error: SessionError) {
    session.log.rep = error.rep.or(session.log.rep);
    session.log.set_error_of(error.topic, error.reason);
    // Logs the session now: closing can take seconds.
    let Session { permit: _permit, log, conn, .. } = session;
    drop(log);
    if !error.reply.is_empty() {
        let close = async {
            conn.close_gracefully(&error.reply).await;
            Ok(())
        };
        let _ = unless(replaced(handshake.as_ref()), close).await;
    }
}

/// Waits until an unfinished handshake has to end for a new connection, and returns the error.
async fn replaced(handshake: Option<&HandshakeGuard>) -> SessionError {
    match handshake {
        Some(handshake) => handshake.wait_ended().await,
        None => pending().await,
    }
    SessionError::silent("closed for a newer connection: too many unfinished handshakes")
}

/// A client that has logged in: only with this value, a request can be read.
struct Authenticated {
    /// For all messages after the login (RFC 1961 section 5).
    protection: Option<Protection>,
    /// False if a GSSAPI context protects messages, but can't detect replayed or reordered ones.
    is_stream_allowed: bool,
}

impl Authenticated {
    const UNPROTECTED: Self = Self { protection: None, is_stream_allowed: true };

    async fn read_request(&self, session: &mut Session) -> SessionResult<Request> {
        let request = timeout_at(session.deadline, session.conn.read_message()).await;
        request.ok_or_else(|| session.timed_out())?.map_err(|error| {
            // A check whether this is a SOCKS5 server, such as `s5 connect -z`.
            let is_check = matches!(&error, ReadError::Closed(begun, None) if begun.is_empty());
            let error = read_error(error, |error| SessionError::with_rep(error.rep(), error));
            if is_check && session.log.user.is_none() { error.quiet() } else { error }
        })
    }
}

impl Session {
    /// Selects a method and authenticates the client.
    async fn log_in(&mut self) -> SessionResult<Authenticated> {
        let has_sent = Cell::new(false);
        let selected = timeout_at(self.deadline, self.select_method(|| has_sent.set(true))).await;
        let selected = selected.unwrap_or_else(|| Err(self.timed_out()));
        let method = selected.map_err(|error| if has_sent.get() { error } else { error.quiet() })?;
        match method {
            // Boxed, once the login has arrived: a client that sends nothing takes no memory for it.
            Method::PASSWORD => {
                let login =
                    timeout_at(self.deadline, self.conn.read_message()).await.ok_or_else(|| self.timed_out())?;
                let invalid = |error| match error {
                    ProtocolError::EmptyCredential => {
                        SessionError::login_refused(&LoginStatus::FAILURE, &format!(" ({error})"))
                    }
                    _ => SessionError::with_message(&LoginStatus::FAILURE, error),
                };
                let login = login.map_err(|error| read_error(error, invalid))?;
                Box::pin(self.verify_password(login)).await
            }
            Method::GSSAPI => Box::pin(self.accept_gssapi()).await,
            Method::NONE => {
                self.log.method = Some(method);
                self.log.log_progress("login");
                Ok(Authenticated::UNPROTECTED)
            }
            _ => Err(not_configured()),
        }
    }

    /// Authorizes and executes the request. Returns the connection to relay with, or `None` at the end of an association.
    /// CONNECT and BIND require `is_stream_allowed`.
    async fn serve_request(&mut self, request: &Request, is_stream_allowed: bool) -> SessionResult<Option<Conn>> {
        self.log.command = Some(request.command);
        self.log.dst = Some(request.dst.clone());
        self.log.log_request();
        Histogram::Handshake.observe(self.log.elapsed());
        self.policy = self.server().policy.current();
        self.log.policy_generation.set(self.policy.generation);
        let route = self.policy.authorize(&self.log.access_request())?;
        if let Some(user) = &self.log.user
            && !self.permit.admit_user(user)
        {
            return Err(SessionError::not_allowed("session limit of this user reached (raise --max-per-user)"));
        }
        if !is_stream_allowed && request.command != Command::UdpAssociate {
            let reason = "GSSAPI context has no replay and sequence detection (required by RFC 1961 for TCP)";
            return Err(SessionError::not_allowed(reason));
        }
        let dst = &request.dst;
        match request.command {
            Command::Connect => connect::serve(self, dst, route).await.map(Some),
            // The rarer commands are boxed: their futures are larger than that of CONNECT.
            Command::Bind => Box::pin(bind::serve(self, dst, route)).await.map(Some),
            Command::UdpAssociate => Box::pin(association::serve(self, dst)).await.map(|()| None),
        }
    }

    fn timed_out(&self) -> SessionError {
        SessionError::silent(format!("handshake timed out after {:?}", self.server().options.handshake_timeout))
    }

    /// Reads the header of the PROXY protocol, and then applies the limits and rules that apply to other clients at
    /// accept. Until then, the connection counts against no client.
    async fn identify_client(&mut self, handshake: &HandshakeGuard) -> SessionResult<()> {
        if let Some(client) = self.read_proxy_header().await? {
            self.log.set_forwarded_client(client);
        }
        let key = self.log.client_key();
        handshake.assign(key);
        let SessionPermit { server, share, .. } = &mut self.permit;
        if !server.limiter.admit_client(&server.options, share, self.log.client()) {
            return Err(SessionError::silent("limit of connections of this client reached").quiet());
        }
        self.check_client()
    }

    /// Returns the client in the header. `None`: the balancer itself.
    async fn read_proxy_header(&mut self) -> SessionResult<Option<SocketAddr>> {
        let timeout = self.server().options.handshake_timeout;
        let too_slow = || format!("no complete PROXY header within {timeout:?}");
        let header = timeout_at(self.deadline, self.conn.read_message()).await;
        let header = header.ok_or_else(|| SessionError::silent(too_slow()))?;
        let ProxyHeader { client } = header.map_err(|error| match &error {
            // A health check that only connects.
            ReadError::Closed(begun, _) if begun.is_empty() => SessionError::silent(error).quiet(),
            ReadError::Protocol(_, bytes) if !ProxyHeader::is_start(bytes) => SessionError::silent(format!(
                "{error} (let the load balancer send it, or remove the address from --proxy-protocol-from)"
            )),
            ReadError::Protocol(..) => SessionError::silent(error),
            _ => SessionError::silent(format!("PROXY header: {error}")),
        })?;
        // A loopback address of another host gives no access to that of this one.
        let is_local = self.log.client().is_none_or(|balancer| balancer.ip().is_loopback());
        Ok(client.filter(|client| is_local || !client.ip().is_loopback()))
    }

    async fn select_method(&mut self, on_receipt: impl Fn()) -> SessionResult<Method> {
        let mut greeting = self.conn.read_message_with(true, on_receipt).await;
        if let Err(ReadError::Protocol(_, bytes)) = &mut greeting {
            // Boxed: other clients take no memory for it.
            Box::pin(read_proxy_start(&mut self.conn, bytes)).await;
        }
        let greeting: Greeting = greeting.map_err(|error| match error {
            ReadError::Protocol(_, bytes) if ProxyHeader::is_start(&bytes) => SessionError::silent(self.header_error()),
            error => read_error(error, greeting_error),
        })?;
        let selected = self.policy.policy.select_method(&greeting.methods);
        self.log.log_methods(&greeting.methods, selected);
        let Some(method) = selected else {
            let none = MethodSelection(Method::NO_ACCEPTABLE);
            return Err(SessionError::with_message(&none, "no acceptable authentication method"));
        };
        self.conn.write_message(&MethodSelection(method)).await.map_err(SessionError::silent)?;
        Ok(method)
    }

    /// Returns why a PROXY header is refused here.
    fn header_error(&self) -> &'static str {
        match self.log.is_forwarded() || self.server().options.is_balancer(self.log.client()) {
            true => "second PROXY header (if another load balancer is in front of yours, let yours accept its header)",
            false => "PROXY header from an address not in --proxy-protocol-from (if it is your load balancer, add it)",
        }
    }

    /// Verifies a login, and sends the result (RFC 1929). A refusal is delayed if logins of this client have failed.
    async fn verify_password(&mut self, credentials: Credentials) -> SessionResult<Authenticated> {
        self.log.user = Some(Box::new(credentials.uname.clone().into()));
        let login = Arc::new(Login { client: self.log.client_key(), credentials });
        if self.server().options.hops.iter().any(|hop| hop.forwards_login) {
            self.login = Some(login.clone());
        }
        let (server, started) = (self.server(), Instant::now());
        let verify = async {
            let on_refused = || self.log.set_error_of(Topic::Login, LOGIN_REFUSED);
            let verified = server.logins.verify(&server.policy, login, self.deadline, on_refused).await;
            verified.ok_or_else(|| SessionError::silent("password not checked in time: too many logins wait"))
        };
        let Some(policy) = self.cancellable(verify).await? else {
            return Err(SessionError::login_refused(&LoginStatus::FAILURE, ""));
        };
        self.policy = policy;
        self.log.method = Some(Method::PASSWORD);
        self.log.log_progress("login");
        // The time of the verification, with the wait for a turn, does not count.
        self.deadline += started.elapsed();
        let sent = timeout_at(self.deadline, self.conn.write_message(&LoginStatus::SUCCESS)).await;
        sent.ok_or_else(|| self.timed_out())?.map_err(SessionError::silent)?;
        Ok(Authenticated::UNPROTECTED)
    }

    /// Establishes a security context (RFC 1961). A timeout ends it with an abort message (section 3.8).
    async fn accept_gssapi(&mut self) -> SessionResult<Authenticated> {
        let Self { permit: SessionPermit { server, .. }, log, conn, deadline, .. } = self;
        let acceptor = server.options.gssapi_acceptor.as_ref().ok_or_else(not_configured)?;
        // Cancelled if the client leaves while it waits.
        let thread = async |conn: &Conn| {
            let thread = server.logins.threads.acquire(log.client_key());
            let cancelled = disconnected(conn).or(denied_by_reload(server, log));
            unless(cancelled, async { Ok(thread.await) }).await.map_err(|error| error.reason)
        };
        let accepted = timeout_at(*deadline, acceptor.accept(conn, thread)).await;
        let accepted =
            match accepted.ok_or_else(|| SessionError::with_message(&Frame::Abort, self.timed_out().reason))? {
                Ok(accepted) => accepted,
                Err(error @ GssapiError::Refused(_)) => return Err(SessionError::silent(error)),
                // Not delayed: a ticket cannot be guessed.
                Err(error) => return Err(SessionError::login_refused(&Frame::Abort, &format!(" ({error})"))),
            };
        self.log.method = Some(Method::GSSAPI);
        self.log.user = Some(Box::new(accepted.user.into()));
        self.log.level = accepted.level;
        self.log.log_progress("login");
        let is_stream_allowed = accepted.detects_reordering || accepted.protection.is_none();
        Ok(Authenticated { protection: accepted.protection, is_stream_allowed })
    }
}

fn not_configured() -> SessionError {
    SessionError::silent("the selected authentication method is not configured")
}

/// Reads on while the bytes may become the start of a PROXY header, which can arrive in pieces.
async fn read_proxy_start(conn: &mut Conn, bytes: &mut Vec<u8>) {
    let mut byte = [0];
    while ProxyHeader::may_become_start(bytes) && matches!(conn.read(&mut byte).await, Ok(1)) {
        bytes.extend(byte);
    }
}

/// Returns the error of a message that was not read. `answer` returns it for an invalid message.
fn read_error(error: ReadError, answer: impl FnOnce(ProtocolError) -> SessionError) -> SessionError {
    match error {
        ReadError::Protocol(error, _) => answer(error),
        closed @ ReadError::Closed(..) => SessionError::silent(closed),
    }
}

fn greeting_error(error: ProtocolError) -> SessionError {
    let ProtocolError::Version(first) = error else {
        return SessionError::with_message(&MethodSelection(Method::NO_ACCEPTABLE), error);
    };
    let protocol = OtherProtocol(first);
    let reason = format!("not SOCKS5: the client's first byte is {protocol}");
    SessionError { reply: protocol.rejection().to_vec(), ..SessionError::silent(reason) }
}
