//! Rules: syntax, built-in rules, early decisions, and random rules compared with a simple model.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use proptest::prelude::*;
use s5::policy::rules::{AccessRequest, Decision, Identity, Route, Rule, Rules, parse_rules};
use s5::proto::{HostName, ProtectionLevel};

mod built_in;
mod early;
mod generators;
mod long_lists;
mod model;
mod plain_scan;
mod readme;
mod text;

/// Listener of the server in [`evaluate`].
const OWN_LISTENER: &str = "192.0.2.80:1080";

/// Text of the built-in rules, each with its label in these tests.
const BUILT_IN: [(&str, &str); 4] = [
    ("deny to=(listeners of this server)", "own-listener"),
    (
        "deny from=remote to=.localhost,0.0.0.0/8,127.0.0.0/8,169.254.0.0/16,224.0.0.0/4,255.255.255.255,\
         ::,::1,fd00:ec2::254,fe80::/10,ff00::/8",
        "protected",
    ),
    ("allow", "default-allow"),
    ("deny", "default-deny"),
];

/// This host, link-local, cloud metadata, unspecified, multicast, broadcast: first and last address of each range.
const PROTECTED: &str = "0.0.0.0 0.255.255.255 127.0.0.0 127.0.0.1 127.0.0.53 127.255.255.255 169.254.0.0 \
                         169.254.169.254 169.254.255.255 224.0.0.0 224.0.0.251 239.255.255.255 255.255.255.255 \
                         :: ::1 fd00:ec2::254 fe80:: fe80::1 febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff ff00:: ff02::1 \
                         ff0e::1 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff";
/// Addresses just outside of the protected ranges, private addresses, and IPv6 addresses that resemble those that embed
/// an IPv4 address.
const UNPROTECTED: &str = "1.0.0.0 126.255.255.255 128.0.0.0 169.253.255.255 169.255.0.0 223.255.255.255 240.0.0.0 \
                           255.255.255.254 198.51.100.1 8.8.8.8 10.0.0.1 172.16.0.1 192.168.0.1 100.100.100.200 ::2 \
                           fd00:ec2::253 fd00:ec2::255 fe7f:ffff:ffff:ffff:ffff:ffff:ffff:ffff fec0:: fe00::1 \
                           feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 2001:db8::1 2606:4700::1 2001:1:7f00:1:: \
                           2003:7f00:1:: 64:ff9b:2::7f00:1 ::fffe:7f00:1";

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { failure_persistence: None, cases, ..ProptestConfig::default() }
}

fn hops() -> [String; 2] {
    ["a".into(), "b".into()]
}

/// The route through the hop with this index.
fn through_hop(index: usize) -> Route {
    Route { hop: Some(index), outbound: None }
}

/// Parses rules. Rules without `via=` use `route`.
fn rules_with_route(route: Route, text: &str) -> Rules {
    let rules = parse_rules(text, "rules", &hops()).unwrap_or_else(|error| panic!("{error}: {text}"));
    Rules::new(rules, route)
}

fn rules(text: &str) -> Rules {
    rules_with_route(Route::default(), text)
}

/// Returns the line of a user rule, or the label of a built-in rule.
fn label(rule: &Rule) -> String {
    let (origin, text) = (rule.origin(), rule.to_string());
    if let Some(line) = origin.strip_prefix("rules ") {
        return line.into();
    }
    assert!(origin.starts_with("built in"), "{text}: {origin}");
    let found = BUILT_IN.iter().find(|(shown, _)| *shown == text);
    found.unwrap_or_else(|| panic!("unknown built-in rule: {text}")).1.into()
}

/// Formats action, rule and hop, such as `allow line 1`, `deny protected`, `? line 2` or `allow default-allow a`.
fn describe(decision: Decision<'_>) -> String {
    match decision {
        Decision::Allow(rule, Route { hop: None, .. }) => format!("allow {}", label(rule)),
        Decision::Allow(rule, Route { hop: Some(hop), .. }) => format!("allow {} {}", label(rule), hops()[hop]),
        Decision::Deny(rule) => format!("deny {}", label(rule)),
        Decision::Undecided(rule) => format!("? {}", label(rule)),
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap_or_else(|_| panic!("invalid address {text}"))
}

/// Evaluates a request with these facts, such as `from=192.0.2.7`. A later fact replaces an earlier one with the same
/// key. A fact with an empty value is unknown.
fn evaluate(rules: &Rules, facts: &str) -> String {
    let facts: Vec<_> = facts.split_whitespace().map(|word| word.split_once('=').expect("key=value")).collect();
    let is_key = |key| ["from", "method", "user", "command", "name", "ip", "port"].contains(&key);
    assert!(facts.iter().all(|(key, _)| is_key(key)), "{facts:?}");
    let fact = |key: &str| {
        let last = facts.iter().rfind(|(word, _)| *word == key).map(|(_, value)| *value);
        last.filter(|value| !value.is_empty())
    };
    let name = fact("name").map(|name| HostName::new(name.as_bytes()).expect("valid host name"));
    let user = fact("user").map(str::as_bytes);
    let request = AccessRequest {
        client_ip: fact("from").map(ip),
        identity: fact("method").map(|name| Identity {
            method: name.parse().expect("valid method"),
            user,
            level: ProtectionLevel::None,
        }),
        command: fact("command").map(|name| name.parse().expect("valid command")),
        target_name: name.as_ref(),
        target_ip: fact("ip").map(ip),
        target_port: fact("port").map(|port| port.parse().expect("valid port")),
    };
    let own_listener: SocketAddr = OWN_LISTENER.parse().expect("valid address");
    describe(rules.evaluate(&request, &|to| to == own_listener))
}

/// Returns an IPv4 address and the five IPv6 addresses that embed it: IPv4-mapped, NAT64, 6to4, Teredo and local NAT64.
fn embedded_addrs(ip: Ipv4Addr) -> [IpAddr; 6] {
    let [a, b, c, d] = ip.octets();
    let (high, low) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
    [
        ip.into(),
        Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, high, low).into(),
        Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, high, low).into(),
        Ipv6Addr::new(0x2002, high, low, 0, 0, 0, 0, 1).into(),
        Ipv6Addr::new(0x2001, 0, 0xc612, 0x0001, 0, 0x1234, !high, !low).into(),
        Ipv6Addr::new(0x64, 0xff9b, 1, 0xabcd, 0, 0x5678, high, low).into(),
    ]
}
