//! The handshake of a client, through any number of hops: `open` walks them, `request` asks the last one. With no hops
//! at all the target is reached directly.
//!
//! Errors say which proxy, in which phase, and why; what a mode makes of them is `cmd`'s.

mod error;
mod proxy;
mod udp;

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
pub use error::{Cause, Error, Phase, Times};
pub use proxy::{Endpoint, Proxy, credentials, parse_addr, parse_hops, parse_host, parse_port};
pub use udp::{Association, Lost};

/// What a client offers to proxies, besides the credentials of each.
#[derive(Debug, Default)]
pub struct Auth {
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
    limit: Option<(Instant, Duration)>,
    resolver: Resolver,
    auth: Arc<Auth>,
    source: LocalAddr,
    /// Whether the target's name is looked up here.
    resolves: bool,
    /// Where the handshake is: at which hop, doing what, since when.
    at: Cell<(usize, Phase, Instant)>,
    times: Cell<Times>,
    /// What the last hop that was greeted selected, and the REP that was heard last.
    heard: Cell<(Option<Method>, Option<Rep>)>,
}

impl Client {
    /// `hops` are walked first to last; without any, the target is reached directly. `wait` bounds everything up to the
    /// reply.
    pub fn new(hops: Vec<Proxy>, dst: Addr, wait: Option<Duration>) -> Self {
        let now = Instant::now();
        Self {
            hops,
            dst,
            limit: wait.and_then(|wait| Some((now.checked_add(wait)?, wait))),
            resolver: Resolver::default(),
            auth: Arc::default(),
            source: LocalAddr::default(),
            resolves: false,
            at: Cell::new((0, Phase::Resolve, now)),
            times: Cell::default(),
            heard: Cell::default(),
        }
    }

    /// The same, with these ways to log in.
    pub fn with_auth(self, auth: Arc<Auth>) -> Self {
        Self { auth, ..self }
    }

    /// The same, as one of many that share a resolver.
    pub fn resolving_by(self, resolver: Resolver) -> Self {
        Self { resolver, ..self }
    }

    /// The same, from there.
    pub fn from_source(self, source: LocalAddr) -> Self {
        Self { source, ..self }
    }

    /// The same; the target's name is looked up here when `resolves`, and by the last proxy otherwise.
    pub fn resolving_target(self, resolves: bool) -> Self {
        Self { resolves, ..self }
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
    pub fn times(&self) -> Times {
        self.times.get()
    }

    /// What the proxy that was greeted last has selected.
    pub fn method(&self) -> Option<Method> {
        self.heard.get().0
    }

    /// The REP that was heard last.
    pub fn rep(&self) -> Option<Rep> {
        self.heard.get().1
    }

    /// Walks all hops and makes the request: a connection on which data may flow, and BND.
    ///
    /// # Errors
    /// Where and why it failed.
    pub async fn request(&self, command: Command) -> Result<(Conn, Addr), Error> {
        self.limited(async {
            if self.hops.is_empty() {
                return self.direct().await;
            }
            let mut refusal = Cause::Unreachable(DialError::NameNotFound);
            for dst in self.targets().await? {
                let (mut conn, _) = self.open(self.hops.len()).await?;
                match self.ask(&mut conn, command, &dst).await {
                    // Of several addresses another one may do.
                    Err(cause @ Cause::Rep(_)) => refusal = cause,
                    asked => return Ok((conn, asked?)),
                }
            }
            Err(refusal)
        })
        .await
    }

    /// Walks all hops, past the login of the last, and asks it for nothing.
    ///
    /// # Errors
    /// Where and why it failed.
    pub async fn probe(&self) -> Result<(), Error> {
        self.limited(async { self.open(self.hops.len()).await.map(drop) }).await
    }

    /// What a request asks for, by the deadline: the target as it was given, or the first of its addresses here.
    ///
    /// # Errors
    /// The name could not be resolved.
    pub async fn target(&self) -> Result<Addr, Error> {
        self.limited(async {
            self.targets().await.map(|targets| targets.into_iter().next().unwrap_or(Addr::UNSPECIFIED))
        })
        .await
    }

    /// What to ask for in turn.
    async fn targets(&self) -> Result<Vec<Addr>, Cause> {
        match self.dst.host {
            Host::Name(_) if self.resolves || self.hops.is_empty() => {
                self.step(Phase::Target);
                Ok(self.lookup(&self.dst).await?.into_iter().map(Addr::from).collect())
            }
            _ => Ok(vec![self.dst.clone()]),
        }
    }

    /// The addresses of `addr` that can be reached from where we come from.
    async fn lookup(&self, addr: &Addr) -> Result<Vec<SocketAddr>, Cause> {
        let mut found = self.resolver.lookup(addr).await.map_err(Cause::Unreachable)?;
        found.retain(|addr| self.source.can_reach(addr.ip()));
        if found.is_empty() { Err(Cause::Unreachable(DialError::FamilyUnavailable)) } else { Ok(found) }
    }

    /// A connection to the target itself, and where it comes from.
    async fn direct(&self) -> Result<(Conn, Addr), Cause> {
        self.step(Phase::Target);
        let addrs = self.lookup(&self.dst).await?;
        self.step(Phase::Connect);
        let conn = dial(addrs, self.source, far()).await.map(Conn::Tcp).map_err(Cause::Unreachable)?;
        let bnd = conn.local_addr().map_or(Addr::UNSPECIFIED, Addr::from);
        Ok((conn, bnd))
    }

    /// Waits for the second reply to BIND: BND is the peer.
    ///
    /// # Errors
    /// Where and why it failed.
    pub async fn accepted(&self, conn: &mut Conn) -> Result<Addr, Error> {
        self.step(Phase::Accept);
        let reply = self.read_reply(conn).await;
        self.step(Phase::Accept);
        reply.map(|reply| reply.bnd).map_err(|cause| self.error(cause))
    }

    /// As [`Client::accepted`], by the deadline.
    ///
    /// # Errors
    /// Where and why it failed.
    pub async fn accepted_in_time(&self, conn: &mut Conn) -> Result<Addr, Error> {
        self.step(Phase::Accept);
        self.limited(async { self.read_reply(conn).await.map(|reply| reply.bnd) }).await
    }

    /// Runs `future` under the deadline.
    async fn limited<T>(&self, future: impl Future<Output = Result<T, Cause>>) -> Result<T, Error> {
        let result = match self.limit {
            None => future.await,
            Some((deadline, wait)) => timeout_at(deadline, future).await.unwrap_or(Err(Cause::TimedOut(wait))),
        };
        self.step(self.at.get().1);
        result.map_err(|cause| self.error(cause))
    }

    /// Walks the first `count` hops: a connection to the last of them, past its authentication.
    async fn open(&self, count: usize) -> Result<(Conn, Option<Protection>), Cause> {
        let mut open: Option<Conn> = None;
        let mut protection = None;
        for (i, hop) in self.hops.iter().take(count).enumerate() {
            let mut conn = match (open.take(), &hop.endpoint) {
                (None, endpoint) => self.connect(endpoint).await?,
                (Some(mut conn), Endpoint::Tcp(addr)) => {
                    self.ask(&mut conn, Command::Connect, addr).await?;
                    conn
                }
                // parse_hops lets none through.
                (Some(_), Endpoint::Unix(_)) => return Err(Cause::Socket(io::ErrorKind::Unsupported.into())),
            };
            self.step_at(i, Phase::Greeting);
            protection = self.authenticate(&mut conn, hop).await?;
            open = Some(match &protection {
                Some(protection) => conn.protect(protection.clone()),
                None => conn,
            });
        }
        let conn = open.ok_or_else(|| Cause::Protocol("no proxy given".into()))?;
        Ok((conn, protection))
    }

    async fn connect(&self, endpoint: &Endpoint) -> Result<Conn, Cause> {
        self.step_at(0, Phase::Resolve);
        match endpoint {
            Endpoint::Unix(path) => {
                self.step(Phase::Connect);
                Io::connect_unix(path).await.map(Conn::Unix).map_err(Cause::Socket)
            }
            Endpoint::Tcp(addr) => {
                let addrs = self.lookup(addr).await?;
                self.step(Phase::Connect);
                dial(addrs, self.source, far()).await.map(Conn::Tcp).map_err(Cause::Unreachable)
            }
        }
    }

    /// Logs in: what protects the connection from there on.
    async fn authenticate(&self, conn: &mut Conn, hop: &Proxy) -> Result<Option<Protection>, Cause> {
        let credentials = hop.credentials.as_ref();
        let ticket = self.ticket().await?;
        let can = |method: &Method| match *method {
            Method::PASSWORD => credentials.is_some(),
            Method::GSSAPI => ticket.is_some(),
            _ => true,
        };
        let all = self.auth.methods.as_deref().unwrap_or(&[Method::NONE, Method::PASSWORD, Method::GSSAPI]);
        let methods: Vec<Method> = all.iter().copied().filter(can).collect();
        if methods.is_empty() {
            return Err(Cause::NoMethod);
        }
        write(conn, &Greeting { methods: methods.clone() }).await?;
        let selected = read::<MethodSelection>(conn).await?.0;
        self.heard.set((Some(selected), None));
        log::debug!("proxy {hop} selected {selected} of {}", listed(&methods));
        match (selected, credentials, &self.auth.gssapi, ticket) {
            (Method::NO_ACCEPTABLE, ..) => Err(Cause::NoMethod),
            _ if !methods.contains(&selected) => {
                Err(Cause::Protocol(format!("it selected {selected}, which was not offered")))
            }
            (Method::PASSWORD, Some(credentials), ..) => {
                self.step(Phase::Login);
                write(conn, credentials).await?;
                match read::<LoginStatus>(conn).await? {
                    LoginStatus::SUCCESS => Ok(None),
                    _ => Err(Cause::LoginRefused),
                }
            }
            (Method::GSSAPI, _, Some(initiator), Some(ticket)) => {
                self.step(Phase::Login);
                let host = match &hop.endpoint {
                    Endpoint::Tcp(Addr { host: Host::Name(name), .. }) => name.as_str().to_owned(),
                    Endpoint::Tcp(Addr { host: Host::Ip(ip), .. }) => ip.to_string(),
                    Endpoint::Unix(_) => String::new(),
                };
                initiator.initiate(conn, ticket, &host).await.map_err(Cause::Gssapi)
            }
            _ => Ok(None),
        }
    }

    /// Something to log in with by GSSAPI, when that may be offered. Only whoever has asked for it in so many words is
    /// told that there is nothing.
    async fn ticket(&self) -> Result<Option<Ticket>, Cause> {
        let Some(initiator) = &self.auth.gssapi else { return Ok(None) };
        let is_demanded = self.auth.methods.as_ref().is_some_and(|methods| methods.contains(&Method::GSSAPI));
        if self.auth.methods.is_some() && !is_demanded {
            return Ok(None);
        }
        match initiator.ticket().await {
            Ok(ticket) => Ok(Some(ticket)),
            Err(error @ (gssapi::Error::NoCredential(_) | gssapi::Error::Unavailable(_)))
                if self.auth.methods.as_ref().is_none_or(|methods| methods.len() > 1) =>
            {
                log::debug!("not offered: {error}");
                Ok(None)
            }
            // That there is something wrong is no reason to do without.
            Err(error) => Err(Cause::Gssapi(error)),
        }
    }

    async fn ask(&self, conn: &mut Conn, command: Command, dst: &Addr) -> Result<Addr, Cause> {
        self.step(Phase::Request);
        write(conn, &Request { command, dst: dst.clone() }).await?;
        self.read_reply(conn).await.map(|reply| reply.bnd)
    }

    async fn read_reply(&self, conn: &mut Conn) -> Result<Reply, Cause> {
        let hear = |rep| self.heard.set((self.heard.get().0, Some(rep)));
        let reply: Reply = conn.read_message().await.map_err(|error| match &error {
            // A failure that is cut short, or has an odd BND, has said all that matters.
            ReadError::Closed(octets, _) | ReadError::Protocol(_, octets) => match octets.as_slice() {
                [proto::VERSION, rep, ..] if *rep != Rep::SUCCEEDED.0 => {
                    hear(Rep(*rep));
                    Cause::Rep(Rep(*rep))
                }
                _ => cause(error),
            },
        })?;
        hear(reply.rep);
        log::debug!("reply: {} (REP {}), bnd {}", reply.rep, reply.rep.0, reply.bnd.to_string().escape_debug());
        match reply.rep {
            Rep::SUCCEEDED => Ok(reply),
            rep => Err(Cause::Rep(rep)),
        }
    }

    /// BND as the proxy on `conn` means it: an unspecified address is the proxy's own.
    pub fn meant(&self, bnd: Addr, conn: &Conn) -> Addr {
        let (hop, ..) = self.at.get();
        let host = match (&bnd.host, self.hops.get(hop).map(|hop| &hop.endpoint)) {
            (Host::Ip(ip), Some(Endpoint::Tcp(addr))) if ip.is_unspecified() && hop > 0 => addr.host.clone(),
            (Host::Ip(ip), _) if ip.is_unspecified() => {
                Host::Ip(conn.peer_addr().map_or(Ipv4Addr::LOCALHOST.into(), |peer| peer.ip()))
            }
            _ => bnd.host,
        };
        Addr { host, port: bnd.port }
    }

    fn step(&self, phase: Phase) {
        self.step_at(self.at.get().0, phase);
    }

    fn step_at(&self, hop: usize, phase: Phase) {
        let (_, last, since) = self.at.get();
        let now = Instant::now();
        let mut times = self.times.get();
        times.add(last, now.saturating_duration_since(since));
        self.times.set(times);
        self.at.set((hop, phase, now));
    }

    fn error(&self, cause: Cause) -> Error {
        let (hop, phase, _) = self.at.get();
        let proxy = self.hops.get(hop).map(ToString::to_string);
        // A request in the middle of a chain is for the next hop.
        let next = self.hops.get(hop + 1).filter(|_| phase == Phase::Request).map(ToString::to_string);
        let cause = match cause {
            Cause::Rep(rep) if next.is_some() => Cause::NextHop(rep),
            cause => cause,
        };
        let dst = Some(&self.dst).filter(|dst| **dst != Addr::UNSPECIFIED).map(ToString::to_string);
        Error { proxy, target: next.or(dst), phase, cause }
    }
}

fn listed(methods: &[Method]) -> String {
    methods.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// A deadline that never comes: the one that counts is that of the whole handshake.
fn far() -> Instant {
    Instant::now() + Duration::from_secs(365 * 24 * 3600)
}

async fn write(conn: &mut Conn, message: &impl Message) -> Result<(), Cause> {
    conn.write_message(message).await.map_err(|error| Cause::Closed(Some(error)))
}

async fn read<M: Message>(conn: &mut Conn) -> Result<M, Cause> {
    conn.read_message().await.map_err(cause)
}

fn cause(error: ReadError) -> Cause {
    match error {
        ReadError::Closed(_, error) => Cause::Closed(error),
        ReadError::Protocol(proto::ProtocolError::Version(first), _) => {
            Cause::Protocol(format!("it answered {}", OtherProtocol(first)))
        }
        ReadError::Protocol(error, _) => Cause::Protocol(error.to_string()),
    }
}
