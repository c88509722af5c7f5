//! What the program says of itself, for other programs to show: the manual page, and completions for shells.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use crate::common::{is_installed, run, temp_dir, write_file};
use crate::scripted::text;
use crate::{is_usage_error, s5_with};

/// Shells and groff read much before they begin.
const A_WHILE: Duration = Duration::from_secs(30);
const MODES: [&str; 4] = ["serve", "connect", "bind", "udp"];
const SHELLS: [&str; 3] = ["bash", "zsh", "fish"];
/// Scripts rely on them.
const STATUSES: [u8; 26] =
    [0, 1, 2, 5, 6, 7, 23, 26, 28, 45, 55, 56, 67, 97, 101, 102, 103, 104, 105, 106, 107, 108, 109, 126, 127, 141];

fn said(args: &[&str]) -> String {
    let output = s5_with(args);
    assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(0), ""), "{args:?}");
    text(&output.stdout)
}

/// The manual as a reader sees it, each paragraph on a line.
fn rendered() -> String {
    let mut man = Command::new("man");
    man.env("MANWIDTH", "20000").env("LC_ALL", "C.UTF-8").env_remove("MANOPT").env_remove("MANROFFOPT");
    let output = run(man.args(["--warnings=all", "-l", "-"]), said(&["--man"]).as_bytes(), A_WHILE);
    assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(0), ""));
    text(&output.stdout).replace('…', "...")
}

/// What stands under a heading.
fn section<'a>(manual: &'a str, heading: &str) -> &'a str {
    let (_, rest) = manual.split_once(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("no {heading}: {manual}"));
    let end = rest.match_indices('\n').find(|(at, _)| rest[at + 1..].starts_with(|c: char| c.is_ascii_uppercase()));
    end.map_or(rest, |(at, _)| &rest[..at])
}

/// The options of a mode's help, each with its short name and its value.
fn options(mode: &str) -> Vec<String> {
    let help = said(&[mode, "--help"]).replace('…', "...");
    let (_, options) = help.split_once("\nOptions:\n").expect("options");
    let lines = options.lines().take_while(|line| line.starts_with(' '));
    let heads = lines.filter(|line| !line.starts_with("        ")).map(|line| line.trim().to_owned());
    heads.chain(["--help".to_owned()]).collect()
}

#[test]
fn groff_and_man_have_no_complaint_about_the_manual() {
    if !is_installed("man") || !is_installed("groff") {
        return;
    }
    assert!(rendered().starts_with("S5(1)"), "{}", rendered());
    let output = run(Command::new("groff").args(["-man", "-ww", "-Tutf8", "-z"]), said(&["--man"]).as_bytes(), A_WHILE);
    assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(0), ""));
}

#[test]
fn the_manual_has_every_option_of_every_mode() {
    if !is_installed("man") {
        return;
    }
    let manual = rendered();
    for mode in MODES {
        let section = section(&manual, &format!("S5 {}", mode.to_uppercase()));
        let options = options(mode);
        assert!(options.len() > 20, "{mode}: {options:?}");
        for option in options {
            // What it is for stands behind it, or on the next line.
            let is_head = |line: &str| line.trim().strip_prefix(&option).is_some_and(|rest| !rest.starts_with('-'));
            assert!(section.lines().any(is_head), "{mode}: {option:?} is missing in {section}");
        }
    }
    for option in ["--version", "--man", "--completions", "--help"] {
        assert!(section(&manual, "SYNOPSIS").contains(&format!("s5 {option}")), "{option}");
    }
}

#[test]
fn the_manual_has_every_exit_status_once_with_a_meaning() {
    if !is_installed("man") {
        return;
    }
    let manual = rendered();
    let entries = section(&manual, "EXIT STATUS").lines().map(str::trim).filter(|line| !line.is_empty());
    let entries = entries.map(|line| line.split_once(' ').unwrap_or_else(|| panic!("no meaning: {line}")));
    let entries: Vec<(u8, &str)> = entries.map(|(code, meaning)| (code.parse().expect(code), meaning.trim())).collect();
    let codes: Vec<u8> = entries.iter().map(|(code, _)| *code).collect();
    assert_eq!(codes, STATUSES);
    let meanings: BTreeSet<&str> = entries.iter().map(|(_, meaning)| *meaning).collect();
    assert!(meanings.len() == STATUSES.len() && meanings.iter().all(|meaning| meaning.len() > 10), "{meanings:?}");
}

#[test]
fn completions_are_for_the_shells_that_are_named() {
    for shell in ["tcsh", "", "Bash"] {
        is_usage_error(&["--completions", shell], &["--completions", shell, "bash", "zsh", "fish"]);
    }
    is_usage_error(&["--completions"], &["--completions"]);
}

/// The script for a shell, as a file.
fn script(folder: &Path, shell: &str) -> String {
    write_file(folder, shell, &said(&["--completions", shell]))
}

#[test]
fn completions_are_scripts_that_their_shells_can_read() {
    let folder = temp_dir();
    for shell in SHELLS.into_iter().filter(|shell| is_installed(shell)) {
        let option = if shell == "fish" { "--no-execute" } else { "-n" };
        let output = run(Command::new(shell).args([option, &script(folder.path(), shell)]), b"", A_WHILE);
        assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(0), ""), "{shell}");
    }
}

/// What is on the command line, and all that its last word may become.
const CASES: [(&str, &[&str]); 10] = [
    ("s5 ud", &["udp"]),
    ("s5 se", &["serve"]),
    ("s5 --ma", &["--man"]),
    ("s5 connect --prox", &["--proxy", "--proxy-auth-file", "--proxy-dns", "--proxy-type", "--proxy-user"]),
    ("s5 connect --proxy a --pas", &["--pass-fd"]),
    ("s5 bind --bou", &["--bound-to"]),
    ("s5 connect --bou", &[]),
    ("s5 udp --len", &["--length-prefixed"]),
    ("s5 serve --max-c", &["--max-connections"]),
    ("s5 serve --prox", &[]),
];

/// A shell that knows nothing of whoever runs the tests.
fn shell(name: &str, home: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(name);
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.env("HOME", home).env("ZDOTDIR", home).env("TERM", "dumb").env("LC_ALL", "C.UTF-8");
    run(command.current_dir(home).args(args), b"", A_WHILE)
}

fn sorted<'a>(words: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    words.collect::<BTreeSet<_>>().into_iter().collect()
}

#[test]
fn bash_completes_modes_and_options() {
    if !is_installed("bash") {
        return;
    }
    let folder = temp_dir();
    let path = script(folder.path(), "bash");
    let code = "source \"$1\"; shift; complete -p s5 | grep -q -- '-F _s5 ' || exit 3; \
                COMP_WORDS=(\"$@\"); COMP_CWORD=$(($# - 1)); _s5 && printf '%s\\n' \"${COMPREPLY[@]}\"";
    for (line, expected) in CASES {
        let words: Vec<&str> = line.split(' ').collect();
        let args = [&["--norc", "--noprofile", "-c", code, "bash", &path], &words[..]].concat();
        let output = shell("bash", folder.path(), &args);
        assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(0), ""), "{line}");
        let completions = text(&output.stdout);
        assert_eq!(sorted(completions.lines().filter(|line| !line.is_empty())), expected, "{line}");
    }
}

#[test]
fn fish_completes_modes_and_options() {
    if !is_installed("fish") {
        return;
    }
    let folder = temp_dir();
    let path = script(folder.path(), "fish");
    for (line, expected) in CASES {
        let code = format!("source '{path}'; complete --do-complete '{line}'");
        let output = shell("fish", folder.path(), &["--no-config", "-c", &code]);
        assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(0), ""), "{line}");
        let completions = text(&output.stdout);
        let words = completions.lines().map(|line| line.split('\t').next().unwrap_or_default());
        assert_eq!(sorted(words), expected, "{line}");
    }
}

/// Types lines and Tab in a shell with a terminal, and prints what they have become.
const ZPTY: &str = r#"
zmodload zsh/zpty
zpty -b shell zsh -d -i
zpty -r -m shell out '*READY*'
for line; do
    zpty -w -n shell "$line"$'\t\x18'
    zpty -r -m shell out '*<*>*'
    out=${out##*<}
    print -r -- "${out%%>*}"
done
zpty -d shell
"#;

#[test]
fn zsh_completes_modes_and_options() {
    if !is_installed("zsh") {
        return;
    }
    let folder = temp_dir();
    let path = script(folder.path(), "zsh");
    let rc = format!(
        "autoload -U compinit; compinit -D -u; source '{path}'\n\
         (( $+functions[_s5] )) && [[ $_comps[s5] == _s5 ]] || exit\n\
         show() {{ print -r -- \"<$BUFFER>\"; BUFFER= }}; zle -N show; bindkey '^X' show; bindkey '^I' complete-word\n\
         setopt no_beep; PS1=; unset zle_bracketed_paste; print READY\n"
    );
    write_file(folder.path(), ".zshrc", &rc);
    let zpty = write_file(folder.path(), "zpty", ZPTY);
    let lines = CASES.map(|(line, _)| line);
    let output = shell("zsh", folder.path(), &[&["-f", zpty.as_str()], &lines[..]].concat());
    assert_eq!(text(&output.stderr), "");
    // Of several it takes what they have in common.
    let becomes = CASES.map(|(line, expected)| match (line.rsplit_once(' ').expect("words"), expected) {
        (_, []) => line.to_owned(),
        ((before, _), [one]) => format!("{before} {one} "),
        ((before, _), [first, ..]) => format!("{before} {first}"),
    });
    assert_eq!(text(&output.stdout).lines().collect::<Vec<_>>(), becomes);
}
