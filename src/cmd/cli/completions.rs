//! `--completions`: scripts that complete the modes, their options, and file names as values of options.
//!
//! The generators for argh are not used. Their scripts do not complete files, mistake a host named like a mode for the
//! mode, and call functions that fish 3 does not have.

use std::fmt::Write as _;

use argh::FlagInfo;

use super::syntax::{Syntax, summary, value_name};

pub(crate) type ScriptFn = fn(&Syntax) -> String;

pub(crate) fn parse_shell(text: &str) -> Result<ScriptFn, String> {
    match text {
        "bash" => Ok(bash),
        "zsh" => Ok(zsh),
        "fish" => Ok(fish),
        _ => Err("expected bash, zsh or fish".into()),
    }
}

fn names(flag: &FlagInfo<'_>) -> impl Iterator<Item = String> {
    flag.short.map(|short| format!("-{short}")).into_iter().chain([flag.long.to_owned()])
}

fn option_names(syntax: &Syntax) -> String {
    syntax.options().flat_map(names).collect::<Vec<_>>().join(" ")
}

/// Encloses text in single quotes for bash and zsh.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// Replaces the words of the first argument and the cases of the modes in the template of a script.
fn fill(template: &str, first: &str, cases: &[String]) -> String {
    template.replace("@first@", first).replace("@cases@", &cases.join("\n"))
}

fn bash(program: &Syntax) -> String {
    let modes: Vec<&str> = program.modes.iter().map(|mode| mode.name).collect();
    let first = quote(&format!("{} {}", modes.join(" "), option_names(program)));
    let case = |mode: &Syntax| format!("            {}) words={} ;;", mode.name, quote(&option_names(mode)));
    let cases: Vec<String> = program.modes.iter().map(case).collect();
    fill(include_str!("completions.bash"), &first, &cases)
}

fn zsh(program: &Syntax) -> String {
    let escape = |text: &str| text.replace('[', "(").replace(']', ")").replace(':', "\\:");
    let line = |text: String| format!("            {}", quote(&text));
    let spec = |flag: &FlagInfo<'_>, name: &str| {
        let action = value_name(flag).map(|value| format!(":{}:_files", escape(value))).unwrap_or_default();
        line(format!("*{name}[{}]{action}", escape(summary(flag))))
    };
    let modes = program.modes.iter().map(|mode| (mode.name, mode.description));
    let first = modes.chain(program.options().map(|flag| (flag.long, summary(flag))));
    let first: Vec<String> = first.map(|(name, text)| line(format!("{name}:{}", escape(text)))).collect();
    let case = |mode: &Syntax| {
        let specs = mode.options().flat_map(|flag| names(flag).map(move |name| (flag, name)));
        let specs: Vec<String> = specs.map(|(flag, name)| spec(flag, &name)).collect();
        format!("        {}) specs=(\n{}\n        ) ;;", mode.name, specs.join("\n"))
    };
    let cases: Vec<String> = program.modes.iter().map(case).collect();
    fill(include_str!("completions.zsh"), &first.join("\n"), &cases)
}

fn fish(program: &Syntax) -> String {
    // In fish, backslash is special within single quotes too.
    let quote = |text: &str| format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"));
    let mut out = String::new();
    let mut options = |condition: &str, syntax: &Syntax| {
        for flag in syntax.options() {
            let short = flag.short.map(|short| format!(" -s {short}")).unwrap_or_default();
            let required = if value_name(flag).is_some() { " -r" } else { "" };
            let (long, description) = (flag.long.trim_start_matches('-'), quote(summary(flag)));
            let _ = writeln!(out, "complete -c s5 -n '{condition}'{short} -l {long}{required} -d {description}");
        }
    };
    options("__fish_use_subcommand", program);
    for mode in &program.modes {
        options(&format!("__fish_seen_subcommand_from {}", mode.name), mode);
    }
    for mode in &program.modes {
        let description = quote(mode.description);
        let _ = writeln!(out, "complete -c s5 -n __fish_use_subcommand -f -a {} -d {description}", mode.name);
    }
    out
}
