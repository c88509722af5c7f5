//! CONNECT (RFC 1928 sections 4 and 6): resolve, judge, dial, answer, relay.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use futures_lite::FutureExt as _;
use smol::Timer;

use super::record::Record;
use super::session::Refusal;
use super::{Server, is_local};
use crate::conn::{Conn, until};
use crate::dial::{Failure, dial};
use crate::policy::is_unicast;
use crate::proto::{Addr, Rep, Reply};
use crate::relay::{Abort as _, Broken, Limits, relay};

/// How long the dialling goes on when the client has closed its side and said nothing: it may only want to listen.
const LEAVE_GRACE: Duration = Duration::from_secs(2);

/// How long a client whose target has closed and takes no more may take for the last of what it was sent.
const LAST_WORDS: Duration = Duration::from_secs(2);

pub(super) async fn serve(server: &Server, client: &mut Conn, dst: &Addr, record: &mut Record) -> Result<(), Refusal> {
    let deadline = Instant::now() + server.options.connect_timeout;
    let connected = async {
        let addrs = server.reachable(dst, deadline).await?;
        dial(addrs, deadline).await.map_err(|failure| Refusal::failure(failure, dst))
    };
    let left = async {
        client.left().await;
        Timer::after(LEAVE_GRACE).await;
        Err(Refusal::silent("the client left before the connection was made"))
    };
    let target = connected.or(left).await?;
    let bnd = target.local_addr().map_err(|error| Refusal::reply(Rep::GENERAL_FAILURE, error))?;
    server.succeed(client, bnd, record).await?;
    server.relay(client, Conn::Tcp(target), record).await;
    Ok(())
}

impl Server {
    /// The addresses of `dst` that a session may go to, in the resolver's order.
    pub(super) async fn reachable(&self, dst: &Addr, deadline: Instant) -> Result<Vec<SocketAddr>, Refusal> {
        let mut addrs = self.resolve(dst, deadline).await?;
        addrs.retain(|addr| addr.port() != 0 && is_unicast(addr.ip()));
        if addrs.is_empty() {
            return Err(Refusal::reply(Rep::NETWORK_UNREACHABLE, "no address that one could connect to"));
        }
        addrs.retain(|addr| self.policy.may_reach(*addr, is_local));
        if addrs.is_empty() {
            return Err(Refusal::reply(Rep::NOT_ALLOWED, "a listener of this server itself"));
        }
        Ok(addrs)
    }

    /// All addresses of `dst`.
    pub(super) async fn resolve(&self, dst: &Addr, deadline: Instant) -> Result<Vec<SocketAddr>, Refusal> {
        let found = until(deadline, self.resolver.lookup(dst)).await.unwrap_or(Err(Failure::Resolver));
        found.map_err(|failure| Refusal::failure(failure, dst))
    }

    /// Answers success. The record keeps the first BND, that of this server's socket.
    pub(super) async fn succeed(&self, client: &mut Conn, bnd: SocketAddr, record: &mut Record) -> Result<(), Refusal> {
        record.bnd.get_or_insert(bnd);
        let reply = Reply { rep: Rep::SUCCEEDED, bnd: bnd.into() };
        client.write_message(&reply).await.map_err(Refusal::silent)?;
        record.rep = Some(Rep::SUCCEEDED);
        Ok(())
    }

    /// Relays between the client and the target until the tunnel ends.
    pub(super) async fn relay(&self, client: &mut Conn, mut target: Conn, record: &mut Record) {
        let limits = Limits { idle: Some(self.options.idle_timeout), linger: None };
        let Err(broken) = relay(client, &mut target, limits, &record.moved).await else { return };
        record.error = Some(broken.to_string());
        if let Broken::Unsent(_) = broken {
            drop(target);
            // What it goes on to send is not read, since it is lost, and the client should not think otherwise. That it
            // has closed its side does not say that it has read all.
            Timer::after(LAST_WORDS).await;
            client.abort();
        }
    }
}
