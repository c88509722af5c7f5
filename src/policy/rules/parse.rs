//! Parser of rules: `allow` or `deny`, then any number of `key=value[,value]...`; `#` starts a comment.

use std::collections::HashSet;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;

use ipnet::IpNet;
use percent_encoding::percent_decode_str;

use super::conditions::{ClientPattern, Conditions, TargetPattern, UserPattern, normalize_name};
use super::rule::{Rule, Source, TargetCondition};
use crate::policy::PolicyError;
use crate::proto::{MAX_HOST_NAME_LEN, PortRange, parse_port, split_host_port};

const DIRECT: &str = "direct";

/// Maximum length of a word in messages, in characters.
const MAX_SHOWN: usize = 100;
/// Maximum length of an entry of a list, in bytes. A user name with escapes has up to 765.
const MAX_ENTRY: usize = 1000;

const KEYS: &str = "from, user, method, protection, command, to, port, via, outbound";
/// Keys of a rule, each with its names in other programs.
const FOREIGN_KEYS: [(&str, &[&str]); 4] = [
    ("from", &["client", "source", "src"]),
    ("to", &["target", "destination", "dest", "dst"]),
    ("user", &["username"]),
    ("command", &["cmd"]),
];
/// Words after `allow` or `deny` that other programs require for a rule without conditions.
const ANY: [&str; 3] = ["all", "any", "*"];

/// Parses a rules file. `file` is its name in [`Rule::origin`]; `hops` are the names for `via=`, by index.
pub fn parse_rules(text: impl Into<String>, file: &str, hops: &[String]) -> Result<Vec<Rule>, PolicyError> {
    let source = Arc::new(Source { name: file.into(), text: text.into() });
    let mut parser = Parser { source: source.clone(), hops, conditions: HashSet::new() };
    let count = source.text.lines().filter(|line| line.len() >= "deny".len()).count();
    let mut rules = Vec::with_capacity(count);
    for (line, text) in (1..).zip(source.text.lines()) {
        rules.extend(parser.parse_line(line, text).map_err(|message| PolicyError { line, message })?);
    }
    rules.shrink_to_fit();
    Ok(rules)
}

/// Parses one rule. Returns `None` if the line is empty or only a comment.
pub fn parse_rule(line: &str, origin: &str, hops: &[String]) -> Result<Option<Rule>, String> {
    let source = Arc::new(Source { name: origin.into(), text: line.into() });
    Parser { source: source.clone(), hops, conditions: HashSet::new() }.parse_line(0, &source.text)
}

struct Parser<'a> {
    source: Arc<Source>,
    hops: &'a [String],
    /// Those of all rules so far. Equal conditions share one allocation.
    conditions: HashSet<Arc<Conditions>>,
}

impl Parser<'_> {
    fn parse_line(&mut self, line: usize, text: &str) -> Result<Option<Rule>, String> {
        let mut words = text.split_whitespace().take_while(|word| !word.starts_with('#'));
        let Some(action) = words.next() else { return Ok(None) };
        let allow = match action {
            "allow" => true,
            "deny" => false,
            other => return Err(format!("expected \"allow\" or \"deny\", found {}", excerpt(other))),
        };
        let mut conditions = Conditions { allow, ..Conditions::default() };
        let mut to = if allow { TargetCondition::Unprotected } else { TargetCondition::Any };
        let (mut keys, mut last) = (Vec::new(), action);
        for word in words {
            let (key, value) = split_condition(word, action)?;
            let duplicate = keys.contains(&key).then_some("duplicate key (lists are comma-separated)");
            if let Some(problem) = duplicate.or(value_problem(value)) {
                // The value of via= may be a URL with a password, so the word is not shown.
                let word = if key == "via" { "via=".into() } else { excerpt(word) };
                return Err(format!("{word}: {problem}"));
            }
            conditions.set(&mut to, key, value, self.hops)?;
            keys.push(key);
            last = word;
        }
        let conditions = self.share(conditions);
        Ok(Some(Rule::new(&self.source, line, [action, last], conditions, to)))
    }

    fn share(&mut self, conditions: Conditions) -> Arc<Conditions> {
        let shared = self.conditions.get(&conditions).cloned().unwrap_or_else(|| conditions.into());
        self.conditions.insert(shared.clone());
        shared
    }
}

fn split_condition<'a>(word: &'a str, action: &str) -> Result<(&'a str, &'a str), String> {
    match word.split_once('=') {
        _ if word.contains(char::is_control) => Err(format!("control character in {}", excerpt(word))),
        Some(condition) => Ok(condition),
        None if ANY.contains(&word) => {
            Err(format!("{word:?} is not a condition (a rule that matches everything is {action:?} alone)"))
        }
        None => Err(format!("expected key=value, such as from=10.0.0.0/8, found {}", excerpt(word))),
    }
}

/// Returns the quoted start of a word for a message: a list can have many thousand entries.
fn excerpt(word: &str) -> String {
    match word.char_indices().nth(MAX_SHOWN) {
        Some((end, _)) => format!("{:?}...", word.get(..end).unwrap_or_default()),
        None => format!("{word:?}"),
    }
}

/// Returns the problem of a value that would be taken literally and then match nothing.
fn value_problem(value: &str) -> Option<&'static str> {
    value.split(',').find_map(|entry| match entry.as_bytes() {
        [] => Some("empty value (values and lists have no spaces)"),
        bytes if bytes.len() > MAX_ENTRY => Some("an entry is longer than 1000 bytes"),
        [b'\'', ..] => Some("remove the quotes (a quote in a user name is %22 or %27)"),
        _ if entry.contains(['"', '“', '”']) => Some("remove the quotes (a quote in a user name is %22 or %27)"),
        _ if entry.contains('#') => Some("a comment requires a space before its # (a # in a user name is %23)"),
        _ => None,
    })
}

impl Conditions {
    /// Sets one condition. The targets of `to=` are only checked.
    fn set(&mut self, to: &mut TargetCondition, key: &str, value: &str, hops: &[String]) -> Result<(), String> {
        let set = match key {
            "from" => parse_list(value, parse_client).map(|list| self.from = list),
            "user" => parse_list(value, parse_user).map(|list| self.users = list),
            "method" => parse_list(value, str::parse).map(|list| self.methods = list),
            "protection" => parse_list(value, str::parse).map(|list| self.levels = list),
            "command" => parse_list(value, str::parse).map(|list| self.commands = list),
            "to" => has_net(value).map(|has_net| *to = TargetCondition::Listed { has_net }),
            "port" => parse_list(value, parse_ports).map(|list| self.ports = list),
            "via" if self.allow => parse_route(value, hops).map(|route| self.via = Some(route)),
            "outbound" if self.allow => parse_outbound(value).map(|outbound| self.outbound = Some(outbound)),
            "via" | "outbound" => Err("only valid with allow".into()),
            _ => {
                let own = FOREIGN_KEYS.iter().find(|(_, foreign)| foreign.contains(&key));
                let hint = own.map_or(format!("keys are {KEYS}"), |(own, _)| format!("write {own}="));
                return Err(format!("unknown key {} ({hint})", excerpt(key)));
            }
        };
        set.map_err(|problem| format!("{key}=: {problem}"))
    }
}

/// Checks the targets of `to=`. Returns whether one is an address or CIDR block.
fn has_net(targets: &str) -> Result<bool, String> {
    let is_net = |target| parse_target(target).map(|target| matches!(target, TargetPattern::Net(_)));
    targets.split(',').try_fold(false, |has_net, target| Ok(has_net | is_net(target)?))
}

fn parse_list<T>(values: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<Box<[T]>, String> {
    values.split(',').map(parse).collect()
}

fn parse_client(text: &str) -> Result<ClientPattern, String> {
    match text {
        "loopback" => Ok(ClientPattern::Loopback),
        "remote" => Ok(ClientPattern::Remote),
        _ => parse_cidr(text, "from")?.map(ClientPattern::Net).ok_or_else(|| {
            format!("expected an address, a CIDR such as 192.0.2.0/24, loopback or remote, found {text:?}")
        }),
    }
}

fn parse_user(text: &str) -> Result<UserPattern, String> {
    match text.strip_prefix('*') {
        Some("") => Ok(UserPattern::Any),
        Some(realm) if realm.len() > 1 && realm.starts_with('@') && !realm.contains('*') => {
            decode_user(realm).map(UserPattern::Realm)
        }
        _ if text.contains('*') => {
            Err(format!("expected NAME, *@REALM or *, found {text:?} (write a * in a name as %2A)"))
        }
        _ => decode_user(text).map(UserPattern::Named),
    }
}

/// Decodes the percent escapes of a user name.
///
/// # Errors
/// A `%` without two hexadecimal digits.
pub fn decode_user(text: &str) -> Result<Vec<u8>, String> {
    let is_escape = |rest: &str| rest.bytes().take(2).filter(u8::is_ascii_hexdigit).count() == 2;
    match text.split('%').skip(1).all(is_escape) {
        true => Ok(percent_decode_str(text).collect()),
        false => Err(format!("invalid escape in {text:?} (write a % in a name as %25)")),
    }
}

pub(super) fn parse_target(text: &str) -> Result<TargetPattern, String> {
    // Most targets are names. An address ends with a digit, unless it has one of the others.
    let may_be_net = text.ends_with(|c: char| c.is_ascii_digit()) || text.bytes().any(|byte| b":/".contains(&byte));
    if may_be_net && let Some(net) = parse_cidr(text, "to")? {
        return Ok(TargetPattern::Net(net));
    }
    if text.contains('*') {
        return Err(format!("wildcard in {text:?} (use .example.org to match example.org and its subdomains)"));
    }
    if !text.is_ascii() {
        return Err(format!("{text:?} is not ASCII (write the name in its ASCII form, xn--...)"));
    }
    let name = normalize_name(text);
    let suffix = name.strip_prefix('.');
    let labels = suffix.unwrap_or(&name);
    let is_label_char = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    let has_valid_labels = labels.split('.').all(|label| !label.is_empty() && label.chars().all(is_label_char));
    // The system resolver parses 10.0.0 and 0x7f.1 as addresses, so a rule with them as names would never match.
    let last = labels.rsplit('.').next().unwrap_or_default();
    let is_numeric = last.chars().all(|c| c.is_ascii_digit()) || last.starts_with("0x");
    match suffix {
        _ if labels.len() > MAX_HOST_NAME_LEN => {
            Err(format!("a name has at most {MAX_HOST_NAME_LEN} bytes, found {}", excerpt(text)))
        }
        _ if !has_valid_labels || is_numeric => {
            Err(format!("expected a name, a .suffix, an address or a CIDR such as 192.0.2.0/24, found {text:?}"))
        }
        Some(suffix) => Ok(TargetPattern::Suffix(suffix.into())),
        None => Ok(TargetPattern::Name(name)),
    }
}

fn parse_ports(text: &str) -> Result<RangeInclusive<u16>, String> {
    let range = if text.contains('-') { text.parse() } else { format!("{text}-{text}").parse() };
    let invalid = |_: String| format!("expected a port or LO-HI, from 1 to 65535, found {text:?}");
    range.map(|PortRange(ports)| ports).map_err(invalid)
}

fn parse_route(text: &str, hops: &[String]) -> Result<Option<usize>, String> {
    if text == DIRECT {
        return Ok(None);
    }
    if let Some(hop) = hops.iter().position(|hop| hop == text) {
        return Ok(Some(hop));
    }
    // A URL may contain a password, so it is not shown.
    let is_name = !text.contains([':', '/', '@']);
    let problem = if is_name { format!("no hop named {text:?}") } else { "not the name of a hop".into() };
    Err(format!("{problem} (define hops with --hop NAME=URL)"))
}

/// Parses source addresses.
fn parse_outbound(text: &str) -> Result<[Option<IpAddr>; 2], String> {
    let ips = parse_list(text, |ip| ip.parse::<IpAddr>().map_err(|_| format!("expected an IP address, found {ip:?}")))?;
    one_per_family(&ips)
}

/// Returns the addresses. Fails if two of them have the same family.
pub fn one_per_family(ips: &[IpAddr]) -> Result<[Option<IpAddr>; 2], String> {
    match *ips {
        [] => Ok([None, None]),
        [ip] => Ok([Some(ip), None]),
        [first, second] if first.is_ipv4() != second.is_ipv4() => Ok([Some(first), Some(second)]),
        _ => Err("at most one IPv4 and one IPv6 address".into()),
    }
}

/// Parses an address or a CIDR of `key`. Returns `None` if the text is neither.
pub fn parse_cidr(text: &str, key: &str) -> Result<Option<IpNet>, String> {
    if let (host, Some(port)) = split_host_port(text)
        && (parse_port(port).is_ok() || host.contains('.') && port.chars().all(char::is_alphanumeric))
    {
        let own_condition = if key == "to" { format!(" port={port}") } else { String::new() };
        return Err(format!("{text:?} has a port (write {key}={host}{own_condition})"));
    }
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let Ok(net) = bare.parse::<IpAddr>().map(IpNet::from).or_else(|_| text.parse()) else { return Ok(None) };
    if net.trunc() != net {
        return Err(format!("invalid CIDR {text:?}: host bits are set (did you mean {}?)", net.trunc()));
    }
    if let IpNet::V6(v6) = net
        && let Some(v4) = v6.addr().to_ipv4_mapped()
    {
        return Err(format!("invalid CIDR {text:?}: IPv4-mapped address (write it as IPv4: {v4})"));
    }
    Ok(Some(net))
}
