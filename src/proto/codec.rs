//! What all messages have in common: the trait, the reader of their fields, and the errors of decoding.

use thiserror::Error;

use super::codes::Rep;

/// VER of RFC 1928.
pub const VERSION: u8 = 5;
/// VER of the sub-negotiations of RFC 1929 and RFC 1961.
pub const AUTH_VERSION: u8 = 1;
/// Longest host name that ATYP 3 can carry, in bytes (RFC 1928 section 5).
pub const MAX_HOST_NAME_LEN: usize = 255;
/// Length of an IPv6 address and a port, in bytes. Most messages are at most this much longer than the shortest one.
const MAX_IP_ADDR_LEN: usize = 18;
/// Longest UNAME or PASSWD, in bytes (RFC 1929 section 2).
pub const MAX_CREDENTIAL_LEN: usize = 255;
/// Longest token that LEN can express, in bytes (RFC 1961 section 3.3).
pub const MAX_TOKEN_LEN: usize = 65_535;

/// Reason why bytes are not a valid message. More bytes can't change it.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ProtocolError {
    /// VER of a greeting, selection, request or reply is not 5.
    #[error("expected SOCKS version 5, found {0}")]
    Version(u8),
    /// VER of a message of RFC 1929 or RFC 1961 is not 1.
    #[error("expected authentication version 1, found {0}")]
    AuthVersion(u8),
    /// MTYP of an RFC 1961 message is none of 1, 2, 3 and FF, or not the expected one.
    #[error("unexpected GSSAPI message type {0}")]
    MessageType(u8),
    /// A token of RFC 1961 has more bytes than LEN can express.
    #[error("token of {0} bytes is too long (at most {MAX_TOKEN_LEN})")]
    TokenLength(usize),
    /// A greeting offers no method.
    #[error("no authentication method offered")]
    NoMethods,
    /// UNAME or PASSWD is empty.
    #[error("empty user name or password")]
    EmptyCredential,
    /// CMD is none of CONNECT, BIND and UDP ASSOCIATE.
    #[error("unknown command {0}")]
    Command(u8),
    /// ATYP is none of 1, 3 and 4.
    #[error("unknown address type {0}")]
    AddressType(u8),
    /// A host name is empty, has a control character or is not UTF-8.
    #[error("invalid host name")]
    InvalidHostName,
    /// A datagram ends within its header.
    #[error("truncated datagram header")]
    TruncatedHeader,
    /// Not a header of the PROXY protocol, or not one that is supported, for this reason.
    #[error("invalid PROXY header: {0}")]
    ProxyHeader(&'static str),
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
        Self::decode_prefix(bytes).map(|(message, _)| message)
    }

    /// Like [`Message::decode`]. Also returns the bytes after the message.
    ///
    /// # Errors
    /// Same as [`Message::decode`].
    fn decode_prefix(bytes: &[u8]) -> Result<(Self, &[u8]), DecodeError> {
        let reader = &mut MessageReader { remaining: bytes, min_missing: Self::MIN_LEN.saturating_sub(bytes.len()) };
        Ok((Self::decode_fields(reader)?, reader.remaining))
    }

    /// Decodes the fields in order. Callers use [`Message::decode`], which has the same errors.
    fn decode_fields(reader: &mut MessageReader<'_>) -> Result<Self, DecodeError>;

    /// Appends the message to `out`.
    fn encode_into(&self, out: &mut Vec<u8>);

    /// Returns the message as bytes.
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::MIN_LEN + MAX_IP_ADDR_LEN);
        self.encode_into(&mut out);
        out
    }
}

/// A cursor over the bytes of a message that may be incomplete.
#[derive(Debug)]
pub struct MessageReader<'a> {
    pub(super) remaining: &'a [u8],
    /// Bytes missing until the shortest message of this type is complete.
    pub(super) min_missing: usize,
}

impl<'a> MessageReader<'a> {
    /// Takes the next `n` bytes. The message has at least `min_after` bytes after them.
    pub(super) fn take(&mut self, n: usize, min_after: usize) -> Result<&'a [u8], DecodeError> {
        let Some((taken, rest)) = self.remaining.split_at_checked(n) else {
            return Err(DecodeError::Incomplete(self.min_missing.max(n + min_after - self.remaining.len())));
        };
        self.remaining = rest;
        Ok(taken)
    }

    pub(super) fn array_followed_by<const N: usize>(&mut self, min_after: usize) -> Result<[u8; N], DecodeError> {
        let taken = self.take(N, min_after)?;
        taken.try_into().map_err(|_| DecodeError::Incomplete(N))
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        self.array_followed_by(0)
    }

    pub(super) fn byte(&mut self) -> Result<u8, DecodeError> {
        Ok(u8::from_be_bytes(self.array()?))
    }

    /// Takes a length byte and that many bytes. The message has at least `min_after` bytes after them.
    pub(super) fn length_prefixed(&mut self, min_after: usize) -> Result<&'a [u8], DecodeError> {
        let length = self.byte()?;
        self.take(length.into(), min_after)
    }

    /// Takes VER. `error` is the error for a value other than `version`.
    pub(super) fn expect(&mut self, version: u8, error: fn(u8) -> ProtocolError) -> Result<(), DecodeError> {
        let found = self.byte()?;
        if found == version { Ok(()) } else { Err(error(found).into()) }
    }
}

/// Appends a length byte and `bytes`. Callers pass at most 255 bytes; more are truncated.
pub(super) fn write_length_prefixed(bytes: &[u8], out: &mut Vec<u8>) {
    let length = u8::try_from(bytes.len()).unwrap_or(u8::MAX);
    out.push(length);
    out.extend(bytes.iter().take(length.into()));
}
