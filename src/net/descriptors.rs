//! Passes descriptors to other processes (SCM_RIGHTS in unix(7)), and takes those that another process has left open here.

use std::fs;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// Maximum number of descriptors in a message: SCM_MAX_FD of the kernel.
pub const MAX_DESCRIPTORS: usize = 253;

/// Sends descriptors with one byte of data.
pub fn send_descriptors(socket: impl AsFd, descriptors: &[RawFd]) -> io::Result<()> {
    let rights = [ControlMessage::ScmRights(descriptors)];
    sendmsg::<()>(socket.as_fd().as_raw_fd(), &[IoSlice::new(&[0])], &rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Receives the descriptors of one message. Empty at the end of the stream.
pub fn receive_descriptors(socket: impl AsFd) -> io::Result<Vec<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut messages = RecvAncillaryBuffer::new(&mut space);
    recvmsg(socket, &mut [IoSliceMut::new(&mut [0])], &mut messages, RecvFlags::CMSG_CLOEXEC)?;
    let rights = messages.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    Ok(rights.flatten().collect())
}

/// Returns a duplicate of descriptor `number`, and closes the original. Safe code cannot own a descriptor of which it has
/// only the number, but the kernel accepts it in a message.
pub fn take_descriptor(number: RawFd) -> io::Result<OwnedFd> {
    // Otherwise the sockets of this function could get the number.
    fs::symlink_metadata(format!("/proc/self/fd/{number}")).map_err(|_| Errno::BADF)?;
    let (sender, receiver) = UnixStream::pair()?;
    send_descriptors(&sender, &[number])?;
    let duplicate = receive_descriptors(&receiver)?.pop().ok_or(io::ErrorKind::NotFound)?;
    nix::unistd::close(number)?;
    Ok(duplicate)
}
