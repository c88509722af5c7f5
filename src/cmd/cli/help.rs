//! The text of `--help`.

use std::fmt::Write as _;

use argh::FlagInfo;

use super::syntax::{NAME, Syntax, optional_value_name, summary, value_name};

const WIDTH: usize = 80;
const DESCRIPTION_COLUMN: usize = 30;

/// Options that begin a group, and its heading. A group has several if not every mode supports the first.
const GROUPS: [(&str, &str); 11] = [
    ("--version", "Options"),
    ("--listen", "Listening"),
    ("--address-file", "Listening"),
    ("--users", "Access"),
    ("--via", "Routing"),
    ("--max-connections", "Limits"),
    ("--proxy", "Proxy"),
    ("--proxy-dns", "Addresses"),
    ("--timeout", "Limits"),
    ("--zero-io", "Data"),
    ("--verbose", "Logging"),
];

/// Options with `hidden_help` are only in the manual, so that the help fits on two screens: few users need them.
pub(crate) fn text(syntax: &Syntax) -> String {
    let mut out = format!("Usage: {}\n{}\n", syntax.usage(), syntax.description.trim());
    if !syntax.modes.is_empty() {
        out.push_str("Modes\n");
        for mode in &syntax.modes {
            push_entry(&mut out, mode.name, mode.description);
        }
    }
    let mut group = "";
    for flag in syntax.options().filter(|flag| !flag.hidden) {
        // "Options" has all options of the program itself.
        if let Some(heading) = heading(flag).filter(|heading| *heading != group && group != "Options") {
            let _ = writeln!(out, "{heading}");
            group = heading;
        }
        push_entry(&mut out, &synopsis(flag), summary(flag));
    }
    let modes = format!("Help for a mode: {NAME} <mode> --help");
    let hint = if syntax.modes.is_empty() { "TIME is in seconds, or 500ms, 10s, 1m30s, 2h" } else { &modes };
    let _ = writeln!(out, "{hint}. Manual: {NAME} --man | man -l -");
    out
}

/// Returns the heading of the group that begins with this option.
pub(crate) fn heading(flag: &FlagInfo<'_>) -> Option<&'static str> {
    GROUPS.iter().find(|(first, _)| *first == flag.long).map(|(_, heading)| *heading)
}

/// Returns the names and the value of an option, such as `-x, --proxy URL`.
fn synopsis(flag: &FlagInfo<'_>) -> String {
    let short = flag.short.map(|short| format!("-{short}, ")).unwrap_or_default();
    let value = value_name(flag).map(|value| format!(" {value}")).unwrap_or_default();
    let optional = optional_value_name(flag).map(|value| format!("[={value}]")).unwrap_or_default();
    format!("{short}{}{value}{optional}", flag.long)
}

/// Appends an entry of two columns. The description starts on the next line if `name` is too long for its column.
fn push_entry(out: &mut String, name: &str, description: &str) {
    let mut line = format!("  {name}");
    if line.len() + 2 > DESCRIPTION_COLUMN {
        let _ = writeln!(out, "{line}");
        line.clear();
    }
    line = format!("{line:DESCRIPTION_COLUMN$}");
    for (i, word) in description.split_whitespace().enumerate() {
        if i > 0 && line.chars().count() + 1 + word.chars().count() > WIDTH {
            let _ = writeln!(out, "{line}");
            line = " ".repeat(DESCRIPTION_COLUMN);
        } else if i > 0 {
            line.push(' ');
        }
        line.push_str(word);
    }
    let _ = writeln!(out, "{line}");
}
