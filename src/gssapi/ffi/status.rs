//! What the calls of GSSAPI say besides their data: errors, remarks on a message, and what a context protects. Numbers
//! are those of RFC 2744.

use std::fmt;
use std::path::Path;

/// An upper half that is not 0 is an error, any bit of the lower half a remark.
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
/// A minor status, of Kerberos: MIT's major says no more than that it failed.
const KRB5KRB_AP_ERR_TKT_EXPIRED: u32 = -1_765_328_352_i32 as u32;

const GSS_C_DELEG_FLAG: u32 = 1;
pub(super) const GSS_C_MUTUAL_FLAG: u32 = 2;
pub(super) const GSS_C_REPLAY_FLAG: u32 = 4;
pub(super) const GSS_C_SEQUENCE_FLAG: u32 = 8;
pub(super) const GSS_C_CONF_FLAG: u32 = 16;
pub(super) const GSS_C_INTEG_FLAG: u32 = 32;
const GSS_C_ANON_FLAG: u32 = 64;

/// What the library said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LibraryError {
    /// One line, for people.
    pub text: String,
    /// The major status, without remarks.
    pub major: u32,
    pub(super) minor: u32,
}

impl LibraryError {
    pub(super) fn new(major: u32, text: impl Into<String>) -> Self {
        Self { text: text.into(), major, minor: 0 }
    }

    /// Says which file it is about, unless the library did.
    pub(super) fn with_path(mut self, path: &Path) -> Self {
        let path = one_line(&path.to_string_lossy());
        if !self.text.contains(&path) {
            self.text = format!("{} ({path})", self.text);
        }
        self
    }

    /// There is no credential: no ticket, no key.
    pub fn is_no_credential(&self) -> bool {
        self.major == GSS_S_NO_CRED
    }

    /// The ticket has expired.
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

/// Without line ends and other controls: what others have written may be in it.
pub(super) fn one_line(text: &str) -> String {
    let words = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(" ")
}

/// What a context has; all false until it is complete.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ContextFlags {
    /// The initiator knows the acceptor, too.
    pub mutual: bool,
    /// A message that comes twice is noticed.
    pub replay: bool,
    /// A message that is missing or out of order is noticed.
    pub sequence: bool,
    /// Messages can be sealed.
    pub confidentiality: bool,
    /// Messages can be protected from change.
    pub integrity: bool,
    /// The initiator has no name.
    pub anonymous: bool,
    /// The initiator has handed over a credential of its own.
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

/// Where a message stands among the others, as far as the context has [`ContextFlags::replay`] and [`ContextFlags::sequence`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SequenceStatus {
    /// The one behind the last one.
    InOrder,
    /// Some before it are missing.
    Gap,
    /// It was missing before.
    Unsequenced,
    /// It was here before.
    Duplicate,
    /// Too old to be told from a duplicate.
    Old,
}

impl SequenceStatus {
    pub(super) fn new(major: u32) -> Self {
        // The worst one tells.
        let remarks = [(2, Self::Duplicate), (4, Self::Old), (8, Self::Unsequenced), (16, Self::Gap)];
        remarks.into_iter().find(|(bit, _)| major & bit != 0).map_or(Self::InOrder, |(_, order)| order)
    }
}
