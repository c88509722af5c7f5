//! Addresses that the server cannot listen on, and its output. tests/server/lifecycle/listen.rs has those that it can.

use std::os::unix::fs::FileTypeExt as _;

use crate::support::serve;
use crate::*;

fn is_socket(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}

#[test]
fn server_does_not_start_if_one_address_fails() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("free port");
    let addr = taken.local_addr().expect("local address").to_string();
    let (dir, long) = (temp_dir(), "x".repeat(120));
    let unix = |path: &str| format!("unix:{}/{path}", dir.path().display());
    for (listen, words) in [
        (addr.clone(), &[&*addr, "in use"][..]),
        ("192.0.2.1:0".into(), &["192.0.2.1:0"]),
        (unix("nowhere/s5.sock"), &["nowhere"]),
        (unix(&long), &[&long]),
    ] {
        assert_line(&format!("serve --listen {listen}"), 1, words);
        // With one line of output, the first address is not used either.
        assert_line(&format!("serve --listen 127.0.0.1:0 --listen {listen}"), 1, words);
    }
}

#[test]
fn unix_socket_is_replaced_unless_it_is_in_use() {
    let dir = temp_dir();
    let path = dir.path().join("s5.sock");
    let listen = format!("unix:{}", path.display());
    let assert_in_use = || {
        assert_line(&format!("serve --listen {listen}"), 1, &[&listen, "in use"]);
        assert!(is_socket(&path));
    };
    let server = serve(&listen, 1, &[]);
    assert_in_use();
    UnixStream::connect(&path).expect("the listener accepts");
    // A server that is killed leaves its socket file.
    server.signal("KILL");
    drop(server);
    assert!(is_socket(&path));
    let server = serve(&listen, 1, &[]);
    UnixStream::connect(&path).expect("the listener accepts");
    drop(server);
    std::fs::remove_file(&path).expect("file removed");
    // A full backlog counts as in use.
    let busy = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).expect("socket created");
    busy.bind(&socket2::SockAddr::unix(&path).expect("valid socket path")).expect("bound");
    busy.listen(0).expect("listening");
    let _queued = UnixStream::connect(&path).expect("the backlog holds one connection");
    assert_in_use();
}

#[test]
fn listen_error_says_what_is_meant() {
    let table = [
        ("serve --listen :1081", "--listen", "(write *:1081 for all addresses, or 1081 for loopback)"),
        ("serve --listen 0.0.0.0", "--listen", "(write *:PORT)"),
        ("serve --listen :::1081", "--listen", "(write *:1081)"),
        ("serve --listen ::1", "--listen", "(write [::1]:PORT)"),
        ("serve --listen 192.0.2.1", "--listen", "(write 192.0.2.1:PORT)"),
        (
            "serve --listen unix:@s5",
            "--listen '…@s5': ",
            "abstract sockets are not supported (for a file, write ./ before its name)",
        ),
        (
            "serve --metrics unix:@s5",
            "--metrics",
            "abstract sockets are not supported (for a file, write ./ before its name)",
        ),
        ("serve --check --listen unix:/dir/s5/", "--listen", "requires the path of a file, as in unix:/run/s5.sock"),
        ("serve --via unix:@s5", "--via", "abstract sockets are not supported (for a file, write ./ before its name)"),
        (
            "udp -x u:p@unix:@s5 a:80",
            "--proxy",
            "abstract sockets are not supported (for a file, write ./ before its name)",
        ),
        ("connect -l unix:@s5 a:80", "-l", "expected [ADDR:]PORT (-l takes a value"),
        ("serve --listen s5", "--listen", "*:PORT or unix:/PATH"),
        ("serve --metrics 0.0.0.0", "--metrics", "(write *:PORT)"),
        ("connect -l :1081 example.org:80", "-l", "(write *:1081 for all addresses, or 1081 for loopback)"),
        ("udp -l :1081 example.org:80", "-l", "(write *:1081 for all addresses, or 1081 for loopback)"),
    ];
    for (args, option, hint) in table {
        assert_line(args, 2, &[option, hint]);
    }
}

#[test]
fn server_prints_nothing_on_stdout_and_a_quiet_one_logs_nothing_at_start() {
    let mut child = start("serve --listen 127.0.0.1:0");
    child.stderr(|stderr| stderr.contains("listening on 127.0.0.1:"));
    assert!(child.stdout(|_| true).is_empty() && child.is_running());
    let dir = temp_dir();
    let path = dir.path().join("s5.sock");
    let mut child = start(&format!("serve -q --listen unix:{}", path.display()));
    wait_until("the server listens", TIMEOUT, || UnixStream::connect(&path).is_ok());
    assert_eq!(child.stderr(|_| true), "");
    assert!(child.is_running());
}
