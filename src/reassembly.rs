//! Reassembly of fragmented datagrams (RFC 1928 section 7): one queue, one timer, the clock an argument.
//!
//! It holds one sequence, that of an association's one client. Fragments count only in their order: the RFC empties
//! the queue at a FRAG lower than the highest one seen, so what arrives late can never be filled in.

use std::borrow::Cow;
use std::time::{Duration, Instant};

use crate::proto::{Addr, Datagram, MAX_UDP6_PAYLOAD};

/// How long a sequence may take from its first fragment; section 7 wants no less than 5 seconds.
pub const REASSEMBLY_TIMEOUT: Duration = Duration::from_secs(6);

const END_FLAG: u8 = 0x80;

/// The queue of one association. Holds at most [`MAX_UDP6_PAYLOAD`] octets, and none between sequences.
#[derive(Debug, Default)]
pub struct Reassembler {
    sequence: Option<Sequence>,
    /// How many sequences have lost a fragment for good.
    lost_count: u64,
    /// What still comes of such a one is no further loss.
    has_counted_loss: bool,
}

#[derive(Debug)]
struct Sequence {
    started: Instant,
    dst: Addr,
    /// The position of the last fragment that was taken.
    last_position: u8,
    /// Where its octets begin in `data`.
    last_start: usize,
    data: Vec<u8>,
}

impl Reassembler {
    /// Takes a datagram, alone or a fragment, and gives one when one is whole. `None`: kept, or dropped in silence.
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

    /// Empties the queue when its timer has ended; for whoever wants the memory back before the next datagram.
    pub fn expire(&mut self, now: Instant) {
        if self.deadline().is_some_and(|deadline| now >= deadline) {
            self.discard(false);
        }
    }

    /// Empties the queue. A fragment that belongs to no sequence is of one whose beginning was lost.
    fn discard(&mut self, is_stray: bool) {
        if self.sequence.take().is_some() || is_stray && !self.has_counted_loss {
            self.lost_count += 1;
            self.has_counted_loss = true;
        }
    }

    /// How many datagrams are lost for want of a fragment, the one under way included when its time is over.
    pub fn lost_count(&self, now: Instant) -> u64 {
        self.lost_count + u64::from(self.deadline().is_some_and(|deadline| now >= deadline))
    }

    /// When [`Reassembler::expire`] will have something to do.
    pub fn deadline(&self) -> Option<Instant> {
        Some(self.sequence.as_ref()?.started + REASSEMBLY_TIMEOUT)
    }
}

impl Sequence {
    fn start(now: Instant, datagram: &Datagram<'_>) -> Self {
        Self { started: now, dst: datagram.dst.clone(), last_position: 1, last_start: 0, data: datagram.data.to_vec() }
    }

    fn is_continued_by(&self, position: u8, datagram: &Datagram<'_>) -> bool {
        position == self.last_position.saturating_add(1) && datagram.dst == self.dst
    }

    /// UDP may deliver a datagram twice; the second one is neither new nor lower.
    fn is_repeated_by(&self, position: u8, datagram: &Datagram<'_>) -> bool {
        position == self.last_position
            && datagram.dst == self.dst
            && self.data.get(self.last_start..).is_some_and(|tail| tail == datagram.data)
    }

    fn append(&mut self, position: u8, data: &[u8]) {
        self.last_position = position;
        self.last_start = self.data.len();
        self.data.extend(data);
    }
}

/// Splits a payload that does not fit into one datagram of `limit` octets, header included, into fragments that do.
/// A payload that fits is sent alone. `None` when even 127 fragments would not do, or not even a header fits.
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
