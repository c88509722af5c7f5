//! Passwords that were given in the command line: not shown in messages, and overwritten there, so that ps(1) does not
//! show them either. Others may have looked before.

use std::ops::Range;

/// What a password in the command line is overwritten with.
#[cfg(target_os = "linux")]
const FILLER: u8 = b'x';

/// What stands before an `@`, but for a scheme, is not shown.
pub(super) fn without_userinfo(word: &str) -> String {
    match word.rsplit_once('@') {
        Some((before, host)) => match before.split_once("://") {
            Some((scheme, _)) => format!("{scheme}://…@{host}"),
            None => format!("…@{host}"),
        },
        None => word.into(),
    }
}

/// Overwrites in the command line of this process, of which `words` are a copy, the passwords of URLs and that of
/// `user`, which is the value of an option. As far as the system lets it.
pub(super) fn redact(words: &[&[u8]], user: Option<&str>) {
    let spans: Vec<(usize, Range<usize>)> = words
        .iter()
        .enumerate()
        .flat_map(|(i, word)| {
            let spans = [password_in_url(word), user.and_then(|user| password_in_option(word, user.as_bytes()))];
            spans.into_iter().flatten().map(move |span| (i, span))
        })
        .collect();
    if !spans.is_empty() {
        #[cfg(target_os = "linux")]
        if let Err(error) = overwrite_arguments(words, &spans) {
            log::debug!("a password stays in the command line: {error}");
        }
    }
}

/// Where a word has passwords, from the first to the end of the last.
fn password_in_url(word: &[u8]) -> Option<Range<usize>> {
    let end = word.iter().rposition(|octet| *octet == b'@')?;
    let before = word.get(..end)?;
    let colon = before.iter().position(|octet| *octet == b':')?;
    let rest = before.get(colon..)?;
    match rest.strip_prefix(b"://") {
        // Behind a scheme.
        Some(userinfo) => {
            let second = userinfo.iter().position(|octet| *octet == b':')?;
            Some(colon + 3 + second + 1..end)
        }
        None => Some(colon + 1..end),
    }
}

/// Where a word that is or ends with `user:password` has the password.
fn password_in_option(word: &[u8], value: &[u8]) -> Option<Range<usize>> {
    let colon = value.iter().position(|octet| *octet == b':')?;
    word.ends_with(value).then(|| word.len() - value.len() + colon + 1..word.len())
}

/// The kernel says where the command line is, and gives this process its own memory as a file.
#[cfg(target_os = "linux")]
fn overwrite_arguments(words: &[&[u8]], spans: &[(usize, Range<usize>)]) -> std::io::Result<()> {
    use std::os::unix::fs::FileExt as _;
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    // arg_start, field 48 of proc_pid_stat(5); the third comes behind the name, which is in brackets.
    let field = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_ascii_whitespace().nth(48 - 3));
    let start = field.and_then(|field| field.parse::<u64>().ok()).ok_or(std::io::ErrorKind::Unsupported)?;
    let memory = std::fs::OpenOptions::new().read(true).write(true).open("/proc/self/mem")?;
    let expected = words.iter().flat_map(|word| word.iter().copied().chain([0])).collect::<Vec<u8>>();
    let mut found = vec![0; expected.len()];
    memory.read_exact_at(&mut found, start)?;
    if found != expected {
        return Err(std::io::ErrorKind::InvalidData.into());
    }
    let mut at = start;
    for (i, word) in words.iter().enumerate() {
        for (_, span) in spans.iter().filter(|(of, _)| *of == i) {
            memory.write_all_at(&vec![FILLER; span.len()], at + span.start as u64)?;
        }
        at += word.len() as u64 + 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_found_wherever_it_stands() {
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
        for (word, secret) in table {
            let found = password_in_url(word.as_bytes()).and_then(|span| word.get(span));
            assert_eq!(found, secret, "{word}");
        }
        let table = [("-Palice:a:b", Some("a:b")), ("alice:a:b", Some("a:b")), ("alice:a:bc", None)];
        for (word, secret) in table {
            let found = password_in_option(word.as_bytes(), b"alice:a:b").and_then(|span| word.get(span));
            assert_eq!(found, secret, "{word}");
        }
    }
}
