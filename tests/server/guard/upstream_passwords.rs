//! Users and passwords for `--via` and `--hop`: from the URL, --proxy-auth-file and the environment.

use super::tools::{alice_and_bob, associate_anonymously, open_ok, rep};
use crate::*;

type Variables<'a> = &'a [(&'a str, &'a str)];

/// A hop that accepts only alice and bob, and the directory of its users file.
fn hop() -> (TempDir, Server) {
    let dir = temp_dir();
    let users = write_file(dir.path(), "users", alice_and_bob());
    (dir, Server::start(&["--users", &users]))
}

/// Starts a server with these options and variables.
fn start(args: &[&str], variables: Variables<'_>) -> Server {
    let mut command = s5();
    Server::start_with(command.args(["serve", "--listen", "127.0.0.1:0"]).args(args).envs(variables.iter().copied()), 1)
}

#[test]
fn passwords_of_hops_come_from_the_url_the_file_and_the_environment() {
    let (_dir, hop) = hop();
    let dir = temp_dir();
    let file = write_file(dir.path(), "auth", "\u{feff}bob@corp:secret\n\nalice:secret\r\n");
    let [none, alice, bob, wrong] =
        ["", "alice@", "bob%40corp@", "alice:wrong@"].map(|userinfo| format!("{userinfo}{}", hop.addr()));
    let environment = [("S5_PROXY_AUTH", "alice:secret")];
    let other = [("SOCKS5_USER", "alice"), ("SOCKS5_PASSWORD", "secret")];
    let rows: [(&[&str], Variables<'_>, u8, &str); 9] = [
        (&["--via", &alice], &environment, 0, "alice"),
        (&["--via", &none], &environment, 0, "alice"),
        (&["--via", &alice], &other, 0, "alice"),
        (&["--via", &alice, "--proxy-auth-file", &file], &[], 0, "alice"),
        (&["--via", &bob, "--proxy-auth-file", &file], &environment, 0, "bob@corp"),
        // The first line is for URLs without a user.
        (&["--via", &none, "--proxy-auth-file", &file], &environment, 0, "bob@corp"),
        // The password of the URL has precedence.
        (&["--via", &wrong, "--proxy-auth-file", &file], &environment, 1, ""),
        // Without passwords, a user in the URL is not used.
        (&["--via", &alice, "--hop-auth", "none"], &environment, 1, ""),
        (&["--via", &none], &[], 1, ""),
    ];
    let target = echo_server().to_string();
    for (args, variables, expected, user) in rows {
        let server = start(args, variables);
        assert_eq!(rep(&server, CONNECT, &target), expected, "{args:?} {variables:?}");
        if expected == 0 {
            let user = format!(" user=\"{user}\" method=password command=udp ");
            let before = hop.log().matches(&user).count();
            associate_anonymously(&server).ping(udp_echo_server(V4), b"udp");
            hop.wait_log(|log| log.matches(&user).count() == before + 1);
        }
    }
}

#[test]
fn each_hop_gets_the_password_of_its_user() {
    let [(_dir, hop), (_next_dir, next)] = [(); 2].map(|()| hop());
    let dir = temp_dir();
    let file = write_file(dir.path(), "auth", "alice:secret\nbob@corp:secret\n");
    let [a, b] = [("a", "alice"), ("b", "bob%40corp")].map(|(name, user)| format!("{name}={user}@{}", hop.addr()));
    // A chain: alice at the first proxy, bob at the second.
    let chain = format!("alice@{},bob%40corp@{}", hop.addr(), next.addr());
    let rules = ["--allow", "to=127.0.0.2 via=a", "--allow", "to=127.0.0.3 via=b"];
    let args = [&["--hop", &a, "--hop", &b, "--via", &chain, "--proxy-auth-file", &file][..], &rules].concat();
    // The variable is not needed.
    let server = start(&args, &[("S5_PROXY_AUTH", "mallory:wrong")]);
    let rows = [("127.0.0.2", &hop, "alice"), ("127.0.0.3", &hop, "bob@corp"), ("127.0.0.1", &next, "bob@corp")];
    for (at, hop, user) in rows {
        let echo = echo_server_at(ip(at));
        ping(&mut open_ok(&server, None, CONNECT, &echo.to_string()).0, b"hello");
        let echo = echo.to_string();
        let log = hop.wait_log(|log| log.contains(&echo));
        let line = log.lines().find(|line| line.contains(&echo)).expect("the session is logged");
        assert!(line.contains(&format!("\"{user}\"")), "{line}");
    }
}

#[test]
fn reload_reads_passwords_of_hops_again() {
    let (_dir, hop) = hop();
    let dir = temp_dir();
    let file = write_file(dir.path(), "auth", "alice:old\n");
    let via = format!("alice@{}", hop.addr());
    let server = start(&["--via", &via, "--proxy-auth-file", &file], &[]);
    let target = echo_server().to_string();
    assert_eq!(rep(&server, CONNECT, &target), 1);
    fs::write(&file, "alice:secret\n").expect("file written");
    let line = server.reload();
    assert!(line.contains(" INFO "), "{line}");
    let (mut tunnel, _) = open_ok(&server, None, CONNECT, &target);
    // After an error, the passwords stay in use.
    for (text, words) in [
        ("alice:secret\nbob\n", "line 2: expected user:password"),
        ("bob:secret\n", "no password for alice (use --proxy-auth-file or S5_PROXY_AUTH)"),
        ("", "no user:password found"),
    ] {
        fs::write(&file, text).expect("file written");
        let line = server.reload();
        assert!(line.contains(words) && line.contains("keeping the current configuration"), "{line}");
        assert!(!line.contains("secret"), "{line}");
        assert_eq!(rep(&server, CONNECT, &target), 0, "{text}");
    }
    fs::remove_file(&file).expect("file removed");
    assert!(Command::new("mkfifo").arg(&file).status().expect("mkfifo runs").success());
    let line = server.reload();
    assert!(line.contains(&format!("{file}: not a regular file")), "{line}");
    // Sessions are not closed, and need no new login.
    ping(&mut tunnel, b"hello");
    assert_eq!(rep(&server, CONNECT, &target), 0);
}

#[test]
fn password_file_of_hops_may_be_stdin_which_is_read_once() {
    let (_dir, hop) = hop();
    let serve = "exec \"$0\" serve --listen 127.0.0.1:0 --proxy-auth-file - --via \"$1\"";
    let command = format!("{serve} <<END\nalice:secret\nEND");
    let mut shell = Command::new("sh");
    shell.args(["-c", &command, env!("CARGO_BIN_EXE_s5"), &format!("alice@{}", hop.addr())]);
    shell.env_remove("S5_PROXY_AUTH");
    let server = Server::start_with(&mut shell, 1);
    let target = echo_server().to_string();
    assert_eq!(rep(&server, CONNECT, &target), 0);
}

#[test]
fn start_fails_without_a_valid_password_for_each_user_of_a_hop() {
    let dir = temp_dir();
    let file = write_file(dir.path(), "auth", "bob:secret\n");
    let broken = write_file(dir.path(), "broken", "bob:secret\nsecret\n");
    let missing = dir.path().join("missing").display().to_string();
    let long = format!("bob:{}", "s".repeat(256));
    let remedy = "no password for alice (use --proxy-auth-file or S5_PROXY_AUTH)";
    let rows: [(&[&str], Variables<'_>, &[&str]); 9] = [
        (&["--via", "alice@192.0.2.1"], &[], &["s5: --via: proxy 192.0.2.1:1080: ", remedy]),
        (&["--via", "alice@192.0.2.1"], &[("S5_PROXY_AUTH", "bob:secret")], &[remedy]),
        (&["--hop", "h=192.0.2.1,alice@192.0.2.2"], &[], &["s5: --hop h: proxy 192.0.2.2:1080: ", remedy]),
        (&["--hop", "h=alice@192.0.2.2", "--proxy-auth-file", &file], &[], &[remedy]),
        (&["--via", "192.0.2.1"], &[("S5_PROXY_AUTH", "secret")], &["S5_PROXY_AUTH: expected user:password"]),
        (&["--via", "192.0.2.1"], &[("S5_PROXY_AUTH", &long)], &["s5: --via: proxy 192.0.2.1:1080: ", "255"]),
        (&["--via", "192.0.2.1", "--proxy-auth-file", &broken], &[], &["--proxy-auth-file", &broken, "line 2"]),
        (&["--via", "192.0.2.1", "--proxy-auth-file", &missing], &[], &["--proxy-auth-file", &missing]),
        (
            &["--proxy-auth-file", &file],
            &[],
            &["--proxy-auth-file, --hop-auth and --hop-udp-relay require --via or --hop"],
        ),
    ];
    for (args, variables, words) in rows {
        let mut command = s5();
        command.args(["serve", "--listen", "127.0.0.1:0"]).args(args).envs(variables.iter().copied());
        let output = run(&mut command, b"", TIMEOUT);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), stderr.lines().count()), (Some(2), 1), "{args:?}: {stderr}");
        assert!(words.iter().all(|word| stderr.contains(word)), "{args:?}: {stderr}");
        assert!(!stderr.contains("secret") && !stderr.contains("sss"), "{stderr}");
    }
    // Rules are explained without passwords.
    let explain = ["serve", "--via", "alice@192.0.2.1", "--explain", "to=192.0.2.9:80"];
    assert_eq!(run(s5().args(explain), b"", TIMEOUT).status.code(), Some(0));
}
