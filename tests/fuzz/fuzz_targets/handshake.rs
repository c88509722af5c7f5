//! Answers a client with random bytes in random pieces, as a proxy does. The client must end, with a result or with an
//! error that has a text, and must not panic.

#![no_main]

mod support;

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures_lite::AsyncWriteExt as _;
use futures_lite::future::zip;
use libfuzzer_sys::fuzz_target;
use s5::client::{Client, ClientOptions, parse_hops};
use s5::conn::Conn;
use s5::net::{Io, reactor, yield_now};
use s5::proto::{Addr, Command};

/// Beginnings of an answer: none, a selected method, a method and a login, a method and the first bytes of a reply.
const PREFIXES: [&[u8]; 4] = [b"", b"\x05\0", b"\x05\x02\x01\0", b"\x05\0\x05\0\0"];
const COMMANDS: [Command; 3] = [Command::Connect, Command::Bind, Command::UdpAssociate];
const LIMIT: Duration = Duration::from_millis(500);

fuzz_target!(|bytes: &[u8]| {
    let [prefix, kind, rest @ ..] = bytes else { return };
    let (listener, path) = listener();
    let proxy = async {
        let (socket, _) = listener.accept().expect("the client connects");
        socket.set_nonblocking(true).expect("option set");
        let mut conn = Conn::Unix(Io::new(socket.into()).expect("registered"));
        let _ = conn.write_all(PREFIXES[usize::from(*prefix) % PREFIXES.len()]).await;
        for piece in support::pieces(rest) {
            // Lets the client read the piece.
            yield_now().await;
            let _ = conn.write_all(piece).await;
        }
    };
    let command = COMMANDS[usize::from(*kind) % COMMANDS.len()];
    let url = format!("u:p@unix:{}{}", path.display(), if kind & 0x80 == 0 { "" } else { ",hop:1" });
    let options = ClientOptions { proxy_is_udp_relay: kind & 0x40 != 0, ..ClientOptions::default() };
    let dst = Addr { host: "192.0.2.7".parse().expect("valid host"), port: 80 };
    let client = Client::new(parse_hops(&url).expect("valid URL"), dst, Some(LIMIT), Arc::new(options));
    let handshake = async {
        let result = match command {
            Command::UdpAssociate => client.associate().await.map(drop),
            command => match client.request(command).await {
                Ok((mut conn, _)) if command == Command::Bind => client.wait_for_peer(&mut conn, true).await.map(drop),
                result => result.map(drop),
            },
        };
        if let Err(error) = result {
            assert!(!error.to_string().is_empty());
        }
    };
    // The client is polled first, so it has connected when the proxy accepts.
    reactor::run(zip(handshake, proxy)).expect("the event loop runs");
});

fn listener() -> &'static (UnixListener, PathBuf) {
    static LISTENER: OnceLock<(UnixListener, PathBuf)> = OnceLock::new();
    LISTENER.get_or_init(|| {
        let path = support::temp_path("proxy");
        (UnixListener::bind(&path).expect("bound"), path)
    })
}
