//! `s5 bind`: asks the proxy to accept one connection for us, says where, then is netcat.

use std::time::Duration;

use argh::{ArgsInfo, FromArgs};

use super::client::client_args;
use super::{Failure, HANDSHAKE, deadline, note, pipe, say};
use crate::client::parse_addr;
use crate::proto::{Addr, Command};

client_args! {
    /// Accept one connection at a SOCKS5 proxy: says where on stderr, then stdin and stdout are that connection.
    #[derive(FromArgs, ArgsInfo, Debug)]
    #[argh(
        subcommand,
        name = "bind",
        note = "The proxy is --proxy, else S5_PROXY, all_proxy or ALL_PROXY, else 127.0.0.1:1080.",
        example = "s5 bind -x proxy.example 192.0.2.7 > received"
    )]
    pub struct Args {
        /// how long it may take until the proxy listens: seconds, or with ms, s, m, h (60); the wait for the peer is the
        /// proxy's to bound
        #[argh(option, short = 'w', long = "timeout", arg_name = "time", from_str_fn(deadline), default = "HANDSHAKE")]
        wait: Duration,

        /// who may connect: host or host:port, anybody without it
        #[argh(positional)]
        peer: Option<String>,
    }
}

impl Args {
    pub(super) fn run(mut self) -> Result<(), Failure> {
        let peer = self.peer.as_deref().map_or(Ok(Addr::UNSPECIFIED), |peer| parse_addr(peer, Some(0)));
        let peer = peer.map_err(|error| Failure::usage(format!("peer: {error}")))?;
        let client = self.client(peer, self.wait)?;
        smol::block_on(async {
            let (mut tunnel, bnd) = client.request(Command::Bind).await?;
            say(&format!("bound {}", client.meant(bnd, &tunnel)));
            note(self.verbose, &client, &format!("waiting for {}", client.dst()));
            let peer = client.accepted(&mut tunnel).await?;
            say(&format!("accepted {peer}"));
            pipe::run(&client, tunnel).await
        })
    }
}
