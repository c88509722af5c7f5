//! Access control: authentication methods, users, and rules about which client may reach which target.
//!
//! Pure: no sockets, no clock, no files. A policy is immutable; a reload replaces it.

#![deny(clippy::disallowed_types, clippy::disallowed_methods)]

mod index;
pub mod rules;
pub mod users;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use thiserror::Error;

use crate::proto::{Command, Method, ProtectionLevel};
use rules::{AccessRequest, Decision, Identity, Route, Rule, Rules, UserPattern};
use users::Users;

/// An error in a rules file or users file.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("line {line}: {message}")]
pub struct PolicyError {
    /// Line number, from 1.
    pub line: usize,
    /// What is wrong, with the word that is wrong.
    pub message: String,
}

/// Methods, users, rules and listeners of a server, which together decide every request.
#[derive(Debug, Default)]
pub struct Policy {
    /// Users that can log in with a password. `None`: password logins are refused.
    pub users: Option<Arc<Users>>,
    /// Accepted methods, the preferred one first. Empty: `PASSWORD` with users, `NONE` without.
    pub methods: Vec<Method>,
    /// Rules about clients and targets.
    pub rules: Rules,
    /// Addresses that this server listens on.
    pub listen_addrs: Vec<SocketAddr>,
    /// Addresses of the metrics of this server, which clients cannot reach through it either.
    pub metrics_addrs: Vec<SocketAddr>,
    /// Addresses of a NAT gateway that forwards the ports of `listen_addrs` to this server.
    pub advertised_ips: Vec<IpAddr>,
}

impl Policy {
    /// Returns this policy with the listen addresses of `old`, which a reload does not change.
    pub fn with_listeners_of(self, old: &Self) -> Self {
        let (listen_addrs, metrics_addrs) = (old.listen_addrs.clone(), old.metrics_addrs.clone());
        Self { listen_addrs, metrics_addrs, advertised_ips: old.advertised_ips.clone(), ..self }
    }

    /// Selects the method for a client (RFC 1928 section 3). `None`: no offered method is accepted.
    pub fn select_method(&self, offered: &[Method]) -> Option<Method> {
        let default = [if self.users.is_some() { Method::PASSWORD } else { Method::NONE }];
        let methods = if self.methods.is_empty() { &default } else { self.methods.as_slice() };
        methods.iter().copied().find(|method| offered.contains(method))
    }

    /// Decides a request from the facts known so far. `is_local` returns whether an address belongs to this host. It is
    /// called only for the port of a listener on an unspecified address (0.0.0.0 or `::`).
    pub fn evaluate(&self, request: &AccessRequest<'_>, is_local: impl Fn(SocketAddr) -> bool) -> Decision<'_> {
        self.rules.evaluate(request, &|addr| self.is_own_listener(addr, &is_local))
    }

    /// Returns whether this identity can still log in: its method is accepted, and its user exists.
    pub fn accepts_identity(&self, identity: &Identity<'_>) -> bool {
        let has_user = |users: &Arc<Users>| identity.user.is_some_and(|user| users.contains(user));
        let is_user_valid = identity.method != Method::PASSWORD || self.users.as_ref().is_some_and(has_user);
        self.select_method(&[identity.method]).is_some() && is_user_valid
    }

    /// Returns the entries of `user=` that match no possible login, each with its rule.
    pub fn unmatched_users(&self) -> impl Iterator<Item = (&Rule, &UserPattern)> {
        let accepts_gssapi = self.select_method(&[Method::GSSAPI]).is_some();
        let is_unmatched = move |user: &UserPattern| match user {
            UserPattern::Named(name) if accepts_gssapi && name.contains(&b'@') => false,
            UserPattern::Named(name) => !self.users.as_ref().is_some_and(|users| users.contains(name)),
            UserPattern::Any | UserPattern::Realm(_) if accepts_gssapi => false,
            pattern => !self.users.iter().flat_map(|users| users.names()).any(|name| pattern.matches(name)),
        };
        let entries = self.rules.first_user_rules().flat_map(|rule| rule.users().iter().map(move |user| (rule, user)));
        entries.filter(move |(_, user)| is_unmatched(user))
    }

    /// Returns whether a client that matches no `from=` condition can use the server without a login.
    pub fn is_open_relay(&self) -> bool {
        let identity = Some(Identity { method: Method::NONE, user: None, level: ProtectionLevel::None });
        let decision = self.rules.evaluate(&AccessRequest { identity, ..AccessRequest::default() }, &|_| false);
        self.select_method(&[Method::NONE]).is_some() && !matches!(decision, Decision::Deny(_))
    }

    /// Returns whether a connection to `addr` would reach a listener of this server.
    pub fn is_own_listener(&self, addr: SocketAddr, is_local: impl Fn(SocketAddr) -> bool) -> bool {
        let all = self.listen_addrs.iter().chain(&self.metrics_addrs);
        all.filter(|listener| listener.port() == addr.port()).any(|listener| {
            let is_reached = listener.is_ipv4() == addr.is_ipv4()
                && (listener.ip() == addr.ip() || listener.ip().is_unspecified() && is_local(addr));
            is_reached || self.advertised_ips.contains(&addr.ip())
        })
    }
}

/// Returns whether a request that `rule` allows can reach its target by this route. A target that is not known can.
pub fn is_reachable(request: &AccessRequest<'_>, rule: &Rule, route: Route) -> bool {
    let (has_port, is_unicast) = (request.target_port != Some(0), request.target_ip.is_none_or(is_unicast));
    match request.command {
        Some(Command::Connect) => route.hop.is_some() || has_port && is_unicast,
        // Multicast and broadcast are possible if a rule names them.
        Some(Command::UdpAssociate) => has_port && (is_unicast || rule.has_to_condition()),
        Some(Command::Bind) | None => true,
    }
}

/// Returns whether `ip` is outside multicast, broadcast and class E (240.0.0.0/4), and so can belong to a single host.
pub fn is_unicast(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip < Ipv4Addr::new(224, 0, 0, 0),
        IpAddr::V6(ip) => !ip.is_multicast(),
    }
}
