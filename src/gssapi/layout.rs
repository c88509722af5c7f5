//! Structures and constants of GSSAPI (RFC 2744, with the layout on Linux), and the meaning of status codes, texts and
//! tokens. This file calls no function of the library.

use std::ffi::{c_char, c_int, c_void};
use std::marker::PhantomData;
use std::path::Path;
use std::ptr::null_mut;

use crate::conn::TokenOrder;

/// The libraries of MIT and Heimdal. The first one that is installed is used.
pub(super) const LIBRARY_NAMES: [&str; 2] = ["libgssapi_krb5.so.2", "libgssapi.so.3"];
/// Environment variable for tests: the absolute path of the only library to open. Ignored by a process with more
/// privileges than its caller, by capabilities of the file or set-user-ID.
pub(super) const LIBRARY_ENV_VAR: &str = "S5_GSSAPI_LIBRARY";

/// A major status is an error if one of these bits is set. The others are supplementary bits.
pub(super) const ERROR_MASK: u32 = 0xFFFF_0000;
const GSS_S_FAILURE: u32 = 13 << 16;
const GSS_S_CONTINUE_NEEDED: u32 = 1;
const GSS_S_DUPLICATE_TOKEN: u32 = 2;
const GSS_S_OLD_TOKEN: u32 = 4;
const GSS_S_UNSEQ_TOKEN: u32 = 8;
const GSS_S_GAP_TOKEN: u32 = 16;

/// Flag of a context: the acceptor has authenticated itself to the initiator.
pub const GSS_C_MUTUAL_FLAG: u32 = 2;
/// Flag of a context: replayed messages are detected.
pub const GSS_C_REPLAY_FLAG: u32 = 4;
/// Flag of a context: missing and reordered messages are detected.
pub const GSS_C_SEQUENCE_FLAG: u32 = 8;
/// Flag of a context: messages can be encrypted.
pub const GSS_C_CONF_FLAG: u32 = 16;
/// Flag of a context: messages can be integrity-protected.
pub const GSS_C_INTEG_FLAG: u32 = 32;
/// Flag of a context: the initiator is anonymous.
pub const GSS_C_ANON_FLAG: u32 = 64;

pub(super) const GSS_C_INITIATE: c_int = 1;
pub(super) const GSS_C_ACCEPT: c_int = 2;
pub(super) const GSS_C_INDEFINITE: u32 = u32::MAX;
/// Argument of gss_display_status: a major status code.
pub(super) const GSS_C_GSS_CODE: c_int = 1;
/// Argument of gss_display_status: a minor status code.
pub(super) const GSS_C_MECH_CODE: c_int = 2;

/// `gss_buffer_desc`: bytes that the library borrows or has allocated.
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

#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Credential,
    Name,
    Context,
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

const KRB5_OID_BYTES: &[u8] = b"\x2A\x86\x48\x86\xF7\x12\x01\x02\x02";
// Statics, because the library can keep pointers to them.
pub(super) static KRB5_OID: Oid = Oid::new(KRB5_OID_BYTES);
pub(super) static HOSTBASED_SERVICE_OID: Oid = Oid::new(b"\x2A\x86\x48\x86\xF7\x12\x01\x02\x01\x04");
pub(super) static KRB5_PRINCIPAL_OID: Oid = Oid::new(b"\x2A\x86\x48\x86\xF7\x12\x01\x02\x02\x01");

/// Returns the order of a message from the supplementary bits of its major status, of which several can be set.
pub(super) fn token_order(major: u32) -> TokenOrder {
    if major & (GSS_S_DUPLICATE_TOKEN | GSS_S_OLD_TOKEN) != 0 {
        TokenOrder::Duplicate
    } else if major & (GSS_S_UNSEQ_TOKEN | GSS_S_GAP_TOKEN) != 0 {
        TokenOrder::OutOfOrder
    } else {
        TokenOrder::Next
    }
}

/// Kerberos establishes a context with one token from each side.
pub(super) fn check_complete(major: u32) -> Result<(), String> {
    if major & GSS_S_CONTINUE_NEEDED == 0 { Ok(()) } else { Err("more than one token is required".into()) }
}

/// The libraries cut off a name at a NUL byte, and accept an empty name.
pub(super) fn check_name(text: &str) -> Result<(), String> {
    let is_valid = !text.is_empty() && !text.contains('\0');
    if is_valid { Ok(()) } else { Err("name is empty or contains a NUL byte".into()) }
}

/// Accepts a framed AP-REP or KRB-ERROR (RFC 2743 section 3.1, RFC 4121 section 4.1): others crash Heimdal 7.8.
pub(super) fn check_acceptor_token(token: &[u8]) -> Result<(), String> {
    let (length, body) = match token {
        [0x60, 0x82, high, low, body @ ..] => (u16::from_be_bytes([*high, *low]).into(), body),
        [0x60, 0x81, length, body @ ..] | [0x60, length @ ..=0x7F, body @ ..] => (usize::from(*length), body),
        _ => (0, token),
    };
    let message = body.strip_prefix(b"\x06\x09").and_then(|body| body.strip_prefix(KRB5_OID_BYTES));
    let is_valid = body.len() == length && message.is_some_and(|message| matches!(message, [2 | 3, 0, ..]));
    if is_valid { Ok(()) } else { Err("not the answer of a Kerberos acceptor".into()) }
}

/// Combines the library's texts for a major and a minor status, which the caller has made [`one_line`].
pub(super) fn error_text(major: u32, major_text: String, minor: u32, minor_text: String) -> String {
    match () {
        // MIT's library describes a minor status of 0 as "Success".
        _ if minor == 0 || minor_text == "Success" => major_text,
        // "Unspecified failure": only the minor status has the reason.
        _ if major == GSS_S_FAILURE && !minor_text.is_empty() => minor_text,
        _ => format!("{major_text}: {minor_text}"),
    }
}

/// Adds the path of a file to an error that does not contain it.
pub(super) fn with_path(error: String, path: &Path) -> String {
    let path = one_line(&path.to_string_lossy());
    if error.contains(&path) { error } else { format!("{error} ({path})") }
}

/// Replaces each run of white space and control characters by one space. The text can contain input from a peer.
pub(super) fn one_line(text: &str) -> String {
    let words = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duplicate_outweighs_other_orders() {
        let table = [
            (0, TokenOrder::Next),
            (GSS_S_CONTINUE_NEEDED, TokenOrder::Next),
            (GSS_S_GAP_TOKEN, TokenOrder::OutOfOrder),
            (GSS_S_UNSEQ_TOKEN, TokenOrder::OutOfOrder),
            (GSS_S_OLD_TOKEN, TokenOrder::Duplicate),
            (GSS_S_DUPLICATE_TOKEN | GSS_S_UNSEQ_TOKEN, TokenOrder::Duplicate),
        ];
        for (major, order) in table {
            assert_eq!(token_order(major), order, "{major}");
        }
    }

    #[test]
    fn error_text_is_that_of_the_status_with_the_reason() {
        let text = |major, minor, minor_text: &str| error_text(major, "major".into(), minor, minor_text.into());
        assert_eq!(text(7 << 16, 0, "minor"), "major");
        assert_eq!(text(7 << 16, 1, "Success"), "major");
        assert_eq!(text(7 << 16, 1, "minor"), "major: minor");
        assert_eq!(text(GSS_S_FAILURE, 1, "minor"), "minor");
    }

    #[test]
    fn one_line_has_no_control_characters() {
        assert_eq!(one_line(" a\nb\t\u{1b}[1m  c\0"), "a b [1m c");
    }
}
