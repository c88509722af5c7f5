//! Rules: which client may reach which target, and by which route. The first match decides; built-in rules are last.
//!
//! Pure: resolves no name and opens no file. A request can be evaluated before all facts are known. The decision is
//! final as soon as no unknown fact can change it.

mod parse;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;

use ipnet::IpNet;

use crate::proto::{Command, HostName, Method, ProtectionLevel};
pub use parse::{decode_user, normalize_name, parse_rule, parse_rules};

/// Targets that a remote client reaches only if an `allow to=` rule names them: this host, link-local addresses,
/// unspecified addresses, multicast and broadcast. Cloud metadata services have link-local addresses.
const PROTECTED_TARGETS: &str = ".localhost,0.0.0.0/8,127.0.0.0/8,169.254.0.0/16,224.0.0.0/4,255.255.255.255,\
                         ::,::1,fd00:ec2::254,fe80::/10,ff00::/8";

/// The facts about a session that rules are evaluated against. `None` means "not known yet".
#[derive(Clone, Copy, Debug, Default)]
pub struct AccessRequest<'a> {
    /// Client address, canonical. Unlike an unknown fact, `None` matches no `from=` condition.
    pub client_ip: Option<IpAddr>,
    /// Result of the login.
    pub identity: Option<Identity<'a>>,
    /// Requested command.
    pub command: Option<Command>,
    /// Domain name in DST. `None` if DST is an address.
    pub target_name: Option<&'a HostName>,
    /// Address that packets would be sent to, canonical.
    pub target_ip: Option<IpAddr>,
    /// Port of the target; with BIND, of the peer.
    pub target_port: Option<u16>,
}

/// How a client has authenticated.
#[derive(Clone, Copy, Debug)]
pub struct Identity<'a> {
    /// Authentication method.
    pub method: Method,
    /// User name or Kerberos principal. `None` with [`Method::NONE`].
    pub user: Option<&'a [u8]>,
    /// Protection level of the session (RFC 1961 section 4).
    pub level: ProtectionLevel,
}

/// Result of evaluating a request.
#[derive(Clone, Copy, Debug)]
pub enum Decision<'a> {
    /// Allowed by this rule, with this route.
    Allow(&'a Rule, Route),
    /// Denied by this rule.
    Deny(&'a Rule),
    /// Depends on facts that are not known yet; this is the first rule that needs them.
    Undecided(&'a Rule),
}

/// How a target is reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Route {
    /// By connecting from this host.
    #[default]
    Direct,
    /// Through the hop (upstream proxy or chain of proxies) with this index.
    Hop(usize),
}

/// One rule. An empty list stands for no condition.
#[derive(Debug, Default)]
pub struct Rule {
    allow: bool,
    from: Vec<ClientPattern>,
    users: Vec<UserPattern>,
    methods: Vec<Method>,
    levels: Vec<ProtectionLevel>,
    commands: Vec<Command>,
    to: TargetCondition,
    ports: Vec<RangeInclusive<u16>>,
    via: Option<Route>,
    /// Text of the rule, with single spaces and without comment.
    text: String,
    /// File and line, option, or "built in".
    origin: String,
}

#[derive(Debug)]
enum ClientPattern {
    Loopback,
    Remote,
    Net(IpNet),
}

/// An entry of `user=`.
#[derive(Debug)]
pub enum UserPattern {
    /// `*`: any user that has logged in.
    Any,
    /// A user name or Kerberos principal.
    Named(Vec<u8>),
    /// `*@REALM`, with the `@`.
    Realm(Vec<u8>),
}

#[derive(Debug, Default)]
enum TargetCondition {
    #[default]
    Any,
    /// `allow` without `to=`: every target that the built-in rules do not deny to this client.
    Unprotected,
    Patterns(Vec<TargetPattern>),
    /// The listeners of this server.
    OwnListeners,
}

#[derive(Debug)]
enum TargetPattern {
    Name(String),
    /// `.SUFFIX`, without the dot: the name and its subdomains.
    Suffix(String),
    Net(IpNet),
}

/// Result of matching a condition. `Maybe`: depends on an unknown fact. By their order, `min` is "and", `max` is "or".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Match {
    No,
    Maybe,
    Yes,
}

impl From<bool> for Match {
    fn from(matches: bool) -> Self {
        if matches { Self::Yes } else { Self::No }
    }
}

/// All rules of a server, in the order of evaluation.
#[derive(Debug)]
pub struct Rules {
    rules: Vec<Rule>,
    /// Number of user rules, which come first in `rules`; the others are built in.
    user_rule_count: usize,
    /// Applies if no rule matches.
    default_rule: Rule,
    /// Route of rules without `via=`.
    default_route: Route,
}

impl Default for Rules {
    fn default() -> Self {
        Self::new(Vec::new(), Route::Direct)
    }
}

impl Rules {
    /// Appends the built-in rules to the user rules. If an `allow` has `from=`, the default is to deny.
    pub fn new(mut rules: Vec<Rule>, default_route: Route) -> Self {
        let user_rule_count = rules.len();
        let has_client_allowlist = rules.iter().any(|rule| rule.allow && !rule.from.is_empty());
        // `Unprotected` excludes the targets of the built-in `deny` rules, so it can precede them. Before them, it can
        // allow a name whose address only a hop will know.
        if !has_client_allowlist {
            rules.push(Rule { to: TargetCondition::Unprotected, ..Rule::unconditional(true, "allow") });
        }
        let text = "deny to=(listeners of this server)";
        rules.push(Rule { to: TargetCondition::OwnListeners, ..Rule::unconditional(false, text) });
        let (from, text) = (vec![ClientPattern::Remote], format!("deny from=remote to={PROTECTED_TARGETS}"));
        let patterns = PROTECTED_TARGETS.split(',').filter_map(|target| parse::parse_target(target).ok()).collect();
        rules.push(Rule { from, to: TargetCondition::Patterns(patterns), ..Rule::unconditional(false, &text) });
        let origin = if has_client_allowlist { "built in, because an allow rule has from=" } else { "built in" };
        let default_rule = Rule { origin: origin.into(), ..Rule::unconditional(false, "deny") };
        Self { rules, user_rule_count, default_rule, default_route }
    }

    /// Returns the rules of files and options, without the built-in rules.
    pub fn user_rules(&self) -> &[Rule] {
        self.rules.get(..self.user_rule_count).unwrap_or_default()
    }

    /// Returns whether a user rule has a `from=` condition.
    pub fn has_from_condition(&self) -> bool {
        self.user_rules().iter().any(|rule| !rule.from.is_empty())
    }

    /// Returns all rules in the order for display: the built-in `deny` rules before the built-in `allow`.
    pub fn in_display_order(&self) -> impl Iterator<Item = &Rule> {
        let (user_rules, built_in) = self.rules.split_at_checked(self.user_rule_count).unwrap_or_default();
        let built_in_with = |allow: bool| built_in.iter().filter(move |rule| rule.allow == allow);
        user_rules.iter().chain(built_in_with(false)).chain(built_in_with(true)).chain([&self.default_rule])
    }

    /// Decides a request by the first rule that matches. `is_own_listener` detects the listeners of this server.
    pub fn evaluate(&self, request: &AccessRequest<'_>, is_own_listener: &dyn Fn(SocketAddr) -> bool) -> Decision<'_> {
        let mut first_maybe = None;
        for rule in &self.rules {
            match (self.matches(rule, request, is_own_listener), rule.allow) {
                (Match::No, _) => {}
                (Match::Maybe, true) => return Decision::Undecided(first_maybe.unwrap_or(rule)),
                (Match::Maybe, false) => first_maybe = first_maybe.or(Some(rule)),
                // Earlier rules that may match are `deny` rules too, so the decision is final.
                (Match::Yes, false) => return Decision::Deny(rule),
                (Match::Yes, true) => {
                    return first_maybe.map_or(Decision::Allow(rule, self.route(rule)), Decision::Undecided);
                }
            }
        }
        Decision::Deny(&self.default_rule)
    }

    /// Returns every route that an `allow` may still select for this request, without duplicates.
    pub fn possible_routes(&self, request: &AccessRequest<'_>) -> Vec<Route> {
        let mut routes = Vec::new();
        for rule in self.rules.iter().filter(|rule| rule.allow) {
            let route = self.route(rule);
            if self.matches(rule, request, &|_| false) > Match::No && !routes.contains(&route) {
                routes.push(route);
            }
        }
        routes
    }

    fn route(&self, rule: &Rule) -> Route {
        rule.via.unwrap_or(self.default_route)
    }

    fn matches(&self, rule: &Rule, request: &AccessRequest<'_>, is_own_listener: &dyn Fn(SocketAddr) -> bool) -> Match {
        let other_conditions = rule.match_all_except_to(request);
        if other_conditions == Match::No {
            return Match::No;
        }
        let to = match &rule.to {
            TargetCondition::Any => Match::Yes,
            TargetCondition::Patterns(patterns) => match_any(patterns, |pattern| pattern.matches(rule.allow, request)),
            TargetCondition::OwnListeners => match (request.target_ip, request.target_port) {
                (Some(ip), Some(port)) => embedded_addrs(ip).any(|ip| is_own_listener((ip, port).into())).into(),
                _ => Match::Maybe,
            },
            TargetCondition::Unprotected => {
                let has_only_name = request.target_name.is_some() && request.target_ip.is_none();
                let built_in = self.rules.iter().skip(self.user_rule_count).filter(|rule| !rule.allow);
                match built_in.map(|rule| self.matches(rule, request, is_own_listener)).max() {
                    Some(Match::Yes) => Match::No,
                    // The hop resolves the name and applies its own rules to the address.
                    Some(Match::Maybe) if has_only_name && self.route(rule) != Route::Direct => Match::Yes,
                    Some(Match::Maybe) => Match::Maybe,
                    Some(Match::No) | None => Match::Yes,
                }
            }
        };
        other_conditions.min(to)
    }
}

/// Matches a fact; `Maybe` if it is unknown.
fn match_fact<T>(fact: Option<T>, matches: impl Fn(T) -> bool) -> Match {
    fact.map_or(Match::Maybe, |fact| matches(fact).into())
}

/// Matches a list of which one entry must match; an empty list always matches.
fn match_any<T>(list: &[T], match_one: impl Fn(&T) -> Match) -> Match {
    if list.is_empty() { Match::Yes } else { list.iter().map(match_one).max().unwrap_or(Match::No) }
}

impl Rule {
    /// Returns a built-in rule without conditions.
    fn unconditional(allow: bool, text: &str) -> Self {
        Self { allow, text: text.into(), origin: "built in".into(), ..Self::default() }
    }

    /// Returns the source of the rule: a file and line, an option, or "built in".
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// Returns whether this is the built-in rule that denies the listeners of this server.
    pub fn denies_own_listeners(&self) -> bool {
        matches!(self.to, TargetCondition::OwnListeners)
    }

    /// Returns whether the rule has a `to=` condition.
    pub fn has_to_condition(&self) -> bool {
        matches!(self.to, TargetCondition::Patterns(_))
    }

    /// Returns the entries of `user=`.
    pub fn users(&self) -> &[UserPattern] {
        &self.users
    }

    /// Matches all conditions except `to=`.
    fn match_all_except_to(&self, request: &AccessRequest<'_>) -> Match {
        let identity = request.identity;
        let user = |user: &UserPattern| match_fact(identity, |id| id.user.is_some_and(|name| user.matches(name)));
        let method = |method: &Method| match_fact(identity, |id| id.method == *method);
        let level = |level: &ProtectionLevel| match_fact(identity, |id| id.level == *level);
        let command = |command: &Command| match_fact(request.command, |requested| requested == *command);
        let port = |ports: &RangeInclusive<u16>| match_fact(request.target_port, |port| ports.contains(&port));
        let from = match_any(&self.from, |pattern| pattern.matches(request.client_ip).into());
        let login = match_any(&self.users, user).min(match_any(&self.methods, method));
        let login = login.min(match_any(&self.levels, level));
        from.min(login).min(match_any(&self.commands, command)).min(match_any(&self.ports, port))
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl ClientPattern {
    fn matches(&self, client_ip: Option<IpAddr>) -> bool {
        match self {
            Self::Loopback => client_ip.is_some_and(|ip| ip.is_loopback()),
            Self::Remote => client_ip.is_some_and(|ip| !ip.is_loopback()),
            Self::Net(net) => client_ip.is_some_and(|ip| net.contains(&ip)),
        }
    }
}

impl UserPattern {
    /// Returns whether this is the user name of a login.
    pub fn matches(&self, user: &[u8]) -> bool {
        match self {
            Self::Any => true,
            Self::Named(name) => name == user,
            // Kerberos escapes an @ that is part of a name as \@.
            Self::Realm(realm) => user.strip_suffix(realm.as_slice()).is_some_and(|name| !name.ends_with(b"\\")),
        }
    }
}

/// The entry as in a rule, without escapes.
impl fmt::Display for UserPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Named(name) => String::from_utf8_lossy(name).escape_debug().fmt(f),
            Self::Realm(realm) => write!(f, "*{}", String::from_utf8_lossy(realm).escape_debug()),
        }
    }
}

impl TargetPattern {
    fn matches(&self, allow: bool, request: &AccessRequest<'_>) -> Match {
        let name = match self {
            Self::Net(net) => return match_fact(request.target_ip, |ip| net_matches(net, ip, allow)),
            Self::Name(name) | Self::Suffix(name) => name,
        };
        match (request.target_ip, request.target_name) {
            (_, Some(target)) => {
                let target = normalize_name(target.as_str());
                let prefix = target.strip_suffix(name.as_str());
                let is_subdomain = prefix.is_some_and(|prefix| prefix.ends_with('.'));
                (prefix == Some("") || is_subdomain && matches!(self, Self::Suffix(_))).into()
            }
            (Some(_), None) => Match::No,
            (None, None) => Match::Maybe,
        }
    }
}

/// Matches an address. An `allow` compares the address that packets finally reach, a `deny` all [`embedded_addrs`].
fn net_matches(net: &IpNet, ip: IpAddr, allow: bool) -> bool {
    let destination = match ip {
        IpAddr::V6(v6) => embedded_ipv4(v6).map_or(ip, IpAddr::V4),
        IpAddr::V4(_) => ip,
    };
    if allow { net.contains(&destination) } else { embedded_addrs(ip).any(|addr| net.contains(&addr)) }
}

/// Returns `ip`, its embedded IPv4 address, and for Teredo also the address of the server.
fn embedded_addrs(ip: IpAddr) -> impl Iterator<Item = IpAddr> {
    let (embedded, teredo_server) = match ip {
        IpAddr::V4(_) => (None, None),
        IpAddr::V6(v6) => match v6.segments() {
            [0x2001, 0, high, low, ..] => (embedded_ipv4(v6), Some(ipv4(high, low))),
            _ => (embedded_ipv4(v6), None),
        },
    };
    [Some(ip), embedded.map(IpAddr::V4), teredo_server.map(IpAddr::V4)].into_iter().flatten()
}

/// Returns the IPv4 address embedded in an IPv6 address: IPv4-mapped, NAT64 (RFC 6052), 6to4 (RFC 3056) or the Teredo
/// client (RFC 4380).
pub fn embedded_ipv4(ip: Ipv6Addr) -> Option<Ipv4Addr> {
    match ip.segments() {
        [0, 0, 0, 0, 0, 0xffff, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] => Some(ipv4(high, low)),
        [0x2002, high, low, ..] => Some(ipv4(high, low)),
        [0x2001, 0, .., high, low] => Some(ipv4(!high, !low)),
        _ => None,
    }
}

fn ipv4(high: u16, low: u16) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(high) << 16 | u32::from(low))
}
