//! `s5 connect`: stdin and stdout through proxies to a target.

use std::time::Duration;

use argh::FromArgs;

use super::{Failure, HANDSHAKE, deadline, hops, note, pipe, target};
use crate::client::Client;
use crate::proto::Command;

/// Connect to a target through SOCKS5 proxies: stdin goes there, what it answers comes to stdout.
#[derive(FromArgs, Debug)]
#[argh(
    subcommand,
    name = "connect",
    note = "The proxy is --proxy, else S5_PROXY, all_proxy or ALL_PROXY, else 127.0.0.1:1080.",
    example = "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | s5 connect example.org:80\nssh -o ProxyCommand='s5 connect %h %p' host"
)]
pub struct Args {
    /// the proxy: host:port, socks5h://user:pass@host:port or unix:/path; a comma list is a chain, nearest first
    #[argh(option, short = 'x', long = "proxy", arg_name = "url")]
    proxy: Option<String>,

    /// how long it may take until the target has accepted: seconds, or with ms, s, m, h (60)
    #[argh(option, short = 'w', long = "timeout", arg_name = "time", from_str_fn(deadline), default = "HANDSHAKE")]
    wait: Duration,

    /// say on stderr what happens
    #[argh(switch, short = 'v')]
    verbose: bool,

    /// host:port, or host and port
    #[argh(positional, arg_name = "target")]
    target: Vec<String>,
}

impl Args {
    pub(super) fn run(self) -> Result<(), Failure> {
        let client = Client::new(hops(self.proxy.as_deref())?, target(&self.target)?, Some(self.wait));
        smol::block_on(async {
            let (tunnel, bnd) = client.request(Command::Connect).await?;
            note(self.verbose, &client, &format!("connected to {} from {bnd}", client.dst()));
            pipe::run(&client, tunnel).await
        })
    }
}
