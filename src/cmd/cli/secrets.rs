//! Removes passwords from messages and from the arguments of the process. Before that, ps(1) shows them.

use std::fs::{self, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

const FILLER: u8 = b'x';

/// Returns `arg` with `…` instead of the text before its last `@`. A scheme is kept.
pub(crate) fn without_userinfo(arg: &str) -> String {
    match arg.rsplit_once('@') {
        Some((before, host)) => match before.split_once("://") {
            Some((scheme, _)) => format!("{scheme}://…@{host}"),
            None => format!("…@{host}"),
        },
        None => arg.into(),
    }
}

/// Overwrites passwords in the command line of this process: in URLs, and in `user`, the `user:password` value of an
/// option. `args` is a copy of the command line. Failures are only logged.
pub(crate) fn redact(args: &[String], user: Option<&str>) {
    // In memory, each argument ends with a NUL.
    let original: Vec<u8> = args.iter().flat_map(|arg| arg.bytes().chain([0])).collect();
    let mut redacted = original.clone();
    let mut rest = redacted.as_mut_slice();
    for arg in args {
        let (bytes, after) = rest.split_at_mut((arg.len() + 1).min(rest.len()));
        for span in [password_in_url(arg), user.and_then(|user| password_in_option(arg, user))].into_iter().flatten() {
            bytes.get_mut(span).unwrap_or_default().fill(FILLER);
        }
        rest = after;
    }
    if redacted != original
        && let Err(error) = overwrite_arguments(&original, &redacted)
    {
        log::debug!("cannot overwrite a password in the command line: {error}");
    }
}

/// Returns the range of the password in a URL. In a list of URLs, it extends from the first password to the last one.
pub fn password_in_url(arg: &str) -> Option<Range<usize>> {
    let (before, _) = arg.rsplit_once('@')?;
    let colon = before.find(':')?;
    let start = match before.get(colon..)?.strip_prefix("://") {
        Some(userinfo) => colon + 3 + userinfo.find(':')? + 1,
        None => colon + 1,
    };
    Some(start..before.len())
}

/// Returns the range of the password in an argument that ends with `value`, which is `user:password`.
pub fn password_in_option(arg: &str, value: &str) -> Option<Range<usize>> {
    let (_, password) = value.split_once(':')?;
    arg.ends_with(value).then(|| arg.len() - password.len()..arg.len())
}

/// Writes to the arguments through /proc/self/mem, at the address that /proc/self/stat reports.
fn overwrite_arguments(original: &[u8], redacted: &[u8]) -> io::Result<()> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    // arg_start is field 48 of proc_pid_stat(5). Field 3 follows the name, which is in parentheses.
    let field = stat.rsplit_once(')').and_then(|(_, fields)| fields.split_ascii_whitespace().nth(48 - 3));
    let start = field.and_then(|field| field.parse().ok()).ok_or(io::ErrorKind::Unsupported)?;
    let memory = OpenOptions::new().read(true).write(true).open("/proc/self/mem")?;
    let mut found = vec![0; original.len()];
    memory.read_exact_at(&mut found, start)?;
    if found == original { memory.write_all_at(redacted, start) } else { Err(io::ErrorKind::InvalidData.into()) }
}
