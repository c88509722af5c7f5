//! OpenSSH: ssh and git through `s5 connect`, and `ssh -D` as a proxy.

use std::fmt::Write as _;
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use crate::support::{
    Server, TIMEOUT, closed_port, echo_server, run, s5, tcp_server, temp_dir, wait_until, write_file,
};
use crate::{LONG_TIMEOUT, ProcessGroup, assert_same, bytes, exit_code, has_all, stdout, text, wait_for_session};

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
    pub(crate) fn start() -> Self {
        let dir = temp_dir();
        let path = |name: &str| dir.path().join(name).display().to_string();
        for key in ["host_key", "user_key"] {
            let mut keygen = Command::new("ssh-keygen");
            stdout(keygen.args(["-q", "-t", "ed25519", "-N", "", "-C", key, "-f", &path(key)]), b"");
        }
        let public = |key: &str| std::fs::read_to_string(path(&format!("{key}.pub"))).expect("file read");
        write_file(dir.path(), "known_hosts", &format!("* {}", public("host_key")));
        // StrictModes would refuse the keys, because /tmp is world-writable. Without PAM, an sshd that does not run as root
        // can't read the user's password and treats the account as locked.
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
        let addr = tcp_server(Ipv4Addr::LOCALHOST.into(), move |stream| {
            let socket = OwnedFd::from(stream);
            let second = socket.try_clone().expect("cloned");
            let mut command = sshd();
            command.args(["-i", "-e", "-f", &config]).stdin(Stdio::from(socket)).stdout(Stdio::from(second));
            command.stderr(log.try_clone().expect("cloned"));
            shared.lock().expect("not poisoned").push(ProcessGroup::start(&mut command));
        });
        Self { addr, dir, children }
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
fn s5_connect_as_proxy_command_carries_ssh() {
    if !has_all(&["ssh", "sshd", "ssh-keygen"]) {
        return;
    }
    let (server, sshd, data) = (Server::start(&[]), Sshd::start(), bytes(4 << 20));
    let mut ssh = sshd.ssh(&s5_as_proxy_command(""));
    let echoed = stdout(ssh.arg("cat").env("S5_PROXY", server.addr().to_string()), &data);
    assert_same(&echoed, &data);
    wait_for_session(&server, &["command=connect", &format!("dst=\"{}\"", sshd.addr), "rep=0"]);
}

#[test]
fn nc_as_proxy_command_carries_ssh_through_s5_serve() {
    if !has_all(&["ssh", "sshd", "ssh-keygen", "nc.openbsd"]) {
        return;
    }
    let (server, sshd, data) = (Server::start(&[]), Sshd::start(), bytes(4 << 20));
    let mut ssh = sshd.ssh(&format!("ProxyCommand nc.openbsd -X 5 -x {} %h %p", server.addr()));
    assert_same(&stdout(ssh.arg("cat"), &data), &data);
    wait_for_session(&server, &["command=connect", &format!("dst=\"{}\"", sshd.addr), "rep=0"]);
}

#[test]
fn ssh_shows_error_of_s5_connect() {
    if !has_all(&["ssh", "sshd", "ssh-keygen"]) {
        return;
    }
    let (server, sshd, closed) = (Server::start(&[]), Sshd::start(), closed_port());
    let config = sshd.client_config(&s5_as_proxy_command(&format!("-x {}", server.addr())));
    let mut ssh = Command::new("ssh");
    let output =
        run(ssh.args(["-F", &config, "-p", &closed.port().to_string(), "127.0.0.1", "true"]), b"", LONG_TIMEOUT);
    assert_eq!(exit_code(&output), 255);
    let stderr = text(&output.stderr);
    assert!(stderr.contains(&format!("for {closed}: ")) && stderr.contains("refused (REP 5)"), "{stderr}");
}

#[test]
fn git_clones_and_pushes_over_ssh_through_one_proxy_and_two() {
    if !has_all(&["ssh", "sshd", "ssh-keygen", "git"]) {
        return;
    }
    let (first, second, sshd) = (Server::start(&[]), Server::start(&[]), Sshd::start());
    let (dir, content) = (temp_dir(), bytes(2 << 20));
    let origin = repository(dir.path(), &content);
    let url = format!("ssh://127.0.0.1:{}{}", sshd.addr.port(), origin.display());
    for (name, hops) in [("one", first.addr().to_string()), ("two", format!("{},{}", first.addr(), second.addr()))] {
        let config = sshd.client_config(&s5_as_proxy_command(&format!("-x {hops}")));
        let with_ssh = |dir: &Path| {
            let mut command = git(dir);
            command.env("GIT_SSH_COMMAND", format!("ssh -F '{config}'"));
            command
        };
        stdout(with_ssh(dir.path()).args(["clone", "-q", &url, name]), b"");
        let clone = dir.path().join(name);
        assert_same(&std::fs::read(clone.join("file")).expect("the file was cloned"), &content);
        stdout(with_ssh(&clone).args(["push", "-q", "origin", &format!("main:{name}")]), b"");
        stdout(git(&origin).args(["rev-parse", "--verify", "-q", name]), b"");
    }
    let target = format!("dst=\"{}\"", sshd.addr);
    wait_for_session(&first, &[&target, "rep=0"]);
    wait_for_session(&first, &[&format!("dst=\"{}\"", second.addr()), "rep=0"]);
    wait_for_session(&second, &[&target, "rep=0"]);
}

/// Starts `ssh -D` on a free port. Returns the process and its address.
fn start_ssh_d(sshd: &Sshd) -> (ProcessGroup, SocketAddr) {
    let attempt = || {
        let addr = closed_port();
        let mut ssh = sshd.ssh(&format!("DynamicForward {addr}\nExitOnForwardFailure yes"));
        let log = File::create(sshd.dir.path().join("ssh_d")).expect("file created");
        ssh.args(["echo connected && exec cat"]).stdin(Stdio::piped()).stdout(log).stderr(Stdio::null());
        let mut process = ProcessGroup::start(&mut ssh);
        let mut ended = false;
        wait_until("ssh -D listens", TIMEOUT, || {
            ended = process.has_ended();
            // ssh listens before it runs the command.
            ended || std::fs::read(sshd.dir.path().join("ssh_d")).is_ok_and(|log| log == b"connected\n")
        });
        (!ended).then_some((process, addr))
    };
    // ssh -D does not accept port 0, and another process may take a port that was free.
    (0..5).find_map(|_| attempt()).expect("ssh -D listens")
}

#[test]
fn s5_connect_passes_through_ssh_d() {
    if !has_all(&["ssh", "sshd", "ssh-keygen"]) {
        return;
    }
    let sshd = Sshd::start();
    let (_ssh, proxy) = start_ssh_d(&sshd);
    let (echo, data) = (echo_server(), bytes(4 << 20));
    let connect = |hops: &str, host: &str| {
        let mut command = s5();
        command.args(["connect", "-x", hops, host, &echo.port().to_string()]);
        command
    };
    let hop = proxy.to_string();
    assert_same(&stdout(&mut connect(&hop, "127.0.0.1"), &data), &data);
    assert_eq!(stdout(&mut connect(&hop, "localhost"), b"hello"), b"hello");
    // In chains with s5, first and last.
    let server = Server::start(&[]);
    assert_eq!(stdout(&mut connect(&format!("{hop},{}", server.addr()), "127.0.0.1"), b"hello"), b"hello");
    wait_for_session(&server, &["command=connect", &format!("dst=\"{echo}\""), "rep=0"]);
    assert_eq!(stdout(&mut connect(&format!("{},{hop}", server.addr()), "127.0.0.1"), b"hello"), b"hello");
    wait_for_session(&server, &["command=connect", &format!("dst=\"{proxy}\""), "rep=0"]);
}

#[test]
fn s5_bind_and_udp_through_ssh_d_fail_with_status_97() {
    if !has_all(&["ssh", "sshd", "ssh-keygen"]) {
        return;
    }
    let sshd = Sshd::start();
    let (_ssh, proxy) = start_ssh_d(&sshd);
    for mode in ["bind", "udp"] {
        let output = run(s5().args([mode, "-x", &proxy.to_string(), "127.0.0.1:9"]), b"", LONG_TIMEOUT);
        let stderr = text(&output.stderr);
        assert_eq!(exit_code(&output), PROTOCOL_ERROR, "{mode}: {stderr}");
        assert!(stderr.contains(&format!("proxy {proxy}: request, for 127.0.0.1:9: ")), "{mode}: {stderr}");
    }
}
