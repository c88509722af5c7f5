//! GSSAPI: a temporary Kerberos realm, protected streams through a client and a server, and logins. The column `direct`
//! is the library alone.
//!
//! A separate process uses the library, because environment variables select the realm.

use std::io::stdin;
use std::sync::mpsc::sync_channel;

use s5::conn::{SecurityContext as _, TokenOrder};
use s5::gssapi::ffi::{Credential, GSS_C_CONF_FLAG, GSS_C_SEQUENCE_FLAG, GssContext, PendingContext};

use crate::*;

/// First argument of this program when it uses the library.
pub const GSSAPI: &str = "gssapi";
/// Names of the protection levels, by number.
const LEVELS: [&str; 3] = ["none", "integrity", "confidentiality"];
/// Logins at the same time.
const CONCURRENT_LOGINS: usize = 8;
/// Bytes wrapped with one call.
const PIECE_LEN: usize = 16 * 1024;
const PROGRAMS: [&str; 4] = ["krb5kdc", "kdb5_util", "kadmin.local", "kinit"];
const MIB: f64 = (1 << 20) as f64;

fn dante() -> Option<PathBuf> {
    std::env::var_os("S5_BENCH_DANTE").map(PathBuf::from)
}

/// Returns a line for each missing program.
pub fn missing() -> Vec<String> {
    let programs: Vec<_> = PROGRAMS.into_iter().filter(|program| which(program).is_none()).collect();
    let mut missing = Vec::new();
    if !programs.is_empty() {
        missing.push(format!("GSSAPI: not installed: {}", programs.join(", ")));
    }
    if !dante().is_some_and(|dante| dante.join("sbin/sockd").is_file() && dante.join("bin/socksify").is_file()) {
        missing.push("Dante: no GSSAPI: set S5_BENCH_DANTE to a directory with sbin/sockd and bin/socksify".into());
    }
    missing
}

/// A KDC with the user alice, whose ticket is in the cache, and the service rcmd/localhost.
pub struct Realm(#[expect(dead_code, reason = "ends when dropped")] Process);

impl Realm {
    /// Starts the realm. Call this on the main thread only, see [`Process::start`].
    pub fn start() -> Result<Self, BenchError> {
        if PROGRAMS.iter().any(|program| which(program).is_none()) {
            return Err(BenchError::Unsupported);
        }
        let (port, at) = (free_port()?, dir().display().to_string());
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
        let mut kdc = Process::start(&in_realm("krb5kdc", &["-n", "-r", "S5.TEST"]))?;
        wait_until_it_listens(&mut kdc, port)?;
        run("kinit", &["-k", "-t", &format!("{at}/user.keytab"), "-c", &format!("{at}/ccache"), "alice"])?;
        Ok(Self(kdc))
    }

    /// Returns the rate of one upload in MiB/s. Without a proxy, also returns the rate of the library on one thread.
    pub fn stream(
        &self,
        proxy: &Proxy,
        bulk: SocketAddrV4,
        level: usize,
        time: Duration,
    ) -> Result<Vec<f64>, BenchError> {
        if proxy.kind == ProxyKind::Direct {
            let measure_library =
                |threads| measure(&["stream", &level.to_string(), &time.as_millis().to_string(), threads]);
            return Ok(vec![measure_library("2")?, measure_library("1")?]);
        }
        Ok(vec![self.stream_via(proxy, bulk, level, time)?, f64::NAN])
    }

    fn stream_via(&self, proxy: &Proxy, bulk: SocketAddrV4, level: usize, time: Duration) -> Result<f64, BenchError> {
        let (_running, at) = self.serve(proxy, level)?;
        if proxy.kind == ProxyKind::Dante {
            let config = format!(
                "route {{\n from: 0.0.0.0/0 to: 0.0.0.0/0 via: localhost port = {}\n proxyprotocol: socks_v5\n\
                 \x20command: connect\n method: gssapi\n gssapi.enctype: {}\n}}\n",
                at.port(),
                LEVELS[level]
            );
            let dante = dante().ok_or(BenchError::Unsupported)?;
            let mut command = in_realm(&dante.join("bin/socksify").to_string_lossy(), &[]);
            command.env("SOCKS_CONF", write("socks.conf", &config)?).env("SOCKS_AUTOADD_LANROUTES", "no");
            command.arg(std::env::current_exe()?).args([GSSAPI, "upload", &bulk.to_string()]);
            return read_figure(command.arg(time.as_millis().to_string()));
        }
        let mut command = in_realm(&proxy.path.to_string_lossy(), &["connect", "-x", &at.to_string()]);
        command.args(["--auth", "gssapi", "--gssapi-host", "localhost", "--gssapi-protection", LEVELS[level]]);
        command.arg(bulk.to_string());
        let mut client = Process::start_with_pipes(&command)?;
        let (Some(to), Some(from)) = (client.child().stdin.take(), client.child().stdout.take()) else {
            return Err(failed("no pipes"));
        };
        upload(to, from, time)
    }

    /// Returns logins per second, each with a tunnel to `echo`.
    pub fn logins(&self, proxy: &Proxy, echo: SocketAddrV4, time: Duration) -> Result<f64, BenchError> {
        let millis = time.as_millis().to_string();
        if proxy.kind == ProxyKind::Direct {
            return measure(&["logins", &millis]);
        }
        let (_running, at) = self.serve(proxy, 2)?;
        measure(&["logins", &millis, &at.to_string(), &echo.to_string()])
    }

    fn serve(&self, proxy: &Proxy, level: usize) -> Result<(RunningProxy, SocketAddrV4), BenchError> {
        let keytab = dir().join("service.keytab");
        let running = match (proxy.kind, dante()) {
            (ProxyKind::S5, _) => proxy.start_as(|port| {
                let plain = proxy.command(port)?;
                let mut command = in_realm(&proxy.path.to_string_lossy(), &[]);
                command.args(plain.get_args()).args(["--auth", "gssapi", "--gssapi-protection", LEVELS[level]]);
                command.arg("--keytab").arg(&keytab);
                Ok(command)
            }),
            (ProxyKind::Dante, Some(dante)) => proxy.start_as(|port| {
                let (level, keytab) = (LEVELS[level], keytab.display());
                let login = format!("gssapi.keytab: FILE:{keytab}\n gssapi.enctype: {level}\n");
                let config = dante_config(port, "gssapi", &user()?, &login, "connect");
                let mut command = in_realm(&dante.join("sbin/sockd").to_string_lossy(), &["-N", "1", "-f"]);
                command.arg(write("sockd.conf", &config)?).arg("-p").arg(dir().join("sockd.pid"));
                Ok(command)
            }),
            _ => Err(BenchError::Unsupported),
        }?;
        let Via::Socks(at) = running.via else { return Err(BenchError::Unsupported) };
        Ok((running, at))
    }
}

/// Returns a command in the realm, with the ticket of alice and the key of the service.
fn in_realm(program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(which(program).unwrap_or_else(|| program.into()));
    let file = |kind: &str, name: &str| format!("{kind}{}", dir().join(name).display());
    command.args(args).env("KRB5_CONFIG", file("", "krb5.conf")).env("KRB5_KDC_PROFILE", file("", "kdc.conf"));
    command.env("KRB5CCNAME", file("FILE:", "ccache")).env("KRB5_KTNAME", file("FILE:", "service.keytab"));
    command.env("KRB5_CLIENT_KTNAME", file("FILE:", "none.keytab")).env("KRB5RCACHENAME", file("file2:", "rcache"));
    command.env("TMPDIR", dir()).env_remove("KRB5_TRACE");
    command
}

fn run(program: &str, args: &[&str]) -> Result<(), BenchError> {
    let output = in_realm(program, args).stdin(Stdio::null()).output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(failed(format!("{program}: {}", stderr.trim()))) }
}

/// Runs this program in the realm, and returns the figure that it prints.
fn measure(args: &[&str]) -> Result<f64, BenchError> {
    // A large replay cache slows logins down.
    let _ = fs::remove_file(dir().join("rcache"));
    let this = std::env::current_exe()?;
    read_figure(in_realm(&this.to_string_lossy(), &[GSSAPI]).args(args))
}

fn read_figure(command: &Command) -> Result<f64, BenchError> {
    let mut process = Process::start_with_pipes(command)?;
    let from = process.child().stdout.take().ok_or_else(|| failed("no pipe"))?;
    let mut line = String::new();
    BufReader::new(from).read_line(&mut line)?;
    line.trim().parse().map_err(|_| failed(if line.is_empty() { "no answer" } else { line.trim() }))
}

/// The main function of the process that uses the library. Prints one figure or an error.
pub fn main(args: &[String]) -> ExitCode {
    let number = |at: usize| args.get(at).and_then(|arg| arg.parse::<u64>().ok());
    let time = |at: usize| number(at).map_or(IDLE_TIMEOUT, Duration::from_millis);
    let addr = |at: usize| args.get(at).and_then(|arg| arg.parse::<SocketAddrV4>().ok());
    let result = match args.first().map(String::as_str) {
        Some("upload") => addr(1).ok_or(BenchError::Unsupported).and_then(|to| {
            let stream = TcpStream::connect(to)?;
            upload(&stream, &stream, time(2))
        }),
        Some("stream") => stream(number(1) == Some(2), time(2), number(3) == Some(2)),
        Some("logins") => logins(time(1), addr(2).zip(addr(3))),
        _ => Err(BenchError::Unsupported),
    };
    match result {
        Ok(figure) => println!("{figure}"),
        Err(error) => println!("{error}"),
    }
    // Waits until the parent closes the pipe.
    let _ = stdin().read(&mut [0]);
    ExitCode::SUCCESS
}

fn upload(to: impl std::io::Write, from: impl std::io::Read, time: Duration) -> Result<f64, BenchError> {
    let started = Instant::now();
    let bytes = target::upload(to, from, TransferLimit::for_time(time), false)?;
    Ok(bytes as f64 / MIB / started.elapsed().as_secs_f64())
}

impl From<String> for BenchError {
    fn from(error: String) -> Self {
        failed(error)
    }
}

/// Credentials of client and server.
struct Credentials {
    alice: Arc<Credential>,
    keys: Credential,
}

impl Credentials {
    fn new() -> Result<Self, BenchError> {
        Ok(Self { alice: Arc::new(Credential::initiator(None, None)?), keys: Credential::acceptor(None, None)? })
    }

    /// Returns the client's context and its first token.
    fn begin(&self) -> Result<(PendingContext, Vec<u8>), BenchError> {
        let flags = GSS_C_SEQUENCE_FLAG | GSS_C_CONF_FLAG;
        Ok(PendingContext::new(self.alice.clone(), "rcmd@localhost", flags)?)
    }

    /// Establishes a context. Returns both sides.
    fn contexts(&self) -> Result<(GssContext, GssContext), BenchError> {
        let (client, token) = self.begin()?;
        let accepted = self.keys.accept(&token)?;
        Ok((client.complete(&accepted.answer)?, accepted.context))
    }

    /// Logs in without a connection, with the messages of RFC 1961.
    fn log_in_locally(&self) -> Result<(), BenchError> {
        let (mut client, mut server) = self.contexts()?;
        unwrap(&mut server, client.wrap(&[2], false)?)?;
        unwrap(&mut client, server.wrap(&[2], false)?)?;
        Ok(())
    }

    /// Logs in to a server, and opens a tunnel to `echo`.
    fn log_in(&self, proxy: SocketAddrV4, echo: SocketAddrV4) -> Result<(), BenchError> {
        let mut stream = socks::connect(Via::Direct, proxy)?;
        let mut method = [0; 2];
        stream.write_all(&[5, 1, 1])?;
        stream.read_exact(&mut method)?;
        if method != [5, 1] {
            return Err(failed(format!("method {method:?}")));
        }
        let (pending, token) = self.begin()?;
        let mut context = pending.complete(&exchange_frame(&mut stream, 1, &token)?)?;
        let level = exchange_frame(&mut stream, 2, &context.wrap(&[2], false)?)?;
        if unwrap(&mut context, level)? != [2] {
            return Err(corrupt("the server selected another protection level"));
        }
        let reply = exchange_frame(&mut stream, 3, &context.wrap(&socks::request(socks::CONNECT, echo), true)?)?;
        match unwrap(&mut context, reply)?[..] {
            [5, 0, ..] => Ok(()),
            ref reply => Err(failed(format!("reply {reply:?}"))),
        }
    }
}

/// Sends a frame. Returns the token of the answer.
fn exchange_frame(stream: &mut TcpStream, kind: u8, token: &[u8]) -> Result<Vec<u8>, BenchError> {
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

fn unwrap(context: &mut GssContext, mut token: Vec<u8>) -> Result<Vec<u8>, BenchError> {
    let unwrapped = context.unwrap(&mut token)?;
    if unwrapped.order == TokenOrder::Next { Ok(unwrapped.data) } else { Err(corrupt("out of order")) }
}

/// Returns the rate of wrapping and unwrapping in MiB/s, on one thread or on two.
fn stream(encrypt: bool, time: Duration, on_two_threads: bool) -> Result<f64, BenchError> {
    let (mut client, mut server) = Credentials::new()?.contexts()?;
    let (started, data, mut pieces) = (Instant::now(), &noise()[..PIECE_LEN], 0_u32);
    let mut receive = |token| match unwrap(&mut server, token)? == data {
        true => Ok(()),
        false => Err(corrupt("the unwrapped data differs")),
    };
    let mut wrap = |send: &mut dyn FnMut(Vec<u8>) -> Result<(), BenchError>| {
        while started.elapsed() < time {
            send(client.wrap(data, encrypt)?)?;
            pieces += 1;
        }
        Ok(())
    };
    match on_two_threads {
        false => wrap(&mut receive)?,
        true => thread::scope(|scope| {
            let (sender, receiver) = sync_channel(64);
            let unwrapping = scope.spawn(move || receiver.into_iter().try_for_each(receive));
            let wrapped = wrap(&mut |token| sender.send(token).map_err(|_| failed("the unwrapping thread has ended")));
            drop(sender);
            unwrapping.join().unwrap_or_else(|_| Err(failed("panic"))).and(wrapped)
        })?,
    }
    Ok(f64::from(pieces) * PIECE_LEN as f64 / MIB / started.elapsed().as_secs_f64())
}

/// Returns logins per second, to a server or with the library alone.
fn logins(time: Duration, to: Option<(SocketAddrV4, SocketAddrV4)>) -> Result<f64, BenchError> {
    let credentials = Credentials::new()?;
    let login = || match to {
        Some((proxy, echo)) => credentials.log_in(proxy, echo),
        None => credentials.log_in_locally(),
    };
    // The first login stores the ticket for the service in the cache.
    login()?;
    let started = Instant::now();
    let repeat_login = || {
        let mut count = 0_u64;
        while started.elapsed() < time {
            login()?;
            count += 1;
        }
        Ok::<_, BenchError>(count)
    };
    let count = sum_of_threads([repeat_login; CONCURRENT_LOGINS])?;
    Ok(count as f64 / started.elapsed().as_secs_f64())
}
