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
pub(super) struct Source {
    path: PathBuf,
    /// What it looked like when it was taken last.
    taken: Cell<Option<Shape>>,
    /// What it said then, if its last line did not end: a part of it looks no less whole.
    open_text: RefCell<String>,
}

/// How whole a file looks. One that is replaced by copying is empty for a moment, and then ends anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Shape {
    Empty,
    /// The last line does not end.
    Open,
    Whole,
}

impl Shape {
    fn of(text: &str) -> Self {
        match text {
            "" => Self::Empty,
            _ if text.ends_with('\n') => Self::Whole,
            _ => Self::Open,
        }
    }
}

impl Source {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, taken: Cell::new(None), open_text: RefCell::default() }
    }

    /// Its text, unless that looks less whole than the one before.
    fn read(&self, max: u64) -> Result<(String, Shape), CliError> {
        let taken = self.taken.get();
        // Nobody waits at the other end of a pipe the second time, and opening it would wait for him.
        if taken.is_some() && fs::metadata(&self.path).is_ok_and(|file| !file.is_file()) {
            return Err(wrong(&self.path, "not a plain file but a directory or a pipe, which is not read again"));
        }
        let text = read(&self.path, max)?;
        let shape = Shape::of(&text);
        let old = self.open_text.borrow();
        let is_part = shape == Shape::Open && text.len() < old.len() && old.starts_with(&text);
        if taken.is_none_or(|taken| shape >= taken) && !is_part {
            return Ok((text, shape));
        }
        let line = text.lines().count();
        let first = text.lines().last().and_then(|line| line.split([' ', '\t', ':']).next()).unwrap_or_default();
        Err(wrong(
            &self.path,
            match shape {
                Shape::Empty => "line 1: the file is empty, as if it were just being written".into(),
                _ => format!(
                    "line {line}: the line that begins with {first:?} does not end, as if the file were cut off"
                ),
            },
        ))
    }
}

/// All that the policy is made of.
#[derive(Debug, Default)]
pub(super) struct Sources {
    pub(super) users: Option<Source>,
    pub(super) rules: Option<Source>,
    /// The methods that are taken, in their order.
    pub(super) methods: Vec<Method>,
    /// The rules of the command line, each with the option that it came by.
    pub(super) lines: Vec<(String, &'static str)>,
    /// The names of the hops, by number.
    pub(super) hops: Vec<String>,
    /// The way that is taken where no rule names one.
    pub(super) route: Route,
}

impl Sources {
    /// # Errors
    /// What can't be read, or is wrong: file, line and word.
    pub(super) fn load(&self) -> Result<Policy, CliError> {
        let mut taken = Vec::new();
        let users = match &self.users {
            None => None,
            Some(source) => {
                let (text, shape) = source.read(MAX_USERS_FILE)?;
                let users = Users::parse(&text).map_err(|error| wrong(&source.path, error))?;
                taken.push((source, shape, text));
                if users.is_empty() {
                    log::warn!("{}: no users, so nobody can log in; add one with --add-user", source.path.display());
                }
                Some(Arc::new(users))
            }
        };
        let mut all = self.lines()?;
        if let Some(source) = &self.rules {
            let (text, shape) = source.read(MAX_RULES_FILE)?;
            let file = source.path.display().to_string();
            all.extend(rules::parse_rules(&text, &file, &self.hops).map_err(|error| wrong(&source.path, error))?);
            taken.push((source, shape, text));
        }
        // Taken both or not at all.
        for (source, shape, text) in taken {
            source.taken.set(Some(shape));
            source.open_text.replace(if shape == Shape::Open { text } else { String::new() });
        }
        Ok(Policy { users, methods: self.methods.clone(), rules: Rules::new(all, self.route), ..Policy::default() })
    }

    fn lines(&self) -> Result<Vec<Rule>, CliError> {
        let mut all = Vec::new();
        for (text, option) in &self.lines {
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
pub(super) fn acceptor(
    keytab: Option<PathBuf>,
    service: Option<&str>,
    levels: Vec<ProtectionLevel>,
) -> Result<Acceptor, CliError> {
    if let Some(file) = &keytab {
        // The library calls everything that it can't read "nonexistent or empty".
        fs::File::open(file).map_err(|error| wrong(file, error))?;
    }
    let file = keytab.as_ref().map_or_else(|| "--auth gssapi".into(), |file| file.display().to_string());
    Acceptor::new(keytab, service, levels).map_err(|error| CliError::usage(format!("{file}: {error}")))
}

pub(super) fn wrong(file: &Path, what: impl std::fmt::Display) -> CliError {
    CliError::usage(format!("{}: {what}", file.display()))
}

/// The text of a file of at most `max` octets.
pub(super) fn read(file: &Path, max: u64) -> Result<String, CliError> {
    let mut octets = Vec::new();
    let opened = fs::File::open(file).map_err(|error| wrong(file, error))?;
    io::Read::take(opened, max + 1).read_to_end(&mut octets).map_err(|error| wrong(file, error))?;
    if octets.len() as u64 > max {
        return Err(wrong(file, format!("too large: it may have at most {max} octets")));
    }
    String::from_utf8(octets).map_err(|error| {
        let before = error.as_bytes().iter().take(error.utf8_error().valid_up_to());
        let line = before.filter(|octet| **octet == b'\n').count() + 1;
        wrong(file, format!("line {line}: not UTF-8"))
    })
}
