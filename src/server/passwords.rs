//! Verifies passwords (RFC 1929). Hashing runs on threads of its own. Valid passwords are cached.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use blake2::Blake2bMac512;
use blake2::digest::{KeyInit as _, Mac as _};
use smol::lock::Mutex as AsyncMutex;

use crate::net::ThreadPool;
use crate::policy::users::{HashMemory, Users};
use crate::proto::Credentials;

/// Time that a verified password is accepted without another hash.
const CACHE_TIME: Duration = Duration::from_secs(600);
/// Number of queues. Logins with the same credentials wait in the same queue, so that only the first one is hashed.
const QUEUES: usize = 64;
/// Maximum number of threads, also with more cores: with the hashes of `--add-user`, they take 152 MiB.
const MAX_THREADS: usize = 8;

/// At most one thread per core. Each has the memory of one hash, which is freed when the thread ends.
static THREADS: LazyLock<ThreadPool<HashMemory>> = LazyLock::new(|| {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    ThreadPool::new("s5-hash", cores.min(MAX_THREADS))
});

/// Verifies passwords. The cache has at most one entry per user, and none for unknown names or wrong passwords.
pub(super) struct PasswordVerifier {
    queues: [AsyncMutex<()>; QUEUES],
    /// Random key of the cached digests, which are useless outside of this process. `None`: nothing is cached.
    mac_key: Option<[u8; 32]>,
    cache: Mutex<HashMap<Vec<u8>, (Digest, Instant)>>,
}

type Digest = [u8; 64];

impl Default for PasswordVerifier {
    fn default() -> Self {
        let mut key = [0; 32];
        Self {
            queues: [const { AsyncMutex::new(()) }; QUEUES],
            mac_key: getrandom::fill(&mut key).is_ok().then_some(key),
            cache: Mutex::default(),
        }
    }
}

impl PasswordVerifier {
    /// Returns whether `users` has these credentials. Concurrent logins with the same ones cost one hash.
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
        let is_valid = self.verify_uncached(users, credentials).await;
        if is_valid {
            self.cache().insert(uname, (digest, Instant::now()));
        }
        is_valid
    }

    async fn verify_uncached(&self, users: &Arc<Users>, credentials: Credentials) -> bool {
        let users = users.clone();
        let verify = move |memory: &mut _| users.verify(&credentials.uname, &credentials.passwd, memory);
        // If no thread can be started, this worker computes the hash: otherwise a valid password would be refused, and
        // would count as a guess.
        THREADS.run(verify.clone()).await.unwrap_or_else(|| verify(&mut HashMemory::default()))
    }

    fn is_cached(&self, uname: &[u8], mac: Blake2bMac512) -> bool {
        let cached = self.cache().get(uname).copied();
        cached.is_some_and(|(digest, since)| since.elapsed() < CACHE_TIME && mac.verify_slice(&digest).is_ok())
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
