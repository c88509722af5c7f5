//! Authorizes a request and executes its command.

use super::reply::{SessionError, SessionResult};
use super::state::Session;
use super::{association, bind, connect};
use crate::conn::Conn;
use crate::proto::{Command, Request};

/// Executes the request. Returns the connection to relay with, or `None` at the end of a UDP association. CONNECT and
/// BIND require `is_stream_allowed`: false if GSSAPI protection can't detect replayed or reordered messages.
pub(super) async fn dispatch(
    session: &mut Session,
    conn: &mut Conn,
    request: &Request,
    is_stream_allowed: bool,
) -> SessionResult<Option<Conn>> {
    session.policy = session.server().policy.current();
    session.log.policy_generation.set(session.policy.generation);
    let route = session.policy.authorize(&session.log.access_request())?;
    if let Some(user) = &session.log.user
        && !session.permit.admit_user(user)
    {
        return Err(SessionError::not_allowed("session limit of this user reached (raise --max-per-user)"));
    }
    if !is_stream_allowed && request.command != Command::UdpAssociate {
        let reason = "GSSAPI context has no replay and sequence detection (required by RFC 1961 for TCP)";
        return Err(SessionError::not_allowed(reason));
    }
    let dst = &request.dst;
    match request.command {
        Command::Connect => connect::serve(session, conn, dst, route).await.map(Some),
        // The rarer commands are boxed: their futures are larger than that of CONNECT.
        Command::Bind => Box::pin(bind::serve(session, conn, dst, route)).await.map(Some),
        Command::UdpAssociate => Box::pin(association::serve(session, conn, dst)).await.map(|()| None),
    }
}
