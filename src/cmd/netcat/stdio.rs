//! stdin and stdout, or those of a child process, as one stream for the relay.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::future::poll_fn;
use std::io::{self, BufRead as _, Cursor, Read as _, Write as _};
use std::mem::take;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures_lite::future::Boxed;
use futures_lite::{AsyncRead, AsyncWrite};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::OFlags;

use super::descriptor;
use crate::net::{Interest, Io, RELAY_BUFFER_SIZE, SocketOp, SocketPoll, Stream, ThreadPool};
use crate::proto::MAX_UDP6_PAYLOAD;

/// Major number of /dev/null, /dev/zero and /dev/full (Linux, devices.txt).
const MEMORY_DEVICES_MAJOR: u32 = 1;

enum StdioEnd {
    /// A pipe. The event loop waits for it, as for a socket.
    Pipe(Io<File>),
    /// A regular file, or a device such as /dev/null: always ready.
    File(File),
    /// Any other file, on its own thread: O_NONBLOCK would affect other processes that share the descriptor.
    Blocking(BlockingFile),
}

/// Two pools: a write must not wait behind a read if only one thread can be started.
static STDIN_THREAD: ThreadPool<()> = ThreadPool::new("s5-stdin", 1, false);
static STDOUT_THREAD: ThreadPool<()> = ThreadPool::new("s5-stdout", 1, false);

/// A descriptor whose reads and writes block on a thread, even if another process has set O_NONBLOCK.
pub(crate) struct BlockingFile {
    file: Arc<File>,
    /// The current read or write. Returns the data that was read; `None` if no thread can be started.
    call: Option<Boxed<Option<io::Result<Vec<u8>>>>>,
    unread: Cursor<Vec<u8>>,
    /// Set after a read of 0 bytes: the next read of a terminal would wait again.
    has_ended: bool,
}

impl BlockingFile {
    pub(crate) fn new(file: impl Into<File>) -> Self {
        Self { file: Arc::new(file.into()), call: None, unread: Cursor::default(), has_ended: false }
    }

    fn poll_call(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Vec<u8>>> {
        let Some(call) = &mut self.call else { return Poll::Ready(Ok(Vec::new())) };
        let result = ready!(call.as_mut().poll(cx));
        self.call = None;
        let error = "no thread can be started (raise the limit of processes, ulimit -u)";
        Poll::Ready(result.unwrap_or_else(|| Err(io::Error::other(error))))
    }
}

/// Repeats `op` while it returns `WouldBlock`.
fn retry_when_ready<T>(file: &File, flags: PollFlags, mut op: impl FnMut(&File) -> io::Result<T>) -> io::Result<T> {
    let mut result = op(file);
    while result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
        rustix::event::poll(&mut [PollFd::new(file, flags)], None)?;
        result = op(file);
    }
    result
}

impl AsyncRead for BlockingFile {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        if self.unread.fill_buf()?.is_empty() && !self.has_ended {
            if self.call.is_none() {
                let (file, mut data) = (self.file.clone(), take(&mut self.unread).into_inner());
                data.resize(MAX_UDP6_PAYLOAD, 0);
                self.call = Some(Box::pin(STDIN_THREAD.run(move |()| {
                    let n = retry_when_ready(&file, PollFlags::IN, |mut file| file.read(&mut data))?;
                    data.truncate(n);
                    Ok(data)
                })));
            }
            self.unread = Cursor::new(ready!(self.poll_call(cx))?);
            self.has_ended = self.unread.get_ref().is_empty();
        }
        Poll::Ready(self.unread.read(buf))
    }
}

/// The next write or flush returns the error of a write.
impl AsyncWrite for BlockingFile {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.as_mut().poll_flush(cx))?;
        let buf = buf.get(..RELAY_BUFFER_SIZE).unwrap_or(buf);
        let (file, mut data) = (self.file.clone(), buf.to_vec());
        self.call = Some(Box::pin(STDOUT_THREAD.run(move |()| {
            while !data.is_empty() {
                match retry_when_ready(&file, PollFlags::OUT, |mut file| file.write(&data))? {
                    0 => return Err(io::ErrorKind::WriteZero.into()),
                    n => drop(data.drain(..n)),
                }
            }
            Ok(data)
        })));
        let started = self.poll_call(cx).map_ok(|_| buf.len());
        if started.is_pending() { Poll::Ready(Ok(buf.len())) } else { started }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_call(cx).map_ok(drop)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flush(cx)
    }
}

impl StdioEnd {
    /// Wraps a descriptor that other processes may share. On Linux, a pipe is reopened, to not share O_NONBLOCK.
    fn from_shared(fd: OwnedFd, writes: bool) -> Self {
        let file = File::from(fd);
        let Ok(metadata) = file.metadata() else { return Self::Blocking(BlockingFile::new(file)) };
        let kind = metadata.file_type();
        if kind.is_file() || kind.is_char_device() && rustix::fs::major(metadata.rdev()) == MEMORY_DEVICES_MAJOR {
            return Self::File(file);
        }
        let reopen = || {
            let mut options = OpenOptions::new();
            options
                .read(!writes)
                .write(writes)
                .custom_flags(i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default());
            options.open(format!("/proc/self/fd/{}", file.as_raw_fd())).and_then(Io::new)
        };
        match kind.is_fifo().then(reopen) {
            Some(Ok(pipe)) => Self::Pipe(pipe),
            _ => Self::Blocking(BlockingFile::new(file)),
        }
    }

    /// Wraps a pipe that no other process shares.
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

#[derive(Default)]
pub(super) struct StdioStream {
    /// `None`: reads never complete.
    input: Option<StdioEnd>,
    /// `None`: written data is discarded.
    output: Option<StdioEnd>,
    crlf: Option<CrlfEncoder>,
    /// Whether data is discarded, instead of failing, after the reader has closed the pipe.
    ignores_broken_pipe: bool,
    /// Whether data has been accepted since the last flush.
    has_unflushed: bool,
    is_stdout: bool,
}

impl StdioStream {
    /// Returns stdin, if `reads` is set, and stdout, if `writes` is set, as a stream.
    pub(super) fn from_stdio(reads: bool, writes: bool, crlf: bool) -> io::Result<Self> {
        let stdin = reads.then(|| io::stdin().as_fd().try_clone_to_owned()).transpose()?;
        let stdout = writes.then(|| io::stdout().as_fd().try_clone_to_owned()).transpose()?;
        let input = stdin.map(|fd| StdioEnd::from_shared(fd, false));
        let output = stdout.map(|fd| StdioEnd::from_shared(fd, true));
        Ok(Self { input, output, crlf: crlf.then(CrlfEncoder::default), is_stdout: writes, ..Self::default() })
    }

    /// Returns the pipes of a child process as a stream.
    pub(super) fn from_child(stdout: OwnedFd, stdin: OwnedFd, crlf: bool) -> io::Result<Self> {
        let (input, output) =
            (StdioEnd::from_owned_pipe(stdout).map(Some)?, StdioEnd::from_owned_pipe(stdin).map(Some)?);
        Ok(Self { input, output, crlf: crlf.then(CrlfEncoder::default), ignores_broken_pipe: true, ..Self::default() })
    }

    /// Waits until all accepted data is written. An error of the writing thread is reported only here.
    pub(super) async fn flush(&mut self) -> io::Result<()> {
        poll_fn(|cx| Pin::new(&mut *self).poll_flush(cx)).await
    }
}

/// Aborting does nothing: the exit status reports a reset.
impl Stream for StdioStream {
    fn abort(&self) {}

    /// If true, the relay flushes. Otherwise a write error would be reported late, at the next write.
    fn has_unflushed(&self) -> bool {
        self.has_unflushed
    }

    fn poll_socket(&self, cx: &mut Context<'_>, interest: Interest, op: &mut SocketOp<'_>) -> SocketPoll {
        match interest {
            Interest::Read if self.crlf.is_none() => self.input.as_ref()?.poll_socket(cx, interest, op),
            Interest::Write if !self.ignores_broken_pipe => self.output.as_ref()?.poll_socket(cx, interest, op),
            _ => None,
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
            // A write to a program fails only after the program has closed its stdin.
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

    /// Flushes and closes the output. Its reader, which may wait for the end before it closes stdin, then sees the end.
    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.as_mut().poll_flush(cx))?;
        self.output = None;
        Poll::Ready(if self.is_stdout { descriptor::close_stdout() } else { Ok(()) })
    }
}

/// Converts LF to CR LF, and leaves CR LF unchanged.
#[derive(Default)]
struct CrlfEncoder {
    last: u8,
    /// Converted bytes that did not fit into the reader's buffer.
    pending: VecDeque<u8>,
}

impl CrlfEncoder {
    fn poll_read(&mut self, input: &mut StdioEnd, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        if self.pending.is_empty() {
            let n = ready!(input.poll_read(cx, buf))?;
            for byte in buf.iter().take(n) {
                if *byte == b'\n' && self.last != b'\r' {
                    self.pending.push_back(b'\r');
                }
                self.pending.push_back(*byte);
                self.last = *byte;
            }
        }
        Poll::Ready(self.pending.read(buf))
    }
}
