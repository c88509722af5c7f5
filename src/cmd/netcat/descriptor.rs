//! File descriptors inherited from the shell, as in `fd:3`.

use std::fs::File;
use std::io;

use rustix::fs::FileType;

use crate::net::take_descriptor;

/// Returns the number after `fd:`, or `None` for the name of a file.
pub(crate) fn fd_number(text: &str) -> Option<&str> {
    text.strip_prefix("fd:")
}

/// Duplicates descriptor `number`, and closes the original, so that dropping the result closes the file.
///
/// # Errors
/// The descriptor is not open, or is stdin, stdout or stderr.
pub(crate) fn take_fd(number: &str) -> io::Result<File> {
    let n: i32 = number.parse().map_err(|_| io::Error::other("not a file descriptor number"))?;
    if n < 3 {
        return Err(io::Error::other("0, 1 and 2 are stdin, stdout and stderr (use 3 or more)"));
    }
    Ok(take_descriptor(n)?.into())
}

/// Closes stdout: replaces it by a pipe, so that its number is not used for another file. /dev/null may be missing. If
/// stdin and stdout are the same socket, stdin keeps it open, so its write side is shut down.
pub(super) fn close_stdout() -> io::Result<()> {
    let (stdin, stdout) = (rustix::fs::fstat(io::stdin())?, rustix::fs::fstat(io::stdout())?);
    if FileType::from_raw_mode(stdout.st_mode).is_socket()
        && (stdin.st_dev, stdin.st_ino) == (stdout.st_dev, stdout.st_ino)
    {
        // A peer that has closed the socket does not need its end.
        let _ = rustix::net::shutdown(io::stdout(), rustix::net::Shutdown::Write);
    }
    Ok(rustix::stdio::dup2_stdout(io::pipe()?.0)?)
}
