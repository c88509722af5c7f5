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
    Target,
    /// Looking up the proxy's name.
    Resolve,
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
            Self::Target => "resolving the target's name",
            Self::Resolve => "resolving the proxy's name",
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
pub struct Times([Duration; 7]);

impl Times {
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
pub enum Cause {
    /// The name could not be resolved, or the address not be reached: of the first proxy or, without one, of the target.
    Unreachable(DialError),
    /// The proxy's Unix socket could not be reached.
    Socket(io::Error),
    /// The peer does not speak SOCKS5, or not correctly.
    Protocol(String),
    /// The proxy closed or reset the connection.
    Closed(Option<io::Error>),
    /// The proxy wants a method that we can't offer.
    NoMethod,
    /// The proxy refused user name and password.
    LoginRefused,
    /// The login by GSSAPI failed, on either side.
    Gssapi(gssapi::Error),
    /// The proxy answered with a failure.
    Rep(Rep),
    /// The proxy answered with a failure when it was asked for the next proxy.
    NextHop(Rep),
    /// The deadline passed.
    TimedOut(Duration),
}

/// A handshake that failed: at which proxy, for which target, in which phase, and why.
#[derive(Debug)]
pub struct Error {
    /// The proxy that was being talked to, if there is one.
    pub proxy: Option<String>,
    /// What it was asked for, if for anything.
    pub target: Option<String>,
    /// What was being done.
    pub phase: Phase,
    /// Why it failed.
    pub cause: Cause,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { proxy, target, phase, cause } = self;
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
        match cause {
            Cause::Unreachable(DialError::Refused) => write!(f, "connection refused{hint}"),
            Cause::Unreachable(failure) => failure.fmt(f),
            Cause::Socket(error) => write!(f, "{error}{hint}"),
            Cause::Protocol(what) => write!(f, "not a SOCKS5 server ({what})"),
            Cause::Closed(None) => f.write_str("the proxy closed the connection"),
            Cause::Closed(Some(error)) => error.fmt(f),
            Cause::NoMethod => {
                f.write_str("no acceptable authentication method (does it want user:password@, or a Kerberos ticket?)")
            }
            Cause::Gssapi(error) => error.fmt(f),
            Cause::LoginRefused => f.write_str("user name or password refused"),
            Cause::Rep(rep) | Cause::NextHop(rep) => write!(f, "{rep} (REP {})", rep.0),
            Cause::TimedOut(after) => write!(f, "timed out after {after:?}"),
        }
    }
}

impl std::error::Error for Error {}
