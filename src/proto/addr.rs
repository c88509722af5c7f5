//! Addresses: as encoded in messages, ATYP, an IP address or host name, and a port (RFC 1928 section 5); and as text,
//! `host:port`. Errors about text are messages for the user.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::str::FromStr;

use super::codec::{DecodeError, MAX_HOST_NAME_LEN, MessageReader, ProtocolError, write_length_prefixed};

const ATYP_IPV4: u8 = 1;
const ATYP_NAME: u8 = 3;
const ATYP_IPV6: u8 = 4;
/// Length of the port that follows every address, in bytes.
const PORT_LEN: usize = 2;

/// A host name (ATYP 3): 1 to 255 bytes of UTF-8 without control characters. It may be invalid in DNS.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostName(Box<str>);

impl HostName {
    /// Checks a host name of a message.
    pub fn new(bytes: &[u8]) -> Result<Self, ProtocolError> {
        match std::str::from_utf8(bytes) {
            Ok(text) if (1..=MAX_HOST_NAME_LEN).contains(&text.len()) && !text.contains(char::is_control) => {
                Ok(Self(text.into()))
            }
            _ => Err(ProtocolError::InvalidHostName),
        }
    }

    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns true for an address or a host name: labels of ASCII letters, digits, `-` and `_` that do not begin with
    /// `-` (RFC 1123 section 2.1). So it is safe in a file, a variable or a command line. Its length is not checked.
    pub fn is_plain(&self) -> bool {
        let is_label_char = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let is_label = |label: &str| !label.is_empty() && !label.starts_with('-') && label.chars().all(is_label_char);
        let (ip, zone) = self.0.split_once('%').unwrap_or((&self.0, "lo"));
        let name = self.0.strip_suffix('.').unwrap_or(&self.0);
        name.split('.').all(is_label) || ip.parse::<Ipv6Addr>().is_ok() && zone.split('.').all(is_label)
    }

    /// Returns true for a link-local address with a zone, such as `fe80::1%eth0`. It is encoded as a name (ATYP 3),
    /// because ATYP 4 has no room for the zone.
    pub fn is_zoned_address(&self) -> bool {
        let parts = self.0.split_once('%').filter(|(_, zone)| !zone.is_empty());
        parts.and_then(|(ip, _)| ip.parse().ok()).is_some_and(|ip: Ipv6Addr| ip.is_unicast_link_local())
    }
}

impl FromStr for HostName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (Self::new(text.as_bytes()), text.len()) {
            (Ok(_), _) if !text.is_ascii() => {
                Err(format!("{text} is not ASCII (write the name in its ASCII form, xn--\u{2026}, RFC 5891)"))
            }
            (Ok(name), _) if !text.contains(['/', '@', ' ']) => Ok(name),
            (Err(_), 0) => Err("the host is empty".into()),
            (Err(_), length) if length > MAX_HOST_NAME_LEN => {
                Err(format!("the host name has {length} bytes: SOCKS5 allows {MAX_HOST_NAME_LEN}"))
            }
            _ => Err(format!("invalid host name {text:?}")),
        }
    }
}

/// DST.ADDR or BND.ADDR (RFC 1928 section 5).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Host {
    /// ATYP 1 or 4.
    Ip(IpAddr),
    /// ATYP 3.
    Name(HostName),
}

/// Parses an IPv4 or IPv6 address, with or without brackets, or a name. An address with a zone becomes a name.
impl FromStr for Host {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let inner = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
        let host = inner.unwrap_or(text);
        match (host.parse(), host.parse::<HostName>()) {
            (Ok(ip), _) => Ok(Self::Ip(ip)),
            (_, Ok(name)) if name.is_zoned_address() => Ok(Self::Name(name)),
            _ if inner.is_some() || text.contains(':') => Err(format!("invalid IPv6 address {text:?}")),
            (_, name) => name.map(Self::Name),
        }
    }
}

/// DST or BND: a host and a port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Addr {
    /// DST.ADDR or BND.ADDR.
    pub host: Host,
    /// DST.PORT or BND.PORT.
    pub port: u16,
}

impl Addr {
    /// 0.0.0.0:0, which means "no address".
    pub const UNSPECIFIED: Self = Self { host: Host::Ip(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), port: 0 };

    /// Parses `host`, `host:port` or `[ipv6]:port`.
    pub fn parse_with_default_port(text: &str, default_port: u16) -> Result<Self, String> {
        Self::parse_with(text, Some(default_port), parse_port)
    }

    /// Like [`Addr::parse_with_default_port`]. `parse_port` may accept more than numbers. Without a default, the port
    /// is required.
    pub fn parse_with(
        text: &str,
        default_port: Option<u16>,
        parse_port: impl Fn(&str) -> Result<u16, String>,
    ) -> Result<Self, String> {
        let (host, port) = split_host_port(text);
        let missing = || format!("expected HOST:PORT or [IPV6]:PORT, found {text:?}");
        let port = match port {
            Some(port) => parse_port(port)?,
            None => default_port.ok_or_else(missing)?,
        };
        Ok(Self { port, host: host.parse()? })
    }

    /// Returns IPv4 instead of IPv4-mapped IPv6, so that addresses can be compared.
    #[must_use]
    pub fn to_canonical(self) -> Self {
        match self.host {
            Host::Ip(ip) => Self { host: Host::Ip(ip.to_canonical()), ..self },
            Host::Name(_) => self,
        }
    }

    /// Length of ATYP, an empty host name (in replies only) and the port.
    pub(super) const MIN_LEN: usize = 1 + 1 + 2;
    /// Length of ATYP, the longest host name with its length byte, and the port.
    pub(super) const MAX_LEN: usize = 1 + 1 + MAX_HOST_NAME_LEN + 2;

    pub(super) fn decode_fields(reader: &mut MessageReader<'_>) -> Result<Self, DecodeError> {
        let host = match reader.byte()? {
            ATYP_IPV4 => Host::Ip(Ipv4Addr::from(reader.array_followed_by::<4>(PORT_LEN)?).into()),
            ATYP_NAME => Host::Name(HostName::new(reader.length_prefixed(PORT_LEN)?)?),
            ATYP_IPV6 => Host::Ip(Ipv6Addr::from(reader.array_followed_by::<16>(PORT_LEN)?).into()),
            other => return Err(ProtocolError::AddressType(other).into()),
        };
        Ok(Self { host, port: u16::from_be_bytes(reader.array()?) })
    }

    pub(super) fn encode_into(&self, out: &mut Vec<u8>) {
        match &self.host {
            Host::Ip(IpAddr::V4(ip)) => out.extend([ATYP_IPV4].into_iter().chain(ip.octets())),
            Host::Ip(IpAddr::V6(ip)) => out.extend([ATYP_IPV6].into_iter().chain(ip.octets())),
            Host::Name(name) => {
                out.push(ATYP_NAME);
                write_length_prefixed(name.as_str().as_bytes(), out);
            }
        }
        out.extend(self.port.to_be_bytes());
    }
}

impl From<SocketAddr> for Addr {
    fn from(addr: SocketAddr) -> Self {
        Self { host: Host::Ip(addr.ip()), port: addr.port() }
    }
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(ip) => SocketAddr::new(*ip, self.port).fmt(f),
            Host::Name(HostName(name)) if name.contains(':') && !name.starts_with('[') => {
                write!(f, "[{name}]:{}", self.port)
            }
            Host::Name(HostName(name)) => write!(f, "{name}:{}", self.port),
        }
    }
}

/// Parses `host:port` or `[ipv6]:port`.
impl FromStr for Addr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::parse_with(text, None, parse_port)
    }
}

/// Splits `host:port`. The port is `None` if there is none. An IPv6 address without brackets has none.
pub fn split_host_port(text: &str) -> (&str, Option<&str>) {
    match text.rsplit_once(':') {
        Some((host, _)) if host.contains(':') && !host.starts_with('[') => (text, None),
        Some((_, port)) if port.ends_with(']') => (text, None),
        Some((host, port)) => (host, Some(port)),
        None => (text, None),
    }
}

/// Parses a port from 0 to 65535.
pub fn parse_port(text: &str) -> Result<u16, String> {
    let port = text.parse().ok().filter(|_| !text.starts_with('+'));
    port.ok_or_else(|| format!("expected a port up to 65535, found {text:?}"))
}

/// A range of ports, `LO-HI` or a single port, from 1 to 65535.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortRange(pub RangeInclusive<u16>);

impl FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let port = |text: &str| parse_port(text).ok().filter(|port| *port != 0);
        let (low, high) = text.split_once('-').unwrap_or((text, text));
        let range = port(low).and_then(|low| Some(low..=port(high)?));
        let range = range.filter(|ports| !ports.is_empty());
        range.map(Self).ok_or_else(|| "expected PORT or LO-HI, ports from 1 to 65535".into())
    }
}

impl PortRange {
    /// Returns the port if there is only one.
    pub fn single(&self) -> Option<u16> {
        (self.0.start() == self.0.end()).then_some(*self.0.start())
    }
}
