//! Builds the policy from options and files at the start and at each reload.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{self, Path, PathBuf};
use std::sync::Arc;

use super::hops::HopSources;
use crate::cmd::cli::exit::{CliError, CliResult, ExitStatus};
use crate::cmd::cli::text_file;
use crate::gssapi::Acceptor;
use crate::policy::Policy;
use crate::policy::rules::{self, Route, Rule, Rules};
use crate::policy::users::Users;
use crate::proto::{Method, ProtectionLevel};
use crate::server::{Configuration, RuleOption, ServeArgs};

/// Maximum size of a users file in bytes: about 100 000 users.
pub(super) const MAX_USERS_FILE: u64 = 16 << 20;
/// Maximum number of warnings about single entries of `user=`.
const MAX_WARNINGS: usize = 10;
const MAX_RULES_FILE: u64 = 64 << 20;

/// The options and files that make up the policy.
#[derive(Debug, Default)]
pub(super) struct PolicySources {
    pub(super) users: Option<PathBuf>,
    /// The user in the environment, as in a users file. There is no such file then.
    pub(super) user_entry: Option<String>,
    pub(super) rules: Option<PathBuf>,
    /// Accepted methods, the preferred one first.
    pub(super) methods: Vec<Method>,
    pub(super) rule_options: Vec<RuleOption>,
    /// Read by the GSSAPI library, not here.
    pub(super) keytab: Option<PathBuf>,
    /// Upstreams, by index.
    pub(super) hops: HopSources,
    /// Route of rules without `via=`.
    pub(super) default_route: Route,
}

impl PolicySources {
    /// Reads the files and builds the policy. The log has warnings about rules and users that are valid but useless.
    /// Also returns the proxies of each hop, with their passwords.
    ///
    /// # Errors
    /// A file cannot be read, or a line is invalid. The message names file, line and word.
    pub(super) fn load(&self) -> CliResult<Configuration> {
        let file = self.users.as_deref();
        let text = file.map(|file| read_file("--users", file, MAX_USERS_FILE)).transpose()?;
        let file = file.unwrap_or(Path::new("S5_USER"));
        let users = text.as_ref().or(self.user_entry.as_ref()).map(|text| Users::parse(text).map(Arc::new));
        let users = users.transpose().map_err(|error| file_error(file, error))?;
        let mut all = self.parse_rule_options()?;
        if let Some(file) = &self.rules {
            let text = read_file("--rules", file, MAX_RULES_FILE)?;
            let rules = rules::parse_rules(text, &file.display().to_string(), &self.hops.names());
            all.extend(rules.map_err(|error| file_error(file, error))?);
        }
        let rules = Rules::new(all, self.default_route);
        if let Some((rule, target)) = rules.unmatched_target() {
            let problem = "never matches: an allow compares the IPv4 address in it (write to= with IPv4 addresses)";
            return Err(CliError::usage(format!("{}: \"to={target}\" {problem}", rule.origin())));
        }
        let policy = Policy { users, methods: self.methods.clone(), rules, ..Policy::default() };
        let hops = self.hops.load()?;
        self.warn(&policy);
        Ok((policy, hops))
    }

    /// Reads the files again, as [`PolicySources::load`].
    ///
    /// # Errors
    /// Those of `load`, and a file that is not a regular one: a pipe may have no writer, and opening it would block.
    pub(super) fn reload(&self) -> CliResult<Configuration> {
        let is_special = |file: &&Path| fs::metadata(file).is_ok_and(|metadata| !metadata.is_file());
        match self.files().find(is_special) {
            Some(file) => Err(file_error(file, "not a regular file (a directory or a pipe cannot be reloaded)")),
            None => self.load(),
        }
    }

    /// Returns the files that a reload reads.
    pub(super) fn files(&self) -> impl Iterator<Item = &Path> {
        [self.users.as_deref(), self.rules.as_deref(), self.hops.file()].into_iter().flatten()
    }

    fn warn(&self, policy: &Policy) {
        self.files().chain(self.keytab.as_deref()).for_each(warn_if_everybody_can_change);
        if let (Some(file), Some(0)) = (&self.users, policy.users.as_ref().map(|users| users.names().len())) {
            log::warn!("{}: no users, so every login is refused (add users with --add-user)", file.display());
        }
        let problem = match &self.users {
            Some(file) => format!("no such user in {} (add it with --add-user, or correct the rule)", file.display()),
            None if self.user_entry.is_some() => "S5_USER is another user".into(),
            None if self.methods.contains(&Method::GSSAPI) => "no realm (write user=NAME@REALM)".into(),
            None => "no login is accepted (use --users FILE)".into(),
        };
        let mut unmatched = policy.unmatched_users();
        for (rule, user) in unmatched.by_ref().take(MAX_WARNINGS) {
            log::warn!("{}: user={user} never matches: {problem}", rule.origin());
        }
        let more = unmatched.count();
        if more > 0 {
            log::warn!("{more} more entries of user= never match");
        }
        let unmatched = policy.rules.first_user_rules().filter(|rule| !rule.matches_any(&self.methods));
        for rule in unmatched.take(MAX_WARNINGS) {
            log::warn!("{}: never matches: no login has its method= or protection= (see --auth)", rule.origin());
        }
        for (hop, name) in self.hops.names().iter().enumerate() {
            let is_hop = |rule| policy.rules.route(rule).hop == Some(hop);
            if self.default_route.hop != Some(hop) && !policy.rules.first_user_rules().any(is_hop) {
                log::warn!("--hop {name}: no rule selects it (add an allow rule with via={name})");
            }
        }
    }

    fn parse_rule_options(&self) -> CliResult<Vec<Rule>> {
        let hops = self.hops.names();
        let parse = |RuleOption { option, text, .. }: &RuleOption| {
            let parsed = rules::parse_rule(text, option, &hops);
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
pub(super) fn gssapi_acceptor(args: &ServeArgs) -> CliResult<Acceptor> {
    let ServeArgs { keytab, gssapi_service: service, gssapi_protection: levels, .. } = args;
    if let Some(file) = keytab {
        // The library reports every unreadable keytab as "nonexistent or empty"; this error is more exact.
        fs::File::open(file).map_err(unreadable("--keytab", file))?;
    }
    let file = keytab.as_ref().map_or("--auth gssapi without --keytab".into(), |file| file.display().to_string());
    let levels = levels.clone().unwrap_or(vec![ProtectionLevel::Integrity, ProtectionLevel::Confidentiality]);
    Acceptor::new(keytab.as_deref(), service.as_deref(), levels)
        .map_err(|error| CliError::new(ExitStatus::USAGE, format!("{file}: {error}")))
}

/// Logs a warning if everybody can write the file, or replace it in one of the directories above it.
fn warn_if_everybody_can_change(file: &Path) {
    let is_writable = |path: &&Path| {
        let mode = fs::metadata(path).map_or(0, |metadata| metadata.mode());
        // A regular file (S_IFREG), or a directory (S_IFDIR) without the sticky bit, which everybody can write.
        matches!(mode & 0o171_002, 0o100_002 | 0o101_002 | 0o040_002)
    };
    let paths = [fs::canonicalize(file), path::absolute(file)];
    let found = paths.iter().flatten().find_map(|path| path.ancestors().find(is_writable));
    if let Some(found) = found.map(Path::display) {
        log::warn!("{}: everybody can change it (run chmod o-w {found})", file.display());
    }
}

pub(super) fn file_error(file: &Path, problem: impl std::fmt::Display) -> CliError {
    CliError::new(ExitStatus::USAGE, format!("{}: {problem}", file.display()))
}

/// Returns the error of a file that cannot be opened or read, and how to create it if it is missing.
fn unreadable(option: &str, file: &Path) -> impl Fn(io::Error) -> CliError {
    move |error| {
        let remedy = match option {
            _ if error.kind() != io::ErrorKind::NotFound => "",
            "--users" => " (create it with --add-user NAME)",
            "--keytab" => " (create it with ktadd of kadmin, and copy it to this path)",
            _ => " (create it with one rule per line, or give rules with --allow and --deny)",
        };
        CliError::new(ExitStatus::USAGE, format!("{option} {}: {error}{remedy}", file.display()))
    }
}

/// Reads a file of at most `max` bytes, which `option` names.
pub(super) fn read_file(option: &str, file: &Path, max: u64) -> CliResult<String> {
    let bytes = fs::File::open(file).and_then(|file| text_file::read(file, max)).map_err(unreadable(option, file))?;
    String::from_utf8(bytes).map_err(|error| {
        let before = error.as_bytes().iter().take(error.utf8_error().valid_up_to());
        let line = before.filter(|byte| **byte == b'\n').count() + 1;
        file_error(file, format!("line {line}: not UTF-8"))
    })
}
