//! Errors of the client handshake: the proxy, the phase and the cause.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use super::{Client, Progress};
use crate::gssapi;
use crate::net::DialError;
use crate::proto::{Addr, Command, Method, Rep};

/// Phase of the client handshake. `Accept` waits for the second reply to BIND.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "Display describes them")]
pub enum Phase {
    ResolveTarget,
    ResolveProxy,
    Connect,
    Greeting,
    Login,
    Request,
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

/// Time spent in each phase, summed over all hops and target addresses.
#[derive(Clone, Copy, Debug, Default)]
pub struct PhaseTimes([Option<Duration>; 7]);

impl PhaseTimes {
    /// Time spent in `phase`. `None`: it has not begun.
    pub fn of(&self, phase: Phase) -> Option<Duration> {
        self.0.get(phase as usize).copied().flatten()
    }

    pub(super) fn add(&mut self, phase: Phase, time: Duration) {
        if let Some(sum) = self.0.get_mut(phase as usize) {
            *sum = Some(sum.unwrap_or_default() + time);
        }
    }
}

/// Cause of a failed handshake.
#[derive(Debug)]
#[allow(missing_docs, reason = "Display describes the others")]
pub enum ClientErrorKind {
    /// Resolving the name of the first proxy or of the target, or connecting to it, failed.
    Unreachable(DialError),
    /// Connecting to the proxy's Unix socket failed.
    Socket(io::Error),
    /// The proxy is not a SOCKS5 server, or violates the protocol.
    Protocol(String),
    /// The proxy closed the connection (`None`), or reading or writing failed.
    Closed(Option<io::Error>),
    /// The offered methods, none of which the proxy accepts; empty if there are none to offer. Then the reason why
    /// GSSAPI was not offered, if kinit is no remedy.
    NoAcceptableMethod(Vec<Method>, Option<gssapi::GssapiError>),
    LoginRefused,
    Gssapi(gssapi::GssapiError),
    /// The last proxy replied with a failure.
    Rep(Rep),
    /// The last proxy stopped waiting for the peer of BIND (REP 6 in the second reply), after this time.
    NoPeer(Duration),
    /// A proxy before the last one could not connect to the next proxy.
    NextHop(Rep),
    /// The UDP relay that the proxy reported could not be resolved or reached.
    Relay(Addr, DialError),
    TimedOut(Duration),
}

impl From<DialError> for ClientErrorKind {
    fn from(error: DialError) -> Self {
        Self::Unreachable(error)
    }
}

/// A failed handshake. `proxy` is `None` for a direct connection. `target` is that of the request, or the next proxy.
#[derive(Debug)]
#[allow(missing_docs, reason = "self-explanatory")]
pub struct ClientError {
    pub proxy: Option<String>,
    pub target: Option<String>,
    pub phase: Phase,
    pub kind: ClientErrorKind,
}

impl Client {
    /// Returns true if the client of a server causes a delay now: the last proxy connects to its target, or a proxy
    /// checks its login, and may delay a refusal.
    pub fn waits_for_client(&self, command: Command) -> bool {
        let Progress { hop, phase, .. } = self.progress();
        match phase {
            Phase::Login => self.hops.get(hop).is_some_and(|proxy| proxy.forwards_login),
            Phase::Request => command == Command::Connect && hop + 1 == self.hops.len(),
            _ => false,
        }
    }

    /// Returns true if `error`, of this client, is a failure of the proxies, and not of the target or the login.
    pub fn is_at_fault(&self, error: &ClientError, command: Command) -> bool {
        match error.kind {
            ClientErrorKind::Rep(rep) => rep == Rep::GENERAL_FAILURE,
            ClientErrorKind::LoginRefused | ClientErrorKind::TimedOut(_) => !self.waits_for_client(command),
            _ => true,
        }
    }
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { proxy, target, phase, kind } = self;
        let hint = if proxy.is_some() { " (is the proxy running?)" } else { "" };
        let denied = if *phase == Phase::Greeting { " (its rules or limits may deny this client)" } else { "" };
        let (role, addr) = match phase {
            Phase::ResolveProxy => ("proxy", proxy),
            Phase::ResolveTarget => ("target", target),
            _ => ("", &None),
        };
        // An IP address needs no resolution: its family is not allowed.
        if let ClientErrorKind::Unreachable(DialError::FamilyUnavailable) = kind
            && let Some(Ok(addr)) = addr.as_ref().map(|addr| addr.parse::<SocketAddr>())
        {
            let required = if addr.ip().to_canonical().is_ipv4() { 6 } else { 4 };
            return write!(f, "{role} {addr}: not an IPv{required} address, as -{required} or -s requires");
        }
        match proxy {
            Some(proxy) => write!(f, "proxy {proxy}: {phase}")?,
            None if *phase == Phase::Connect => write!(f, "direct: connecting to the target")?,
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
            ClientErrorKind::Closed(None) => write!(f, "the proxy closed the connection{denied}"),
            ClientErrorKind::Closed(Some(error)) => write!(f, "{error}{denied}"),
            ClientErrorKind::NoAcceptableMethod(offered, reason) => {
                let list = offered.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                let list = if list.is_empty() { "nothing" } else { &list };
                // The proxy may require a method that was not offered.
                let reason = reason.as_ref().map_or("run kinit".into(), |reason| format!("for {reason}"));
                let remedies = [
                    (Method::PASSWORD, "add user:password@ to the proxy's URL"),
                    (Method::GSSAPI, reason.as_str()),
                    (Method::NONE, "allow more methods with --auth or --hop-auth"),
                ];
                let missing = remedies.iter().filter(|(method, _)| !offered.contains(method));
                let remedies = missing.map(|(_, remedy)| *remedy).collect::<Vec<_>>().join(", or ");
                let hint = format!("offered: {list}; {remedies}");
                write!(f, "no acceptable authentication method ({})", hint.trim_end_matches("; "))
            }
            ClientErrorKind::Gssapi(error) => error.fmt(f),
            ClientErrorKind::LoginRefused => f.write_str("user name or password refused"),
            ClientErrorKind::Rep(rep) | ClientErrorKind::NextHop(rep) => write!(f, "{rep} (REP {})", rep.0),
            ClientErrorKind::NoPeer(after) => {
                let seconds = format!("{:.1}", after.as_secs_f64());
                write!(f, "the proxy stopped waiting for the peer after {} s", seconds.trim_end_matches(".0"))?;
                let remedy = "to wait longer, raise the limit of the proxy: --bind-timeout of s5 serve";
                write!(f, " (REP {}) ({remedy})", Rep::TTL_EXPIRED.0)
            }
            ClientErrorKind::Relay(relay, failure) => write!(f, "UDP relay {relay}: {failure}"),
            ClientErrorKind::TimedOut(after) => {
                // Without the microseconds that have passed before.
                let after = after.saturating_add(Duration::from_micros(500));
                let micros = Duration::from_nanos(u64::from(after.subsec_nanos()) % 1_000_000);
                write!(f, "timed out after {:?}", after - micros)
            }
        }
    }
}

impl std::error::Error for ClientError {}
