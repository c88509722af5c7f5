//! The facts about one session: for the log line at its end, and for the requests to the policy.

use std::cell::{Cell, OnceCell};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use super::options::Hop;
use crate::net::{ByteCounts, canonical, parse_literal};
use crate::policy::rules::{AccessRequest, Identity};
use crate::proto::{Addr, Command, Host, Method, ProtectionLevel, Rep};

/// Error of a failed login. fail2ban filters match it.
pub(super) const LOGIN_REFUSED: &str = "login refused";

/// Filled in during the session; writes the log line on drop. Kept small, because every tunnel has one.
#[derive(Debug)]
pub(super) struct SessionLog {
    started: Instant,
    client: Option<AddrPort>,
    pub(super) user: Option<Box<[u8]>>,
    /// Set after a successful login.
    pub(super) method: Option<Method>,
    pub(super) level: ProtectionLevel,
    pub(super) command: Option<Command>,
    pub(super) dst: Option<Addr>,
    bnd: Option<AddrPort>,
    pub(super) via: Option<Arc<Hop>>,
    pub(super) rep: Option<Rep>,
    /// Generation of the policy that the session was last checked with.
    pub(super) policy_generation: Cell<u32>,
    pub(super) bytes: ByteCounts,
    pub(super) error: OnceCell<Box<str>>,
}

/// A [`SocketAddr`] without flow information and scope, which take up 8 bytes.
type AddrPort = (IpAddr, u16);

impl SessionLog {
    /// `client` is `None` on a Unix socket.
    pub(super) fn new(client: Option<SocketAddr>) -> Self {
        Self {
            started: Instant::now(),
            client: client.map(|client| (client.ip(), client.port())),
            user: None,
            method: None,
            level: ProtectionLevel::None,
            command: None,
            dst: None,
            bnd: None,
            via: None,
            rep: None,
            policy_generation: Cell::new(0),
            bytes: ByteCounts::default(),
            error: OnceCell::new(),
        }
    }

    /// Sets the reason for the end of the session. The first one is kept.
    pub(super) fn set_error(&self, error: impl ToString) {
        let _ = self.error.set(error.to_string().into());
    }

    pub(super) fn client(&self) -> Option<SocketAddr> {
        self.client.map(SocketAddr::from)
    }

    /// Sets BND. The first one is kept, which for BIND is the listening socket.
    pub(super) fn set_bnd(&mut self, bnd: SocketAddr) {
        self.bnd.get_or_insert((bnd.ip(), bnd.port()));
    }

    /// Returns the identity of a client that has logged in.
    pub(super) fn identity(&self) -> Option<Identity<'_>> {
        self.method.map(|method| Identity { method, user: self.user.as_deref(), level: self.level })
    }

    /// Returns the access request of the session without a target.
    pub(super) fn client_request(&self) -> AccessRequest<'_> {
        AccessRequest { identity: self.identity(), command: self.command, ..request_from(self.client()) }
    }

    /// Returns the access request of the session. For BIND, a zero address in DST matches any peer, and a zero port that of
    /// the peer. DST of UDP ASSOCIATE is not a target.
    pub(super) fn access_request(&self) -> AccessRequest<'_> {
        let request = self.client_request();
        match (&self.dst, self.command) {
            (Some(dst), Some(Command::Connect)) => with_target(request, dst),
            (Some(Addr { host: Host::Ip(ip), .. }), Some(Command::Bind)) if ip.is_unspecified() => request,
            (Some(dst), Some(Command::Bind)) => {
                let request = with_target(request, dst);
                AccessRequest { target_port: request.target_port.filter(|port| *port != 0), ..request }
            }
            _ => request,
        }
    }
}

/// Returns the access request at accept, when only the client's address is known. On a Unix socket that is 127.0.0.1.
pub(super) fn request_from(client: Option<SocketAddr>) -> AccessRequest<'static> {
    let from = client.map_or(Ipv4Addr::LOCALHOST.into(), |client| client.ip().to_canonical());
    AccessRequest { client_ip: Some(from), ..AccessRequest::default() }
}

/// Adds the target `dst` to an access request.
pub(super) fn with_target<'a>(request: AccessRequest<'a>, dst: &'a Addr) -> AccessRequest<'a> {
    let (name, ip) = match &dst.host {
        Host::Ip(ip) => (None, Some(*ip)),
        Host::Name(name) => parse_literal(name.as_str()).map_or((Some(name), None), |ip| (None, Some(ip))),
    };
    AccessRequest {
        target_name: name,
        target_ip: ip.map(|ip| canonical(ip, dst.port).ip()),
        target_port: Some(dst.port),
        ..request
    }
}

/// Adds an address, of the target or of a peer, to an access request. The port of DST is kept, because the peer of BIND
/// connects from another one.
pub(super) fn with_addr(request: AccessRequest<'_>, addr: SocketAddr) -> AccessRequest<'_> {
    AccessRequest { target_ip: Some(addr.ip()), target_port: request.target_port.or(Some(addr.port())), ..request }
}

impl Drop for SessionLog {
    fn drop(&mut self) {
        let is_refused = self.error.get().is_some_and(|error| **error == *LOGIN_REFUSED);
        log::log!(if is_refused { log::Level::Warn } else { log::Level::Info }, "session {self}");
    }
}

/// `key=value` pairs; `-` means "not reached". Values that a client or a hop can choose are quoted and escaped.
impl fmt::Display for SessionLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.client() {
            Some(client) => write!(f, "client={client}")?,
            None => write!(f, "client=unix")?,
        }
        match &self.user {
            Some(user) => write!(f, " user=\"{}\"", user.escape_ascii())?,
            None => write!(f, " user=-")?,
        }
        if self.method == Some(Method::GSSAPI) {
            write!(f, " protection={}", self.level)?;
        }
        write!(f, " command={}", or_dash(self.command))?;
        match &self.dst {
            Some(dst) => write!(f, " dst={:?}", dst.to_string())?,
            None => write!(f, " dst=-")?,
        }
        if let Some(hop) = &self.via {
            write!(f, " via={:?}", hop.name)?;
        }
        write!(f, " bnd={} rep={}", or_dash(self.bnd.map(SocketAddr::from)), or_dash(self.rep.map(|rep| rep.0)))?;
        let [up, down] = [&self.bytes.up, &self.bytes.down].map(|n| n.load(std::sync::atomic::Ordering::Relaxed));
        let elapsed = self.started.elapsed();
        write!(f, " up={up} down={down} seconds={}.{:03}", elapsed.as_secs(), elapsed.subsec_millis())?;
        self.error.get().map_or(Ok(()), |error| write!(f, " error={error:?}"))
    }
}

fn or_dash(value: Option<impl fmt::Display>) -> String {
    value.map_or_else(|| "-".into(), |value| value.to_string())
}
