//! What precedes the first thread of a server: its listeners, the checks of its configuration, and the sandbox.

use std::fmt::Display;
use std::io;
use std::mem::take;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use rustix::io::Errno;

use super::args::ServeArgs;
use super::inherited::{from_predecessor, is_successor};
use super::listen::{ListenAddr, Listener};
use super::local_addr::is_local;
use super::options::Options;
use super::output_file::check_append;
use super::sandbox;
use crate::client::{Endpoint, Proxy};
use crate::net::{OutboundOptions, bind_outbound, canonical, parse_literal};
use crate::policy::{Policy, is_unicast};
use crate::proto::Host;

/// An error that prevents the start of the server, or ends it.
#[derive(Debug)]
pub enum ServerError {
    /// A failed operation, and its error.
    Io(String, io::Error),
    /// The access log cannot be written.
    AccessLog(PathBuf, io::Error),
    /// A refused configuration: an open relay or a proxy loop.
    Config(String),
}

impl ServerError {
    pub(super) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        |error| Self::Io(what.into(), error)
    }
}

/// Checks what [`run`](super::run) checks, and enters the same sandbox, but opens no port.
pub fn check(mut options: Options, mut policy: Policy) -> Result<(), ServerError> {
    let inherited = take(&mut options.inherited);
    let mut addrs: Vec<SocketAddr> = inherited.iter().flat_map(Listener::addrs).collect();
    let listens = if inherited.is_empty() { options.listen.as_slice() } else { &[] };
    for (i, listen) in listens.iter().enumerate() {
        addrs.extend(check_listen(listen, "--listen", listens.iter().take(i), &addrs)?);
    }
    if let Some(listen) = &options.metrics {
        policy.metrics_addrs = check_listen(listen, "--metrics", listens.iter(), &addrs)?;
    }
    prepare(&mut policy, &options, addrs)?();
    let Some(path) = &options.access_log else { return Ok(()) };
    check_append(path).map_err(|error| ServerError::AccessLog(path.clone(), error))
}

/// Sets the addresses that a server with these options would have, without opening a port.
pub fn set_server_addrs(policy: &mut Policy, options: &Options) {
    let resolve = |listen: &ListenAddr| listen.resolve().unwrap_or_default();
    policy.metrics_addrs = options.metrics.iter().flat_map(resolve).collect();
    policy.listen_addrs = options.inherited.iter().flat_map(Listener::addrs).collect();
    if options.inherited.is_empty() {
        policy.listen_addrs = options.listen.iter().flat_map(resolve).collect();
    }
    policy.advertised_ips = advertised_ips(options);
}

fn advertised_ips(options: &Options) -> Vec<IpAddr> {
    [options.advertise_bind.as_slice(), &options.advertise_udp].concat()
}

/// Checks the configuration of a server with these addresses, and enters the sandbox. Returns a function that logs what is
/// in force there.
pub(super) fn prepare(
    policy: &mut Policy,
    options: &Options,
    addrs: Vec<SocketAddr>,
) -> Result<impl FnOnce() + use<>, ServerError> {
    policy.listen_addrs = addrs;
    policy.advertised_ips = advertised_ips(options);
    let error = check_open_relay(policy, options).or_else(|| check_proxy_loop(policy, options));
    let error = error.or_else(|| check_metrics(policy, options));
    warn_of_balancers(options);
    let ServeArgs { outbound_interface, mark, prefer, .. } = &options.args;
    OutboundOptions { interface: outbound_interface.clone(), mark: *mark, prefers_ipv4: *prefer }.set_for_process();
    let capabilities = sandbox::outbound_capabilities(options).map_err(ServerError::Config)?;
    let error = error.or_else(|| sandbox::check_ports(options)).or_else(|| check_outbound(policy, options));
    if let Some(error) = error {
        return Err(ServerError::Config(error));
    }
    let has_hop_passwords =
        options.hops.iter().flat_map(|hop| hop.chains()).flatten().any(|proxy| proxy.credentials.is_some());
    // Before the first thread.
    sandbox::enter(options, capabilities, policy.users.is_some() || has_hop_passwords)
        .map_err(ServerError::io("switch to the user of --run-as"))
}

/// Opens the sockets of the options.
pub(super) fn open_listeners(options: &mut Options) -> Result<Vec<Listener>, ServerError> {
    match take(&mut options.inherited) {
        inherited if inherited.is_empty() => bind_all(&options.listen, "--listen"),
        inherited => Ok(inherited),
    }
}

/// Binds the addresses of an option.
fn bind_all<'a>(addrs: impl IntoIterator<Item = &'a ListenAddr>, option: &str) -> Result<Vec<Listener>, ServerError> {
    let bind = |listen: &ListenAddr| listen.bind().map_err(|(addr, error)| listen_error(addr, error, option));
    let listeners: Result<Vec<_>, _> = addrs.into_iter().map(bind).collect();
    Ok(listeners?.into_iter().flatten().collect())
}

fn listen_error(addr: impl Display, error: io::Error, option: &str) -> ServerError {
    let with_remedy = io::Error::other(format!("{error} (choose another address with {option})"));
    ServerError::Io(format!("listen on {addr}"), with_remedy)
}

/// Returns the addresses that a start would bind. Fails as bind(2) would, also if address and port conflict with one of
/// `others`, or if the path of a Unix socket is one of `before`.
fn check_listen<'a>(
    listen: &ListenAddr,
    option: &str,
    mut before: impl Iterator<Item = &'a ListenAddr>,
    others: &[SocketAddr],
) -> Result<Vec<SocketAddr>, ServerError> {
    let mut addrs = listen.resolve().map_err(|error| listen_error(listen, error, option))?;
    let is_used = |addr: &&SocketAddr| {
        let is_any = |other: &SocketAddr| addr.ip().is_unspecified() || other.ip().is_unspecified();
        let is_same = |other: &SocketAddr| addr.is_ipv4() == other.is_ipv4() && addr.port() == other.port();
        addr.port() != 0 && others.iter().any(|other| *addr == other || is_same(other) && is_any(other))
    };
    let is_repeated = matches!(listen, ListenAddr::Unix(_)) && before.any(|other| other == listen);
    let used = addrs.iter().find(is_used).map(ToString::to_string).or(is_repeated.then(|| listen.to_string()));
    let checked = used.map_or_else(|| listen.check(&mut addrs), |addr| Err((addr, Errno::ADDRINUSE.into())));
    checked.map(|()| addrs).map_err(|(addr, error)| listen_error(addr, error, option))
}

/// Opens the sockets for metrics.
pub(super) fn open_metrics(options: &Options) -> Result<Vec<Listener>, ServerError> {
    if !is_successor() {
        return bind_all(&options.metrics, "--metrics");
    }
    from_predecessor(true).map_err(ServerError::Config)
}

/// Returns the wildcard addresses of IPv6 whose port does not accept IPv4: other programs accept both there.
pub(super) fn ipv6_only(addrs: &[SocketAddr]) -> impl Iterator<Item = &SocketAddr> {
    let has_ipv4 = |port| addrs.contains(&SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port));
    addrs.iter().filter(move |addr| addr.ip() == Ipv6Addr::UNSPECIFIED && !has_ipv4(addr.port()))
}

/// Returns an error with remedies if the server would be an open relay, unless the options allow that.
pub(super) fn check_open_relay(policy: &Policy, options: &Options) -> Option<String> {
    let remote = policy.listen_addrs.iter().find(|addr| !addr.ip().is_loopback());
    let behind_balancer =
        || options.proxy_protocol_from.as_ref().map(|_| "serve the clients of --proxy-protocol-from".to_owned());
    let what = remote.map(|addr| format!("listen on {addr}")).or_else(behind_balancer)?;
    (policy.is_open_relay() && !options.allow_open_relay).then(|| {
        let clients = if policy.rules.has_from_condition() { " for clients that match no from= rule" } else { "" };
        format!(
            "refusing to {what} without access control{clients}: \
             use --users FILE, or --allow from=CIDR, or --allow-open-relay to run an open relay"
        )
    })
}

/// Returns an error if a source address of the options or rules is not an address of this host. bind(2) of UDP also
/// accepts groups, broadcast, and IPv4 in the form of IPv6, from which no connection is possible.
pub(super) fn check_outbound(policy: &Policy, options: &Options) -> Option<String> {
    let ips = options.outbound.ips.into_iter().flatten().filter(|ip| !ip.is_unspecified());
    let of_rules = policy.rules.first_user_rules().flat_map(|rule| rule.outbound().map(move |ip| (Some(rule), ip)));
    ips.map(|ip| (None, ip)).chain(of_rules).find_map(|(rule, ip)| {
        let is_link_local = matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
        let problem = match bind_outbound(SocketAddr::new(ip, 0)) {
            _ if !is_unicast(ip) || ip.to_canonical() != ip || is_link_local => {
                "not a global, private or loopback address".into()
            }
            bound => bound.err()?.to_string(),
        };
        let name = rule.map_or("--outbound ".into(), |rule| format!("{}: outbound=", rule.origin()));
        Some(format!("{name}{ip}: {problem} (choose an address of this host)"))
    })
}

/// Returns an error with remedies if other hosts can reach the metrics, unless the options allow that.
fn check_metrics(policy: &Policy, options: &Options) -> Option<String> {
    let addr = policy.metrics_addrs.iter().find(|addr| !addr.ip().is_loopback() && !options.allow_remote_metrics)?;
    Some(format!(
        "refusing to serve metrics on {addr}, where other hosts can read them: \
         use a loopback address or unix:/PATH, or --allow-remote-metrics"
    ))
}

/// Logs a warning for each balancer that stands for all clients.
fn warn_of_balancers(options: &Options) {
    for net in options.proxy_protocol_from.iter().flatten().flatten().filter(|net| net.prefix_len() == 0) {
        log::warn!("--proxy-protocol-from {net}: each client can choose its address (name only the load balancers)");
    }
}

/// Returns an error if the first proxy of a hop is this server: one request would use up all of its sessions.
fn check_proxy_loop(policy: &Policy, options: &Options) -> Option<String> {
    let is_this_server = |proxy: &Proxy| {
        let Endpoint::Tcp(addr) = &proxy.endpoint else { return false };
        let ips = match &addr.host {
            Host::Ip(ip) => vec![*ip],
            Host::Name(name) if name.as_str().eq_ignore_ascii_case("localhost") => {
                vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]
            }
            Host::Name(name) => parse_literal(name.as_str()).into_iter().collect(),
        };
        ips.into_iter().any(|ip| policy.is_own_listener(canonical(ip, addr.port), is_local))
    };
    let chains = options.hops.iter().flat_map(|hop| hop.chains().into_iter().map(move |chain| (hop, chain)));
    let mut first = chains.filter_map(|(hop, chain)| Some((hop, chain.into_iter().next()?)));
    let (hop, proxy) = first.find(|(_, proxy)| is_this_server(proxy))?;
    Some(format!("hop {}: proxy {proxy} is this server itself (choose another)", hop.name))
}
