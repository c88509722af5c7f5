//! PySocks (Debian's python3-socks) through `s5 serve`.

use crate::*;

/// Arguments: host and port of the proxy, host and port of the target, user name and password.
const TCP: &str = r#"
import socket, socks, sys
proxy, proxy_port, host, port, *login = sys.argv[1:]
s = socks.socksocket()
s.settimeout(10)
s.set_proxy(socks.SOCKS5, proxy, int(proxy_port), True, *login)
try:
    s.connect((host, int(port)))
except socks.GeneralProxyError as error:
    print(error)
    sys.exit()
s.sendall(b"hello " * 100000)
s.shutdown(socket.SHUT_WR)
data = b""
while chunk := s.recv(65536):
    data += chunk
print(data == b"hello " * 100000)
"#;

/// Same arguments. Sends datagrams of the lengths given on stdin, and prints for each: length, whether the answer is
/// equal, and its sender.
const UDP: &str = r#"
import socket, socks, sys
proxy, proxy_port, host, port, *login = sys.argv[1:]
s = socks.socksocket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(10)
s.set_proxy(socks.SOCKS5, proxy, int(proxy_port), True, *login)
target = (host, int(port))
for length in map(int, sys.stdin.read().split()):
    data = bytes(i * 7 % 256 for i in range(length))
    s.sendto(data, target)
    answer, sender = s.recvfrom(65536)
    print(length, answer == data, *sender)
"#;

fn has_pysocks() -> bool {
    has_python_module("socks", "PySocks (python3-socks)")
}

fn python(script: &str, server: &Server, host: &str, port: u16, login: &[&str], stdin: &str) -> String {
    let proxy = server.addr();
    let mut command = Command::new(PYTHON);
    command.args(["-c", script, &proxy.ip().to_string(), &proxy.port().to_string(), host, &port.to_string()]);
    text(&stdout(command.args(login), stdin.as_bytes()))
}

#[test]
fn pysocks_logs_in_with_the_right_password_only() {
    if !has_pysocks() {
        return;
    }
    let dir = temp_dir();
    let users = add_anna(dir.path());
    let (server, echo) = (Server::start(&["--users", &users]), echo_server());
    let udp = udp_echo_server(V4);
    let anna = ["anna", "open sesame"];
    assert_eq!(python(TCP, &server, "127.0.0.1", echo.port(), &anna, ""), "True\n");
    let answers = python(UDP, &server, "127.0.0.1", udp.port(), &anna, "4");
    assert_eq!(answers, format!("4 True 127.0.0.1 {}\n", udp.port()));
    let refused = [
        (&["anna", "swordfish"][..], "SOCKS5 authentication failed"),
        (&[], "All offered SOCKS5 authentication methods were rejected"),
    ];
    for (login, error) in refused {
        let stdout = python(TCP, &server, "127.0.0.1", echo.port(), login, "");
        assert!(stdout.contains(error), "{login:?}: {stdout}");
    }
}

#[test]
fn pysocks_uses_streams_and_datagrams_with_addresses_and_names() {
    if !has_pysocks() {
        return;
    }
    let (server, echo) = (Server::start(&[]), echo_server());
    for host in ["127.0.0.1", "localhost"] {
        assert_eq!(python(TCP, &server, host, echo.port(), &[], ""), "True\n", "{host}");
    }
    for ip in [V4, V6] {
        let (host, port) = (ip.to_string(), udp_echo_server(ip).port());
        let expected = [0, 1, 1472, 65_000].map(|n| format!("{n} True {host} {port}\n")).concat();
        assert_eq!(python(UDP, &server, &host, port, &[], "0 1 1472 65000"), expected, "{host}");
    }
    // On both families, since the server may use either address of the name.
    let port = udp_echo_server(Ipv6Addr::UNSPECIFIED.into()).port();
    let answers = python(UDP, &server, "localhost", port, &[], "5 5");
    let expected = ["127.0.0.1", "::1"].map(|sender| format!("5 True {sender} {port}\n").repeat(2));
    assert!(expected.contains(&answers), "{answers}");
}
