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
const REMEMBERED: Duration = Duration::from_secs(600);
/// Logins with the same credentials wait for each other's result in one of this many lines.
const LINES: usize = 64;

/// Remembers at most one digest a user, and nothing of names that are not users.
pub(super) struct Login {
    hashing: Arc<Semaphore>,
    lines: [AsyncMutex<()>; LINES],
    /// Keys the digests, so that what stays in memory is of no use elsewhere.
    key: Option<[u8; 32]>,
    verified: Mutex<HashMap<Vec<u8>, (Digest, Instant)>>,
}

type Digest = [u8; 64];

impl Default for Login {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut key = [0; 32];
        Self {
            hashing: Arc::new(Semaphore::new(cores)),
            lines: [const { AsyncMutex::new(()) }; LINES],
            key: getrandom::fill(&mut key).is_ok().then_some(key),
            verified: Mutex::default(),
        }
    }
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Login(..)")
    }
}

impl Login {
    /// One that remembers nobody, and waits for the same cores.
    pub(super) fn afresh(&self) -> Self {
        Self { hashing: self.hashing.clone(), ..Self::default() }
    }

    /// Whether the credentials are those of a user. Of many logins with the same ones at once, one is hashed.
    pub(super) async fn verify(&self, users: &Arc<Users>, credentials: Credentials) -> bool {
        let Some(mac) = self.mac(&credentials) else {
            return self.hash(users, credentials).await;
        };
        let digest: Digest = mac.clone().finalize().into_bytes().into();
        if self.remembers(&credentials.uname, mac.clone()) {
            return true;
        }
        let line = digest.first().map_or(0, |octet| usize::from(*octet) % LINES);
        let _turn = match self.lines.get(line) {
            Some(line) => Some(line.lock().await),
            None => None,
        };
        if self.remembers(&credentials.uname, mac) {
            return true;
        }
        let uname = credentials.uname.clone();
        let valid = self.hash(users, credentials).await;
        if valid {
            self.lock().insert(uname, (digest, Instant::now()));
        }
        valid
    }

    async fn hash(&self, users: &Arc<Users>, credentials: Credentials) -> bool {
        let (users, permit) = (users.clone(), self.hashing.acquire_arc().await);
        smol::unblock(move || {
            // Held in here: a client that leaves does not stop the hash that it has caused.
            let _permit = permit;
            users.verify(&credentials.uname, &credentials.passwd)
        })
        .await
    }

    fn remembers(&self, uname: &[u8], mac: Blake2bMac512) -> bool {
        let known = self.lock().get(uname).copied();
        known.is_some_and(|(digest, since)| since.elapsed() < REMEMBERED && mac.verify_slice(&digest).is_ok())
    }

    fn mac(&self, credentials: &Credentials) -> Option<Blake2bMac512> {
        let mut mac = Blake2bMac512::new_from_slice(self.key.as_ref()?).ok()?;
        mac.update(&[u8::try_from(credentials.uname.len()).ok()?]);
        mac.update(&credentials.uname);
        mac.update(&credentials.passwd);
        Some(mac)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Vec<u8>, (Digest, Instant)>> {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner)
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
        let login = Login::default();
        smol::block_on(async {
            assert!(!login.verify(&users, alice("wrong")).await);
            assert!(login.verify(&users, alice("secret")).await);
            assert!(!login.verify(&users, alice("wrong")).await);
            // The second time no hash is needed, which users without any show.
            let nobody = Arc::new(Users::default());
            assert!(login.verify(&nobody, alice("secret")).await);
            assert!(!login.verify(&nobody, alice("wrong")).await);
        });
    }
}
