//! The GSSAPI binding with the system's library and a KDC in a temporary realm. Initiator and acceptor are in one
//! process. Covers protection, order of messages, invalid tokens and names, and the release of all objects.
//!
//! The environment selects the realm, so the tests of `in_realm` run in a process with that environment.

mod in_realm;

use crate::support::realm::{DEFAULT_ENCTYPE, Realm, can_start};
use crate::*;

/// Runs the tests of `in_realm`, as arguments of `program` if it is given.
fn run_in(realm: &Realm, program: Option<&mut Command>) {
    let this = std::env::current_exe().expect("path of this test");
    let mut new = Command::new(&this);
    let command = program.map_or(&mut new, |program| program.arg(&this));
    command.args(["gssapi_ffi::in_realm::", "--ignored", "--test-threads=1"]);
    let output = run(realm.env(command), b"", Duration::from_secs(300));
    let printed = text(&output.stdout) + &text(&output.stderr);
    assert!(output.status.success() && !printed.contains(" 0 passed"), "{printed}");
}

#[test]
fn binding_works_with_two_ciphers() {
    for enctype in [DEFAULT_ENCTYPE, "aes256-cts-hmac-sha384-192"] {
        if can_start() {
            run_in(&Realm::with(enctype), None);
        }
    }
}

#[test]
fn valgrind_finds_no_leaks_or_invalid_reads() {
    if !is_installed("valgrind") || !can_start() {
        return;
    }
    let realm = Realm::start();
    let mut command = Command::new("valgrind");
    // MIT's library leaks a principal if its key is missing. In s5 this happens only once, at the start of a server.
    let suppressions = "{\n  missing key\n  Memcheck:Leak\n  match-leak-kinds: definite\n  fun:malloc\n  \
                 fun:krb5_build_principal_alloc_va\n  fun:krb5_build_principal\n  ...\n  fun:gss_add_cred_from\n}\n";
    let suppressions = write_file(&realm.file(""), "valgrind.supp", suppressions);
    command.arg(format!("--suppressions={suppressions}"));
    command.args(["--leak-check=full", "--errors-for-leak-kinds=definite", "--error-exitcode=99", "--num-callers=30"]);
    run_in(&realm, Some(&mut command));
}
