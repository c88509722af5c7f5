//! Stub for systems without splice(2): opening a pipe always fails.

use std::convert::Infallible;
use std::io;
use std::os::fd::BorrowedFd;

pub(super) struct Pipe(Infallible);

pub(super) fn is_unsupported(_: &io::Error) -> bool {
    false
}

impl Pipe {
    pub(super) fn open(_: usize) -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(super) fn is_empty(&self) -> bool {
        match self.0 {}
    }

    pub(super) fn has_progressed(&mut self, _: u64) -> bool {
        match self.0 {}
    }

    pub(super) fn fill_from(&mut self, _: BorrowedFd<'_>) -> io::Result<usize> {
        match self.0 {}
    }

    pub(super) fn drain_to(&mut self, _: BorrowedFd<'_>) -> io::Result<usize> {
        match self.0 {}
    }

    pub(super) fn take_all(&mut self) -> io::Result<Vec<u8>> {
        match self.0 {}
    }
}
