//! Behavior without a GSSAPI library, and interoperation of Heimdal's and MIT's library.

use crate::page::assert_explains;
use crate::*;

const LIBRARY_ENV_VAR: &str = "S5_GSSAPI_LIBRARY";

/// Returns the path from which the loader loads a library.
fn find_library(name: &str) -> Option<PathBuf> {
    let output = Command::new("/sbin/ldconfig").arg("-p").output().ok()?;
    let all = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = all.lines().find(|line| line.trim_start().starts_with(name))?;
    Some(line.rsplit_once("=> ")?.1.into())
}

/// s5 with this library.
fn s5_with(library: &str, args: &[&str]) -> Command {
    let mut command = s5();
    command.args(args).env(LIBRARY_ENV_VAR, library);
    command
}

#[test]
fn without_library_everything_except_gssapi_works() {
    let (dir, echo) = (temp_dir(), echo_server().to_string());
    let users = path(&dir.path().join("users"));
    stdout(&mut s5_with("/nonexistent", &["serve", "--users", &users, "--add-user", "bob"]), b"secret\n");
    let args = ["serve", "--listen", "127.0.0.1:0", "--users", &users];
    let server = Server::start_with(&mut s5_with("/nonexistent", &args), 1);
    let proxy = format!("bob:secret@{}", url(&server));
    let with = |args: &[&str]| {
        let mut command = s5_with("/nonexistent", &["connect", "-x", &proxy]);
        // The variable makes the client look for tickets.
        hello(command.args(args).arg(&echo).env("KRB5CCNAME", "FILE:/nonexistent"))
    };
    for args in [&[][..], &["--auth", "gssapi,password"], &["--auth", "none,password"]] {
        assert_hello(&with(args), &args.concat());
    }
    assert_fails_with(&with(&["--auth", "gssapi"]), 67, &["/nonexistent", "cannot open shared object file"]);
    assert_explains("cannot open shared object file");
}

#[test]
fn server_with_gssapi_does_not_start_without_usable_library() {
    let dir = temp_dir();
    let (keytab, text) = (write_file(dir.path(), "keytab", ""), write_file(dir.path(), "text.so", "no library"));
    let libc = find_library("libc.so.6").map(|path| path.display().to_string()).expect("ldconfig knows libc");
    let missing = "/nonexistent: cannot open shared object file: No such file or directory";
    let gssapi = &["--auth", "gssapi"];
    let table: [(&str, &[&str; 2], &str); 6] = [
        ("/nonexistent", gssapi, missing),
        ("/nonexistent", &["--keytab", &keytab], missing),
        ("/nonexistent", &["--gssapi-service", "rcmd"], missing),
        (&text, gssapi, &format!("{text}: file too short")),
        ("libgssapi_krb5.so.2", gssapi, "S5_GSSAPI_LIBRARY is not an absolute path: libgssapi_krb5.so.2"),
        (&libc, gssapi, &format!("{libc} has no gss_import_name")),
    ];
    for (library, args, expected) in table {
        let output = run(s5_with(library, &["serve", "--listen", "127.0.0.1:0"]).args(args), b"", TIMEOUT);
        assert_fails_with(&output, 2, &[expected]);
    }
}

#[test]
fn library_of_the_environment_is_ignored_by_a_privileged_process() {
    if !rustix::process::getuid().is_root() || !is_installed("setpriv") {
        return record_skip("needs root");
    }
    let dir = temp_dir();
    let copy = dir.path().join("s5");
    // By another process, so that no child of this one has it open for writing.
    stdout(Command::new("cp").arg(env!("CARGO_BIN_EXE_s5")).arg(&copy), b"");
    let set_mode = |path: &Path, mode| {
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).expect("mode set");
    };
    if rustix::fs::statvfs(&copy).expect("a file system").f_flag.contains(rustix::fs::StatVfsMountFlags::NOSUID) {
        return record_skip("set-user-ID has no effect here");
    }
    set_mode(dir.path(), 0o755);
    let error = |mode| {
        set_mode(&copy, mode);
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--clear-groups"]).arg(&copy).args(["serve", "--keytab", "/dev/null"]);
        String::from_utf8_lossy(&run(command.env(LIBRARY_ENV_VAR, "/nonexistent.so"), b"", TIMEOUT).stderr).into_owned()
    };
    assert!(error(0o755).contains("/nonexistent.so"), "{}", error(0o755));
    assert!(!error(0o4755).contains("/nonexistent.so"), "{}", error(0o4755));
}

#[test]
fn missing_library_error_names_the_package() {
    if !is_installed("unshare") {
        return;
    }
    // /dev/null is mounted over each library, so that it can't be loaded.
    let found = ["libgssapi_krb5.so.2", "libgssapi.so.3"].iter().filter_map(|name| find_library(name));
    let script = "while [ \"$1\" != -- ]; do mount --bind /dev/null \"$1\"; shift; done; shift; exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "--", "sh", "-e", "-c", script, "sh"]).args(found);
    command.args(["--", env!("CARGO_BIN_EXE_s5"), "serve", "--listen", "127.0.0.1:0", "--auth", "gssapi"]);
    assert_fails_with(&run(&mut command, b"", TIMEOUT), 2, &["--auth gssapi", "apt install libgssapi-krb5-2"]);
    assert_explains("apt install libgssapi-krb5-2");
}

#[test]
fn heimdal_and_mit_interoperate() {
    let Some(realm) = realm() else { return };
    let Some(heimdal) = find_library("libgssapi.so.3") else {
        return record_skip("Heimdal's library is not installed");
    };
    let (echo, data) = (echo_server().to_string(), bytes(300_000));
    for level in LEVELS {
        // Heimdal's library reads the keytab's path only from the environment.
        let args = ["serve", "--listen", "127.0.0.1:0", "--auth", "gssapi", "--gssapi-protection", level];
        let server = Server::start_with(realm.env(&mut s5_with(&path(&heimdal), &args)), 1);
        assert_echoes(&mut client_at(&realm, "connect", &url(&server), level, &[&echo]), &data);
        wait_session(&server, &[ALICE, "rep=0"]);
        let server = serve(&realm, &["--gssapi-protection", level]);
        let mut client = client_at(&realm, "connect", &url(&server), level, &[&echo]);
        assert_echoes(client.env(LIBRARY_ENV_VAR, &heimdal), &data);
        wait_session(&server, &[ALICE, "rep=0"]);
    }
}
