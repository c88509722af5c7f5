//! The users file: one `name:hash` per line, `#` for comments. Parses, verifies and edits text; opens no file.
//!
//! Hashes are argon2id in PHC format, or bcrypt as written by `htpasswd -B`. Error messages show no hash.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher as _, RandomState};

use argon2::password_hash::{PasswordHasher as _, phc::Output, phc::PasswordHash};
use argon2::{Algorithm, Argon2, Block, Params, Version};

use super::PolicyError;
use crate::proto::MAX_CREDENTIAL_LEN;

/// Length of the longest password for bcrypt, in bytes. It ignores further bytes, so longer passwords are refused.
const BCRYPT_MAX_PASSWORD: usize = 72;

const ARGON2ID: &str = "$argon2id$";
/// Maximum memory (m) of a hash of argon2id in KiB. It is needed for each login, also for a guess.
const MAX_ARGON2_KIB: u32 = 1 << 20;
const MAX_ARGON2_PASSES: u32 = 1000;
/// Maximum of m times t: 4 GiB, which take about 2 s.
const MAX_ARGON2_WORK: u32 = 4 << 20;
/// Maximum cost of a hash of bcrypt, as in htpasswd(1): about 8 s.
const MAX_BCRYPT_COST: u32 = 17;
/// Identifiers of unsupported hash types, which error messages can name.
const UNSUPPORTED_SCHEMES: [&str; 11] = ["1", "5", "6", "7", "y", "gy", "2", "2x", "apr1", "argon2i", "argon2d"];

/// All users that can log in with a password.
#[derive(Debug, Default)]
pub struct Users {
    hashes: Vec<StoredHash>,
    index_by_name: HashMap<Vec<u8>, usize>,
    /// Selects the hash that an unknown name is verified against.
    decoy_seed: RandomState,
}

/// A hash of argon2id, or else of bcrypt. `Debug` omits it.
struct StoredHash(String);

/// The memory of a hash of argon2id. Further hashes reuse it; when it is dropped, the kernel gets it back.
#[derive(Debug, Default)]
pub struct HashMemory(Vec<Block>);

impl HashMemory {
    /// The allocator maps at least 33 MiB on their own, and unmaps them when they are freed. It keeps smaller areas for
    /// later, as many as there are threads. Memory that no hash uses remains untouched, and takes only addresses.
    const MIN_BLOCKS: usize = 33 << 10;

    /// Returns blocks of 1 KiB with any content, or `None` without memory.
    fn blocks(&mut self, count: usize) -> Option<&mut [Block]> {
        let Self(blocks) = self;
        if blocks.capacity() < count {
            // Freed first, so that the old and the new memory do not add up.
            *blocks = Vec::new();
            blocks.try_reserve_exact(count.max(Self::MIN_BLOCKS)).ok()?;
        }
        if blocks.len() < count {
            blocks.resize(count, Block::new());
        }
        blocks.get_mut(..count)
    }
}

impl fmt::Debug for StoredHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StoredHash(..)")
    }
}

impl Users {
    /// Parses a users file. Fails at the first line whose name is invalid or duplicate, or whose hash is invalid.
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        let mut users = Self::default();
        for (line, text) in (1..).zip(text.lines()) {
            let line_error = |message: String| PolicyError { line, message };
            let text = text.trim();
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            let Some((name, hash)) = text.split_once(':') else {
                let name = text.split_whitespace().next().unwrap_or_default();
                return Err(line_error(format!("expected name:hash, found no \":\" after {:?}", excerpt(name))));
            };
            check_name(name).map_err(line_error)?;
            let hash = StoredHash::parse(hash)
                .map_err(|message| line_error(format!("user {:?}: {message}", excerpt(name))))?;
            if users.index_by_name.insert(name.into(), users.hashes.len()).is_some() {
                return Err(line_error(format!("duplicate user {:?}", excerpt(name))));
            }
            users.hashes.push(hash);
        }
        Ok(users)
    }

    /// Returns whether `passwd` is the password of `uname`. Takes tens of milliseconds of CPU, by design. An unknown
    /// name takes as long: it is verified against the hash of a user, always the same one for the same name.
    pub fn verify(&self, uname: &[u8], passwd: &[u8], memory: &mut HashMemory) -> bool {
        self.hash(uname).is_some_and(|hash| hash.verify(passwd, memory)) && self.contains(uname)
    }

    /// Returns the memory in KiB that [`Self::verify`] needs.
    pub fn hash_kib(&self, uname: &[u8]) -> usize {
        self.hash(uname).map_or(0, StoredHash::kib)
    }

    fn hash(&self, uname: &[u8]) -> Option<&StoredHash> {
        let user = self.index_by_name.get(uname).copied();
        let decoy = || usize::try_from(self.decoy_seed.hash_one(uname)).unwrap_or(0).checked_rem(self.hashes.len());
        self.hashes.get(user.or_else(decoy)?)
    }

    /// Returns the names of all users.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        self.index_by_name.keys().map(Vec::as_slice)
    }

    /// Returns whether a user has this name.
    pub fn contains(&self, uname: &[u8]) -> bool {
        self.index_by_name.contains_key(uname)
    }
}

impl StoredHash {
    fn parse(text: &str) -> Result<Self, String> {
        if text.starts_with(ARGON2ID) {
            let hash = PasswordHash::new(text).map_err(|error| format!("invalid argon2id hash: {error}"))?;
            let argon2 = argon2id(&hash).filter(|_| hash.salt.is_some() && hash.hash.is_some());
            check_argon2_cost(argon2.ok_or("invalid argon2id hash")?.params())?;
            return Ok(Self(text.into()));
        }
        if ["$2a$", "$2b$", "$2y$"].iter().any(|prefix| text.starts_with(prefix)) {
            let cost = text.parse().map_or(0, |parts: bcrypt::HashParts| parts.get_cost());
            return match cost {
                4..=MAX_BCRYPT_COST => Ok(Self(text.into())),
                18..=31 => Err(above_limit("cost", cost, MAX_BCRYPT_COST, "bcrypt")),
                _ => Err("invalid bcrypt hash".into()),
            };
        }
        // Without a known $SCHEME$, the text may be a plain password, so it is not shown.
        match text.strip_prefix('$').and_then(|rest| rest.split_once('$')) {
            Some((scheme, _)) if UNSUPPORTED_SCHEMES.contains(&scheme) => {
                Err(format!("unsupported hash type {scheme:?} (use argon2id or bcrypt)"))
            }
            _ => Err("no valid hash after the name (create one with --add-user or htpasswd -B)".into()),
        }
    }

    /// Returns the memory of argon2id in KiB. bcrypt needs 4.
    fn kib(&self) -> usize {
        let argon2 = PasswordHash::new(&self.0).ok().and_then(|hash| argon2id(&hash));
        argon2.map_or(4, |argon2| argon2.params().block_count())
    }

    fn verify(&self, passwd: &[u8], memory: &mut HashMemory) -> bool {
        let Self(hash) = self;
        if hash.starts_with(ARGON2ID) {
            return verify_argon2id(hash, passwd, memory).unwrap_or(false);
        }
        // bcrypt stops at a NUL byte, so "a\0a" can equal "a".
        let is_comparable = passwd.len() <= BCRYPT_MAX_PASSWORD && !passwd.contains(&0);
        bcrypt::verify(passwd, hash).unwrap_or(false) && is_comparable
    }
}

/// Returns argon2id with the version and the parameters of `hash`, if they are valid.
fn argon2id(hash: &PasswordHash) -> Option<Argon2<'static>> {
    let version = hash.version.map_or(Ok(Version::default()), Version::try_from).ok()?;
    Some(Argon2::new(Algorithm::Argon2id, version, Params::try_from(hash).ok()?))
}

/// Returns `None` for an invalid hash, or without memory.
fn verify_argon2id(hash: &str, passwd: &[u8], memory: &mut HashMemory) -> Option<bool> {
    let hash = PasswordHash::new(hash).ok()?;
    let (argon2, salt, expected) = (argon2id(&hash)?, hash.salt?, hash.hash?);
    let mut buffer = [0; Output::MAX_LENGTH];
    let out = buffer.get_mut(..expected.len())?;
    let blocks = memory.blocks(argon2.params().block_count())?;
    argon2.hash_password_into_with_memory(passwd, &salt, out, blocks).ok()?;
    // Compares in constant time.
    Some(Output::new(out).ok()? == expected)
}

fn check_argon2_cost(params: &Params) -> Result<(), String> {
    let (memory, passes) = (params.m_cost(), params.t_cost());
    if memory > MAX_ARGON2_KIB {
        return Err(above_limit("m", memory, MAX_ARGON2_KIB, "argon2id"));
    }
    let max_passes = MAX_ARGON2_PASSES.min(MAX_ARGON2_WORK / memory.max(1));
    if passes > max_passes { Err(above_limit("t", passes, max_passes, "argon2id")) } else { Ok(()) }
}

fn above_limit(parameter: &str, value: u32, limit: u32, scheme: &str) -> String {
    format!(
        "{parameter}={value} of the {scheme} hash exceeds the limit of {limit} (use --remove-user, then --add-user)"
    )
}

/// Checks that a user name fits into a line of the file and into a login.
///
/// # Errors
/// The name is empty or longer than 255 bytes, starts with `#` or a byte order mark, or contains a colon or a control
/// character. Or it starts or ends with whitespace.
pub fn check_name(name: &str) -> Result<(), String> {
    check_characters(name).map_err(|problem| format!("user name {:?} {problem}", excerpt(name)))
}

/// Like [`check_name`], but the error does not have the name.
pub fn check_characters(name: &str) -> Result<(), &'static str> {
    Err(match name {
        "" => "is empty",
        _ if name.len() > MAX_CREDENTIAL_LEN => "is longer than 255 bytes",
        _ if name.contains(':') => "contains \":\"",
        _ if name.contains(char::is_control) => "contains a control character",
        _ if name.trim() != name => "starts or ends with whitespace",
        _ if name.starts_with('#') => "starts with \"#\"",
        _ if name.starts_with('\u{feff}') => "starts with a byte order mark (remove it)",
        _ => return Ok(()),
    })
}

/// Checks that a new user can have a password.
pub fn check_passwd(passwd: &[u8]) -> Result<(), &'static str> {
    match passwd.len() {
        0 => Err("is empty"),
        length if length > MAX_CREDENTIAL_LEN => Err("is longer than 255 bytes"),
        _ if passwd.iter().any(|byte| b"\r\n".contains(byte)) => Err("contains a line break (remove it)"),
        _ => Ok(()),
    }
}

/// Creates an entry `name:hash`: argon2id with the recommended cost (19 MiB, 2 passes) and a random salt.
///
/// # Errors
/// An invalid name or password, or no random numbers from the system.
pub fn new_entry(name: &str, passwd: &[u8]) -> Result<String, String> {
    check_name(name)?;
    check_passwd(passwd).map_err(|problem| format!("the password {problem}"))?;
    let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, Params::default());
    let hash: PasswordHash = argon2.hash_password(passwd).map_err(|error| format!("hash the password: {error}"))?;
    Ok(format!("{name}:{hash}"))
}

/// Replaces the entry of `name` with `line`, or appends it; removes the entry if `line` is `None`. Returns the new text
/// with all other lines unchanged, or `None` if there is no entry to remove.
pub fn edit_entry(text: &str, name: &str, line: Option<&str>) -> Option<String> {
    let is_entry = |old: &str| old.trim_start().split_once(':').is_some_and(|(other, _)| other == name);
    let mut found = false;
    let mut out = String::with_capacity(text.len() + 160);
    for old in text.split_inclusive('\n') {
        if !is_entry(old) {
            out.push_str(old);
        } else if let (Some(line), false) = (line, found) {
            out += &format!("{line}\n");
        }
        found |= is_entry(old);
    }
    match line {
        Some(line) if !found => {
            let separator = if out.is_empty() || out.ends_with('\n') { "" } else { "\n" };
            Some(format!("{out}{separator}{line}\n"))
        }
        _ => (found || line.is_some()).then_some(out),
    }
}

/// Returns the start of a word for a message, enough to find its line. Shows no hash, and no long secret in full.
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
