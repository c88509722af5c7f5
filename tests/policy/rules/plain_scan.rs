//! Compares the decisions of s5, which has an index of the rules, with a plain scan: all rules one after the other, at
//! each stage of a request. The rules and requests are random, and of every kind.

use std::cell::RefCell;
use std::collections::BTreeSet;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};
use s5::policy::rules::{Decision, Rule as ParsedRule, Rules};

use super::early::{STAGES, check_stages, facts_at};
use super::generators::{
    ROUTES, RulesFile, any_request, any_rule, any_target_pattern, facts, host_name, is_own_listener, parse_route,
    write_rules,
};
use super::model::{self, Ip, Rule, TargetPattern};
use super::{config, label, rules_with_route};

/// Result of one condition. By their order, `min` is "and", `max` is "or".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Match {
    No,
    Maybe,
    Yes,
}

/// The facts of a request that are known at a stage.
struct Facts {
    all: model::AccessRequest,
    /// Set if the server has listeners.
    has_listeners: bool,
    has_identity: bool,
    has_command: bool,
    has_port: bool,
    name: Option<&'static str>,
    ip: Option<Ip>,
}

fn known(is_known: bool, matches: bool) -> Match {
    match (is_known, matches) {
        (false, _) => Match::Maybe,
        (true, false) => Match::No,
        (true, true) => Match::Yes,
    }
}

/// Matches a list of which one entry must match; an empty list always matches.
fn any_of<T: Copy>(list: &[T], is_known: bool, matches: impl Fn(T) -> bool) -> Match {
    known(is_known || list.is_empty(), list.is_empty() || list.iter().any(|entry| matches(*entry)))
}

impl Facts {
    fn matches(&self, rule: &Rule, route: &str) -> Match {
        let all = &self.all;
        let from = any_of(&rule.from, true, |client| model::is_from(client, all.from));
        let user = any_of(&rule.users, self.has_identity, |user| model::is_user(user, all.user));
        let method = any_of(&rule.methods, self.has_identity, |method| method == all.method);
        let command = any_of(&rule.commands, self.has_command, |command| command == all.command);
        let port = any_of(&rule.ports, self.has_port, |(low, high)| (low..=high).contains(&all.port));
        from.min(user).min(method).min(command).min(port).min(self.matches_target(rule, route))
    }

    fn matches_target(&self, rule: &Rule, route: &str) -> Match {
        match (rule.to.is_empty(), rule.allow) {
            (true, false) => Match::Yes,
            (true, true) => match self.own_listener().max(self.protected()) {
                Match::Yes => Match::No,
                Match::Maybe if self.name.is_some() && self.ip.is_none() && route != "direct" => Match::Yes,
                Match::Maybe => Match::Maybe,
                Match::No => Match::Yes,
            },
            (false, allow) => {
                rule.to.iter().map(|pattern| self.matches_pattern(*pattern, allow)).max().expect("not empty")
            }
        }
    }

    fn matches_pattern(&self, pattern: TargetPattern, allow: bool) -> Match {
        let is_known = match pattern {
            TargetPattern::Net(_) => self.ip.is_some(),
            TargetPattern::Name(_) | TargetPattern::Suffix(_) => self.name.is_some() || self.ip.is_some(),
        };
        known(is_known, model::is_to(pattern, allow, &model::AccessRequest { name: self.name, ..self.all }))
    }

    fn own_listener(&self) -> Match {
        known(self.ip.is_some() && self.has_port, self.has_listeners && model::is_own_listener(&self.all))
    }

    fn protected(&self) -> Match {
        let all = model::AccessRequest { name: self.name, ..self.all };
        // This name and this address are not protected.
        let by_name = model::is_protected(&model::AccessRequest { ip: Ip::V4(1 << 24), ..all });
        let is_local = !model::is_protected(&model::AccessRequest { name: Some("localhost"), ..all });
        known(is_local || self.ip.is_some() || by_name, model::is_protected(&all))
    }
}

/// A rule: label, whether it is an `allow`, its match and its route.
type Row = (String, bool, Match, String);

/// Matches all rules.
fn rows(rules: &[Rule], file: &RulesFile, default_route: &'static str, facts: &Facts) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for (rule, (line, text)) in rules.iter().zip(&file.lines) {
        let route = rule.via.unwrap_or(default_route);
        rows.push((
            format!("rules line {line} ({text})"),
            rule.allow,
            facts.matches(rule, route),
            with_outbound(route, rule.outbound),
        ));
    }
    if !rules.iter().any(|rule| rule.allow && !rule.from.is_empty()) {
        let matches = facts.matches(&rule_without_conditions(true), default_route);
        rows.push(("default-allow".into(), true, matches, with_outbound(default_route, None)));
    }
    let denials =
        [("own-listener", facts.own_listener()), ("protected", facts.protected()), ("default-deny", Match::Yes)];
    rows.extend(denials.map(|(label, matches)| (label.into(), false, matches, String::new())));
    rows
}

/// Returns the decision in the form of [`describe`].
fn decide(rows: &[Row]) -> String {
    let mut first_maybe = None;
    for (label, allow, matches, route) in rows {
        match (matches, allow) {
            (Match::No, _) => {}
            (Match::Maybe, false) => first_maybe = first_maybe.or(Some(label)),
            (Match::Yes, false) => return format!("deny {label}"),
            (Match::Maybe, true) => return format!("? {}", first_maybe.unwrap_or(label)),
            (Match::Yes, true) => {
                return first_maybe.map_or(format!("allow {label} {route}"), |rule| format!("? {rule}"));
            }
        }
    }
    unreachable!("the last rule matches")
}

/// Returns the routes of all rules that allow the request or may allow it.
fn routes(rows: &[Row]) -> Vec<String> {
    let mut routes: Vec<String> = Vec::new();
    for (.., route) in rows.iter().filter(|(_, allow, matches, _)| *allow && *matches > Match::No) {
        if !routes.iter().any(|known| known == route) {
            routes.push(route.clone());
        }
    }
    routes
}

fn rule_without_conditions(allow: bool) -> Rule {
    let (to, ports) = (vec![], vec![]);
    Rule {
        allow,
        from: vec![],
        users: vec![],
        methods: vec![],
        commands: vec![],
        to,
        ports,
        via: None,
        outbound: None,
        style: 0,
    }
}

/// Formats a decision of s5, with origin and text of the rule.
fn describe(decision: Decision<'_>) -> String {
    let shown = |rule: &ParsedRule| match rule.origin() {
        line if line.starts_with("rules ") => format!("{line} ({rule})"),
        _ => label(rule),
    };
    match decision {
        Decision::Allow(rule, route) => format!("allow {} {}", shown(rule), name_of(route)),
        Decision::Deny(rule) => format!("deny {}", shown(rule)),
        Decision::Undecided(rule) => format!("? {}", shown(rule)),
    }
}

/// Formats a route as [`name_of`].
fn with_outbound(via: &str, outbound: Option<&str>) -> String {
    outbound.map_or(via.into(), |outbound| format!("{via} from {outbound}"))
}

fn name_of(route: s5::policy::rules::Route) -> String {
    let via = ROUTES.iter().find(|name| parse_route(name).hop == route.hop).expect("known route");
    let ips =
        route.outbound.map(|ips| ips.into_iter().flatten().map(|ip| ip.to_string()).collect::<Vec<_>>().join(","));
    with_outbound(via, ips.as_deref())
}

/// Fails unless s5 and the scan decide alike at each stage of the request. Returns the decision with all facts.
fn compare(
    written: &[Rule],
    file: &RulesFile,
    rules: &Rules,
    route: &'static str,
    all: model::AccessRequest,
) -> Result<String, TestCaseError> {
    let name = host_name(&all);
    let complete = facts(&all, name.as_ref());
    check_stages(rules, &complete)?;
    let mut last = String::new();
    for stage in 0..STAGES {
        let request = facts_at(&complete, stage);
        let mut facts = Facts {
            has_listeners: true,
            has_identity: request.identity.is_some(),
            has_command: request.command.is_some(),
            has_port: request.target_port.is_some(),
            name: all.name.filter(|_| request.target_name.is_some()),
            ip: request.target_ip.map(|_| all.ip),
            all,
        };
        last = describe(rules.evaluate(&request, &is_own_listener));
        prop_assert_eq!(&last, &decide(&rows(written, file, route, &facts)), "at stage {}: {:?}", stage, request);
        // The routes do not depend on the listeners of the server.
        facts.has_listeners = false;
        let possible_routes: Vec<String> = rules.possible_routes(&request).into_iter().map(name_of).collect();
        prop_assert_eq!(possible_routes, routes(&rows(written, file, route, &facts)), "{:?}", request);
    }
    Ok(last)
}

/// Returns rules of which many differ only in their targets: up to four sets of conditions.
fn any_rules() -> impl Strategy<Value = Vec<Rule>> {
    let targets = prop_oneof![1 => Just(Vec::new()), 9 => vec(any_target_pattern(), 1..4)];
    let rules = vec((any::<Index>(), targets, any::<u64>()), 0..40);
    (vec(any_rule(), 1..5), rules).prop_map(|(conditions, rules)| {
        let rule =
            |(index, to, style): (Index, Vec<TargetPattern>, u64)| Rule { to, style, ..index.get(&conditions).clone() };
        rules.into_iter().map(rule).collect()
    })
}

#[test]
fn index_and_plain_scan_agree_at_each_stage() {
    let lists = prop_oneof![1 => any_rules(), 2 => vec(any_rule(), 0..8)];
    let cases = (lists, vec(any_request(), 3), select(&ROUTES[..]));
    let seen = RefCell::new(BTreeSet::new());
    let mut runner = TestRunner::new_with_rng(config(400), TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let result = runner.run(&cases, |(written, requests, route)| {
        let file = write_rules(&written);
        let rules = rules_with_route(parse_route(route), &file.text);
        prop_assert_eq!(rules.user_rules().len(), written.len());
        for request in &requests {
            let decision = compare(&written, &file, &rules, route, *request);
            let decision = decision.map_err(|error| TestCaseError::fail(format!("{error}\n{}", file.text)))?;
            let by = file.lines.iter().position(|(line, _)| decision.contains(&format!(" line {line} (")));
            // The only rule, the first, the last, or one in the middle; or the label of a built-in rule.
            let built_in = || decision.split(' ').nth(1).expect("two words").to_owned();
            let by = by.map_or_else(built_in, |i| format!("{} {}", i == 0, i + 1 == written.len()));
            seen.borrow_mut().insert((by, decision.starts_with("allow")));
        }
        Ok(())
    });
    result.unwrap_or_else(|error| panic!("{error}"));
    // User rules at four positions with both actions, and four built-in rules.
    assert_eq!(seen.borrow().len(), 4 * 2 + 4, "{seen:#?}");
}
