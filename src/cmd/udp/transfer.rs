//! The transfer of datagrams over one association: between the target and either stdin and stdout or a local peer.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_lite::FutureExt as _;

use crate::client::{Association, Client};
use crate::cmd::cli::exit::{CliError, CliResult, ExitStatus};
use crate::cmd::netcat::connector::Connector;
use crate::cmd::netcat::report::SessionReport;
use crate::net::{ByteCounts, RelayStats, sleep_until, yield_now};
use crate::proto::Addr;

pub(super) struct Transfer<'a> {
    pub(super) connector: &'a Connector,
    pub(super) association: Association,
    /// Time of the last datagram in either direction.
    pub(super) last_activity: Rc<Cell<Instant>>,
    counts: Arc<ByteCounts>,
    stats: Arc<RelayStats>,
}

/// Establishes an association and runs `transfer` with it. `peer` is the local peer, `None` for stdin and stdout.
pub(super) async fn run(
    connector: &Connector,
    peer: Option<SocketAddr>,
    transfer: impl AsyncFnOnce(&Transfer<'_>) -> CliResult,
) -> CliResult {
    let run_transfer = async |association: Association, _: &Client, report: &mut SessionReport<'_>| {
        if let Some(relay) = association.relay() {
            report.bnd = Some(relay.clone());
            let peer = peer.map(|peer| format!(" for {peer}")).unwrap_or_default();
            let target = connector.dst().map(|dst| format!(" to {dst}")).unwrap_or_default();
            connector.print_verbose(&format!("UDP relay{peer}{target} at {relay}"));
        }
        let (counts, stats) = report.start_relay();
        let last_activity = Rc::new(Cell::new(Instant::now()));
        let state = Transfer { connector, association, last_activity, counts, stats };
        let result = transfer(&state).await;
        state.print_losses();
        result
    };
    connector.run_reported(async |client: &Client| client.associate().await, run_transfer).await
}

impl Transfer<'_> {
    /// Runs both directions until one of them or the association ends, or is idle for `idle_timeout`.
    pub(super) async fn run(
        &self,
        send: impl Future<Output = CliResult>,
        receive: impl Future<Output = CliResult>,
        idle_timeout: Option<Duration>,
    ) -> CliResult {
        receive.or(send).or(self.idle(idle_timeout)).or(self.closed()).await
    }

    /// Waits until there has been no datagram for `timeout`. Always returns an error.
    pub(super) async fn idle<T>(&self, timeout: Option<Duration>) -> CliResult<T> {
        let Some(limit) = timeout else { return std::future::pending().await };
        while self.last_activity.get().elapsed() < limit {
            sleep_until(self.last_activity.get() + limit).await;
        }
        Err(self.connector.transfer_error(ExitStatus::TIMED_OUT, &format!("idle for {limit:?}")))
    }

    pub(super) async fn send(&self, data: &[u8]) -> io::Result<()> {
        let sent = self.association.send(data).await;
        self.last_activity.set(Instant::now());
        self.counts.up.fetch_add(data.len() as u64, Ordering::Relaxed);
        // Receiving must make progress even if datagrams to send are always ready.
        yield_now().await;
        sent
    }

    /// Receives a datagram and its sender. The caller counts it if it is an answer.
    pub(super) async fn recv(&self) -> CliResult<(Addr, Vec<u8>)> {
        let received = self.association.recv().await;
        received.map_err(|error| self.connector.io_error(ExitStatus::RECEIVE_ERROR, &error))
    }

    pub(super) fn count_answer(&self, data: &[u8]) {
        self.last_activity.set(Instant::now());
        self.stats.set_first_byte();
        self.counts.down.fetch_add(data.len() as u64, Ordering::Relaxed);
    }

    /// Waits until a proxy ends the association. Always returns an error.
    async fn closed(&self) -> CliResult {
        let proxy = self.association.closed().await;
        let target = self.connector.dst().map(|dst| format!(", for {dst}")).unwrap_or_default();
        let message = format!("proxy {proxy}: transfer{target}: the proxy ended the association");
        Err(CliError::new(ExitStatus::RECEIVE_ERROR, message))
    }

    fn print_losses(&self) {
        let losses = self.association.losses();
        for (n, reason) in [
            (losses.incomplete, "incomplete: fragments are missing"),
            (losses.invalid, "dropped: malformed, or not from the relay"),
            (losses.foreign, "dropped: not from the target"),
            (losses.overflowed, "dropped: they arrived faster than they were read"),
        ] {
            if n > 0 {
                let error = self.connector.transfer_error(ExitStatus::FAILURE, &format!("answers {reason} ({n})"));
                self.connector.print_error(Err(error));
            }
        }
    }
}
