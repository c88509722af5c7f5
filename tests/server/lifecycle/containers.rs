//! Servers in containers: one user in the environment, any user ID, and a read-only root file system.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;

use crate::*;

fn with_user(user: &str, passwd: &str) -> Command {
    let mut command = s5();
    command.env("S5_USER", user).env("S5_PASSWORD", passwd);
    command
}

/// Starts a command with `s5 serve` on all addresses, and logs in with the right and with a wrong password.
fn assert_requires_login(command: &mut Command) -> Server {
    let server = Server::start_with(command.args(["serve", "--listen", "*:0"]), 2);
    let at = SocketAddr::new(V4, server.addr().port());
    for (passwd, status) in [("open sesame", 0), ("wrong", 1)] {
        let mut stream = connect_from(SocketAddr::new(V4, 0), at);
        select_password(&mut stream);
        assert_eq!(send_login(&mut stream, b"alice", passwd.as_bytes()), status);
    }
    server
}

#[test]
fn user_in_the_environment_can_log_in_also_after_a_reload_and_the_password_is_removed() {
    let server = assert_requires_login(&mut with_user("alice", "open sesame"));
    let environment = fs::read(format!("/proc/{}/environ", server.pid())).expect("the server runs");
    let environment = text(&environment);
    assert!(environment.contains("S5_USER=alice\0") && environment.contains("S5_PASSWORD=\0"), "{environment}");
    assert!(!environment.contains("sesame"), "{environment}");
    assert!(server.reload().contains("users: 1"));
    let at = SocketAddr::new(V4, server.addr().port());
    let mut stream = connect_from(SocketAddr::new(V4, 0), at);
    select_password(&mut stream);
    assert_eq!(send_login(&mut stream, b"alice", b"open sesame"), 0);
    assert!(server.log().contains("not dumpable") && !server.log().contains("sesame"), "{}", server.log());
}

#[test]
fn user_in_the_environment_can_log_in_after_a_restart() {
    let server = assert_requires_login(&mut with_user("alice", "open sesame"));
    let _successor = Successor::of(&server);
    for (passwd, status) in [("open sesame", 0), ("wrong", 1)] {
        let mut stream = connect_from(SocketAddr::new(V4, 0), SocketAddr::new(V4, server.addr().port()));
        select_password(&mut stream);
        assert_eq!(send_login(&mut stream, b"alice", passwd.as_bytes()), status);
    }
}

#[test]
fn user_in_the_environment_is_refused_if_it_is_incomplete_or_another_source_of_users_is_given() {
    let dir = temp_dir();
    let users = write_file(dir.path(), "users", &user_line("bob", "secret"));
    let rows = [
        (Some("alice"), None, &[][..], "S5_PASSWORD is not set (set both, or neither)"),
        (None, Some("secret"), &[], "S5_USER is not set (set both, or neither)"),
        (
            Some("alice"),
            Some("secret"),
            &["--users", &users],
            "S5_USER and S5_PASSWORD: cannot be combined with --users",
        ),
        (Some("alice"), Some("secret"), &["--auth", "none"], "--users and S5_USER require password in this list"),
        (Some("alice"), None, &["--users", &users], "S5_PASSWORD is not set (set both, or neither)"),
        (None, None, &["--auth", "password"], "--auth: password requires --users FILE"),
    ];
    for (user, passwd, args, error) in rows {
        let mut command = s5();
        [("S5_USER", user), ("S5_PASSWORD", passwd)].into_iter().for_each(|(name, value)| {
            value.map(|value| command.env(name, value));
        });
        let output = run(command.args(["serve", "--listen", "127.0.0.1:0"]).args(args), b"", TIMEOUT);
        assert_fails_with(&output, 2, &[error]);
        assert!(!text(&output.stderr).contains("secret"), "{}", text(&output.stderr));
    }
    // The file can be edited.
    let mut command = with_user("alice", "secret");
    stdout(command.args(["serve", "--users", &users, "--add-user", "carol"]), b"open sesame\n");
}

#[test]
fn invalid_user_in_the_environment_is_an_error_that_names_the_variable_and_not_the_value() {
    let long = "x".repeat(256);
    let rows: [(&[u8], &[u8], &str); 13] = [
        (b"", b"zzz", "S5_USER is empty"),
        (b"", b"", "S5_USER is empty"),
        (b"zzz:", b"zzz", "S5_USER contains \":\""),
        (b"zzz\n", b"zzz", "S5_USER contains a control character"),
        (b" zzz", b"zzz", "S5_USER starts or ends with whitespace"),
        (b"#zzz", b"zzz", "S5_USER starts with \"#\""),
        (b"zzz\xff", b"zzz", "S5_USER is not UTF-8"),
        (long.as_bytes(), b"zzz", "S5_USER is longer than 255 bytes"),
        (b"zzz", b"", "S5_PASSWORD is empty"),
        (b"zzz", b"zzz\n", "S5_PASSWORD contains a line break (remove it)"),
        (b"zzz", b"zzz\r", "S5_PASSWORD contains a line break (remove it)"),
        (b"zzz", b"zzz\nzzz", "S5_PASSWORD contains a line break (remove it)"),
        (b"zzz", long.as_bytes(), "S5_PASSWORD is longer than 255 bytes"),
    ];
    for (user, passwd, error) in rows {
        let mut command = s5();
        command.env("S5_USER", OsStr::from_bytes(user)).env("S5_PASSWORD", OsStr::from_bytes(passwd));
        let output = run(command.args(["serve", "--listen", "127.0.0.1:0"]), b"", TIMEOUT);
        assert_fails_with(&output, 2, &[&format!("s5: {error}")]);
        assert!(!text(&output.stderr).contains("zzz") && output.stderr.len() < 200, "{}", text(&output.stderr));
    }
}

#[test]
fn password_in_the_environment_can_have_any_bytes_but_line_breaks() {
    for passwd in [&[b'p'; 255][..], b"p\xff: #", b" p\t "] {
        let mut command = s5();
        command.env("S5_USER", "zo\u{eb}").env("S5_PASSWORD", OsStr::from_bytes(passwd));
        let server = Server::start_with(command.args(["serve", "--listen", "127.0.0.1:0"]), 1);
        assert_eq!(log_in(&server, V4, "zo\u{eb}".as_bytes(), passwd).1, 0, "{passwd:?}");
    }
}

#[test]
fn server_runs_as_any_user_on_a_read_only_file_system() {
    if !has_all(&["unshare", "setpriv"]) {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        return record_skip("only root can use any user ID");
    }
    // No user has this ID, and nothing can be written, except perhaps in /dev and /proc.
    let script = "mount -o remount,bind,ro / && ! touch /probe 2>/dev/null \
                  && exec setpriv --reuid=12345 --regid=12345 --clear-groups \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "--", "sh", "-c", script, "sh", env!("CARGO_BIN_EXE_s5")]);
    command.env_clear().env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin");
    command.env("S5_USER", "alice").env("S5_PASSWORD", "open sesame");
    let server = assert_requires_login(&mut command);
    let status = fs::read_to_string(format!("/proc/{}/status", server.pid())).expect("the server runs");
    assert!(status.contains("\nUid:\t12345\t12345\t12345\t12345\n"), "{status}");
    let log = server.wait_log(|log| log.contains("sandbox: "));
    assert!(log.contains("no capabilities, no_new_privs, not dumpable"), "{log}");
    // The files of a process that is not dumpable belong to root, and other processes of the user cannot read them.
    let pid = server.pid();
    let helper = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("the server runs");
    for pid in [&pid.to_string(), helper.trim()] {
        let environ = fs::metadata(format!("/proc/{pid}/environ")).expect("one process with this number");
        assert_eq!(environ.uid(), 0, "{pid}");
    }
}
