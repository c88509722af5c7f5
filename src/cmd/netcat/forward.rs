//! `s5 connect -l`: forwards connections to a local port through the proxy, each in its own tunnel.

use std::io;
use std::mem::replace;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::pin::Pin;

use futures_lite::FutureExt as _;
use smol::LocalExecutor;
use socket2::SockRef;

use super::connector::{Connector, ModeFuture};
use super::report::SessionReport;
use super::tunnel::relay_result;
use crate::client::Client;
use crate::cmd::cli::exit::{CliError, CliResult, ExitStatus, start_stderr_thread};
use crate::conn::{Conn, HALF_CLOSED_GRACE};
use crate::net::{
    self, ACCEPT_RETRY_DELAY, Interest, Io, RelayError, RelayOp, RelayOptions, Stream, UNDELIVERED_GRACE, relay,
    set_tcp_options, sleep,
};
use crate::proto::{Addr, Command};

/// Opens a socket on a local address with `bind`, and prints the address. From then on, another thread writes to stderr.
pub(crate) fn listen<T: AsFd>(
    connector: &Connector,
    addr: SocketAddr,
    bind: impl FnOnce(SocketAddr) -> io::Result<T>,
) -> CliResult<Io<T>> {
    let open = || {
        let socket = bind(addr).map_err(|error| net::bind_error(error, addr))?;
        SockRef::from(&socket).set_nonblocking(true)?;
        let local = SockRef::from(&socket).local_addr()?.as_socket();
        Ok((Io::new(socket)?, local.unwrap_or(addr)))
    };
    let (socket, local) = open().map_err(|error: io::Error| {
        CliError::new(ExitStatus::LOCAL_ADDR, format!("listen on {addr}: {error} (choose another with -l)"))
    })?;
    // One reader of stderr that has stopped must not stop all connections.
    start_stderr_thread()
        .map_err(|error| CliError::new(ExitStatus::FAILURE, format!("start a thread for stderr: {error}")))?;
    connector.print_line(&format!("listening on {local}"));
    Ok(socket)
}

/// Forwards one connection, or with `-k` any number.
pub(crate) async fn run(connector: &Connector, addr: SocketAddr) -> CliResult {
    let listener = listen(connector, addr, TcpListener::bind)?;
    if !connector.args.keep_open {
        let local = accept(connector, &listener).await?;
        drop(listener);
        return serve_connection(connector, local).await;
    }
    let executor = LocalExecutor::new();
    let accept_all: ModeFuture<'_> = Box::pin(async {
        loop {
            let local = accept(connector, &listener).await?;
            let session = connector.open_sessions.clone();
            let tunnel = async move {
                connector.print_error(serve_connection(connector, local).await);
                drop(session);
            };
            executor.spawn(Box::pin(tunnel) as Task<'_>).detach();
        }
    });
    executor.run(accept_all).await
}

/// A task that runs while connections are accepted. One boxed type, so that the executor's code is compiled once.
pub(crate) type Task<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

/// Accepts the next connection. After an error, accept(2) is retried after a pause; only the first error is printed.
async fn accept(connector: &Connector, listener: &Io<TcpListener>) -> CliResult<Conn> {
    let mut is_reported = false;
    loop {
        let accepted = listener.with(Interest::Read, net::accept).await;
        match accepted.and_then(|(socket, _)| Io::new(socket.into())) {
            Ok(local) => {
                set_tcp_options(&local);
                return Ok(Conn::Tcp(local));
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                if !replace(&mut is_reported, true) {
                    connector.print_line(&format!("s5: accept: {error} (retrying)"));
                }
                sleep(ACCEPT_RETRY_DELAY).await;
            }
        }
    }
}

async fn serve_connection(connector: &Connector, mut local: Conn) -> CliResult {
    let request = connector.retry(async |client| client.request(Command::Connect).await);
    let disconnected = async {
        local.wait_eof().await;
        sleep(HALF_CLOSED_GRACE).await;
        None
    };
    let Some(outcome) = async { Some(request.await) }.or(disconnected).await else {
        let reason = "the local client disconnected before the tunnel was established";
        let error = connector.transfer_error(ExitStatus::RECEIVE_ERROR, reason);
        return connector.finish(&SessionReport::default(), Err(error));
    };
    if outcome.result.is_err() {
        // Reset the connection: an orderly close would look like an empty answer from the target.
        local.abort();
    }
    let transfer = async |(mut tunnel, bnd): (Conn, Addr), _: &Client, report: &mut SessionReport<'_>| {
        connector.print_connected(&bnd);
        report.bnd = Some(bnd);
        let (counts, stats) = report.start_relay();
        let options = RelayOptions {
            idle_timeout: connector.args.max_idle_time(),
            linger: connector.args.linger,
            stats: Some(stats),
            ..RelayOptions::default()
        };
        let outcome = relay(&mut local, &mut tunnel, &options, &counts, |_, _| true).await;
        drop(tunnel);
        match outcome {
            Err(RelayError::Io(RelayOp::ReadClient | RelayOp::WriteClient, error)) => {
                Err(connector.transfer_error(ExitStatus::RECEIVE_ERROR, &format!("local client: {error}")))
            }
            outcome => {
                if let Err(RelayError::Undelivered(_)) = outcome {
                    sleep(UNDELIVERED_GRACE).await;
                    local.abort();
                }
                relay_result(connector, outcome, Ok(()))
            }
        }
    };
    connector.use_reported(outcome, transfer).await
}
