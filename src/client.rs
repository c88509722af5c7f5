//! The handshake of a client, through any number of hops: `open` walks them, `request` asks the last one.
//!
//! Errors say which proxy, in which phase, and why; what a mode makes of them is `cmd`'s.

mod proxy;
mod udp;

use std::cell::Cell;
use std::fmt;
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::net;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_net::unix::UnixStream;
use smol::Async;

use crate::conn::{Conn, Protection, ReadError, until};
use crate::dial::{Failure, Resolver, dial};
use crate::gssapi::{self, Initiator, Ticket};
use crate::proto::{
    self, Addr, Command, Foreign, Greeting, Host, Message, Method, Rep, Reply, Request, Selection, Status,
};
pub use proxy::{Endpoint, Proxy, parse_addr, parse_hops, parse_host, parse_port};
pub use udp::{Association, Lost};

/// What a client is doing when it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Looking up the proxy's name.
    Resolve,
    /// Connecting to the proxy.
    Connect,
    /// Greeting and selection.
    Greeting,
    /// The RFC 1929 sub-negotiation.
    Login,
    /// Request and reply.
    Request,
    /// Waiting for the second reply to BIND.
    Accept,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Resolve => "resolving the proxy's name",
            Self::Connect => "connecting to the proxy",
            Self::Greeting => "greeting",
            Self::Login => "login",
            Self::Request => "request",
            Self::Accept => "waiting for the peer",
        })
    }
}

/// Why a handshake failed.
#[derive(Debug)]
pub enum Cause {
    /// The proxy's name, or the proxy, could not be reached.
    Unreachable(Failure),
    /// The proxy's Unix socket could not be reached.
    Socket(io::Error),
    /// The peer does not speak SOCKS5, or not correctly.
    Protocol(String),
    /// The proxy closed or reset the connection.
    Closed(Option<io::Error>),
    /// The proxy wants a method that we can't offer.
    NoMethod,
    /// The proxy refused user name and password.
    LoginRefused,
    /// The login by GSSAPI failed, on either side.
    Gssapi(gssapi::Error),
    /// The proxy answered with a failure.
    Rep(Rep),
    /// The proxy answered with a failure when it was asked for the next proxy.
    NextHop(Rep),
    /// The deadline passed.
    TimedOut(Duration),
}

/// A handshake that failed: at which proxy, for which target, in which phase, and why.
#[derive(Debug)]
pub struct Error {
    /// The proxy that was being talked to.
    pub proxy: String,
    /// What it was asked for.
    pub target: String,
    /// What was being done.
    pub phase: Phase,
    /// Why it failed.
    pub cause: Cause,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { proxy, target, phase, cause } = self;
        write!(f, "proxy {proxy}: {phase}, for {target}: ")?;
        match cause {
            Cause::Unreachable(Failure::Refused) => f.write_str("connection refused (is the proxy running?)"),
            Cause::Unreachable(failure) => failure.fmt(f),
            Cause::Socket(error) => write!(f, "{error} (is the proxy running?)"),
            Cause::Protocol(what) => write!(f, "not a SOCKS5 server ({what})"),
            Cause::Closed(None) => f.write_str("the proxy closed the connection"),
            Cause::Closed(Some(error)) => error.fmt(f),
            Cause::NoMethod => {
                f.write_str("no acceptable authentication method (does it want user:password@, or a Kerberos ticket?)")
            }
            Cause::Gssapi(error) => error.fmt(f),
            Cause::LoginRefused => f.write_str("user name or password refused"),
            Cause::Rep(rep) | Cause::NextHop(rep) => write!(f, "{rep} (REP {})", rep.0),
            Cause::TimedOut(after) => write!(f, "timed out after {} s", after.as_secs_f64()),
        }
    }
}

impl std::error::Error for Error {}

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
    /// Where the handshake is: at which hop, doing what.
    at: Cell<(usize, Phase)>,
}

impl Client {
    /// `hops` are walked first to last; none at all is a mistake. `wait` bounds everything up to the reply.
    pub fn new(hops: Vec<Proxy>, dst: Addr, wait: Option<Duration>) -> Self {
        let limit = wait.and_then(|wait| Some((Instant::now().checked_add(wait)?, wait)));
        let (resolver, auth) = (Resolver::default(), Arc::default());
        Self { hops, dst, limit, resolver, auth, at: Cell::new((0, Phase::Resolve)) }
    }

    /// The same, with these ways to log in.
    pub fn with_auth(self, auth: Arc<Auth>) -> Self {
        Self { auth, ..self }
    }

    /// The same, as one of many that share a resolver.
    pub fn resolving_by(self, resolver: Resolver) -> Self {
        Self { resolver, ..self }
    }

    /// What the hops lead to.
    pub fn dst(&self) -> &Addr {
        &self.dst
    }

    /// The proxy that the request itself goes to.
    pub fn last_proxy(&self) -> String {
        self.hops.last().map(ToString::to_string).unwrap_or_default()
    }

    /// Walks all hops and makes the request: a connection on which data may flow, and BND.
    ///
    /// # Errors
    /// Where and why it failed.
    pub async fn request(&self, command: Command) -> Result<(Conn, Addr), Error> {
        self.limited(async {
            let (mut conn, _) = self.open(self.hops.len()).await?;
            let bnd = self.ask(&mut conn, command, &self.dst).await?;
            Ok((conn, bnd))
        })
        .await
    }

    /// Waits for the second reply to BIND: BND is the peer.
    ///
    /// # Errors
    /// Where and why it failed.
    pub async fn accepted(&self, conn: &mut Conn) -> Result<Addr, Error> {
        self.step(Phase::Accept);
        self.read_reply(conn).await.map(|reply| reply.bnd).map_err(|cause| self.error(cause))
    }

    /// Runs `future` under the deadline.
    async fn limited<T>(&self, future: impl Future<Output = Result<T, Cause>>) -> Result<T, Error> {
        let result = match self.limit {
            None => future.await,
            Some((deadline, wait)) => until(deadline, future).await.unwrap_or(Err(Cause::TimedOut(wait))),
        };
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
            self.at.set((i, Phase::Greeting));
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
        self.at.set((0, Phase::Resolve));
        match endpoint {
            Endpoint::Unix(path) => {
                self.step(Phase::Connect);
                let stream = UnixStream::connect(path).await.map_err(Cause::Socket)?;
                Ok(Conn::Unix(Arc::<Async<net::UnixStream>>::from(stream).into()))
            }
            Endpoint::Tcp(addr) => {
                let addrs = self.resolver.lookup(addr).await.map_err(Cause::Unreachable)?;
                self.step(Phase::Connect);
                dial(addrs, far()).await.map(Conn::Tcp).map_err(Cause::Unreachable)
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
        let selected = read::<Selection>(conn).await?.0;
        match (selected, credentials, &self.auth.gssapi, ticket) {
            (Method::UNACCEPTABLE, ..) => Err(Cause::NoMethod),
            _ if !methods.contains(&selected) => {
                Err(Cause::Protocol(format!("it selected {selected}, which was not offered")))
            }
            (Method::PASSWORD, Some(credentials), ..) => {
                self.step(Phase::Login);
                write(conn, credentials).await?;
                match read::<Status>(conn).await? {
                    Status::SUCCESS => Ok(None),
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
        let reply: Reply = conn.read_message().await.map_err(|error| match &error {
            // A failure that is cut short, or has an odd BND, has said all that matters.
            ReadError::Closed(octets, _) | ReadError::Protocol(_, octets) => match octets.as_slice() {
                [proto::VERSION, rep, ..] if *rep != Rep::SUCCEEDED.0 => Cause::Rep(Rep(*rep)),
                _ => cause(error),
            },
        })?;
        match reply.rep {
            Rep::SUCCEEDED => Ok(reply),
            rep => Err(Cause::Rep(rep)),
        }
    }

    /// BND as the proxy on `conn` means it: an unspecified address is the proxy's own.
    pub fn meant(&self, bnd: Addr, conn: &Conn) -> Addr {
        let (hop, _) = self.at.get();
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
        self.at.set((self.at.get().0, phase));
    }

    fn error(&self, cause: Cause) -> Error {
        let (hop, phase) = self.at.get();
        let proxy = self.hops.get(hop).map(ToString::to_string).unwrap_or_default();
        // A request in the middle of a chain is for the next hop.
        let next = self.hops.get(hop + 1).filter(|_| phase == Phase::Request).map(ToString::to_string);
        let cause = match cause {
            Cause::Rep(rep) if next.is_some() => Cause::NextHop(rep),
            cause => cause,
        };
        Error { proxy, target: next.unwrap_or_else(|| self.dst.to_string()), phase, cause }
    }
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
        ReadError::Protocol(proto::Error::Version(first), _) => {
            Cause::Protocol(format!("it answered {}", Foreign(first)))
        }
        ReadError::Protocol(error, _) => Cause::Protocol(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxy(text: &str) -> Result<(String, Option<(String, String)>), String> {
        let proxy: Proxy = text.parse()?;
        let text = |octets: &[u8]| String::from_utf8_lossy(octets).into_owned();
        Ok((proxy.to_string(), proxy.credentials.map(|c| (text(&c.uname), text(&c.passwd)))))
    }

    #[test]
    fn a_proxy_is_read_in_every_form() {
        let table = [
            ("127.0.0.1", "127.0.0.1:1080"),
            ("example.org:9", "example.org:9"),
            ("socks5://example.org", "example.org:1080"),
            ("socks5h://example.org:9/", "example.org:9"),
            ("[::1]", "[::1]:1080"),
            ("[::1]:9", "[::1]:9"),
            ("::1", "[::1]:1080"),
            ("unix:/run/s5.sock", "unix:/run/s5.sock"),
        ];
        for (text, shown) in table {
            assert_eq!(proxy(text), Ok((shown.into(), None)), "{text}");
        }
        for text in ["", "http://example.org", ":pass@host", "user:@host", "[::1", "host:x", "unix:"] {
            assert!(proxy(text).is_err(), "{text}");
        }
    }

    #[test]
    fn userinfo_is_percent_decoded_and_never_shown() {
        let decoded = proxy("socks5h://al%40ice:p%3A%2C%25@host:1").expect("a proxy");
        assert_eq!(decoded, ("host:1".into(), Some(("al@ice".into(), "p:,%".into()))));
        let long = format!("{}:x@host", "u".repeat(256));
        assert_eq!(proxy(&long), Err("the user name has 256 octets, and SOCKS5 takes 1 to 255".into()));
        let debug = format!("{:?}", "u:topsecret@host".parse::<Proxy>().expect("a proxy"));
        assert!(!debug.contains("topsecret"), "{debug}");
    }

    #[test]
    fn a_target_is_an_address_where_it_can_be_one() {
        let addr = |text: &str| parse_addr(text, None);
        assert_eq!(addr("[::1]:22").map(|a| a.host), Ok(Host::Ip("::1".parse().expect("an address"))));
        assert_eq!(addr("127.0.0.1:22").map(|a| a.host), Ok(Host::Ip("127.0.0.1".parse().expect("an address"))));
        assert!(matches!(addr("example.org:22").map(|a| a.host), Ok(Host::Name(_))));
        assert!(addr("example.org").is_err() && addr("::1").is_err() && addr(":22").is_err());
        assert!(addr(&format!("{}:1", "a".repeat(256))).is_err_and(|error| error.contains("256 octets")));
    }
}
