//! CONNECT (RFC 1928 sections 4 and 6): resolve, judge, dial, answer.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use futures_lite::FutureExt as _;

use super::record::Record;
use super::session::Refusal;
use super::{Server, is_local};
use crate::conn::{Conn, until};
use crate::dial::{Failure, dial};
use crate::policy::is_unicast;
use crate::policy::rules::{Question, Verdict};
use crate::proto::{Addr, Rep, Reply};
use crate::reactor::sleep;

/// How long the dialling goes on when the client has closed its side and said nothing: it may only want to listen.
const LEAVE_GRACE: Duration = Duration::from_secs(2);

pub(super) async fn serve(
    server: &Server,
    client: &mut Conn,
    dst: &Addr,
    record: &mut Record,
) -> Result<Conn, Refusal> {
    let deadline = Instant::now() + server.options.connect_timeout;
    let connected = async {
        let addrs = server.reachable(dst, deadline).await?;
        dial(addrs, deadline).await.map_err(|failure| Refusal::failure(failure, dst))
    };
    let left = async {
        client.left().await;
        sleep(LEAVE_GRACE).await;
        Err(Refusal::silent("the client left before the connection was made"))
    };
    let target = connected.or(left).await?;
    let bnd = target.get_ref().local_addr().map_err(|error| Refusal::reply(Rep::GENERAL_FAILURE, error))?;
    server.succeed(client, bnd, record).await?;
    Ok(Conn::Tcp(target))
}

impl Server {
    /// The addresses of `dst` that a session may go to, in the resolver's order.
    pub(super) async fn reachable(&self, dst: &Addr, deadline: Instant) -> Result<Vec<SocketAddr>, Refusal> {
        let mut addrs = self.resolve(dst, deadline).await?;
        addrs.retain(|addr| addr.port() != 0 && is_unicast(addr.ip()));
        if addrs.is_empty() {
            return Err(Refusal::reply(Rep::NETWORK_UNREACHABLE, "no address that one could connect to"));
        }
        let allowed = |addr: &SocketAddr| {
            let question = Question { ip: Some(addr.ip()), port: Some(addr.port()), ..Question::default() };
            !matches!(self.policy.judge(&question, is_local), Verdict::Deny(_))
        };
        addrs.retain(allowed);
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
}
