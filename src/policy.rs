//! The three questions that a server asks about a client: which method, who is this, where may they go.
//!
//! Pure: decisions only, no sockets and no clock. A policy is built whole and never changed; a session keeps the one
//! that it began with.

pub mod rules;
pub mod users;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use crate::proto::{Method, ProtectionLevel};
use rules::{AccessRequest, Decision, Identity, Rules};
use users::Users;

/// What is wrong with a file of rules or users, and where.
#[derive(Debug, PartialEq, Eq)]
pub struct PolicyError {
    /// From 1.
    pub line: usize,
    /// What is wrong, with the word that is.
    pub message: String,
}

impl fmt::Display for PolicyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.message)
    }
}

impl std::error::Error for PolicyError {}

/// What a server allows.
#[derive(Debug, Default)]
pub struct Policy {
    /// Who may log in by password.
    pub users: Option<Arc<Users>>,
    /// The methods that are taken, the preferred one first. None: passwords where there are users, else NO
    /// AUTHENTICATION.
    pub methods: Vec<Method>,
    /// Who may go where.
    pub rules: Rules,
    /// Where this server listens.
    pub listen_addrs: Vec<SocketAddr>,
    /// Addresses that lead to the ports of those from elsewhere, behind NAT.
    pub advertised_ips: Vec<IpAddr>,
}

impl Policy {
    /// The same, where the server is that of `old`.
    pub fn with_listeners_of(self, old: &Self) -> Self {
        Self { listen_addrs: old.listen_addrs.clone(), advertised_ips: old.advertised_ips.clone(), ..self }
    }

    /// Which of the offered methods is used (RFC 1928 section 3); none when none will do.
    pub fn select_method(&self, offered: &[Method]) -> Option<Method> {
        let default = [if self.users.is_some() { Method::PASSWORD } else { Method::NONE }];
        let methods = if self.methods.is_empty() { &default } else { self.methods.as_slice() };
        methods.iter().copied().find(|method| offered.contains(method))
    }

    /// Whether a session may be what it is, as far as is known; and because of which rule. `is_local` says whether an
    /// address is one of this machine's, and is asked only where it matters.
    pub fn evaluate(&self, request: &AccessRequest<'_>, is_local: impl Fn(SocketAddr) -> bool) -> Decision<'_> {
        self.rules.evaluate(request, &|addr| self.is_own_listener(addr, &is_local))
    }

    /// Whether whoever got in so would get in again.
    pub fn accepts_identity(&self, identity: &Identity<'_>) -> bool {
        let is_user = |users: &Arc<Users>| identity.user.is_some_and(|user| users.contains(user));
        let is_user_valid = identity.method != Method::PASSWORD || self.users.as_ref().is_some_and(is_user);
        self.select_method(&[identity.method]).is_some() && is_user_valid
    }

    /// Whether somebody whom no rule names gets in without a login.
    pub fn is_open_relay(&self) -> bool {
        let identity = Identity { method: Method::NONE, user: None, level: ProtectionLevel::None };
        let anonymous = AccessRequest { identity: Some(identity), ..AccessRequest::default() };
        self.select_method(&[Method::NONE]).is_some()
            && !matches!(self.evaluate(&anonymous, |_| false), Decision::Deny(_))
    }

    /// Whether a connection to `to` would come back to this server.
    pub fn is_own_listener(&self, addr: SocketAddr, is_local: impl Fn(SocketAddr) -> bool) -> bool {
        self.listen_addrs.iter().filter(|own| own.port() == addr.port()).any(|own| {
            let is_own = own.is_ipv4() == addr.is_ipv4()
                && (own.ip() == addr.ip() || own.ip().is_unspecified() && is_local(addr));
            is_own || self.advertised_ips.contains(&addr.ip())
        })
    }
}

/// Whether `ip` can be that of one host: neither multicast nor broadcast nor of the reserved class E.
pub fn is_unicast(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip < Ipv4Addr::new(224, 0, 0, 0),
        IpAddr::V6(ip) => !ip.is_multicast(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn with_users_nobody_gets_in_without_a_login() {
        let open = Policy::default();
        let closed = Policy { users: Some(Arc::default()), ..Policy::default() };
        let all = [Method::GSSAPI, Method::NONE, Method::PASSWORD];
        assert_eq!(open.select_method(&all), Some(Method::NONE));
        assert_eq!(closed.select_method(&all), Some(Method::PASSWORD));
        assert_eq!(closed.select_method(&[Method::NONE]), None);
        assert_eq!(open.select_method(&[Method::PASSWORD]), None);
    }

    #[test]
    fn the_own_listeners_are_out_of_reach_by_every_address_that_leads_there() {
        let policy = Policy { listen_addrs: vec![addr("127.0.0.1:1080"), addr("0.0.0.0:1081")], ..Policy::default() };
        let local = |to: SocketAddr| to.ip() == addr("192.0.2.1:0").ip();
        assert!(policy.is_own_listener(addr("127.0.0.1:1080"), local));
        assert!(!policy.is_own_listener(addr("127.0.0.2:1080"), local));
        assert!(!policy.is_own_listener(addr("127.0.0.1:1082"), local));
        assert!(policy.is_own_listener(addr("192.0.2.1:1081"), local));
        assert!(!policy.is_own_listener(addr("192.0.2.2:1081"), local));
        assert!(!policy.is_own_listener(addr("[::1]:1081"), local));
        let advertised_ips = vec![addr("198.51.100.1:0").ip()];
        let policy = Policy { advertised_ips, ..policy };
        assert!(policy.is_own_listener(addr("198.51.100.1:1080"), local));
        assert!(!policy.is_own_listener(addr("198.51.100.1:1082"), local));
    }
}
