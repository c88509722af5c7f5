//! Decisions before all facts are known: at accept, after the login, at a request by name. Later facts do not change
//! them. `plain_scan.rs` compares more of them, and the possible routes.

use std::net::SocketAddr;

use proptest::prelude::*;
use s5::policy::rules::{AccessRequest, Decision, Route, Rules};

use super::generators::{is_own_listener, parse_route};
use super::{describe, evaluate, rules, rules_with_route, through_hop};

/// Facts that are known after the login.
const LOGGED_IN: &str = "method=password user=alice";
/// Facts that are known at a request by name.
const BY_NAME: &str = "method=password user=alice command=connect port=80 name=www.example.org";
const BY_ADDRESS: &str = "ip=198.51.100.1 port=80";

#[test]
fn request_is_denied_as_soon_as_no_later_fact_can_allow_it() {
    // Rules, facts, decision. "?" means undecided because of any rule.
    let table = [
        // At accept: the address of the client.
        ("", "from=192.0.2.7", "?"),
        ("deny", "from=192.0.2.7", "deny line 1"),
        ("deny from=192.0.2.0/24", "from=192.0.2.7", "deny line 1"),
        ("deny from=192.0.2.0/24", "from=192.0.3.7", "?"),
        ("allow from=10.0.0.0/8", "from=192.0.2.7", "deny default-deny"),
        ("allow from=10.0.0.0/8", "from=10.1.2.3", "? line 1"),
        ("allow from=10.0.0.0/8 user=alice\nallow from=192.0.2.0/24", "from=198.51.100.7", "deny default-deny"),
        ("deny user=bob\ndeny from=192.0.2.7", "from=192.0.2.7", "deny line 2"),
        ("allow user=bob\ndeny from=192.0.2.7", "from=192.0.2.7", "? line 1"),
        ("allow from=127.0.0.1 user=bob\ndeny from=192.0.2.7", "from=192.0.2.7", "deny line 2"),
        ("deny to=10.0.0.0/8", "from=192.0.2.7", "?"),
        ("allow to=example.org\ndeny", "from=192.0.2.7", "? line 1"),
        // After the login.
        ("deny user=alice", LOGGED_IN, "deny line 1"),
        ("deny user=bob", LOGGED_IN, "?"),
        ("deny user=*", LOGGED_IN, "deny line 1"),
        ("deny user=*", "method=none", "?"),
        ("deny method=none", "method=none", "deny line 1"),
        ("allow user=bob\ndeny", "", "? line 1"),
        ("allow user=bob\ndeny", LOGGED_IN, "deny line 2"),
        ("allow user=bob\ndeny", "method=password user=bob", "? line 1"),
        ("allow from=10.0.0.0/8 user=bob", "from=10.1.2.3", "? line 1"),
        ("allow from=10.0.0.0/8 user=bob", "from=10.1.2.3 method=password user=alice", "deny default-deny"),
        ("deny port=25\ndeny user=alice", LOGGED_IN, "deny line 2"),
        ("allow port=25\ndeny user=alice", LOGGED_IN, "? line 1"),
        // At a request by name, before the name is resolved.
        ("deny to=.example.org", BY_NAME, "deny line 1"),
        ("deny to=example.org", BY_NAME, "?"),
        ("deny port=80", BY_NAME, "deny line 1"),
        ("deny to=10.0.0.0/8\ndeny to=.org", BY_NAME, "deny line 2"),
        ("allow to=10.0.0.0/8\ndeny to=.org", BY_NAME, "? line 1"),
        ("allow to=.example.net\ndeny", BY_NAME, "deny line 2"),
        ("allow", BY_NAME, "? line 1"),
        ("", BY_NAME, "? default-allow"),
        ("deny to=10.0.0.0/8", BY_NAME, "? line 1"),
        ("deny to=10.0.0.0/8\nallow to=192.0.2.0/24", BY_NAME, "? line 1"),
        ("deny user=bob\nallow user=alice\ndeny", "from=192.0.2.7", "? line 1"),
        // At a request by address. Conditions of the client can be unknown, for example in a check of the rules.
        ("", BY_ADDRESS, "allow default-allow"),
        ("", "from=192.0.2.7 ip=198.51.100.1", "?"),
        ("deny to=198.51.100.1", "ip=198.51.100.1", "deny line 1"),
        ("deny to=example.org", BY_ADDRESS, "allow default-allow"),
        ("allow user=alice", BY_ADDRESS, "? line 1"),
        ("deny user=alice", BY_ADDRESS, "? line 1"),
        ("deny user=alice command=bind", "command=connect ip=198.51.100.1 port=80", "allow default-allow"),
    ];
    for (text, facts, expected) in table {
        let answer = evaluate(&rules(text), facts);
        let is_open = expected == "?" && answer.starts_with("? ");
        assert!(is_open || answer == expected, "{text:?} with {facts:?}: {answer} instead of {expected}");
    }
}

#[test]
fn name_is_allowed_before_resolution_if_rule_names_it_or_hop_resolves_it() {
    let (direct, hop) = (Route::default(), through_hop(1));
    let table = [
        // The rule names it, and no rule with an address precedes.
        (direct, "allow to=.example.org", "allow line 1"),
        (direct, "allow to=.example.org,10.0.0.0/8", "allow line 1"),
        (direct, "deny to=.example.com\nallow to=www.example.org", "allow line 2"),
        (direct, "deny to=10.0.0.0/8 port=22\nallow to=www.example.org", "allow line 2"),
        (direct, "deny to=10.0.0.0/8\nallow to=www.example.org", "? line 1"),
        (direct, "allow to=10.0.0.0/8\nallow to=www.example.org", "? line 1"),
        // A hop resolves it, and no rule with an address precedes.
        (direct, "allow via=a", "allow line 1 a"),
        (hop, "allow", "allow line 1 b"),
        (direct, "allow", "? line 1"),
        (hop, "allow via=direct", "? line 1"),
        (direct, "allow from=remote,loopback user=* via=a", "allow line 1 a"),
        (direct, "deny to=.example.org\nallow via=a", "deny line 1"),
        (direct, "deny to=10.0.0.0/8\nallow via=a", "? line 1"),
        (direct, "deny port=22 to=10.0.0.0/8\nallow via=a", "allow line 2 a"),
        (direct, "allow port=22\nallow via=a", "allow line 2 a"),
        (hop, "", "allow default-allow b"),
        (hop, "deny to=.example.com", "allow default-allow b"),
        (hop, "allow user=bob", "allow default-allow b"),
    ];
    for (route, text, expected) in table {
        for from in ["192.0.2.7", "::1"] {
            let answer = evaluate(&rules_with_route(route, text), &format!("from={from} {BY_NAME}"));
            assert_eq!(answer, expected, "{text:?} from {from} with {route:?}");
        }
    }
}

#[test]
fn protected_address_is_denied_through_hop_too() {
    for (from, expected) in [("192.0.2.7", "deny protected"), ("::1", "allow line 1 a")] {
        assert_eq!(evaluate(&rules("allow via=a"), &format!("from={from} ip=127.0.0.1 port=80")), expected);
    }
    assert_eq!(evaluate(&rules("allow via=a to=127.0.0.1"), "from=192.0.2.7 ip=127.0.0.1 port=80"), "allow line 1 a");
}

// Known part of the target.
const NO_TARGET: usize = 0;
const NAME: usize = 1;
const ADDRESS: usize = 2;
/// Login, command and port are each known or not. The target is unknown, known by name, or known by address.
pub const STAGES: usize = 8 * 3;

/// Returns the facts of a request that are known at a stage.
pub fn facts_at<'a>(all: &AccessRequest<'a>, stage: usize) -> AccessRequest<'a> {
    let (bits, target) = (stage % 8, stage / 8);
    AccessRequest {
        client_ip: all.client_ip,
        identity: all.identity.filter(|_| bits & 1 != 0),
        command: all.command.filter(|_| bits & 2 != 0),
        target_port: all.target_port.filter(|_| bits & 4 != 0),
        target_name: all.target_name.filter(|_| target >= NAME),
        target_ip: all.target_ip.filter(|_| target == ADDRESS),
    }
}

/// Returns true if all facts of `stage` are known at `other` too.
fn is_later(stage: usize, other: usize) -> bool {
    let (bits, other_bits) = (stage % 8, other % 8);
    bits & other_bits == bits && stage / 8 <= other / 8
}

/// Checks that a decision at one stage is the same at all stages with more facts.
pub fn check_stages(rules: &Rules, all: &AccessRequest<'_>) -> Result<(), TestCaseError> {
    let own_listener = |to: SocketAddr| is_own_listener(to);
    let answers: Vec<Decision<'_>> =
        (0..STAGES).map(|stage| rules.evaluate(&facts_at(all, stage), &own_listener)).collect();
    for (stage, early) in answers.iter().enumerate() {
        // If a hop resolves the name, its address never becomes known.
        let is_resolved_by_hop = match early {
            Decision::Allow(rule, Route { hop: Some(_), .. }) => {
                stage / 8 == NAME && !rule.to_string().contains(" to=")
            }
            _ => false,
        };
        for (other, late) in answers.iter().enumerate() {
            if !is_later(stage, other) || is_resolved_by_hop && other / 8 != NAME {
                continue;
            }
            match (early, late) {
                (Decision::Undecided(_), _) | (Decision::Deny(_), Decision::Deny(_)) => {}
                (Decision::Allow(..), Decision::Allow(..)) => prop_assert_eq!(describe(*early), describe(*late)),
                _ => prop_assert!(false, "{} at {stage}, {} at {other}", describe(*early), describe(*late)),
            }
            if let Decision::Allow(_, route) = late {
                let routes = rules.possible_routes(&facts_at(all, stage));
                prop_assert!(routes.contains(route), "{route:?} at {other}, {routes:?} at {stage}");
            }
        }
    }
    let last = answers.last().expect("at least one stage");
    prop_assert!(!matches!(last, Decision::Undecided(_)), "undecided with all facts");
    let by_target = [NO_TARGET, NAME, ADDRESS].map(|target| describe(answers[target * 8 + 7]));
    prop_assert!(all.target_name.is_some() || by_target[NO_TARGET] == by_target[NAME], "{:?}", by_target);
    Ok(())
}

#[test]
fn only_route_ignores_rules_after_one_that_decides_all_targets() {
    let (hop, other) = (parse_route("a"), parse_route("b"));
    for (text, route, only) in [
        ("", Route::default(), Some(Route::default())),
        ("", hop, Some(hop)),
        ("allow via=a\nallow to=.example via=b", Route::default(), Some(hop)),
        ("allow to=.example via=a", Route::default(), None),
        ("allow to=.example via=a\nallow via=b", Route::default(), None),
        ("allow to=.example via=a\nallow via=a", other, Some(hop)),
        ("allow to=.example via=a\ndeny", Route::default(), Some(hop)),
        ("allow user=alice via=a", Route::default(), None),
    ] {
        assert_eq!(rules_with_route(route, text).only_route(&AccessRequest::default()), only, "{text:?}");
    }
}
