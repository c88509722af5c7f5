//! UDP sockets that receive with recvmmsg(2) and GRO, and send with GSO, if the kernel supports these.
//!
//! Datagrams are not interpreted. The receiver sees no difference if the kernel refuses a batch: it is sent singly.

mod batch;

use std::cell::{Cell, RefCell};
use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::sync::OnceLock;
use std::task::{Context, Poll};

use nix::errno::Errno;
use nix::sys::socket::sockopt::{Ipv4RecvErr, Ipv6RecvErr, UdpGroSegment};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, RecvMsg, SockaddrStorage, recvmsg, sendmsg, setsockopt,
};
use quinn_udp::UdpSocketState;
use socket2::{Domain, Socket, Type};

use super::reactor::{Interest, wake_later};
use super::socket::Io;
use crate::counters::{self, Counter};
pub use batch::DATAGRAM_BUFFER_SIZE;
pub(crate) use batch::{GsoBatch, RecvBatch};
use batch::{MAX_MESSAGES, MAX_SEGMENTS};

/// SO_RCVBUF and SO_SNDBUF in bytes, for bursts. The kernel may grant less.
const SOCKET_BUFFER_SIZE: usize = 1 << 20;
/// Size in bytes of the control message of an ICMP error: header, `sock_extended_err` and IPv6 address.
const ERROR_CONTROL_LEN: usize = 128;

/// A datagram socket, registered with the reactor of its thread.
pub(crate) struct BatchSocket {
    io: Io<UdpSocket>,
    /// Maximum length of a datagram that is sent with GSO, from the kernel's errors: the smallest MTU of all routes so
    /// far. 0: the kernel or the device does not support GSO, or a route goes through IPsec.
    max_segment_len: Cell<u16>,
    /// Number of receive calls in a row, modulo 256, that returned a single message.
    single_streak: Cell<u8>,
    /// Set when a call has returned several messages: a socket with little traffic needs no GRO.
    is_gro_enabled: Cell<bool>,
    reports_unreachable: Cell<bool>,
    /// Destinations of datagrams that caused an ICMP error; at most [`MAX_MESSAGES`].
    unreachable: RefCell<Vec<SocketAddr>>,
}

impl BatchSocket {
    /// Binds a socket with large buffers, for IPv6 without IPv4. `prepare` is called before it is bound.
    pub(crate) fn bind(local: SocketAddr, prepare: impl FnOnce(&Socket) -> io::Result<()>) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(local), Type::DGRAM, None)?;
        prepare(&socket)?;
        if local.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.bind(&local.into())?;
        let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_SIZE);
        let _ = socket.set_send_buffer_size(SOCKET_BUFFER_SIZE);
        socket.set_nonblocking(true)?;
        // Without GSO, the kernel would send a batch as one large datagram.
        let can_segment = kernel_features()?.max_gso_segments() >= MAX_SEGMENTS;
        Ok(Self {
            io: Io::read_only(socket.into())?,
            max_segment_len: Cell::new(if can_segment { u16::MAX } else { 0 }),
            single_streak: Cell::default(),
            is_gro_enabled: Cell::default(),
            reports_unreachable: Cell::default(),
            unreachable: RefCell::default(),
        })
    }

    /// Makes [`BatchSocket::next_unreachable`] report ICMP errors. `ip` is any address of the family of the socket.
    pub(crate) fn report_unreachable(&self, ip: IpAddr) {
        if !self.reports_unreachable.replace(true) {
            let _ = match ip {
                IpAddr::V4(_) => setsockopt(self.get_ref(), Ipv4RecvErr, &true),
                IpAddr::V6(_) => setsockopt(self.get_ref(), Ipv6RecvErr, &true),
            };
        }
    }

    /// Returns a destination from which an ICMP error was received during [`BatchSocket::poll_receive`] or a send call.
    pub(crate) fn next_unreachable(&self) -> Option<SocketAddr> {
        self.unreachable.borrow_mut().pop()
    }

    /// Reads queued ICMP errors. Returns false if the kernel does not queue them.
    fn read_errors(&self) -> bool {
        if !self.reports_unreachable.get() {
            return false;
        }
        let (mut unreachable, mut control) = (self.unreachable.borrow_mut(), vec![0; ERROR_CONTROL_LEN]);
        for _ in 0..MAX_MESSAGES {
            let (fd, flags) = (self.get_ref().as_raw_fd(), MsgFlags::MSG_ERRQUEUE);
            let Ok(message) = recvmsg::<SockaddrStorage>(fd, &mut [], Some(&mut control), flags) else { break };
            let is_full = unreachable.len() >= MAX_MESSAGES;
            unreachable.extend(unreachable_addr(&message).filter(|_| !is_full));
        }
        true
    }

    pub(crate) fn get_ref(&self) -> &UdpSocket {
        self.io.get_ref()
    }

    /// Receives a batch, and takes its number of datagrams from `budget`: the last batch may exceed it. Returns false if
    /// there are no datagrams, or at the end of the budget; then the task is woken after others. Skips errors, which are
    /// about earlier datagrams.
    pub(crate) fn poll_receive(&self, cx: &mut Context<'_>, batch: &mut RecvBatch, budget: &mut usize) -> bool {
        for _ in 0..*budget {
            match self.io.poll_with(cx, Interest::Read, |socket| self.receive(socket, batch, *budget)) {
                Poll::Ready(Ok(may_be_empty)) => {
                    if may_be_empty {
                        self.io.mark_not_ready(Interest::Read);
                    }
                    *budget = budget.saturating_sub(batch.datagrams().count());
                    return true;
                }
                Poll::Ready(Err(_)) => {
                    self.read_errors();
                }
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
            batch.receive(socket, kernel_features()?, if is_one { 1 } else { max })?;
            if batch.message_count > 1 && !self.is_gro_enabled.replace(true) {
                let _ = setsockopt(socket, UdpGroSegment, &true);
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
        let is_sent = |datagram: &&[u8]| {
            let is_sent = is_sent || self.send_bytes(to, datagram).is_ok();
            counters::add(Counter::DropUnsent, u64::from(!is_sent));
            is_sent
        };
        let sent = batch.datagrams().filter(is_sent);
        let sent = sent.map(|datagram| datagram.len() - batch.header_len()).sum();
        batch.clear();
        sent
    }

    /// Sends the batch with one call, which the kernel segments. Returns false if nothing was sent.
    fn send_gso(&self, to: Option<SocketAddr>, batch: &GsoBatch<'_>) -> bool {
        let segment_len = u16::try_from(batch.segment_len).ok().filter(|len| *len <= self.max_segment_len.get());
        let Some(segment_len) = segment_len else { return false };
        let (bytes, addr) = ([IoSlice::new(batch.bytes())], to.map(SockaddrStorage::from));
        let control = [ControlMessage::UdpGsoSegments(&segment_len)];
        let send = || sendmsg(self.get_ref().as_raw_fd(), &bytes, &control, MsgFlags::empty(), addr.as_ref());
        match self.retry_after_icmp(to, send) {
            Ok(_) => return true,
            // Longer than the MTU. Single datagrams of this length are fragmented.
            Err(Errno::EMSGSIZE | Errno::EINVAL) => self.max_segment_len.set(segment_len.saturating_sub(1)),
            Err(Errno::EIO | Errno::ENOPROTOOPT | Errno::EOPNOTSUPP) => self.max_segment_len.set(0),
            // Temporary, or about this peer only.
            Err(_) => {}
        }
        false
    }

    pub(crate) fn send_bytes(&self, to: Option<SocketAddr>, bytes: &[u8]) -> io::Result<()> {
        self.retry_after_icmp(to, || match &to {
            Some(to) => self.get_ref().send_to(bytes, to),
            None => self.get_ref().send(bytes),
        })?;
        Ok(())
    }

    /// Retries once if the first error may be an ICMP message about an earlier datagram. Sockets that are not connected
    /// receive such errors only after [`BatchSocket::report_unreachable`].
    fn retry_after_icmp<T, E>(&self, to: Option<SocketAddr>, mut send: impl FnMut() -> Result<T, E>) -> Result<T, E> {
        send().or_else(|error| if self.read_errors() || to.is_none() { send() } else { Err(error) })
    }
}

/// Returns the destination of a datagram that caused an ICMP error. An ICMP message about the MTU is no error.
fn unreachable_addr(message: &RecvMsg<'_, '_, SockaddrStorage>) -> Option<SocketAddr> {
    let is_error = |control| match control {
        ControlMessageOwned::Ipv4RecvErr(error, _) | ControlMessageOwned::Ipv6RecvErr(error, _) => {
            error.ee_errno != Errno::EMSGSIZE as u32
        }
        _ => false,
    };
    let addr = message.address.filter(|_| message.cmsgs().is_ok_and(|mut controls| controls.any(is_error)))?;
    let v4 = addr.as_sockaddr_in().map(|addr| SocketAddr::V4((*addr).into()));
    v4.or_else(|| addr.as_sockaddr_in6().map(|addr| SocketAddr::V6((*addr).into())))
}

/// Permits more sockets of this user at the same address. The kernel selects one that is connected to the sender.
// SO_REUSEADDR would let other users take over the port.
pub(crate) fn share_port(socket: &Socket) -> io::Result<()> {
    socket.set_reuse_port(true)
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

/// Returns the features of the kernel that quinn-udp detects. Detection uses a separate socket, because it sets options
/// for QUIC: with one of them the kernel drops datagrams larger than the MTU.
fn kernel_features() -> io::Result<&'static UdpSocketState> {
    static STATE: OnceLock<UdpSocketState> = OnceLock::new();
    if let Some(state) = STATE.get() {
        return Ok(state);
    }
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    let state = UdpSocketState::new((&socket).into())?;
    Ok(STATE.get_or_init(|| state))
}
