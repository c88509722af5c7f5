//! Dante both ways, where S5_TEST_DANTE names a build that has GSSAPI (Debian's has not): the folder with sbin/sockd and
//! bin/socksify in it. All is skipped without it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::common::{TIMEOUT, closed_port, echo_server, temp_dir, udp_echo_server, wait_until, write_file};
use crate::kit::V4;
use crate::kit::realm::Realm;
use crate::peer::PYTHON;
use crate::scripted::{RunningProgram, text};
use crate::{ALICE, LEVELS, client_at, octets, path, realm, serve, session, stdout};

/// What Dante calls the levels.
const ITS_LEVELS: [&str; 3] = ["clear", "integrity", "confidentiality"];
/// host, port: sends octets, and says how many of them have come back. Dante's library is not for threads.
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
/// host, port: sends datagrams of some lengths, and says which have come back.
const UDP: &str = r#"
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(10)
for length in (1, 1472, 60000):
    s.sendto(b"u" * length, (sys.argv[1], int(sys.argv[2])))
    print(s.recvfrom(65536)[0] == b"u" * length)
"#;

/// Where Dante is, and a realm; nobody is to blame for not having built it.
fn set_up() -> Option<(PathBuf, Realm)> {
    match std::env::var_os("S5_TEST_DANTE") {
        Some(dante) => Some((dante.into(), realm()?)),
        None => {
            eprintln!("skipped: S5_TEST_DANTE names no build of Dante with GSSAPI");
            None
        }
    }
}

/// A server of Dante's; killed when dropped.
struct Sockd(Child, SocketAddr, tempfile::TempDir);

impl Sockd {
    fn start(dante: &Path, realm: &Realm, level: &str, more: &str) -> Self {
        // It takes no port 0, and somebody may be faster to take a port that was free.
        (0..5).find_map(|_| Self::start_on(closed_port(), dante, realm, level, more)).expect("sockd listens")
    }

    fn start_on(addr: SocketAddr, dante: &Path, realm: &Realm, level: &str, more: &str) -> Option<Self> {
        let folder = temp_dir();
        let user = text(&stdout(Command::new("id").arg("-un"), b""));
        // The first of its rules counts for the login, the second for the level.
        let keytab = realm.file("service.keytab");
        let login = format!("gssapi.keytab: FILE:{}\n  gssapi.enctype: {level}", keytab.display());
        let config = format!(
            "logoutput: {log}\ninternal: 127.0.0.1 port = {port}\nexternal: 127.0.0.1\nclientmethod: none\n\
             socksmethod: gssapi\nuser.privileged: {user}\nuser.unprivileged: {user}\n\
             client pass {{\n  from: 0.0.0.0/0 to: 0.0.0.0/0\n  {login}\n  {more}\n}}\n\
             socks pass {{\n  from: 0.0.0.0/0 to: 0.0.0.0/0\n\
             command: bind connect udpassociate bindreply udpreply\n\
             {login}\n}}\n",
            log = folder.path().join("log").display(),
            port = addr.port(),
            user = user.trim(),
        );
        let config = write_file(folder.path(), "sockd.conf", &config);
        let mut command = Command::new(dante.join("sbin/sockd"));
        command.args(["-N", "1", "-f", &config, "-p", &path(&folder.path().join("pid"))]).env("TMPDIR", folder.path());
        realm.env(&mut command).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().expect("sockd starts");
        let log = || std::fs::read_to_string(folder.path().join("log")).unwrap_or_default();
        let mut has_ended = false;
        wait_until("sockd runs", TIMEOUT, || {
            has_ended = child.try_wait().expect("it can be waited for").is_some();
            has_ended || log().contains(" running")
        });
        if has_ended {
            eprintln!("sockd:\n{}", log());
            return None;
        }
        Some(Self(child, addr, folder))
    }

    fn url(&self) -> String {
        format!("localhost:{}", self.1.port())
    }
}

impl Drop for Sockd {
    fn drop(&mut self) {
        // It ends its own children.
        let _ = Command::new("kill").arg(self.0.id().to_string()).status();
        let _ = self.0.wait();
        if std::thread::panicking() {
            eprintln!("sockd's log:\n{}", std::fs::read_to_string(self.2.path().join("log")).unwrap_or_default());
        }
    }
}

#[test]
fn our_clients_go_through_dantes_server() {
    let Some((dante, realm)) = set_up() else { return };
    let (echo, udp, data) = (echo_server().to_string(), udp_echo_server(V4).to_string(), octets(300_000));
    for (level, its) in LEVELS.into_iter().zip(ITS_LEVELS) {
        for (more, nec) in [("", None), ("clientcompatibility: necgssapi", Some("--gssapi-nec"))] {
            let sockd = Sockd::start(&dante, &realm, its, more);
            let args = |target| nec.into_iter().chain([target]).collect::<Vec<&str>>();
            let came = stdout(&mut client_at(&realm, "connect", &sockd.url(), level, &args(&echo)), &data);
            assert!(came == data, "{level} {nec:?}: {} octets", came.len());
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
fn dantes_client_goes_through_our_server() {
    let Some((dante, realm)) = set_up() else { return };
    let (echo, udp) = (echo_server(), udp_echo_server(V4));
    for (level, its) in LEVELS.into_iter().zip(ITS_LEVELS) {
        for nec in ["", "clientcompatibility: necgssapi"] {
            let server = serve(&realm, &["--gssapi-protection", level]);
            let folder = temp_dir();
            let config = format!(
                "route {{\n  from: 0.0.0.0/0 to: 0.0.0.0/0 via: localhost port = {port}\n\
                 proxyprotocol: socks_v5\n  command: connect udpassociate\n  method: gssapi\n\
                 gssapi.enctype: {its}\n  {nec}\n}}\n",
                port = server.addr().port()
            );
            let config = write_file(folder.path(), "socks.conf", &config);
            let run = |script: &str, target: SocketAddr| {
                let mut command = Command::new(dante.join("bin/socksify"));
                command.args([PYTHON, "-c", script, &target.ip().to_string(), &target.port().to_string()]);
                realm.env(&mut command).env("SOCKS_CONF", &config).env("SOCKS_AUTOADD_LANROUTES", "no");
                text(&stdout(&mut command, b""))
            };
            assert_eq!(run(TCP, echo), "300000 True b''\n", "{level} {nec}");
            session(&server, &[ALICE, "command=connect", "rep=0"]);
            assert_eq!(run(UDP, udp), "True\nTrue\nTrue\n", "{level} {nec}");
            session(&server, &[ALICE, "command=udp", "rep=0"]);
        }
    }
}
