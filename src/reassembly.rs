//! Reassembly of fragmented datagrams (RFC 1928 section 7): one queue and one timer. Time is an argument.
//!
//! An association has one client, so the queue holds one sequence. Fragments must arrive in order: the RFC empties the
//! queue at a FRAG lower than the highest one seen. So a late fragment can't complete a datagram.

#![deny(clippy::disallowed_types, clippy::disallowed_methods)]

use std::borrow::Cow;
use std::time::{Duration, Instant};

use crate::proto::{Addr, Datagram, MAX_UDP6_PAYLOAD};

/// Time from the first fragment of a sequence to its last. RFC 1928 section 7 requires at least 5 s.
pub const REASSEMBLY_TIMEOUT: Duration = Duration::from_secs(6);

/// Bit of FRAG that marks the last fragment.
const END_FLAG: u8 = 0x80;

/// The reassembly queue of one association. Holds at most [`MAX_UDP6_PAYLOAD`] bytes; empty between sequences.
#[derive(Debug, Default)]
pub struct Reassembler {
    sequence: Option<Sequence>,
    /// Number of datagrams that were not completed, and of those that `take_lost` has returned.
    lost_count: u64,
    taken_count: u64,
    /// Set if further fragments belong to a datagram that is already counted as lost.
    has_counted_loss: bool,
}

#[derive(Debug)]
struct Sequence {
    started: Instant,
    dst: Addr,
    /// FRAG of the last fragment in `data`, without [`END_FLAG`].
    last_position: u8,
    /// Offset of the last fragment in `data`, in bytes.
    last_offset: usize,
    data: Vec<u8>,
}

impl Reassembler {
    /// Adds a datagram or a fragment. Returns a datagram when it is complete, `None` when the fragment was stored or
    /// dropped.
    pub fn push<'a>(&mut self, now: Instant, datagram: Datagram<'a>) -> Option<(Addr, Cow<'a, [u8]>)> {
        self.expire(now);
        let position = datagram.frag & !END_FLAG;
        match &mut self.sequence {
            Some(sequence) if sequence.is_repeated_by(position, &datagram) => return None,
            Some(sequence) if sequence.is_continued_by(position, &datagram) => sequence.append(position, datagram.data),
            _ if position == 1 => {
                self.discard(false);
                self.sequence = Some(Sequence::start(now, &datagram));
                self.has_counted_loss = false;
            }
            _ => {
                self.discard(datagram.frag != 0);
                self.has_counted_loss &= datagram.frag & END_FLAG == 0;
            }
        }
        if datagram.frag == 0 {
            return Some((datagram.dst, datagram.data.into()));
        }
        if self.sequence.as_ref().is_some_and(|sequence| sequence.data.len() > MAX_UDP6_PAYLOAD) {
            self.discard(false);
        }
        if datagram.frag & END_FLAG == 0 {
            return None;
        }
        self.sequence.take().map(|sequence| (sequence.dst, sequence.data.into()))
    }

    /// Empties the queue if its timer has expired. Called at [`deadline`](Self::deadline), it frees memory early.
    pub fn expire(&mut self, now: Instant) {
        if self.deadline().is_some_and(|deadline| now >= deadline) {
            self.discard(false);
        }
    }

    /// Empties the queue and counts the loss. `is_stray`: a fragment arrived without the ones before it.
    fn discard(&mut self, is_stray: bool) {
        if self.sequence.take().is_some() || is_stray && !self.has_counted_loss {
            self.lost_count += 1;
            self.has_counted_loss = true;
        }
    }

    /// Returns the number of fragmented datagrams that were lost, including the one in the queue. Call it at the end.
    pub fn lost_count(&self) -> u64 {
        self.lost_count + u64::from(self.sequence.is_some())
    }

    /// Returns the number of losses since the last call.
    pub fn take_lost(&mut self) -> u64 {
        let new = self.lost_count - self.taken_count;
        self.taken_count = self.lost_count;
        new
    }

    /// Returns the time at which [`Reassembler::expire`] empties the queue; `None` if the queue is empty.
    pub fn deadline(&self) -> Option<Instant> {
        Some(self.sequence.as_ref()?.started + REASSEMBLY_TIMEOUT)
    }
}

impl Sequence {
    fn start(now: Instant, datagram: &Datagram<'_>) -> Self {
        Self { started: now, dst: datagram.dst.clone(), last_position: 1, last_offset: 0, data: datagram.data.to_vec() }
    }

    fn is_continued_by(&self, position: u8, datagram: &Datagram<'_>) -> bool {
        position == self.last_position.saturating_add(1) && datagram.dst == self.dst
    }

    /// Detects a duplicate of the last fragment: the network can duplicate datagrams.
    fn is_repeated_by(&self, position: u8, datagram: &Datagram<'_>) -> bool {
        position == self.last_position
            && datagram.dst == self.dst
            && self.data.get(self.last_offset..).is_some_and(|tail| tail == datagram.data)
    }

    fn append(&mut self, position: u8, data: &[u8]) {
        self.last_position = position;
        self.last_offset = self.data.len();
        self.data.extend(data);
    }
}

/// Encodes a payload as datagrams of at most `limit` bytes each, header included: one with FRAG 0 if it fits, else
/// fragments. Returns `None` if more than 127 fragments are needed or the header does not fit.
pub fn fragment(dst: &Addr, data: &[u8], limit: usize) -> Option<Vec<Vec<u8>>> {
    let encode = |frag, data| {
        let mut out = Vec::new();
        Datagram { frag, dst: dst.clone(), data }.encode_into(&mut out);
        out
    };
    let max_data = limit.checked_sub(encode(0, &[]).len())?;
    if data.len() <= max_data {
        return Some(vec![encode(0, data)]);
    }
    let chunks = data.chunks(max_data.max(1));
    let count = u8::try_from(chunks.len()).ok().filter(|count| *count < END_FLAG && max_data > 0)?;
    let frags = (1..count).chain([count | END_FLAG]);
    Some(frags.zip(chunks).map(|(frag, chunk)| encode(frag, chunk)).collect())
}
