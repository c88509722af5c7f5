//! Files that s5 writes at a path that the user has chosen.
//!
//! In a directory where all users can create files, such as /tmp, symbolic links of other users are not followed: they
//! could lead to any file of the user. The kernel refuses that only if fs.protected_symlinks of proc(5) is set.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, OFlags, access};
use rustix::io::Errno;
use rustix::process::geteuid;

/// Mode of a directory with restricted deletion in which all users can create files.
const STICKY_AND_WRITABLE: u32 = 0o1002;
/// Maximum number of symbolic links in a path, as in path_resolution(7).
const MAX_LINKS: usize = 40;
/// The links of open files, which are not paths.
const PROC: &str = "/proc";

/// Returns the path without symbolic links. The file need not exist.
///
/// # Errors
/// A link of another user in a directory where all users can create links.
pub(crate) fn resolve_links(path: &Path) -> io::Result<PathBuf> {
    let reversed = |path: &Path| path.components().rev().map(|part| part.as_os_str().into()).collect::<Vec<OsString>>();
    let (mut parts, mut resolved, mut links) = (reversed(path), PathBuf::new(), 0);
    while let Some(part) = parts.pop() {
        let next = resolved.join(part);
        match fs::symlink_metadata(&next) {
            Ok(link) if link.is_symlink() && !resolved.starts_with(PROC) => {
                let directory = fs::metadata(directory(&next))?;
                let is_shared = directory.mode() & STICKY_AND_WRITABLE == STICKY_AND_WRITABLE;
                if is_shared && ![geteuid().as_raw(), directory.uid()].contains(&link.uid()) {
                    return Err(io::Error::other(format!("{} is a symbolic link of another user", next.display())));
                }
                links += 1;
                if links > MAX_LINKS {
                    return Err(Errno::LOOP.into());
                }
                parts.extend(reversed(&fs::read_link(&next)?));
            }
            _ => resolved = next,
        }
    }
    Ok(resolved)
}

/// Opens a file for writing, with O_NONBLOCK: s5 does not wait for the reader of a named pipe.
///
/// # Errors
/// Those of [`resolve_links`] and open(2). ENXIO: a named pipe has no reader.
pub(crate) fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    let path = resolve_links(path)?;
    let flags = if path.starts_with(PROC) { OFlags::NONBLOCK } else { OFlags::NONBLOCK | OFlags::NOFOLLOW };
    let flags = i32::try_from(flags.bits()).unwrap_or_default();
    options.custom_flags(flags).open(path)
}

/// Opens a file to append to it. Creates it if it is missing, with mode 640 without the bits of the umask.
pub(crate) fn append(path: &Path) -> io::Result<File> {
    open(path, OpenOptions::new().append(true).create(true).mode(0o640))
}

/// Returns the error of [`append`], but creates no file.
pub(crate) fn check_append(path: &Path) -> io::Result<()> {
    let (path, create) = (resolve_links(path)?, Access::WRITE_OK | Access::EXEC_OK);
    if path.try_exists()? { append(&path).map(drop) } else { Ok(access(directory(&path), create)?) }
}

/// Replaces the file at a path without symbolic links atomically: a reader sees all of the new file or nothing. `write`
/// writes the new file, whose mode is `mode` without the bits of the umask.
pub(crate) fn replace(path: &Path, mode: u32, write: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    let directory = directory(path);
    let created = tempfile::Builder::new().permissions(Permissions::from_mode(mode)).tempfile_in(directory);
    let mut new = created.map_err(|error| {
        // The error itself would name the temporary file, which the user does not know.
        let (is_missing, directory) = (!directory.exists(), directory.display());
        io::Error::other(match is_missing {
            true => format!("directory {directory} does not exist (create it: mkdir -p {directory})"),
            false => format!("create a file in {directory}: {}", error.kind()),
        })
    })?;
    write(new.as_file_mut())?;
    Ok(new.persist(path).map(drop)?)
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|directory| !directory.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
