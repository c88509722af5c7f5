//! `s5 serve`: the server's options.

mod explain;
mod load;
mod users;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use argh::{ArgsInfo, FromArgs};
use log::LevelFilter;

use super::client::{parse_levels, parse_methods};
use super::{CliError, ExitStatus, parse_duration, parse_positive, parse_timeout};
use crate::client::{ClientAuth, parse_hops};
use crate::gssapi::Initiator;
use crate::policy::Policy;
use crate::policy::rules::Route;
use crate::proto::{Method, ProtectionLevel};
use crate::server::{self, Filtering, Hop, ListenAddr, Options, PortRange, Quotas, StartError};
use load::{ConfigFile, PolicySources};

/// What the log calls the way of `--via`.
const VIA_HOP_NAME: &str = "--via";
/// Where to listen when nobody says.
const DEFAULT_LISTEN: &str = "127.0.0.1:1080";

/// Run a SOCKS5 server: CONNECT, BIND and UDP ASSOCIATE (RFC 1928); open, with passwords (RFC 1929) or Kerberos (RFC 1961).
#[derive(FromArgs, ArgsInfo, Debug)]
#[argh(
    subcommand,
    name = "serve",
    note = "Times are seconds, or with ms, s, m, h; rates are octets a second, or with k, M, G. SIGHUP reads users and \
            rules again. SIGTERM and SIGINT drain and end it, a second one ends it at once.\n\nA rule is allow or deny, \
            and any of from=CIDR user=NAME|*@REALM method=none|password|gssapi command=connect|bind|udp \
            to=NAME|.SUFFIX|CIDR port=N|LO-HI via=NAME, with commas for lists. The first one that matches decides.",
    example = "s5 serve --listen '*:1080' --users /etc/s5/users\n\
               s5 serve --listen '*:1080' --allow from=192.168.0.0/16\n\
               s5 serve --rules rules --explain 'from=192.168.1.2 to=localhost:22'"
)]
pub struct Args {
    #[argh(
        option,
        arg_name = "addr",
        description = "where to listen: host:port, [v6]:port, port (loopback), *:port (every address) or unix:/path; \
                       may be repeated (127.0.0.1:1080)"
    )]
    listen: Vec<ListenAddr>,

    /// a file with a line name:hash for each user; with it, nobody gets in without a password
    #[argh(option, arg_name = "file")]
    users: Option<PathBuf>,

    /// add a user to the users file, or change the password, and exit; asks for it, or reads a line of stdin
    #[argh(option, arg_name = "name")]
    add_user: Option<String>,

    /// remove a user from the users file and exit
    #[argh(option, arg_name = "name")]
    remove_user: Option<String>,

    /// methods that are taken, the preferred one first: none, password, gssapi (password with --users, gssapi with
    /// --keytab, else none)
    #[argh(option, arg_name = "method,…", from_str_fn(parse_methods))]
    auth: Option<Vec<Method>>,

    /// where the keys for gssapi are (what the environment or the system says)
    #[argh(option, arg_name = "file")]
    keytab: Option<PathBuf>,

    /// which key is used: rcmd, rcmd@host or a principal (any of the keytab)
    #[argh(option, arg_name = "name")]
    gssapi_service: Option<String>,

    /// what may be granted: none (curl can do no other), integrity, confidentiality (the last two)
    #[argh(option, arg_name = "level,…", from_str_fn(parse_levels))]
    gssapi_protection: Option<Vec<ProtectionLevel>>,

    /// a file with a rule a line: who may go where; first match wins
    #[argh(option, arg_name = "file")]
    rules: Option<PathBuf>,

    /// a rule before those of the file, without its first word; may be repeated
    #[argh(option, arg_name = "conditions", from_str_fn(allow_rule))]
    allow: Vec<RuleOption>,

    /// the same for what is denied; the order of all of them counts
    #[argh(option, arg_name = "conditions", from_str_fn(deny_rule))]
    deny: Vec<RuleOption>,

    /// print all rules, the built-in ones too, and exit
    #[argh(switch)]
    show_rules: bool,

    /// print which rule decides about 'from=IP user=NAME command=connect to=HOST:PORT', and exit: 0 allow, 1 deny
    #[argh(option, arg_name = "question")]
    explain: Option<String>,

    /// let everybody who can reach this server use it, without login or rules
    #[argh(switch)]
    open: bool,

    /// go through this SOCKS5 server, or through several with commas, nearest first: user:password@host:port
    #[argh(option, arg_name = "url")]
    via: Option<String>,

    /// a way that rules can name with via=NAME; may be repeated
    #[argh(option, arg_name = "name=url")]
    hop: Vec<String>,

    /// the methods that are offered to hops: none, password, gssapi (none, and what there is something to log in with)
    #[argh(option, arg_name = "method,…", from_str_fn(parse_methods))]
    hop_auth: Option<Vec<Method>>,

    /// at a reload, leave sessions alone that would now be refused
    #[argh(switch)]
    keep_sessions: bool,

    /// sessions at once from one address, of IPv6 from one /64 (no limit)
    #[argh(option, arg_name = "n", from_str_fn(parse_positive))]
    max_per_client: Option<usize>,

    /// sessions at once of one user (no limit)
    #[argh(option, arg_name = "n", from_str_fn(parse_positive))]
    max_per_user: Option<usize>,

    /// octets a second of a session, and of all sessions of a user together; both ways together (no limit)
    #[argh(option, arg_name = "bytes", from_str_fn(parse_rate))]
    rate: Option<u64>,

    /// octets a second of all sessions of a user together, where that is to be another number (as --rate)
    #[argh(option, arg_name = "bytes", from_str_fn(parse_rate))]
    rate_per_user: Option<u64>,

    /// for everything up to the request (10)
    #[argh(option, arg_name = "time", from_str_fn(parse_timeout), default = "Duration::from_secs(10)")]
    handshake_timeout: Duration,

    /// for the name and all addresses of a target together (10)
    #[argh(option, arg_name = "time", from_str_fn(parse_timeout), default = "Duration::from_secs(10)")]
    connect_timeout: Duration,

    /// for the peer that BIND expects (120)
    #[argh(option, arg_name = "time", from_str_fn(parse_timeout), default = "Duration::from_secs(120)")]
    bind_timeout: Duration,

    /// for silence on an open tunnel or association (124m, RFC 5382)
    #[argh(option, arg_name = "time", from_str_fn(parse_timeout), default = "Duration::from_secs(124 * 60)")]
    idle_timeout: Duration,

    /// for open sessions to finish once the server is told to end (5)
    #[argh(option, arg_name = "time", from_str_fn(parse_duration), default = "Duration::from_secs(5)")]
    drain: Duration,

    /// connections at once (what the descriptor limit allows)
    #[argh(option, arg_name = "n", from_str_fn(parse_positive))]
    max_connections: Option<usize>,

    /// threads that run sessions (one a core)
    #[argh(option, arg_name = "n", from_str_fn(parse_threads))]
    threads: Option<u16>,

    /// the address that replies to BIND and UDP ASSOCIATE give, behind NAT; one a family (the one the client uses)
    #[argh(option, arg_name = "ip")]
    advertise: Vec<IpAddr>,

    /// ports for BIND, lo-hi (the system's choice)
    #[argh(option, arg_name = "lo-hi")]
    bind_ports: Option<PortRange>,

    /// ports for UDP ASSOCIATE, lo-hi (the system's choice)
    #[argh(option, arg_name = "lo-hi")]
    udp_ports: Option<PortRange>,

    /// whose datagrams reach a client: address-dependent (of those it has sent to) or endpoint-independent
    /// (everybody's) (address-dependent)
    #[argh(option, arg_name = "how", from_str_fn(parse_filtering), default = "Filtering::AddressDependent")]
    udp_filtering: Filtering,

    /// log more; twice, all there is
    #[argh(switch, short = 'v')]
    verbose: u8,

    /// log only what is wrong
    #[argh(switch, short = 'q')]
    quiet: bool,
}

fn parse_threads(text: &str) -> Result<u16, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| format!("{text:?} is not a number from 1 to 65535"))
}

fn default_threads() -> u16 {
    std::thread::available_parallelism().map_or(1, |cores| u16::try_from(cores.get()).unwrap_or(u16::MAX))
}

fn parse_filtering(text: &str) -> Result<Filtering, String> {
    match text {
        "address-dependent" => Ok(Filtering::AddressDependent),
        "endpoint-independent" => Ok(Filtering::EndpointIndependent),
        _ => Err(format!("{text:?} is neither address-dependent nor endpoint-independent")),
    }
}

/// `1500`, `64k`, `10M`, `1G`: octets a second, in powers of 1000.
fn parse_rate(text: &str) -> Result<u64, String> {
    let number = text.trim_end_matches(['k', 'M', 'G']);
    let unit = match text.get(number.len()..).unwrap_or_default() {
        "" => Some(1),
        "k" => Some(1_000),
        "M" => Some(1_000_000),
        "G" => Some(1_000_000_000),
        _ => None,
    };
    let rate = number.parse::<u64>().ok().zip(unit).and_then(|(number, unit)| number.checked_mul(unit));
    rate.filter(|rate| *rate > 0).ok_or_else(|| format!("{text:?} is not a number of octets a second, as 1500 or 10M"))
}

/// A rule of the command line, and the how manieth it is: the options keep their own order only.
#[derive(Debug)]
struct RuleOption {
    position: usize,
    text: String,
}

impl RuleOption {
    fn new(action: &str, conditions: &str) -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        Self { position: COUNT.fetch_add(1, Ordering::Relaxed), text: format!("{action} {conditions}") }
    }
}

fn allow_rule(text: &str) -> Result<RuleOption, String> {
    Ok(RuleOption::new("allow", text))
}

fn deny_rule(text: &str) -> Result<RuleOption, String> {
    Ok(RuleOption::new("deny", text))
}

impl Args {
    pub(super) fn log_level(&self) -> LevelFilter {
        match (self.quiet, self.verbose) {
            (true, _) => LevelFilter::Warn,
            (false, 0) => LevelFilter::Info,
            (false, 1) => LevelFilter::Debug,
            (false, _) => LevelFilter::Trace,
        }
    }

    pub(super) fn run(mut self) -> Result<(), CliError> {
        match (&self.users, &self.add_user, &self.remove_user) {
            (_, Some(_), Some(_)) => return Err(CliError::usage("--add-user and --remove-user: one at a time")),
            (None, Some(_), None) => return Err(CliError::usage("--add-user needs --users FILE")),
            (None, None, Some(_)) => return Err(CliError::usage("--remove-user needs --users FILE")),
            (Some(file), Some(name), None) => return users::add_user(file, name),
            (Some(file), None, Some(name)) => return users::remove_user(file, name),
            (_, None, None) => {}
        }
        let hops = self.hops()?;
        let methods = self.accepted_methods()?;
        let sources = self.policy_sources(&hops, methods);
        let policy = sources.load()?;
        let (request, show_rules) = (self.explain.take(), self.show_rules);
        let options = self.options(&policy, hops)?;
        if show_rules {
            return explain::show(&policy, &options);
        }
        if let Some(request) = request {
            return explain::explain(policy, &options, &request);
        }
        let reload = || sources.load().map_err(|failure| failure.message);
        server::run(options, policy, &reload).map_err(|error| match error {
            StartError::Io(what, error) => CliError::new(ExitStatus::FAILURE, format!("{what}: {error}")),
            StartError::Config(why) => CliError::usage(why),
        })
    }

    /// The hops by number. That of `--via` comes last.
    fn hops(&mut self) -> Result<Vec<Arc<Hop>>, CliError> {
        let mut hops: Vec<Arc<Hop>> = Vec::new();
        for text in &self.hop {
            let (name, url) = text.split_once('=').ok_or_else(|| CliError::usage("--hop: write NAME=URL"))?;
            // A URL in place of a name may have a password in it, so neither is shown.
            let is_name = !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || "-_.".contains(c));
            if !is_name || name == "direct" {
                let what = "a name has letters, digits, - _ and . only, and is not \"direct\"";
                return Err(CliError::usage(format!("--hop: write NAME=URL; {what}")));
            }
            if hops.iter().any(|hop| hop.name == name) {
                return Err(CliError::usage(format!("--hop: there are two called {name:?}")));
            }
            let proxies = parse_hops(url).map_err(|error| CliError::usage(format!("--hop {name}: {error}")))?;
            hops.push(Arc::new(Hop { name: name.into(), proxies }));
        }
        if let Some(url) = &self.via {
            let proxies = parse_hops(url).map_err(|error| CliError::usage(format!("--via: {error}")))?;
            hops.push(Arc::new(Hop { name: VIA_HOP_NAME.into(), proxies }));
        }
        Ok(hops)
    }

    /// The methods that are taken, in their order.
    fn accepted_methods(&self) -> Result<Vec<Method>, CliError> {
        let has_gssapi_options =
            self.keytab.is_some() || self.gssapi_service.is_some() || self.gssapi_protection.is_some();
        let methods = self.auth.clone().unwrap_or_else(|| {
            let candidates = [(self.users.is_some(), Method::PASSWORD), (has_gssapi_options, Method::GSSAPI)];
            let found: Vec<Method> =
                candidates.into_iter().filter(|(is_configured, _)| *is_configured).map(|(_, method)| method).collect();
            if found.is_empty() { vec![Method::NONE] } else { found }
        });
        let usage_error = |what: &str| Err(CliError::usage(format!("--auth: {what}")));
        match (methods.contains(&Method::PASSWORD), methods.contains(&Method::GSSAPI)) {
            (true, _) if self.users.is_none() => usage_error("password needs --users FILE"),
            (false, _) if self.users.is_some() => usage_error("with --users, password has to be one of them"),
            (_, false) if has_gssapi_options => usage_error("with --keytab and the like, gssapi has to be one of them"),
            _ => Ok(methods),
        }
    }

    fn policy_sources(&mut self, hops: &[Arc<Hop>], methods: Vec<Method>) -> PolicySources {
        let drain =
            |rules: &mut Vec<RuleOption>, option| rules.drain(..).map(move |rule| (rule, option)).collect::<Vec<_>>();
        let mut all = drain(&mut self.allow, "--allow");
        for (rule, option) in drain(&mut self.deny, "--deny") {
            let at = all.partition_point(|(before, _)| before.position < rule.position);
            all.insert(at, (rule, option));
        }
        let via = self.via.as_ref().and_then(|_| hops.len().checked_sub(1));
        PolicySources {
            users: self.users.take().map(ConfigFile::new),
            rules: self.rules.take().map(ConfigFile::new),
            rule_options: all.into_iter().map(|(rule, option)| (rule.text, option)).collect(),
            methods,
            hops: hops.iter().map(|hop| hop.name.clone()).collect(),
            default_route: via.map_or(Route::Direct, Route::Hop),
        }
    }

    fn options(self, policy: &Policy, hops: Vec<Arc<Hop>>) -> Result<Options, CliError> {
        let [ipv4_count, ipv6_count] = [IpAddr::is_ipv4, IpAddr::is_ipv6]
            .map(|is_family| self.advertise.iter().filter(|ip| is_family(ip)).count());
        if ipv4_count > 1 || ipv6_count > 1 {
            return Err(CliError::usage("--advertise: one address a family"));
        }
        let offers_gssapi = match &self.hop_auth {
            Some(methods) => methods.contains(&Method::GSSAPI),
            None => Initiator::may_have_tickets(),
        };
        let acceptor = policy.methods.contains(&Method::GSSAPI).then(|| {
            let default_levels = || vec![ProtectionLevel::Integrity, ProtectionLevel::Confidentiality];
            let levels = self.gssapi_protection.unwrap_or_else(default_levels);
            load::gssapi_acceptor(self.keytab, self.gssapi_service.as_deref(), levels)
        });
        let default_listen = || DEFAULT_LISTEN.parse().map(|listen| vec![listen]).map_err(CliError::usage);
        Ok(Options {
            listen: if self.listen.is_empty() { default_listen()? } else { self.listen },
            handshake_timeout: self.handshake_timeout,
            connect_timeout: self.connect_timeout,
            bind_timeout: self.bind_timeout,
            idle_timeout: self.idle_timeout,
            drain_timeout: self.drain,
            max_connections: self.max_connections,
            threads: self.threads.unwrap_or_else(default_threads),
            advertise: self.advertise,
            bind_ports: self.bind_ports,
            udp_ports: self.udp_ports,
            udp_filtering: self.udp_filtering,
            gssapi_acceptor: acceptor.transpose()?,
            hop_auth: Arc::new(ClientAuth { gssapi: offers_gssapi.then(Initiator::default), methods: self.hop_auth }),
            hops,
            quotas: Quotas {
                sessions_per_client: self.max_per_client,
                sessions_per_user: self.max_per_user,
                session_rate: self.rate,
                user_rate: self.rate_per_user.or(self.rate),
            },
            allow_open_relay: self.open,
            keep_sessions: self.keep_sessions,
        })
    }
}
