//! The request of `--explain`: the conditions of a rule with one value each, or the fields of a log line.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use percent_encoding::{AsciiSet, CONTROLS, percent_encode};

use crate::cmd::cli::logfmt::{Value, next_field};
use crate::policy::Policy;
use crate::policy::rules::{AccessRequest, Identity, decode_user};
use crate::proto::{Addr, Command, Host, HostName, Method, ProtectionLevel, parse_port, split_host_port};

/// Keys of a log line that say nothing about the request.
const IGNORED: [&str; 14] =
    ["ts", "level", "msg", "id", "proxy", "via", "outbound", "bnd", "rep", "targets", "up", "down", "seconds", "error"];
/// Characters of a user name that rules escape, in addition to those that are not ASCII.
const ESCAPED: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'#').add(b'%').add(b'\'').add(b'*').add(b',');

/// The default of `from=`.
const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

#[derive(Debug)]
pub(super) struct ExplainedRequest {
    from: IpAddr,
    pub(super) user: Option<Vec<u8>>,
    method: Method,
    level: ProtectionLevel,
    command: Command,
    pub(super) to: Option<Addr>,
    /// Set if the port of `to` is known, even if it is 0. Port 0 of BIND means any port.
    has_port: bool,
    /// The address of the target that a log line has. Its port counts if that of the target is 0.
    pub(super) addr: Option<SocketAddr>,
}

impl Value {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }

    fn user(self) -> Result<Vec<u8>, String> {
        if self.is_quoted { Ok(self.bytes) } else { decode_user(&self.text()) }
    }

    /// Parses an address, with or without a port. `unix` is 127.0.0.1, as rules see it.
    fn socket_addr(&self, key: &str) -> Result<SocketAddr, String> {
        let text = self.text();
        let (start, zone) = text.split_once('%').unwrap_or((&text, ""));
        let without_zone = format!("{start}{}", zone.find(']').and_then(|end| zone.get(end..)).unwrap_or_default());
        let addr = match without_zone.parse::<SocketAddr>() {
            _ if text == "unix" => Ok(LOOPBACK),
            Ok(addr) => Ok(addr),
            Err(_) => without_zone.trim_matches(['[', ']']).parse().map(|ip: IpAddr| SocketAddr::new(ip, 0)),
        };
        let addr = addr.map(|addr| SocketAddr::new(addr.ip().to_canonical(), addr.port()));
        addr.map_err(|_| format!("{key}={text}: expected one IP address, with or without a port"))
    }

    /// Parses a host, with or without a port. The log has every name that a client may send.
    fn addr(&self) -> Result<Addr, String> {
        let text = self.text();
        Addr::parse_with_default_port(&text, 0).or_else(|error| match (self.is_quoted, split_host_port(&text)) {
            (true, (host, Some(port))) => {
                let inner = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
                let host = inner.filter(|inner| inner.contains(':')).unwrap_or(host);
                let name = HostName::new(host.as_bytes()).map_err(|_| error)?;
                Ok(Addr { host: Host::Name(name), port: parse_port(port)? })
            }
            _ => Err(error),
        })
    }
}

impl ExplainedRequest {
    pub(super) fn parse(text: &str, policy: &Policy) -> Result<Self, String> {
        let mut fields = parse_fields(text)?;
        let mut take = |key: &str| fields.remove(key).filter(|value| value.is_quoted || value.bytes != b"-");
        let [from, user, to, addr] = ["from", "user", "to", "addr"].map(&mut take);
        let [method, level, command, port] = ["method", "protection", "command", "port"].map(&mut take);
        let text = |value: Value| value.text();
        let user = user.map(Value::user).transpose()?;
        let has_password = |user: &Vec<u8>| policy.users.as_ref().is_some_and(|users| users.contains(user));
        let default_method = match &user {
            None => Method::NONE,
            // The log has the protection level of GSSAPI sessions only.
            Some(_) if level.is_some() => Method::GSSAPI,
            Some(user) if user.contains(&b'@') && !has_password(user) => Method::GSSAPI,
            Some(_) => Method::PASSWORD,
        };
        let addr = addr.map(|addr| addr.socket_addr("addr")).transpose()?;
        let has_port = port.is_some() || to.as_ref().is_some_and(|to| split_host_port(&to.text()).1.is_some());
        let mut to = to.map(|to| to.addr()).transpose()?.or(addr.map(Addr::from));
        if let (Some(to), Some(port)) = (&mut to, port.map(text)) {
            to.port = parse_port(&port)?;
        }
        let command = command.map(text).map_or(Ok(Command::Connect), |text| text.parse())?;
        Ok(Self {
            from: from.map_or(Ok(LOOPBACK), |from| from.socket_addr("from"))?.ip(),
            user,
            method: method.map(text).map_or(Ok(default_method), |text| text.parse())?,
            level: level.map(text).map_or(Ok(ProtectionLevel::None), |text| text.parse())?,
            command,
            to,
            has_port: has_port && command != Command::Bind,
            addr,
        })
    }

    pub(super) fn request(&self) -> AccessRequest<'_> {
        let port = self.target().map(|to| to.port);
        let ports = [port, self.addr.map(|addr| addr.port())];
        let first_known = ports.into_iter().flatten().find(|port| *port != 0);
        let identity = Identity { method: self.method, user: self.user.as_deref(), level: self.level };
        AccessRequest {
            client_ip: Some(self.from),
            identity: Some(identity),
            command: Some(self.command),
            target_port: port.filter(|_| self.has_port).or(first_known),
            ..AccessRequest::default()
        }
    }

    /// Returns the target. BIND for `0.0.0.0` or `[::]` accepts any peer, and UDP ASSOCIATE has a target only for each
    /// datagram, so these requests have none, and their port is not that of a target.
    pub(super) fn target(&self) -> Option<&Addr> {
        let has_none = |host: &Host| matches!(host, Host::Ip(ip) if ip.is_unspecified());
        self.to.as_ref().filter(|to| self.command == Command::Connect || !has_none(&to.host))
    }

    /// Returns true if an address, of the peer of BIND or of a datagram, follows the request.
    pub(super) fn can_wait(&self) -> bool {
        let has_no_target = self.command == Command::Bind || self.target().is_none();
        self.command != Command::Connect && has_no_target && self.addr.is_none()
    }
}

impl fmt::Display for ExplainedRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "from={} ", self.from)?;
        self.user.as_ref().map_or(Ok(()), |user| write!(f, "user={} ", percent_encode(user, ESCAPED)))?;
        write!(f, "method={} protection={} command={}", self.method, self.level, self.command)?;
        match &self.to {
            Some(to) if self.has_port => write!(f, " to={to}")?,
            Some(Addr { host: Host::Name(name), port: 0 }) => write!(f, " to={}", name.as_str())?,
            Some(Addr { host: Host::Ip(ip), port: 0 }) => write!(f, " to={ip}")?,
            Some(to) => write!(f, " to={to}")?,
            None => {}
        }
        match self.addr {
            Some(addr) if addr.port() == 0 => write!(f, " addr={}", addr.ip()),
            Some(addr) => write!(f, " addr={addr}"),
            None => Ok(()),
        }
    }
}

/// Parses `key=value` fields. A log line can have other words before its first field.
fn parse_fields(text: &str) -> Result<HashMap<&str, Value>, String> {
    let (mut rest, is_log_line) = match log_line(text) {
        Some(fields) => (fields, true),
        None => (text, false),
    };
    let mut fields = HashMap::new();
    while let Some((word, key, value, next)) = next_field(rest.trim_start())? {
        rest = next;
        let key = match key {
            // Earlier names in the log.
            "client" => "from",
            "dst" => "to",
            key => key.rsplit('>').next().unwrap_or(key),
        };
        match key {
            "from" | "user" | "method" | "protection" | "command" | "to" | "port" | "addr" => {
                let is_empty = value.bytes.is_empty() && !value.is_quoted;
                if is_empty || fields.insert(key, value).is_some() {
                    return Err(format!("{word:?}: empty value or duplicate key"));
                }
            }
            _ if is_log_line || IGNORED.contains(&key) => {}
            _ => {
                let keys = "from, user, method, protection, command, to, port, addr";
                return Err(format!("unknown key {key:?} (keys are {keys}, and the fields of a log line)"));
            }
        }
    }
    Ok(fields)
}

/// Returns the fields of a log line, which can follow the words of a logger.
fn log_line(text: &str) -> Option<&str> {
    let mut rest = text;
    loop {
        rest = rest.trim_start();
        let (word, next) = rest.split_once(char::is_whitespace)?;
        // Without a journal that reads it, a priority such as <6> precedes the first field.
        let field = word.rsplit('>').next().unwrap_or(word);
        if ["ts=", "level=", "msg="].iter().any(|start| field.starts_with(start)) {
            return Some(rest);
        }
        if word == "session" {
            return Some(next);
        }
        rest = next;
    }
}
