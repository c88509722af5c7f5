//! `s5 udp`: datagrams through proxies, from stdin and to stdout.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::time::Duration;

use argh::FromArgs;
use futures_lite::{AsyncBufReadExt as _, AsyncReadExt as _, FutureExt as _, io::BufReader};
use smol::{Timer, Unblock};

use super::{Failure, HANDSHAKE, Status, duration, hops, note, target};
use crate::client::{Association, Client, Lost};
use crate::proto::MAX_UDP;

/// How long to wait for answers behind the last datagram when nobody says.
const ANSWERS: Duration = Duration::from_secs(2);

/// Send datagrams to a target through SOCKS5 proxies: a line of stdin is a datagram, an answer is a line on stdout.
#[derive(FromArgs, Debug)]
#[argh(
    subcommand,
    name = "udp",
    note = "The proxy is --proxy, else S5_PROXY, all_proxy or ALL_PROXY, else 127.0.0.1:1080.",
    example = "echo ping | s5 udp -w 1 192.0.2.7:7"
)]
pub struct Args {
    /// the proxy: host:port, socks5h://user:pass@host:port or unix:/path; a comma list is a chain, nearest first
    #[argh(option, short = 'x', long = "proxy", arg_name = "url")]
    proxy: Option<String>,

    /// how long to wait for answers when stdin has ended: seconds, or with ms, s, m, h (2)
    #[argh(option, short = 'w', long = "timeout", arg_name = "time", from_str_fn(duration), default = "ANSWERS")]
    wait: Duration,

    /// take what one read gives as a datagram, and write answers as they are
    #[argh(switch)]
    raw: bool,

    /// say on stderr what happens
    #[argh(switch, short = 'v')]
    verbose: bool,

    /// host:port, or host and port
    #[argh(positional, arg_name = "target")]
    target: Vec<String>,
}

impl Args {
    pub(super) fn run(self) -> Result<(), Failure> {
        let client = Client::new(hops(self.proxy.as_deref())?, target(&self.target)?, Some(HANDSHAKE));
        smol::block_on(async {
            let association = client.associate().await?;
            if let Some(relay) = association.relay() {
                note(self.verbose, &client, &format!("relays for {} at {relay}", client.dst()));
            }
            let transfer = Transfer { client: &client, association: &association, raw: self.raw };
            let send = async {
                transfer.send().await?;
                Timer::after(self.wait).await;
                Ok(())
            };
            let lost = async {
                let Lost(proxy) = association.lost().await;
                let what = format!("proxy {proxy}: transfer, for {}: the proxy ended the association", client.dst());
                Err(Failure::new(Status::Receive, what))
            };
            // Answers that are here already are written before anything ends.
            transfer.receive().or(send).or(lost).await
        })
    }
}

struct Transfer<'a> {
    client: &'a Client,
    association: &'a Association,
    raw: bool,
}

impl Transfer<'_> {
    /// Sends what stdin has, to its end.
    async fn send(&self) -> Result<(), Failure> {
        let stdin = io::stdin().as_fd().try_clone_to_owned().map_err(|error| self.failed(Status::Stdin, &error))?;
        let mut stdin = BufReader::new(Unblock::with_capacity(MAX_UDP, File::from(stdin)));
        let mut data = Vec::new();
        loop {
            data.clear();
            let read = if self.raw {
                data.resize(MAX_UDP, 0);
                stdin.get_mut().read(&mut data).await.inspect(|n| data.truncate(*n))
            } else {
                // One octet more than fits, for the line that does not, and one for its end.
                (&mut stdin).take(MAX_UDP as u64 + 2).read_until(b'\n', &mut data).await
            };
            if read.map_err(|error| self.failed(Status::Stdin, &error))? == 0 {
                return Ok(());
            }
            if !self.raw && data.last() == Some(&b'\n') {
                data.pop();
            }
            if let Err(error) = self.association.send(self.client.dst(), &data).await {
                return Err(self.failed(Status::Send, &error));
            }
        }
    }

    /// Writes answers as they come, without end.
    async fn receive(&self) -> Result<(), Failure> {
        let stdout = io::stdout().as_fd().try_clone_to_owned().map_err(|error| self.failed(Status::Stdout, &error))?;
        let mut stdout = File::from(stdout);
        loop {
            let answer = self.association.recv().await;
            let (_, mut data) = answer.map_err(|error| self.failed(Status::Receive, &error))?;
            if !self.raw {
                data.push(b'\n');
            }
            match stdout.write_all(&data) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                    return Err(Failure::new(Status::BrokenPipe, ""));
                }
                Err(error) => return Err(self.failed(Status::Stdout, &error)),
            }
        }
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
