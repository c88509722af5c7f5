//! The errors of a session, and the replies for them. Only this file maps errors to REP.

use super::log_shares::Topic;
use super::policy_handle::Denial;
use super::session_log::MAX_NAME_LEN;
use crate::client::{ClientError, ClientErrorKind, Phase};
use crate::net::DialError;
use crate::proto::{Addr, Host, Message, Rep, Reply};

pub(super) type SessionResult<T> = Result<T, SessionError>;

/// Start of the error of a failed login. fail2ban filters match it.
pub(super) const LOGIN_REFUSED: &str = "login refused";

/// The reason why a session failed, and the reply to the client.
#[derive(Debug)]
pub(super) struct SessionError {
    /// The encoded message. If it is empty, the connection is closed without a message.
    pub(super) reply: Vec<u8>,
    pub(super) rep: Option<Rep>,
    /// For the log.
    pub(super) reason: String,
    pub(super) topic: Topic,
}

impl SessionError {
    /// A failure reply (RFC 1928 section 6).
    pub(super) fn with_rep(rep: Rep, reason: impl ToString) -> Self {
        let reply = Reply { rep, bnd: Addr::UNSPECIFIED }.encode();
        Self { reply, rep: Some(rep), ..Self::silent(reason) }
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
    pub(super) fn from_upstream(mut error: ClientError) -> Self {
        // The field `to` of the line has its start.
        error.target.take_if(|target| target.escape_debug().count() > MAX_NAME_LEN);
        let rep = match error.kind {
            ClientErrorKind::Rep(rep) => rep,
            ClientErrorKind::NoPeer(_) => Rep::TTL_EXPIRED,
            _ => Rep::GENERAL_FAILURE,
        };
        let reason = match &error {
            // No address of the first proxy has a family that is allowed.
            ClientError {
                proxy: Some(proxy),
                phase: Phase::ResolveProxy,
                kind: ClientErrorKind::Unreachable(DialError::FamilyUnavailable),
                ..
            } => format!("proxy {proxy}: no source address of its family (add one to --outbound, or to outbound=)"),
            error => error.to_string(),
        };
        Self::with_rep(rep, reason)
    }

    pub(super) fn with_message(message: &impl Message, reason: impl ToString) -> Self {
        Self { reply: message.encode(), ..Self::silent(reason) }
    }

    /// Refuses a login. `detail` follows the text that fail2ban filters match.
    pub(super) fn login_refused(message: &impl Message, detail: &str) -> Self {
        Self { topic: Topic::Login, ..Self::with_message(message, format!("{LOGIN_REFUSED}{detail}")) }
    }

    /// Closes the connection without a message.
    pub(super) fn silent(reason: impl ToString) -> Self {
        Self { reply: Vec::new(), rep: None, reason: reason.to_string(), topic: Topic::Session }
    }

    /// Sets the topic of the log line so that only a verbose server logs it: the client has sent no request.
    pub(super) fn quiet(self) -> Self {
        Self { topic: Topic::Step, ..self }
    }
}

impl From<Denial<'_>> for SessionError {
    fn from(denial: Denial<'_>) -> Self {
        match denial {
            Denial::Login | Denial::Rule(_) => Self::not_allowed(denial),
            Denial::Unreachable => Self::with_rep(Rep::NETWORK_UNREACHABLE, denial),
        }
    }
}

/// Maps errors of a direct connection to REP (RFC 1928 section 6).
fn rep_for(error: DialError, is_name: bool) -> Rep {
    match error {
        DialError::Denied => Rep::NOT_ALLOWED,
        DialError::NetworkUnreachable | DialError::ZoneRequired => Rep::NETWORK_UNREACHABLE,
        DialError::HostUnreachable | DialError::NameNotFound | DialError::NoInterface => Rep::HOST_UNREACHABLE,
        DialError::Refused => Rep::CONNECTION_REFUSED,
        DialError::TimedOut => Rep::TTL_EXPIRED,
        // The client chose the family of an address, but not of a name.
        DialError::FamilyUnavailable if is_name => Rep::HOST_UNREACHABLE,
        DialError::FamilyUnavailable => Rep::ATYP_NOT_SUPPORTED,
        _ => Rep::GENERAL_FAILURE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dial_errors_of_this_machine_and_of_routers_have_their_rep() {
        let table = [
            (DialError::HostUnreachable, 4, 4),
            (DialError::FamilyUnavailable, 8, 4),
            (DialError::Denied, 2, 2),
            (DialError::ZoneRequired, 3, 3),
            (DialError::LocalResources, 1, 1),
        ];
        for (error, by_address, by_name) in table {
            assert_eq!([false, true].map(|is_name| rep_for(error, is_name).0), [by_address, by_name], "{error:?}");
        }
    }
}
