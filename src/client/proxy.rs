//! Proxies as users write them, and the hosts and ports behind them.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use percent_encoding::percent_decode_str;

use crate::proto::{self, Addr, Credentials, DEFAULT_PORT, Host, MAX_FIELD, Name};

/// One SOCKS5 server on the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proxy {
    /// Where it is.
    pub endpoint: Endpoint,
    /// Who we are to it.
    pub credentials: Option<Credentials>,
}

/// Where a proxy is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A host and a port.
    Tcp(Addr),
    /// A Unix socket.
    Unix(PathBuf),
}

/// Never shows credentials.
impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.endpoint {
            Endpoint::Tcp(addr) => addr.fmt(f),
            Endpoint::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// `\[socks5\[h\]://][user:pass@]host[:port]` or `unix:/path`. The host's name is looked up here, all others by the
/// proxy, whichever scheme is given.
impl FromStr for Proxy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rest = match text.split_once("://") {
            Some((scheme, rest)) if ["socks5", "socks5h"].contains(&scheme.to_ascii_lowercase().as_str()) => rest,
            // Only what can be a scheme is shown; it could also be the beginning of a password.
            Some((scheme, _)) if scheme.chars().all(|c| c.is_ascii_alphanumeric()) => {
                return Err(format!("{scheme}:// is not SOCKS5, and s5 speaks nothing else: use socks5h://HOST:PORT"));
            }
            _ => text,
        };
        let (userinfo, place) = match rest.rsplit_once('@') {
            Some((userinfo, place)) => (Some(userinfo), place),
            None => (None, rest),
        };
        // A user name without a password is nothing to log in with.
        let credentials = userinfo.and_then(|userinfo| userinfo.split_once(':')).map(parse_userinfo).transpose()?;
        let place = place.trim_end_matches('/');
        let endpoint = match place.strip_prefix("unix:") {
            Some("") => return Err("unix: without a path".into()),
            Some(path) => Endpoint::Unix(path.into()),
            None => Endpoint::Tcp(parse_addr(place, Some(DEFAULT_PORT))?),
        };
        Ok(Self { endpoint, credentials })
    }
}

/// A comma list of proxies, nearest first.
///
/// # Errors
/// What is wrong with the first one that is wrong, without its credentials.
pub fn parse_hops(text: &str) -> Result<Vec<Proxy>, String> {
    let parse = |hop: &str| hop.trim().parse();
    let hops = text.split(',').map(parse).collect::<Result<Vec<Proxy>, String>>().map_err(|error| {
        // Whatever is quoted may be a password, or a part of one.
        let what = "not [socks5h://][user:password@]host[:port] or unix:/path; in user and password write \
                    %2C %2F %3A %40 %25 for , / : @ %";
        if error.contains('"') { what.into() } else { error }
    })?;
    match hops.iter().skip(1).find(|hop| matches!(hop.endpoint, Endpoint::Unix(_))) {
        Some(hop) => Err(format!("{hop}: a Unix socket can only be the first hop")),
        None => Ok(hops),
    }
}

fn parse_userinfo((uname, passwd): (&str, &str)) -> Result<Credentials, String> {
    let decode = |what: &str, text: &str| {
        let octets: Vec<u8> = percent_decode_str(text).collect();
        match octets.len() {
            1..=MAX_FIELD => Ok(octets),
            length => Err(format!("the {what} has {length} octets, and SOCKS5 takes 1 to {MAX_FIELD}")),
        }
    };
    Ok(Credentials { uname: decode("user name", uname)?, passwd: decode("password", passwd)? })
}

/// `host:port`, `\[v6\]:port`, `v4:port`; with a default port also without one.
///
/// # Errors
/// What is wrong, in words.
pub fn parse_addr(text: &str, default_port: Option<u16>) -> Result<Addr, String> {
    let (host, port) = match text.rsplit_once(':') {
        // Several colons and no brackets: an IPv6 address alone.
        Some((host, _)) if host.contains(':') && !host.starts_with('[') => (text, None),
        Some((_, port)) if text.starts_with('[') && port.ends_with(']') => (text, None),
        Some((host, port)) => (host, Some(port)),
        None => (text, None),
    };
    let port = match (port, default_port) {
        (Some(port), _) => parse_port(port)?,
        (None, Some(port)) => port,
        (None, None) => return Err(format!("{text:?} has no port: write host:port or [v6]:port")),
    };
    Ok(Addr { host: parse_host(host)?, port })
}

/// # Errors
/// What is wrong, in words.
pub fn parse_port(text: &str) -> Result<u16, String> {
    text.parse().map_err(|_| format!("{text:?} is not a port (0 to 65535)"))
}

/// An IPv4 or IPv6 address, with or without brackets, or a name.
///
/// # Errors
/// What is wrong, in words.
pub fn parse_host(text: &str) -> Result<Host, String> {
    let inner = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    if let Ok(ip) = inner.unwrap_or(text).parse::<IpAddr>() {
        return Ok(Host::Ip(ip));
    }
    if text.is_empty() {
        return Err("the host is empty".into());
    }
    if inner.is_some() || text.contains(':') {
        return Err(format!("{text:?} is not an IPv6 address"));
    }
    if text.contains(['/', '@', ' ']) {
        return Err(format!("{text:?} is not a host name"));
    }
    Name::new(text.as_bytes()).map(Host::Name).map_err(|_| match text.len() {
        length if length > proto::MAX_NAME => format!("the host name has {length} octets, and SOCKS5 takes 255"),
        _ => format!("{text:?} is not a host name"),
    })
}
