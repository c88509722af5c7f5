//! The rules: who may go where, and which way. First match wins; the built-in ones come last.
//!
//! Judges what it is told and nothing else: resolves no name, opens no file. A question may be asked before all of its
//! facts are known; it is answered as soon as nothing that is still to come could change the answer.

mod parse;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;

use ipnet::IpNet;

use crate::proto::{Command, HostName, Method, ProtectionLevel};
pub use parse::{normalize_name, parse_command, parse_level, parse_method, parse_rule, parse_rules};

/// Where a client that is not on loopback does not get unless a rule says so by address or name: this host itself, the
/// link (and the metadata service of a cloud), nobody in particular, and many at once.
const PROTECTED: &str = ".localhost,0.0.0.0/8,127.0.0.0/8,169.254.0.0/16,224.0.0.0/4,255.255.255.255,\
                         ::,::1,fd00:ec2::254,fe80::/10,ff00::/8";

/// What is known of a session so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct AccessRequest<'a> {
    /// Where the client is, canonical. `None`: somewhere that no rule names.
    pub client_ip: Option<IpAddr>,
    /// How it got in, once it has.
    pub identity: Option<Identity<'a>>,
    /// What it asks for, once it has.
    pub command: Option<Command>,
    /// The name of DST, when it is one.
    pub target_name: Option<&'a HostName>,
    /// The address that packets would go to, once it is known, canonical.
    pub target_ip: Option<IpAddr>,
    /// The port, once it is known.
    pub target_port: Option<u16>,
}

/// How a client got in.
#[derive(Clone, Copy, Debug)]
pub struct Identity<'a> {
    /// By which method.
    pub method: Method,
    /// As whom.
    pub user: Option<&'a [u8]>,
    /// How the session is protected (RFC 1961).
    pub level: ProtectionLevel,
}

/// The answer to a question.
#[derive(Clone, Copy, Debug)]
pub enum Decision<'a> {
    /// Yes, because of this rule, and this way.
    Allow(&'a Rule, Route),
    /// No, because of this rule.
    Deny(&'a Rule),
    /// It depends on what is not known yet; first for this rule.
    Undecided(&'a Rule),
}

/// The way to a target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Route {
    /// From here.
    #[default]
    Direct,
    /// Through the hop of this number.
    Hop(usize),
}

/// One rule.
#[derive(Debug)]
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
    /// As it was written.
    text: String,
    /// Where it was.
    origin: String,
}

#[derive(Debug)]
enum ClientPattern {
    Loopback,
    Remote,
    Net(IpNet),
}

#[derive(Debug)]
enum UserPattern {
    /// `*`: whoever has logged in.
    Any,
    Named(Vec<u8>),
    /// `*@REALM`, with the `@`.
    Realm(Vec<u8>),
}

#[derive(Debug)]
enum TargetCondition {
    Any,
    /// What an `allow` without `to=` means: everywhere but where the built-in rules do not let this client.
    Unprotected,
    Patterns(Vec<TargetPattern>),
    /// Where this server itself listens.
    OwnListeners,
}

#[derive(Debug)]
enum TargetPattern {
    Name(String),
    /// `.SUFFIX`, without the dot: that name and all below it.
    Suffix(String),
    Net(IpNet),
}

/// Whether something is so, as far as is known. Ordered, so that "all" is the minimum and "any" is the maximum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Match {
    No,
    Maybe,
    Yes,
}

impl From<bool> for Match {
    fn from(holds: bool) -> Self {
        if holds { Self::Yes } else { Self::No }
    }
}

/// All rules of a server, in the order in which they are tried.
#[derive(Debug)]
pub struct Rules {
    rules: Vec<Rule>,
    /// How many of them are not built in.
    user_rule_count: usize,
    /// What holds when none matches.
    default_rule: Rule,
    /// The way that is taken where a rule names none.
    default_route: Route,
}

impl Default for Rules {
    fn default() -> Self {
        Self::new(Vec::new(), Route::Direct)
    }
}

impl Rules {
    /// These, and the built-in ones behind them. As soon as an `allow` names `from`, what nothing allows is denied.
    pub fn new(mut rules: Vec<Rule>, default_route: Route) -> Self {
        let user_rule_count = rules.len();
        let is_list = rules.iter().any(|rule| rule.allow && !rule.from.is_empty());
        // It means what it would mean behind the denials, and does not wait for them to be decided.
        if !is_list {
            rules.push(Rule { to: TargetCondition::Unprotected, ..Rule::built_in(true, "allow") });
        }
        rules.push(Rule {
            to: TargetCondition::OwnListeners,
            ..Rule::built_in(false, "deny to=(where s5 itself listens)")
        });
        let text = format!("deny from=remote to={PROTECTED}");
        let places = PROTECTED.split(',').filter_map(|place| parse::parse_target(place).ok()).collect();
        rules.push(Rule {
            from: vec![ClientPattern::Remote],
            to: TargetCondition::Patterns(places),
            ..Rule::built_in(false, &text)
        });
        let origin = if is_list { "built in, since an allow names from=" } else { "built in" };
        let default_rule = Rule { origin: origin.into(), ..Rule::built_in(false, "deny") };
        Self { rules, user_rule_count, default_rule, default_route }
    }

    /// The rules that are not built in.
    pub fn user_rules(&self) -> &[Rule] {
        self.rules.get(..self.user_rule_count).unwrap_or_default()
    }

    /// Whether a rule names `from`.
    pub fn has_from_condition(&self) -> bool {
        self.user_rules().iter().any(|rule| !rule.from.is_empty())
    }

    /// All rules, the built-in ones too, in an order in which they can be read: what is denied before what is not.
    pub fn in_display_order(&self) -> impl Iterator<Item = &Rule> {
        let (written, built_in) = self.rules.split_at_checked(self.user_rule_count).unwrap_or_default();
        let of = |allow: bool| built_in.iter().filter(move |rule| rule.allow == allow);
        written.iter().chain(of(false)).chain(of(true)).chain([&self.default_rule])
    }

    /// The first rule that decides. `is_own_listener` says whether an address leads to this server's own listeners.
    pub fn evaluate(&self, question: &AccessRequest<'_>, is_own_listener: &dyn Fn(SocketAddr) -> bool) -> Decision<'_> {
        let mut doubt = None;
        for rule in &self.rules {
            match (self.matches(rule, question, is_own_listener), rule.allow) {
                (Match::No, _) => {}
                (Match::Maybe, true) => return Decision::Undecided(doubt.unwrap_or(rule)),
                (Match::Maybe, false) => doubt = doubt.or(Some(rule)),
                // Whatever else may match before it denies too.
                (Match::Yes, false) => return Decision::Deny(rule),
                (Match::Yes, true) => {
                    return doubt.map_or(Decision::Allow(rule, self.route(rule)), Decision::Undecided);
                }
            }
        }
        Decision::Deny(&self.default_rule)
    }

    /// The ways that an answer of "yes" may still name, each once.
    pub fn possible_routes(&self, question: &AccessRequest<'_>) -> Vec<Route> {
        let mut routes = Vec::new();
        for rule in self.rules.iter().filter(|rule| rule.allow) {
            let route = self.route(rule);
            if self.matches(rule, question, &|_| false) > Match::No && !routes.contains(&route) {
                routes.push(route);
            }
        }
        routes
    }

    fn route(&self, rule: &Rule) -> Route {
        rule.via.unwrap_or(self.default_route)
    }

    fn matches(
        &self,
        rule: &Rule,
        question: &AccessRequest<'_>,
        is_own_listener: &dyn Fn(SocketAddr) -> bool,
    ) -> Match {
        let client = rule.matches_client(question);
        if client == Match::No {
            return Match::No;
        }
        let to = match &rule.to {
            TargetCondition::Any => Match::Yes,
            TargetCondition::Patterns(places) => any(places, |place| place.matches(rule.allow, question)),
            TargetCondition::OwnListeners => match (question.target_ip, question.target_port) {
                (Some(ip), Some(port)) => {
                    embedded_addrs(ip).any(|ip| is_own_listener(SocketAddr::new(ip, port))).into()
                }
                _ => Match::Maybe,
            },
            TargetCondition::Unprotected => {
                let built_in = self.rules.iter().skip(self.user_rule_count).filter(|rule| !rule.allow);
                match built_in.map(|rule| self.matches(rule, question, is_own_listener)).max() {
                    Some(Match::Yes) => Match::No,
                    // What a name means is the hop's to know, and its rules' to judge.
                    Some(Match::Maybe) if is_name_only(question) && self.route(rule) != Route::Direct => Match::Yes,
                    Some(Match::Maybe) => Match::Maybe,
                    Some(Match::No) | None => Match::Yes,
                }
            }
        };
        client.min(to)
    }
}

fn is_name_only(question: &AccessRequest<'_>) -> bool {
    question.target_name.is_some() && question.target_ip.is_none()
}

/// Whether one of a list holds; an empty list is no condition.
fn any<T>(list: &[T], holds: impl Fn(&T) -> Match) -> Match {
    if list.is_empty() { Match::Yes } else { list.iter().map(holds).max().unwrap_or(Match::No) }
}

impl Rule {
    fn built_in(allow: bool, text: &str) -> Self {
        Self {
            allow,
            from: Vec::new(),
            users: Vec::new(),
            methods: Vec::new(),
            levels: Vec::new(),
            commands: Vec::new(),
            to: TargetCondition::Any,
            ports: Vec::new(),
            via: None,
            text: text.into(),
            origin: "built in".into(),
        }
    }

    /// Where the rule stands: a file and its line, an option, or "built in".
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// Whether it is the built-in rule about this server's own listeners.
    pub fn is_about_own_listeners(&self) -> bool {
        matches!(self.to, TargetCondition::OwnListeners)
    }

    /// Whether it says `to=`.
    pub fn has_to_condition(&self) -> bool {
        matches!(self.to, TargetCondition::Patterns(_))
    }

    /// All that a rule says, but for `to`.
    fn matches_client(&self, question: &AccessRequest<'_>) -> Match {
        let user = |user: &UserPattern| match question.identity {
            None => Match::Maybe,
            Some(login) => login.user.is_some_and(|name| user.is(name)).into(),
        };
        let method = |method: &Method| question.identity.map_or(Match::Maybe, |login| (login.method == *method).into());
        let level =
            |level: &ProtectionLevel| question.identity.map_or(Match::Maybe, |login| (login.level == *level).into());
        let command = |command: &Command| question.command.map_or(Match::Maybe, |asked| (asked == *command).into());
        let port =
            |ports: &RangeInclusive<u16>| question.target_port.map_or(Match::Maybe, |p| ports.contains(&p).into());
        let from = any(&self.from, |source| source.includes(question.client_ip).into());
        let login = any(&self.users, user).min(any(&self.methods, method)).min(any(&self.levels, level));
        from.min(login).min(any(&self.commands, command)).min(any(&self.ports, port))
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl ClientPattern {
    fn includes(&self, from: Option<IpAddr>) -> bool {
        match self {
            Self::Loopback => from.is_some_and(|ip| ip.is_loopback()),
            Self::Remote => from.is_some_and(|ip| !ip.is_loopback()),
            Self::Net(net) => from.is_some_and(|ip| net.contains(&ip)),
        }
    }
}

impl UserPattern {
    fn is(&self, user: &[u8]) -> bool {
        match self {
            Self::Any => true,
            Self::Named(name) => name == user,
            // Kerberos writes an @ that is part of a name as \@.
            Self::Realm(realm) => user.strip_suffix(realm.as_slice()).is_some_and(|name| !name.ends_with(b"\\")),
        }
    }
}

impl TargetPattern {
    fn matches(&self, allow: bool, question: &AccessRequest<'_>) -> Match {
        let (name, net) = match self {
            Self::Name(name) => (name, None),
            Self::Suffix(suffix) => (suffix, None),
            Self::Net(net) => (&String::new(), Some(net)),
        };
        match (net, question.target_ip, question.target_name) {
            (Some(net), Some(ip), _) => includes(net, ip, allow).into(),
            (_, None, None) | (Some(_), None, Some(_)) => Match::Maybe,
            (None, _, None) => Match::No,
            (None, _, Some(asked)) => {
                let asked = normalize_name(asked.as_str());
                let rest = asked.strip_suffix(name.as_str());
                let is_below = matches!(self, Self::Suffix(_)) && rest.is_some_and(|rest| rest.ends_with('.'));
                (rest == Some("") || is_below).into()
            }
        }
    }
}

/// Whether `net` has `ip`: to allow it, by the address that it really leads to; to deny it, by any that it could be
/// taken for.
fn includes(net: &IpNet, ip: IpAddr, allow: bool) -> bool {
    let real = match ip {
        IpAddr::V6(v6) => embedded_ipv4(v6).map_or(ip, IpAddr::V4),
        IpAddr::V4(_) => ip,
    };
    if allow { net.contains(&real) } else { embedded_addrs(ip).any(|form| net.contains(&form)) }
}

/// All addresses that one could be taken for: itself, the one inside, and of Teredo the server's.
fn embedded_addrs(ip: IpAddr) -> impl Iterator<Item = IpAddr> {
    let (embedded_ipv4, server) = match ip {
        IpAddr::V4(_) => (None, None),
        IpAddr::V6(v6) => match v6.segments() {
            [0x2001, 0, high, low, ..] => (embedded_ipv4(v6), Some(v4(high, low))),
            _ => (embedded_ipv4(v6), None),
        },
    };
    [Some(ip), embedded_ipv4.map(IpAddr::V4), server.map(IpAddr::V4)].into_iter().flatten()
}

/// The IPv4 address in an IPv6 one: mapped, NAT64 (RFC 6052), 6to4 (RFC 3056) or Teredo, the client's (RFC 4380).
pub fn embedded_ipv4(ip: Ipv6Addr) -> Option<Ipv4Addr> {
    match ip.segments() {
        [0, 0, 0, 0, 0, 0xffff, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] => Some(v4(high, low)),
        [0x2002, high, low, ..] => Some(v4(high, low)),
        [0x2001, 0, .., high, low] => Some(v4(!high, !low)),
        _ => None,
    }
}

fn v4(high: u16, low: u16) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(high) << 16 | u32::from(low))
}
