//! Status codes and flags of GSSAPI calls. The constants have the names and values of RFC 2744.

use std::fmt;
use std::path::Path;

/// A major status is an error if one of these bits is set. The others are supplementary bits.
pub(super) const ERROR_MASK: u32 = 0xFFFF_0000;
pub(super) const GSS_S_BAD_NAME: u32 = 2 << 16;
const GSS_S_NO_CRED: u32 = 7 << 16;
pub(super) const GSS_S_NO_CONTEXT: u32 = 8 << 16;
pub(super) const GSS_S_DEFECTIVE_TOKEN: u32 = 9 << 16;
const GSS_S_CREDENTIALS_EXPIRED: u32 = 11 << 16;
const GSS_S_CONTEXT_EXPIRED: u32 = 12 << 16;
pub(super) const GSS_S_FAILURE: u32 = 13 << 16;
pub(super) const GSS_S_BAD_QOP: u32 = 14 << 16;
pub(super) const GSS_S_UNAVAILABLE: u32 = 16 << 16;
pub(super) const GSS_S_CONTINUE_NEEDED: u32 = 1;
/// A minor status. MIT's major status for an expired ticket is only [`GSS_S_FAILURE`].
const KRB5KRB_AP_ERR_TKT_EXPIRED: u32 = -1_765_328_352_i32 as u32;

const GSS_C_DELEG_FLAG: u32 = 1;
pub(super) const GSS_C_MUTUAL_FLAG: u32 = 2;
pub(super) const GSS_C_REPLAY_FLAG: u32 = 4;
pub(super) const GSS_C_SEQUENCE_FLAG: u32 = 8;
pub(super) const GSS_C_CONF_FLAG: u32 = 16;
pub(super) const GSS_C_INTEG_FLAG: u32 = 32;
const GSS_C_ANON_FLAG: u32 = 64;

pub(super) type Result<T, E = LibraryError> = std::result::Result<T, E>;

/// Error of the GSSAPI library.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LibraryError {
    /// Message, one line.
    pub text: String,
    /// Major status without supplementary bits.
    pub major: u32,
    pub(super) minor: u32,
}

impl LibraryError {
    pub(super) fn new(major: u32, text: impl Into<String>) -> Self {
        Self { text: text.into(), major, minor: 0 }
    }

    /// Appends the path of the file to the message, unless the library's message contains it.
    pub(super) fn with_path(mut self, path: &Path) -> Self {
        let path = one_line(&path.to_string_lossy());
        if !self.text.contains(&path) {
            self.text = format!("{} ({path})", self.text);
        }
        self
    }

    /// Returns whether a ticket or key is missing.
    pub fn is_no_credential(&self) -> bool {
        self.major == GSS_S_NO_CRED
    }

    /// Returns whether the ticket has expired.
    pub fn is_expired(&self) -> bool {
        matches!(self.major, GSS_S_CREDENTIALS_EXPIRED | GSS_S_CONTEXT_EXPIRED)
            || self.minor == KRB5KRB_AP_ERR_TKT_EXPIRED
    }
}

impl fmt::Display for LibraryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for LibraryError {}

/// Replaces white space and control characters by spaces: the text can contain input from a peer.
pub(super) fn one_line(text: &str) -> String {
    let words = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(" ")
}

/// Properties of a context; all false until it is established.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ContextFlags {
    /// The acceptor has authenticated itself to the initiator.
    pub mutual: bool,
    /// Replayed messages are detected.
    pub replay: bool,
    /// Missing and reordered messages are detected.
    pub sequence: bool,
    /// Messages can be encrypted.
    pub confidentiality: bool,
    /// Messages can be integrity-protected.
    pub integrity: bool,
    /// The initiator is anonymous.
    pub anonymous: bool,
    /// The initiator has delegated its credential.
    pub delegated: bool,
}

impl ContextFlags {
    pub(super) fn new(bits: u32) -> Self {
        let has = |bit| bits & bit != 0;
        Self {
            mutual: has(GSS_C_MUTUAL_FLAG),
            replay: has(GSS_C_REPLAY_FLAG),
            sequence: has(GSS_C_SEQUENCE_FLAG),
            confidentiality: has(GSS_C_CONF_FLAG),
            integrity: has(GSS_C_INTEG_FLAG),
            anonymous: has(GSS_C_ANON_FLAG),
            delegated: has(GSS_C_DELEG_FLAG),
        }
    }
}

/// Position of a message relative to others, as far as the context detects it ([`ContextFlags`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SequenceStatus {
    /// The expected next message.
    InOrder,
    /// Earlier messages are missing.
    Gap,
    /// An earlier message arrives late.
    Unsequenced,
    /// The message was received before.
    Duplicate,
    /// Too old to exclude that it is a duplicate.
    Old,
}

impl SequenceStatus {
    pub(super) fn new(major: u32) -> Self {
        // Ordered by severity: several bits can be set.
        let statuses = [(2, Self::Duplicate), (4, Self::Old), (8, Self::Unsequenced), (16, Self::Gap)];
        statuses.into_iter().find(|(bit, _)| major & bit != 0).map_or(Self::InOrder, |(_, order)| order)
    }
}
