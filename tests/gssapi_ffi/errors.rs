//! Errors before a context is established, and their messages.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use s5::gssapi::ffi::{ContextFlags, Credential, GssContext, GssName, available};

use crate::common::{TIMEOUT, run, temp_dir, wait_until, write_file};
use crate::kit::realm::{Options, Realm, in_realm, kinit};
use crate::{
    ALL_FLAGS, KRB5_OID, alice, der, establish, established_pair, expect_error, first_token, in_default_realm, service,
    services, unwrap_copy,
};

#[test]
fn token_is_valid_for_one_context() {
    let Some(_) = in_default_realm("errors::token_is_valid_for_one_context") else { return };
    let keys = services();
    let (_, token) = first_token(&alice(), &service("rcmd@localhost"), ALL_FLAGS).expect("first token created");
    GssContext::new().accept(&keys, &token).expect("valid");
    let error = expect_error(GssContext::new().accept(&keys, &token));
    assert!(error.text.contains("replay"), "{error}");
}

#[test]
fn error_names_unknown_service() {
    let Some(_) = in_default_realm("errors::error_names_unknown_service") else { return };
    let error = expect_error(first_token(&alice(), &service("nobody@localhost"), ALL_FLAGS));
    assert_eq!(error.text, "Server nobody/localhost@S5.TEST not found in Kerberos database");
    assert!(!error.is_no_credential() && !error.is_expired());
    for text in ["nobody", "nobody@", "@localhost", "@", "a b@c d", "é@\n", &"x".repeat(70_000)] {
        expect_error(GssName::service(text).and_then(|name| first_token(&alice(), &name, ALL_FLAGS)));
        expect_error(GssName::principal(text).and_then(|name| first_token(&alice(), &name, ALL_FLAGS)));
    }
    for text in ["", "\0", "rcmd@localhost\0", "rcmd\0@localhost"] {
        expect_error(GssName::service(text));
        expect_error(GssName::principal(text));
    }
}

#[test]
fn wrong_or_missing_key_is_reported() {
    let Some(dir) = in_default_realm("errors::wrong_or_missing_key_is_reported") else { return };
    let wrong = Credential::acceptor(None, Some(&dir.join("wrong.keytab"))).expect("valid keytab");
    let (_, token) = first_token(&alice(), &service("rcmd@localhost"), ALL_FLAGS).expect("first token created");
    let mut context = GssContext::new();
    let error = expect_error(context.accept(&wrong, &token));
    assert!(error.text.contains("rcmd/localhost@S5.TEST"), "{error}");
    // A failed context stays failed.
    expect_error(context.accept(&services(), &token));
    assert_eq!(context.flags(), ContextFlags::default());

    let (_, token) = first_token(&alice(), &service("nokey@localhost"), ALL_FLAGS).expect("first token created");
    let error = expect_error(GssContext::new().accept(&services(), &token));
    assert!(error.text.contains("nokey/localhost@S5.TEST not found in keytab"), "{error}");
}

#[test]
fn invalid_keytab_is_reported() {
    let Some(dir) = in_default_realm("errors::invalid_keytab_is_reported") else { return };
    let missing = dir.join("missing.keytab");
    let junk = PathBuf::from(write_file(&dir, "junk.keytab", "junk"));
    for path in [&*missing, &*junk, &*dir] {
        let error = expect_error(Credential::acceptor(None, Some(path)));
        assert!(error.text.contains(path.to_str().expect("UTF-8 path")), "{error}");
        assert!(error.is_no_credential(), "{error:?}");
    }
    expect_error(Credential::acceptor(None, Some(Path::new("a\0b"))));
    expect_error(Credential::acceptor(None, Some(Path::new(""))));
}

#[test]
fn missing_ticket_is_reported() {
    let Some(dir) = in_default_realm("errors::missing_ticket_is_reported") else { return };
    let path = dir.join("ccache.none");
    let target = service("rcmd@localhost");
    let error =
        expect_error(Credential::initiator(Some(&path)).and_then(|none| first_token(&none, &target, ALL_FLAGS)));
    let text = "No credentials were supplied, or the credentials were unavailable or inaccessible: ";
    assert_eq!(error.text, format!("{text}No credentials cache found ({})", path.display()));
    assert!(error.is_no_credential(), "{error:?}");
}

#[test]
fn expired_ticket_is_reported() {
    let Some(dir) = in_default_realm("errors::expired_ticket_is_reported") else { return };
    kinit(&dir, "alice", "user.keytab", "ccache.short", "1s");
    let path = dir.join("ccache.short");
    let target = service("rcmd@localhost");
    let mut error = None;
    wait_until("the ticket expires", TIMEOUT, || {
        error = Credential::initiator(Some(&path)).and_then(|short| first_token(&short, &target, ALL_FLAGS)).err();
        error.is_some()
    });
    let error = error.expect("the ticket has expired");
    assert!(error.is_expired() && error.text.contains("expired"), "{error:?}");
}

#[test]
fn calls_in_invalid_order_are_rejected() {
    let Some(_) = in_default_realm("errors::calls_in_invalid_order_are_rejected") else { return };
    let (alice, keys, target) = (alice(), services(), service("rcmd@localhost"));
    let mut fresh = GssContext::new();
    assert_eq!(expect_error(fresh.wrap(b"x", true)).text, "the security context is not established");
    expect_error(unwrap_copy(&mut fresh, b"x"));
    expect_error(fresh.wrap_size_limit(true));
    assert_eq!(
        (fresh.flags(), fresh.initiator_name(), fresh.lifetime()),
        (ContextFlags::default(), None, Some(Duration::ZERO))
    );
    // The initiator rejects an answer before its first token. The acceptor rejects an empty token.
    expect_error(GssContext::new().init(&alice, &target, ALL_FLAGS, Some(b"x")));
    expect_error(GssContext::new().accept(&keys, b""));
    expect_error(GssContext::new().accept(&alice, b"x"));
    let junk = vec![0x60; 70_000];
    expect_error(GssContext::new().accept(&keys, &junk));
    expect_error(GssContext::new().accept(&keys, b"NTLMSSP\0\x01\0\0\0"));

    let framed = |token_id: &[u8], inner: &[u8]| der(0x60, &[&[6, 9], KRB5_OID, token_id, inner]);
    let (reply, error, other) = (framed(&[2, 0], b"x"), framed(&[3, 0], b"x"), framed(&[1, 0], b"x"));
    let (empty, long) = (framed(&[2, 0], b""), [&reply[..], b"x"].concat());
    let answers = [&b""[..], b"x", &junk, &other, &empty[..1], &long].map(|answer| (Some(answer), false));
    let answers = answers.into_iter().chain([(None, false)]);
    for (answer, is_framed) in answers.chain([&reply, &error, &empty].map(|answer| (Some(&answer[..]), true))) {
        let (mut initiator, token) = first_token(&alice, &target, ALL_FLAGS).expect("first token created");
        expect_error(initiator.accept(&keys, &token));
        assert_eq!(expect_error(initiator.wrap(b"x", true)).text, "the security context is not established");
        let error = expect_error(initiator.init(&alice, &target, ALL_FLAGS, answer));
        // Other tokens must not reach the library: Heimdal's would crash.
        assert_eq!(error.text != "not the answer of a Kerberos acceptor", is_framed, "{answer:?}: {error}");
        expect_error(initiator.init(&alice, &target, ALL_FLAGS, None));
    }
    let (mut initiator, mut acceptor) = established_pair(ALL_FLAGS);
    expect_error(initiator.init(&alice, &target, ALL_FLAGS, None));
    expect_error(acceptor.accept(&keys, b"x"));
    // The contexts are still usable.
    let token = initiator.wrap(b"x", true).expect("wrapped");
    assert_eq!(unwrap_copy(&mut acceptor, &token).map(|got| got.data), Ok(b"x".into()));
    let shown = format!("{acceptor:?} {alice:?}");
    assert!(shown.starts_with("GssContext { state: Complete, flags: ContextFlags {"), "{shown}");
    assert!(!shown.contains("alice") && !shown.contains("0x"), "{shown}");
}

#[test]
fn environment_sets_ticket_cache_and_keytab() {
    let test = "errors::environment_sets_ticket_cache_and_keytab";
    let set_missing_files = |_: &mut Realm, command: &mut Command| {
        command.env("KRB5CCNAME", "FILE:/nowhere/ccache").env("KRB5_KTNAME", "FILE:/nowhere/keytab");
    };
    let Some(dir) = in_realm(test, &Options::default(), set_missing_files) else { return };
    let error = expect_error(Credential::initiator(None));
    assert!(error.is_no_credential() && error.text.contains("/nowhere/ccache"), "{error:?}");
    let error = expect_error(Credential::acceptor(None, None));
    assert!(error.is_no_credential() && error.text.contains("/nowhere/keytab"), "{error:?}");
    let alice = Credential::initiator(Some(&dir.join("ccache"))).expect("the ticket exists");
    let keys = Credential::acceptor(None, Some(&dir.join("service.keytab"))).expect("valid keytab");
    establish(&alice, &service("rcmd@localhost"), &keys, ALL_FLAGS).expect("established");
}

#[test]
fn unusable_library_is_an_error() {
    if let Ok(expected) = std::env::var("S5_TEST_LIBRARY") {
        assert_eq!(available(), Err(expected.clone()));
        assert_eq!(expect_error(GssName::service("rcmd@localhost")).text, expected);
        assert_eq!(expect_error(Credential::initiator(None)).text, expected);
        assert_eq!(expect_error(Credential::acceptor(None, Some(Path::new("x")))).text, expected);
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
        command.args(["--exact", "errors::unusable_library_is_an_error"]);
        command.env("S5_GSSAPI_LIBRARY", library).env("S5_TEST_LIBRARY", expected);
        let output = run(&mut command, b"", TIMEOUT);
        let printed = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && printed.contains("1 passed"), "{library}:\n{printed}");
    }
}
