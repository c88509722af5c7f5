//! Settings of a server. A reload changes none of them but the passwords of the hops.

use std::net::SocketAddr;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::args::ServeArgs;
use super::listen::Listener;
use super::shares::lock;
use crate::client::{ClientOptions, Proxy};
use crate::gssapi::Acceptor;
use crate::net::LocalAddr;

/// Settings of a server: its command line, and what results from it.
#[derive(Debug)]
pub struct Options {
    /// The command line. `listen` is not empty, and `advertise_bind` and `advertise_udp` have the addresses of
    /// `advertise` too.
    pub args: ServeArgs,
    /// Sockets to use instead of `listen`, if there are any.
    pub inherited: Vec<Listener>,
    /// Command line of this process, for one that replaces it.
    pub command_line: Vec<String>,
    /// A variable in the environment of that process.
    pub successor_variable: Option<(&'static str, String)>,
    /// Source addresses of connections and datagrams to targets and hops, and addresses of the listeners of BIND.
    pub outbound: LocalAddr,
    /// Server side of GSSAPI logins.
    pub gssapi_acceptor: Option<Acceptor>,
    /// Login methods and Kerberos tickets for hops; passwords are part of each hop.
    pub hop_options: Arc<ClientOptions>,
    /// Upstreams that rules can select. [`Route::hop`](crate::policy::rules::Route::hop) is an index into this list.
    pub hops: Vec<Arc<Hop>>,
    /// Files of the command line that the server opens again.
    pub reload_files: Vec<PathBuf>,
}

impl Deref for Options {
    type Target = ServeArgs;

    fn deref(&self) -> &ServeArgs {
        &self.args
    }
}

impl Options {
    /// Returns whether connections of this client begin with a header. `client` is `None` on a Unix socket.
    pub(super) fn is_balancer(&self, client: Option<SocketAddr>) -> bool {
        let is_in = |net: &IpNet| client.is_some_and(|client| net.contains(&client.ip().to_canonical()));
        self.proxy_protocol_from.iter().flatten().any(|net| net.as_ref().map_or(client.is_none(), is_in))
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
pub(super) const FAILED_CHAIN_PAUSE: Duration = Duration::from_secs(10);

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

    /// Returns the number of sockets of an association: a connection to each proxy, and one for the datagrams.
    pub(super) fn association_sockets(&self) -> usize {
        lock(&self.chains).iter().map(|(chain, _)| chain.len() + 1).max().unwrap_or_default()
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

    /// Records whether a chain works. Returns whether it worked before.
    pub(super) fn set_failed(&self, index: usize, is_failed: bool) -> bool {
        let until = is_failed.then(|| Instant::now() + FAILED_CHAIN_PAUSE);
        lock(&self.chains).get_mut(index).is_some_and(|(_, old)| std::mem::replace(old, until).is_none())
    }

    /// Returns the name in the log of a session that has used this chain.
    pub(super) fn log_name(&self, chain: &[Proxy]) -> String {
        let proxies = chain.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        if lock(&self.chains).len() > 1 { format!("{}={proxies}", self.name) } else { self.name.clone() }
    }
}
