//! The netcats: ncat and OpenBSD's through `s5 serve`.

use std::process::Command;

use crate::common::{Server, closed_port, echo_server, is_installed, run, temp_dir};
use crate::{LONG, assert_same, code, have, htpasswd_berta, octets, session, stdout, text};

/// More than the socket buffers hold, so that it must flow both ways at once.
const SIZE: usize = 4 << 20;

fn ncat(server: &Server) -> Command {
    let mut command = Command::new("ncat");
    command.env_remove("NCAT_PROXY_AUTH");
    command.args(["--proxy", &server.addr().to_string(), "--proxy-type", "socks5"]);
    command
}

fn nc(server: &Server) -> Command {
    let mut command = Command::new("nc.openbsd");
    command.args(["-N", "-X", "5", "-x", &server.addr().to_string()]);
    command
}

#[test]
fn ncat_gets_back_what_it_sends() {
    if !is_installed("ncat") {
        return;
    }
    let (server, echo, data) = (Server::start(&[]), echo_server(), octets(SIZE));
    let echoed = stdout(ncat(&server).args(["127.0.0.1", &echo.port().to_string()]), &data);
    assert_same(&echoed, &data);
    session(&server, &[&format!("dst=\"{echo}\""), "rep=0", &format!("up={SIZE}"), &format!("down={SIZE}")]);
}

#[test]
fn ncat_logs_in_with_the_right_password_only() {
    if !have(&["ncat", "htpasswd"]) {
        return;
    }
    let folder = temp_dir();
    let users = htpasswd_berta(folder.path());
    let (server, echo) = (Server::start(&["--users", &users]), echo_server());
    let say =
        |auth: &[&str]| run(ncat(&server).args(auth).args(["127.0.0.1", &echo.port().to_string()]), b"hello", LONG);
    let output = say(&["--proxy-auth", "berta:swordfish"]);
    assert_eq!(text(&output.stdout), "hello", "{}", text(&output.stderr));
    for auth in [&["--proxy-auth", "berta:sword"][..], &[]] {
        let output = say(auth);
        assert_eq!((code(&output), output.stdout.as_slice()), (1, &b""[..]), "{auth:?}");
    }
}

#[test]
fn nc_gets_back_what_it_sends() {
    if !is_installed("nc.openbsd") {
        return;
    }
    let (server, echo, data) = (Server::start(&[]), echo_server(), octets(SIZE));
    let echoed = stdout(nc(&server).args(["127.0.0.1", &echo.port().to_string()]), &data);
    assert_same(&echoed, &data);
    let by_name = stdout(nc(&server).args(["localhost", &echo.port().to_string()]), b"hello");
    assert_eq!(by_name, b"hello");
    session(&server, &[&format!("dst=\"localhost:{}\"", echo.port()), "rep=0", "up=5", "down=5"]);
}

#[test]
fn nc_is_told_why_there_is_no_connection() {
    if !is_installed("nc.openbsd") {
        return;
    }
    let server = Server::start(&[]);
    let output = run(nc(&server).args(["127.0.0.1", &closed_port().port().to_string()]), b"", LONG);
    assert_eq!(code(&output), 1);
    assert!(text(&output.stderr).contains("Connection refused"), "{}", text(&output.stderr));
}
