//! The content of bulk streams: blocks that say their number and whether they are the last, so that a receiver knows
//! that nothing is missing, doubled or displaced without being told how much there will be.

use std::io::{self, IoSlice, Read, Write};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::measure::{Fault, wrong};

/// What is written and read at once.
pub const BLOCK: usize = 256 * 1024;
const HEAD: usize = 16;
/// How much is compared at each end of what one read gave, when not all is.
const SAMPLE: usize = 32;

/// Octets without a pattern, twice as many as a block has.
pub fn noise() -> &'static [u8] {
    static NOISE: OnceLock<Vec<u8>> = OnceLock::new();
    NOISE.get_or_init(|| {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        };
        (0..2 * BLOCK).map(|_| next()).collect()
    })
}

/// The block of this number, but for its head.
fn block(number: u64) -> &'static [u8] {
    let from = (number.wrapping_mul(7919) % BLOCK as u64) as usize;
    &noise()[from..from + BLOCK]
}

/// How much to send: until the time is over or this many octets are sent, whichever is first.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub time: Duration,
    pub octets: u64,
}

impl Plan {
    pub fn for_time(time: Duration) -> Self {
        Self { time, octets: u64::MAX }
    }

    pub fn for_octets(octets: u64) -> Self {
        Self { time: Duration::from_secs(60), octets }
    }
}

/// Sends blocks; says how many octets they had.
pub fn send(mut stream: impl Write, plan: Plan) -> io::Result<u64> {
    let began = Instant::now();
    for number in 0.. {
        let sent = (number + 1) * BLOCK as u64;
        let last = sent >= plan.octets || began.elapsed() >= plan.time;
        let mut head = [0; HEAD];
        head[..8].copy_from_slice(&number.to_le_bytes());
        head[8..].copy_from_slice(&u64::from(last).to_le_bytes());
        let (body, mut at) = (block(number), 0);
        while at < BLOCK {
            let wrote = match at < HEAD {
                true => stream.write_vectored(&[IoSlice::new(&head[at..]), IoSlice::new(&body[HEAD..])])?,
                false => stream.write(&body[at..])?,
            };
            if wrote == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            at += wrote;
        }
        if last {
            return Ok(sent);
        }
    }
    Ok(0)
}

/// Looks at what is received.
pub struct Check {
    at: u64,
    head: [u8; HEAD],
    whole: bool,
    ended: bool,
}

impl Check {
    /// `whole` compares every octet, otherwise counts, heads and samples are compared.
    pub fn new(whole: bool) -> Self {
        Self { at: 0, head: [0; HEAD], whole, ended: false }
    }

    pub fn take(&mut self, mut chunk: &[u8]) -> Result<(), String> {
        while !chunk.is_empty() {
            let (number, from) = (self.at / BLOCK as u64, (self.at % BLOCK as u64) as usize);
            if self.ended && from == 0 {
                return Err(format!("more after the last block, {}", number - 1));
            }
            let piece;
            if from < HEAD {
                (piece, chunk) = chunk.split_at(chunk.len().min(HEAD - from));
                self.head[from..from + piece.len()].copy_from_slice(piece);
                if from + piece.len() == HEAD {
                    self.look_at_head(number)?;
                }
            } else {
                (piece, chunk) = chunk.split_at(chunk.len().min(BLOCK - from));
                self.compare(piece, &block(number)[from..from + piece.len()])?;
            }
            self.at += piece.len() as u64;
        }
        Ok(())
    }

    fn look_at_head(&mut self, number: u64) -> Result<(), String> {
        let (said, last) = self.head.split_at(8);
        self.ended = last[0] == 1;
        match said == number.to_le_bytes() && (self.ended || last == [0; 8]) {
            true => Ok(()),
            false => Err(format!("block {number} has another's head")),
        }
    }

    fn compare(&self, got: &[u8], want: &[u8]) -> Result<(), String> {
        let (first, last) = (got.len().min(SAMPLE), got.len().saturating_sub(SAMPLE));
        let same = match self.whole {
            true => got == want,
            false => got[..first] == want[..first] && got[last..] == want[last..],
        };
        same.then_some(()).ok_or_else(|| format!("octets differ after {}", self.at))
    }

    /// All octets, once the last block is complete.
    pub fn complete(&self) -> Option<u64> {
        (self.ended && self.at.is_multiple_of(BLOCK as u64)).then_some(self.at)
    }
}

/// Receives blocks up to the last one; says how many octets they had.
pub fn receive(mut stream: impl Read, whole: bool) -> Result<u64, Fault> {
    let mut buffer = vec![0; BLOCK];
    let mut check = Check::new(whole);
    loop {
        let got = stream.read(&mut buffer)?;
        if got == 0 {
            return Err(wrong(format!("the stream ended after {} octets", check.at)));
        }
        check.take(&buffer[..got]).map_err(wrong)?;
        if let Some(octets) = check.complete() {
            return Ok(octets);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent() -> Vec<u8> {
        let mut stream = Vec::new();
        send(&mut stream, Plan::for_octets(3 * BLOCK as u64)).expect("memory takes everything");
        stream
    }

    #[test]
    fn what_was_sent_is_right_whatever_the_pieces() {
        let mut check = Check::new(true);
        for piece in sent().chunks(1000) {
            assert_eq!(check.take(piece), Ok(()));
        }
        assert_eq!(check.complete(), Some(3 * BLOCK as u64));
    }

    #[test]
    fn an_octet_changed_a_block_missing_doubled_or_cut_is_noticed() {
        let wrong = |change: fn(&mut Vec<u8>), whole| {
            let mut stream = sent();
            change(&mut stream);
            receive(stream.as_slice(), whole).is_err()
        };
        assert!(wrong(|stream| stream[BLOCK + 99_999] ^= 1, true));
        for whole in [true, false] {
            assert!(wrong(|stream| drop(stream.drain(BLOCK..2 * BLOCK)), whole));
            assert!(wrong(|stream| *stream = [&stream[..BLOCK], stream].concat(), whole));
            assert!(wrong(|stream| stream.truncate(3 * BLOCK - 1), whole));
            assert!(wrong(|stream| drop(stream.drain(5000..5001)), whole));
        }
    }
}
