//! `s5 udp`: sends and receives datagrams through proxies, for stdin and stdout or for a local port.

mod forward;
mod framing;
mod transfer;

use std::future::pending;
use std::io;
use std::time::Duration;

use futures_lite::FutureExt as _;

use super::cli::exit::{CliError, CliResult, ExitStatus};
use super::netcat::connector::{Connector, UDP_RELAY_HINT};
use super::netcat::options::ClientArgs;
use super::netcat::report::JsonOutput;
use super::netcat::target::target;
use crate::net::{sleep, yield_now};
use crate::proto::Command;
use framing::{DatagramReader, DatagramWriter, Framing};
use transfer::Transfer;

/// Time to wait for answers after stdin has ended.
const DEFAULT_ANSWER_WAIT: Duration = Duration::from_secs(2);
/// Maximum number of answers that are written together. A socket's buffer holds about as many.
const MAX_BATCH: usize = 1000;

pub(super) fn run(args: ClientArgs, json: JsonOutput) -> CliResult {
    let dst = target(&args, true)?;
    let framing = Framing::from_args(&args)?;
    let uses_stdio = args.zero_io || args.recv_only || args.send_only || args.count.is_some();
    CliError::usage_if(args.listen.is_some() && uses_stdio, "-z, -d, -n and --send-only cannot be used with -l")?;
    let connector = Connector::new(Command::UdpAssociate, args, json, dst)?;
    if let Some(addr) = connector.args.listen {
        return connector.run(Box::pin(forward::run(&connector, addr)));
    }
    let transfer = async |transfer: &Transfer<'_>| match connector.args.zero_io {
        true => Ok(()),
        false => relay_stdio(transfer, framing).await,
    };
    connector.run(Box::pin(transfer::run(&connector, None, transfer)))
}

async fn relay_stdio(transfer: &Transfer<'_>, framing: Framing) -> CliResult {
    let Transfer { connector, .. } = transfer;
    let args = &connector.args;
    let writer = DatagramWriter::new(framing, !args.send_only)
        .map_err(|error| connector.io_error(ExitStatus::WRITE_STDOUT, &error))?;
    let expected = args.count.unwrap_or(u64::MAX);
    let mut answers = AnswerWriter { transfer, writer, missing: expected };
    let ended = transfer.run(send_stdin(transfer, framing), answers.receive(), args.idle_timeout).await;
    match &ended {
        // After a timeout, a stalled reader of stdout must not delay the exit.
        Err(error) if error.status == ExitStatus::TIMED_OUT => {}
        // Answers that have already arrived are written even after an error.
        _ => answers.receive_ready().await?,
    }
    // The proxy may end the association right after the last answer.
    if answers.missing > 0 || ended.as_ref().is_err_and(|error| error.status != ExitStatus::RECEIVE_ERROR) {
        ended?;
    }
    if args.count.is_some() && answers.missing > 0 {
        let received = expected - answers.missing;
        let relay = transfer.association.relay_elsewhere().filter(|_| received == 0);
        let hint = relay.map(|relay| format!(" (the UDP relay is {relay}; {UDP_RELAY_HINT})")).unwrap_or_default();
        let reason = format!("received {received} of {expected} answers in time{hint}");
        return Err(connector.transfer_error(ExitStatus::TIMED_OUT, &reason));
    }
    Ok(())
}

async fn send_stdin(transfer: &Transfer<'_>, framing: Framing) -> CliResult {
    let args = &transfer.connector.args;
    let mut wait = args.quit_after.or(args.timeout);
    // Without stdin, the wait for answers begins at once.
    if !args.recv_only {
        let io_error = |status| move |error: io::Error| transfer.connector.io_error(status, &error);
        let stdin_error = io_error(ExitStatus::READ_STDIN);
        let mut reader = DatagramReader::new(framing).map_err(stdin_error)?;
        let mut read = async || {
            let next = async { reader.next().await.map_err(stdin_error) };
            next.or(transfer.idle(args.max_idle_time())).await
        };
        while let Some(data) = read().await? {
            transfer.send(&data).await.map_err(io_error(ExitStatus::SEND_ERROR))?;
        }
        wait = wait.or(Some(DEFAULT_ANSWER_WAIT));
    }
    match wait {
        Some(time) => sleep(time).await,
        None => pending().await,
    }
    Ok(())
}

struct AnswerWriter<'a> {
    transfer: &'a Transfer<'a>,
    writer: DatagramWriter,
    /// Number of answers that have not been received yet.
    missing: u64,
}

impl AnswerWriter<'_> {
    async fn receive(&mut self) -> CliResult {
        while self.missing > 0 {
            let (_, answer) = self.transfer.recv().await?;
            self.push(&answer);
            self.receive_ready().await?;
            // Sending must make progress even if answers are always ready.
            yield_now().await;
        }
        Ok(())
    }

    /// Receives all answers that have arrived, then writes them: a write is slow, and the socket's buffer is small.
    async fn receive_ready(&mut self) -> CliResult {
        for _ in 0..MAX_BATCH {
            if self.missing == 0 {
                break;
            }
            let Some((_, answer)) = self.transfer.association.try_recv() else { break };
            self.push(&answer);
        }
        let connector = self.transfer.connector;
        self.writer.flush().await.map_err(|error| connector.io_error(ExitStatus::WRITE_STDOUT, &error))
    }

    fn push(&mut self, answer: &[u8]) {
        self.missing -= 1;
        self.transfer.count_answer(answer);
        self.writer.push(answer);
    }
}
