//! `--show-rules` and `--explain`: print the rules, or the rule that decides a request. The server is not started.

use std::collections::HashMap;
use std::fmt::{self, Write as _};
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use crate::client::lookup;
use crate::cmd::cli::exit::{CliError, ExitStatus};
use crate::net::{Resolver, canonical, parse_literal, reactor, timeout_at};
use crate::policy::Policy;
use crate::policy::rules::{AccessRequest, Decision, Identity, Route, Rule};
use crate::proto::{Addr, Command, Host, Method, ProtectionLevel, parse_port};
use crate::server::{Options, is_local};

/// Minimum column of a comment.
const COMMENT_COLUMN: usize = 48;

/// Prints all rules in order of evaluation, each with its origin.
pub(super) fn show(policy: &Policy, options: &Options) -> Result<(), CliError> {
    let mut text = String::new();
    let mut add = |rule: &str, origin: &str| text += &format!("{rule:COMMENT_COLUMN$}  # {origin}\n");
    for rule in policy.rules.in_display_order() {
        if !rule.denies_own_listeners() {
            add(&rule.text(), &rule.origin());
            continue;
        }
        let own_listeners = options.listen.iter().flat_map(|listen| listen.addrs());
        let rule_text = |addr: SocketAddr| match addr.ip().is_unspecified() {
            true => format!("deny to=(any address of this host) port={}", addr.port()),
            false => format!("deny to={} port={}", addr.ip(), addr.port()),
        };
        let mut rules: Vec<String> = own_listeners.map(rule_text).collect();
        rules.dedup();
        rules.iter().for_each(|rule| add(rule, "built in, own listener"));
    }
    text += "# an allow without to= does not override the built-in deny rules\n";
    print(&text)
}

/// Prints the deciding rule for the name and for each address. Fails with status 1 if the request is denied.
pub(super) fn explain(mut policy: Policy, options: &Options, request: &str) -> Result<(), CliError> {
    policy.listen_addrs = options.listen.iter().flat_map(|listen| listen.addrs()).collect();
    let query = ExplainedRequest::parse(request).map_err(|error| CliError::usage(format!("--explain: {error}")))?;
    let mut explanation = Explanation { policy: &policy, options, query: &query, text: format!("request {query}\n") };
    let is_allowed = explanation.explain();
    explanation.text += match is_allowed {
        Ok(true) => "allow\n",
        Ok(false) => "deny\n",
        Err(_) => "",
    };
    print(&explanation.text)?;
    if is_allowed? { Ok(()) } else { Err(CliError::new(ExitStatus::FAILURE, "")) }
}

fn print(text: &str) -> Result<(), CliError> {
    let result = std::io::stdout().write_all(text.as_bytes());
    result.map_err(|error| CliError::new(ExitStatus::WRITE_STDOUT, format!("write to stdout: {error}")))
}

/// The parsed value of `--explain`.
#[derive(Debug)]
struct ExplainedRequest {
    from: IpAddr,
    user: Option<String>,
    method: Method,
    level: ProtectionLevel,
    command: Command,
    to: Option<Addr>,
}

impl ExplainedRequest {
    fn parse(text: &str) -> Result<Self, String> {
        let mut conditions: HashMap<&str, &str> = HashMap::new();
        for word in text.split_whitespace() {
            let expected = || format!("expected key=value, such as to=example.org:80, found {word:?}");
            let (key, value) = word.split_once('=').ok_or_else(expected)?;
            if value.is_empty() || conditions.insert(key, value).is_some() {
                return Err(format!("{word:?}: empty value or duplicate key"));
            }
        }
        let from = conditions.remove("from").unwrap_or("127.0.0.1");
        let user = conditions.remove("user").map(str::to_owned);
        let default_method = match &user {
            None => Method::NONE,
            Some(user) if user.contains('@') => Method::GSSAPI,
            Some(_) => Method::PASSWORD,
        };
        let method = conditions.remove("method").map_or(Ok(default_method), str::parse)?;
        let level = conditions.remove("protection").map_or(Ok(ProtectionLevel::None), str::parse)?;
        let command = conditions.remove("command").map_or(Ok(Command::Connect), str::parse)?;
        let mut to = conditions.remove("to").map(|to| Addr::parse_with_default_port(to, 0)).transpose()?;
        let port = conditions.remove("port").map(parse_port).transpose()?;
        if let (Some(to), Some(port)) = (&mut to, port) {
            to.port = port;
        }
        if let Some(key) = conditions.keys().next() {
            return Err(format!("unknown key {key:?} (keys are from, user, method, protection, command, to, port)"));
        }
        let from: IpAddr = from.parse().map_err(|_| format!("from={from}: expected one IP address"))?;
        Ok(Self { from: from.to_canonical(), user, method, level, command, to })
    }

    fn request(&self) -> AccessRequest<'_> {
        let identity =
            Identity { method: self.method, user: self.user.as_deref().map(str::as_bytes), level: self.level };
        AccessRequest {
            client_ip: Some(self.from),
            identity: Some(identity),
            command: Some(self.command),
            target_port: self.to.as_ref().map(|to| to.port).filter(|port| *port != 0),
            ..AccessRequest::default()
        }
    }

    /// Returns the target. BIND for `0.0.0.0` or `[::]` accepts any peer, so the request has none.
    fn target(&self) -> Option<&Addr> {
        let accepts_any =
            |host: &Host| self.command == Command::Bind && matches!(host, Host::Ip(ip) if ip.is_unspecified());
        self.to.as_ref().filter(|to| !accepts_any(&to.host))
    }
}

impl fmt::Display for ExplainedRequest {
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

struct Explanation<'a> {
    policy: &'a Policy,
    options: &'a Options,
    query: &'a ExplainedRequest,
    text: String,
}

impl Explanation<'_> {
    fn explain(&mut self) -> Result<bool, CliError> {
        let query = self.query;
        let request = query.request();
        if let Some(identity) = request.identity
            && !self.policy.accepts_identity(&identity)
        {
            self.text += match (&query.user, &self.policy.users) {
                (Some(_), Some(_)) => "deny at the login: unknown user, or method not accepted\n",
                (None, Some(_)) => "deny at the greeting: login required (add user=NAME)\n",
                (_, None) => "deny at the greeting: method not accepted (passwords require --users)\n",
            };
            return Ok(false);
        }
        let Some(to) = query.target() else { return self.report("the client", &request) };
        let name = match &to.host {
            Host::Ip(ip) => return self.report_addrs(&request, &[*ip]),
            Host::Name(name) => name,
        };
        if let Some(ip) = parse_literal(name.as_str()) {
            return self.report_addrs(&request, &[ip]);
        }
        let request = AccessRequest { target_name: Some(name), ..request };
        match self.policy.evaluate(&request, is_local) {
            Decision::Undecided(rule) => {
                let subject = format!("{} (its addresses decide)", name.as_str());
                self.add_line("resolve", &subject, rule, Route::Direct);
                let ips = resolve(to, self.options.connect_timeout).map_err(|error| {
                    CliError::new(ExitStatus::USAGE, format!("--explain: {}: {error}", name.as_str()))
                })?;
                self.report_addrs(&request, &ips)
            }
            _ => self.report(name.as_str(), &request),
        }
    }

    /// Reports the decision for each address. Returns true if at least one is allowed.
    fn report_addrs(&mut self, request: &AccessRequest<'_>, ips: &[IpAddr]) -> Result<bool, CliError> {
        let mut is_any_allowed = false;
        for ip in ips {
            let ip = canonical(*ip, 0).ip();
            is_any_allowed |= self.report(&ip.to_string(), &AccessRequest { target_ip: Some(ip), ..*request })?;
        }
        Ok(is_any_allowed)
    }

    fn report(&mut self, subject: &str, request: &AccessRequest<'_>) -> Result<bool, CliError> {
        let (decision, rule, route) = match self.policy.evaluate(request, is_local) {
            Decision::Allow(rule, route) => ("allow", rule, route),
            Decision::Deny(rule) => ("deny", rule, Route::Direct),
            Decision::Undecided(_) => {
                let to = self.query.to.as_ref().map(ToString::to_string);
                let problem = match to.as_deref().and_then(|to| to.strip_suffix(":0")) {
                    Some(to) => format!("to={to} has no port"),
                    None => "the request has no target address".into(),
                };
                return Err(CliError::usage(format!("--explain: {problem} (write to=HOST:PORT)")));
            }
        };
        self.add_line(decision, subject, rule, route);
        Ok(decision == "allow")
    }

    fn add_line(&mut self, decision: &str, subject: &str, rule: &Rule, route: Route) {
        let via = match route {
            Route::Direct => String::new(),
            Route::Hop(hop) => self.options.hops.get(hop).map(|hop| format!(" via {}", hop.name)).unwrap_or_default(),
        };
        let _ = writeln!(self.text, "{decision} {subject}{via}: {} ({rule})", rule.origin());
    }
}

fn resolve(to: &Addr, timeout: Duration) -> Result<Vec<IpAddr>, String> {
    let resolver = Resolver::default();
    let found = timeout_at(Instant::now() + timeout, lookup(&resolver, to));
    match reactor::run(found).map_err(|error| format!("start the event loop: {error}"))? {
        Some(found) => Ok(found.map_err(|error| error.to_string())?.into_iter().map(|addr| addr.ip()).collect()),
        None => Err(format!("no answer from the resolver within {timeout:?}")),
    }
}
