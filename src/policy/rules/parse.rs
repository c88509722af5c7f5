//! Rules as text: `allow` or `deny`, and then `key=value[,value]...` as often as it takes; `#` begins a comment.

use std::collections::HashSet;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;
use percent_encoding::percent_decode_str;

use super::{ClientPattern, Route, Rule, TargetCondition, TargetPattern, UserPattern};
use crate::policy::PolicyError;
use crate::proto::{Command, Method, ProtectionLevel};

/// The way that `via=` calls the one through no hop.
const DIRECT: &str = "direct";

const KEYS: &str = "from, user, method, protection, command, to, port and via";

/// The rules of a file that is called `file`. `hops` are the names that `via=` may say, by number.
///
/// # Errors
/// The first line that is wrong.
pub fn parse_rules(text: &str, file: &str, hops: &[String]) -> Result<Vec<Rule>, PolicyError> {
    let mut rules = Vec::new();
    for (line, text) in (1..).zip(text.lines()) {
        let origin = format!("{file} line {line}");
        rules.extend(parse_rule(text, &origin, hops).map_err(|message| PolicyError { line, message })?);
    }
    Ok(rules)
}

/// One rule; none for a line with nothing or only a comment on it.
///
/// # Errors
/// What is wrong, with the word that is.
pub fn parse_rule(line: &str, origin: &str, hops: &[String]) -> Result<Option<Rule>, String> {
    let words: Vec<&str> = line.split_whitespace().take_while(|word| !word.starts_with('#')).collect();
    let Some((action, conditions)) = words.split_first() else { return Ok(None) };
    if let Some(word) = words.iter().find(|word| word.contains(char::is_control)) {
        return Err(format!("{word:?} has a control character in it"));
    }
    let allow = match *action {
        "allow" => true,
        "deny" => false,
        other => return Err(format!("{other:?} is neither allow nor deny, with which a rule begins")),
    };
    let to = if allow { TargetCondition::Unprotected } else { TargetCondition::Any };
    let mut rule = Rule { to, origin: origin.into(), ..Rule::built_in(allow, &words.join(" ")) };
    let mut keys = HashSet::new();
    for word in conditions {
        let (key, value) = word.split_once('=').ok_or_else(|| format!("{word:?} is not key=value"))?;
        // What is said of a way names what is wrong itself.
        let with_word = |why: String| if key == "via" { format!("via=: {why}") } else { format!("{word:?}: {why}") };
        if !keys.insert(key) {
            return Err(with_word(format!("{key}= stands in this rule twice; write a list with commas")));
        }
        if value.split(',').any(str::is_empty) {
            return Err(with_word("an empty value".into()));
        }
        rule.set_condition(key, value, hops).map_err(with_word)?;
    }
    Ok(Some(rule))
}

impl Rule {
    fn set_condition(&mut self, key: &str, value: &str, hops: &[String]) -> Result<(), String> {
        match key {
            "from" => self.from = parse_list(value, parse_client)?,
            "user" => self.users = parse_list(value, parse_user)?,
            "method" => self.methods = parse_list(value, parse_method)?,
            "protection" => self.levels = parse_list(value, parse_level)?,
            "command" => self.commands = parse_list(value, parse_command)?,
            "to" => self.to = TargetCondition::Patterns(parse_list(value, parse_target)?),
            "port" => self.ports = parse_list(value, parse_ports)?,
            "via" if self.allow => self.via = Some(parse_route(value, hops)?),
            "via" => return Err("what is denied goes no way".into()),
            _ => return Err(format!("unknown key {key:?}; there are {KEYS}")),
        }
        Ok(())
    }
}

fn parse_list<T>(values: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    values.split(',').map(parse).collect()
}

fn parse_client(text: &str) -> Result<ClientPattern, String> {
    match text {
        "loopback" => Ok(ClientPattern::Loopback),
        "remote" => Ok(ClientPattern::Remote),
        _ => parse_cidr(text)?.map(ClientPattern::Net).ok_or_else(|| {
            format!("{text:?} is not a CIDR such as 192.0.2.0/24 or 2001:db8::/32, an address, loopback or remote")
        }),
    }
}

fn parse_user(text: &str) -> Result<UserPattern, String> {
    let decoded = |text: &str| percent_decode_str(text).collect::<Vec<u8>>();
    match text.strip_prefix('*') {
        Some("") => Ok(UserPattern::Any),
        Some(realm) if realm.len() > 1 && realm.starts_with('@') && !realm.contains('*') => {
            Ok(UserPattern::Realm(decoded(realm)))
        }
        _ if text.contains('*') => Err(format!("{text:?} is none of NAME, *@REALM and *; a * in a name is %2A")),
        _ => Ok(UserPattern::Named(decoded(text))),
    }
}

/// A method by its name.
///
/// # Errors
/// The names that there are.
pub fn parse_method(text: &str) -> Result<Method, String> {
    let all = [Method::NONE, Method::PASSWORD, Method::GSSAPI];
    let found = all.into_iter().find(|method| method.to_string() == text);
    found.ok_or_else(|| format!("{text:?} is none of none, password and gssapi"))
}

/// A level of protection by its name.
///
/// # Errors
/// The names that there are.
pub fn parse_level(text: &str) -> Result<ProtectionLevel, String> {
    let found = ProtectionLevel::ALL.into_iter().find(|level| level.to_string() == text);
    found.ok_or_else(|| format!("{text:?} is none of none, integrity and confidentiality"))
}

/// A command by its name.
///
/// # Errors
/// The names that there are.
pub fn parse_command(text: &str) -> Result<Command, String> {
    let all = [Command::Connect, Command::Bind, Command::UdpAssociate];
    let found = all.into_iter().find(|command| command.to_string() == text);
    found.ok_or_else(|| format!("{text:?} is none of connect, bind and udp"))
}

pub(super) fn parse_target(text: &str) -> Result<TargetPattern, String> {
    if let Some(net) = parse_cidr(text)? {
        return Ok(TargetPattern::Net(net));
    }
    if text.contains('*') {
        return Err(format!("{text:?}: there is no *; .example.org is example.org and all below it"));
    }
    let name = normalize_name(text);
    let suffix = name.strip_prefix('.');
    let labels = suffix.unwrap_or(&name);
    let is_label_char = |c: char| c.is_alphanumeric() || c == '-' || c == '_';
    let has_valid_labels = labels.split('.').all(|label| !label.is_empty() && label.chars().all(is_label_char));
    // 10.0.0 or 0x7f.1: the system's resolver would take it for an address, and a rule that does not is of no use.
    let last = labels.rsplit('.').next().unwrap_or_default();
    let is_numeric = last.chars().all(|c| c.is_ascii_digit()) || last.starts_with("0x");
    match suffix {
        _ if !has_valid_labels || is_numeric => {
            Err(format!("{text:?} is neither a name, a .suffix, an address nor a CIDR such as 192.0.2.0/24"))
        }
        Some(suffix) => Ok(TargetPattern::Suffix(suffix.into())),
        None => Ok(TargetPattern::Name(name)),
    }
}

fn parse_ports(text: &str) -> Result<RangeInclusive<u16>, String> {
    let is_numeric = |text: &&str| text.chars().all(|c| c.is_ascii_digit());
    let port = |text: &str| Some(text).filter(is_numeric)?.parse::<u16>().ok().filter(|port| *port > 0);
    let (low, high) = text.split_once('-').unwrap_or((text, text));
    match (port(low), port(high)) {
        (Some(low), Some(high)) if low <= high => Ok(low..=high),
        _ => Err(format!("{text:?} is neither a port nor LO-HI, from 1 to 65535")),
    }
}

fn parse_route(text: &str, hops: &[String]) -> Result<Route, String> {
    if text == DIRECT {
        return Ok(Route::Direct);
    }
    if let Some(hop) = hops.iter().position(|hop| hop == text) {
        return Ok(Route::Hop(hop));
    }
    // A URL in place of a name may have a password in it.
    let is_name = !text.contains([':', '/', '@']);
    let what = if is_name { format!("no hop is called {text:?}") } else { "that is not the name of a hop".into() };
    Err(format!("{what}; --hop NAME=URL says where it is"))
}

/// An address or a CIDR; `None` for what does not look like one.
fn parse_cidr(text: &str) -> Result<Option<IpNet>, String> {
    let Some(net) = parse_net(text) else {
        let looks_like_cidr = text.contains(['/', ':']);
        return if looks_like_cidr { Err(format!("bad CIDR {text:?}")) } else { Ok(None) };
    };
    if net.trunc() != net {
        return Err(format!(
            "bad CIDR {text:?}: it has more bits than /{}; is {} meant?",
            net.prefix_len(),
            net.trunc()
        ));
    }
    if let IpNet::V6(v6) = net
        && let Some(v4) = v6.addr().to_ipv4_mapped()
    {
        return Err(format!("bad CIDR {text:?}: write the IPv4 address itself, {v4}"));
    }
    Ok(Some(net))
}

fn parse_net(text: &str) -> Option<IpNet> {
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    bare.parse::<IpAddr>().map(IpNet::from).or_else(|_| text.parse()).ok()
}

/// A name as it is compared: in lower case, without the dot at its end.
pub fn normalize_name(text: &str) -> String {
    text.strip_suffix('.').unwrap_or(text).to_lowercase()
}
