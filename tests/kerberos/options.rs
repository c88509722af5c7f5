//! Options for GSSAPI: order of methods, keytab and service, granted levels, ticket cache, and errors at start.

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

use crate::support::realm::Realm;
use crate::support::{Server, TIMEOUT, echo_server, is_installed, read_exact, run, s5, temp_dir};
use crate::{
    ALICE, LONG_TIMEOUT, assert_fails_with, client, client_at, path, realm, serve, start, stdout, url, wait_session,
};

/// Runs a server that must not start.
fn refused(realm: &Realm, args: &[&str]) -> Output {
    run(realm.env(s5().args(["serve", "--listen", "127.0.0.1:0"]).args(args)), b"", TIMEOUT)
}

fn users(dir: &std::path::Path) -> String {
    let users = path(&dir.join("users"));
    stdout(s5().args(["serve", "--users", &users, "--add-user", "bob"]), b"secret\n");
    users
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
    let (dir, keytab) = (temp_dir(), path(&realm.file("service.keytab")));
    let users = users(dir.path());
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
    let (dir, keytab) = (temp_dir(), path(&realm.file("service.keytab")));
    let users = users(dir.path());
    let table: [(&[&str], &str); 9] = [
        (&["--auth", "password"], "password requires --users"),
        (&["--auth", "gssapi,password", "--keytab", &keytab], "password requires --users"),
        (&["--auth", "none", "--keytab", &keytab], "require gssapi in this list"),
        (&["--auth", "none", "--gssapi-protection", "none"], "require gssapi in this list"),
        (&["--auth", "gssapi", "--users", &users], "--users requires password in this list"),
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
    let dir = temp_dir();
    let file = |name: &str| path(&dir.path().join(name));
    std::fs::write(file("junk"), b"this is no keytab\n").expect("a file");
    std::fs::write(file("empty"), b"").expect("a file");
    std::fs::create_dir(file("dir")).expect("a directory");
    let unusable = "is nonexistent or empty";
    for (name, expected) in [("missing", "no such file"), ("junk", unusable), ("empty", unusable), ("dir", unusable)] {
        assert_fails_with(&refused(&realm, &["--keytab", &file(name)]), 2, &[&file(name), expected]);
        crate::page::assert_explains(expected);
    }
    let keytab = path(&realm.file("service.keytab"));
    let no_key = refused(&realm, &["--keytab", &keytab, "--gssapi-service", "nokey"]);
    assert_fails_with(&no_key, 2, &[&keytab, "No key table entry found"]);
    crate::page::assert_explains("No key table entry found");
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
    std::fs::copy(env!("CARGO_BIN_EXE_s5"), &program).expect("a copy");
    std::fs::copy(realm.file("service.keytab"), &keytab).expect("a copy");
    let mode = |path: &str, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).expect("a mode");
    mode(&path(dir.path()), 0o755);
    mode(&program, 0o755);
    mode(&keytab, if is_root { 0o600 } else { 0 });
    let mut command = if is_root {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", &program]);
        command
    } else {
        Command::new(&program)
    };
    command.args(["serve", "--listen", "127.0.0.1:0", "--keytab", &keytab]);
    let output = run(realm.env(&mut command), b"", TIMEOUT);
    assert_fails_with(&output, 2, &[&keytab, "permission denied"]);
    crate::page::assert_explains("permission denied");
}

#[test]
fn service_can_be_a_name_a_name_with_host_or_a_principal() {
    let Some(realm) = realm() else { return };
    let echo = echo_server().to_string();
    for (service, accepted) in [
        ("rcmd", "rcmd"),
        ("rcmd@localhost", "rcmd"),
        ("rcmd/localhost@S5.TEST", "rcmd"),
        ("rcmd/localhost", "rcmd"),
        ("socks", "socks"),
        ("socks@localhost", "socks"),
        ("socks/localhost@S5.TEST", "socks"),
    ] {
        let server = serve(&realm, &["--gssapi-service", service]);
        for requested in ["rcmd", "socks"] {
            let args = ["--gssapi-service", requested, &echo];
            let output = run(&mut client(&realm, "connect", &url(&server), &args), b"hello", LONG_TIMEOUT);
            match requested == accepted {
                true => assert_eq!(output.stdout, b"hello", "{service}"),
                false => assert_fails_with(&output, 67, &["login", "GSSAPI"]),
            }
        }
    }
    let other_host = refused(&realm, &["--auth", "gssapi", "--gssapi-service", "rcmd@other.test"]);
    assert_fails_with(&other_host, 2, &["--auth gssapi", "GSSAPI"]);
}

#[test]
fn wrong_key_refuses_login_and_new_key_needs_no_restart() {
    let Some(realm) = realm() else { return };
    let server = start(&realm, &["--keytab", &path(&realm.file("wrong.keytab"))]);
    let echo = echo_server().to_string();
    let output = run(&mut client(&realm, "connect", &url(&server), &[&echo]), b"hello", LONG_TIMEOUT);
    assert_fails_with(&output, 67, &["proxy localhost:", "login", "the server refused the login"]);
    crate::page::assert_explains("the server refused the login");
    wait_session(&server, &["user=- ", "rep=-", "GSSAPI: "]);
    // A key that is written later is used at the next login.
    let keytab = realm.file("wrong.keytab");
    std::fs::copy(realm.file("service.keytab"), &keytab).expect("a copy");
    assert_eq!(stdout(&mut client(&realm, "connect", &url(&server), &[&echo]), b"hello"), b"hello");
}

#[test]
fn client_disconnects_if_granted_level_is_too_low() {
    let Some(realm) = realm() else { return };
    let echo = echo_server().to_string();
    let table: [(&str, &[&str], Option<&str>); 8] = [
        ("integrity,confidentiality", &[], None),
        ("integrity", &[], None),
        (
            "integrity",
            &["--gssapi-min", "confidentiality"],
            Some("the server grants protection integrity, required is confidentiality"),
        ),
        ("none", &[], Some("the server grants protection none, required is integrity (see --gssapi-min)")),
        ("none", &["--gssapi-min", "none"], None),
        ("none", &["--gssapi-protection", "integrity"], Some("the server grants protection none, required is")),
        ("confidentiality", &["--gssapi-protection", "none"], None),
        ("confidentiality", &["--gssapi-nec"], None),
    ];
    for (levels, args, expected) in table {
        let server = serve(&realm, &["--gssapi-protection", levels]);
        let output =
            run(&mut client(&realm, "connect", &url(&server), &[args, &[&echo]].concat()), b"hello", LONG_TIMEOUT);
        match expected {
            None => assert_eq!(output.stdout, b"hello", "{levels} {args:?}"),
            Some(expected) => assert_fails_with(&output, 67, &["login", expected]),
        }
    }
    let args = ["--gssapi-min", "confidentiality", &echo];
    let server = serve(&realm, &[]);
    let min_above_requested =
        run(&mut client_at(&realm, "connect", &url(&server), "integrity", &args), b"", LONG_TIMEOUT);
    assert_fails_with(&min_above_requested, 2, &["--gssapi-min", "--gssapi-protection"]);
}

#[test]
fn ccache_option_selects_the_tickets() {
    let Some(realm) = realm() else { return };
    let (server, echo) = (serve(&realm, &[]), echo_server().to_string());
    for (ccache, user) in [("ccache", ALICE), ("ccache.mallory", "mallory@S5.TEST")] {
        let mut command = client(&realm, "connect", &url(&server), &["--ccache", &path(&realm.file(ccache)), &echo]);
        command.env("KRB5CCNAME", "FILE:/nonexistent");
        assert_eq!(stdout(&mut command, b"hello"), b"hello");
        wait_session(&server, &[&format!("user=\"{user}\"")]);
    }
}

#[test]
fn gssapi_is_offered_only_with_a_ticket() {
    let Some(realm) = realm() else { return };
    let (dir, echo) = (temp_dir(), echo_server().to_string());
    // Prefers GSSAPI, and accepts others.
    let users = users(dir.path());
    let server = serve(&realm, &["--users", &users, "--auth", "gssapi,password,none"]);
    let connect = |ccache: &str, args: &[&str], proxy: &str| {
        let mut command = s5();
        realm.env(command.args(["connect", "-x", proxy]).args(args).arg(&echo));
        let output =
            run(command.env("KRB5CCNAME", format!("FILE:{}", realm.file(ccache).display())), b"hello", LONG_TIMEOUT);
        assert_eq!(output.stdout, b"hello", "{}", crate::text(&output.stderr));
    };
    let bob = format!("bob:secret@{}", url(&server));
    connect("ccache", &[], &url(&server));
    wait_session(&server, &[&format!("user=\"{ALICE}\"")]);
    connect("none", &[], &bob);
    wait_session(&server, &["user=\"bob\""]);
    connect("none", &[], &url(&server));
    wait_session(&server, &["user=- "]);
    let before = server.log();
    connect("ccache", &["--auth", "password"], &bob);
    server.wait_log(|log| log[before.len()..].contains("user=\"bob\""));
}
