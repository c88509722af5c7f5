//! stdin and stdout, or those of a program, as one stream for the relay.

use std::fs::File;
use std::future::poll_fn;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_lite::{AsyncRead, AsyncWrite};
use rustix::event::{PollFd, PollFlags};
use smol::Unblock;

use super::descriptor;
use crate::reactor::{Interest, Io};
use crate::relay::{SocketOp, SocketPoll, Stream};

/// The buffer between a blocking descriptor and the relay, in octets.
const BUFFER_SIZE: usize = 64 * 1024;
/// The major number of /dev/null, /dev/zero and /dev/full (Linux, devices.txt).
const MEMORY_DEVICES_MAJOR: u32 = 1;

/// A descriptor that is read or written.
enum StdioEnd {
    /// A pipe, which this thread waits for like for a socket.
    Pipe(Io<File>),
    /// A file, or /dev/null and its like: no waiting at all.
    File(File),
    /// Anything else, on a thread of its own: O_NONBLOCK would hit whoever shares it with us.
    Blocking(Unblock<BlockingFile>),
}

/// A descriptor that somebody else may have made non-blocking: it is waited for all the same.
pub(in crate::cmd) struct BlockingFile(pub(in crate::cmd) File);

impl BlockingFile {
    fn wait<T>(&self, flags: PollFlags, mut op: impl FnMut(&File) -> io::Result<T>) -> io::Result<T> {
        loop {
            match op(&self.0) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    rustix::event::poll(&mut [PollFd::new(&self.0, flags)], None)?;
                }
                done => return done,
            }
        }
    }
}

impl io::Read for BlockingFile {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.wait(PollFlags::IN, |mut file| file.read(buf))
    }
}

impl io::Write for BlockingFile {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.wait(PollFlags::OUT, |mut file| file.write(buf))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl StdioEnd {
    /// Of a descriptor that others may have too. A pipe can be opened once more, and has flags of its own then (Linux).
    fn from_shared(fd: OwnedFd, writes: bool) -> Self {
        let file = File::from(fd);
        let Ok(found) = file.metadata() else { return Self::blocking(file) };
        let kind = found.file_type();
        if kind.is_file() || kind.is_char_device() && rustix::fs::major(found.rdev()) == MEMORY_DEVICES_MAJOR {
            return Self::File(file);
        }
        let reopen = || {
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            descriptor::open_fifo(Path::new(&path), writes).and_then(Io::new)
        };
        match kind.is_fifo().then(reopen) {
            Some(Ok(pipe)) => Self::Pipe(pipe),
            _ => Self::blocking(file),
        }
    }

    fn blocking(file: File) -> Self {
        Self::Blocking(Unblock::with_capacity(BUFFER_SIZE, BlockingFile(file)))
    }

    /// Of a pipe that nobody else has.
    fn from_owned_pipe(pipe: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&pipe, true)?;
        Io::new(File::from(pipe)).map(Self::Pipe)
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        match self {
            Self::Pipe(pipe) => pipe.poll_with(cx, Interest::Read, |mut file| file.read(buf)),
            Self::File(file) => Poll::Ready(file.read(buf)),
            Self::Blocking(file) => Pin::new(file).poll_read(cx, buf),
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self {
            Self::Pipe(pipe) => pipe.poll_with(cx, Interest::Write, |mut file| file.write(buf)),
            Self::File(file) => Poll::Ready(file.write(buf)),
            Self::Blocking(file) => Pin::new(file).poll_write(cx, buf),
        }
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Pipe(_) | Self::File(_) => Poll::Ready(Ok(())),
            Self::Blocking(file) => Pin::new(file).poll_flush(cx),
        }
    }

    fn poll_socket(&self, cx: &mut Context<'_>, interest: Interest, op: &mut SocketOp<'_>) -> SocketPoll {
        match self {
            Self::Pipe(pipe) => Some(pipe.poll_with(cx, interest, |file| op(file.as_fd()))),
            Self::File(file) => Some(Poll::Ready(op(file.as_fd()))),
            Self::Blocking(_) => None,
        }
    }
}

/// What is read goes up, what comes down is written.
pub(super) struct StdioStream {
    /// Without it nothing is read, and no end comes either.
    input: Option<StdioEnd>,
    /// Without it, what comes is thrown away.
    output: Option<StdioEnd>,
    crlf: Option<CrlfEncoder>,
    /// Whether a reader that is gone has had enough, and is no failure.
    ignores_broken_pipe: bool,
    /// Whether something was taken of which it is not known yet that it is written.
    has_unflushed: bool,
}

impl StdioStream {
    /// stdin and stdout, each where it is wanted.
    pub(super) fn from_stdio(reads: bool, writes: bool, crlf: bool) -> io::Result<Self> {
        let stdin = reads.then(|| io::stdin().as_fd().try_clone_to_owned()).transpose()?;
        let stdout = writes.then(|| io::stdout().as_fd().try_clone_to_owned()).transpose()?;
        let (input, output) =
            (stdin.map(|fd| StdioEnd::from_shared(fd, false)), stdout.map(|fd| StdioEnd::from_shared(fd, true)));
        Ok(Self {
            input,
            output,
            crlf: crlf.then(CrlfEncoder::default),
            ignores_broken_pipe: false,
            has_unflushed: false,
        })
    }

    /// The ends of a program's pipes.
    pub(super) fn from_child(stdout: OwnedFd, stdin: OwnedFd, crlf: bool) -> io::Result<Self> {
        let (input, output) = (Some(StdioEnd::from_owned_pipe(stdout)?), Some(StdioEnd::from_owned_pipe(stdin)?));
        Ok(Self {
            input,
            output,
            crlf: crlf.then(CrlfEncoder::default),
            ignores_broken_pipe: true,
            has_unflushed: false,
        })
    }

    /// Whether it can ever give anything.
    pub(super) fn reads(&self) -> bool {
        self.input.is_some()
    }

    /// Waits until all is written that was taken. Only the thread that writes knows why writing failed.
    pub(super) async fn flush(&mut self) -> io::Result<()> {
        poll_fn(|cx| Pin::new(&mut *self).poll_flush(cx)).await
    }
}

/// A reset is told by the exit status.
impl Stream for StdioStream {
    fn abort(&self) {}

    /// So that the relay hears of a failure when it happens, and not at the next octet.
    fn has_unflushed(&self) -> bool {
        self.has_unflushed
    }

    fn poll_socket(&self, cx: &mut Context<'_>, interest: Interest, op: &mut SocketOp<'_>) -> SocketPoll {
        match interest {
            Interest::Read if self.crlf.is_none() => self.input.as_ref()?.poll_socket(cx, interest, op),
            Interest::Write if !self.ignores_broken_pipe => self.output.as_ref()?.poll_socket(cx, interest, op),
            Interest::Read | Interest::Write => None,
        }
    }
}

impl AsyncRead for StdioStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let Self { input, crlf, .. } = &mut *self;
        let Some(input) = input else { return Poll::Pending };
        match crlf {
            Some(crlf) => crlf.poll_read(input, cx, buf),
            None => input.poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for StdioStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let Some(output) = &mut self.output else { return Poll::Ready(Ok(buf.len())) };
        match ready!(output.poll_write(cx, buf)) {
            // Nothing but a reader that is gone keeps a program's pipe from being written.
            Err(_) if self.ignores_broken_pipe => {
                self.output = None;
                Poll::Ready(Ok(buf.len()))
            }
            written => {
                self.has_unflushed = true;
                Poll::Ready(written)
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(output) = &mut self.output {
            ready!(output.poll_flush(cx))?;
        }
        self.has_unflushed = false;
        Poll::Ready(Ok(()))
    }

    /// What was written is on its way; our copy of the descriptor is closed, which for a program is the end of its stdin.
    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.as_mut().poll_flush(cx))?;
        self.output = None;
        Poll::Ready(Ok(()))
    }
}

/// Makes LF into CR LF, but where it is that already.
#[derive(Default)]
struct CrlfEncoder {
    /// The octet that was read last.
    last: u8,
    /// What was read, and had no room yet as LF was behind it.
    pending: Vec<u8>,
}

impl CrlfEncoder {
    fn poll_read(&mut self, input: &mut StdioEnd, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        if self.pending.is_empty() {
            let n = ready!(input.poll_read(cx, buf))?;
            for byte in buf.iter().take(n) {
                if *byte == b'\n' && self.last != b'\r' {
                    self.pending.push(b'\r');
                }
                self.pending.push(*byte);
                self.last = *byte;
            }
        }
        let n = buf.len().min(self.pending.len());
        for (to, from) in buf.iter_mut().zip(self.pending.drain(..n)) {
            *to = from;
        }
        Poll::Ready(Ok(n))
    }
}
