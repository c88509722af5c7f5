//! BIND (RFC 1928 sections 4 and 6): listen for one expected peer, answer twice, relay.
//!
//! DST is who is expected, never where to listen: an address of zeros is anybody, port 0 is any port.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use futures_lite::FutureExt as _;

use super::policy_handle::denial;
use super::session::{Refusal, Session};
use super::{Hop, Server, address_for, bind_within};
use crate::conn::{Conn, until};
use crate::dial::{parse_literal, set_tcp_options, unspecified};
use crate::policy::rules::{AccessRequest, Decision, Route};
use crate::proto::{Addr, Command, Host, Rep};
use crate::reactor::{self, Interest, Io, sleep};

/// How long to rest when there is no descriptor for the peer's connection.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

pub(super) async fn serve(session: &mut Session<'_>, client: &mut Conn, dst: &Addr) -> Result<Conn, Refusal> {
    match session.way_to_bind()? {
        Route::Direct => here(session, client, dst).await,
        Route::Hop(number) => {
            let hop = session.server.hop(number)?;
            session.log.via = Some(hop.clone());
            through(session, client, dst, &hop).await
        }
    }
}

async fn here(session: &mut Session<'_>, client: &mut Conn, dst: &Addr) -> Result<Conn, Refusal> {
    let server = session.server;
    let expected = Expected::resolve(session, dst).await?;
    let listener = listen(server, client, &expected).map_err(|error| Refusal::reply(Rep::GENERAL_FAILURE, error))?;
    let local = listener.get_ref().local_addr().map_err(|error| Refusal::reply(Rep::GENERAL_FAILURE, error))?;
    let reported = match address_for(client.local_addr(), expected.representative(client.local_addr())) {
        Ok(addr) if local.ip().is_unspecified() => SocketAddr::new(addr.ip(), local.port()),
        _ => local,
    };
    session.succeed(client, server.advertised(reported).into(), None).await?;
    let came = session.wait_for_peer(client, async { Ok(session.accept(&listener, &expected).await) }).await;
    drop(listener);
    let (peer, addr) = came?;
    session.succeed(client, addr.into(), Some(addr)).await?;
    Ok(peer)
}

async fn through(session: &mut Session<'_>, client: &mut Conn, dst: &Addr, hop: &Hop) -> Result<Conn, Refusal> {
    let server = session.server;
    let proxy = server.client(hop, dst.clone(), Instant::now() + server.options.connect_timeout);
    let (mut conn, bnd) = proxy.request(Command::Bind).await.map_err(Refusal::hop)?;
    session.succeed(client, proxy.meant(bnd, &conn), None).await?;
    let accepted = async { proxy.accepted(&mut conn).await.map_err(Refusal::hop) };
    let peer = session.wait_for_peer(client, accepted).await?;
    let Host::Ip(ip) = peer.host else { return Err(Refusal::reply(Rep::GENERAL_FAILURE, "a peer without an address")) };
    let addr = SocketAddr::new(ip.to_canonical(), peer.port);
    if let Decision::Deny(rule) = session.current_snapshot().evaluate(&session.question_of(addr)) {
        return Err(denial(rule));
    }
    session.succeed(client, peer, Some(addr)).await?;
    Ok(conn)
}

impl Session<'_> {
    /// Where the peer is to be waited for. When that depends on who comes, it is here, and only for those who may come
    /// here.
    fn way_to_bind(&self) -> Result<Route, Refusal> {
        let question = self.log.access_request();
        match self.snapshot.evaluate(&question) {
            Decision::Allow(_, route) => Ok(route),
            Decision::Deny(rule) => Err(denial(rule)),
            Decision::Undecided(_) => {
                let routes = self.snapshot.policy.rules.possible_routes(&question);
                match routes.as_slice() {
                    [only] => Ok(*only),
                    several if several.contains(&Route::Direct) => Ok(Route::Direct),
                    _ => Err(Refusal::reply(Rep::NOT_ALLOWED, "the way depends on the peer, who was not named")),
                }
            }
        }
    }

    /// Waits as long as the peer may take, the client stays, and the rules let it.
    async fn wait_for_peer<T>(
        &self,
        client: &Conn,
        comes: impl Future<Output = Result<T, Refusal>>,
    ) -> Result<T, Refusal> {
        let left = async {
            client.closed().await;
            Err(Refusal::silent("the client left before the peer came"))
        };
        let revoked = async { Err(self.revoked().await) };
        let deadline = Instant::now() + self.server.options.bind_timeout;
        let came = until(deadline, comes.or(left).or(revoked)).await;
        came.unwrap_or_else(|| Err(Refusal::reply(Rep::TTL_EXPIRED, "the peer did not come in time")))
    }

    fn question_of(&self, peer: SocketAddr) -> AccessRequest<'_> {
        AccessRequest { target_ip: Some(peer.ip()), target_port: Some(peer.port()), ..self.log.access_request() }
    }

    /// Waits for the expected peer. Whoever else connects is closed.
    async fn accept(&self, listener: &Io<TcpListener>, expected: &Expected) -> (Conn, SocketAddr) {
        loop {
            let accepted = listener.with(Interest::Read, reactor::accept).await;
            match accepted.and_then(|(socket, peer)| Ok((Io::new(socket.into())?, peer))) {
                Ok((stream, Some(peer))) => {
                    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
                    if expected.includes(peer)
                        && self.current_snapshot().allowed_route(&self.question_of(peer)) == Some(Route::Direct)
                    {
                        return (Conn::Tcp(stream), peer);
                    }
                    log::debug!("bind: {peer} is not the expected peer, or is denied");
                }
                Ok((_, None)) => {}
                Err(_) => sleep(EXHAUSTED_PAUSE).await,
            }
        }
    }
}

/// Who may connect.
struct Expected {
    /// All addresses of DST, canonical but for the unspecified ones, which mean anybody.
    ips: Vec<IpAddr>,
    port: u16,
}

impl Expected {
    /// Those that the rules let come; an error when that is nobody.
    async fn resolve(session: &Session<'_>, dst: &Addr) -> Result<Self, Refusal> {
        let port = dst.port;
        let mut ips = match &dst.host {
            Host::Ip(ip) => return Ok(Self { ips: vec![ip.to_canonical()], port }),
            Host::Name(name) => match parse_literal(name) {
                Some(ip) => return Ok(Self { ips: vec![ip.to_canonical()], port }),
                None => {
                    let deadline = Instant::now() + session.server.options.connect_timeout;
                    session.server.resolve(dst, deadline).await?
                }
            },
        };
        let mut objection = None;
        ips.retain(|addr| {
            let question = AccessRequest { target_ip: Some(addr.ip()), ..session.log.access_request() };
            match session.snapshot.evaluate(&question) {
                Decision::Deny(rule) => {
                    objection = Some(rule);
                    false
                }
                Decision::Allow(..) | Decision::Undecided(_) => true,
            }
        });
        match objection {
            Some(rule) if ips.is_empty() => Err(denial(rule)),
            _ => Ok(Self { ips: ips.into_iter().map(|addr| addr.ip()).collect(), port }),
        }
    }

    fn includes(&self, peer: SocketAddr) -> bool {
        let ip = peer.ip().to_canonical();
        let is_expected = |expected: &IpAddr| expected.is_unspecified() || *expected == ip;
        self.ips.iter().any(is_expected) && (self.port == 0 || self.port == peer.port())
    }

    /// The address that decides on the family and on where to listen: of both families, that of the client's own
    /// connection.
    fn representative(&self, control: Option<SocketAddr>) -> IpAddr {
        let is_near = |ip: &&IpAddr| control.is_some_and(|control| control.is_ipv4() == ip.is_ipv4());
        let near = self.ips.iter().find(is_near).or(self.ips.first());
        near.copied().unwrap_or(Ipv4Addr::UNSPECIFIED.into())
    }

    /// A name may have addresses of both families.
    fn both_families(&self) -> bool {
        self.ips.iter().any(IpAddr::is_ipv4) && self.ips.iter().any(IpAddr::is_ipv6)
    }
}

/// Binds where the expected peer can come to: the address that the client uses, or every address where one would not
/// do: for peers of both families, and behind an advertised address, which need not be one of this machine's.
fn listen(server: &Server, client: &Conn, expected: &Expected) -> io::Result<Io<TcpListener>> {
    let mut local = address_for(client.local_addr(), expected.representative(client.local_addr()))?;
    if expected.both_families() {
        local.set_ip(Ipv6Addr::UNSPECIFIED.into());
    } else if server.advertised(local) != local {
        local.set_ip(unspecified(local.ip()));
    }
    let bind = |local| listen_at(local, !expected.both_families());
    Io::new(bind_within(server.options.bind_ports.as_ref(), local, bind)?)
}

fn listen_at(local: SocketAddr, only_v6: bool) -> io::Result<TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(local), socket2::Type::STREAM, None)?;
    if local.is_ipv6() {
        socket.set_only_v6(only_v6)?;
    }
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(true)?;
    socket.bind(&local.into())?;
    set_tcp_options(&socket);
    // Strangers wait here too, until they are turned away.
    socket.listen(16)?;
    Ok(socket.into())
}
