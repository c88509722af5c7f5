//! `--users`: accepted and refused logins (RFC 1929), and their CPU time.

use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;
use std::time::Duration;

use crate::support::login::{login_message, users_file};
use crate::support::{
    CONNECT, Server, StreamEnd, TIMEOUT, connect_from, echo_server, fastest, ping, read_exact, read_reply, request,
    run, s5, stream_end, temp_dir,
};

/// Connects from an unused address, because answers to an address are delayed after failed logins.
fn connect_from_unused_ip(server: &Server) -> TcpStream {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let [high, low] = NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    connect_from(SocketAddr::from(([127, 1, high, low], 0)), server.addr())
}

/// Logs in. Returns the connection and STATUS.
fn login(server: &Server, uname: &[u8], passwd: &[u8]) -> (TcpStream, u8) {
    let mut stream = connect_from_unused_ip(server);
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("timeout set");
    stream.write_all(&[5, 2, 0, 2]).expect("greeting sent");
    assert_eq!(read_exact(&mut stream, 2), [5, 2], "the server must not select NO AUTHENTICATION");
    stream.write_all(&login_message(uname, passwd)).expect("login sent");
    let status = read_exact(&mut stream, 2);
    assert_eq!(status[0], 1);
    (stream, status[1])
}

fn assert_refused(server: &Server, uname: &[u8], passwd: &[u8]) {
    let (mut stream, status) = login(server, uname, passwd);
    let case = (uname.escape_ascii(), passwd.escape_ascii());
    assert_ne!(status, 0, "{case:?}");
    assert_eq!(stream_end(&mut stream), StreamEnd::Closed(vec![]), "{case:?}");
}

#[test]
fn login_with_correct_credentials_succeeds() {
    // bcrypt allows passwords of 72 bytes.
    let (longest_name, longest_password) = ("n".repeat(255), "p".repeat(72));
    let (_dir, users) = users_file(&[("alice", "secret"), ("bob", "pa ss:wörd"), (&longest_name, &longest_password)]);
    let server = Server::start(&["--users", &users]);
    let dst = echo_server();
    for (uname, passwd) in [("alice", "secret"), ("bob", "pa ss:wörd"), (&longest_name, &longest_password)] {
        let (mut stream, status) = login(&server, uname.as_bytes(), passwd.as_bytes());
        assert_eq!(status, 0, "{uname}");
        stream.write_all(&request(CONNECT, dst)).expect("request sent");
        assert_eq!(read_reply(&mut stream).0, 0);
        ping(&mut stream, b"hello");
    }
}

#[test]
fn login_with_any_deviation_is_refused() {
    let (_dir, users) = users_file(&[("alice", "secret"), ("bob", "other")]);
    let server = Server::start(&["--users", &users]);
    // In the second round the password of alice is cached.
    for _ in 0..2 {
        let wrong: [(&[u8], &[u8]); 16] = [
            (b"alice", b"wrong"),
            (b"alice", b"other"),
            (b"mallory", b"secret"),
            (b"alice\0", b"secret"),
            (b"alice", b"secret\0"),
            (b"alice", b"secret\0secret"),
            (b"alic", b"secret"),
            (b"alicea", b"secret"),
            (b"alice", b"secre"),
            (b"alice", b"secrets"),
            (b"Alice", b"secret"),
            (b"alice", b"Secret"),
            (b" alice", b"secret"),
            (b"alices", b"ecret"),
            (b"\xFF\xFE", b"secret"),
            (&[b'a'; 255], &[b'p'; 255]),
        ];
        for (uname, passwd) in wrong {
            assert_refused(&server, uname, passwd);
        }
        assert_eq!(login(&server, b"alice", b"secret").1, 0);
    }
}

#[test]
fn login_with_empty_name_or_password_is_refused() {
    let (_dir, users) = users_file(&[("alice", "secret")]);
    let server = Server::start(&["--users", &users]);
    assert_refused(&server, b"alice", b"");
    let mut stream = server.connect();
    stream.write_all(&[5, 1, 2, 1, 0]).expect("data sent");
    assert_eq!(stream_end(&mut stream), StreamEnd::Closed(vec![5, 2, 1, 1]));
}

#[test]
fn users_file_disables_no_authentication() {
    let (_dir, users) = users_file(&[("alice", "secret")]);
    let server = Server::start(&["--users", &users]);
    let offers: [&[u8]; 4] = [&[5, 1, 0], &[5, 2, 0, 1], &[5, 1, 0x80], &[5, 3, 0, 0, 0]];
    for offer in offers {
        let mut stream = server.connect();
        // The request after the greeting must not be answered.
        stream.write_all(&[offer, &request(CONNECT, echo_server())].concat()).expect("data sent");
        assert_eq!(stream_end(&mut stream), StreamEnd::Closed(vec![5, 0xFF]), "{offer:?}");
    }
    // A request after a wrong password must not be answered either.
    let mut stream = server.connect();
    let all = [vec![5, 1, 2], login_message(b"alice", b"wrong"), request(CONNECT, echo_server())].concat();
    stream.write_all(&all).expect("data sent");
    assert_eq!(stream_end(&mut stream), StreamEnd::Closed(vec![5, 2, 1, 1]));
}

#[test]
fn empty_users_file_refuses_every_login() {
    let (_dir, users) = users_file(&[]);
    let server = Server::start(&["--users", &users]);
    assert_refused(&server, b"alice", b"secret");
    assert!(server.log().contains("no users"));
}

#[test]
fn argon2_password_of_255_bytes_is_compared_whole() {
    let dir = temp_dir();
    let users = dir.path().join("users");
    let users = users.to_str().expect("UTF-8 path");
    let long = "p".repeat(255);
    add_user(users, "alice", &long);
    let server = Server::start(&["--users", users]);
    assert_refused(&server, b"alice", &long.as_bytes()[..254]);
    let mut other = long.clone().into_bytes();
    other[254] = b'q';
    assert_refused(&server, b"alice", &other);
    assert_eq!(login(&server, b"alice", long.as_bytes()).1, 0);
}

fn add_user(file: &str, name: &str, passwd: &str) {
    let mut command = s5();
    command.args(["serve", "--users", file, "--add-user", name]);
    let output = run(&mut command, format!("{passwd}\n").as_bytes(), TIMEOUT);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn concurrent_logins_of_one_user_compute_one_hash() {
    const LOGINS: usize = 500;
    let dir = temp_dir();
    let users = dir.path().join("users");
    let users = users.to_str().expect("UTF-8 path");
    add_user(users, "alice", "secret");
    let cost_of = |logins: usize| {
        let server = Server::start(&["--users", users]);
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
    let dir = temp_dir();
    let users = dir.path().join("users");
    let users = users.to_str().expect("UTF-8 path");
    add_user(users, "alice", "secret");
    let server = Server::start(&["--users", users, "--threads", "1", "--handshake-timeout", "60"]);
    let (mut stream, status) = login(&server, b"alice", b"secret");
    assert_eq!(status, 0);
    stream.write_all(&request(CONNECT, echo_server())).expect("request sent");
    assert_eq!(read_reply(&mut stream).0, 0);
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
