//! Builds the policy from options and files at the start and at each reload.

use std::cell::RefCell;
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::cmd::cli::exit::{CliError, ExitStatus};
use crate::gssapi::Acceptor;
use crate::policy::Policy;
use crate::policy::rules::{self, Route, Rule, Rules};
use crate::policy::users::Users;
use crate::proto::{Method, ProtectionLevel};

/// Maximum size of a users file in bytes: about 100 000 users.
pub(super) const MAX_USERS_FILE: u64 = 16 << 20;
/// Maximum size of a rules file in bytes.
const MAX_RULES_FILE: u64 = 1 << 20;

/// A file that is read at the start and at each reload.
#[derive(Debug)]
pub(super) struct ConfigFile {
    /// The option that names the file.
    option: &'static str,
    path: PathBuf,
    /// Completeness of the text that was last loaded, and the text if it was unterminated: a truncated copy of it would
    /// look equally complete. `None` before the first load.
    loaded: RefCell<Option<(Completeness, String)>>,
}

/// How complete a file looks. While it is being copied, a file is first empty and then may end in the middle of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Completeness {
    Empty,
    /// The last line has no line end.
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
    pub(super) fn new(option: &'static str, path: PathBuf) -> Self {
        Self { option, path, loaded: RefCell::default() }
    }

    /// Reads the file. Fails if it looks less complete than the text that was last loaded.
    fn read(&self, max: u64) -> Result<String, CliError> {
        let loaded = self.loaded.borrow();
        // At a reload, a pipe may have no writer, and opening it would block.
        if loaded.is_some() && fs::metadata(&self.path).is_ok_and(|file| !file.is_file()) {
            return Err(file_error(&self.path, "not a regular file (a directory or a pipe cannot be reloaded)"));
        }
        let text = read_file(self.option, &self.path, max)?;
        let completeness = Completeness::of(&text);
        let is_less_complete = |(previous, old): &(Completeness, String)| {
            let is_shorter = text.len() < old.len() && old.starts_with(&text);
            completeness < *previous || completeness == Completeness::Unterminated && is_shorter
        };
        if !loaded.as_ref().is_some_and(is_less_complete) {
            return Ok(text);
        }
        let line = text.lines().count();
        let first = text.lines().last().and_then(|line| line.split([' ', '\t', ':']).next()).unwrap_or_default();
        let problem = match completeness {
            Completeness::Empty => "line 1: the file is empty".into(),
            _ => format!("line {line}: no line end after the line that starts with {first:?}"),
        };
        Err(file_error(&self.path, format!("{problem} (is the file still being written?)")))
    }

    fn set_loaded(&self, text: String) {
        let completeness = Completeness::of(&text);
        let kept = if completeness == Completeness::Unterminated { text } else { String::new() };
        self.loaded.replace(Some((completeness, kept)));
    }
}

/// A rule of `--rule`, `--allow` or `--deny`.
#[derive(Clone, Debug)]
pub(super) struct RuleOption {
    pub(super) position: usize,
    pub(super) option: &'static str,
    pub(super) text: String,
}

/// The options and files that make up the policy.
#[derive(Debug, Default)]
pub(super) struct PolicySources {
    pub(super) users: Option<ConfigFile>,
    pub(super) rules: Option<ConfigFile>,
    /// Accepted methods, the preferred one first.
    pub(super) methods: Vec<Method>,
    /// Rules of the command line, in order.
    pub(super) rule_options: Vec<RuleOption>,
    /// Names of the hops, by index.
    pub(super) hops: Vec<String>,
    /// Route of rules without `via=`.
    pub(super) default_route: Route,
}

impl PolicySources {
    /// Reads the files and builds the policy. A reload accepts both files or neither.
    ///
    /// # Errors
    /// A file cannot be read, or a line is invalid. The message names file, line and word.
    pub(super) fn load(&self) -> Result<Policy, CliError> {
        let mut loaded = Vec::new();
        let users = match &self.users {
            None => None,
            Some(config) => {
                let text = config.read(MAX_USERS_FILE)?;
                let users = Users::parse(&text).map_err(|error| file_error(&config.path, error))?;
                loaded.push((config, text));
                if users.is_empty() {
                    log::warn!(
                        "{}: no users, so every login is refused (add users with --add-user)",
                        config.path.display()
                    );
                }
                Some(Arc::new(users))
            }
        };
        let mut all = self.parse_rule_options()?;
        if let Some(config) = &self.rules {
            let text = config.read(MAX_RULES_FILE)?;
            let file = config.path.display().to_string();
            all.extend(rules::parse_rules(&text, &file, &self.hops).map_err(|error| file_error(&config.path, error))?);
            loaded.push((config, text));
        }
        loaded.into_iter().for_each(|(config, text)| config.set_loaded(text));
        let rules = Rules::new(all, self.default_route);
        Ok(Policy { users, methods: self.methods.clone(), rules, ..Policy::default() })
    }

    fn parse_rule_options(&self) -> Result<Vec<Rule>, CliError> {
        let parse = |RuleOption { option, text, .. }: &RuleOption| {
            let parsed = rules::parse_rule(text, option, &self.hops);
            let rule = parsed.and_then(|rule| rule.ok_or_else(|| "the rule is empty".into()));
            rule.map_err(|error| CliError::usage(format!("{option}: {error}")))
        };
        self.rule_options.iter().map(parse).collect()
    }
}

/// Creates the GSSAPI acceptor: the keys of the server and the protection levels that it grants.
///
/// # Errors
/// The GSSAPI library is missing, the keytab cannot be read, or it has no key for the service.
pub(super) fn gssapi_acceptor(
    keytab: Option<PathBuf>,
    service: Option<&str>,
    levels: Vec<ProtectionLevel>,
) -> Result<Acceptor, CliError> {
    if let Some(file) = &keytab {
        // The library reports every unreadable keytab as "nonexistent or empty"; this error is more exact.
        fs::File::open(file).map_err(unreadable("--keytab", file))?;
    }
    let file = keytab.as_ref().map_or("--auth gssapi without --keytab".into(), |file| file.display().to_string());
    Acceptor::new(keytab, service, levels).map_err(|error| CliError::new(ExitStatus::USAGE, format!("{file}: {error}")))
}

pub(super) fn file_error(file: &Path, problem: impl std::fmt::Display) -> CliError {
    CliError::new(ExitStatus::USAGE, format!("{}: {problem}", file.display()))
}

fn unreadable(option: &str, file: &Path) -> impl Fn(io::Error) -> CliError {
    move |error| CliError::new(ExitStatus::USAGE, format!("{option} {}: {error}", file.display()))
}

/// Reads a file of at most `max` bytes, which `option` names.
pub(super) fn read_file(option: &str, file: &Path, max: u64) -> Result<String, CliError> {
    let mut bytes = Vec::new();
    let opened = fs::File::open(file).map_err(unreadable(option, file))?;
    io::Read::take(opened, max + 1).read_to_end(&mut bytes).map_err(unreadable(option, file))?;
    if bytes.len() as u64 > max {
        return Err(file_error(file, format!("too large (the limit is {max} bytes)")));
    }
    String::from_utf8(bytes).map_err(|error| {
        let before = error.as_bytes().iter().take(error.utf8_error().valid_up_to());
        let line = before.filter(|byte| **byte == b'\n').count() + 1;
        file_error(file, format!("line {line}: not UTF-8"))
    })
}
