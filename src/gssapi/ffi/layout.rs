//! The C structures of GSSAPI, with the layout of Linux and the BSDs.

use std::ffi::{c_char, c_void};
use std::marker::PhantomData;
use std::ptr::null_mut;

/// `gss_buffer_desc`: bytes that are borrowed by the library, or that it allocated.
#[repr(C)]
pub(super) struct GssBuffer<'a> {
    pub(super) length: usize,
    pub(super) value: *mut c_void,
    borrow: PhantomData<&'a [u8]>,
}

impl<'a> GssBuffer<'a> {
    pub(super) const EMPTY: Self = Self { length: 0, value: null_mut(), borrow: PhantomData };

    /// Borrows bytes that the library only reads.
    pub(super) fn borrowed(bytes: &'a [u8]) -> Self {
        Self { length: bytes.len(), value: bytes.as_ptr().cast_mut().cast(), borrow: PhantomData }
    }

    pub(super) fn borrowed_mut(bytes: &'a mut [u8]) -> Self {
        Self { length: bytes.len(), value: bytes.as_mut_ptr().cast(), borrow: PhantomData }
    }
}

/// `gss_OID_desc`.
#[repr(C)]
pub(super) struct Oid {
    pub(super) length: u32,
    pub(super) elements: *const u8,
}

impl Oid {
    pub(super) const fn new(bytes: &'static [u8]) -> Self {
        Self { length: bytes.len() as u32, elements: bytes.as_ptr() }
    }
}

/// `gss_OID_set_desc`.
#[repr(C)]
pub(super) struct OidSet {
    pub(super) count: usize,
    pub(super) elements: *const Oid,
}

/// `gss_key_value_element_desc`.
#[repr(C)]
pub(super) struct KeyValueElement {
    pub(super) key: *const c_char,
    pub(super) value: *const c_char,
}

/// `gss_key_value_set_desc`, a credential store in MIT's extension.
#[repr(C)]
pub(super) struct KeyValueSet {
    pub(super) count: u32,
    pub(super) elements: *const KeyValueElement,
}
