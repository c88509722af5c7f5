//! The examples of src/policy/README.md: the rules file parses, and s5 prints the output shown.

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

use s5::policy::rules::parse_rules;
use s5::policy::users::new_entry;

const PAGE: &str = include_str!("../../../src/policy/README.md");

/// The code blocks of one language.
fn blocks(language: &str) -> Vec<&'static str> {
    let blocks = PAGE.split("\n```").skip(1).step_by(2).filter_map(|block| block.split_once('\n'));
    blocks.filter(|(name, _)| *name == language).map(|(_, text)| text).collect()
}

fn example_rules() -> &'static str {
    let files: Vec<&str> = blocks("text").into_iter().filter(|text| text.starts_with("# /etc/s5/rules\n")).collect();
    assert_eq!(files.len(), 1, "example rules files on the page");
    files[0]
}

/// The commands after a `$`, each with its output on the page.
fn examples() -> Vec<(String, String)> {
    let transcripts = blocks("console").join("\n");
    let mut examples: Vec<(String, String)> = Vec::new();
    for line in transcripts.lines().filter(|line| !line.is_empty()) {
        match (line.strip_prefix("$ "), examples.last_mut()) {
            (Some(command), _) => examples.push((command.to_owned(), String::new())),
            (None, Some((_, output))) => *output += &format!("{line}\n"),
            (None, None) => panic!("output without a command: {line}"),
        }
    }
    examples
}

#[test]
fn readme_example_rules_parse() {
    let rules = parse_rules(example_rules(), "rules", &[]).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(rules.len(), 5);
}

#[test]
fn readme_commands_print_the_shown_output() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let users = new_entry("alice", b"secret").expect("valid entry");
    fs::write(dir.path().join("users"), users + "\n").expect("file written");
    fs::write(dir.path().join("rules"), example_rules()).expect("file written");
    let bin = Path::new(env!("CARGO_BIN_EXE_s5")).parent().expect("a path with a directory").display();
    let path = format!("{bin}:{}", env::var("PATH").unwrap_or_default());
    let examples = examples();
    assert_eq!(examples.len(), 5, "{examples:#?}");
    for (command, expected) in examples {
        let mut shell = Command::new("sh");
        let output = shell.args(["-c", &command]).env("PATH", &path).current_dir(dir.path()).output().expect("sh runs");
        assert_eq!(String::from_utf8_lossy(&output.stdout), expected, "{command}");
        assert!(output.stderr.is_empty(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
        // The last line of an explanation is the decision, which the exit status repeats.
        let status = i32::from(expected.ends_with("\ndeny\n"));
        assert_eq!(output.status.code(), Some(status), "{command}");
    }
}
