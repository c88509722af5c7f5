//! Behavior without a GSSAPI library, and interoperation of Heimdal's and MIT's library.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::page::assert_explains;
use crate::support::realm::Realm;
use crate::support::{Server, TIMEOUT, echo_server, is_installed, record_skip, run, s5, temp_dir};
use crate::{
    ALICE, LEVELS, LONG_TIMEOUT, assert_fails_with, bytes, client_at, path, realm, serve, stdout, url, wait_session,
};

const LIBRARY_ENV_VAR: &str = "S5_GSSAPI_LIBRARY";

/// Returns the path from which the loader loads a library.
fn find_library(name: &str) -> Option<PathBuf> {
    let output = Command::new("/sbin/ldconfig").arg("-p").output().ok()?;
    let all = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = all.lines().find(|line| line.trim_start().starts_with(name))?;
    Some(line.rsplit_once("=> ")?.1.into())
}

#[test]
fn without_library_everything_except_gssapi_works() {
    let (dir, echo) = (temp_dir(), echo_server().to_string());
    let users = path(&dir.path().join("users"));
    stdout(
        s5().args(["serve", "--users", &users, "--add-user", "bob"]).env(LIBRARY_ENV_VAR, "/nonexistent"),
        b"secret\n",
    );
    let mut command = s5();
    command.args(["serve", "--listen", "127.0.0.1:0", "--users", &users]).env(LIBRARY_ENV_VAR, "/nonexistent");
    let server = Server::start_with(&mut command, 1);
    let proxy = format!("bob:secret@{}", url(&server));
    let with = |args: &[&str]| {
        let mut command = s5();
        command.args(["connect", "-x", &proxy]).args(args).arg(&echo);
        // The variable makes the client look for tickets.
        command.env(LIBRARY_ENV_VAR, "/nonexistent").env("KRB5CCNAME", "FILE:/nonexistent");
        run(&mut command, b"hello", LONG_TIMEOUT)
    };
    for args in [&[][..], &["--auth", "gssapi,password"], &["--auth", "none,password"]] {
        assert_eq!(with(args).stdout, b"hello", "{args:?}");
    }
    assert_fails_with(&with(&["--auth", "gssapi"]), 67, &["/nonexistent", "cannot open shared object file"]);
    assert_explains("cannot open shared object file");
}

#[test]
fn server_with_gssapi_does_not_start_without_library() {
    let dir = temp_dir();
    let keytab = crate::support::write_file(dir.path(), "keytab", "");
    for args in [&["--auth", "gssapi"][..], &["--keytab", &keytab], &["--gssapi-service", "rcmd"]] {
        let mut command = s5();
        command.args(["serve", "--listen", "127.0.0.1:0"]).args(args).env(LIBRARY_ENV_VAR, "/nonexistent");
        assert_fails_with(&run(&mut command, b"", TIMEOUT), 2, &["/nonexistent", "cannot open shared object file"]);
    }
}

#[test]
fn missing_library_error_names_the_package() {
    if !is_installed("unshare") {
        return;
    }
    // /dev/null is mounted over each library, so that it can't be loaded.
    let found: Vec<String> = ["libgssapi_krb5.so.2", "libgssapi.so.3"]
        .iter()
        .filter_map(|name| find_library(name))
        .map(|at| path(&at))
        .collect();
    let script = "while [ \"$1\" != -- ]; do mount --bind /dev/null \"$1\"; shift; done; shift; exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "--", "sh", "-e", "-c", script, "sh"]).args(&found);
    command.args(["--", env!("CARGO_BIN_EXE_s5"), "serve", "--listen", "127.0.0.1:0", "--auth", "gssapi"]);
    assert_fails_with(&run(&mut command, b"", TIMEOUT), 2, &["--auth gssapi", "apt install libgssapi-krb5-2"]);
    assert_explains("apt install libgssapi-krb5-2");
}

/// Sets the library of a command.
fn with_library<'a>(command: &'a mut Command, library: &Path) -> &'a mut Command {
    command.env(LIBRARY_ENV_VAR, library)
}

#[test]
fn heimdal_and_mit_interoperate() {
    let Some(realm) = realm() else { return };
    let Some(heimdal) = find_library("libgssapi.so.3") else {
        record_skip("Heimdal's library is not installed");
        return;
    };
    let (echo, data) = (echo_server().to_string(), bytes(300_000));
    for level in LEVELS {
        let server = serve_heimdal(&realm, &heimdal, level);
        let received = stdout(&mut client_at(&realm, "connect", &url(&server), level, &[&echo]), &data);
        assert!(received == data, "{level}: Heimdal's server, {} bytes", received.len());
        wait_session(&server, &[ALICE, "rep=0"]);
        let server = serve(&realm, &["--gssapi-protection", level]);
        let mut client = client_at(&realm, "connect", &url(&server), level, &[&echo]);
        let received = stdout(with_library(&mut client, &heimdal), &data);
        assert!(received == data, "{level}: Heimdal's client, {} bytes", received.len());
        wait_session(&server, &[ALICE, "rep=0"]);
    }
}

/// Starts a server with Heimdal's library, which reads the keytab's path only from the environment.
fn serve_heimdal(realm: &Realm, heimdal: &Path, level: &str) -> Server {
    let mut command = s5();
    command.args(["serve", "--listen", "127.0.0.1:0", "--auth", "gssapi", "--gssapi-protection", level]);
    Server::start_with(with_library(realm.env(&mut command), heimdal), 1)
}
