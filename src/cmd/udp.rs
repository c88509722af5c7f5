//! `s5 udp`: datagrams through proxies, from stdin and to stdout.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::Duration;

use argh::{ArgsInfo, FromArgs};
use futures_lite::io::BufReader;
use futures_lite::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, FutureExt as _};
use smol::{Timer, Unblock};

use super::client::client_args;
use super::{Failure, HANDSHAKE, Status, duration, note, target};
use crate::client::{Association, Client, Lost};
use crate::proto::MAX_UDP6;

/// How long to wait for answers behind the last datagram when nobody says.
const ANSWERS: Duration = Duration::from_secs(2);
/// How many answers are written at once: about what a socket holds, and not without end.
const MAX_BATCH: usize = 1000;

client_args! {
    /// Send datagrams to a target through SOCKS5 proxies: a line of stdin is a datagram, an answer is a line on stdout.
    #[derive(FromArgs, ArgsInfo, Debug)]
    #[argh(
        subcommand,
        name = "udp",
        note = "The proxy is --proxy, else S5_PROXY, all_proxy or ALL_PROXY, else 127.0.0.1:1080.",
        example = "echo ping | s5 udp -w 1 192.0.2.7:7"
    )]
    pub struct Args {
        /// how long to wait for answers when stdin has ended: seconds, or with ms, s, m, h (2)
        #[argh(option, short = 'w', long = "timeout", arg_name = "time", from_str_fn(duration), default = "ANSWERS")]
        wait: Duration,

        /// take what one read gives as a datagram, and write answers as they are
        #[argh(switch)]
        raw: bool,

        /// host:port, or host and port
        #[argh(positional, arg_name = "target")]
        target: Vec<String>,
    }
}

impl Args {
    pub(super) fn run(mut self) -> Result<(), Failure> {
        let client = self.client(target(&self.target)?, HANDSHAKE)?;
        smol::block_on(async {
            let association = client.associate().await?;
            if let Some(relay) = association.relay() {
                note(self.verbose, &client, &format!("relays for {} at {relay}", client.dst()));
            }
            let transfer = Transfer { client: &client, association: &association };
            let send = async {
                if self.raw {
                    transfer.send_reads().await?
                } else {
                    transfer.send_lines().await?
                }
                Timer::after(self.wait).await;
                Ok(())
            };
            let lost = async {
                let Lost(proxy) = association.lost().await;
                let what = format!("proxy {proxy}: transfer, for {}: the proxy ended the association", client.dst());
                Err(Failure::new(Status::Receive, what))
            };
            let mut stdout = Stdout::new(self.raw).map_err(|error| transfer.failed(Status::Stdout, &error))?;
            let ended = transfer.receive(&mut stdout).or(send).or(lost).await;
            // Answers that are here already are written, whatever it was that ended.
            transfer.receive_rest(&mut stdout).await?;
            ended
        })
    }
}

/// Where answers go. Written on a thread of its own, so that who does not read holds up nothing else.
struct Stdout {
    file: Unblock<File>,
    raw: bool,
    /// What is still to be written; kept here, since writing may be given up in the middle and taken up again.
    rest: VecDeque<u8>,
}

impl Stdout {
    fn new(raw: bool) -> io::Result<Self> {
        let file = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        Ok(Self { file: Unblock::with_capacity(MAX_UDP6, file), raw, rest: VecDeque::new() })
    }

    fn push(&mut self, answer: &[u8]) {
        self.rest.extend(answer);
        if !self.raw {
            self.rest.push_back(b'\n');
        }
    }

    async fn flush(&mut self) -> io::Result<()> {
        while !self.rest.is_empty() {
            match self.file.write(self.rest.as_slices().0).await {
                Ok(n @ 1..) => drop(self.rest.drain(..n)),
                // Only flushing tells why.
                Ok(0) | Err(_) => break,
            }
        }
        self.file.flush().await?;
        if self.rest.is_empty() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }
}

struct Transfer<'a> {
    client: &'a Client,
    association: &'a Association,
}

impl Transfer<'_> {
    /// Sends each line of stdin, to its end.
    async fn send_lines(&self) -> Result<(), Failure> {
        let mut stdin = BufReader::new(Unblock::with_capacity(MAX_UDP6, self.stdin()?));
        let mut line = Vec::new();
        loop {
            line.clear();
            // Room for one octet too many, so that a line that does not fit is refused, and for its end.
            let read = (&mut stdin).take(MAX_UDP6 as u64 + 2).read_until(b'\n', &mut line).await;
            if read.map_err(|error| self.failed(Status::Stdin, &error))? == 0 {
                return Ok(());
            }
            self.send(line.strip_suffix(b"\n").unwrap_or(&line)).await?;
        }
    }

    /// Sends what each read of stdin gives, to its end.
    async fn send_reads(&self) -> Result<(), Failure> {
        let stdin = Arc::new(self.stdin()?);
        loop {
            let stdin = stdin.clone();
            let read = smol::unblock(move || {
                let mut data = vec![0; MAX_UDP6];
                let n = (&*stdin).read(&mut data)?;
                data.truncate(n);
                io::Result::Ok(data)
            });
            let data = read.await.map_err(|error| self.failed(Status::Stdin, &error))?;
            if data.is_empty() {
                return Ok(());
            }
            self.send(&data).await?;
        }
    }

    fn stdin(&self) -> Result<File, Failure> {
        let stdin = io::stdin().as_fd().try_clone_to_owned();
        stdin.map(File::from).map_err(|error| self.failed(Status::Stdin, &error))
    }

    async fn send(&self, data: &[u8]) -> Result<(), Failure> {
        let sent = self.association.send(self.client.dst(), data).await;
        // Stdin may always have more; answers must get their turn.
        smol::future::yield_now().await;
        sent.map_err(|error| self.failed(Status::Send, &error))
    }

    /// Writes answers as they come, without end.
    async fn receive(&self, stdout: &mut Stdout) -> Result<(), Failure> {
        loop {
            let received = self.association.recv().await;
            let (_, answer) = received.map_err(|error| self.failed(Status::Receive, &error))?;
            stdout.push(&answer);
            self.receive_rest(stdout).await?;
            // Answers without end must not keep the others from their turn.
            smol::future::yield_now().await;
        }
    }

    /// Writes what is here already, all at once: writing takes a while, and a socket holds only a few hundred answers.
    async fn receive_rest(&self, stdout: &mut Stdout) -> Result<(), Failure> {
        for _ in 0..MAX_BATCH {
            let Ok(Some((_, answer))) = self.association.try_recv() else { break };
            stdout.push(&answer);
        }
        self.flush(stdout).await
    }

    async fn flush(&self, stdout: &mut Stdout) -> Result<(), Failure> {
        stdout.flush().await.map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => Failure::new(Status::BrokenPipe, ""),
            _ => self.failed(Status::Stdout, &error),
        })
    }

    fn failed(&self, status: Status, error: &io::Error) -> Failure {
        let what = match status {
            Status::Stdin => "reading stdin",
            Status::Stdout => "writing to stdout",
            Status::Send => "sending",
            _ => "receiving",
        };
        let (proxy, target) = (self.client.last_proxy(), self.client.dst());
        Failure::new(status, format!("proxy {proxy}: transfer, for {target}: {what}: {error}"))
    }
}
