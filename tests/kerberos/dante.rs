//! Interoperation with Dante's server and client. S5_TEST_DANTE names the install directory of a build with GSSAPI,
//! with sbin/sockd and bin/socksify (Debian's packages have no GSSAPI). Without it, the tests are skipped.

use crate::support::realm::Realm;
use crate::*;

/// Dante's names of the levels.
const DANTE_LEVELS: [&str; 3] = ["clear", "integrity", "confidentiality"];
/// Arguments: host, port. Sends data and prints what comes back. One thread, since Dante's library supports no others.
const TCP: &str = r#"
import socket, sys
s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10)
data = bytes(i * 7 % 251 for i in range(300000))
got = b""
for at in range(0, len(data), 20000):
    s.sendall(data[at:at + 20000])
    while len(got) < at + 20000:
        got += s.recv(65536)
s.shutdown(socket.SHUT_WR)
print(len(got), got == data, s.recv(1))
"#;
/// Arguments: host, port. Sends datagrams of several lengths and prints which ones are returned.
const UDP: &str = r#"
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(10)
for length in (1, 1472, 60000):
    s.sendto(b"u" * length, (sys.argv[1], int(sys.argv[2])))
    print(s.recvfrom(65536)[0] == b"u" * length)
"#;

/// Returns Dante's directory and a realm. Skips even if S5_TEST_STRICT=1, because no package provides this Dante.
fn set_up() -> Option<(PathBuf, Realm)> {
    match std::env::var_os("S5_TEST_DANTE") {
        Some(dante) => Some((dante.into(), realm()?)),
        None => {
            record_skip("S5_TEST_DANTE names no build of Dante with GSSAPI");
            None
        }
    }
}

/// Starts Dante's server. The client rule configures the login, the socks rule the level.
fn start_sockd(dante: &Path, realm: &Realm, level: &str, more: &str) -> OtherServer {
    let keytab = realm.file("service.keytab");
    let login = format!("gssapi.keytab: FILE:{}\n  gssapi.enctype: {level}", keytab.display());
    let (client_rule, commands) = (format!("{login}\n  {more}"), "connect bind udpassociate bindreply udpreply");
    let socks_rule = format!("command: {commands}\n  {login}");
    let config = Dante { method: "gssapi", client_rule: &client_rule, socks_rule: &socks_rule, ..Dante::default() };
    OtherServer::start(|dir, addr| {
        let mut sockd = Command::new(dante.join("sbin/sockd"));
        realm.env(&mut sockd);
        config.configure(dir, addr, sockd)
    })
}

#[test]
fn s5_clients_work_with_dante_server() {
    let Some((dante, realm)) = set_up() else { return };
    let (echo, udp, data) = (echo_server().to_string(), udp_echo_server(V4).to_string(), bytes(300_000));
    for (level, dante_level) in LEVELS.into_iter().zip(DANTE_LEVELS) {
        for (more, nec) in [("", None), ("clientcompatibility: necgssapi", Some("--gssapi-nec"))] {
            let sockd = start_sockd(&dante, &realm, dante_level, more);
            let url = format!("localhost:{}", sockd.addr.port());
            let args = |target| nec.into_iter().chain([target]).collect::<Vec<&str>>();
            assert_echoes(&mut client_at(&realm, "connect", &url, level, &args(&echo)), &data);
            exchange_datagrams(&mut client_at(&realm, "udp", &url, level, &args(&udp)), &[1, 1472, 60_000]);
        }
    }
}

#[test]
fn dante_client_works_with_s5_server() {
    let Some((dante, realm)) = set_up() else { return };
    let (echo, udp) = (echo_server(), udp_echo_server(V4));
    for (level, dante_level) in LEVELS.into_iter().zip(DANTE_LEVELS) {
        for nec in ["", "clientcompatibility: necgssapi"] {
            let server = serve(&realm, &["--gssapi-protection", level]);
            let dir = temp_dir();
            let config = format!(
                "route {{\n  from: 0.0.0.0/0 to: 0.0.0.0/0 via: localhost port = {port}\n\
                 proxyprotocol: socks_v5\n  command: connect udpassociate\n  method: gssapi\n\
                 gssapi.enctype: {dante_level}\n  {nec}\n}}\n",
                port = server.addr().port()
            );
            let config = write_file(dir.path(), "socks.conf", &config);
            let run = |script: &str, target: SocketAddr| {
                let mut command = Command::new(dante.join("bin/socksify"));
                command.args([PYTHON, "-c", script, &target.ip().to_string(), &target.port().to_string()]);
                realm.env(&mut command).env("SOCKS_CONF", &config).env("SOCKS_AUTOADD_LANROUTES", "no");
                text(&stdout(&mut command, b""))
            };
            assert_eq!(run(TCP, echo), "300000 True b''\n", "{level} {nec}");
            wait_session(&server, &[ALICE, "command=connect", "rep=0"]);
            assert_eq!(run(UDP, udp), "True\nTrue\nTrue\n", "{level} {nec}");
            wait_session(&server, &[ALICE, "command=udp", "rep=0"]);
        }
    }
}
