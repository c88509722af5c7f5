//! A temporary Kerberos realm on 127.0.0.1: an MIT KDC as a child process, with principals, keys and tickets in a
//! temporary directory. Several realms can run at once.

use socket2::{Domain, Socket, Type};

use super::*;

pub const REALM: &str = "S5.TEST";
/// The password of alice.
pub const PASSWORD: &str = "alice-secret";

/// Programs that a realm needs.
const PROGRAMS: [&str; 4] = ["krb5kdc", "kdb5_util", "kadmin.local", "kinit"];
/// The only encryption type, unless another one is given.
pub const DEFAULT_ENCTYPE: &str = "aes256-cts-hmac-sha1-96";
/// Lifetime of tickets, in kinit's format.
const LIFETIME: &str = "1h";

pub struct Realm {
    dir: TempDir,
    kdc: Kdc,
    port: Port,
    /// Occupies the KDC's UDP port after [`Realm::stop_answering`].
    silent: Option<UdpSocket>,
}

impl Realm {
    pub fn start() -> Self {
        Self::with(DEFAULT_ENCTYPE)
    }

    /// Starts a realm with this encryption type and these files in its directory:
    ///
    /// | file | content |
    /// | --- | --- |
    /// | ccache, ccache.mallory | a ticket of alice, of mallory |
    /// | user.keytab | alice's key |
    /// | service.keytab | the keys of rcmd/localhost and socks/localhost |
    /// | wrong.keytab | a wrong key with the name and key version of rcmd/localhost |
    ///
    /// The principal nokey/localhost exists too, without a keytab.
    pub fn with(enctype: &str) -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        // Another process may have the UDP port.
        for _ in 0..20 {
            let port = Port::reserve();
            write_config(dir.path(), port.number, enctype);
            if !dir.path().join("principal").exists() {
                make_principals(dir.path());
            }
            if let Some(kdc) = start_kdc(dir.path(), &port) {
                let realm = Self { dir, kdc, port, silent: None };
                kinit(realm.dir.path(), "alice", "user.keytab", "ccache", LIFETIME);
                kinit(realm.dir.path(), "mallory", "mallory.keytab", "ccache.mallory", LIFETIME);
                return realm;
            }
        }
        panic!("the KDC did not start:\n{}", fs::read_to_string(dir.path().join("log")).unwrap_or_default());
    }

    /// Path of a file in the realm's directory. The file need not exist.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Sets the environment of a child process: the realm, alice's ticket and the services' keytab.
    pub fn env<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        env(self.dir.path(), command)
    }

    /// Stops the KDC. Its port still accepts connections and datagrams, but nothing answers.
    pub fn stop_answering(&mut self) {
        self.stop();
        self.silent = Some(UdpSocket::bind((V4, self.port.number)).expect("the KDC's port is free again"));
        self.port.socket.listen(16).expect("listening");
    }

    /// Stops the KDC and closes its port.
    pub fn stop(&mut self) {
        self.kdc.stop();
    }
}

/// A KDC process. It ends with this process, even if this process is killed.
struct Kdc {
    child: Child,
    /// Kills the KDC when this process closes the guard's stdin.
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
        // The guard first: once the KDC has exited, its pid may be reused.
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

/// Returns true if all programs that a realm needs are installed, see [`is_installed`].
pub fn can_start() -> bool {
    PROGRAMS.iter().all(|program| is_installed(program))
}

/// Acquires a ticket with a keytab. Both are files in the realm's directory.
pub fn kinit(dir: &Path, user: &str, keytab: &str, ccache: &str, lifetime: &str) {
    let mut command = program("kinit");
    command.args(["-l", lifetime, "-k", "-t"]).arg(dir.join(keytab)).arg("-c").arg(dir.join(ccache)).arg(user);
    check(env(dir, &mut command), b"");
}

/// A port reserved for one realm. krb5kdc can bind it too, since both set SO_REUSEPORT; this socket does not listen, so
/// it receives no connections.
struct Port {
    socket: Socket,
    number: u16,
}

impl Port {
    fn reserve() -> Self {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("socket created");
        socket.set_reuse_address(true).and_then(|()| socket.set_reuse_port(true)).expect("option set");
        socket.bind(&SocketAddr::new(V4, 0).into()).expect("free port");
        let addr = socket.local_addr().ok().and_then(|addr| addr.as_socket()).expect("local address");
        Self { socket, number: addr.port() }
    }
}

/// A command, also searched in sbin directories, which are not in the PATH of Debian's users.
fn program(name: &str) -> Command {
    let mut command = Command::new(name);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", path + ":/usr/sbin:/sbin");
    command
}

fn env<'a>(dir: &Path, command: &'a mut Command) -> &'a mut Command {
    let file = |kind: &str, name: &str| format!("{kind}{}", dir.join(name).display());
    // With a client keytab, GSSAPI would acquire a missing ticket.
    command
        .env("KRB5_CONFIG", file("", "krb5.conf"))
        .env("KRB5_KDC_PROFILE", file("", "kdc.conf"))
        .env("KRB5CCNAME", file("FILE:", "ccache"))
        .env("KRB5_KTNAME", file("FILE:", "service.keytab"))
        .env("KRB5_CLIENT_KTNAME", file("FILE:", "none.keytab"))
        .env("KRB5RCACHENAME", file("file2:", "rcache"))
        .env_remove("KRB5_TRACE")
}

/// Runs a program and checks that it succeeds.
fn check(command: &mut Command, stdin: &[u8]) {
    let output = run(command, stdin, TIMEOUT);
    let output_text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}:\n{output_text}");
}

fn write_config(dir: &Path, port: u16, enctype: &str) {
    // No DNS, and independent of this machine's host name.
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
    ticket_lifetime = {LIFETIME}
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
        log = dir.join("log").display()
    );
    let kdc = format!(
        "[kdcdefaults]
    kdc_listen = 127.0.0.1:{port}
    kdc_tcp_listen = 127.0.0.1:{port}
[realms]
    {REALM} = {{
        database_name = {dir}/principal
        key_stash_file = {dir}/stash
        acl_file = {dir}/kadm5.acl
        master_key_type = {enctype}
        supported_enctypes = {enctype}:normal
        max_life = 24h
    }}
",
        dir = dir.display()
    );
    for (name, text) in [("krb5.conf", &*krb5), ("kdc.conf", &*kdc), ("kadm5.acl", "")] {
        fs::write(dir.join(name), text).expect("file written");
    }
}

fn make_principals(dir: &Path) {
    let mut create = program("kdb5_util");
    create.args(["-r", REALM, "-P", "master-secret", "create", "-s"]);
    check(env(dir, &mut create), b"");
    // -norandkey keeps the password valid. A principal that is created again starts with the same key version.
    let at = dir.display();
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
    check(env(dir, program("kadmin.local").args(["-r", REALM])), script.as_bytes());
    for name in ["wrong", "service", "user", "mallory"] {
        assert!(dir.join(format!("{name}.keytab")).exists(), "kadmin.local did not create {name}.keytab");
    }
}

/// Returns `None` if the KDC ends at once, for example because the port is in use.
fn start_kdc(dir: &Path, port: &Port) -> Option<Kdc> {
    let mut kdc = Kdc::start(env(dir, program("krb5kdc").args(["-n", "-r", REALM])));
    let addr = SocketAddr::new(V4, port.number);
    let mut is_up = false;
    wait_until("the KDC listens or exits", TIMEOUT, || {
        is_up = TcpStream::connect(addr).is_ok();
        is_up || kdc.has_ended()
    });
    is_up.then_some(kdc)
}
