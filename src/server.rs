//! The server: listens, limits, runs one session a connection, drains.
//!
//! What a session may do is the policy's to say; how octets become messages is `conn`'s and `proto`'s.

mod association;
mod batch;
mod bind;
mod connect;
mod connection_counts;
mod limiter;
mod listen;
mod login_throttle;
mod passwords;
mod policy_handle;
mod rate_limit;
mod session;
mod session_log;
mod tunnel;
mod worker;

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::ops::RangeInclusive;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use async_signal::{Signal, Signals};
use futures_lite::{FutureExt as _, StreamExt as _};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use smol::Timer;
use smol::channel::{self, Receiver, Sender};

use crate::client::{ClientAuth, Endpoint, Proxy};
use crate::dial::{Resolver, canonical, parse_literal, unspecified};
use crate::gssapi::Acceptor;
use crate::policy::Policy;
use crate::proto::{Addr, Host};
use crate::relay::RelayOptions;
use limiter::Limiter;
pub use limiter::Quotas;
pub use listen::ListenAddr;
use listen::Listener;
use policy_handle::PolicyHandle;
use worker::{Shutdown, Worker, WorkerPoolHandle};

/// Descriptors kept back for the listeners, the reactor, the log and the resolver; of few, a quarter.
const RESERVED_DESCRIPTORS: u64 = 64;
/// Descriptors that a session holds at the least: the client's and the target's.
const DESCRIPTORS_PER_SESSION: u64 = 2;
/// Pause after accept(2) failed for lack of descriptors or memory.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);
/// The most connections that the default allows, whatever the descriptor limit.
const MAX_DEFAULT_CONNECTIONS: u64 = 500_000;

/// What a server is told at its start.
#[derive(Debug)]
pub struct Options {
    /// Where to listen.
    pub listen: Vec<ListenAddr>,
    /// From accept to the end of the request.
    pub handshake_timeout: Duration,
    /// For resolution and all addresses together.
    pub connect_timeout: Duration,
    /// How long BIND waits for the expected peer.
    pub bind_timeout: Duration,
    /// How long a tunnel or an association may be silent.
    pub idle_timeout: Duration,
    /// How long sessions may go on once the server has been told to end.
    pub drain_timeout: Duration,
    /// Sessions at once; none: what the descriptor limit allows.
    pub max_connections: Option<usize>,
    /// Threads that run sessions, at least 1.
    pub threads: u16,
    /// What BND says in place of the address that the client connected to, at most one a family.
    pub advertise: Vec<IpAddr>,
    /// Where BIND listens; none: wherever the system likes.
    pub bind_ports: Option<PortRange>,
    /// Where associations are; none: wherever the system likes.
    pub udp_ports: Option<PortRange>,
    /// Whose datagrams reach the client of an association.
    pub udp_filtering: Filtering,
    /// Who this server is to clients that come with GSSAPI.
    pub gssapi_acceptor: Option<Acceptor>,
    /// What is offered to hops besides the credentials of each.
    pub hop_auth: Arc<ClientAuth>,
    /// The ways that rules may name, by number.
    pub hops: Vec<Arc<Hop>>,
    /// What one client or user may take up.
    pub quotas: Quotas,
    /// Whether everybody who can reach this server may use it.
    pub allow_open_relay: bool,
    /// Whether sessions that a new policy would refuse live on.
    pub keep_sessions: bool,
}

/// A way through other SOCKS5 servers.
#[derive(Debug)]
pub struct Hop {
    /// What rules and the log call it.
    pub name: String,
    /// Nearest first, at least one.
    pub proxies: Vec<Proxy>,
}

/// Which answers an association lets in (RFC 4787 section 5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Filtering {
    /// Those from addresses that the client has sent to.
    #[default]
    AddressDependent,
    /// Everybody's.
    EndpointIndependent,
}

/// A range of ports, `LO-HI`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortRange(RangeInclusive<u16>);

impl FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let port = |text: &str| text.parse().ok().filter(|port| *port != 0);
        text.split_once('-')
            .and_then(|(low, high)| Some(port(low)?..=port(high)?))
            .filter(|ports| !ports.is_empty())
            .map(Self)
            .ok_or_else(|| format!("{text:?} is not LO-HI with ports from 1 to 65535"))
    }
}

/// The ports to try in turn: all of a range from a random one on, or 0, the system's choice.
fn candidate_ports(ports: Option<&PortRange>) -> Vec<u16> {
    let Some(PortRange(range)) = ports else { return vec![0] };
    let mut ports: Vec<u16> = range.clone().collect();
    let start = getrandom::u32().ok().and_then(|random| usize::try_from(random).ok()).unwrap_or(0);
    let start = start.checked_rem(ports.len()).unwrap_or(0);
    ports.rotate_left(start);
    ports
}

/// Binds `local` with one of the ports that are not in use, or gives the error of the last one tried.
fn bind_in_range<T>(
    ports: Option<&PortRange>,
    mut local: SocketAddr,
    bind: impl Fn(SocketAddr) -> io::Result<T>,
) -> io::Result<T> {
    let mut result = Err(io::ErrorKind::AddrInUse.into());
    for port in candidate_ports(ports) {
        local.set_port(port);
        result = bind(local);
        if !result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse) {
            break;
        }
    }
    result
}

/// What all sessions share.
#[derive(Debug)]
struct Server {
    options: Options,
    policy: PolicyHandle,
    limiter: Limiter,
    resolver: Resolver,
    relay_options: RelayOptions,
}

impl Server {
    /// The address that BND gives for a socket at `local`: the one to advertise, where there is one of its family.
    fn advertised_addr(&self, local: SocketAddr) -> SocketAddr {
        let ip = self.options.advertise.iter().find(|ip| ip.is_ipv4() == local.is_ipv4());
        ip.map_or(local, |ip| SocketAddr::new(*ip, local.port()))
    }
}

/// Why the server did not start, or ended.
#[derive(Debug)]
pub enum StartError {
    /// Something that was tried, and the error.
    Io(String, io::Error),
    /// It would be open to everybody, and nobody has said that it should.
    Config(String),
}

impl StartError {
    fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        |error| Self::Io(what.into(), error)
    }
}

/// Makes a new policy out of what the files say now; or says what is wrong with them.
pub type LoadPolicy<'a> = dyn Fn() -> Result<Policy, String> + 'a;

/// Runs until SIGTERM or SIGINT, then drains; reloads at each SIGHUP. Blocks.
///
/// # Errors
/// What could not be listened on, or signals and threads that could not be had; or that nobody would be kept out.
pub fn run(options: Options, mut policy: Policy, load_policy: &LoadPolicy<'_>) -> Result<(), StartError> {
    let descriptors = raise_descriptor_limit();
    let by_descriptors = (descriptors - RESERVED_DESCRIPTORS.min(descriptors / 4)) / DESCRIPTORS_PER_SESSION;
    let limit = usize::try_from(by_descriptors.clamp(1, MAX_DEFAULT_CONNECTIONS)).unwrap_or(usize::MAX);
    let limit = options.max_connections.unwrap_or(limit);
    let mut listeners = Vec::new();
    for listen in &options.listen {
        listeners.extend(listen.bind().map_err(StartError::io(format!("listen on {listen}")))?);
    }
    policy.listen_addrs = listeners.iter().filter_map(Listener::addr).collect();
    policy.advertised_ips.clone_from(&options.advertise);
    if let Some(error) = check_open_relay(&policy, &options).or_else(|| check_proxy_loop(&policy, &options)) {
        return Err(StartError::Config(error));
    }
    let signals = Signals::new([Signal::Term, Signal::Int, Signal::Hup]).map_err(StartError::io("signals"))?;
    let addrs: Vec<String> = listeners.iter().map(ToString::to_string).collect();
    let (threads, drain) = (options.threads, options.drain_timeout);
    let relay_options =
        RelayOptions { idle_timeout: Some(options.idle_timeout), linger: None, stop_when_bulk: threads > 1 };
    let (policy, limiter) = (PolicyHandle::new(policy, options.keep_sessions), Limiter::new(options.quotas));
    let server = Server { options, policy, limiter, resolver: Resolver::default(), relay_options };
    let (accepting, stop_accepting) = channel::bounded::<Infallible>(1);
    let (running, stop_sessions) = channel::bounded::<Infallible>(1);
    let (alive, all_ended) = channel::bounded::<Infallible>(1);
    let (pool, workers) =
        Worker::create_pool(threads, server, listeners, limit, Shutdown { stop_accepting, stop_sessions, alive });
    let (report, reports) = channel::unbounded();
    let threads = start_workers(workers, &report, &reports).map_err(StartError::io("threads"))?;
    for addr in addrs {
        log::info!("listening on {addr}");
    }
    let reload = || reload(&pool, load_policy);
    let result = smol::block_on(run_until_signal(signals, accepting, drain, all_ended, reports, reload));
    drop((running, pool));
    for thread in threads {
        // A worker that panicked has said so; there is nothing to be done about it at the end.
        let _ = thread.join();
    }
    result.map_err(StartError::io("threads"))
}

/// Why a server would be an open relay, and how not to be one; `None` when it would not be, or is meant to be.
fn check_open_relay(policy: &Policy, options: &Options) -> Option<String> {
    let own = policy.listen_addrs.iter().find(|own| !own.ip().is_loopback())?;
    (policy.is_open_relay() && !options.allow_open_relay).then(|| {
        let who = if policy.rules.has_from_condition() { "whoever no rule keeps out" } else { "whoever reaches it" };
        format!(
            "{own} can be reached from other hosts, and {who} could use this server: let them log in (--users FILE), \
             say who may come (--allow from=CIDR, or a rule that does), or mean it (--open)"
        )
    })
}

/// Which hop leads back to this server, so that one request would take all that it has.
fn check_proxy_loop(policy: &Policy, options: &Options) -> Option<String> {
    let leads_here = |hop: &&Arc<Hop>| match hop.proxies.first().map(|proxy| &proxy.endpoint) {
        Some(Endpoint::Tcp(Addr { host: Host::Ip(ip), port })) => {
            policy.is_own_listener(canonical(*ip, *port), is_local)
        }
        Some(Endpoint::Tcp(Addr { host: Host::Name(name), port })) => {
            let loopback = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
            let ips = parse_literal(name).map_or(loopback.to_vec(), |ip| vec![ip]);
            let is_local_name = parse_literal(name).is_some() || name.as_str().eq_ignore_ascii_case("localhost");
            is_local_name && ips.iter().any(|ip| policy.is_own_listener(canonical(*ip, *port), is_local))
        }
        Some(Endpoint::Unix(_)) | None => false,
    };
    let hop = options.hops.iter().find(leads_here)?;
    let proxy = hop.proxies.first().map(ToString::to_string).unwrap_or_default();
    Some(format!("the hop {} is this server itself, {proxy}", hop.name))
}

/// Puts a new policy in force, unless there is something wrong with it.
async fn reload(pool: &WorkerPoolHandle, load_policy: &LoadPolicy<'_>) {
    let Some(pool) = pool.upgrade() else { return };
    let server = pool.server();
    let old = server.policy.current();
    let policy = load_policy().and_then(|policy| {
        let policy = policy.with_listeners_of(&old.policy);
        check_open_relay(&policy, &server.options).map_or(Ok(policy), Err)
    });
    match policy {
        Err(error) => log::error!("reload: {error}; what was in force stays in force"),
        Ok(policy) => {
            let users = policy.users.as_ref().map_or(0, |users| users.len());
            let rules = policy.rules.user_rules().len();
            server.policy.replace(policy);
            pool.recheck_all().await;
            let cut = server.policy.closed_sessions.load(Ordering::Relaxed);
            log::info!("reload: {users} users and {rules} rules are in force; sessions cut: {cut}");
        }
    }
}

/// What a thread says: `Ok` when it accepts, and the error with which it has ended.
type WorkerResult = io::Result<()>;

/// Starts the threads, and returns when all of them accept.
fn start_workers(
    workers: Vec<Worker>,
    report: &Sender<WorkerResult>,
    reports: &Receiver<WorkerResult>,
) -> io::Result<Vec<JoinHandle<()>>> {
    let mut threads = Vec::new();
    for worker in workers {
        let report = report.clone();
        let thread = std::thread::Builder::new().name("s5-worker".into());
        threads.push(thread.spawn(move || {
            let result = catch_unwind(AssertUnwindSafe(|| worker.run(&report)));
            if let Err(error) = result.unwrap_or_else(|_| Err(io::Error::other("one of them panicked"))) {
                let _ = report.try_send(Err(error));
            }
        })?);
    }
    threads.iter().try_for_each(|_| reports.recv_blocking().map_err(io::Error::other)?)?;
    Ok(threads)
}

/// Raises the soft limit to the hard one and gives what holds then.
fn raise_descriptor_limit() -> u64 {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    match setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        Ok(()) => maximum,
        Err(_) => current,
    }
    .unwrap_or(u64::MAX)
}

/// Reloads when told to, waits for the signal to end, and then for the sessions, as long as they may take. A thread that
/// ends before that is the end as well, and its error: a server that goes on with a part of itself would fool those who
/// watch it.
async fn run_until_signal(
    mut signals: Signals,
    accepting: Sender<Infallible>,
    drain: Duration,
    all_ended: Receiver<Infallible>,
    reports: Receiver<WorkerResult>,
    reload: impl AsyncFn(),
) -> io::Result<()> {
    let signal = async {
        while let Some(Ok(Signal::Hup)) = signals.next().await {
            reload().await;
        }
        WorkerResult::Ok(())
    };
    let failed = async {
        while let Ok(result) = reports.recv().await {
            result?;
        }
        std::future::pending().await
    };
    signal.or(failed).await?;
    drop(accepting);
    log::info!("ending: no new connections, {} s for the open ones", drain.as_secs());
    let drained = async {
        let _ = all_ended.recv().await;
    };
    let timeout = async {
        Timer::after(drain).await;
        log::info!("ending: the open connections are cut");
    };
    let again = async {
        while let Some(Ok(Signal::Hup)) = signals.next().await {}
        log::info!("ending: at once");
    };
    drained.or(timeout).or(again).await;
    Ok(())
}

/// The address of this machine at which `peer` (unspecified: anybody) of its own family can reach a session whose
/// client connected to `control`.
fn reachable_addr(control: Option<SocketAddr>, peer: IpAddr) -> io::Result<SocketAddr> {
    let loopback = if peer.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
    let mut control = control.unwrap_or(SocketAddr::new(loopback, 0));
    control.set_port(0);
    let is_loopback = control.ip().is_loopback();
    let can_reach = peer.is_unspecified() || peer.is_loopback() == is_loopback;
    if control.is_ipv4() == peer.is_ipv4() && can_reach {
        return Ok(control);
    }
    let target = match peer {
        _ if peer.is_unspecified() && is_loopback => loopback,
        // Documentation addresses (RFC 5737, RFC 3849): the way out of here, whoever is meant by "anybody".
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::new(192, 0, 2, 1).into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(),
        peer => peer,
    };
    // Connecting a UDP socket sends nothing, and tells which address the system would send from.
    let probe = UdpSocket::bind((unspecified(peer), 0))?;
    probe.connect((target, 9))?;
    let mut local = probe.local_addr()?;
    local.set_port(0);
    Ok(local)
}

/// Whether an address may be one of this machine's: only such a one can be bound, and of others the system says that
/// they are not. When it says that it has no port or descriptor left, it has not said so.
pub fn is_local(mut addr: SocketAddr) -> bool {
    use rustix::io::Errno;
    addr.set_port(0);
    let refused = UdpSocket::bind(addr).err().and_then(|error| error.raw_os_error()).map(Errno::from_raw_os_error);
    !matches!(refused, Some(Errno::ADDRNOTAVAIL | Errno::INVAL | Errno::AFNOSUPPORT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_of_ports_is_tried_whole_from_anywhere() {
        let range = "5000-5003".parse().expect("a range");
        let mut ports = candidate_ports(Some(&range));
        ports.sort_unstable();
        assert_eq!(ports, [5000, 5001, 5002, 5003]);
        assert_eq!(candidate_ports(None), [0]);
        for bad in ["", "1", "2-1", "0-5", "1-65536", "a-b", "1-2-3"] {
            assert!(bad.parse::<PortRange>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_address_for_a_peer_is_the_one_the_client_uses_where_the_peer_can_too() {
        let control = |text: &str| Some(text.parse().expect("an address"));
        let ask = |control, peer: &str| {
            reachable_addr(control, peer.parse().expect("an address")).map(|addr| addr.ip().to_string()).ok()
        };
        assert_eq!(ask(control("127.0.0.2:1080"), "127.0.0.1").as_deref(), Some("127.0.0.2"));
        assert_eq!(ask(control("127.0.0.2:1080"), "0.0.0.0").as_deref(), Some("127.0.0.2"));
        assert_eq!(ask(control("[::1]:1080"), "0.0.0.0").as_deref(), Some("127.0.0.1"));
        assert_eq!(ask(None, "0.0.0.0").as_deref(), Some("127.0.0.1"));
        assert_eq!(ask(None, "::").as_deref(), Some("::1"));
        assert_eq!(ask(control("192.0.2.7:1080"), "0.0.0.0").as_deref(), Some("192.0.2.7"));
        assert_eq!(ask(control("192.0.2.7:1080"), "127.0.0.1").as_deref(), Some("127.0.0.1"));
    }
}
