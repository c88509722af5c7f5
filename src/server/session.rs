//! One session from greeting to end, top to bottom: negotiate, authenticate, read the request, dispatch.
//!
//! A command answers success itself. Every refusal, of whatever stage, is said here and nowhere else, so that no
//! path answers twice or not at all.

use std::net::SocketAddr;
use std::time::Instant;

use super::record::Record;
use super::tunnel::Tunnel;
use super::{Server, associate, bind, connect};
use crate::conn::{Conn, ReadError, until};
use crate::dial::Failure;
use crate::proto::{
    Addr, Command, Credentials, Error, Foreign, Greeting, Host, Message, Method, Rep, Reply, Request, Selection, Status,
};

/// Why a session ends before it has succeeded, and what the client is told.
#[derive(Debug)]
pub(super) struct Refusal {
    say: Vec<u8>,
    rep: Option<Rep>,
    why: String,
}

impl Refusal {
    /// A failure reply (RFC 1928 section 6).
    pub(super) fn reply(rep: Rep, why: impl ToString) -> Self {
        let say = Reply { rep, bnd: Addr::UNSPECIFIED }.encode();
        Self { say, rep: Some(rep), why: why.to_string() }
    }

    /// The reply to a request for `dst` that failed.
    pub(super) fn failure(failure: Failure, dst: &Addr) -> Self {
        Self::reply(rep(failure, matches!(dst.host, Host::Name(_))), failure)
    }

    fn say(message: &impl Message, why: impl ToString) -> Self {
        Self { say: message.encode(), rep: None, why: why.to_string() }
    }

    /// There is nobody to answer, or no way to.
    pub(super) fn silent(why: impl ToString) -> Self {
        Self { say: Vec::new(), rep: None, why: why.to_string() }
    }
}

/// The one table from failures to REP.
fn rep(failure: Failure, dst_is_name: bool) -> Rep {
    match failure {
        Failure::Local | Failure::Resolver => Rep::GENERAL_FAILURE,
        Failure::Denied => Rep::NOT_ALLOWED,
        Failure::NetworkUnreachable => Rep::NETWORK_UNREACHABLE,
        Failure::HostUnreachable | Failure::NotFound => Rep::HOST_UNREACHABLE,
        Failure::Refused => Rep::REFUSED,
        Failure::TimedOut => Rep::TTL_EXPIRED,
        // The client chose the family of an address, but not that of a name.
        Failure::NoFamily if dst_is_name => Rep::HOST_UNREACHABLE,
        Failure::NoFamily => Rep::ATYP_NOT_SUPPORTED,
    }
}

/// Runs a session of `client`, which has no address on a Unix socket, and had one even if it is gone by now. What is
/// left of it when two ends are to be relayed is its tunnel.
pub(super) async fn run(server: &Server, mut conn: Conn, client: Option<SocketAddr>) -> Option<Tunnel> {
    let mut record = Record::new(client);
    let deadline = Instant::now() + server.options.handshake_timeout;
    let outcome = match until(deadline, handshake(server, &mut conn, &mut record)).await {
        Some(Ok(request)) => dispatch(server, &mut conn, &request, &mut record).await,
        Some(Err(refusal)) => Err(refusal),
        None => Err(Refusal::silent("the handshake took too long")),
    };
    match outcome {
        Ok(target) => Some(Tunnel { client: conn, target: target?, record }),
        Err(refusal) => {
            record.rep = refusal.rep.or(record.rep);
            record.error = Some(refusal.why.into());
            if !refusal.say.is_empty() {
                conn.farewell(&refusal.say).await;
            }
            None
        }
    }
}

async fn handshake(server: &Server, conn: &mut Conn, record: &mut Record) -> Result<Request, Refusal> {
    let request = authenticate(server, conn, record).await?.request().await?;
    record.command = Some(request.command);
    record.dst = Some(request.dst.clone());
    Ok(request)
}

/// A connection whose client may make a request; there is no other way to read one.
struct Authenticated<'a>(&'a mut Conn);

async fn authenticate<'a>(
    server: &Server,
    conn: &'a mut Conn,
    record: &mut Record,
) -> Result<Authenticated<'a>, Refusal> {
    let greeting: Greeting = conn.read_message().await.map_err(refuse_greeting)?;
    let Some(method) = server.policy.select(&greeting.methods) else {
        let none = Selection(Method::UNACCEPTABLE);
        return Err(Refusal::say(&none, "none of the methods that the client offers will do"));
    };
    conn.write_message(&Selection(method)).await.map_err(Refusal::silent)?;
    if let (Method::PASSWORD, Some(users)) = (method, &server.policy.users) {
        let credentials: Credentials = conn.read_message().await.map_err(refuse_login)?;
        record.user = Some(credentials.uname.clone().into());
        if !server.login.verify(users, credentials).await {
            return Err(Refusal::say(&Status::FAILURE, "login refused"));
        }
        conn.write_message(&Status::SUCCESS).await.map_err(Refusal::silent)?;
    }
    Ok(Authenticated(conn))
}

impl Authenticated<'_> {
    async fn request(self) -> Result<Request, Refusal> {
        self.0.read_message().await.map_err(|error| match error {
            ReadError::Protocol(error, _) => Refusal::reply(error.rep(), error),
            closed => Refusal::silent(closed),
        })
    }
}

fn refuse_greeting(error: ReadError) -> Refusal {
    match error {
        ReadError::Protocol(Error::Version(first), _) => {
            let foreign = Foreign(first);
            let why = format!("not SOCKS5: the client began with {foreign}");
            Refusal { say: foreign.rejection().to_vec(), rep: None, why }
        }
        ReadError::Protocol(error, _) => Refusal::say(&Selection(Method::UNACCEPTABLE), error),
        closed => Refusal::silent(closed),
    }
}

fn refuse_login(error: ReadError) -> Refusal {
    match error {
        ReadError::Protocol(error, _) => Refusal::say(&Status::FAILURE, error),
        closed => Refusal::silent(closed),
    }
}

/// Does what was asked for; what comes of it, but for an association, is the connection to relay with.
async fn dispatch(
    server: &Server,
    conn: &mut Conn,
    request: &Request,
    record: &mut Record,
) -> Result<Option<Conn>, Refusal> {
    let dst = &request.dst;
    match request.command {
        Command::Connect => connect::serve(server, conn, dst, record).await.map(Some),
        // The rarer commands are boxed, so that a session is not as large as the largest of them.
        Command::Bind => Box::pin(bind::serve(server, conn, dst, record)).await.map(Some),
        Command::UdpAssociate => Box::pin(associate::serve(server, conn, dst, record)).await.map(|()| None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_failure_has_its_rep() {
        let table = [
            (Failure::Refused, 5, 5),
            (Failure::NetworkUnreachable, 3, 3),
            (Failure::HostUnreachable, 4, 4),
            (Failure::TimedOut, 6, 6),
            (Failure::NotFound, 4, 4),
            (Failure::Resolver, 1, 1),
            (Failure::NoFamily, 8, 4),
            (Failure::Denied, 2, 2),
            (Failure::Local, 1, 1),
        ];
        for (failure, by_address, by_name) in table {
            assert_eq!(rep(failure, false).0, by_address, "{failure:?}");
            assert_eq!(rep(failure, true).0, by_name, "{failure:?}");
        }
    }
}
