//! ncat and OpenBSD's nc through `s5 serve`.

use std::process::Command;

use crate::support::{Server, closed_port, echo_server, is_installed, run, temp_dir};
use crate::{LONG_TIMEOUT, assert_same, bytes, exit_code, has_all, htpasswd_berta, stdout, text, wait_for_session};

/// More than socket buffers hold, so that data must flow in both directions at once.
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
fn ncat_round_trips_bulk() {
    if !is_installed("ncat") {
        return;
    }
    let (server, echo, data) = (Server::start(&[]), echo_server(), bytes(SIZE));
    let echoed = stdout(ncat(&server).args(["127.0.0.1", &echo.port().to_string()]), &data);
    assert_same(&echoed, &data);
    wait_for_session(&server, &[&format!("dst=\"{echo}\""), "rep=0", &format!("up={SIZE}"), &format!("down={SIZE}")]);
}

#[test]
fn ncat_logs_in_with_the_right_password_only() {
    if !has_all(&["ncat", "htpasswd"]) {
        return;
    }
    let dir = temp_dir();
    let users = htpasswd_berta(dir.path());
    let (server, echo) = (Server::start(&["--users", &users]), echo_server());
    let run_ncat = |auth: &[&str]| {
        run(ncat(&server).args(auth).args(["127.0.0.1", &echo.port().to_string()]), b"hello", LONG_TIMEOUT)
    };
    let output = run_ncat(&["--proxy-auth", "berta:swordfish"]);
    assert_eq!(text(&output.stdout), "hello", "{}", text(&output.stderr));
    for auth in [&["--proxy-auth", "berta:sword"][..], &[]] {
        let output = run_ncat(auth);
        assert_eq!((exit_code(&output), output.stdout.as_slice()), (1, &b""[..]), "{auth:?}");
    }
}

#[test]
fn nc_round_trips_bulk() {
    if !is_installed("nc.openbsd") {
        return;
    }
    let (server, echo, data) = (Server::start(&[]), echo_server(), bytes(SIZE));
    let echoed = stdout(nc(&server).args(["127.0.0.1", &echo.port().to_string()]), &data);
    assert_same(&echoed, &data);
    let by_name = stdout(nc(&server).args(["localhost", &echo.port().to_string()]), b"hello");
    assert_eq!(by_name, b"hello");
    wait_for_session(&server, &[&format!("dst=\"localhost:{}\"", echo.port()), "rep=0", "up=5", "down=5"]);
}

#[test]
fn nc_reports_a_refused_connection() {
    if !is_installed("nc.openbsd") {
        return;
    }
    let server = Server::start(&[]);
    let output = run(nc(&server).args(["127.0.0.1", &closed_port().port().to_string()]), b"", LONG_TIMEOUT);
    assert_eq!(exit_code(&output), 1);
    assert!(text(&output.stderr).contains("Connection refused"), "{}", text(&output.stderr));
}
