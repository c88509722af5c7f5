//! The system calls for batches: recvmmsg(2), and UDP_GRO and UDP_SEGMENT of udp(7).

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::sys::socket::sockopt::UdpGroSegment;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt};
use quinn_udp::{RecvMeta, UdpSocketState};

use super::batch::{DATAGRAM_BUFFER_SIZE, GsoBatch, MAX_MESSAGES, MAX_SEGMENTS, RecvBatch, RecvMessage};

/// Limit of GSO that the errors of the kernel have shown so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum GsoLimit {
    #[default]
    Unlimited,
    /// To this peer, only segments shorter than this many bytes: longer ones exceed the MTU of the route. A later
    /// increase of the MTU is not detected: single datagrams still arrive, only slower.
    Below(Option<SocketAddr>, usize),
    /// The device has no support, or the route goes through IPsec.
    Unsupported,
}

/// Returns the features of the kernel that quinn-udp detects. Detection uses a separate socket, because it sets options
/// for QUIC: with one of them the kernel drops datagrams larger than the MTU.
fn quinn_state() -> io::Result<&'static UdpSocketState> {
    static STATE: OnceLock<UdpSocketState> = OnceLock::new();
    if let Some(state) = STATE.get() {
        return Ok(state);
    }
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None)?;
    let state = UdpSocketState::new((&socket).into())?;
    Ok(STATE.get_or_init(|| state))
}

/// Returns whether the kernel has GSO. Without it, the kernel would send a batch as one large datagram.
pub(super) fn can_segment() -> io::Result<bool> {
    Ok(quinn_state()?.max_gso_segments() >= MAX_SEGMENTS)
}

pub(super) fn enable_gro(socket: &UdpSocket) {
    let _ = setsockopt(socket, UdpGroSegment, &true);
}

/// Receives up to `max` messages, without waiting.
pub(super) fn receive(socket: &UdpSocket, batch: &mut RecvBatch, max: usize) -> io::Result<()> {
    let mut buffers = batch.buffers.chunks_exact_mut(DATAGRAM_BUFFER_SIZE);
    let mut slices: [_; MAX_MESSAGES] = std::array::from_fn(|_| IoSliceMut::new(buffers.next().unwrap_or_default()));
    let slices = slices.get_mut(..max.min(MAX_MESSAGES)).unwrap_or_default();
    let metas = &mut batch.metas;
    let count = quinn_state()?.recv(socket.into(), slices, metas)?;
    let message = |meta: &RecvMeta| RecvMessage { from: meta.addr, len: meta.len, segment_len: meta.stride };
    batch.messages.extend(metas.iter().take(count).map(message));
    Ok(())
}

/// Receives one message, without waiting.
pub(super) fn receive_one(socket: &UdpSocket, batch: &mut RecvBatch) -> io::Result<()> {
    let buffer = batch.buffers.get_mut(..DATAGRAM_BUFFER_SIZE).unwrap_or_default();
    let (slices, control) = (&mut [IoSliceMut::new(buffer)], Some(&mut *batch.control));
    let message = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), slices, control, MsgFlags::MSG_DONTWAIT)?;
    let mut segment_len = message.bytes;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::UdpGroSegments(len) = control {
            segment_len = usize::try_from(len).unwrap_or(segment_len);
        }
    }
    let v4 = |addr: &SockaddrStorage| addr.as_sockaddr_in().map(|addr| SocketAddr::V4((*addr).into()));
    let v6 = |addr: &SockaddrStorage| addr.as_sockaddr_in6().map(|addr| SocketAddr::V6((*addr).into()));
    let from = message.address.and_then(|addr| v4(&addr).or_else(|| v6(&addr)));
    batch.messages.extend(from.map(|from| RecvMessage { from, len: message.bytes, segment_len }));
    Ok(())
}

/// Sends the batch with one call. The kernel segments it into its datagrams.
pub(super) fn send(socket: &UdpSocket, to: Option<SocketAddr>, batch: &GsoBatch<'_>) -> Result<(), Errno> {
    let mut parts = [IoSlice::new(&[]); 2 * MAX_SEGMENTS];
    for (payload, pair) in batch.payloads().iter().zip(parts.chunks_exact_mut(2)) {
        if let [first, second] = pair {
            (*first, *second) = (IoSlice::new(batch.header), IoSlice::new(payload));
        }
    }
    let parts = parts.get(..2 * batch.payloads().len()).unwrap_or_default();
    let segment_len = u16::try_from(batch.segment_len()).map_err(|_| Errno::EMSGSIZE)?;
    let control = [ControlMessage::UdpGsoSegments(&segment_len)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let to = to.map(SockaddrStorage::from);
    sendmsg(socket.as_raw_fd(), parts, &control, flags, to.as_ref()).map(drop)
}

/// Returns the limit that an error of `send` has shown, or `None` if the error may be temporary.
pub(super) fn limit_after(error: Errno, to: Option<SocketAddr>, segment_len: usize) -> Option<GsoLimit> {
    match error {
        Errno::EMSGSIZE | Errno::EINVAL => Some(GsoLimit::Below(to, segment_len)),
        Errno::EIO | Errno::ENOPROTOOPT | Errno::EOPNOTSUPP => Some(GsoLimit::Unsupported),
        _ => None,
    }
}
