//! What Linux has for many datagrams at once: recvmmsg(2), and UDP_GRO and UDP_SEGMENT of udp(7).

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::sync::OnceLock;

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::sockopt::UdpGroSegment;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt};
use quinn_udp::{RecvMeta, UdpSocketState};

use super::{BUFFER, Batch, MESSAGES, Message, Refused, Run, SEGMENTS};

/// Room for what a call says of each message.
pub(super) struct Metas {
    metas: Vec<RecvMeta>,
    control: Vec<u8>,
}

impl Default for Metas {
    fn default() -> Self {
        Self { metas: vec![RecvMeta::default(); MESSAGES], control: cmsg_space!(i32) }
    }
}

/// What quinn-udp knows of the system. It is made of a socket of its own: making it sets options that suit QUIC, of
/// which one would have the kernel drop what is larger than the MTU.
fn state() -> io::Result<&'static UdpSocketState> {
    static STATE: OnceLock<UdpSocketState> = OnceLock::new();
    if let Some(state) = STATE.get() {
        return Ok(state);
    }
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None)?;
    let state = UdpSocketState::new((&socket).into())?;
    Ok(STATE.get_or_init(|| state))
}

/// Whether the kernel can cut a run into its datagrams. An older one would take it for one large datagram.
pub(super) fn can_segment() -> io::Result<bool> {
    Ok(state()?.max_gso_segments() >= SEGMENTS)
}

/// Has the socket receive aggregates, where the kernel can.
pub(super) fn want_aggregates(socket: &UdpSocket) {
    let _ = setsockopt(socket, UdpGroSegment, &true);
}

/// Receives `most` messages at the most, without waiting for them.
pub(super) fn receive(socket: &UdpSocket, batch: &mut Batch, most: usize) -> io::Result<()> {
    let mut buffers = batch.buffers.chunks_exact_mut(BUFFER);
    let mut slices: [_; MESSAGES] = std::array::from_fn(|_| IoSliceMut::new(buffers.next().unwrap_or_default()));
    let slices = slices.get_mut(..most.min(MESSAGES)).unwrap_or_default();
    let metas = &mut batch.offload.metas;
    let count = state()?.recv(socket.into(), slices, metas)?;
    let message = |meta: &RecvMeta| Message { from: meta.addr, octets: meta.len, stride: meta.stride };
    batch.messages.extend(metas.iter().take(count).map(message));
    Ok(())
}

/// As `receive`, one message.
pub(super) fn receive_one(socket: &UdpSocket, batch: &mut Batch) -> io::Result<()> {
    let buffer = batch.buffers.get_mut(..BUFFER).unwrap_or_default();
    let (slices, control) = (&mut [IoSliceMut::new(buffer)], Some(&mut *batch.offload.control));
    let message = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), slices, control, MsgFlags::MSG_DONTWAIT)?;
    let mut stride = message.bytes;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::UdpGroSegments(octets) = control {
            stride = usize::try_from(octets).unwrap_or(stride);
        }
    }
    let v4 = |addr: &SockaddrStorage| addr.as_sockaddr_in().map(|addr| SocketAddr::V4((*addr).into()));
    let v6 = |addr: &SockaddrStorage| addr.as_sockaddr_in6().map(|addr| SocketAddr::V6((*addr).into()));
    let from = message.address.and_then(|addr| v4(&addr).or_else(|| v6(&addr)));
    batch.messages.extend(from.map(|from| Message { from, octets: message.bytes, stride }));
    Ok(())
}

/// Sends the run as one, which the kernel cuts into its datagrams.
pub(super) fn send(socket: &UdpSocket, to: Option<SocketAddr>, run: &Run<'_>) -> Result<(), Errno> {
    let mut parts = [IoSlice::new(&[]); 2 * SEGMENTS];
    for (payload, pair) in run.payloads().iter().zip(parts.chunks_exact_mut(2)) {
        if let [first, second] = pair {
            (*first, *second) = (IoSlice::new(run.header), IoSlice::new(payload));
        }
    }
    let parts = parts.get(..2 * run.payloads().len()).unwrap_or_default();
    let segment = u16::try_from(run.segment()).map_err(|_| Errno::EMSGSIZE)?;
    let control = [ControlMessage::UdpGsoSegments(&segment)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let to = to.map(SockaddrStorage::from);
    sendmsg(socket.as_raw_fd(), parts, &control, flags, to.as_ref()).map(drop)
}

/// What an error says about later runs; nothing, when it may be gone then.
pub(super) fn refused(error: Errno, to: Option<SocketAddr>, segment: usize) -> Option<Refused> {
    match error {
        Errno::EMSGSIZE | Errno::EINVAL => Some(Refused::Long(to, segment)),
        Errno::EIO | Errno::ENOPROTOOPT | Errno::EOPNOTSUPP => Some(Refused::All),
        _ => None,
    }
}
