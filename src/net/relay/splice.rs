//! A pipe between two sockets: the kernel moves the bytes without copying them to user space (splice(2)).

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, splice};
use rustix::process::{Resource, getrlimit};

use crate::counters::{Counter, OpenGuard};

/// Pipe sizes to try, in bytes. The kernel limits the sum of a user's pipes (pipe-user-pages-soft in pipe(7)).
const PIPE_SIZES: [usize; 2] = [1 << 20, 1 << 18];

pub(super) struct Pipe {
    reader: OwnedFd,
    writer: OwnedFd,
    capacity: usize,
    len: usize,
    /// Bytes relayed by the direction until the last call of `has_progressed`.
    last_count: u64,
    _guard: OpenGuard,
}

/// Returns whether the error means that the kernel cannot splice this socket. The stream itself is intact.
pub(super) fn is_unsupported(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(errno, Some(Errno::INVAL | Errno::NOSYS | Errno::PERM))
}

/// Returns whether a socket has unread data; false for a pipe. Use errors: the kernel reports each only once.
fn has_data(socket: BorrowedFd<'_>) -> io::Result<bool> {
    match recv(socket, &mut [0; 1], RecvFlags::PEEK) {
        Ok((_, n)) => Ok(n > 0),
        Err(Errno::AGAIN | Errno::INTR | Errno::NOTSOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

impl Pipe {
    /// # Errors
    /// Errors from pipe(2). EMFILE if half of all descriptors are in use: the others are for sessions. ENOMEM if the
    /// pipe would hold less than `min_capacity` bytes: copying is faster then.
    pub(super) fn open(min_capacity: usize) -> io::Result<Self> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        // The kernel assigns the lowest free descriptor number, so a high number means that many are in use.
        if u64::try_from(writer.as_raw_fd()).is_ok_and(|fd| fd >= limit / 2) {
            return Err(Errno::MFILE.into());
        }
        let granted = PIPE_SIZES.iter().find(|size| fcntl_setpipe_size(&writer, **size).is_ok());
        let capacity = granted.copied().map_or_else(|| fcntl_getpipe_size(&writer), Ok)?;
        if capacity < min_capacity {
            return Err(Errno::NOMEM.into());
        }
        Ok(Self { reader, writer, capacity, len: 0, last_count: 0, _guard: OpenGuard::new(Counter::OpenPipes) })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns whether `count`, the bytes relayed so far, has changed since the last call.
    pub(super) fn has_progressed(&mut self, count: u64) -> bool {
        std::mem::replace(&mut self.last_count, count) != count
    }

    /// Splices from the socket into the empty pipe. Returns 0 at the end of the stream.
    pub(super) fn fill_from(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        let splice = || splice(socket, None, &self.writer, None, self.capacity, flags);
        let n = match splice() {
            // The kernel does not splice urgent data: splice(2) fails with EAGAIN or returns 0.
            Ok(0) | Err(Errno::AGAIN) if has_data(socket)? => match splice() {
                Ok(0) | Err(Errno::AGAIN) => return Err(Errno::INVAL.into()),
                // The data arrived between the two calls.
                result => result?,
            },
            result => result?,
        };
        self.len += n;
        Ok(n)
    }

    pub(super) fn drain_to(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let n = splice(&self.reader, None, socket, None, self.len, SpliceFlags::MOVE | SpliceFlags::NONBLOCK)?;
        self.len -= n.min(self.len);
        Ok(n)
    }

    pub(super) fn take_all(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; self.len];
        let mut unfilled = bytes.as_mut_slice();
        while !unfilled.is_empty() {
            let n = rustix::io::read(&self.reader, &mut *unfilled)?;
            unfilled = unfilled.get_mut(n..).filter(|_| n > 0).ok_or(io::ErrorKind::UnexpectedEof)?;
        }
        self.len = 0;
        Ok(bytes)
    }
}
