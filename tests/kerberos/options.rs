//! Options for GSSAPI: order of methods, keytab and service, granted levels, ticket cache, and errors at start.

use std::os::unix::fs::PermissionsExt;

use crate::page::assert_explains;
use crate::support::realm::Realm;
use crate::*;

/// Runs a server that must not start.
fn refused(realm: &Realm, args: &[&str]) -> Output {
    run(realm.env(s5().args(["serve", "--listen", "127.0.0.1:0"]).args(args)), b"", TIMEOUT)
}

/// Returns the method that the server selects.
fn selected(server: &Server, methods: &[u8]) -> u8 {
    let mut stream = server.connect();
    let count = u8::try_from(methods.len()).expect("a few methods");
    stream.write_all(&[&[5, count], methods].concat()).expect("the greeting is sent");
    read_exact(&mut stream, 2)[1]
}

#[test]
fn server_selects_methods_in_order_of_auth() {
    let Some(realm) = realm() else { return };
    let keytab = path(&realm.file("service.keytab"));
    let (_dir, users) = users_file(&[("bob", "secret")]);
    let both = ["--users", &users, "--keytab", &keytab];
    let table: [(&[&str], [u8; 5]); 7] = [
        // Selected methods for each of `offers` below.
        (&both, [2, 2, 0xff, 1, 2]),
        (&[&both[..], &["--auth", "password,gssapi"]].concat(), [2, 2, 0xff, 1, 2]),
        (&[&both[..], &["--auth", "gssapi,password"]].concat(), [1, 1, 0xff, 1, 2]),
        (&[&both[..], &["--auth", "none,gssapi,password"]].concat(), [0, 0, 0, 1, 2]),
        (&["--keytab", &keytab], [1, 1, 0xff, 1, 0xff]),
        (&["--auth", "gssapi"], [1, 1, 0xff, 1, 0xff]),
        (&["--auth", "gssapi,none"], [1, 1, 0, 1, 0xff]),
    ];
    for (args, expected) in table {
        let server = start(&realm, args);
        let offers: [&[u8]; 5] = [&[0, 1, 2], &[2, 1, 0], &[0], &[1], &[2]];
        assert_eq!(offers.map(|methods| selected(&server, methods)), expected, "{args:?}");
    }
}

#[test]
fn contradictory_options_are_refused() {
    let Some(realm) = realm() else { return };
    let keytab = path(&realm.file("service.keytab"));
    let (_dir, users) = users_file(&[("bob", "secret")]);
    let table: [(&[&str], &str); 9] = [
        (&["--auth", "password"], "password requires --users"),
        (&["--auth", "gssapi,password", "--keytab", &keytab], "password requires --users"),
        (&["--auth", "none", "--keytab", &keytab], "require gssapi in this list"),
        (&["--auth", "none", "--gssapi-protection", "none"], "require gssapi in this list"),
        (&["--auth", "gssapi", "--users", &users], "--users and S5_USER require password in this list"),
        (&["--auth", "gssapi,gssapi"], "\"gssapi\" is given twice"),
        (&["--auth", "kerberos"], "none, password or gssapi"),
        (&["--keytab", &keytab, "--gssapi-protection", "most"], "none, integrity or confidentiality"),
        (&["--keytab", &keytab, "--gssapi-protection", ""], "none, integrity or confidentiality"),
    ];
    for (args, expected) in table {
        assert_fails_with(&refused(&realm, args), 2, &[expected]);
    }
}

#[test]
fn unusable_keytab_is_reported_at_start() {
    let Some(realm) = realm() else { return };
    let (dir, keytab) = (temp_dir(), path(&realm.file("service.keytab")));
    let file = |name: &str| path(&dir.path().join(name));
    let (junk, empty) = (write_file(dir.path(), "junk", "no keytab\n"), write_file(dir.path(), "empty", ""));
    let nonexistent = "is nonexistent or empty";
    let table: [(&[&str], &[&str]); 6] = [
        (&["--keytab", &file("missing")], &[&file("missing"), "no such file"]),
        (&["--keytab", &junk], &[&junk, nonexistent]),
        (&["--keytab", &empty], &[&empty, nonexistent]),
        (&["--keytab", &file("")], &[&file(""), nonexistent]),
        (&["--keytab", &keytab, "--gssapi-service", "nokey"], &[&keytab, "No key table entry found"]),
        (&["--auth", "gssapi", "--gssapi-service", "rcmd@other.test"], &["--auth gssapi", "GSSAPI"]),
    ];
    for (args, words) in table {
        assert_fails_with(&refused(&realm, args), 2, words);
        assert_explains(words[1]);
    }
    // Without --keytab, KRB5_KTNAME names the keytab.
    let mut command = s5();
    realm.env(command.args(["serve", "--listen", "127.0.0.1:0", "--auth", "gssapi"]));
    let output = run(command.env("KRB5_KTNAME", format!("FILE:{}", file("missing"))), b"", TIMEOUT);
    assert_fails_with(&output, 2, &["--auth gssapi", "missing"]);
}

#[test]
fn unreadable_keytab_is_reported_at_start() {
    let Some(realm) = realm() else { return };
    let (dir, is_root) = (temp_dir(), rustix::process::getuid().is_root());
    if is_root && !is_installed("setpriv") {
        return;
    }
    // Only the keytab is unreadable for the other user.
    let (program, keytab) = (path(&dir.path().join("s5")), path(&dir.path().join("keytab")));
    // By another process, so that no child of this one has it open for writing.
    stdout(Command::new("cp").args([env!("CARGO_BIN_EXE_s5"), &program]), b"");
    std::fs::copy(realm.file("service.keytab"), &keytab).expect("a copy");
    let mode = |path: &str, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).expect("a mode");
    mode(&path(dir.path()), 0o755);
    mode(&program, 0o755);
    mode(&keytab, if is_root { 0o600 } else { 0 });
    let mut command = Command::new(if is_root { "setpriv" } else { &program });
    if is_root {
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", &program]);
    }
    command.args(["serve", "--listen", "127.0.0.1:0", "--keytab", &keytab]);
    let output = run(realm.env(&mut command), b"", TIMEOUT);
    assert_fails_with(&output, 2, &[&keytab, "permission denied"]);
    assert_explains("permission denied");
}

#[test]
fn keytab_that_everybody_can_change_is_a_warning() {
    let Some(realm) = realm() else { return };
    let dir = temp_dir();
    let keytab = path(&dir.path().join("keytab"));
    std::fs::copy(realm.file("service.keytab"), &keytab).expect("a copy");
    let warning = format!("{keytab}: everybody can change it (run chmod o-w {keytab})");
    for (mode, is_warning) in [(0o640, false), (0o642, true)] {
        std::fs::set_permissions(&keytab, PermissionsExt::from_mode(mode)).expect("a mode");
        let server = start(&realm, &["--keytab", &keytab]);
        assert_eq!(server.log().contains(&warning), is_warning, "{mode:o}: {}", server.log());
    }
}

#[test]
fn service_can_be_a_name_a_name_with_host_or_a_principal() {
    let Some(realm) = realm() else { return };
    let echo = echo_server().to_string();
    let table: [(&[&str], &[&str]); 8] = [
        // Without the option, all keys of the keytab are used.
        (&[], &["rcmd", "socks"]),
        (&["--gssapi-service", "rcmd"], &["rcmd"]),
        (&["--gssapi-service", "rcmd@localhost"], &["rcmd"]),
        (&["--gssapi-service", "rcmd/localhost@S5.TEST"], &["rcmd"]),
        (&["--gssapi-service", "rcmd/localhost"], &["rcmd"]),
        (&["--gssapi-service", "socks"], &["socks"]),
        (&["--gssapi-service", "socks@localhost"], &["socks"]),
        (&["--gssapi-service", "socks/localhost@S5.TEST"], &["socks"]),
    ];
    for (args, accepted) in table {
        // One server has the keytab of the environment.
        let server = if args.is_empty() { start(&realm, &["--auth", "gssapi"]) } else { serve(&realm, args) };
        for requested in ["rcmd", "socks"] {
            let output = connect(&realm, &url(&server), &["--gssapi-service", requested, &echo]);
            match accepted.contains(&requested) {
                true => assert_hello(&output, requested),
                false => assert_fails_with(&output, 67, &["login", "GSSAPI"]),
            }
        }
    }
}

#[test]
fn wrong_key_refuses_login_and_new_key_needs_no_restart() {
    let Some(realm) = realm() else { return };
    let server = start(&realm, &["--keytab", &path(&realm.file("wrong.keytab"))]);
    let echo = echo_server().to_string();
    let output = connect(&realm, &url(&server), &[&echo]);
    assert_fails_with(&output, 67, &["proxy localhost:", "login", "the server refused the login"]);
    assert_explains("the server refused the login");
    wait_session(&server, &[" up=0 down=0 ", "GSSAPI: ", "rcmd/localhost@S5.TEST"]);
    // A key that is written later is used at the next login.
    std::fs::copy(realm.file("service.keytab"), realm.file("wrong.keytab")).expect("a copy");
    assert_hello(&connect(&realm, &url(&server), &[&echo]), "new key");
}

#[test]
fn minimum_above_the_requested_level_is_a_usage_error() {
    let Some(realm) = realm() else { return };
    let args = ["--gssapi-protection", "integrity", "--gssapi-min", "confidentiality", "127.0.0.1:9"];
    assert_fails_with(&connect(&realm, "localhost:9", &args), 2, &["--gssapi-min", "--gssapi-protection"]);
}

#[test]
fn ccache_option_selects_the_tickets() {
    let Some(realm) = realm() else { return };
    let (server, echo) = (serve(&realm, &[]), echo_server().to_string());
    for (ccache, user) in [("ccache", ALICE), ("ccache.mallory", "mallory@S5.TEST")] {
        let ccache = path(&realm.file(ccache));
        let mut command = crate::client(&realm, "connect", &url(&server), &["--ccache", &ccache, &echo]);
        assert_hello(&hello(command.env("KRB5CCNAME", "FILE:/nonexistent")), user);
        wait_session(&server, &[&format!("user=\"{user}\"")]);
    }
}

#[test]
fn gssapi_is_offered_only_with_a_ticket() {
    let Some(realm) = realm() else { return };
    let echo = echo_server().to_string();
    let (_dir, users) = users_file(&[("bob", "secret")]);
    // Prefers GSSAPI, and accepts others.
    let server = serve(&realm, &["--users", &users, "--auth", "gssapi,password,none"]);
    let (plain, bob) = (url(&server), format!("bob:secret@{}", url(&server)));
    let table: [(&str, &[&str], &str, &str); 4] = [
        ("ccache", &[], &plain, "user=\"alice@S5.TEST\""),
        ("none", &[], &bob, "user=\"bob\""),
        ("none", &[], &plain, " method=none "),
        ("ccache", &["--auth", "password"], &bob, "user=\"bob\""),
    ];
    for (ccache, args, proxy, user) in table {
        let before = server.log().len();
        let mut command = any_client(&realm, "connect", proxy, &[args, &[&echo]].concat());
        command.env("KRB5CCNAME", format!("FILE:{}", realm.file(ccache).display()));
        assert_hello(&hello(&mut command), user);
        server.wait_log(|log| log[before..].contains(user));
    }
}
