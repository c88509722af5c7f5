//! The manual page in man(7) format: the prose of `s5.1`, with options and exit statuses from their definitions.

use std::fmt::Write as _;

use super::argv::ALIASES;
use super::exit::ExitStatus;
use super::help::heading;
use super::syntax::{NAME, Syntax, optional_value_name, split_summary, value_name};

/// The page. A line that begins with `@` is replaced by the generated text of that name.
const PAGE: &str = include_str!("s5.1");

pub(crate) fn text(program: &Syntax) -> String {
    let (server, clients) = program.modes.split_at(1.min(program.modes.len()));
    let mut out = String::new();
    for line in PAGE.lines() {
        match line.strip_prefix('@') {
            None => out += &format!("{line}\n"),
            Some("title") => out += &format!(".TH S5 1 2026-11-26 \"{NAME} {}\"\n", env!("CARGO_PKG_VERSION")),
            Some("synopsis") => push_synopsis(&mut out, program),
            Some("server options") => push_options(&mut out, server),
            Some("client options") => push_options(&mut out, clients),
            Some("exit statuses") => push_exit_statuses(&mut out),
            Some(other) => debug_assert!(false, "unknown placeholder @{other}"),
        }
    }
    out
}

fn push_synopsis(out: &mut String, program: &Syntax) {
    for mode in &program.modes {
        let usage = mode.usage();
        let args = usage.strip_prefix(&format!("{NAME} {}", mode.name)).unwrap_or_default();
        let _ = writeln!(out, ".B {NAME} {}\n{}\n.br", mode.name, escape(args.trim()));
    }
    for flag in program.options().filter(|flag| flag.long != "--verbose") {
        let value = value_name(flag).map(|value| format!("\n.I {value}")).unwrap_or_default();
        let value = if flag.long == "--version" { "\n.RB [ \\-\\-verbose ]".into() } else { value };
        let _ = writeln!(out, ".B {NAME} {}{value}\n.br", escape(flag.long));
    }
    let _ = writeln!(out, ".B {NAME}\n.RI [ mode ]\n.B {}", escape("--help"));
}

/// Appends an entry for each option with its aliases. It names the modes that support it if not all of them do.
fn push_options(out: &mut String, modes: &[Syntax]) {
    let mut group = "";
    for flag in modes.first().map(|mode| mode.flags).unwrap_or_default().iter().filter(|flag| flag.long != "--help") {
        if let Some(heading) = heading(flag).filter(|heading| *heading != group) {
            let _ = writeln!(out, ".SS {heading}");
            group = heading;
        }
        let short = flag.short.map(|short| format!("\\fB\\-{short}\\fR, ")).unwrap_or_default();
        let value = value_name(flag).map(|value| format!(" \\fI{}\\fR", escape(value))).unwrap_or_default();
        let optional = optional_value_name(flag).map(|value| format!("[=\\fI{value}\\fR]")).unwrap_or_default();
        let _ = writeln!(out, ".TP\n{short}\\fB{}\\fR{value}{optional}", escape(flag.long));
        let (summary, details) = split_summary(flag);
        let mut chars = summary.chars();
        let first = chars.next().map(|c| c.to_uppercase().to_string()).unwrap_or_default();
        push_paragraph(out, &format!("{first}{}. {details}", chars.as_str()));
        for (alias, _) in ALIASES.iter().filter(|(_, long)| *long == flag.long) {
            push_paragraph(out, &format!("Alias: {alias}."));
        }
        let supporting = modes.iter().filter(|mode| mode.refusal(flag).is_none());
        let supporting: Vec<&str> = supporting.map(|mode| mode.name).collect();
        if supporting.len() < modes.len() {
            push_paragraph(out, &format!("Only for {}.", supporting.join(" and ")));
        }
    }
}

fn push_exit_statuses(out: &mut String) {
    for (code, meaning) in ExitStatus::ALL {
        let _ = writeln!(out, ".TP 6\n.B {code}");
        push_paragraph(out, &meaning.replace('`', ""));
    }
}

/// Appends `text` in lines of at most 80 bytes. Each sentence begins a new line, as is usual in man(7) pages.
fn push_paragraph(out: &mut String, text: &str) {
    let mut line = String::new();
    for word in escape(text).split_whitespace() {
        if !line.is_empty() && (line.len() + 1 + word.len() > 80 || line.ends_with('.')) {
            let _ = writeln!(out, "{line}");
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        } else if word.starts_with(['.', '\'']) {
            line.push_str("\\&");
        }
        line.push_str(word);
    }
    if !line.is_empty() {
        let _ = writeln!(out, "{line}");
    }
}

/// Escapes text for roff, which prints a plain `-` as a hyphen that cannot be copied to a shell.
fn escape(text: &str) -> String {
    text.replace('\\', "\\e").replace('-', "\\-")
}
