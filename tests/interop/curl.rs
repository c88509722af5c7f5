//! curl through `s5 serve`.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::process::Command;

use crate::support::{Server, closed_port, is_installed, run, tcp_server, temp_dir};
use crate::{
    LONG_TIMEOUT, add_anna, assert_same, bytes, exit_code, has_all, htpasswd_berta, stdout, text, wait_for_session,
};

/// Exit status of curl if the SOCKS server refuses the login or the request.
const PROXY_REFUSED: i32 = 97;

/// curl through a proxy, without the user's .curlrc and NO_PROXY.
fn curl(proxy: &str) -> Command {
    let mut command = Command::new("curl");
    command.args(["-q", "-sS", "--noproxy", "", "--max-time", "50", "-x", proxy]);
    command
}

/// A web server that answers with the body of the request, or with `hello` if it is empty.
fn http_server(ip: impl Into<IpAddr>) -> SocketAddr {
    tcp_server(ip.into(), |stream| drop(answer(stream)))
}

fn answer(stream: TcpStream) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let line = line.trim_end().to_ascii_lowercase();
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().expect("valid length");
        }
        if line.is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    if body.is_empty() {
        body.extend(b"hello");
    }
    let mut stream = reader.into_inner();
    write!(stream, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len())?;
    stream.write_all(&body)
}

#[test]
fn curl_socks5_resolves_locally_and_socks5h_remotely() {
    if !is_installed("curl") {
        return;
    }
    let (server, web) = (Server::start(&[]), http_server(Ipv4Addr::LOCALHOST));
    let url = format!("http://localhost:{}/", web.port());
    for scheme in ["socks5", "socks5h"] {
        // -4: with socks5:// curl tries one address only, and the web server does not listen on ::1.
        let proxy = format!("{scheme}://{}", server.addr());
        assert_eq!(stdout(curl(&proxy).args(["-4", &url]), b""), b"hello", "{scheme}");
    }
    wait_for_session(&server, &["command=connect", &format!("dst=\"{web}\""), "rep=0"]);
    wait_for_session(&server, &["command=connect", &format!("dst=\"localhost:{}\"", web.port()), "rep=0"]);
}

#[test]
fn curl_reaches_an_ipv6_address() {
    if !is_installed("curl") {
        return;
    }
    let (server, web) = (Server::start(&[]), http_server(Ipv6Addr::LOCALHOST));
    for scheme in ["socks5", "socks5h"] {
        let proxy = format!("{scheme}://{}", server.addr());
        assert_eq!(stdout(curl(&proxy).arg(format!("http://{web}/")), b""), b"hello", "{scheme}");
    }
    wait_for_session(&server, &["command=connect", &format!("dst=\"{web}\""), "rep=0"]);
}

#[test]
fn curl_connects_to_the_server_on_ipv6_and_on_a_unix_socket() {
    if !is_installed("curl") {
        return;
    }
    let dir = temp_dir();
    let path = dir.path().join("socket");
    let path = path.to_str().expect("UTF-8 path");
    let mut command = crate::s5();
    command.args(["serve", "--listen", "[::1]:0", "--listen", &format!("unix:{path}")]);
    let server = Server::start_with(&mut command, 2);
    let web = http_server(Ipv4Addr::LOCALHOST);
    for proxy in [format!("socks5h://{}", server.addr()), format!("socks5h://localhost{path}")] {
        assert_eq!(stdout(curl(&proxy).arg(format!("http://{web}/")), b""), b"hello", "{proxy}");
    }
    wait_for_session(&server, &["client=unix", "command=connect", &format!("dst=\"{web}\""), "rep=0"]);
}

#[test]
fn curl_logs_in_with_the_right_password_only() {
    if !has_all(&["curl", "htpasswd"]) {
        return;
    }
    let dir = temp_dir();
    // --add-user adds a line to the file that htpasswd has written.
    htpasswd_berta(dir.path());
    let users = add_anna(dir.path());
    let (server, web) = (Server::start(&["--users", &users]), http_server(Ipv4Addr::LOCALHOST));
    let get = |userinfo: &str| {
        let proxy = format!("socks5h://{userinfo}{}", server.addr());
        run(curl(&proxy).arg(format!("http://{web}/")), b"", LONG_TIMEOUT)
    };
    for (userinfo, user) in [("anna:open%20sesame@", "user=\"anna\""), ("berta:swordfish@", "user=\"berta\"")] {
        let output = get(userinfo);
        assert_eq!((exit_code(&output), output.stdout.as_slice()), (0, &b"hello"[..]), "{}", text(&output.stderr));
        wait_for_session(&server, &[user, "command=connect", "rep=0"]);
    }
    for userinfo in ["anna:swordfish@", "berta:swordfis@", "clara:swordfish@", ""] {
        let output = get(userinfo);
        assert_eq!((exit_code(&output), output.stdout.as_slice()), (PROXY_REFUSED, &b""[..]), "{userinfo}");
    }
    let log = server.log();
    assert!(!log.contains("sesame") && !log.contains("swordfis"), "a password is in the log:\n{log}");
}

#[test]
fn curl_transfers_32_mib_in_both_directions() {
    if !is_installed("curl") {
        return;
    }
    let (server, web) = (Server::start(&[]), http_server(Ipv4Addr::LOCALHOST));
    let body = bytes(32 << 20);
    let mut command = curl(&format!("socks5h://{}", server.addr()));
    command.args(["-H", "Expect:", "-H", "Content-Type: application/octet-stream"]);
    let answer = stdout(command.args(["--data-binary", "@-", &format!("http://{web}/")]), &body);
    assert_same(&answer, &body);
}

#[test]
fn curl_reports_rep_5_if_the_target_refuses() {
    if !is_installed("curl") {
        return;
    }
    let server = Server::start(&[]);
    let output =
        run(curl(&format!("socks5h://{}", server.addr())).arg(format!("http://{}/", closed_port())), b"", LONG_TIMEOUT);
    assert_eq!(exit_code(&output), PROXY_REFUSED);
    assert!(text(&output.stderr).contains("(5)"), "{}", text(&output.stderr));
}
