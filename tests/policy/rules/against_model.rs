//! Compares the decisions of s5 with those of the model, for rules and requests of every kind.

use std::collections::BTreeSet;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;
use s5::policy::rules::{self, Decision, Identity, Rules, parse_rules};
use s5::proto::{HostName, ProtectionLevel};

use super::generators::{
    CLIENTS, COMMANDS, KINDS, METHODS, ROUTES, RulesFile, any_request, any_request_of, any_rule, is_own_listener,
    parse_route, std_ip, write_rules,
};
use super::model::{AccessRequest, Answer, DecidedBy, Rule, decide, matches};
use super::{BUILT_IN, command, config, hops, method};

/// Formats the decision that the model expects: action, origin, text and route.
fn expected(answer: Answer, printed: &RulesFile) -> String {
    let (action, by, route) = match answer {
        Answer::Allow(by, route) => ("allow", by, format!("{:?}", parse_route(route))),
        Answer::Deny(by) => ("deny", by, String::new()),
    };
    let built_in = |i: usize| ("built in".to_owned(), BUILT_IN[i].0.to_owned());
    let (origin, text) = match by {
        DecidedBy::UserRule(i) => (format!("f line {}", printed.lines[i].0), printed.lines[i].1.clone()),
        DecidedBy::OwnListener => built_in(0),
        DecidedBy::Protected => built_in(1),
        DecidedBy::DefaultAllow => built_in(2),
        DecidedBy::DefaultDeny => ("built in, because an allow rule has from=".into(), BUILT_IN[3].0.into()),
    };
    format!("{action} because of {origin}: {text} {route}")
}

/// Formats the decision of s5 in the same way.
fn actual(rules: &Rules, request: &AccessRequest) -> String {
    let name = request.name.map(|name| HostName::new(name.as_bytes()).expect("valid host name"));
    let request = rules::AccessRequest {
        client_ip: request.from.map(std_ip),
        identity: Some(Identity { method: method(request.method), user: request.user, level: ProtectionLevel::None }),
        command: Some(command(request.command)),
        target_name: name.as_ref(),
        target_ip: Some(std_ip(request.ip)),
        target_port: Some(request.port),
    };
    let (action, rule, route) = match rules.evaluate(&request, &is_own_listener) {
        Decision::Allow(rule, route) => ("allow", rule, format!("{route:?}")),
        Decision::Deny(rule) => ("deny", rule, String::new()),
        Decision::Undecided(rule) => ("undecided", rule, String::new()),
    };
    format!("{action} because of {}: {rule} {route}", rule.origin())
}

/// Fails unless s5 and the model decide the requests alike. Returns the decisions.
fn compare(written: &[Rule], route: &'static str, requests: &[AccessRequest]) -> Result<Vec<Answer>, TestCaseError> {
    let printed = write_rules(written);
    let parsed = parse_rules(&printed.text, "f", &hops());
    let parsed = parsed.map_err(|error| TestCaseError::fail(format!("{error}\n{}", printed.text)))?;
    prop_assert_eq!(parsed.len(), written.len());
    let rules = Rules::new(parsed, parse_route(route));
    let mut answers = Vec::new();
    for request in requests {
        let answer = decide(written, route, request);
        prop_assert_eq!(actual(&rules, request), expected(answer, &printed), "{}\n{:?}", printed.text, request);
        answers.push(answer);
    }
    Ok(answers)
}

proptest! {
    #![proptest_config(config(3000))]

    #[test]
    fn random_rules_and_requests_agree_with_model(
        written in vec(any_rule(), 0..8),
        requests in vec(any_request(), 6),
        route in select(&ROUTES[..]),
    ) {
        compare(&written, route, &requests)?;
    }
}

/// Position of the deciding rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Position {
    First,
    Middle,
    Last,
    BuiltIn,
}

const POSITIONS: [Position; 4] = [Position::First, Position::Middle, Position::Last, Position::BuiltIn];

fn position(by: DecidedBy, written: usize) -> Position {
    match by {
        DecidedBy::UserRule(0) => Position::First,
        DecidedBy::UserRule(i) if i + 1 == written => Position::Last,
        DecidedBy::UserRule(_) => Position::Middle,
        _ => Position::BuiltIn,
    }
}

/// Returns the next suitable rule of the pool, starting after the previous one.
fn next<'a>(pool: &'a [Rule], at: &mut usize, is_suitable: impl Fn(&Rule) -> bool) -> &'a Rule {
    for _ in 0..pool.len() {
        *at = (*at + 1) % pool.len();
        if is_suitable(&pool[*at]) {
            return &pool[*at];
        }
    }
    panic!("no suitable rule in the pool");
}

/// Returns rules from the pool. The rule at `position` is the first that matches the request, and has this action.
fn rules_with(pool: &[Rule], at: &mut usize, position: Position, allow: bool, request: &AccessRequest) -> Vec<Rule> {
    let length = 3 + *at % 3;
    let index = match position {
        Position::First => 0,
        Position::Middle => 1 + *at % (length - 2),
        Position::Last => length - 1,
        Position::BuiltIn => length,
    };
    let mut rules = Vec::new();
    for i in 0..length {
        let rule = next(pool, at, |rule| match i.cmp(&index) {
            std::cmp::Ordering::Less => !matches(rule, request),
            std::cmp::Ordering::Equal => matches(rule, request) && rule.allow == allow,
            std::cmp::Ordering::Greater => true,
        });
        rules.push(rule.clone());
    }
    rules
}

#[test]
fn every_method_command_address_kind_and_rule_position_agrees_with_model() {
    let mut runner = TestRunner::deterministic();
    let pool = vec(any_rule(), 1500).new_tree(&mut runner).expect("rules generated").current();
    let (mut at, mut seen, mut built_in) = (0, BTreeSet::new(), BTreeSet::new());
    for (method, command, kind) in METHODS.iter().flat_map(|method| {
        COMMANDS.iter().flat_map(move |command| KINDS.iter().map(move |kind| (*method, *command, *kind)))
    }) {
        for (client, clients) in CLIENTS.into_iter().enumerate() {
            for is_named in [false, true] {
                let from = select(clients).prop_map(Some).boxed();
                let requests = any_request_of(from, kind, method, command, is_named);
                for (wanted, allow) in POSITIONS.into_iter().flat_map(|wanted| [(wanted, false), (wanted, true)]) {
                    let request = requests.new_tree(&mut runner).expect("request generated").current();
                    let written = rules_with(&pool, &mut at, wanted, allow, &request);
                    let answers =
                        compare(&written, ROUTES[at % 3], &[request]).unwrap_or_else(|error| panic!("{error}"));
                    let (is_allowed, by) = match answers[0] {
                        Answer::Allow(by, _) => (true, by),
                        Answer::Deny(by) => (false, by),
                    };
                    if wanted == Position::BuiltIn {
                        built_in.insert(by);
                    }
                    assert!(wanted == Position::BuiltIn || is_allowed == allow, "{answers:?}");
                    let action = wanted == Position::BuiltIn || is_allowed;
                    seen.insert((method, command, kind, client, is_named, position(by, written.len()), action));
                }
            }
        }
    }
    // User rules at three positions with both actions, plus the built-in rules.
    assert_eq!(seen.len(), 3 * 3 * 6 * 4 * 2 * (3 * 2 + 1));
    assert_eq!(
        built_in.into_iter().collect::<Vec<_>>(),
        [DecidedBy::OwnListener, DecidedBy::Protected, DecidedBy::DefaultAllow, DecidedBy::DefaultDeny]
    );
}
