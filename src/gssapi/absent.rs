//! Replacement for ffi.rs in builds without the `gssapi` feature: every call fails.

#![allow(missing_docs, reason = "the items are documented in ffi.rs")]

use std::fmt;
use std::path::Path;

const ABSENT: &str = "s5 was built without GSSAPI (rebuild with the feature gssapi)";

/// Always returns an error.
pub fn available() -> Result<(), String> {
    Err(ABSENT.into())
}

type Result<T, E = LibraryError> = std::result::Result<T, E>;

#[derive(Debug)]
pub struct LibraryError;

impl fmt::Display for LibraryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(ABSENT)
    }
}

/// Never constructed.
#[derive(Debug)]
pub enum Credential {}

impl Credential {
    pub fn acceptor(_: Option<&GssName>, _: Option<&Path>) -> Result<Self> {
        Err(LibraryError)
    }

    pub fn initiator(_: Option<&Path>) -> Result<Self> {
        Err(LibraryError)
    }
}

#[derive(Debug)]
pub struct GssName;

impl GssName {
    pub fn service(_: &str) -> Result<Self> {
        Err(LibraryError)
    }

    pub fn principal(_: &str) -> Result<Self> {
        Err(LibraryError)
    }
}

#[derive(Clone, Copy, Debug)]
pub struct RequestedFlags {
    pub sequence: bool,
    pub confidentiality: bool,
}

#[derive(Debug, Default)]
pub struct ContextFlags {
    pub mutual: bool,
    pub replay: bool,
    pub sequence: bool,
    pub confidentiality: bool,
    pub integrity: bool,
    pub anonymous: bool,
}

#[derive(Debug)]
pub struct ContextStep {
    pub output: Vec<u8>,
    pub is_complete: bool,
}

#[derive(Debug)]
pub enum SequenceStatus {
    InOrder,
    Gap,
    Unsequenced,
    Duplicate,
    Old,
}

#[derive(Debug)]
pub struct Unwrapped {
    pub data: Vec<u8>,
    pub is_encrypted: bool,
    pub order: SequenceStatus,
}

#[derive(Debug, Default)]
pub struct GssContext(());

impl GssContext {
    pub fn accept(&mut self, _: &Credential, _: &[u8]) -> Result<ContextStep> {
        Err(LibraryError)
    }

    pub fn init(&mut self, _: &Credential, _: &GssName, _: RequestedFlags, _: Option<&[u8]>) -> Result<ContextStep> {
        Err(LibraryError)
    }

    pub fn flags(&self) -> ContextFlags {
        ContextFlags::default()
    }

    pub fn initiator_name(&self) -> Option<&[u8]> {
        None
    }

    pub fn wrap(&mut self, _: &[u8], _: bool) -> Result<Vec<u8>> {
        Err(LibraryError)
    }

    pub fn unwrap(&mut self, _: &mut [u8]) -> Result<Unwrapped> {
        Err(LibraryError)
    }

    pub fn wrap_size_limit(&self, _: bool) -> Result<usize> {
        Err(LibraryError)
    }
}
