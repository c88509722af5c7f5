//! BIND (RFC 1928 sections 4 and 6): listen for one expected peer, answer twice, relay.
//!
//! DST is who is expected, never where to listen: an address of zeros is anybody, port 0 is any port.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::time::Instant;

use futures_lite::FutureExt as _;

use super::policy_handle::denial;
use super::session::{Session, SessionError};
use super::{ACCEPT_RETRY_DELAY, Hop, Server, bind_in_range, reachable_addr};
use crate::conn::{Conn, timeout_at};
use crate::dial::{parse_literal, set_tcp_options, unspecified};
use crate::policy::rules::{AccessRequest, Decision, Route};
use crate::proto::{Addr, Command, Host, Rep};
use crate::reactor::{self, Interest, Io, sleep};

pub(super) async fn serve(session: &mut Session<'_>, client: &mut Conn, dst: &Addr) -> Result<Conn, SessionError> {
    match session.bind_route()? {
        Route::Direct => bind_directly(session, client, dst).await,
        Route::Hop(number) => {
            let hop = session.server.hop(number)?;
            session.log.via = Some(hop.clone());
            bind_via_hop(session, client, dst, &hop).await
        }
    }
}

async fn bind_directly(session: &mut Session<'_>, client: &mut Conn, dst: &Addr) -> Result<Conn, SessionError> {
    let server = session.server;
    let expected = ExpectedPeer::resolve(session, dst).await?;
    let listener = listen(server, client, &expected).map_err(SessionError::general_failure)?;
    let local = listener.get_ref().local_addr().map_err(SessionError::general_failure)?;
    let bnd = match reachable_addr(client.local_addr(), expected.representative(client.local_addr())) {
        Ok(addr) if local.ip().is_unspecified() => SocketAddr::new(addr.ip(), local.port()),
        _ => local,
    };
    session.reply_success(client, server.advertised_addr(bnd).into(), None).await?;
    let accepted = session.wait_for_peer(client, async { Ok(session.accept(&listener, &expected).await) }).await;
    drop(listener);
    let (peer, addr) = accepted?;
    session.reply_success(client, addr.into(), Some(addr)).await?;
    Ok(peer)
}

async fn bind_via_hop(
    session: &mut Session<'_>,
    client: &mut Conn,
    dst: &Addr,
    hop: &Hop,
) -> Result<Conn, SessionError> {
    let server = session.server;
    let proxy = server.hop_client(hop, dst.clone(), Instant::now() + server.options.connect_timeout);
    let (mut conn, bnd) = proxy.request(Command::Bind).await.map_err(SessionError::from_upstream)?;
    session.reply_success(client, proxy.resolve_unspecified_bnd(bnd, &conn), None).await?;
    let accepted = async { proxy.wait_for_peer(&mut conn).await.map_err(SessionError::from_upstream) };
    let peer = session.wait_for_peer(client, accepted).await?;
    let Host::Ip(ip) = peer.host else { return Err(SessionError::general_failure("a peer without an address")) };
    let addr = SocketAddr::new(ip.to_canonical(), peer.port);
    if let Decision::Deny(rule) = session.current_snapshot().evaluate(&session.request_for_peer(addr)) {
        return Err(denial(rule));
    }
    session.reply_success(client, peer, Some(addr)).await?;
    Ok(conn)
}

impl Session<'_> {
    /// Where the peer is to be waited for. When that depends on who comes, it is here, and only for those who may come
    /// here.
    fn bind_route(&self) -> Result<Route, SessionError> {
        let request = self.log.access_request();
        match self.snapshot.evaluate(&request) {
            Decision::Allow(_, route) => Ok(route),
            Decision::Deny(rule) => Err(denial(rule)),
            Decision::Undecided(_) => {
                let routes = self.snapshot.policy.rules.possible_routes(&request);
                match routes.as_slice() {
                    [only] => Ok(*only),
                    several if several.contains(&Route::Direct) => Ok(Route::Direct),
                    _ => Err(SessionError::not_allowed("the way depends on the peer, who was not named")),
                }
            }
        }
    }

    /// Waits as long as the peer may take, the client stays, and the rules let it.
    async fn wait_for_peer<T>(
        &self,
        client: &Conn,
        accepted: impl Future<Output = Result<T, SessionError>>,
    ) -> Result<T, SessionError> {
        let client_gone = async {
            client.wait_peer_closed().await;
            Err(SessionError::silent("the client left before the peer came"))
        };
        let denied = async { Err(self.denied_by_reload().await) };
        let deadline = Instant::now() + self.server.options.bind_timeout;
        let result = timeout_at(deadline, accepted.or(client_gone).or(denied)).await;
        result.unwrap_or_else(|| Err(SessionError::with_rep(Rep::TTL_EXPIRED, "the peer did not come in time")))
    }

    fn request_for_peer(&self, peer: SocketAddr) -> AccessRequest<'_> {
        AccessRequest { target_ip: Some(peer.ip()), target_port: Some(peer.port()), ..self.log.access_request() }
    }

    /// Waits for the expected peer. Whoever else connects is closed.
    async fn accept(&self, listener: &Io<TcpListener>, expected: &ExpectedPeer) -> (Conn, SocketAddr) {
        loop {
            let accepted = listener.with(Interest::Read, reactor::accept).await;
            match accepted.and_then(|(socket, peer)| Ok((Io::new(socket.into())?, peer))) {
                Ok((stream, Some(peer))) => {
                    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
                    if expected.includes(peer)
                        && self.current_snapshot().allowed_route(&self.request_for_peer(peer)) == Some(Route::Direct)
                    {
                        return (Conn::Tcp(stream), peer);
                    }
                    log::debug!("bind: {peer} is not the expected peer, or is denied");
                }
                Ok((_, None)) => {}
                Err(_) => sleep(ACCEPT_RETRY_DELAY).await,
            }
        }
    }
}

/// Who may connect.
struct ExpectedPeer {
    /// All addresses of DST, canonical but for the unspecified ones, which mean anybody.
    ips: Vec<IpAddr>,
    port: u16,
}

impl ExpectedPeer {
    /// Those that the rules let come; an error when that is nobody.
    async fn resolve(session: &Session<'_>, dst: &Addr) -> Result<Self, SessionError> {
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
        let mut denied_by = None;
        ips.retain(|addr| {
            let request = AccessRequest { target_ip: Some(addr.ip()), ..session.log.access_request() };
            match session.snapshot.evaluate(&request) {
                Decision::Deny(rule) => {
                    denied_by = Some(rule);
                    false
                }
                Decision::Allow(..) | Decision::Undecided(_) => true,
            }
        });
        match denied_by {
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
        let is_same_family = |ip: &&IpAddr| control.is_some_and(|control| control.is_ipv4() == ip.is_ipv4());
        let preferred = self.ips.iter().find(is_same_family).or(self.ips.first());
        preferred.copied().unwrap_or(Ipv4Addr::UNSPECIFIED.into())
    }

    /// A name may have addresses of both families.
    fn has_both_families(&self) -> bool {
        self.ips.iter().any(IpAddr::is_ipv4) && self.ips.iter().any(IpAddr::is_ipv6)
    }
}

/// Binds where the expected peer can come to: the address that the client uses, or every address where one would not
/// do: for peers of both families, and behind an advertised address, which need not be one of this machine's.
fn listen(server: &Server, client: &Conn, expected: &ExpectedPeer) -> io::Result<Io<TcpListener>> {
    let mut local = reachable_addr(client.local_addr(), expected.representative(client.local_addr()))?;
    if expected.has_both_families() {
        local.set_ip(Ipv6Addr::UNSPECIFIED.into());
    } else if server.advertised_addr(local) != local {
        local.set_ip(unspecified(local.ip()));
    }
    let bind = |local| bind_tcp(local, !expected.has_both_families());
    Io::new(bind_in_range(server.options.bind_ports.as_ref(), local, bind)?)
}

fn bind_tcp(local: SocketAddr, is_v6_only: bool) -> io::Result<TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(local), socket2::Type::STREAM, None)?;
    if local.is_ipv6() {
        socket.set_only_v6(is_v6_only)?;
    }
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(true)?;
    socket.bind(&local.into())?;
    set_tcp_options(&socket);
    // Strangers wait here too, until they are turned away.
    socket.listen(16)?;
    Ok(socket.into())
}
