//! The users file: parsing, verifying passwords, replacing entries. No test opens a file.

use std::time::{Duration, Instant};

use argon2::password_hash::phc::PasswordHash;
use argon2::password_hash::{PasswordHasher as _, PasswordVerifier as _};
use argon2::{Algorithm, Argon2, Params, Version};
use proptest::collection::vec;
use proptest::prelude::*;
use s5::policy::users::{HashMemory, Users, check_name, edit_entry, new_entry};

/// Hash of "password", from the test vectors of the reference implementation of argon2.
const ARGON2ID: &str = "$argon2id$v=19$m=256,t=2,p=1$c29tZXNhbHQ$nf65EOgLrQMR/uIPnA4rEsF5h7TKyQwu9U1bMCHGi/4";
/// Hash of "password" with two lanes.
const TWO_LANES: &str = "$argon2id$v=19$m=256,t=2,p=2$c29tZXNhbHQ$bQk8UB/VmZZF4Oo79iDXuL5/0ttZwg2f/5U52iv1cDc";
/// Hash of "p4ssword", written by `htpasswd -nbB -C 4 alice p4ssword`.
const HTPASSWD: &str = "$2y$04$zEhle9QibRYvvalySJvLY.P/KSl5uubhJCzGFq6YyNWF1jg0jrk1O";
/// Hash of "U*U", from the test vectors of crypt_blowfish.
const CRYPT_2A: &str = "$2a$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW";
/// Hash of "a" by crypt(3).
const CRYPT_2B: &str = "$2b$04$CCCCCCCCCCCCCCCCCCCCC.f/Fm9DOYGp2ai9rjxvG4QHlhtDCuDuu";
/// Hash of 72 times "a" by crypt(3). 73 times "a" has the same hash.
const CRYPT_72: &str = "$2y$04$CCCCCCCCCCCCCCCCCCCCC.mDyzbhj.9K0apb9O/AGMWwoLXiYAu6u";
/// Hash of the empty password by crypt(3).
const CRYPT_EMPTY: &str = "$2y$04$CCCCCCCCCCCCCCCCCCCCC.Cg0ly9t/KVBCBYYDfOmZKwry9JuXClC";

fn users(text: &str) -> Users {
    Users::parse(text).unwrap_or_else(|error| panic!("{error}"))
}

/// Returns a users file with one user.
fn alice(hash: &str) -> Users {
    users(&format!("alice:{hash}\n"))
}

/// Verifies a login with memory of its own.
fn verify(users: &Users, uname: &[u8], passwd: &[u8]) -> bool {
    users.verify(uname, passwd, &mut HashMemory::default())
}

/// Hashes a password with argon2id. `cost` is the memory in KiB.
fn argon2id(passwd: &[u8], cost: u32) -> String {
    let params = Params::new(cost, 1, 1, None).expect("valid parameters");
    let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
    let hash: PasswordHash = argon2.hash_password(passwd).expect("password hashed");
    hash.to_string()
}

#[test]
fn verify_accepts_hashes_of_other_programs() {
    let table = [
        (ARGON2ID, "password"),
        (TWO_LANES, "password"),
        (HTPASSWD, "p4ssword"),
        (CRYPT_2A, "U*U"),
        (CRYPT_2B, "a"),
        (&CRYPT_2B.replace("$2b$", "$2y$"), "a"),
        (&CRYPT_2B.replace("$2b$", "$2a$"), "a"),
    ];
    for (hash, passwd) in table {
        let users = alice(hash);
        assert!(verify(&users, b"alice", passwd.as_bytes()), "{hash}");
        let upper = passwd.to_uppercase();
        let wrong = [&format!("{passwd}x"), &passwd[1..], &format!(" {passwd}"), "", &upper, &passwd.to_lowercase()];
        for wrong in wrong.into_iter().filter(|wrong| *wrong != passwd) {
            assert!(!verify(&users, b"alice", wrong.as_bytes()), "{wrong:?} for {hash}");
        }
    }
}

/// Returns whether the argon2 crate accepts the password, with memory of its own.
fn reference_verify(hash: &str, passwd: &[u8]) -> bool {
    let hash = PasswordHash::new(hash).expect("valid hash");
    Argon2::default().verify_password(passwd, &hash).is_ok()
}

/// Any hash of argon2id, with its password.
fn any_argon2id() -> impl Strategy<Value = (String, Vec<u8>)> {
    let costs = (1_u32..4, 1_u32..4).prop_flat_map(|(passes, lanes)| (Just(passes), Just(lanes), 8 * lanes..600));
    let versions = prop_oneof![Just(Version::V0x10), Just(Version::V0x13)];
    (costs, versions, 10_usize..65, vec(any::<u8>(), 1..20)).prop_map(|((passes, lanes, kib), version, len, passwd)| {
        let params = Params::new(kib, passes, lanes, Some(len)).expect("valid parameters");
        let argon2 = Argon2::new(Algorithm::Argon2id, version, params);
        let hash: PasswordHash = argon2.hash_password(&passwd).expect("password hashed");
        (hash.to_string(), passwd)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn verify_with_reused_memory_agrees_with_the_argon2_crate(logins in vec((any_argon2id(), any::<bool>()), 1..6)) {
        let mut memory = HashMemory::default();
        for ((hash, mut passwd), is_wrong) in logins {
            passwd[0] ^= u8::from(is_wrong);
            let is_valid = alice(&hash).verify(b"alice", &passwd, &mut memory);
            prop_assert_eq!(is_valid, !is_wrong, "{}", hash);
            prop_assert_eq!(is_valid, reference_verify(&hash, &passwd), "{}", hash);
        }
    }
}

#[test]
fn verify_accepts_an_old_hash_without_version_and_ignores_the_content_of_the_memory() {
    let mut memory = HashMemory::default();
    let large = argon2id(b"p4ssword", 40 << 10);
    // Larger than the memory, smaller again, and each of them twice.
    for (hash, passwd) in [(ARGON2ID, "password"), (&large, "p4ssword"), (TWO_LANES, "password"), (&large, "p4ssword")]
    {
        let users = alice(hash);
        for _ in 0..2 {
            assert!(!users.verify(b"alice", b"wrong", &mut memory), "{hash}");
            assert!(users.verify(b"alice", passwd.as_bytes(), &mut memory), "{hash}");
        }
    }
    let without_version = ARGON2ID.replace("v=19$", "");
    assert_eq!(
        verify(&alice(&without_version), b"alice", b"password"),
        reference_verify(&without_version, b"password")
    );
}

#[test]
fn hash_that_costs_too_much_is_an_error_that_names_line_and_limit() {
    let argon2id = |costs| ARGON2ID.replace("m=256,t=2", costs);
    let bcrypt = |cost| HTPASSWD.replace("$04$", cost);
    let table = [
        (argon2id("m=4194304,t=2"), "m=4194304 of the argon2id hash exceeds the limit of 1048576"),
        (argon2id("m=1048577,t=1"), "m=1048577 of the argon2id hash exceeds the limit of 1048576"),
        (argon2id("m=1048576,t=5"), "t=5 of the argon2id hash exceeds the limit of 4"),
        (argon2id("m=19456,t=100000"), "t=100000 of the argon2id hash exceeds the limit of 215"),
        (argon2id("m=8,t=100000"), "t=100000 of the argon2id hash exceeds the limit of 1000"),
        (argon2id("m=4294967295,t=4294967295"), "m=4294967295 of the argon2id hash exceeds the limit of 1048576"),
        (bcrypt("$18$"), "cost=18 of the bcrypt hash exceeds the limit of 17"),
        (bcrypt("$31$"), "cost=31 of the bcrypt hash exceeds the limit of 17"),
    ];
    for (hash, message) in table {
        let text = format!(
            "first:{CRYPT_2B}
alice:{hash}
"
        );
        let error = Users::parse(&text).expect_err(&hash).to_string();
        let expected = format!("line 2: user \"alice\": {message} (use --remove-user, then --add-user)");
        assert_eq!(error, expected);
    }
    for hash in [argon2id("m=1048576,t=4"), argon2id("m=19456,t=215"), argon2id("m=8,t=1000"), bcrypt("$17$")] {
        alice(&hash);
    }
}

#[test]
fn verify_compares_whole_password() {
    for passwd in [&[b'a'; 255][..], b"\xff\xfe", b"a\r\n\x1b[2J", b"a\0b", "pässwörd".as_bytes(), b"\0"] {
        let users = alice(&argon2id(passwd, 8));
        assert!(verify(&users, b"alice", passwd), "{}", passwd.escape_ascii());
        let (_, shorter) = passwd.split_last().expect("not empty");
        assert!(!verify(&users, b"alice", shorter), "{} truncated", passwd.escape_ascii());
        assert!(!verify(&users, b"alice", &[passwd, b"\0"].concat()), "{} and NUL", passwd.escape_ascii());
        assert!(!verify(&users, b"alice", &[passwd, b"a"].concat()), "{} and more", passwd.escape_ascii());
    }
}

#[test]
fn bcrypt_refuses_passwords_that_it_cannot_distinguish() {
    let a = alice(CRYPT_2B);
    assert!(verify(&a, b"alice", b"a"));
    for passwd in [&b"a\0"[..], b"a\0a", b"a\0a\0", b"a\0b", b"\0", b"\0a"] {
        assert!(!verify(&a, b"alice", passwd), "{}", passwd.escape_ascii());
    }
    let long = alice(CRYPT_72);
    assert!(verify(&long, b"alice", &[b'a'; 72]), "the longest password that bcrypt distinguishes");
    for length in [0, 71, 73, 144, 255] {
        assert!(!verify(&long, b"alice", &vec![b'a'; length]), "{length} bytes");
    }
    let empty = alice(CRYPT_EMPTY);
    assert!(!verify(&empty, b"alice", b"\0"), "NUL for the empty password");
}

#[test]
fn verify_accepts_only_the_whole_name_and_the_password_of_the_user() {
    let users = users(&format!("alice:{ARGON2ID}\nbob:{CRYPT_2B}\nzoë:{HTPASSWD}\n"));
    assert_eq!(users.names().len(), 3);
    let passwds = ["password", "a", "p4ssword"];
    for (i, uname) in ["alice", "bob", "zoë"].iter().enumerate() {
        for (j, passwd) in passwds.iter().enumerate() {
            assert_eq!(verify(&users, uname.as_bytes(), passwd.as_bytes()), i == j, "{uname} with {passwd}");
        }
        assert!(users.contains(uname.as_bytes()));
    }
    for uname in [&b""[..], b"Bob", b"bo", b"bob\0", b"boba", b" bob", b"bob ", b"\xff", b"mallory"] {
        let is_accepted = passwds.iter().any(|passwd| verify(&users, uname, passwd.as_bytes()));
        assert!(!users.contains(uname) && !is_accepted, "{}", uname.escape_ascii());
    }
}

#[test]
fn comments_blanks_and_crlf_are_ignored() {
    for text in ["", "\n\n", "# alice:\n", "#", "  \r\n\t# b"] {
        let users = users(text);
        assert_eq!(users.names().len(), 0, "{text:?}");
        assert!(!verify(&users, b"alice", b"a") && !verify(&users, b"", b""), "an empty file accepts a login");
    }
    let text = format!("# first: a comment\r\n\r\n  alice:{CRYPT_2B}  \r\n\t#bob:{CRYPT_2B}\r\nzoë:{HTPASSWD}");
    let users = users(&text);
    assert_eq!(users.names().len(), 2);
    assert!(verify(&users, b"alice", b"a") && verify(&users, "zoë".as_bytes(), b"p4ssword"));
}

/// Invalid lines, each with a word that the error message must contain.
fn bad_lines() -> Vec<(String, &'static str)> {
    let line_with = |hash: &str| format!("alice:{hash}");
    let line_with_cost = |cost| line_with(&HTPASSWD.replace("$04$", cost));
    vec![
        ("alice".into(), "alice"),
        (":".into(), "empty"),
        (format!(":{ARGON2ID}"), "empty"),
        (line_with(""), "alice"),
        (line_with("secret-password"), "alice"),
        (line_with("rqXexS6ZhobKA"), "alice"),
        (line_with("{SHA}W6ph5Mm5Pz8GgiULbPgzG37mj9g="), "alice"),
        (line_with("$1$saltsalt$qjXMvbEw8oaL.CzflDtaK/"), "\"1\""),
        (line_with("$apr1$saltsalt$1oSdEkWwqAPDZAOqI7dFd1"), "\"apr1\""),
        (line_with("$6$saltsalt$qFmFH.bQmmtXzyBY0s9v7Oicd2z4XSIecDzlB5KiA2/jctKu9YterLp8wwnSq.qc"), "\"6\""),
        (line_with(&ARGON2ID.replace("2id", "2i")), "\"argon2i\""),
        (line_with(&HTPASSWD.replace("$2y$", "$2x$")), "\"2x\""),
        (line_with(&HTPASSWD[..59]), "bcrypt"),
        (line_with(&format!("{HTPASSWD}O")), "bcrypt"),
        (line_with(&format!("{HTPASSWD}:more")), "bcrypt"),
        (line_with(&HTPASSWD.replace('/', "*")), "bcrypt"),
        (line_with(&HTPASSWD.replace('/', "é")), "bcrypt"),
        (line_with("$2y$"), "bcrypt"),
        (line_with_cost("$xx$"), "bcrypt"),
        (line_with("$argon2id$"), "argon2id"),
        (line_with("$argon2id$v=19$m=256,t=2,p=1$c29tZXNhbHQ"), "argon2id"),
        (line_with("$argon2id$v=19$m=256,t=2,p=1"), "argon2id"),
        (line_with(&ARGON2ID.replace("m=256", "m=1")), "argon2id"),
        (line_with(&ARGON2ID.replace("t=2", "t=0")), "argon2id"),
        (line_with(&ARGON2ID.replace("p=1", "p=x")), "argon2id"),
        (line_with(&ARGON2ID.replace('+', "!").replace("nf65", "n!65")), "argon2id"),
        (format!("alice :{CRYPT_2B}"), "alice "),
        (format!("al\tice:{CRYPT_2B}"), "al\\tice"),
        (format!("al\u{1b}ice:{CRYPT_2B}"), "al\\u{1b}ice"),
        (format!("{}:{CRYPT_2B}", "a".repeat(256)), "aaaa"),
        (format!("first:{CRYPT_2B}"), "first"),
        // Entries with these costs would never accept a password.
        (line_with_cost("$00$"), "alice"),
        (line_with_cost("$03$"), "alice"),
        (line_with_cost("$32$"), "alice"),
        (line_with_cost("$99$"), "alice"),
        // Secrets in a wrong field.
        (HTPASSWD.into(), ""),
        (ARGON2ID.into(), ""),
        (format!("alice {HTPASSWD}"), ""),
        ("alice hunter2-hunter2".into(), ""),
        ("alice:$ecret-password".into(), ""),
        (format!("{HTPASSWD}:alice"), ""),
        (format!("{ARGON2ID}:alice"), ""),
    ]
}

/// Returns 8 consecutive characters of a hash or password that the message contains, if there are any.
fn leaked_part(message: &str, text: &str) -> Option<String> {
    let parts = text.split([':', '$', ' ', '\n']);
    let secrets = parts.filter(|part| !["argon2", "m=", "aaaa"].iter().any(|harmless| part.contains(harmless)));
    let windows = secrets.flat_map(|secret| {
        let characters: Vec<char> = secret.chars().collect();
        characters.windows(8).map(|window| window.iter().collect()).collect::<Vec<String>>()
    });
    windows.into_iter().find(|window| message.contains(window))
}

#[test]
fn error_names_first_invalid_line_and_word_without_hash() {
    for (bad, word) in bad_lines() {
        let text = format!("# a comment\r\n\r\nfirst:{CRYPT_2B}\n{bad}\nlast:{HTPASSWD}\nbob\n");
        let error = Users::parse(&text).expect_err(&bad);
        let shown = error.to_string();
        assert_eq!(error.line, 4, "{bad:?}: {shown}");
        assert!(shown.starts_with("line 4: ") && shown.contains(word), "{bad:?}: {shown}");
        assert!(!shown.contains(char::is_control), "{shown:?}");
        assert!(shown.len() < 120, "{} characters: {shown}", shown.len());
        assert_eq!(leaked_part(&shown, &bad), None, "{shown}");
    }
}

#[test]
fn debug_does_not_show_hash() {
    let shown = format!("{:#?}", users(&format!("alice:{ARGON2ID}\nbob:{HTPASSWD}")));
    assert_eq!((leaked_part(&shown, ARGON2ID), leaked_part(&shown, HTPASSWD)), (None, None), "{shown}");
}

#[test]
fn check_name_accepts_names_valid_in_file_and_login() {
    for name in ["a", "alice", "al ice", "zoë", "a#b", "a$b", "user@example.com", &"a".repeat(255)] {
        assert_eq!(check_name(name), Ok(()), "{name:?}");
        let users = users(&format!("{name}:{CRYPT_2B}\n"));
        assert!(users.contains(name.as_bytes()), "{name:?}");
    }
    let too_long = "ë".repeat(128);
    for name in [
        "",
        ":",
        "a:b",
        "a\nb",
        "a\0",
        "a\u{85}",
        " a",
        "a ",
        "a\u{a0}",
        "#a",
        "\u{feff}a",
        &"a".repeat(256),
        &too_long,
    ] {
        let error = check_name(name).expect_err(name);
        assert!(error.starts_with("user name ") && error.len() < 100 && !error.contains(char::is_control), "{error}");
    }
}

/// Returns the shortest time of each job. The jobs run alternately, so that a busy machine slows all of them alike.
fn shortest<const N: usize>(jobs: [&dyn Fn(); N]) -> [Duration; N] {
    let mut shortest = [Duration::MAX; N];
    for _ in 0..15 {
        for (job, shortest) in jobs.iter().zip(&mut shortest) {
            let started = Instant::now();
            job();
            *shortest = started.elapsed().min(*shortest);
        }
    }
    shortest
}

#[test]
fn verify_takes_as_long_for_unknown_user_or_refused_password_as_for_wrong_password() {
    for hash in [&argon2id(b"p4ssword", 256), HTPASSWD] {
        let users = users(&format!("alice:{hash}\nbob:{hash}\n"));
        let verify = |uname: &'static str, passwd: &'static [u8]| {
            let users = &users;
            move || assert!(!verify(users, uname.as_bytes(), passwd))
        };
        // bcrypt refuses the last two.
        let [known, others @ ..] = shortest([
            &verify("alice", b"wrong"),
            &verify("mallory", b"wrong"),
            &verify("", b"wrong"),
            &verify("alice", b"p4ssword\0"),
            &verify("alice", &[b'a'; 255]),
        ]);
        assert!(others.iter().all(|other| *other > known / 2), "{others:?} against {known:?}");
    }
}

#[test]
fn new_entry_verifies_its_password() {
    let line = new_entry("zoë", b"p\xff\0ss").expect("valid entry");
    assert!(line.starts_with("zoë:$argon2id$v=19$m=19456,t=2,p=1$") && !line.contains('\n'), "{line}");
    let users = users(&line);
    assert!(verify(&users, "zoë".as_bytes(), b"p\xff\0ss"));
    assert_ne!(new_entry("zoë", b"p\xff\0ss").expect("valid entry"), line, "the salt must be random");
}

#[test]
fn new_entry_rejects_invalid_name_or_password() {
    for (name, passwd) in
        [("", &b"p"[..]), ("a:b", b"p"), ("a\nb:c", b"p"), ("alice", b""), ("alice", &[b'p'; 256]), ("alice", b"ppp\n")]
    {
        let error = new_entry(name, passwd).expect_err("invalid entry");
        assert!(!error.contains("ppp") && !error.contains('\n'), "{error:?}");
    }
}

/// A line of a users file, with the user name if it is an entry.
#[derive(Clone, Debug)]
struct Line {
    owner: Option<String>,
    text: String,
}

fn join(lines: &[Line]) -> String {
    lines.iter().map(|line| line.text.as_str()).collect()
}

fn any_line() -> impl Strategy<Value = Line> {
    let user = ("[ \t]{0,2}", "[abB]{1,2}", "[ -~]{0,8}")
        .prop_map(|(indent, name, rest)| Line { text: format!("{indent}{name}:{rest}"), owner: Some(name) });
    let other = "[ \t]{0,2}(#[ -~é]{0,8})?|[ab]{1,3}".prop_map(|text| Line { text, owner: None });
    (prop_oneof![user, other], any::<bool>())
        .prop_map(|(line, is_windows)| Line { text: line.text + if is_windows { "\r\n" } else { "\n" }, ..line })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn edit_entry_replaces_appends_or_removes_and_keeps_all_other_lines(
        mut lines in vec(any_line(), 0..8),
        name in "[ab]{1,2}",
        is_removed: bool,
        is_cut: bool,
    ) {
        if let (Some(last), true) = (lines.last_mut(), is_cut) {
            last.text.truncate(last.text.trim_end_matches(['\r', '\n']).len());
        }
        let text = join(&lines);
        let new = format!("{name}:new");
        let edited = edit_entry(&text, &name, (!is_removed).then_some(&new));

        let is_entry = |line: &Line| line.owner.as_ref() == Some(&name);
        let index = lines.iter().position(is_entry);
        let mut expected = lines;
        expected.retain(|line| !is_entry(line));
        if !is_removed {
            if let (Some(last), None) = (expected.last_mut(), index) {
                let lacks_line_end = !last.text.is_empty() && !last.text.ends_with('\n');
                last.text.extend(lacks_line_end.then_some('\n'));
            }
            let line = Line { owner: Some(name), text: new + "\n" };
            expected.insert(index.unwrap_or(expected.len()), line);
        }
        prop_assert_eq!(edited, (index.is_some() || !is_removed).then(|| join(&expected)));
    }

    #[test]
    fn any_text_parses_or_fails_in_one_of_its_lines(text in "([ -~é#:$\t]{0,30}\r?\n){0,5}") {
        if let Err(error) = Users::parse(&text) {
            prop_assert!((1..=text.lines().count()).contains(&error.line));
            prop_assert!(!error.to_string().contains('\n'));
        }
        prop_assert_eq!(edit_entry(&text, "absent", None), None);
    }
}
