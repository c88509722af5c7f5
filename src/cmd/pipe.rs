//! stdin and stdout as one stream, and the relay between them and a tunnel.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_lite::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use smol::Unblock;

use super::{Failure, Status};
use crate::client::Client;
use crate::conn::Conn;
use crate::relay::{Broken, Limits, Moved, Place, Stream, relay};

/// The buffer between a blocking descriptor and the relay, in octets.
const BUFFER: usize = 64 * 1024;
/// How long stdin may be silent when the network side has ended: what it has ready is still sent, but it is not
/// waited for, since the peer has most likely left.
const LINGER: Duration = Duration::from_millis(250);

/// stdin and stdout. Read and written on threads of their own: O_NONBLOCK would hit whoever shares them with us.
struct Pipe {
    stdin: Unblock<File>,
    stdout: Unblock<File>,
}

impl Pipe {
    fn new() -> io::Result<Self> {
        let stdin = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        let stdout = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        Ok(Self { stdin: Unblock::with_capacity(BUFFER, stdin), stdout: Unblock::with_capacity(BUFFER, stdout) })
    }
}

/// A reset is told by the exit status.
impl Stream for Pipe {
    fn abort(&self) {}
}

impl AsyncRead for Pipe {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stdin).poll_read(cx, buf)
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stdout).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stdout).poll_flush(cx)
    }

    /// Closing is flushing: what was written is on its way, and the descriptor is not ours alone.
    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flush(cx)
    }
}

/// Relays between stdin, stdout and the tunnel, until the network side ends.
pub(super) async fn run(client: &Client, mut tunnel: Conn) -> Result<(), Failure> {
    let failed = |status, what: &str, error: &io::Error| {
        let (proxy, target) = (client.last_proxy(), client.dst());
        Failure::new(status, format!("proxy {proxy}: transfer, for {target}: {what}: {error}"))
    };
    let mut pipe = Pipe::new().map_err(|error| failed(Status::Other, "stdin and stdout", &error))?;
    let limits = Limits { linger: Some(LINGER), ..Limits::default() };
    let ended = relay(&mut pipe, &mut tunnel, &limits, &Moved::default(), |_, _| true).await;
    let ended = match (ended, pipe.stdout.flush().await) {
        // Only the thread that writes knows why writing failed.
        (Ok(_) | Err(Broken::Idle | Broken::Io(Place::WriteClient, _)), Err(error)) => {
            Err(Broken::Io(Place::WriteClient, error))
        }
        (ended, _) => ended,
    };
    match ended {
        // Nobody cuts it here.
        Ok(_) | Err(Broken::Idle | Broken::Cut) => Ok(()),
        Err(Broken::Io(Place::WriteClient, error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            Err(Failure::new(Status::BrokenPipe, ""))
        }
        Err(Broken::Io(Place::WriteClient, error)) => Err(failed(Status::Stdout, "writing to stdout", &error)),
        Err(Broken::Io(Place::ReadClient, error)) => Err(failed(Status::Stdin, "reading stdin", &error)),
        Err(Broken::Io(Place::WriteDst, error) | Broken::Unsent(error)) => Err(failed(Status::Send, "sending", &error)),
        Err(Broken::Io(Place::ReadDst, error)) => Err(failed(Status::Receive, "receiving", &error)),
    }
}
