//! Every octet of RFC 1928 (SOCKS5), RFC 1929 (username/password) and RFC 1961 (GSSAPI), both directions side by side.
//!
//! A decoder takes the octets that are there and gives a message, an error, or the number of octets that certainly
//! still belong to the message; so whoever reads on its behalf never reads past a message. Nothing here does I/O,
//! reads a clock, knows a socket or decides who may do what.

mod addr;
mod codes;
mod gssapi;

use std::fmt;

pub use addr::{Addr, Host, HostName};
pub use codes::{Command, Method, OtherProtocol, Rep};
pub use gssapi::{FRAME_HEADER_LEN, Frame, MAX_TOKEN_LEN, ProtectionLevel};

/// VER of RFC 1928.
pub const VERSION: u8 = 5;
/// VER of the sub-negotiations of RFC 1929 and RFC 1961.
pub const AUTH_VERSION: u8 = 1;
/// Where a SOCKS server listens by convention (RFC 1928 section 3).
pub const DEFAULT_PORT: u16 = 1080;
/// The longest name that ATYP 3 can carry, in octets (section 5).
pub const MAX_HOST_NAME_LEN: usize = 255;
/// The longest UNAME or PASSWD, in octets (RFC 1929 section 2).
pub const MAX_CREDENTIAL_LEN: usize = 255;
/// The most octets that one UDP datagram over IPv4 can carry.
pub const MAX_UDP4_PAYLOAD: usize = 65_507;
/// The most octets that one UDP datagram over IPv6 can carry.
pub const MAX_UDP6_PAYLOAD: usize = 65_527;

/// What is wrong with octets that can't become a message, whatever follows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProtocolError {
    /// VER of a greeting, selection, request or reply is not 5.
    Version(u8),
    /// VER of a message of RFC 1929 or RFC 1961 is not 1.
    AuthVersion(u8),
    /// MTYP of an RFC 1961 message is none of 1, 2, 3 and FF, or not the one that belongs here.
    MessageType(u8),
    /// A greeting that offers no method.
    NoMethods,
    /// UNAME or PASSWD of length 0.
    EmptyCredential,
    /// CMD is none of CONNECT, BIND and UDP ASSOCIATE.
    Command(u8),
    /// ATYP is none of 1, 3 and 4.
    AddressType(u8),
    /// A name of length 0, with a NUL or another control octet, or that is not UTF-8.
    InvalidHostName,
    /// A datagram that ends inside of its header.
    TruncatedHeader,
}

impl ProtocolError {
    /// The REP that answers a request with this fault (section 6).
    pub fn rep(self) -> Rep {
        match self {
            Self::Command(_) => Rep::COMMAND_NOT_SUPPORTED,
            Self::AddressType(_) => Rep::ATYP_NOT_SUPPORTED,
            _ => Rep::GENERAL_FAILURE,
        }
    }
}

impl fmt::Display for ProtocolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Version(v) => write!(f, "version {v} instead of 5"),
            Self::AuthVersion(v) => write!(f, "sub-negotiation version {v} instead of 1"),
            Self::MessageType(m) => write!(f, "message type {m} out of place"),
            Self::NoMethods => write!(f, "no methods offered"),
            Self::EmptyCredential => write!(f, "empty user name or password"),
            Self::Command(c) => write!(f, "unknown command {c}"),
            Self::AddressType(a) => write!(f, "unknown address type {a}"),
            Self::InvalidHostName => write!(f, "bad name"),
            Self::TruncatedHeader => write!(f, "truncated header"),
        }
    }
}

impl std::error::Error for ProtocolError {}

/// Why a decoder gave no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// This many octets, at least 1, certainly follow in the same message.
    Incomplete(usize),
    /// No message starts like this.
    Invalid(ProtocolError),
}

impl From<ProtocolError> for DecodeError {
    fn from(error: ProtocolError) -> Self {
        Self::Invalid(error)
    }
}

/// A message of the handshake.
pub trait Message: Sized {
    /// The length of the shortest message of this kind, in octets.
    const MIN_LEN: usize;
    /// The length of the longest message of this kind, in octets.
    const MAX_LEN: usize;

    /// Reads the message at the front of `bytes`. Octets behind it are not looked at.
    ///
    /// # Errors
    /// [`DecodeError::Incomplete`] when `bytes` is a proper prefix of a message, [`DecodeError::Invalid`] when it is of
    /// none.
    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let reader = &mut MessageReader { remaining: bytes, missing: Self::MIN_LEN.saturating_sub(bytes.len()) };
        Self::decode_fields(reader)
    }

    /// Reads the fields in their order; [`Message::decode`] is what callers use.
    ///
    /// # Errors
    /// As [`Message::decode`].
    fn decode_fields(reader: &mut MessageReader<'_>) -> Result<Self, DecodeError>;

    /// Appends the message to `out`.
    fn encode_into(&self, out: &mut Vec<u8>);

    /// The message as octets.
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::MIN_LEN);
        self.encode_into(&mut out);
        out
    }
}

/// A position in the octets of a message that may not be whole yet.
#[derive(Debug)]
pub struct MessageReader<'a> {
    remaining: &'a [u8],
    /// How many octets short of the shortest message of its kind the whole input is.
    missing: usize,
}

impl<'a> MessageReader<'a> {
    /// The next `n` octets, behind which `more` certainly follow.
    fn take(&mut self, n: usize, min_after: usize) -> Result<&'a [u8], DecodeError> {
        let Some((taken, rest)) = self.remaining.split_at_checked(n) else {
            return Err(DecodeError::Incomplete(self.missing.max(n + min_after - self.remaining.len())));
        };
        self.remaining = rest;
        Ok(taken)
    }

    fn array_followed_by<const N: usize>(&mut self, min_after: usize) -> Result<[u8; N], DecodeError> {
        let taken = self.take(N, min_after)?;
        taken.try_into().map_err(|_| DecodeError::Incomplete(N))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        self.array_followed_by(0)
    }

    fn byte(&mut self) -> Result<u8, DecodeError> {
        Ok(u8::from_be_bytes(self.array()?))
    }

    /// One octet of length, then that many octets, behind which `more` follow.
    fn length_prefixed_followed_by(&mut self, min_after: usize) -> Result<&'a [u8], DecodeError> {
        let length = self.byte()?;
        self.take(length.into(), min_after)
    }

    fn length_prefixed(&mut self) -> Result<&'a [u8], DecodeError> {
        self.length_prefixed_followed_by(0)
    }

    fn expect_version(&mut self) -> Result<(), DecodeError> {
        match self.byte()? {
            VERSION => Ok(()),
            other => Err(ProtocolError::Version(other).into()),
        }
    }

    fn expect_auth_version(&mut self) -> Result<(), DecodeError> {
        match self.byte()? {
            AUTH_VERSION => Ok(()),
            other => Err(ProtocolError::AuthVersion(other).into()),
        }
    }
}

/// Appends one octet of length and the octets. What the constructors let in fits; the rest would be cut, not mangled.
fn write_length_prefixed(bytes: &[u8], out: &mut Vec<u8>) {
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
    const MIN_LEN: usize = 3;
    const MAX_LEN: usize = 2 + 255;

    fn decode_fields(reader: &mut MessageReader<'_>) -> Result<Self, DecodeError> {
        reader.expect_version()?;
        let count = reader.byte()?;
        if count == 0 {
            return Err(ProtocolError::NoMethods.into());
        }
        let methods = reader.take(count.into(), 0)?.iter().copied().map(Method).collect();
        Ok(Self { methods })
    }

    fn encode_into(&self, out: &mut Vec<u8>) {
        let methods: Vec<u8> = self.methods.iter().map(|method| method.0).collect();
        out.push(VERSION);
        write_length_prefixed(&methods, out);
    }
}

/// `VER METHOD`: what the server picked (section 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MethodSelection(pub Method);

impl Message for MethodSelection {
    const MIN_LEN: usize = 2;
    const MAX_LEN: usize = 2;

    fn decode_fields(reader: &mut MessageReader<'_>) -> Result<Self, DecodeError> {
        reader.expect_version()?;
        Ok(Self(Method(reader.byte()?)))
    }

    fn encode_into(&self, out: &mut Vec<u8>) {
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
    const MIN_LEN: usize = 5;
    const MAX_LEN: usize = 3 + 2 * MAX_CREDENTIAL_LEN;

    fn decode_fields(reader: &mut MessageReader<'_>) -> Result<Self, DecodeError> {
        reader.expect_auth_version()?;
        let mut field = || match reader.length_prefixed()? {
            [] => Err(DecodeError::from(ProtocolError::EmptyCredential)),
            octets => Ok(octets.to_vec()),
        };
        Ok(Self { uname: field()?, passwd: field()? })
    }

    fn encode_into(&self, out: &mut Vec<u8>) {
        out.push(AUTH_VERSION);
        write_length_prefixed(&self.uname, out);
        write_length_prefixed(&self.passwd, out);
    }
}

/// `VER STATUS`: 0 is success, anything else is a failure (RFC 1929 section 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoginStatus(pub u8);

impl LoginStatus {
    /// The login is accepted.
    pub const SUCCESS: Self = Self(0);
    /// The login is refused; the server closes.
    pub const FAILURE: Self = Self(1);
}

impl Message for LoginStatus {
    const MIN_LEN: usize = 2;
    const MAX_LEN: usize = 2;

    fn decode_fields(reader: &mut MessageReader<'_>) -> Result<Self, DecodeError> {
        reader.expect_auth_version()?;
        Ok(Self(reader.byte()?))
    }

    fn encode_into(&self, out: &mut Vec<u8>) {
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
    const MIN_LEN: usize = 3 + Addr::MIN_LEN + 1;
    const MAX_LEN: usize = 3 + Addr::MAX_LEN;

    fn decode_fields(reader: &mut MessageReader<'_>) -> Result<Self, DecodeError> {
        reader.expect_version()?;
        let command = match reader.byte()? {
            1 => Command::Connect,
            2 => Command::Bind,
            3 => Command::UdpAssociate,
            other => return Err(ProtocolError::Command(other).into()),
        };
        reader.byte()?;
        Ok(Self { command, dst: Addr::decode_fields(reader)? })
    }

    fn encode_into(&self, out: &mut Vec<u8>) {
        out.extend([VERSION, self.command.code(), 0]);
        self.dst.encode_into(out);
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
    const MIN_LEN: usize = 3 + Addr::MIN_LEN;
    const MAX_LEN: usize = 3 + Addr::MAX_LEN;

    fn decode_fields(reader: &mut MessageReader<'_>) -> Result<Self, DecodeError> {
        reader.expect_version()?;
        let rep = Rep(reader.byte()?);
        reader.byte()?;
        let bnd = match Addr::decode_fields(reader) {
            Err(DecodeError::Invalid(ProtocolError::InvalidHostName)) => {
                reader.array::<2>().map(|_| Addr::UNSPECIFIED)?
            }
            bnd => bnd?,
        };
        Ok(Self { rep, bnd })
    }

    fn encode_into(&self, out: &mut Vec<u8>) {
        out.extend([VERSION, self.rep.0, 0]);
        self.bnd.encode_into(out);
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
    pub const MAX_HEADER_LEN: usize = 3 + Addr::MAX_LEN;

    /// # Errors
    /// What is wrong with the header.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, ProtocolError> {
        let reader = &mut MessageReader { remaining: bytes, missing: 0 };
        let mut read = || {
            reader.array::<2>()?;
            Ok(Self { frag: reader.byte()?, dst: Addr::decode_fields(reader)?, data: reader.remaining })
        };
        read().map_err(|stop| match stop {
            DecodeError::Incomplete(_) => ProtocolError::TruncatedHeader,
            DecodeError::Invalid(error) => error,
        })
    }

    /// Appends header and payload to `out`.
    pub fn encode_into(&self, out: &mut Vec<u8>) {
        out.extend([0, 0, self.frag]);
        self.dst.encode_into(out);
        out.extend(self.data);
    }
}
