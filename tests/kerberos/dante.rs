//! Interoperation with Dante's server and client. S5_TEST_DANTE names the install directory of a build with GSSAPI, with
//! sbin/sockd and bin/socksify (Debian's packages have no GSSAPI). Without it, the tests are skipped.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::peer::PYTHON;
use crate::support::realm::Realm;
use crate::support::scripted::{RunningProgram, text};
use crate::support::{
    TIMEOUT, V4, closed_port, echo_server, record_skip, temp_dir, udp_echo_server, wait_until, write_file,
};
use crate::{ALICE, LEVELS, bytes, client_at, path, realm, serve, stdout, wait_session};

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

/// Dante's server; killed when dropped.
struct Sockd(Child, SocketAddr, tempfile::TempDir);

impl Sockd {
    fn start(dante: &Path, realm: &Realm, level: &str, more: &str) -> Self {
        // sockd does not support port 0, and another program can take the free port first.
        (0..5).find_map(|_| Self::start_on(closed_port(), dante, realm, level, more)).expect("sockd listens")
    }

    fn start_on(addr: SocketAddr, dante: &Path, realm: &Realm, level: &str, more: &str) -> Option<Self> {
        let dir = temp_dir();
        let user = text(&stdout(Command::new("id").arg("-un"), b""));
        // The client rule configures the login, the socks rule the level.
        let keytab = realm.file("service.keytab");
        let login = format!("gssapi.keytab: FILE:{}\n  gssapi.enctype: {level}", keytab.display());
        let config = format!(
            "logoutput: {log}\ninternal: 127.0.0.1 port = {port}\nexternal: 127.0.0.1\nclientmethod: none\n\
             socksmethod: gssapi\nuser.privileged: {user}\nuser.unprivileged: {user}\n\
             client pass {{\n  from: 0.0.0.0/0 to: 0.0.0.0/0\n  {login}\n  {more}\n}}\n\
             socks pass {{\n  from: 0.0.0.0/0 to: 0.0.0.0/0\n\
             command: bind connect udpassociate bindreply udpreply\n\
             {login}\n}}\n",
            log = dir.path().join("log").display(),
            port = addr.port(),
            user = user.trim(),
        );
        let config = write_file(dir.path(), "sockd.conf", &config);
        let mut command = Command::new(dante.join("sbin/sockd"));
        command.args(["-N", "1", "-f", &config, "-p", &path(&dir.path().join("pid"))]).env("TMPDIR", dir.path());
        realm.env(&mut command).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().expect("sockd starts");
        let log = || std::fs::read_to_string(dir.path().join("log")).unwrap_or_default();
        let mut has_ended = false;
        wait_until("sockd runs", TIMEOUT, || {
            has_ended = child.try_wait().expect("it can be waited for").is_some();
            has_ended || log().contains(" running")
        });
        if has_ended {
            eprintln!("sockd:\n{}", log());
            return None;
        }
        Some(Self(child, addr, dir))
    }

    fn url(&self) -> String {
        format!("localhost:{}", self.1.port())
    }
}

impl Drop for Sockd {
    fn drop(&mut self) {
        // SIGTERM also ends its child processes.
        let _ = Command::new("kill").arg(self.0.id().to_string()).status();
        let _ = self.0.wait();
        if std::thread::panicking() {
            eprintln!("sockd's log:\n{}", std::fs::read_to_string(self.2.path().join("log")).unwrap_or_default());
        }
    }
}

#[test]
fn s5_clients_work_with_dante_server() {
    let Some((dante, realm)) = set_up() else { return };
    let (echo, udp, data) = (echo_server().to_string(), udp_echo_server(V4).to_string(), bytes(300_000));
    for (level, dante_level) in LEVELS.into_iter().zip(DANTE_LEVELS) {
        for (more, nec) in [("", None), ("clientcompatibility: necgssapi", Some("--gssapi-nec"))] {
            let sockd = Sockd::start(&dante, &realm, dante_level, more);
            let args = |target| nec.into_iter().chain([target]).collect::<Vec<&str>>();
            let received = stdout(&mut client_at(&realm, "connect", &sockd.url(), level, &args(&echo)), &data);
            assert!(received == data, "{level} {nec:?}: {} bytes", received.len());
            let mut client = RunningProgram::start(&mut client_at(&realm, "udp", &sockd.url(), level, &args(&udp)));
            for length in [1, 1472, 60_000] {
                let line = [vec![b'x'; length], b"\n".to_vec()].concat();
                client.write(&line);
                client.stdout(|all| all.ends_with(&line));
            }
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
