//! BIND (RFC 1928 sections 4 and 6): listen for one expected peer, answer twice, relay.
//!
//! DST is who is expected, never where to listen: an address of zeros is anybody, port 0 is any port.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use futures_lite::FutureExt as _;

use super::record::Record;
use super::session::Refusal;
use super::{Server, address_for, bind_within};
use crate::conn::{Conn, until};
use crate::dial::{literal, tune, unspecified};
use crate::proto::{Addr, Host, Rep};
use crate::reactor::{self, Io, Way, sleep};

/// How long to rest when there is no descriptor for the peer's connection.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

pub(super) async fn serve(
    server: &Server,
    client: &mut Conn,
    dst: &Addr,
    record: &mut Record,
) -> Result<Conn, Refusal> {
    let expected = Expected::resolve(server, dst).await?;
    let listener = listen(server, client, &expected).map_err(|error| Refusal::reply(Rep::GENERAL_FAILURE, error))?;
    let local = listener.get_ref().local_addr().map_err(|error| Refusal::reply(Rep::GENERAL_FAILURE, error))?;
    let reported = match address_for(client.local_addr(), expected.representative(client.local_addr())) {
        Ok(addr) if local.ip().is_unspecified() => SocketAddr::new(addr.ip(), local.port()),
        _ => local,
    };
    server.succeed(client, server.advertised(reported), record).await?;
    let left = async {
        client.closed().await;
        Err(Refusal::silent("the client left before the peer came"))
    };
    let deadline = Instant::now() + server.options.bind_timeout;
    let came = until(deadline, async { Ok(accept(&listener, &expected).await) }.or(left)).await;
    drop(listener);
    let (peer, addr) =
        came.unwrap_or_else(|| Err(Refusal::reply(Rep::TTL_EXPIRED, "the peer did not come in time")))?;
    server.succeed(client, addr, record).await?;
    Ok(peer)
}

/// Who may connect.
struct Expected {
    /// All addresses of DST, canonical but for the unspecified ones, which mean anybody.
    ips: Vec<IpAddr>,
    port: u16,
}

impl Expected {
    async fn resolve(server: &Server, dst: &Addr) -> Result<Self, Refusal> {
        let ips = match &dst.host {
            Host::Ip(ip) => vec![ip.to_canonical()],
            Host::Name(name) => match literal(name) {
                Some(ip) => vec![ip.to_canonical()],
                None => {
                    let deadline = Instant::now() + server.options.connect_timeout;
                    server.resolve(dst, deadline).await?.into_iter().map(|addr| addr.ip()).collect()
                }
            },
        };
        Ok(Self { ips, port: dst.port })
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
    tune(&socket);
    // Strangers wait here too, until they are turned away.
    socket.listen(16)?;
    Ok(socket.into())
}

/// Waits for the expected peer. Whoever else connects is closed.
async fn accept(listener: &Io<TcpListener>, expected: &Expected) -> (Conn, SocketAddr) {
    loop {
        let accepted = listener.with(Way::Read, reactor::accept).await;
        match accepted.and_then(|(socket, peer)| Ok((Io::new(socket.into())?, peer))) {
            Ok((stream, Some(peer))) if expected.includes(peer) => {
                return (Conn::Tcp(stream), SocketAddr::new(peer.ip().to_canonical(), peer.port()));
            }
            Ok((_, stranger)) => log::debug!("bind: {stranger:?} is not the expected peer"),
            Err(_) => sleep(EXHAUSTED_PAUSE).await,
        }
    }
}
