//! Parses random text as rules, and evaluates requests with them. Parsing must not panic, and an error must have a
//! text. The decision must not depend on comments and spaces, and a decision without all facts must be the final one.

#![no_main]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use libfuzzer_sys::fuzz_target;
use s5::policy::rules::{AccessRequest, Decision, Identity, Route, Rules, parse_rules};
use s5::proto::{Command, HostName, Method, ProtectionLevel};

fuzz_target!(|text: &str| {
    let hops = ["hop".to_owned()];
    let rules = match parse_rules(text, "file", &hops) {
        Ok(rules) => rules,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let spaced: String = text.lines().map(|line| format!("  {line}  # comment\n")).collect();
    let again = parse_rules(spaced, "file", &hops).expect("comments change nothing");
    let (rules, again) = (Rules::new(rules, Route::default()), Rules::new(again, Route::default()));
    let name: HostName = "name.example".parse().expect("valid name");
    let ips: [IpAddr; 3] =
        [Ipv4Addr::LOCALHOST.into(), Ipv4Addr::new(198, 51, 100, 1).into(), Ipv6Addr::LOCALHOST.into()];
    for (ip, user) in ips.iter().flat_map(|ip| [(*ip, None), (*ip, Some(&b"alice"[..]))]) {
        let method = if user.is_some() { Method::PASSWORD } else { Method::NONE };
        let accepted = AccessRequest { client_ip: Some(ip), ..AccessRequest::default() };
        let identity = Some(Identity { method, user, level: ProtectionLevel::None });
        let target_name = user.is_some().then_some(&name);
        let command = Some(Command::Connect);
        let requested = AccessRequest { identity, command, target_name, target_port: Some(80), ..accepted };
        let resolved = AccessRequest { target_ip: Some(ip), ..requested };
        let stages = [accepted, requested, resolved].map(|request| {
            let outcome = outcome(rules.evaluate(&request, &|_| false));
            assert_eq!(outcome, self::outcome(again.evaluate(&request, &|_| false)));
            outcome
        });
        assert!(stages[2].is_some(), "undecided with all facts");
        assert!(stages.iter().flatten().all(|outcome| Some(*outcome) == stages[2]), "a decision has changed");
    }
});

/// Returns the decision; `None` if facts are missing.
fn outcome(decision: Decision<'_>) -> Option<Option<Route>> {
    match decision {
        Decision::Allow(_, route) => Some(Some(route)),
        Decision::Deny(_) => Some(None),
        Decision::Undecided(_) => None,
    }
}
