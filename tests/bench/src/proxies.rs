//! The measured proxies: finds the installed ones, and starts them.

use std::ffi::OsStr;

use crate::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyKind {
    Direct,
    /// A proxy that does as little as possible, see floor.rs.
    Floor,
    FloorSplice,
    S5,
    Microsocks,
    Dante,
    Ssh,
    Hev,
    ThreeProxy,
    FastSocks5,
    Other,
}

/// An installed proxy.
#[derive(Clone, Debug)]
pub struct Proxy {
    pub name: String,
    pub kind: ProxyKind,
    pub path: PathBuf,
}

/// A running proxy, killed when dropped.
pub struct RunningProxy {
    pub via: Via,
    pub tree: Tree,
    _processes: Vec<Process>,
}

/// Returns the installed proxies, and a line for each missing one.
pub fn find() -> (Vec<Proxy>, Vec<String>) {
    let (mut found, mut missing) = (vec![Proxy::new("direct", ProxyKind::Direct, PathBuf::new())], Vec::new());
    let this = std::env::current_exe().unwrap_or_default();
    found.push(Proxy::new("floor", ProxyKind::Floor, this.clone()));
    found.push(Proxy::new("floor, splice", ProxyKind::FloorSplice, this));
    let built = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/release/s5");
    let s5 = std::env::var_os("S5_BENCH_S5").map_or_else(|| PathBuf::from(built), PathBuf::from);
    let debian = [("microsocks", ProxyKind::Microsocks, "microsocks"), ("Dante", ProxyKind::Dante, "danted")];
    let mut wanted = vec![("s5".to_owned(), ProxyKind::S5, Some(s5))];
    wanted.extend(debian.map(|(name, kind, program)| (name.to_owned(), kind, which(program))));
    let ssh = ["sshd", "ssh-keygen", "ssh"].map(which).into_iter().reduce(Option::and).flatten();
    wanted.push(("ssh -D".to_owned(), ProxyKind::Ssh, ssh));
    let peers = std::env::var("S5_BENCH_PEERS").unwrap_or_default();
    for peer in peers.split([':', ',']).filter(|peer| !peer.is_empty()) {
        let (name, path) = peer.split_once('=').unwrap_or((peer, peer));
        let kind = match name {
            "microsocks" => ProxyKind::Microsocks,
            "hev-socks5-server" => ProxyKind::Hev,
            "3proxy" => ProxyKind::ThreeProxy,
            "fast-socks5" => ProxyKind::FastSocks5,
            _ if name.starts_with("s5") => ProxyKind::S5,
            _ => ProxyKind::Other,
        };
        wanted.retain(|(known, ..)| known != name);
        wanted.push((name.to_owned(), kind, Some(path.into())));
    }
    for (name, kind, path) in wanted {
        match path.filter(|path| path.is_file()) {
            Some(path) => found.push(Proxy::new(&name, kind, path)),
            None => missing.push(format!("{name}: not installed, or not found at its path")),
        }
    }
    for known in ["hev-socks5-server", "3proxy", "fast-socks5"] {
        if !found.iter().any(|proxy| proxy.name == known) && !missing.iter().any(|line| line.starts_with(known)) {
            missing.push(format!("{known}: not in S5_BENCH_PEERS"));
        }
    }
    (found, missing)
}

pub fn which(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    dirs.map(|dir| dir.join(program)).find(|path| path.is_file())
}

/// Returns a free port. Not all proxies can choose a port and report it.
pub fn free_port() -> Result<u16, BenchError> {
    Ok(listen_anywhere()?.local_addr()?.port())
}

/// Writes a file into the directory of this run.
pub fn write(name: &str, content: &str) -> Result<PathBuf, BenchError> {
    let path = dir().join(name);
    fs::write(&path, content)?;
    Ok(path)
}

fn command(path: &Path, args: &[&dyn AsRef<OsStr>]) -> Command {
    let mut command = Command::new(path);
    command.args(args.iter().map(|arg| arg.as_ref()));
    command
}

impl Proxy {
    fn new(name: &str, kind: ProxyKind, path: PathBuf) -> Self {
        Self { name: name.to_owned(), kind, path }
    }

    pub fn is_peer(&self) -> bool {
        !matches!(self.kind, ProxyKind::Direct | ProxyKind::Floor | ProxyKind::FloorSplice | ProxyKind::S5)
    }

    /// Returns true if the proxy supports UDP ASSOCIATE.
    pub fn has_udp(&self) -> bool {
        !matches!(self.kind, ProxyKind::Floor | ProxyKind::FloorSplice | ProxyKind::Microsocks | ProxyKind::Ssh)
    }

    /// Returns the number of descriptors of one tunnel. hev-socks5-server and the floor with splice open two pipes
    /// more.
    pub fn descriptors_per_tunnel(&self) -> u64 {
        if matches!(self.kind, ProxyKind::Hev | ProxyKind::FloorSplice) { 6 } else { 2 }
    }

    /// Starts the proxy and waits until it answers a greeting.
    pub fn start(&self) -> Result<RunningProxy, BenchError> {
        if self.kind == ProxyKind::Direct {
            return Ok(RunningProxy { via: Via::Direct, tree: Tree::default(), _processes: Vec::new() });
        }
        self.start_as(|port| self.command(port))
    }

    /// Like [`Proxy::start`], with another command.
    pub fn start_as(&self, command: impl Fn(u16) -> Result<Command, BenchError>) -> Result<RunningProxy, BenchError> {
        // Another process may bind the free port first.
        let mut last = Err(failed("not started"));
        for _ in 0..3 {
            let (port, mut processes) = (free_port()?, self.prepare()?);
            processes.push(Process::start(&command(port)?)?);
            last = self.wait(processes, port, Duration::from_millis(5));
            if last.is_ok() {
                break;
            }
        }
        last
    }

    /// Starts the proxy. Returns the time until it answers a greeting.
    pub fn timed_start(&self) -> Result<(Duration, RunningProxy), BenchError> {
        let (port, mut processes) = (free_port()?, self.prepare()?);
        let mut command = self.command(port)?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let started = Instant::now();
        processes.push(Process::spawn_directly(command)?);
        let running = self.wait(processes, port, Duration::ZERO)?;
        Ok((started.elapsed(), running))
    }

    /// Starts the processes that must run before the proxy.
    fn prepare(&self) -> Result<Vec<Process>, BenchError> {
        if self.kind == ProxyKind::Ssh { Ok(vec![start_sshd()?]) } else { Ok(Vec::new()) }
    }

    fn wait(&self, mut processes: Vec<Process>, port: u16, pause: Duration) -> Result<RunningProxy, BenchError> {
        let at = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
        wait_until(&mut processes, pause, || socks::answers_greeting(at).unwrap_or(false))
            .map_err(|_| failed(format!("{} did not start", self.path.display())))?;
        let tree = Tree(processes.iter().map(Process::pid).collect());
        Ok(RunningProxy { via: Via::Socks(at), tree, _processes: processes })
    }

    pub fn command(&self, port: u16) -> Result<Command, BenchError> {
        let (path, number) = (self.path.as_path(), port.to_string());
        let listen = format!("127.0.0.1:{port}");
        Ok(match self.kind {
            ProxyKind::Direct => return Err(BenchError::Unsupported),
            ProxyKind::Floor => command(path, &[&FLOOR, &number]),
            ProxyKind::FloorSplice => command(path, &[&FLOOR, &number, &"splice"]),
            ProxyKind::S5 => {
                let mut command = command(path, &[&"serve", &"-q", &"--listen", &listen]);
                // All load comes from one address.
                command.args(["--max-per-client", "1000000"]);
                let more = std::env::var("S5_BENCH_ARGS").unwrap_or_default();
                command.args(more.split_whitespace());
                command
            }
            ProxyKind::Microsocks => command(path, &[&"-i", &"127.0.0.1", &"-p", &number]),
            ProxyKind::Dante => {
                let text = dante_config(port, "none", "root", "", "connect udpassociate udpreply");
                command(path, &[&"-f", &write("danted.conf", &text)?, &"-p", &dir().join("danted.pid")])
            }
            ProxyKind::Ssh => ssh(path, port)?,
            ProxyKind::Hev => {
                let text = format!(
                    "main:\n  workers: 2\n  port: {port}\n  listen-address: '127.0.0.1'\n\
                     \x20 udp-listen-address: '127.0.0.1'\n\
                     misc:\n  log-file: stderr\n  log-level: error\n  limit-nofile: 20000\n"
                );
                command(path, &[&write("hev.yml", &text)?])
            }
            ProxyKind::ThreeProxy => {
                let text = format!("auth none\nmaxconn 20000\nsocks -p{port} -i127.0.0.1\n");
                command(path, &[&write("3proxy.cfg", &text)?])
            }
            ProxyKind::FastSocks5 => {
                command(path, &[&"--listen-addr", &listen, &"--allow-udp", &"--public-addr", &"127.0.0.1", &"no-auth"])
            }
            ProxyKind::Other => command(path, &[&number]),
        })
    }
}

/// Returns a configuration of Dante. `login` has further lines of both rules.
pub fn dante_config(port: u16, method: &str, user: &str, login: &str, commands: &str) -> String {
    format!(
        "logoutput: /dev/null\ninternal: 127.0.0.1 port = {port}\nexternal: 127.0.0.1\n\
         clientmethod: none\nsocksmethod: {method}\nuser.privileged: {user}\nuser.unprivileged: {user}\n\
         client pass {{\n from: 0.0.0.0/0 to: 0.0.0.0/0\n {login}}}\n\
         socks pass {{\n from: 0.0.0.0/0 to: 0.0.0.0/0\n command: {commands}\n {login}}}\n"
    )
}

pub fn user() -> Result<String, BenchError> {
    let output = Command::new("id").arg("-un").output()?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn key(name: &str) -> Result<PathBuf, BenchError> {
    let path = dir().join(name);
    if !path.exists() {
        let status = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&path).status()?;
        if !status.success() {
            return Err(failed("ssh-keygen failed"));
        }
    }
    Ok(path)
}

/// Starts sshd on loopback with new keys. Writes its port to the file `sshd.port`.
fn start_sshd() -> Result<Process, BenchError> {
    let sshd = which("sshd").ok_or_else(|| failed("sshd is not installed"))?;
    let port = free_port()?;
    let config = format!(
        "Port {port}\nListenAddress 127.0.0.1\nHostKey {}\nAuthorizedKeysFile {}.pub\nPidFile none\nStrictModes no\n\
         UsePAM yes\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n\
         PermitRootLogin prohibit-password\nPrintMotd no\nAllowTcpForwarding yes\nLogLevel QUIET\n",
        key("host_key")?.display(),
        key("user_key")?.display(),
    );
    let config = write("sshd_config", &config)?;
    // Root's sshd requires the directory /run/sshd, which is created in a mount namespace if it is missing.
    let script = "[ -d /run/sshd ] || [ \"$(id -u)\" != 0 ] || { mount -t tmpfs none /run && mkdir /run/sshd; }; \
                  exec \"$@\"";
    let mut command = match Path::new("/run/sshd").is_dir() {
        true => Command::new(&sshd),
        false => {
            let mut command = Command::new("unshare");
            command.args(["--mount", "--", "sh", "-c", script, "sh"]).arg(&sshd);
            command
        }
    };
    command.arg("-D").arg("-f").arg(config);
    let mut process = Process::start(&command)?;
    wait_until_it_listens(&mut process, port)?;
    write("sshd.port", &port.to_string())?;
    Ok(process)
}

fn ssh(path: &Path, port: u16) -> Result<Command, BenchError> {
    let sshd = fs::read_to_string(dir().join("sshd.port"))?;
    let mut command = command(path, &[&"-F", &"none", &"-4", &"-N", &"-p", &sshd, &"-l", &user()?]);
    command.arg("-D").arg(format!("127.0.0.1:{port}")).arg("-i").arg(key("user_key")?);
    for option in [
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
        "GlobalKnownHostsFile=/dev/null",
        "IdentitiesOnly=yes",
        "IdentityAgent=none",
        "BatchMode=yes",
        "ExitOnForwardFailure=yes",
        "LogLevel=QUIET",
    ] {
        command.arg("-o").arg(option);
    }
    command.arg("127.0.0.1");
    Ok(command)
}
