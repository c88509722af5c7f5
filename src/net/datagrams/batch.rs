//! The datagrams of one receive or send call.

use std::net::SocketAddr;

use nix::cmsg_space;
use quinn_udp::RecvMeta;

/// Size of a buffer for any UDP datagram or GRO aggregate, in bytes. None is larger, so none is truncated.
pub const DATAGRAM_BUFFER_SIZE: usize = 65_536;
/// Maximum number of messages per receive call. Each is a datagram or a GRO aggregate.
pub(super) const MAX_MESSAGES: usize = 32;
/// Maximum number of datagrams per send call: UDP_MAX_SEGMENTS of the oldest kernels with GSO.
pub(super) const MAX_SEGMENTS: usize = 64;
/// Maximum number of bytes per send call. Until the kernel segments it, a batch is one IPv4 packet with a UDP header.
const MAX_GSO_BYTES: usize = 65_535 - 20 - 8;

/// Buffers for one receive call, and the messages that it has received.
pub(crate) struct RecvBatch {
    // Lazily zeroed by the kernel. Most of the 2 MiB is never touched.
    pub(super) buffers: Vec<u8>,
    pub(super) messages: Vec<RecvMessage>,
    pub(super) metas: Vec<RecvMeta>,
    /// Control data of a single message.
    pub(super) control: Vec<u8>,
}

/// A datagram, or a GRO aggregate: datagrams of one sender with the same length, of which the last may be shorter.
#[derive(Clone, Copy)]
pub(super) struct RecvMessage {
    pub(super) from: SocketAddr,
    /// All bytes of the message.
    pub(super) len: usize,
    /// Bytes of each datagram.
    pub(super) segment_len: usize,
}

impl Default for RecvBatch {
    fn default() -> Self {
        Self {
            buffers: vec![0; MAX_MESSAGES * DATAGRAM_BUFFER_SIZE],
            messages: Vec::with_capacity(MAX_MESSAGES),
            metas: vec![RecvMeta::default(); MAX_MESSAGES],
            control: cmsg_space!(i32),
        }
    }
}

impl RecvBatch {
    /// Returns the datagrams with their senders, in the order of arrival.
    pub(crate) fn datagrams(&self) -> impl Iterator<Item = (SocketAddr, &[u8])> {
        self.messages.iter().zip(self.buffers.chunks(DATAGRAM_BUFFER_SIZE)).flat_map(|(message, buffer)| {
            let bytes = buffer.get(..message.len).unwrap_or_default();
            // An empty message is one datagram.
            let empty = bytes.is_empty().then_some(bytes);
            bytes.chunks(message.segment_len.max(1)).chain(empty).map(|datagram| (message.from, datagram))
        })
    }

    pub(crate) fn count(&self) -> usize {
        self.messages.iter().map(|message| message.len.div_ceil(message.segment_len.max(1)).max(1)).sum()
    }
}

/// Datagrams that one call can send with GSO. All are to or from one peer, have the same header, and are as long as the
/// first one; the last may be shorter.
pub(crate) struct GsoBatch<'a> {
    peer: Option<SocketAddr>,
    pub(super) header: &'a mut Vec<u8>,
    pub(super) payloads: [&'a [u8]; MAX_SEGMENTS],
    pub(super) count: usize,
    /// Bytes including headers.
    pub(super) len: usize,
}

impl<'a> GsoBatch<'a> {
    /// Returns an empty batch. `header` is the buffer for the header.
    pub(crate) fn new(header: &'a mut Vec<u8>) -> Self {
        header.clear();
        Self { peer: None, header, payloads: [&[]; MAX_SEGMENTS], count: 0, len: 0 }
    }

    pub(crate) fn peer(&self) -> Option<SocketAddr> {
        self.peer
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Sets the peer and the header of an empty batch. `write_header` appends to the buffer.
    pub(crate) fn begin(&mut self, peer: SocketAddr, write_header: impl FnOnce(&mut Vec<u8>)) {
        self.peer = Some(peer);
        self.header.clear();
        write_header(self.header);
    }

    pub(crate) fn header_len(&self) -> usize {
        self.header.len()
    }

    /// Appends a datagram. Returns false if it does not fit; an empty batch takes any datagram.
    pub(crate) fn push(&mut self, payload: &'a [u8]) -> bool {
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
        // The kernel would not send an empty last segment.
        is_uniform && (1..=segment_len).contains(&len) && self.len + len <= MAX_GSO_BYTES && self.count < MAX_SEGMENTS
    }

    pub(super) fn payloads(&self) -> &[&'a [u8]] {
        self.payloads.get(..self.count).unwrap_or_default()
    }

    /// Returns the length of each datagram but the last one, including the header.
    pub(super) fn segment_len(&self) -> usize {
        self.header.len() + self.payloads().first().map_or(0, |payload| payload.len())
    }

    pub(crate) fn clear(&mut self) {
        self.count = 0;
        self.len = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gso_batch_is_full_at_a_longer_datagram_after_a_shorter_one_and_at_the_limits() {
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
