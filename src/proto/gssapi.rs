//! The messages of RFC 1961, `VER MTYP LEN TOKEN`, and the protection levels. Tokens are opaque here.

use std::fmt;
use std::str::FromStr;

use super::codec::{AUTH_VERSION, DecodeError, MAX_TOKEN_LEN, Message, MessageReader, ProtocolError};
use super::codes::from_name;

/// Length of VER, MTYP and LEN, in bytes.
pub const FRAME_HEADER_LEN: usize = 4;

const AUTHENTICATION: u8 = 1;
const PROTECTION: u8 = 2;
const DATA: u8 = 3;
const ABORT: u8 = 0xFF;

/// A message of RFC 1961. `Debug` omits the token.
#[derive(Clone, PartialEq, Eq)]
pub enum Frame {
    /// MTYP 1: a token of gss_init_sec_context or gss_accept_sec_context (RFC 1961 section 3.3).
    Authentication(Vec<u8>),
    /// MTYP 2: the requested or granted protection level, wrapped (RFC 1961 section 4.3).
    Protection(Vec<u8>),
    /// MTYP 3: wrapped data (RFC 1961 section 5).
    Data(Vec<u8>),
    /// MTYP FF, without LEN and TOKEN: the sender refuses the context (RFC 1961 section 3.8).
    Abort,
}

impl Frame {
    fn message_type_and_token(&self) -> (u8, &[u8]) {
        match self {
            Self::Authentication(token) => (AUTHENTICATION, token),
            Self::Protection(token) => (PROTECTION, token),
            Self::Data(token) => (DATA, token),
            Self::Abort => (ABORT, &[]),
        }
    }

    /// Checks that LEN can express the length of the token. A longer token must not be sent.
    pub fn check_len(&self) -> Result<(), ProtocolError> {
        match self.message_type_and_token().1.len() {
            0..=MAX_TOKEN_LEN => Ok(()),
            length => Err(ProtocolError::TokenLength(length)),
        }
    }

    /// Returns the token of a datagram, if the datagram is one whole data frame.
    pub fn datagram_token(bytes: &mut [u8]) -> Option<&mut [u8]> {
        let is_whole = Self::data_frame_len(bytes) == Ok(Some(bytes.len()));
        bytes.get_mut(FRAME_HEADER_LEN..).filter(|_| is_whole)
    }

    /// Returns the length of the data frame at the start of `bytes`, in bytes; `None` if its header is incomplete.
    /// Fails if `bytes` start with a message of another type or version.
    pub fn data_frame_len(bytes: &[u8]) -> Result<Option<usize>, ProtocolError> {
        match *bytes {
            [version, ..] if version != AUTH_VERSION => Err(ProtocolError::AuthVersion(version)),
            [_, mtyp, ..] if mtyp != DATA => Err(ProtocolError::MessageType(mtyp)),
            [_, _, high, low, ..] => Ok(Some(FRAME_HEADER_LEN + usize::from(u16::from_be_bytes([high, low])))),
            _ => Ok(None),
        }
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mtyp, token) = self.message_type_and_token();
        write!(f, "GSSAPI message of type {mtyp} with {} bytes", token.len())
    }
}

impl Message for Frame {
    const MIN_LEN: usize = 2;
    const MAX_LEN: usize = FRAME_HEADER_LEN + MAX_TOKEN_LEN;

    fn decode_fields(reader: &mut MessageReader<'_>) -> Result<Self, DecodeError> {
        reader.expect(AUTH_VERSION, ProtocolError::AuthVersion)?;
        let make = match reader.byte()? {
            ABORT => return Ok(Self::Abort),
            AUTHENTICATION => Self::Authentication,
            PROTECTION => Self::Protection,
            DATA => Self::Data,
            other => return Err(ProtocolError::MessageType(other).into()),
        };
        let length = u16::from_be_bytes(reader.array()?);
        Ok(make(reader.take(length.into(), 0)?.to_vec()))
    }

    // The sender checks the length with `check_len`.
    fn encode_into(&self, out: &mut Vec<u8>) {
        let (mtyp, token) = self.message_type_and_token();
        out.extend([AUTH_VERSION, mtyp]);
        if mtyp != ABORT {
            let length = u16::try_from(token.len()).unwrap_or(u16::MAX);
            out.extend(length.to_be_bytes());
            out.extend(token.iter().take(length.into()));
        }
    }
}

/// Protection of the data after the login (RFC 1961 section 4.3), ordered by strength.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ProtectionLevel {
    /// No protection. The RFC has no such level; NEC, Dante and curl use the code 0 for it.
    None = 0,
    /// Changes are detected.
    Integrity = 1,
    /// Changes are detected, and the data is encrypted.
    Confidentiality = 2,
}

impl ProtectionLevel {
    /// All levels except "selective" (3), which no implementation is known to support.
    pub const ALL: [Self; 3] = [Self::None, Self::Integrity, Self::Confidentiality];

    /// Returns the level with this code in messages.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|level| *level as u8 == code)
    }
}

impl fmt::Display for ProtectionLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Integrity => "integrity",
            Self::Confidentiality => "confidentiality",
        })
    }
}

impl FromStr for ProtectionLevel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        from_name(text, &Self::ALL, "none, integrity or confidentiality")
    }
}
