//! Unit tests of the private items of `src/server/passwords.rs`.

use super::*;

#[test]
fn wrong_passwords_are_compared_60_times_at_most_and_not_in_a_burst() {
    let (verified, start) = (VerifiedPasswords::default(), Instant::now());
    let login = |passwd: &[u8]| {
        let credentials = Credentials { uname: b"alice".into(), passwd: passwd.into() };
        Login { client: ClientKey::new(None), credentials }
    };
    verified.insert(&login(b"secret"), start);
    let is_verified = |n| verified.contains(&login(b"secret"), true, start + MISMATCH_INTERVAL * n);
    for n in 0..MAX_MISMATCHES {
        assert!(is_verified(n), "{n}");
        assert!(!verified.contains(&login(b"wrong"), true, start + MISMATCH_INTERVAL * n));
        assert!(!is_verified(n), "compared at once after a mismatch");
    }
    assert!(!is_verified(MAX_MISMATCHES));
    assert!(verified.contains(&login(b"secret"), false, start), "with a turn");
    assert!(!verified.contains(&login(b"secret"), false, start + CACHE_TIME));
}
