//! Every octet of RFC 1928 (SOCKS5), RFC 1929 (username/password) and RFC 1961 (GSSAPI), both directions side by side.
//!
//! A decoder takes the octets that are there and gives a message, an error, or the number of octets that certainly
//! still belong to the message; so whoever reads on its behalf never reads past a message. Nothing here does I/O,
//! reads a clock, knows a socket or decides who may do what.

mod addr;
mod codes;
mod frame;

use std::fmt;

pub use addr::{Addr, Host, Name};
pub use codes::{Command, Foreign, Method, Rep};
pub use frame::{FRAME_HEADER, Frame, Level, MAX_TOKEN};

/// VER of RFC 1928.
pub const VERSION: u8 = 5;
/// VER of the sub-negotiations of RFC 1929 and RFC 1961.
pub const AUTH_VERSION: u8 = 1;
/// Where a SOCKS server listens by convention (RFC 1928 section 3).
pub const DEFAULT_PORT: u16 = 1080;
/// The longest name that ATYP 3 can carry, in octets (section 5).
pub const MAX_NAME: usize = 255;
/// The longest UNAME or PASSWD, in octets (RFC 1929 section 2).
pub const MAX_FIELD: usize = 255;
/// The most octets that one UDP datagram over IPv4 can carry.
pub const MAX_UDP: usize = 65_507;
/// The most octets that one UDP datagram over IPv6 can carry.
pub const MAX_UDP6: usize = 65_527;

/// What is wrong with octets that can't become a message, whatever follows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// VER of a greeting, selection, request or reply is not 5.
    Version(u8),
    /// VER of a message of RFC 1929 or RFC 1961 is not 1.
    AuthVersion(u8),
    /// MTYP of an RFC 1961 message is none of 1, 2, 3 and FF, or not the one that belongs here.
    Mtyp(u8),
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
            Self::Mtyp(m) => write!(f, "message type {m} out of place"),
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
    /// The next `n` octets, behind which `more` certainly follow.
    fn take(&mut self, n: usize, more: usize) -> Result<&'a [u8], Stop> {
        let Some((taken, rest)) = self.rest.split_at_checked(n) else {
            return Err(Stop::Need(self.missing.max(n + more - self.rest.len())));
        };
        self.rest = rest;
        Ok(taken)
    }

    fn array_before<const N: usize>(&mut self, more: usize) -> Result<[u8; N], Stop> {
        let taken = self.take(N, more)?;
        taken.try_into().map_err(|_| Stop::Need(N))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Stop> {
        self.array_before(0)
    }

    fn octet(&mut self) -> Result<u8, Stop> {
        Ok(u8::from_be_bytes(self.array()?))
    }

    /// One octet of length, then that many octets, behind which `more` follow.
    fn counted_before(&mut self, more: usize) -> Result<&'a [u8], Stop> {
        let length = self.octet()?;
        self.take(length.into(), more)
    }

    fn counted(&mut self) -> Result<&'a [u8], Stop> {
        self.counted_before(0)
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
        let methods = reader.take(count.into(), 0)?.iter().copied().map(Method).collect();
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

/// `VER REP RSV ATYP BND.ADDR BND.PORT` (section 6).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// REP.
    pub rep: Rep,
    /// BND. A name that is none, of length 0 for one, is read as [`Addr::UNSPECIFIED`]: some servers send such, and
    /// nothing depends on it.
    pub bnd: Addr,
}

impl Message for Reply {
    const MIN: usize = 3 + Addr::MIN;
    const MAX: usize = 3 + Addr::MAX;

    fn read(reader: &mut Reader<'_>) -> Result<Self, Stop> {
        reader.version()?;
        let rep = Rep(reader.octet()?);
        reader.octet()?;
        let bnd = match Addr::read(reader) {
            Err(Stop::Bad(Error::Name)) => reader.array::<2>().map(|_| Addr::UNSPECIFIED)?,
            bnd => bnd?,
        };
        Ok(Self { rep, bnd })
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
