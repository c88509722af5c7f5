//! Addresses as encoded in messages: ATYP, an IP address or host name, and a port (RFC 1928 section 5).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{DecodeError, MAX_HOST_NAME_LEN, MessageReader, ProtocolError, write_length_prefixed};

const ATYP_IPV4: u8 = 1;
const ATYP_NAME: u8 = 3;
const ATYP_IPV6: u8 = 4;
/// Length of the port that follows every address, in bytes.
const PORT_LEN: usize = 2;

/// A host name (ATYP 3): 1 to 255 bytes of UTF-8 without control characters. It may be invalid in DNS.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostName(Box<str>);

impl HostName {
    /// # Errors
    /// [`ProtocolError::InvalidHostName`].
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
}

/// DST.ADDR or BND.ADDR (RFC 1928 section 5).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Host {
    /// ATYP 1 or 4.
    Ip(IpAddr),
    /// ATYP 3.
    Name(HostName),
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

    /// Length of ATYP, an empty host name (in replies only) and the port.
    pub(super) const MIN_LEN: usize = 1 + 1 + 2;
    /// Length of ATYP, the longest host name with its length byte, and the port.
    pub(super) const MAX_LEN: usize = 1 + 1 + MAX_HOST_NAME_LEN + 2;

    pub(super) fn decode_fields(reader: &mut MessageReader<'_>) -> Result<Self, DecodeError> {
        let host = match reader.byte()? {
            ATYP_IPV4 => Host::Ip(Ipv4Addr::from(reader.array_followed_by::<4>(PORT_LEN)?).into()),
            ATYP_NAME => Host::Name(HostName::new(reader.length_prefixed_followed_by(PORT_LEN)?)?),
            ATYP_IPV6 => Host::Ip(Ipv6Addr::from(reader.array_followed_by::<16>(PORT_LEN)?).into()),
            other => return Err(ProtocolError::AddressType(other).into()),
        };
        Ok(Self { host, port: u16::from_be_bytes(reader.array()?) })
    }

    pub(super) fn encode_into(&self, out: &mut Vec<u8>) {
        match &self.host {
            Host::Ip(IpAddr::V4(ip)) => {
                out.push(ATYP_IPV4);
                out.extend(ip.octets());
            }
            Host::Name(name) => {
                out.push(ATYP_NAME);
                write_length_prefixed(name.as_str().as_bytes(), out);
            }
            Host::Ip(IpAddr::V6(ip)) => {
                out.push(ATYP_IPV6);
                out.extend(ip.octets());
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
            Host::Name(name) => write!(f, "{}:{}", name.as_str(), self.port),
        }
    }
}
