//! UDP sockets that receive with recvmmsg(2) and GRO, and send with GSO, if the kernel supports these.
//!
//! The content of datagrams is not interpreted. A batch that the kernel refuses is sent as single datagrams, with the
//! same result at the receiver.

mod batch;
mod offload;

use std::cell::Cell;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::task::{Context, Poll};

use socket2::{Domain, Socket, Type};

use super::reactor::{Interest, wake_later};
use super::socket::Io;
pub use batch::DATAGRAM_BUFFER_SIZE;
use batch::MAX_MESSAGES;
pub(crate) use batch::{GsoBatch, RecvBatch};
use offload::GsoLimit;

/// SO_RCVBUF and SO_SNDBUF in bytes, for bursts. The kernel may grant less.
const SOCKET_BUFFER_SIZE: usize = 1 << 20;

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
    /// Binds a socket with large buffers. An IPv6 socket receives no IPv4 traffic.
    ///
    /// # Errors
    /// Those of bind(2), epoll_ctl(2) and socket(2).
    pub(crate) fn bind(local: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(local), Type::DGRAM, None)?;
        if local.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.bind(&local.into())?;
        let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_SIZE);
        let _ = socket.set_send_buffer_size(SOCKET_BUFFER_SIZE);
        socket.set_nonblocking(true)?;
        let gso_limit = if offload::can_segment()? { GsoLimit::Unlimited } else { GsoLimit::Unsupported };
        Ok(Self {
            io: Io::read_only(socket.into())?,
            gso_limit: gso_limit.into(),
            single_streak: Cell::default(),
            is_gro_enabled: Cell::default(),
        })
    }

    pub(crate) fn get_ref(&self) -> &UdpSocket {
        self.io.get_ref()
    }

    /// Receives up to `max` messages. Returns false if there are none. Errors are skipped: they are ICMP messages about
    /// earlier datagrams.
    pub(crate) fn poll_receive(&self, cx: &mut Context<'_>, batch: &mut RecvBatch, max: usize) -> bool {
        for _ in 0..max {
            match self.io.poll_with(cx, Interest::Read, |socket| self.receive(socket, batch, max)) {
                Poll::Ready(Ok(may_be_empty)) => {
                    if may_be_empty {
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

    /// Receives up to `max` messages. Returns true if the socket may be empty. If it is not, epoll reports it again.
    fn receive(&self, socket: &UdpSocket, batch: &mut RecvBatch, max: usize) -> io::Result<bool> {
        let is_one = self.should_receive_one();
        if is_one && !self.is_gro_enabled.get() {
            batch.receive_one(socket)?;
        } else {
            batch.receive(socket, offload::quinn_state()?, if is_one { 1 } else { max })?;
            if batch.message_count > 1 && !self.is_gro_enabled.replace(true) {
                offload::enable_gro(socket);
            }
        }
        self.single_streak.set(if batch.message_count == 1 { self.single_streak.get().wrapping_add(1) } else { 0 });
        Ok(batch.message_count < max.min(MAX_MESSAGES))
    }

    /// Returns true after four calls in a row with a single message, except for every 16th call. A call for one
    /// message costs less than a call that also looks for a second one.
    fn should_receive_one(&self) -> bool {
        self.single_streak.get() >= 4 && !self.single_streak.get().is_multiple_of(16)
    }

    /// Sends and clears the batch, to the peer of a connected socket if `to` is `None`. Each datagram is sent once or
    /// dropped. Returns the number of payload bytes sent.
    pub(crate) fn send_batch(&self, to: Option<SocketAddr>, batch: &mut GsoBatch<'_>) -> usize {
        let is_sent = batch.count > 1 && self.send_gso(to, batch);
        let sent = batch.datagrams().filter(|datagram| is_sent || self.send_bytes(to, datagram).is_ok());
        let sent = sent.map(|datagram| datagram.len() - batch.header_len()).sum();
        batch.clear();
        sent
    }

    /// Sends the batch with one call. Returns false if nothing was sent.
    fn send_gso(&self, to: Option<SocketAddr>, batch: &GsoBatch<'_>) -> bool {
        match self.gso_limit.get() {
            GsoLimit::Unsupported => return false,
            GsoLimit::Below(peer, len) if peer == to && batch.segment_len >= len => return false,
            _ => {}
        }
        match retry_if_connected(to, || offload::send(self.get_ref(), to, batch)) {
            Ok(()) => return true,
            Err(error) => {
                self.gso_limit.set(offload::limit_after(error, to, batch.segment_len).unwrap_or(self.gso_limit.get()))
            }
        }
        false
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

/// Receives a datagram by `op`, again after ECONNREFUSED, which reports an ICMP error about an earlier datagram.
pub fn retry_refused<T>(mut op: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match op() {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::net::Ipv4Addr;

    use super::*;
    use crate::net::reactor;

    fn batch_socket() -> BatchSocket {
        BatchSocket::bind((Ipv4Addr::LOCALHOST, 0).into()).expect("a socket")
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
            let [sender, receiver] = [(); 2].map(|()| batch_socket());
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
        let receiver = batch_socket();
        let (to, socket) = (addr(&receiver), UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket"));
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
