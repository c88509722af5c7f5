//! `--show-rules` and `--explain`: print the rules, or the rule that decides a request. The server is not started.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::request::ExplainedRequest;
use crate::client::lookup;
use crate::cmd::cli::exit::{CliError, CliResult, ExitStatus, escape};
use crate::net::{Unlimited, canonical, parse_literal, reactor, timeout_at};
use crate::policy::rules::{AccessRequest, Decision, Route, Rule};
use crate::policy::{Policy, is_reachable};
use crate::proto::{Addr, Host};
use crate::server::{Options, is_local, set_server_addrs};

const COMMENT_COLUMN: usize = 48;

/// Prints all rules in order of evaluation, each with its origin.
pub(super) fn show(mut policy: Policy, options: &Options) -> CliResult {
    set_server_addrs(&mut policy, options);
    let mut text = String::new();
    let mut add = |rule: &str, origin: &str| text += &format!("{rule:COMMENT_COLUMN$}  # {origin}\n");
    for rule in policy.rules.in_display_order() {
        if !rule.denies_own_listeners() {
            add(&rule.text(), &rule.origin());
            continue;
        }
        let all: Vec<SocketAddr> = policy.listen_addrs.iter().chain(&policy.metrics_addrs).copied().collect();
        let advertised = policy.advertised_ips.iter().flat_map(|ip| all.iter().map(|addr| (*ip, addr.port()).into()));
        let rule_text = |addr: SocketAddr| match addr.ip().is_unspecified() {
            true => format!("deny to=(any address of this host) port={}", addr.port()),
            false => format!("deny to={} port={}", addr.ip(), addr.port()),
        };
        let (rules, mut seen) = (all.iter().copied().chain(advertised).map(rule_text), HashSet::new());
        for rule in rules.filter(|rule| seen.insert(rule.clone())) {
            add(&rule, "built in, own listener");
        }
    }
    text += "# an allow without to= does not override the built-in deny rules\n";
    print(&text)
}

/// Prints the deciding rule for the name and for each address. Fails with status 1 if the request is denied.
pub(super) fn explain(mut policy: Policy, options: &Options, request: &str) -> CliResult {
    set_server_addrs(&mut policy, options);
    let query =
        ExplainedRequest::parse(request, &policy).map_err(|error| CliError::usage(format!("--explain: {error}")))?;
    let mut explanation = Explanation { policy: &policy, options, query: &query, text: format!("request {query}\n") };
    let is_allowed = explanation.explain();
    if let Ok(is_allowed) = is_allowed {
        explanation.text += if is_allowed { "allow\n" } else { "deny\n" };
    }
    print(&explanation.text)?;
    if is_allowed? { Ok(()) } else { Err(CliError::new(ExitStatus::FAILURE, "")) }
}

fn print(text: &str) -> CliResult {
    let lines = text.lines().map(|line| escape(line) + "\n").collect::<String>();
    let result = std::io::stdout().write_all(lines.as_bytes());
    result.map_err(|error| CliError::new(ExitStatus::WRITE_STDOUT, format!("write to stdout: {error}")))
}

struct Explanation<'a> {
    policy: &'a Policy,
    options: &'a Options,
    query: &'a ExplainedRequest,
    text: String,
}

impl Explanation<'_> {
    fn explain(&mut self) -> CliResult<bool> {
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
        let to = match (query.target(), query.addr) {
            (Some(to), _) => to,
            (None, Some(addr)) => return self.report_addrs(&request, &[addr.ip()]),
            (None, None) => return self.report("the client", &request),
        };
        let name = match &to.host {
            Host::Ip(ip) => return self.report_addrs(&request, &[*ip]),
            Host::Name(name) => name,
        };
        if let Some(ip) = parse_literal(name.as_str()) {
            return self.report_addrs(&request, &[ip]);
        }
        let request = AccessRequest { target_name: Some(name), ..request };
        match (self.policy.evaluate(&request, is_local), query.addr) {
            (Decision::Undecided(_), Some(addr)) => self.report_addrs(&request, &[addr.ip()]),
            (Decision::Undecided(rule), None) if self.needs_addrs(&request) => {
                let subject = format!("{} (its addresses decide)", name.as_str());
                self.add_line("resolve", &subject, rule, Route::default());
                let ips = resolve(to, self.options.connect_timeout).map_err(|error| {
                    CliError::new(ExitStatus::USAGE, format!("--explain: {}: {error}", name.as_str()))
                })?;
                self.report_addrs(&request, &ips)
            }
            _ => self.report(name.as_str(), &request),
        }
    }

    /// Returns false for a BIND whose name the hop resolves.
    fn needs_addrs(&self, request: &AccessRequest<'_>) -> bool {
        let has_hop = self.policy.rules.only_route(request).is_some_and(|route| route.hop.is_some());
        !has_hop || self.policy.rules.depends_on_address(request)
    }

    /// Reports the decision for each address. Returns true if at least one is allowed.
    fn report_addrs(&mut self, request: &AccessRequest<'_>, ips: &[IpAddr]) -> CliResult<bool> {
        let mut is_any_allowed = false;
        for ip in ips {
            let ip = canonical(*ip, 0).ip();
            is_any_allowed |= self.report(&ip.to_string(), &AccessRequest { target_ip: Some(ip), ..*request })?;
        }
        Ok(is_any_allowed)
    }

    fn report(&mut self, subject: &str, request: &AccessRequest<'_>) -> CliResult<bool> {
        let (decision, rule, route) = match self.policy.evaluate(request, is_local) {
            Decision::Allow(rule, route) if !is_reachable(request, rule, route) => {
                let _ = writeln!(self.text, "deny {subject}: not a unicast address, or port 0");
                return Ok(false);
            }
            Decision::Allow(rule, route) => ("allow", rule, route),
            Decision::Deny(rule) => ("deny", rule, Route::default()),
            // The server accepts the request, and decides when it knows the address.
            Decision::Undecided(rule) if self.query.can_wait() => {
                self.add_line("wait", "for an address (add addr=IP:PORT)", rule, Route::default());
                return Ok(true);
            }
            Decision::Undecided(_) => {
                let to = self.query.to.as_ref().map(ToString::to_string);
                let to = to.as_deref().and_then(|to| to.strip_suffix(":0"));
                let problem =
                    to.map_or("the request has no target address".into(), |to| format!("to={to} has no port"));
                return Err(CliError::usage(format!("--explain: {problem} (write to=HOST:PORT)")));
            }
        };
        self.add_line(decision, subject, rule, route);
        Ok(decision == "allow")
    }

    fn add_line(&mut self, decision: &str, subject: &str, rule: &Rule, route: Route) {
        let hop = route.hop.and_then(|hop| self.options.hops.get(hop));
        let via = hop.map(|hop| format!(" via {}", hop.name)).unwrap_or_default();
        let outbound = route.outbound.unwrap_or(self.options.outbound.ips).into_iter().flatten();
        let from: String = outbound.filter(|ip| !ip.is_unspecified()).map(|ip| format!(" from {ip}")).collect();
        let _ = writeln!(self.text, "{decision} {subject}{via}{from}: {} ({rule})", rule.origin());
    }
}

fn resolve(to: &Addr, timeout: Duration) -> Result<Vec<IpAddr>, String> {
    let found = timeout_at(Instant::now() + timeout, lookup(to, &Unlimited));
    match reactor::run(found).map_err(|error| format!("start the event loop: {error}"))? {
        Some(found) => Ok(found.map_err(|error| error.to_string())?.into_iter().map(|addr| addr.ip()).collect()),
        None => Err(format!("no answer from the resolver within {timeout:?}")),
    }
}
