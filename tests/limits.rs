//! The limits per client and per user, the throttling of password guesses, and the escaping of client data in the log.

mod common;
mod kit;

#[path = "limits/fail2ban.rs"]
mod fail2ban;
#[path = "limits/log_escaping.rs"]
mod log_escaping;
#[path = "limits/password_guessing.rs"]
mod password_guessing;
#[path = "limits/rate_limit.rs"]
mod rate_limit;
#[path = "limits/session_limits.rs"]
mod session_limits;
#[path = "limits/slow_handshakes.rs"]
mod slow_handshakes;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks the machine for tests that measure it or load all of it; they would disturb each other.
fn lock_machine() -> MutexGuard<'static, ()> {
    static MACHINE: Mutex<()> = Mutex::new(());
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Repeats a measurement up to twice after a failure, because other programs may disturb it.
fn best_of_three(attempt: impl Fn() -> Result<(), String>) {
    let mut errors = Vec::new();
    while let Err(error) = attempt() {
        eprintln!("attempt failed: {error}");
        errors.push(error);
        assert!(errors.len() < 3, "{errors:#?}");
    }
}

/// Returns the error unless the condition holds.
fn ensure(is_true: bool, error: impl FnOnce() -> String) -> Result<(), String> {
    if is_true { Ok(()) } else { Err(error()) }
}
