//! The frames of RFC 1961, `VER MTYP LEN TOKEN`, and the levels of protection. What is in a token is not known here.

use std::fmt;

use super::{AUTH_VERSION, DecodeError, Message, MessageReader, ProtocolError};

/// The most octets that a token can have (RFC 1961 section 3.3): what LEN can say.
pub const MAX_TOKEN_LEN: usize = 65_535;
/// What stands before a token, in octets.
pub const FRAME_HEADER_LEN: usize = 4;

const AUTHENTICATION: u8 = 1;
const PROTECTION: u8 = 2;
const DATA: u8 = 3;
const ABORT: u8 = 0xFF;

/// One message of RFC 1961.
#[derive(Clone, PartialEq, Eq)]
pub enum Frame {
    /// MTYP 1: a token of gss_init_sec_context or gss_accept_sec_context (section 3.3).
    Authentication(Vec<u8>),
    /// MTYP 2: the level asked for or granted, wrapped (section 4.3).
    Protection(Vec<u8>),
    /// MTYP 3: wrapped octets (section 5).
    Data(Vec<u8>),
    /// MTYP FF, which has neither LEN nor TOKEN: the context is refused (section 3.8).
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

    /// The token of the data frame that a datagram is, whole; it may be written to.
    pub fn datagram_token(octets: &mut [u8]) -> Option<&mut [u8]> {
        let (header, token) = octets.split_first_chunk_mut::<FRAME_HEADER_LEN>()?;
        let [version, mtyp, high, low] = *header;
        let is_whole = usize::from(u16::from_be_bytes([high, low])) == token.len();
        (version == AUTH_VERSION && mtyp == DATA && is_whole).then_some(token)
    }

    /// How long the data frame is that begins with these octets, when that can be told.
    ///
    /// # Errors
    /// No data frame begins so.
    pub fn data_frame_len(octets: &[u8]) -> Result<Option<usize>, ProtocolError> {
        match *octets {
            [version, ..] if version != AUTH_VERSION => Err(ProtocolError::AuthVersion(version)),
            [_, mtyp, ..] if mtyp != DATA => Err(ProtocolError::MessageType(mtyp)),
            [_, _, high, low, ..] => Ok(Some(FRAME_HEADER_LEN + usize::from(u16::from_be_bytes([high, low])))),
            _ => Ok(None),
        }
    }
}

/// Tokens are not shown.
impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mtyp, token) = self.message_type_and_token();
        write!(f, "Frame({mtyp}, {} octets)", token.len())
    }
}

impl Message for Frame {
    const MIN_LEN: usize = 2;
    const MAX_LEN: usize = FRAME_HEADER_LEN + MAX_TOKEN_LEN;

    fn decode_fields(reader: &mut MessageReader<'_>) -> Result<Self, DecodeError> {
        reader.expect_auth_version()?;
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

    /// A token that is too long is cut, not mangled; none that GSSAPI was told the limit of is.
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

/// How octets are protected once a context is there (RFC 1961 section 4.3). Ordered by strength.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ProtectionLevel {
    /// Not at all. Not in the RFC; what NEC, Dante and curl mean by 0.
    None,
    /// Nobody changes them unseen.
    Integrity,
    /// And nobody reads them.
    Confidentiality,
}

impl ProtectionLevel {
    /// All there are, but for "selective" (3), which nobody speaks.
    pub const ALL: [Self; 3] = [Self::None, Self::Integrity, Self::Confidentiality];

    /// The octet that means it.
    pub fn code(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Integrity => 1,
            Self::Confidentiality => 2,
        }
    }

    /// The level of that octet.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|level| level.code() == code)
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
