//! The proxies that are measured: which of them are there, and how each is started.

use std::ffi::OsStr;
use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::children::{Process, folder};
use crate::cpu::Tree;
use crate::measure::{Fault, PATIENCE, Via, failed};
use crate::socks;
use crate::target::listen_anywhere;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Direct,
    S5,
    Microsocks,
    Dante,
    Ssh,
    Hev,
    ThreeProxy,
    FastSocks5,
    Other,
}

/// A proxy that may be started.
#[derive(Clone, Debug)]
pub struct Proxy {
    pub name: String,
    pub kind: Kind,
    pub path: PathBuf,
}

/// A proxy that runs, until this is dropped.
pub struct Running {
    pub via: Via,
    pub tree: Tree,
    _processes: Vec<Process>,
}

/// Those that are there, and what is to be said of the others.
pub fn find() -> (Vec<Proxy>, Vec<String>) {
    let (mut found, mut missing) = (vec![Proxy::new("direct", Kind::Direct, PathBuf::new())], Vec::new());
    let built = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/release/s5");
    let s5 = std::env::var_os("S5_BENCH_S5").map_or_else(|| PathBuf::from(built), PathBuf::from);
    let debian = [("microsocks", Kind::Microsocks, "microsocks"), ("Dante", Kind::Dante, "danted")];
    let mut wanted = vec![("s5".to_owned(), Kind::S5, Some(s5))];
    wanted.extend(debian.map(|(name, kind, program)| (name.to_owned(), kind, which(program))));
    let ssh = ["sshd", "ssh-keygen", "ssh"].map(which).into_iter().reduce(Option::and).flatten();
    wanted.push(("ssh -D".to_owned(), Kind::Ssh, ssh));
    let peers = std::env::var("S5_BENCH_PEERS").unwrap_or_default();
    for peer in peers.split([':', ',']).filter(|peer| !peer.is_empty()) {
        let (name, path) = peer.split_once('=').unwrap_or((peer, peer));
        let kind = match name {
            "microsocks" => Kind::Microsocks,
            "hev-socks5-server" => Kind::Hev,
            "3proxy" => Kind::ThreeProxy,
            "fast-socks5" => Kind::FastSocks5,
            _ if name.starts_with("s5") => Kind::S5,
            _ => Kind::Other,
        };
        wanted.retain(|(known, ..)| known != name);
        wanted.push((name.to_owned(), kind, Some(path.into())));
    }
    for (name, kind, path) in wanted {
        match path.filter(|path| path.is_file()) {
            Some(path) => found.push(Proxy::new(&name, kind, path)),
            None => missing.push(format!("{name}: not installed, or not at the path that was given")),
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
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    folders.map(|folder| folder.join(program)).find(|path| path.is_file())
}

/// A port that nobody has at the moment: not every proxy can say which one it took.
pub fn free_port() -> Result<u16, Fault> {
    Ok(listen_anywhere()?.local_addr()?.port())
}

/// A file of this run.
pub fn write(name: &str, content: &str) -> Result<PathBuf, Fault> {
    let path = folder().join(name);
    fs::write(&path, content)?;
    Ok(path)
}

fn command(path: &Path, args: &[&dyn AsRef<OsStr>]) -> Command {
    let mut command = Command::new(path);
    command.args(args.iter().map(|arg| arg.as_ref()));
    command
}

impl Proxy {
    fn new(name: &str, kind: Kind, path: PathBuf) -> Self {
        Self { name: name.to_owned(), kind, path }
    }

    pub fn is_peer(&self) -> bool {
        !matches!(self.kind, Kind::Direct | Kind::S5)
    }

    /// Whether it has UDP ASSOCIATE at all.
    pub fn has_udp(&self) -> bool {
        !matches!(self.kind, Kind::Microsocks | Kind::Ssh)
    }

    /// What a tunnel takes of them: hev-socks5-server makes two pipes for each.
    pub fn descriptors_a_tunnel(&self) -> u64 {
        if self.kind == Kind::Hev { 6 } else { 2 }
    }

    /// Runs when this returns: a greeting has been answered.
    pub fn start(&self) -> Result<Running, Fault> {
        if self.kind == Kind::Direct {
            return Ok(Running { via: Via::Direct, tree: Tree::default(), _processes: Vec::new() });
        }
        self.start_as(|port| self.command(port))
    }

    /// The same with another command line, or another program.
    pub fn start_as(&self, command: impl Fn(u16) -> Result<Command, Fault>) -> Result<Running, Fault> {
        // Somebody else may be faster to take a port that was free.
        let mut last = Err(failed("was not tried"));
        for _ in 0..3 {
            let port = free_port()?;
            let mut processes = Vec::new();
            if self.kind == Kind::Ssh {
                processes.push(start_sshd()?);
            }
            processes.push(Process::start(&command(port)?)?);
            last = self.wait(processes, port);
            if last.is_ok() {
                break;
            }
        }
        last
    }

    /// How long a start takes, from before the program runs to an answered greeting, and what runs then.
    pub fn timed_start(&self) -> Result<(Duration, Running), Fault> {
        let port = free_port()?;
        let mut processes = Vec::new();
        if self.kind == Kind::Ssh {
            processes.push(start_sshd()?);
        }
        let mut command = self.command(port)?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let (began, at) = (Instant::now(), SocketAddrV4::new(Ipv4Addr::LOCALHOST, port));
        processes.push(Process::start_as_it_is(command)?);
        while !socks::greets(at).unwrap_or(false) {
            if began.elapsed() > PATIENCE || processes.iter_mut().any(Process::has_ended) {
                return Err(failed("does not answer"));
            }
        }
        let took = began.elapsed();
        Ok((took, self.wait(processes, port)?))
    }

    fn wait(&self, mut processes: Vec<Process>, port: u16) -> Result<Running, Fault> {
        let (began, at) = (Instant::now(), SocketAddrV4::new(Ipv4Addr::LOCALHOST, port));
        while !socks::greets(at).unwrap_or(false) {
            if began.elapsed() > PATIENCE || processes.iter_mut().any(Process::has_ended) {
                return Err(failed(format!("{} does not start", self.path.display())));
            }
            sleep(Duration::from_millis(5));
        }
        let tree = Tree(processes.iter().map(Process::pid).collect());
        Ok(Running { via: Via::Socks(at), tree, _processes: processes })
    }

    pub fn command(&self, port: u16) -> Result<Command, Fault> {
        let (path, number) = (self.path.as_path(), port.to_string());
        let listen = format!("127.0.0.1:{port}");
        Ok(match self.kind {
            Kind::Direct => return Err(Fault::None),
            Kind::S5 => {
                let mut command = command(path, &[&"serve", &"-q", &"--listen", &listen]);
                let more = std::env::var("S5_BENCH_ARGS").unwrap_or_default();
                command.args(more.split_whitespace());
                command
            }
            Kind::Microsocks => command(path, &[&"-i", &"127.0.0.1", &"-p", &number]),
            Kind::Dante => {
                let text = format!(
                    "logoutput: /dev/null\ninternal: 127.0.0.1 port = {port}\nexternal: 127.0.0.1\n\
                     clientmethod: none\nsocksmethod: none\nuser.privileged: root\nuser.unprivileged: root\n\
                     client pass {{\n from: 0.0.0.0/0 to: 0.0.0.0/0\n}}\n\
                     socks pass {{\n from: 0.0.0.0/0 to: 0.0.0.0/0\n command: connect udpassociate udpreply\n}}\n"
                );
                command(path, &[&"-f", &write("danted.conf", &text)?, &"-p", &folder().join("danted.pid")])
            }
            Kind::Ssh => ssh(path, port)?,
            Kind::Hev => {
                let text = format!(
                    "main:\n  workers: 2\n  port: {port}\n  listen-address: '127.0.0.1'\n\
                     \x20 udp-listen-address: '127.0.0.1'\n\
                     misc:\n  log-file: stderr\n  log-level: error\n  limit-nofile: 20000\n"
                );
                command(path, &[&write("hev.yml", &text)?])
            }
            Kind::ThreeProxy => {
                let text = format!("auth none\nmaxconn 20000\nsocks -p{port} -i127.0.0.1\n");
                command(path, &[&write("3proxy.cfg", &text)?])
            }
            Kind::FastSocks5 => {
                command(path, &[&"--listen-addr", &listen, &"--allow-udp", &"--public-addr", &"127.0.0.1", &"no-auth"])
            }
            Kind::Other => command(path, &[&number]),
        })
    }
}

pub fn user() -> Result<String, Fault> {
    let output = Command::new("id").arg("-un").output()?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn key(name: &str) -> Result<PathBuf, Fault> {
    let path = folder().join(name);
    if !path.exists() {
        let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&path).status()?;
        if !made.success() {
            return Err(failed("ssh-keygen failed"));
        }
    }
    Ok(path)
}

/// An sshd of this run, with keys of its own, that listens on loopback; its port is in the file `sshd.port`.
fn start_sshd() -> Result<Process, Fault> {
    let sshd = which("sshd").ok_or_else(|| failed("no sshd"))?;
    let port = free_port()?;
    let config = format!(
        "Port {port}\nListenAddress 127.0.0.1\nHostKey {}\nAuthorizedKeysFile {}.pub\nPidFile none\nStrictModes no\n\
         UsePAM yes\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n\
         PermitRootLogin prohibit-password\nPrintMotd no\nAllowTcpForwarding yes\nLogLevel QUIET\n",
        key("host_key")?.display(),
        key("user_key")?.display(),
    );
    let config = write("sshd_config", &config)?;
    // It wants this folder when root runs it, and gets it in a namespace of its own where it is missing.
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
    let began = Instant::now();
    while std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
        if began.elapsed() > PATIENCE || process.has_ended() {
            return Err(failed("sshd does not start"));
        }
        sleep(Duration::from_millis(5));
    }
    write("sshd.port", &port.to_string())?;
    Ok(process)
}

fn ssh(path: &Path, port: u16) -> Result<Command, Fault> {
    let sshd = fs::read_to_string(folder().join("sshd.port"))?;
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
