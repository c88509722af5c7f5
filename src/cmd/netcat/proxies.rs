//! Selects the proxies: from the command line, otherwise from the environment, otherwise the default.

use std::env;
use std::net::IpAddr;

use ipnet::IpNet;

use super::options::ClientArgs;
use crate::client::{Proxy, parse_hops};
use crate::cmd::cli::exit::{CliError, CliResult};
use crate::net::parse_literal;
use crate::proto::{Addr, Host, split_host_port};

/// Environment variables with a list of proxies. The first that is set is used.
const PROXY_VARIABLES: [&str; 5] = ["S5_PROXY", "all_proxy", "ALL_PROXY", "SOCKS5_SERVER", "SOCKS_SERVER"];
/// Environment variables with a list of targets that are reached without a proxy. The first that is set is used.
const NO_PROXY_VARIABLES: [&str; 2] = ["no_proxy", "NO_PROXY"];
/// Environment variables with an HTTP proxy, which s5 does not use.
const HTTP_PROXY_VARIABLES: [&str; 4] = ["https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"];

/// Returns the proxies on the route to `dst`, nearest first; none for a direct connection.
pub(super) fn select_proxies(args: &ClientArgs, dst: Option<&Addr>) -> CliResult<Vec<Proxy>> {
    match (args.direct, args.proxy.as_slice()) {
        (true, []) => return Ok(Vec::new()),
        (true, _) => return Err(CliError::usage("--direct and --proxy cannot be combined")),
        (false, [url]) if url.is_empty() => return Ok(Vec::new()),
        (false, []) => {}
        (false, urls) => {
            return parse_hops(&urls.join(",")).map_err(|error| CliError::usage(format!("--proxy: {error}")));
        }
    }
    let Some((name, text)) = PROXY_VARIABLES.into_iter().find_map(|name| Some((name, env_var(name)?))) else {
        return parse_hops("127.0.0.1").map_err(CliError::usage);
    };
    let no_proxy = NO_PROXY_VARIABLES.into_iter().find_map(env_var).unwrap_or_default();
    if dst.is_some_and(|dst| is_excluded(&no_proxy, dst)) {
        return Ok(Vec::new());
    }
    parse_hops(&text).map_err(|error| CliError::usage(format!("{name}: {error} (-x overrides it)")))
}

/// Returns what the user may have meant, if the default proxy is used.
pub(super) fn default_proxy_hint(args: &ClientArgs) -> Option<String> {
    if args.direct || !args.proxy.is_empty() || PROXY_VARIABLES.into_iter().any(|name| env_var(name).is_some()) {
        return None;
    }
    let source = |port| format!("-p is the source port; -x 127.0.0.1:{port} sets the port of the proxy");
    let http = HTTP_PROXY_VARIABLES.into_iter().find(|name| env_var(name).is_some());
    let http = http.map(|name| format!("{name} is not used; set ALL_PROXY or -x to a SOCKS5 proxy"));
    args.source_port.map(source).or(http)
}

/// Returns an environment variable that is set and not empty.
pub(super) fn env_var(name: &str) -> Option<String> {
    env::var_os(name).filter(|text| !text.is_empty()).map(|text| text.to_string_lossy().into_owned())
}

/// Returns true if the value of NO_PROXY matches the target. An entry is `*`, a domain (including its subdomains), an
/// address or a CIDR, each with an optional port.
pub fn is_excluded(list: &str, dst: &Addr) -> bool {
    let mut entries = list.split([',', ' ']).map(str::trim).filter(|entry| !entry.is_empty());
    entries.any(|entry| entry == "*" || entry_matches(entry, dst))
}

fn entry_matches(entry: &str, dst: &Addr) -> bool {
    let (entry, port) = split_host_port(entry);
    if port.is_some_and(|port| port.parse() != Ok(dst.port)) {
        return false;
    }
    let entry = entry.trim_start_matches('[').trim_end_matches(']');
    match &dst.host {
        Host::Ip(ip) => matches_ip(entry, *ip),
        Host::Name(name) if name.is_zoned_address() => {
            entry == name.as_str() || parse_literal(name.as_str()).is_some_and(|ip| matches_ip(entry, ip))
        }
        Host::Name(name) => {
            let name = name.as_str().trim_end_matches('.').to_ascii_lowercase();
            let entry = entry.trim_start_matches("*.").trim_matches('.').to_ascii_lowercase();
            !entry.is_empty() && (name == entry || name.strip_suffix(&entry).is_some_and(|rest| rest.ends_with('.')))
        }
    }
}

fn matches_ip(entry: &str, ip: IpAddr) -> bool {
    let ip = ip.to_canonical();
    entry.parse::<IpAddr>().is_ok_and(|entry| entry.to_canonical() == ip)
        || entry.parse::<IpNet>().is_ok_and(|net| net.contains(&ip))
}
