//! The users file: what is wrong with it, and --add-user and --remove-user.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use crate::common::{Server, echo_server, is_installed, run, s5, temp_dir, wait_until, write_file};
use crate::is_usage_error;
use crate::scripted::{RunningProgram, text};

/// What is not optimised takes its time to hash.
const A_WHILE: Duration = Duration::from_secs(60);
/// A sound hash; of what does not matter.
const BCRYPT: &str = "$2y$05$7hT6Qu9VIEHwTdqyYV9xDeEF1Ddl9G/Y3lkSBY/zO3DVHSZOQu1nS";

fn add(users: &str, name: &str, stdin: &[u8]) -> Output {
    run(s5().args(["serve", "--users", users, "--add-user", name]), stdin, A_WHILE)
}

fn remove(users: &str, name: &str) -> Output {
    run(s5().args(["serve", "--users", users, "--remove-user", name]), b"", A_WHILE)
}

fn succeeds(output: &Output) {
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(output.stdout.is_empty(), "{}", text(&output.stdout));
}

/// Fails unless there is one line with these words, nothing on stdout, and a failure.
fn fails(output: &Output, words: &[&str]) {
    let said = text(&output.stderr);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0), "{said}");
    assert!(said.starts_with("s5: ") && said.lines().count() == 1, "{said}");
    for word in words {
        assert!(said.contains(word), "{word:?} is not named: {said}");
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).expect("the users file")
}

fn mode(path: &str) -> u32 {
    fs::metadata(path).expect("the users file").permissions().mode() & 0o7777
}

/// How a client with this login fares at a server with this users file.
fn login(users: &str, userinfo: &str) -> Option<i32> {
    let server = Server::start(&["--users", users]);
    let proxy = format!("{userinfo}@{}", server.addr());
    run(s5().args(["connect", "-x", &proxy, &echo_server().to_string()]), b"x", A_WHILE).status.code()
}

#[test]
fn a_bad_line_is_named_with_file_line_and_word() {
    let folder = temp_dir();
    let long = "n".repeat(256);
    let table = [
        ("alice", "line 1", "alice"),
        ("# comment\n\n  \nbob\n", "line 4", "bob"),
        (":$2y$05$x", "line 1", "user name"),
        ("al\tice:x", "line 1", "al\\tice"),
        ("alice:$1$salt$hash", "line 1", "\"1\""),
        ("alice:$6$salt$hash", "line 1", "\"6\""),
        ("alice:$argon2i$v=19$m=8,t=1,p=1$c2FsdHNhbHQ$aGFzaGhhc2g", "line 1", "argon2i"),
        ("alice:$argon2id$nonsense", "line 1", "argon2id"),
        ("alice:$2y$05$short", "line 1", "bcrypt"),
        ("alice:", "line 1", "alice"),
        (&format!("{long}:{BCRYPT}"), "line 1", "user name"),
        (&format!("alice:{BCRYPT}\nbob:{BCRYPT}\nalice:{BCRYPT}"), "line 3", "alice"),
    ];
    for (content, line, word) in table {
        let path = write_file(folder.path(), "users", content);
        is_usage_error(&["serve", "--listen", "127.0.0.1:0", "--users", &path], &[&path, line, word]);
    }
}

#[test]
fn a_users_file_that_can_not_be_read_is_named() {
    let folder = temp_dir();
    let missing = format!("{}/missing", folder.path().display());
    is_usage_error(&["serve", "--users", &missing], &[&missing, "No such file"]);
    let path = folder.path().to_str().expect("text").to_owned();
    is_usage_error(&["serve", "--users", &path], &[&path]);
    let binary = folder.path().join("binary");
    fs::write(&binary, b"alice:\xff\xfe\n").expect("a file");
    let binary = binary.to_str().expect("text");
    is_usage_error(&["serve", "--users", binary], &[binary]);
}

#[test]
fn a_password_in_a_users_file_is_not_repeated() {
    let folder = temp_dir();
    for content in [
        "alice:topsecret",
        "alice:$topsecret",
        "alice:top$secret",
        "alice:$2y$05$topsecret",
        "alice:$argon2id$topsecret",
    ] {
        let path = write_file(folder.path(), "users", content);
        let output = run(s5().args(["serve", "--listen", "127.0.0.1:0", "--users", &path]), b"", A_WHILE);
        fails(&output, &[&path, "line 1", "alice"]);
        let said = text(&output.stderr);
        assert!(!said.contains("secret"), "{said}");
    }
}

#[test]
fn a_user_is_added_and_can_log_in() {
    let folder = temp_dir();
    let users = format!("{}/users", folder.path().display());
    succeeds(&add(&users, "alice", b"topsecret\n"));
    let content = read(&users);
    assert!(content.starts_with("alice:$argon2id$") && content.ends_with('\n'), "{content}");
    assert_eq!(content.lines().count(), 1, "{content}");
    assert!(!content.contains("topsecret"));
    assert_eq!(mode(&users), 0o600);
    assert_eq!(login(&users, "alice:topsecret"), Some(0));
}

#[test]
fn the_first_line_of_stdin_is_the_password_without_its_end() {
    let folder = temp_dir();
    for (stdin, passwd) in [(&b" pass word\r\nmore\n"[..], " pass word"), (b"no end", "no end")] {
        let users = format!("{}/users", folder.path().display());
        succeeds(&add(&users, "alice", stdin));
        let users = s5::policy::users::Users::parse(&read(&users)).expect("a sound file");
        assert!(users.verify(b"alice", passwd.as_bytes()), "{passwd}");
    }
}

#[test]
fn a_password_that_can_not_be_used_changes_nothing() {
    let folder = temp_dir();
    let users = write_file(folder.path(), "users", "# mine\n");
    fails(&add(&users, "alice", b""), &["--add-user", "empty"]);
    fails(&add(&users, "alice", b"\n"), &["--add-user", "empty"]);
    let long = [b'p'; 256];
    let output = add(&users, "alice", &long);
    fails(&output, &["--add-user", "255"]);
    assert!(!text(&output.stderr).contains("ppp"));
    assert_eq!(read(&users), "# mine\n");
    succeeds(&add(&users, "alice", &long[1..]));
}

#[test]
fn a_name_that_can_not_be_used_changes_nothing() {
    let folder = temp_dir();
    let users = write_file(folder.path(), "users", "# mine\n");
    for name in ["", "a:b", "a\nb", " a", "#a", &"n".repeat(256)] {
        fails(&add(&users, name, b"topsecret\n"), &["--add-user", "user name"]);
    }
    assert_eq!(read(&users), "# mine\n");
}

#[test]
fn other_lines_stay_as_they_are_octet_for_octet() {
    let folder = temp_dir();
    let before = format!("# one\r\n\n  bob:{BCRYPT}  \nalice:{BCRYPT}\n\t# two: alice:x\nalicia:{BCRYPT}\n#end");
    let users = write_file(folder.path(), "users", &before);
    succeeds(&add(&users, "alice", b"topsecret\n"));
    let after = read(&users);
    let (head, rest) = after.split_once("alice:").expect("she is in it");
    let (line, tail) = rest.split_once('\n').expect("a line");
    assert!(line.starts_with("$argon2id$"), "{after}");
    assert_eq!(head, format!("# one\r\n\n  bob:{BCRYPT}  \n"));
    assert_eq!(tail, format!("\t# two: alice:x\nalicia:{BCRYPT}\n#end"));

    // A new one comes at the end, on a line of its own.
    succeeds(&add(&users, "carol", b"topsecret\n"));
    let added = read(&users);
    let line = added.strip_prefix(&format!("{after}\n")).expect("what was there is still there");
    assert!(line.starts_with("carol:$argon2id$") && line.ends_with('\n') && line.lines().count() == 1, "{line}");

    // Gone again, nothing but the end of the last line is left of her.
    succeeds(&remove(&users, "carol"));
    assert_eq!(read(&users), format!("{after}\n"));
    succeeds(&remove(&users, "alice"));
    assert_eq!(read(&users), format!("{head}{tail}\n"));
}

#[test]
fn a_user_who_is_not_there_can_not_be_removed() {
    let folder = temp_dir();
    let before = format!("# alice\nalicia:{BCRYPT}\n");
    let users = write_file(folder.path(), "users", &before);
    fails(&remove(&users, "alice"), &[&users, "alice"]);
    assert_eq!(read(&users), before);
    let missing = format!("{}/missing", folder.path().display());
    fails(&remove(&missing, "alice"), &[&missing]);
    assert!(!Path::new(&missing).exists());
}

#[test]
fn only_the_owner_can_read_what_is_written() {
    let folder = temp_dir();
    let users = write_file(folder.path(), "users", &format!("bob:{BCRYPT}\n"));
    for act in [add, |users: &str, name: &str, _: &[u8]| remove(users, name)] {
        fs::set_permissions(&users, fs::Permissions::from_mode(0o644)).expect("it can be set");
        succeeds(&act(&users, "bob", b"topsecret\n"));
        assert_eq!(mode(&users), 0o600);
    }
    let names: Vec<_> =
        fs::read_dir(folder.path()).expect("a folder").flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(names, ["users"], "nothing else is left behind");
}

#[test]
fn a_link_stays_a_link() {
    let folder = temp_dir();
    let elsewhere = temp_dir();
    let real = write_file(elsewhere.path(), "real", "# mine\n");
    let link = folder.path().join("users");
    symlink(&real, &link).expect("a link");
    let users = link.to_str().expect("text");
    succeeds(&add(users, "alice", b"topsecret\n"));
    assert!(fs::symlink_metadata(&link).expect("a link").file_type().is_symlink());
    assert!(read(&real).starts_with("# mine\nalice:$argon2id$"), "{}", read(&real));
    succeeds(&remove(users, "alice"));
    assert!(fs::symlink_metadata(&link).expect("a link").file_type().is_symlink());
    assert_eq!(read(&real), "# mine\n");
}

#[test]
fn a_bad_file_is_not_touched() {
    let folder = temp_dir();
    let before = format!("bob:{BCRYPT}\nnonsense\n");
    let users = write_file(folder.path(), "users", &before);
    fails(&add(&users, "alice", b"topsecret\n"), &[&users, "line 2", "nonsense"]);
    assert_eq!(read(&users), before);
}

#[test]
fn add_user_in_missing_directory_names_file_and_remedy() {
    let dir = temp_dir();
    let directory = format!("{}/missing/s5", dir.path().display());
    let users = format!("{directory}/users");
    let output = add(&users, "alice", b"topsecret\n");
    let expected = format!("s5: {users}: directory {directory} does not exist (create it: mkdir -p {directory})\n");
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(2), expected));
    assert!(!Path::new(&directory).exists(), "it is the user who creates it");
}

#[test]
fn add_user_in_unwritable_directory_names_file_and_directory() {
    // /proc accepts no new files, not even from root.
    let output = add("/proc/users", "alice", b"topsecret\n");
    fails(&output, &["s5: /proc/users: create a file in /proc: "]);
    assert!(!text(&output.stderr).contains(".tmp"), "{}", text(&output.stderr));
}

#[test]
fn what_htpasswd_wrote_stays_and_works() {
    if !is_installed("htpasswd") {
        return;
    }
    let folder = temp_dir();
    let users = format!("{}/users", folder.path().display());
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let mut htpasswd = Command::new("htpasswd");
    succeeds(&run(
        htpasswd.env("PATH", &path).args(["-c", "-b", "-B", "-C", "4", &users, "bob", "bobsecret"]),
        b"",
        A_WHILE,
    ));
    let before = read(&users);
    succeeds(&add(&users, "alice", b"topsecret\n"));
    assert!(read(&users).starts_with(&before));
    assert_eq!(login(&users, "bob:bobsecret"), Some(0));
    assert_eq!(login(&users, "bob:topsecret"), Some(67));
    succeeds(&remove(&users, "bob"));
    assert!(read(&users).starts_with("alice:"), "{}", read(&users));
}

#[test]
fn upkeep_needs_a_file_and_one_thing_at_a_time() {
    is_usage_error(&["serve", "--add-user", "alice"], &["--add-user", "--users"]);
    is_usage_error(&["serve", "--remove-user", "alice"], &["--remove-user", "--users"]);
    let both = ["serve", "--users", "/nonexistent", "--add-user", "a", "--remove-user", "b"];
    is_usage_error(&both, &["--add-user", "--remove-user"]);
}

/// `--add-user alice` on a terminal of its own. What the terminal shows comes to stdout.
fn on_a_terminal(folder: &Path, users: &str) -> RunningProgram {
    let command = format!("tty > tty; exec '{}' serve --users '{users}' --add-user alice", env!("CARGO_BIN_EXE_s5"));
    RunningProgram::start(Command::new("script").current_dir(folder).args(["-q", "-e", "-c", &command, "/dev/null"]))
}

/// Waits for a prompt, and types an answer as soon as the terminal would not show it.
fn type_at(terminal: &mut RunningProgram, folder: &Path, prompt: &str, answer: &[u8]) {
    terminal.stdout(|shown| text(shown).ends_with(prompt));
    let tty = read(folder.join("tty").to_str().expect("text"));
    wait_until("the terminal does not echo", A_WHILE, || {
        let settings = Command::new("stty").args(["-a", "-F", tty.trim()]).output().expect("stty runs");
        text(&settings.stdout).split_whitespace().any(|word| word == "-echo")
    });
    terminal.write(answer);
}

#[test]
fn a_terminal_is_asked_twice_and_shows_nothing() {
    if !is_installed("script") {
        return;
    }
    let folder = temp_dir();
    let users = format!("{}/users", folder.path().display());
    let mut terminal = on_a_terminal(folder.path(), &users);
    type_at(&mut terminal, folder.path(), "password for alice: ", b"topsecret\n");
    type_at(&mut terminal, folder.path(), "repeat the password: ", b"topsecret\n");
    let (status, shown, _) = terminal.end(A_WHILE);
    assert_eq!(status.code(), Some(0), "{}", text(&shown));
    assert!(!text(&shown).contains("secret"), "{}", text(&shown));
    assert!(read(&users).starts_with("alice:$argon2id$"));
    assert_eq!(login(&users, "alice:topsecret"), Some(0));
}

#[test]
fn two_passwords_that_differ_change_nothing() {
    if !is_installed("script") {
        return;
    }
    let folder = temp_dir();
    let users = write_file(folder.path(), "users", "# mine\n");
    let mut terminal = on_a_terminal(folder.path(), &users);
    type_at(&mut terminal, folder.path(), "password for alice: ", b"topsecret\n");
    type_at(&mut terminal, folder.path(), "repeat the password: ", b"othersecret\n");
    let (status, shown, _) = terminal.end(A_WHILE);
    let shown = text(&shown);
    assert!(!status.success(), "{shown}");
    assert!(shown.contains("s5: ") && shown.contains("do not match") && !shown.contains("secret"), "{shown}");
    assert_eq!(read(&users), "# mine\n");
}
