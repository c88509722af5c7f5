//! Encoding and decoding of the messages of RFC 1928 (SOCKS5), RFC 1929 (username/password) and RFC 1961 (GSSAPI),
//! and of the header of the PROXY protocol.
//!
//! A decoder takes the bytes received so far. It returns the message, an error, or how many more bytes certainly
//! belong to the message, so that its caller never reads past the message. Everything here is pure: no I/O, no clock
//! and no policy.

#![deny(clippy::disallowed_types, clippy::disallowed_methods)]

mod addr;
mod codec;
mod codes;
mod gssapi;
mod proxy_header;

use std::fmt;

pub use addr::{Addr, Host, HostName, PortRange, parse_port, split_host_port};
use codec::write_length_prefixed;
pub use codec::{
    AUTH_VERSION, DecodeError, MAX_CREDENTIAL_LEN, MAX_HOST_NAME_LEN, MAX_TOKEN_LEN, Message, MessageReader,
    ProtocolError, VERSION,
};
pub use codes::{Command, Method, OtherProtocol, Rep};
pub use gssapi::{FRAME_HEADER_LEN, Frame, ProtectionLevel};
pub use proxy_header::ProxyHeader;

/// The conventional TCP port of a SOCKS server (RFC 1928 section 3).
pub const DEFAULT_PORT: u16 = 1080;
/// Largest payload of a UDP datagram over IPv4, in bytes.
pub const MAX_UDP4_PAYLOAD: usize = 65_507;
/// Largest payload of a UDP datagram over IPv6, in bytes.
pub const MAX_UDP6_PAYLOAD: usize = 65_527;

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
        reader.expect(VERSION, ProtocolError::Version)?;
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
        reader.expect(VERSION, ProtocolError::Version)?;
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
        reader.expect(AUTH_VERSION, ProtocolError::AuthVersion)?;
        let mut field = || match reader.length_prefixed(0)? {
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
        reader.expect(AUTH_VERSION, ProtocolError::AuthVersion)?;
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
        reader.expect(VERSION, ProtocolError::Version)?;
        let code = reader.byte()?;
        let command = Command::ALL.into_iter().find(|command| *command as u8 == code);
        let command = command.ok_or(ProtocolError::Command(code))?;
        reader.byte()?;
        Ok(Self { command, dst: Addr::decode_fields(reader)? })
    }

    fn encode_into(&self, out: &mut Vec<u8>) {
        out.extend([VERSION, self.command as u8, 0]);
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
        reader.expect(VERSION, ProtocolError::Version)?;
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

    /// Decodes a datagram, which must have a whole header.
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
