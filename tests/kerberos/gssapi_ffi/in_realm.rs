//! Tests that run with the environment of a realm.

use std::fmt::Debug;

use s5::conn::{SecurityContext as _, TokenOrder, Unwrapped};
use s5::gssapi::ffi::{
    AcceptedContext, Credential, GSS_C_CONF_FLAG, GSS_C_INTEG_FLAG, GSS_C_MUTUAL_FLAG, GSS_C_REPLAY_FLAG,
    GSS_C_SEQUENCE_FLAG, GssContext, PendingContext,
};

use crate::*;

const ALL_FLAGS: u32 = GSS_C_SEQUENCE_FLAG | GSS_C_CONF_FLAG;
const RCMD: &str = "rcmd@localhost";
/// Object identifier of the Kerberos mechanism (RFC 1964).
const KRB5_OID: &[u8] = b"\x2A\x86\x48\x86\xF7\x12\x01\x02\x02";
/// Longest token of RFC 1961, in bytes.
const MAX_TOKEN_LEN: usize = 65_535;

fn alice() -> Arc<Credential> {
    Arc::new(Credential::initiator(None, None).expect("alice has a ticket"))
}

fn services() -> Credential {
    Credential::acceptor(None, None).expect("valid keytab")
}

/// Returns the error. Fails if it is empty, has control characters, or is "Success".
fn expect_error(result: Result<impl Debug, String>) -> String {
    let error = result.expect_err("an error");
    assert!(!error.is_empty() && !error.contains(char::is_control), "{error:?}");
    assert!(!error.contains("Success"), "{error:?}");
    error
}

/// Returns a context of alice and its first token.
fn first_token() -> (PendingContext, Vec<u8>) {
    PendingContext::new(alice(), RCMD, ALL_FLAGS).expect("first token created")
}

/// Establishes a context. Returns the initiator's and the acceptor's side.
fn establish(initiator: &Arc<Credential>, acceptor: &Credential, flags: u32) -> (GssContext, AcceptedContext) {
    let (pending, token) = PendingContext::new(initiator.clone(), RCMD, flags).expect("first token created");
    let accepted = acceptor.accept(&token).expect("valid");
    assert!(!accepted.answer.is_empty());
    (pending.complete(&accepted.answer).expect("established"), accepted)
}

fn established_pair(flags: u32) -> (GssContext, GssContext) {
    let (initiator, accepted) = establish(&alice(), &services(), flags);
    (initiator, accepted.context)
}

/// Unwraps a copy: unwrapping overwrites the token.
fn unwrap_copy(context: &mut GssContext, token: &[u8]) -> Result<Unwrapped, String> {
    context.unwrap(&mut token.to_vec())
}

fn contains(bytes: &[u8], text: &[u8]) -> bool {
    bytes.windows(text.len()).any(|window| window == text)
}

/// Encodes an ASN.1 element in DER, with a length of at most 65535 bytes.
fn der(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let content = parts.concat();
    let length = u16::try_from(content.len()).expect("at most 65535 bytes").to_be_bytes();
    [&[tag, 0x82], &length[..], &content].concat()
}

#[test]
#[ignore = "runs in a realm"]
fn both_sides_report_flags_and_initiator() {
    for flags in [ALL_FLAGS, GSS_C_CONF_FLAG] {
        let (initiator, accepted) = establish(&alice(), &services(), flags);
        for context in [&initiator, &accepted.context] {
            assert!(context.has(GSS_C_MUTUAL_FLAG | GSS_C_REPLAY_FLAG | GSS_C_INTEG_FLAG | GSS_C_CONF_FLAG));
            assert_eq!(context.has(GSS_C_SEQUENCE_FLAG), flags == ALL_FLAGS);
            // The ticket is forwardable, so it could be delegated.
            let (delegated, anonymous) = (1, 64);
            assert!(!context.has(delegated) && !context.has(anonymous), "{context:?}");
        }
        assert_eq!(accepted.initiator, b"alice@S5.TEST");
        let shown = format!("{initiator:?} {:?}", alice());
        assert!(!shown.contains("alice") && !shown.contains("0x"), "{shown}");
    }
}

#[test]
#[ignore = "runs in a realm"]
fn message_is_encrypted_or_only_integrity_protected() {
    let (mut initiator, mut acceptor) = established_pair(ALL_FLAGS);
    let long = vec![0xA5; MAX_TOKEN_LEN - 100];
    for data in [&b"to be or not to be"[..], b"", b"\0", &long] {
        for should_encrypt in [true, false] {
            let token = initiator.wrap(data, should_encrypt).expect("wrapped");
            assert_eq!(contains(&token, b"not to be"), !should_encrypt && contains(data, b"not to be"));
            let expected = Unwrapped { data: data.into(), is_encrypted: should_encrypt, order: TokenOrder::Next };
            assert_eq!(unwrap_copy(&mut acceptor, &token), Ok(expected.clone()));
            let token = acceptor.wrap(data, should_encrypt).expect("wrapped");
            assert_eq!(unwrap_copy(&mut initiator, &token), Ok(expected));
        }
    }
}

#[test]
#[ignore = "runs in a realm"]
fn order_is_detected_and_without_sequence_flag_only_duplicates_are() {
    use TokenOrder::{Duplicate, Next, OutOfOrder};
    let table: [(u32, &[(u8, TokenOrder)]); 2] = [
        (
            ALL_FLAGS,
            &[(0, Next), (0, Duplicate), (2, OutOfOrder), (1, OutOfOrder), (1, Duplicate), (3, Next), (4, Next)],
        ),
        (GSS_C_CONF_FLAG, &[(0, Next), (2, Next), (1, Next), (1, Duplicate), (199, Next), (3, Duplicate)]),
    ];
    for (flags, cases) in table {
        let (mut initiator, mut acceptor) = established_pair(flags);
        let tokens: Vec<Vec<u8>> = (0..200_u8).map(|i| initiator.wrap(&[i], true).expect("wrapped")).collect();
        for (i, order) in cases {
            let got = unwrap_copy(&mut acceptor, &tokens[usize::from(*i)]).expect("valid");
            assert_eq!((got.order, got.data), (*order, vec![*i]), "token {i} with flags {flags}");
        }
    }
    // A duplicate without data must not be mistaken for an empty message.
    let (mut initiator, mut acceptor) = established_pair(ALL_FLAGS);
    let empty = initiator.wrap(b"", true).expect("wrapped");
    assert_eq!(unwrap_copy(&mut acceptor, &empty).map(|got| got.order), Ok(Next));
    assert_eq!(expect_error(unwrap_copy(&mut acceptor, &empty)), "message out of order");
}

#[test]
#[ignore = "runs in a realm"]
fn changed_reflected_and_foreign_messages_are_rejected() {
    let (mut initiator, mut acceptor) = established_pair(ALL_FLAGS);
    for should_encrypt in [true, false] {
        let reflected = acceptor.wrap(b"hello", should_encrypt).expect("wrapped");
        let (mut foreign, _) = established_pair(ALL_FLAGS);
        let foreign = foreign.wrap(b"hello", should_encrypt).expect("wrapped");
        let token = initiator.wrap(b"hello", should_encrypt).expect("wrapped");
        for invalid in [&reflected, &foreign, &[&token[..], b"x"].concat()] {
            expect_error(unwrap_copy(&mut acceptor, invalid));
        }
        for i in 0..token.len() {
            let mut changed = token.clone();
            changed[i] ^= 0x10;
            assert!(unwrap_copy(&mut acceptor, &changed).is_err(), "byte {i} changed");
            assert!(unwrap_copy(&mut acceptor, &token[..i]).is_err(), "only {i} bytes");
        }
        for length in [1, 15, 16, MAX_TOKEN_LEN, MAX_TOKEN_LEN + 1, 1 << 20] {
            expect_error(unwrap_copy(&mut acceptor, &vec![5; length]));
        }
        assert_eq!(expect_error(unwrap_copy(&mut acceptor, b"")), "empty token");
        // The context is still usable.
        let expected = Unwrapped { data: b"hello".into(), is_encrypted: should_encrypt, order: TokenOrder::Next };
        assert_eq!(unwrap_copy(&mut acceptor, &token), Ok(expected.clone()));
        assert_eq!(unwrap_copy(&mut initiator, &reflected), Ok(expected));
    }
}

/// The size limit is the largest data length whose token fits into a message of RFC 1961.
#[test]
#[ignore = "runs in a realm"]
fn wrap_size_limit_is_exact() {
    let (mut initiator, mut acceptor) = established_pair(ALL_FLAGS);
    for should_encrypt in [false, true] {
        let capacity = initiator.wrap_size_limit(should_encrypt);
        let token = initiator.wrap(&vec![b'x'; capacity], should_encrypt).expect("wrapped");
        assert!(token.len() <= MAX_TOKEN_LEN, "{}", token.len());
        assert_eq!(unwrap_copy(&mut acceptor, &token).expect("valid").data.len(), capacity);
        let token = initiator.wrap(&vec![b'x'; capacity + 1], should_encrypt).expect("wrapped");
        assert!(token.len() > MAX_TOKEN_LEN, "{}", token.len());
        unwrap_copy(&mut acceptor, &token).expect("valid");
        assert_eq!(acceptor.wrap_size_limit(should_encrypt), capacity);
    }
}

#[test]
#[ignore = "runs in a realm"]
fn invalid_and_spnego_tokens_are_rejected() {
    let (alice, keys, (_, token)) = (alice(), services(), first_token());
    // The same token within SPNEGO (RFC 4178), which could negotiate another mechanism.
    let mechanisms = der(0xA0, &[&der(0x30, &[&der(0x06, &[KRB5_OID])])]);
    let inner = der(0xA0, &[&der(0x30, &[&mechanisms, &der(0xA2, &[&der(0x04, &[&token])])])]);
    let spnego = der(0x60, &[b"\x06\x06\x2B\x06\x01\x05\x05\x02", &inner]);
    let junk = vec![0x60; 70_000];
    for invalid in [&b""[..], b"x", &junk, b"NTLMSSP\0\x01\0\0\0", &spnego] {
        expect_error(keys.accept(invalid));
    }
    // Tickets of a user do not contain the key of a service.
    expect_error(alice.accept(&token));
    keys.accept(&token).expect("valid");

    let framed = |token_id: &[u8], inner: &[u8]| der(0x60, &[&[6, 9], KRB5_OID, token_id, inner]);
    let (reply, error, other) = (framed(&[2, 0], b"x"), framed(&[3, 0], b"x"), framed(&[1, 0], b"x"));
    let (empty, long) = (framed(&[2, 0], b""), [&reply[..], b"x"].concat());
    let answers = [&b""[..], b"x", &junk, &other, &empty[..1], &long].map(|answer| (answer, false));
    for (answer, is_framed) in answers.into_iter().chain([&reply, &error, &empty].map(|answer| (&answer[..], true))) {
        let error = expect_error(first_token().0.complete(answer));
        // Other tokens must not reach the library: Heimdal's would crash.
        assert_eq!(error != "not the answer of a Kerberos acceptor", is_framed, "{answer:?}: {error}");
    }
}

#[test]
#[ignore = "runs in a realm"]
fn invalid_names_and_files_are_errors() {
    let invalid = ["nobody", "nobody@", "@localhost", "@", "a b@c d", "é@\n", "nobody/", "/@", "", "\0"];
    for text in invalid.into_iter().chain(["rcmd@localhost\0", "rcmd\0@localhost", &"x".repeat(70_000)]) {
        expect_error(PendingContext::new(alice(), text, ALL_FLAGS));
    }
    for path in ["a\0b", "", "/nonexistent"] {
        expect_error(Credential::acceptor(None, Some(Path::new(path))));
    }
    let none = Credential::initiator(Some(Path::new("/nonexistent")), None);
    let error = expect_error(none.and_then(|none| PendingContext::new(Arc::new(none), RCMD, ALL_FLAGS)));
    let text = "No credentials were supplied, or the credentials were unavailable or inaccessible: ";
    assert_eq!(error, format!("{text}No credentials cache found (/nonexistent)"));
}

#[test]
#[ignore = "runs in a realm"]
fn corrupted_tokens_do_not_crash() {
    let (keys, (_, request)) = (services(), first_token());
    // The library may accept a corrupted token, since some bytes are not protected. It must not crash.
    let corrupt = |token: &[u8], i: usize| {
        let mut token = token.to_vec();
        token[i] ^= 1 << (i % 8);
        token
    };
    for i in (0..request.len()).step_by(3) {
        let _ = keys.accept(&corrupt(&request, i));
        expect_error(keys.accept(&request[..i]));
    }
    for i in 0..150 {
        let (pending, request) = first_token();
        let answer = keys.accept(&request).expect("valid").answer;
        let (cut, corrupted) = (&answer[..i], corrupt(&answer, i));
        let _ = pending.complete(if i % 2 == 0 { cut } else { &corrupted });
    }
}

#[test]
#[ignore = "runs in a realm"]
fn credentials_are_shared_and_contexts_sent_between_threads() {
    let (alice, keys) = (alice(), services());
    let contexts: Vec<_> = thread::scope(|scope| {
        let establish = || (0..8).map(|_| establish(&alice, &keys, ALL_FLAGS)).collect::<Vec<_>>();
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(establish)).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("the thread does not panic")).collect()
    });
    for (mut initiator, mut accepted) in contexts {
        let token = initiator.wrap(b"x", true).expect("wrapped");
        assert_eq!(unwrap_copy(&mut accepted.context, &token).map(|got| got.data), Ok(b"x".into()));
    }
}
