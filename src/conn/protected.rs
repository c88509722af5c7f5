//! A stream layer of RFC 1961: what goes through it is wrapped into data frames, and unwrapped out of them. Over any
//! connection, also one that is protected itself; under messages and relay, which know nothing of it.

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use futures_lite::{AsyncRead, AsyncWrite};

use super::Conn;
use crate::proto::{FRAME_HEADER_LEN, Frame, MAX_TOKEN_LEN, Message as _, ProtectionLevel};
use crate::reactor::wake_later;

/// How many octets one token of ours has at the most: larger ones are no faster.
const MAX_WRAP_LEN: usize = 16 * 1024;
/// How many octets are read at once, so that a token of that size comes in one piece.
const READ_LEN: usize = MAX_WRAP_LEN + 256;
/// How many tokens with nothing in them are skipped before others get their turn.
const MAX_EMPTY_TOKENS: usize = 64;

/// A security context that is established: what wraps and unwraps (RFC 2743 sections 2.3.3 and 2.3.4).
pub trait SecurityContext: fmt::Debug {
    /// A token with `data` in it; sealed, or only signed.
    ///
    /// # Errors
    /// In the library's words.
    fn wrap(&mut self, data: &[u8], encrypt: bool) -> Result<Vec<u8>, String>;

    /// What is in a token, which may be overwritten.
    ///
    /// # Errors
    /// In the library's words.
    fn unwrap(&mut self, token: &mut [u8]) -> Result<Unwrapped, String>;

    /// How many octets fit into a token of 65535.
    fn wrap_size_limit(&self, encrypt: bool) -> usize;
}

/// What was in a token.
#[derive(Debug)]
pub struct Unwrapped {
    /// The octets.
    pub data: Vec<u8>,
    /// Whether they were sealed, and not only signed.
    pub is_encrypted: bool,
    /// Where the token stands among the others.
    pub order: TokenOrder,
}

/// Where a token stands among those of its context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenOrder {
    /// It is the next one.
    Next,
    /// It is new, but some before it are missing, or it is late.
    OutOfOrder,
    /// It was here before, or is too old to tell.
    Duplicate,
}

/// A context and the level at which it is used; shared by a control connection and its datagrams.
#[derive(Clone, Debug)]
pub struct Protection {
    context: Rc<RefCell<dyn SecurityContext>>,
    encrypt: bool,
}

impl Protection {
    /// `None` at [`ProtectionLevel::None`], which protects nothing.
    pub fn new(context: impl SecurityContext + 'static, level: ProtectionLevel) -> Option<Self> {
        let encrypt = level == ProtectionLevel::Confidentiality;
        (level > ProtectionLevel::None).then(|| Self { context: Rc::new(RefCell::new(context)), encrypt })
    }

    /// The level at which it is used.
    pub fn level(&self) -> ProtectionLevel {
        if self.encrypt { ProtectionLevel::Confidentiality } else { ProtectionLevel::Integrity }
    }

    /// How many octets a datagram gets longer at the most.
    pub fn max_overhead(&self) -> usize {
        FRAME_HEADER_LEN + MAX_TOKEN_LEN.saturating_sub(self.context.borrow().wrap_size_limit(self.encrypt))
    }

    /// A data frame with these octets in it.
    ///
    /// # Errors
    /// They are too many, or the library says no.
    pub fn wrap(&self, data: &[u8]) -> io::Result<Vec<u8>> {
        let token = self.context.borrow_mut().wrap(data, self.encrypt).map_err(io::Error::other)?;
        if token.len() > MAX_TOKEN_LEN {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Frame::Data(token).encode())
    }

    /// What is in a datagram; `None` for what is no frame, was not protected so, or was here before.
    pub fn unwrap_datagram(&self, bytes: &mut [u8]) -> Option<Vec<u8>> {
        let unwrapped = self.unwrap(Frame::datagram_token(bytes)?).ok()?;
        (unwrapped.order != TokenOrder::Duplicate).then_some(unwrapped.data)
    }

    fn unwrap(&self, token: &mut [u8]) -> Result<Unwrapped, String> {
        let unwrapped = self.context.borrow_mut().unwrap(token)?;
        if self.encrypt && !unwrapped.is_encrypted {
            return Err("a token that is not sealed".into());
        }
        Ok(unwrapped)
    }
}

/// A protected stream. Holds what has come of a frame, what was unwrapped and not read yet, and what the connection has
/// not taken yet; nothing of that while it is idle.
#[derive(Debug)]
pub struct ProtectedStream {
    pub(super) conn: Conn,
    pub(super) protection: Protection,
    /// Frames, or the beginning of one.
    received: Vec<u8>,
    /// From the second on.
    unwrapped: (Vec<u8>, usize),
    /// From the second on.
    outgoing: (Vec<u8>, usize),
}

impl ProtectedStream {
    pub(super) fn new(conn: Conn, protection: Protection) -> Self {
        Self { conn, protection, received: Vec::new(), unwrapped: Default::default(), outgoing: Default::default() }
    }

    pub(super) fn has_unflushed(&self) -> bool {
        !self.outgoing.0.is_empty()
    }

    pub(super) fn has_unread(&self) -> bool {
        !self.received.is_empty() || !self.unwrapped.0.is_empty() || self.conn.has_unread()
    }

    /// What is left of what was unwrapped, as much as fits.
    fn take_unwrapped(&mut self, buf: &mut [u8]) -> usize {
        let (unwrapped, at) = &mut self.unwrapped;
        let rest = unwrapped.get(*at..).unwrap_or_default();
        let n = rest.len().min(buf.len());
        if let (Some(to), Some(from)) = (buf.get_mut(..n), rest.get(..n)) {
            to.copy_from_slice(from);
        }
        *at += n;
        if *at >= unwrapped.len() {
            self.unwrapped = Default::default();
        }
        n
    }

    /// Unwraps the first frame of what has come, if it is whole.
    fn unwrap_frame(&mut self) -> io::Result<bool> {
        let Some(frame_len) =
            Frame::data_frame_len(&self.received).map_err(|error| protection_error(error.to_string()))?
        else {
            return Ok(false);
        };
        let Some(frame) = self.received.get_mut(..frame_len) else { return Ok(false) };
        let token = Frame::datagram_token(frame).unwrap_or_default();
        let unwrapped = self.protection.unwrap(token).map_err(protection_error)?;
        if unwrapped.order != TokenOrder::Next {
            return Err(protection_error("a token that is out of order"));
        }
        self.received.drain(..frame_len);
        if self.received.is_empty() {
            self.received = Vec::new();
        }
        self.unwrapped = (unwrapped.data, 0);
        Ok(true)
    }

    /// Reads what there is, as far as it is of use.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let received_len = self.received.len();
        let frame_len = Frame::data_frame_len(&self.received).ok().flatten().unwrap_or_default();
        // Room for a long token only as it comes.
        let room = frame_len.saturating_sub(received_len).clamp(READ_LEN, READ_LEN.max(received_len));
        self.received.resize(received_len + room, 0);
        let read = Pin::new(&mut self.conn).poll_read(cx, self.received.get_mut(received_len..).unwrap_or_default());
        let n = if let Poll::Ready(Ok(n)) = &read { *n } else { 0 };
        self.received.truncate(received_len + n);
        if self.received.is_empty() {
            self.received = Vec::new();
        }
        read
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let (bytes, at) = &mut self.outgoing;
            let rest = bytes.get(*at..).unwrap_or_default();
            if rest.is_empty() {
                self.outgoing = Default::default();
                return Poll::Ready(Ok(()));
            }
            match ready!(Pin::new(&mut self.conn).poll_write(cx, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => *at += n,
            }
        }
    }
}

fn protection_error(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("protection: {}", reason.into()))
}

impl AsyncRead for ProtectedStream {
    /// The end is one only between two frames. Any fault ends the stream: what comes behind it can't be trusted.
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let mut empty_tokens = 0;
        loop {
            let n = this.take_unwrapped(buf);
            if n > 0 || buf.is_empty() {
                return Poll::Ready(Ok(n));
            }
            if this.unwrap_frame()? {
                empty_tokens += 1;
            } else if ready!(this.poll_receive(cx))? == 0 {
                let is_whole = this.received.is_empty();
                let cut_off = io::Error::new(io::ErrorKind::UnexpectedEof, "protection: closed inside of a token");
                return Poll::Ready(if is_whole { Ok(0) } else { Err(cut_off) });
            }
            if empty_tokens > MAX_EMPTY_TOKENS {
                wake_later(cx);
                return Poll::Pending;
            }
        }
    }
}

impl AsyncWrite for ProtectedStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        let chunk = buf.get(..MAX_WRAP_LEN).unwrap_or(buf);
        this.outgoing = (this.protection.wrap(chunk)?, 0);
        // What does not go now goes with the next write, the flush or the close.
        if let Poll::Ready(Err(error)) = this.poll_send(cx) {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(chunk.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.conn).poll_flush(cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.conn).poll_close(cx)
    }
}
