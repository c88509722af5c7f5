//! The rules once more, as plainly as can be: numbers, strings and a loop. Nothing of the crate is called here.

/// An address as the number that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ip {
    V4(u32),
    V6(u128),
}

/// An address and how many of its bits count.
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
    /// What stands behind the `@`.
    Realm(&'static [u8]),
}

#[derive(Clone, Copy, Debug)]
pub enum TargetPattern {
    Name(&'static str),
    Suffix(&'static str),
    Net(Net),
}

/// A rule; an empty list is no condition.
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
    /// Decides how it is written down, and nothing else.
    pub style: u64,
}

/// A question with all that there is to know.
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

/// What decided: a written rule by its place in the list, or one that is built in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum By {
    Written(usize),
    Home,
    Protected,
    Open,
    Otherwise,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Allow(By, &'static str),
    Deny(By),
}

/// Where the server listens.
pub const OWN: [(Ip, u16); 3] =
    [(Ip::V4(0xc000_0250), 1080), (Ip::V4(0x7f00_0001), 1080), (Ip::V6(0x2001_0db8 << 96 | 0x50), 1080)];

/// The answer to a question. `way` is taken where a rule names none.
pub fn decide(rules: &[Rule], way: &'static str, asked: &AccessRequest) -> Answer {
    for (i, rule) in rules.iter().enumerate() {
        if holds(rule, asked) {
            return match rule.allow {
                true => Answer::Allow(By::Written(i), rule.via.unwrap_or(way)),
                false => Answer::Deny(By::Written(i)),
            };
        }
    }
    if is_home(asked) {
        return Answer::Deny(By::Home);
    }
    if is_protected(asked) {
        return Answer::Deny(By::Protected);
    }
    if rules.iter().any(|rule| rule.allow && !rule.from.is_empty()) {
        return Answer::Deny(By::Otherwise);
    }
    Answer::Allow(By::Open, way)
}

/// Whether every condition of a rule holds.
pub fn holds(rule: &Rule, asked: &AccessRequest) -> bool {
    if !rule.from.is_empty() && !rule.from.iter().any(|source| is_from(*source, asked.from)) {
        return false;
    }
    if !rule.users.is_empty() && !rule.users.iter().any(|user| is_user(*user, asked.user)) {
        return false;
    }
    if !rule.methods.is_empty() && !rule.methods.contains(&asked.method) {
        return false;
    }
    if !rule.commands.is_empty() && !rule.commands.contains(&asked.command) {
        return false;
    }
    if !rule.ports.is_empty() && !rule.ports.iter().any(|(low, high)| *low <= asked.port && asked.port <= *high) {
        return false;
    }
    if !rule.to.is_empty() {
        return rule.to.iter().any(|place| is_to(*place, rule.allow, asked));
    }
    // "allow" alone means everywhere but where the built-in rules do not let this client.
    !rule.allow || !is_home(asked) && !is_protected(asked)
}

fn is_home(asked: &AccessRequest) -> bool {
    embedded_addrs(asked.ip).into_iter().any(|ip| OWN.contains(&(ip, asked.port)))
}

fn is_protected(asked: &AccessRequest) -> bool {
    let is_remote = asked.from.is_some_and(|from| !is_loopback(from));
    let is_local_name = asked.name.is_some_and(|name| labels(name).last().is_some_and(|last| last == "localhost"));
    is_remote && (is_local_name || embedded_addrs(asked.ip).into_iter().any(is_protected_form))
}

fn is_loopback(ip: Ip) -> bool {
    match ip {
        Ip::V4(ip) => ip / 0x0100_0000 == 127,
        Ip::V6(ip) => ip == 1,
    }
}

fn is_protected_form(ip: Ip) -> bool {
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

/// All that an address could be taken for.
fn embedded_addrs(ip: Ip) -> Vec<Ip> {
    let mut forms = vec![ip];
    forms.extend(inside(ip).map(Ip::V4));
    if let Ip::V6(ip) = ip
        && ip >> 96 == 0x2001_0000
    {
        forms.push(Ip::V4(low(ip >> 64)));
    }
    forms
}

/// The IPv4 address that an IPv6 address leads to.
fn inside(ip: Ip) -> Option<u32> {
    let Ip::V6(ip) = ip else { return None };
    if ip >> 32 == 0xffff || ip >> 32 == 0x0064_ff9b << 64 {
        return Some(low(ip));
    }
    if ip >> 112 == 0x2002 {
        return Some(low(ip >> 80));
    }
    (ip >> 96 == 0x2001_0000).then(|| u32::MAX - low(ip))
}

/// The last 32 bits.
fn low(number: u128) -> u32 {
    u32::try_from(number % (1 << 32)).expect("32 bits")
}

fn is_from(source: ClientPattern, from: Option<Ip>) -> bool {
    let Some(from) = from else { return false };
    match source {
        ClientPattern::Loopback => is_loopback(from),
        ClientPattern::Remote => !is_loopback(from),
        ClientPattern::Net(net) => has(net, from),
    }
}

fn is_user(user: UserPattern, name: Option<&[u8]>) -> bool {
    let Some(name) = name else { return false };
    match user {
        UserPattern::Any => true,
        UserPattern::Named(named) => named == name,
        UserPattern::Realm(realm) => name.ends_with(&[b"@", realm].concat()),
    }
}

fn is_to(place: TargetPattern, allow: bool, asked: &AccessRequest) -> bool {
    match place {
        TargetPattern::Name(name) => asked.name.is_some_and(|asked| labels(asked) == labels(name)),
        TargetPattern::Suffix(suffix) => asked.name.is_some_and(|asked| labels(asked).ends_with(&labels(suffix))),
        TargetPattern::Net(net) if allow => has(net, inside(asked.ip).map_or(asked.ip, Ip::V4)),
        TargetPattern::Net(net) => embedded_addrs(asked.ip).into_iter().any(|form| has(net, form)),
    }
}

/// A name in its parts; a dot at the end ends it and begins nothing.
fn labels(name: &str) -> Vec<String> {
    let mut labels: Vec<String> = name.split('.').map(str::to_lowercase).collect();
    if labels.last().is_some_and(String::is_empty) {
        labels.pop();
    }
    labels
}

fn has(net: Net, ip: Ip) -> bool {
    match (net, ip) {
        (Net::V4(net, bits), Ip::V4(ip)) => (0..bits).all(|bit| (net ^ ip) & (1 << (31 - bit)) == 0),
        (Net::V6(net, bits), Ip::V6(ip)) => (0..bits).all(|bit| (net ^ ip) & (1 << (127 - bit)) == 0),
        _ => false,
    }
}
