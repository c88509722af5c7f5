//! The facts about one session: for its log lines, and for the requests to the policy.
//!
//! The lines are logfmt: `key=value`, with the keys of rules and of `--explain`. A value that is not known is left out.
//! Text that a client, a peer or a hop can choose is quoted and escaped.

use std::ascii::escape_default;
use std::cell::{Cell, OnceCell};
use std::fmt::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::num::NonZeroU16;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use log::Level;

use super::log_shares::{ACCESS_TARGET, LOGFMT_TARGET, Topic, admit};
use super::options::Hop;
use super::session_counts;
use super::shares::ClientKey;
use super::worker;
use crate::client::Client;
use crate::counters::{self, Counter};
use crate::net::{ByteCounts, DialError, canonical, parse_literal};
use crate::policy::rules::{AccessRequest, Identity};
use crate::proto::{Addr, Command, Host, HostName, Method, ProtectionLevel, Rep};

/// Length of the longest name in bytes, if it needs no escapes.
pub(super) const MAX_NAME_LEN: usize = 255;
/// Time between two lines about the dropped datagrams of an association.
const DROP_INTERVAL: Duration = Duration::from_secs(1);

/// Filled in during the session; writes the log line on drop. Kept small, because every tunnel has one.
#[derive(Debug)]
pub(super) struct SessionLog {
    /// Number of the session since the start of the server.
    pub(super) id: u32,
    /// Time from the start of the first session to that of this one, in microseconds.
    started: u64,
    client: Option<AddrPort>,
    /// Boxed twice, because most sessions have no user.
    pub(super) user: Option<Box<Box<[u8]>>>,
    /// Set after a successful login.
    pub(super) method: Option<Method>,
    pub(super) level: ProtectionLevel,
    pub(super) command: Option<Command>,
    pub(super) dst: Option<Addr>,
    /// The address that stands for DST: of the target, or of the peer of BIND.
    addr: Option<AddrPort>,
    bnd: Option<AddrPort>,
    /// Number of targets of an association.
    targets: Cell<u32>,
    /// Boxed, because most sessions have none.
    path: Option<Box<Path>>,
    pub(super) rep: Option<Rep>,
    /// Generation of the policy that the session was last checked with.
    pub(super) policy_generation: Cell<u32>,
    pub(super) bytes: ByteCounts,
    /// Boxed, because most sessions have no error.
    error: OnceCell<Box<(Topic, String)>>,
}

/// Other machines that a session passes through, and the source addresses of options and rules that were used. Lists are
/// separated by commas.
#[derive(Debug, Default)]
struct Path {
    /// The names of all hops that were used.
    via: String,
    outbound: String,
    /// The load balancer that forwards the client: its address, or `None` on a Unix socket.
    balancer: Option<Option<AddrPort>>,
}

/// A [`SocketAddr`] without flow information. In an `Option`, it takes up 18 bytes instead of 32.
#[derive(Clone, Copy, Debug)]
struct AddrPort {
    /// IPv4 addresses are mapped. A link-local address has its scope in the bits from [`SCOPE_SHIFT`] on, which are
    /// zero in the address itself (RFC 4291 section 2.5.6).
    ip: Ipv6Addr,
    port: NonZeroU16,
}

const SCOPE_SHIFT: u32 = 64;

impl AddrPort {
    /// Returns `None` for port 0, which no connection has.
    fn new(addr: SocketAddr) -> Option<Self> {
        let ip = match addr {
            SocketAddr::V4(addr) => addr.ip().to_ipv6_mapped(),
            SocketAddr::V6(addr) if addr.ip().is_unicast_link_local() => {
                Ipv6Addr::from_bits(addr.ip().to_bits() | u128::from(addr.scope_id()) << SCOPE_SHIFT)
            }
            SocketAddr::V6(addr) => *addr.ip(),
        };
        NonZeroU16::new(addr.port()).map(|port| Self { ip, port })
    }

    fn socket_addr(self) -> SocketAddr {
        if !self.ip.is_unicast_link_local() {
            return SocketAddr::new(self.ip.to_canonical(), self.port.get());
        }
        let scope = (self.ip.to_bits() >> SCOPE_SHIFT) as u32;
        let ip = Ipv6Addr::from_bits(self.ip.to_bits() & !(u128::from(u32::MAX) << SCOPE_SHIFT));
        SocketAddrV6::new(ip, self.port.get(), 0, scope).into()
    }
}

impl SessionLog {
    /// `client` is `None` on a Unix socket.
    pub(super) fn new(client: Option<SocketAddr>) -> Self {
        Self {
            id: session_counts::begin(),
            started: session_counts::uptime_us(),
            client: client.and_then(AddrPort::new),
            user: None,
            method: None,
            level: ProtectionLevel::None,
            command: None,
            dst: None,
            addr: None,
            bnd: None,
            targets: Cell::new(0),
            path: None,
            rep: None,
            policy_generation: Cell::new(0),
            bytes: ByteCounts::default(),
            error: OnceCell::new(),
        }
    }

    /// Sets the reason for the end of the session. The first one is kept.
    pub(super) fn set_error(&self, error: impl ToString) {
        self.set_error_of(Topic::Session, error);
    }

    /// Like [`Self::set_error`], with the topic of the line.
    pub(super) fn set_error_of(&self, topic: Topic, error: impl ToString) {
        let _ = self.error.set(Box::new((topic, error.to_string())));
    }

    /// Counts the result: a success when it is reached, and all others at the end of the session.
    pub(super) fn count_result(&self, is_end: bool) {
        session_counts::count_result(is_end, self.addr.is_some(), (self.command, self.method, self.rep));
    }

    pub(super) fn elapsed(&self) -> Duration {
        Duration::from_micros(session_counts::uptime_us().saturating_sub(self.started))
    }

    pub(super) fn client(&self) -> Option<SocketAddr> {
        self.client.map(AddrPort::socket_addr)
    }

    /// Sets the client that the peer of the connection forwards. Its port is not 0.
    pub(super) fn set_forwarded_client(&mut self, client: SocketAddr) {
        self.path.get_or_insert_default().balancer = Some(self.client);
        self.client = AddrPort::new(client);
    }

    /// Returns whether the client is behind a load balancer.
    pub(super) fn is_forwarded(&self) -> bool {
        self.path.as_ref().is_some_and(|path| path.balancer.is_some())
    }

    /// Sets BND. The first one is kept, which for BIND is the listening socket.
    pub(super) fn set_bnd(&mut self, bnd: SocketAddr) {
        self.bnd = self.bnd.or(AddrPort::new(bnd));
    }

    /// Sets the address that stands for DST.
    pub(super) fn set_addr(&mut self, addr: SocketAddr) {
        self.addr = AddrPort::new(addr);
    }

    /// Adds a hop to those that were used. `proxy` is the client of the chain that works, once it is known.
    pub(super) fn add_via(&mut self, hop: &Hop, proxy: Option<&Client>) {
        let name = proxy.map_or(hop.name.clone(), |proxy| hop.log_name(proxy.hops()));
        add_to_list(&mut self.path.get_or_insert_default().via, &name, &hop.name);
    }

    /// Adds a source address to those that were used.
    pub(super) fn add_outbound(&mut self, ip: IpAddr) {
        add_to_list(&mut self.path.get_or_insert_default().outbound, &ip.to_string(), "");
    }

    /// Returns whether no hop was used.
    pub(super) fn is_direct(&self) -> bool {
        self.path.as_ref().is_none_or(|path| path.via.is_empty())
    }

    /// Returns the identity of a client that has logged in.
    pub(super) fn identity(&self) -> Option<Identity<'_>> {
        self.method.map(|method| Identity { method, user: self.user.as_deref().map(|user| &**user), level: self.level })
    }

    pub(super) fn client_key(&self) -> ClientKey {
        ClientKey::new(self.client().map(|client| client.ip()))
    }

    /// Returns the access request of the session without a target. The address of a client on a Unix socket is 127.0.0.1.
    pub(super) fn client_request(&self) -> AccessRequest<'_> {
        let from = self.client().map_or(Ipv4Addr::LOCALHOST.into(), |client| client.ip().to_canonical());
        let (identity, command) = (self.identity(), self.command);
        AccessRequest { client_ip: Some(from), identity, command, ..AccessRequest::default() }
    }

    /// Returns the access request of the session. For BIND, a zero address in DST matches any peer, and a zero port
    /// that of the peer. DST of UDP ASSOCIATE is not a target.
    pub(super) fn access_request(&self) -> AccessRequest<'_> {
        let request = self.client_request();
        match (&self.dst, self.command) {
            (Some(dst), Some(Command::Connect)) => with_target(request, dst),
            (Some(Addr { host: Host::Ip(ip), .. }), Some(Command::Bind)) if ip.is_unspecified() => request,
            (Some(dst), Some(Command::Bind)) => {
                let request = with_target(request, dst);
                AccessRequest { target_port: request.target_port.filter(|port| *port != 0), ..request }
            }
            _ => request,
        }
    }
}

/// Adds the target `dst` to an access request.
pub(super) fn with_target<'a>(request: AccessRequest<'a>, dst: &'a Addr) -> AccessRequest<'a> {
    let (name, ip) = match &dst.host {
        Host::Ip(ip) => (None, Some(*ip)),
        Host::Name(name) => parse_literal(name.as_str()).map_or((Some(name), None), |ip| (None, Some(ip))),
    };
    AccessRequest {
        target_name: name,
        target_ip: ip.map(|ip| canonical(ip, dst.port).ip()),
        target_port: Some(dst.port),
        ..request
    }
}

/// Adds an address, of the target or of a peer, to an access request. The port of DST is kept, because the peer of BIND
/// connects from another one.
pub(super) fn with_addr(request: AccessRequest<'_>, addr: SocketAddr) -> AccessRequest<'_> {
    AccessRequest { target_ip: Some(addr.ip()), target_port: request.target_port.or(Some(addr.port())), ..request }
}

/// The steps of a session, which only a verbose server logs. Each line has the facts that are known so far.
impl SessionLog {
    fn log_step(&self, level: Level, step: &str, fields: fmt::Arguments<'_>) {
        if self.admit(Topic::Step) {
            log::log!(target: LOGFMT_TARGET, level, "msg={step} {}{fields}", Facts(self, true));
        }
    }

    /// Returns whether the share of the client has room for a line.
    fn admit(&self, topic: Topic) -> bool {
        admit(topic, (topic != Topic::Refused).then(|| self.client_key()))
    }

    /// Logs a step without further facts.
    pub(super) fn log_progress(&self, step: &str) {
        self.log_step(Level::Debug, step, format_args!(""));
    }

    pub(super) fn log_methods(&self, offered: &[Method], selected: Option<Method>) {
        let selected = selected.unwrap_or(Method::NO_ACCEPTABLE);
        self.log_step(Level::Trace, "greeting", format_args!(" offered=\"{}\" selected=\"{selected}\"", List(offered)));
    }

    /// DST of UDP ASSOCIATE is not a target, but the address that the client announces.
    pub(super) fn log_request(&self) {
        match (self.command, &self.dst) {
            (Some(Command::UdpAssociate), Some(dst)) => {
                self.log_step(Level::Trace, "request", format_args!(" announced={}", quote_addr(dst)));
            }
            _ => self.log_step(Level::Trace, "request", format_args!("")),
        }
    }

    /// `name` is that of a datagram; otherwise it is DST.
    pub(super) fn log_lookup(&self, name: Option<&HostName>, found: &Result<Vec<SocketAddr>, DialError>) {
        let to = Field(" to=", name.map(|name| format!("\"{}\"", escape_name(name.as_str()))));
        match found {
            Ok(addrs) => self.log_step(Level::Debug, "lookup", format_args!("{to} addrs=\"{}\"", List(addrs))),
            Err(error) => self.log_step(Level::Debug, "lookup", format_args!("{to} error=\"{error}\"")),
        }
    }

    /// Logs that a hop of a UDP association does not work. `dropped`: the number of datagrams dropped so far.
    pub(super) fn log_hop(&self, hop: &Hop, dropped: usize, error: &str) {
        self.log_step(Level::Debug, "hop", format_args!(" hop={:?} dropped={dropped} error={error:?}", hop.name));
    }

    pub(super) fn log_other_peer(&self, peer: SocketAddr) {
        self.log_step(Level::Debug, "peer", format_args!(" peer={peer} error=\"not the expected peer, or denied\""));
    }

    /// Counts a target that an association sends to for the first time: `addr` of `dst`, or `dst` itself through a hop.
    pub(super) fn log_target(&self, dst: &dyn fmt::Display, addr: Option<SocketAddr>, via: Option<&Hop>) {
        self.targets.set(self.targets.get().saturating_add(1));
        if !self.admit(Topic::Step) {
            return;
        }
        let (facts, addr, via) =
            (Facts(self, false), Field(" addr=", addr), Field(" via=", via.map(|hop| format!("{:?}", hop.name))));
        log::debug!(target: LOGFMT_TARGET, "msg=datagram {facts} to={}{addr}{via}", quote_addr(dst));
    }

    pub(super) fn log_reply(&self, rep: Rep, bnd: &Addr) {
        self.log_step(Level::Trace, "reply", format_args!(" rep={} bnd={}", rep.0, quote_addr(bnd)));
    }
}

/// Counts the datagrams that an association has dropped since the last line about them. A line has their number, and the
/// reason and destination of the last one.
#[derive(Default)]
pub(super) struct DropLog {
    count: Cell<u32>,
    next_line: Cell<Option<Instant>>,
}

impl DropLog {
    /// Counts a datagram to `dst`. `None`: the reason says what is known of it.
    pub(super) fn record(&self, log: &SessionLog, dst: Option<&Addr>, reason: impl fmt::Display) {
        if !log::log_enabled!(target: LOGFMT_TARGET, Level::Debug) {
            return;
        }
        self.count.set(self.count.get().saturating_add(1));
        let now = Instant::now();
        if self.next_line.get().is_none_or(|next| now >= next) {
            self.next_line.set(Some(now + DROP_INTERVAL));
            let (dst, reason, count) = (Field(" to=", dst.map(quote_addr)), reason.to_string(), self.count.take());
            log.log_step(Level::Debug, "drop", format_args!("{dst} dropped={count} error={reason:?}"));
        }
    }
}

impl Drop for SessionLog {
    fn drop(&mut self) {
        if worker::is_ending() {
            self.set_error_of(self.method.map_or(Topic::Step, |_| Topic::Session), "cut at shutdown");
        }
        session_counts::end();
        self.count_result(true);
        let topic = self.error.get().map_or(Topic::Session, |error| error.0);
        counters::add(Counter::FailedLogins, u64::from(topic == Topic::Login));
        if self.admit(topic) {
            log::log!(target: ACCESS_TARGET, topic.level(), "msg=session {self}");
        }
    }
}

/// The fields of the client and its request, which all lines of a session have. `true`: those of the route to the target
/// too.
struct Facts<'a>(&'a SessionLog, bool);

impl fmt::Display for Facts<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(log, has_route) = self;
        let from = |client: Option<AddrPort>| client.map_or("unix".into(), |addr| addr.socket_addr().to_string());
        write!(f, "id={} from={}", log.id, from(log.client))?;
        Field(" proxy=", log.path.as_ref().and_then(|path| path.balancer).map(from)).fmt(f)?;
        Field(" user=", log.user.as_ref().map(|user| format!("\"{}\"", escape_user(user)))).fmt(f)?;
        Field(" method=", log.method).fmt(f)?;
        Field(" protection=", log.method.filter(|method| *method == Method::GSSAPI).map(|_| log.level)).fmt(f)?;
        Field(" command=", log.command).fmt(f)?;
        let dst = log.dst.as_ref().filter(|_| log.command != Some(Command::UdpAssociate));
        Field(" to=", dst.map(quote_addr)).fmt(f)?;
        Field(" addr=", log.addr.filter(|_| *has_route).map(AddrPort::socket_addr)).fmt(f)?;
        let Some(Path { via, outbound, .. }) = log.path.as_deref().filter(|_| *has_route) else { return Ok(()) };
        Field(" via=", Some(via).filter(|names| !names.is_empty()).map(|names| format!("{names:?}"))).fmt(f)?;
        Field(" outbound=", Some(outbound).filter(|ips| !ips.is_empty())).fmt(f)
    }
}

impl fmt::Display for SessionLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Facts(self, true).fmt(f)?;
        Field(" bnd=", self.bnd.map(AddrPort::socket_addr)).fmt(f)?;
        Field(" rep=", self.rep.map(|rep| rep.0)).fmt(f)?;
        let is_association = self.command == Some(Command::UdpAssociate) && self.bnd.is_some();
        Field(" targets=", is_association.then(|| self.targets.get())).fmt(f)?;
        let [up, down] = [&self.bytes.up, &self.bytes.down].map(|bytes| bytes.load(Ordering::Relaxed));
        let elapsed = self.elapsed();
        write!(f, " up={up} down={down} seconds={}.{:03}", elapsed.as_secs(), elapsed.subsec_millis())?;
        Field(" error=", self.error.get().map(|error| format!("{:?}", error.1))).fmt(f)
    }
}

/// Adds an entry to a list that is separated by commas, instead of `replaced`.
fn add_to_list(list: &mut String, entry: &str, replaced: &str) {
    let others = list.split(',').filter(|other| !other.is_empty() && *other != entry && *other != replaced);
    *list = others.chain([entry]).collect::<Vec<_>>().join(",");
}

/// A key with its value; nothing if the value is not known.
struct Field<T>(&'static str, Option<T>);

impl<T: fmt::Display> fmt::Display for Field<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.1.as_ref().map_or(Ok(()), |value| write!(f, "{}{value}", self.0))
    }
}

/// Quotes `host:port`, where the port is a number.
fn quote_addr(addr: impl fmt::Display) -> String {
    let text = addr.to_string();
    let (host, port) = text.rsplit_once(':').unwrap_or((&text, ""));
    format!("\"{}:{port}\"", escape_name(host))
}

fn escape_name(name: &str) -> String {
    escape(name.chars().map(char::escape_debug), name.len())
}

fn escape_user(user: &[u8]) -> String {
    let escape_bytes = |_| escape(user.iter().map(|byte| escape_default(*byte)), user.len());
    std::str::from_utf8(user).map_or_else(escape_bytes, escape_name)
}

/// Joins the escaped characters of a name. Cuts a name that is too long, and adds its length in bytes.
fn escape(characters: impl Iterator<Item = impl fmt::Display>, length: usize) -> String {
    let mut escaped = String::new();
    for character in characters {
        let end = escaped.len();
        let _ = write!(escaped, "{character}");
        if escaped.len() > MAX_NAME_LEN {
            escaped.truncate(end);
            return format!("{escaped}...({length} bytes)");
        }
    }
    escaped
}

/// Values separated by commas.
struct List<'a, T>(&'a [T]);

impl<T: fmt::Display> fmt::Display for List<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (0..).zip(self.0).try_for_each(|(i, value)| write!(f, "{}{value}", if i > 0 { "," } else { "" }))
    }
}
