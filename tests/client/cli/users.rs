//! The users file: errors in the file, --add-user and --remove-user.

use std::os::unix::fs::{MetadataExt as _, chown};

use s5::policy::users::{HashMemory, Users};

use crate::prompts::{on_a_terminal, type_at_prompt};
use crate::*;

/// Time limit for hashing, which is slow in an unoptimised build.
const HASH_TIMEOUT: Duration = Duration::from_secs(60);
/// A valid hash of some password.
const BCRYPT_HASH: &str = "$2y$05$7hT6Qu9VIEHwTdqyYV9xDeEF1Ddl9G/Y3lkSBY/zO3DVHSZOQu1nS";

fn add_user(users: &str, name: &str, stdin: &[u8]) -> Output {
    run(s5().args(["serve", "--users", users, "--add-user", name]), stdin, HASH_TIMEOUT)
}

fn remove_user(users: &str, name: &str) -> Output {
    run(s5().args(["serve", "--users", users, "--remove-user", name]), b"", HASH_TIMEOUT)
}

fn assert_success(output: &Output) {
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(0), ""), "{}", text(&output.stderr));
}

/// Fails unless s5 has exited with 2 and printed only one line, on stderr, that contains all words.
fn assert_error(output: &Output, words: &[&str]) {
    let stderr = text(&output.stderr);
    assert_eq!((output.status.code(), output.stdout.len(), stderr.lines().count()), (Some(2), 0, 1), "{stderr}");
    assert!(stderr.starts_with("s5: ") && words.iter().all(|word| stderr.contains(word)), "{words:?}: {stderr}");
}

/// A directory, and the path of a users file in it that does not exist.
fn new_file() -> (tempfile::TempDir, String) {
    let dir = temp_dir();
    let path = dir.path().join("users").display().to_string();
    (dir, path)
}

/// A users file with this content, and its directory.
fn file_with(content: &str) -> (tempfile::TempDir, String) {
    let (dir, path) = new_file();
    fs::write(&path, content).expect("file written");
    (dir, path)
}

fn read_users(path: &str) -> String {
    fs::read_to_string(path).expect("file read")
}

fn mode(path: &str) -> u32 {
    fs::metadata(path).expect("the file exists").permissions().mode() & 0o7777
}

/// Returns the exit status of a client that logs in to a server with this users file.
fn login_status(users: &str, userinfo: &str) -> Option<i32> {
    let server = Server::start(&["--users", users]);
    let proxy = format!("{userinfo}@{}", server.addr());
    run(s5().args(["connect", "-x", &proxy, &echo_server().to_string()]), b"x", HASH_TIMEOUT).status.code()
}

#[test]
fn users_file_may_begin_with_a_byte_order_mark() {
    let (_dir, users) = file_with("");
    assert_success(&add_user(&users, "alice", b"secret\n"));
    let entry = read_users(&users);
    fs::write(&users, format!("\u{feff}{entry}")).expect("file written");
    assert_eq!(login_status(&users, "alice:secret"), Some(0));
    assert_success(&add_user(&users, "bob", "\u{feff}secret\r\n".as_bytes()));
    assert!(read_users(&users).starts_with(&entry), "{}", read_users(&users));
    assert_eq!(login_status(&users, "bob:secret"), Some(0), "the mark on stdin is part of the password");
    for (bom, encode) in [(b"\xff\xfe", u16::to_le_bytes as fn(u16) -> [u8; 2]), (b"\xfe\xff", u16::to_be_bytes)] {
        fs::write(&users, [&bom[..], &entry.encode_utf16().flat_map(encode).collect::<Vec<_>>()].concat())
            .expect("file written");
        assert_error(&remove_user(&users, "alice"), &[&users, "the text is UTF-16 (save it as UTF-8)"]);
    }
}

#[test]
fn invalid_users_line_is_an_error_with_file_line_and_word_and_without_passwords() {
    for (content, line, word) in [
        ("alice", "line 1", "alice"),
        ("# comment\n\n  \nbob\n", "line 4", "bob"),
        ("al\tice:x", "line 1", "al\\tice"),
        (&format!("alice:{BCRYPT_HASH}\nalice:{BCRYPT_HASH}"), "line 2", "alice"),
        ("alice:topsecret", "line 1", "alice"),
        ("alice:$2y$05$topsecret", "line 1", "bcrypt"),
    ] {
        let (_dir, users) = file_with(content);
        let output = run(s5().args(["serve", "--listen", "127.0.0.1:0", "--users", &users]), b"", HASH_TIMEOUT);
        assert_error(&output, &[&users, line, word]);
        assert!(!text(&output.stderr).contains("secret"), "{}", text(&output.stderr));
    }
}

#[test]
fn hash_above_a_limit_is_an_error_whose_remedy_works() {
    const HASH: &str = "$argon2id$v=19$m=256,t=2,p=1$c29tZXNhbHQ$nf65EOgLrQMR/uIPnA4rEsF5h7TKyQwu9U1bMCHGi/4";
    for (costs, limit) in [("m=4194304,t=2", "limit of 1048576"), ("m=256,t=100000", "limit of 1000")] {
        let (_dir, users) = file_with(&format!("# comment\nalice:{}\n", HASH.replace("m=256,t=2", costs)));
        let output = run(s5().args(["serve", "--listen", "127.0.0.1:0", "--users", &users]), b"", HASH_TIMEOUT);
        let words = [&users, "line 2: ", "\"alice\"", limit, "(use --remove-user, then --add-user)"];
        assert_error(&output, &words);
        assert_error(&add_user(&users, "alice", b"secret\n"), &words);
        assert_success(&remove_user(&users, "alice"));
        assert_success(&add_user(&users, "alice", b"secret\n"));
    }
}

#[test]
fn message_about_a_missing_file_says_how_to_create_it() {
    let logins = "(create it with one user:password per line)";
    for (args, remedy) in [
        ("serve --users", "(create it with --add-user NAME)"),
        ("serve --rules", "(create it with one rule per line, or give rules with --allow and --deny)"),
        ("serve --keytab", "(create it with ktadd of kadmin, and copy it to this path)"),
        ("serve --via 127.0.0.1:9 --proxy-auth-file", logins),
        ("connect 127.0.0.1:9 --proxy-auth-file", logins),
    ] {
        let words = [args.rsplit(' ').next().unwrap_or_default(), &format!("file: no such file or directory {remedy}")];
        assert_line(&format!("{args} /nonexistent/file"), 2, &words);
    }
}

#[test]
fn unreadable_users_file_is_an_error_with_its_name() {
    let (dir, missing) = new_file();
    assert_line(&format!("serve --users {missing}"), 2, &[&format!("--users {missing}: "), "no such file"]);
    let binary = dir.path().join("binary");
    fs::write(&binary, b"alice:\xff\xfe\n").expect("file written");
    for path in [dir.path(), &binary].map(|path| path.display().to_string()) {
        assert_line(&format!("serve --users {path}"), 2, &[&path]);
    }
}

#[test]
fn added_user_can_log_in() {
    let (_dir, users) = new_file();
    assert_success(&add_user(&users, "alice", b"topsecret\n"));
    let content = read_users(&users);
    assert!(content.starts_with("alice:$argon2id$") && content.ends_with('\n'), "{content}");
    assert_eq!(content.lines().count(), 1, "{content}");
    assert!(!content.contains("topsecret"));
    assert_eq!(mode(&users), 0o600);
    assert_eq!(login_status(&users, "alice:topsecret"), Some(0));
}

#[test]
fn add_user_reads_password_from_first_line_of_stdin() {
    for (stdin, passwd) in [(&b" pass word\r\nmore\n"[..], " pass word"), (b"no end", "no end")] {
        let (_dir, users) = new_file();
        assert_success(&add_user(&users, "alice", stdin));
        let users = Users::parse(&read_users(&users)).expect("valid users file");
        assert!(users.verify(b"alice", passwd.as_bytes(), &mut HashMemory::default()), "{passwd}");
    }
}

#[test]
fn add_user_with_invalid_password_changes_nothing() {
    let (_dir, users) = file_with("# mine\n");
    assert_error(&add_user(&users, "alice", b""), &["--add-user", "empty"]);
    assert_error(&add_user(&users, "alice", b"\n"), &["--add-user", "empty"]);
    let long = [b'p'; 256];
    let output = add_user(&users, "alice", &long);
    assert_error(&output, &["--add-user", "255"]);
    assert!(!text(&output.stderr).contains("ppp"));
    assert_eq!(read_users(&users), "# mine\n");
    assert_success(&add_user(&users, "alice", &long[1..]));
}

#[test]
fn add_user_with_invalid_name_changes_nothing() {
    let (_dir, users) = file_with("# mine\n");
    for name in ["", "a:b", "a\nb", " a", "#a", &"n".repeat(256)] {
        assert_error(&add_user(&users, name, b"topsecret\n"), &["--add-user", "user name"]);
    }
    assert_eq!(read_users(&users), "# mine\n");
}

#[test]
fn add_and_remove_user_keep_other_lines_byte_for_byte() {
    let before =
        format!("# one\r\n\n  bob:{BCRYPT_HASH}  \nalice:{BCRYPT_HASH}\n\t# two: alice:x\nalicia:{BCRYPT_HASH}\n#end");
    let (_dir, users) = file_with(&before);
    assert_success(&add_user(&users, "alice", b"topsecret\n"));
    let after = read_users(&users);
    let (head, rest) = after.split_once("alice:").expect("alice is in the file");
    let (line, tail) = rest.split_once('\n').expect("a complete line");
    assert!(line.starts_with("$argon2id$"), "{after}");
    assert_eq!(head, format!("# one\r\n\n  bob:{BCRYPT_HASH}  \n"));
    assert_eq!(tail, format!("\t# two: alice:x\nalicia:{BCRYPT_HASH}\n#end"));

    // A new user is added at the end, on its own line.
    assert_success(&add_user(&users, "carol", b"topsecret\n"));
    let added = read_users(&users);
    let line = added.strip_prefix(&format!("{after}\n")).expect("the old content is unchanged");
    assert!(line.starts_with("carol:$argon2id$") && line.ends_with('\n') && line.lines().count() == 1, "{line}");

    // Removal keeps the line end that was added to the last line.
    assert_success(&remove_user(&users, "carol"));
    assert_eq!(read_users(&users), format!("{after}\n"));
    assert_success(&remove_user(&users, "alice"));
    assert_eq!(read_users(&users), format!("{head}{tail}\n"));
}

#[test]
fn removing_unknown_user_is_an_error() {
    let before = format!("# alice\nalicia:{BCRYPT_HASH}\n");
    let (dir, users) = file_with(&before);
    assert_error(&remove_user(&users, "alice"), &[&users, "alice"]);
    assert_eq!(read_users(&users), before);
    let missing = format!("{}/missing", dir.path().display());
    assert_error(&remove_user(&missing, "alice"), &[&missing]);
    assert!(!Path::new(&missing).exists());
}

#[test]
fn edited_users_file_keeps_mode_owner_and_group() {
    let (dir, users) = file_with(&format!("bob:{BCRYPT_HASH}\n"));
    // Only root can give a file away.
    let owner = rustix::process::getuid().is_root().then_some((12, 34));
    for act in [add_user, |users: &str, name: &str, _: &[u8]| remove_user(users, name)] {
        for mode in [0o600, 0o640, 0o644, 0o664, 0o440] {
            fs::write(&users, format!("bob:{BCRYPT_HASH}\n")).expect("file written");
            if let Some((uid, gid)) = owner {
                chown(&users, Some(uid), Some(gid)).expect("owner set");
            }
            fs::set_permissions(&users, fs::Permissions::from_mode(mode)).expect("permissions set");
            assert_success(&act(&users, "bob", b"topsecret\n"));
            assert_eq!(self::mode(&users), mode);
            let metadata = fs::metadata(&users).expect("the file exists");
            assert!(owner.is_none_or(|owner| owner == (metadata.uid(), metadata.gid())), "{metadata:?}");
            fs::set_permissions(&users, fs::Permissions::from_mode(0o600)).expect("permissions set");
        }
    }
    let names: Vec<_> =
        fs::read_dir(dir.path()).expect("directory read").flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(names, ["users"], "a temporary file is left");
}

#[test]
fn group_that_cannot_be_kept_is_an_error_and_changes_nothing() {
    if !rustix::process::getuid().is_root() || !is_installed("setpriv") {
        return;
    }
    let before = format!("bob:{BCRYPT_HASH}\n");
    let (dir, users) = file_with(&before);
    // The user 1 owns the file and the directory, but is not in the group 34.
    chown(dir.path(), Some(1), Some(1)).expect("owner set");
    chown(&users, Some(1), Some(34)).expect("owner set");
    let mut command = Command::new("setpriv");
    command.args(["--reuid=1", "--regid=1", "--clear-groups", env!("CARGO_BIN_EXE_s5")]);
    let output = run(command.args(["serve", "--users", &users, "--remove-user", "bob"]), b"", HASH_TIMEOUT);
    assert_error(&output, &[&users, "keep owner 1 and group 34: ", "(run s5 as root)"]);
    assert_eq!(read_users(&users), before);
}

#[test]
fn two_actions_are_an_error_that_names_them_and_change_no_file() {
    let (_dir, users) = file_with("# none\n");
    let actions = ["--add-user alice", "--remove-user alice", "--explain to=a.test:80", "--show-rules", "--check"];
    let pairs = actions.iter().enumerate().flat_map(|(i, one)| actions[i + 1..].iter().map(move |other| (one, other)));
    for (one, other) in pairs {
        let args = format!("serve --users {users} {other} {one}");
        let output = run(s5().args(args.split(' ')), b"secret\n", HASH_TIMEOUT);
        let error = "s5: --add-user, --remove-user, --explain, --show-rules and --check exclude each other (see ";
        assert_error(&output, &[error]);
        assert_eq!(read_users(&users), "# none\n", "{args}");
    }
}

#[test]
fn changes_of_the_users_file_are_reported_with_the_next_step() {
    let (_dir, users) = new_file();
    let report = |change: &str| format!("s5: {users}: {change} alice (send SIGHUP to a running server)\n");
    for change in ["added user", "changed the password of"] {
        assert_eq!(text(&add_user(&users, "alice", b"topsecret\n").stderr), report(change));
    }
    assert_eq!(text(&remove_user(&users, "alice").stderr), report("removed user"));
    let mut command = s5();
    command.args(["serve", "--quiet", "--users", &users, "--add-user", "alice"]);
    let output = run(&mut command, b"topsecret\n", HASH_TIMEOUT);
    assert_success(&output);
    assert_eq!(text(&output.stderr), "");
}

#[test]
fn symlink_to_users_file_is_followed_and_kept() {
    let dir = temp_dir();
    let target_dir = temp_dir();
    let real = write_file(target_dir.path(), "real", "# mine\n");
    let link = dir.path().join("users");
    symlink(&real, &link).expect("symlink created");
    let users = link.to_str().expect("UTF-8 path");
    assert_success(&add_user(users, "alice", b"topsecret\n"));
    assert!(fs::symlink_metadata(&link).expect("the symlink exists").file_type().is_symlink());
    assert!(read_users(&real).starts_with("# mine\nalice:$argon2id$"), "{}", read_users(&real));
    assert_success(&remove_user(users, "alice"));
    assert!(fs::symlink_metadata(&link).expect("the symlink exists").file_type().is_symlink());
    assert_eq!(read_users(&real), "# mine\n");
}

#[test]
fn add_user_to_invalid_file_changes_nothing() {
    let before = format!("bob:{BCRYPT_HASH}\nnonsense\n");
    let (_dir, users) = file_with(&before);
    assert_error(&add_user(&users, "alice", b"topsecret\n"), &[&users, "line 2", "nonsense"]);
    assert_eq!(read_users(&users), before);
}

#[test]
fn add_user_in_missing_directory_names_file_and_remedy() {
    let dir = temp_dir();
    let directory = format!("{}/missing/s5", dir.path().display());
    let users = format!("{directory}/users");
    let output = add_user(&users, "alice", b"topsecret\n");
    let expected = format!("s5: {users}: directory {directory} does not exist (create it: mkdir -p {directory})\n");
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(2), expected));
    assert!(!Path::new(&directory).exists(), "s5 has created the directory");
}

#[test]
fn add_user_in_unwritable_directory_names_file_and_directory() {
    // /proc accepts no new files, not even from root.
    let output = add_user("/proc/users", "alice", b"topsecret\n");
    assert_error(&output, &["s5: /proc/users: create a file in /proc: "]);
    assert!(!text(&output.stderr).contains(".tmp"), "{}", text(&output.stderr));
}

#[test]
fn users_file_of_htpasswd_is_edited_and_accepts_its_passwords() {
    if !is_installed("htpasswd") {
        return;
    }
    let (_dir, users) = new_file();
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let mut htpasswd = Command::new("htpasswd");
    htpasswd.env("PATH", &path).args(["-c", "-b", "-B", "-C", "4", &users, "bob", "bobsecret"]);
    assert_success(&run(&mut htpasswd, b"", HASH_TIMEOUT));
    let before = read_users(&users);
    assert_success(&add_user(&users, "alice", b"topsecret\n"));
    assert!(read_users(&users).starts_with(&before));
    assert_eq!(login_status(&users, "bob:bobsecret"), Some(0));
    assert_eq!(login_status(&users, "bob:topsecret"), Some(67));
    assert_success(&remove_user(&users, "bob"));
    assert!(read_users(&users).starts_with("alice:"), "{}", read_users(&users));
}

#[test]
fn add_and_remove_user_require_users_file_and_exclude_each_other() {
    assert_line("serve --add-user alice", 2, &["--add-user", "--users"]);
    assert_line("serve --remove-user alice", 2, &["--remove-user", "--users"]);
    let both = "serve --users /nonexistent --add-user a --remove-user b";
    assert_line(both, 2, &["--add-user", "--remove-user"]);
}

/// Runs `--add-user alice` on a terminal, and types two passwords. Returns the exit status and what the terminal shows.
fn type_passwords(users: &str, passwords: [&str; 2]) -> (Option<i32>, String) {
    let dir = temp_dir();
    let command = format!("exec \"$S5\" serve --users '{users}' --add-user alice");
    let mut terminal = RunningProgram::start(&mut on_a_terminal(dir.path(), &command));
    for (prompt, passwd) in ["Password for alice: ", "Repeat the password: "].into_iter().zip(passwords) {
        type_at_prompt(&mut terminal, dir.path(), prompt, passwd);
    }
    let (status, shown, _) = terminal.wait_exit(HASH_TIMEOUT);
    assert!(!text(&shown).contains("secret"), "{}", text(&shown));
    (status.code(), text(&shown))
}

#[test]
fn add_user_prompts_twice_without_echo() {
    if !is_installed("script") {
        return;
    }
    let (_dir, users) = new_file();
    let (status, shown) = type_passwords(&users, ["topsecret", "topsecret"]);
    assert_eq!(status, Some(0), "{shown}");
    assert!(read_users(&users).starts_with("alice:$argon2id$"));
    assert_eq!(login_status(&users, "alice:topsecret"), Some(0));
}

#[test]
fn add_user_with_different_passwords_changes_nothing() {
    if !is_installed("script") {
        return;
    }
    let (_dir, users) = file_with("# mine\n");
    let (status, shown) = type_passwords(&users, ["topsecret", "othersecret"]);
    assert!(status != Some(0) && shown.contains("s5: ") && shown.contains("do not match"), "{shown}");
    assert_eq!(read_users(&users), "# mine\n");
}
