//! Memory of logins: a hash needs 19 MiB, and a server keeps none of it.

use argon2::password_hash::PasswordHasher as _;
use argon2::password_hash::phc::PasswordHash;
use argon2::{Algorithm, Argon2, Params, Version};

use crate::*;

/// Maximum number of hashes at a time.
const MAX_HASHES: usize = 8;
/// Memory of the largest hash of these tests in KiB.
const LARGE_KIB: u32 = 40 << 10;
/// Memory in KiB that the server may have in addition after the logins.
const TOLERANCE_KIB: usize = 2048;

/// Hashes "secret" with argon2id. `cost` is the memory in KiB.
fn hash(cost: u32) -> String {
    let params = Params::new(cost, 2, 1, None).expect("valid parameters");
    let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
    let hash: PasswordHash = argon2.hash_password(b"secret").expect("password hashed");
    hash.to_string()
}

/// A users file with 40 users: most hashes are those of --add-user, some need more memory, some are of bcrypt.
pub fn users_text() -> String {
    let (usual, large) = (hash(Params::DEFAULT_M_COST), hash(LARGE_KIB));
    let line = |n| match n % 10 {
        0 => format!("user{n}:{large}\n"),
        1 => bcrypt_line(&format!("user{n}"), "secret", 4),
        _ => format!("user{n}:{usual}\n"),
    };
    (0..40).map(line).collect()
}

/// Starts a login from an address of its own.
fn start_login(server: &Server, n: usize, passwd: &[u8]) -> TcpStream {
    let mut stream = connect_from_ip(server, unused_client_ip());
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("timeout set");
    select_password(&mut stream);
    stream.write_all(&login_message(format!("user{n}").as_bytes(), passwd)).expect("login sent");
    stream
}

/// Reads the answer to a login. Returns whether it was accepted.
fn is_accepted(mut stream: TcpStream) -> bool {
    let answer = read_exact(&mut stream, 2);
    answer[1] == 0
}

#[test]
fn memory_of_hashes_is_bounded_and_freed_after_the_logins() {
    let _machine = lock_machine();
    let dir = temp_dir();
    let users = write_file(dir.path(), "users", &users_text());
    let server = Server::start(&["--users", &users, "--handshake-timeout", "60"]);
    let private_kib = || proc_kib(&server, "smaps_rollup", "Private_Dirty");
    let before = private_kib();
    let wait_freed = |what: &str| {
        let mut kib = 0;
        wait_until(&format!("memory freed after {what}"), TIMEOUT, || {
            kib = private_kib();
            kib <= before + TOLERANCE_KIB
        });
        eprintln!("private memory: {before} KiB at the start, {kib} KiB after {what}");
    };

    for (what, passwd) in [("40 wrong logins at once", &b"wrong"[..]), ("40 right logins at once", b"secret")] {
        let logins: Vec<TcpStream> = (0..40).map(|n| start_login(&server, n, passwd)).collect();
        assert!(logins.into_iter().all(|login| is_accepted(login) == (passwd == b"secret")), "{what}");
        wait_freed(what);
    }
    for n in 0..30 {
        assert!(!is_accepted(start_login(&server, n, b"wrong")), "login {n}");
    }
    wait_freed("30 logins, one after the other");

    let cores = thread::available_parallelism().map_or(1, usize::from);
    let hashes = cores.min(MAX_HASHES) * usize::try_from(LARGE_KIB).expect("32 bits");
    let peak = proc_kib(&server, "status", "VmHWM");
    eprintln!("peak: {peak} KiB, hashes: {hashes} KiB");
    assert!(peak <= before + hashes + 16_384, "peak of {peak} KiB, {hashes} KiB for hashes");
}

#[test]
fn hash_of_a_login_that_has_timed_out_is_not_computed() {
    const LOGINS: u8 = 200;
    // On one core, so that few hashes can begin before the timeout.
    enter_namespace!("", "");
    crate::bystanders::choose_core(true);
    let _machine = lock_machine();
    let dir = temp_dir();
    let users = write_file(dir.path(), "users", &bcrypt_line("user0", "secret", 11));
    let server = Server::start(&["--users", &users, "--handshake-timeout", "1s"]);
    let start = server.cpu_seconds();
    assert!(!is_accepted(start_login(&server, 0, b"wrong")));
    let one_hash = server.cpu_seconds() - start;
    let logins: Vec<TcpStream> = (0..LOGINS).map(|n| start_login(&server, 0, &[b'x', n])).collect();
    server.wait_log(|log| log.matches("msg=session").count() > usize::from(LOGINS));
    drop(logins);
    // Waits for the hashes that have begun, and for no others: one after them must end before the timeout too.
    let is_answered = || start_login(&server, 0, b"secret").read_exact(&mut [0; 2]).is_ok();
    wait_until("all hashes have ended", LONG_TIMEOUT, is_answered);
    let cpu = server.cpu_seconds() - start;
    eprintln!("CPU time: one hash {one_hash} s, all {cpu} s");
    assert!(cpu < one_hash * f64::from(LOGINS) / 2.0, "one hash {one_hash} s, all {cpu} s");
}

#[test]
fn only_one_large_hash_is_computed_at_a_time() {
    const KIB: u32 = 160 << 10;
    let _machine = lock_machine();
    let (dir, line) = (temp_dir(), hash(KIB));
    let users = write_file(dir.path(), "users", &format!("user0:{line}\n"));
    let server = Server::start(&["--users", &users, "--handshake-timeout", "60"]);
    let before = proc_kib(&server, "status", "VmRSS");
    let logins: Vec<TcpStream> = (0..4).map(|n| start_login(&server, 0, &[b'x', n])).collect();
    assert!(!logins.into_iter().any(is_accepted));
    let peak = proc_kib(&server, "status", "VmHWM") - before;
    assert!(peak <= usize::try_from(KIB).expect("32 bits") + 16_384, "peak of {peak} KiB");
}

#[test]
fn hash_of_a_login_whose_client_has_left_is_not_computed() {
    const LOGINS: u8 = 100;
    let _machine = lock_machine();
    let dir = temp_dir();
    let users = write_file(dir.path(), "users", &bcrypt_line("user0", "secret", 12));
    let server = Server::start(&["--users", &users, "--handshake-timeout", "60"]);
    let start = server.cpu_seconds();
    assert!(!is_accepted(start_login(&server, 0, b"wrong")));
    let one_hash = server.cpu_seconds() - start;
    (0..LOGINS).for_each(|n| reset(start_login(&server, 0, &[b'x', n])));
    server.wait_log(|log| log.matches("msg=session").count() > usize::from(LOGINS));
    // Waits for the hashes that have begun, and for no others.
    assert!(is_accepted(start_login(&server, 0, b"secret")));
    let cpu = server.cpu_seconds() - start;
    eprintln!("CPU time: one hash {one_hash} s, all {cpu} s");
    assert!(cpu < one_hash * f64::from(LOGINS) / 4.0, "one hash {one_hash} s, all {cpu} s");
}
