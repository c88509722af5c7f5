//! The help, the manual page and the completions are valid and complete.

use s5::cmd::ExitStatus;

use crate::*;

/// Time limit for a shell, man or groff: they read many files at their start.
const PROGRAM_TIMEOUT: Duration = Duration::from_secs(30);
const MODES: [&str; 4] = ["serve", "connect", "bind", "udp"];
const SHELLS: [&str; 3] = ["bash", "zsh", "fish"];
/// Exit statuses of s5. Scripts rely on these numbers.
const STATUSES: [u8; 26] =
    [0, 1, 2, 5, 6, 7, 23, 26, 28, 45, 55, 56, 67, 97, 101, 102, 103, 104, 105, 106, 107, 108, 109, 126, 127, 141];
/// Two screens of a terminal.
const MAX_HELP_LINES: usize = 48;
const MAX_HELP_COLUMNS: usize = 80;

/// Runs s5 and returns its stdout. Fails unless it exits with 0.
fn stdout_of(args: &str) -> String {
    let (status, stdout, stderr) = outcome(args, b"");
    assert_eq!((status, stderr.as_str()), (Some(0), ""), "{args}");
    stdout
}

/// Fails unless a program succeeds and prints nothing on stderr. Returns its stdout.
fn run_quietly(command: &mut Command, stdin: &str) -> String {
    let output = run(command, stdin.as_bytes(), PROGRAM_TIMEOUT);
    assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(0), ""), "{command:?}");
    text(&output.stdout)
}

/// The source of the manual page, without escapes and font changes.
fn manual() -> String {
    let page = stdout_of("--man");
    ["\\fB", "\\fI", "\\fR", "\\fP", "\\&"].iter().fold(page, |page, font| page.replace(font, "")).replace("\\-", "-")
}

/// The lines of a section.
fn section<'a>(manual: &'a str, heading: &str) -> &'a str {
    let start = format!("\n.SH {heading}\n");
    let (_, rest) = manual.split_once(&start).unwrap_or_else(|| panic!("no section {heading}"));
    rest.split("\n.SH ").next().unwrap_or_default()
}

/// The bold words of a section: the fields, variables, keys or signals that it documents.
fn bold_words(manual: &str, heading: &str) -> BTreeSet<String> {
    let lines = section(manual, heading).lines().filter(|line| line.starts_with(".B"));
    let words = lines.flat_map(|line| line.split([' ', ',', '\\']).skip(1));
    words.filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

/// Fails unless a section documents all names. `at_least` is a lower limit for their number.
fn assert_documented<T: AsRef<str>>(manual: &str, heading: &str, names: impl IntoIterator<Item = T>, at_least: usize) {
    let words = bold_words(manual, heading);
    let names: Vec<T> = names.into_iter().collect();
    assert!(names.len() >= at_least, "only {} names for {heading}", names.len());
    for name in names {
        assert!(words.contains(name.as_ref()), "{} is missing in {heading}: {words:?}", name.as_ref());
    }
}

/// Path and code of each source file of s5, without tests.
fn sources() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut dirs = vec![root];
    let mut files = Vec::new();
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).expect("directory read") {
            let path = entry.expect("directory entry").path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).expect("file read");
                let code = text.split("\n#[cfg(test)]").next().unwrap_or_default().to_owned();
                files.push((path.to_string_lossy().into_owned(), code));
            }
        }
    }
    files
}

/// The string literals of a line of code.
fn literals(line: &str) -> impl Iterator<Item = &str> {
    line.split('"').skip(1).step_by(2)
}

/// The options in the help of a mode, with their placeholders.
fn options(mode: &str) -> Vec<String> {
    let help = stdout_of(&format!("{mode} --help"));
    let options = help.lines().filter(|line| line.starts_with("  -")).map(|line| line.trim().split("  ").next());
    options.map(|option| option.unwrap_or_default().to_owned()).collect()
}

#[test]
fn help_groups_the_options_and_fits_on_two_screens() {
    let client = ["Proxy", "Addresses", "Limits", "Data", "Listening", "Logging"];
    for mode in ["", "serve", "connect", "bind", "udp"] {
        let help = stdout_of(format!("{mode} --help").trim_start());
        let lines: Vec<&str> = help.lines().collect();
        assert!(lines.len() <= MAX_HELP_LINES, "{mode}: {} lines", lines.len());
        assert!(lines.iter().all(|line| line.chars().count() <= MAX_HELP_COLUMNS), "{mode}: {help}");
        let headings: Vec<&str> = lines[2..lines.len() - 1].iter().filter(|l| !l.starts_with(' ')).copied().collect();
        let expected = match mode {
            "" => &["Modes", "Options"][..],
            "serve" => &["Listening", "Access", "Routing", "Limits", "Logging"],
            _ => &client,
        };
        assert_eq!(headings, expected, "{mode}");
        assert!(lines[2] == headings[0], "{mode}: an option precedes the first heading");
    }
}

#[test]
fn help_line_of_an_option_ends_with_its_default() {
    for mode in MODES {
        let help = stdout_of(&format!("{mode} --help"));
        for line in help.lines().filter(|line| line.contains("[default:")) {
            assert!(line.ends_with(']'), "{mode}: {line}");
        }
    }
}

#[test]
fn manual_names_the_aliases_of_options() {
    let manual = manual();
    for alias in ["--no-proxy", "--resolve", "--wait", "--proxy-auth", "--bound-to", "--drain", "--open"] {
        assert_eq!(manual.matches(&format!("\nAlias: {alias}.\n")).count(), 1, "{alias}");
    }
}

#[test]
fn mandoc_groff_and_man_have_no_warnings_about_the_manual() {
    let page = stdout_of("--man");
    let linters =
        [("mandoc", "-T lint", ""), ("groff", "-man -ww -Tutf8 -z", ""), ("man", "--warnings=all -l -", "S5(1)")];
    for (program, args, start) in linters.into_iter().filter(|(program, ..)| is_installed(program)) {
        let mut linter = Command::new(program);
        linter.env("LC_ALL", "C.UTF-8").env_remove("MANOPT").env_remove("MANROFFOPT");
        let stdout = run_quietly(linter.args(args.split(' ')), &page);
        assert!(stdout.starts_with(start) && (stdout.is_empty() || !start.is_empty()), "{program}: {stdout}");
    }
}

#[test]
fn manual_has_every_option_of_every_mode() {
    let manual = manual();
    for mode in MODES {
        let section = section(&manual, if mode == "serve" { "SERVER OPTIONS" } else { "CLIENT OPTIONS" });
        let options = options(mode);
        assert!(options.len() > 30, "{mode}: {options:?}");
        for option in options {
            assert!(section.contains(&format!("\n.TP\n{option}\n")), "{mode}: {option:?} is missing");
        }
    }
    for option in ["--version", "--man", "--completions", "--help"] {
        assert!(section(&manual, "SYNOPSIS").contains(option), "{option}");
    }
    let (_, after) = section(&manual, "SYNOPSIS").split_once("--verbose").expect("the option is in the synopsis");
    assert!(
        section(&manual, "SYNOPSIS").contains(".B s5 --version\n.RB [ --verbose ]") && !after.contains("--verbose")
    );
}

#[test]
fn manual_names_the_modes_of_an_option_that_some_modes_lack() {
    let manual = manual();
    let section = section(&manual, "CLIENT OPTIONS");
    for entry in section.split("\n.TP\n").skip(1) {
        let option = entry.lines().next().unwrap_or_default();
        let modes: Vec<&str> =
            MODES[1..].iter().filter(|mode| options(mode).iter().any(|o| o == option)).copied().collect();
        let is_named = entry.contains(&format!("Only for {}.", modes.join(" and ")));
        assert_eq!(is_named, modes.len() < 3, "{option}: {modes:?}");
    }
}

#[test]
fn manual_has_every_environment_variable() {
    const READERS: [&str; 5] = ["env_var(", "var_os(", "variable(", "is_set(", "VARIABLE"];
    let is_name = |word: &str| word.len() > 1 && word.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    let is_upper = |word: &str| word.contains('_') && !word.contains(|c: char| c.is_ascii_lowercase());
    let sources = sources();
    let lines = sources.iter().flat_map(|(_, code)| code.lines());
    let lines = lines
        .filter(|line| !line.trim_start().starts_with("//") && !line.contains("env!(") && !line.contains("#[argh("));
    let names = lines.flat_map(|line| {
        let is_reader = READERS.iter().any(|reader| line.contains(reader));
        literals(line).filter(move |word| is_name(word) && (is_reader || is_upper(word)))
    });
    assert_documented(&manual(), "ENVIRONMENT", names.collect::<BTreeSet<_>>(), 24);
}

#[test]
fn manual_has_every_field_of_a_log_line() {
    let sources = sources();
    let is_log = |path: &str| path.ends_with("session_log.rs");
    let (_, code) = sources.iter().find(|(path, _)| is_log(path)).expect("src/**/session_log.rs");
    let words = code.lines().flat_map(literals).flat_map(|literal| literal.split(' '));
    let fields =
        words.filter_map(|word| word.split_once('=')).map(|(field, _)| field).filter(|field| !field.is_empty());
    assert_documented(&manual(), "LOG", fields.collect::<BTreeSet<_>>(), 12);
}

#[test]
fn manual_has_every_counter() {
    let sources = sources();
    let (_, code) =
        sources.iter().find(|(path, _)| path.ends_with("session_counts.rs")).expect("src/server/session_counts.rs");
    let counters = code.split(['"', ' ']).filter_map(|word| word.split_once("={")).map(|(counter, _)| counter);
    assert_documented(&manual(), "SIGNALS", counters.collect::<BTreeSet<_>>(), 8);
}

#[test]
fn manual_has_every_key_of_the_json_object() {
    let (_, _, json) = outcome("connect --json --auth none -x 127.0.0.1:1 192.0.2.1:1", b"");
    let keys = json.match_indices("\":").filter_map(|(at, _)| json[..at].rsplit('"').next());
    assert_documented(&manual(), "JSON", keys, 21);
}

#[test]
fn manual_has_every_key_of_a_rule() {
    let (_, _, error) = outcome("serve --allow bogus=1 --show-rules", b"");
    let (_, keys) = error.split_once("(keys are ").expect("the error lists the keys");
    let keys = keys.trim_end().trim_end_matches(')').split(", ").map(|key| format!("{key}="));
    assert_documented(&manual(), "RULES", keys, 8);
}

#[test]
fn manual_has_every_signal() {
    let sources = sources();
    let names = sources.iter().flat_map(|(_, code)| code.split("Signal::").skip(1));
    let names = names.filter_map(|rest| rest.split(|c: char| !c.is_alphanumeric()).next());
    // One thread of s5 sends SIGURG to another.
    let names = names.filter(|name| *name != "SIGURG");
    let names: BTreeSet<String> =
        names.map(|name| format!("SIG{}", name.to_uppercase().trim_start_matches("SIG"))).collect();
    assert_documented(&manual(), "SIGNALS", names, 3);
}

#[test]
fn manual_has_every_exit_status_once_with_its_meaning() {
    let manual = manual();
    let entries = section(&manual, "EXIT STATUS").split("\n.TP 6\n.B ").skip(1);
    let entries: Vec<(u8, String)> = entries
        .map(|entry| entry.split_once('\n').unwrap_or_else(|| panic!("no meaning: {entry}")))
        .map(|(code, meaning)| (code.parse().expect(code), meaning.replace('\n', " ")))
        .collect();
    assert_eq!(entries.iter().map(|(code, _)| *code).collect::<Vec<_>>(), STATUSES);
    assert_eq!(STATUSES.to_vec(), ExitStatus::ALL.iter().map(|(code, _)| *code).collect::<Vec<_>>());
    let meanings: BTreeSet<&str> = entries.iter().map(|(_, meaning)| meaning.trim()).collect();
    assert!(meanings.len() == STATUSES.len() && meanings.iter().all(|meaning| meaning.len() > 10), "{meanings:?}");
}

#[test]
fn completions_reject_an_unknown_shell() {
    for shell in ["tcsh", "", "Bash"] {
        assert_line(&format!("--completions {shell}"), 2, &["--completions", shell, "bash", "zsh", "fish"]);
    }
    assert_line("--completions", 2, &["--completions"]);
}

/// Writes the script for a shell to a file, and returns its path.
fn script(dir: &Path, shell: &str) -> String {
    write_file(dir, shell, &stdout_of(&format!("--completions {shell}")))
}

#[test]
fn completions_are_scripts_that_their_shells_parse() {
    let dir = temp_dir();
    for shell in SHELLS.into_iter().filter(|shell| is_installed(shell)) {
        let option = if shell == "fish" { "--no-execute" } else { "-n" };
        run_quietly(Command::new(shell).args([option, &script(dir.path(), shell)]), "");
    }
}

/// Command lines, each with all completions of its last word.
const CASES: [(&str, &[&str]); 10] = [
    ("s5 ud", &["udp"]),
    ("s5 se", &["serve"]),
    ("s5 --ma", &["--man"]),
    ("s5 connect --prox", &["--proxy", "--proxy-auth-file", "--proxy-dns", "--proxy-type", "--proxy-user"]),
    ("s5 connect --proxy a --pas", &["--pass-fd"]),
    ("s5 bind --addr", &["--address-file"]),
    ("s5 connect --addr", &[]),
    ("s5 udp --len", &["--length-prefixed"]),
    ("s5 serve --max-c", &["--max-connections"]),
    ("s5 serve --addr", &[]),
];

/// Runs a shell without the user's configuration. Returns its stdout.
fn shell(name: &str, home: &Path, args: &[&str]) -> String {
    let mut command = Command::new(name);
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.env("HOME", home).env("ZDOTDIR", home).env("TERM", "dumb").env("LC_ALL", "C.UTF-8");
    run_quietly(command.current_dir(home).args(args), "")
}

fn sorted<'a>(words: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    words.collect::<BTreeSet<_>>().into_iter().collect()
}

#[test]
fn bash_completes_modes_and_options() {
    if !is_installed("bash") {
        return;
    }
    let dir = temp_dir();
    let path = script(dir.path(), "bash");
    let code = "source \"$1\"; shift; complete -p s5 | grep -q -- '-F _s5 ' || exit 3; \
                COMP_WORDS=(\"$@\"); COMP_CWORD=$(($# - 1)); _s5 && printf '%s\\n' \"${COMPREPLY[@]}\"";
    for (line, expected) in CASES {
        let words: Vec<&str> = line.split(' ').collect();
        let args = [&["--norc", "--noprofile", "-c", code, "bash", &path], &words[..]].concat();
        let completions = shell("bash", dir.path(), &args);
        assert_eq!(sorted(completions.lines().filter(|line| !line.is_empty())), expected, "{line}");
    }
}

#[test]
fn fish_completes_modes_and_options() {
    if !is_installed("fish") {
        return;
    }
    let dir = temp_dir();
    let path = script(dir.path(), "fish");
    for (line, expected) in CASES {
        let code = format!("source '{path}'; complete --do-complete '{line}'");
        let completions = shell("fish", dir.path(), &["--no-config", "-c", &code]);
        let words = completions.lines().map(|line| line.split('\t').next().unwrap_or_default());
        assert_eq!(sorted(words), expected, "{line}");
    }
}

/// Types each line and Tab into a shell with a terminal, and prints the completed line.
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
    let dir = temp_dir();
    let path = script(dir.path(), "zsh");
    let rc = format!(
        "autoload -U compinit; compinit -D -u; source '{path}'\n\
         (( $+functions[_s5] )) && [[ $_comps[s5] == _s5 ]] || exit\n\
         show() {{ print -r -- \"<$BUFFER>\"; BUFFER= }}; zle -N show; bindkey '^X' show; bindkey '^I' complete-word\n\
         setopt no_beep; PS1=; unset zle_bracketed_paste; print READY\n"
    );
    write_file(dir.path(), ".zshrc", &rc);
    let zpty = write_file(dir.path(), "zpty", ZPTY);
    let lines = CASES.map(|(line, _)| line);
    let completed = shell("zsh", dir.path(), &[&["-f", zpty.as_str()], &lines[..]].concat());
    // With several completions, zsh inserts their common prefix.
    let expected_lines = CASES.map(|(line, expected)| match (line.rsplit_once(' ').expect("words"), expected) {
        (_, []) => line.to_owned(),
        ((before, _), [one]) => format!("{before} {one} "),
        ((before, _), [first, ..]) => format!("{before} {first}"),
    });
    assert_eq!(completed.lines().collect::<Vec<_>>(), expected_lines);
}
