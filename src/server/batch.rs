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
const BUFFER: usize = 65_536;
/// How many messages, each a datagram or an aggregate, are received at once.
const MESSAGES: usize = 32;
/// How many datagrams go out at once: the least that any kernel with GSO takes.
const SEGMENTS: usize = 64;
/// How many octets go out at once: what fits into one IPv4 packet, which is what they are until they are segmented.
const RUN: usize = 65_507;
/// Up to how many octets a payload is copied behind its header.
const SHORT: usize = 2048;

/// How datagrams go in and out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    /// Many at a time.
    #[cfg(target_os = "linux")]
    Batched,
    /// One at a time.
    #[cfg(any(not(target_os = "linux"), test))]
    Single,
}

impl Style {
    /// What this system can do.
    #[cfg(target_os = "linux")]
    pub(super) const BEST: Self = Self::Batched;
    /// What this system can do.
    #[cfg(not(target_os = "linux"))]
    pub(super) const BEST: Self = Self::Single;
}

/// Room for what one call receives, and what it has received.
pub(super) struct Batch {
    /// Zeroed by the kernel when they are first touched, and most never are.
    buffers: Vec<u8>,
    messages: Vec<Message>,
    #[cfg(target_os = "linux")]
    offload: offload::Metas,
}

/// A datagram, or an aggregate: several of the same length from the same sender, the last of them maybe shorter.
#[derive(Clone, Copy)]
struct Message {
    from: SocketAddr,
    octets: usize,
    /// The length of each datagram.
    stride: usize,
}

impl Default for Batch {
    fn default() -> Self {
        Self {
            buffers: vec![0; MESSAGES * BUFFER],
            messages: Vec::with_capacity(MESSAGES),
            #[cfg(target_os = "linux")]
            offload: offload::Metas::default(),
        }
    }
}

impl Batch {
    /// The datagrams, in the order in which they came, and whose they are.
    pub(super) fn datagrams(&self) -> impl Iterator<Item = (SocketAddr, &[u8])> {
        self.messages.iter().zip(self.buffers.chunks(BUFFER)).flat_map(|(message, buffer)| {
            let octets = buffer.get(..message.octets).unwrap_or_default();
            // One that has no octets is a datagram all the same.
            let empty = octets.is_empty().then_some(octets);
            octets.chunks(message.stride.max(1)).chain(empty).map(|datagram| (message.from, datagram))
        })
    }

    /// How many datagrams there are.
    pub(super) fn count(&self) -> usize {
        self.messages.iter().map(|message| message.octets.div_ceil(message.stride.max(1)).max(1)).sum()
    }
}

/// Datagrams that may go out at once: to or from one peer, behind the same header, all of the length of the first but
/// for the last, which may be shorter.
pub(super) struct Run<'a> {
    peer: Option<SocketAddr>,
    header: &'a mut Vec<u8>,
    payloads: [&'a [u8]; SEGMENTS],
    count: usize,
    /// Headers included.
    octets: usize,
}

impl<'a> Run<'a> {
    /// `header` is where the header will be written.
    pub(super) fn new(header: &'a mut Vec<u8>) -> Self {
        header.clear();
        Self { peer: None, header, payloads: [&[]; SEGMENTS], count: 0, octets: 0 }
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
    pub(super) fn header(&self) -> usize {
        self.header.len()
    }

    /// False when it does not fit behind the others. Into an empty run everything fits.
    pub(super) fn push(&mut self, payload: &'a [u8]) -> bool {
        let octets = self.header.len() + payload.len();
        if !self.is_empty() && !self.takes(octets) {
            return false;
        }
        if let Some(place) = self.payloads.get_mut(self.count) {
            *place = payload;
            self.count += 1;
            self.octets += octets;
        }
        true
    }

    fn takes(&self, octets: usize) -> bool {
        let segment = self.segment();
        let is_whole = self.octets == self.count * segment;
        // One of no octets would be none when it is cut off the others.
        is_whole && (1..=segment).contains(&octets) && self.octets + octets <= RUN && self.count < SEGMENTS
    }

    fn payloads(&self) -> &[&'a [u8]] {
        self.payloads.get(..self.count).unwrap_or_default()
    }

    /// The length of all but the last one, header included.
    fn segment(&self) -> usize {
        self.header.len() + self.payloads().first().map_or(0, |payload| payload.len())
    }

    pub(super) fn clear(&mut self) {
        self.count = 0;
        self.octets = 0;
    }
}

/// A datagram socket, bound to the thread that made it.
pub(super) struct BatchSocket {
    io: Io<UdpSocket>,
    style: Style,
    /// What the kernel refuses to segment.
    refused: Cell<Refused>,
    /// How often in a row one message came alone.
    #[cfg(target_os = "linux")]
    ones: Cell<u8>,
    /// Whether a message may be an aggregate: from the first time that several came at once.
    #[cfg(target_os = "linux")]
    has_aggregates: Cell<bool>,
}

/// What the kernel refuses to segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(not(target_os = "linux"), allow(dead_code, reason = "all is refused there"))]
enum Refused {
    #[default]
    Nothing,
    /// Segments of this length and longer, to there, since they do not go there in one packet. Should the route get
    /// better, sending one by one is only slower.
    Long(Option<SocketAddr>, usize),
    /// All: a device that can't, or a route through IPsec.
    All,
}

impl BatchSocket {
    /// Of a non-blocking socket.
    ///
    /// # Errors
    /// Those of epoll_ctl(2) and, the first time, of socket(2).
    pub(super) fn new(socket: UdpSocket, style: Style) -> io::Result<Self> {
        #[cfg(target_os = "linux")]
        let can_segment = style == Style::Batched && offload::can_segment()?;
        #[cfg(not(target_os = "linux"))]
        let can_segment = false;
        let refused = if can_segment { Refused::Nothing } else { Refused::All };
        Ok(Self {
            io: Io::read_only(socket)?,
            style,
            refused: refused.into(),
            #[cfg(target_os = "linux")]
            ones: Cell::default(),
            #[cfg(target_os = "linux")]
            has_aggregates: Cell::default(),
        })
    }

    pub(super) fn get_ref(&self) -> &UdpSocket {
        self.io.get_ref()
    }

    /// Receives what has come, `most` messages at the most; false when nothing has. Errors are ICMP's, about datagrams
    /// that were sent before: they pass.
    pub(super) fn poll_receive(&self, cx: &mut Context<'_>, batch: &mut Batch, most: usize) -> bool {
        for _ in 0..most {
            match self.io.poll_with(cx, Interest::Read, |socket| self.receive(socket, batch, most)) {
                Poll::Ready(Ok(is_all)) => {
                    if is_all {
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
    fn receive(&self, socket: &UdpSocket, batch: &mut Batch, most: usize) -> io::Result<bool> {
        batch.messages.clear();
        match self.style {
            #[cfg(target_os = "linux")]
            Style::Batched if !self.is_lone() => {
                offload::receive(socket, batch, most)?;
                if batch.messages.len() > 1 && !self.has_aggregates.replace(true) {
                    offload::want_aggregates(socket);
                }
            }
            #[cfg(target_os = "linux")]
            Style::Batched if self.has_aggregates.get() => offload::receive_one(socket, batch)?,
            _ => {
                let (octets, from) = socket.recv_from(batch.buffers.get_mut(..BUFFER).unwrap_or_default())?;
                batch.messages.push(Message { from, octets, stride: octets });
            }
        }
        #[cfg(target_os = "linux")]
        self.ones.set(if batch.messages.len() == 1 { self.ones.get().wrapping_add(1) } else { 0 });
        Ok(batch.messages.len() < most.min(MESSAGES))
    }

    /// Whether to receive one message only, which costs less than to find out that there is no other one: when they
    /// have come one by one. Now and then it is found out all the same.
    #[cfg(target_os = "linux")]
    fn is_lone(&self) -> bool {
        self.ones.get() >= 4 && !self.ones.get().is_multiple_of(16)
    }

    /// Sends the run, `to` somebody or to whom the socket is connected, and empties it: how many octets of payload
    /// went. Each datagram goes once or is dropped.
    pub(super) fn send_run(&self, to: Option<SocketAddr>, run: &mut Run<'_>) -> usize {
        let all = run.octets - run.count * run.header.len();
        let sent = if run.count > 1 && self.segments(to, run) { all } else { self.send_singly(to, run) };
        run.clear();
        sent
    }

    /// Sends the run at once; or nothing, and says false.
    fn segments(&self, to: Option<SocketAddr>, run: &Run<'_>) -> bool {
        match self.refused.get() {
            Refused::All => return false,
            Refused::Long(there, octets) if there == to && run.segment() >= octets => return false,
            _ => {}
        }
        #[cfg(target_os = "linux")]
        match again_if_connected(to, || offload::send(self.get_ref(), to, run)) {
            Ok(()) => return true,
            Err(error) => self.refused.set(offload::refused(error, to, run.segment()).unwrap_or(self.refused.get())),
        }
        false
    }

    fn send_singly(&self, to: Option<SocketAddr>, run: &mut Run<'_>) -> usize {
        let payloads = run.payloads.get(..run.count).unwrap_or_default();
        let sent = payloads.iter().filter(|payload| self.send(to, run.header, payload).is_ok());
        sent.map(|payload| payload.len()).sum()
    }

    /// Sends one datagram. `header` has it for a moment, when it is short: copying that costs less than gathering.
    ///
    /// # Errors
    /// Those of sendmsg(2).
    pub(super) fn send(&self, to: Option<SocketAddr>, header: &mut Vec<u8>, payload: &[u8]) -> io::Result<()> {
        if header.is_empty() {
            return self.send_octets(to, payload);
        }
        if payload.len() > SHORT {
            let parts = [IoSlice::new(header), IoSlice::new(payload)];
            let control = &mut SendAncillaryBuffer::default();
            again_if_connected(to, || match &to {
                Some(to) => sendmsg_addr(self.get_ref(), to, &parts, control, SendFlags::NOSIGNAL),
                None => sendmsg(self.get_ref(), &parts, control, SendFlags::NOSIGNAL),
            })?;
            return Ok(());
        }
        let length = header.len();
        header.extend_from_slice(payload);
        let result = self.send_octets(to, header);
        header.truncate(length);
        result
    }

    /// Sends one datagram.
    ///
    /// # Errors
    /// Those of sendto(2).
    pub(super) fn send_octets(&self, to: Option<SocketAddr>, octets: &[u8]) -> io::Result<()> {
        again_if_connected(to, || match &to {
            Some(to) => self.get_ref().send_to(octets, to),
            None => self.get_ref().send(octets),
        })?;
        Ok(())
    }
}

/// Of a socket that is connected, the first try may only be told what ICMP said about an earlier datagram; others are
/// not told.
fn again_if_connected<T, E>(to: Option<SocketAddr>, mut send: impl FnMut() -> Result<T, E>) -> Result<T, E> {
    send().or_else(|error| if to.is_none() { send() } else { Err(error) })
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::net::Ipv4Addr;

    use super::*;
    use crate::reactor;

    const STYLES: [Style; 2] = [Style::BEST, Style::Single];

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
        let (mut batch, mut received) = (Batch::default(), Vec::new());
        poll_fn(|cx| {
            while received.len() < count {
                if !socket.poll_receive(cx, &mut batch, 64) {
                    return Poll::Pending;
                }
                assert_eq!(batch.count(), batch.datagrams().count());
                received.extend(batch.datagrams().map(|(from, octets)| (from, octets.to_vec())));
            }
            Poll::Ready(())
        })
        .await;
        received
    }

    /// Sends the payloads in as few runs as they take; how many runs, and how many octets went.
    fn send(socket: &BatchSocket, to: SocketAddr, payloads: &[Vec<u8>]) -> (usize, usize) {
        let (mut header, mut runs, mut sent) = (Vec::new(), 1, 0);
        let mut run = Run::new(&mut header);
        run.begin(to, |header| header.extend(b"head"));
        for payload in payloads {
            if !run.push(payload) {
                sent += socket.send_run(Some(to), &mut run);
                runs += 1;
                assert!(run.push(payload), "everything fits into an empty run");
            }
        }
        (runs, sent + socket.send_run(Some(to), &mut run))
    }

    #[test]
    fn either_style_receives_what_either_sends() {
        let payloads: Vec<Vec<u8>> = (0..40_u8).map(|n| vec![n; if n % 10 == 9 { 30 } else { 100 }]).collect();
        let all = |inside: &dyn Fn() -> (BatchSocket, BatchSocket)| {
            let (sender, receiver) = inside();
            for _ in 0..10 {
                assert_eq!(send(&sender, addr(&receiver), &payloads), (4, 36 * 100 + 4 * 30));
                let received = smol::future::block_on(receive(&receiver, payloads.len()));
                let expected: Vec<_> = payloads.iter().map(|p| (addr(&sender), [b"head", &p[..]].concat())).collect();
                assert_eq!(received, expected);
            }
        };
        for (from, to) in STYLES.iter().flat_map(|from| STYLES.map(|to| (*from, to))) {
            let sockets = || {
                let socket = |style| BatchSocket::new(udp_socket(), style).expect("a socket");
                (socket(from), socket(to))
            };
            all(&sockets);
        }
    }

    #[test]
    fn either_style_waits_on_the_reactor_of_a_thread() {
        for style in STYLES {
            reactor::run(async {
                let receiver = BatchSocket::new(udp_socket(), style).expect("a socket");
                let (to, socket) = (addr(&receiver), udp_socket());
                // One by one, then several, then one by one again: none is left lying.
                for count in [1; 40].into_iter().chain([50]).chain([1; 40]) {
                    for number in 0..count {
                        socket.send_to(&[number], to).expect("it is sent");
                    }
                    let received = receive(&receiver, count.into()).await;
                    assert!(
                        received.iter().map(|(_, octets)| octets).eq(&(0..count).map(|n| vec![n]).collect::<Vec<_>>())
                    );
                }
            })
            .expect("a reactor");
        }
    }

    #[test]
    fn a_run_ends_where_the_kernel_would_cut_otherwise() {
        let runs = |lengths: &[usize], header: usize| {
            let payloads: Vec<Vec<u8>> = lengths.iter().map(|length| vec![0; *length]).collect();
            let mut octets = Vec::new();
            let (mut run, mut counts) = (Run::new(&mut octets), vec![0]);
            run.begin(SocketAddr::from(([127, 0, 0, 1], 9)), |octets| octets.resize(header, 0));
            for payload in &payloads {
                if !run.push(payload) {
                    run.clear();
                    assert!(run.push(payload));
                    counts.push(0);
                }
                *counts.last_mut().expect("one") += 1;
            }
            counts
        };
        assert_eq!(runs(&[5, 5, 5], 0), [3]);
        assert_eq!(runs(&[5, 5, 4, 4], 0), [3, 1], "behind a shorter one nothing fits");
        assert_eq!(runs(&[5, 6, 6], 0), [1, 2], "a longer one does not fit");
        assert_eq!(runs(&[5, 0, 0, 5], 0), [1, 1, 1, 1], "one without octets goes alone");
        assert_eq!(runs(&[5, 0, 0, 0], 10), [2, 2], "with a header it has octets");
        assert_eq!(runs(&[1; 130], 0), [64, 64, 2]);
        assert_eq!(runs(&[21_835; 4], 0), [3, 1], "65507 octets at the most");
        assert_eq!(runs(&[21_836; 4], 0), [2, 2]);
        assert_eq!(runs(&[21_830; 4], 10), [2, 2], "headers included");
    }
}
