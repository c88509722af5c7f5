//! `s5 udp`: datagrams through proxies, from stdin and to stdout, or from and to a local port.

mod forward;
mod framing;

use std::cell::Cell;
use std::future::pending;
use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_lite::FutureExt as _;

use super::client::connector::{Attempt, Connector};
use super::client::forward::parse_listen_addr;
use super::client::report::Report;
use super::client::{ClientMode, client_mode, parse_target};
use super::exit_status::{CliError, ExitStatus};
use crate::client::{Association, AssociationClosed, Client, ClientError};
use crate::proto::Addr;
use crate::reactor::{sleep, sleep_until, yield_now};
use crate::relay::ByteCounts;
use framing::{DatagramReader, DatagramWriter, Framing};

/// How long to wait for answers behind the last datagram when nobody says.
const ANSWER_WAIT: Duration = Duration::from_secs(2);
/// How many answers are written at once: about what a socket holds, and not without end.
const MAX_BATCH: usize = 1000;
/// How many local peers may have an association at once when nobody says.
pub(super) const MAX_PEERS: usize = 256;
/// After how long without a datagram a local peer's association is closed when nobody says.
const PEER_IDLE_TIMEOUT: Duration = Duration::from_secs(60);

client_mode!(
    Udp,
    "udp",
    "Send stdin as datagrams through SOCKS5 proxies, and print the answers",
    [target "host:port, or host and port"]
);

impl Args {
    pub(super) fn run(self) -> Result<(), CliError> {
        let Self(args) = self;
        let dst = match (args.target.as_slice(), args.zero_io) {
            ([], true) => None,
            (words, _) => Some(parse_target(words)?),
        };
        let framing = Framing::from_args(&args)?;
        let listen = args.listen.as_deref().map(parse_listen_addr).transpose()?;
        if listen.is_some() && (args.zero_io || args.recv_only || args.send_only || args.count.is_some()) {
            return Err(CliError::usage("-z, -d, -n and --send-only are of no use with -l"));
        }
        let connector = Connector::new(ClientMode::Udp, &args, dst)?;
        if let Some(addr) = listen {
            let limits = forward::PeerLimits {
                max_peers: args.max_peers,
                idle_timeout: args.idle_timeout.unwrap_or(PEER_IDLE_TIMEOUT),
            };
            return connector.run(Box::pin(forward::run(&connector, addr, limits)));
        }
        let options = TransferOptions {
            framing,
            reads_stdin: !args.recv_only,
            writes_stdout: !args.send_only,
            answer_wait: args.quit_after.or(args.timeout),
            idle_timeout: args.idle_timeout,
            count: args.count,
        };
        connector.run(Box::pin(run(&connector, (!args.zero_io).then_some(options))))
    }
}

/// An association, and what its datagrams are for, as it is resolved by whoever is to resolve it.
async fn associate(client: &Client) -> Result<(Association, Addr), ClientError> {
    let dst = client.target().await?;
    Ok((client.associate().await?, dst))
}

async fn run(connector: &Connector, options: Option<TransferOptions>) -> Result<(), CliError> {
    let Attempt { client, tries, result } = connector.attempt(associate).await;
    let mut report = Report::new(connector, &client, tries);
    let result = match result {
        Ok((association, dst)) => {
            if let Some(relay) = association.relay() {
                report.set_bnd(relay);
                let target = connector.dst().map(|dst| format!(" for {dst}")).unwrap_or_default();
                connector.print_verbose(&format!("relays{target} at {relay}"));
            }
            match options {
                Some(options) => options.run(connector, &association, &dst, &mut report).await,
                None => Ok(()),
            }
        }
        Err(failure) => Err(failure),
    };
    connector.finish(report, result)
}

/// What is to be done with stdin and answers.
struct TransferOptions {
    framing: Framing,
    reads_stdin: bool,
    writes_stdout: bool,
    /// How long answers are waited for behind the end of stdin.
    answer_wait: Option<Duration>,
    idle_timeout: Option<Duration>,
    /// After how many answers it is enough.
    count: Option<u64>,
}

impl TransferOptions {
    async fn run(
        self,
        connector: &Connector,
        association: &Association,
        dst: &Addr,
        report: &mut Report,
    ) -> Result<(), CliError> {
        let mut writer = DatagramWriter::new(self.framing, self.writes_stdout)
            .map_err(|error| io_error(connector, ExitStatus::WRITE_STDOUT, &error))?;
        let transfer = Transfer {
            connector,
            association,
            dst,
            started: Instant::now(),
            first_answer: Cell::default(),
            last_activity: Cell::new(Instant::now()),
            answers: Cell::new(0),
            count: self.count.unwrap_or(u64::MAX),
            moved: ByteCounts::default(),
        };
        let ended = transfer
            .receive(&mut writer)
            .or(self.send(&transfer))
            .or(self.idle(&transfer))
            .or(association_end(connector, association))
            .await;
        // Answers that are here already are written, whatever it was that ended.
        let flushed = match &ended {
            // Who does not read does not keep it from ending when its time is over.
            Err(failure) if failure.status == ExitStatus::TIMED_OUT => Ok(()),
            _ => transfer.receive_ready(&mut writer).await,
        };
        report.set_bytes(&transfer.moved);
        report.set_transfer_stats(transfer.first_answer.get(), None);
        print_losses(connector, association);
        flushed.and(ended)?;
        match self.count {
            Some(count) if transfer.answers.get() < count => {
                let answers = transfer.answers.get();
                Err(connector
                    .transfer_error(ExitStatus::TIMED_OUT, &format!("{answers} of {count} answers came in time")))
            }
            _ => Ok(()),
        }
    }

    /// Sends all of stdin, and waits for the answers.
    async fn send(&self, transfer: &Transfer<'_>) -> Result<(), CliError> {
        if !self.reads_stdin {
            // Then there is no end of stdin that answers could be waited for behind.
            return match self.answer_wait {
                Some(time) => {
                    sleep(time).await;
                    Ok(())
                }
                None => pending().await,
            };
        }
        let stdin = |error: io::Error| io_error(transfer.connector, ExitStatus::READ_STDIN, &error);
        let mut reader = DatagramReader::new(self.framing).map_err(stdin)?;
        while let Some(data) = reader.next().await.map_err(stdin)? {
            transfer.send(&data).await?;
        }
        sleep(self.answer_wait.unwrap_or(ANSWER_WAIT)).await;
        Ok(())
    }

    async fn idle(&self, transfer: &Transfer<'_>) -> Result<(), CliError> {
        let Some(idle_timeout) = self.idle_timeout else { return pending().await };
        wait_for_silence(&transfer.last_activity, idle_timeout).await;
        Err(transfer.connector.transfer_error(ExitStatus::TIMED_OUT, &format!("idle for {idle_timeout:?}")))
    }
}

/// Datagrams may be lost, but not without a word where we know of it.
fn print_losses(connector: &Connector, association: &Association) {
    let losses = association.losses();
    for (n, what) in [
        (losses.incomplete, "cut: fragments are missing"),
        (losses.invalid, "dropped: not of the protocol, or not from the relay"),
        (losses.overflowed, "dropped: they came faster than they were read"),
    ] {
        if n > 0 {
            connector.print_line(&format!(
                "s5: {}",
                connector.transfer_error(ExitStatus::FAILURE, &format!("answers {what} ({n})"))
            ));
        }
    }
}

/// Returns when nothing has moved for so long.
async fn wait_for_silence(last_activity: &Cell<Instant>, limit: Duration) {
    while last_activity.get().elapsed() < limit {
        sleep_until(last_activity.get() + limit).await;
    }
}

/// Returns when a proxy has ended the association, which is a failure.
async fn association_end(connector: &Connector, association: &Association) -> Result<(), CliError> {
    let AssociationClosed(proxy) = association.closed().await;
    let target = connector.dst().map(|dst| format!(", for {dst}")).unwrap_or_default();
    let what = format!("proxy {proxy}: transfer{target}: the proxy ended the association");
    Err(CliError::new(ExitStatus::RECEIVE_ERROR, what))
}

fn io_error(connector: &Connector, status: ExitStatus, error: &io::Error) -> CliError {
    let what = match status {
        ExitStatus::READ_STDIN => "reading stdin",
        ExitStatus::WRITE_STDOUT => "writing to stdout",
        ExitStatus::SEND_ERROR => "sending",
        _ => "receiving",
    };
    connector.transfer_error(status, &format!("{what}: {error}"))
}

/// Datagrams on their way.
struct Transfer<'a> {
    connector: &'a Connector,
    association: &'a Association,
    dst: &'a Addr,
    started: Instant,
    first_answer: Cell<Option<Duration>>,
    /// When one moved last.
    last_activity: Cell<Instant>,
    answers: Cell<u64>,
    count: u64,
    moved: ByteCounts,
}

impl Transfer<'_> {
    async fn send(&self, data: &[u8]) -> Result<(), CliError> {
        let sent = self.association.send(self.dst, data).await;
        self.last_activity.set(Instant::now());
        self.moved.up.fetch_add(data.len() as u64, Ordering::Relaxed);
        // Stdin may always have more; answers must get their turn.
        yield_now().await;
        sent.map_err(|error| io_error(self.connector, ExitStatus::SEND_ERROR, &error))
    }

    /// Writes answers as they come, until there are enough.
    async fn receive(&self, writer: &mut DatagramWriter) -> Result<(), CliError> {
        while self.answers.get() < self.count {
            let received = self.association.recv().await;
            let (_, answer) = received.map_err(|error| io_error(self.connector, ExitStatus::RECEIVE_ERROR, &error))?;
            self.push_answer(&answer, writer);
            self.receive_ready(writer).await?;
            // Answers without end must not keep the others from their turn.
            yield_now().await;
        }
        Ok(())
    }

    /// Writes what is here already, all at once: writing takes a while, and a socket holds only a few hundred answers.
    async fn receive_ready(&self, writer: &mut DatagramWriter) -> Result<(), CliError> {
        for _ in 0..MAX_BATCH {
            if self.answers.get() >= self.count {
                break;
            }
            let Ok(Some((_, answer))) = self.association.try_recv() else { break };
            self.push_answer(&answer, writer);
        }
        writer.flush().await.map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => CliError::new(ExitStatus::BROKEN_PIPE, ""),
            _ => io_error(self.connector, ExitStatus::WRITE_STDOUT, &error),
        })
    }

    fn push_answer(&self, answer: &[u8], writer: &mut DatagramWriter) {
        self.answers.set(self.answers.get() + 1);
        self.last_activity.set(Instant::now());
        self.first_answer.set(self.first_answer.get().or(Some(self.started.elapsed())));
        self.moved.down.fetch_add(answer.len() as u64, Ordering::Relaxed);
        writer.push(answer);
    }
}
