//! Descriptors that the shell has opened for us, as in `fd:3`; and pipes with a name that are opened without waiting for
//! their other end.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use filedescriptor::FileDescriptor;
use rustix::fs::OFlags;

/// Opens a pipe, non-blocking, for what is to be done with it.
///
/// # Errors
/// Those of open(2): ENXIO, when it is to be written and nobody reads.
pub(in crate::cmd) fn open_fifo(path: &Path, writes: bool) -> io::Result<File> {
    let flag = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
    OpenOptions::new().read(!writes).write(writes).custom_flags(flag).open(path)
}

/// The number behind `fd:`; `None` for the name of a file.
pub(in crate::cmd) fn fd_number(text: &str) -> Option<&str> {
    text.strip_prefix("fd:")
}

/// Takes descriptor `number` over: under its own number it is closed, so that its other end sees when we are done.
///
/// # Errors
/// It is not open, or one of the standard three.
pub(in crate::cmd) fn take_fd(number: &str) -> io::Result<FileDescriptor> {
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what);
    let n: i32 = number.parse().map_err(|_| invalid("not the number of a descriptor"))?;
    if n < 3 {
        return Err(invalid("0, 1 and 2 are stdin, stdout and stderr"));
    }
    let taken = FileDescriptor::dup(&n).map_err(|_| io::Error::last_os_error())?;
    #[cfg(target_os = "linux")]
    nix::unistd::close(n)?;
    Ok(taken)
}
