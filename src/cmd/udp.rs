//! `s5 udp`: sends and receives datagrams through proxies, for stdin and stdout or for a local port.

mod forward;
mod framing;

use std::cell::Cell;
use std::future::pending;
use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_lite::FutureExt as _;

use super::cli::exit::{CliError, ExitStatus};
use super::netcat::connector::{Connector, RetryOutcome};
use super::netcat::options::client_mode;
use super::netcat::report::Report;
use crate::client::{Association, AssociationClosed, Client, ClientError};
use crate::proto::{Addr, Command};
use crate::reactor::{sleep, sleep_until, yield_now};
use crate::relay::ByteCounts;
use framing::{DatagramReader, DatagramWriter, Framing};

/// Time to wait for answers after stdin has ended.
const DEFAULT_ANSWER_WAIT: Duration = Duration::from_secs(2);
/// Maximum number of answers that are written together. A socket's buffer holds about as many.
const MAX_BATCH: usize = 1000;
/// Idle timeout of a local peer's association.
const DEFAULT_PEER_IDLE_TIMEOUT: Duration = Duration::from_secs(60);

client_mode!(
    "udp",
    "Send stdin as datagrams through SOCKS5 proxies, and print the answers",
    [target "host:port, or host and port"]
);

impl Args {
    pub(super) fn run(self) -> Result<(), CliError> {
        let Self(args) = self;
        let dst = args.target()?;
        let framing = Framing::from_args(&args)?;
        if args.listen.is_some() && (args.zero_io || args.recv_only || args.send_only || args.count.is_some()) {
            return Err(CliError::usage("-z, -d, -n and --send-only cannot be used with -l"));
        }
        let connector = Connector::new(Command::UdpAssociate, &args, dst)?;
        if let Some(addr) = args.listen {
            let limits = forward::PeerLimits {
                max_peers: args.max_peers,
                idle_timeout: args.idle_timeout.unwrap_or(DEFAULT_PEER_IDLE_TIMEOUT),
            };
            return connector.run(Box::pin(forward::run(&connector, addr, limits)));
        }
        let transfer = StdioTransfer {
            framing,
            reads_stdin: !args.recv_only,
            writes_stdout: !args.send_only,
            answer_wait: args.quit_after.or(args.timeout),
            idle_timeout: args.idle_timeout,
            expected_answers: args.count,
        };
        connector.run(Box::pin(run(&connector, (!args.zero_io).then_some(transfer))))
    }
}

/// Establishes an association. Returns it and the target, which `-R local` resolves on this machine.
async fn associate(client: &Client) -> Result<(Association, Addr), ClientError> {
    let dst = client.target().await?;
    Ok((client.associate().await?, dst))
}

async fn run(connector: &Connector, transfer: Option<StdioTransfer>) -> Result<(), CliError> {
    let RetryOutcome { client, tries, result } = connector.retry(associate).await;
    let mut report = connector.report(&client, tries);
    let result = match result {
        Ok((association, dst)) => {
            if let Some(relay) = association.relay() {
                report.set_bnd(relay);
                let target = connector.dst().map(|dst| format!(" for {dst}")).unwrap_or_default();
                connector.print_verbose(&format!("UDP relay{target} at {relay}"));
            }
            match transfer {
                Some(transfer) => transfer.run(connector, &association, &dst, &mut report).await,
                None => Ok(()),
            }
        }
        Err(error) => Err(error),
    };
    connector.finish(report, result)
}

/// The options of a transfer between stdin, stdout and an association.
struct StdioTransfer {
    framing: Framing,
    reads_stdin: bool,
    writes_stdout: bool,
    /// Time to wait for answers after stdin has ended.
    answer_wait: Option<Duration>,
    idle_timeout: Option<Duration>,
    /// The transfer ends after this many answers; fewer are an error.
    expected_answers: Option<u64>,
}

impl StdioTransfer {
    async fn run(
        self,
        connector: &Connector,
        association: &Association,
        dst: &Addr,
        report: &mut Report,
    ) -> Result<(), CliError> {
        let mut writer = DatagramWriter::new(self.framing, self.writes_stdout)
            .map_err(|error| connector.io_error(ExitStatus::WRITE_STDOUT, &error))?;
        let state = TransferState {
            connector,
            association,
            dst,
            started: Instant::now(),
            first_answer: Cell::default(),
            last_activity: Cell::new(Instant::now()),
            answers: Cell::new(0),
            expected_answers: self.expected_answers.unwrap_or(u64::MAX),
            counts: ByteCounts::default(),
        };
        let ended = state
            .receive(&mut writer)
            .or(self.send(&state))
            .or(self.idle(&state))
            .or(association_end(connector, association))
            .await;
        // Answers that have already arrived are written even after an error.
        let flushed = match &ended {
            // After a timeout, a stalled reader of stdout must not delay the exit.
            Err(error) if error.status == ExitStatus::TIMED_OUT => Ok(()),
            _ => state.receive_ready(&mut writer).await,
        };
        report.set_bytes(&state.counts);
        report.set_stats(state.first_answer.get(), None);
        print_losses(connector, association);
        flushed.and(ended)?;
        match self.expected_answers {
            Some(count) if state.answers.get() < count => {
                let answers = state.answers.get();
                let reason = format!("received {answers} of {count} answers in time");
                Err(connector.transfer_error(ExitStatus::TIMED_OUT, &reason))
            }
            _ => Ok(()),
        }
    }

    /// Sends all datagrams of stdin, then waits for answers.
    async fn send(&self, state: &TransferState<'_>) -> Result<(), CliError> {
        if !self.reads_stdin {
            // Without stdin, the wait for answers begins at once.
            return match self.answer_wait {
                Some(time) => {
                    sleep(time).await;
                    Ok(())
                }
                None => pending().await,
            };
        }
        let stdin_error = |error: io::Error| state.connector.io_error(ExitStatus::READ_STDIN, &error);
        let mut reader = DatagramReader::new(self.framing).map_err(stdin_error)?;
        while let Some(data) = reader.next().await.map_err(stdin_error)? {
            state.send(&data).await?;
        }
        sleep(self.answer_wait.unwrap_or(DEFAULT_ANSWER_WAIT)).await;
        Ok(())
    }

    async fn idle(&self, state: &TransferState<'_>) -> Result<(), CliError> {
        let Some(idle_timeout) = self.idle_timeout else { return pending().await };
        wait_until_idle(&state.last_activity, idle_timeout).await;
        Err(state.connector.transfer_error(ExitStatus::TIMED_OUT, &format!("idle for {idle_timeout:?}")))
    }
}

/// Prints how many answers were lost on this machine.
fn print_losses(connector: &Connector, association: &Association) {
    let losses = association.losses();
    for (n, reason) in [
        (losses.incomplete, "incomplete: fragments are missing"),
        (losses.invalid, "dropped: malformed, or not from the relay"),
        (losses.overflowed, "dropped: they arrived faster than they were read"),
    ] {
        if n > 0 {
            let error = connector.transfer_error(ExitStatus::FAILURE, &format!("answers {reason} ({n})"));
            connector.print_error(Err(error));
        }
    }
}

/// Waits until there has been no datagram for `limit`.
async fn wait_until_idle(last_activity: &Cell<Instant>, limit: Duration) {
    while last_activity.get().elapsed() < limit {
        sleep_until(last_activity.get() + limit).await;
    }
}

/// Waits until a proxy ends the association. Always returns an error.
async fn association_end(connector: &Connector, association: &Association) -> Result<(), CliError> {
    let AssociationClosed(proxy) = association.closed().await;
    let target = connector.dst().map(|dst| format!(", for {dst}")).unwrap_or_default();
    let message = format!("proxy {proxy}: transfer{target}: the proxy ended the association");
    Err(CliError::new(ExitStatus::RECEIVE_ERROR, message))
}

/// The state of a transfer.
struct TransferState<'a> {
    connector: &'a Connector,
    association: &'a Association,
    dst: &'a Addr,
    started: Instant,
    first_answer: Cell<Option<Duration>>,
    /// Time of the last datagram in either direction.
    last_activity: Cell<Instant>,
    answers: Cell<u64>,
    expected_answers: u64,
    counts: ByteCounts,
}

impl TransferState<'_> {
    async fn send(&self, data: &[u8]) -> Result<(), CliError> {
        let sent = self.association.send(self.dst, data).await;
        self.last_activity.set(Instant::now());
        self.counts.up.fetch_add(data.len() as u64, Ordering::Relaxed);
        // Receiving must make progress even if stdin is always ready.
        yield_now().await;
        sent.map_err(|error| self.connector.io_error(ExitStatus::SEND_ERROR, &error))
    }

    /// Receives and writes answers until there are `expected_answers` of them.
    async fn receive(&self, writer: &mut DatagramWriter) -> Result<(), CliError> {
        while self.answers.get() < self.expected_answers {
            let received = self.association.recv().await;
            let (_, answer) = received.map_err(|error| self.connector.io_error(ExitStatus::RECEIVE_ERROR, &error))?;
            self.push_answer(&answer, writer);
            self.receive_ready(writer).await?;
            // Sending must make progress even if answers are always ready.
            yield_now().await;
        }
        Ok(())
    }

    /// Receives all answers that have arrived, then writes them: a write is slow, and the socket's buffer is small.
    async fn receive_ready(&self, writer: &mut DatagramWriter) -> Result<(), CliError> {
        for _ in 0..MAX_BATCH {
            if self.answers.get() >= self.expected_answers {
                break;
            }
            let Ok(Some((_, answer))) = self.association.try_recv() else { break };
            self.push_answer(&answer, writer);
        }
        writer.flush().await.map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => CliError::new(ExitStatus::BROKEN_PIPE, ""),
            _ => self.connector.io_error(ExitStatus::WRITE_STDOUT, &error),
        })
    }

    fn push_answer(&self, answer: &[u8], writer: &mut DatagramWriter) {
        self.answers.set(self.answers.get() + 1);
        self.last_activity.set(Instant::now());
        self.first_answer.set(self.first_answer.get().or(Some(self.started.elapsed())));
        self.counts.down.fetch_add(answer.len() as u64, Ordering::Relaxed);
        writer.push(answer);
    }
}
