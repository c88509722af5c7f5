//! The users file's upkeep: `--add-user` and `--remove-user`.

use std::fs;
use std::io::{self, BufRead as _, IsTerminal as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::load::{MAX_USERS_FILE, file_error, read_file};
use crate::cmd::{CliError, ExitStatus};
use crate::policy::users::{self, Users};

pub(super) fn add_user(file: &Path, name: &str) -> Result<(), CliError> {
    let usage_error = |error| CliError::usage(format!("--add-user: {error}"));
    users::check_name(name).map_err(usage_error)?;
    read_valid_users(file)?;
    let passwd = read_new_password(name)?;
    let line = users::new_entry(name, passwd.as_bytes()).map_err(usage_error)?;
    // Once more: somebody else may have edited it while we asked.
    let text = read_valid_users(file)?;
    replace_file(file, &users::edit_entry(&text, name, Some(&line)).unwrap_or_default())
}

/// The text of a users file that is in order, or of one that is not there yet.
fn read_valid_users(file: &Path) -> Result<String, CliError> {
    let text = if file.exists() { read_file(file, MAX_USERS_FILE)? } else { String::new() };
    Users::parse(&text).map_err(|error| file_error(file, error))?;
    Ok(text)
}

pub(super) fn remove_user(file: &Path, name: &str) -> Result<(), CliError> {
    let text = read_file(file, MAX_USERS_FILE)?;
    let text = users::edit_entry(&text, name, None).ok_or_else(|| file_error(file, format!("no user {name:?}")))?;
    // An empty file could also be one that is being written.
    replace_file(file, if text.is_empty() { "# no users\n" } else { &text })
}

/// Writes a new file beside the old one and renames it: whoever reads meanwhile sees one or the other, whole. Only
/// the owner, who stays the same, may read it.
fn replace_file(file: &Path, text: &str) -> Result<(), CliError> {
    // Through a link, so that the link stays one.
    let target = fs::canonicalize(file).unwrap_or_else(|_| file.into());
    let directory = target.parent().filter(|directory| !directory.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let write = || {
        let mut new = tempfile::NamedTempFile::new_in(directory)?;
        new.write_all(text.as_bytes())?;
        if let Ok(old) = fs::metadata(&target) {
            std::os::unix::fs::fchown(new.as_file(), Some(old.uid()), Some(old.gid()))?;
        }
        new.as_file().sync_all()?;
        new.persist(&target).map_err(|error| error.error).map(drop)
    };
    write().map_err(|error: io::Error| file_error(file, error))
}

/// Twice from the terminal, without echo; or the first line of a stdin that is none.
fn read_new_password(name: &str) -> Result<String, CliError> {
    let failed = |error: io::Error| CliError::new(ExitStatus::FAILURE, format!("no password for {name:?}: {error}"));
    if !io::stdin().is_terminal() {
        let mut line = String::new();
        let mut stdin = io::Read::take(io::stdin().lock(), 4096);
        stdin.read_line(&mut line).map_err(failed)?;
        return Ok(line.trim_end_matches(['\r', '\n']).into());
    }
    let first = rpassword::prompt_password(format!("password for {name}: ")).map_err(failed)?;
    let again = rpassword::prompt_password("again: ").map_err(failed)?;
    if first == again {
        Ok(first)
    } else {
        Err(CliError::new(ExitStatus::FAILURE, "the two passwords differ; nothing changed"))
    }
}
