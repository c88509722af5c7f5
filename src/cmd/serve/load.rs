//! The policy out of what the command line and files say; and once more at each reload.

use std::cell::{Cell, RefCell};
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::cmd::CliError;
use crate::gssapi::Acceptor;
use crate::policy::Policy;
use crate::policy::rules::{self, Route, Rule, Rules};
use crate::policy::users::Users;
use crate::proto::{Method, ProtectionLevel};

/// The largest users file that is read, in octets: room for some 100 000 users.
pub(super) const MAX_USERS_FILE: u64 = 16 << 20;
/// The largest rules file that is read, in octets.
const MAX_RULES_FILE: u64 = 1 << 20;

/// A file that is read again at each reload.
#[derive(Debug)]
pub(super) struct ConfigFile {
    path: PathBuf,
    /// What it looked like when it was taken last.
    previous: Cell<Option<Completeness>>,
    /// What it said then, if its last line did not end: a part of it looks no less whole.
    previous_text: RefCell<String>,
}

/// How whole a file looks. One that is replaced by copying is empty for a moment, and then ends anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Completeness {
    Empty,
    /// The last line does not end.
    Unterminated,
    Complete,
}

impl Completeness {
    fn of(text: &str) -> Self {
        match text {
            "" => Self::Empty,
            _ if text.ends_with('\n') => Self::Complete,
            _ => Self::Unterminated,
        }
    }
}

impl ConfigFile {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, previous: Cell::new(None), previous_text: RefCell::default() }
    }

    /// Its text, unless that looks less whole than the one before.
    fn read(&self, max: u64) -> Result<(String, Completeness), CliError> {
        let previous = self.previous.get();
        // Nobody waits at the other end of a pipe the second time, and opening it would wait for him.
        if previous.is_some() && fs::metadata(&self.path).is_ok_and(|file| !file.is_file()) {
            return Err(file_error(&self.path, "not a plain file but a directory or a pipe, which is not read again"));
        }
        let text = read_file(&self.path, max)?;
        let completeness = Completeness::of(&text);
        let old = self.previous_text.borrow();
        let is_truncated =
            completeness == Completeness::Unterminated && text.len() < old.len() && old.starts_with(&text);
        if previous.is_none_or(|previous| completeness >= previous) && !is_truncated {
            return Ok((text, completeness));
        }
        let line = text.lines().count();
        let first = text.lines().last().and_then(|line| line.split([' ', '\t', ':']).next()).unwrap_or_default();
        Err(file_error(
            &self.path,
            match completeness {
                Completeness::Empty => "line 1: the file is empty, as if it were just being written".into(),
                _ => format!(
                    "line {line}: the line that begins with {first:?} does not end, as if the file were cut off"
                ),
            },
        ))
    }
}

/// All that the policy is made of.
#[derive(Debug, Default)]
pub(super) struct PolicySources {
    pub(super) users: Option<ConfigFile>,
    pub(super) rules: Option<ConfigFile>,
    /// The methods that are taken, in their order.
    pub(super) methods: Vec<Method>,
    /// The rules of the command line, each with the option that it came by.
    pub(super) rule_options: Vec<(String, &'static str)>,
    /// The names of the hops, by number.
    pub(super) hops: Vec<String>,
    /// The way that is taken where no rule names one.
    pub(super) default_route: Route,
}

impl PolicySources {
    /// # Errors
    /// What can't be read, or is wrong: file, line and word.
    pub(super) fn load(&self) -> Result<Policy, CliError> {
        let mut loaded = Vec::new();
        let users = match &self.users {
            None => None,
            Some(config) => {
                let (text, completeness) = config.read(MAX_USERS_FILE)?;
                let users = Users::parse(&text).map_err(|error| file_error(&config.path, error))?;
                loaded.push((config, completeness, text));
                if users.is_empty() {
                    log::warn!("{}: no users, so nobody can log in; add one with --add-user", config.path.display());
                }
                Some(Arc::new(users))
            }
        };
        let mut all = self.parse_rule_options()?;
        if let Some(config) = &self.rules {
            let (text, completeness) = config.read(MAX_RULES_FILE)?;
            let file = config.path.display().to_string();
            all.extend(rules::parse_rules(&text, &file, &self.hops).map_err(|error| file_error(&config.path, error))?);
            loaded.push((config, completeness, text));
        }
        // Taken both or not at all.
        for (config, completeness, text) in loaded {
            config.previous.set(Some(completeness));
            let is_unterminated = completeness == Completeness::Unterminated;
            config.previous_text.replace(if is_unterminated { text } else { String::new() });
        }
        let rules = Rules::new(all, self.default_route);
        Ok(Policy { users, methods: self.methods.clone(), rules, ..Policy::default() })
    }

    fn parse_rule_options(&self) -> Result<Vec<Rule>, CliError> {
        let mut all = Vec::new();
        for (text, option) in &self.rule_options {
            let parsed = rules::parse_rule(text, option, &self.hops);
            all.extend(parsed.map_err(|what| CliError::usage(format!("{option}: {what}")))?);
        }
        Ok(all)
    }
}

/// Who the server is to clients that come with GSSAPI.
///
/// # Errors
/// The library is missing, or the keytab can't be read, or has no such key.
pub(super) fn gssapi_acceptor(
    keytab: Option<PathBuf>,
    service: Option<&str>,
    levels: Vec<ProtectionLevel>,
) -> Result<Acceptor, CliError> {
    if let Some(file) = &keytab {
        // The library calls everything that it can't read "nonexistent or empty".
        fs::File::open(file).map_err(|error| file_error(file, error))?;
    }
    let file = keytab.as_ref().map_or_else(|| "--auth gssapi".into(), |file| file.display().to_string());
    Acceptor::new(keytab, service, levels).map_err(|error| CliError::usage(format!("{file}: {error}")))
}

pub(super) fn file_error(file: &Path, problem: impl std::fmt::Display) -> CliError {
    CliError::usage(format!("{}: {problem}", file.display()))
}

/// The text of a file of at most `max` octets.
pub(super) fn read_file(file: &Path, max: u64) -> Result<String, CliError> {
    let mut bytes = Vec::new();
    let opened = fs::File::open(file).map_err(|error| file_error(file, error))?;
    io::Read::take(opened, max + 1).read_to_end(&mut bytes).map_err(|error| file_error(file, error))?;
    if bytes.len() as u64 > max {
        return Err(file_error(file, format!("too large: it may have at most {max} octets")));
    }
    String::from_utf8(bytes).map_err(|error| {
        let before = error.as_bytes().iter().take(error.utf8_error().valid_up_to());
        let line = before.filter(|byte| **byte == b'\n').count() + 1;
        file_error(file, format!("line {line}: not UTF-8"))
    })
}
