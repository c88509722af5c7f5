//! The library of the system: when there is none, and when it is the other one.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::{Server, TIMEOUT, echo_server, is_installed, run, s5, temp_dir};
use crate::kit::realm::Realm;
use crate::page::assert_explains;
use crate::{ALICE, LEVELS, LONG, assert_says, client_at, octets, path, realm, serve, session, stdout, url};

const KNOB: &str = "S5_GSSAPI_LIBRARY";

/// Where the loader finds a library.
fn library(name: &str) -> Option<PathBuf> {
    let output = Command::new("/sbin/ldconfig").arg("-p").output().ok()?;
    let all = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = all.lines().find(|line| line.trim_start().starts_with(name))?;
    Some(line.rsplit_once("=> ")?.1.into())
}

#[test]
fn without_a_library_all_but_gssapi_works() {
    let (folder, echo) = (temp_dir(), echo_server().to_string());
    let users = path(&folder.path().join("users"));
    stdout(s5().args(["serve", "--users", &users, "--add-user", "bob"]).env(KNOB, "/nonexistent"), b"secret\n");
    let mut command = s5();
    command.args(["serve", "--listen", "127.0.0.1:0", "--users", &users]).env(KNOB, "/nonexistent");
    let server = Server::start_with(&mut command, 1);
    let proxy = format!("bob:secret@{}", url(&server));
    let with = |args: &[&str]| {
        let mut command = s5();
        command.args(["connect", "-x", &proxy]).args(args).arg(&echo);
        // As if there might be tickets.
        command.env(KNOB, "/nonexistent").env("KRB5CCNAME", "FILE:/nonexistent");
        run(&mut command, b"hello", LONG)
    };
    for args in [&[][..], &["--auth", "gssapi,password"], &["--auth", "none,password"]] {
        assert_eq!(with(args).stdout, b"hello", "{args:?}");
    }
    assert_says(&with(&["--auth", "gssapi"]), 67, &["/nonexistent", "cannot open shared object file"]);
    assert_explains("cannot open shared object file");
}

#[test]
fn a_server_that_is_to_take_gssapi_does_not_start_without_a_library() {
    let folder = temp_dir();
    let keytab = crate::common::write_file(folder.path(), "keytab", "");
    for args in [&["--auth", "gssapi"][..], &["--keytab", &keytab], &["--gssapi-service", "rcmd"]] {
        let mut command = s5();
        command.args(["serve", "--listen", "127.0.0.1:0"]).args(args).env(KNOB, "/nonexistent");
        assert_says(&run(&mut command, b"", TIMEOUT), 2, &["/nonexistent", "cannot open shared object file"]);
    }
}

#[test]
fn where_there_is_no_library_it_is_said_what_to_install() {
    if !is_installed("unshare") {
        return;
    }
    // Both are hidden from the program, each behind a file that is none.
    let found: Vec<String> =
        ["libgssapi_krb5.so.2", "libgssapi.so.3"].iter().filter_map(|name| library(name)).map(|at| path(&at)).collect();
    let script = "while [ \"$1\" != -- ]; do mount --bind /dev/null \"$1\"; shift; done; shift; exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "--", "sh", "-e", "-c", script, "sh"]).args(&found);
    command.args(["--", env!("CARGO_BIN_EXE_s5"), "serve", "--listen", "127.0.0.1:0", "--auth", "gssapi"]);
    assert_says(&run(&mut command, b"", TIMEOUT), 2, &["--auth gssapi", "apt install libgssapi-krb5-2"]);
    assert_explains("apt install libgssapi-krb5-2");
}

/// Lets a command use that library.
fn using<'a>(command: &'a mut Command, library: &Path) -> &'a mut Command {
    command.env(KNOB, library)
}

#[test]
fn heimdal_and_mit_understand_each_other() {
    let Some(realm) = realm() else { return };
    let Some(heimdal) = library("libgssapi.so.3") else {
        eprintln!("skipped: Heimdal's library is not installed");
        return;
    };
    let (echo, data) = (echo_server().to_string(), octets(300_000));
    for level in LEVELS {
        let server = serve_heimdal(&realm, &heimdal, level);
        let came = stdout(&mut client_at(&realm, "connect", &url(&server), level, &[&echo]), &data);
        assert!(came == data, "{level}: a server with Heimdal's, {} octets", came.len());
        session(&server, &[ALICE, "rep=0"]);
        let server = serve(&realm, &["--gssapi-protection", level]);
        let mut client = client_at(&realm, "connect", &url(&server), level, &[&echo]);
        let came = stdout(using(&mut client, &heimdal), &data);
        assert!(came == data, "{level}: a client with Heimdal's, {} octets", came.len());
        session(&server, &[ALICE, "rep=0"]);
    }
}

/// Heimdal's takes a keytab from the environment only.
fn serve_heimdal(realm: &Realm, heimdal: &Path, level: &str) -> Server {
    let mut command = s5();
    command.args(["serve", "--listen", "127.0.0.1:0", "--auth", "gssapi", "--gssapi-protection", level]);
    Server::start_with(using(realm.env(&mut command), heimdal), 1)
}
