//! The content of bulk streams: blocks with their number and a flag for the last one. A receiver that does not know the
//! length detects missing, duplicate and displaced blocks.

use std::io::{IoSlice, Read, Write};
use std::sync::OnceLock;

use crate::*;

/// Bytes of a block. Each block is written and read with one call.
pub const BLOCK: usize = 256 * 1024;
const HEADER_LEN: usize = 16;
/// Bytes compared at each end of the data of one read, unless all data is compared.
const SAMPLE_LEN: usize = 32;

/// Returns two blocks of pseudo-random bytes.
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

/// Returns the content of a block. Its first bytes are replaced by the header.
fn block(number: u64) -> &'static [u8] {
    let from = (number.wrapping_mul(7919) % BLOCK as u64) as usize;
    &noise()[from..from + BLOCK]
}

/// Limit for sending: a time or a number of bytes, whichever is reached first.
#[derive(Clone, Copy, Debug)]
pub struct TransferLimit {
    pub time: Duration,
    pub bytes: u64,
}

impl TransferLimit {
    pub fn for_time(time: Duration) -> Self {
        Self { time, bytes: u64::MAX }
    }

    pub fn for_bytes(bytes: u64) -> Self {
        Self { time: Duration::from_secs(60), bytes }
    }
}

/// Sends blocks. Returns the number of bytes.
pub fn send(mut stream: impl Write, limit: TransferLimit) -> io::Result<u64> {
    let started = Instant::now();
    for number in 0.. {
        let sent = (number + 1) * BLOCK as u64;
        let last = sent >= limit.bytes || started.elapsed() >= limit.time;
        let mut header = [0; HEADER_LEN];
        header[..8].copy_from_slice(&number.to_le_bytes());
        header[8..].copy_from_slice(&u64::from(last).to_le_bytes());
        let (body, mut at) = (block(number), 0);
        while at < BLOCK {
            let wrote = match at < HEADER_LEN {
                true => stream.write_vectored(&[IoSlice::new(&header[at..]), IoSlice::new(&body[HEADER_LEN..])])?,
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

/// Verifies a received stream.
pub struct StreamVerifier {
    position: u64,
    header: [u8; HEADER_LEN],
    compare_all: bool,
    has_last_block: bool,
}

impl StreamVerifier {
    /// With `compare_all` compares each byte, otherwise counts, headers and samples.
    pub fn new(compare_all: bool) -> Self {
        Self { position: 0, header: [0; HEADER_LEN], compare_all, has_last_block: false }
    }

    pub fn push(&mut self, mut chunk: &[u8]) -> Result<(), String> {
        while !chunk.is_empty() {
            let (number, from) = (self.position / BLOCK as u64, (self.position % BLOCK as u64) as usize);
            if self.has_last_block && from == 0 {
                return Err(format!("data after the last block, {}", number - 1));
            }
            let piece;
            if from < HEADER_LEN {
                (piece, chunk) = chunk.split_at(chunk.len().min(HEADER_LEN - from));
                self.header[from..from + piece.len()].copy_from_slice(piece);
                if from + piece.len() == HEADER_LEN {
                    self.check_header(number)?;
                }
            } else {
                (piece, chunk) = chunk.split_at(chunk.len().min(BLOCK - from));
                self.compare(piece, &block(number)[from..from + piece.len()])?;
            }
            self.position += piece.len() as u64;
        }
        Ok(())
    }

    fn check_header(&mut self, number: u64) -> Result<(), String> {
        let (number_bytes, last) = self.header.split_at(8);
        self.has_last_block = last[0] == 1;
        match number_bytes == number.to_le_bytes() && (self.has_last_block || last == [0; 8]) {
            true => Ok(()),
            false => Err(format!("block {number} has the header of another block")),
        }
    }

    fn compare(&self, got: &[u8], want: &[u8]) -> Result<(), String> {
        let (first, last) = (got.len().min(SAMPLE_LEN), got.len().saturating_sub(SAMPLE_LEN));
        let same = match self.compare_all {
            true => got == want,
            false => got[..first] == want[..first] && got[last..] == want[last..],
        };
        same.then_some(()).ok_or_else(|| format!("bytes differ at or after offset {}", self.position))
    }

    /// Returns the number of bytes once the last block is complete.
    pub fn total_if_complete(&self) -> Option<u64> {
        (self.has_last_block && self.position.is_multiple_of(BLOCK as u64)).then_some(self.position)
    }
}

/// Receives blocks up to the last one. Returns the number of bytes.
pub fn receive(mut stream: impl Read, compare_all: bool) -> Result<u64, BenchError> {
    let mut buffer = vec![0; BLOCK];
    let mut verifier = StreamVerifier::new(compare_all);
    loop {
        let got = stream.read(&mut buffer)?;
        if got == 0 {
            return Err(corrupt(format!("the stream ended after {} bytes", verifier.position)));
        }
        verifier.push(&buffer[..got]).map_err(corrupt)?;
        if let Some(bytes) = verifier.total_if_complete() {
            return Ok(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent() -> Vec<u8> {
        let mut stream = Vec::new();
        send(&mut stream, TransferLimit::for_bytes(3 * BLOCK as u64)).expect("written to memory");
        stream
    }

    #[test]
    fn verifier_accepts_a_stream_in_pieces_of_any_size() {
        let mut verifier = StreamVerifier::new(true);
        for piece in sent().chunks(1000) {
            assert_eq!(verifier.push(piece), Ok(()));
        }
        assert_eq!(verifier.total_if_complete(), Some(3 * BLOCK as u64));
    }

    #[test]
    fn verifier_detects_changed_missing_duplicate_and_truncated_data() {
        let is_detected = |change: fn(&mut Vec<u8>), compare_all| {
            let mut stream = sent();
            change(&mut stream);
            receive(stream.as_slice(), compare_all).is_err()
        };
        assert!(is_detected(|stream| stream[BLOCK + 99_999] ^= 1, true));
        for compare_all in [true, false] {
            assert!(is_detected(|stream| drop(stream.drain(BLOCK..2 * BLOCK)), compare_all));
            assert!(is_detected(|stream| *stream = [&stream[..BLOCK], stream].concat(), compare_all));
            assert!(is_detected(|stream| stream.truncate(3 * BLOCK - 1), compare_all));
            assert!(is_detected(|stream| drop(stream.drain(5000..5001)), compare_all));
        }
    }
}
