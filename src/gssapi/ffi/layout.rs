//! The structures of GSSAPI in C, as Linux and the BSDs lay them out, and how octets become one.

use std::ffi::{c_char, c_void};
use std::marker::PhantomData;
use std::ptr::null_mut;

/// Octets that are lent to the library, or that it owns.
#[repr(C)]
pub(super) struct Octets<'a> {
    pub(super) length: usize,
    pub(super) value: *mut c_void,
    lent: PhantomData<&'a [u8]>,
}

impl<'a> Octets<'a> {
    pub(super) const NONE: Self = Self { length: 0, value: null_mut(), lent: PhantomData };

    /// For what the library only reads.
    pub(super) fn of(octets: &'a [u8]) -> Self {
        Self { length: octets.len(), value: octets.as_ptr().cast_mut().cast(), lent: PhantomData }
    }

    pub(super) fn of_mut(octets: &'a mut [u8]) -> Self {
        Self { length: octets.len(), value: octets.as_mut_ptr().cast(), lent: PhantomData }
    }
}

#[repr(C)]
pub(super) struct Oid {
    pub(super) length: u32,
    pub(super) elements: *const u8,
}

impl Oid {
    pub(super) const fn new(octets: &'static [u8]) -> Self {
        Self { length: octets.len() as u32, elements: octets.as_ptr() }
    }
}

#[repr(C)]
pub(super) struct OidSet {
    pub(super) count: usize,
    pub(super) elements: *const Oid,
}

#[repr(C)]
pub(super) struct StoreEntry {
    pub(super) key: *const c_char,
    pub(super) value: *const c_char,
}

/// Where a credential is to be found, in MIT's extension.
#[repr(C)]
pub(super) struct Store {
    pub(super) count: u32,
    pub(super) elements: *const StoreEntry,
}
