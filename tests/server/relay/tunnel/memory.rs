//! `s5::relay` over streams in memory. It is polled only after a wake-up, so that a lost wake-up fails the test.

use std::cell::{RefCell, RefMut};
use std::collections::VecDeque;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Wake, Waker};

use futures_lite::future::BoxedLocal;
use futures_lite::{AsyncRead, AsyncWrite};
use s5::net::{ByteCounts, RelayError, RelayOptions, RelayResult, reactor, relay};

use super::{Peer, Received, Tunnel};
use crate::*;

/// State of one stream, shared by both of its ends.
#[derive(Default)]
pub struct Stream {
    capacity: usize,
    to_relay: VecDeque<u8>,
    to_relay_ended: bool,
    from_relay: VecDeque<u8>,
    from_relay_ended: bool,
    /// Bytes written by the relay.
    written: u64,
    aborts: usize,
    /// The relay has dropped its end.
    closed: bool,
    is_reset: bool,
    /// Writes fail, as after the peer has closed the connection.
    pub fails_writes: bool,
    /// Writes return 0.
    pub accepts_nothing: bool,
    /// Reads fail.
    pub fails_reads: bool,
    /// Reads fill the buffer and writes accept all bytes, without end.
    pub is_endless: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Stream {
    fn wake(&mut self) {
        [self.reader.take(), self.writer.take()].into_iter().flatten().for_each(Waker::wake);
    }

    fn read(&mut self, cx: &Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        if self.is_reset || self.fails_reads {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if self.is_endless {
            return Poll::Ready(Ok(buffer.len()));
        }
        if self.to_relay.is_empty() && !self.to_relay_ended {
            self.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let n = buffer.len().min(self.to_relay.len());
        buffer.iter_mut().zip(self.to_relay.drain(..n)).for_each(|(to, byte)| *to = byte);
        Poll::Ready(Ok(n))
    }

    fn write(&mut self, cx: &Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        assert!(!self.from_relay_ended, "the relay wrote after its half-close");
        assert!(!bytes.is_empty(), "the relay wrote 0 bytes");
        if self.is_reset || self.fails_writes {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if self.accepts_nothing || self.is_endless {
            return Poll::Ready(Ok(if self.accepts_nothing { 0 } else { bytes.len() }));
        }
        let n = bytes.len().min(self.capacity - self.from_relay.len());
        if n == 0 {
            self.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        self.from_relay.extend(&bytes[..n]);
        self.written += n as u64;
        Poll::Ready(Ok(n))
    }

    /// Pending until all bytes have been received, as on a stream with a buffer.
    fn close(&mut self, cx: &Context<'_>) -> Poll<io::Result<()>> {
        if self.is_reset {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        }
        self.from_relay_ended |= self.from_relay.is_empty();
        if !self.from_relay_ended {
            self.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }
}

/// The relay's end.
struct RelayEnd(Rc<RefCell<Stream>>);

impl Drop for RelayEnd {
    fn drop(&mut self) {
        self.0.borrow_mut().closed = true;
    }
}

impl s5::net::Stream for RelayEnd {
    fn abort(&self) {
        self.0.borrow_mut().aborts += 1;
    }
}

impl AsyncRead for RelayEnd {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().read(cx, buffer)
    }
}

impl AsyncWrite for RelayEnd {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.borrow_mut().close(cx)
    }
}

/// The test's end.
pub struct PeerEnd(Rc<RefCell<Stream>>);

impl PeerEnd {
    pub fn stream(&self) -> RefMut<'_, Stream> {
        self.0.borrow_mut()
    }

    pub fn aborts(&self) -> usize {
        self.0.borrow().aborts
    }
}

impl Peer for PeerEnd {
    fn send(&mut self, bytes: &[u8]) -> usize {
        let mut stream = self.stream();
        if stream.to_relay_ended || stream.is_reset || stream.closed {
            return 0;
        }
        let n = bytes.len().min(stream.capacity - stream.to_relay.len());
        stream.to_relay.extend(&bytes[..n]);
        stream.wake();
        n
    }

    fn receive(&mut self, max: usize) -> Received {
        let mut stream = self.stream();
        let n = max.min(stream.from_relay.len());
        if n > 0 {
            let bytes = stream.from_relay.drain(..n).collect();
            stream.wake();
            return Received::Bytes(bytes);
        }
        match *stream {
            Stream { from_relay_ended: true, .. } => Received::End,
            Stream { closed: true, aborts: 0, .. } => Received::End,
            Stream { closed: true, .. } => Received::Reset,
            _ => Received::WouldBlock,
        }
    }

    fn half_close(&mut self) {
        let mut stream = self.stream();
        stream.to_relay_ended = true;
        stream.wake();
    }

    fn reset(&mut self) {
        let mut stream = self.stream();
        stream.is_reset = true;
        stream.to_relay.clear();
        stream.from_relay.clear();
        stream.wake();
    }
}

/// Set if the relay has been woken since the last poll.
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

pub struct MemoryTunnel {
    relay: Option<BoxedLocal<RelayResult>>,
    is_woken: Arc<Flag>,
    counts: Rc<ByteCounts>,
    client: PeerEnd,
    dst: PeerEnd,
    outcome: Option<RelayResult>,
}

impl MemoryTunnel {
    /// Lets timers fire, and polls the relay once if it was woken. Returns true if it was.
    pub fn poll(&mut self) -> bool {
        reactor::run(reactor::yield_now()).expect("reactor created");
        let Some(relay) = self.relay.as_mut().filter(|_| self.is_woken.0.swap(false, Ordering::SeqCst)) else {
            return false;
        };
        let waker = self.is_woken.clone().into();
        if let Poll::Ready(result) = relay.as_mut().poll(&mut Context::from_waker(&waker)) {
            self.outcome = Some(result);
            self.relay = None;
        }
        true
    }
}

impl Tunnel for MemoryTunnel {
    type Peer = PeerEnd;

    fn open(capacity: usize, options: RelayOptions) -> Self {
        let stream = || Rc::new(RefCell::new(Stream { capacity, ..Stream::default() }));
        let (client, dst, counts) = (stream(), stream(), Rc::<ByteCounts>::default());
        let (mut client_end, mut dst_end) = (RelayEnd(client.clone()), RelayEnd(dst.clone()));
        let relay_counts = counts.clone();
        let relay = async move { relay(&mut client_end, &mut dst_end, &options, &relay_counts, |_, _| true).await };
        Self {
            relay: Some(Box::pin(relay)),
            is_woken: Arc::new(Flag(AtomicBool::new(true))),
            counts,
            client: PeerEnd(client),
            dst: PeerEnd(dst),
            outcome: None,
        }
    }

    fn run_until_idle(&mut self) {
        while self.poll() {}
    }

    fn client(&mut self) -> &mut PeerEnd {
        &mut self.client
    }

    fn dst(&mut self) -> &mut PeerEnd {
        &mut self.dst
    }

    fn byte_counts(&self) -> (u64, u64) {
        (self.counts.up.load(Ordering::Relaxed), self.counts.down.load(Ordering::Relaxed))
    }

    fn outcome(&mut self) -> Option<&RelayResult> {
        self.outcome.as_ref()
    }

    fn cancel(&mut self) {
        self.relay = None;
    }

    fn check_invariants(&mut self) {
        let aborts = match self.outcome {
            Some(Ok(_)) => (0, 0),
            Some(Err(RelayError::Undelivered(_))) => (0, 1),
            _ => (1, 1),
        };
        assert_eq!((self.client.aborts(), self.dst.aborts()), aborts, "after {:?}", self.outcome);
        let written = (self.dst.stream().written, self.client.stream().written);
        assert_eq!(self.byte_counts(), written, "counts differ from the bytes that the sinks accepted");
    }
}
