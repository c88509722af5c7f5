//! ncat and OpenBSD's nc through `s5 serve`.

use crate::*;

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
fn ncat_and_nc_transfer_bulk_in_both_directions() {
    for (program, netcat) in [("ncat", ncat as fn(&Server) -> Command), ("nc.openbsd", nc)] {
        let Some(server) = serve_for(&[program]) else { continue };
        let (echo, data) = (echo_server(), bytes(SIZE));
        for (host, data) in [("127.0.0.1", &data[..]), ("localhost", b"hello")] {
            assert_echoes(netcat(&server).args([host, &echo.port().to_string()]), data);
            let (dst, size) = (format!("to=\"{host}:{}\"", echo.port()), data.len());
            wait_session(&server, &[&dst, &format!("rep=0 up={size} down={size} ")]);
        }
    }
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
fn nc_reports_a_refused_connection() {
    let Some(server) = serve_for(&["nc.openbsd"]) else { return };
    let output = run(nc(&server).args(["127.0.0.1", &closed_port().port().to_string()]), b"", LONG_TIMEOUT);
    assert_eq!(exit_code(&output), 1);
    assert!(text(&output.stderr).contains("Connection refused"), "{}", text(&output.stderr));
}
