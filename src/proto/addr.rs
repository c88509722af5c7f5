//! Addresses on the wire: ATYP, an address or a name, a port (RFC 1928 section 5).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{Error, MAX_NAME, Reader, Stop, write_counted};

const ATYP_IPV4: u8 = 1;
const ATYP_NAME: u8 = 3;
const ATYP_IPV6: u8 = 4;
/// How many octets a port has, which is always behind an address.
const PORT: usize = 2;

/// A name of ATYP 3: 1 to 255 octets of UTF-8 without control characters. Whether a host can have it is another question.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(Box<str>);

impl Name {
    /// # Errors
    /// [`Error::Name`] for octets that are no such name.
    pub fn new(octets: &[u8]) -> Result<Self, Error> {
        match std::str::from_utf8(octets) {
            Ok(text) if (1..=MAX_NAME).contains(&text.len()) && !text.contains(char::is_control) => {
                Ok(Self(text.into()))
            }
            _ => Err(Error::Name),
        }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// DST.ADDR or BND.ADDR (section 5).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Host {
    /// ATYP 1 or 4.
    Ip(IpAddr),
    /// ATYP 3.
    Name(Name),
}

/// A host and a port: DST or BND.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Addr {
    /// DST.ADDR or BND.ADDR.
    pub host: Host,
    /// DST.PORT or BND.PORT.
    pub port: u16,
}

impl Addr {
    /// 0.0.0.0:0: nothing to tell.
    pub const UNSPECIFIED: Self = Self { host: Host::Ip(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), port: 0 };

    /// ATYP, the shortest address (a name of 0 octets, in replies only), port.
    pub(super) const MIN: usize = 1 + 1 + 2;
    /// ATYP, length, the longest name, port.
    pub(super) const MAX: usize = 1 + 1 + MAX_NAME + 2;

    pub(super) fn read(reader: &mut Reader<'_>) -> Result<Self, Stop> {
        let host = match reader.octet()? {
            ATYP_IPV4 => Host::Ip(Ipv4Addr::from(reader.array_before::<4>(PORT)?).into()),
            ATYP_NAME => Host::Name(Name::new(reader.counted_before(PORT)?)?),
            ATYP_IPV6 => Host::Ip(Ipv6Addr::from(reader.array_before::<16>(PORT)?).into()),
            other => return Err(Error::Atyp(other).into()),
        };
        Ok(Self { host, port: u16::from_be_bytes(reader.array()?) })
    }

    pub(super) fn write(&self, out: &mut Vec<u8>) {
        match &self.host {
            Host::Ip(IpAddr::V4(ip)) => {
                out.push(ATYP_IPV4);
                out.extend(ip.octets());
            }
            Host::Name(name) => {
                out.push(ATYP_NAME);
                write_counted(name.as_str().as_bytes(), out);
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
