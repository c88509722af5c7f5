//! Binding to the GSSAPI library of the system (RFC 2744), MIT's or Heimdal's, for Kerberos 5. The library is loaded at
//! its first use, so that s5 also runs without it.
//!
//! The only file with unsafe code; its public items are safe. Each object of the library has one owner, which releases
//! it. A context can be used by one thread at a time; credentials can be shared. Acquiring a credential or establishing
//! a context can take up to 30 s (files, DNS, a KDC). Errors are the library's messages, one line each.

#![allow(unsafe_code, reason = "calls a C library; the public items are safe")]
#![warn(clippy::undocumented_unsafe_blocks)]

use std::ffi::{CStr, CString, OsString, c_int, c_void};
use std::fmt;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::ptr::{from_mut, null, null_mut};
use std::sync::{Arc, OnceLock};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal as Nix, sigaction};

use super::layout::*;
pub use super::layout::{
    GSS_C_ANON_FLAG, GSS_C_CONF_FLAG, GSS_C_INTEG_FLAG, GSS_C_MUTUAL_FLAG, GSS_C_REPLAY_FLAG, GSS_C_SEQUENCE_FLAG,
};
use crate::conn::{SecurityContext, TokenOrder, Unwrapped};
use crate::proto::MAX_TOKEN_LEN;

// SAFETY: an Oid points to constants.
unsafe impl Sync for Oid {}

type LibraryResult<T> = Result<T, String>;
type OutputResult = LibraryResult<(u32, Vec<u8>)>;
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
            fn load(library: Library) -> LibraryResult<Self> {
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
fn api() -> LibraryResult<&'static Api> {
    static API: OnceLock<LibraryResult<Api>> = OnceLock::new();
    // SAFETY: getauxval(3) has no preconditions.
    let is_secure = unsafe { libc::getauxval(libc::AT_SECURE) } != 0;
    let api = API.get_or_init(|| match std::env::var_os(LIBRARY_ENV_VAR).filter(|_| !is_secure) {
        _ if cfg!(target_feature = "crt-static") => {
            Err("a static binary cannot load the library (use another build)".into())
        }
        Some(path) if Path::new(&path).is_absolute() => open_library(path),
        Some(path) => Err(format!("{LIBRARY_ENV_VAR} is not an absolute path: {}", path.display())),
        None => {
            let [mit, heimdal] = LIBRARY_NAMES.map(OsString::from);
            let hint = |error| format!("{error} (Debian: apt install libgssapi-krb5-2)");
            open_library(mit).or_else(|error| open_library(heimdal).map_err(|_| hint(error)))
        }
    });
    api.as_ref().map_err(Clone::clone)
}

fn open_library(name: OsString) -> LibraryResult<Api> {
    // SAFETY: the initializers of a GSSAPI library have no preconditions, and the library is never closed.
    let library = unsafe { Library::open(Some(&name), RTLD_NOW | RTLD_LOCAL) };
    let name = name.display();
    let text = |error: &dyn std::error::Error| error.source().map(|source| one_line(&source.to_string()));
    let library = library.map_err(|error| text(&error).unwrap_or_else(|| format!("{name}: {error}")))?;
    Api::load(library).map_err(|error| format!("{name} {error}"))
}

/// Returns free memory to the kernel if the allocator is that of glibc. Here, because it needs unsafe code.
pub fn release_free_memory() {
    // SAFETY: the type is that of malloc_trim(3), which has no preconditions.
    if let Ok(malloc_trim) = unsafe { Library::this().get::<extern "C" fn(usize) -> c_int>(b"malloc_trim\0") } {
        malloc_trim(0);
    }
}

/// Lets system calls that a seccomp filter answers with SIGSYS fail with EPERM. `report` gets their numbers, and may do
/// what signal-safety(7) allows. Not of GSSAPI either.
pub fn fail_trapped_calls(report: fn(i64)) -> nix::Result<()> {
    static REPORT: OnceLock<fn(i64)> = OnceLock::new();
    extern "C" fn at_signal(_: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
        // SAFETY: the kernel passes both, and they are this function's until it returns.
        let (code, context) = unsafe { ((*info).si_code, &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext) };
        #[cfg(target_arch = "x86_64")]
        let (registers, call, result) = (&mut context.gregs, libc::REG_RAX as usize, libc::REG_RAX as usize);
        #[cfg(target_arch = "aarch64")]
        let (registers, call, result) = (&mut context.regs, 8, 0);
        #[cfg(target_arch = "riscv64")]
        let (registers, call, result) = (&mut context.__gregs, 17, 10);
        // SYS_SECCOMP. kill(2) can send the signal at any time.
        let call = registers.get(call).copied().filter(|_| code == 1);
        if let (Some(call), Some(result)) = (call, registers.get_mut(result)) {
            *result = i64::from(-libc::EPERM) as _;
            REPORT.get().inspect(|report| report(call as _));
        }
    }
    let _ = REPORT.set(report);
    let action = SigAction::new(SigHandler::SigAction(at_signal), SaFlags::SA_ONSTACK, SigSet::empty());
    // SAFETY: the handler accesses its arguments and a constant, and `report` does what a handler may do.
    unsafe { sigaction(Nix::SIGSYS, &action) }.map(drop)
}

/// Checks that a GSSAPI library can be loaded. The error names the package to install.
pub fn available() -> LibraryResult<()> {
    api().map(drop)
}

impl Api {
    fn call(&self, function: impl FnOnce(*mut u32) -> u32) -> LibraryResult<()> {
        let mut minor = 0;
        let major = function(&mut minor);
        self.check(major, minor)
    }

    /// Calls a function that allocates a buffer. Returns its major status and the bytes in the buffer.
    fn call_with_output(&self, function: impl FnOnce(*mut u32, *mut GssBuffer<'_>) -> u32) -> OutputResult {
        let mut minor = 0;
        let (major, bytes) = self.copy_output(|buffer| function(&mut minor, buffer));
        self.check(major, minor).map(|()| (major, bytes))
    }

    /// As `call_with_output`, without a check of the status.
    fn copy_output(&self, function: impl FnOnce(*mut GssBuffer<'_>) -> u32) -> (u32, Vec<u8>) {
        let mut buffer = GssBuffer::EMPTY;
        let major = function(&mut buffer);
        if buffer.value.is_null() {
            return (major, Vec::new());
        }
        // SAFETY: the library has allocated and initialized this many bytes.
        let bytes = unsafe { std::slice::from_raw_parts(buffer.value.cast(), buffer.length) }.to_vec();
        // MIT's library allocates a buffer for an empty message, but does not release a buffer of length 0.
        buffer.length = buffer.length.max(1);
        // SAFETY: the library has allocated the buffer, and it is released only here.
        unsafe { (self.gss_release_buffer)(&mut 0, &mut buffer) };
        (major, bytes)
    }

    /// Returns the library's message if the status is an error. Must run on the thread of the call.
    fn check(&self, major: u32, minor: u32) -> LibraryResult<()> {
        let error = major & ERROR_MASK;
        if error == 0 {
            return Ok(());
        }
        Err(error_text(error, self.status_text(error, GSS_C_GSS_CODE), minor, self.status_text(minor, GSS_C_MECH_CODE)))
    }

    fn status_text(&self, value: u32, kind: c_int) -> String {
        let (mut messages, mut message_context, mut minor) = (Vec::new(), 0, 0);
        // A status can have several messages. The limit protects against a library that never ends the list.
        for _ in 0..8 {
            let next = &mut message_context;
            // SAFETY: all pointers are to locals or constants.
            let (major, text) = self.copy_output(|buffer| unsafe {
                (self.gss_display_status)(&mut minor, value, kind, &KRB5_OID, next, buffer)
            });
            if major & ERROR_MASK != 0 {
                break;
            }
            messages.push(one_line(&String::from_utf8_lossy(&text)));
            if message_context == 0 {
                break;
            }
        }
        messages.join(", ")
    }
}

/// An object of the library, or null until a call has created it. `Debug` shows no addresses.
struct Object {
    api: &'static Api,
    kind: Kind,
    handle: Handle,
}

// SAFETY: the library permits calls from any thread, but only one at a time.
unsafe impl Send for Object {}

impl Object {
    fn new(kind: Kind) -> LibraryResult<Self> {
        Ok(Self { api: api()?, kind, handle: null_mut() })
    }

    /// Imports `service@host`, or a Kerberos principal, which contains a `/`.
    fn import_name(text: &str) -> LibraryResult<Self> {
        check_name(text)?;
        let kind = if text.contains('/') { &KRB5_PRINCIPAL_OID } else { &HOSTBASED_SERVICE_OID };
        let (mut name, text) = (Self::new(Kind::Name)?, GssBuffer::borrowed(text.as_bytes()));
        // SAFETY: all pointers are to locals or constants.
        name.api.call(|minor| unsafe { (name.api.gss_import_name)(minor, &text, kind, &mut name.handle) })?;
        Ok(name)
    }
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.kind.fmt(f)
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        if self.handle.is_null() {
            return;
        }
        let (api, minor, handle) = (self.api, &mut 0, &mut self.handle);
        // SAFETY: the library allocated the object, and it is released only here.
        unsafe {
            match self.kind {
                Kind::Credential => (api.gss_release_cred)(minor, handle),
                Kind::Name => (api.gss_release_name)(minor, handle),
                Kind::Context => (api.gss_delete_sec_context)(minor, handle, null_mut()),
            }
        };
    }
}

/// Key and path for MIT's extension, and a description of the path for errors.
type Store<'a> = Option<(&'a CStr, &'a Path, &'a str)>;

/// The keys of a service, or the tickets of a user.
#[derive(Debug)]
pub struct Credential(Object);

// SAFETY: the library locks a credential during each call, and keeps no thread-local state for it.
unsafe impl Sync for Credential {}

impl Credential {
    /// Acquires the keys of `service` (`service@host` or a principal; `None`: all) from `keytab` or that of the system.
    ///
    /// # Errors
    /// No library or no such key is available. The library reports an unreadable keytab as an empty one.
    pub fn acceptor(service: Option<&str>, keytab: Option<&Path>) -> LibraryResult<Self> {
        let name = service.map(Object::import_name).transpose()?;
        let store = keytab.map(|path| (c"keytab", path, "keytab path (set KRB5_KTNAME)"));
        Self::acquire(name.as_ref(), GSS_C_ACCEPT, store, None)
    }

    /// Acquires the tickets in `ccache` or the system's ticket cache. MIT's library selects those for the service at
    /// their first use, but the primary tickets at once to return their `lifetime` in seconds.
    ///
    /// # Errors
    /// No library or no ticket is available. An expired ticket can be reported here or at its use.
    pub fn initiator(ccache: Option<&Path>, lifetime: Option<&mut u32>) -> LibraryResult<Self> {
        let store = ccache.map(|path| (c"ccache", path, "ticket cache path (set KRB5CCNAME)"));
        Self::acquire(None, GSS_C_INITIATE, store, lifetime)
    }

    /// Acquires a credential.
    fn acquire(name: Option<&Object>, usage: c_int, store: Store<'_>, time: Option<&mut u32>) -> LibraryResult<Self> {
        let mut credential = Object::new(Kind::Credential)?;
        let Object { api, handle, .. } = &mut credential;
        let name = name.map_or(null_mut(), |name| name.handle);
        let mechanisms = OidSet { count: 1, elements: &KRB5_OID };
        let (time, no_set, lifetime) = (GSS_C_INDEFINITE, null_mut(), time.map_or(null_mut(), from_mut));
        let Some((key, path, setting)) = store else {
            // SAFETY: all pointers are to locals or constants, or null.
            api.call(|minor| unsafe {
                (api.gss_acquire_cred)(minor, name, time, &mechanisms, usage, handle, no_set, lifetime)
            })?;
            return Ok(Self(credential));
        };
        let unsupported = || format!("this GSSAPI library does not support a {setting}");
        let acquire_from = api.gss_acquire_cred_from.ok_or_else(unsupported)?;
        let value = CString::new([b"FILE:", path.as_os_str().as_bytes()].concat());
        let value = value.map_err(|_| "path contains a NUL byte")?;
        let entry = KeyValueElement { key: key.as_ptr(), value: value.as_ptr() };
        let key_values = KeyValueSet { count: 1, elements: &entry };
        // SAFETY: all pointers are to locals or constants, or null.
        let acquired = api.call(|minor| unsafe {
            acquire_from(minor, name, time, &mechanisms, usage, &key_values, handle, no_set, lifetime)
        });
        acquired.map(|()| Self(credential)).map_err(|error| with_path(error, path))
    }

    /// Accepts a context with the only token of an initiator. Ignores a delegated credential.
    pub fn accept(&self, token: &[u8]) -> LibraryResult<AcceptedContext> {
        let (mut object, mut initiator) = (Object::new(Kind::Context)?, Object::new(Kind::Name)?);
        let (api, context, name, keys) = (object.api, &mut object.handle, &mut initiator.handle, self.0.handle);
        let (mut flags, token) = (0, GssBuffer::borrowed(token));
        let (accept, flag_bits, no_type, no_time, no_delegation) =
            (api.gss_accept_sec_context, &mut flags, null_mut(), null_mut(), null_mut());
        // SAFETY: the handles are the library's or null; all pointers are to locals or null.
        let (major, answer) = api.call_with_output(|minor, output| unsafe {
            accept(minor, context, keys, &token, null(), name, no_type, output, flag_bits, no_time, no_delegation)
        })?;
        check_complete(major)?;
        // SAFETY: the handle is the library's or null; the other pointers are to locals or null.
        let (_, initiator) = api.call_with_output(|minor, output| unsafe {
            (api.gss_display_name)(minor, initiator.handle, output, null_mut())
        })?;
        Ok(AcceptedContext { context: GssContext { object, flags }, initiator, answer })
    }
}

/// The acceptor's side of a new context.
#[derive(Debug)]
pub struct AcceptedContext {
    /// The context.
    pub context: GssContext,
    /// Principal of the initiator, `alice@REALM`.
    pub initiator: Vec<u8>,
    /// Token for the initiator; empty if it did not request mutual authentication.
    pub answer: Vec<u8>,
}

/// The initiator's side of a context that waits for the token of the acceptor.
#[derive(Debug)]
pub struct PendingContext {
    context: GssContext,
    credential: Arc<Credential>,
    target: Object,
    requested: u32,
}

impl PendingContext {
    /// Creates a context with `service` (`service@host` or a principal), and its token for the acceptor. Requests
    /// mutual authentication, integrity, replay detection and `flags`. Never delegates the credential.
    pub fn new(credential: Arc<Credential>, service: &str, flags: u32) -> LibraryResult<(Self, Vec<u8>)> {
        let requested = flags | GSS_C_MUTUAL_FLAG | GSS_C_REPLAY_FLAG | GSS_C_INTEG_FLAG;
        let context = GssContext { object: Object::new(Kind::Context)?, flags: 0 };
        let mut pending = Self { context, credential, target: Object::import_name(service)?, requested };
        let (_, token) = pending.init(None)?;
        Ok((pending, token))
    }

    /// Establishes the context with the only token of the acceptor.
    pub fn complete(mut self, token: &[u8]) -> LibraryResult<GssContext> {
        check_acceptor_token(token)?;
        check_complete(self.init(Some(token))?.0)?;
        Ok(self.context)
    }

    /// Calls gss_init_sec_context. Returns the major status and the token for the acceptor.
    fn init(&mut self, token: Option<&[u8]>) -> OutputResult {
        let GssContext { object: Object { api, handle: context, .. }, flags } = &mut self.context;
        let (ticket, target, requested) = (self.credential.0.handle, self.target.handle, self.requested);
        let token = token.map(GssBuffer::borrowed);
        let token = token.as_ref().map_or(null(), |token| token as *const GssBuffer<'_>);
        let (init, oid, any, no_type, no_time) = (api.gss_init_sec_context, &KRB5_OID, null(), null_mut(), null_mut());
        // SAFETY: the handles are the library's or null; all pointers are to locals or constants, or null.
        api.call_with_output(|minor, output| unsafe {
            init(minor, ticket, context, target, oid, requested, 0, any, token, no_type, output, flags, no_time)
        })
    }
}

/// One side of an established security context. Must not be used by two threads at once.
#[derive(Debug)]
pub struct GssContext {
    object: Object,
    flags: u32,
}

impl GssContext {
    /// Returns true if the context has all of these flags (`GSS_C_…_FLAG`).
    pub fn has(&self, flags: u32) -> bool {
        self.flags & flags == flags
    }
}

impl SecurityContext for GssContext {
    fn wrap(&mut self, data: &[u8], should_encrypt: bool) -> LibraryResult<Vec<u8>> {
        let Object { api, handle, .. } = self.object;
        let (mut is_encrypted, data) = (0, GssBuffer::borrowed(data));
        // SAFETY: the context is established; the other pointers are to locals.
        let (_, token) = api.call_with_output(|minor, output| unsafe {
            (api.gss_wrap)(minor, handle, should_encrypt.into(), 0, &data, &mut is_encrypted, output)
        })?;
        if should_encrypt && is_encrypted == 0 { Err("the security context can't encrypt".into()) } else { Ok(token) }
    }

    /// Heimdal's library rejects messages out of order. MIT's returns them; this function rejects those without data.
    fn unwrap(&mut self, token: &mut [u8]) -> LibraryResult<Unwrapped> {
        if token.is_empty() {
            return Err("empty token".into());
        }
        let Object { api, handle, .. } = self.object;
        let (mut is_encrypted, token) = (0, GssBuffer::borrowed_mut(token));
        // SAFETY: the context is established; the other pointers are to locals, and mutable.
        let (major, data) = api.call_with_output(|minor, output| unsafe {
            (api.gss_unwrap)(minor, handle, &token, output, &mut is_encrypted, null_mut())
        })?;
        let order = token_order(major);
        // Without data, Heimdal's library has not verified the message yet, so its order can be forged.
        if data.is_empty() && order != TokenOrder::Next {
            return Err("message out of order".into());
        }
        Ok(Unwrapped { data, is_encrypted: is_encrypted != 0, order })
    }

    fn wrap_size_limit(&self, should_encrypt: bool) -> usize {
        let Object { api, handle, .. } = self.object;
        let (max, mut size) = (MAX_TOKEN_LEN as u32, 0);
        // SAFETY: the context is established; the other pointers are to locals.
        let limit = api.call(|minor| unsafe {
            (api.gss_wrap_size_limit)(minor, handle, should_encrypt.into(), 0, max, &mut size)
        });
        // Used if the library reports an error: no mechanism adds 256 bytes or more.
        limit.map_or(MAX_TOKEN_LEN - 256, |()| size as usize)
    }
}
