//! Reload by SIGHUP: the files are read again, the new policy applies to sessions, and an error keeps the old policy.

use std::os::unix::fs::PermissionsExt;

use rustix::process::geteuid;

use super::tools::{
    ALICE, BOB, Login, Setup, alice_and_bob, assert_no_datagram, associate, is_closed, log_in, only_alice, only_bob,
    open_ok, send_request, try_log_in, udp_target,
};
use crate::udp::association::receive;
use crate::*;

const EVE: Login<'_> = Some(("eve", "secret"));

/// Returns the REP of a CONNECT from an unused client address, or `None` if the login is refused.
fn rep(server: &Server, login: Login<'_>, dst: SocketAddr) -> Option<u8> {
    let mut stream = try_log_in(server.addr(), unused_client_ip(), login)?;
    Some(send_request(&mut stream, CONNECT, &dst.to_string()).0)
}

/// Starts a target that closes its connections.
fn target() -> SocketAddr {
    tcp_server(V4, drop)
}

#[test]
fn reload_reads_users_and_rules() {
    let [a, b] = [target(), target()];
    let deny = |dst: SocketAddr| format!("deny port={}\n", dst.port());
    let setup = Setup::start(only_alice(), &deny(a), &[]);
    let reps = || [(ALICE, a), (ALICE, b), (EVE, a), (EVE, b)].map(|(login, dst)| rep(&setup.server, login, dst));
    assert_eq!(reps(), [Some(2), Some(0), None, None]);
    // The reload would close a session that has not ended yet.
    setup.server.wait_log(|log| log.contains(" rep=0 "));
    let eve = user_line("eve", "secret");
    std::fs::write(&setup.users, &eve).expect("file written");
    let line = setup.reload_rules(&(deny(b) + "# no rule\ndeny port=1\n"));
    assert!(line.contains("INFO") && line.ends_with("reload: users: 1, rules: 2, sessions closed: 0"), "{line}");
    assert_eq!(reps(), [None, None, Some(0), Some(2)]);
    // Rules of options still precede those of the file. A reload of an unchanged file changes nothing.
    let setup = Setup::start(&eve, &deny(a), &["--allow", &format!("port={}", b.port())]);
    for rules in [deny(b), deny(b) + &deny(a), "deny\n".into(), "deny\n".into()] {
        let line = setup.reload_rules(&rules);
        assert!(line.contains(&format!(" rules: {},", rules.lines().count() + 1)), "{line}");
        assert_eq!(rep(&setup.server, EVE, b), Some(0));
    }
    assert_eq!(rep(&setup.server, EVE, a), Some(2));
}

#[test]
fn reload_replaces_users_and_rules_together() {
    let [a, b] = [target(), target()];
    let policies = [("alice", a), ("eve", b)]
        .map(|(name, allowed)| (user_line(name, "secret"), format!("allow port={}\ndeny\n", allowed.port())));
    let setup = Setup::start(&policies[0].0, &policies[0].1, &["--threads", "2"]);
    let is_done = AtomicBool::new(false);
    thread::scope(|scope| {
        for (login, dst) in [(ALICE, b), (EVE, a)] {
            let (setup, is_done) = (&setup, &is_done);
            scope.spawn(move || {
                while !is_done.load(Ordering::Relaxed) {
                    assert_ne!(rep(&setup.server, login, dst), Some(0), "{login:?} reached {dst}");
                }
            });
        }
        for (users, rules) in policies.iter().cycle().skip(1).take(100) {
            std::fs::write(&setup.users, users).expect("file written");
            let line = setup.reload_rules(rules);
            assert!(line.contains("reload: users: "), "{line}");
        }
        is_done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn reload_forgets_cached_passwords() {
    let setup = Setup::start(alice_and_bob(), "", &[]);
    let dst = target();
    // The second login uses the cache.
    for _ in 0..2 {
        assert_eq!(rep(&setup.server, ALICE, dst), Some(0));
    }
    let line = setup.reload_users(&user_line("alice", "another"));
    assert!(line.contains(" users: 1,"), "{line}");
    for _ in 0..2 {
        assert_eq!(rep(&setup.server, ALICE, dst), None);
        assert_eq!(rep(&setup.server, BOB, dst), None);
        assert_eq!(rep(&setup.server, Some(("alice", "another")), dst), Some(0));
    }
    // After another change, the second password is refused too.
    setup.reload_users(alice_and_bob());
    assert_eq!(rep(&setup.server, Some(("alice", "another")), dst), None);
    assert_eq!(rep(&setup.server, ALICE, dst), Some(0));
}

/// Invalid files, each with the line and the word that the log must contain. tests/policy has all errors.
const BAD_USERS: [(&str, &str, &str); 2] =
    [("# ours\nalice\n", "line 2", "alice"), ("\n\nalice:$argon2id$v=19$m=1$x\n", "line 3", "alice")];
const BAD_RULES: [(&str, &str, &str); 2] =
    [("# x\n\ndeny port=99999\n", "line 3", "99999"), ("allow via=far\n", "line 1", "far")];

#[test]
fn reload_keeps_policy_if_a_file_is_invalid() {
    let [a, b] = [target(), target()];
    let rules = format!("deny port={}\n", a.port());
    let setup = Setup::start(alice_and_bob(), &rules, &[]);
    let other = user_line("eve", "secret");
    let assert_kept = |line: &str, file: &str, words: [&str; 2]| {
        assert!(line.contains("ERROR") && line.contains("keeping the current configuration"), "{line}");
        let is_named = line.contains(&format!("{file}: ")) && words.iter().all(|word| line.contains(word));
        assert!(is_named, "{words:?}: {line}");
        let reps = [(ALICE, a), (ALICE, b), (EVE, b)].map(|(login, dst)| rep(&setup.server, login, dst));
        assert_eq!(reps, [Some(2), Some(0), None], "{line}");
    };
    for (text, line, word) in BAD_USERS {
        // The new rules are valid, but must not be loaded without the users.
        std::fs::write(&setup.rules, "deny\n").expect("file written");
        assert_kept(&setup.reload_users(text), &setup.users, [line, word]);
    }
    for (text, line, word) in BAD_RULES {
        std::fs::write(&setup.users, &other).expect("file written");
        assert_kept(&setup.reload_rules(text), &setup.rules, [line, word]);
    }
    for (file, good) in [(&setup.users, &other), (&setup.rules, &rules)] {
        std::fs::write(file, b"# fine\n\xff\xfe\n").expect("file written");
        assert_kept(&setup.reload(), file, ["line 2", "UTF-8"]);
        std::fs::write(file, vec![b'#'; (64 << 20) + 1]).expect("file written");
        assert_kept(&setup.reload(), file, ["too large", ""]);
        std::fs::remove_file(file).expect("file removed");
        assert_kept(&setup.reload(), file, ["no such file", ""]);
        symlink(file, file).expect("symlink created");
        assert_kept(&setup.reload(), file, ["symbolic link", ""]);
        std::fs::remove_file(file).expect("file removed");
        std::fs::create_dir(file).expect("directory created");
        assert_kept(&setup.reload(), file, ["directory", ""]);
        std::fs::remove_dir(file).expect("directory removed");
        std::fs::write(file, good).expect("file written");
    }
    let line = setup.reload();
    assert!(line.contains(" users: 1, rules: 1,"), "valid files are not loaded after errors: {line}");
    assert_eq!(rep(&setup.server, EVE, b), Some(0));
}

#[test]
fn reload_does_not_block_on_named_pipe() {
    let mut setup = Setup::new(&["--drain-timeout", "0"]);
    std::fs::remove_file(&setup.rules).expect("file removed");
    assert!(Command::new("mkfifo").arg(&setup.rules).status().expect("mkfifo runs").success());
    setup.server.signal("HUP");
    assert_eq!(rep(&setup.server, ALICE, target()), Some(0));
    setup.server.signal("TERM");
    assert_eq!(setup.server.wait(TIMEOUT / 4).code(), Some(0));
}

#[test]
fn reload_keeps_policy_if_a_file_is_unreadable() {
    let dir = temp_dir();
    let file = |name, text| write_file(dir.path(), name, text);
    let (users, rules) = (file("users", alice_and_bob()), file("rules", "deny port=1\n"));
    let mode =
        |file: &str, mode| std::fs::set_permissions(file, PermissionsExt::from_mode(mode)).expect("permissions set");
    mode(dir.path().to_str().expect("UTF-8 path"), 0o755);
    // Root can read any file, so the server runs as another user.
    let mut command = if geteuid().is_root() {
        if !is_installed("setpriv") {
            return;
        }
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--clear-groups", env!("CARGO_BIN_EXE_s5")]);
        command
    } else {
        s5()
    };
    command.args(["serve", "--listen", "127.0.0.1:0", "--users", &users, "--rules", &rules]);
    let server = Server::start_with(&mut command, 1);
    for file in [&users, &rules] {
        mode(file, 0o000);
        let line = server.reload();
        assert!(line.contains("ERROR") && line.contains(file) && line.contains("denied"), "{line}");
        assert_eq!(rep(&server, ALICE, target()), Some(0));
        mode(file, 0o644);
        assert!(server.reload().contains("reload: users: "));
    }
}

#[test]
fn reload_applies_files_as_they_are() {
    let [a, b] = [target(), target()];
    let (alice, bob) = (only_alice(), only_bob());
    let setup = Setup::start(alice_and_bob(), &format!("deny port={}\ndeny port=1\n", a.port()), &[]);
    let reps = |logins: [Login<'_>; 2]| logins.map(|login| [a, b].map(|dst| rep(&setup.server, login, dst)));
    let without_final_line_end = format!("deny port={}", b.port());
    for (rules, count, expected) in [
        (&*without_final_line_end, 1, [Some(0), Some(2)]),
        ("", 0, [Some(0), Some(0)]),
        ("deny to=127.0.0.1", 1, [Some(2), Some(2)]),
        ("# none\n", 0, [Some(0), Some(0)]),
        ("\n", 0, [Some(0), Some(0)]),
    ] {
        let line = setup.reload_rules(rules);
        assert!(line.contains(&format!(" users: 2, rules: {count},")), "{rules:?}: {line}");
        assert_eq!(reps([ALICE, BOB]), [expected, expected], "{rules:?}");
    }
    let allowed = [Some(0), Some(0)];
    for (users, count, expected) in [
        (alice.trim_end(), 1, [allowed, [None, None]]),
        ("", 0, [[None, None], [None, None]]),
        (bob, 1, [[None, None], allowed]),
    ] {
        let line = setup.reload_users(users);
        assert!(line.contains(&format!(" users: {count}, rules: 0,")), "{users:?}: {line}");
        assert_eq!(reps([ALICE, BOB]), expected, "{users:?}");
    }
    assert!(setup.server.log().contains("users: no users, so every login is refused (add users with --add-user)"));
}

#[test]
fn reload_never_opens_relay() {
    enter_namespace!("", "");
    let (dir, dst) = (temp_dir(), target());
    let rules = write_file(dir.path(), "rules", "allow from=127.0.0.2\n");
    let server = serve("*:0", 2, &["--rules", &rules]);
    let to = SocketAddr::new(V4, server.addr().port());
    for open_rules in ["# none\n", "allow from=127.0.0.2\nallow port=80\n"] {
        std::fs::write(&rules, open_rules).expect("file written");
        let line = server.reload();
        for word in ["ERROR", "--allow-open-relay", "keeping the current configuration"] {
            assert!(line.contains(word), "{open_rules}: {line}");
        }
        assert!(is_closed(&mut connect_from(SocketAddr::new(ip("127.0.0.3"), 0), to)), "{open_rules}");
        let rep = send_request(&mut log_in(to, ip("127.0.0.2"), None), CONNECT, &dst.to_string()).0;
        assert_eq!(rep, 0, "{open_rules}");
    }
    std::fs::write(&rules, "allow from=127.0.0.3\n").expect("file written");
    assert!(server.reload().contains("reload: users: "));
    assert!(is_closed(&mut connect_from(SocketAddr::new(ip("127.0.0.2"), 0), to)));
    log_in(to, ip("127.0.0.3"), None);
}

#[test]
fn reload_applies_to_next_datagram_of_association() {
    let [(good, good_addr), (bad, bad_addr)] = [(); 2].map(|()| udp_target("127.0.0.1"));
    let deny = format!("deny command=udp port={}\n", bad_addr.port());
    for (args, is_rechecked) in [(&[][..], true), (&["--keep-sessions"], false)] {
        let setup = Setup::new(args);
        let association = associate(setup.server.addr(), V4, ALICE);
        let [_, relay] = [(&good, good_addr), (&bad, bad_addr)].map(|(socket, addr)| {
            association.send(addr, b"before");
            receive(socket).1
        });
        assert!(setup.reload_rules(&deny).ends_with("sessions closed: 0"));
        association.send(bad_addr, b"denied");
        association.send(good_addr, b"after");
        assert_eq!(receive(&good).0, b"after");
        // The new rules apply to answers too.
        bad.send_to(b"denied", relay).expect("datagram sent");
        good.send_to(b"answer", relay).expect("datagram sent");
        if is_rechecked {
            assert_no_datagram(&bad);
        } else {
            assert_eq!((receive(&bad).0, association.receive().1), (b"denied".to_vec(), b"denied".to_vec()));
        }
        assert_eq!(association.receive().1, b"answer");
        // The old rules apply again after another reload.
        assert!(setup.reload_rules("# none\n").ends_with("sessions closed: 0"));
        association.send(bad_addr, b"again");
        assert_eq!(receive(&bad).0, b"again");
    }
}

#[test]
fn many_reloads_disturb_no_allowed_session_also_during_shutdown() {
    let mut setup = Setup::new(&["--drain-timeout", "60"]);
    let (mut stream, _) = open_ok(&setup.server, ALICE, CONNECT, &echo_server().to_string());
    for number in 0..20_u8 {
        setup.server.signal("HUP");
        ping(&mut stream, &[number; 1000]);
    }
    setup.reload();
    ping(&mut stream, b"last");
    setup.server.signal("TERM");
    setup.server.wait_log(|log| log.contains("shutting down: draining sessions"));
    for _ in 0..3 {
        setup.server.signal("HUP");
        ping(&mut stream, b"still open");
    }
    drop(stream);
    assert_eq!(setup.server.wait(TIMEOUT).code(), Some(0));
}

#[test]
fn file_that_everybody_can_change_is_a_warning_at_start_and_reload() {
    let dir = temp_dir();
    let texts = [("users", only_alice()), ("rules", "# none\n"), ("auth", "a:b\n")];
    let files = texts.map(|(name, text)| write_file(dir.path(), name, text));
    let args = ["--users", &files[0], "--rules", &files[1], "--via", "127.0.0.1:9", "--proxy-auth-file", &files[2]];
    let set_mode =
        |path: &str, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).expect("mode set");
    let folder = dir.path().display().to_string();
    let warning = |file: &str, remedy: &str| format!("{file}: everybody can change it (run chmod o-w {remedy})");
    let warnings = |log: &str| log.matches("everybody can change it").count();
    set_mode(&folder, 0o1777);
    let server = Server::start(&args);
    assert_eq!(warnings(&server.log()), 0, "{}", server.log());
    for (file, n) in files.iter().zip(1..) {
        set_mode(file, 0o666);
        server.reload();
        let log = server.wait_log(|log| log.contains(&warning(file, file)));
        assert_eq!(warnings(&log), n, "{log}");
        set_mode(file, 0o600);
    }
    set_mode(&folder, 0o777);
    let server = Server::start(&args);
    for file in &files {
        server.wait_log(|log| log.contains(&warning(file, &folder)));
    }
}
