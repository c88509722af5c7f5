//! The operands of the client modes: the target, or the peer that BIND expects.

use super::options::ClientArgs;
use crate::client::{parse_addr, parse_addr_or_host, parse_port};
use crate::cmd::cli::exit::{CliError, CliResult};
use crate::proto::{Addr, split_host_port};

/// The error for an operand with `user@` or `user:password@`. It does not show the operand, which may have a password.
const USER_NAME: &str = "expected a host without a user name (-x takes the URL of a proxy)";

/// Returns the target, given as `host:port` or as `host port`. `None`: there is none, and `-z` does not need one.
pub(crate) fn target(args: &ClientArgs, is_udp: bool) -> CliResult<Option<Addr>> {
    let parsed = match args.target.as_slice() {
        [] if args.zero_io => return Ok(None),
        [] => {
            let purpose = if args.listen.is_some() { " (-l forwards to it)" } else { "" };
            return Err(CliError::usage(format!("a target is required: HOST:PORT, or HOST and PORT{purpose}")));
        }
        [url, ..] if url.contains("://") => Err(url_error(url)),
        operands if operands.iter().any(|operand| operand.contains('@')) => Err(USER_NAME.into()),
        [host_port] => parse_addr(host_port, is_udp),
        [host, port] if parse_addr(host, is_udp).is_err() => host_and_port(host, port, is_udp),
        [proxy, target] if parse_addr(target, is_udp).is_ok() => {
            Err(format!("expected one HOST:PORT (-x takes the proxy: -x {proxy} {target})"))
        }
        _ => return Err(CliError::usage("too many operands: expected HOST:PORT, or HOST and PORT")),
    };
    match parsed {
        Ok(addr) if addr.port == 0 => Err(CliError::usage("target: the port must not be 0")),
        parsed => parsed.map(Some).map_err(|error| CliError::usage(format!("target: {error}"))),
    }
}

/// Returns the peer that may connect, given as `host`, `host:port` or `host port`. `None`: any peer.
pub(crate) fn expected_peer(args: &ClientArgs) -> CliResult<Option<Addr>> {
    let parsed = match args.target.as_slice() {
        [] => return Ok(None),
        [port] if port.parse::<u16>().is_ok() => {
            Err(format!("expected HOST, found a port (the proxy chooses its port; 0.0.0.0:{port} asks for this one)"))
        }
        [url, ..] if url.contains("://") => Err(url_error(url)),
        operands if operands.iter().any(|operand| operand.contains('@')) => Err(USER_NAME.into()),
        [peer] => parse_addr_or_host(peer, 0),
        [host, port] if parse_addr(host, false).is_err() => host_and_port(host, port, false),
        [_, extra, ..] => {
            return Err(CliError::usage(format!("too many operands: expected one peer, found also {extra:?}")));
        }
    };
    parsed.map(Some).map_err(|error| CliError::usage(format!("peer: {error}")))
}

fn host_and_port(host: &str, port: &str, is_udp: bool) -> Result<Addr, String> {
    Ok(Addr { host: host.parse()?, port: parse_port(port, is_udp)? })
}

/// Returns the error for a URL as an operand, with the target in it. A URL may have a password, so it is not shown.
fn url_error(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or_default();
    if scheme.to_ascii_lowercase().starts_with("socks") {
        return "expected HOST:PORT, not a URL (-x takes the URL of a proxy)".into();
    }
    let after_userinfo = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
    let authority = after_userinfo.split(['/', '?', '#']).next().unwrap_or_default();
    let (host, port) = split_host_port(authority);
    let port = port.map_or_else(|| parse_port(scheme, false).map(|port| port.to_string()), |port| Ok(port.into()));
    format!("expected HOST:PORT, not a URL (write {host}:{})", port.unwrap_or_else(|_| "PORT".into()))
}
