//! How a client's handshake can fail: where, doing what, and why.

use std::fmt;
use std::io;
use std::time::Duration;

use crate::dial::DialError;
use crate::gssapi;
use crate::proto::Rep;

/// What a client is doing when it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Looking up the target's name here.
    ResolveTarget,
    /// Looking up the proxy's name.
    ResolveProxy,
    /// Connecting to the proxy.
    Connect,
    /// Greeting and selection.
    Greeting,
    /// The RFC 1929 sub-negotiation.
    Login,
    /// Request and reply.
    Request,
    /// Waiting for the second reply to BIND.
    Accept,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ResolveTarget => "resolving the target's name",
            Self::ResolveProxy => "resolving the proxy's name",
            Self::Connect => "connecting to the proxy",
            Self::Greeting => "greeting",
            Self::Login => "login",
            Self::Request => "request",
            Self::Accept => "waiting for the peer",
        })
    }
}

/// How long a client was in each phase, with all hops and tries together.
#[derive(Clone, Copy, Debug, Default)]
pub struct PhaseTimes([Duration; 7]);

impl PhaseTimes {
    /// Of one phase.
    pub fn of(&self, phase: Phase) -> Duration {
        self.0.get(phase as usize).copied().unwrap_or_default()
    }

    pub(super) fn add(&mut self, phase: Phase, time: Duration) {
        if let Some(sum) = self.0.get_mut(phase as usize) {
            *sum += time;
        }
    }
}

/// Why a handshake failed.
#[derive(Debug)]
pub enum ClientErrorKind {
    /// The name could not be resolved, or the address not be reached: of the first proxy or, without one, of the target.
    Unreachable(DialError),
    /// The proxy's Unix socket could not be reached.
    Socket(io::Error),
    /// The peer does not speak SOCKS5, or not correctly.
    Protocol(String),
    /// The proxy closed or reset the connection.
    Closed(Option<io::Error>),
    /// The proxy wants a method that we can't offer.
    NoAcceptableMethod,
    /// The proxy refused user name and password.
    LoginRefused,
    /// The login by GSSAPI failed, on either side.
    Gssapi(gssapi::GssapiError),
    /// The proxy answered with a failure.
    Rep(Rep),
    /// The proxy answered with a failure when it was asked for the next proxy.
    NextHop(Rep),
    /// The deadline passed.
    TimedOut(Duration),
}

/// A handshake that failed: at which proxy, for which target, in which phase, and why.
#[derive(Debug)]
pub struct ClientError {
    /// The proxy that was being talked to, if there is one.
    pub proxy: Option<String>,
    /// What it was asked for, if for anything.
    pub target: Option<String>,
    /// What was being done.
    pub phase: Phase,
    /// Why it failed.
    pub kind: ClientErrorKind,
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { proxy, target, phase, kind } = self;
        let hint = if proxy.is_some() { " (is the proxy running?)" } else { "" };
        match proxy {
            Some(proxy) => write!(f, "proxy {proxy}: {phase}")?,
            None if *phase == Phase::Connect => write!(f, "direct: connecting")?,
            None => write!(f, "direct: {phase}")?,
        }
        if let Some(target) = target {
            write!(f, ", for {target}")?;
        }
        f.write_str(": ")?;
        match kind {
            ClientErrorKind::Unreachable(DialError::Refused) => write!(f, "connection refused{hint}"),
            ClientErrorKind::Unreachable(failure) => failure.fmt(f),
            ClientErrorKind::Socket(error) => write!(f, "{error}{hint}"),
            ClientErrorKind::Protocol(what) => write!(f, "not a SOCKS5 server ({what})"),
            ClientErrorKind::Closed(None) => f.write_str("the proxy closed the connection"),
            ClientErrorKind::Closed(Some(error)) => error.fmt(f),
            ClientErrorKind::NoAcceptableMethod => {
                f.write_str("no acceptable authentication method (does it want user:password@, or a Kerberos ticket?)")
            }
            ClientErrorKind::Gssapi(error) => error.fmt(f),
            ClientErrorKind::LoginRefused => f.write_str("user name or password refused"),
            ClientErrorKind::Rep(rep) | ClientErrorKind::NextHop(rep) => write!(f, "{rep} (REP {})", rep.0),
            ClientErrorKind::TimedOut(after) => write!(f, "timed out after {after:?}"),
        }
    }
}

impl std::error::Error for ClientError {}
