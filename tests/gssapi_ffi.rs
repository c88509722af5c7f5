//! The binding of GSSAPI against the library of the system, both sides in one process, in a realm of its own: who is
//! who, what is protected, what is noticed, what goes wrong and how it is told; and that all of it is released.

#![cfg(feature = "gssapi")]

mod common;
mod kit;

#[path = "gssapi_ffi/faults.rs"]
mod faults;

use std::fmt::Debug;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use common::{is_installed, run, write_file};
use kit::realm::{Options, Realm, can_start, current_realm_dir, in_realm};
use s5::gssapi::ffi::{
    ContextStep, Credential, GssContext, GssName, LibraryError, RequestedFlags, SequenceStatus, Unwrapped,
};

const ALL: RequestedFlags = RequestedFlags { sequence: true, confidentiality: true };
/// The mechanism's object identifier.
const KRB5: &[u8] = b"\x2A\x86\x48\x86\xF7\x12\x01\x02\x02";
/// What RFC 1961 can carry.
const LARGEST: usize = 65_535;

/// As [`in_realm`], in a realm like any other.
fn in_any(test: &str) -> Option<PathBuf> {
    in_realm(test, &Options::default(), |_, _| {})
}

fn alice() -> Credential {
    Credential::initiator(None).expect("alice has a ticket")
}

fn services() -> Credential {
    Credential::acceptor(None, None).expect("there is a keytab")
}

fn service(text: &str) -> GssName {
    GssName::service(text).expect("a name")
}

/// The error, which must fit into a line of the log.
fn fault(result: Result<impl Debug, LibraryError>) -> LibraryError {
    let error = result.expect_err("it fails");
    assert!(!error.text.is_empty() && !error.text.contains(char::is_control), "{error:?}");
    assert!(!error.text.contains("Success"), "{error:?}");
    assert_eq!(error.to_string(), error.text);
    error
}

/// The first token of an initiator.
fn first(
    credential: &Credential,
    target: &GssName,
    requested: RequestedFlags,
) -> Result<(GssContext, Vec<u8>), LibraryError> {
    let mut context = GssContext::new();
    let step = context.init(credential, target, requested, None)?;
    assert!(!step.is_complete, "who asks for mutual authentication waits for an answer");
    Ok((context, step.output))
}

/// Both sides of a context: the initiator's and the acceptor's.
fn establish(
    from: &Credential,
    target: &GssName,
    to: &Credential,
    requested: RequestedFlags,
) -> Result<(GssContext, GssContext), LibraryError> {
    let (mut initiator, token) = first(from, target, requested)?;
    let mut acceptor = GssContext::new();
    let step = acceptor.accept(to, &token)?;
    assert!(step.is_complete && !step.output.is_empty());
    let last = initiator.init(from, target, requested, Some(&step.output))?;
    assert_eq!(last, ContextStep { output: Vec::new(), is_complete: true });
    Ok((initiator, acceptor))
}

fn pair(requested: RequestedFlags) -> (GssContext, GssContext) {
    establish(&alice(), &service("rcmd@localhost"), &services(), requested).expect("they come together")
}

/// Unwraps a copy, since a token is spoilt by it.
fn unwrap(context: &mut GssContext, token: &[u8]) -> Result<Unwrapped, LibraryError> {
    context.unwrap(&mut token.to_vec())
}

fn order(context: &mut GssContext, token: &[u8]) -> SequenceStatus {
    unwrap(context, token).expect("it is good as such").order
}

fn contains(octets: &[u8], text: &[u8]) -> bool {
    octets.windows(text.len()).any(|window| window == text)
}

/// A piece of ASN.1, of at most 65535 octets.
fn der(tag: u8, pieces: &[&[u8]]) -> Vec<u8> {
    let content = pieces.concat();
    let length = u16::try_from(content.len()).expect("it is short").to_be_bytes();
    [&[tag, 0x82], &length[..], &content].concat()
}

#[test]
fn both_sides_know_what_they_have() {
    let Some(_) = in_any("both_sides_know_what_they_have") else { return };
    for sequence in [true, false] {
        let (initiator, acceptor) = pair(RequestedFlags { sequence, confidentiality: true });
        for context in [&initiator, &acceptor] {
            let flags = context.flags();
            assert!(flags.mutual && flags.replay && flags.integrity && flags.confidentiality, "{flags:?}");
            assert_eq!(flags.sequence, sequence);
            // The ticket is forwardable, so that it could have been.
            assert!(!flags.delegated && !flags.anonymous, "{flags:?}");
            let lifetime = context.lifetime().expect("the ticket has an end");
            // The acceptor may add what it allows clocks to differ.
            assert!((3500..=3900).contains(&lifetime.as_secs()), "{lifetime:?}");
        }
        assert_eq!(acceptor.initiator_name(), Some(&b"alice@S5.TEST"[..]));
        assert_eq!(initiator.initiator_name(), None);
    }
}

#[test]
fn names_are_taken_as_they_are() {
    let Some(folder) = in_any("names_are_taken_as_they_are") else { return };
    let (keys, alice) = (services(), alice());
    assert_eq!(service("rcmd@localhost").display().expect("it is shown"), b"rcmd@localhost");
    let principal = GssName::principal("socks/localhost@S5.TEST").expect("a name");
    assert_eq!(principal.display().expect("it is shown"), b"socks/localhost@S5.TEST");
    let names = [service("rcmd@localhost"), service("socks@localhost"), principal];
    for name in &names {
        establish(&alice, name, &keys, ALL).unwrap_or_else(|error| panic!("{name:?}: {error}"));
    }
    let mallory = Credential::initiator(Some(&folder.join("ccache.mallory"))).expect("a ticket");
    let (_, acceptor) = establish(&mallory, &names[0], &keys, ALL).expect("they come together");
    assert_eq!(acceptor.initiator_name(), Some(&b"mallory@S5.TEST"[..]));
}

#[test]
fn an_acceptor_may_be_one_name_or_any_of_a_keytab() {
    let Some(folder) = in_any("an_acceptor_may_be_one_name_or_any_of_a_keytab") else { return };
    let (alice, keytab) = (alice(), folder.join("service.keytab"));
    let (rcmd, socks) = (service("rcmd@localhost"), service("socks@localhost"));
    let any = Credential::acceptor(None, Some(&keytab)).expect("a keytab");
    establish(&alice, &rcmd, &any, ALL).expect("it has that key");
    establish(&alice, &socks, &any, ALL).expect("it has that key");
    for name in [&rcmd, &GssName::principal("rcmd/localhost@S5.TEST").expect("a name")] {
        for keytab in [None, Some(&*keytab)] {
            let one = Credential::acceptor(Some(name), keytab).expect("it has that key");
            establish(&alice, &rcmd, &one, ALL).expect("it is that service");
            fault(establish(&alice, &socks, &one, ALL));
        }
    }
    let error = fault(Credential::acceptor(Some(&service("nokey@localhost")), Some(&keytab)));
    assert!(error.is_no_credential() && error.text.contains("nokey/localhost"), "{error:?}");
}

#[test]
fn a_message_is_sealed_or_only_protected() {
    let Some(_) = in_any("a_message_is_sealed_or_only_protected") else { return };
    let (mut initiator, mut acceptor) = pair(ALL);
    let long = vec![0xA5; LARGEST - 100];
    for data in [&b"to be or not to be"[..], b"", b"\0", &long] {
        for encrypt in [true, false] {
            let token = initiator.wrap(data, encrypt).expect("it is wrapped");
            assert_eq!(contains(&token, b"not to be"), !encrypt && contains(data, b"not to be"));
            let expected = Unwrapped { data: data.into(), is_encrypted: encrypt, order: SequenceStatus::InOrder };
            assert_eq!(unwrap(&mut acceptor, &token), Ok(expected.clone()));
            let token = acceptor.wrap(data, encrypt).expect("it is wrapped");
            assert_eq!(unwrap(&mut initiator, &token), Ok(expected));
        }
    }
}

#[test]
fn what_is_missing_late_or_twice_is_told() {
    let Some(_) = in_any("what_is_missing_late_or_twice_is_told") else { return };
    let (mut initiator, mut acceptor) = pair(ALL);
    let tokens: Vec<Vec<u8>> = (0..5_u8).map(|i| initiator.wrap(&[i], true).expect("it is wrapped")).collect();
    let expected = [
        (0, SequenceStatus::InOrder),
        (0, SequenceStatus::Duplicate),
        (2, SequenceStatus::Gap),
        (1, SequenceStatus::Unsequenced),
        (1, SequenceStatus::Duplicate),
    ];
    for (i, order) in expected.into_iter().chain([(3, SequenceStatus::InOrder), (4, SequenceStatus::InOrder)]) {
        let got = unwrap(&mut acceptor, &tokens[i]).expect("it is good as such");
        assert_eq!((got.order, &got.data), (order, &vec![i as u8]), "token {i}");
    }
    // Where the library gives no data, an order alone would be taken for a message of no octets.
    let nothing = initiator.wrap(b"", true).expect("it is wrapped");
    assert_eq!(order(&mut acceptor, &nothing), SequenceStatus::InOrder);
    assert_eq!(fault(unwrap(&mut acceptor, &nothing)).text, "message out of order");
}

#[test]
fn without_a_sequence_only_what_comes_twice_is_told() {
    let Some(_) = in_any("without_a_sequence_only_what_comes_twice_is_told") else { return };
    let (mut initiator, mut acceptor) = pair(RequestedFlags { sequence: false, confidentiality: true });
    let tokens: Vec<Vec<u8>> = (0..200_u8).map(|i| initiator.wrap(&[i], false).expect("it is wrapped")).collect();
    assert_eq!(order(&mut acceptor, &tokens[0]), SequenceStatus::InOrder);
    assert_eq!(order(&mut acceptor, &tokens[2]), SequenceStatus::InOrder);
    assert_eq!(order(&mut acceptor, &tokens[1]), SequenceStatus::InOrder);
    assert_eq!(order(&mut acceptor, &tokens[1]), SequenceStatus::Duplicate);
    assert_eq!(order(&mut acceptor, &tokens[199]), SequenceStatus::InOrder);
    assert_eq!(order(&mut acceptor, &tokens[3]), SequenceStatus::Old);
}

#[test]
fn what_the_other_side_did_not_send_is_refused() {
    let Some(_) = in_any("what_the_other_side_did_not_send_is_refused") else { return };
    let (mut initiator, mut acceptor) = pair(ALL);
    for encrypt in [true, false] {
        let own = acceptor.wrap(b"hello", encrypt).expect("it is wrapped");
        fault(unwrap(&mut acceptor, &own));
        let (mut stranger, _) = pair(ALL);
        fault(unwrap(&mut acceptor, &stranger.wrap(b"hello", encrypt).expect("it is wrapped")));
        let token = initiator.wrap(b"hello", encrypt).expect("it is wrapped");
        for i in 0..token.len() {
            let mut changed = token.clone();
            changed[i] ^= 0x10;
            assert!(unwrap(&mut acceptor, &changed).is_err(), "octet {i} was changed");
            assert!(unwrap(&mut acceptor, &token[..i]).is_err(), "only {i} octets of it");
        }
        fault(unwrap(&mut acceptor, &[&token[..], b"x"].concat()));
        for length in [1, 15, 16, LARGEST, LARGEST + 1, 1 << 20] {
            fault(unwrap(&mut acceptor, &vec![5; length]));
        }
        assert_eq!(fault(unwrap(&mut acceptor, b"")).text, "empty token");
        // None of it has done any harm.
        assert_eq!(
            unwrap(&mut acceptor, &token).map(|got| (got.data, got.order)),
            Ok((b"hello".into(), SequenceStatus::InOrder))
        );
        assert_eq!(unwrap(&mut initiator, &own).map(|got| got.data), Ok(b"hello".into()));
    }
}

/// How much goes into a message: the most that makes no more than a frame of RFC 1961.
fn check_capacity() -> [usize; 2] {
    let (mut initiator, mut acceptor) = pair(ALL);
    [false, true].map(|encrypt| {
        let capacity = initiator.wrap_size_limit(encrypt).expect("it is told");
        let data = vec![b'x'; capacity + 1];
        let token = initiator.wrap(&data[1..], encrypt).expect("it is wrapped");
        assert!(token.len() <= LARGEST, "{}", token.len());
        assert_eq!(unwrap(&mut acceptor, &token).expect("it is good").data.len(), capacity);
        let token = initiator.wrap(&data, encrypt).expect("it is wrapped");
        assert!(token.len() > LARGEST, "{}", token.len());
        unwrap(&mut acceptor, &token).expect("it is good");
        assert_eq!(acceptor.wrap_size_limit(encrypt), Ok(capacity));
        capacity
    })
}

#[test]
fn the_capacity_is_exact() {
    let Some(_) = in_any("the_capacity_is_exact") else { return };
    assert_eq!(check_capacity(), [65_507, 65_475]);
}

#[test]
fn the_capacity_is_exact_with_other_ciphers() {
    let options = Options { enctype: "aes256-cts-hmac-sha384-192", ..Options::default() };
    let Some(_) = in_realm("the_capacity_is_exact_with_other_ciphers", &options, |_, _| {}) else { return };
    check_capacity();
}

#[test]
fn only_kerberos_is_spoken() {
    let Some(_) = in_any("only_kerberos_is_spoken") else { return };
    let (_, token) = first(&alice(), &service("rcmd@localhost"), ALL).expect("a token");
    // The same within SPNEGO (RFC 4178), which could negotiate something else.
    let kinds = der(0xA0, &[&der(0x30, &[&der(0x06, &[KRB5])])]);
    let inner = der(0xA0, &[&der(0x30, &[&kinds, &der(0xA2, &[&der(0x04, &[&token])])])]);
    let spnego = der(0x60, &[b"\x06\x06\x2B\x06\x01\x05\x05\x02", &inner]);
    let keys = services();
    fault(GssContext::new().accept(&keys, &spnego));
    GssContext::new().accept(&keys, &token).expect("it is good as such");
}

#[test]
fn spoilt_tokens_do_no_harm_to_who_takes_them() {
    let Some(_) = in_any("spoilt_tokens_do_no_harm_to_who_takes_them") else { return };
    let (alice, keys, target) = (alice(), services(), service("rcmd@localhost"));
    let (_, request) = first(&alice, &target, ALL).expect("a token");
    // Some octets are protected by nothing, so that what becomes of it is left to the library.
    let spoil = |token: &[u8], i: usize| {
        let mut token = token.to_vec();
        token[i] ^= 1 << (i % 8);
        token
    };
    for i in (0..request.len()).step_by(3) {
        let _ = GssContext::new().accept(&keys, &spoil(&request, i));
        fault(GssContext::new().accept(&keys, &request[..i]));
    }
    for i in 0..150 {
        let (mut initiator, request) = first(&alice, &target, ALL).expect("a token");
        let answer = GssContext::new().accept(&keys, &request).expect("it is good").output;
        let (cut, spoilt) = (&answer[..i], spoil(&answer, i));
        let _ = initiator.init(&alice, &target, ALL, Some(if i % 2 == 0 { cut } else { &spoilt }));
    }
}

#[test]
fn threads_share_credentials_and_hand_contexts_on() {
    let Some(_) = in_any("threads_share_credentials_and_hand_contexts_on") else { return };
    let shared = Arc::new((alice(), service("rcmd@localhost"), services()));
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let shared = shared.clone();
            thread::spawn(move || {
                let (alice, target, keys) = &*shared;
                (0..8).map(|_| establish(alice, target, keys, ALL).expect("they come together")).collect::<Vec<_>>()
            })
        })
        .collect();
    for (mut initiator, mut acceptor) in threads.into_iter().flat_map(|thread| thread.join().expect("no panic")) {
        let token = initiator.wrap(b"x", true).expect("it is wrapped");
        assert_eq!(unwrap(&mut acceptor, &token).map(|got| got.data), Ok(b"x".into()));
    }
}

#[test]
fn realms_do_not_meet_and_a_kdc_can_be_silent() {
    if !can_start() {
        return;
    }
    let (one, mut other) = (Realm::start(), Realm::start());
    let port = |realm: &Realm| std::fs::read_to_string(realm.file("krb5.conf")).expect("a file");
    assert_ne!(port(&one), port(&other));
    other.stop_answering();
    let ask = |realm: &Realm| {
        let mut command = Command::new("kinit");
        command.arg("-k").arg("-t").arg(realm.file("user.keytab")).arg("alice").stderr(Stdio::null());
        realm.env(&mut command).spawn().expect("kinit starts")
    };
    let mut waiting = ask(&other);
    assert!(ask(&one).wait().expect("a child").success());
    thread::sleep(Duration::from_millis(500));
    assert!(waiting.try_wait().expect("a child").is_none(), "kinit waits for the KDC");
    waiting.kill().and_then(|()| waiting.wait()).expect("a child");
}

#[test]
fn nothing_is_lost_and_nothing_is_read_beyond_its_end() {
    if current_realm_dir().is_some() || !is_installed("valgrind") || !can_start() {
        return;
    }
    let realm = Realm::start();
    let mut command = Command::new("valgrind");
    // MIT forgets a principal when it does not find its key; only the start of a server can come to that.
    let known = "{\n  a key that is not there\n  Memcheck:Leak\n  match-leak-kinds: definite\n  fun:malloc\n  \
                 fun:krb5_build_principal_alloc_va\n  fun:krb5_build_principal\n  ...\n  fun:gss_add_cred_from\n}\n";
    let known = write_file(&realm.file(""), "valgrind.supp", known);
    command.arg(format!("--suppressions={known}"));
    command.args(["--leak-check=full", "--errors-for-leak-kinds=definite", "--error-exitcode=99", "--num-callers=30"]);
    command.arg(std::env::current_exe().expect("this test"));
    // What is about other environments and other processes is not repeated.
    for test in ["the_environment", "a_library", "realms_do", "nothing_is_lost"] {
        command.args(["--skip", test]);
    }
    realm.env(&mut command).env("S5_TEST_REALM", realm.file(""));
    let output = run(command.arg("--test-threads=1"), b"", Duration::from_secs(300));
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}
