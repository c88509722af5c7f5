//! RFC 1929 logins: hashing off the executor, bounded by the number of cores, and remembered for a while.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use blake2::Blake2bMac512;
use blake2::digest::{KeyInit as _, Mac as _};
use smol::lock::{Mutex as AsyncMutex, Semaphore};

use crate::policy::users::Users;
use crate::proto::Credentials;

/// How long a password that was verified is taken without hashing it again.
const CACHE_TIME: Duration = Duration::from_secs(600);
/// Logins with the same credentials wait for each other's result in one of this many lines.
const QUEUES: usize = 64;

/// Remembers at most one digest a user, and nothing of names that are not users.
pub(super) struct PasswordVerifier {
    hashing: Arc<Semaphore>,
    queues: [AsyncMutex<()>; QUEUES],
    /// Keys the digests, so that what stays in memory is of no use elsewhere.
    mac_key: Option<[u8; 32]>,
    cache: Mutex<HashMap<Vec<u8>, (Digest, Instant)>>,
}

type Digest = [u8; 64];

impl Default for PasswordVerifier {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut key = [0; 32];
        Self {
            hashing: Arc::new(Semaphore::new(cores)),
            queues: [const { AsyncMutex::new(()) }; QUEUES],
            mac_key: getrandom::fill(&mut key).is_ok().then_some(key),
            cache: Mutex::default(),
        }
    }
}

impl fmt::Debug for PasswordVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PasswordVerifier(..)")
    }
}

impl PasswordVerifier {
    /// One that remembers nobody, and waits for the same cores.
    pub(super) fn with_empty_cache(&self) -> Self {
        Self { hashing: self.hashing.clone(), ..Self::default() }
    }

    /// Whether the credentials are those of a user. Of many logins with the same ones at once, one is hashed.
    pub(super) async fn verify(&self, users: &Arc<Users>, credentials: Credentials) -> bool {
        let Some(mac) = self.mac(&credentials) else {
            return self.verify_uncached(users, credentials).await;
        };
        let digest: Digest = mac.clone().finalize().into_bytes().into();
        if self.is_cached(&credentials.uname, mac.clone()) {
            return true;
        }
        let queue = digest.first().map_or(0, |byte| usize::from(*byte) % QUEUES);
        let _turn = match self.queues.get(queue) {
            Some(queue) => Some(queue.lock().await),
            None => None,
        };
        if self.is_cached(&credentials.uname, mac) {
            return true;
        }
        let uname = credentials.uname.clone();
        let valid = self.verify_uncached(users, credentials).await;
        if valid {
            self.cache().insert(uname, (digest, Instant::now()));
        }
        valid
    }

    async fn verify_uncached(&self, users: &Arc<Users>, credentials: Credentials) -> bool {
        let (users, permit) = (users.clone(), self.hashing.acquire_arc().await);
        smol::unblock(move || {
            // Held in here: a client that leaves does not stop the hash that it has caused.
            let _permit = permit;
            users.verify(&credentials.uname, &credentials.passwd)
        })
        .await
    }

    fn is_cached(&self, uname: &[u8], mac: Blake2bMac512) -> bool {
        let cached = self.cache().get(uname).copied();
        cached.is_some_and(|(digest, verified_at)| {
            verified_at.elapsed() < CACHE_TIME && mac.verify_slice(&digest).is_ok()
        })
    }

    fn mac(&self, credentials: &Credentials) -> Option<Blake2bMac512> {
        let mut mac = Blake2bMac512::new_from_slice(self.mac_key.as_ref()?).ok()?;
        mac.update(&[u8::try_from(credentials.uname.len()).ok()?]);
        mac.update(&credentials.uname);
        mac.update(&credentials.passwd);
        Some(mac)
    }

    fn cache(&self) -> std::sync::MutexGuard<'_, HashMap<Vec<u8>, (Digest, Instant)>> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alice(passwd: &str) -> Credentials {
        Credentials { uname: b"alice".to_vec(), passwd: passwd.into() }
    }

    #[test]
    fn a_login_is_hashed_once_and_a_wrong_password_is_never_remembered() {
        let line = crate::policy::users::new_entry("alice", b"secret").expect("a line");
        let users = Arc::new(Users::parse(&line).expect("users"));
        let passwords = PasswordVerifier::default();
        smol::block_on(async {
            assert!(!passwords.verify(&users, alice("wrong")).await);
            assert!(passwords.verify(&users, alice("secret")).await);
            assert!(!passwords.verify(&users, alice("wrong")).await);
            // The second time no hash is needed, which users without any show.
            let nobody = Arc::new(Users::default());
            assert!(passwords.verify(&nobody, alice("secret")).await);
            assert!(!passwords.verify(&nobody, alice("wrong")).await);
        });
    }
}
