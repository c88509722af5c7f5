//! A simple model of the conditions of rules: numbers and strings. Does not call s5.

/// An address as a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ip {
    V4(u32),
    V6(u128),
}

/// Address and prefix length.
#[derive(Clone, Copy, Debug)]
pub enum Net {
    V4(u32, u32),
    V6(u128, u32),
}

#[derive(Clone, Copy, Debug)]
pub enum ClientPattern {
    Loopback,
    Remote,
    Net(Net),
}

#[derive(Clone, Copy, Debug)]
pub enum UserPattern {
    Any,
    Named(&'static [u8]),
    /// The part after the `@`.
    Realm(&'static [u8]),
}

#[derive(Clone, Copy, Debug)]
pub enum TargetPattern {
    Name(&'static str),
    Suffix(&'static str),
    Net(Net),
}

/// A rule. An empty list is no condition.
#[derive(Clone, Debug)]
pub struct Rule {
    pub allow: bool,
    pub from: Vec<ClientPattern>,
    pub users: Vec<UserPattern>,
    pub methods: Vec<&'static str>,
    pub commands: Vec<&'static str>,
    pub to: Vec<TargetPattern>,
    pub ports: Vec<(u16, u16)>,
    pub via: Option<&'static str>,
    pub outbound: Option<&'static str>,
    /// Selects the spelling of the rule. Does not affect its meaning.
    pub style: u64,
}

/// A request with all facts.
#[derive(Clone, Copy, Debug)]
pub struct AccessRequest {
    pub from: Option<Ip>,
    pub method: &'static str,
    pub user: Option<&'static [u8]>,
    pub command: &'static str,
    pub name: Option<&'static str>,
    pub ip: Ip,
    pub port: u16,
}

/// Listeners of the server.
pub const OWN_LISTENERS: [(Ip, u16); 3] =
    [(Ip::V4(0xc000_0250), 1080), (Ip::V4(0x7f00_0001), 1080), (Ip::V6(0x2001_0db8 << 96 | 0x50), 1080)];

pub fn is_own_listener(request: &AccessRequest) -> bool {
    embedded_addrs(request.ip).into_iter().any(|ip| OWN_LISTENERS.contains(&(ip, request.port)))
}

pub fn is_protected(request: &AccessRequest) -> bool {
    let is_remote = request.from.is_some_and(|from| !is_loopback(from));
    let is_local_name = request.name.is_some_and(|name| labels(name).last().is_some_and(|last| last == "localhost"));
    is_remote && (is_local_name || embedded_addrs(request.ip).into_iter().any(is_protected_addr))
}

fn is_loopback(ip: Ip) -> bool {
    match ip {
        Ip::V4(ip) => ip / 0x0100_0000 == 127,
        Ip::V6(ip) => ip == 1,
    }
}

fn is_protected_addr(ip: Ip) -> bool {
    match ip {
        Ip::V4(ip) => match ip.to_be_bytes() {
            [0 | 127 | 224..=239, ..] | [169, 254, ..] | [255, 255, 255, 255] => true,
            [_, _, _, _] => false,
        },
        Ip::V6(ip) => {
            let top = ip >> 112;
            ip < 2 || ip == 0xfd00_0ec2 << 96 | 0x254 || (0xfe80..=0xfebf).contains(&top) || top >= 0xff00
        }
    }
}

/// Returns an address and the addresses embedded in it.
fn embedded_addrs(ip: Ip) -> Vec<Ip> {
    let mut addrs = vec![ip];
    addrs.extend(embedded_ipv4(ip).map(Ip::V4));
    if let Ip::V6(ip) = ip
        && ip >> 96 == 0x2001_0000
    {
        addrs.push(Ip::V4(low(ip >> 64)));
    }
    addrs
}

/// Returns the IPv4 address of the host that an IPv6 address reaches.
fn embedded_ipv4(ip: Ip) -> Option<u32> {
    let Ip::V6(ip) = ip else { return None };
    if ip >> 32 == 0xffff || ip >> 32 == 0x0064_ff9b << 64 || ip >> 80 == 0x0064_ff9b_0001 {
        return Some(low(ip));
    }
    if ip >> 112 == 0x2002 {
        return Some(low(ip >> 80));
    }
    (ip >> 96 == 0x2001_0000).then(|| u32::MAX - low(ip))
}

/// Returns the low 32 bits.
fn low(number: u128) -> u32 {
    u32::try_from(number % (1 << 32)).expect("32 bits suffice")
}

pub fn is_from(source: ClientPattern, from: Option<Ip>) -> bool {
    let Some(from) = from else { return false };
    match source {
        ClientPattern::Loopback => is_loopback(from),
        ClientPattern::Remote => !is_loopback(from),
        ClientPattern::Net(net) => contains(net, from),
    }
}

pub fn is_user(user: UserPattern, name: Option<&[u8]>) -> bool {
    let Some(name) = name else { return false };
    match user {
        UserPattern::Any => true,
        UserPattern::Named(named) => named == name,
        UserPattern::Realm(realm) => name.ends_with(&[b"@", realm].concat()),
    }
}

pub fn is_to(target: TargetPattern, allow: bool, request: &AccessRequest) -> bool {
    match target {
        TargetPattern::Name(name) => request.name.is_some_and(|request| labels(request) == labels(name)),
        TargetPattern::Suffix(suffix) => request.name.is_some_and(|request| labels(request).ends_with(&labels(suffix))),
        TargetPattern::Net(net) if allow => contains(net, embedded_ipv4(request.ip).map_or(request.ip, Ip::V4)),
        TargetPattern::Net(net) => embedded_addrs(request.ip).into_iter().any(|form| contains(net, form)),
    }
}

/// Splits a name into labels in lower case. A final dot adds no label.
fn labels(name: &str) -> Vec<String> {
    let mut labels: Vec<String> = name.split('.').map(str::to_lowercase).collect();
    if labels.last().is_some_and(String::is_empty) {
        labels.pop();
    }
    labels
}

fn contains(net: Net, ip: Ip) -> bool {
    match (net, ip) {
        (Net::V4(net, bits), Ip::V4(ip)) => (0..bits).all(|bit| (net ^ ip) & (1 << (31 - bit)) == 0),
        (Net::V6(net, bits), Ip::V6(ip)) => (0..bits).all(|bit| (net ^ ip) & (1 << (127 - bit)) == 0),
        _ => false,
    }
}
