//! `s5::relay` over TCP on loopback, on a separate thread.

use std::thread::{self, JoinHandle};

use futures_lite::FutureExt as _;
use s5::conn::Conn;
use s5::net::{ByteCounts, Io, RelayOptions, RelayOutcome, RelayResult, reactor, relay};
use smol::channel::{Sender, unbounded};

use super::{Peer, Received, Tunnel};
use crate::*;

/// The test's end of a connection.
pub struct PeerEnd {
    /// `None` after a reset by the test.
    stream: Option<TcpStream>,
    /// Set after sending has failed with a reset. The kernel reports it once: later reads return end of stream.
    is_broken: bool,
}

impl Peer for PeerEnd {
    fn send(&mut self, bytes: &[u8]) -> usize {
        match self.stream.as_mut().map(|stream| stream.write(bytes)) {
            Some(Ok(n)) => n,
            Some(Err(error)) if error.kind() == ErrorKind::WouldBlock => 0,
            Some(Err(_)) | None => {
                self.is_broken = true;
                0
            }
        }
    }

    fn receive(&mut self, max: usize) -> Received {
        let mut buffer = vec![0; max];
        match self.stream.as_mut().map(|stream| stream.read(&mut buffer)) {
            Some(Ok(0)) if !self.is_broken => Received::End,
            Some(Ok(n)) if n > 0 => Received::Bytes(buffer[..n].into()),
            Some(Err(error)) if error.kind() == ErrorKind::WouldBlock => Received::WouldBlock,
            _ => Received::Reset,
        }
    }

    fn half_close(&mut self) {
        if let Some(stream) = &self.stream {
            // Fails if the relay has already reset the connection.
            let _ = stream.shutdown(Shutdown::Write);
        }
    }

    fn reset(&mut self) {
        if let Some(stream) = self.stream.take() {
            SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("option set");
        }
    }
}

pub struct SocketTunnel {
    client: PeerEnd,
    dst: PeerEnd,
    counts: Arc<ByteCounts>,
    cancel: Sender<()>,
    /// Returns `None` if cancelled.
    thread: Option<JoinHandle<Option<RelayResult>>>,
    outcome: Option<RelayResult>,
}

/// Detaches and attaches a connection, as the server does to move it to another thread.
fn reattach(conn: Conn) -> Conn {
    let detached = conn.detach().expect("a connection with a descriptor");
    conn.deregister();
    detached.attach().expect("registered with the event loop")
}

impl SocketTunnel {
    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.outcome = thread.join().expect("the thread does not panic");
        }
    }
}

/// Returns the test's end and the relay's end of a connection with small buffers. Smaller buffers would delay segments.
fn connection(capacity: usize) -> (PeerEnd, TcpStream) {
    let capacity = capacity.max(64 * 1024);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("free port");
    SockRef::from(&listener).set_recv_buffer_size(capacity).expect("option set");
    let test_end = TcpStream::connect(listener.local_addr().expect("local address")).expect("the listener accepts");
    let (relay_end, _) = listener.accept().expect("connection accepted");
    for stream in [&test_end, &relay_end] {
        SockRef::from(stream).set_send_buffer_size(capacity).expect("option set");
        stream.set_nodelay(true).expect("option set");
    }
    test_end.set_nonblocking(true).expect("option set");
    relay_end.set_nonblocking(true).expect("option set");
    (PeerEnd { stream: Some(test_end), is_broken: false }, relay_end)
}

impl Tunnel for SocketTunnel {
    type Peer = PeerEnd;

    fn open(capacity: usize, options: RelayOptions) -> Self {
        let (client, client_relay_end) = connection(capacity);
        let (dst, dst_relay_end) = connection(capacity);
        let counts = Arc::<ByteCounts>::default();
        let (cancel, cancelled) = unbounded();
        let relay_counts = counts.clone();
        let thread = thread::spawn(move || {
            let relay = async {
                let mut ends = [client_relay_end, dst_relay_end]
                    .map(|end| Conn::Tcp(Io::new(end.into()).expect("registered with the event loop")));
                loop {
                    let [client, dst] = &mut ends;
                    match relay(client, dst, &options, &relay_counts, |_, _| true).await {
                        Ok(RelayOutcome::Bulk) => ends = ends.map(reattach),
                        result => break Some(result),
                    }
                }
            };
            let cancelled = async {
                let _ = cancelled.recv().await;
                None
            };
            reactor::run(relay.or(cancelled)).expect("reactor created")
        });
        Self { client, dst, counts, cancel, thread: Some(thread), outcome: None }
    }

    fn run_until_idle(&mut self) {
        thread::sleep(Duration::from_micros(50));
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
        if self.thread.as_ref().is_some_and(JoinHandle::is_finished) {
            self.join();
        }
        self.outcome.as_ref()
    }

    fn cancel(&mut self) {
        self.cancel.try_send(()).expect("the relay runs");
        self.join();
    }
}

impl Drop for SocketTunnel {
    fn drop(&mut self) {
        self.cancel.close();
    }
}
