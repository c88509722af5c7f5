//! Rules: which client may reach which target, and by which route. The first match decides; built-in rules are last.
//!
//! Pure: resolves no name and opens no file. A request can be evaluated before all facts are known. The decision is
//! final as soon as no unknown fact can change it.

mod conditions;
mod groups;
mod parse;
mod rule;

use std::collections::HashSet;
use std::net::SocketAddr;

pub use conditions::{AccessRequest, Identity, Route, UserPattern, embedded_ipv4, normalize_name};
use conditions::{ClientPattern, Conditions, Match, TargetPattern, embedded_addrs, is_always_embedding};
use groups::{Groups, Search};
use parse::parse_target;
pub use parse::{decode_user, one_per_family, parse_cidr, parse_rule, parse_rules};
pub use rule::Rule;
use rule::TargetCondition;

/// Targets that a remote client reaches only if an `allow to=` rule names them: this host, link-local addresses,
/// unspecified addresses, multicast and broadcast. Cloud metadata services have link-local addresses.
const PROTECTED_TARGETS: &str = ".localhost,0.0.0.0/8,127.0.0.0/8,169.254.0.0/16,224.0.0.0/4,255.255.255.255,\
                         ::,::1,fd00:ec2::254,fe80::/10,ff00::/8";

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

/// All rules of a server.
#[derive(Debug)]
pub struct Rules {
    /// Rules of files and options, in the order of evaluation.
    user_rules: Vec<Rule>,
    groups: Groups,
    /// Evaluated after the user rules.
    built_in: Vec<Rule>,
    /// Targets of [`TargetCondition::Protected`].
    protected: Vec<TargetPattern>,
    default_rule: Rule,
    default_route: Route,
}

/// The first rules that match or may match a request, as far as they are found.
#[derive(Default)]
struct FirstRules<'a> {
    /// Index and rule; the first `deny` that may match, the first that matches, the first `allow` that does either.
    deny_maybe: Option<(usize, &'a Rule)>,
    deny: Option<(usize, &'a Rule)>,
    allow: Option<(usize, &'a Rule, Match)>,
}

impl Default for Rules {
    fn default() -> Self {
        Self::new(Vec::new(), Route::default())
    }
}

impl Rules {
    /// Adds the built-in rules to the user rules. If an `allow` has `from=`, the default is to deny.
    pub fn new(user_rules: Vec<Rule>, default_route: Route) -> Self {
        use TargetCondition::{Any, OwnListeners, Protected, Unprotected};
        let name = "built in";
        let is_allowlist = |rule: &Rule| rule.conditions.allow && !rule.conditions.from.is_empty();
        let has_client_allowlist = user_rules.iter().any(is_allowlist);
        let mut built_in = Vec::new();
        // `Unprotected` excludes the targets of the built-in `deny` rules, so it can precede them. Before them, it can
        // allow a name whose address only a hop will know.
        if !has_client_allowlist {
            let allow = Conditions { allow: true, ..Conditions::default() };
            built_in.push(Rule::built_in(name, "allow", allow, Unprotected));
        }
        let text = "deny to=(listeners of this server)";
        built_in.push(Rule::built_in(name, text, Conditions::default(), OwnListeners));
        let from_remote = Conditions { from: [ClientPattern::Remote].into(), ..Conditions::default() };
        let text = format!("deny from=remote to={PROTECTED_TARGETS}");
        built_in.push(Rule::built_in(name, &text, from_remote, Protected));
        let origin = if has_client_allowlist { "built in, because an allow rule has from=" } else { name };
        Self {
            groups: Groups::new(&user_rules),
            user_rules,
            built_in,
            protected: PROTECTED_TARGETS.split(',').filter_map(|target| parse_target(target).ok()).collect(),
            default_rule: Rule::built_in(origin, "deny", Conditions::default(), Any),
            default_route,
        }
    }

    /// Returns the first entry of `to=` that matches no target, and its rule: an IPv6 prefix of an `allow`, which
    /// compares the IPv4 address that each address of the prefix embeds.
    pub fn unmatched_target(&self) -> Option<(&Rule, &str)> {
        let allows = self.user_rules.iter().filter(|rule| rule.conditions.allow);
        let targets = allows.flat_map(|rule| rule.targets().map(move |(_, target)| (rule, target)));
        let mut nets = targets.filter(|(_, target)| target.contains(':'));
        nets.find(|(_, target)| parse_target(target).is_ok_and(|target| is_always_embedding(&target)))
    }

    /// Returns the rules of files and options, without the built-in rules.
    pub fn user_rules(&self) -> &[Rule] {
        &self.user_rules
    }

    /// Returns the user rules that do not merely repeat the conditions of an earlier one for other targets.
    pub fn first_user_rules(&self) -> impl Iterator<Item = &Rule> {
        self.groups.first_rules().filter_map(|index| self.user_rules.get(index))
    }

    pub(crate) fn has_from_condition(&self) -> bool {
        self.user_rules.iter().any(|rule| !rule.conditions.from.is_empty())
    }

    /// Returns all rules in the order for display: the built-in `deny` rules before the built-in `allow`, which stands
    /// for the default rule if there is one.
    pub fn in_display_order(&self) -> impl Iterator<Item = &Rule> {
        let built_in_with = |allow: bool| self.built_in.iter().filter(move |rule| rule.conditions.allow == allow);
        let last = built_in_with(true).next().unwrap_or(&self.default_rule);
        self.user_rules.iter().chain(built_in_with(false)).chain([last])
    }

    /// Decides a request by the first rule that matches. `is_own_listener` detects the listeners of this server. The
    /// time does not depend on the number of rules that differ only in `to=`, or in the networks of `from=`, or in the
    /// names of `user=`.
    pub fn evaluate(&self, request: &AccessRequest<'_>, is_own_listener: &dyn Fn(SocketAddr) -> bool) -> Decision<'_> {
        let mut first = FirstRules::default();
        let match_target = |rule: &Rule| self.match_target(rule, request, is_own_listener);
        self.search(request, true, &match_target, &mut |index, rule, matches| first.add(index, rule, matches));
        for (index, rule) in (self.user_rules.len()..).zip(&self.built_in) {
            if first.is_final() {
                break;
            }
            first.add(index, rule, rule.conditions.matches(request).min(match_target(rule)));
        }
        match (first.deny, first.allow) {
            // Earlier rules that may match are `deny` rules too, so the decision is final.
            (Some((denied, rule)), allow) if allow.is_none_or(|(allowed, ..)| denied < allowed) => Decision::Deny(rule),
            (_, Some((allowed, rule, matches))) => match (first.deny_maybe, matches) {
                (Some((index, deny)), _) if index < allowed => Decision::Undecided(deny),
                (_, Match::Yes) => Decision::Allow(rule, self.route(rule)),
                (_, _) => Decision::Undecided(rule),
            },
            (_, None) => Decision::Deny(&self.default_rule),
        }
    }

    /// Returns every route that an `allow` may still select for this request, without duplicates.
    pub fn possible_routes(&self, request: &AccessRequest<'_>) -> Vec<Route> {
        self.routes(&self.possible_rules(request))
    }

    fn routes(&self, rules: &[&Rule]) -> Vec<Route> {
        let mut seen = HashSet::new();
        let routes = rules.iter().filter(|rule| rule.conditions.allow).map(|rule| self.route(rule));
        routes.filter(|route| seen.insert(*route)).collect()
    }

    /// Returns the route of all targets that the rules may still allow, if there is only one.
    pub fn only_route(&self, request: &AccessRequest<'_>) -> Option<Route> {
        <[Route; 1]>::try_from(self.routes(&self.deciding_rules(request))).ok().map(|[only]| only)
    }

    /// Returns whether a rule with an address or CIDR block may decide.
    pub fn depends_on_address(&self, request: &AccessRequest<'_>) -> bool {
        self.deciding_rules(request).iter().any(|rule| rule.to == TargetCondition::Listed { has_net: true })
    }

    /// Returns the rules that may still decide, in order, up to the first one that decides about all targets.
    fn deciding_rules(&self, request: &AccessRequest<'_>) -> Vec<&Rule> {
        let mut rules = self.possible_rules(request);
        let decides_all = |rule: &&Rule| {
            let has_all_targets = matches!(rule.to, TargetCondition::Any | TargetCondition::Unprotected);
            has_all_targets && rule.conditions.matches(request) == Match::Yes
        };
        let last = rules.iter().position(decides_all).unwrap_or(rules.len());
        rules.truncate(last.saturating_add(1));
        rules
    }

    /// Returns the rules that may still match, in order.
    fn possible_rules(&self, request: &AccessRequest<'_>) -> Vec<&Rule> {
        let mut found = Vec::new();
        let match_target = |rule: &Rule| self.match_target(rule, request, &|_| false);
        self.search(request, false, &match_target, &mut |index, rule, matches| found.push((index, rule, matches)));
        let built_in = (self.user_rules.len()..).zip(&self.built_in);
        let matches = |rule: &Rule| rule.conditions.matches(request).min(match_target(rule));
        found.extend(built_in.map(|(index, rule)| (index, rule, matches(rule))));
        found.retain(|(.., matches)| *matches > Match::No);
        found.sort_by_key(|(index, ..)| *index);
        found.into_iter().map(|(_, rule, _)| rule).collect()
    }

    fn search<'a>(
        &'a self,
        request: &AccessRequest<'_>,
        only_first: bool,
        match_target: &dyn Fn(&Rule) -> Match,
        found: &mut dyn FnMut(usize, &'a Rule, Match),
    ) {
        Search { groups: &self.groups, rules: &self.user_rules, request, match_target, only_first }.run(found);
    }

    /// Returns the route of the targets that a rule allows.
    pub fn route(&self, rule: &Rule) -> Route {
        Route { hop: rule.conditions.via.unwrap_or(self.default_route.hop), outbound: rule.conditions.outbound }
    }

    /// Matches the target of a rule without `to=`, or of a built-in rule.
    fn match_target(
        &self,
        rule: &Rule,
        request: &AccessRequest<'_>,
        is_own_listener: &dyn Fn(SocketAddr) -> bool,
    ) -> Match {
        match rule.to {
            TargetCondition::Any | TargetCondition::Listed { .. } => Match::Yes,
            TargetCondition::Protected => {
                self.protected.iter().map(|pattern| pattern.matches(false, request)).max().unwrap_or(Match::No)
            }
            TargetCondition::OwnListeners => match (request.target_ip, request.target_port) {
                (Some(ip), Some(port)) => embedded_addrs(ip).any(|ip| is_own_listener((ip, port).into())).into(),
                _ => Match::Maybe,
            },
            TargetCondition::Unprotected => {
                let denials = self.built_in.iter().filter(|rule| !rule.conditions.allow);
                let matches = |rule: &Rule| {
                    rule.conditions.matches(request).min(self.match_target(rule, request, is_own_listener))
                };
                let has_only_name = request.target_name.is_some() && request.target_ip.is_none();
                match denials.map(matches).max() {
                    Some(Match::Yes) => Match::No,
                    // The hop resolves the name and applies its own rules to the address.
                    Some(Match::Maybe) if has_only_name && self.route(rule).hop.is_some() => Match::Yes,
                    Some(Match::Maybe) => Match::Maybe,
                    Some(Match::No) | None => Match::Yes,
                }
            }
        }
    }
}

impl<'a> FirstRules<'a> {
    fn add(&mut self, index: usize, rule: &'a Rule, matches: Match) {
        let is_first = |old: Option<(usize, &Rule)>| old.is_none_or(|(old, _)| index < old);
        match (rule.conditions.allow, matches) {
            (_, Match::No) => {}
            (true, _) => {
                // A rule found twice may match because of a network, and match because of a name.
                let is_better = |(old, _, old_match)| (index, old_match) < (old, matches);
                if self.allow.is_none_or(is_better) {
                    self.allow = Some((index, rule, matches));
                }
            }
            (false, Match::Yes) if is_first(self.deny) => self.deny = Some((index, rule)),
            (false, Match::Maybe) if is_first(self.deny_maybe) => self.deny_maybe = Some((index, rule)),
            (false, _) => {}
        }
    }

    fn is_final(&self) -> bool {
        self.deny.is_some() || self.allow.is_some()
    }
}
