//! OpenSSH: ssh and git through `s5 connect`, and `ssh -D` as a proxy.

use std::fs::File;

use crate::*;

const SSHD: &str = "/usr/sbin/sshd";
/// Exit status of s5 if the proxy closes the connection instead of replying.
const PROTOCOL_ERROR: i32 = 97;

/// An ssh server with new keys, which admits the current user.
pub(crate) struct Sshd {
    pub(crate) addr: SocketAddr,
    dir: tempfile::TempDir,
    /// One process for each connection, as with inetd.
    children: Arc<Mutex<Vec<ProcessGroup>>>,
}

impl Sshd {
    /// Returns `None` if OpenSSH is not installed.
    pub(crate) fn start() -> Option<Self> {
        if !has_all(&["ssh", "sshd", "ssh-keygen"]) {
            return None;
        }
        let dir = temp_dir();
        let path = |name: &str| dir.path().join(name).display().to_string();
        for key in ["host_key", "user_key"] {
            let mut keygen = Command::new("ssh-keygen");
            stdout(keygen.args(["-q", "-t", "ed25519", "-N", "", "-C", key, "-f", &path(key)]), b"");
        }
        let public = |key: &str| std::fs::read_to_string(path(&format!("{key}.pub"))).expect("file read");
        write_file(dir.path(), "known_hosts", &format!("* {}", public("host_key")));
        // StrictModes would refuse the keys, because /tmp is world-writable. Without PAM, an sshd that does not run as
        // root can't read the user's password and treats the account as locked.
        let config = write_file(
            dir.path(),
            "sshd_config",
            &format!(
                "HostKey {}\nAuthorizedKeysFile {}\nPidFile none\nStrictModes no\nUsePAM yes\n\
                 PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n\
                 PrintMotd no\nSetEnv PATH={}:/usr/bin:/bin\nAllowTcpForwarding yes\nLogLevel ERROR\n",
                path("host_key"),
                path("user_key.pub"),
                Path::new(env!("CARGO_BIN_EXE_s5")).with_file_name("").display(),
            ),
        );
        let log = File::create(dir.path().join("log")).expect("file created");
        let children = Arc::new(Mutex::new(Vec::new()));
        let shared = children.clone();
        let addr = tcp_server(V4, move |stream| {
            let socket = OwnedFd::from(stream);
            let second = socket.try_clone().expect("cloned");
            let mut command = sshd();
            command.args(["-i", "-e", "-f", &config]).stdin(Stdio::from(socket)).stdout(Stdio::from(second));
            command.stderr(log.try_clone().expect("cloned"));
            shared.lock().expect("not poisoned").push(ProcessGroup::start(&mut command));
        });
        Some(Self { addr, dir, children })
    }

    /// Writes a configuration file for ssh that begins with these lines.
    pub(crate) fn client_config(&self, lines: &str) -> String {
        let path = |name: &str| self.dir.path().join(name).display().to_string();
        let mut config = format!("{lines}\n");
        let _ = writeln!(config, "IdentityFile {}\nUserKnownHostsFile {}", path("user_key"), path("known_hosts"));
        config += "GlobalKnownHostsFile none\nStrictHostKeyChecking yes\nIdentitiesOnly yes\nIdentityAgent none\n\
                   BatchMode yes\nPreferredAuthentications publickey\nConnectTimeout 30\nLogLevel ERROR\n";
        static COUNT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let n = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        write_file(self.dir.path(), &format!("ssh_config{n}"), &config)
    }

    /// ssh to this server, with these lines of configuration.
    pub(crate) fn ssh(&self, lines: &str) -> Command {
        let mut command = Command::new("ssh");
        command.args(["-T", "-F", &self.client_config(lines), "-p", &self.addr.port().to_string(), "127.0.0.1"]);
        command
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        self.children.lock().map(|mut children| children.clear()).unwrap_or_default();
        if thread::panicking() {
            eprintln!("sshd's log:\n{}", std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default());
        }
    }
}

/// sshd. Root's sshd requires the directory /run/sshd, which is created in a mount namespace if it is missing.
fn sshd() -> Command {
    if Path::new("/run/sshd").is_dir() || !rustix::process::getuid().is_root() {
        return Command::new(SSHD);
    }
    let script = "mount -t tmpfs none /run && mkdir -m 755 /run/sshd && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "--", "sh", "-c", script, "sh", SSHD]);
    command
}

/// A `ProxyCommand` line with `s5 connect`.
pub(crate) fn s5_as_proxy_command(options: &str) -> String {
    format!("ProxyCommand '{}' connect {options} %h %p", env!("CARGO_BIN_EXE_s5"))
}

/// git without the configuration of the user and the machine.
pub(crate) fn git(dir: &Path) -> Command {
    let mut command = Command::new("git");
    command.current_dir(dir).env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1");
    for variable in ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_SSH", "GIT_SSH_COMMAND"] {
        command.env_remove(variable);
    }
    command
}

/// Creates a repository with one commit of a file with this content.
pub(crate) fn repository(dir: &Path, content: &[u8]) -> PathBuf {
    let path = dir.join("origin");
    std::fs::create_dir(&path).expect("directory created");
    std::fs::write(path.join("file"), content).expect("file written");
    stdout(git(&path).args(["init", "-q", "-b", "main"]), b"");
    stdout(git(&path).args(["add", "file"]), b"");
    let author = ["-c", "user.name=anna", "-c", "user.email=anna@localhost", "-c", "commit.gpgsign=false"];
    stdout(git(&path).args(author).args(["commit", "-q", "-m", "one file"]), b"");
    path
}

#[test]
fn s5_or_nc_as_proxy_command_carries_ssh_through_s5_serve() {
    let Some(sshd) = Sshd::start() else { return };
    let nc = |server: &Server| format!("ProxyCommand nc.openbsd -X 5 -x {} %h %p", server.addr());
    let commands: [&dyn Fn(&Server) -> String; 2] = [&|_| s5_as_proxy_command(""), &nc];
    for command in &commands[..if is_installed("nc.openbsd") { 2 } else { 1 }] {
        let server = Server::start(&[]);
        let mut ssh = sshd.ssh(&command(&server));
        assert_echoes(ssh.arg("cat").env("S5_PROXY", server.addr().to_string()), &bytes(4 << 20));
        wait_session(&server, &["command=connect", &format!("to=\"{}\"", sshd.addr), "rep=0"]);
    }
}

#[test]
fn ssh_shows_error_of_s5_connect() {
    let Some(sshd) = Sshd::start() else { return };
    let (server, closed) = (Server::start(&[]), closed_port());
    let config = sshd.client_config(&s5_as_proxy_command(&format!("-x {}", server.addr())));
    let mut ssh = Command::new("ssh");
    let output =
        run(ssh.args(["-F", &config, "-p", &closed.port().to_string(), "127.0.0.1", "true"]), b"", LONG_TIMEOUT);
    assert_eq!(exit_code(&output), 255);
    let stderr = text(&output.stderr);
    assert!(stderr.contains(&format!("for {closed}: ")) && stderr.contains("refused (REP 5)"), "{stderr}");
}

/// Starts `ssh -D`.
fn start_ssh_d(sshd: &Sshd) -> OtherServer {
    OtherServer::start(|_, addr| {
        let mut ssh = sshd.ssh(&format!("DynamicForward {addr}\nExitOnForwardFailure yes"));
        ssh.arg("-N");
        ssh
    })
}

#[test]
fn s5_connect_passes_through_ssh_d() {
    let Some(sshd) = Sshd::start() else { return };
    let (proxy, server, echo) = (start_ssh_d(&sshd), Server::start(&[]), echo_server());
    let (hop, s5_hop) = (proxy.addr.to_string(), server.addr().to_string());
    // Also in chains with s5, first and last.
    let table = [
        (hop.clone(), "127.0.0.1", bytes(4 << 20), None),
        (hop.clone(), "localhost", b"hello".to_vec(), None),
        (format!("{hop},{s5_hop}"), "127.0.0.1", b"hello".to_vec(), Some(echo)),
        (format!("{s5_hop},{hop}"), "127.0.0.1", b"hello".to_vec(), Some(proxy.addr)),
    ];
    for (hops, host, data, dst) in table {
        assert_echoes(s5().args(["connect", "-x", &hops, host, &echo.port().to_string()]), &data);
        if let Some(dst) = dst {
            wait_session(&server, &["command=connect", &format!("to=\"{dst}\""), "rep=0"]);
        }
    }
}

#[test]
fn s5_bind_and_udp_through_ssh_d_fail_with_status_97() {
    let Some(sshd) = Sshd::start() else { return };
    let proxy = start_ssh_d(&sshd);
    for mode in ["bind", "udp"] {
        let output = run(s5().args([mode, "-x", &proxy.addr.to_string(), "127.0.0.1:9"]), b"", LONG_TIMEOUT);
        let words = format!("proxy {}: request, for 127.0.0.1:9: ", proxy.addr);
        assert_fails_with(&output, PROTOCOL_ERROR, &[&words]);
    }
}
