//! UDP sockets that receive with recvmmsg(2) and GRO, and send with GSO, as far as the kernel has them.
//!
//! The content of datagrams is not interpreted. A batch that the kernel refuses is sent as single datagrams, with the
//! same result at the receiver.

mod batch;
mod offload;

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::net::{SocketAddr, UdpSocket};
use std::task::{Context, Poll};

use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg, sendmsg_addr};
use socket2::{Domain, Socket, Type};

use super::reactor::{Interest, wake_later};
use super::socket::Io;
pub use batch::DATAGRAM_BUFFER_SIZE;
pub(crate) use batch::{GsoBatch, RecvBatch};
use batch::{MAX_MESSAGES, RecvMessage};
use offload::GsoLimit;

/// SO_RCVBUF and SO_SNDBUF in bytes, for bursts. The kernel may grant less.
const SOCKET_BUFFER_SIZE: usize = 1 << 20;
/// Longest payload in bytes that is copied after its header. Longer ones are gathered by the kernel.
const MAX_COPIED_PAYLOAD: usize = 2048;

/// A datagram socket, registered with the reactor of its thread.
pub(crate) struct BatchSocket {
    io: Io<UdpSocket>,
    gso_limit: Cell<GsoLimit>,
    /// Number of receive calls in a row, modulo 256, that returned a single message.
    single_streak: Cell<u8>,
    /// Set when a call has returned several messages: a socket with little traffic needs no GRO.
    is_gro_enabled: Cell<bool>,
}

impl BatchSocket {
    /// Registers a non-blocking socket.
    ///
    /// # Errors
    /// Those of epoll_ctl(2), and of socket(2) on the first call.
    fn new(socket: UdpSocket) -> io::Result<Self> {
        let gso_limit = if offload::can_segment()? { GsoLimit::Unlimited } else { GsoLimit::Unsupported };
        Ok(Self {
            io: Io::read_only(socket)?,
            gso_limit: gso_limit.into(),
            single_streak: Cell::default(),
            is_gro_enabled: Cell::default(),
        })
    }

    /// Binds a socket with large buffers. An IPv6 socket has no IPv4 traffic.
    ///
    /// # Errors
    /// Those of bind(2) and [`BatchSocket::new`].
    pub(crate) fn bind(local: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(local), Type::DGRAM, None)?;
        if local.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.bind(&local.into())?;
        let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_SIZE);
        let _ = socket.set_send_buffer_size(SOCKET_BUFFER_SIZE);
        socket.set_nonblocking(true)?;
        Self::new(socket.into())
    }

    pub(crate) fn get_ref(&self) -> &UdpSocket {
        self.io.get_ref()
    }

    /// Receives up to `max` messages. Returns false if there are none. Errors are skipped: they are ICMP messages about
    /// earlier datagrams.
    pub(crate) fn poll_receive(&self, cx: &mut Context<'_>, batch: &mut RecvBatch, max: usize) -> bool {
        for _ in 0..max {
            match self.io.poll_with(cx, Interest::Read, |socket| self.receive(socket, batch, max)) {
                Poll::Ready(Ok(is_drained)) => {
                    if is_drained {
                        self.io.mark_not_ready(Interest::Read);
                    }
                    return true;
                }
                Poll::Ready(Err(_)) => {}
                Poll::Pending => return false,
            }
        }
        wake_later(cx);
        false
    }

    /// Receives up to `max` messages. Returns true if the socket is empty, so that epoll reports the next message.
    fn receive(&self, socket: &UdpSocket, batch: &mut RecvBatch, max: usize) -> io::Result<bool> {
        batch.messages.clear();
        if !self.should_receive_one() {
            offload::receive(socket, batch, max)?;
            if batch.messages.len() > 1 && !self.is_gro_enabled.replace(true) {
                offload::enable_gro(socket);
            }
        } else if self.is_gro_enabled.get() {
            offload::receive_one(socket, batch)?;
        } else {
            let (len, from) = socket.recv_from(batch.buffers.get_mut(..DATAGRAM_BUFFER_SIZE).unwrap_or_default())?;
            batch.messages.push(RecvMessage { from, len, segment_len: len });
        }
        self.single_streak.set(if batch.messages.len() == 1 { self.single_streak.get().wrapping_add(1) } else { 0 });
        Ok(batch.messages.len() < max.min(MAX_MESSAGES))
    }

    /// Returns true after four calls with a single message, except for every 16th call. Receiving one message costs
    /// less than finding out that there is no second one.
    fn should_receive_one(&self) -> bool {
        self.single_streak.get() >= 4 && !self.single_streak.get().is_multiple_of(16)
    }

    /// Sends and clears the batch, to the peer of a connected socket if `to` is `None`. Each datagram is sent once or
    /// dropped. Returns the number of payload bytes sent.
    pub(crate) fn send_batch(&self, to: Option<SocketAddr>, batch: &mut GsoBatch<'_>) -> usize {
        let total = batch.len - batch.count * batch.header.len();
        let sent = if batch.count > 1 && self.send_gso(to, batch) { total } else { self.send_individually(to, batch) };
        batch.clear();
        sent
    }

    /// Sends the batch with one call. Returns false if nothing was sent.
    fn send_gso(&self, to: Option<SocketAddr>, batch: &GsoBatch<'_>) -> bool {
        match self.gso_limit.get() {
            GsoLimit::Unsupported => return false,
            GsoLimit::Below(peer, len) if peer == to && batch.segment_len() >= len => return false,
            _ => {}
        }
        match retry_if_connected(to, || offload::send(self.get_ref(), to, batch)) {
            Ok(()) => return true,
            Err(error) => {
                self.gso_limit.set(offload::limit_after(error, to, batch.segment_len()).unwrap_or(self.gso_limit.get()))
            }
        }
        false
    }

    fn send_individually(&self, to: Option<SocketAddr>, batch: &mut GsoBatch<'_>) -> usize {
        let payloads = batch.payloads.get(..batch.count).unwrap_or_default();
        let sent = payloads.iter().filter(|payload| self.send_parts(to, batch.header, payload).is_ok());
        sent.map(|payload| payload.len()).sum()
    }

    /// Sends one datagram. A short payload is copied after `header` and removed again, which costs less than gathering.
    ///
    /// # Errors
    /// Those of sendmsg(2).
    fn send_parts(&self, to: Option<SocketAddr>, header: &mut Vec<u8>, payload: &[u8]) -> io::Result<()> {
        if header.is_empty() {
            return self.send_bytes(to, payload);
        }
        if payload.len() > MAX_COPIED_PAYLOAD {
            let parts = [IoSlice::new(header), IoSlice::new(payload)];
            let control = &mut SendAncillaryBuffer::default();
            retry_if_connected(to, || match &to {
                Some(to) => sendmsg_addr(self.get_ref(), to, &parts, control, SendFlags::NOSIGNAL),
                None => sendmsg(self.get_ref(), &parts, control, SendFlags::NOSIGNAL),
            })?;
            return Ok(());
        }
        let header_len = header.len();
        header.extend_from_slice(payload);
        let result = self.send_bytes(to, header);
        header.truncate(header_len);
        result
    }

    /// Sends one datagram.
    ///
    /// # Errors
    /// Those of sendto(2).
    pub(crate) fn send_bytes(&self, to: Option<SocketAddr>, bytes: &[u8]) -> io::Result<()> {
        retry_if_connected(to, || match &to {
            Some(to) => self.get_ref().send_to(bytes, to),
            None => self.get_ref().send(bytes),
        })?;
        Ok(())
    }
}

/// Retries once on a connected socket, whose first error may be an ICMP message about an earlier datagram. Sockets that
/// are not connected receive no such errors.
fn retry_if_connected<T, E>(to: Option<SocketAddr>, mut send: impl FnMut() -> Result<T, E>) -> Result<T, E> {
    send().or_else(|error| if to.is_none() { send() } else { Err(error) })
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::net::Ipv4Addr;

    use super::*;
    use crate::net::reactor;

    fn udp_socket() -> UdpSocket {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        socket.set_nonblocking(true).expect("an option");
        socket
    }

    fn addr(socket: &BatchSocket) -> SocketAddr {
        socket.get_ref().local_addr().expect("an address")
    }

    /// Receives `count` datagrams.
    async fn receive(socket: &BatchSocket, count: usize) -> Vec<(SocketAddr, Vec<u8>)> {
        let (mut batch, mut received) = (RecvBatch::default(), Vec::new());
        poll_fn(|cx| {
            while received.len() < count {
                if !socket.poll_receive(cx, &mut batch, 64) {
                    return Poll::Pending;
                }
                assert_eq!(batch.count(), batch.datagrams().count());
                received.extend(batch.datagrams().map(|(from, bytes)| (from, bytes.to_vec())));
            }
            Poll::Ready(())
        })
        .await;
        received
    }

    /// Sends the payloads in as few batches as possible. Returns the number of batches, and the bytes sent.
    fn send(socket: &BatchSocket, to: SocketAddr, payloads: &[Vec<u8>]) -> (usize, usize) {
        let (mut header, mut batches, mut sent) = (Vec::new(), 1, 0);
        let mut batch = GsoBatch::new(&mut header);
        batch.begin(to, |header| header.extend(b"head"));
        for payload in payloads {
            if !batch.push(payload) {
                sent += socket.send_batch(Some(to), &mut batch);
                batches += 1;
                assert!(batch.push(payload), "everything fits into an empty batch");
            }
        }
        (batches, sent + socket.send_batch(Some(to), &mut batch))
    }

    #[test]
    fn udp_batches_arrive_as_single_datagrams_with_and_without_gso() {
        let payloads: Vec<Vec<u8>> = (0..40_u8).map(|n| vec![n; if n % 10 == 9 { 30 } else { 100 }]).collect();
        for gso_limit in [GsoLimit::Unlimited, GsoLimit::Unsupported] {
            let [sender, receiver] = [(); 2].map(|()| BatchSocket::new(udp_socket()).expect("a socket"));
            sender.gso_limit.set(gso_limit);
            for _ in 0..10 {
                assert_eq!(send(&sender, addr(&receiver), &payloads), (4, 36 * 100 + 4 * 30));
                let received = reactor::run(receive(&receiver, payloads.len())).expect("reactor created");
                let expected: Vec<_> = payloads.iter().map(|p| (addr(&sender), [b"head", &p[..]].concat())).collect();
                assert_eq!(received, expected);
            }
        }
    }

    #[test]
    fn udp_receive_loses_no_datagram_when_switching_between_single_and_batched() {
        let receiver = BatchSocket::new(udp_socket()).expect("a socket");
        let (to, socket) = (addr(&receiver), udp_socket());
        // Single datagrams, then a burst, then single ones.
        for count in [1; 40].into_iter().chain([50]).chain([1; 40]) {
            for number in 0..count {
                socket.send_to(&[number], to).expect("it is sent");
            }
            let received = reactor::run(receive(&receiver, count.into())).expect("reactor created");
            assert!(received.iter().map(|(_, bytes)| bytes).eq(&(0..count).map(|n| vec![n]).collect::<Vec<_>>()));
        }
    }
}
