//! The text of `--help`, made from the definitions that argh parses the command line by.

use std::fmt::Write as _;

use argh::{CommandInfoWithArgs, FlagInfo, FlagInfoKind};

use super::NAME;

/// Width of the text, in columns.
const WIDTH: usize = 80;
/// Column at which the description of an option begins.
const COLUMN: usize = 30;

/// The option that begins a group, and the heading of the group. A mode may lack the first options of a group, so that
/// several options name the same heading.
const GROUPS: [(&str, &str); 11] = [
    ("--version", "Options"),
    ("--listen", "Listening"),
    ("--bound-to", "Listening"),
    ("--users", "Access"),
    ("--via", "Routing"),
    ("--max-connections", "Limits"),
    ("--proxy", "Proxy"),
    ("--proxy-dns", "Addresses"),
    ("--timeout", "Limits"),
    ("--zero-io", "Data"),
    ("--verbose", "Logging"),
];

/// Returns the help of the program or of one of its modes.
pub(super) fn text(command: &CommandInfoWithArgs, is_mode: bool) -> String {
    let mut out = format!("Usage: {}\n{}\n", usage(command, is_mode), command.description.trim());
    if !command.commands.is_empty() {
        out.push_str("Modes\n");
        for mode in &command.commands {
            entry(&mut out, mode.name, mode.command.description);
        }
    }
    let mut group = "";
    for flag in options_of(command.flags) {
        if let Some(heading) = heading(flag).filter(|heading| *heading != group) {
            let _ = writeln!(out, "{heading}");
            group = heading;
        }
        entry(&mut out, &head(flag), summary(flag));
    }
    let _ = if is_mode {
        writeln!(out, "TIME is in seconds, or 500ms, 10s, 5m, 2h. Manual: {NAME} --man | man -l -")
    } else {
        writeln!(out, "Help for a mode: {NAME} <mode> --help. Manual: {NAME} --man | man -l -")
    };
    out
}

/// Returns the synopsis of the program or of one of its modes.
pub(super) fn usage(command: &CommandInfoWithArgs, is_mode: bool) -> String {
    let mut usage =
        if is_mode { format!("{NAME} {} [options]", command.name) } else { format!("{NAME} <mode> [options]") };
    for positional in command.positionals {
        let _ = write!(usage, " [{}]", positional.name);
    }
    usage
}

/// Returns the options that are listed: all but `--help`.
pub(super) fn options_of<'a, 'b>(flags: &'a [FlagInfo<'b>]) -> impl Iterator<Item = &'a FlagInfo<'b>> {
    flags.iter().filter(|flag| flag.long != "--help")
}

/// Returns the heading of the group that begins with this option.
pub(super) fn heading(flag: &FlagInfo<'_>) -> Option<&'static str> {
    GROUPS.iter().find(|(first, _)| *first == flag.long).map(|(_, heading)| *heading)
}

/// Returns the placeholder for the value of an option.
pub(super) fn value<'a>(flag: &FlagInfo<'a>) -> Option<&'a str> {
    match flag.kind {
        FlagInfoKind::Switch => None,
        FlagInfoKind::Option { arg_name } => Some(arg_name),
    }
}

/// Splits a description into its first sentence, which is the line of the help, and the details for the manual.
pub(super) fn sentences<'a>(flag: &FlagInfo<'a>) -> (&'a str, &'a str) {
    let text = flag.description.trim();
    text.split_once(". ").unwrap_or((text, ""))
}

/// Returns the line that describes an option in the help and in completions.
pub(super) fn summary<'a>(flag: &FlagInfo<'a>) -> &'a str {
    sentences(flag).0
}

/// Returns the names and the value of an option.
fn head(flag: &FlagInfo<'_>) -> String {
    let short = flag.short.map(|short| format!("-{short}, ")).unwrap_or_default();
    let value = value(flag).map(|value| format!(" {value}")).unwrap_or_default();
    format!("{short}{}{value}", flag.long)
}

/// Appends an entry of two columns. A head that is too wide for its column stands on a line of its own.
fn entry(out: &mut String, head: &str, description: &str) {
    let mut line = format!("  {head}");
    if line.len() + 2 > COLUMN {
        let _ = writeln!(out, "{line}");
        line.clear();
    }
    line = format!("{line:COLUMN$}");
    for (at, word) in description.split_whitespace().enumerate() {
        if at > 0 && line.chars().count() + 1 + word.chars().count() > WIDTH {
            let _ = writeln!(out, "{line}");
            line = " ".repeat(COLUMN);
        } else if at > 0 {
            line.push(' ');
        }
        line.push_str(word);
    }
    let _ = writeln!(out, "{line}");
}
