//! The stream layer of RFC 1961: wraps data into frames, and unwraps them, over any connection, also a protected one.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Read as _};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use futures_lite::{AsyncRead, AsyncWrite};

use crate::net::wake_later;
use crate::proto::{FRAME_HEADER_LEN, Frame, MAX_TOKEN_LEN, Message as _, ProtectionLevel};

/// Most data that one token carries, in bytes. Larger tokens are not faster.
const MAX_WRAP_LEN: usize = 16 * 1024;
/// Size of a read, in bytes. A token with [`MAX_WRAP_LEN`] bytes of data fits.
const READ_LEN: usize = MAX_WRAP_LEN + 256;
/// Number of tokens without data that are skipped before other tasks run.
const MAX_EMPTY_TOKENS: usize = 64;

/// An established security context (RFC 2743 sections 2.3.3 and 2.3.4). Errors are the library's messages.
pub trait SecurityContext: fmt::Debug {
    /// Returns a token that contains `data`, encrypted or only integrity-protected.
    fn wrap(&mut self, data: &[u8], should_encrypt: bool) -> Result<Vec<u8>, String>;

    /// Returns the data in `token`. Can overwrite `token`.
    fn unwrap(&mut self, token: &mut [u8]) -> Result<Unwrapped, String>;

    /// Returns how much data fits into a token of [`MAX_TOKEN_LEN`] bytes, in bytes.
    fn wrap_size_limit(&self, should_encrypt: bool) -> usize;
}

/// The content of a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unwrapped {
    /// The data that was wrapped.
    pub data: Vec<u8>,
    /// Set when the data was encrypted, not only integrity-protected.
    pub is_encrypted: bool,
    /// Position relative to the other tokens of the context.
    pub order: TokenOrder,
}

/// Position of a token relative to the other tokens of its context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenOrder {
    /// The expected next token.
    Next,
    /// A new token that is late, or whose predecessors are missing.
    OutOfOrder,
    /// A token that was received before, or is too old to exclude that.
    Duplicate,
}

/// A security context and its protection level. A control connection and its datagrams share it.
#[derive(Clone, Debug)]
pub struct Protection {
    context: Rc<RefCell<dyn SecurityContext>>,
    should_encrypt: bool,
}

impl Protection {
    /// Returns `None` at [`ProtectionLevel::None`].
    pub fn new(context: impl SecurityContext + 'static, level: ProtectionLevel) -> Option<Self> {
        let should_encrypt = level == ProtectionLevel::Confidentiality;
        (level > ProtectionLevel::None).then(|| Self { context: Rc::new(RefCell::new(context)), should_encrypt })
    }

    /// Returns the protection level.
    pub fn level(&self) -> ProtectionLevel {
        if self.should_encrypt { ProtectionLevel::Confidentiality } else { ProtectionLevel::Integrity }
    }

    /// Returns the largest number of bytes that protection adds to a datagram.
    pub fn max_overhead(&self) -> usize {
        FRAME_HEADER_LEN + MAX_TOKEN_LEN.saturating_sub(self.context.borrow().wrap_size_limit(self.should_encrypt))
    }

    /// Returns a data frame that contains `data`. Fails if `data` is too long, or if the library reports an error.
    pub fn wrap(&self, data: &[u8]) -> io::Result<Vec<u8>> {
        let token = self.context.borrow_mut().wrap(data, self.should_encrypt).map_err(io::Error::other)?;
        let frame = Frame::Data(token);
        frame.check_len().map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        Ok(frame.encode())
    }

    /// Returns the data in a datagram; `None` if it is not a valid frame at this level, or is a duplicate.
    pub fn unwrap_datagram(&self, bytes: &mut [u8]) -> Option<Vec<u8>> {
        let unwrapped = self.unwrap(Frame::datagram_token(bytes)?).ok()?;
        (unwrapped.order != TokenOrder::Duplicate).then_some(unwrapped.data)
    }

    fn unwrap(&self, token: &mut [u8]) -> Result<Unwrapped, String> {
        let unwrapped = self.context.borrow_mut().unwrap(token)?;
        if self.should_encrypt && !unwrapped.is_encrypted {
            return Err("token is not encrypted".into());
        }
        Ok(unwrapped)
    }
}

/// A stream over `inner` with GSSAPI protection. Holds no buffers while it is idle.
#[derive(Debug)]
pub struct ProtectedStream<S> {
    pub(super) inner: S,
    pub(super) protection: Protection,
    /// Received frames that are not unwrapped yet; the last one can be incomplete.
    received: Vec<u8>,
    /// Data for the caller.
    unwrapped: VecDeque<u8>,
    /// Frames for the connection.
    outgoing: VecDeque<u8>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> ProtectedStream<S> {
    pub(super) fn new(inner: S, protection: Protection) -> Self {
        Self { inner, protection, received: Vec::new(), unwrapped: VecDeque::new(), outgoing: VecDeque::new() }
    }

    /// Ignores `inner`, like [`Self::has_unread`].
    pub(super) fn has_unflushed(&self) -> bool {
        !self.outgoing.is_empty()
    }

    pub(super) fn has_unread(&self) -> bool {
        !self.received.is_empty() || !self.unwrapped.is_empty()
    }

    fn take_unwrapped(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.unwrapped.read(buf)?;
        if self.unwrapped.is_empty() {
            self.unwrapped = VecDeque::new();
        }
        Ok(n)
    }

    /// Unwraps the first received frame. Returns `false` if it is incomplete.
    fn unwrap_frame(&mut self) -> io::Result<bool> {
        let frame_len = Frame::data_frame_len(&self.received).map_err(|error| protection_error(error.to_string()))?;
        let Some(frame) = frame_len.and_then(|len| self.received.get_mut(..len)) else { return Ok(false) };
        let frame_len = frame.len();
        let token = Frame::datagram_token(frame).unwrap_or_default();
        let unwrapped = self.protection.unwrap(token).map_err(protection_error)?;
        if unwrapped.order != TokenOrder::Next {
            return Err(protection_error("token out of order"));
        }
        self.received.drain(..frame_len);
        if self.received.is_empty() {
            self.received = Vec::new();
        }
        self.unwrapped = unwrapped.data.into();
        Ok(true)
    }

    /// Reads from the connection into `received`.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let received_len = self.received.len();
        let frame_len = Frame::data_frame_len(&self.received).ok().flatten().unwrap_or_default();
        // The buffer grows only as data arrives: a length field alone must not allocate 64 KiB.
        let room = frame_len.saturating_sub(received_len).clamp(READ_LEN, READ_LEN.max(received_len));
        self.received.resize(received_len + room, 0);
        let read = Pin::new(&mut self.inner).poll_read(cx, self.received.get_mut(received_len..).unwrap_or_default());
        let n = if let Poll::Ready(Ok(n)) = &read { *n } else { 0 };
        self.received.truncate(received_len + n);
        if self.received.is_empty() {
            self.received = Vec::new();
        }
        read
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.outgoing.is_empty() {
            match ready!(Pin::new(&mut self.inner).poll_write(cx, self.outgoing.as_slices().0))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => drop(self.outgoing.drain(..n)),
            }
        }
        self.outgoing = VecDeque::new();
        Poll::Ready(Ok(()))
    }
}

fn protection_error(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("protection: {}", reason.into()))
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for ProtectedStream<S> {
    /// The end of the stream within a frame is an error. After an error, further data can't be trusted.
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let mut empty_tokens = 0;
        loop {
            let n = this.take_unwrapped(buf)?;
            if n > 0 || buf.is_empty() {
                return Poll::Ready(Ok(n));
            }
            if this.unwrap_frame()? {
                empty_tokens += 1;
            } else if ready!(this.poll_receive(cx))? == 0 {
                let is_complete = this.received.is_empty();
                let truncated =
                    io::Error::new(io::ErrorKind::UnexpectedEof, "protection: connection closed within a token");
                return Poll::Ready(if is_complete { Ok(0) } else { Err(truncated) });
            }
            if empty_tokens > MAX_EMPTY_TOKENS {
                wake_later(cx);
                return Poll::Pending;
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for ProtectedStream<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        let chunk = buf.get(..MAX_WRAP_LEN).unwrap_or(buf);
        this.outgoing = this.protection.wrap(chunk)?.into();
        // The next write, flush or close sends the bytes that the connection does not accept now.
        if let Poll::Ready(Err(error)) = this.poll_send(cx) {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(chunk.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.inner).poll_flush(cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.inner).poll_close(cx)
    }
}
