//! Addresses that the server can and cannot listen on, and its output.

use std::net::TcpListener;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use crate::support::scripted::text;
use crate::support::{Server, TIMEOUT, run, s5, temp_dir, wait_until, write_file};

/// Fails unless `s5 serve --listen` exits with 1 and prints only one line, on stderr, that contains all words.
fn assert_listen_error(listen: &str, words: &[&str]) {
    let output = run(s5().args(["serve", "--listen", listen]), b"", TIMEOUT);
    let stderr = text(&output.stderr);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{listen}: {stderr}");
    assert!(stderr.starts_with("s5: ") && stderr.lines().count() == 1, "{stderr}");
    for word in words {
        assert!(stderr.contains(word), "{word:?} is missing in: {stderr}");
    }
}

fn is_socket(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}

#[test]
fn error_names_port_in_use() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("free port");
    let addr = taken.local_addr().expect("local address").to_string();
    assert_listen_error(&addr, &[&addr, "in use"]);
}

#[test]
fn error_names_address_of_another_machine() {
    assert_listen_error("192.0.2.1:0", &["192.0.2.1:0"]);
}

#[test]
fn server_does_not_start_if_one_address_fails() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("free port");
    let addr = taken.local_addr().expect("local address").to_string();
    let output = run(s5().args(["serve", "--listen", "127.0.0.1:0", "--listen", &addr]), b"", TIMEOUT);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(!stderr.contains("listening on"), "the first address must not be used either: {stderr}");
    assert!(stderr.contains(&addr), "{stderr}");
}

#[test]
fn unix_socket_in_use_is_an_error_and_is_not_removed() {
    let dir = temp_dir();
    let path = dir.path().join("s5.sock");
    let listen = format!("unix:{}", path.display());
    let server = Server::start_with(s5().args(["serve", "--listen", &listen]), 1);
    assert_listen_error(&listen, &[&listen, "in use"]);
    assert!(is_socket(&path));
    UnixStream::connect(&path).expect("the listener accepts");
    drop(server);
}

#[test]
fn unix_socket_with_full_backlog_counts_as_in_use() {
    let dir = temp_dir();
    let path = dir.path().join("s5.sock");
    let busy = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).expect("socket created");
    busy.bind(&socket2::SockAddr::unix(&path).expect("valid socket path")).expect("bound");
    busy.listen(0).expect("listening");
    let _queued = UnixStream::connect(&path).expect("the backlog holds one connection");
    let listen = format!("unix:{}", path.display());
    assert_listen_error(&listen, &[&listen, "in use"]);
    assert!(is_socket(&path));
}

#[test]
fn stale_unix_socket_is_replaced() {
    let dir = temp_dir();
    let path = dir.path().join("s5.sock");
    let listen = format!("unix:{}", path.display());
    drop(UnixListener::bind(&path).expect("bound"));
    // A child process that another test has just started may still have a copy of the listener.
    wait_until("the socket refuses connections", TIMEOUT, || UnixStream::connect(&path).is_err());
    assert!(is_socket(&path), "closing the listener has removed its file");
    let server = Server::start_with(s5().args(["serve", "--listen", &listen]), 1);
    UnixStream::connect(&path).expect("the listener accepts");
    // A server that is killed leaves its socket file.
    server.signal("KILL");
    drop(server);
    assert!(is_socket(&path));
    let _again = Server::start_with(s5().args(["serve", "--listen", &listen]), 1);
    UnixStream::connect(&path).expect("the listener accepts");
}

#[test]
fn unix_socket_is_removed_at_exit() {
    let dir = temp_dir();
    let path = dir.path().join("s5.sock");
    let listen = format!("unix:{}", path.display());
    let mut server = Server::start_with(s5().args(["serve", "--listen", &listen]), 1);
    server.signal("TERM");
    assert!(server.wait(TIMEOUT).success());
    assert!(!path.exists());
}

#[test]
fn listen_does_not_replace_a_regular_file() {
    let dir = temp_dir();
    let path = write_file(dir.path(), "precious", "data");
    assert_listen_error(&format!("unix:{path}"), &[&path]);
    assert_eq!(std::fs::read_to_string(&path).expect("file read"), "data");
    assert_listen_error(&format!("unix:{}/nowhere/s5.sock", dir.path().display()), &["nowhere"]);
    let long = "x".repeat(120);
    assert_listen_error(&format!("unix:{}/{long}", dir.path().display()), &[&long]);
}

#[test]
fn server_prints_nothing_on_stdout() {
    let mut child = crate::support::scripted::RunningProgram::start(s5().args(["serve", "--listen", "127.0.0.1:0"]));
    child.stderr(|stderr| stderr.contains("listening on 127.0.0.1:"));
    assert!(child.stdout(|_| true).is_empty());
    assert!(child.is_running());
}

#[test]
fn quiet_server_logs_nothing_at_start() {
    let dir = temp_dir();
    let path = dir.path().join("s5.sock");
    let listen = format!("unix:{}", path.display());
    let mut child = crate::support::scripted::RunningProgram::start(s5().args(["serve", "-q", "--listen", &listen]));
    wait_until("the server listens", TIMEOUT, || UnixStream::connect(&path).is_ok());
    assert_eq!(child.stderr(|_| true), "");
    assert!(child.is_running());
}
