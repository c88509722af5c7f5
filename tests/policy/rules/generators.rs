//! Generators of random rules and requests that often match, and of the many spellings of a rule.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use s5::policy::rules::Route;

use super::model::{AccessRequest, ClientPattern, Ip, Net, OWN_LISTENERS, Rule, TargetPattern, UserPattern};

pub const METHODS: [&str; 3] = ["none", "password", "gssapi"];
pub const COMMANDS: [&str; 3] = ["connect", "bind", "udp"];

/// Kind of target address. The last four kinds embed an IPv4 address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    V4,
    V6,
    Mapped,
    Nat64,
    SixToFour,
    Teredo,
}

pub const KINDS: [Kind; 6] = [Kind::V4, Kind::V6, Kind::Mapped, Kind::Nat64, Kind::SixToFour, Kind::Teredo];

/// Client addresses: loopback and remote, IPv4 and IPv6.
pub const CLIENTS: [&[Ip]; 4] = [
    &[Ip::V4(0x7f00_0001), Ip::V4(0x7f01_0203), Ip::V4(0x7fff_ffff)],
    &[Ip::V6(1)],
    &[Ip::V4(0xc000_0207), Ip::V4(0xc000_0307), Ip::V4(0x0a01_0203), Ip::V4(0x7e00_0001), Ip::V4(0)],
    &[Ip::V6(0x2001_0db8 << 96 | 7), Ip::V6(0xfe80 << 112 | 7), Ip::V6(0x2002_7f00_0001 << 80), Ip::V6(2)],
];

/// First and last addresses of the protected ranges, the addresses next to them, and a few others.
const V4: [u32; 24] = [
    0,
    0x00ff_ffff,
    0x0100_0000,
    0x0a00_0001,
    0x0aff_ffff,
    0x7eff_ffff,
    0x7f00_0001,
    0x7fff_ffff,
    0x8000_0000,
    0xa9fd_ffff,
    0xa9fe_0000,
    0xa9fe_a9fe,
    0xa9fe_ffff,
    0xa9ff_0000,
    0xc000_0250,
    0xc000_0201,
    0xc000_0281,
    0xc633_6401,
    0xdfff_ffff,
    0xe000_0001,
    0xefff_ffff,
    0xf000_0000,
    0xffff_fffe,
    0xffff_ffff,
];
const V6: [u128; 22] = [
    0,
    1,
    2,
    0x7f00_0001,
    0xfffe_7f00_0001,
    0x0064_ff9b_0001 << 80 | 0x7f00_0001,
    0x0064_ff9b << 96 | 1 << 32,
    0x2001_0001 << 96 | 0x80ff_fffe,
    0x2001_0db8 << 96 | 0x50,
    0x2001_0db8 << 96 | 1,
    0x2001_0db8_ffff << 80,
    0x2001_0db9 << 96,
    0x2003_7f00_0001 << 80,
    0xfd00_0ec2 << 96 | 0x253,
    0xfd00_0ec2 << 96 | 0x254,
    0xfe7f << 112 | 1,
    0xfe80 << 112 | 1,
    (0xfec0 << 112) - 1,
    0xfec0 << 112,
    (0xff00 << 112) - 1,
    0xff02 << 112 | 1,
    u128::MAX,
];
const NAMES: [&str; 14] = [
    "example.org",
    "EXAMPLE.Org",
    "example.org.",
    "www.example.org",
    "a.B.example.org",
    "notexample.org",
    "example.org.example.com",
    "example.com",
    "org",
    "org.",
    "localhost",
    "LOCALHOST.",
    "bücher.example",
    "xn--bcher-KVA.example",
];
/// Names in rules. Some get a final dot when they are written.
const RULE_NAMES: [&str; 9] = [
    "example.org",
    "EXAMPLE.org",
    "www.example.org",
    "b.example.org",
    "example.com",
    "org",
    "localhost",
    "xn--Bcher-kva.example",
    "example",
];
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

pub fn std_ip(ip: Ip) -> IpAddr {
    match ip {
        Ip::V4(ip) => Ipv4Addr::from(ip).into(),
        Ip::V6(ip) => Ipv6Addr::from(ip).into(),
    }
}

pub fn is_own_listener(to: SocketAddr) -> bool {
    OWN_LISTENERS.iter().any(|(ip, port)| SocketAddr::new(std_ip(*ip), *port) == to)
}

fn any_v4() -> BoxedStrategy<u32> {
    prop_oneof![9 => select(&V4[..]), 1 => any::<u32>()].boxed()
}

pub fn any_ip(kind: Kind) -> BoxedStrategy<Ip> {
    let embedding = (any_v4(), any_v4(), any::<u64>()).prop_map(move |(ip, server, rest)| {
        let (ip, server, rest) = (u128::from(ip), u128::from(server), u128::from(rest));
        match kind {
            Kind::V4 | Kind::V6 | Kind::Mapped => 0xffff << 32 | ip,
            Kind::Nat64 => 0x0064_ff9b << 96 | ip,
            Kind::SixToFour => 0x2002 << 112 | ip << 80 | rest,
            Kind::Teredo => 0x2001 << 112 | server << 64 | rest >> 32 << 32 | (0xffff_ffff - ip),
        }
    });
    match kind {
        Kind::V4 => any_v4().prop_map(Ip::V4).boxed(),
        Kind::V6 => prop_oneof![9 => select(&V6[..]), 1 => any::<u128>()].prop_map(Ip::V6).boxed(),
        _ => embedding.prop_map(Ip::V6).boxed(),
    }
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
    prop_oneof![select(CLIENTS[0]), select(CLIENTS[1]), select(CLIENTS[2]), select(CLIENTS[3])].boxed()
}

fn any_target() -> BoxedStrategy<Ip> {
    select(&KINDS[..]).prop_flat_map(any_ip).boxed()
}

fn any_target_pattern() -> impl Strategy<Value = TargetPattern> {
    prop_oneof![
        4 => any_net(any_target()).prop_map(TargetPattern::Net),
        1 => select(&RULE_NAMES[..]).prop_map(TargetPattern::Name),
        2 => select(&RULE_NAMES[..]).prop_map(TargetPattern::Suffix),
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
    let route = proptest::option::of(select(&ROUTES[..]));
    let client = (up_to_three(source), up_to_three(user), subset(&METHODS), subset(&COMMANDS));
    let target = (up_to_three(any_target_pattern()), up_to_three(any_ports()), route);
    (any::<bool>(), client, target, any::<u64>()).prop_map(|(allow, client, target, style)| {
        let ((from, users, methods, commands), (to, ports, via)) = (client, target);
        Rule { allow, from, users, methods, commands, to, ports, via: via.filter(|_| allow), style }
    })
}

/// Returns a request of a client from `from` for an address of this kind.
pub fn any_request_of(
    from: BoxedStrategy<Option<Ip>>,
    kind: Kind,
    method: &'static str,
    command: &'static str,
    is_named: bool,
) -> impl Strategy<Value = AccessRequest> {
    let port = prop_oneof![8 => select(&PORTS[..]), 2 => Just(1080), 1 => Just(0), 1 => any::<u16>()];
    let target = prop_oneof![8 => any_ip(kind).boxed(), 1 => select(&OWN_LISTENERS[..]).prop_map(|(ip, _)| ip).boxed()];
    (from, select(&USERS[..]), select(&NAMES[..]), target, any_ip(kind), port).prop_map(
        move |(from, user, name, ip, other, port)| {
            let is_of_kind = matches!((kind, ip), (Kind::V4, Ip::V4(_)) | (Kind::V6, Ip::V6(_)));
            let ip = if is_of_kind || !OWN_LISTENERS.iter().any(|(listener, _)| *listener == ip) { ip } else { other };
            let user = (method != "none").then_some(user);
            AccessRequest { from, method, user, command, name: is_named.then_some(name), ip, port }
        },
    )
}

pub fn any_request() -> impl Strategy<Value = AccessRequest> {
    let kinds = (select(&KINDS[..]), select(&METHODS[..]), select(&COMMANDS[..]), any::<bool>());
    kinds.prop_flat_map(|(kind, method, command, is_named)| {
        let from = prop_oneof![19 => any_client().prop_map(Some), 1 => Just(None)];
        any_request_of(from.boxed(), kind, method, command, is_named)
    })
}

pub fn parse_route(route: &str) -> Route {
    match route {
        "direct" => Route::Direct,
        hop => Route::Hop(super::hops().iter().position(|name| name == hop).expect("known hop")),
    }
}

pub fn any_route() -> impl Strategy<Value = Route> {
    select(&ROUTES[..]).prop_map(parse_route)
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
