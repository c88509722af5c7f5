//! What the rules are, and what they say to a question. Nothing is started for it.

use std::collections::HashMap;
use std::fmt::{self, Write as _};
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use crate::client::parse_addr;
use crate::cmd::{CliError, ExitStatus};
use crate::conn::until;
use crate::dial::{Resolver, canonical, parse_literal};
use crate::policy::Policy;
use crate::policy::rules::{self, AccessRequest, Decision, Identity, Route, Rule};
use crate::proto::{Addr, Command, Host, HostName, Method, ProtectionLevel};
use crate::server::{Options, is_local};

/// How long the system's resolver may take.
const LOOKUP: Duration = Duration::from_secs(10);

/// Where the comments of rules that are not longer stand.
const COLUMN: usize = 48;

/// Prints all rules in their order, each with where it stands.
pub(super) fn show(policy: &Policy, options: &Options) -> Result<(), CliError> {
    let mut text = String::new();
    let mut lines: Vec<(String, &str)> = Vec::new();
    for rule in policy.rules.in_display_order() {
        if rule.is_about_own_listeners() {
            let own = options.listen.iter().flat_map(|listen| listen.addrs());
            let to = |own: SocketAddr| match own.ip().is_unspecified() {
                true => format!("deny to=(all of this machine) port={}", own.port()),
                false => format!("deny to={} port={}", own.ip(), own.port()),
            };
            lines.extend(own.map(|own| (to(own), "built in, s5 itself")));
        } else {
            lines.push((rule.to_string(), rule.origin()));
        }
    }
    for (rule, origin) in lines {
        let _ = writeln!(text, "{rule:COLUMN$}  # {origin}");
    }
    text += "# an allow that does not say to= leaves the built-in denials in force\n";
    print(&text)
}

/// Prints which rule decides, for the name and for each address.
pub(super) fn explain(mut policy: Policy, options: &Options, question: &str) -> Result<(), CliError> {
    policy.listen_addrs = options.listen.iter().flat_map(|listen| listen.addrs()).collect();
    let asked = Asked::parse(question).map_err(|why| CliError::usage(format!("--explain: {why}")))?;
    let mut explained = Explained { policy: &policy, options, text: format!("asked {asked}\n") };
    let explained_so_far = explained.explain(&asked);
    explained.text += match explained_so_far {
        Ok(true) => "allow\n",
        Ok(false) => "deny\n",
        Err(_) => "",
    };
    print(&explained.text)?;
    if explained_so_far? { Ok(()) } else { Err(CliError::new(ExitStatus::FAILURE, "")) }
}

fn print(text: &str) -> Result<(), CliError> {
    let written = std::io::stdout().write_all(text.as_bytes());
    written.map_err(|error| CliError::new(ExitStatus::WRITE_STDOUT, format!("writing to stdout: {error}")))
}

/// A question as it was put.
#[derive(Debug)]
struct Asked {
    from: IpAddr,
    user: Option<String>,
    method: Method,
    level: ProtectionLevel,
    command: Command,
    to: Option<Addr>,
}

impl Asked {
    fn parse(text: &str) -> Result<Self, String> {
        let mut words: HashMap<&str, &str> = HashMap::new();
        for word in text.split_whitespace() {
            let (key, value) = word.split_once('=').ok_or_else(|| format!("{word:?} is not key=value"))?;
            if value.is_empty() || words.insert(key, value).is_some() {
                return Err(format!("{word:?} is empty, or stands here twice"));
            }
        }
        let from = words.remove("from").unwrap_or("127.0.0.1");
        let user = words.remove("user").map(str::to_owned);
        let likely = match &user {
            None => Method::NONE,
            Some(user) if user.contains('@') => Method::GSSAPI,
            Some(_) => Method::PASSWORD,
        };
        let method = words.remove("method").map_or(Ok(likely), rules::parse_method)?;
        let level = words.remove("protection").map_or(Ok(ProtectionLevel::None), rules::parse_level)?;
        let command = words.remove("command").map_or(Ok(Command::Connect), rules::parse_command)?;
        let to = words.remove("to").map(|to| parse_addr(to, Some(0))).transpose()?;
        let port = words.remove("port").map(|port| port.parse().map_err(|_| format!("{port:?} is not a port")));
        let to = match (to, port.transpose()?) {
            (Some(to), Some(port)) => Some(Addr { port, ..to }),
            (to, _) => to,
        };
        if let Some(key) = words.keys().next() {
            return Err(format!("unknown key {key:?}; there are from, user, method, protection, command, to and port"));
        }
        let from: IpAddr = from.parse().map_err(|_| format!("from={from}: write one address"))?;
        Ok(Self { from: from.to_canonical(), user, method, level, command, to })
    }

    fn question(&self) -> AccessRequest<'_> {
        let login = Identity { method: self.method, user: self.user.as_deref().map(str::as_bytes), level: self.level };
        let port = self.to.as_ref().map(|to| to.port).filter(|port| *port != 0);
        let question = AccessRequest {
            client_ip: Some(self.from),
            identity: Some(login),
            command: Some(self.command),
            ..AccessRequest::default()
        };
        AccessRequest { target_port: port, ..question }
    }

    /// The address, or the name that has to be looked up.
    fn target(&self) -> Option<Result<IpAddr, &HostName>> {
        let host = &self.to.as_ref()?.host;
        // Whose peer is anybody says nothing about a target.
        if self.command == Command::Bind && matches!(host, Host::Ip(ip) if ip.is_unspecified()) {
            return None;
        }
        Some(match host {
            Host::Ip(ip) => Ok(*ip),
            Host::Name(name) => parse_literal(name).ok_or(name),
        })
    }
}

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "from={} ", self.from)?;
        self.user.as_ref().map_or(Ok(()), |user| write!(f, "user={user} "))?;
        write!(f, "method={} protection={} command={}", self.method, self.level, self.command)?;
        match &self.to {
            Some(Addr { host: Host::Name(name), port: 0 }) => write!(f, " to={}", name.as_str()),
            Some(Addr { host: Host::Ip(ip), port: 0 }) => write!(f, " to={ip}"),
            Some(to) => write!(f, " to={to}"),
            None => Ok(()),
        }
    }
}

struct Explained<'a> {
    policy: &'a Policy,
    options: &'a Options,
    text: String,
}

impl<'a> Explained<'a> {
    fn explain(&mut self, asked: &Asked) -> Result<bool, CliError> {
        let question = asked.question();
        if let Some(login) = question.identity
            && !self.policy.accepts_identity(&login)
        {
            self.text += match (&asked.user, &self.policy.users) {
                (Some(_), Some(_)) => "deny at the login: there is no such user, or not by this method\n",
                (None, Some(_)) => "deny at the greeting: nobody gets in without a login; say user=NAME\n",
                (_, None) => "deny at the greeting: without --users there is no login; leave out user=\n",
            };
            return Ok(false);
        }
        match asked.target() {
            None => self.certain("the client", &question),
            Some(Ok(ip)) => self.addresses(&question, &[ip]),
            Some(Err(name)) => {
                let question = AccessRequest { target_name: Some(name), ..question };
                match self.evaluate(&question) {
                    Decision::Undecided(rule) => {
                        let what = format!("{}, by its addresses", name.as_str());
                        self.line("look up", &what, rule, Route::Direct);
                        let addrs = lookup(asked)?;
                        self.addresses(&question, &addrs)
                    }
                    _ => self.certain(name.as_str(), &question),
                }
            }
        }
    }

    /// Whether one of the addresses is allowed.
    fn addresses(&mut self, question: &AccessRequest<'_>, ips: &[IpAddr]) -> Result<bool, CliError> {
        let mut any = false;
        for ip in ips {
            let ip = canonical(*ip, 0).ip();
            any |= self.certain(&ip.to_string(), &AccessRequest { target_ip: Some(ip), ..*question })?;
        }
        Ok(any)
    }

    fn certain(&mut self, what: &str, question: &AccessRequest<'_>) -> Result<bool, CliError> {
        match self.evaluate(question) {
            Decision::Allow(rule, route) => {
                self.line("allow", what, rule, route);
                Ok(true)
            }
            Decision::Deny(rule) => {
                self.line("deny", what, rule, Route::Direct);
                Ok(false)
            }
            Decision::Undecided(rule) => {
                let what = format!("it depends on {}: {rule}", rule.origin());
                Err(CliError::usage(format!("--explain: say more, as in to=HOST:PORT; {what}")))
            }
        }
    }

    fn evaluate(&self, question: &AccessRequest<'_>) -> Decision<'a> {
        self.policy.evaluate(question, is_local)
    }

    fn line(&mut self, verdict: &str, what: &str, rule: &Rule, route: Route) {
        let via = match route {
            Route::Direct => String::new(),
            Route::Hop(hop) => self.options.hops.get(hop).map(|hop| format!(" via {}", hop.name)).unwrap_or_default(),
        };
        let _ = writeln!(self.text, "{verdict} {what}{via}: {} ({rule})", rule.origin());
    }
}

fn lookup(asked: &Asked) -> Result<Vec<IpAddr>, CliError> {
    let Some(to) = &asked.to else { return Ok(Vec::new()) };
    let found = smol::block_on(until(Instant::now() + LOOKUP, Resolver::default().lookup(to)));
    match found {
        Some(Ok(addrs)) => Ok(addrs.into_iter().map(|addr| addr.ip()).collect()),
        Some(Err(failure)) => Err(CliError::usage(format!("--explain: {to}: {failure}"))),
        None => Err(CliError::usage(format!("--explain: {to}: the resolver gave no answer"))),
    }
}
