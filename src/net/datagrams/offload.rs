//! GRO and GSO of the kernel: UDP_GRO and UDP_SEGMENT (udp(7)), and their detection with quinn-udp.

use std::io::{self, IoSlice};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::sys::socket::sockopt::UdpGroSegment;
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg, setsockopt};
use quinn_udp::UdpSocketState;

use super::batch::{GsoBatch, MAX_SEGMENTS};

/// Limit of GSO on a socket, determined from the kernel's errors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum GsoLimit {
    #[default]
    Unlimited,
    /// To this peer, only segments shorter than this many bytes: longer ones exceed the MTU of the route. A later
    /// increase of the MTU is not detected: single datagrams still arrive, only slower.
    Below(Option<SocketAddr>, usize),
    /// The kernel or the device does not support GSO, or the route goes through IPsec.
    Unsupported,
}

/// Returns the features of the kernel that quinn-udp detects. Detection uses a separate socket, because it sets options
/// for QUIC: with one of them the kernel drops datagrams larger than the MTU.
pub(super) fn quinn_state() -> io::Result<&'static UdpSocketState> {
    static STATE: OnceLock<UdpSocketState> = OnceLock::new();
    if let Some(state) = STATE.get() {
        return Ok(state);
    }
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None)?;
    let state = UdpSocketState::new((&socket).into())?;
    Ok(STATE.get_or_init(|| state))
}

/// Returns whether the kernel supports GSO. Otherwise it would send a batch as one large datagram.
pub(super) fn can_segment() -> io::Result<bool> {
    Ok(quinn_state()?.max_gso_segments() >= MAX_SEGMENTS)
}

pub(super) fn enable_gro(socket: &UdpSocket) {
    let _ = setsockopt(socket, UdpGroSegment, &true);
}

/// Sends the batch with one call. The kernel segments it into its datagrams.
pub(super) fn send(socket: &UdpSocket, to: Option<SocketAddr>, batch: &GsoBatch<'_>) -> Result<(), Errno> {
    let segment_len = u16::try_from(batch.segment_len).map_err(|_| Errno::EMSGSIZE)?;
    let control = [ControlMessage::UdpGsoSegments(&segment_len)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let to = to.map(SockaddrStorage::from);
    sendmsg(socket.as_raw_fd(), &[IoSlice::new(batch.bytes())], &control, flags, to.as_ref()).map(drop)
}

/// Returns the limit that an error of [`send`] implies, or `None` if the error may be temporary.
pub(super) fn limit_after(error: Errno, to: Option<SocketAddr>, segment_len: usize) -> Option<GsoLimit> {
    match error {
        Errno::EMSGSIZE | Errno::EINVAL => Some(GsoLimit::Below(to, segment_len)),
        Errno::EIO | Errno::ENOPROTOOPT | Errno::EOPNOTSUPP => Some(GsoLimit::Unsupported),
        _ => None,
    }
}
