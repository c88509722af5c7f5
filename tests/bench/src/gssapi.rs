//! GSSAPI: a throw-away realm of Kerberos; streams through clients and servers that protect them, and logins; and what
//! the library gives with nothing around it, which is in the column of no proxy.
//!
//! What uses the library is a process of its own, since it finds the realm by its environment.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _, stdin};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::{Duration, Instant};

use s5::gssapi::ffi::{Credential, GssContext, GssName, RequestedFlags, SequenceStatus};

use crate::children::{Process, folder};
use crate::measure::{Fault, PATIENCE, Via, failed, wrong};
use crate::pattern::{Plan, noise};
use crate::proxies::{Kind, Proxy, Running, free_port, user, which, write};
use crate::{socks, target};

/// The first argument of this program when it is what uses the library.
pub const GSSAPI: &str = "gssapi";
/// As programs call the levels, by their numbers.
const LEVELS: [&str; 3] = ["none", "integrity", "confidentiality"];
/// How many log in at once.
const CLIENTS: u64 = 8;
/// What is wrapped at once.
const PIECE: usize = 16 * 1024;
const PROGRAMS: [&str; 4] = ["krb5kdc", "kdb5_util", "kadmin.local", "kinit"];
const MIB: f64 = (1 << 20) as f64;

fn dante() -> Option<PathBuf> {
    std::env::var_os("S5_BENCH_DANTE").map(PathBuf::from)
}

/// What is not there to be run.
pub fn missing() -> Vec<String> {
    let programs: Vec<_> = PROGRAMS.into_iter().filter(|program| which(program).is_none()).collect();
    let mut missing = Vec::new();
    if !programs.is_empty() {
        missing.push(format!("GSSAPI: not installed: {}", programs.join(", ")));
    }
    if !dante().is_some_and(|dante| dante.join("sbin/sockd").is_file() && dante.join("bin/socksify").is_file()) {
        missing.push("Dante: no GSSAPI: S5_BENCH_DANTE names no folder with sbin/sockd and bin/socksify".into());
    }
    missing
}

/// A KDC with alice, who has a ticket, and the service rcmd/localhost.
pub struct Realm(#[expect(dead_code, reason = "ends when dropped")] Process);

impl Realm {
    /// Only for the main thread.
    pub fn start() -> Result<Self, Fault> {
        if PROGRAMS.iter().any(|program| which(program).is_none()) {
            return Err(Fault::None);
        }
        let (port, at) = (free_port()?, folder().display().to_string());
        let enctype = "aes256-cts-hmac-sha1-96";
        write(
            "krb5.conf",
            &format!(
                "[libdefaults]\n default_realm = S5.TEST\n dns_lookup_kdc = false\n dns_lookup_realm = false\n\
                 \x20dns_canonicalize_hostname = false\n rdns = false\n qualify_shortname = \"\"\n\
                 \x20udp_preference_limit = 1\n permitted_enctypes = {enctype}\n\
                 [realms]\n S5.TEST = {{\n  kdc = 127.0.0.1:{port}\n }}\n[domain_realm]\n localhost = S5.TEST\n\
                 [logging]\n kdc = FILE:/dev/null\n"
            ),
        )?;
        write(
            "kdc.conf",
            &format!(
                "[kdcdefaults]\n kdc_listen = 127.0.0.1:{port}\n kdc_tcp_listen = 127.0.0.1:{port}\n\
                 [realms]\n S5.TEST = {{\n  database_name = {at}/principal\n  key_stash_file = {at}/stash\n\
                 \x20 acl_file = {at}/kadm5.acl\n  supported_enctypes = {enctype}:normal\n }}\n"
            ),
        )?;
        write("kadm5.acl", "")?;
        run("kdb5_util", &["-r", "S5.TEST", "-P", "master", "create", "-s"])?;
        for query in [
            "addprinc -randkey alice".to_owned(),
            "addprinc -randkey rcmd/localhost".to_owned(),
            format!("ktadd -k {at}/user.keytab alice"),
            format!("ktadd -k {at}/service.keytab rcmd/localhost"),
        ] {
            run("kadmin.local", &["-r", "S5.TEST", "-q", &query])?;
        }
        let mut kdc = Process::start(&inside("krb5kdc", &["-n", "-r", "S5.TEST"]))?;
        let began = Instant::now();
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            if began.elapsed() > PATIENCE || kdc.has_ended() {
                return Err(failed("krb5kdc does not start"));
            }
            thread::sleep(Duration::from_millis(5));
        }
        run("kinit", &["-k", "-t", &format!("{at}/user.keytab"), "-c", &format!("{at}/ccache"), "alice"])?;
        Ok(Self(kdc))
    }

    /// MiB a second of one stream up, and without a proxy also what one thread does.
    pub fn stream(&self, proxy: &Proxy, bulk: SocketAddrV4, level: usize, time: Duration) -> Result<Vec<f64>, Fault> {
        if proxy.kind == Kind::Direct {
            let alone = |threads| measure(&["stream", &level.to_string(), &time.as_millis().to_string(), threads]);
            return Ok(vec![alone("2")?, alone("1")?]);
        }
        Ok(vec![self.through(proxy, bulk, level, time)?, f64::NAN])
    }

    fn through(&self, proxy: &Proxy, bulk: SocketAddrV4, level: usize, time: Duration) -> Result<f64, Fault> {
        let (_running, at) = self.serve(proxy, level)?;
        if proxy.kind == Kind::Dante {
            let config = format!(
                "route {{\n from: 0.0.0.0/0 to: 0.0.0.0/0 via: localhost port = {}\n proxyprotocol: socks_v5\n\
                 \x20command: connect\n method: gssapi\n gssapi.enctype: {}\n}}\n",
                at.port(),
                LEVELS[level]
            );
            let dante = dante().ok_or(Fault::None)?;
            let mut command = inside(&dante.join("bin/socksify").to_string_lossy(), &[]);
            command.env("SOCKS_CONF", write("socks.conf", &config)?).env("SOCKS_AUTOADD_LANROUTES", "no");
            command.arg(std::env::current_exe()?).args([GSSAPI, "upload", &bulk.to_string()]);
            return answer(command.arg(time.as_millis().to_string()));
        }
        let mut command = inside(&proxy.path.to_string_lossy(), &["connect", "-x", &at.to_string()]);
        command.args(["--auth", "gssapi", "--gssapi-host", "localhost", "--gssapi-protection", LEVELS[level]]);
        command.arg(bulk.to_string());
        let mut client = Process::start_with_pipes(&command)?;
        let (Some(to), Some(from)) = (client.child().stdin.take(), client.child().stdout.take()) else {
            return Err(failed("no pipes"));
        };
        upload(to, from, time)
    }

    /// Logins a second, each with a tunnel to `echo`.
    pub fn logins(&self, proxy: &Proxy, echo: SocketAddrV4, time: Duration) -> Result<f64, Fault> {
        let millis = time.as_millis().to_string();
        if proxy.kind == Kind::Direct {
            return measure(&["logins", &millis]);
        }
        let (_running, at) = self.serve(proxy, 2)?;
        measure(&["logins", &millis, &at.to_string(), &echo.to_string()])
    }

    fn serve(&self, proxy: &Proxy, level: usize) -> Result<(Running, SocketAddrV4), Fault> {
        let keytab = folder().join("service.keytab");
        let running = match (proxy.kind, dante()) {
            (Kind::S5, _) => proxy.start_as(|port| {
                let plain = proxy.command(port)?;
                let mut command = inside(&proxy.path.to_string_lossy(), &[]);
                command.args(plain.get_args()).args(["--auth", "gssapi", "--gssapi-protection", LEVELS[level]]);
                command.arg("--keytab").arg(&keytab);
                Ok(command)
            }),
            (Kind::Dante, Some(dante)) => proxy.start_as(|port| {
                let (user, level) = (user()?, LEVELS[level]);
                let login = format!("gssapi.keytab: FILE:{}\n gssapi.enctype: {level}\n", keytab.display());
                let config = format!(
                    "logoutput: /dev/null\ninternal: 127.0.0.1 port = {port}\nexternal: 127.0.0.1\n\
                     clientmethod: none\nsocksmethod: gssapi\nuser.privileged: {user}\nuser.unprivileged: {user}\n\
                     client pass {{\n from: 0.0.0.0/0 to: 0.0.0.0/0\n {login}}}\n\
                     socks pass {{\n from: 0.0.0.0/0 to: 0.0.0.0/0\n command: connect\n {login}}}\n"
                );
                let mut command = inside(&dante.join("sbin/sockd").to_string_lossy(), &["-N", "1", "-f"]);
                command.arg(write("sockd.conf", &config)?).arg("-p").arg(folder().join("sockd.pid"));
                Ok(command)
            }),
            _ => Err(Fault::None),
        }?;
        let Via::Socks(at) = running.via else { return Err(Fault::None) };
        Ok((running, at))
    }
}

/// A program in the realm, as alice and with the key of the service.
fn inside(program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(which(program).unwrap_or_else(|| program.into()));
    let file = |kind: &str, name: &str| format!("{kind}{}", folder().join(name).display());
    command.args(args).env("KRB5_CONFIG", file("", "krb5.conf")).env("KRB5_KDC_PROFILE", file("", "kdc.conf"));
    command.env("KRB5CCNAME", file("FILE:", "ccache")).env("KRB5_KTNAME", file("FILE:", "service.keytab"));
    command.env("KRB5_CLIENT_KTNAME", file("FILE:", "none.keytab")).env("KRB5RCACHENAME", file("file2:", "rcache"));
    command.env("TMPDIR", folder()).env_remove("KRB5_TRACE");
    command
}

fn run(program: &str, args: &[&str]) -> Result<(), Fault> {
    let output = inside(program, args).stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(failed(format!("{program}: {}", said.trim()))) }
}

/// Has this program measure, in the realm.
fn measure(args: &[&str]) -> Result<f64, Fault> {
    // Whoever remembers more logins is slower.
    let _ = fs::remove_file(folder().join("rcache"));
    let this = std::env::current_exe()?;
    answer(inside(&this.to_string_lossy(), &[GSSAPI]).args(args))
}

fn answer(command: &Command) -> Result<f64, Fault> {
    let mut process = Process::start_with_pipes(command)?;
    let from = process.child().stdout.take().ok_or_else(|| failed("no pipe"))?;
    let mut line = String::new();
    BufReader::new(from).read_line(&mut line)?;
    line.trim().parse().map_err(|_| failed(if line.is_empty() { "no answer" } else { line.trim() }))
}

/// The process: says one figure, or what is wrong.
pub fn main(args: &[String]) -> ExitCode {
    let number = |at: usize| args.get(at).and_then(|arg| arg.parse::<u64>().ok());
    let time = |at: usize| number(at).map_or(PATIENCE, Duration::from_millis);
    let addr = |at: usize| args.get(at).and_then(|arg| arg.parse::<SocketAddrV4>().ok());
    let result = match args.first().map(String::as_str) {
        Some("upload") => addr(1).ok_or(Fault::None).and_then(|to| {
            let stream = TcpStream::connect(to)?;
            upload(&stream, &stream, time(2))
        }),
        Some("stream") => stream(number(1) == Some(2), time(2), number(3) == Some(2)),
        Some("logins") => logins(time(1), addr(2).zip(addr(3))),
        _ => Err(Fault::None),
    };
    match result {
        Ok(figure) => println!("{figure}"),
        Err(fault) => println!("{fault}"),
    }
    // Until the other end closes, so that nobody takes what was measured for ended.
    let _ = stdin().read(&mut [0]);
    ExitCode::SUCCESS
}

fn upload(to: impl std::io::Write, from: impl std::io::Read, time: Duration) -> Result<f64, Fault> {
    let began = Instant::now();
    let octets = target::upload_over(to, from, Plan::for_time(time), false)?;
    Ok(octets as f64 / MIB / began.elapsed().as_secs_f64())
}

impl From<s5::gssapi::ffi::LibraryError> for Fault {
    fn from(error: s5::gssapi::ffi::LibraryError) -> Self {
        failed(error.to_string())
    }
}

/// Whom to log in as, to whom, and who that is.
struct Parties {
    alice: Credential,
    service: GssName,
    keys: Credential,
}

const WANTS: RequestedFlags = RequestedFlags { sequence: true, confidentiality: true };

impl Parties {
    fn new() -> Result<Self, Fault> {
        let (alice, keys) = (Credential::initiator(None)?, Credential::acceptor(None, None)?);
        Ok(Self { alice, service: GssName::service("rcmd@localhost")?, keys })
    }

    /// The contexts of client and server.
    fn contexts(&self) -> Result<(GssContext, GssContext), Fault> {
        let (mut client, mut server) = (GssContext::new(), GssContext::new());
        let token = client.init(&self.alice, &self.service, WANTS, None)?.output;
        let token = server.accept(&self.keys, &token)?.output;
        client.init(&self.alice, &self.service, WANTS, Some(&token))?;
        Ok((client, server))
    }

    /// A login without a connection.
    fn alone(&self) -> Result<(), Fault> {
        let (mut client, mut server) = self.contexts()?;
        unwrap(&mut server, client.wrap(&[2], false)?)?;
        unwrap(&mut client, server.wrap(&[2], false)?)?;
        Ok(())
    }

    /// A login to a server, and a tunnel to `echo`.
    fn through(&self, proxy: SocketAddrV4, echo: SocketAddrV4) -> Result<(), Fault> {
        let (mut stream, mut context) = (socks::plain(proxy)?, GssContext::new());
        let mut method = [0; 2];
        stream.write_all(&[5, 1, 1])?;
        stream.read_exact(&mut method)?;
        if method != [5, 1] {
            return Err(failed(format!("method {method:?}")));
        }
        let token = context.init(&self.alice, &self.service, WANTS, None)?.output;
        let token = trip(&mut stream, 1, &token)?;
        context.init(&self.alice, &self.service, WANTS, Some(&token))?;
        let level = trip(&mut stream, 2, &context.wrap(&[2], false)?)?;
        if unwrap(&mut context, level)? != [2] {
            return Err(wrong("another level"));
        }
        let reply = trip(&mut stream, 3, &context.wrap(&socks::request(socks::CONNECT, echo), true)?)?;
        match unwrap(&mut context, reply)?[..] {
            [5, 0, ..] => Ok(()),
            ref reply => Err(failed(format!("reply {reply:?}"))),
        }
    }
}

/// Sends a frame, and gives the token of the one that comes back.
fn trip(stream: &mut TcpStream, kind: u8, token: &[u8]) -> Result<Vec<u8>, Fault> {
    let mut head = [1, kind, 0, 0];
    head[2..].copy_from_slice(&(token.len() as u16).to_be_bytes());
    stream.write_all(&[&head, token].concat())?;
    stream.read_exact(&mut head)?;
    if head[..2] != [1, kind] {
        return Err(failed(format!("refused: {head:?}")));
    }
    let mut token = vec![0; u16::from_be_bytes([head[2], head[3]]).into()];
    stream.read_exact(&mut token)?;
    Ok(token)
}

fn unwrap(context: &mut GssContext, mut token: Vec<u8>) -> Result<Vec<u8>, Fault> {
    let unwrapped = context.unwrap(&mut token)?;
    if unwrapped.order == SequenceStatus::InOrder { Ok(unwrapped.data) } else { Err(wrong("out of order")) }
}

/// MiB a second that are wrapped and unwrapped, on one thread or on two.
fn stream(encrypt: bool, time: Duration, two: bool) -> Result<f64, Fault> {
    let (mut client, mut server) = Parties::new()?.contexts()?;
    let (began, data, mut pieces) = (Instant::now(), &noise()[..PIECE], 0_u32);
    let mut take = |token| match unwrap(&mut server, token)? == data {
        true => Ok(()),
        false => Err(wrong("other octets")),
    };
    let mut wrap = |give: &mut dyn FnMut(Vec<u8>) -> Result<(), Fault>| {
        while began.elapsed() < time {
            give(client.wrap(data, encrypt)?)?;
            pieces += 1;
        }
        Ok(())
    };
    match two {
        false => wrap(&mut take)?,
        true => thread::scope(|scope| {
            let (sender, receiver) = sync_channel(64);
            let there = scope.spawn(move || receiver.into_iter().try_for_each(take));
            let wrapped = wrap(&mut |token| sender.send(token).map_err(|_| failed("nobody unwraps")));
            drop(sender);
            there.join().unwrap_or_else(|_| Err(failed("panic"))).and(wrapped)
        })?,
    }
    Ok(f64::from(pieces) * PIECE as f64 / MIB / began.elapsed().as_secs_f64())
}

/// Logins a second, to a server or with nothing around them.
fn logins(time: Duration, to: Option<(SocketAddrV4, SocketAddrV4)>) -> Result<f64, Fault> {
    let parties = Parties::new()?;
    let login = || match to {
        Some((proxy, echo)) => parties.through(proxy, echo),
        None => parties.alone(),
    };
    // Gets the ticket for the service, which is in the cache from then on.
    login()?;
    let began = Instant::now();
    let many = || {
        let mut count = 0_u64;
        while began.elapsed() < time {
            login()?;
            count += 1;
        }
        Ok::<_, Fault>(count)
    };
    let count = thread::scope(|scope| {
        let threads: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(many)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(failed("panic")))).sum::<Result<u64, _>>()
    })?;
    Ok(count as f64 / began.elapsed().as_secs_f64())
}
