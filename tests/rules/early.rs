//! Answers before everything is known: at accept, after the login, at the request by name; and that they stay.

use std::net::SocketAddr;

use proptest::collection::vec;
use proptest::prelude::*;
use s5::policy::rules::{AccessRequest, Decision, Identity, Route, Rules};
use s5::proto::{HostName, ProtectionLevel};

use crate::any::{any_question, any_rule, any_way, is_home, print, std_ip};
use crate::{ask, config, ip, rules, rules_by, told};

/// Each stage knows what the ones before it knew.
const LOGIN: &str = "method=password user=alice";
const NAMED: &str = "method=password user=alice command=connect port=80 name=www.example.org";

/// "?" alone is for whichever rule.
fn check(table: &[(&str, &str, &str)]) {
    for (text, facts, expected) in table {
        let answer = ask(&rules(text), facts);
        let is_open = *expected == "?" && answer.starts_with("? ");
        assert!(is_open || answer == *expected, "{text:?}, asked {facts:?}: {answer} and not {expected}");
    }
}

#[test]
fn at_accept_a_client_is_denied_for_where_it_is_alone() {
    let table = [
        ("", "from=192.0.2.7", "?"),
        ("", "from=::1", "?"),
        ("deny", "from=192.0.2.7", "deny line 1"),
        ("deny from=192.0.2.0/24", "from=192.0.2.7", "deny line 1"),
        ("deny from=192.0.2.0/24", "from=192.0.3.7", "?"),
        ("deny from=remote", "from=2001:db8::7", "deny line 1"),
        ("allow from=10.0.0.0/8", "from=192.0.2.7", "deny otherwise"),
        ("allow from=10.0.0.0/8", "from=10.1.2.3", "? line 1"),
        ("allow from=10.0.0.0/8 to=0.0.0.0/0", "from=10.1.2.3", "? line 1"),
        ("allow from=10.0.0.0/8 user=alice\nallow from=192.0.2.0/24", "from=198.51.100.7", "deny otherwise"),
        ("deny user=bob\ndeny from=192.0.2.7", "from=192.0.2.7", "deny line 2"),
        ("allow user=bob\ndeny from=192.0.2.7", "from=192.0.2.7", "? line 1"),
        ("allow from=127.0.0.1 user=bob\ndeny from=192.0.2.7", "from=192.0.2.7", "deny line 2"),
        ("deny method=none", "from=192.0.2.7", "?"),
        ("deny command=bind", "from=192.0.2.7", "?"),
        ("deny port=25", "from=192.0.2.7", "?"),
        ("deny to=10.0.0.0/8", "from=192.0.2.7", "?"),
        ("deny to=example.org", "from=192.0.2.7", "?"),
        ("allow to=example.org\ndeny", "from=192.0.2.7", "? line 1"),
        ("allow to=192.0.2.0/24\ndeny", "from=192.0.2.7", "? line 1"),
    ];
    check(&table);
}

#[test]
fn after_the_login_a_client_is_denied_for_who_it_is() {
    let table = [
        ("deny user=alice", LOGIN, "deny line 1"),
        ("deny user=bob", LOGIN, "?"),
        ("deny user=*", LOGIN, "deny line 1"),
        ("deny user=*", "method=none", "?"),
        ("deny user=*", "", "?"),
        ("deny user=*@example.org", "method=gssapi user=a@example.org", "deny line 1"),
        ("deny method=none", "method=none", "deny line 1"),
        ("deny method=none", LOGIN, "?"),
        ("allow user=bob\ndeny", "", "? line 1"),
        ("allow user=bob\ndeny", LOGIN, "deny line 2"),
        ("allow user=bob\ndeny", "method=password user=bob", "? line 1"),
        ("allow from=10.0.0.0/8 user=bob", "from=10.1.2.3", "? line 1"),
        ("allow from=10.0.0.0/8 user=bob", "from=10.1.2.3 method=password user=alice", "deny otherwise"),
        ("deny port=25\ndeny user=alice", LOGIN, "deny line 2"),
        ("allow port=25\ndeny user=alice", LOGIN, "? line 1"),
    ];
    check(&table);
}

#[test]
fn at_the_request_a_name_command_or_port_is_denied_without_an_address() {
    let table = [
        ("", NAMED, "?"),
        ("deny to=.example.org", NAMED, "deny line 1"),
        ("deny to=www.example.org", NAMED, "deny line 1"),
        ("deny to=example.org", NAMED, "?"),
        ("deny command=connect", NAMED, "deny line 1"),
        ("deny port=80", NAMED, "deny line 1"),
        ("deny port=80 to=.org,10.0.0.0/8", NAMED, "deny line 1"),
        ("deny to=10.0.0.0/8\ndeny to=.org", NAMED, "deny line 2"),
        ("allow to=10.0.0.0/8\ndeny to=.org", NAMED, "? line 1"),
        ("allow to=10.0.0.0/8 port=22\ndeny to=.org", NAMED, "deny line 2"),
        ("deny to=10.0.0.0/8", NAMED, "?"),
        ("deny to=10.0.0.0/8\nallow", NAMED, "?"),
        ("allow to=.example.net\ndeny", NAMED, "deny line 2"),
        ("allow", NAMED, "? line 1"),
    ];
    check(&table);
}

#[test]
fn at_the_request_a_name_is_allowed_without_an_address_unless_a_rule_on_addresses_stands_before() {
    let table = [
        ("allow to=.example.org", "allow line 1"),
        ("allow to=.example.org,10.0.0.0/8", "allow line 1"),
        ("allow to=.example.org via=a", "allow line 1 a"),
        ("deny to=.example.com\nallow to=www.example.org", "allow line 2"),
        ("deny to=10.0.0.0/8 port=22\nallow to=www.example.org", "allow line 2"),
        ("deny to=10.0.0.0/8\nallow to=www.example.org", "? line 1"),
        ("deny to=10.0.0.0/8\ndeny to=::/0\nallow to=www.example.org", "? line 1"),
        ("allow to=10.0.0.0/8\nallow to=www.example.org", "? line 1"),
    ];
    for (text, expected) in table {
        for from in ["192.0.2.7", "::1"] {
            assert_eq!(ask(&rules(text), &format!("from={from} {NAMED}")), expected, "{text:?} from {from}");
        }
    }
}

#[test]
fn a_name_through_a_hop_needs_no_address_unless_a_written_rule_on_addresses_stands_before() {
    let (direct, hop) = (Route::Direct, Route::Hop(1));
    let table = [
        (direct, "allow via=a", "allow line 1 a"),
        (hop, "allow", "allow line 1 b"),
        (hop, "allow via=a", "allow line 1 a"),
        (direct, "allow", "? line 1"),
        (hop, "allow via=direct", "? line 1"),
        (direct, "allow from=remote,loopback user=* via=a", "allow line 1 a"),
        (direct, "deny to=.example.com\nallow via=a", "allow line 2 a"),
        (direct, "deny to=.example.org\nallow via=a", "deny line 1"),
        (direct, "deny to=10.0.0.0/8\nallow via=a", "? line 1"),
        (direct, "allow to=10.0.0.0/8\nallow via=a", "? line 1"),
        (direct, "deny port=22 to=10.0.0.0/8\nallow via=a", "allow line 2 a"),
        (direct, "allow\nallow via=a", "? line 1"),
        (direct, "allow port=22\nallow via=a", "allow line 2 a"),
    ];
    for (route, text, expected) in table {
        for from in ["192.0.2.7", "::1"] {
            let answer = ask(&rules_by(route, text), &format!("from={from} {NAMED}"));
            assert_eq!(answer, expected, "{text:?} from {from} with {route:?}");
        }
    }
}

#[test]
fn a_name_through_the_hop_of_all_needs_no_address_when_there_are_no_rules() {
    for text in ["", "deny port=25", "deny to=.example.com", "allow user=bob"] {
        for from in ["192.0.2.7", "::1"] {
            let answer = ask(&rules_by(Route::Hop(0), text), &format!("from={from} {NAMED}"));
            assert_eq!(answer, "allow open a", "{text:?} from {from}");
        }
    }
}

#[test]
fn what_is_not_decided_is_so_first_for_the_first_rule_in_doubt() {
    let table = [
        ("", NAMED, "? open"),
        ("deny to=10.0.0.0/8", NAMED, "? line 1"),
        ("deny to=10.0.0.0/8\nallow", NAMED, "? line 1"),
        ("deny to=10.0.0.0/8\nallow to=192.0.2.0/24", NAMED, "? line 1"),
        ("deny user=bob\nallow user=alice\ndeny", "from=192.0.2.7", "? line 1"),
    ];
    check(&table);
}

#[test]
fn an_address_through_a_hop_is_protected_as_any_other() {
    for (from, expected) in [("192.0.2.7", "deny protected"), ("::1", "allow line 1 a")] {
        assert_eq!(ask(&rules("allow via=a"), &format!("from={from} ip=127.0.0.1 port=80")), expected);
    }
    assert_eq!(ask(&rules("allow via=a to=127.0.0.1"), "from=192.0.2.7 ip=127.0.0.1 port=80"), "allow line 1 a");
}

#[test]
fn with_an_address_nothing_is_open_but_what_is_unknown_of_the_client() {
    let to = "ip=198.51.100.1 port=80";
    let table = [
        ("", to, "allow open"),
        ("", "from=192.0.2.7 ip=198.51.100.1", "?"),
        ("", "ip=198.51.100.1", "?"),
        ("deny to=198.51.100.1", "ip=198.51.100.1", "deny line 1"),
        ("deny to=example.org", to, "allow open"),
        ("allow user=alice", to, "? line 1"),
        ("deny user=alice", to, "? line 1"),
        ("deny user=alice command=bind", "command=connect ip=198.51.100.1 port=80", "allow open"),
    ];
    check(&table);
}

#[test]
fn the_ways_that_are_left_are_told_each_once() {
    let ways = |rules: &Rules, from: &str, to: Option<&str>| {
        let question = AccessRequest { client_ip: Some(ip(from)), target_ip: to.map(ip), ..AccessRequest::default() };
        rules.possible_routes(&question)
    };
    let (direct, a, b) = (Route::Direct, Route::Hop(0), Route::Hop(1));
    let text = "allow from=192.0.2.7 via=b\nallow port=22 via=a\nallow port=23 via=a\ndeny\nallow to=10.0.0.0/8";
    let table = [
        (rules(""), "::1", None, vec![direct]),
        (rules_by(a, ""), "::1", None, vec![a]),
        (rules(text), "192.0.2.7", None, vec![b, a, direct]),
        (rules(text), "192.0.2.8", None, vec![a, direct]),
        (rules(text), "192.0.2.8", Some("198.51.100.1"), vec![a]),
        (rules("allow from=::1 via=direct"), "192.0.2.7", None, vec![]),
    ];
    for (rules, from, to, expected) in table {
        assert_eq!(ways(&rules, from, to), expected, "{:?} from {from} to {to:?}", rules.user_rules());
    }
}

/// How much of where it goes is known.
const NOTHING: usize = 0;
const NAME: usize = 1;
const ADDRESS: usize = 2;
/// Login, command and port, known or not, by where to.
const STAGES: usize = 8 * 3;

/// As much of a question as is known at a stage.
fn known<'a>(all: &AccessRequest<'a>, stage: usize) -> AccessRequest<'a> {
    let (bits, place) = (stage % 8, stage / 8);
    AccessRequest {
        client_ip: all.client_ip,
        identity: all.identity.filter(|_| bits & 1 != 0),
        command: all.command.filter(|_| bits & 2 != 0),
        target_port: all.target_port.filter(|_| bits & 4 != 0),
        target_name: all.target_name.filter(|_| place >= NAME),
        target_ip: all.target_ip.filter(|_| place == ADDRESS),
    }
}

fn is_later(stage: usize, other: usize) -> bool {
    let (bits, others) = (stage % 8, other % 8);
    bits & others == bits && stage / 8 <= other / 8
}

/// Each answer that is given counts at all stages that know more.
fn check_stages(rules: &Rules, all: &AccessRequest<'_>) -> Result<(), TestCaseError> {
    let home = |to: SocketAddr| is_home(to);
    let answers: Vec<Decision<'_>> = (0..STAGES).map(|stage| rules.evaluate(&known(all, stage), &home)).collect();
    for (stage, early) in answers.iter().enumerate() {
        // A name that is a hop's to resolve is all that will be known of the place.
        let is_hops = match early {
            Decision::Allow(rule, Route::Hop(_)) => stage / 8 == NAME && !rule.to_string().contains(" to="),
            _ => false,
        };
        for (other, late) in answers.iter().enumerate() {
            if !is_later(stage, other) || is_hops && other / 8 != NAME {
                continue;
            }
            match (early, late) {
                (Decision::Undecided(_), _) | (Decision::Deny(_), Decision::Deny(_)) => {}
                (Decision::Allow(..), Decision::Allow(..)) => prop_assert_eq!(told(*early), told(*late)),
                _ => prop_assert!(false, "{} at {stage}, {} at {other}", told(*early), told(*late)),
            }
            if let Decision::Allow(_, way) = late {
                let ways = rules.possible_routes(&known(all, stage));
                prop_assert!(ways.contains(way), "{way:?} at {other}, {ways:?} at {stage}");
            }
        }
    }
    let last = answers.last().expect("the last stage");
    prop_assert!(!matches!(last, Decision::Undecided(_)), "everything is known");
    let places = [NOTHING, NAME, ADDRESS].map(|place| told(answers[place * 8 + 7]));
    prop_assert!(all.target_name.is_some() || places[NOTHING] == places[NAME], "{:?}", places);
    Ok(())
}

proptest! {
    #![proptest_config(config(1000))]

    #[test]
    fn an_early_answer_is_the_one_that_is_given_when_all_is_known(
        written in vec(any_rule(), 0..6),
        asked in vec(any_question(), 3),
        way in any_way(),
    ) {
        let text = print(&written).text;
        let rules = rules_by(way, &text);
        for plain in &asked {
            let name = plain.name.map(|name| HostName::new(name.as_bytes()).expect("a name"));
            let all = AccessRequest {
                client_ip: plain.from.map(std_ip),
                identity: Some(Identity { method: crate::method(plain.method), user: plain.user, level: ProtectionLevel::None }),
                command: Some(crate::command(plain.command)),
                target_name: name.as_ref(),
                target_ip: Some(std_ip(plain.ip)),
                target_port: Some(plain.port),
            };
            let checked = check_stages(&rules, &all);
            prop_assert!(checked.is_ok(), "{checked:?}\n{text}\n{plain:?}");
        }
    }
}
