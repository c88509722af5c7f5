//! The options of `s5 serve`. The server reads them, except those about files, rules and messages, which are for `cmd`.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use argh::{ArgsInfo, FromArgs};
use ipnet::IpNet;

use super::listen::ListenAddr;
use super::run_as::RunAs;
use crate::policy::is_unicast;
use crate::policy::rules::parse_cidr;
use crate::proto::{Method, PortRange, ProtectionLevel};
use crate::values::{
    parse_choice, parse_duration, parse_nonzero, parse_positive, parse_rate, parse_set, parse_timeout, parse_udp_relay,
};

/// Run a SOCKS5 server: CONNECT, BIND and UDP ASSOCIATE
#[derive(FromArgs, ArgsInfo, Debug)]
pub struct ServeArgs {
    /// listen here (repeatable) [default: 1080, loopback]. ADDR is HOST:PORT, \[IPV6\]:PORT, PORT (127.0.0.1 and ::1),
    /// *:PORT (all addresses) or unix:/PATH. 0.0.0.0:PORT accepts only IPv4, and \[::\]:PORT only IPv6. An address
    /// family that the host does not have is skipped. If HOST is a name, s5 skips its addresses of other hosts with a
    /// warning. A link-local address has a zone, as in \[fe80::1%eth0\]:1080. With port 0 the kernel chooses the port,
    /// and s5 logs it. PORT can be the name of a service. A Unix socket that no process uses is replaced; one in use is
    /// an error. The umask sets the permissions of its file. Its clients send and receive datagrams at 127.0.0.1. If a
    /// client announces its port, datagrams from other ports are dropped. Without this option, s5 uses the sockets of a
    /// socket unit, if systemd passes some. See SYSTEMD. Addresses other than loopback, and --proxy-protocol-from,
    /// require --users, --keytab, an allow rule with from=, or --allow-open-relay.
    #[argh(option, arg_name = "ADDR")]
    pub listen: Vec<ListenAddr>,

    /// public address of this host behind NAT. IP is the address in the replies to BIND and UDP ASSOCIATE, which
    /// clients and peers can reach. By default, BIND has the address on the route to the peer (without a peer in the
    /// request, on the default route), and UDP ASSOCIATE the address that the client connected to. Clients on this host
    /// still get loopback, unless the server listens on loopback only. At most one IPv4 and one IPv6 address.
    #[argh(option, arg_name = "IP", from_str_fn(parse_host_ip))]
    pub advertise: Vec<IpAddr>,

    /// address for BIND alone [default: as --advertise]
    #[argh(option, hidden_help, arg_name = "IP", from_str_fn(parse_host_ip))]
    pub advertise_bind: Vec<IpAddr>,

    /// address for UDP alone [default: as --advertise]
    #[argh(option, hidden_help, arg_name = "IP", from_str_fn(parse_host_ip))]
    pub advertise_udp: Vec<IpAddr>,

    /// source address [default: the system's]. Repeatable: at most one IPv4 and one IPv6 address, both of this host. It
    /// applies to connections and datagrams to targets and upstream proxies. BIND listens there, and replies with it
    /// unless --advertise-bind is set. If only one family is given, the other one is not used: its targets are refused
    /// with REP 8, and such addresses of a name are skipped. 0.0.0.0 and :: stand for the choice of the system.
    #[argh(option, arg_name = "IP")]
    pub outbound: Vec<IpAddr>,

    /// use only this network interface for outbound traffic. It applies to connections, the listeners of BIND, and
    /// datagrams, except those between the server and its clients. Name resolution is not affected. Before Linux 5.7,
    /// it requires CAP_NET_RAW.
    #[argh(option, hidden_help, arg_name = "NAME")]
    pub outbound_interface: Option<String>,

    /// set the mark of outbound packets (SO_MARK), for routing and the packet filter. N is decimal, or hexadecimal with
    /// 0x. It applies to the same sockets as --outbound-interface: the queries of name resolution have no mark, because
    /// the C library sends them. It requires CAP_NET_RAW (before Linux 5.17, CAP_NET_ADMIN), which the server then
    /// keeps.
    #[argh(option, hidden_help, arg_name = "N", from_str_fn(parse_mark))]
    pub mark: Option<u32>,

    /// order of the addresses of a name: 4 or 6 first [default: the resolver's]. It applies to TCP and UDP. s5 tries
    /// the families in turn, beginning with this one (RFC 8305). A name that an upstream proxy resolves is not
    /// affected.
    #[argh(option, hidden_help, arg_name = "FAMILY", from_str_fn(parse_family))]
    pub prefer: Option<bool>,

    /// ports for BIND [default: any free port]. PORTS is LO-HI or a single port. If any peer may connect, s5 tries the
    /// port of the request first.
    #[argh(option, arg_name = "PORTS")]
    pub bind_ports: Option<PortRange>,

    /// ports for UDP ASSOCIATE [default: any free port]. PORTS is LO-HI, with one port for each association and REP 1
    /// if none is free, or a single port for all associations. They are told apart by the addresses of their clients.
    /// The first datagram from a new port of a client address belongs to its oldest association without a port, or, with
    /// GSSAPI, to the one that can unwrap it.
    #[argh(option, arg_name = "PORTS")]
    pub udp_ports: Option<PortRange>,

    /// read client addresses that these balancers send. CIDR is a comma-separated list of addresses, CIDR blocks, and
    /// unix for Unix sockets. Connections from there begin with a header of the PROXY protocol. See LOAD BALANCERS.
    #[argh(option, arg_name = "CIDR", from_str_fn(parse_balancers))]
    pub proxy_protocol_from: Option<Vec<Option<IpNet>>>,

    /// serve metrics and health checks over HTTP. ADDR is as in --listen. See METRICS.
    #[argh(option, arg_name = "ADDR")]
    pub metrics: Option<ListenAddr>,

    /// serve metrics to other hosts. All hosts that reach the address can read them; use a firewall.
    #[argh(switch, hidden_help)]
    pub allow_remote_metrics: bool,

    /// number of worker threads [default: one per core]
    #[argh(option, arg_name = "N", from_str_fn(parse_nonzero), default = "default_threads()")]
    pub threads: u16,

    /// switch to this user once the server listens. USER is a user or USER:GROUP, by name or number. Without a group,
    /// the server gets all groups of the user. For a reload, the user must be able to read the files of --users,
    /// --rules and --proxy-auth-file, and at logins that of --keytab. Only root can use this option. See SANDBOX.
    #[argh(option, arg_name = "USER")]
    pub run_as: Option<RunAs>,

    /// do not restrict the process. The server keeps its privileges, but --run-as still applies. See SANDBOX.
    #[argh(switch)]
    pub no_sandbox: bool,

    /// require a password; FILE has name:hash lines. See USERS FILE. S5_USER and S5_PASSWORD define a single user
    /// instead.
    #[argh(option, arg_name = "FILE")]
    pub users: Option<PathBuf>,

    /// add a user or change the password, then exit. s5 prompts for the password twice, without echo. If stdin is not a
    /// terminal, s5 reads the password from the first line of stdin.
    #[argh(option, arg_name = "NAME")]
    pub add_user: Option<String>,

    /// remove a user from the users file, then exit
    #[argh(option, arg_name = "NAME")]
    pub remove_user: Option<String>,

    /// login methods to accept [default: automatic]. A comma-separated list of none, password and gssapi, the preferred
    /// method first. The default is password with --users, gssapi with --keytab or a --gssapi option, otherwise none.
    #[argh(option, arg_name = "METHODS", from_str_fn(parse_set))]
    pub auth: Option<Vec<Method>>,

    /// file with Kerberos keys [default: the system's]. s5 reads FILE at each login, so new keys need no restart. The
    /// default is KRB5_KTNAME or the default of the Kerberos library.
    #[argh(option, arg_name = "FILE")]
    pub keytab: Option<PathBuf>,

    /// service or principal [default: any in the keytab]. NAME is a service such as rcmd (on any host) or rcmd@HOST, or
    /// a principal such as rcmd/HOST@REALM.
    #[argh(option, arg_name = "NAME")]
    pub gssapi_service: Option<String>,

    /// protection levels to grant [default: all but none]. A comma-separated list of none, integrity and
    /// confidentiality. A client gets the level that it requests if the list has it, otherwise the strongest level of
    /// the list. curl supports only none.
    #[argh(option, arg_name = "LEVELS", from_str_fn(parse_set))]
    pub gssapi_protection: Option<Vec<ProtectionLevel>>,

    /// rules for clients, users and targets. The first rule that matches decides. See RULES.
    #[argh(option, arg_name = "FILE")]
    pub rules: Option<PathBuf>,

    /// add a rule before the file's (repeatable). RULE is a line of a rules file, such as 'allow to=192.0.2.0/24'.
    /// Rules of --rule, --allow and --deny are evaluated in the order of the command line.
    #[argh(option, arg_name = "RULE", from_str_fn(parse_rule))]
    pub rule: Vec<RuleOption>,

    /// same as --rule 'allow CONDITIONS'
    #[argh(option, arg_name = "CONDITIONS", from_str_fn(parse_allow))]
    pub allow: Vec<RuleOption>,

    /// same as --rule 'deny CONDITIONS'
    #[argh(option, arg_name = "CONDITIONS", from_str_fn(parse_deny))]
    pub deny: Vec<RuleOption>,

    /// print all rules in order, then exit. This includes the built-in rules.
    #[argh(switch)]
    pub show_rules: bool,

    /// show which rule decides REQUEST, then exit. REQUEST has the form 'from=IP user=NAME command=connect
    /// to=HOST:PORT'; only to= is required. The keys method=, protection= and port= are also possible. REQUEST can also
    /// be a line of the log in logfmt: its addr= is the address of the name in to=, and keys such as proxy= (the load
    /// balancer) are not used. The exit status is 0 for allow and 1 for deny. No server is started.
    #[argh(option, arg_name = "REQUEST")]
    pub explain: Option<String>,

    /// check options and files as at a start, then exit. s5 opens no port. The exit status is that of a start that
    /// fails, or 0. An address in use is no error, because the server may be running.
    #[argh(switch)]
    pub check: bool,

    /// serve other hosts without login or rules. This is an open relay: all hosts that reach the server can use it.
    #[argh(switch)]
    pub allow_open_relay: bool,

    /// keep sessions that reloaded rules would deny. By default a reload closes them.
    #[argh(switch, hidden_help)]
    pub keep_sessions: bool,

    /// forward all traffic through this proxy or chain. Rules with via= override it. For URL, see CLIENT OPTIONS. User
    /// and password can also come from --proxy-auth-file or the environment, see PROXY AND CREDENTIALS. Of several URLs
    /// or chains, separated by |, the first one that works is used. See UPSTREAM PROXIES.
    #[argh(option, arg_name = "URL")]
    pub via: Option<String>,

    /// proxy that rules select by via=NAME (repeatable). NAME has letters, digits, -, _ and ., and is not "direct". URL
    /// may be a chain, or several of them, as with --via.
    #[argh(option, arg_name = "NAME=URL")]
    pub hop: Vec<String>,

    /// read user:password lines for --via and --hop. It is the file of CLIENT OPTIONS. s5 reads it again at SIGHUP, for
    /// new connections to the proxies. A server that read stdin or a descriptor cannot restart at SIGUSR2.
    #[argh(option, arg_name = "FILE")]
    pub proxy_auth_file: Option<String>,

    /// login methods for proxies [default: automatic]. A comma-separated list of none, password and gssapi. The default
    /// is none, plus password and gssapi if there are credentials for them. With only gssapi in the list, s5 never uses
    /// an unprotected session.
    #[argh(option, hidden_help, arg_name = "METHODS", from_str_fn(parse_set))]
    pub hop_auth: Option<Vec<Method>>,

    /// UDP relay: reply or proxy [default: reply]. With reply, datagrams go to the address in the reply of a proxy.
    /// With proxy, they go to the address of the proxy itself, with the port in the reply, as with --udp-relay of the
    /// clients.
    #[argh(option, hidden_help, arg_name = "ADDR", from_str_fn(parse_udp_relay), default = "false")]
    pub hop_udp_relay: bool,

    /// filter UDP answers [default: address-dependent]. With address-dependent, a client receives datagrams only from
    /// addresses that it has sent to; with endpoint-independent, from all addresses (RFC 4787 section 5).
    #[argh(
        option,
        hidden_help,
        arg_name = "MODE",
        from_str_fn(parse_filtering),
        default = "Filtering::AddressDependent"
    )]
    pub udp_filtering: Filtering,

    /// limit sessions [default: from descriptor limit]. At the limit, new connections wait in the listen backlog. The
    /// default is about half of the hard descriptor limit, since a session needs two descriptors, and at most 500000.
    #[argh(option, arg_name = "N", from_str_fn(parse_positive))]
    pub max_connections: Option<usize>,

    /// limit sessions per client [default: 3/4 of all]. IPv6 clients are counted per /64. Connections above the limit
    /// are closed at accept. The default is three quarters of --max-connections. See LIMITS AND ATTACKS.
    #[argh(option, arg_name = "N", from_str_fn(parse_positive))]
    pub max_per_client: Option<usize>,

    /// limit sessions per user [default: none]. Requests above the limit are refused with REP 2.
    #[argh(option, arg_name = "N", from_str_fn(parse_positive))]
    pub max_per_user: Option<usize>,

    /// limit bytes/s of a session [default: none]. Both directions count together. BYTES can end in k, M or G (powers
    /// of 1000). An idle session can send a burst of 250 ms at this rate, but at least 64 KiB. Datagrams above the
    /// limit are dropped.
    #[argh(option, arg_name = "BYTES", from_str_fn(parse_rate))]
    pub rate: Option<u64>,

    /// limit bytes/s of a user [default: as --rate]. All sessions of the user count together.
    #[argh(option, hidden_help, arg_name = "BYTES", from_str_fn(parse_rate))]
    pub rate_per_user: Option<u64>,

    /// time limit for login and request [default: 10s]. It starts at accept.
    #[argh(option, arg_name = "TIME", from_str_fn(parse_timeout), default = "Duration::from_secs(10)")]
    pub handshake_timeout: Duration,

    /// time limit to reach a target [default: 10s]. It covers name resolution, all addresses and upstream proxies.
    #[argh(option, arg_name = "TIME", from_str_fn(parse_timeout), default = "Duration::from_secs(10)")]
    pub connect_timeout: Duration,

    /// time limit for a peer of BIND [default: 2m]
    #[argh(option, arg_name = "TIME", from_str_fn(parse_timeout), default = "Duration::from_secs(120)")]
    pub bind_timeout: Duration,

    /// close sessions idle for this long [default: 124m]. The default follows RFC 5382.
    #[argh(option, arg_name = "TIME", from_str_fn(parse_timeout), default = "Duration::from_secs(124 * 60)")]
    pub idle_timeout: Duration,

    /// wait for sessions at shutdown [default: 5s]. Sessions that are still open after this time are reset.
    /// After SIGQUIT, the maximum is 2 s.
    #[argh(option, arg_name = "TIME", from_str_fn(parse_duration), default = "Duration::from_secs(5)")]
    pub drain_timeout: Duration,

    /// log the steps of sessions; -vv: handshakes too. See LOG.
    #[argh(switch, short = 'v')]
    pub verbose: u8,

    /// log only warnings and errors. The file of --access-log still has all sessions.
    #[argh(switch, short = 'q')]
    pub quiet: bool,

    /// format of the log: logfmt or json [default: logfmt]. With json, each line is a JSON object. See LOG.
    #[argh(option, hidden_help, arg_name = "FORMAT", from_str_fn(parse_log_format), default = "false")]
    pub log_format: bool,

    /// log ended sessions to this file [default: stderr]. s5 appends to FILE, and opens it again at SIGHUP. See LOG.
    #[argh(option, arg_name = "FILE")]
    pub access_log: Option<PathBuf>,
}

/// Senders whose datagrams a UDP association relays to its client (RFC 4787 section 5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Filtering {
    /// Only addresses that the client has sent to.
    #[default]
    AddressDependent,
    /// Every address.
    EndpointIndependent,
}

/// A rule of the command line.
#[derive(Clone, Debug)]
pub struct RuleOption {
    /// Position among all of them. argh collects each option separately; this restores their common order.
    pub position: usize,
    /// `--rule`, `--allow` or `--deny`.
    pub option: &'static str,
    /// The rule.
    pub text: String,
}

fn default_threads() -> u16 {
    std::thread::available_parallelism().map_or(1, |cores| u16::try_from(cores.get()).unwrap_or(u16::MAX))
}

/// Parses a mark: decimal, or hexadecimal with `0x`.
fn parse_mark(text: &str) -> Result<u32, String> {
    let mark = text.strip_prefix("0x").map_or_else(|| text.parse(), |digits| u32::from_str_radix(digits, 16));
    mark.map_err(|_| "expected a number from 0 to 4294967295, or from 0x0 to 0xffffffff".into())
}

/// Parses an address family. Returns true for IPv4.
fn parse_family(text: &str) -> Result<bool, String> {
    parse_choice(text, [("4", true), ("6", false)])
}

/// Parses a unicast address.
fn parse_host_ip(text: &str) -> Result<IpAddr, String> {
    let ip = text.parse().ok().filter(|ip: &IpAddr| is_unicast(ip.to_canonical()));
    ip.ok_or_else(|| "expected the IP address of a host".into())
}

/// Parses a comma-separated list of addresses and CIDR blocks. `None` is `unix`.
fn parse_balancers(text: &str) -> Result<Vec<Option<IpNet>>, String> {
    let expected = |word: &str| format!("expected an address, a CIDR such as 192.0.2.0/24, or unix, found {word:?}");
    let parse = |word| match word {
        "unix" => Ok(None),
        _ => parse_cidr(word, "--proxy-protocol-from")?.map(Some).ok_or_else(|| expected(word)),
    };
    text.split(',').map(parse).collect()
}

fn parse_log_format(text: &str) -> Result<bool, String> {
    parse_choice(text, [("logfmt", false), ("json", true)])
}

fn parse_filtering(text: &str) -> Result<Filtering, String> {
    let choices =
        [("address-dependent", Filtering::AddressDependent), ("endpoint-independent", Filtering::EndpointIndependent)];
    parse_choice(text, choices)
}

fn rule_option(option: &'static str, text: String) -> Result<RuleOption, String> {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    Ok(RuleOption { position: COUNT.fetch_add(1, Ordering::Relaxed), option, text })
}

fn parse_rule(text: &str) -> Result<RuleOption, String> {
    rule_option("--rule", text.into())
}

fn parse_allow(conditions: &str) -> Result<RuleOption, String> {
    rule_option("--allow", format!("allow {conditions}"))
}

fn parse_deny(conditions: &str) -> Result<RuleOption, String> {
    rule_option("--deny", format!("deny {conditions}"))
}
