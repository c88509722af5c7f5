//! `--users`: logins (RFC 1929) end to end, their cache and their CPU time. tests/wire has the messages.

use crate::*;

#[test]
fn only_exact_credentials_open_a_session() {
    let [alice, bob] = [("alice", "secret"), ("bob", "pa ss:w\u{f6}rd")];
    let (_dir, users) = users_file(&[alice, bob]);
    let server = Server::start(&["--users", &users]);
    let wrong: [(&[u8], &[u8]); 5] = [
        (b"alice", b"wrong"),
        (b"alice", "pa ss:w\u{f6}rd".as_bytes()),
        (b"mallory", b"secret"),
        (b"alicea", b"secret"),
        (b"alice", b"Secret"),
    ];
    // In the second round the passwords are cached.
    for _ in 0..2 {
        for (uname, passwd) in wrong {
            let (mut stream, status) = log_in(&server, unused_client_ip(), uname, passwd);
            let case = (uname.escape_ascii(), passwd.escape_ascii());
            assert_ne!(status, 0, "{case:?}");
            assert_eq!(stream_end(&mut stream), StreamEnd::Closed(vec![]), "{case:?}");
        }
        for user in [alice, bob] {
            let (mut stream, rep) = open_with_login(&server, user, CONNECT, echo_server());
            assert_eq!(rep, 0);
            ping(&mut stream, b"hello");
        }
    }
}

/// Adds alice with the default hash, which takes long.
fn slow_users_file() -> (TempDir, String) {
    let dir = temp_dir();
    let users = format!("{}/users", dir.path().display());
    let output = run(s5().args(["serve", "--users", &users, "--add-user", "alice"]), b"secret\n", TIMEOUT);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    (dir, users)
}

#[test]
fn concurrent_logins_of_one_user_compute_one_hash() {
    const LOGINS: usize = 500;
    let (_dir, users) = slow_users_file();
    let cost_of = |logins: usize| {
        let server = Server::start(&["--users", &users]);
        let before = server.cpu_seconds();
        thread::scope(|scope| {
            for _ in 0..10 {
                // Each thread sends all of its logins before it reads the first answer.
                scope.spawn(|| {
                    let mut streams: Vec<TcpStream> = (0..logins.div_ceil(10)).map(|_| server.connect()).collect();
                    for stream in &mut streams {
                        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("timeout set");
                        let all = [vec![5, 1, 2], login_message(b"alice", b"secret")].concat();
                        stream.write_all(&all).expect("data sent");
                    }
                    for stream in &mut streams {
                        assert_eq!(read_exact(stream, 4), [5, 2, 1, 0]);
                    }
                });
            }
        });
        server.cpu_seconds() - before
    };
    let (few, many) = (cost_of(10), cost_of(LOGINS));
    // 490 more sessions need no further hash. One hash for each would take a hundred times as long.
    assert!(many < 3.0 * few + 1.0, "{few} s of CPU for 10, {many} s for {LOGINS}");
}

#[test]
fn password_hashing_does_not_delay_tunnels() {
    let (_dir, users) = slow_users_file();
    let server = Server::start(&["--users", &users, "--threads", "1", "--handshake-timeout", "60"]);
    let (mut stream, rep) = open_with_login(&server, ("alice", "secret"), CONNECT, echo_server());
    assert_eq!(rep, 0);
    let mut guessing: Vec<TcpStream> = (0..20).map(|_| server.connect()).collect();
    for (n, guess) in (0..20_u8).zip(&mut guessing) {
        let all = [vec![5, 1, 2], login_message(b"alice", &[b'x', n])].concat();
        guess.write_all(&all).expect("data sent");
        assert_eq!(read_exact(guess, 2), [5, 2]);
    }
    let fastest = fastest(|| ping(&mut stream, b"hello"));
    // A hash on the executor would take longer than this in a debug build.
    assert!(fastest < Duration::from_millis(50), "{fastest:?}");
}
