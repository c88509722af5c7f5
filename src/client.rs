//! The SOCKS5 client handshake, through any number of proxies (hops). Without hops, connects to the target directly.
//!
//! A [`ClientError`] names the proxy, the phase and the cause; `cmd` maps it to an exit status.

mod association;
mod error;
mod peer_socket;
mod proxy;

use std::cell::Cell;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::conn::{Conn, Protection, ReadError};
use crate::gssapi::{GssapiError, Initiator, Ticket};
use crate::name_addrs::MAX_ADDRS;
use crate::net::{
    self, DialError, DialLimits, LocalAddr, Unlimited, canonical, connect_unix, dial, set_keepalive, timeout_at,
};
use crate::proto::{
    self, Addr, Command, Greeting, Host, LoginStatus, Message, Method, MethodSelection, OtherProtocol, Rep, Reply,
    Request,
};
pub use association::Association;
pub use error::{ClientError, ClientErrorKind, Phase, PhaseTimes};
pub use proxy::{
    Endpoint, Proxy, check_credentials, check_unix_path, parse_addr, parse_addr_or_host, parse_hops, parse_port,
};

/// Settings of all handshakes, with any proxy and target. User names and passwords are part of each [`Proxy`].
#[derive(Clone, Debug, Default)]
pub struct ClientOptions {
    /// Methods to offer to all proxies, in order. `None`: `none`, and all methods for which there are credentials.
    pub methods: Option<Vec<Method>>,
    /// Settings for GSSAPI. `None`: GSSAPI is not offered.
    pub gssapi: Option<Initiator>,
    /// Limits of lookups and connection attempts. `None`: no limits.
    pub limits: Option<Arc<dyn DialLimits>>,
    /// Local address of connections and datagrams.
    pub local: LocalAddr,
    /// Whether this machine resolves the target's name, instead of the last proxy.
    pub resolves_target: bool,
    /// Whether datagrams are sent to the address of each proxy, instead of that in its reply.
    pub proxy_is_udp_relay: bool,
    /// Whether the socket of the tunnel is passed to another process, with all bytes that follow the reply.
    pub passes_socket: bool,
}

impl ClientOptions {
    fn limits(&self) -> &dyn DialLimits {
        self.limits.as_deref().unwrap_or(&Unlimited)
    }

    /// Resolves `addr`. Returns the addresses of the families that the local address allows.
    async fn lookup(&self, addr: &Addr) -> Result<Vec<SocketAddr>, DialError> {
        let mut addrs = lookup(addr, self.limits()).await?;
        addrs.retain(|addr| self.local.can_reach(addr.ip()));
        if addrs.is_empty() { Err(DialError::FamilyUnavailable) } else { Ok(addrs) }
    }
}

/// One handshake: the proxies, the target and the deadline.
#[derive(Debug)]
pub struct Client {
    hops: Vec<Proxy>,
    dst: Addr,
    pub(crate) deadline: Option<(Instant, Duration)>,
    options: Arc<ClientOptions>,
    progress: Cell<Progress>,
}

/// How far a handshake is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Progress {
    /// Index of the current hop.
    hop: usize,
    pub(crate) phase: Phase,
    since: Instant,
    pub(crate) times: PhaseTimes,
    /// Selected by the last hop that was greeted.
    pub(crate) method: Option<Method>,
    /// REP of the last reply.
    pub(crate) rep: Option<Rep>,
}

/// Resolves `addr` to canonical addresses. The caller limits the time.
pub(crate) async fn lookup(addr: &Addr, limits: &dyn DialLimits) -> Result<Vec<SocketAddr>, DialError> {
    match &addr.host {
        Host::Ip(ip) => Ok(vec![canonical(*ip, addr.port)]),
        Host::Name(name) => net::lookup(name.as_str(), addr.port, limits).await,
    }
}

impl Client {
    /// Creates a client that reaches `dst` through `hops`, nearest first. `timeout` covers everything up to the reply.
    pub fn new(hops: Vec<Proxy>, dst: Addr, timeout: Option<Duration>, options: Arc<ClientOptions>) -> Self {
        let (since, phase, times) = (Instant::now(), Phase::ResolveProxy, PhaseTimes::default());
        let deadline = timeout.and_then(|timeout| Some((since.checked_add(timeout)?, timeout)));
        let progress = Progress { hop: 0, phase, since, times, method: None, rep: None };
        Self { hops, dst, deadline, options, progress: Cell::new(progress) }
    }

    /// The proxies, nearest first.
    pub(crate) fn hops(&self) -> &[Proxy] {
        &self.hops
    }

    /// The target, or with BIND the expected peer. `None`: any peer, or only a login.
    pub fn dst(&self) -> Option<&Addr> {
        Some(&self.dst).filter(|dst| **dst != Addr::UNSPECIFIED)
    }

    pub(crate) fn progress(&self) -> Progress {
        self.progress.get()
    }

    /// Opens all hops and sends the request to the last one. Returns the connection, ready for data, and BND.
    pub async fn request(&self, command: Command) -> Result<(Conn, Addr), ClientError> {
        self.within(self.deadline, async {
            if self.hops.is_empty() {
                let conn = self.dial(&self.dst, Phase::ResolveTarget).await?;
                let bnd = conn.local_addr().map_or(Addr::UNSPECIFIED, Addr::from);
                return Ok((conn, bnd));
            }
            let targets = match self.resolves_for_hops()? {
                true => self.options.lookup(&self.dst).await?.into_iter().map(Addr::from).collect(),
                false => vec![self.dst.clone()],
            };
            let (conn, bnd, _) = self.try_targets(command, targets).await?;
            Ok((conn, bnd))
        })
        .await
    }

    /// Like [`Client::request`], for the first of several addresses of the target that succeeds, which it returns too.
    pub async fn request_first(&self, command: Command, targets: Vec<Addr>) -> Result<(Conn, Addr, Addr), ClientError> {
        self.within(self.deadline, self.try_targets(command, targets)).await
    }

    async fn try_targets(&self, command: Command, targets: Vec<Addr>) -> Result<(Conn, Addr, Addr), ClientErrorKind> {
        let mut last_error = DialError::NameNotFound.into();
        for dst in targets.into_iter().take(MAX_ADDRS) {
            let (mut conn, _) = self.open_hops(self.hops.len()).await?;
            match self.send_request(&mut conn, command, &dst).await {
                // Another address of the target may succeed.
                Err(kind @ ClientErrorKind::Rep(_)) => last_error = kind,
                result => return Ok((conn, result?, dst)),
            }
        }
        Err(last_error)
    }

    /// Opens all hops, including the login to the last one. Does not send a request to it.
    pub async fn probe(&self) -> Result<(), ClientError> {
        self.within(self.deadline, async { self.open_hops(self.hops.len()).await.map(drop) }).await
    }

    /// Returns true if the last hop gets the addresses of the target's name instead of the name, and enters that phase.
    ///
    /// # Errors
    /// The target is an address, and its family is not allowed.
    fn resolves_for_hops(&self) -> Result<bool, ClientErrorKind> {
        match &self.dst.host {
            _ if !self.options.resolves_target || self.hops.is_empty() => return Ok(false),
            Host::Name(name) if name.is_zoned_address() => return Ok(false),
            Host::Ip(ip) if ip.is_unspecified() || self.options.local.can_reach(ip.to_canonical()) => return Ok(false),
            Host::Name(_) | Host::Ip(_) => self.enter_phase(Phase::ResolveTarget),
        }
        if matches!(self.dst.host, Host::Name(_)) { Ok(true) } else { Err(DialError::FamilyUnavailable.into()) }
    }

    /// Resolves `addr`, in `phase`, and connects to it.
    async fn dial(&self, addr: &Addr, phase: Phase) -> Result<Conn, ClientErrorKind> {
        self.enter_phase(phase);
        let addrs = self.options.lookup(addr).await?;
        self.enter_phase(Phase::Connect);
        // `within` bounds the whole handshake.
        let no_deadline = Instant::now() + Duration::from_secs(365 * 24 * 3600);
        let (io, _) = dial(addrs, self.options.local, self.options.limits(), no_deadline).await?;
        set_keepalive(&io);
        Ok(Conn::Tcp(io))
    }

    /// Waits for the second reply to BIND, until the deadline if `has_deadline` is set. Returns the peer's address.
    pub async fn wait_for_peer(&self, conn: &mut Conn, has_deadline: bool) -> Result<Addr, ClientError> {
        self.enter_phase(Phase::Accept);
        let started = Instant::now();
        let accepted = async {
            self.read_reply(conn).await.map_err(|kind| match kind {
                ClientErrorKind::Rep(Rep::TTL_EXPIRED) => ClientErrorKind::NoPeer(started.elapsed()),
                kind => kind,
            })
        };
        self.within(self.deadline.filter(|_| has_deadline), accepted).await
    }

    async fn within<T>(
        &self,
        deadline: Option<(Instant, Duration)>,
        future: impl Future<Output = Result<T, ClientErrorKind>>,
    ) -> Result<T, ClientError> {
        let result = match deadline {
            None => future.await,
            Some((deadline, timeout)) => {
                timeout_at(deadline, future).await.unwrap_or(Err(ClientErrorKind::TimedOut(timeout)))
            }
        };
        self.enter_phase(self.progress().phase);
        result.map_err(|kind| self.error_at_position(kind))
    }

    /// Connects through the first `count` hops, and logs in to each. Returns the connection and its GSSAPI protection.
    async fn open_hops(&self, count: usize) -> Result<(Conn, Option<Protection>), ClientErrorKind> {
        let mut last: Option<Conn> = None;
        let mut protection = None;
        for (i, hop) in self.hops.iter().take(count).enumerate() {
            let mut conn = match (last.take(), &hop.endpoint) {
                (None, endpoint) => self.connect(endpoint).await?,
                (Some(mut conn), Endpoint::Tcp(addr)) => {
                    self.send_request(&mut conn, Command::Connect, addr).await?;
                    conn
                }
                // Rejected by parse_hops.
                (Some(_), Endpoint::Unix(_)) => return Err(ClientErrorKind::Socket(io::ErrorKind::Unsupported.into())),
            };
            self.enter_phase_at(i, Phase::Greeting);
            protection = self.authenticate(&mut conn, hop).await?;
            last = Some(match &protection {
                Some(protection) => conn.protect(protection.clone()),
                None => conn,
            });
        }
        let conn = last.ok_or_else(|| ClientErrorKind::Protocol("no proxy".into()))?;
        Ok((conn, protection))
    }

    async fn connect(&self, endpoint: &Endpoint) -> Result<Conn, ClientErrorKind> {
        self.enter_phase_at(0, Phase::ResolveProxy);
        match endpoint {
            Endpoint::Unix(path) => {
                self.enter_phase(Phase::Connect);
                connect_unix(path).await.map(Conn::Unix).map_err(ClientErrorKind::Socket)
            }
            Endpoint::Tcp(addr) => self.dial(addr, Phase::ResolveProxy).await,
        }
    }

    /// Sends the greeting and logs in. Returns the GSSAPI protection of all further messages and data.
    async fn authenticate(&self, conn: &mut Conn, hop: &Proxy) -> Result<Option<Protection>, ClientErrorKind> {
        let credentials = hop.credentials.as_ref();
        let ticket = self.ticket(hop).await?;
        let is_available = |method: &Method| match *method {
            Method::PASSWORD => credentials.is_some(),
            Method::GSSAPI => ticket.is_ok(),
            _ => true,
        };
        let allowed = self.options.methods.as_deref().unwrap_or(&[Method::NONE, Method::PASSWORD, Method::GSSAPI]);
        let methods: Vec<Method> = allowed.iter().copied().filter(is_available).collect();
        if methods.is_empty() {
            return Err(ClientErrorKind::NoAcceptableMethod(methods, ticket.err().flatten()));
        }
        write(conn, &Greeting { methods: methods.clone() }).await?;
        let selected = read::<MethodSelection>(conn).await?.0;
        self.progress.update(|progress| Progress { method: Some(selected), rep: None, ..progress });
        let offered = methods.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        log::debug!("proxy {hop} selected method {selected} (offered: {offered})");
        match (selected, credentials, &self.options.gssapi, ticket) {
            (Method::NO_ACCEPTABLE, .., ticket) => {
                Err(ClientErrorKind::NoAcceptableMethod(methods, ticket.err().flatten()))
            }
            _ if !methods.contains(&selected) => {
                Err(ClientErrorKind::Protocol(format!("selected {selected}, which was not offered")))
            }
            (Method::PASSWORD, Some(credentials), ..) => {
                self.enter_phase(Phase::Login);
                write(conn, credentials).await?;
                match read::<LoginStatus>(conn).await? {
                    LoginStatus::SUCCESS => Ok(None),
                    _ => Err(ClientErrorKind::LoginRefused),
                }
            }
            (Method::GSSAPI, _, Some(initiator), Ok(ticket)) => {
                self.enter_phase(Phase::Login);
                initiator.initiate(conn, ticket).await.map_err(ClientErrorKind::Gssapi)
            }
            _ => Ok(None),
        }
    }

    /// Returns a Kerberos ticket and the name of the service of `hop`, if GSSAPI may be offered. A missing ticket is an
    /// inner `Err`, with the reason if kinit is no remedy, or an outer one if only GSSAPI is requested.
    async fn ticket(&self, hop: &Proxy) -> Result<Result<Ticket, Option<GssapiError>>, ClientErrorKind> {
        let methods = self.options.methods.as_deref();
        let is_possible = methods.is_none_or(|methods| methods.contains(&Method::GSSAPI));
        let Some(initiator) = self.options.gssapi.as_ref().filter(|_| is_possible) else { return Ok(Err(None)) };
        let host = match &hop.endpoint {
            Endpoint::Tcp(Addr { host: Host::Name(name), .. }) => name.as_str().to_owned(),
            Endpoint::Tcp(Addr { host: Host::Ip(ip), .. }) => ip.to_string(),
            Endpoint::Unix(_) => String::new(),
        };
        match initiator.acquire_ticket(&host).await {
            Ok(ticket) => Ok(Ok(ticket)),
            Err(error @ (GssapiError::NoCredential(_) | GssapiError::Unavailable(_)))
                if methods.is_none_or(|methods| methods.len() > 1) =>
            {
                log::debug!("gssapi not offered: {error}");
                Ok(Err(Some(error).filter(|error| matches!(error, GssapiError::Unavailable(_)))))
            }
            // Other failures, such as an invalid configuration, must not silently disable GSSAPI.
            Err(error) => Err(ClientErrorKind::Gssapi(error)),
        }
    }

    async fn send_request(&self, conn: &mut Conn, command: Command, dst: &Addr) -> Result<Addr, ClientErrorKind> {
        self.enter_phase(Phase::Request);
        write(conn, &Request { command, dst: dst.clone() }).await?;
        let bnd = self.read_reply(conn).await?;
        let problem = match command {
            Command::Bind if bnd.port == 0 => "no address, or port 0 in the reply to BIND",
            Command::UdpAssociate if bnd.port == 0 => "no address, or port 0 in the reply to UDP ASSOCIATE",
            _ => return Ok(bnd),
        };
        Err(ClientErrorKind::Protocol(problem.into()))
    }

    /// Reads a reply. Returns its BND: unspecified if it is neither an address nor a host name.
    async fn read_reply(&self, conn: &mut Conn) -> Result<Addr, ClientErrorKind> {
        let record_rep = |rep| self.progress.update(|progress| Progress { rep: Some(rep), ..progress });
        let reads_ahead = !self.options.passes_socket;
        let reply: Reply = conn.read_message_with(reads_ahead, || {}).await.map_err(|error| match &error {
            // A failure reply that is truncated or has an invalid BND still has its REP.
            ReadError::Closed(bytes, _) | ReadError::Protocol(_, bytes) => match bytes.as_slice() {
                [proto::VERSION, rep, ..] if *rep != Rep::SUCCEEDED.0 => {
                    record_rep(Rep(*rep));
                    ClientErrorKind::Rep(Rep(*rep))
                }
                _ => read_error_kind(error),
            },
        })?;
        record_rep(reply.rep);
        let bnd = match &reply.bnd.host {
            // Scripts and programs read BND: they must not get any other text.
            Host::Name(name) if !name.is_plain() => Addr::UNSPECIFIED,
            _ => reply.bnd,
        };
        log::debug!("reply: {} (REP {}), bnd {bnd}", reply.rep, reply.rep.0);
        match reply.rep {
            Rep::SUCCEEDED => Ok(bnd),
            rep => Err(ClientErrorKind::Rep(rep)),
        }
    }

    /// Replaces an unspecified address in BND by the address of the proxy that sent it. The result is canonical.
    pub fn resolve_unspecified_bnd(&self, bnd: Addr, conn: &Conn) -> Addr {
        let Progress { hop, .. } = self.progress();
        let is_unspecified = matches!(bnd.host, Host::Ip(ip) if ip.to_canonical().is_unspecified());
        let host = match self.hops.get(hop).map(|hop| &hop.endpoint) {
            _ if !is_unspecified => bnd.host,
            Some(Endpoint::Tcp(addr)) if hop > 0 => addr.host.clone(),
            _ => Host::Ip(conn.peer_addr().map_or(Ipv4Addr::LOCALHOST.into(), |peer| peer.ip())),
        };
        match host {
            Host::Ip(ip) => canonical(ip, bnd.port).into(),
            Host::Name(_) => Addr { host, port: bnd.port },
        }
    }

    pub(crate) fn enter_phase(&self, phase: Phase) {
        self.enter_phase_at(self.progress().hop, phase);
    }

    fn enter_phase_at(&self, hop: usize, phase: Phase) {
        let (last, now) = (self.progress(), Instant::now());
        let mut times = last.times;
        if self.is_timed(last.phase) {
            times.add(last.phase, now.saturating_duration_since(last.since));
        }
        self.progress.set(Progress { hop, phase, since: now, times, ..last });
    }

    /// Returns whether a phase takes time: an address or a path needs no resolution.
    fn is_timed(&self, phase: Phase) -> bool {
        let is_name = |host: &Host| matches!(host, Host::Name(_));
        match phase {
            Phase::ResolveProxy => {
                let proxy = self.hops.first().map(|hop| &hop.endpoint);
                proxy.is_some_and(|proxy| matches!(proxy, Endpoint::Tcp(addr) if is_name(&addr.host)))
            }
            Phase::ResolveTarget => is_name(&self.dst.host),
            _ => true,
        }
    }

    /// Returns the error of a handshake that its caller ends after `limit`.
    pub fn timed_out(&self, limit: Duration) -> ClientError {
        self.enter_phase(self.progress().phase);
        self.error_at_position(ClientErrorKind::TimedOut(limit))
    }

    fn error_at_position(&self, kind: ClientErrorKind) -> ClientError {
        let Progress { hop, phase, .. } = self.progress();
        let proxy = self.hops.get(hop).map(ToString::to_string);
        // Before the last hop, the target of a request is the next hop.
        let is_about_next = phase == Phase::Request && !matches!(kind, ClientErrorKind::Relay(..));
        let next = self.hops.get(hop + 1).filter(|_| is_about_next).map(ToString::to_string);
        let kind = match kind {
            ClientErrorKind::Rep(rep) if next.is_some() => ClientErrorKind::NextHop(rep),
            kind => kind,
        };
        ClientError { proxy, target: next.or(self.dst().map(ToString::to_string)), phase, kind }
    }
}

async fn write(conn: &mut Conn, message: &impl Message) -> Result<(), ClientErrorKind> {
    conn.write_message(message).await.map_err(|error| ClientErrorKind::Closed(Some(error)))
}

async fn read<M: Message>(conn: &mut Conn) -> Result<M, ClientErrorKind> {
    conn.read_message().await.map_err(read_error_kind)
}

fn read_error_kind(error: ReadError) -> ClientErrorKind {
    match error {
        ReadError::Closed(_, error) => ClientErrorKind::Closed(error),
        ReadError::Protocol(proto::ProtocolError::Version(first), _) => {
            ClientErrorKind::Protocol(format!("first byte {}", OtherProtocol(first)))
        }
        ReadError::Protocol(error, _) => ClientErrorKind::Protocol(error.to_string()),
    }
}
