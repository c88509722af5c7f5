//! Reads text files that the user has written.

use std::fs::File;
use std::io::{self, Read as _};

const UTF8_BOM: &[u8] = b"\xef\xbb\xbf";

/// Reads a text of at most `max` bytes to its end. Skips a byte order mark, as editors on Windows write it.
///
/// # Errors
/// Those of read(2), a longer text, and UTF-16.
pub(crate) fn read(file: File, max: u64) -> io::Result<Vec<u8>> {
    let len = file.metadata().map_or(0, |metadata| metadata.len().min(max));
    let mut text = Vec::with_capacity(usize::try_from(len).unwrap_or_default());
    file.take(max + 1).read_to_end(&mut text)?;
    if text.len() as u64 > max {
        return Err(io::Error::other(format!("too large (the limit is {} MiB)", max >> 20)));
    }
    if text.starts_with(b"\xff\xfe") || text.starts_with(b"\xfe\xff") {
        return Err(io::Error::other("the text is UTF-16 (save it as UTF-8)"));
    }
    skip_bom(&mut text);
    Ok(text)
}

pub(crate) fn skip_bom(text: &mut Vec<u8>) {
    if text.starts_with(UTF8_BOM) {
        text.drain(..UTF8_BOM.len());
    }
}
