//! The conditions of a rule, and whether the facts about a session match them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use ipnet::IpNet;

use crate::proto::{Command, HostName, Method, ProtectionLevel};

/// The facts about a session that rules are evaluated against. `None` means "not known yet".
#[derive(Clone, Copy, Debug, Default)]
pub struct AccessRequest<'a> {
    /// Client address, canonical. Unlike an unknown fact, `None` matches no `from=` condition.
    pub client_ip: Option<IpAddr>,
    /// Result of the login.
    pub identity: Option<Identity<'a>>,
    /// Requested command.
    pub command: Option<Command>,
    /// Domain name in DST. `None` if DST is an address.
    pub target_name: Option<&'a HostName>,
    /// Address that packets would be sent to, canonical.
    pub target_ip: Option<IpAddr>,
    /// Port of the target; with BIND, of DST, or if that is 0 or any peer may connect, of the peer.
    pub target_port: Option<u16>,
}

/// How a client has authenticated.
#[derive(Clone, Copy, Debug)]
pub struct Identity<'a> {
    /// Authentication method.
    pub method: Method,
    /// User name or Kerberos principal. `None` with [`Method::NONE`].
    pub user: Option<&'a [u8]>,
    /// Protection level of the session (RFC 1961 section 4).
    pub level: ProtectionLevel,
}

/// How a target is reached. By default, from this host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Route {
    /// Index of the hop (upstream proxy or chain of proxies) that the target is reached through.
    pub hop: Option<usize>,
    /// Source addresses on this host, at most one of each family. `None`: those of the server.
    pub outbound: Option<[Option<IpAddr>; 2]>,
}

/// The action of a rule and its conditions except `to=`. Rules with the same share one. An empty list is no condition.
#[derive(Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Conditions {
    pub(super) allow: bool,
    pub(super) from: Box<[ClientPattern]>,
    pub(super) users: Box<[UserPattern]>,
    pub(super) methods: Box<[Method]>,
    pub(super) levels: Box<[ProtectionLevel]>,
    pub(super) commands: Box<[Command]>,
    pub(super) ports: Box<[RangeInclusive<u16>]>,
    /// The route of an `allow`: a hop or `None` for a direct connection, if it has `via=`, and the source addresses.
    pub(super) via: Option<Option<usize>>,
    pub(super) outbound: Option<[Option<IpAddr>; 2]>,
}

#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) enum ClientPattern {
    Loopback,
    Remote,
    Net(IpNet),
}

/// An entry of `user=`.
#[derive(Debug, PartialEq, Eq, Hash)]
pub enum UserPattern {
    /// `*`: any user that has logged in.
    Any,
    /// A user name or Kerberos principal.
    Named(Vec<u8>),
    /// `*@REALM`, with the `@`.
    Realm(Vec<u8>),
}

#[derive(Debug)]
pub(super) enum TargetPattern {
    Name(String),
    /// `.SUFFIX`, without the dot: the name and its subdomains.
    Suffix(String),
    Net(IpNet),
}

/// Result of matching a condition. `Maybe`: depends on an unknown fact. By their order, `min` is "and", `max` is "or".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Match {
    No,
    Maybe,
    Yes,
}

impl From<bool> for Match {
    fn from(matches: bool) -> Self {
        if matches { Self::Yes } else { Self::No }
    }
}

/// Matches a fact; `Maybe` if it is unknown.
fn match_fact<T>(fact: Option<T>, matches: impl Fn(T) -> bool) -> Match {
    fact.map_or(Match::Maybe, |fact| matches(fact).into())
}

/// Matches a fact with a list of which one entry must match; an empty list always matches.
fn match_any<T, F>(list: &[T], fact: Option<F>, matches: impl Fn(&T, &F) -> bool) -> Match {
    if list.is_empty() { Match::Yes } else { match_fact(fact, |fact| list.iter().any(|entry| matches(entry, &fact))) }
}

impl Conditions {
    pub(super) fn matches(&self, request: &AccessRequest<'_>) -> Match {
        let identity = request.identity;
        let from = match_any(&self.from, Some(request.client_ip), |pattern, ip| pattern.matches(*ip));
        let user = match_any(&self.users, identity, |user, id| id.user.is_some_and(|name| user.matches(name)));
        let method = match_any(&self.methods, identity, |method, id| id.method == *method);
        let level = match_any(&self.levels, identity, |level, id| id.level == *level);
        let command = match_any(&self.commands, request.command, |command, requested| requested == command);
        let port = match_any(&self.ports, request.target_port, |ports, port| ports.contains(port));
        from.min(user).min(method).min(level).min(command).min(port)
    }
}

impl ClientPattern {
    fn matches(&self, client_ip: Option<IpAddr>) -> bool {
        match self {
            Self::Loopback => client_ip.is_some_and(|ip| ip.is_loopback()),
            Self::Remote => client_ip.is_some_and(|ip| !ip.is_loopback()),
            Self::Net(net) => client_ip.is_some_and(|ip| net.contains(&ip)),
        }
    }
}

impl UserPattern {
    /// Returns whether this is the user name of a login.
    pub fn matches(&self, user: &[u8]) -> bool {
        match self {
            Self::Any => true,
            Self::Named(name) => name == user,
            // Kerberos escapes an @ that is part of a name as \@.
            Self::Realm(realm) => user.strip_suffix(realm.as_slice()).is_some_and(|name| !name.ends_with(b"\\")),
        }
    }
}

/// The entry as in a rule, without escapes.
impl fmt::Display for UserPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Named(name) => String::from_utf8_lossy(name).escape_debug().fmt(f),
            Self::Realm(realm) => write!(f, "*{}", String::from_utf8_lossy(realm).escape_debug()),
        }
    }
}

impl TargetPattern {
    pub(super) fn matches(&self, allow: bool, request: &AccessRequest<'_>) -> Match {
        let name = match self {
            Self::Net(net) => return match_fact(request.target_ip, |ip| net_matches(net, ip, allow)),
            Self::Name(name) | Self::Suffix(name) => name,
        };
        match (request.target_ip, request.target_name) {
            (_, Some(target)) => {
                let target = normalize_name(target.as_str());
                let prefix = target.strip_suffix(name.as_str());
                let is_subdomain = prefix.is_some_and(|prefix| prefix.ends_with('.'));
                (prefix == Some("") || is_subdomain && matches!(self, Self::Suffix(_))).into()
            }
            (Some(_), None) => Match::No,
            (None, None) => Match::Maybe,
        }
    }
}

/// Matches an address. An `allow` compares the address that packets finally reach, a `deny` all [`embedded_addrs`].
fn net_matches(net: &IpNet, ip: IpAddr, allow: bool) -> bool {
    let destination = match ip {
        IpAddr::V6(v6) => embedded_ipv4(v6).map_or(ip, IpAddr::V4),
        IpAddr::V4(_) => ip,
    };
    if allow { net.contains(&destination) } else { embedded_addrs(ip).any(|addr| net.contains(&addr)) }
}

/// Returns `ip`, its embedded IPv4 address, and for Teredo also the address of the server.
pub(super) fn embedded_addrs(ip: IpAddr) -> impl Iterator<Item = IpAddr> {
    let (embedded, teredo_server) = match ip {
        IpAddr::V4(_) => (None, None),
        IpAddr::V6(v6) => match v6.segments() {
            [0x2001, 0, high, low, ..] => (embedded_ipv4(v6), Some(ipv4(high, low))),
            _ => (embedded_ipv4(v6), None),
        },
    };
    [Some(ip), embedded.map(IpAddr::V4), teredo_server.map(IpAddr::V4)].into_iter().flatten()
}

/// Returns the IPv4 address embedded in an IPv6 address: IPv4-mapped, NAT64 (RFC 6052, and the local prefix of
/// RFC 8215), 6to4 (RFC 3056) or the Teredo client (RFC 4380).
pub fn embedded_ipv4(ip: Ipv6Addr) -> Option<Ipv4Addr> {
    embedding(ip).map(|(_, embedded)| embedded)
}

/// Returns the embedded address, and the length of the prefix whose addresses all embed one in this way.
fn embedding(ip: Ipv6Addr) -> Option<(u8, Ipv4Addr)> {
    match ip.segments() {
        [0, 0, 0, 0, 0, 0xffff, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] => Some((96, ipv4(high, low))),
        [0x64, 0xff9b, 1, .., high, low] => Some((48, ipv4(high, low))),
        [0x2002, high, low, ..] => Some((16, ipv4(high, low))),
        [0x2001, 0, .., high, low] => Some((32, ipv4(!high, !low))),
        _ => None,
    }
}

/// Returns true if an `allow` never matches a target: it compares the embedded address.
pub(super) fn is_always_embedding(target: &TargetPattern) -> bool {
    let TargetPattern::Net(IpNet::V6(net)) = target else { return false };
    embedding(net.addr()).is_some_and(|(prefix_len, _)| net.prefix_len() >= prefix_len)
}

fn ipv4(high: u16, low: u16) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(high) << 16 | u32::from(low))
}

/// Returns a name in the form used for comparison: lower case, without the final dot.
pub fn normalize_name(text: &str) -> String {
    text.strip_suffix('.').unwrap_or(text).to_lowercase()
}
