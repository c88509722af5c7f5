//! Limits per client and per user, throttling of password guesses, and escaping of client data in the log.

#![allow(unused_qualifications, reason = "the names of std that support exports may be written with their path")]

mod attempts;
mod bystanders;
mod fail2ban;
mod fair_shares;
mod log_escaping;
mod log_shares;
mod login_memory;
mod lookups;
mod password_guessing;
mod ports;
mod rate_limit;
mod restart;
mod session_limits;
mod slow_handshakes;
#[path = "../support/mod.rs"]
mod support;

use std::fs::File;

use rustix::fs::{FlockOperation, flock};

use support::*;

/// Held by tests that measure times or load the whole machine, because they would disturb each other. It is the lock of
/// a file, because each test in a namespace is a process of its own.
fn lock_machine() -> File {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("limits.lock");
    let file = File::create(path).expect("lock file created");
    retry(|| Ok(flock(&file, FlockOperation::LockExclusive)?)).expect("locked");
    file
}

/// Runs a measurement up to three times until it succeeds, because other programs may disturb it.
fn try_three_times(mut attempt: impl FnMut() -> Result<(), String>) {
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
