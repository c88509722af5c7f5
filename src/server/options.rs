//! Settings of a server. A reload changes none of them but the passwords of the hops.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::listen::{ListenAddr, Listener};
use super::log_queue::AccessLog;
use super::run_as::RunAs;
use super::shares::lock;
use crate::client::{ClientOptions, Proxy};
use crate::gssapi::Acceptor;
use crate::net::{LocalAddr, OutboundOptions};
use crate::proto::PortRange;

/// Settings of a server.
#[derive(Debug)]
pub struct Options {
    /// Addresses to listen on.
    pub listen: Vec<ListenAddr>,
    /// Sockets to use instead of `listen`, if there are any.
    pub inherited: Vec<Listener>,
    /// Address of metrics and health checks.
    pub metrics: Option<ListenAddr>,
    /// Set to let other hosts read the metrics.
    pub allow_remote_metrics: bool,
    /// Command line of this process, for one that replaces it.
    pub command_line: Vec<String>,
    /// A variable in the environment of that process.
    pub successor_variable: Option<(&'static str, String)>,
    /// Time from accept to the end of the request.
    pub handshake_timeout: Duration,
    /// Time to resolve a name and to try all of its addresses.
    pub connect_timeout: Duration,
    /// Time that BIND waits for the expected peer.
    pub bind_timeout: Duration,
    /// Time without traffic after which a tunnel or a UDP association ends.
    pub idle_timeout: Duration,
    /// Time that sessions get to finish after SIGTERM or SIGINT.
    pub drain_timeout: Duration,
    /// Maximum number of concurrent sessions. `None`: as many as the descriptor limit allows.
    pub max_connections: Option<usize>,
    /// Threads that run sessions, at least 1.
    pub threads: u16,
    /// Addresses for BND of BIND instead of the one on the route to the peer, at most one per family.
    pub advertise_bind: Vec<IpAddr>,
    /// Addresses for BND of UDP ASSOCIATE instead of the one that the client connected to, at most one per family.
    pub advertise_udp: Vec<IpAddr>,
    /// Source addresses of connections and datagrams to targets and hops, and addresses of the listeners of BIND.
    pub outbound: LocalAddr,
    /// Further options of these sockets.
    pub outbound_options: OutboundOptions,
    /// Ports for BIND. `None`: chosen by the kernel.
    pub bind_ports: Option<PortRange>,
    /// Ports for UDP associations. All share a single port. `None`: chosen by the kernel.
    pub udp_ports: Option<PortRange>,
    /// Load balancers, whose connections begin with a header of the PROXY protocol. `None`: those on Unix sockets.
    pub proxy_protocol_from: Vec<Option<IpNet>>,
    /// Filter for datagrams to the client of a UDP association.
    pub udp_filtering: Filtering,
    /// Server side of GSSAPI logins.
    pub gssapi_acceptor: Option<Acceptor>,
    /// Login methods and Kerberos tickets for hops; passwords are part of each hop.
    pub hop_options: Arc<ClientOptions>,
    /// Upstreams that rules can select. [`Route::hop`](crate::policy::rules::Route::hop) is an index into this list.
    pub hops: Vec<Arc<Hop>>,
    /// Limits of one client address, one user and one session.
    pub quotas: Quotas,
    /// Set to serve clients from other hosts without a login or a client rule.
    pub allow_open_relay: bool,
    /// Set to keep sessions that a reloaded policy would refuse.
    pub keep_sessions: bool,
    /// User that the server becomes once it listens.
    pub run_as: Option<RunAs>,
    /// Set to restrict the process once it listens.
    pub sandbox: bool,
    /// File for the lines of ended sessions. `None`: stderr.
    pub access_log: Option<AccessLog>,
    /// Files of the command line that the server opens again.
    pub reload_files: Vec<PathBuf>,
}

impl Options {
    /// Returns whether connections of this client begin with a header. `client` is `None` on a Unix socket.
    pub(super) fn is_balancer(&self, client: Option<SocketAddr>) -> bool {
        let is_in = |net: &IpNet| client.is_some_and(|client| net.contains(&client.ip().to_canonical()));
        self.proxy_protocol_from.iter().any(|net| net.as_ref().map_or(client.is_none(), is_in))
    }

    pub(super) fn uses_kerberos(&self) -> bool {
        self.gssapi_acceptor.is_some() || self.uses_kerberos_tickets()
    }

    /// Returns true if the server may log in to hops with tickets.
    pub(super) fn uses_kerberos_tickets(&self) -> bool {
        !self.hops.is_empty() && self.hop_options.gssapi.is_some()
    }
}

/// Time after a failure of a chain in which the other chains of its hop are tried first.
const FAILED_CHAIN_PAUSE: Duration = Duration::from_secs(10);

/// Chains of proxies, nearest first. A chain is used if those before it do not work.
pub type Chains = Vec<Vec<Proxy>>;

/// An upstream: other SOCKS5 proxies, with a name.
#[derive(Debug)]
pub struct Hop {
    /// Name in rules and in the log.
    pub name: String,
    /// Set if a proxy gets user name and password of the client.
    pub forwards_login: bool,
    /// At least one, each with the time until which others are tried first. A reload changes only users and passwords.
    chains: Mutex<Vec<(Vec<Proxy>, Option<Instant>)>>,
}

impl Hop {
    /// `chains` has at least one chain, and each has at least one proxy.
    pub fn new(name: String, chains: Chains) -> Self {
        let forwards_login = chains.iter().flatten().any(|proxy| proxy.forwards_login);
        let hop = Self { name, forwards_login, chains: Mutex::default() };
        hop.set_chains(chains);
        hop
    }

    /// Replaces the chains of later sessions.
    pub(super) fn set_chains(&self, chains: Chains) {
        *lock(&self.chains) = chains.into_iter().map(|chain| (chain, None)).collect();
    }

    /// Returns the chains in the order of preference.
    pub fn chains(&self) -> Chains {
        lock(&self.chains).iter().map(|(chain, _)| chain.clone()).collect()
    }

    /// Returns the chains with their indexes, those that have failed lately at the end.
    pub(super) fn in_order(&self, now: Instant) -> Vec<(usize, Vec<Proxy>)> {
        let mut chains = lock(&self.chains);
        let mut order: Vec<_> = chains.iter().cloned().enumerate().collect();
        order.sort_by_key(|(_, (_, failed_until))| *failed_until > Some(now));
        // After the pause, one session tries it again before the others do.
        if let Some((_, until @ Some(_))) = order.first().and_then(|(index, _)| chains.get_mut(*index)) {
            *until = Some(now + FAILED_CHAIN_PAUSE);
        }
        order.into_iter().map(|(index, (chain, _))| (index, chain)).collect()
    }

    /// Records whether a chain works.
    pub(super) fn set_failed(&self, index: usize, is_failed: bool) {
        if let Some((_, until)) = lock(&self.chains).get_mut(index) {
            *until = is_failed.then(|| Instant::now() + FAILED_CHAIN_PAUSE);
        }
    }

    /// Returns the name in the log of a session that has used this chain.
    pub(super) fn log_name(&self, chain: &[Proxy]) -> String {
        let proxies = chain.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        if lock(&self.chains).len() > 1 { format!("{}={proxies}", self.name) } else { self.name.clone() }
    }
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

/// Limits of one client address, one user and one session. `None`: no limit.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quotas {
    /// Concurrent sessions of one client address (IPv6: one /64), at least 1. `None`: three quarters of all sessions.
    pub sessions_per_client: Option<usize>,
    /// Concurrent sessions of one user, at least 1.
    pub sessions_per_user: Option<usize>,
    /// Bytes per second of one session, both directions together, at least 1.
    pub session_rate: Option<u64>,
    /// Bytes per second of all sessions of one user, both directions together, at least 1.
    pub user_rate: Option<u64>,
}
