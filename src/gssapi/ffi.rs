//! Binding to the GSSAPI library of the system (RFC 2744), MIT's or Heimdal's, for Kerberos 5. The library is loaded at
//! its first use, so that s5 also runs without it.
//!
//! The only file with unsafe code; its public items are safe. Each object of the library has one owner, which releases
//! it. A context can be used by one thread at a time; credentials and names can be shared. All calls except `wrap` and
//! `unwrap` can wait for a file, DNS or a KDC (up to 30 s).

#![allow(unsafe_code, reason = "calls a C library; the public items are safe")]
#![warn(clippy::undocumented_unsafe_blocks)]

mod context;
mod layout;
mod status;

use std::error::Error as _;
use std::ffi::{CStr, CString, OsString, c_int, c_void};
use std::fmt;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::ptr::{null, null_mut};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

pub use context::{ContextStep, GssContext, GssName, RequestedFlags, Unwrapped};
use layout::{GssBuffer, KeyValueElement, KeyValueSet, Oid, OidSet};
pub use status::{ContextFlags, LibraryError, SequenceStatus};
use status::{ERROR_MASK, GSS_S_CONTINUE_NEEDED, GSS_S_FAILURE, GSS_S_UNAVAILABLE, Result, one_line};

/// MIT's and Heimdal's library. The first one that is installed is used.
const LIBRARY_NAMES: [&str; 2] = ["libgssapi_krb5.so.2", "libgssapi.so.3"];
/// Environment variable for tests: the absolute path of the only library to open.
const LIBRARY_ENV_VAR: &str = "S5_GSSAPI_LIBRARY";
const GSS_C_INITIATE: c_int = 1;
const GSS_C_ACCEPT: c_int = 2;
const GSS_C_INDEFINITE: u32 = u32::MAX;
/// Argument of gss_display_status: a major status code.
const GSS_C_GSS_CODE: c_int = 1;
/// Argument of gss_display_status: a minor status code.
const GSS_C_MECH_CODE: c_int = 2;

// SAFETY: an Oid points to constants.
unsafe impl Sync for Oid {}

const KRB5_OID_BYTES: &[u8] = b"\x2A\x86\x48\x86\xF7\x12\x01\x02\x02";
// Statics, because the library can keep pointers to them.
static KRB5_OID: Oid = Oid::new(KRB5_OID_BYTES);
static HOSTBASED_SERVICE_OID: Oid = Oid::new(b"\x2A\x86\x48\x86\xF7\x12\x01\x02\x01\x04");
static KRB5_PRINCIPAL_OID: Oid = Oid::new(b"\x2A\x86\x48\x86\xF7\x12\x01\x02\x02\x01");

/// Pointer to a credential, name or context of the library.
type Handle = *mut c_void;

/// Defines the functions of the library by their C names. The first argument of each is the output for the minor
/// status, the result is the major status. A function after `?` is optional.
macro_rules! functions {
    ($($name:ident($($argument:ty),*);)* ?$optional:ident($($optional_argument:ty),*);) => {
        struct Api {
            $($name: unsafe extern "C" fn(*mut u32, $($argument),*) -> u32,)*
            $optional: Option<unsafe extern "C" fn(*mut u32, $($optional_argument),*) -> u32>,
            /// Keeps the library open.
            _library: Library,
        }

        impl Api {
            fn load(library: Library) -> Result<Self, String> {
                $(
                    // SAFETY: RFC 2744 declares the function with this type; a null pointer becomes `None`.
                    let $name = unsafe { library.get::<Option<_>>(concat!(stringify!($name), "\0")) };
                    let $name = $name.ok().and_then(|symbol| *symbol).ok_or(concat!("has no ", stringify!($name)))?;
                )*
                // SAFETY: MIT's headers declare it with this type; only MIT's library has this function.
                let $optional = unsafe { library.get::<Option<_>>(concat!(stringify!($optional), "\0")) };
                let $optional = $optional.ok().and_then(|symbol| *symbol);
                Ok(Self { $($name,)* $optional, _library: library })
            }
        }
    };
}

functions! {
    gss_import_name(*const GssBuffer<'_>, *const Oid, *mut Handle);
    gss_display_name(Handle, *mut GssBuffer<'_>, *mut *mut Oid);
    gss_release_name(*mut Handle);
    gss_acquire_cred(Handle, u32, *const OidSet, c_int, *mut Handle, *mut *mut OidSet, *mut u32);
    gss_release_cred(*mut Handle);
    gss_init_sec_context(
        Handle, *mut Handle, Handle, *const Oid, u32, u32, *const c_void, *const GssBuffer<'_>, *mut *mut Oid,
        *mut GssBuffer<'_>, *mut u32, *mut u32
    );
    gss_accept_sec_context(
        *mut Handle, Handle, *const GssBuffer<'_>, *const c_void, *mut Handle, *mut *mut Oid, *mut GssBuffer<'_>,
        *mut u32, *mut u32, *mut Handle
    );
    gss_delete_sec_context(*mut Handle, *mut GssBuffer<'_>);
    gss_context_time(Handle, *mut u32);
    gss_wrap(Handle, c_int, u32, *const GssBuffer<'_>, *mut c_int, *mut GssBuffer<'_>);
    gss_unwrap(Handle, *const GssBuffer<'_>, *mut GssBuffer<'_>, *mut c_int, *mut u32);
    gss_wrap_size_limit(Handle, c_int, u32, u32, *mut u32);
    gss_display_status(u32, c_int, *const Oid, *mut u32, *mut GssBuffer<'_>);
    gss_release_buffer(*mut GssBuffer<'_>);
    ?gss_acquire_cred_from(
        Handle, u32, *const OidSet, c_int, *const KeyValueSet, *mut Handle, *mut *mut OidSet, *mut u32
    );
}

/// Returns the library. Opens it at the first call.
fn api() -> Result<&'static Api> {
    static API: OnceLock<Result<Api, String>> = OnceLock::new();
    let api = API.get_or_init(|| match std::env::var_os(LIBRARY_ENV_VAR) {
        Some(path) if Path::new(&path).is_absolute() => open_library(path),
        Some(path) => Err(format!("{LIBRARY_ENV_VAR} is not an absolute path: {}", path.display())),
        None => {
            let [mit, heimdal] = LIBRARY_NAMES.map(OsString::from);
            let hint = |error| format!("{error} (Debian: apt install libgssapi-krb5-2)");
            open_library(mit).or_else(|error| open_library(heimdal).map_err(|_| hint(error)))
        }
    });
    api.as_ref().map_err(|text| LibraryError::new(GSS_S_UNAVAILABLE, text))
}

fn open_library(name: OsString) -> Result<Api, String> {
    // SAFETY: the initializers of a GSSAPI library have no preconditions, and the library is never closed.
    let library = unsafe { Library::open(Some(&name), RTLD_NOW | RTLD_LOCAL) };
    let name = name.display();
    let library = library.map_err(|error| match error.source() {
        Some(source) => one_line(&source.to_string()),
        None => format!("{name}: {error}"),
    })?;
    Api::load(library).map_err(|error| format!("{name} {error}"))
}

/// Checks that a GSSAPI library can be loaded.
///
/// # Errors
/// The error of the loader, with the package to install.
pub fn available() -> Result<(), String> {
    api().map(|_| ()).map_err(|error| error.text)
}

impl Api {
    /// Calls a function and returns its major status.
    fn call(&self, function: impl FnOnce(*mut u32) -> u32) -> Result<u32> {
        let mut minor = 0;
        let major = function(&mut minor);
        if major & ERROR_MASK == 0 { Ok(major) } else { Err(self.error(major & ERROR_MASK, minor)) }
    }

    /// Returns the library's message for an error. Must run on the thread of the failed call.
    fn error(&self, major: u32, minor: u32) -> LibraryError {
        let (major_text, minor_text) =
            (self.status_text(major, GSS_C_GSS_CODE), self.status_text(minor, GSS_C_MECH_CODE));
        let text = match () {
            // MIT's library describes a minor status of 0 as "Success".
            _ if minor == 0 || minor_text == "Success" => major_text,
            // "Unspecified failure": only the minor status has the reason.
            _ if major == GSS_S_FAILURE && !minor_text.is_empty() => minor_text,
            _ => format!("{major_text}: {minor_text}"),
        };
        LibraryError { text, major, minor }
    }

    fn status_text(&self, value: u32, kind: c_int) -> String {
        let (mut messages, mut message_context, mut minor) = (Vec::new(), 0, 0);
        // A status can have several messages. The limit protects against a library that never ends the list.
        for _ in 0..8 {
            let mut text = LibraryBuffer::new(self);
            let (next, raw) = (&mut message_context, &mut text.raw);
            // SAFETY: all pointers are to locals or constants.
            let major = unsafe { (self.gss_display_status)(&mut minor, value, kind, &KRB5_OID, next, raw) };
            if major & ERROR_MASK != 0 {
                break;
            }
            messages.push(one_line(&String::from_utf8_lossy(text.as_slice())));
            if message_context == 0 {
                break;
            }
        }
        messages.join(", ")
    }
}

/// A buffer that the library allocates.
struct LibraryBuffer<'a> {
    api: &'a Api,
    raw: GssBuffer<'a>,
}

impl<'a> LibraryBuffer<'a> {
    fn new(api: &'a Api) -> Self {
        Self { api, raw: GssBuffer::EMPTY }
    }

    fn as_slice(&self) -> &[u8] {
        if self.raw.value.is_null() {
            return &[];
        }
        // SAFETY: the library has initialized this many bytes, and they are valid until the drop.
        unsafe { std::slice::from_raw_parts(self.raw.value.cast(), self.raw.length) }
    }
}

impl Drop for LibraryBuffer<'_> {
    fn drop(&mut self) {
        // MIT's library allocates a buffer for an empty message, but does not release a buffer of length 0.
        self.raw.length = self.raw.length.max((!self.raw.value.is_null()).into());
        // SAFETY: the buffer is empty, or the library allocated it and it is released only here.
        unsafe { (self.api.gss_release_buffer)(&mut 0, &mut self.raw) };
    }
}

/// A `gss_name_t`.
struct RawName {
    api: &'static Api,
    handle: Handle,
}

impl RawName {
    fn import(text: &[u8], kind: &'static Oid) -> Result<Self> {
        let api = api()?;
        let mut name = Self { api, handle: null_mut() };
        let text = GssBuffer::borrowed(text);
        // SAFETY: all pointers are to locals or constants.
        api.call(|minor| unsafe { (api.gss_import_name)(minor, &text, kind, &mut name.handle) })?;
        Ok(name)
    }

    fn display(&self) -> Result<Vec<u8>> {
        let mut text = LibraryBuffer::new(self.api);
        let raw_output = &mut text.raw;
        // SAFETY: the name is valid until the drop; the other pointers are to locals.
        self.api.call(|minor| unsafe { (self.api.gss_display_name)(minor, self.handle, raw_output, null_mut()) })?;
        Ok(text.as_slice().to_vec())
    }
}

impl Drop for RawName {
    fn drop(&mut self) {
        if !self.handle.is_null() {
            // SAFETY: the library allocated it, and it is released only here.
            unsafe { (self.api.gss_release_name)(&mut 0, &mut self.handle) };
        }
    }
}

/// The keys of a service, or the tickets of a user.
pub struct Credential {
    api: &'static Api,
    handle: Handle,
}

// SAFETY: the library locks a credential during each call, and keeps no thread-local state for it.
unsafe impl Send for Credential {}
// SAFETY: as above.
unsafe impl Sync for Credential {}

impl Credential {
    /// Acquires the keys of the service `name`, or all keys if `None`, from `keytab` or the system's keytab.
    ///
    /// # Errors
    /// No library or no such key is available. The library reports an unreadable keytab as an empty one.
    pub fn acceptor(name: Option<&GssName>, keytab: Option<&Path>) -> Result<Self> {
        let name = name.map(GssName::import).transpose()?;
        let store = keytab.map(|path| (c"keytab", path, "keytab path (set KRB5_KTNAME)"));
        Self::acquire(name.as_ref(), GSS_C_ACCEPT, store)
    }

    /// Acquires the tickets in `ccache` or the system's ticket cache.
    ///
    /// # Errors
    /// No library or no ticket is available. An expired ticket can be reported here or at its use.
    pub fn initiator(ccache: Option<&Path>) -> Result<Self> {
        Self::acquire(None, GSS_C_INITIATE, ccache.map(|path| (c"ccache", path, "ticket cache path (set KRB5CCNAME)")))
    }

    /// Acquires a credential. `store`: key and path for MIT's extension, and the name of the path for an error message.
    fn acquire(name: Option<&RawName>, usage: c_int, store: Option<(&CStr, &Path, &str)>) -> Result<Self> {
        let api = api()?;
        let name = name.map_or(null_mut(), |name| name.handle);
        let mechanisms = OidSet { count: 1, elements: &KRB5_OID };
        let mut credential = Self { api, handle: null_mut() };
        let handle = &mut credential.handle;
        let Some((key, path, setting)) = store else {
            // SAFETY: all pointers are to locals or constants, or null.
            api.call(|minor| unsafe {
                (api.gss_acquire_cred)(
                    minor,
                    name,
                    GSS_C_INDEFINITE,
                    &mechanisms,
                    usage,
                    handle,
                    null_mut(),
                    null_mut(),
                )
            })?;
            return Ok(credential);
        };
        let Some(acquire_from) = api.gss_acquire_cred_from else {
            return Err(LibraryError::new(
                GSS_S_UNAVAILABLE,
                format!("this GSSAPI library does not support a {setting}"),
            ));
        };
        let value = CString::new([b"FILE:", path.as_os_str().as_bytes()].concat());
        let value = value.map_err(|_| LibraryError::new(GSS_S_FAILURE, "path contains a NUL byte"))?;
        let entry = KeyValueElement { key: key.as_ptr(), value: value.as_ptr() };
        let key_values = KeyValueSet { count: 1, elements: &entry };
        // SAFETY: all pointers are to locals or constants, or null.
        let acquired = api.call(|minor| unsafe {
            acquire_from(minor, name, GSS_C_INDEFINITE, &mechanisms, usage, &key_values, handle, null_mut(), null_mut())
        });
        acquired.map(|_| credential).map_err(|error| error.with_path(path))
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credential").finish_non_exhaustive()
    }
}

impl Drop for Credential {
    fn drop(&mut self) {
        if !self.handle.is_null() {
            // SAFETY: the library allocated it, and it is released only here.
            unsafe { (self.api.gss_release_cred)(&mut 0, &mut self.handle) };
        }
    }
}

/// Result of one call that establishes a context.
struct RawStep {
    output: Vec<u8>,
    is_complete: bool,
    flags: u32,
}

impl RawStep {
    fn new(major: u32, output: &LibraryBuffer<'_>, flags: u32) -> Self {
        Self { output: output.as_slice().to_vec(), is_complete: major & GSS_S_CONTINUE_NEEDED == 0, flags }
    }
}

/// A `gss_ctx_id_t`. [`GssContext`] tracks its state.
struct RawContext {
    api: &'static Api,
    handle: Handle,
}

// SAFETY: the library permits any thread, one at a time.
unsafe impl Send for RawContext {}

impl RawContext {
    fn new() -> Result<Self> {
        Ok(Self { api: api()?, handle: null_mut() })
    }

    /// Processes a token of the initiator. Also returns the initiator's name, which the library can report at any step.
    fn accept(&mut self, credential: &Credential, token: &[u8]) -> Result<(RawStep, RawName)> {
        let Self { api, handle } = self;
        let mut initiator = RawName { api, handle: null_mut() };
        let (mut output, mut flags, token) = (LibraryBuffer::new(api), 0, GssBuffer::borrowed(token));
        let (name, raw_output, cred) = (&mut initiator.handle, &mut output.raw, credential.handle);
        // The last argument is null: a delegated credential is not accepted.
        // SAFETY: the handles are the library's or null; all pointers are to locals or null.
        let major = api.call(|minor| unsafe {
            (api.gss_accept_sec_context)(
                minor,
                handle,
                cred,
                &token,
                null(),
                name,
                null_mut(),
                raw_output,
                &mut flags,
                null_mut(),
                null_mut(),
            )
        })?;
        Ok((RawStep::new(major, &output, flags), initiator))
    }

    fn init(&mut self, cred: &Credential, target: &RawName, requested: u32, token: Option<&[u8]>) -> Result<RawStep> {
        let Self { api, handle } = self;
        let (mut output, mut flags, token) = (LibraryBuffer::new(api), 0, token.map(GssBuffer::borrowed));
        let (raw_output, cred, target) = (&mut output.raw, cred.handle, target.handle);
        let token = token.as_ref().map_or(null(), |token| token as *const GssBuffer<'_>);
        // SAFETY: the handles are the library's or null; all pointers are to locals or constants, or null.
        let major = api.call(|minor| unsafe {
            (api.gss_init_sec_context)(
                minor,
                cred,
                handle,
                target,
                &KRB5_OID,
                requested,
                0,
                null(),
                token,
                null_mut(),
                raw_output,
                &mut flags,
                null_mut(),
            )
        })?;
        Ok(RawStep::new(major, &output, flags))
    }

    /// Returns the remaining lifetime in seconds.
    fn lifetime(&self) -> Result<u32> {
        let mut seconds = 0;
        // SAFETY: the context is the library's or null; the other pointers are to locals.
        self.api.call(|minor| unsafe { (self.api.gss_context_time)(minor, self.handle, &mut seconds) })?;
        Ok(seconds)
    }

    /// Returns the token, and whether it is encrypted.
    fn wrap(&mut self, data: &[u8], should_encrypt: bool) -> Result<(Vec<u8>, bool)> {
        let Self { api, handle } = self;
        let (mut output, mut is_encrypted, data) = (LibraryBuffer::new(api), 0, GssBuffer::borrowed(data));
        let raw_output = &mut output.raw;
        // SAFETY: the context is the library's or null; the other pointers are to locals.
        api.call(|minor| unsafe {
            (api.gss_wrap)(minor, *handle, should_encrypt.into(), 0, &data, &mut is_encrypted, raw_output)
        })?;
        Ok((output.as_slice().to_vec(), is_encrypted != 0))
    }

    /// Returns the data if there is any, whether it was encrypted, and the major status. Overwrites `token`.
    fn unwrap(&mut self, token: &mut [u8]) -> Result<(Option<Vec<u8>>, bool, u32)> {
        let Self { api, handle } = self;
        let (mut output, mut is_encrypted, token) = (LibraryBuffer::new(api), 0, GssBuffer::borrowed_mut(token));
        let raw_output = &mut output.raw;
        // SAFETY: the context is the library's or null; the other pointers are to locals and mutable.
        let major = api.call(|minor| unsafe {
            (api.gss_unwrap)(minor, *handle, &token, raw_output, &mut is_encrypted, null_mut())
        })?;
        let data = (!output.raw.value.is_null()).then(|| output.as_slice().to_vec());
        Ok((data, is_encrypted != 0, major))
    }

    fn wrap_size_limit(&self, should_encrypt: bool, token: u32) -> Result<u32> {
        let mut size = 0;
        // SAFETY: the context is the library's or null; the other pointers are to locals.
        self.api.call(|minor| unsafe {
            (self.api.gss_wrap_size_limit)(minor, self.handle, should_encrypt.into(), 0, token, &mut size)
        })?;
        Ok(size)
    }
}

impl Drop for RawContext {
    fn drop(&mut self) {
        if !self.handle.is_null() {
            // SAFETY: the library allocated it, and it is released only here.
            unsafe { (self.api.gss_delete_sec_context)(&mut 0, &mut self.handle, null_mut()) };
        }
    }
}
