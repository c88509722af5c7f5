//! `s5 connect -l`: a local port that leads through the proxy, each connection by a tunnel of its own. The relay is the
//! server's.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::pin::Pin;
use std::time::Duration;

use futures_lite::FutureExt as _;
use smol::LocalExecutor;

use super::connector::{Attempt, Connector};
use super::report::Report;
use super::tunnel::{TrackedConn, relay_result};
use crate::client::parse_addr;
use crate::cmd::CliError;
use crate::cmd::exit_status::ExitStatus;
use crate::conn::Conn;
use crate::dial::tune;
use crate::proto::{Addr, Command, Host};
use crate::reactor::{self, Io, Way, sleep};
use crate::relay::{Broken, Limits, Moved, Place, Stream, relay};

/// How long a local client whose target has closed and takes no more may take for the last of what it was sent.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// How long the attempt goes on when a local client has closed its side and said nothing: it may only want to listen.
const LEAVE_GRACE: Duration = Duration::from_secs(2);
/// How long nothing is accepted when there is no descriptor left.
const PAUSE: Duration = Duration::from_millis(100);

/// Where to listen: `port` on 127.0.0.1, or `addr:port`.
///
/// # Errors
/// What is wrong, in words.
pub(in crate::cmd) fn local(text: &str) -> Result<SocketAddr, CliError> {
    let wrong = |what: String| CliError::usage(format!("-l: {what}"));
    if let Ok(port) = text.parse() {
        return Ok(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port));
    }
    match parse_addr(text, None).map_err(wrong)? {
        Addr { host: Host::Ip(ip), port } => Ok(SocketAddr::new(ip, port)),
        Addr { host: Host::Name(name), port } if name.as_str() == "localhost" => {
            Ok(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port))
        }
        Addr { host: Host::Name(name), port } if name.as_str() == "*" => {
            Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port))
        }
        Addr { host: Host::Name(_), .. } => Err(wrong(format!("{text:?} is not an address of this machine"))),
    }
}

/// What a socket that can't be had is to the user.
pub(in crate::cmd) fn unbound(addr: SocketAddr, error: &io::Error) -> CliError {
    CliError::new(ExitStatus::LOCAL_ADDR, format!("listen on {addr}: {error}"))
}

/// Gives one connection its tunnel, or with `keeps` any number.
pub(in crate::cmd) async fn run(
    connector: &Connector,
    addr: SocketAddr,
    keeps: bool,
    idle: Option<Duration>,
) -> Result<(), CliError> {
    let bound = TcpListener::bind(addr).and_then(|listener| {
        listener.set_nonblocking(true)?;
        let addr = listener.local_addr()?;
        Ok((Io::new(listener)?, addr))
    });
    let (listener, addr) = bound.map_err(|error| unbound(addr, &error))?;
    connector.print_line(&format!("listening on {addr}"));
    if !keeps {
        let local = accept(connector, &listener).await?;
        drop(listener);
        return serve(connector, local, idle).await;
    }
    let executor = LocalExecutor::new();
    let serve_all = async {
        loop {
            let local = accept(connector, &listener).await?;
            let tunnel = async { connector.print_error(serve(connector, local, idle).await) };
            executor.spawn(Box::pin(tunnel) as Task<'_>).detach();
        }
    };
    run_with(&executor, Box::pin(serve_all)).await
}

/// What is done beside the accepting. Of one type for all, each of which would have its copy of the executor's code.
pub(in crate::cmd) type Task<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

/// Runs `main` to its end, and meanwhile the tasks of the executor.
pub(in crate::cmd) async fn run_with(
    executor: &LocalExecutor<'_>,
    main: Pin<Box<dyn Future<Output = Result<(), CliError>> + '_>>,
) -> Result<(), CliError> {
    executor.run(main).await
}

/// The next connection. What one of them has to do with it does not keep the others from coming.
async fn accept(connector: &Connector, listener: &Io<TcpListener>) -> Result<Conn, CliError> {
    let mut is_short = false;
    loop {
        let accepted = listener.with(Way::Read, reactor::accept).await;
        match accepted.and_then(|(socket, _)| Io::new(TcpStream::from(socket))) {
            Ok(local) => {
                tune(&local);
                return Ok(Conn::Tcp(local));
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                if !is_short {
                    connector.print_line(&format!("s5: accepting: {error}"));
                }
                is_short = true;
                sleep(PAUSE).await;
            }
        }
    }
}

/// One connection from its beginning to its end.
async fn serve(connector: &Connector, mut local: Conn, idle: Option<Duration>) -> Result<(), CliError> {
    let established = connector.request(Command::Connect);
    let left = async {
        local.left().await;
        sleep(LEAVE_GRACE).await;
        None
    };
    let Some(Attempt { client, tries, result }) = async { Some(established.await) }.or(left).await else {
        let left =
            connector.transfer_error(ExitStatus::RECEIVE_ERROR, "the local client left before there was a tunnel");
        return connector.finish(Report::default(), Err(left));
    };
    let mut report = Report::new(connector, &client, tries);
    let (tunnel, bnd) = match result {
        Ok(reached) => reached,
        Err(failure) => {
            // It must not take nothing for the whole.
            local.abort();
            return connector.finish(report, Err(failure));
        }
    };
    report.set_bnd(&bnd);
    connector.print_verbose(&format!("connected to {} from {bnd}", client.dst()));
    let mut tunnel = TrackedConn::new(tunnel, true);
    let stats = tunnel.stats.clone();
    let moved = Moved::default();
    let limits = Limits { idle, ..Limits::default() };
    let ended = {
        let (mut near, mut far): (&mut dyn Stream, &mut dyn Stream) = (&mut local, &mut tunnel);
        relay(&mut near, &mut far, &limits, &moved, |_, _| true).await
    };
    drop(tunnel);
    if let Err(Broken::Unsent(_)) = ended {
        sleep(LAST_WORDS).await;
        local.abort();
    }
    report.set_moved(&moved);
    report.set_ends(stats.first_byte.get(), stats.ended_first.get());
    let result = match ended {
        Err(Broken::Io(Place::ReadClient | Place::WriteClient, error)) => {
            Err(connector.transfer_error(ExitStatus::RECEIVE_ERROR, &format!("the local client: {error}")))
        }
        ended => relay_result(connector, idle, ended, Ok(())),
    };
    connector.finish(report, result)
}
