//! `--completions`: scripts that complete the modes, their options, and file names as values of options.
//!
//! The generators for argh are not used. Their scripts do not complete files, mistake a host named like a mode for the
//! mode, and call functions that fish 3 does not have.

use std::fmt::Write as _;

use argh::FlagInfo;

use super::syntax::{Syntax, summary, value_name};

/// Returns the completion script of a shell.
pub(crate) type ScriptFn = fn(&Syntax) -> String;

/// Parses the name of a shell.
pub(crate) fn parse_shell(text: &str) -> Result<ScriptFn, String> {
    match text {
        "bash" => Ok(bash),
        "zsh" => Ok(zsh),
        "fish" => Ok(fish),
        _ => Err("expected bash, zsh or fish".into()),
    }
}

/// Returns the names of an option, the short one first.
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

fn bash(program: &Syntax) -> String {
    let modes: Vec<&str> = program.modes.iter().map(|mode| mode.name).collect();
    let mut out = format!(
        "_s5() {{\n    local cur=\"${{COMP_WORDS[COMP_CWORD]}}\" words=\n    COMPREPLY=()\n    \
         if [[ $COMP_CWORD -eq 1 ]]; then\n        words={}\n    elif [[ $cur == -* ]]; then\n        \
         case \"${{COMP_WORDS[1]}}\" in\n",
        quote(&format!("{} {}", modes.join(" "), option_names(program)))
    );
    for mode in &program.modes {
        let _ = writeln!(out, "            {}) words={} ;;", mode.name, quote(&option_names(mode)));
    }
    out + "        esac\n    fi\n    \
           if [[ -n $words ]]; then\n        COMPREPLY=($(compgen -W \"$words\" -- \"$cur\"))\n    fi\n    return 0\n}\n\
           complete -o bashdefault -o default -F _s5 s5\n"
}

fn zsh(program: &Syntax) -> String {
    let escape = |text: &str| text.replace('[', "(").replace(']', ")").replace(':', "\\:");
    let spec = |flag: &FlagInfo<'_>, name: &str| {
        let action = value_name(flag).map(|value| format!(":{}:_files", escape(value))).unwrap_or_default();
        quote(&format!("*{name}[{}]{action}", escape(summary(flag))))
    };
    let mut out =
        "#compdef s5\n\n_s5() {\n    local -a modes specs\n    if (( CURRENT == 2 )); then\n        modes=(\n"
            .to_owned();
    for mode in &program.modes {
        let text = format!("{}:{}", mode.name, escape(mode.description));
        let _ = writeln!(out, "            {}", quote(&text));
    }
    for flag in program.options() {
        let _ = writeln!(out, "            {}", quote(&format!("{}:{}", flag.long, escape(summary(flag)))));
    }
    out += "        )\n        _describe mode modes\n        return\n    fi\n    case $words[2] in\n";
    for mode in &program.modes {
        let _ = writeln!(out, "        {}) specs=(", mode.name);
        for flag in mode.options() {
            for name in names(flag) {
                let _ = writeln!(out, "            {}", spec(flag, &name));
            }
        }
        out += "        ) ;;\n";
    }
    out + "    esac\n    shift words\n    (( CURRENT-- ))\n    _arguments -s -S $specs '*: :_files'\n}\n\n\
           if [[ $funcstack[1] == _s5 ]]; then\n    _s5 \"$@\"\nelse\n    compdef _s5 s5\nfi\n"
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
