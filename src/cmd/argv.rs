//! The command line as argh wants it. Hands write `--opt=value`, `-w3` and `-zv`, and argh takes none of them; which
//! options take a value is read off the definitions that the help is made from.

use argh::{ArgsInfo, CommandInfoWithArgs, FlagInfo, FlagInfoKind};

use super::{Args, without_userinfo};

/// How far off a misspelt option may be, in letters.
const MISSPELT: usize = 3;

/// `args`, without the program's name, with each option and each value a word of its own.
///
/// # Errors
/// An option that there is not, with the nearest one that there is; or a value for one that takes none.
pub(super) fn normalise(args: &[String]) -> Result<Vec<String>, String> {
    let program = Args::get_args_info();
    let (first, rest) = match args.split_first() {
        Some((first, rest)) if !first.starts_with('-') => (Some(first), rest),
        _ => (None, args),
    };
    let mode = first.and_then(|first| program.commands.iter().find(|mode| mode.name == first));
    let command = mode.map_or(&program, |mode| &mode.command);
    let mut out: Vec<String> = first.into_iter().cloned().collect();
    let mut rest = rest.iter();
    while let Some(word) = rest.next() {
        match word.strip_prefix('-') {
            None | Some("") => out.push(word.clone()),
            Some("-") => {
                out.push(word.clone());
                out.extend(rest.by_ref().cloned());
            }
            Some(text) => {
                let wants_value = match text.strip_prefix('-') {
                    Some(long) => expand_long(command, long, &mut out)?,
                    None => expand_short(command, text, &mut out)?,
                };
                if wants_value {
                    // Whatever it looks like.
                    out.extend(rest.next().cloned());
                }
            }
        }
    }
    Ok(out)
}

/// A long option; true when its value is the next word.
fn expand_long(command: &CommandInfoWithArgs, text: &str, out: &mut Vec<String>) -> Result<bool, String> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (text, None),
    };
    let long = format!("--{name}");
    let flag = command.flags.iter().find(|flag| flag.long == long);
    let is_switch = match flag {
        Some(flag) => is_switch(flag),
        None if ["help", "version"].contains(&name) => true,
        None => return Err(unknown(command, &long)),
    };
    out.push(long);
    match value {
        Some(_) if is_switch => Err(format!("--{name} takes no value")),
        Some(value) => {
            out.push(value.into());
            Ok(false)
        }
        None => Ok(!is_switch),
    }
}

/// Short options in one word, the last of which may have its value behind it; true when that is the next word.
fn expand_short(command: &CommandInfoWithArgs, text: &str, out: &mut Vec<String>) -> Result<bool, String> {
    let mut chars = text.chars();
    while let Some(letter) = chars.next() {
        let flag = command.flags.iter().find(|flag| flag.short == Some(letter));
        if flag.is_none() && letter == 'h' {
            out.push("--help".into());
            continue;
        }
        let Some(flag) = flag else { return Err(unknown(command, &format!("-{letter}"))) };
        out.push(format!("-{letter}"));
        if !is_switch(flag) {
            let value = chars.as_str();
            let value = value.strip_prefix('=').unwrap_or(value);
            out.extend((!value.is_empty()).then(|| value.to_owned()));
            return Ok(value.is_empty());
        }
    }
    Ok(false)
}

fn is_switch(flag: &FlagInfo<'_>) -> bool {
    matches!(flag.kind, FlagInfoKind::Switch)
}

fn unknown(command: &CommandInfoWithArgs, option: &str) -> String {
    let known = command.flags.iter().map(|flag| flag.long).filter(|_| option.starts_with("--"));
    let nearest = known.map(|long| (strsim::osa_distance(long, option), long)).min();
    let option = without_userinfo(option);
    match nearest.filter(|(distance, _)| *distance <= MISSPELT) {
        Some((_, long)) => format!("unrecognized option {option}; is {long} meant?"),
        None => format!("unrecognized option {option}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(line: &str) -> Result<String, String> {
        normalise(&line.split(' ').map(String::from).collect::<Vec<_>>()).map(|words| words.join(" "))
    }

    #[test]
    fn what_hands_write_becomes_what_argh_takes() {
        let table = [
            ("connect -x proxy -w 3 host 80", "connect -x proxy -w 3 host 80"),
            ("connect -xproxy -w3 host:80", "connect -x proxy -w 3 host:80"),
            ("connect -vw3 host:80", "connect -v -w 3 host:80"),
            ("connect -vvw=3 host:80", "connect -v -v -w 3 host:80"),
            ("connect --proxy=a=b --timeout=3 host:80", "connect --proxy a=b --timeout 3 host:80"),
            ("connect --proxy= host:80", "connect --proxy  host:80"),
            ("connect -x -v host:80", "connect -x -v host:80"),
            ("connect -- -v -w3", "connect -- -v -w3"),
            ("connect - host", "connect - host"),
            ("serve --listen=*:1080 -qv", "serve --listen *:1080 -q -v"),
            ("--version", "--version"),
            ("connect --help", "connect --help"),
        ];
        for (line, expected) in table {
            assert_eq!(ask(line).as_deref(), Ok(expected), "{line}");
        }
    }

    #[test]
    fn a_misspelt_option_is_told_by_the_nearest() {
        let table = [
            ("connect --porxy a b", "unrecognized option --porxy; is --proxy meant?"),
            ("serve --user f", "unrecognized option --user; is --users meant?"),
            ("serve --nonsense", "unrecognized option --nonsense"),
            ("connect -vZ", "unrecognized option -Z"),
            ("connect --verbose=yes", "--verbose takes no value"),
            ("--versoin", "unrecognized option --versoin; is --version meant?"),
        ];
        for (line, expected) in table {
            assert_eq!(ask(line), Err(expected.into()), "{line}");
        }
    }
}
