//! curl through `s5 serve`.

use crate::*;

/// Exit status of curl if the SOCKS server refuses the login or the request.
const PROXY_REFUSED: i32 = 97;

/// curl through a proxy, without the user's .curlrc and NO_PROXY.
fn curl(proxy: &str) -> Command {
    let mut command = Command::new("curl");
    command.args(["-q", "-sS", "--noproxy", "", "--max-time", "50", "-x", proxy]);
    command
}

/// A web server that answers with the body of the request, or with `hello` if it is empty.
fn http_server(ip: IpAddr) -> SocketAddr {
    tcp_server(ip, |stream| drop(answer(stream)))
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
fn curl_reaches_names_and_ipv6_addresses_through_each_kind_of_listener() {
    if !has_all(&["curl"]) {
        return;
    }
    let (dir, web, web6) = (temp_dir(), http_server(V4), http_server(V6));
    let socket = format!("{}/socket", dir.path().display());
    let mut command = s5();
    command.args(["serve", "--listen", "127.0.0.1:0", "--listen", "[::1]:0", "--listen", &format!("unix:{socket}")]);
    let server = Server::start_with(&mut command, 3);
    let [ipv4, ipv6] = server.addrs[..] else { panic!("{:?}", server.addrs) };
    let by_name = format!("localhost:{}", web.port());
    let table = [
        // socks5 resolves names locally, and socks5h remotely.
        (format!("socks5://{ipv4}"), by_name.clone(), web.to_string()),
        (format!("socks5h://{ipv4}"), by_name.clone(), by_name),
        (format!("socks5://{ipv4}"), web6.to_string(), web6.to_string()),
        (format!("socks5h://{ipv4}"), web6.to_string(), web6.to_string()),
        (format!("socks5h://{ipv6}"), web.to_string(), web.to_string()),
        (format!("socks5h://localhost{socket}"), web.to_string(), web.to_string()),
    ];
    for (proxy, target, dst) in table {
        let before = server.log().len();
        let mut command = curl(&proxy);
        // -4: with socks5:// curl tries one address only, and the web server does not listen on ::1.
        command.args(target.starts_with("localhost").then_some("-4"));
        assert_eq!(stdout(command.arg(format!("http://{target}/")), b""), b"hello", "{proxy}");
        server.wait_log(|log| log[before..].contains(&format!("command=connect to=\"{dst}\" ")));
    }
    wait_session(&server, &["from=unix method=none", "command=connect", &format!("to=\"{web}\""), "rep=0"]);
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
    let (server, web) = (Server::start(&["--users", &users]), http_server(V4));
    let get = |userinfo: &str| {
        let proxy = format!("socks5h://{userinfo}{}", server.addr());
        run(curl(&proxy).arg(format!("http://{web}/")), b"", LONG_TIMEOUT)
    };
    for (userinfo, user) in [("anna:open%20sesame@", "user=\"anna\""), ("berta:swordfish@", "user=\"berta\"")] {
        let output = get(userinfo);
        assert_eq!((exit_code(&output), output.stdout.as_slice()), (0, &b"hello"[..]), "{}", text(&output.stderr));
        wait_session(&server, &[user, "command=connect", "rep=0"]);
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
    let Some(server) = serve_for(&["curl"]) else { return };
    let web = http_server(V4);
    let body = bytes(32 << 20);
    let mut command = curl(&format!("socks5h://{}", server.addr()));
    command.args(["-H", "Expect:", "-H", "Content-Type: application/octet-stream"]);
    assert_echoes(command.args(["--data-binary", "@-", &format!("http://{web}/")]), &body);
}

#[test]
fn curl_reports_rep_5_if_the_target_refuses() {
    let Some(server) = serve_for(&["curl"]) else { return };
    let output =
        run(curl(&format!("socks5h://{}", server.addr())).arg(format!("http://{}/", closed_port())), b"", LONG_TIMEOUT);
    assert_eq!(exit_code(&output), PROXY_REFUSED);
    assert!(text(&output.stderr).contains("(5)"), "{}", text(&output.stderr));
}
