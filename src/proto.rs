//! Encoding and decoding of the messages of RFC 1928 (SOCKS5), RFC 1929 (username/password) and RFC 1961 (GSSAPI).
//!
//! A decoder takes the bytes received so far. It returns the message, an error, or how many more bytes certainly
//! belong to the message, so that its caller never reads past the message. Everything here is pure: no I/O, no clock
//! and no policy.

mod addr;
mod codes;
mod gssapi;

use std::fmt;

pub use addr::{Addr, Host, HostName, PortRange, parse_port, split_host_port};
pub use codes::{Command, Method, OtherProtocol, Rep};
pub use gssapi::{FRAME_HEADER_LEN, Frame, MAX_TOKEN_LEN, ProtectionLevel};

/// VER of RFC 1928.
pub const VERSION: u8 = 5;
/// VER of the sub-negotiations of RFC 1929 and RFC 1961.
pub const AUTH_VERSION: u8 = 1;
/// The conventional TCP port of a SOCKS server (RFC 1928 section 3).
pub const DEFAULT_PORT: u16 = 1080;
/// Longest host name that ATYP 3 can carry, in bytes (RFC 1928 section 5).
pub const MAX_HOST_NAME_LEN: usize = 255;
/// Longest UNAME or PASSWD, in bytes (RFC 1929 section 2).
pub const MAX_CREDENTIAL_LEN: usize = 255;
/// Largest payload of a UDP datagram over IPv4, in bytes.
pub const MAX_UDP4_PAYLOAD: usize = 65_507;
/// Largest payload of a UDP datagram over IPv6, in bytes.
pub const MAX_UDP6_PAYLOAD: usize = 65_527;

/// Reason why bytes are not a valid message. More bytes can't change it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProtocolError {
    /// VER of a greeting, selection, request or reply is not 5.
    Version(u8),
    /// VER of a message of RFC 1929 or RFC 1961 is not 1.
    AuthVersion(u8),
    /// MTYP of an RFC 1961 message is none of 1, 2, 3 and FF, or not the expected one.
    MessageType(u8),
    /// A token of RFC 1961 has more bytes than LEN can express.
    TokenLength(usize),
    /// A greeting offers no method.
    NoMethods,
    /// UNAME or PASSWD is empty.
    EmptyCredential,
    /// CMD is none of CONNECT, BIND and UDP ASSOCIATE.
    Command(u8),
    /// ATYP is none of 1, 3 and 4.
    AddressType(u8),
    /// A host name is empty, has a control character or is not UTF-8.
    InvalidHostName,
    /// A datagram ends within its header.
    TruncatedHeader,
}

impl ProtocolError {
    /// Reply code for a request with this error (RFC 1928 section 6).
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
            Self::Version(v) => write!(f, "expected SOCKS version 5, found {v}"),
            Self::AuthVersion(v) => write!(f, "expected authentication version 1, found {v}"),
            Self::MessageType(m) => write!(f, "unexpected GSSAPI message type {m}"),
            Self::TokenLength(n) => write!(f, "token of {n} bytes is too long (at most {MAX_TOKEN_LEN})"),
            Self::NoMethods => write!(f, "no authentication method offered"),
            Self::EmptyCredential => write!(f, "empty user name or password"),
            Self::Command(c) => write!(f, "unknown command {c}"),
            Self::AddressType(a) => write!(f, "unknown address type {a}"),
            Self::InvalidHostName => write!(f, "invalid host name"),
            Self::TruncatedHeader => write!(f, "truncated datagram header"),
        }
    }
}

impl std::error::Error for ProtocolError {}

/// Reason why a decoder returned no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// The bytes are the start of a message, and at least this many more belong to it. Never 0.
    Incomplete(usize),
    /// No valid message starts with these bytes.
    Invalid(ProtocolError),
}

impl From<ProtocolError> for DecodeError {
    fn from(error: ProtocolError) -> Self {
        Self::Invalid(error)
    }
}

/// A message of the handshake.
pub trait Message: Sized {
    /// Length of the shortest message of this type, in bytes.
    const MIN_LEN: usize;
    /// Length of the longest message of this type, in bytes.
    const MAX_LEN: usize;

    /// Decodes the message at the start of `bytes`. Bytes after the message are ignored.
    ///
    /// # Errors
    /// [`DecodeError::Incomplete`] if `bytes` is a proper prefix of a message, else [`DecodeError::Invalid`].
    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let reader = &mut MessageReader { remaining: bytes, min_missing: Self::MIN_LEN.saturating_sub(bytes.len()) };
        Self::decode_fields(reader)
    }

    /// Decodes the fields in order. Callers use [`Message::decode`].
    ///
    /// # Errors
    /// Same as [`Message::decode`].
    fn decode_fields(reader: &mut MessageReader<'_>) -> Result<Self, DecodeError>;

    /// Appends the message to `out`.
    fn encode_into(&self, out: &mut Vec<u8>);

    /// Returns the message as bytes.
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::MIN_LEN);
        self.encode_into(&mut out);
        out
    }
}

/// A cursor over the bytes of a message that may be incomplete.
#[derive(Debug)]
pub struct MessageReader<'a> {
    remaining: &'a [u8],
    /// Bytes missing until the shortest message of this type is complete.
    min_missing: usize,
}

impl<'a> MessageReader<'a> {
    /// Takes the next `n` bytes. The message has at least `min_after` bytes after them.
    fn take(&mut self, n: usize, min_after: usize) -> Result<&'a [u8], DecodeError> {
        let Some((taken, rest)) = self.remaining.split_at_checked(n) else {
            return Err(DecodeError::Incomplete(self.min_missing.max(n + min_after - self.remaining.len())));
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

    /// Takes a length byte and that many bytes. The message has at least `min_after` bytes after them.
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

/// Appends a length byte and `bytes`. Callers pass at most 255 bytes; more are truncated.
fn write_length_prefixed(bytes: &[u8], out: &mut Vec<u8>) {
    let length = u8::try_from(bytes.len()).unwrap_or(u8::MAX);
    out.push(length);
    out.extend(bytes.iter().take(length.into()));
}

/// `VER NMETHODS METHODS`: the authentication methods that the client offers (RFC 1928 section 3).
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

/// `VER METHOD`: the method that the server selects (RFC 1928 section 3).
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

/// `VER ULEN UNAME PLEN PASSWD` (RFC 1929 section 2). `Debug` omits PASSWD.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// 1 to 255 bytes.
    pub uname: Vec<u8>,
    /// 1 to 255 bytes.
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
            bytes => Ok(bytes.to_vec()),
        };
        Ok(Self { uname: field()?, passwd: field()? })
    }

    fn encode_into(&self, out: &mut Vec<u8>) {
        out.push(AUTH_VERSION);
        write_length_prefixed(&self.uname, out);
        write_length_prefixed(&self.passwd, out);
    }
}

/// `VER STATUS`: 0 is success, any other value is failure (RFC 1929 section 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoginStatus(pub u8);

impl LoginStatus {
    /// The login is accepted.
    pub const SUCCESS: Self = Self(0);
    /// The login is refused, and the server closes the connection (RFC 1929 section 2).
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

/// `VER CMD RSV ATYP DST.ADDR DST.PORT` (RFC 1928 section 4). RSV is sent as 0 and ignored when received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// CMD.
    pub command: Command,
    /// DST: the target (CONNECT), the expected peer (BIND) or the client's UDP address (UDP ASSOCIATE).
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

/// `VER REP RSV ATYP BND.ADDR BND.PORT` (RFC 1928 section 6).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// REP.
    pub rep: Rep,
    /// BND. An invalid host name decodes as [`Addr::UNSPECIFIED`]: some servers send an empty one.
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

/// `RSV FRAG ATYP DST.ADDR DST.PORT DATA` (RFC 1928 section 7). RSV is sent as 0 and ignored when received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datagram<'a> {
    /// 0 for a complete datagram, else the fragment's position from 1. The last fragment has the high bit set.
    pub frag: u8,
    /// The target of a datagram from the client, or the sender of a datagram to the client.
    pub dst: Addr,
    /// The payload.
    pub data: &'a [u8],
}

impl<'a> Datagram<'a> {
    /// Length of the longest header, in bytes: RSV, FRAG and a host name of 255 bytes.
    pub const MAX_HEADER_LEN: usize = 3 + Addr::MAX_LEN;

    /// # Errors
    /// The header is invalid or truncated.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, ProtocolError> {
        let reader = &mut MessageReader { remaining: bytes, min_missing: 0 };
        let mut decode = || {
            reader.array::<2>()?;
            Ok(Self { frag: reader.byte()?, dst: Addr::decode_fields(reader)?, data: reader.remaining })
        };
        decode().map_err(|error| match error {
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
