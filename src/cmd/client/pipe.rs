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
use crate::reactor::{Io, Way};
use crate::relay::{BareOp, Stream};

/// The buffer between a blocking descriptor and the relay, in octets.
const BUFFER: usize = 64 * 1024;
/// The major number of /dev/null, /dev/zero and /dev/full (Linux, devices.txt).
const MEMORY: u32 = 1;

/// A descriptor that is read or written.
enum End {
    /// A pipe, which this thread waits for like for a socket.
    Pipe(Io<File>),
    /// A file, or /dev/null and its like: no waiting at all.
    File(File),
    /// Anything else, on a thread of its own: O_NONBLOCK would hit whoever shares it with us.
    Other(Unblock<Patient>),
}

/// A descriptor that somebody else may have made non-blocking: it is waited for all the same.
pub(in crate::cmd) struct Patient(pub(in crate::cmd) File);

impl Patient {
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

impl io::Read for Patient {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.wait(PollFlags::IN, |mut file| file.read(buf))
    }
}

impl io::Write for Patient {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.wait(PollFlags::OUT, |mut file| file.write(buf))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl End {
    /// Of a descriptor that others may have too. A pipe can be opened once more, and has flags of its own then (Linux).
    fn shared(fd: OwnedFd, writes: bool) -> Self {
        let file = File::from(fd);
        let Ok(found) = file.metadata() else { return Self::other(file) };
        let kind = found.file_type();
        if kind.is_file() || kind.is_char_device() && rustix::fs::major(found.rdev()) == MEMORY {
            return Self::File(file);
        }
        let again = || {
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            descriptor::open_pipe(Path::new(&path), writes).and_then(Io::new)
        };
        match kind.is_fifo().then(again) {
            Some(Ok(pipe)) => Self::Pipe(pipe),
            _ => Self::other(file),
        }
    }

    fn other(file: File) -> Self {
        Self::Other(Unblock::with_capacity(BUFFER, Patient(file)))
    }

    /// Of a pipe that nobody else has.
    fn own(pipe: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&pipe, true)?;
        Io::new(File::from(pipe)).map(Self::Pipe)
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        match self {
            Self::Pipe(pipe) => pipe.poll_with(cx, Way::Read, |mut file| file.read(buf)),
            Self::File(file) => Poll::Ready(file.read(buf)),
            Self::Other(file) => Pin::new(file).poll_read(cx, buf),
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self {
            Self::Pipe(pipe) => pipe.poll_with(cx, Way::Write, |mut file| file.write(buf)),
            Self::File(file) => Poll::Ready(file.write(buf)),
            Self::Other(file) => Pin::new(file).poll_write(cx, buf),
        }
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Pipe(_) | Self::File(_) => Poll::Ready(Ok(())),
            Self::Other(file) => Pin::new(file).poll_flush(cx),
        }
    }

    fn poll_bare(&self, cx: &mut Context<'_>, way: Way, op: &mut BareOp<'_>) -> Option<Poll<io::Result<usize>>> {
        match self {
            Self::Pipe(pipe) => Some(pipe.poll_with(cx, way, |file| op(file.as_fd()))),
            Self::File(file) => Some(Poll::Ready(op(file.as_fd()))),
            Self::Other(_) => None,
        }
    }
}

/// What is read goes up, what comes down is written.
pub(super) struct Pipe {
    /// Without it nothing is read, and no end comes either.
    source: Option<End>,
    /// Without it, what comes is thrown away.
    sink: Option<End>,
    crlf: Option<Crlf>,
    /// Whether a reader that is gone has had enough, and is no failure.
    may_hang_up: bool,
    /// Whether something was taken of which it is not known yet that it is written.
    unsent: bool,
}

impl Pipe {
    /// stdin and stdout, each where it is wanted.
    pub(super) fn standard(reads: bool, writes: bool, crlf: bool) -> io::Result<Self> {
        let stdin = reads.then(|| io::stdin().as_fd().try_clone_to_owned()).transpose()?;
        let stdout = writes.then(|| io::stdout().as_fd().try_clone_to_owned()).transpose()?;
        let (source, sink) = (stdin.map(|fd| End::shared(fd, false)), stdout.map(|fd| End::shared(fd, true)));
        Ok(Self { source, sink, crlf: crlf.then(Crlf::default), may_hang_up: false, unsent: false })
    }

    /// The ends of a program's pipes.
    pub(super) fn from_child(stdout: OwnedFd, stdin: OwnedFd, crlf: bool) -> io::Result<Self> {
        let (source, sink) = (Some(End::own(stdout)?), Some(End::own(stdin)?));
        Ok(Self { source, sink, crlf: crlf.then(Crlf::default), may_hang_up: true, unsent: false })
    }

    /// Whether it can ever give anything.
    pub(super) fn reads(&self) -> bool {
        self.source.is_some()
    }

    /// Waits until all is written that was taken. Only the thread that writes knows why writing failed.
    pub(super) async fn flush(&mut self) -> io::Result<()> {
        poll_fn(|cx| Pin::new(&mut *self).poll_flush(cx)).await
    }
}

/// A reset is told by the exit status.
impl Stream for Pipe {
    fn abort(&self) {}

    /// So that the relay hears of a failure when it happens, and not at the next octet.
    fn has_unsent(&self) -> bool {
        self.unsent
    }

    fn poll_bare(&self, cx: &mut Context<'_>, way: Way, op: &mut BareOp<'_>) -> Option<Poll<io::Result<usize>>> {
        match way {
            Way::Read if self.crlf.is_none() => self.source.as_ref()?.poll_bare(cx, way, op),
            Way::Write if !self.may_hang_up => self.sink.as_ref()?.poll_bare(cx, way, op),
            Way::Read | Way::Write => None,
        }
    }
}

impl AsyncRead for Pipe {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let Self { source, crlf, .. } = &mut *self;
        let Some(source) = source else { return Poll::Pending };
        match crlf {
            Some(crlf) => crlf.poll_read(source, cx, buf),
            None => source.poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let Some(sink) = &mut self.sink else { return Poll::Ready(Ok(buf.len())) };
        match ready!(sink.poll_write(cx, buf)) {
            // Nothing but a reader that is gone keeps a program's pipe from being written.
            Err(_) if self.may_hang_up => {
                self.sink = None;
                Poll::Ready(Ok(buf.len()))
            }
            written => {
                self.unsent = true;
                Poll::Ready(written)
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(sink) = &mut self.sink {
            ready!(sink.poll_flush(cx))?;
        }
        self.unsent = false;
        Poll::Ready(Ok(()))
    }

    /// What was written is on its way; our copy of the descriptor is closed, which for a program is the end of its stdin.
    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.as_mut().poll_flush(cx))?;
        self.sink = None;
        Poll::Ready(Ok(()))
    }
}

/// Makes LF into CR LF, but where it is that already.
#[derive(Default)]
struct Crlf {
    /// The octet that was read last.
    last: u8,
    /// What was read, and had no room yet as LF was behind it.
    rest: Vec<u8>,
}

impl Crlf {
    fn poll_read(&mut self, source: &mut End, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        if self.rest.is_empty() {
            let n = ready!(source.poll_read(cx, buf))?;
            for octet in buf.iter().take(n) {
                if *octet == b'\n' && self.last != b'\r' {
                    self.rest.push(b'\r');
                }
                self.rest.push(*octet);
                self.last = *octet;
            }
        }
        let n = buf.len().min(self.rest.len());
        for (to, from) in buf.iter_mut().zip(self.rest.drain(..n)) {
            *to = from;
        }
        Poll::Ready(Ok(n))
    }
}
