//! The datagrams of one receive or send call.

use std::array;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};

use quinn_udp::{RecvMeta, UdpSocketState};

/// Size of a buffer for any UDP datagram or GRO aggregate, in bytes. None is larger, so none is truncated.
pub const DATAGRAM_BUFFER_SIZE: usize = 65_536;
pub(super) const MAX_MESSAGES: usize = 32;
/// Maximum number of datagrams per send call: UDP_MAX_SEGMENTS of the oldest kernels with GSO.
pub(super) const MAX_SEGMENTS: usize = 64;
/// Maximum number of bytes per send call. Until the kernel segments it, a batch is one IPv4 packet with a UDP header.
const MAX_GSO_BYTES: usize = 65_535 - 20 - 8;

/// Buffers for one receive call, and the messages that it has received. A message is a datagram, or a GRO aggregate:
/// datagrams of one sender with the same length, of which the last may be shorter.
pub(crate) struct RecvBatch {
    // Lazily zeroed by the kernel. Most of the 2 MiB is never touched.
    buffers: Vec<u8>,
    metas: Vec<RecvMeta>,
    pub(super) message_count: usize,
}

impl Default for RecvBatch {
    fn default() -> Self {
        Self {
            buffers: vec![0; MAX_MESSAGES * DATAGRAM_BUFFER_SIZE],
            metas: vec![RecvMeta::default(); MAX_MESSAGES],
            message_count: 0,
        }
    }
}

/// Splits the bytes of a message or a batch into datagrams of the same length, of which the last may be shorter.
fn split(bytes: &[u8], segment_len: usize) -> impl Iterator<Item = &[u8]> {
    // An empty message is one datagram.
    let empty = bytes.is_empty().then_some(bytes);
    bytes.chunks(segment_len.max(1)).chain(empty)
}

impl RecvBatch {
    /// Returns the datagrams with their senders, in the order of arrival.
    pub(crate) fn datagrams(&self) -> impl Iterator<Item = (SocketAddr, &[u8])> {
        let messages = self.metas.iter().take(self.message_count).zip(self.buffers.chunks(DATAGRAM_BUFFER_SIZE));
        messages.flat_map(|(meta, buffer)| {
            split(buffer.get(..meta.len).unwrap_or_default(), meta.stride).map(|datagram| (meta.addr, datagram))
        })
    }

    pub(super) fn receive_one(&mut self, socket: &UdpSocket) -> io::Result<()> {
        let (len, addr) = socket.recv_from(self.buffers.get_mut(..DATAGRAM_BUFFER_SIZE).unwrap_or_default())?;
        if let Some(meta) = self.metas.first_mut() {
            (meta.addr, meta.len, meta.stride) = (addr, len, len);
        }
        self.message_count = 1;
        Ok(())
    }

    /// Receives up to `max` messages with recvmmsg(2).
    pub(super) fn receive(&mut self, socket: &UdpSocket, quinn: &UdpSocketState, max: usize) -> io::Result<()> {
        let mut buffers = self.buffers.chunks_exact_mut(DATAGRAM_BUFFER_SIZE);
        let mut slices: [_; MAX_MESSAGES] = array::from_fn(|_| IoSliceMut::new(buffers.next().unwrap_or_default()));
        let slices = slices.get_mut(..max.min(MAX_MESSAGES)).unwrap_or_default();
        self.message_count = quinn.recv(socket.into(), slices, &mut self.metas)?;
        Ok(())
    }
}

/// Datagrams for one call with GSO: of one peer, with one header, and as long as the first; the last may be shorter.
pub(crate) struct GsoBatch<'a> {
    peer: Option<SocketAddr>,
    /// The datagrams, each with the header. In an empty batch, only the header.
    bytes: &'a mut Vec<u8>,
    header_len: usize,
    pub(super) count: usize,
    /// Length of each datagram but the last one, including the header.
    pub(super) segment_len: usize,
}

impl<'a> GsoBatch<'a> {
    /// Returns an empty batch without a peer, which uses the buffer.
    pub(crate) fn new(bytes: &'a mut Vec<u8>) -> Self {
        bytes.clear();
        Self { peer: None, bytes, header_len: 0, count: 0, segment_len: 0 }
    }

    pub(crate) fn peer(&self) -> Option<SocketAddr> {
        self.peer
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub(crate) fn has_payload(&self) -> bool {
        !self.is_empty() && self.segment_len > self.header_len
    }

    /// Sets the peer and the header of an empty batch. `write_header` appends to the buffer.
    pub(crate) fn begin(&mut self, peer: SocketAddr, write_header: impl FnOnce(&mut Vec<u8>)) {
        self.peer = Some(peer);
        self.bytes.clear();
        write_header(self.bytes);
        self.header_len = self.bytes.len();
    }

    pub(crate) fn header_len(&self) -> usize {
        self.header_len
    }

    /// Appends a datagram. Returns false if it does not fit; an empty batch accepts any datagram.
    pub(crate) fn push(&mut self, payload: &[u8]) -> bool {
        let len = self.header_len + payload.len();
        if self.is_empty() {
            self.segment_len = len;
        } else if self.fits(len) {
            self.bytes.extend_from_within(..self.header_len);
        } else {
            return false;
        }
        self.bytes.extend_from_slice(payload);
        self.count += 1;
        true
    }

    fn fits(&self, len: usize) -> bool {
        let is_uniform = self.bytes.len() == self.count * self.segment_len;
        // The kernel would not send an empty last segment.
        is_uniform
            && (1..=self.segment_len).contains(&len)
            && self.bytes.len() + len <= MAX_GSO_BYTES
            && self.count < MAX_SEGMENTS
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes
    }

    pub(super) fn datagrams(&self) -> impl Iterator<Item = &[u8]> {
        split(self.bytes, self.segment_len).take(self.count)
    }

    pub(crate) fn clear(&mut self) {
        self.bytes.truncate(self.header_len);
        self.count = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gso_batch_is_full_at_a_longer_datagram_after_a_shorter_one_and_at_the_limits() {
        let batches = |lengths: &[usize], header: usize| {
            let mut buffer = Vec::new();
            let (mut batch, mut counts) = (GsoBatch::new(&mut buffer), Vec::new());
            batch.begin(([127, 0, 0, 1], 9).into(), |buffer| buffer.resize(header, 0));
            for length in lengths {
                if !batch.push(&vec![0; *length]) {
                    counts.push(batch.count);
                    batch.clear();
                    assert!(batch.push(&vec![0; *length]), "everything fits into an empty batch");
                }
            }
            [counts, vec![batch.count]].concat()
        };
        assert_eq!(batches(&[5, 5, 5], 0), [3]);
        assert_eq!(batches(&[5, 5, 4, 4], 0), [3, 1], "nothing fits after a shorter one");
        assert_eq!(batches(&[5, 6, 6], 0), [1, 2], "a longer one does not fit");
        assert_eq!(batches(&[5, 0, 0, 5], 0), [1, 1, 1, 1], "an empty one is sent alone");
        assert_eq!(batches(&[5, 0, 0, 0], 10), [2, 2], "with a header it is not empty");
        assert_eq!(batches(&[1; 130], 0), [64, 64, 2]);
        assert_eq!(batches(&[21_835; 4], 0), [3, 1], "65507 bytes at most");
        assert_eq!(batches(&[21_836; 4], 0), [2, 2]);
        assert_eq!(batches(&[21_830; 4], 10), [2, 2], "headers included");
    }
}
