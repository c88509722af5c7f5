//! The time of a decision does not grow with the number of rules.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use s5::policy::rules::{AccessRequest, Identity, Rules, parse_rule};
use s5::proto::{Command, HostName, Method, ProtectionLevel};

use super::{describe, ip, rules};

/// A plain scan would take 2000 times as long as with [`FEW`].
const MANY: usize = 20_000;
const FEW: usize = 10;

/// Returns rules for the number of lines.
type Lines = fn(usize) -> String;

fn joined(count: usize, line: impl Fn(usize) -> String) -> String {
    (0..count).fold(String::new(), |mut text, i| {
        writeln!(text, "{}", line(i)).expect("formatted");
        text
    })
}

fn list(count: usize, entry: impl Fn(usize) -> String) -> String {
    (0..count).map(entry).collect::<Vec<_>>().join(",")
}

fn net(i: usize) -> String {
    format!("10.{}.{}.0/24", i / 256, i % 256)
}

const LISTS: [(&str, Lines); 10] = [
    ("one name per rule", |n| joined(n, |i| format!("deny to=host{i}.blocked.test"))),
    ("names in one rule", |n| format!("deny to={}", list(n, |i| format!("host{i}.blocked.test")))),
    ("suffixes", |n| joined(n, |i| format!("deny to=.host{i}.blocked.test port=1-1000"))),
    ("networks", |n| joined(n, |i| format!("deny to={}", net(i)))),
    ("addresses in one rule", |n| format!("deny to={}", list(n, |i| format!("2001:db8::{i:x}")))),
    ("clients", |n| joined(n, |i| format!("deny from={}", net(i)))),
    ("clients and targets", |n| joined(n, |i| format!("deny from={} to=host{i}.test", net(i)))),
    ("denied users", |n| joined(n, |i| format!("deny user=user{i}"))),
    ("a target for each user", |n| joined(n, |i| format!("allow user=user{i} to=host{i}.test,{}", net(i)))),
    ("one target for all users", |n| joined(n, |i| format!("allow user=user{i} to=intranet.test")) + "deny"),
];

/// Returns the shortest time of 50 decisions about each request: other programs only make it longer.
fn fastest<T>(requests: &[AccessRequest<'_>], decide: impl Fn(&AccessRequest<'_>) -> T) -> Duration {
    let times = (0..10).map(|_| {
        let started = Instant::now();
        for request in requests.iter().cycle().take(50 * requests.len()) {
            std::hint::black_box(decide(request));
        }
        started.elapsed()
    });
    times.min().expect("several times")
}

#[test]
fn decision_takes_as_long_with_many_rules_as_with_few() {
    let names = ["www.example.org", "host9.blocked.test", "host9.test", "intranet.test"];
    let names = names.map(|name| HostName::new(name.as_bytes()).expect("valid host name"));
    let user = Identity { method: Method::PASSWORD, user: Some(b"user9"), level: ProtectionLevel::None };
    let accept = AccessRequest { client_ip: Some(ip("10.0.9.1")), ..AccessRequest::default() };
    let login =
        AccessRequest { identity: Some(user), command: Some(Command::Connect), target_port: Some(80), ..accept };
    let by_name = |name| AccessRequest { target_name: Some(name), ..login };
    let by_addr = |addr| AccessRequest { target_ip: Some(ip(addr)), ..login };
    let stages = [
        ("at accept", vec![accept]),
        ("after the login", vec![login]),
        ("by name", names.iter().map(by_name).collect()),
        ("by address", ["10.0.9.1", "198.51.100.1", "2001:db8::9", "2001:db8:1::"].map(by_addr).to_vec()),
        (
            "with all facts",
            names.iter().map(|name| AccessRequest { target_name: Some(name), ..by_addr("10.0.9.1") }).collect(),
        ),
    ];
    for (kind, lines) in LISTS {
        let [few, many] = [FEW, MANY].map(|count| rules(&lines(count)));
        for (stage, requests) in &stages {
            for request in requests {
                let [with_few, with_many] = [&few, &many].map(|rules| describe(rules.evaluate(request, &|_| false)));
                assert_eq!(with_few.split(' ').next(), with_many.split(' ').next(), "{kind} {stage}");
            }
            let time = |rules: &Rules| fastest(requests, |request| rules.evaluate(request, &|_| false));
            let is_short = |_| time(&many) < 3 * time(&few);
            assert!((0..5).any(is_short), "{kind} {stage}: a decision takes three times as long with {MANY} rules");
        }
    }
}

#[test]
fn whether_a_named_peer_needs_its_addresses_takes_as_long_with_many_targets_as_with_few() {
    let name = HostName::new(b"www.example.org").expect("valid host name");
    let request =
        [AccessRequest { command: Some(Command::Bind), target_name: Some(&name), ..AccessRequest::default() }];
    for (net, expected) in [("", false), (",192.0.2.0/24", true), (",2001:db8::1", true)] {
        let lines = |n| format!("allow to=.example.org,{}{net} port=80", list(n, |i| format!("host{i}.blocked.test")));
        let [few, many] = [FEW, MANY].map(|count| rules(&lines(count)));
        assert_eq!([&few, &many].map(|rules| rules.depends_on_address(&request[0])), [expected; 2], "{net}");
        let time = |rules: &Rules| fastest(&request, |request| rules.depends_on_address(request));
        assert!((0..5).any(|_| time(&many) < 3 * time(&few)), "{net}: it takes three times as long with {MANY} names");
    }
}

#[test]
fn message_shows_the_start_of_a_long_rule() {
    let names = list(1000, |i| format!("host{i}.blocked.test"));
    let rules = rules(&format!("deny  to={names}"));
    let rule = &rules.user_rules()[0];
    assert_eq!(rule.text(), format!("deny to={names}"));
    let shown = rule.to_string();
    assert!(shown.len() < 510 && shown.starts_with("deny to=host0.blocked.test,host1.") && shown.ends_with("..."));
}

#[test]
fn error_in_a_long_list_shows_the_wrong_entry_or_the_start_of_the_word() {
    let names = list(1000, |i| format!("host{i}.blocked.test"));
    let long = "a".repeat(256);
    let table = [
        (format!("deny to={names},a..b"), "found \"a..b\""),
        (format!("deny to={names},{long}"), "a name has at most 255 bytes"),
        (format!("deny user={names},{}", "a".repeat(1001)), "an entry is longer than 1000 bytes"),
        (format!("deny {names}"), "expected key=value"),
        (format!("{names} deny"), "expected \"allow\" or \"deny\""),
    ];
    for (line, expected) in table {
        let error = parse_rule(&line, "", &[]).expect_err("an invalid rule");
        let names_place = error.starts_with("to=: ") || error.contains("host0.blocked.test,host1.blo");
        assert!(names_place && error.contains(expected), "{error}");
        assert!(error.len() < 300, "{error}");
    }
    parse_rule(&format!("deny to={}", &long[1..]), "", &[]).expect("the longest name is valid");
}
