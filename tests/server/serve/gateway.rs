//! BND of BIND and UDP ASSOCIATE on a host with two networks: that of the clients (10.9.0.0/24, fd09::/64) and that of
//! the peers (10.9.1.0/24, fd09:1::/64).

use crate::guard::hosts::{Host, server_addr, server_addr_v6};
use crate::guard::tools::{assert_accepts_peer, associate, log_in, send_request};
use crate::*;

const CLIENT: &str = "10.9.0.2";
const CLIENT_V6: &str = "fd09::2";
/// An address that the host does not have.
const PUBLIC: &str = "203.0.113.5";

/// Sends BIND from a client of the other network. Returns the client's connection and BND.
fn bind(client: &str, dst: &str) -> (TcpStream, SocketAddr) {
    let server = if ip(client).is_ipv4() { server_addr() } else { server_addr_v6() };
    let mut stream = log_in(server, ip(client), None);
    let (rep, bnd) = send_request(&mut stream, BIND, dst);
    assert_eq!(rep, 0, "{client} {dst}");
    (stream, bnd)
}

/// Runs a program of the host with this input. Returns its output.
fn output(host: &Host, args: &[&str], input: &[u8]) -> String {
    let output = run(host.command(args[0]).args(&args[1..]), input, TIMEOUT);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// The address that `s5 bind` of the host prints.
fn bound_on_host(host: &Host, args: &[&str]) -> SocketAddr {
    let mut command = host.command(env!("CARGO_BIN_EXE_s5"));
    let client = RunningProgram::start(command.args(["bind", "-x", "127.0.0.1:1080"]).args(args));
    let stderr = client.stderr(|stderr| stderr.ends_with('\n'));
    stderr.trim().strip_prefix("bound ").and_then(|bnd| bnd.parse().ok()).unwrap_or_else(|| panic!("{stderr}"))
}

#[test]
fn bind_bnd_is_on_the_route_to_the_peer_and_udp_bnd_is_where_the_client_connected_to() {
    enter_namespace!("", "");
    let host = Host::new();
    let _server = host.serve(&[]);
    let table = [
        (CLIENT, "10.9.1.2:21", "10.9.1.1"),
        (CLIENT, "10.9.0.3:0", "10.9.0.1"),
        (CLIENT, "[fd09:1::2]:0", "fd09:1::1"),
        (CLIENT_V6, "[fd09:1::2]:0", "fd09:1::1"),
        (CLIENT_V6, "10.9.1.2:0", "10.9.1.1"),
    ];
    for (client, dst, expected) in table {
        let (mut stream, bnd) = bind(client, dst);
        assert_eq!(bnd.ip(), ip(expected), "{client} {dst}");
        assert_accepts_peer(&mut stream, bnd, SocketAddr::new(addr(dst).ip(), 0));
    }
    // Without a default route, the peer of a request without an address may be in the network of the client.
    let any = [(CLIENT, "0.0.0.0:0", "10.9.0.1", "10.9.1.1"), (CLIENT_V6, "[::]:0", "fd09::1", "fd09:1::1")];
    for (client, dst, without_route, _) in any {
        assert_eq!(bind(client, dst).1.ip(), ip(without_route), "{client}");
    }
    output(&host, &["ip", "route", "add", "default", "via", "10.9.1.2"], b"");
    output(&host, &["ip", "-6", "route", "add", "default", "via", "fd09:1::2"], b"");
    for (client, dst, _, by_route) in any {
        assert_eq!(bind(client, dst).1.ip(), ip(by_route), "{client}");
    }
    for (server, client) in [(server_addr(), CLIENT), (server_addr_v6(), CLIENT_V6)] {
        let association = associate(server, ip(client), None);
        assert_eq!(association.bnd.ip(), server.ip());
        association.ping(udp_echo_server(ip(if server.is_ipv4() { "10.9.1.2" } else { "fd09:1::2" })), b"hello");
    }
    // A client on the host itself: a peer without an address is there too.
    assert_eq!(bound_on_host(&host, &[]).ip(), ip("127.0.0.1"));
    assert_eq!(bound_on_host(&host, &["10.9.1.2"]).ip(), ip("10.9.1.1"));
}

#[test]
fn advertised_addresses_are_for_bind_for_udp_or_for_both() {
    enter_namespace!("", "");
    let host = Host::new();
    let echo = udp_echo_server(ip("10.9.1.2"));
    let table: [(&[&str], &str, &str); 6] = [
        (&[], "10.9.1.1", "10.9.0.1"),
        (&["--advertise", PUBLIC], PUBLIC, PUBLIC),
        (&["--advertise-bind", PUBLIC], PUBLIC, "10.9.0.1"),
        (&["--advertise-udp", PUBLIC], "10.9.1.1", PUBLIC),
        (&["--advertise", PUBLIC, "--advertise-udp", "10.9.0.1"], PUBLIC, "10.9.0.1"),
        (&["--advertise", PUBLIC, "--advertise-bind", "2001:db8::5"], PUBLIC, PUBLIC),
    ];
    for (args, expected_bind, expected_udp) in table {
        let _server = host.serve(args);
        let (mut stream, mut bnd) = bind(CLIENT, "10.9.1.2:0");
        assert_eq!(bnd.ip(), ip(expected_bind), "{args:?}");
        bnd.set_ip(ip("10.9.1.1"));
        assert_accepts_peer(&mut stream, bnd, addr("10.9.1.2:0"));
        let mut association = associate(server_addr(), ip(CLIENT), None);
        assert_eq!(association.bnd.ip(), ip(expected_udp), "{args:?}");
        association.bnd.set_ip(server_addr().ip());
        association.ping(echo, b"hello");
        // Clients on loopback cannot use the address of a NAT gateway.
        assert_eq!(bound_on_host(&host, &[]).ip(), ip("127.0.0.1"), "{args:?}");
        let s5 = [env!("CARGO_BIN_EXE_s5"), "udp", "-n", "1", "-x", "127.0.0.1:1080", &echo.to_string()];
        assert_eq!(output(&host, &s5, b"hello\n"), "hello\n", "{args:?}");
    }
    // The address of one family does not replace that of the other.
    let _server = host.serve(&["--advertise", PUBLIC]);
    assert_eq!(bind(CLIENT, "[fd09:1::2]:0").1.ip(), ip("fd09:1::1"));
    assert_eq!(associate(server_addr_v6(), ip(CLIENT_V6), None).bnd.ip(), server_addr_v6().ip());
}
