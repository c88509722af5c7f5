//! `s5 serve`: options of the server.

mod explain;
mod hops;
mod load;
mod request;
mod users;
mod values;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use argh::{ArgsInfo, FromArgs};
use ipnet::IpNet;
use log::LevelFilter;

use super::cli::exit::{CliError, CliResult, ExitStatus, eprint_line};
use super::cli::logger::Logger;
use super::cli::output_file;
use super::cli::values::{
    parse_duration, parse_nonzero, parse_positive, parse_rate, parse_set, parse_timeout, parse_udp_relay,
};
use crate::client::ClientOptions;
use crate::gssapi::Initiator;
use crate::net::OutboundOptions;
use crate::policy::Policy;
use crate::policy::rules::Route;
use crate::proto::{DEFAULT_PORT, Method, PortRange, ProtectionLevel};
use crate::server::{self, AccessLog, Filtering, Hop, ListenAddr, Options, Quotas, RunAs};
use hops::HopSources;
use load::{PolicySources, RuleOption};
use values::{
    accepted_methods, default_threads, one_per_family, outbound, parse_allow, parse_balancers, parse_deny,
    parse_family, parse_filtering, parse_log_format, parse_mark, parse_rule,
};

/// Run a SOCKS5 server: CONNECT, BIND and UDP ASSOCIATE
#[derive(FromArgs, ArgsInfo, Debug)]
pub struct ServeArgs {
    /// listen here (repeatable) [default: 1080, loopback]. ADDR is HOST:PORT, \[IPV6\]:PORT, PORT (127.0.0.1 and ::1),
    /// *:PORT (all addresses) or unix:/PATH. 0.0.0.0:PORT accepts only IPv4, and \[::\]:PORT only IPv6. An address
    /// family that the host does not have is skipped. A link-local address has a zone, as in \[fe80::1%eth0\]:1080.
    /// With port 0 the kernel chooses the port, and s5 logs it. PORT can be the name of a service. A Unix socket that
    /// no process uses is replaced; one in use is an error. The umask sets the permissions of its file. Its clients
    /// send and receive datagrams at 127.0.0.1. If a client announces its port, datagrams from other ports are dropped.
    /// Without this option, s5 uses the sockets of a socket unit, if systemd passes some. See SYSTEMD. Addresses other than
    /// loopback, and --proxy-protocol-from, require --users, --keytab, an allow rule with from=, or --allow-open-relay.
    #[argh(option, arg_name = "ADDR")]
    listen: Vec<ListenAddr>,

    /// public address of this host behind NAT. IP is the address in the replies to BIND and UDP ASSOCIATE, which
    /// clients and peers can reach. By default, BIND has the address on the route to the peer (without a peer in the
    /// request, on the default route), and UDP ASSOCIATE the address that the client connected to. Clients on this host
    /// still get loopback, unless the server listens on loopback only. At most one IPv4 and one IPv6 address.
    #[argh(option, arg_name = "IP")]
    advertise: Vec<IpAddr>,

    /// address for BIND alone [default: as --advertise]
    #[argh(option, arg_name = "IP")]
    advertise_bind: Vec<IpAddr>,

    /// address for UDP alone [default: as --advertise]
    #[argh(option, arg_name = "IP")]
    advertise_udp: Vec<IpAddr>,

    /// source address [default: the system's]. Repeatable: at most one IPv4 and one IPv6 address, both of this host. It
    /// applies to connections and datagrams to targets and upstream proxies. BIND listens there, and replies with it
    /// unless --advertise-bind is set. If only one family is given, the other one is not used: its targets are refused
    /// with REP 8, and such addresses of a name are skipped. 0.0.0.0 and :: stand for the choice of the system.
    #[argh(option, arg_name = "IP")]
    outbound: Vec<IpAddr>,

    /// use only this network interface for outbound traffic. It applies to connections, the listeners of BIND, and
    /// datagrams, except those between the server and its clients. Name resolution is not affected. Before Linux 5.7, it
    /// requires CAP_NET_RAW.
    #[argh(option, arg_name = "NAME")]
    outbound_interface: Option<String>,

    /// set the mark of outbound packets (SO_MARK), for routing and the packet filter. N is decimal, or hexadecimal with
    /// 0x. It applies to the same sockets as --outbound-interface, and requires CAP_NET_RAW (before Linux 5.17,
    /// CAP_NET_ADMIN), which the server then keeps.
    #[argh(option, arg_name = "N", from_str_fn(parse_mark))]
    mark: Option<u32>,

    /// order of the addresses of a name: 4 or 6 first [default: the resolver's]. It applies to TCP and UDP. s5 tries the
    /// families in turn, beginning with this one (RFC 8305). A name that an upstream proxy resolves is not affected.
    #[argh(option, arg_name = "FAMILY", from_str_fn(parse_family))]
    prefer: Option<bool>,

    /// ports for BIND [default: any free port]. PORTS is LO-HI or a single port. If any peer may connect, s5 tries the
    /// port of the request first.
    #[argh(option, arg_name = "PORTS")]
    bind_ports: Option<PortRange>,

    /// ports for UDP ASSOCIATE [default: any free port]. PORTS is LO-HI, with one port for each association and REP 1
    /// if none is free, or a single port for all associations. They are told apart by the addresses of their clients.
    /// The first datagram from a new port of a client address belongs to its oldest association without a port.
    #[argh(option, arg_name = "PORTS")]
    udp_ports: Option<PortRange>,

    /// read client addresses that these balancers send. CIDR is a comma-separated list of addresses, CIDR blocks, and
    /// unix for Unix sockets. Connections from there begin with a header of the PROXY protocol. See LOAD BALANCERS.
    #[argh(option, arg_name = "CIDR", from_str_fn(parse_balancers))]
    proxy_protocol_from: Option<Vec<Option<IpNet>>>,

    /// serve metrics and health checks over HTTP. ADDR is as in --listen. See METRICS.
    #[argh(option, arg_name = "ADDR")]
    metrics: Option<ListenAddr>,

    /// serve metrics to other hosts. All hosts that reach the address can read them; use a firewall.
    #[argh(switch)]
    allow_remote_metrics: bool,

    /// number of worker threads [default: one per core]
    #[argh(option, arg_name = "N", from_str_fn(parse_nonzero))]
    threads: Option<u16>,

    /// switch to this user once the server listens. USER is a user or USER:GROUP, by name or number. Without a group,
    /// the server gets all groups of the user. For a reload, the user must be able to read the files of --users,
    /// --rules and --proxy-auth-file, and at logins that of --keytab. Only root can use this option. See SANDBOX.
    #[argh(option, arg_name = "USER")]
    run_as: Option<RunAs>,

    /// do not restrict the process. The server keeps its privileges, but --run-as still applies. See SANDBOX.
    #[argh(switch)]
    no_sandbox: bool,

    /// require a password; FILE has name:hash lines. See USERS FILE. S5_USER and S5_PASSWORD define a single user instead.
    #[argh(option, arg_name = "FILE")]
    users: Option<PathBuf>,

    /// add a user or change the password, then exit. s5 prompts for the password twice, without echo. If stdin is not a
    /// terminal, s5 reads the password from the first line of stdin.
    #[argh(option, arg_name = "NAME")]
    add_user: Option<String>,

    /// remove a user from the users file, then exit
    #[argh(option, arg_name = "NAME")]
    remove_user: Option<String>,

    /// login methods to accept [default: automatic]. A comma-separated list of none, password and gssapi, the preferred
    /// method first. The default is password with --users, gssapi with --keytab or a --gssapi option, otherwise none.
    #[argh(option, arg_name = "METHODS", from_str_fn(parse_set))]
    auth: Option<Vec<Method>>,

    /// file with Kerberos keys [default: the system's]. s5 reads FILE at each login, so new keys need no restart. The
    /// default is KRB5_KTNAME or the default of the Kerberos library.
    #[argh(option, arg_name = "FILE")]
    keytab: Option<PathBuf>,

    /// service or principal [default: any in the keytab]. NAME is a service such as rcmd (on any host) or rcmd@HOST, or
    /// a principal such as rcmd/HOST@REALM.
    #[argh(option, arg_name = "NAME")]
    gssapi_service: Option<String>,

    /// protection levels to grant [default: all but none]. A comma-separated list of none, integrity and
    /// confidentiality. A client gets the level that it requests if the list has it, otherwise the strongest level of
    /// the list. curl supports only none.
    #[argh(option, arg_name = "LEVELS", from_str_fn(parse_set))]
    gssapi_protection: Option<Vec<ProtectionLevel>>,

    /// rules for clients, users and targets. The first rule that matches decides. See RULES.
    #[argh(option, arg_name = "FILE")]
    rules: Option<PathBuf>,

    /// add a rule before the file's (repeatable). RULE is a line of a rules file, such as 'allow to=192.0.2.0/24'.
    /// Rules of --rule, --allow and --deny are evaluated in the order of the command line.
    #[argh(option, arg_name = "RULE", from_str_fn(parse_rule))]
    rule: Vec<RuleOption>,

    /// same as --rule 'allow CONDITIONS'
    #[argh(option, arg_name = "CONDITIONS", from_str_fn(parse_allow))]
    allow: Vec<RuleOption>,

    /// same as --rule 'deny CONDITIONS'
    #[argh(option, arg_name = "CONDITIONS", from_str_fn(parse_deny))]
    deny: Vec<RuleOption>,

    /// print all rules in order, then exit. This includes the built-in rules.
    #[argh(switch)]
    show_rules: bool,

    /// show which rule decides REQUEST, then exit. REQUEST has the form 'from=IP user=NAME command=connect
    /// to=HOST:PORT'; only to= is required. The keys method=, protection= and port= are also possible. REQUEST can also
    /// be a line of the log: its addr= is the address of the name in to=. The exit status is 0 for allow and 1 for
    /// deny. No server is started.
    #[argh(option, arg_name = "REQUEST")]
    explain: Option<String>,

    /// check options and files as at a start, then exit. s5 opens no port. The exit status is that of a start that fails,
    /// or 0.
    #[argh(switch)]
    check: bool,

    /// serve other hosts without login or rules. This is an open relay: all hosts that reach the server can use it.
    #[argh(switch)]
    allow_open_relay: bool,

    /// keep sessions that reloaded rules would deny. By default a reload closes them.
    #[argh(switch)]
    keep_sessions: bool,

    /// forward all traffic through this proxy or chain. Rules with via= override it. For URL, see CLIENT OPTIONS. User
    /// and password can also come from --proxy-auth-file or the environment, see PROXY AND CREDENTIALS. Of several URLs
    /// or chains, separated by |, the first one that works is used. See UPSTREAM PROXIES.
    #[argh(option, arg_name = "URL")]
    via: Option<String>,

    /// proxy that rules select by via=NAME (repeatable). NAME has letters, digits, -, _ and ., and is not "direct". URL
    /// may be a chain, or several of them, as with --via.
    #[argh(option, arg_name = "NAME=URL")]
    hop: Vec<String>,

    /// read user:password lines for --via and --hop. It is the file of CLIENT OPTIONS. s5 reads it again at SIGHUP, for
    /// new connections to the proxies.
    #[argh(option, arg_name = "FILE")]
    proxy_auth_file: Option<String>,

    /// login methods for proxies [default: automatic]. A comma-separated list of none, password and gssapi. The default
    /// is none, plus password and gssapi if there are credentials for them. With only gssapi in the list, s5 never uses
    /// an unprotected session.
    #[argh(option, arg_name = "METHODS", from_str_fn(parse_set))]
    hop_auth: Option<Vec<Method>>,

    /// UDP relay: reply or proxy [default: reply]. With reply, datagrams go to the address in the reply of a proxy.
    /// With proxy, they go to the address of the proxy itself, with the port in the reply, as with --udp-relay of the
    /// clients.
    #[argh(option, arg_name = "ADDR", from_str_fn(parse_udp_relay), default = "false")]
    hop_udp_relay: bool,

    /// filter UDP answers [default: address-dependent]. With address-dependent, a client receives datagrams only from
    /// addresses that it has sent to; with endpoint-independent, from all addresses (RFC 4787 section 5).
    #[argh(option, arg_name = "MODE", from_str_fn(parse_filtering), default = "Filtering::AddressDependent")]
    udp_filtering: Filtering,

    /// limit sessions [default: from descriptor limit]. At the limit, new connections wait in the listen backlog. The
    /// default is about half of the hard descriptor limit, since a session needs two descriptors, and at most 500000.
    #[argh(option, arg_name = "N", from_str_fn(parse_positive))]
    max_connections: Option<usize>,

    /// limit sessions per client [default: 3/4 of all]. IPv6 clients are counted per /64. Connections above the limit
    /// are closed at accept. The default is three quarters of --max-connections. See LIMITS AND ATTACKS.
    #[argh(option, arg_name = "N", from_str_fn(parse_positive))]
    max_per_client: Option<usize>,

    /// limit sessions per user [default: none]. Requests above the limit are refused with REP 2.
    #[argh(option, arg_name = "N", from_str_fn(parse_positive))]
    max_per_user: Option<usize>,

    /// limit bytes/s of a session [default: none]. Both directions count together. BYTES can end in k, M or G (powers
    /// of 1000). An idle session can send a burst of 250 ms at this rate, but at least 64 KiB. Datagrams above the
    /// limit are dropped.
    #[argh(option, arg_name = "BYTES", from_str_fn(parse_rate))]
    rate: Option<u64>,

    /// limit bytes/s of a user [default: as --rate]. All sessions of the user count together.
    #[argh(option, arg_name = "BYTES", from_str_fn(parse_rate))]
    rate_per_user: Option<u64>,

    /// time limit for login and request [default: 10s]. It starts at accept.
    #[argh(option, arg_name = "TIME", from_str_fn(parse_timeout), default = "Duration::from_secs(10)")]
    handshake_timeout: Duration,

    /// time limit to reach a target [default: 10s]. It covers name resolution, all addresses and upstream proxies.
    #[argh(option, arg_name = "TIME", from_str_fn(parse_timeout), default = "Duration::from_secs(10)")]
    connect_timeout: Duration,

    /// time limit for a peer of BIND [default: 2m]
    #[argh(option, arg_name = "TIME", from_str_fn(parse_timeout), default = "Duration::from_secs(120)")]
    bind_timeout: Duration,

    /// close sessions idle for this long [default: 124m]. The default follows RFC 5382.
    #[argh(option, arg_name = "TIME", from_str_fn(parse_timeout), default = "Duration::from_secs(124 * 60)")]
    idle_timeout: Duration,

    /// wait for sessions at shutdown [default: 5s]. Sessions that are still open after this time are reset.
    #[argh(option, arg_name = "TIME", from_str_fn(parse_duration), default = "Duration::from_secs(5)")]
    drain_timeout: Duration,

    /// log the steps of sessions; -vv: handshakes too. See LOG.
    #[argh(switch, short = 'v')]
    verbose: u8,

    /// log only warnings and errors. The file of --access-log still has all sessions.
    #[argh(switch, short = 'q')]
    quiet: bool,

    /// format of the log: logfmt or json [default: logfmt]. With json, each line is a JSON object. See LOG.
    #[argh(option, arg_name = "FORMAT", from_str_fn(parse_log_format), default = "false")]
    log_format: bool,

    /// log ended sessions to this file [default: stderr]. s5 appends to FILE, and opens it again at SIGHUP. See LOG.
    #[argh(option, arg_name = "FILE")]
    access_log: Option<PathBuf>,
}

/// Prints the result of an action, unless `--quiet` is set.
fn report(is_quiet: bool, text: String) -> CliResult {
    if !is_quiet {
        eprint_line(&format!("s5: {}", CliError::new(ExitStatus::FAILURE, text)));
    }
    Ok(())
}

impl ServeArgs {
    pub(super) fn logger(&self) -> Logger {
        let level = match self.verbose {
            verbose if self.quiet || (self.check && verbose == 0) => LevelFilter::Warn,
            0 => LevelFilter::Info,
            1 => LevelFilter::Debug,
            _ => LevelFilter::Trace,
        };
        Logger::new(level, self.log_format, self.access_log.is_some())
    }

    /// `command_line` starts a process with these arguments.
    pub(super) fn run(mut self, command_line: Vec<String>) -> CliResult {
        match (&self.users, &self.add_user, &self.remove_user) {
            (_, Some(_), Some(_)) => return Err(CliError::usage("--add-user and --remove-user cannot be combined")),
            (Some(file), Some(name), _) => return report(self.quiet, users::add_user(file, name)?),
            (Some(file), _, Some(name)) => return report(self.quiet, users::remove_user(file, name)?),
            (None, Some(_), _) => return Err(CliError::usage("--add-user requires --users FILE")),
            (None, _, Some(_)) => return Err(CliError::usage("--remove-user requires --users FILE")),
            (_, None, None) => {}
        }
        let user_entry = users::entry_in_environment(self.users.is_some())?;
        let has_gssapi = self.keytab.is_some() || self.gssapi_service.is_some() || self.gssapi_protection.is_some();
        let has_users = self.users.is_some() || user_entry.is_some();
        let methods = accepted_methods(self.auth.as_deref(), has_users, has_gssapi)?;
        let sources = self.policy_sources(methods, user_entry)?;
        let inherited = server::inherited_listeners(!self.listen.is_empty()).map_err(CliError::usage)?;
        let (policy, proxies) = sources.load()?;
        if !self.no_sandbox {
            server::close_inherited_descriptors();
        }
        let hops = sources.hops.names().into_iter().zip(proxies).map(|(name, proxies)| Hop::new(name, proxies).into());
        let (request, show_rules, is_check, is_quiet) = (self.explain.take(), self.show_rules, self.check, self.quiet);
        let mut options = self.options(&policy, hops.collect(), sources.files().map(Into::into).collect())?;
        (options.inherited, options.command_line) = (inherited, command_line);
        options.successor_variable = sources.user_entry.clone().map(|entry| (users::ENTRY_VARIABLE, entry));
        if show_rules {
            return explain::show(&policy, &options);
        }
        if let Some(request) = request {
            return explain::explain(policy, &options, &request);
        }
        if is_check {
            server::check(options, policy)?;
            return report(is_quiet, "check passed: the options and files are valid".into());
        }
        Ok(server::run(options, policy, &|| sources.reload().map_err(|error| error.message))?)
    }

    fn policy_sources(&mut self, methods: Vec<Method>, user_entry: Option<String>) -> CliResult<PolicySources> {
        let mut rule_options: Vec<RuleOption> = Vec::new();
        for rule in [&mut self.rule, &mut self.allow, &mut self.deny].map(std::mem::take).concat() {
            // They are few, and a sort takes 4 KB of code.
            rule_options.insert(rule_options.partition_point(|other| other.position < rule.position), rule);
        }
        // The --via hop follows the others.
        let via = self.via.as_ref().map(|_| self.hop.len());
        let takes_passwords = self.hop_auth.as_ref().is_none_or(|methods| methods.contains(&Method::PASSWORD));
        // Without a server, no password is needed.
        let needs_passwords = takes_passwords && self.explain.is_none() && !self.show_rules;
        let hops = HopSources::new(&self.hop, self.via.as_deref(), self.proxy_auth_file.take(), needs_passwords)?;
        hops.check_forwarding(takes_passwords && methods.contains(&Method::PASSWORD))?;
        Ok(PolicySources {
            users: self.users.take(),
            user_entry,
            rules: self.rules.take(),
            keytab: self.keytab.clone(),
            rule_options,
            methods,
            hops,
            default_route: Route { hop: via, outbound: None },
        })
    }

    fn options(self, policy: &Policy, hops: Vec<Arc<Hop>>, mut reload_files: Vec<PathBuf>) -> CliResult<Options> {
        let both = one_per_family("--advertise", self.advertise)?;
        let or_both = |own: Vec<IpAddr>| {
            let others = both.iter().filter(|ip| !own.iter().any(|own| own.is_ipv4() == ip.is_ipv4()));
            own.iter().chain(others).copied().collect()
        };
        let advertise_bind = or_both(one_per_family("--advertise-bind", self.advertise_bind)?);
        let advertise_udp = or_both(one_per_family("--advertise-udp", self.advertise_udp)?);
        let offers_gssapi = match &self.hop_auth {
            Some(methods) => methods.contains(&Method::GSSAPI),
            None => Initiator::may_have_tickets(),
        };
        let gssapi = offers_gssapi.then(Initiator::default);
        let hop_options = ClientOptions {
            gssapi,
            methods: self.hop_auth,
            proxy_is_udp_relay: self.hop_udp_relay,
            ..ClientOptions::default()
        };
        reload_files.extend(self.keytab.clone());
        let acceptor = policy.methods.contains(&Method::GSSAPI).then(|| {
            let default_levels = || vec![ProtectionLevel::Integrity, ProtectionLevel::Confidentiality];
            let levels = self.gssapi_protection.unwrap_or_else(default_levels);
            load::gssapi_acceptor(self.keytab, self.gssapi_service.as_deref(), levels)
        });
        let default_listen = ListenAddr::Loopback(DEFAULT_PORT);
        Ok(Options {
            inherited: Vec::new(),
            command_line: Vec::new(),
            successor_variable: None,
            listen: if self.listen.is_empty() { vec![default_listen] } else { self.listen },
            metrics: self.metrics,
            allow_remote_metrics: self.allow_remote_metrics,
            handshake_timeout: self.handshake_timeout,
            connect_timeout: self.connect_timeout,
            bind_timeout: self.bind_timeout,
            idle_timeout: self.idle_timeout,
            drain_timeout: self.drain_timeout,
            max_connections: self.max_connections,
            threads: self.threads.unwrap_or_else(default_threads),
            advertise_bind,
            advertise_udp,
            outbound: outbound(self.outbound)?,
            outbound_options: OutboundOptions {
                interface: self.outbound_interface,
                mark: self.mark,
                prefers_ipv4: self.prefer,
            },
            bind_ports: self.bind_ports,
            udp_ports: self.udp_ports,
            udp_filtering: self.udp_filtering,
            proxy_protocol_from: self.proxy_protocol_from.unwrap_or_default(),
            gssapi_acceptor: acceptor.transpose()?,
            hop_options: hop_options.into(),
            hops,
            quotas: Quotas {
                sessions_per_client: self.max_per_client,
                sessions_per_user: self.max_per_user,
                session_rate: self.rate,
                user_rate: self.rate_per_user.or(self.rate),
            },
            allow_open_relay: self.allow_open_relay,
            keep_sessions: self.keep_sessions,
            run_as: self.run_as,
            sandbox: !self.no_sandbox,
            access_log: self.access_log.map(|path| AccessLog { path, open: output_file::append }),
            reload_files,
        })
    }
}
