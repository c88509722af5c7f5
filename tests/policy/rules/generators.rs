//! Generators of random rules and requests that often match, and of the many spellings of a rule.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use s5::policy::rules::{self, Identity, Route};
use s5::proto::{HostName, ProtectionLevel};

use super::model::{AccessRequest, ClientPattern, Ip, Net, OWN_LISTENERS, Rule, TargetPattern, UserPattern};
use super::{PROTECTED, UNPROTECTED, ip};

const METHODS: [&str; 3] = ["none", "password", "gssapi"];
const COMMANDS: [&str; 3] = ["connect", "bind", "udp"];

/// Client addresses: loopback and remote, IPv4 and IPv6.
const CLIENTS: &str = "127.0.0.1 127.1.2.3 127.255.255.255 ::1 192.0.2.7 192.0.3.7 10.1.2.3 126.0.0.1 0.0.0.0 \
                       2001:db8::7 fe80::7 2002:7f00:1:: ::2";
/// Target addresses besides those of [`super::PROTECTED`] and [`super::UNPROTECTED`]: near nets of the rules, and IPv6
/// addresses that contain the bits of an IPv4 address.
const TARGETS: &str = "10.255.255.255 192.0.2.80 192.0.2.1 192.0.2.129 ::7f00:1 64:ff9b::1:0:0 2001:1::80ff:fffe \
                       2001:db8::50 2001:db8:ffff:: 2001:db9::";
const NAMES: &str = "example.org EXAMPLE.Org example.org. www.example.org a.B.example.org notexample.org \
                     example.org.example.com example.com org org. localhost LOCALHOST. bücher.example \
                     xn--bcher-KVA.example";
/// Names in rules. Some get a final dot when they are written.
const RULE_NAMES: &str = "example.org EXAMPLE.org www.example.org b.example.org example.com org localhost \
                          xn--Bcher-kva.example example";
const USERS: [&[u8]; 13] = [
    b"alice",
    b"Alice",
    b"bob",
    b"alice@example.org",
    b"bob@example.org",
    b"bob@example.com",
    b"@example.org",
    b"bob.example.org",
    b"*",
    b"a,b =#%41",
    b"\xff\xfe",
    "zoë".as_bytes(),
    b"x@*%@y",
];
const REALMS: [&[u8]; 4] = [b"example.org", b"example.com", b"*%@y", b"y"];
const PORTS: [u16; 10] = [1, 22, 79, 80, 81, 443, 1079, 1080, 1081, 65535];
const PREFIXES: [u32; 17] = [0, 1, 3, 4, 7, 8, 10, 16, 24, 31, 32, 48, 64, 96, 97, 127, 128];
pub const ROUTES: [&str; 3] = ["direct", "a", "b"];
const OUTBOUND: [&str; 3] = ["192.0.2.1", "2001:db8::1", "192.0.2.1,2001:db8::1"];

pub fn std_ip(ip: Ip) -> IpAddr {
    match ip {
        Ip::V4(ip) => Ipv4Addr::from(ip).into(),
        Ip::V6(ip) => Ipv6Addr::from(ip).into(),
    }
}

fn model_ip(ip: IpAddr) -> Ip {
    match ip {
        IpAddr::V4(ip) => Ip::V4(ip.into()),
        IpAddr::V6(ip) => Ip::V6(ip.into()),
    }
}

/// Selects one of the words of a text.
fn any_word(text: &'static str) -> impl Strategy<Value = &'static str> {
    select(text.split_whitespace().collect::<Vec<_>>())
}

pub fn is_own_listener(to: SocketAddr) -> bool {
    OWN_LISTENERS.iter().any(|(ip, port)| SocketAddr::new(std_ip(*ip), *port) == to)
}

/// Returns one of the listed addresses of a family.
fn any_listed(is_ipv4: bool) -> impl Strategy<Value = Ip> {
    let all = [TARGETS, PROTECTED, UNPROTECTED].into_iter().flat_map(str::split_whitespace).map(ip);
    select(all.filter(|ip| ip.is_ipv4() == is_ipv4).map(model_ip).collect::<Vec<_>>())
}

fn any_v4() -> BoxedStrategy<u32> {
    let listed = any_listed(true).prop_map(|ip| if let Ip::V4(ip) = ip { ip } else { unreachable!("IPv4 is listed") });
    prop_oneof![9 => listed, 1 => any::<u32>()].boxed()
}

/// Returns a net that contains one of the addresses, so that its prefix length matters.
fn any_net(addresses: BoxedStrategy<Ip>) -> impl Strategy<Value = Net> {
    (addresses, select(&PREFIXES[..])).prop_map(|(ip, bits)| match ip {
        Ip::V4(ip) => v4_net(ip, bits),
        // Rules require IPv4 notation for nets of IPv4-mapped addresses.
        Ip::V6(ip) if ip >> 32 == 0xffff && bits >= 80 => {
            v4_net(u32::try_from(ip & 0xffff_ffff).expect("32 bits suffice"), bits.saturating_sub(96))
        }
        Ip::V6(ip) => Net::V6(ip.checked_shr(128 - bits).unwrap_or(0).checked_shl(128 - bits).unwrap_or(0), bits),
    })
}

fn v4_net(ip: u32, bits: u32) -> Net {
    let bits = bits.min(32);
    Net::V4(ip.checked_shr(32 - bits).unwrap_or(0).checked_shl(32 - bits).unwrap_or(0), bits)
}

fn any_client() -> BoxedStrategy<Ip> {
    any_word(CLIENTS).prop_map(|text| model_ip(ip(text))).boxed()
}

/// Returns addresses of both families, and IPv6 addresses that embed an IPv4 address.
fn any_target() -> BoxedStrategy<Ip> {
    let embedded = |form: fn(u128, u128, u128) -> u128| {
        let parts = (any_v4(), any_v4(), any::<u64>());
        parts.prop_map(move |(ip, server, rest)| Ip::V6(form(ip.into(), server.into(), rest.into())))
    };
    prop_oneof![
        any_v4().prop_map(Ip::V4),
        prop_oneof![9 => any_listed(false), 1 => any::<u128>().prop_map(Ip::V6)],
        // IPv4-mapped, NAT64, local NAT64, 6to4, Teredo.
        embedded(|ip, _, _| 0xffff << 32 | ip),
        embedded(|ip, _, _| 0x0064_ff9b << 96 | ip),
        embedded(|ip, _, rest| 0x0064_ff9b_0001 << 80 | rest >> 16 << 32 | ip),
        embedded(|ip, _, rest| 0x2002 << 112 | ip << 80 | rest),
        embedded(|ip, server, rest| 0x2001 << 112 | server << 64 | rest >> 32 << 32 | (0xffff_ffff - ip)),
    ]
    .boxed()
}

pub fn any_target_pattern() -> impl Strategy<Value = TargetPattern> {
    prop_oneof![
        4 => any_net(any_target()).prop_map(TargetPattern::Net),
        1 => any_word(RULE_NAMES).prop_map(TargetPattern::Name),
        2 => any_word(RULE_NAMES).prop_map(TargetPattern::Suffix),
    ]
}

fn any_ports() -> impl Strategy<Value = (u16, u16)> {
    let port = || select(&PORTS[..]);
    (port(), port(), any::<bool>()).prop_map(|(a, b, is_one)| if is_one { (a, a) } else { (a.min(b), a.max(b)) })
}

/// Returns a list, which is empty in most cases.
fn up_to_three<S: Strategy>(one: S) -> impl Strategy<Value = Vec<S::Value>>
where
    S::Value: Clone,
{
    prop_oneof![3 => Just(Vec::new()), 2 => vec(one, 1..4)]
}

fn subset(all: &'static [&'static str]) -> impl Strategy<Value = Vec<&'static str>> {
    prop_oneof![3 => Just(Vec::new()), 2 => subsequence(all, 1..=all.len())]
}

pub fn any_rule() -> impl Strategy<Value = Rule> {
    let source = prop_oneof![
        Just(ClientPattern::Loopback),
        Just(ClientPattern::Remote),
        any_net(any_client()).prop_map(ClientPattern::Net),
        any_net(any_client()).prop_map(ClientPattern::Net),
    ];
    let user = prop_oneof![
        1 => Just(UserPattern::Any),
        3 => select(&USERS[..]).prop_map(UserPattern::Named),
        2 => select(&REALMS[..]).prop_map(UserPattern::Realm),
    ];
    let route = (option::of(select(&ROUTES[..])), option::weighted(0.2, select(&OUTBOUND[..])));
    let client = (up_to_three(source), up_to_three(user), subset(&METHODS), subset(&COMMANDS));
    let target = (up_to_three(any_target_pattern()), up_to_three(any_ports()), route);
    (any::<bool>(), client, target, any::<u64>()).prop_map(|(allow, client, target, style)| {
        let ((from, users, methods, commands), (to, ports, route)) = (client, target);
        let (via, outbound) = if allow { route } else { (None, None) };
        Rule { allow, from, users, methods, commands, to, ports, via, outbound, style }
    })
}

pub fn any_request() -> impl Strategy<Value = AccessRequest> {
    let from = prop_oneof![19 => any_client().prop_map(Some), 1 => Just(None)];
    let client = (from, select(&METHODS[..]), select(&USERS[..]), select(&COMMANDS[..]));
    let port = prop_oneof![8 => select(&PORTS[..]), 2 => Just(1080), 1 => Just(0), 1 => any::<u16>()];
    let own = select(&OWN_LISTENERS[..]).prop_map(|(ip, _)| ip);
    let target = (option::of(any_word(NAMES)), prop_oneof![8 => any_target(), 1 => own], port);
    (client, target).prop_map(|((from, method, user, command), (name, ip, port))| {
        let user = (method != "none").then_some(user);
        AccessRequest { from, method, user, command, name, ip, port }
    })
}

pub fn host_name(request: &AccessRequest) -> Option<HostName> {
    request.name.map(|name| HostName::new(name.as_bytes()).expect("valid host name"))
}

/// Returns the request as s5 sees it. `name` is its [`host_name`].
pub fn facts<'a>(request: &AccessRequest, name: Option<&'a HostName>) -> rules::AccessRequest<'a> {
    let (method, level) = (request.method.parse().expect("valid method"), ProtectionLevel::None);
    rules::AccessRequest {
        client_ip: request.from.map(std_ip),
        identity: Some(Identity { method, user: request.user, level }),
        command: Some(request.command.parse().expect("valid command")),
        target_name: name,
        target_ip: Some(std_ip(request.ip)),
        target_port: Some(request.port),
    }
}

pub fn parse_route(route: &str) -> Route {
    match route {
        "direct" => Route::default(),
        hop => super::through_hop(super::hops().iter().position(|name| name == hop).expect("known hop")),
    }
}

/// A rules file.
pub struct RulesFile {
    pub text: String,
    /// Line number and displayed text of each rule.
    pub lines: Vec<(usize, String)>,
}

pub fn write_rules(rules: &[Rule]) -> RulesFile {
    let (mut text, mut lines) = (String::new(), Vec::new());
    for rule in rules {
        text += ["", "", "", "# deny\n", "\n", " \t\r\n", "", ""][pick(rule.style, 0, 8)];
        let shown = words(rule).join(" ");
        lines.push((text.matches('\n').count() + 1, shown));
        let blank = [" ", " ", " ", "  ", "\t"][pick(rule.style, 3, 5)];
        text += &words(rule).join(blank);
        text += ["\n", "\n", "\r\n", " # why port=1\n", " \n"][pick(rule.style, 6, 5)];
    }
    RulesFile { text, lines }
}

/// Selects one of `choices` by the bits of the style from `bit` on.
fn pick(style: u64, bit: u32, choices: usize) -> usize {
    usize::from(style.rotate_right(bit).to_le_bytes()[0]) % choices
}

fn words(rule: &Rule) -> Vec<String> {
    let style = rule.style;
    let ports = |(low, high): (u16, u16)| match low == high && style & 1 == 0 {
        true => low.to_string(),
        false => format!("{low}-{high}"),
    };
    let mut words = vec![
        ("from", list(&rule.from, |from| client(from, style))),
        ("user", list(&rule.users, |named| user(named, style))),
        ("method", rule.methods.join(",")),
        ("command", rule.commands.join(",")),
        ("to", list(&rule.to, |to| target(to, style))),
        ("port", list(&rule.ports, ports)),
        ("via", rule.via.unwrap_or_default().to_owned()),
        ("outbound", rule.outbound.unwrap_or_default().to_owned()),
    ];
    words.retain(|(_, value)| !value.is_empty());
    let conditions = words.len().max(1);
    words.rotate_left(pick(style, 9, conditions));
    if style & 2 != 0 {
        words.reverse();
    }
    let action = if rule.allow { "allow" } else { "deny" };
    let conditions = words.into_iter().map(|(key, value)| format!("{key}={value}"));
    [action.to_owned()].into_iter().chain(conditions).collect()
}

fn list<T: Copy>(items: &[T], print: impl Fn(T) -> String) -> String {
    items.iter().map(|item| print(*item)).collect::<Vec<_>>().join(",")
}

fn client(pattern: ClientPattern, style: u64) -> String {
    match pattern {
        ClientPattern::Loopback => "loopback".into(),
        ClientPattern::Remote => "remote".into(),
        ClientPattern::Net(of) => net(of, style),
    }
}

fn user(user: UserPattern, style: u64) -> String {
    match user {
        UserPattern::Any => "*".into(),
        UserPattern::Named(name) => percent_encode(name, style),
        UserPattern::Realm(realm) => format!("*@{}", percent_encode(realm, style)),
    }
}

/// Percent-encodes special characters always, and other characters depending on the style.
fn percent_encode(bytes: &[u8], style: u64) -> String {
    let mut text = String::new();
    for byte in bytes {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'.' | b'@' if style & 4 == 0 => text.push(char::from(*byte)),
            _ if style & 8 == 0 => write!(text, "%{byte:02x}").expect("formatted"),
            _ => write!(text, "%{byte:02X}").expect("formatted"),
        }
    }
    text
}

fn target(pattern: TargetPattern, style: u64) -> String {
    let dot = if style & 16 == 0 { "" } else { "." };
    let in_case = |name: &str| if style & 32 == 0 { name.to_owned() } else { name.to_uppercase() };
    match pattern {
        TargetPattern::Name(name) => in_case(name) + dot,
        TargetPattern::Suffix(suffix) => format!(".{}{dot}", in_case(suffix)),
        TargetPattern::Net(of) => net(of, style),
    }
}

fn net(net: Net, style: u64) -> String {
    match net {
        Net::V4(ip, 32) if style & 1 == 0 => Ipv4Addr::from(ip).to_string(),
        Net::V4(ip, bits) => format!("{}/{bits}", Ipv4Addr::from(ip)),
        Net::V6(ip, 128) if style & 1 == 0 && style & 64 == 0 => format!("[{}]", v6(ip, style)),
        Net::V6(ip, 128) if style & 1 == 0 => v6(ip, style),
        Net::V6(ip, bits) => format!("{}/{bits}", v6(ip, style)),
    }
}

fn v6(ip: u128, style: u64) -> String {
    if style & 128 == 0 {
        return Ipv6Addr::from(ip).to_string();
    }
    let groups = (0..8).map(|group| format!("{:X}", ip >> (112 - 16 * group) & 0xffff));
    groups.collect::<Vec<_>>().join(":")
}
