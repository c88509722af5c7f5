//! Removes passwords from messages and from the arguments of the process, which ps(1) shows. Other users may read them
//! before s5 overwrites them.

use std::ops::Range;

/// Replaces each byte of a password.
const FILLER: u8 = b'x';

/// Returns `arg` with `…` instead of the text before its last `@`. A scheme is kept.
pub(in crate::cmd) fn without_userinfo(arg: &str) -> String {
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
pub(in crate::cmd) fn redact(args: &[&[u8]], user: Option<&str>) {
    let spans: Vec<(usize, Range<usize>)> = args
        .iter()
        .enumerate()
        .flat_map(|(i, arg)| {
            let spans = [password_in_url(arg), user.and_then(|user| password_in_option(arg, user.as_bytes()))];
            spans.into_iter().flatten().map(move |span| (i, span))
        })
        .collect();
    if !spans.is_empty()
        && let Err(error) = overwrite_arguments(args, &spans)
    {
        log::debug!("cannot overwrite a password in the command line: {error}");
    }
}

/// Returns the range of the password in a URL. In a list of URLs, it extends from the first password to the last one.
fn password_in_url(arg: &[u8]) -> Option<Range<usize>> {
    let end = arg.iter().rposition(|byte| *byte == b'@')?;
    let before = arg.get(..end)?;
    let colon = before.iter().position(|byte| *byte == b':')?;
    let from_colon = before.get(colon..)?;
    match from_colon.strip_prefix(b"://") {
        Some(userinfo) => {
            let password_colon = userinfo.iter().position(|byte| *byte == b':')?;
            Some(colon + 3 + password_colon + 1..end)
        }
        None => Some(colon + 1..end),
    }
}

/// Returns the range of the password in an argument that ends with `value`, which is `user:password`.
fn password_in_option(arg: &[u8], value: &[u8]) -> Option<Range<usize>> {
    let colon = value.iter().position(|byte| *byte == b':')?;
    arg.ends_with(value).then(|| arg.len() - value.len() + colon + 1..arg.len())
}

/// Writes to the arguments through /proc/self/mem, at the address that /proc/self/stat reports.
fn overwrite_arguments(args: &[&[u8]], spans: &[(usize, Range<usize>)]) -> std::io::Result<()> {
    use std::os::unix::fs::FileExt as _;
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    // arg_start is field 48 of proc_pid_stat(5). Field 3 follows the name, which is in parentheses.
    let field = stat.rsplit_once(')').and_then(|(_, fields)| fields.split_ascii_whitespace().nth(48 - 3));
    let start = field.and_then(|field| field.parse::<u64>().ok()).ok_or(std::io::ErrorKind::Unsupported)?;
    let memory = std::fs::OpenOptions::new().read(true).write(true).open("/proc/self/mem")?;
    let expected = args.iter().flat_map(|arg| arg.iter().copied().chain([0])).collect::<Vec<u8>>();
    let mut found = vec![0; expected.len()];
    memory.read_exact_at(&mut found, start)?;
    if found != expected {
        return Err(std::io::ErrorKind::InvalidData.into());
    }
    let mut addr = start;
    for (i, arg) in args.iter().enumerate() {
        for (_, span) in spans.iter().filter(|(index, _)| *index == i) {
            memory.write_all_at(&vec![FILLER; span.len()], addr + span.start as u64)?;
        }
        addr += arg.len() as u64 + 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn password_is_found_in_urls_and_option_values() {
        let table = [
            ("alice:secret@proxy", Some("secret")),
            ("socks5h://alice:secret@proxy:1", Some("secret")),
            ("--proxy=socks5h://alice:secret@proxy", Some("secret")),
            ("-xalice:se:cr@et@proxy", Some("se:cr@et")),
            ("-xalice:a://b@proxy", Some("a://b")),
            ("name=alice:secret@proxy", Some("secret")),
            ("alice:one@first,bob:two@second", Some("one@first,bob:two")),
            ("alice@proxy:1080", None),
            ("alice@[::1]:1080", None),
            ("[::1]:1080", None),
            ("", None),
        ];
        for (arg, secret) in table {
            let found = password_in_url(arg.as_bytes()).and_then(|span| arg.get(span));
            assert_eq!(found, secret, "{arg}");
        }
        let table = [("-Palice:a:b", Some("a:b")), ("alice:a:b", Some("a:b")), ("alice:a:bc", None)];
        for (arg, secret) in table {
            let found = password_in_option(arg.as_bytes(), b"alice:a:b").and_then(|span| arg.get(span));
            assert_eq!(found, secret, "{arg}");
        }
    }
}
