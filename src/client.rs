//! The handshake of a client, through any number of hops: `open` walks them, `request` asks the last one. With no hops
//! at all the target is reached directly.
//!
//! Errors say which proxy, in which phase, and why; what a mode makes of them is `cmd`'s.

mod association;
mod error;
mod proxy;

use std::cell::Cell;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::conn::{Conn, Protection, ReadError, timeout_at};
use crate::dial::{DialError, LocalAddr, Resolver, dial};
use crate::gssapi::{self, Initiator, Ticket};
use crate::proto::{
    self, Addr, Command, Greeting, Host, LoginStatus, Message, Method, MethodSelection, OtherProtocol, Rep, Reply,
    Request,
};
use crate::reactor::Io;
pub use association::{Association, AssociationClosed};
pub use error::{ClientError, ClientErrorKind, Phase, PhaseTimes};
pub use proxy::{Endpoint, Proxy, credentials, parse_addr, parse_hops, parse_host, parse_port};

/// What a client offers to proxies, besides the credentials of each.
#[derive(Debug, Default)]
pub struct ClientAuth {
    /// The methods that are offered, in this order. None: NO AUTHENTICATION, and whatever there is something to log in
    /// with.
    pub methods: Option<Vec<Method>>,
    /// How to log in by GSSAPI; not, without it.
    pub gssapi: Option<Initiator>,
}

/// One way through proxies to one target, under one deadline.
#[derive(Debug)]
pub struct Client {
    hops: Vec<Proxy>,
    dst: Addr,
    deadline: Option<(Instant, Duration)>,
    resolver: Resolver,
    auth: Arc<ClientAuth>,
    local: LocalAddr,
    /// Whether the target's name is looked up here.
    looks_up_target: bool,
    /// Where the handshake is: at which hop, doing what, since when.
    position: Cell<(usize, Phase, Instant)>,
    times: Cell<PhaseTimes>,
    /// What the last hop that was greeted selected, and the REP that was heard last.
    last_answer: Cell<(Option<Method>, Option<Rep>)>,
}

impl Client {
    /// `hops` are walked first to last; without any, the target is reached directly. `timeout` bounds everything up to the
    /// reply.
    pub fn new(hops: Vec<Proxy>, dst: Addr, timeout: Option<Duration>) -> Self {
        let now = Instant::now();
        Self {
            hops,
            dst,
            deadline: timeout.and_then(|timeout| Some((now.checked_add(timeout)?, timeout))),
            resolver: Resolver::default(),
            auth: Arc::default(),
            local: LocalAddr::default(),
            looks_up_target: false,
            position: Cell::new((0, Phase::ResolveProxy, now)),
            times: Cell::default(),
            last_answer: Cell::default(),
        }
    }

    /// The same, with these ways to log in.
    pub fn with_auth(self, auth: Arc<ClientAuth>) -> Self {
        Self { auth, ..self }
    }

    /// The same, as one of many that share a resolver.
    pub fn with_resolver(self, resolver: Resolver) -> Self {
        Self { resolver, ..self }
    }

    /// The same, from there.
    pub fn with_local_addr(self, local: LocalAddr) -> Self {
        Self { local, ..self }
    }

    /// The same; the target's name is looked up here when `looks_up_target`, and by the last proxy otherwise.
    pub fn with_target_lookup(self, looks_up_target: bool) -> Self {
        Self { looks_up_target, ..self }
    }

    /// What the hops lead to.
    pub fn dst(&self) -> &Addr {
        &self.dst
    }

    /// The proxy that the request itself goes to, if there is one.
    pub fn last_proxy(&self) -> Option<String> {
        self.hops.last().map(ToString::to_string)
    }

    /// How long each phase took so far.
    pub fn times(&self) -> PhaseTimes {
        self.times.get()
    }

    /// What the proxy that was greeted last has selected.
    pub fn method(&self) -> Option<Method> {
        self.last_answer.get().0
    }

    /// The REP that was heard last.
    pub fn rep(&self) -> Option<Rep> {
        self.last_answer.get().1
    }

    /// Walks all hops and makes the request: a connection on which data may flow, and BND.
    ///
    /// # Errors
    /// Where and why it failed.
    pub async fn request(&self, command: Command) -> Result<(Conn, Addr), ClientError> {
        self.with_deadline(async {
            if self.hops.is_empty() {
                return self.connect_direct().await;
            }
            let mut last_error = ClientErrorKind::Unreachable(DialError::NameNotFound);
            for dst in self.targets().await? {
                let (mut conn, _) = self.open_hops(self.hops.len()).await?;
                match self.send_request(&mut conn, command, &dst).await {
                    // Of several addresses another one may do.
                    Err(kind @ ClientErrorKind::Rep(_)) => last_error = kind,
                    replied => return Ok((conn, replied?)),
                }
            }
            Err(last_error)
        })
        .await
    }

    /// Walks all hops, past the login of the last, and asks it for nothing.
    ///
    /// # Errors
    /// Where and why it failed.
    pub async fn probe(&self) -> Result<(), ClientError> {
        self.with_deadline(async { self.open_hops(self.hops.len()).await.map(drop) }).await
    }

    /// What a request asks for, by the deadline: the target as it was given, or the first of its addresses here.
    ///
    /// # Errors
    /// The name could not be resolved.
    pub async fn target(&self) -> Result<Addr, ClientError> {
        self.with_deadline(async {
            self.targets().await.map(|targets| targets.into_iter().next().unwrap_or(Addr::UNSPECIFIED))
        })
        .await
    }

    /// What to ask for in turn.
    async fn targets(&self) -> Result<Vec<Addr>, ClientErrorKind> {
        match self.dst.host {
            Host::Name(_) if self.looks_up_target || self.hops.is_empty() => {
                self.enter_phase(Phase::ResolveTarget);
                Ok(self.lookup(&self.dst).await?.into_iter().map(Addr::from).collect())
            }
            _ => Ok(vec![self.dst.clone()]),
        }
    }

    /// The addresses of `addr` that can be reached from where we come from.
    async fn lookup(&self, addr: &Addr) -> Result<Vec<SocketAddr>, ClientErrorKind> {
        let mut found = self.resolver.lookup(addr).await.map_err(ClientErrorKind::Unreachable)?;
        found.retain(|addr| self.local.can_reach(addr.ip()));
        if found.is_empty() { Err(ClientErrorKind::Unreachable(DialError::FamilyUnavailable)) } else { Ok(found) }
    }

    /// A connection to the target itself, and where it comes from.
    async fn connect_direct(&self) -> Result<(Conn, Addr), ClientErrorKind> {
        self.enter_phase(Phase::ResolveTarget);
        let addrs = self.lookup(&self.dst).await?;
        self.enter_phase(Phase::Connect);
        let conn = dial(addrs, self.local, no_deadline()).await.map(Conn::Tcp).map_err(ClientErrorKind::Unreachable)?;
        let bnd = conn.local_addr().map_or(Addr::UNSPECIFIED, Addr::from);
        Ok((conn, bnd))
    }

    /// Waits for the second reply to BIND: BND is the peer.
    ///
    /// # Errors
    /// Where and why it failed.
    pub async fn wait_for_peer(&self, conn: &mut Conn) -> Result<Addr, ClientError> {
        self.enter_phase(Phase::Accept);
        let reply = self.read_reply(conn).await;
        self.enter_phase(Phase::Accept);
        reply.map(|reply| reply.bnd).map_err(|kind| self.error_at_position(kind))
    }

    /// As [`Client::wait_for_peer`], by the deadline.
    ///
    /// # Errors
    /// Where and why it failed.
    pub async fn wait_for_peer_with_deadline(&self, conn: &mut Conn) -> Result<Addr, ClientError> {
        self.enter_phase(Phase::Accept);
        self.with_deadline(async { self.read_reply(conn).await.map(|reply| reply.bnd) }).await
    }

    /// Runs `future` under the deadline.
    async fn with_deadline<T>(
        &self,
        future: impl Future<Output = Result<T, ClientErrorKind>>,
    ) -> Result<T, ClientError> {
        let result = match self.deadline {
            None => future.await,
            Some((deadline, timeout)) => {
                timeout_at(deadline, future).await.unwrap_or(Err(ClientErrorKind::TimedOut(timeout)))
            }
        };
        self.enter_phase(self.position.get().1);
        result.map_err(|kind| self.error_at_position(kind))
    }

    /// Walks the first `count` hops: a connection to the last of them, past its authentication.
    async fn open_hops(&self, count: usize) -> Result<(Conn, Option<Protection>), ClientErrorKind> {
        let mut open: Option<Conn> = None;
        let mut protection = None;
        for (i, hop) in self.hops.iter().take(count).enumerate() {
            let mut conn = match (open.take(), &hop.endpoint) {
                (None, endpoint) => self.connect(endpoint).await?,
                (Some(mut conn), Endpoint::Tcp(addr)) => {
                    self.send_request(&mut conn, Command::Connect, addr).await?;
                    conn
                }
                // parse_hops lets none through.
                (Some(_), Endpoint::Unix(_)) => return Err(ClientErrorKind::Socket(io::ErrorKind::Unsupported.into())),
            };
            self.enter_phase_at(i, Phase::Greeting);
            protection = self.authenticate(&mut conn, hop).await?;
            open = Some(match &protection {
                Some(protection) => conn.protect(protection.clone()),
                None => conn,
            });
        }
        let conn = open.ok_or_else(|| ClientErrorKind::Protocol("no proxy given".into()))?;
        Ok((conn, protection))
    }

    async fn connect(&self, endpoint: &Endpoint) -> Result<Conn, ClientErrorKind> {
        self.enter_phase_at(0, Phase::ResolveProxy);
        match endpoint {
            Endpoint::Unix(path) => {
                self.enter_phase(Phase::Connect);
                Io::connect_unix(path).await.map(Conn::Unix).map_err(ClientErrorKind::Socket)
            }
            Endpoint::Tcp(addr) => {
                let addrs = self.lookup(addr).await?;
                self.enter_phase(Phase::Connect);
                dial(addrs, self.local, no_deadline()).await.map(Conn::Tcp).map_err(ClientErrorKind::Unreachable)
            }
        }
    }

    /// Logs in: what protects the connection from there on.
    async fn authenticate(&self, conn: &mut Conn, hop: &Proxy) -> Result<Option<Protection>, ClientErrorKind> {
        let credentials = hop.credentials.as_ref();
        let ticket = self.ticket().await?;
        let is_available = |method: &Method| match *method {
            Method::PASSWORD => credentials.is_some(),
            Method::GSSAPI => ticket.is_some(),
            _ => true,
        };
        let wanted = self.auth.methods.as_deref().unwrap_or(&[Method::NONE, Method::PASSWORD, Method::GSSAPI]);
        let methods: Vec<Method> = wanted.iter().copied().filter(is_available).collect();
        if methods.is_empty() {
            return Err(ClientErrorKind::NoAcceptableMethod);
        }
        write(conn, &Greeting { methods: methods.clone() }).await?;
        let selected = read::<MethodSelection>(conn).await?.0;
        self.last_answer.set((Some(selected), None));
        log::debug!("proxy {hop} selected {selected} of {}", join_methods(&methods));
        match (selected, credentials, &self.auth.gssapi, ticket) {
            (Method::NO_ACCEPTABLE, ..) => Err(ClientErrorKind::NoAcceptableMethod),
            _ if !methods.contains(&selected) => {
                Err(ClientErrorKind::Protocol(format!("it selected {selected}, which was not offered")))
            }
            (Method::PASSWORD, Some(credentials), ..) => {
                self.enter_phase(Phase::Login);
                write(conn, credentials).await?;
                match read::<LoginStatus>(conn).await? {
                    LoginStatus::SUCCESS => Ok(None),
                    _ => Err(ClientErrorKind::LoginRefused),
                }
            }
            (Method::GSSAPI, _, Some(initiator), Some(ticket)) => {
                self.enter_phase(Phase::Login);
                let host = match &hop.endpoint {
                    Endpoint::Tcp(Addr { host: Host::Name(name), .. }) => name.as_str().to_owned(),
                    Endpoint::Tcp(Addr { host: Host::Ip(ip), .. }) => ip.to_string(),
                    Endpoint::Unix(_) => String::new(),
                };
                initiator.initiate(conn, ticket, &host).await.map_err(ClientErrorKind::Gssapi)
            }
            _ => Ok(None),
        }
    }

    /// Something to log in with by GSSAPI, when that may be offered. Only whoever has asked for it in so many words is
    /// told that there is nothing.
    async fn ticket(&self) -> Result<Option<Ticket>, ClientErrorKind> {
        let Some(initiator) = &self.auth.gssapi else { return Ok(None) };
        let is_requested = self.auth.methods.as_ref().is_some_and(|methods| methods.contains(&Method::GSSAPI));
        if self.auth.methods.is_some() && !is_requested {
            return Ok(None);
        }
        match initiator.acquire_ticket().await {
            Ok(ticket) => Ok(Some(ticket)),
            Err(error @ (gssapi::GssapiError::NoCredential(_) | gssapi::GssapiError::Unavailable(_)))
                if self.auth.methods.as_ref().is_none_or(|methods| methods.len() > 1) =>
            {
                log::debug!("not offered: {error}");
                Ok(None)
            }
            // That there is something wrong is no reason to do without.
            Err(error) => Err(ClientErrorKind::Gssapi(error)),
        }
    }

    async fn send_request(&self, conn: &mut Conn, command: Command, dst: &Addr) -> Result<Addr, ClientErrorKind> {
        self.enter_phase(Phase::Request);
        write(conn, &Request { command, dst: dst.clone() }).await?;
        self.read_reply(conn).await.map(|reply| reply.bnd)
    }

    async fn read_reply(&self, conn: &mut Conn) -> Result<Reply, ClientErrorKind> {
        let record_rep = |rep| self.last_answer.set((self.last_answer.get().0, Some(rep)));
        let reply: Reply = conn.read_message().await.map_err(|error| match &error {
            // A failure that is cut short, or has an odd BND, has said all that matters.
            ReadError::Closed(octets, _) | ReadError::Protocol(_, octets) => match octets.as_slice() {
                [proto::VERSION, rep, ..] if *rep != Rep::SUCCEEDED.0 => {
                    record_rep(Rep(*rep));
                    ClientErrorKind::Rep(Rep(*rep))
                }
                _ => read_error_kind(error),
            },
        })?;
        record_rep(reply.rep);
        log::debug!("reply: {} (REP {}), bnd {}", reply.rep, reply.rep.0, reply.bnd.to_string().escape_debug());
        match reply.rep {
            Rep::SUCCEEDED => Ok(reply),
            rep => Err(ClientErrorKind::Rep(rep)),
        }
    }

    /// BND as the proxy on `conn` means it: an unspecified address is the proxy's own.
    pub fn resolve_unspecified_bnd(&self, bnd: Addr, conn: &Conn) -> Addr {
        let (hop, ..) = self.position.get();
        let host = match (&bnd.host, self.hops.get(hop).map(|hop| &hop.endpoint)) {
            (Host::Ip(ip), Some(Endpoint::Tcp(addr))) if ip.is_unspecified() && hop > 0 => addr.host.clone(),
            (Host::Ip(ip), _) if ip.is_unspecified() => {
                Host::Ip(conn.peer_addr().map_or(Ipv4Addr::LOCALHOST.into(), |peer| peer.ip()))
            }
            _ => bnd.host,
        };
        Addr { host, port: bnd.port }
    }

    fn enter_phase(&self, phase: Phase) {
        self.enter_phase_at(self.position.get().0, phase);
    }

    fn enter_phase_at(&self, hop: usize, phase: Phase) {
        let (_, last, since) = self.position.get();
        let now = Instant::now();
        let mut times = self.times.get();
        times.add(last, now.saturating_duration_since(since));
        self.times.set(times);
        self.position.set((hop, phase, now));
    }

    fn error_at_position(&self, kind: ClientErrorKind) -> ClientError {
        let (hop, phase, _) = self.position.get();
        let proxy = self.hops.get(hop).map(ToString::to_string);
        // A request in the middle of a chain is for the next hop.
        let next = self.hops.get(hop + 1).filter(|_| phase == Phase::Request).map(ToString::to_string);
        let kind = match kind {
            ClientErrorKind::Rep(rep) if next.is_some() => ClientErrorKind::NextHop(rep),
            kind => kind,
        };
        let dst = Some(&self.dst).filter(|dst| **dst != Addr::UNSPECIFIED).map(ToString::to_string);
        ClientError { proxy, target: next.or(dst), phase, kind }
    }
}

fn join_methods(methods: &[Method]) -> String {
    methods.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// A deadline that never comes: the one that counts is that of the whole handshake.
fn no_deadline() -> Instant {
    Instant::now() + Duration::from_secs(365 * 24 * 3600)
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
            ClientErrorKind::Protocol(format!("it answered {}", OtherProtocol(first)))
        }
        ReadError::Protocol(error, _) => ClientErrorKind::Protocol(error.to_string()),
    }
}
