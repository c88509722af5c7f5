//! What goes wrong before there is a context, and what is said of it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use s5::gssapi::ffi::{ContextFlags, Credential, GssContext, GssName, available};

use crate::common::{TIMEOUT, run, temp_dir, wait_until, write_file};
use crate::kit::realm::{Options, Realm, in_realm, kinit};
use crate::{ALL, KRB5, alice, der, establish, fault, first, in_any, pair, service, services, unwrap};

#[test]
fn a_token_is_good_for_one_context() {
    let Some(_) = in_any("faults::a_token_is_good_for_one_context") else { return };
    let keys = services();
    let (_, token) = first(&alice(), &service("rcmd@localhost"), ALL).expect("a token");
    GssContext::new().accept(&keys, &token).expect("it is good");
    let error = fault(GssContext::new().accept(&keys, &token));
    assert!(error.text.contains("replay"), "{error}");
}

#[test]
fn a_service_that_nobody_knows_is_told_by_name() {
    let Some(_) = in_any("faults::a_service_that_nobody_knows_is_told_by_name") else { return };
    let error = fault(first(&alice(), &service("nobody@localhost"), ALL));
    assert_eq!(error.text, "Server nobody/localhost@S5.TEST not found in Kerberos database");
    assert!(!error.is_no_credential() && !error.is_expired());
    for text in ["nobody", "nobody@", "@localhost", "@", "a b@c d", "é@\n", &"x".repeat(70_000)] {
        fault(GssName::service(text).and_then(|name| first(&alice(), &name, ALL)));
        fault(GssName::principal(text).and_then(|name| first(&alice(), &name, ALL)));
    }
    for text in ["", "\0", "rcmd@localhost\0", "rcmd\0@localhost"] {
        fault(GssName::service(text));
        fault(GssName::principal(text));
    }
}

#[test]
fn a_key_that_is_wrong_or_missing_is_told() {
    let Some(folder) = in_any("faults::a_key_that_is_wrong_or_missing_is_told") else { return };
    let wrong = Credential::acceptor(None, Some(&folder.join("wrong.keytab"))).expect("a keytab");
    let (_, token) = first(&alice(), &service("rcmd@localhost"), ALL).expect("a token");
    let mut context = GssContext::new();
    let error = fault(context.accept(&wrong, &token));
    assert!(error.text.contains("rcmd/localhost@S5.TEST"), "{error}");
    // It has failed for good.
    fault(context.accept(&services(), &token));
    assert_eq!(context.flags(), ContextFlags::default());

    let (_, token) = first(&alice(), &service("nokey@localhost"), ALL).expect("the KDC knows it");
    let error = fault(GssContext::new().accept(&services(), &token));
    assert!(error.text.contains("nokey/localhost@S5.TEST not found in keytab"), "{error}");
}

#[test]
fn a_keytab_that_is_none_is_told() {
    let Some(folder) = in_any("faults::a_keytab_that_is_none_is_told") else { return };
    let missing = folder.join("missing.keytab");
    let junk = PathBuf::from(write_file(&folder, "junk.keytab", "junk"));
    for path in [&*missing, &*junk, &*folder] {
        let error = fault(Credential::acceptor(None, Some(path)));
        assert!(error.text.contains(path.to_str().expect("a path of text")), "{error}");
        assert!(error.is_no_credential(), "{error:?}");
    }
    fault(Credential::acceptor(None, Some(Path::new("a\0b"))));
    fault(Credential::acceptor(None, Some(Path::new(""))));
}

#[test]
fn no_ticket_is_told() {
    let Some(folder) = in_any("faults::no_ticket_is_told") else { return };
    let path = folder.join("ccache.none");
    let target = service("rcmd@localhost");
    let error = fault(Credential::initiator(Some(&path)).and_then(|none| first(&none, &target, ALL)));
    let text = "No credentials were supplied, or the credentials were unavailable or inaccessible: ";
    assert_eq!(error.text, format!("{text}No credentials cache found ({})", path.display()));
    assert!(error.is_no_credential(), "{error:?}");
}

#[test]
fn a_ticket_that_has_expired_is_told() {
    let Some(folder) = in_any("faults::a_ticket_that_has_expired_is_told") else { return };
    kinit(&folder, "alice", "user.keytab", "ccache.short", "1s");
    let path = folder.join("ccache.short");
    let target = service("rcmd@localhost");
    let mut error = None;
    wait_until("the ticket expires", TIMEOUT, || {
        error = Credential::initiator(Some(&path)).and_then(|short| first(&short, &target, ALL)).err();
        error.is_some()
    });
    let error = error.expect("an error");
    assert!(error.is_expired() && error.text.contains("expired"), "{error:?}");
}

#[test]
fn a_context_takes_only_what_it_is_for() {
    let Some(_) = in_any("faults::a_context_takes_only_what_it_is_for") else { return };
    let (alice, keys, target) = (alice(), services(), service("rcmd@localhost"));
    let mut fresh = GssContext::new();
    assert_eq!(fault(fresh.wrap(b"x", true)).text, "the security context is not established");
    fault(unwrap(&mut fresh, b"x"));
    fault(fresh.wrap_size_limit(true));
    assert_eq!(
        (fresh.flags(), fresh.initiator_name(), fresh.lifetime()),
        (ContextFlags::default(), None, Some(Duration::ZERO))
    );
    // A first token is not taken for an answer, nothing for a token.
    fault(GssContext::new().init(&alice, &target, ALL, Some(b"x")));
    fault(GssContext::new().accept(&keys, b""));
    fault(GssContext::new().accept(&alice, b"x"));
    let junk = vec![0x60; 70_000];
    fault(GssContext::new().accept(&keys, &junk));
    fault(GssContext::new().accept(&keys, b"NTLMSSP\0\x01\0\0\0"));

    let framed = |kind: &[u8], inner: &[u8]| der(0x60, &[&[6, 9], KRB5, kind, inner]);
    let (reply, error, other) = (framed(&[2, 0], b"x"), framed(&[3, 0], b"x"), framed(&[1, 0], b"x"));
    let (empty, long) = (framed(&[2, 0], b""), [&reply[..], b"x"].concat());
    let kinds = [&b""[..], b"x", &junk, &other, &empty[..1], &long].map(|answer| (Some(answer), false));
    let kinds = kinds.into_iter().chain([(None, false)]);
    for (answer, is_framed) in kinds.chain([&reply, &error, &empty].map(|answer| (Some(&answer[..]), true))) {
        let (mut initiator, token) = first(&alice, &target, ALL).expect("a token");
        fault(initiator.accept(&keys, &token));
        assert_eq!(fault(initiator.wrap(b"x", true)).text, "the security context is not established");
        let error = fault(initiator.init(&alice, &target, ALL, answer));
        // Anything else would do harm to one of the libraries.
        assert_eq!(error.text != "not the answer of a Kerberos acceptor", is_framed, "{answer:?}: {error}");
        fault(initiator.init(&alice, &target, ALL, None));
    }
    let (mut initiator, mut acceptor) = pair(ALL);
    fault(initiator.init(&alice, &target, ALL, None));
    fault(acceptor.accept(&keys, b"x"));
    // That was no harm to them.
    let token = initiator.wrap(b"x", true).expect("it is wrapped");
    assert_eq!(unwrap(&mut acceptor, &token).map(|got| got.data), Ok(b"x".into()));
    let shown = format!("{acceptor:?} {alice:?}");
    assert!(shown.starts_with("GssContext { state: Complete, flags: ContextFlags {"), "{shown}");
    assert!(!shown.contains("alice") && !shown.contains("0x"), "{shown}");
}

#[test]
fn the_environment_names_tickets_and_keys() {
    let test = "faults::the_environment_names_tickets_and_keys";
    let elsewhere = |_: &mut Realm, command: &mut Command| {
        command.env("KRB5CCNAME", "FILE:/nowhere/ccache").env("KRB5_KTNAME", "FILE:/nowhere/keytab");
    };
    let Some(folder) = in_realm(test, &Options::default(), elsewhere) else { return };
    let error = fault(Credential::initiator(None));
    assert!(error.is_no_credential() && error.text.contains("/nowhere/ccache"), "{error:?}");
    let error = fault(Credential::acceptor(None, None));
    assert!(error.is_no_credential() && error.text.contains("/nowhere/keytab"), "{error:?}");
    let alice = Credential::initiator(Some(&folder.join("ccache"))).expect("a ticket");
    let keys = Credential::acceptor(None, Some(&folder.join("service.keytab"))).expect("a keytab");
    establish(&alice, &service("rcmd@localhost"), &keys, ALL).expect("they come together");
}

#[test]
fn a_library_that_is_missing_or_another_is_an_error() {
    if let Ok(expected) = std::env::var("S5_TEST_LIBRARY") {
        assert_eq!(available(), Err(expected.clone()));
        assert_eq!(fault(GssName::service("rcmd@localhost")).text, expected);
        assert_eq!(fault(Credential::initiator(None)).text, expected);
        assert_eq!(fault(Credential::acceptor(None, Some(Path::new("x")))).text, expected);
        return;
    }
    let folder = temp_dir();
    let missing = folder.path().join("missing.so").display().to_string();
    let text = write_file(folder.path(), "text.so", "no library");
    let maps = std::fs::read_to_string("/proc/self/maps").expect("Linux");
    let libc = maps.lines().find_map(|line| Some(&line[line.find('/')?..]).filter(|path| path.contains("/libc.so")));
    let libc = libc.expect("tests are linked dynamically");
    for (library, expected) in [
        (&*missing, format!("{missing}: cannot open shared object file: No such file or directory")),
        (&text, format!("{text}: file too short")),
        ("libgssapi_krb5.so.2", "S5_GSSAPI_LIBRARY is not an absolute path".into()),
        (libc, format!("{libc} has no gss_import_name")),
    ] {
        let mut command = Command::new(std::env::current_exe().expect("this test"));
        command.args(["--exact", "faults::a_library_that_is_missing_or_another_is_an_error"]);
        command.env("S5_GSSAPI_LIBRARY", library).env("S5_TEST_LIBRARY", expected);
        let output = run(&mut command, b"", TIMEOUT);
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.contains("1 passed"), "{library}:\n{said}");
    }
}
