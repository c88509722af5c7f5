//! Proxies, their URLs, and addresses as users write them: a port can be the name of a service.

use std::ffi::OsString;
use std::fmt;
use std::net::Ipv6Addr;
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;
use std::str::FromStr;

use percent_encoding::percent_decode_str;

use crate::net::service_port;
use crate::proto::{self, Addr, Credentials, DEFAULT_PORT, MAX_CREDENTIAL_LEN, split_host_port};

/// End of the URL of a proxy that gets user name and password of the client. A user name cannot follow the host.
const CLIENT_LOGIN: &str = "?user=client";

/// A SOCKS5 proxy and the credentials for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proxy {
    /// The address of the proxy.
    pub endpoint: Endpoint,
    /// The user name, if the URL has one without a password.
    pub uname: Option<Vec<u8>>,
    /// User name and password, if the proxy has both.
    pub credentials: Option<Credentials>,
    /// Set if the proxy gets user name and password of the client of a server.
    pub forwards_login: bool,
}

/// Address of a proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A host and a port.
    Tcp(Addr),
    /// A Unix socket.
    Unix(PathBuf),
}

/// Writes the address, without credentials.
impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.endpoint {
            Endpoint::Tcp(addr) => addr.fmt(f),
            Endpoint::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Parses `[socks5h://][user[:password]@]host[:port]`, `unix:/path`, or the latter in curl's form
/// `socks5h://localhost/path`. `socks5://` and `socks://` (which GNOME sets) are the same: no scheme selects where the
/// name of the target is resolved.
impl FromStr for Proxy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_supported = |scheme: &str| ["socks5h", "socks5", "socks"].contains(&&*scheme.to_ascii_lowercase());
        let text = match text.split_once("://") {
            Some((scheme, rest)) if is_supported(scheme) => rest,
            // Other text is not printed: it may be part of a password.
            Some((scheme, _)) if scheme.chars().all(|c| c.is_ascii_alphanumeric()) => {
                return Err(format!("{scheme}:// is not supported (use socks5h://HOST:PORT)"));
            }
            _ => text,
        };
        // User and password end with the last `@` before the first `/`: a path may contain `@` too.
        let authority = text.split('/').next().unwrap_or_default();
        let userinfo = authority.rsplit_once('@').map(|(userinfo, _)| userinfo);
        let address = userinfo.and_then(|userinfo| text.get(userinfo.len() + 1..)).unwrap_or(text);
        if userinfo.is_some_and(|userinfo| userinfo.rsplit('@').next() == Some("unix:")) {
            check_unix_path("@")?;
        }
        let decode = |text: &str| percent_decode_str(text).collect::<Vec<u8>>();
        let login = userinfo.and_then(|userinfo| userinfo.split_once(':'));
        let credentials = login.map(|(user, passwd)| Credentials { uname: decode(user), passwd: decode(passwd) });
        let uname = userinfo.filter(|_| login.is_none()).map(decode);
        credentials.as_ref().map_or(Ok(()), check_credentials)?;
        let forwards_login = address.ends_with(CLIENT_LOGIN);
        if forwards_login && userinfo.is_some() {
            return Err(format!("{CLIENT_LOGIN} and a user cannot be combined"));
        }
        let address = address.strip_suffix(CLIENT_LOGIN).unwrap_or(address).trim_end_matches('/');
        // `unix:a/b@host` may be a user and a password with a `/`.
        let is_path = |path: &&str| path.starts_with(['/', '.']) || !path.contains('@');
        let curl_path = address.strip_prefix("localhost").filter(|path| path.starts_with('/'));
        let endpoint = match address.strip_prefix("unix:").filter(is_path).or(curl_path) {
            _ if address.contains('?') => return Err(format!("a proxy URL has no parameters but {CLIENT_LOGIN}")),
            Some(path) => check_unix_path(path).map(|()| Endpoint::Unix(OsString::from_vec(decode(path)).into()))?,
            None if address.contains('/') => {
                let remedy = "write unix:/PATH for a Unix socket, and %2F for / in a password";
                return Err(format!("a proxy URL has no path ({remedy})"));
            }
            None => Endpoint::Tcp(parse_addr_or_host(&decode_zone(address), DEFAULT_PORT)?),
        };
        if matches!(endpoint, Endpoint::Tcp(Addr { port: 0, .. })) {
            return Err("the port of a proxy must not be 0".into());
        }
        Ok(Self { endpoint, uname, credentials, forwards_login })
    }
}

/// Checks a path after `unix:`. Elsewhere, as in units of systemd, `@` begins the name of an abstract socket.
pub fn check_unix_path(path: &str) -> Result<(), String> {
    match path.as_bytes() {
        [] | [.., b'/'] => Err("requires the path of a file, as in unix:/run/s5.sock".into()),
        [b'@', ..] => Err("abstract sockets are not supported (for a file, write ./ before its name)".into()),
        _ => Ok(()),
    }
}

/// Replaces the `%25` before a zone by `%` (RFC 6874).
fn decode_zone(address: &str) -> String {
    match address.split_once("%25") {
        // `%25` alone is zone 25.
        Some((ip, zone)) if zone.starts_with(|c: char| c.is_ascii_alphabetic()) => format!("{ip}%{zone}"),
        _ => address.into(),
    }
}

/// Parses a comma-separated list of proxies, nearest first. Error messages do not contain credentials.
pub fn parse_hops(text: &str) -> Result<Vec<Proxy>, String> {
    let parse = |hop: &str| match hop.trim() {
        "" => Err("empty URL before or after , or |".into()),
        hop => hop.parse(),
    };
    let hops = text.split(',').map(parse).collect::<Result<Vec<Proxy>, String>>().map_err(|error| {
        // Quoted text may be a password, or a part of one.
        let hint = "expected [socks5h://][user:password@]host[:port] or unix:/path; in user, password and \
                    path, write %2C %2F %3A %3F %40 %7C %25 for , / : ? @ | %";
        if error.contains('"') { hint.into() } else { error }
    })?;
    match hops.iter().skip(1).find(|hop| matches!(hop.endpoint, Endpoint::Unix(_))) {
        Some(hop) => Err(format!("{hop}: a Unix socket can only be the first hop")),
        None => Ok(hops),
    }
}

/// Checks the lengths of user name and password: 1 to 255 bytes (RFC 1929). An empty password is possible too: a server
/// that takes a token as the user name ignores it. The error message contains neither of them.
pub fn check_credentials(credentials: &Credentials) -> Result<(), String> {
    for (name, bytes, min_len) in [("user name", &credentials.uname, 1), ("password", &credentials.passwd, 0)] {
        if !(min_len..=MAX_CREDENTIAL_LEN).contains(&bytes.len()) {
            return Err(format!("the {name} has {} bytes: SOCKS5 allows 1 to {MAX_CREDENTIAL_LEN}", bytes.len()));
        }
    }
    Ok(())
}

/// Parses a port from 0 to 65535, or the name of a TCP or UDP service.
pub fn parse_port(text: &str, is_udp: bool) -> Result<u16, String> {
    let is_word = text.starts_with(|c: char| c.is_ascii_alphabetic());
    proto::parse_port(text).or_else(|error| match service_port(text, is_udp) {
        None if is_word => Err(format!("{text:?} is neither a port nor a known service")),
        port => port.ok_or(error),
    })
}

/// Parses `host:port` or `[ipv6]:port`.
pub fn parse_addr(text: &str, is_udp: bool) -> Result<Addr, String> {
    Addr::parse_with(text, None, |port| parse_port(port, is_udp))
}

/// Parses `host`, `host:port` or `[ipv6]:port`. Without brackets, an IPv6 address must not look as if it ended with a
/// port.
pub fn parse_addr_or_host(text: &str, default_port: u16) -> Result<Addr, String> {
    let (host, port) = text.rsplit_once(':').unwrap_or_default();
    let ends_with_port = port.parse::<u16>().is_ok() && host.parse::<Ipv6Addr>().is_ok();
    if split_host_port(text).1.is_none() && ends_with_port {
        return Err(format!("{text} is ambiguous (write [{host}]:{port}, or [{text}] if it has no port)"));
    }
    Addr::parse_with(text, Some(default_port), |port| parse_port(port, false))
}
