//! `--add-user` and `--remove-user`: edit the users file. Also the user in the environment.

use std::env;
use std::fs;
use std::io::{self, BufRead as _, IsTerminal as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, fchown};
use std::path::Path;

use super::load::{MAX_USERS_FILE, file_error, read_file};
use crate::cmd::cli::exit::{CliError, CliResult, ExitStatus, escape};
use crate::cmd::cli::secrets;
use crate::policy::users::{self, Users};
use crate::server::{is_successor, output_file};

/// Variable with the entry of the user for a process that replaces this one: the password is no longer known then.
pub(super) const ENTRY_VARIABLE: &str = "S5_USER_ENTRY";

/// Returns the entry of the user in the environment, if there is one. Removes the password from the environment.
/// `has_file`: a users file is given, which is another source of users.
pub(super) fn entry_in_environment(has_file: bool) -> CliResult<Option<String>> {
    let usage_error = |problem: &str| CliError::usage(format!("S5_USER and S5_PASSWORD: {problem}"));
    if let (true, Ok(entry)) = (is_successor(), env::var(ENTRY_VARIABLE)) {
        return Ok(Some(entry));
    }
    let (name, passwd) = match (env::var_os("S5_USER"), env::var_os("S5_PASSWORD")) {
        (Some(_), Some(_)) if has_file => return Err(usage_error("cannot be combined with --users (unset them)")),
        (Some(name), Some(passwd)) => (name, passwd),
        (Some(_), None) => return Err(usage_error("S5_PASSWORD is not set (set both, or neither)")),
        (None, Some(_)) => return Err(usage_error("S5_USER is not set (set both, or neither)")),
        (None, None) => return Ok(None),
    };
    secrets::empty_variable("S5_PASSWORD");
    // Without the values: the password may be in the wrong variable.
    let invalid = |variable| move |problem| CliError::usage(format!("{variable} {problem}"));
    let name = name.to_str().ok_or("is not UTF-8").map_err(invalid("S5_USER"))?;
    users::check_characters(name).map_err(invalid("S5_USER"))?;
    users::check_passwd(passwd.as_bytes()).map_err(invalid("S5_PASSWORD"))?;
    users::new_entry(name, passwd.as_bytes()).map(Some).map_err(|error| usage_error(&error))
}

/// Adds a user or changes the password. Returns a report for the user.
pub(super) fn add_user(file: &Path, name: &str) -> CliResult<String> {
    let usage_error = |error| CliError::usage(format!("--add-user: {error}"));
    users::check_name(name).map_err(usage_error)?;
    read_valid_users(file)?;
    let passwd = read_new_password(name)?;
    let line = users::new_entry(name, passwd.as_bytes()).map_err(usage_error)?;
    // Read again: another process may have edited the file during the prompt.
    let text = read_valid_users(file)?;
    let is_new = users::edit_entry(&text, name, None).is_none();
    replace_file(file, &users::edit_entry(&text, name, Some(&line)).unwrap_or_default())?;
    Ok(change_report(file, if is_new { "added user" } else { "changed the password of" }, name))
}

fn change_report(file: &Path, change: &str, name: &str) -> String {
    format!("{}: {change} {name} (send SIGHUP to a running server)", file.display())
}

/// Reads a users file and checks that it is valid. A missing file is empty.
fn read_valid_users(file: &Path) -> CliResult<String> {
    let text = if file.exists() { read_file("--users", file, MAX_USERS_FILE)? } else { String::new() };
    Users::parse(&text).map_err(|error| file_error(file, error))?;
    Ok(text)
}

/// Removes a user. Returns a report for the user.
pub(super) fn remove_user(file: &Path, name: &str) -> CliResult<String> {
    let text = read_file("--users", file, MAX_USERS_FILE)?;
    let text = users::edit_entry(&text, name, None).ok_or_else(|| file_error(file, format!("no user {name:?}")))?;
    replace_file(file, &text)?;
    Ok(change_report(file, "removed user", name))
}

/// Replaces a file atomically, with the same owner, group and mode. A new file can be read only by its owner.
fn replace_file(file: &Path, text: &str) -> CliResult {
    // Replaces the target of a symbolic link, not the link.
    let target = output_file::resolve_links(file).map_err(|error| file_error(file, error))?;
    let write = |new: &mut fs::File| {
        new.write_all(text.as_bytes())?;
        if let Ok(old) = fs::metadata(&target) {
            let own = new.metadata()?;
            if (own.uid(), own.gid()) != (old.uid(), old.gid()) {
                fchown(&*new, Some(old.uid()), Some(old.gid())).map_err(|error| {
                    let (uid, gid) = (old.uid(), old.gid());
                    io::Error::other(format!("keep owner {uid} and group {gid}: {} (run s5 as root)", error.kind()))
                })?;
            }
            // After fchown(2), which clears the bits of set-user-ID and set-group-ID.
            new.set_permissions(old.permissions())?;
        }
        new.sync_all()
    };
    output_file::replace(&target, 0o600, write).map_err(|error| file_error(file, error))
}

/// Reads a password: twice and without echo from the terminal, or the first line of stdin if that is not a terminal.
fn read_new_password(name: &str) -> CliResult<String> {
    let read_error =
        |error: io::Error| CliError::new(ExitStatus::FAILURE, format!("read the password for {name:?}: {error}"));
    if !io::stdin().is_terminal() {
        let mut line = String::new();
        let mut stdin = io::Read::take(io::stdin().lock(), 4096);
        stdin.read_line(&mut line).map_err(read_error)?;
        // A byte order mark comes from editors and shells on Windows.
        return Ok(line.trim_start_matches('\u{feff}').trim_end_matches(['\r', '\n']).into());
    }
    let first = secrets::prompt_password(&escape(&format!("Password for {name}: "))).map_err(read_error)?;
    let again = secrets::prompt_password("Repeat the password: ").map_err(read_error)?;
    let mismatch = "the passwords do not match; the users file is unchanged";
    if first == again { Ok(first) } else { Err(CliError::new(ExitStatus::FAILURE, mismatch)) }
}
