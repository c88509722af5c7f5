//! Framings of datagrams in stdin and stdout: text lines, hexadecimal lines, length prefixes, or one datagram per read.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd as _;

use futures_lite::io::BufReader;
use futures_lite::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _};

use crate::cmd::cli::exit::{CliError, CliResult};
use crate::cmd::netcat::options::ClientArgs;
use crate::cmd::netcat::stdio::BlockingFile;
use crate::proto::MAX_UDP6_PAYLOAD;

/// Maximum length of a line of hexadecimal digits: two and a space for each byte of the largest datagram.
const MAX_HEX_LINE: usize = 3 * MAX_UDP6_PAYLOAD;

/// How datagrams are delimited in stdin and stdout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    /// Each line is a datagram, without the line end.
    Lines,
    /// The bytes of one read(2) are a datagram. Answers are written without delimiters.
    Raw,
    /// Each line is a datagram in hexadecimal digits.
    Hex,
    /// Each datagram follows its length, two bytes in network byte order.
    LengthPrefixed,
}

impl Framing {
    pub(super) fn from_args(args: &ClientArgs) -> CliResult<Self> {
        match (args.raw, args.hex, args.length_prefixed) {
            (false, false, false) => Ok(Self::Lines),
            (true, false, false) => Ok(Self::Raw),
            (false, true, false) => Ok(Self::Hex),
            (false, false, true) => Ok(Self::LengthPrefixed),
            _ => Err(CliError::usage("--raw, --hex and --length-prefixed cannot be combined")),
        }
    }
}

pub(super) struct DatagramReader {
    framing: Framing,
    stdin: BufReader<BlockingFile>,
}

impl DatagramReader {
    pub(super) fn new(framing: Framing) -> io::Result<Self> {
        Ok(Self { framing, stdin: BufReader::new(BlockingFile::new(io::stdin().as_fd().try_clone_to_owned()?)) })
    }

    /// Returns the next datagram; `None` at the end of stdin.
    pub(super) async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        let Self { framing, stdin } = self;
        match framing {
            Framing::Raw => read_raw(stdin.get_mut()).await,
            Framing::LengthPrefixed => read_length_prefixed(stdin).await,
            Framing::Lines => read_line(stdin, MAX_UDP6_PAYLOAD).await,
            Framing::Hex => read_line(stdin, MAX_HEX_LINE).await?.map(|digits| decode_hex(&digits)).transpose(),
        }
    }
}

/// Returns the bytes of one read(2), without a buffer in between.
async fn read_raw(stdin: &mut BlockingFile) -> io::Result<Option<Vec<u8>>> {
    let mut data = vec![0; MAX_UDP6_PAYLOAD];
    let n = stdin.read(&mut data).await?;
    data.truncate(n);
    Ok(Some(data).filter(|data| !data.is_empty()))
}

/// Returns a line without its end, or the first `max` + 2 bytes of a longer line.
async fn read_line(stdin: &mut BufReader<BlockingFile>, max: usize) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    // `max` bytes, the line end, and one more byte: sending a line that is too long then fails.
    if stdin.take(max as u64 + 2).read_until(b'\n', &mut line).await? == 0 {
        return Ok(None);
    }
    line.pop_if(|last| *last == b'\n');
    Ok(Some(line))
}

fn decode_hex(digits: &[u8]) -> io::Result<Vec<u8>> {
    let digits: Vec<u8> = digits.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect();
    hex::decode(digits).map_err(|error| io::Error::other(format!("not hexadecimal: {error}")))
}

async fn read_length_prefixed(stdin: &mut BufReader<BlockingFile>) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 2];
    if stdin.read(&mut length[..1]).await? == 0 {
        return Ok(None);
    }
    let mut read_frame = async || {
        stdin.read_exact(&mut length[1..]).await?;
        let mut data = vec![0; u16::from_be_bytes(length).into()];
        stdin.read_exact(&mut data).await?;
        Ok(Some(data))
    };
    read_frame().await.map_err(|error: io::Error| match error.kind() {
        io::ErrorKind::UnexpectedEof => io::Error::other("the input ends within a datagram"),
        _ => error,
    })
}

/// Writes answers to stdout on its own thread, so that a slow reader does not block sending and receiving.
pub(super) struct DatagramWriter {
    framing: Framing,
    /// `None`: answers are discarded.
    file: Option<BlockingFile>,
    /// Bytes to write. They survive a `flush` that is cancelled and called again.
    pending: VecDeque<u8>,
}

impl DatagramWriter {
    pub(super) fn new(framing: Framing, is_enabled: bool) -> io::Result<Self> {
        let stdout = is_enabled.then(|| io::stdout().as_fd().try_clone_to_owned()).transpose()?;
        Ok(Self { framing, file: stdout.map(BlockingFile::new), pending: VecDeque::new() })
    }

    pub(super) fn push(&mut self, answer: &[u8]) {
        match self.framing {
            _ if self.file.is_none() => {}
            Framing::Raw => self.pending.extend(answer),
            Framing::Lines => self.pending.extend(answer.iter().chain(b"\n")),
            Framing::Hex => self.pending.extend(hex::encode(answer).as_bytes().iter().chain(b"\n")),
            Framing::LengthPrefixed => {
                // No datagram is longer than 65,535 bytes.
                let length = u16::try_from(answer.len()).unwrap_or(u16::MAX);
                self.pending.extend(length.to_be_bytes().iter().chain(answer.iter().take(length.into())));
            }
        }
    }

    pub(super) async fn flush(&mut self) -> io::Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        while !self.pending.is_empty() {
            let n = file.write(self.pending.as_slices().0).await?;
            self.pending.drain(..n);
        }
        file.flush().await
    }
}
