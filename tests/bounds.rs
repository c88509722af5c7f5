//! What one client, one user and one guesser may take up of a server, and what he may write into its log.

mod common;
mod kit;

#[path = "bounds/fail2ban.rs"]
mod fail2ban;
#[path = "bounds/handshakes.rs"]
mod handshakes;
#[path = "bounds/log.rs"]
mod log;
#[path = "bounds/logins.rs"]
mod logins;
#[path = "bounds/rate.rs"]
mod rate;
#[path = "bounds/shares.rs"]
mod shares;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Held by tests that measure, and by those that need all of the machine: each would spoil the other.
fn machine() -> MutexGuard<'static, ()> {
    static MACHINE: Mutex<()> = Mutex::new(());
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// On a machine that is busy otherwise, only the best of three attempts says something.
fn best_of_three(attempt: impl Fn() -> Result<(), String>) {
    let mut said = Vec::new();
    while let Err(why) = attempt() {
        eprintln!("not so: {why}");
        said.push(why);
        assert!(said.len() < 3, "{said:#?}");
    }
}

/// What is wrong, unless something is so.
fn ensure(is_so: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if is_so { Ok(()) } else { Err(what()) }
}
