//! Compares the decisions of s5 with those of the model, for random rules and requests of every kind.

use std::cell::RefCell;
use std::collections::BTreeSet;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};
use s5::policy::rules::{Decision, Rules, parse_rules};

use super::generators::{
    COMMANDS, METHODS, ROUTES, RulesFile, any_request, any_rule, facts, host_name, is_own_listener, parse_route,
    write_rules,
};
use super::model::{AccessRequest, Answer, DecidedBy, Rule, decide};
use super::{BUILT_IN, config, hops};

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
    let name = host_name(request);
    let (action, rule, route) = match rules.evaluate(&facts(request, name.as_ref()), &is_own_listener) {
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

#[test]
fn random_rules_and_requests_agree_with_model() {
    let cases = (vec(any_rule(), 0..8), vec(any_request(), 6), select(&ROUTES[..]));
    let seen = RefCell::new(BTreeSet::new());
    let result = TestRunner::new_with_rng(config(3000), TestRng::deterministic_rng(RngAlgorithm::ChaCha)).run(
        &cases,
        |(written, requests, route)| {
            for (request, answer) in requests.iter().zip(compare(&written, route, &requests)?) {
                let (is_allowed, by) = match answer {
                    Answer::Allow(by, _) => (true, by),
                    Answer::Deny(by) => (false, by),
                };
                // Position of the deciding rule: first, in the middle, last, or built in.
                let position = match by {
                    DecidedBy::UserRule(0) => "first".into(),
                    DecidedBy::UserRule(i) if i + 1 == written.len() => "last".into(),
                    DecidedBy::UserRule(_) => "middle".into(),
                    built_in => format!("{built_in:?}"),
                };
                seen.borrow_mut().insert((request.method, request.command, position, is_allowed));
            }
            Ok(())
        },
    );
    result.unwrap_or_else(|error| panic!("{error}"));
    // User rules at three positions with both actions, and four built-in rules.
    assert_eq!(seen.borrow().len(), METHODS.len() * COMMANDS.len() * (3 * 2 + 4), "{seen:#?}");
}
