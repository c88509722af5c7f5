//! What keeps a server from starting, and what does not.

use std::net::TcpListener;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use crate::common::{Server, TIMEOUT, run, s5, temp_dir, wait_until, write_file};
use crate::scripted::text;

/// Fails unless `s5 serve --listen` of this says one line with these words, nothing on stdout, and exits with 1.
fn can_not_listen(listen: &str, words: &[&str]) {
    let output = run(s5().args(["serve", "--listen", listen]), b"", TIMEOUT);
    let said = text(&output.stderr);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{listen}: {said}");
    assert!(said.starts_with("s5: ") && said.lines().count() == 1, "{said}");
    for word in words {
        assert!(said.contains(word), "{word:?} is not named: {said}");
    }
}

fn is_socket(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}

#[test]
fn a_port_in_use_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = taken.local_addr().expect("an address").to_string();
    can_not_listen(&addr, &[&addr, "in use"]);
}

#[test]
fn an_address_of_another_machine_is_named() {
    can_not_listen("192.0.2.1:0", &["192.0.2.1:0"]);
}

#[test]
fn a_port_that_one_of_two_addresses_can_not_have_ends_the_start() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = taken.local_addr().expect("an address").to_string();
    let output = run(s5().args(["serve", "--listen", "127.0.0.1:0", "--listen", &addr]), b"", TIMEOUT);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(!said.contains("listening on"), "it says that it listens and does not: {said}");
    assert!(said.contains(&addr), "{said}");
}

#[test]
fn a_unix_socket_in_use_is_named_and_left_alone() {
    let folder = temp_dir();
    let path = folder.path().join("s5.sock");
    let listen = format!("unix:{}", path.display());
    let server = Server::start_with(s5().args(["serve", "--listen", &listen]), 1);
    can_not_listen(&listen, &[&listen, "in use"]);
    assert!(is_socket(&path));
    UnixStream::connect(&path).expect("the first server is still there");
    drop(server);
}

#[test]
fn a_unix_socket_whose_owner_has_no_room_for_another_is_in_use() {
    let folder = temp_dir();
    let path = folder.path().join("s5.sock");
    let busy = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).expect("a socket");
    busy.bind(&socket2::SockAddr::unix(&path).expect("an address")).expect("a name");
    busy.listen(0).expect("it listens");
    let _waits = UnixStream::connect(&path).expect("room for one");
    let listen = format!("unix:{}", path.display());
    can_not_listen(&listen, &[&listen, "in use"]);
    assert!(is_socket(&path));
}

#[test]
fn a_unix_socket_that_a_dead_process_left_is_replaced() {
    let folder = temp_dir();
    let path = folder.path().join("s5.sock");
    let listen = format!("unix:{}", path.display());
    drop(UnixListener::bind(&path).expect("a socket"));
    // A program that another test is just starting may hold it a moment longer.
    wait_until("the socket is dead", TIMEOUT, || UnixStream::connect(&path).is_err());
    assert!(is_socket(&path), "the name outlives the socket");
    let server = Server::start_with(s5().args(["serve", "--listen", &listen]), 1);
    UnixStream::connect(&path).expect("the server listens there now");
    // Killed, it leaves its own behind.
    server.signal("KILL");
    drop(server);
    assert!(is_socket(&path));
    let _again = Server::start_with(s5().args(["serve", "--listen", &listen]), 1);
    UnixStream::connect(&path).expect("the server listens there now");
}

#[test]
fn a_unix_socket_goes_with_its_server() {
    let folder = temp_dir();
    let path = folder.path().join("s5.sock");
    let listen = format!("unix:{}", path.display());
    let mut server = Server::start_with(s5().args(["serve", "--listen", &listen]), 1);
    server.signal("TERM");
    assert!(server.wait(TIMEOUT).success());
    assert!(!path.exists());
}

#[test]
fn a_file_that_is_no_socket_is_left_alone() {
    let folder = temp_dir();
    let path = write_file(folder.path(), "precious", "data");
    can_not_listen(&format!("unix:{path}"), &[&path]);
    assert_eq!(std::fs::read_to_string(&path).expect("it is still there"), "data");
    can_not_listen(&format!("unix:{}/nowhere/s5.sock", folder.path().display()), &["nowhere"]);
    let long = "x".repeat(120);
    can_not_listen(&format!("unix:{}/{long}", folder.path().display()), &[&long]);
}

#[test]
fn a_server_says_nothing_on_stdout() {
    let mut child = crate::scripted::RunningProgram::start(s5().args(["serve", "--listen", "127.0.0.1:0"]));
    child.stderr(|said| said.contains("listening on 127.0.0.1:"));
    assert!(child.stdout(|_| true).is_empty());
    assert!(child.is_running());
}

#[test]
fn quiet_hides_what_is_not_wrong() {
    let folder = temp_dir();
    let path = folder.path().join("s5.sock");
    let listen = format!("unix:{}", path.display());
    let mut child = crate::scripted::RunningProgram::start(s5().args(["serve", "-q", "--listen", &listen]));
    wait_until("it listens", TIMEOUT, || UnixStream::connect(&path).is_ok());
    assert_eq!(child.stderr(|_| true), "");
    assert!(child.is_running());
}
