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
use super::client::forward::local;
use super::client::report::Report;
use super::client::{ClientMode, client_mode, parse_target};
use super::exit_status::{CliError, ExitStatus};
use crate::client::{Association, Client, Error, Lost};
use crate::proto::Addr;
use crate::reactor::{sleep, sleep_until, yield_now};
use crate::relay::Moved;
use framing::{Framing, Sink, Source};

/// How long to wait for answers behind the last datagram when nobody says.
const ANSWERS: Duration = Duration::from_secs(2);
/// How many answers are written at once: about what a socket holds, and not without end.
const MAX_BATCH: usize = 1000;
/// How many local peers may have an association at once when nobody says.
pub(super) const MAX_PEERS: usize = 256;
/// After how long without a datagram a local peer's association is closed when nobody says.
const PEER_IDLE: Duration = Duration::from_secs(60);

client_mode!(
    Udp,
    "udp",
    "Send datagrams to a target through SOCKS5 proxies: a line of stdin is a datagram, an answer is a line on stdout.",
    "echo ping | s5 udp -w 1 192.0.2.7:7\n\
     s5 udp -z -v -x proxy.example\n\
     s5 udp -l 5353 192.0.2.53:53",
    [target "host:port, or host and port"]
);

impl Args {
    pub(super) fn run(self) -> Result<(), CliError> {
        let Self(args) = self;
        let dst = match (args.target.as_slice(), args.zero_io) {
            ([], true) => None,
            (words, _) => Some(parse_target(words)?),
        };
        let framing = Framing::of(&args)?;
        let listen = args.listen.as_deref().map(local).transpose()?;
        if listen.is_some() && (args.zero_io || args.recv_only || args.send_only || args.count.is_some()) {
            return Err(CliError::usage("-z, -d, -n and --send-only are of no use with -l"));
        }
        let connector = Connector::new(ClientMode::Udp, &args, dst)?;
        if let Some(addr) = listen {
            let bounds = forward::Bounds { peers: args.max_peers, idle: args.idle_timeout.unwrap_or(PEER_IDLE) };
            return connector.run(Box::pin(forward::run(&connector, addr, bounds)));
        }
        let transfer = Transfer {
            framing,
            reads: !args.recv_only,
            writes: !args.send_only,
            answers: args.quit_after.or(args.timeout),
            idle: args.idle_timeout,
            count: args.count,
        };
        connector.run(Box::pin(run(&connector, (!args.zero_io).then_some(transfer))))
    }
}

/// An association, and what its datagrams are for, as it is resolved by whoever is to resolve it.
async fn associate(client: &Client) -> Result<(Association, Addr), Error> {
    let dst = client.target().await?;
    Ok((client.associate().await?, dst))
}

async fn run(connector: &Connector, transfer: Option<Transfer>) -> Result<(), CliError> {
    let Attempt { client, tries, result } = connector.attempt(associate).await;
    let mut report = Report::new(connector, &client, tries);
    let result = match result {
        Ok((association, dst)) => {
            if let Some(relay) = association.relay() {
                report.set_bnd(relay);
                let target = connector.dst().map(|dst| format!(" for {dst}")).unwrap_or_default();
                connector.print_verbose(&format!("relays{target} at {relay}"));
            }
            match transfer {
                Some(transfer) => transfer.run(connector, &association, &dst, &mut report).await,
                None => Ok(()),
            }
        }
        Err(failure) => Err(failure),
    };
    connector.finish(report, result)
}

/// What is to be done with stdin and answers.
struct Transfer {
    framing: Framing,
    reads: bool,
    writes: bool,
    /// How long answers are waited for behind the end of stdin.
    answers: Option<Duration>,
    idle: Option<Duration>,
    /// After how many answers it is enough.
    count: Option<u64>,
}

impl Transfer {
    async fn run(
        self,
        connector: &Connector,
        association: &Association,
        dst: &Addr,
        report: &mut Report,
    ) -> Result<(), CliError> {
        let mut sink = Sink::new(self.framing, self.writes)
            .map_err(|error| failed(connector, ExitStatus::WRITE_STDOUT, &error))?;
        let flow = Flow {
            connector,
            association,
            dst,
            began: Instant::now(),
            first_answer: Cell::default(),
            last: Cell::new(Instant::now()),
            answers: Cell::new(0),
            count: self.count.unwrap_or(u64::MAX),
            moved: Moved::default(),
        };
        let ended =
            flow.receive(&mut sink).or(self.send(&flow)).or(self.idle(&flow)).or(lost(connector, association)).await;
        // Answers that are here already are written, whatever it was that ended.
        let rest = match &ended {
            // Who does not read does not keep it from ending when its time is over.
            Err(failure) if failure.status == ExitStatus::TIMED_OUT => Ok(()),
            _ => flow.receive_rest(&mut sink).await,
        };
        report.set_moved(&flow.moved);
        report.set_ends(flow.first_answer.get(), None);
        tell_losses(connector, association);
        rest.and(ended)?;
        match self.count {
            Some(count) if flow.answers.get() < count => {
                let answers = flow.answers.get();
                Err(connector
                    .transfer_error(ExitStatus::TIMED_OUT, &format!("{answers} of {count} answers came in time")))
            }
            _ => Ok(()),
        }
    }

    /// Sends all of stdin, and waits for the answers.
    async fn send(&self, flow: &Flow<'_>) -> Result<(), CliError> {
        if !self.reads {
            // Then there is no end of stdin that answers could be waited for behind.
            return match self.answers {
                Some(time) => {
                    sleep(time).await;
                    Ok(())
                }
                None => pending().await,
            };
        }
        let stdin = |error: io::Error| failed(flow.connector, ExitStatus::READ_STDIN, &error);
        let mut source = Source::new(self.framing).map_err(stdin)?;
        while let Some(data) = source.next().await.map_err(stdin)? {
            flow.send(&data).await?;
        }
        sleep(self.answers.unwrap_or(ANSWERS)).await;
        Ok(())
    }

    async fn idle(&self, flow: &Flow<'_>) -> Result<(), CliError> {
        let Some(idle) = self.idle else { return pending().await };
        silence(&flow.last, idle).await;
        Err(flow.connector.transfer_error(ExitStatus::TIMED_OUT, &format!("idle for {idle:?}")))
    }
}

/// Datagrams may be lost, but not without a word where we know of it.
fn tell_losses(connector: &Connector, association: &Association) {
    let losses = association.losses();
    for (n, what) in [
        (losses.cut, "cut: fragments are missing"),
        (losses.strange, "dropped: not of the protocol, or not from the relay"),
        (losses.overflown, "dropped: they came faster than they were read"),
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
async fn silence(last: &Cell<Instant>, idle: Duration) {
    while last.get().elapsed() < idle {
        sleep_until(last.get() + idle).await;
    }
}

/// Returns when a proxy has ended the association, which is a failure.
async fn lost(connector: &Connector, association: &Association) -> Result<(), CliError> {
    let Lost(proxy) = association.lost().await;
    let target = connector.dst().map(|dst| format!(", for {dst}")).unwrap_or_default();
    let what = format!("proxy {proxy}: transfer{target}: the proxy ended the association");
    Err(CliError::new(ExitStatus::RECEIVE_ERROR, what))
}

fn failed(connector: &Connector, status: ExitStatus, error: &io::Error) -> CliError {
    let what = match status {
        ExitStatus::READ_STDIN => "reading stdin",
        ExitStatus::WRITE_STDOUT => "writing to stdout",
        ExitStatus::SEND_ERROR => "sending",
        _ => "receiving",
    };
    connector.transfer_error(status, &format!("{what}: {error}"))
}

/// Datagrams on their way.
struct Flow<'a> {
    connector: &'a Connector,
    association: &'a Association,
    dst: &'a Addr,
    began: Instant,
    first_answer: Cell<Option<Duration>>,
    /// When one moved last.
    last: Cell<Instant>,
    answers: Cell<u64>,
    count: u64,
    moved: Moved,
}

impl Flow<'_> {
    async fn send(&self, data: &[u8]) -> Result<(), CliError> {
        let sent = self.association.send(self.dst, data).await;
        self.last.set(Instant::now());
        self.moved.up.fetch_add(data.len() as u64, Ordering::Relaxed);
        // Stdin may always have more; answers must get their turn.
        yield_now().await;
        sent.map_err(|error| failed(self.connector, ExitStatus::SEND_ERROR, &error))
    }

    /// Writes answers as they come, until there are enough.
    async fn receive(&self, sink: &mut Sink) -> Result<(), CliError> {
        while self.answers.get() < self.count {
            let received = self.association.recv().await;
            let (_, answer) = received.map_err(|error| failed(self.connector, ExitStatus::RECEIVE_ERROR, &error))?;
            self.take(&answer, sink);
            self.receive_rest(sink).await?;
            // Answers without end must not keep the others from their turn.
            yield_now().await;
        }
        Ok(())
    }

    /// Writes what is here already, all at once: writing takes a while, and a socket holds only a few hundred answers.
    async fn receive_rest(&self, sink: &mut Sink) -> Result<(), CliError> {
        for _ in 0..MAX_BATCH {
            if self.answers.get() >= self.count {
                break;
            }
            let Ok(Some((_, answer))) = self.association.try_recv() else { break };
            self.take(&answer, sink);
        }
        sink.flush().await.map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => CliError::new(ExitStatus::BROKEN_PIPE, ""),
            _ => failed(self.connector, ExitStatus::WRITE_STDOUT, &error),
        })
    }

    fn take(&self, answer: &[u8], sink: &mut Sink) {
        self.answers.set(self.answers.get() + 1);
        self.last.set(Instant::now());
        self.first_answer.set(self.first_answer.get().or(Some(self.began.elapsed())));
        self.moved.down.fetch_add(answer.len() as u64, Ordering::Relaxed);
        sink.push(answer);
    }
}
