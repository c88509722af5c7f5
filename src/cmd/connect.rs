//! `s5 connect`: stdin and stdout through proxies to a target.

use std::time::Duration;

use argh::{ArgsInfo, FromArgs};

use super::client::client_args;
use super::{Failure, HANDSHAKE, deadline, note, pipe, target};
use crate::proto::Command;

client_args! {
    /// Connect to a target through SOCKS5 proxies: stdin goes there, what it answers comes to stdout.
    #[derive(FromArgs, ArgsInfo, Debug)]
    #[argh(
        subcommand,
        name = "connect",
        note = "The proxy is --proxy, else S5_PROXY, all_proxy or ALL_PROXY, else 127.0.0.1:1080.",
        example = "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | s5 connect example.org:80\nssh -o ProxyCommand='s5 connect %h %p' host"
    )]
    pub struct Args {
        /// how long it may take until the target has accepted: seconds, or with ms, s, m, h (60)
        #[argh(option, short = 'w', long = "timeout", arg_name = "time", from_str_fn(deadline), default = "HANDSHAKE")]
        wait: Duration,

        /// host:port, or host and port
        #[argh(positional, arg_name = "target")]
        target: Vec<String>,
    }
}

impl Args {
    pub(super) fn run(mut self) -> Result<(), Failure> {
        let client = self.client(target(&self.target)?, self.wait)?;
        smol::block_on(async {
            let (tunnel, bnd) = client.request(Command::Connect).await?;
            note(self.verbose, &client, &format!("connected to {} from {bnd}", client.dst()));
            pipe::run(&client, tunnel).await
        })
    }
}
