//! Values of options of the server.

use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};

use ipnet::IpNet;

use super::load::RuleOption;
use crate::cmd::cli::exit::{CliError, CliResult};
use crate::cmd::cli::values::parse_choice;
use crate::net::LocalAddr;
use crate::policy::rules::parse_cidr;
use crate::proto::Method;
use crate::server::Filtering;

pub(super) fn default_threads() -> u16 {
    std::thread::available_parallelism().map_or(1, |cores| u16::try_from(cores.get()).unwrap_or(u16::MAX))
}

/// Returns the addresses of an option that takes at most one of each family.
pub(super) fn one_per_family(option: &str, ips: Vec<IpAddr>) -> Result<Vec<IpAddr>, CliError> {
    let count = |is_family: fn(&IpAddr) -> bool| ips.iter().filter(|ip| is_family(ip)).count();
    if count(IpAddr::is_ipv4) > 1 || count(IpAddr::is_ipv6) > 1 {
        return Err(CliError::usage(format!("{option}: at most one IPv4 and one IPv6 address")));
    }
    Ok(ips)
}

/// Returns the source addresses of `--outbound`.
pub(super) fn outbound(ips: Vec<IpAddr>) -> CliResult<LocalAddr> {
    Ok(match one_per_family("--outbound", ips)?.as_slice() {
        [] => LocalAddr::default(),
        ips => LocalAddr { ips: [ips.first().copied(), ips.get(1).copied()], port: 0 },
    })
}

/// Parses a mark: decimal, or hexadecimal with `0x`.
pub(super) fn parse_mark(text: &str) -> Result<u32, String> {
    let mark = text.strip_prefix("0x").map_or_else(|| text.parse(), |digits| u32::from_str_radix(digits, 16));
    mark.map_err(|_| "expected a number from 0 to 4294967295, or from 0x0 to 0xffffffff".into())
}

/// Parses an address family. Returns true for IPv4.
pub(super) fn parse_family(text: &str) -> Result<bool, String> {
    parse_choice(text, [("4", true), ("6", false)])
}

/// Parses a comma-separated list of addresses and CIDR blocks. `None` is `unix`.
pub(super) fn parse_balancers(text: &str) -> Result<Vec<Option<IpNet>>, String> {
    let expected = |word: &str| format!("expected an address, a CIDR such as 192.0.2.0/24, or unix, found {word:?}");
    let parse = |word| match word {
        "unix" => Ok(None),
        _ => parse_cidr(word, "--proxy-protocol-from")?.map(Some).ok_or_else(|| expected(word)),
    };
    text.split(',').map(parse).collect()
}

pub(super) fn parse_log_format(text: &str) -> Result<bool, String> {
    parse_choice(text, [("logfmt", false), ("json", true)])
}

pub(super) fn parse_filtering(text: &str) -> Result<Filtering, String> {
    let choices =
        [("address-dependent", Filtering::AddressDependent), ("endpoint-independent", Filtering::EndpointIndependent)];
    parse_choice(text, choices)
}

/// Returns a rule of the command line. argh collects each option separately; the position restores their common order.
fn rule_option(option: &'static str, text: String) -> Result<RuleOption, String> {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    Ok(RuleOption { position: COUNT.fetch_add(1, Ordering::Relaxed), option, text })
}

pub(super) fn parse_rule(text: &str) -> Result<RuleOption, String> {
    rule_option("--rule", text.into())
}

pub(super) fn parse_allow(conditions: &str) -> Result<RuleOption, String> {
    rule_option("--allow", format!("allow {conditions}"))
}

pub(super) fn parse_deny(conditions: &str) -> Result<RuleOption, String> {
    rule_option("--deny", format!("deny {conditions}"))
}

/// Returns the accepted methods, the preferred one first.
pub(super) fn accepted_methods(auth: Option<&[Method]>, has_users: bool, has_gssapi: bool) -> CliResult<Vec<Method>> {
    let methods = auth.map_or_else(
        || {
            let candidates = [(has_users, Method::PASSWORD), (has_gssapi, Method::GSSAPI)];
            let configured = candidates.into_iter().filter_map(|(is_set, method)| is_set.then_some(method));
            let methods: Vec<Method> = configured.collect();
            if methods.is_empty() { vec![Method::NONE] } else { methods }
        },
        <[Method]>::to_vec,
    );
    let usage_error = |problem: &str| Err(CliError::usage(format!("--auth: {problem}")));
    match (methods.contains(&Method::PASSWORD), methods.contains(&Method::GSSAPI)) {
        (true, _) if !has_users => usage_error("password requires --users FILE"),
        (false, _) if has_users => usage_error("--users and S5_USER require password in this list"),
        (_, false) if has_gssapi => usage_error("--keytab and --gssapi-... require gssapi in this list"),
        _ => Ok(methods),
    }
}
