//! Datagrams of one socket, many at a time: in by recvmmsg(2) and GRO, out by GSO, where the system has them, and one
//! at a time elsewhere.
//!
//! It knows nothing of SOCKS, and of the datagrams only where each begins and ends. What is refused as a whole is sent
//! one by one: how datagrams went can't be told by those who get them.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::net::{SocketAddr, UdpSocket};
use std::task::{Context, Poll};

use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg, sendmsg_addr};

use crate::reactor::{Interest, Io, wake_later};

#[cfg(target_os = "linux")]
mod offload;

/// More than any datagram or GRO aggregate has, in octets, so that none is cut.
const MAX_MESSAGE_SIZE: usize = 65_536;
/// How many messages, each a datagram or an aggregate, are received at once.
const MAX_MESSAGES: usize = 32;
/// How many datagrams go out at once: the least that any kernel with GSO takes.
const MAX_SEGMENTS: usize = 64;
/// How many octets go out at once: what fits into one IPv4 packet, which is what they are until they are segmented.
const MAX_GSO_BYTES: usize = 65_507;
/// Up to how many octets a payload is copied behind its header.
const MAX_COPIED_PAYLOAD: usize = 2048;

/// How datagrams go in and out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BatchMode {
    /// Many at a time.
    #[cfg(target_os = "linux")]
    Batched,
    /// One at a time.
    #[cfg(any(not(target_os = "linux"), test))]
    Single,
}

impl BatchMode {
    /// What this system can do.
    #[cfg(target_os = "linux")]
    pub(super) const BEST: Self = Self::Batched;
    /// What this system can do.
    #[cfg(not(target_os = "linux"))]
    pub(super) const BEST: Self = Self::Single;
}

/// Room for what one call receives, and what it has received.
pub(super) struct RecvBatch {
    /// Zeroed by the kernel when they are first touched, and most never are.
    buffers: Vec<u8>,
    messages: Vec<Message>,
    #[cfg(target_os = "linux")]
    offload: offload::RecvMetadata,
}

/// A datagram, or an aggregate: several of the same length from the same sender, the last of them maybe shorter.
#[derive(Clone, Copy)]
struct Message {
    from: SocketAddr,
    len: usize,
    /// The length of each datagram.
    segment_len: usize,
}

impl Default for RecvBatch {
    fn default() -> Self {
        Self {
            buffers: vec![0; MAX_MESSAGES * MAX_MESSAGE_SIZE],
            messages: Vec::with_capacity(MAX_MESSAGES),
            #[cfg(target_os = "linux")]
            offload: offload::RecvMetadata::default(),
        }
    }
}

impl RecvBatch {
    /// The datagrams, in the order in which they came, and whose they are.
    pub(super) fn datagrams(&self) -> impl Iterator<Item = (SocketAddr, &[u8])> {
        self.messages.iter().zip(self.buffers.chunks(MAX_MESSAGE_SIZE)).flat_map(|(message, buffer)| {
            let bytes = buffer.get(..message.len).unwrap_or_default();
            // One that has no octets is a datagram all the same.
            let empty = bytes.is_empty().then_some(bytes);
            bytes.chunks(message.segment_len.max(1)).chain(empty).map(|datagram| (message.from, datagram))
        })
    }

    /// How many datagrams there are.
    pub(super) fn count(&self) -> usize {
        self.messages.iter().map(|message| message.len.div_ceil(message.segment_len.max(1)).max(1)).sum()
    }
}

/// Datagrams that may go out at once: to or from one peer, behind the same header, all of the length of the first but
/// for the last, which may be shorter.
pub(super) struct GsoBatch<'a> {
    peer: Option<SocketAddr>,
    header: &'a mut Vec<u8>,
    payloads: [&'a [u8]; MAX_SEGMENTS],
    count: usize,
    /// Headers included.
    len: usize,
}

impl<'a> GsoBatch<'a> {
    /// `header` is where the header will be written.
    pub(super) fn new(header: &'a mut Vec<u8>) -> Self {
        header.clear();
        Self { peer: None, header, payloads: [&[]; MAX_SEGMENTS], count: 0, len: 0 }
    }

    pub(super) fn peer(&self) -> Option<SocketAddr> {
        self.peer
    }

    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// From here on it is `peer`'s; `write` appends the header. To be done when it is empty.
    pub(super) fn begin(&mut self, peer: SocketAddr, write: impl FnOnce(&mut Vec<u8>)) {
        self.peer = Some(peer);
        self.header.clear();
        write(self.header);
    }

    /// The length of the header, in octets.
    pub(super) fn header_len(&self) -> usize {
        self.header.len()
    }

    /// False when it does not fit behind the others. Into an empty run everything fits.
    pub(super) fn push(&mut self, payload: &'a [u8]) -> bool {
        let len = self.header.len() + payload.len();
        if !self.is_empty() && !self.fits(len) {
            return false;
        }
        if let Some(slot) = self.payloads.get_mut(self.count) {
            *slot = payload;
            self.count += 1;
            self.len += len;
        }
        true
    }

    fn fits(&self, len: usize) -> bool {
        let segment_len = self.segment_len();
        let is_uniform = self.len == self.count * segment_len;
        // One of no octets would be none when it is cut off the others.
        is_uniform && (1..=segment_len).contains(&len) && self.len + len <= MAX_GSO_BYTES && self.count < MAX_SEGMENTS
    }

    fn payloads(&self) -> &[&'a [u8]] {
        self.payloads.get(..self.count).unwrap_or_default()
    }

    /// The length of all but the last one, header included.
    fn segment_len(&self) -> usize {
        self.header.len() + self.payloads().first().map_or(0, |payload| payload.len())
    }

    pub(super) fn clear(&mut self) {
        self.count = 0;
        self.len = 0;
    }
}

/// A datagram socket, bound to the thread that made it.
pub(super) struct BatchSocket {
    io: Io<UdpSocket>,
    mode: BatchMode,
    /// What the kernel refuses to segment.
    gso_limit: Cell<GsoLimit>,
    /// How often in a row one message came alone.
    #[cfg(target_os = "linux")]
    single_streak: Cell<u8>,
    /// Whether a message may be an aggregate: from the first time that several came at once.
    #[cfg(target_os = "linux")]
    is_gro_enabled: Cell<bool>,
}

/// What the kernel refuses to segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(not(target_os = "linux"), allow(dead_code, reason = "all is refused there"))]
enum GsoLimit {
    #[default]
    Unlimited,
    /// Segments of this length and longer, to there, since they do not go there in one packet. Should the route get
    /// better, sending one by one is only slower.
    Below(Option<SocketAddr>, usize),
    /// All: a device that can't, or a route through IPsec.
    Unsupported,
}

impl BatchSocket {
    /// Of a non-blocking socket.
    ///
    /// # Errors
    /// Those of epoll_ctl(2) and, the first time, of socket(2).
    pub(super) fn new(socket: UdpSocket, mode: BatchMode) -> io::Result<Self> {
        #[cfg(target_os = "linux")]
        let can_segment = mode == BatchMode::Batched && offload::can_segment()?;
        #[cfg(not(target_os = "linux"))]
        let can_segment = false;
        let gso_limit = if can_segment { GsoLimit::Unlimited } else { GsoLimit::Unsupported };
        Ok(Self {
            io: Io::read_only(socket)?,
            mode,
            gso_limit: gso_limit.into(),
            #[cfg(target_os = "linux")]
            single_streak: Cell::default(),
            #[cfg(target_os = "linux")]
            is_gro_enabled: Cell::default(),
        })
    }

    pub(super) fn get_ref(&self) -> &UdpSocket {
        self.io.get_ref()
    }

    /// Receives what has come, `most` messages at the most; false when nothing has. Errors are ICMP's, about datagrams
    /// that were sent before: they pass.
    pub(super) fn poll_receive(&self, cx: &mut Context<'_>, batch: &mut RecvBatch, max: usize) -> bool {
        for _ in 0..max {
            match self.io.poll_with(cx, Interest::Read, |socket| self.receive(socket, batch, max)) {
                Poll::Ready(Ok(is_drained)) => {
                    if is_drained {
                        self.io.mark_drained(Interest::Read);
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

    /// True when that was all there is, or the reactor will say that there is more.
    fn receive(&self, socket: &UdpSocket, batch: &mut RecvBatch, max: usize) -> io::Result<bool> {
        batch.messages.clear();
        match self.mode {
            #[cfg(target_os = "linux")]
            BatchMode::Batched if !self.should_receive_one() => {
                offload::receive(socket, batch, max)?;
                if batch.messages.len() > 1 && !self.is_gro_enabled.replace(true) {
                    offload::enable_gro(socket);
                }
            }
            #[cfg(target_os = "linux")]
            BatchMode::Batched if self.is_gro_enabled.get() => offload::receive_one(socket, batch)?,
            _ => {
                let (len, from) = socket.recv_from(batch.buffers.get_mut(..MAX_MESSAGE_SIZE).unwrap_or_default())?;
                batch.messages.push(Message { from, len, segment_len: len });
            }
        }
        #[cfg(target_os = "linux")]
        self.single_streak.set(if batch.messages.len() == 1 { self.single_streak.get().wrapping_add(1) } else { 0 });
        Ok(batch.messages.len() < max.min(MAX_MESSAGES))
    }

    /// Whether to receive one message only, which costs less than to find out that there is no other one: when they
    /// have come one by one. Now and then it is found out all the same.
    #[cfg(target_os = "linux")]
    fn should_receive_one(&self) -> bool {
        self.single_streak.get() >= 4 && !self.single_streak.get().is_multiple_of(16)
    }

    /// Sends the run, `to` somebody or to whom the socket is connected, and empties it: how many octets of payload
    /// went. Each datagram goes once or is dropped.
    pub(super) fn send_batch(&self, to: Option<SocketAddr>, batch: &mut GsoBatch<'_>) -> usize {
        let total = batch.len - batch.count * batch.header.len();
        let sent = if batch.count > 1 && self.send_gso(to, batch) { total } else { self.send_individually(to, batch) };
        batch.clear();
        sent
    }

    /// Sends the run at once; or nothing, and says false.
    fn send_gso(&self, to: Option<SocketAddr>, batch: &GsoBatch<'_>) -> bool {
        match self.gso_limit.get() {
            GsoLimit::Unsupported => return false,
            GsoLimit::Below(peer, len) if peer == to && batch.segment_len() >= len => return false,
            _ => {}
        }
        #[cfg(target_os = "linux")]
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

    /// Sends one datagram. `header` has it for a moment, when it is short: copying that costs less than gathering.
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
    pub(super) fn send_bytes(&self, to: Option<SocketAddr>, bytes: &[u8]) -> io::Result<()> {
        retry_if_connected(to, || match &to {
            Some(to) => self.get_ref().send_to(bytes, to),
            None => self.get_ref().send(bytes),
        })?;
        Ok(())
    }
}

/// Of a socket that is connected, the first try may only be told what ICMP said about an earlier datagram; others are
/// not told.
fn retry_if_connected<T, E>(to: Option<SocketAddr>, mut send: impl FnMut() -> Result<T, E>) -> Result<T, E> {
    send().or_else(|error| if to.is_none() { send() } else { Err(error) })
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::net::Ipv4Addr;

    use super::*;
    use crate::reactor;

    const MODES: [BatchMode; 2] = [BatchMode::BEST, BatchMode::Single];

    fn udp_socket() -> UdpSocket {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        socket.set_nonblocking(true).expect("an option");
        socket
    }

    fn addr(socket: &BatchSocket) -> SocketAddr {
        socket.get_ref().local_addr().expect("an address")
    }

    /// Receives until there are so many.
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

    /// Sends the payloads in as few runs as they take; how many runs, and how many octets went.
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
    fn either_style_receives_what_either_sends() {
        let payloads: Vec<Vec<u8>> = (0..40_u8).map(|n| vec![n; if n % 10 == 9 { 30 } else { 100 }]).collect();
        let exchange = |make: &dyn Fn() -> (BatchSocket, BatchSocket)| {
            let (sender, receiver) = make();
            for _ in 0..10 {
                assert_eq!(send(&sender, addr(&receiver), &payloads), (4, 36 * 100 + 4 * 30));
                let received = smol::future::block_on(receive(&receiver, payloads.len()));
                let expected: Vec<_> = payloads.iter().map(|p| (addr(&sender), [b"head", &p[..]].concat())).collect();
                assert_eq!(received, expected);
            }
        };
        for (from, to) in MODES.iter().flat_map(|from| MODES.map(|to| (*from, to))) {
            let sockets = || {
                let socket = |mode| BatchSocket::new(udp_socket(), mode).expect("a socket");
                (socket(from), socket(to))
            };
            exchange(&sockets);
        }
    }

    #[test]
    fn either_style_waits_on_the_reactor_of_a_thread() {
        for mode in MODES {
            reactor::run(async {
                let receiver = BatchSocket::new(udp_socket(), mode).expect("a socket");
                let (to, socket) = (addr(&receiver), udp_socket());
                // One by one, then several, then one by one again: none is left lying.
                for count in [1; 40].into_iter().chain([50]).chain([1; 40]) {
                    for number in 0..count {
                        socket.send_to(&[number], to).expect("it is sent");
                    }
                    let received = receive(&receiver, count.into()).await;
                    assert!(
                        received.iter().map(|(_, bytes)| bytes).eq(&(0..count).map(|n| vec![n]).collect::<Vec<_>>())
                    );
                }
            })
            .expect("a reactor");
        }
    }

    #[test]
    fn a_run_ends_where_the_kernel_would_cut_otherwise() {
        let batches = |lengths: &[usize], header: usize| {
            let payloads: Vec<Vec<u8>> = lengths.iter().map(|length| vec![0; *length]).collect();
            let mut header_buf = Vec::new();
            let (mut batch, mut counts) = (GsoBatch::new(&mut header_buf), vec![0]);
            batch.begin(SocketAddr::from(([127, 0, 0, 1], 9)), |buf| buf.resize(header, 0));
            for payload in &payloads {
                if !batch.push(payload) {
                    batch.clear();
                    assert!(batch.push(payload));
                    counts.push(0);
                }
                *counts.last_mut().expect("one") += 1;
            }
            counts
        };
        assert_eq!(batches(&[5, 5, 5], 0), [3]);
        assert_eq!(batches(&[5, 5, 4, 4], 0), [3, 1], "behind a shorter one nothing fits");
        assert_eq!(batches(&[5, 6, 6], 0), [1, 2], "a longer one does not fit");
        assert_eq!(batches(&[5, 0, 0, 5], 0), [1, 1, 1, 1], "one without octets goes alone");
        assert_eq!(batches(&[5, 0, 0, 0], 10), [2, 2], "with a header it has octets");
        assert_eq!(batches(&[1; 130], 0), [64, 64, 2]);
        assert_eq!(batches(&[21_835; 4], 0), [3, 1], "65507 octets at the most");
        assert_eq!(batches(&[21_836; 4], 0), [2, 2]);
        assert_eq!(batches(&[21_830; 4], 10), [2, 2], "headers included");
    }
}
