//! What stands for the library in a program that was built without GSSAPI: there is never a credential, and so nothing
//! that could be done with one.

#![allow(missing_docs, reason = "the same as in ffi.rs, and of no use")]

use std::fmt;
use std::path::Path;

const ABSENT: &str = "this s5 was built without GSSAPI";

/// Always says no.
pub fn available() -> Result<(), String> {
    Err(ABSENT.into())
}

#[derive(Debug)]
pub struct Error;

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(ABSENT)
    }
}

/// Never made.
#[derive(Debug)]
pub enum Credential {}

impl Credential {
    pub fn acceptor(_: Option<&Name>, _: Option<&Path>) -> Result<Self, Error> {
        Err(Error)
    }

    pub fn initiator(_: Option<&Path>) -> Result<Self, Error> {
        Err(Error)
    }
}

#[derive(Debug)]
pub struct Name;

impl Name {
    pub fn service(_: &str) -> Result<Self, Error> {
        Err(Error)
    }

    pub fn principal(_: &str) -> Result<Self, Error> {
        Err(Error)
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Wants {
    pub sequence: bool,
    pub confidentiality: bool,
}

#[derive(Debug, Default)]
pub struct Flags {
    pub mutual: bool,
    pub replay: bool,
    pub sequence: bool,
    pub confidentiality: bool,
    pub integrity: bool,
    pub anonymous: bool,
}

#[derive(Debug)]
pub struct Step {
    pub output: Vec<u8>,
    pub is_complete: bool,
}

#[derive(Debug)]
pub enum Order {
    InOrder,
    Gap,
    Unsequenced,
    Duplicate,
    Old,
}

#[derive(Debug)]
pub struct Unwrapped {
    pub data: Vec<u8>,
    pub is_sealed: bool,
    pub order: Order,
}

#[derive(Debug, Default)]
pub struct Context(());

impl Context {
    pub fn accept(&mut self, _: &Credential, _: &[u8]) -> Result<Step, Error> {
        Err(Error)
    }

    pub fn init(&mut self, _: &Credential, _: &Name, _: Wants, _: Option<&[u8]>) -> Result<Step, Error> {
        Err(Error)
    }

    pub fn flags(&self) -> Flags {
        Flags::default()
    }

    pub fn peer(&self) -> Option<&[u8]> {
        None
    }

    pub fn wrap(&mut self, _: &[u8], _: bool) -> Result<Vec<u8>, Error> {
        Err(Error)
    }

    pub fn unwrap(&mut self, _: &mut [u8]) -> Result<Unwrapped, Error> {
        Err(Error)
    }

    pub fn capacity(&self, _: bool) -> Result<usize, Error> {
        Err(Error)
    }
}
