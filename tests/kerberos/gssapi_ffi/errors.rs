//! Errors before a context is established, and their messages.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use s5::gssapi::ffi::{Credential, available};

use super::{ALL_FLAGS, KRB5_OID, RCMD, alice, der, establish, expect_error, first_token, in_default_realm, services};
use crate::support::realm::{Options, Realm, in_realm, kinit};
use crate::support::{TIMEOUT, run, temp_dir, wait_until, write_file};

#[test]
fn token_is_valid_for_one_context() {
    let Some(_) = in_default_realm("gssapi_ffi::errors::token_is_valid_for_one_context") else { return };
    let keys = services();
    let (_, token) = first_token(&alice(), RCMD, ALL_FLAGS).expect("first token created");
    keys.accept(&token).expect("valid");
    let error = expect_error(keys.accept(&token));
    assert!(error.contains("replay"), "{error}");
}

#[test]
fn error_names_unknown_service() {
    let Some(_) = in_default_realm("gssapi_ffi::errors::error_names_unknown_service") else { return };
    let error = expect_error(first_token(&alice(), "nobody@localhost", ALL_FLAGS));
    assert_eq!(error, "Server nobody/localhost@S5.TEST not found in Kerberos database");
    let invalid = ["nobody", "nobody@", "@localhost", "@", "a b@c d", "é@\n", "nobody/", "/@", "", "\0"];
    for text in invalid.into_iter().chain(["rcmd@localhost\0", "rcmd\0@localhost", &"x".repeat(70_000)]) {
        expect_error(first_token(&alice(), text, ALL_FLAGS));
    }
}

#[test]
fn wrong_or_missing_key_is_reported() {
    let Some(dir) = in_default_realm("gssapi_ffi::errors::wrong_or_missing_key_is_reported") else { return };
    let wrong = Credential::acceptor(None, Some(&dir.join("wrong.keytab"))).expect("valid keytab");
    let (_, token) = first_token(&alice(), RCMD, ALL_FLAGS).expect("first token created");
    let error = expect_error(wrong.accept(&token));
    assert!(error.contains("rcmd/localhost@S5.TEST"), "{error}");

    let (_, token) = first_token(&alice(), "nokey@localhost", ALL_FLAGS).expect("first token created");
    let error = expect_error(services().accept(&token));
    assert!(error.contains("nokey/localhost@S5.TEST not found in keytab"), "{error}");
}

#[test]
fn invalid_keytab_is_reported() {
    let Some(dir) = in_default_realm("gssapi_ffi::errors::invalid_keytab_is_reported") else { return };
    let missing = dir.join("missing.keytab");
    let junk = PathBuf::from(write_file(&dir, "junk.keytab", "junk"));
    for path in [&*missing, &*junk, &*dir] {
        let error = expect_error(Credential::acceptor(None, Some(path)));
        assert!(error.contains(path.to_str().expect("UTF-8 path")), "{error}");
    }
    expect_error(Credential::acceptor(None, Some(Path::new("a\0b"))));
    expect_error(Credential::acceptor(None, Some(Path::new(""))));
}

#[test]
fn missing_ticket_is_reported() {
    let Some(dir) = in_default_realm("gssapi_ffi::errors::missing_ticket_is_reported") else { return };
    let path = dir.join("ccache.none");
    let error =
        expect_error(Credential::initiator(Some(&path)).and_then(|none| first_token(&Arc::new(none), RCMD, ALL_FLAGS)));
    let text = "No credentials were supplied, or the credentials were unavailable or inaccessible: ";
    assert_eq!(error, format!("{text}No credentials cache found ({})", path.display()));
}

#[test]
fn expired_ticket_is_reported() {
    let Some(dir) = in_default_realm("gssapi_ffi::errors::expired_ticket_is_reported") else { return };
    kinit(&dir, "alice", "user.keytab", "ccache.short", "1s");
    let path = dir.join("ccache.short");
    let mut error = None;
    wait_until("the ticket expires", TIMEOUT, || {
        let short = Credential::initiator(Some(&path));
        error = short.and_then(|short| first_token(&Arc::new(short), RCMD, ALL_FLAGS)).err();
        error.is_some()
    });
    let error = error.expect("the ticket has expired");
    assert!(error.contains("expired"), "{error:?}");
}

#[test]
fn invalid_tokens_are_rejected() {
    let Some(_) = in_default_realm("gssapi_ffi::errors::invalid_tokens_are_rejected") else { return };
    let (alice, keys) = (alice(), services());
    let junk = vec![0x60; 70_000];
    for token in [&b""[..], b"x", &junk, b"NTLMSSP\0\x01\0\0\0"] {
        expect_error(keys.accept(token));
    }
    // Tickets of a user do not contain the key of a service.
    expect_error(alice.accept(&first_token(&alice, RCMD, ALL_FLAGS).expect("first token created").1));

    let framed = |token_id: &[u8], inner: &[u8]| der(0x60, &[&[6, 9], KRB5_OID, token_id, inner]);
    let (reply, error, other) = (framed(&[2, 0], b"x"), framed(&[3, 0], b"x"), framed(&[1, 0], b"x"));
    let (empty, long) = (framed(&[2, 0], b""), [&reply[..], b"x"].concat());
    let answers = [&b""[..], b"x", &junk, &other, &empty[..1], &long].map(|answer| (answer, false));
    for (answer, is_framed) in answers.into_iter().chain([&reply, &error, &empty].map(|answer| (&answer[..], true))) {
        let pending = first_token(&alice, RCMD, ALL_FLAGS).expect("first token created").0;
        let error = expect_error(pending.complete(answer));
        // Other tokens must not reach the library: Heimdal's would crash.
        assert_eq!(error != "not the answer of a Kerberos acceptor", is_framed, "{answer:?}: {error}");
    }
}

#[test]
fn environment_sets_ticket_cache_and_keytab() {
    let test = "gssapi_ffi::errors::environment_sets_ticket_cache_and_keytab";
    let set_missing_files = |_: &mut Realm, command: &mut Command| {
        command.env("KRB5CCNAME", "FILE:/nowhere/ccache").env("KRB5_KTNAME", "FILE:/nowhere/keytab");
    };
    let Some(dir) = in_realm(test, &Options::default(), set_missing_files) else { return };
    let error = expect_error(Credential::initiator(None));
    assert!(error.contains("/nowhere/ccache"), "{error:?}");
    let error = expect_error(Credential::acceptor(None, None));
    assert!(error.contains("/nowhere/keytab"), "{error:?}");
    let alice = Arc::new(Credential::initiator(Some(&dir.join("ccache"))).expect("the ticket exists"));
    let keys = Credential::acceptor(None, Some(&dir.join("service.keytab"))).expect("valid keytab");
    establish(&alice, RCMD, &keys, ALL_FLAGS).expect("established");
}

#[test]
fn unusable_library_is_an_error() {
    if let Ok(expected) = std::env::var("S5_TEST_LIBRARY") {
        assert_eq!(available(), Err(expected.clone()));
        assert_eq!(expect_error(Credential::initiator(None)), expected);
        assert_eq!(expect_error(Credential::acceptor(Some("rcmd@localhost"), Some(Path::new("x")))), expected);
        return;
    }
    let dir = temp_dir();
    let missing = dir.path().join("missing.so").display().to_string();
    let text = write_file(dir.path(), "text.so", "no library");
    let maps = std::fs::read_to_string("/proc/self/maps").expect("file read");
    let libc = maps.lines().find_map(|line| Some(&line[line.find('/')?..]).filter(|path| path.contains("/libc.so")));
    let libc = libc.expect("tests are linked dynamically");
    for (library, expected) in [
        (&*missing, format!("{missing}: cannot open shared object file: No such file or directory")),
        (&text, format!("{text}: file too short")),
        ("libgssapi_krb5.so.2", "S5_GSSAPI_LIBRARY is not an absolute path: libgssapi_krb5.so.2".into()),
        (libc, format!("{libc} has no gss_import_name")),
    ] {
        let mut command = Command::new(std::env::current_exe().expect("path of this test"));
        command.args(["--exact", "gssapi_ffi::errors::unusable_library_is_an_error"]);
        command.env("S5_GSSAPI_LIBRARY", library).env("S5_TEST_LIBRARY", expected);
        let output = run(&mut command, b"", TIMEOUT);
        let printed = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && printed.contains("1 passed"), "{library}:\n{printed}");
    }
}
