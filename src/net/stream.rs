//! The streams that can be relayed.

use std::io;
use std::os::fd::BorrowedFd;
use std::task::{Context, Poll};

use futures_lite::{AsyncRead, AsyncWrite};

use super::reactor::Interest;

/// An operation on a socket. Returns the number of bytes transferred, 0 at the end of the stream.
pub type SocketOp<'a> = dyn FnMut(BorrowedFd<'_>) -> io::Result<usize> + 'a;
/// Result of [`Stream::poll_socket`]. `None`: the stream is not a plain socket.
pub type SocketPoll = Option<Poll<io::Result<usize>>>;

/// A stream that can be relayed.
pub trait Stream: AsyncRead + AsyncWrite + Unpin {
    /// Makes the next close a reset, if the stream supports it, so that the peer notices missing data.
    fn abort(&self);

    /// Enables TCP keepalive, if the stream supports it. `peer_has_ended`: the peer has ended its stream, so that only
    /// probes can show that it is gone. They are then sent more often.
    fn keep_alive(&self, _peer_has_ended: bool) {}

    /// Makes the next close deliver all written data and then reset the stream, if the stream supports it.
    fn reset_after_delivery(&self) {}

    /// Returns whether written bytes are buffered, and need a flush.
    fn has_unflushed(&self) -> bool {
        false
    }

    /// Returns whether the peer has reset the stream. Reads nothing, because the data could not be stored.
    fn is_reset(&self) -> bool {
        false
    }

    /// Returns whether the peer has closed the stream, and not only its own direction. Call it only after the end of
    /// the peer's direction, and before that of the other one.
    fn is_closed(&self) -> bool {
        self.is_reset()
    }

    /// Calls `op` on the socket when it may be ready. `None` if the stream adds to or changes the bytes of the socket.
    fn poll_socket(&self, _: &mut Context<'_>, _: Interest, _: &mut SocketOp<'_>) -> SocketPoll {
        None
    }
}
