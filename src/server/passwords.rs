//! Passwords that were verified lately. Their users log in at once, without a hash.

use std::collections::HashMap;
use std::hash::BuildHasher as _;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use blake2::Blake2bMac512;
use blake2::digest::{KeyInit as _, Mac as _};

use super::shares::{ClientKey, lock};
use crate::proto::Credentials;

/// Time that a verified password is accepted without another hash.
const CACHE_TIME: Duration = Duration::from_secs(600);
/// Maximum number of wrong passwords that are compared with a verified one, and the least time between two of them.
/// They would be free guesses for a program at the address of the user; further ones are hashed.
const MAX_MISMATCHES: u32 = 60;
const MISMATCH_INTERVAL: Duration = Duration::from_millis(100);
/// Length of a stored digest.
const DIGEST_LEN: usize = 16;
/// Maximum number of entries. The oldest one is evicted first.
const MAX_ENTRIES: usize = 16_384;

/// User name and password of a client.
pub(super) struct Login {
    pub(super) client: ClientKey,
    pub(super) credentials: Credentials,
}

/// Overwrites the password, so that it does not stay in memory.
impl Drop for Credentials {
    fn drop(&mut self) {
        self.passwd.fill(0);
        // The compiler could leave out a write that nothing reads.
        std::hint::black_box(&self.passwd);
    }
}

/// The passwords verified lately, by hash of client address and user. Small, because there are many.
pub(super) struct VerifiedPasswords {
    /// Random key of the digests, which are useless outside of this process. `None` without random numbers: then
    /// nothing is stored.
    mac: Option<Blake2bMac512>,
    entries: Mutex<HashMap<u64, Verified>>,
}

struct Verified {
    /// Of client address, user and password, so that logins with the same hash are told apart.
    digest: [u8; DIGEST_LEN],
    since: Instant,
    mismatches: u32,
    last_mismatch: Option<Instant>,
}

impl Default for VerifiedPasswords {
    fn default() -> Self {
        let mut key = [0; 32];
        let key = getrandom::fill(&mut key).map(|()| key);
        Self { mac: key.ok().and_then(|key| Blake2bMac512::new_from_slice(&key).ok()), entries: Mutex::default() }
    }
}

impl VerifiedPasswords {
    /// Returns whether this password of this user was verified lately, from the same address. `is_free`: the login has
    /// not waited for a turn, so the number of wrong passwords is limited.
    pub(super) fn contains(&self, login: &Login, is_free: bool, now: Instant) -> bool {
        let mut entries = lock(&self.entries);
        let key = entries.hasher().hash_one((login.client, &login.credentials.uname));
        let Some(verified) = entries.get_mut(&key).filter(|verified| !verified.is_expired(now)) else { return false };
        let waits = |last| now.saturating_duration_since(last) < MISMATCH_INTERVAL;
        if is_free && (verified.mismatches >= MAX_MISMATCHES || verified.last_mismatch.is_some_and(waits)) {
            return false;
        }
        let is_same = self.mac(login).is_some_and(|mac| mac.verify_truncated_left(&verified.digest).is_ok());
        if is_free && !is_same {
            verified.mismatches += 1;
            verified.last_mismatch = Some(now);
        }
        is_same
    }

    /// Adds a password that was verified now.
    pub(super) fn insert(&self, login: &Login, now: Instant) {
        let Some(mac) = self.mac(login) else { return };
        let mut entries = lock(&self.entries);
        if entries.len() >= MAX_ENTRIES {
            entries.retain(|_, verified| !verified.is_expired(now));
            let oldest = entries.iter().min_by_key(|(_, verified)| verified.since).map(|(key, _)| *key);
            oldest.filter(|_| entries.len() >= MAX_ENTRIES).map(|oldest| entries.remove(&oldest));
        }
        let digest = mac.finalize().into_bytes();
        let Some((digest, _)) = digest.split_first_chunk() else { return };
        let verified = Verified { digest: *digest, since: now, mismatches: 0, last_mismatch: None };
        let key = entries.hasher().hash_one((login.client, &login.credentials.uname));
        entries.insert(key, verified);
    }

    fn mac(&self, login: &Login) -> Option<Blake2bMac512> {
        let Credentials { uname, passwd } = &login.credentials;
        let mac = self.mac.clone()?.chain_update(uname.len().to_ne_bytes()).chain_update(uname);
        Some(mac.chain_update(passwd.len().to_ne_bytes()).chain_update(passwd).chain_update(login.client.to_string()))
    }
}

impl Verified {
    fn is_expired(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) >= CACHE_TIME
    }
}

#[cfg(test)]
mod tests {
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
}
