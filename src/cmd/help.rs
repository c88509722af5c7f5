//! What `--help` and `--man` print, made from the definitions that argh reads the command line by.

use std::fmt::Write as _;

use argh::{ArgsInfo as _, CommandInfoWithArgs, FlagInfo, FlagInfoKind};
use roff::{Inline, Roff, bold, italic, roman};

use super::exit_status::ExitStatus;
use super::{Args, NAME};

/// How wide a line of help may be, in columns.
const WIDTH: usize = 80;

/// What `--help` prints for the program or for a mode of it.
pub(super) fn text(command: &CommandInfoWithArgs, is_mode: bool) -> String {
    let mut out = format!("Usage: {}\n", usage(command, is_mode));
    paragraph(&mut out, command.description, 0);
    if !command.commands.is_empty() {
        out.push_str("\nModes:\n");
        for mode in &command.commands {
            let _ = writeln!(out, "  {}", mode.name);
            wrap(&mut out, mode.command.description, 8);
        }
    }
    out.push_str("\nOptions:\n");
    for flag in command.flags {
        let short = flag.short.map_or("    ".into(), |short| format!("-{short}, "));
        let value = value(flag).map(|value| format!(" {value}")).unwrap_or_default();
        let _ = writeln!(out, "  {short}{}{value}", flag.long);
        wrap(&mut out, flag.description, 8);
    }
    for note in command.notes {
        paragraph(&mut out, note, 0);
    }
    if !command.examples.is_empty() {
        out.push_str("\nExamples:\n");
        for line in command.examples.iter().flat_map(|example| example.lines()) {
            let _ = writeln!(out, "  {line}");
        }
    }
    let _ = write!(out, "\nThe manual: {NAME} --man | man -l -\n");
    out
}

fn usage(command: &CommandInfoWithArgs, is_mode: bool) -> String {
    let mut usage =
        if is_mode { format!("{NAME} {} [options]", command.name) } else { format!("{NAME} <mode> [options]") };
    for positional in command.positionals {
        let _ = write!(usage, " [{}]", positional.name);
    }
    usage
}

/// What an option takes.
pub(super) fn value<'a>(flag: &FlagInfo<'a>) -> Option<&'a str> {
    match flag.kind {
        FlagInfoKind::Switch => None,
        FlagInfoKind::Option { arg_name } => Some(arg_name),
    }
}

fn paragraph(out: &mut String, text: &str, indent: usize) {
    for part in text.split("\n\n").filter(|part| !part.is_empty()) {
        out.push('\n');
        wrap(out, part, indent);
    }
}

/// Appends `text` in lines of at most `WIDTH` columns, as far as its words let it.
fn wrap(out: &mut String, text: &str, indent: usize) {
    let mut line = " ".repeat(indent);
    for word in text.split_whitespace() {
        if line.trim().is_empty() {
            line.push_str(word);
        } else if line.chars().count() + 1 + word.chars().count() <= WIDTH {
            let _ = write!(line, " {word}");
        } else {
            let _ = writeln!(out, "{line}");
            line = format!("{}{word}", " ".repeat(indent));
        }
    }
    let _ = writeln!(out, "{line}");
}

/// The manual page, in roff.
pub(super) fn manual() -> String {
    let program = Args::get_args_info();
    let mut roff = Roff::new();
    roff.control("TH", ["S5", "1", "", &format!("{NAME} {}", env!("CARGO_PKG_VERSION")), "User Commands"]);
    roff.control("SH", ["NAME"]);
    roff.text([roman(format!("{NAME} - a SOCKS5 server, and a netcat through SOCKS5 proxies"))]);
    roff.control("SH", ["SYNOPSIS"]);
    for mode in &program.commands {
        roff.text([
            bold(format!("{NAME} {}", mode.name)),
            roman(usage(&mode.command, true).replacen(&format!("{NAME} {}", mode.name), "", 1)),
        ]);
        roff.control("br", []);
    }
    for flag in program.flags {
        roff.text([
            bold(NAME),
            roman(" "),
            bold(flag.long),
            roman(value(flag).map(|value| format!(" {value}")).unwrap_or_default()),
        ]);
        roff.control("br", []);
    }
    for mode in &program.commands {
        section(&mut roff, mode.name, &mode.command);
    }
    roff.control("SH", ["EXIT STATUS"]);
    for (code, meaning) in ExitStatus::ALL {
        roff.control("TP", ["6"]);
        roff.text([bold(code.to_string())]);
        roff.text([roman(meaning.replace('`', ""))]);
    }
    roff.control("SH", ["SEE ALSO"]);
    roff.text([
        bold("ssh_config"),
        roman("(5), "),
        bold("nc"),
        roman("(1), "),
        bold("curl"),
        roman("(1); RFC 1928, RFC 1929, RFC 1961"),
    ]);
    // The library leaves an empty date out, and what is not ASCII is not in every locale.
    roff.render().replacen(".TH S5 1  ", ".TH S5 1 \"\" ", 1).replace('…', "...")
}

/// What the manual says of one mode.
fn section(roff: &mut Roff, name: &str, command: &CommandInfoWithArgs) {
    roff.control("SH", [format!("{NAME} {name}").to_uppercase().as_str()]);
    roff.text([roman(command.description)]);
    for flag in command.flags {
        roff.control("TP", []);
        let mut head: Vec<Inline> = Vec::new();
        if let Some(short) = flag.short {
            head.extend([bold(format!("-{short}")), roman(", ")]);
        }
        head.push(bold(flag.long));
        if let Some(value) = value(flag) {
            head.extend([roman(" "), italic(value)]);
        }
        roff.text(head);
        roff.text([roman(flag.description)]);
    }
    for part in command.notes.iter().flat_map(|note| note.split("\n\n")).filter(|part| !part.is_empty()) {
        roff.control("PP", []);
        roff.text([roman(part)]);
    }
    if !command.examples.is_empty() {
        roff.control("SS", ["Examples"]);
        roff.control("nf", []);
        roff.control("RS", ["4"]);
        for line in command.examples.iter().flat_map(|example| example.lines()) {
            roff.text([roman(line)]);
        }
        roff.control("RE", []);
        roff.control("fi", []);
    }
}
