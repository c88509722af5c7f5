//! `s5 serve`: the server's options, and the users file's upkeep.

use std::fs;
use std::io::{self, BufRead as _, IsTerminal as _, Read as _, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use argh::FromArgs;
use log::LevelFilter;

use super::{Failure, Status, deadline, duration};
use crate::policy::Policy;
use crate::policy::users::{self, Users};
use crate::server::{self, Filtering, Listen, Options, Ports};

/// The largest users file that is read, in octets: room for some 100 000 users.
const MAX_USERS_FILE: u64 = 16 << 20;
/// Where to listen when nobody says.
const DEFAULT_LISTEN: &str = "127.0.0.1:1080";

/// Run a SOCKS5 server: CONNECT, BIND and UDP ASSOCIATE (RFC 1928), without or with passwords (RFC 1929).
#[derive(FromArgs, Debug)]
#[argh(
    subcommand,
    name = "serve",
    note = "Times are seconds, or with ms, s, m, h. SIGTERM and SIGINT drain and end it, a second one ends it at once.",
    example = "s5 serve --listen '*:1080' --users /etc/s5/users"
)]
pub struct Args {
    #[argh(
        option,
        arg_name = "addr",
        description = "where to listen: host:port, [v6]:port, port (loopback), *:port (every address) or unix:/path; \
                       may be repeated (127.0.0.1:1080)"
    )]
    listen: Vec<Listen>,

    /// a file with a line name:hash for each user; with it, nobody gets in without a password
    #[argh(option, arg_name = "file")]
    users: Option<PathBuf>,

    /// add a user to the users file, or change the password, and exit; asks for it, or reads a line of stdin
    #[argh(option, arg_name = "name")]
    add_user: Option<String>,

    /// remove a user from the users file and exit
    #[argh(option, arg_name = "name")]
    remove_user: Option<String>,

    /// for everything up to the request (10)
    #[argh(option, arg_name = "time", from_str_fn(deadline), default = "Duration::from_secs(10)")]
    handshake_timeout: Duration,

    /// for the name and all addresses of a target together (10)
    #[argh(option, arg_name = "time", from_str_fn(deadline), default = "Duration::from_secs(10)")]
    connect_timeout: Duration,

    /// for the peer that BIND expects (120)
    #[argh(option, arg_name = "time", from_str_fn(deadline), default = "Duration::from_secs(120)")]
    bind_timeout: Duration,

    /// for silence on an open tunnel or association (124m, RFC 5382)
    #[argh(option, arg_name = "time", from_str_fn(deadline), default = "Duration::from_secs(124 * 60)")]
    idle_timeout: Duration,

    /// for open sessions to finish once the server is told to end (5)
    #[argh(option, arg_name = "time", from_str_fn(duration), default = "Duration::from_secs(5)")]
    drain: Duration,

    /// connections at once (what the descriptor limit allows)
    #[argh(option, arg_name = "n", from_str_fn(at_least_one))]
    max_connections: Option<usize>,

    /// threads that run sessions (one a core)
    #[argh(option, arg_name = "n", from_str_fn(threads))]
    threads: Option<u16>,

    /// the address that replies to BIND and UDP ASSOCIATE give, behind NAT; one a family (the one the client uses)
    #[argh(option, arg_name = "ip")]
    advertise: Vec<IpAddr>,

    /// ports for BIND, lo-hi (the system's choice)
    #[argh(option, arg_name = "lo-hi")]
    bind_ports: Option<Ports>,

    /// ports for UDP ASSOCIATE, lo-hi (the system's choice)
    #[argh(option, arg_name = "lo-hi")]
    udp_ports: Option<Ports>,

    /// whose datagrams reach a client: address-dependent (of those it has sent to) or endpoint-independent
    /// (everybody's) (address-dependent)
    #[argh(option, arg_name = "how", from_str_fn(filtering), default = "Filtering::AddressDependent")]
    udp_filtering: Filtering,

    /// log more
    #[argh(switch, short = 'v')]
    verbose: bool,

    /// log only what is wrong
    #[argh(switch, short = 'q')]
    quiet: bool,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| format!("{text:?} is not a number from 1 on"))
}

fn threads(text: &str) -> Result<u16, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| format!("{text:?} is not a number from 1 to 65535"))
}

fn one_a_core() -> u16 {
    std::thread::available_parallelism().map_or(1, |cores| u16::try_from(cores.get()).unwrap_or(u16::MAX))
}

fn filtering(text: &str) -> Result<Filtering, String> {
    match text {
        "address-dependent" => Ok(Filtering::AddressDependent),
        "endpoint-independent" => Ok(Filtering::EndpointIndependent),
        _ => Err(format!("{text:?} is neither address-dependent nor endpoint-independent")),
    }
}

impl Args {
    pub(super) fn log_level(&self) -> LevelFilter {
        match (self.quiet, self.verbose) {
            (true, _) => LevelFilter::Warn,
            (false, true) => LevelFilter::Debug,
            (false, false) => LevelFilter::Info,
        }
    }

    pub(super) fn run(self) -> Result<(), Failure> {
        match (&self.users, &self.add_user, &self.remove_user) {
            (_, Some(_), Some(_)) => return Err(Failure::usage("--add-user and --remove-user: one at a time")),
            (None, Some(_), None) => return Err(Failure::usage("--add-user needs --users FILE")),
            (None, None, Some(_)) => return Err(Failure::usage("--remove-user needs --users FILE")),
            (Some(file), Some(name), None) => return add_user(file, name),
            (Some(file), None, Some(name)) => return remove_user(file, name),
            (_, None, None) => {}
        }
        let users = self.users.as_deref().map(load_users).transpose()?;
        let policy = Policy { users: users.map(Arc::new), ..Policy::default() };
        server::run(self.options()?, policy)
            .map_err(|(what, error)| Failure::new(Status::Other, format!("{what}: {error}")))
    }

    fn options(self) -> Result<Options, Failure> {
        let [v4, v6] = [IpAddr::is_ipv4, IpAddr::is_ipv6].map(|is| self.advertise.iter().filter(|ip| is(ip)).count());
        if v4 > 1 || v6 > 1 {
            return Err(Failure::usage("--advertise: one address a family"));
        }
        let default = || DEFAULT_LISTEN.parse().map(|listen| vec![listen]).map_err(Failure::usage);
        Ok(Options {
            listen: if self.listen.is_empty() { default()? } else { self.listen },
            handshake_timeout: self.handshake_timeout,
            connect_timeout: self.connect_timeout,
            bind_timeout: self.bind_timeout,
            idle_timeout: self.idle_timeout,
            drain: self.drain,
            max_connections: self.max_connections,
            threads: self.threads.unwrap_or_else(one_a_core),
            advertise: self.advertise,
            bind_ports: self.bind_ports,
            udp_ports: self.udp_ports,
            udp_filtering: self.udp_filtering,
        })
    }
}

fn wrong(file: &Path, what: impl std::fmt::Display) -> Failure {
    Failure::usage(format!("{}: {what}", file.display()))
}

fn read_users(file: &Path) -> Result<String, Failure> {
    let mut octets = Vec::new();
    let opened = fs::File::open(file).map_err(|error| wrong(file, error))?;
    io::Read::take(opened, MAX_USERS_FILE + 1).read_to_end(&mut octets).map_err(|error| wrong(file, error))?;
    if octets.len() as u64 > MAX_USERS_FILE {
        return Err(wrong(file, format!("too large for a users file, which has at most {MAX_USERS_FILE} octets")));
    }
    String::from_utf8(octets).map_err(|error| {
        let before = error.as_bytes().iter().take(error.utf8_error().valid_up_to());
        let line = before.filter(|octet| **octet == b'\n').count() + 1;
        wrong(file, format!("line {line}: not UTF-8"))
    })
}

fn load_users(file: &Path) -> Result<Users, Failure> {
    let users = Users::parse(&read_users(file)?).map_err(|error| wrong(file, error))?;
    if users.is_empty() {
        log::warn!("{}: no users, so nobody can log in; add one with --add-user", file.display());
    }
    Ok(users)
}

fn add_user(file: &Path, name: &str) -> Result<(), Failure> {
    let bad = |error| Failure::usage(format!("--add-user: {error}"));
    users::check_name(name).map_err(bad)?;
    read_users_to_edit(file)?;
    let passwd = ask_password(name)?;
    let line = users::new_line(name, passwd.as_bytes()).map_err(bad)?;
    // Once more: somebody else may have edited it while we asked.
    let text = read_users_to_edit(file)?;
    replace(file, &users::edit(&text, name, Some(&line)).unwrap_or_default())
}

/// The text of a users file that is in order, or of one that is not there yet.
fn read_users_to_edit(file: &Path) -> Result<String, Failure> {
    let text = if file.exists() { read_users(file)? } else { String::new() };
    Users::parse(&text).map_err(|error| wrong(file, error))?;
    Ok(text)
}

fn remove_user(file: &Path, name: &str) -> Result<(), Failure> {
    let text = read_users(file)?;
    let text = users::edit(&text, name, None).ok_or_else(|| wrong(file, format!("no user {name:?}")))?;
    replace(file, &text)
}

/// Writes a new file beside the old one and renames it: whoever reads meanwhile sees one or the other, whole. Only
/// the owner, who stays the same, may read it.
fn replace(file: &Path, text: &str) -> Result<(), Failure> {
    // Through a link, so that the link stays one.
    let target = fs::canonicalize(file).unwrap_or_else(|_| file.into());
    let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let write = || {
        let mut new = tempfile::NamedTempFile::new_in(folder)?;
        new.write_all(text.as_bytes())?;
        if let Ok(old) = fs::metadata(&target) {
            std::os::unix::fs::fchown(new.as_file(), Some(old.uid()), Some(old.gid()))?;
        }
        new.as_file().sync_all()?;
        new.persist(&target).map_err(|error| error.error).map(drop)
    };
    write().map_err(|error: io::Error| wrong(file, error))
}

/// Twice from the terminal, without echo; or the first line of a stdin that is none.
fn ask_password(name: &str) -> Result<String, Failure> {
    let failed = |error: io::Error| Failure::new(Status::Other, format!("no password for {name:?}: {error}"));
    if !io::stdin().is_terminal() {
        let mut line = String::new();
        let mut stdin = io::Read::take(io::stdin().lock(), 4096);
        stdin.read_line(&mut line).map_err(failed)?;
        return Ok(line.trim_end_matches(['\r', '\n']).into());
    }
    let first = rpassword::prompt_password(format!("password for {name}: ")).map_err(failed)?;
    let again = rpassword::prompt_password("again: ").map_err(failed)?;
    if first == again {
        Ok(first)
    } else {
        Err(Failure::new(Status::Other, "the two passwords differ; nothing changed"))
    }
}
