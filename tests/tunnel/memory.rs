//! `s5::relay` over streams in memory. It is polled when it was woken and only then, so a lost wake-up shows.

use std::cell::{RefCell, RefMut};
use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures_lite::future::BoxedLocal;
use futures_lite::{AsyncRead, AsyncWrite};
use s5::relay::{ByteCounts, RelayError, RelayOptions, RelayResult, relay};

use super::{Far, Received, Tunnel};

/// One stream, as both of its ends see it.
#[derive(Default)]
pub struct Stream {
    capacity: usize,
    inbox: VecDeque<u8>,
    inbox_ended: bool,
    outbox: VecDeque<u8>,
    outbox_ended: bool,
    /// How many octets the relay wrote.
    written: u64,
    aborts: usize,
    /// The relay has let go of it.
    closed: bool,
    is_reset: bool,
    /// Writing to it fails, as after the peer has closed what it reads from.
    pub is_deaf: bool,
    /// Writing to it moves nothing, and is no error.
    pub is_stuck: bool,
    /// Reading from it fails.
    pub is_unreadable: bool,
    /// There is always something to read, and it takes whatever is written to it.
    pub is_endless: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Stream {
    fn wake(&mut self) {
        [self.reader.take(), self.writer.take()].into_iter().flatten().for_each(Waker::wake);
    }

    fn read(&mut self, cx: &Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        if self.is_reset || self.is_unreadable {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if self.is_endless {
            return Poll::Ready(Ok(buffer.len()));
        }
        if self.inbox.is_empty() && !self.inbox_ended {
            self.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let n = buffer.len().min(self.inbox.len());
        buffer.iter_mut().zip(self.inbox.drain(..n)).for_each(|(to, octet)| *to = octet);
        Poll::Ready(Ok(n))
    }

    fn write(&mut self, cx: &Context<'_>, octets: &[u8]) -> Poll<io::Result<usize>> {
        assert!(!self.outbox_ended, "the relay wrote behind its own half-close");
        assert!(!octets.is_empty(), "the relay wrote nothing");
        if self.is_reset || self.is_deaf {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if self.is_stuck || self.is_endless {
            return Poll::Ready(Ok(if self.is_stuck { 0 } else { octets.len() }));
        }
        let n = octets.len().min(self.capacity - self.outbox.len());
        if n == 0 {
            self.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        self.outbox.extend(&octets[..n]);
        self.written += n as u64;
        Poll::Ready(Ok(n))
    }

    /// As on a stream that has a buffer of its own, done when that is empty.
    fn close(&mut self, cx: &Context<'_>) -> Poll<io::Result<()>> {
        if self.is_reset {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        }
        self.outbox_ended |= self.outbox.is_empty();
        if !self.outbox_ended {
            self.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }
}

/// The relay's end.
struct NearEnd(Rc<RefCell<Stream>>);

impl Drop for NearEnd {
    fn drop(&mut self) {
        self.0.borrow_mut().closed = true;
    }
}

impl s5::relay::Stream for NearEnd {
    fn abort(&self) {
        self.0.borrow_mut().aborts += 1;
    }
}

impl AsyncRead for NearEnd {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().read(cx, buffer)
    }
}

impl AsyncWrite for NearEnd {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, octets: &[u8]) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().write(cx, octets)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.borrow_mut().close(cx)
    }
}

/// The test's end.
pub struct FarEnd(Rc<RefCell<Stream>>);

impl FarEnd {
    pub fn stream(&self) -> RefMut<'_, Stream> {
        self.0.borrow_mut()
    }

    pub fn aborts(&self) -> usize {
        self.0.borrow().aborts
    }
}

impl Far for FarEnd {
    fn send(&mut self, octets: &[u8]) -> usize {
        let mut stream = self.stream();
        if stream.inbox_ended || stream.is_reset || stream.closed {
            return 0;
        }
        let n = octets.len().min(stream.capacity - stream.inbox.len());
        stream.inbox.extend(&octets[..n]);
        stream.wake();
        n
    }

    fn receive(&mut self, most: usize) -> Received {
        let mut stream = self.stream();
        let n = most.min(stream.outbox.len());
        if n > 0 {
            let octets = stream.outbox.drain(..n).collect();
            stream.wake();
            return Received::Octets(octets);
        }
        match *stream {
            Stream { outbox_ended: true, .. } => Received::End,
            Stream { closed: true, aborts: 0, .. } => Received::End,
            Stream { closed: true, .. } => Received::Reset,
            _ => Received::Nothing,
        }
    }

    fn half_close(&mut self) {
        let mut stream = self.stream();
        stream.inbox_ended = true;
        stream.wake();
    }

    fn reset(&mut self) {
        let mut stream = self.stream();
        stream.is_reset = true;
        stream.inbox.clear();
        stream.outbox.clear();
        stream.wake();
    }
}

/// Whether the relay has been woken since it was polled.
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

pub struct Memory {
    relay: Option<BoxedLocal<RelayResult>>,
    is_woken: Arc<Flag>,
    moved: Rc<ByteCounts>,
    client: FarEnd,
    dst: FarEnd,
    outcome: Option<RelayResult>,
}

impl Memory {
    /// Polls the relay once, if it was woken.
    pub fn poll(&mut self) -> bool {
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

impl Tunnel for Memory {
    type Far = FarEnd;

    fn open(capacity: usize, limits: RelayOptions) -> Self {
        let stream = || Rc::new(RefCell::new(Stream { capacity, ..Stream::default() }));
        let (client, dst, moved) = (stream(), stream(), Rc::<ByteCounts>::default());
        let (mut near, mut far, counted) = (NearEnd(client.clone()), NearEnd(dst.clone()), moved.clone());
        let relay = async move { relay(&mut near, &mut far, &limits, &counted, |_, _| true).await };
        Self {
            relay: Some(Box::pin(relay)),
            is_woken: Arc::new(Flag(AtomicBool::new(true))),
            moved,
            client: FarEnd(client),
            dst: FarEnd(dst),
            outcome: None,
        }
    }

    fn settle(&mut self) {
        while self.poll() {}
    }

    fn client(&mut self) -> &mut FarEnd {
        &mut self.client
    }

    fn dst(&mut self) -> &mut FarEnd {
        &mut self.dst
    }

    fn moved(&self) -> (u64, u64) {
        (self.moved.up.load(Ordering::Relaxed), self.moved.down.load(Ordering::Relaxed))
    }

    fn ended(&mut self) -> Option<&RelayResult> {
        self.outcome.as_ref()
    }

    fn cancel(&mut self) {
        self.relay = None;
    }

    fn check_end(&mut self) {
        let aborts = match self.outcome {
            Some(Ok(_)) => (0, 0),
            Some(Err(RelayError::Undelivered(_))) => (0, 1),
            _ => (1, 1),
        };
        assert_eq!((self.client.aborts(), self.dst.aborts()), aborts, "after {:?}", self.outcome);
        let written = (self.dst.stream().written, self.client.stream().written);
        assert_eq!(self.moved(), written, "the counts are what the sinks took");
    }
}
