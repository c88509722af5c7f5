//! What the calls of GSSAPI say besides their data: errors, remarks on a message, and what a context protects. Numbers
//! are those of RFC 2744.

use std::fmt;
use std::path::Path;

/// An upper half that is not 0 is an error, any bit of the lower half a remark.
pub(super) const ERRORS: u32 = 0xFFFF_0000;
pub(super) const BAD_NAME: u32 = 2 << 16;
const NO_CRED: u32 = 7 << 16;
pub(super) const NO_CONTEXT: u32 = 8 << 16;
pub(super) const DEFECTIVE_TOKEN: u32 = 9 << 16;
const CREDENTIALS_EXPIRED: u32 = 11 << 16;
const CONTEXT_EXPIRED: u32 = 12 << 16;
pub(super) const FAILURE: u32 = 13 << 16;
pub(super) const BAD_QOP: u32 = 14 << 16;
pub(super) const UNAVAILABLE: u32 = 16 << 16;
pub(super) const CONTINUE: u32 = 1;
/// A minor status, of Kerberos: MIT's major says no more than that it failed.
const TICKET_EXPIRED: u32 = -1_765_328_352_i32 as u32;

const DELEGATED: u32 = 1;
pub(super) const MUTUAL: u32 = 2;
pub(super) const REPLAY: u32 = 4;
pub(super) const SEQUENCE: u32 = 8;
pub(super) const CONFIDENTIALITY: u32 = 16;
pub(super) const INTEGRITY: u32 = 32;
const ANONYMOUS: u32 = 64;

/// What the library said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// One line, for people.
    pub text: String,
    /// The major status, without remarks.
    pub major: u32,
    pub(super) minor: u32,
}

impl Error {
    pub(super) fn new(major: u32, text: impl Into<String>) -> Self {
        Self { text: text.into(), major, minor: 0 }
    }

    /// Says which file it is about, unless the library did.
    pub(super) fn about(mut self, path: &Path) -> Self {
        let path = one_line(&path.to_string_lossy());
        if !self.text.contains(&path) {
            self.text = format!("{} ({path})", self.text);
        }
        self
    }

    /// There is no credential: no ticket, no key.
    pub fn is_no_credential(&self) -> bool {
        self.major == NO_CRED
    }

    /// The ticket has expired.
    pub fn is_expired(&self) -> bool {
        matches!(self.major, CREDENTIALS_EXPIRED | CONTEXT_EXPIRED) || self.minor == TICKET_EXPIRED
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Error {}

/// Without line ends and other controls: what others have written may be in it.
pub(super) fn one_line(text: &str) -> String {
    let words = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(" ")
}

/// What a context has; all false until it is complete.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags {
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

impl Flags {
    pub(super) fn new(bits: u32) -> Self {
        let has = |bit| bits & bit != 0;
        Self {
            mutual: has(MUTUAL),
            replay: has(REPLAY),
            sequence: has(SEQUENCE),
            confidentiality: has(CONFIDENTIALITY),
            integrity: has(INTEGRITY),
            anonymous: has(ANONYMOUS),
            delegated: has(DELEGATED),
        }
    }
}

/// Where a message stands among the others, as far as the context has [`Flags::replay`] and [`Flags::sequence`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
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

impl Order {
    pub(super) fn new(major: u32) -> Self {
        // The worst one tells.
        let remarks = [(2, Self::Duplicate), (4, Self::Old), (8, Self::Unsequenced), (16, Self::Gap)];
        remarks.into_iter().find(|(bit, _)| major & bit != 0).map_or(Self::InOrder, |(_, order)| order)
    }
}
