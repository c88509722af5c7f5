//! Every octet of RFC 1928 (SOCKS5) and RFC 1929 (username/password), both directions side by side.
//!
//! A decoder takes the octets that are there and gives a message, an error, or the number of octets that certainly
//! still belong to the message; so whoever reads on its behalf never reads past a message. Nothing here does I/O,
//! reads a clock, knows a socket or decides who may do what.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// VER of RFC 1928.
pub const VERSION: u8 = 5;
/// VER of the RFC 1929 sub-negotiation.
pub const AUTH_VERSION: u8 = 1;
/// Where a SOCKS server listens by convention (RFC 1928 section 3).
pub const DEFAULT_PORT: u16 = 1080;
/// The longest name that ATYP 3 can carry, in octets (section 5).
pub const MAX_NAME: usize = 255;
/// The longest UNAME or PASSWD, in octets (RFC 1929 section 2).
pub const MAX_FIELD: usize = 255;
/// The most octets that one UDP datagram over IPv4 can carry.
pub const MAX_UDP: usize = 65_507;

const ATYP_IPV4: u8 = 1;
const ATYP_NAME: u8 = 3;
const ATYP_IPV6: u8 = 4;

/// What is wrong with octets that can't become a message, whatever follows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// VER of a greeting, selection, request or reply is not 5.
    Version(u8),
    /// VER of an RFC 1929 message is not 1.
    AuthVersion(u8),
    /// A greeting that offers no method.
    NoMethods,
    /// UNAME or PASSWD of length 0.
    EmptyField,
    /// CMD is none of CONNECT, BIND and UDP ASSOCIATE.
    Command(u8),
    /// ATYP is none of 1, 3 and 4.
    Atyp(u8),
    /// A name of length 0, with a NUL or another control octet, or that is not UTF-8.
    Name,
    /// A datagram that ends inside of its header.
    Truncated,
}

impl Error {
    /// The REP that answers a request with this fault (section 6).
    pub fn rep(self) -> Rep {
        match self {
            Self::Command(_) => Rep::COMMAND_NOT_SUPPORTED,
            Self::Atyp(_) => Rep::ATYP_NOT_SUPPORTED,
            _ => Rep::GENERAL_FAILURE,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Version(v) => write!(f, "version {v} instead of 5"),
            Self::AuthVersion(v) => write!(f, "sub-negotiation version {v} instead of 1"),
            Self::NoMethods => write!(f, "no methods offered"),
            Self::EmptyField => write!(f, "empty user name or password"),
            Self::Command(c) => write!(f, "unknown command {c}"),
            Self::Atyp(a) => write!(f, "unknown address type {a}"),
            Self::Name => write!(f, "bad name"),
            Self::Truncated => write!(f, "truncated header"),
        }
    }
}

impl std::error::Error for Error {}

/// Why a decoder gave no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// This many octets, at least 1, certainly follow in the same message.
    Need(usize),
    /// No message starts like this.
    Bad(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Bad(error)
    }
}

/// A message of the handshake.
pub trait Message: Sized {
    /// The length of the shortest message of this kind, in octets.
    const MIN: usize;
    /// The length of the longest message of this kind, in octets.
    const MAX: usize;

    /// Reads the message at the front of `bytes`. Octets behind it are not looked at.
    ///
    /// # Errors
    /// [`Stop::Need`] when `bytes` is a proper prefix of a message, [`Stop::Bad`] when it is of none.
    fn decode(bytes: &[u8]) -> Result<Self, Stop> {
        let reader = &mut Reader { rest: bytes, missing: Self::MIN.saturating_sub(bytes.len()) };
        Self::read(reader)
    }

    /// Reads the fields in their order; [`Message::decode`] is what callers use.
    ///
    /// # Errors
    /// As [`Message::decode`].
    fn read(reader: &mut Reader<'_>) -> Result<Self, Stop>;

    /// Appends the message to `out`.
    fn write(&self, out: &mut Vec<u8>);

    /// The message as octets.
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::MIN);
        self.write(&mut out);
        out
    }
}

/// A position in the octets of a message that may not be whole yet.
#[derive(Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
    /// How many octets short of the shortest message of its kind the whole input is.
    missing: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], Stop> {
        let Some((taken, rest)) = self.rest.split_at_checked(n) else {
            return Err(Stop::Need(self.missing.max(n - self.rest.len())));
        };
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Stop> {
        let taken = self.take(N)?;
        taken.try_into().map_err(|_| Stop::Need(N))
    }

    fn octet(&mut self) -> Result<u8, Stop> {
        Ok(u8::from_be_bytes(self.array()?))
    }

    /// One octet of length, then that many octets.
    fn counted(&mut self) -> Result<&'a [u8], Stop> {
        let length = self.octet()?;
        self.take(length.into())
    }

    fn version(&mut self) -> Result<(), Stop> {
        match self.octet()? {
            VERSION => Ok(()),
            other => Err(Error::Version(other).into()),
        }
    }

    fn auth_version(&mut self) -> Result<(), Stop> {
        match self.octet()? {
            AUTH_VERSION => Ok(()),
            other => Err(Error::AuthVersion(other).into()),
        }
    }
}

/// Appends one octet of length and the octets. What the constructors let in fits; the rest would be cut, not mangled.
fn write_counted(bytes: &[u8], out: &mut Vec<u8>) {
    let length = u8::try_from(bytes.len()).unwrap_or(u8::MAX);
    out.push(length);
    out.extend(bytes.iter().take(length.into()));
}

/// An authentication method (section 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Method(pub u8);

impl Method {
    /// NO AUTHENTICATION REQUIRED.
    pub const NONE: Self = Self(0);
    /// GSSAPI (RFC 1961).
    pub const GSSAPI: Self = Self(1);
    /// USERNAME/PASSWORD (RFC 1929).
    pub const PASSWORD: Self = Self(2);
    /// NO ACCEPTABLE METHODS.
    pub const UNACCEPTABLE: Self = Self(0xff);
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NONE => f.write_str("none"),
            Self::GSSAPI => f.write_str("gssapi"),
            Self::PASSWORD => f.write_str("password"),
            Self::UNACCEPTABLE => f.write_str("no acceptable method"),
            Self(other) => write!(f, "method {other:#04x}"),
        }
    }
}

/// `VER NMETHODS METHODS`: what the client can do (section 3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// 1 to 255 methods, in the client's order.
    pub methods: Vec<Method>,
}

impl Message for Greeting {
    const MIN: usize = 3;
    const MAX: usize = 2 + 255;

    fn read(reader: &mut Reader<'_>) -> Result<Self, Stop> {
        reader.version()?;
        let count = reader.octet()?;
        if count == 0 {
            return Err(Error::NoMethods.into());
        }
        let methods = reader.take(count.into())?.iter().copied().map(Method).collect();
        Ok(Self { methods })
    }

    fn write(&self, out: &mut Vec<u8>) {
        let methods: Vec<u8> = self.methods.iter().map(|method| method.0).collect();
        out.push(VERSION);
        write_counted(&methods, out);
    }
}

/// `VER METHOD`: what the server picked (section 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Selection(pub Method);

impl Message for Selection {
    const MIN: usize = 2;
    const MAX: usize = 2;

    fn read(reader: &mut Reader<'_>) -> Result<Self, Stop> {
        reader.version()?;
        Ok(Self(Method(reader.octet()?)))
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.extend([VERSION, self.0.0]);
    }
}

/// `VER ULEN UNAME PLEN PASSWD` (RFC 1929 section 2). PASSWD is never shown, not even by `{:?}`.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// 1 to 255 octets.
    pub uname: Vec<u8>,
    /// 1 to 255 octets.
    pub passwd: Vec<u8>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({})", self.uname.escape_ascii())
    }
}

impl Message for Credentials {
    const MIN: usize = 5;
    const MAX: usize = 3 + 2 * MAX_FIELD;

    fn read(reader: &mut Reader<'_>) -> Result<Self, Stop> {
        reader.auth_version()?;
        let mut field = || match reader.counted()? {
            [] => Err(Stop::from(Error::EmptyField)),
            octets => Ok(octets.to_vec()),
        };
        Ok(Self { uname: field()?, passwd: field()? })
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.push(AUTH_VERSION);
        write_counted(&self.uname, out);
        write_counted(&self.passwd, out);
    }
}

/// `VER STATUS`: 0 is success, anything else is a failure (RFC 1929 section 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u8);

impl Status {
    /// The login is accepted.
    pub const SUCCESS: Self = Self(0);
    /// The login is refused; the server closes.
    pub const FAILURE: Self = Self(1);
}

impl Message for Status {
    const MIN: usize = 2;
    const MAX: usize = 2;

    fn read(reader: &mut Reader<'_>) -> Result<Self, Stop> {
        reader.auth_version()?;
        Ok(Self(reader.octet()?))
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.extend([AUTH_VERSION, self.0]);
    }
}

/// CMD (section 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// A connection to DST.
    Connect,
    /// A connection from DST.
    Bind,
    /// Datagrams to and from anywhere.
    UdpAssociate,
}

impl Command {
    fn code(self) -> u8 {
        match self {
            Self::Connect => 1,
            Self::Bind => 2,
            Self::UdpAssociate => 3,
        }
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connect => "connect",
            Self::Bind => "bind",
            Self::UdpAssociate => "udp",
        })
    }
}

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
    const MIN: usize = 1 + 1 + 2;
    /// ATYP, length, the longest name, port.
    const MAX: usize = 1 + 1 + MAX_NAME + 2;

    fn read(reader: &mut Reader<'_>) -> Result<Self, Stop> {
        let host = match reader.octet()? {
            ATYP_IPV4 => Host::Ip(Ipv4Addr::from(reader.array::<4>()?).into()),
            ATYP_NAME => Host::Name(Name::new(reader.counted()?)?),
            ATYP_IPV6 => Host::Ip(Ipv6Addr::from(reader.array::<16>()?).into()),
            other => return Err(Error::Atyp(other).into()),
        };
        Ok(Self { host, port: u16::from_be_bytes(reader.array()?) })
    }

    fn write(&self, out: &mut Vec<u8>) {
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

/// `VER CMD RSV ATYP DST.ADDR DST.PORT` (section 4). RSV is sent as 0 and taken as it comes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// CMD.
    pub command: Command,
    /// DST: whereto (CONNECT), from whom (BIND), from where (UDP ASSOCIATE).
    pub dst: Addr,
}

impl Message for Request {
    const MIN: usize = 3 + Addr::MIN + 1;
    const MAX: usize = 3 + Addr::MAX;

    fn read(reader: &mut Reader<'_>) -> Result<Self, Stop> {
        reader.version()?;
        let command = match reader.octet()? {
            1 => Command::Connect,
            2 => Command::Bind,
            3 => Command::UdpAssociate,
            other => return Err(Error::Command(other).into()),
        };
        reader.octet()?;
        Ok(Self { command, dst: Addr::read(reader)? })
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.extend([VERSION, self.command.code(), 0]);
        self.dst.write(out);
    }
}

/// REP (section 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rep(pub u8);

macro_rules! reps {
    ($($code:literal $name:ident $text:literal)*) => {
        impl Rep {
            $(#[doc = concat!("X'", stringify!($code), "': ", $text, ".")] pub const $name: Self = Self($code);)*
        }
        impl fmt::Display for Rep {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self.0 {
                    $($code => f.write_str($text),)*
                    _ => f.write_str("unassigned reply code"),
                }
            }
        }
    };
}

reps! {
    0 SUCCEEDED "succeeded"
    1 GENERAL_FAILURE "general SOCKS server failure"
    2 NOT_ALLOWED "not allowed by ruleset"
    3 NETWORK_UNREACHABLE "network unreachable"
    4 HOST_UNREACHABLE "host unreachable"
    5 REFUSED "connection refused"
    6 TTL_EXPIRED "TTL expired"
    7 COMMAND_NOT_SUPPORTED "command not supported"
    8 ATYP_NOT_SUPPORTED "address type not supported"
}

/// `VER REP RSV ATYP BND.ADDR BND.PORT` (section 6).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// REP.
    pub rep: Rep,
    /// BND. A name of length 0, which some servers send, is read as [`Addr::UNSPECIFIED`].
    pub bnd: Addr,
}

impl Message for Reply {
    const MIN: usize = 3 + Addr::MIN;
    const MAX: usize = 3 + Addr::MAX;

    fn read(reader: &mut Reader<'_>) -> Result<Self, Stop> {
        reader.version()?;
        let rep = Rep(reader.octet()?);
        reader.octet()?;
        if let [ATYP_NAME, 0, rest @ ..] = reader.rest {
            reader.rest = rest;
            reader.array::<2>()?;
            return Ok(Self { rep, bnd: Addr::UNSPECIFIED });
        }
        Ok(Self { rep, bnd: Addr::read(reader)? })
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.extend([VERSION, self.rep.0, 0]);
        self.bnd.write(out);
    }
}

/// `RSV FRAG ATYP DST.ADDR DST.PORT DATA` (section 7). RSV is sent as 0 and taken as it comes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datagram<'a> {
    /// 0 stands alone; else a position from 1, with the high bit on the last one.
    pub frag: u8,
    /// Whereto on the way out, from whom on the way back.
    pub dst: Addr,
    /// The payload.
    pub data: &'a [u8],
}

impl<'a> Datagram<'a> {
    /// The longest header, in octets: RSV, FRAG and a name of 255 octets.
    pub const MAX_HEADER: usize = 3 + Addr::MAX;

    /// # Errors
    /// What is wrong with the header.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, Error> {
        let reader = &mut Reader { rest: bytes, missing: 0 };
        let mut read = || {
            reader.array::<2>()?;
            Ok(Self { frag: reader.octet()?, dst: Addr::read(reader)?, data: reader.rest })
        };
        read().map_err(|stop| match stop {
            Stop::Need(_) => Error::Truncated,
            Stop::Bad(error) => error,
        })
    }

    /// Appends header and payload to `out`.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.extend([0, 0, self.frag]);
        self.dst.write(out);
        out.extend(self.data);
    }
}

/// What speaks another protocol, judged by the first octet that it sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Foreign(pub u8);

impl Foreign {
    /// The answer in the other protocol that says no; empty where it has none.
    pub fn rejection(self) -> &'static [u8] {
        match self.0 {
            4 => &[0, 0x5b, 0, 0, 0, 0, 0, 0],
            b'A'..=b'Z' => {
                b"HTTP/1.0 501 Not Implemented\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n\
                  This is a SOCKS5 proxy, not an HTTP server or proxy. Use it as socks5h://HOST:PORT.\n"
            }
            _ => &[],
        }
    }
}

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let guess = match self.0 {
            0 | 4 => ", SOCKS4?",
            0x15 | 0x16 => ", TLS?",
            b'S' => ", SSH?",
            b'A'..=b'Z' => ", HTTP?",
            _ => "",
        };
        match self.0 {
            octet if octet.is_ascii_graphic() => write!(f, "{octet:#04x} '{}'{guess}", char::from(octet)),
            octet => write!(f, "{octet:#04x}{guess}"),
        }
    }
}
