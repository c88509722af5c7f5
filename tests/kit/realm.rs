//! A throw-away realm of Kerberos on 127.0.0.1: a KDC of MIT's as a child process, its principals, their keys and
//! tickets, all of it in a folder that goes away. Any number of them can run at once.

use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use socket2::{Domain, Socket, Type};
use tempfile::TempDir;

use super::V4;
use crate::common::{TIMEOUT, is_installed, run, wait_until};

pub const REALM: &str = "S5.TEST";
/// The password of alice.
pub const PASSWORD: &str = "alice-secret";

/// The programs that it takes.
const PROGRAMS: [&str; 4] = ["krb5kdc", "kdb5_util", "kadmin.local", "kinit"];
/// Where [`current_realm_dir`] finds the folder of the realm.
const REALM_VARIABLE: &str = "S5_TEST_REALM";

pub struct Options {
    /// How long tickets live, as kinit has it: `10s`, `1h`.
    pub lifetime: &'static str,
    /// The only encryption type.
    pub enctype: &'static str,
}

impl Default for Options {
    fn default() -> Self {
        Self { lifetime: "1h", enctype: "aes256-cts-hmac-sha1-96" }
    }
}

pub struct Realm {
    folder: TempDir,
    kdc: Kdc,
    port: Port,
    /// Keeps the KDC's other port when it is silenced.
    silent: Option<UdpSocket>,
}

impl Realm {
    /// One with the usual options.
    pub fn start() -> Self {
        Self::with(&Options::default())
    }

    /// A realm with, in its folder:
    ///
    /// | file | what it holds |
    /// | --- | --- |
    /// | ccache, ccache.mallory | a ticket of alice, of mallory |
    /// | user.keytab | alice's key |
    /// | service.keytab | the keys of rcmd/localhost and socks/localhost |
    /// | wrong.keytab | another key under the name and number of that of rcmd/localhost |
    ///
    /// The KDC knows nokey/localhost as well.
    pub fn with(options: &Options) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        // What is not ours may have the port for UDP.
        for _ in 0..20 {
            let port = Port::reserve();
            write_config(folder.path(), port.number, options);
            if !folder.path().join("principal").exists() {
                make_principals(folder.path());
            }
            if let Some(kdc) = start_kdc(folder.path(), &port) {
                let realm = Self { folder, kdc, port, silent: None };
                kinit(realm.folder.path(), "alice", "user.keytab", "ccache", options.lifetime);
                kinit(realm.folder.path(), "mallory", "mallory.keytab", "ccache.mallory", options.lifetime);
                return realm;
            }
        }
        panic!("the KDC does not start:\n{}", std::fs::read_to_string(folder.path().join("log")).unwrap_or_default());
    }

    /// A file of the realm's folder, whether there is one or not.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Lets a child process live in the realm, as alice and with the keys of the services.
    pub fn env<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        env(self.folder.path(), command)
    }

    /// From now on nobody answers at the KDC's address, though it can be connected to.
    pub fn stop_answering(&mut self) {
        self.stop();
        self.silent = Some(UdpSocket::bind((V4, self.port.number)).expect("the KDC's port is free again"));
        self.port.socket.listen(16).expect("the port is ours");
    }

    /// The KDC is gone, and its port closed.
    pub fn stop(&mut self) {
        self.kdc.stop();
    }
}

/// A KDC that ends with this process, however that ends.
struct Kdc {
    child: Child,
    /// Kills it when our end of its stdin is closed.
    guard: Child,
}

impl Kdc {
    fn start(command: &mut Command) -> Self {
        let null = |command: &mut Command| command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let child = null(command.stdin(Stdio::null())).expect("krb5kdc starts");
        let mut guard = Command::new("sh");
        guard.args(["-c", "read _; kill -s KILL \"$1\"", "sh", &child.id().to_string()]).stdin(Stdio::piped());
        Self { child, guard: null(&mut guard).expect("sh starts") }
    }

    fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("the child can be waited for").is_some()
    }

    fn stop(&mut self) {
        // In this order, since the number of a process that has ended may be given to another.
        for child in [&mut self.guard, &mut self.child] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Kdc {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Whether all is there that a realm takes; as [`has`].
pub fn can_start() -> bool {
    PROGRAMS.iter().all(|program| is_installed(program))
}

/// The folder of the realm that this process lives in.
pub fn current_realm_dir() -> Option<PathBuf> {
    std::env::var_os(REALM_VARIABLE).map(PathBuf::from)
}

/// Runs the calling test once more, as a child process in a realm with these options, which `prepare` may change
/// before. The folder of the realm in there; outside nothing when the inner run has passed.
pub fn in_realm(test: &str, options: &Options, prepare: impl FnOnce(&mut Realm, &mut Command)) -> Option<PathBuf> {
    if current_realm_dir().is_some() {
        return current_realm_dir();
    }
    if !can_start() {
        return None;
    }
    let mut realm = Realm::with(options);
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    command.args(["--exact", test, "--nocapture"]);
    realm.env(&mut command).env(REALM_VARIABLE, realm.folder.path());
    prepare(&mut realm, &mut command);
    let output = run(&mut command, b"", Duration::from_secs(120));
    let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "inside of the realm:\n{said}");
    None
}

/// Gets a ticket of that lifetime by the key of a keytab, all in the folder of a realm.
pub fn kinit(folder: &Path, user: &str, keytab: &str, ccache: &str, lifetime: &str) {
    let mut command = program("kinit");
    command.args(["-l", lifetime, "-k", "-t"]).arg(folder.join(keytab)).arg("-c").arg(folder.join(ccache)).arg(user);
    check(env(folder, &mut command), b"");
}

/// A port that no other realm gets as long as this one lives: krb5kdc shares it with whoever sets SO_REUSEPORT, but a
/// socket that does not listen gets no connections.
struct Port {
    socket: Socket,
    number: u16,
}

impl Port {
    fn reserve() -> Self {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.set_reuse_address(true).and_then(|()| socket.set_reuse_port(true)).expect("options");
        socket.bind(&SocketAddr::new(V4, 0).into()).expect("a port");
        let addr = socket.local_addr().ok().and_then(|addr| addr.as_socket()).expect("an address");
        Self { socket, number: addr.port() }
    }
}

/// A command that is found although Debian's users have no sbin in their PATH.
fn program(name: &str) -> Command {
    let mut command = Command::new(name);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", path + ":/usr/sbin:/sbin");
    command
}

fn env<'a>(folder: &Path, command: &'a mut Command) -> &'a mut Command {
    let file = |kind: &str, name: &str| format!("{kind}{}", folder.join(name).display());
    // A client keytab would fetch a ticket where there is to be none.
    command
        .env("KRB5_CONFIG", file("", "krb5.conf"))
        .env("KRB5_KDC_PROFILE", file("", "kdc.conf"))
        .env("KRB5CCNAME", file("FILE:", "ccache"))
        .env("KRB5_KTNAME", file("FILE:", "service.keytab"))
        .env("KRB5_CLIENT_KTNAME", file("FILE:", "none.keytab"))
        .env("KRB5RCACHENAME", file("file2:", "rcache"))
        .env_remove("KRB5_TRACE")
}

/// Runs a program that has to succeed.
fn check(command: &mut Command, stdin: &[u8]) {
    let output = run(command, stdin, TIMEOUT);
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}:\n{said}");
}

fn write_config(folder: &Path, port: u16, options: &Options) {
    let Options { lifetime, enctype } = options;
    // Nothing is asked of DNS, nor of this host's own name.
    let krb5 = format!(
        "[libdefaults]
    default_realm = {REALM}
    dns_lookup_kdc = false
    dns_lookup_realm = false
    dns_canonicalize_hostname = false
    rdns = false
    qualify_shortname = \"\"
    udp_preference_limit = 1
    permitted_enctypes = {enctype}
    ticket_lifetime = {lifetime}
    forwardable = true
[realms]
    {REALM} = {{
        kdc = 127.0.0.1:{port}
    }}
[domain_realm]
    localhost = {REALM}
    .localhost = {REALM}
[logging]
    kdc = FILE:{log}
    default = FILE:{log}
",
        log = folder.join("log").display()
    );
    let kdc = format!(
        "[kdcdefaults]
    kdc_listen = 127.0.0.1:{port}
    kdc_tcp_listen = 127.0.0.1:{port}
[realms]
    {REALM} = {{
        database_name = {folder}/principal
        key_stash_file = {folder}/stash
        acl_file = {folder}/kadm5.acl
        master_key_type = {enctype}
        supported_enctypes = {enctype}:normal
        max_life = 24h
    }}
",
        folder = folder.display()
    );
    for (name, text) in [("krb5.conf", &*krb5), ("kdc.conf", &*kdc), ("kadm5.acl", "")] {
        std::fs::write(folder.join(name), text).expect("a file");
    }
}

fn make_principals(folder: &Path) {
    let mut create = program("kdb5_util");
    create.args(["-r", REALM, "-P", "master-secret", "create", "-s"]);
    check(env(folder, &mut create), b"");
    // With -norandkey the password goes on being good. A principal that is made anew begins with the same key number.
    let at = folder.display();
    let script = format!(
        "addprinc -pw {PASSWORD} alice
addprinc -pw mallory-secret mallory
addprinc -randkey rcmd/localhost
ktadd -k {at}/wrong.keytab rcmd/localhost
delprinc -force rcmd/localhost
addprinc -randkey rcmd/localhost
addprinc -randkey socks/localhost
addprinc -randkey nokey/localhost
ktadd -k {at}/service.keytab rcmd/localhost
ktadd -k {at}/service.keytab socks/localhost
ktadd -k {at}/user.keytab -norandkey alice
ktadd -k {at}/mallory.keytab -norandkey mallory
"
    );
    check(env(folder, program("kadmin.local").args(["-r", REALM])), script.as_bytes());
    for name in ["wrong", "service", "user", "mallory"] {
        assert!(folder.join(format!("{name}.keytab")).exists(), "kadmin.local has made no {name}.keytab");
    }
}

/// `None` when it ends at once, as when the port is taken.
fn start_kdc(folder: &Path, port: &Port) -> Option<Kdc> {
    let mut kdc = Kdc::start(env(folder, program("krb5kdc").args(["-n", "-r", REALM])));
    let addr = SocketAddr::new(V4, port.number);
    let mut is_up = false;
    wait_until("the KDC listens or ends", TIMEOUT, || {
        is_up = TcpStream::connect(addr).is_ok();
        is_up || kdc.has_ended()
    });
    is_up.then_some(kdc)
}
