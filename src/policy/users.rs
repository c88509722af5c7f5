//! The users file: one `name:hash` a line, `#` for comments. Reads, checks and edits its text; opens no file.
//!
//! Hashes are argon2id in PHC form and the bcrypt that `htpasswd -B` writes. No password and no hash is ever part of a
//! message.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher as _, RandomState};

use argon2::password_hash::{PasswordHasher as _, PasswordVerifier as _, phc::PasswordHash};
use argon2::{Algorithm, Argon2, Params, Version};

use super::PolicyError;
use crate::proto::MAX_CREDENTIAL_LEN;

/// The most that bcrypt looks at, in octets; what is longer can't be told apart by it and is refused.
const BCRYPT_MAX_PASSWORD: usize = 72;

/// Kinds of hashes that there are elsewhere.
const UNSUPPORTED_SCHEMES: [&str; 11] = ["1", "5", "6", "7", "y", "gy", "2", "2x", "apr1", "argon2i", "argon2d"];

/// Everybody who may log in.
#[derive(Debug, Default)]
pub struct Users {
    hashes: Vec<StoredHash>,
    /// Where in `hashes` each name has its own.
    index_by_name: HashMap<Vec<u8>, usize>,
    /// Which hash an unknown name is measured against.
    decoy: RandomState,
}

enum StoredHash {
    Argon2(String),
    Bcrypt(String),
}

impl fmt::Debug for StoredHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Argon2(_) => "Argon2(..)",
            Self::Bcrypt(_) => "Bcrypt(..)",
        })
    }
}

impl Users {
    /// # Errors
    /// The first line that is wrong: no colon, a bad or repeated name, a hash of an unknown kind.
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        let mut users = Self::default();
        for (line, text) in (1..).zip(text.lines()) {
            let at = |message: String| PolicyError { line, message };
            let text = text.trim();
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            let Some((name, hash)) = text.split_once(':') else {
                let name = text.split_whitespace().next().unwrap_or_default();
                return Err(at(format!("{:?} has no \":\" behind the name", excerpt(name))));
            };
            check_name(name).map_err(at)?;
            let hash = StoredHash::parse(hash).map_err(|what| at(format!("user {:?}: {what}", excerpt(name))))?;
            if users.index_by_name.insert(name.into(), users.hashes.len()).is_some() {
                return Err(at(format!("user {:?} stands here twice", excerpt(name))));
            }
            users.hashes.push(hash);
        }
        Ok(users)
    }

    /// Whether `passwd` is that of `uname`. Takes tens of milliseconds of CPU, by design. An unknown name costs what a
    /// known one does: it is measured against the hash of some user, always the same one for the same name.
    pub fn verify(&self, uname: &[u8], passwd: &[u8]) -> bool {
        let known = self.index_by_name.get(uname).copied();
        let decoy = || usize::try_from(self.decoy.hash_one(uname)).unwrap_or(0).checked_rem(self.hashes.len());
        let hash = known.or_else(decoy).and_then(|i| self.hashes.get(i));
        hash.is_some_and(|hash| hash.verify(passwd)) && known.is_some()
    }

    /// How many users there are.
    pub fn len(&self) -> usize {
        self.hashes.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.hashes.is_empty()
    }

    /// Whether there is a user of that name.
    pub fn contains(&self, uname: &[u8]) -> bool {
        self.index_by_name.contains_key(uname)
    }
}

impl StoredHash {
    fn parse(text: &str) -> Result<Self, String> {
        if text.starts_with("$argon2id$") {
            let hash = PasswordHash::new(text).map_err(|error| format!("bad argon2id hash: {error}"))?;
            let is_complete = hash.salt.is_some() && hash.hash.is_some();
            let is_valid = is_complete && Params::try_from(&hash).is_ok();
            return if is_valid { Ok(Self::Argon2(text.into())) } else { Err("bad argon2id hash".into()) };
        }
        if ["$2a$", "$2b$", "$2y$"].iter().any(|prefix| text.starts_with(prefix)) {
            let is_valid = text.parse::<bcrypt::HashParts>().is_ok_and(|parts| (4..=31).contains(&parts.get_cost()));
            return if is_valid { Ok(Self::Bcrypt(text.into())) } else { Err("bad bcrypt hash".into()) };
        }
        // Anything but $SCHEME$… may be a password in clear, which is not repeated.
        match text.strip_prefix('$').and_then(|rest| rest.split_once('$')) {
            Some((scheme, _)) if UNSUPPORTED_SCHEMES.contains(&scheme) => {
                Err(format!("unknown kind of hash {scheme:?}"))
            }
            _ => Err("no hash behind the name, as --add-user or htpasswd -B writes it".into()),
        }
    }

    fn verify(&self, passwd: &[u8]) -> bool {
        match self {
            Self::Argon2(hash) => {
                PasswordHash::new(hash).is_ok_and(|hash| Argon2::default().verify_password(passwd, &hash).is_ok())
            }
            Self::Bcrypt(hash) => {
                // To bcrypt a NUL is the end, and "a\0a" may be the same as "a".
                let is_comparable = passwd.len() <= BCRYPT_MAX_PASSWORD && !passwd.contains(&0);
                bcrypt::verify(passwd, hash).unwrap_or(false) && is_comparable
            }
        }
    }
}

/// # Errors
/// What is wrong with a user name: empty, over 255 octets, with a colon, a control character or blanks at its ends.
pub fn check_name(name: &str) -> Result<(), String> {
    let problem = match name {
        "" => "is empty",
        _ if name.len() > MAX_CREDENTIAL_LEN => "is longer than 255 octets",
        _ if name.contains(':') => "has a \":\" in it",
        _ if name.contains(char::is_control) => "has a control character in it",
        _ if name.trim() != name => "has blanks at its ends",
        _ if name.starts_with('#') => "looks like a comment",
        _ => return Ok(()),
    };
    Err(format!("user name {:?} {problem}", excerpt(name)))
}

/// A new line for a user: `name:hash`, argon2id with the recommended cost (19 MiB, 2 passes) and a random salt.
///
/// # Errors
/// A bad name, a password of 0 or over 255 octets, or no randomness to be had.
pub fn new_entry(name: &str, passwd: &[u8]) -> Result<String, String> {
    check_name(name)?;
    match passwd.len() {
        0 => return Err("the password is empty".into()),
        length if length > MAX_CREDENTIAL_LEN => return Err("the password is longer than 255 octets".into()),
        _ => {}
    }
    let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, Params::default());
    let hash: PasswordHash = argon2.hash_password(passwd).map_err(|error| format!("no hash: {error}"))?;
    Ok(format!("{name}:{hash}"))
}

/// The text of a users file with the line of `name` replaced, added at its end, or removed (`line` is None); all other
/// lines as they were. `None` when there was nothing to remove.
pub fn edit_entry(text: &str, name: &str, line: Option<&str>) -> Option<String> {
    let is_entry = |old: &str| old.trim_start().split_once(':').is_some_and(|(other, _)| other == name);
    let mut found = false;
    let mut out = String::with_capacity(text.len() + 160);
    for old in text.split_inclusive('\n') {
        if !is_entry(old) {
            out.push_str(old);
        } else if let (Some(line), false) = (line, found) {
            out.push_str(line);
            out.push('\n');
        }
        found |= is_entry(old);
    }
    match line {
        None => return found.then_some(out),
        Some(_) if found => {}
        Some(line) => {
            if !out.is_empty() && !out.ends_with('\n') {
                out.push('\n');
            }
            out.push_str(line);
            out.push('\n');
        }
    }
    Some(out)
}

/// Enough of a word to find it by, and not so much that a secret in the wrong place is told.
fn excerpt(word: &str) -> String {
    const MAX_CHARS: usize = 16;
    if word.starts_with('$') {
        return "$…".into();
    }
    match word.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}…", word.get(..end).unwrap_or_default()),
        None => word.into(),
    }
}
