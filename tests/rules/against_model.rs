//! THE decision table: rules and questions of every kind, judged by the crate and by the plain model.

use std::collections::BTreeSet;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;
use s5::policy::rules::{self, Decision, Identity, Rules, parse_rules};
use s5::proto::{HostName, ProtectionLevel};

use crate::generators::{
    CLIENTS, COMMANDS, KINDS, METHODS, ROUTES, RulesFile, any_request, any_request_of, any_rule, is_own_listener,
    route, std_ip, write_rules,
};
use crate::model::{AccessRequest, Answer, DecidedBy, Rule, decide, matches};
use crate::{BUILT_IN, command, config, hops, method};

/// Decision, origin, text and way, as the crate should have them.
fn expected(answer: Answer, printed: &RulesFile) -> String {
    let (action, by, way) = match answer {
        Answer::Allow(by, way) => ("allow", by, format!("{:?}", route(way))),
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
    format!("{action} because of {origin}: {text} {way}")
}

fn actual(rules: &Rules, asked: &AccessRequest) -> String {
    let name = asked.name.map(|name| HostName::new(name.as_bytes()).expect("a name"));
    let request = rules::AccessRequest {
        client_ip: asked.from.map(std_ip),
        identity: Some(Identity { method: method(asked.method), user: asked.user, level: ProtectionLevel::None }),
        command: Some(command(asked.command)),
        target_name: name.as_ref(),
        target_ip: Some(std_ip(asked.ip)),
        target_port: Some(asked.port),
    };
    let (action, rule, way) = match rules.evaluate(&request, &is_own_listener) {
        Decision::Allow(rule, way) => ("allow", rule, format!("{way:?}")),
        Decision::Deny(rule) => ("deny", rule, String::new()),
        Decision::Undecided(rule) => ("undecided", rule, String::new()),
    };
    format!("{action} because of {}: {rule} {way}", rule.origin())
}

/// Asks both; gives what the model said.
fn compare(written: &[Rule], way: &'static str, asked: &[AccessRequest]) -> Result<Vec<Answer>, TestCaseError> {
    let printed = write_rules(written);
    let parsed = parse_rules(&printed.text, "f", &hops());
    let parsed = parsed.map_err(|error| TestCaseError::fail(format!("{error}\n{}", printed.text)))?;
    prop_assert_eq!(parsed.len(), written.len());
    let rules = Rules::new(parsed, route(way));
    let mut answers = Vec::new();
    for request in asked {
        let answer = decide(written, way, request);
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
        asked in vec(any_request(), 6),
        way in select(&ROUTES[..]),
    ) {
        compare(&written, way, &asked)?;
    }
}

/// Where the rule that decides stands.
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

/// The next of the bank, from wherever the last search ended, that will do.
fn next<'a>(bank: &'a [Rule], at: &mut usize, is_suitable: impl Fn(&Rule) -> bool) -> &'a Rule {
    for _ in 0..bank.len() {
        *at = (*at + 1) % bank.len();
        if is_suitable(&bank[*at]) {
            return &bank[*at];
        }
    }
    panic!("no such rule in the bank");
}

/// Some rules, of which the one at a position is the first that holds and has this verdict.
fn rules_with(bank: &[Rule], at: &mut usize, position: Position, allow: bool, asked: &AccessRequest) -> Vec<Rule> {
    let length = 3 + *at % 3;
    let place = match position {
        Position::First => 0,
        Position::Middle => 1 + *at % (length - 2),
        Position::Last => length - 1,
        Position::BuiltIn => length,
    };
    let mut rules = Vec::new();
    for i in 0..length {
        let rule = next(bank, at, |rule| match i.cmp(&place) {
            std::cmp::Ordering::Less => !matches(rule, asked),
            std::cmp::Ordering::Equal => matches(rule, asked) && rule.allow == allow,
            std::cmp::Ordering::Greater => true,
        });
        rules.push(rule.clone());
    }
    rules
}

#[test]
fn every_method_command_address_kind_and_rule_position_agrees_with_model() {
    let mut runner = TestRunner::deterministic();
    let bank = vec(any_rule(), 1500).new_tree(&mut runner).expect("rules").current();
    let (mut at, mut seen, mut built_in) = (0, BTreeSet::new(), BTreeSet::new());
    for (method, command, kind) in METHODS.iter().flat_map(|method| {
        COMMANDS.iter().flat_map(move |command| KINDS.iter().map(move |kind| (*method, *command, *kind)))
    }) {
        for (client, clients) in CLIENTS.into_iter().enumerate() {
            for is_named in [false, true] {
                let from = select(clients).prop_map(Some).boxed();
                let requests = any_request_of(from, kind, method, command, is_named);
                for (place, allow) in POSITIONS.into_iter().flat_map(|place| [(place, false), (place, true)]) {
                    let asked = requests.new_tree(&mut runner).expect("a request").current();
                    let written = rules_with(&bank, &mut at, place, allow, &asked);
                    let answers = compare(&written, ROUTES[at % 3], &[asked]).unwrap_or_else(|error| panic!("{error}"));
                    let (is_allowed, by) = match answers[0] {
                        Answer::Allow(by, _) => (true, by),
                        Answer::Deny(by) => (false, by),
                    };
                    if place == Position::BuiltIn {
                        built_in.insert(by);
                    }
                    assert!(place == Position::BuiltIn || is_allowed == allow, "{answers:?}");
                    let wished = place == Position::BuiltIn || is_allowed;
                    seen.insert((method, command, kind, client, is_named, position(by, written.len()), wished));
                }
            }
        }
    }
    // Written rules at three positions with both verdicts, and the built-in ones.
    assert_eq!(seen.len(), 3 * 3 * 6 * 4 * 2 * (3 * 2 + 1));
    assert_eq!(
        built_in.into_iter().collect::<Vec<_>>(),
        [DecidedBy::OwnListener, DecidedBy::Protected, DecidedBy::DefaultAllow, DecidedBy::DefaultDeny]
    );
}
