//! Addresses that the server can and cannot listen on, and its output.

use std::net::TcpListener;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::support::{TIMEOUT, serve, temp_dir, wait_until, write_file};
use crate::{assert_line, outcome, start};

/// Fails unless `s5 serve --listen` exits with 1 and prints only one line that contains all words.
fn assert_listen_error(listen: &str, words: &[&str]) {
    assert_line(&format!("serve --listen {listen}"), 1, words);
}

/// A directory for a Unix socket, the path of the socket and the value of --listen.
fn unix_socket() -> (tempfile::TempDir, PathBuf, String) {
    let dir = temp_dir();
    let path = dir.path().join("s5.sock");
    let listen = format!("unix:{}", path.display());
    (dir, path, listen)
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
    let (status, _, stderr) = outcome(&format!("serve --listen 127.0.0.1:0 --listen {addr}"), b"");
    assert_eq!(status, Some(1), "{stderr}");
    assert!(!stderr.contains("listening on"), "the first address must not be used either: {stderr}");
    assert!(stderr.contains(&addr), "{stderr}");
}

#[test]
fn unix_socket_in_use_is_an_error_and_is_not_removed() {
    let (_dir, path, listen) = unix_socket();
    let server = serve(&listen, 1, &[]);
    assert_listen_error(&listen, &[&listen, "in use"]);
    assert!(is_socket(&path));
    UnixStream::connect(&path).expect("the listener accepts");
    drop(server);
}

#[test]
fn unix_socket_with_full_backlog_counts_as_in_use() {
    let (_dir, path, listen) = unix_socket();
    let busy = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).expect("socket created");
    busy.bind(&socket2::SockAddr::unix(&path).expect("valid socket path")).expect("bound");
    busy.listen(0).expect("listening");
    let _queued = UnixStream::connect(&path).expect("the backlog holds one connection");
    assert_listen_error(&listen, &[&listen, "in use"]);
    assert!(is_socket(&path));
}

#[test]
fn stale_unix_socket_is_replaced() {
    let (_dir, path, listen) = unix_socket();
    drop(UnixListener::bind(&path).expect("bound"));
    // A child process that another test has just started may still have a copy of the listener.
    wait_until("the socket refuses connections", TIMEOUT, || UnixStream::connect(&path).is_err());
    assert!(is_socket(&path), "closing the listener has removed its file");
    let server = serve(&listen, 1, &[]);
    UnixStream::connect(&path).expect("the listener accepts");
    // A server that is killed leaves its socket file.
    server.signal("KILL");
    drop(server);
    assert!(is_socket(&path));
    let _again = serve(&listen, 1, &[]);
    UnixStream::connect(&path).expect("the listener accepts");
}

#[test]
fn unix_socket_is_removed_at_exit() {
    let (_dir, path, listen) = unix_socket();
    let mut server = serve(&listen, 1, &[]);
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
    let mut child = start("serve --listen 127.0.0.1:0");
    child.stderr(|stderr| stderr.contains("listening on 127.0.0.1:"));
    assert!(child.stdout(|_| true).is_empty());
    assert!(child.is_running());
}

#[test]
fn quiet_server_logs_nothing_at_start() {
    let (_dir, path, listen) = unix_socket();
    let mut child = start(&format!("serve -q --listen {listen}"));
    wait_until("the server listens", TIMEOUT, || UnixStream::connect(&path).is_ok());
    assert_eq!(child.stderr(|_| true), "");
    assert!(child.is_running());
}
