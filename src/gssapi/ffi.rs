//! GSSAPI (RFC 2744) with Kerberos 5, by the C library of the system: MIT's or Heimdal's, opened when it is first asked
//! for, so that s5 runs without one. What RFC 1961 makes of it is not here.
//!
//! The only file with unsafe code. None of it shows outside: what the library hands out is owned here and released on
//! every path. A context belongs to one thread at a time; credentials and names are for all. Anything but `wrap` and
//! `unwrap` may block: on files, on DNS, on a KDC that does not answer for half a minute.

#![allow(unsafe_code, reason = "it calls a library of C, and nothing of that shows outside")]
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

pub use context::{Context, Name, Step, Unwrapped, Wants};
use layout::{Octets, Oid, OidSet, Store, StoreEntry};
use status::{CONTINUE, ERRORS, FAILURE, UNAVAILABLE, one_line};
pub use status::{Error, Flags, Order};

/// MIT's and Heimdal's; the first one that there is.
const LIBRARIES: [&str; 2] = ["libgssapi_krb5.so.2", "libgssapi.so.3"];
/// For tests: the only library to open, as an absolute path.
const KNOB: &str = "S5_GSSAPI_LIBRARY";
const INITIATE: c_int = 1;
const ACCEPT: c_int = 2;
const INDEFINITE: u32 = u32::MAX;
/// Which half of an error is to be put into words.
const MAJOR: c_int = 1;
const MINOR: c_int = 2;

// SAFETY: it points to constants.
unsafe impl Sync for Oid {}

const KRB5_OCTETS: &[u8] = b"\x2A\x86\x48\x86\xF7\x12\x01\x02\x02";
// Statics, since the library may keep a pointer to one.
static KRB5: Oid = Oid::new(KRB5_OCTETS);
static HOST_BASED_SERVICE: Oid = Oid::new(b"\x2A\x86\x48\x86\xF7\x12\x01\x02\x01\x04");
static KRB5_PRINCIPAL: Oid = Oid::new(b"\x2A\x86\x48\x86\xF7\x12\x01\x02\x02\x01");

/// A credential, name or context of the library.
type Handle = *mut c_void;

/// The functions of the library, by their names in C. Each takes a place for the minor status first, and gives the major.
macro_rules! functions {
    ($($name:ident($($argument:ty),*);)* ?$optional:ident($($its:ty),*);) => {
        struct Api {
            $($name: unsafe extern "C" fn(*mut u32, $($argument),*) -> u32,)*
            $optional: Option<unsafe extern "C" fn(*mut u32, $($its),*) -> u32>,
            /// Keeps it open.
            _library: Library,
        }

        impl Api {
            fn load(library: Library) -> Result<Self, String> {
                $(
                    // SAFETY: RFC 2744 gives the function this type, and a null is a `None`.
                    let $name = unsafe { library.get::<Option<_>>(concat!(stringify!($name), "\0")) };
                    let $name = $name.ok().and_then(|symbol| *symbol).ok_or(concat!("has no ", stringify!($name)))?;
                )*
                // SAFETY: the same with the headers of MIT, the only one who has it.
                let $optional = unsafe { library.get::<Option<_>>(concat!(stringify!($optional), "\0")) };
                let $optional = $optional.ok().and_then(|symbol| *symbol);
                Ok(Self { $($name,)* $optional, _library: library })
            }
        }
    };
}

functions! {
    gss_import_name(*const Octets<'_>, *const Oid, *mut Handle);
    gss_display_name(Handle, *mut Octets<'_>, *mut *mut Oid);
    gss_release_name(*mut Handle);
    gss_acquire_cred(Handle, u32, *const OidSet, c_int, *mut Handle, *mut *mut OidSet, *mut u32);
    gss_release_cred(*mut Handle);
    gss_init_sec_context(
        Handle, *mut Handle, Handle, *const Oid, u32, u32, *const c_void, *const Octets<'_>, *mut *mut Oid,
        *mut Octets<'_>, *mut u32, *mut u32
    );
    gss_accept_sec_context(
        *mut Handle, Handle, *const Octets<'_>, *const c_void, *mut Handle, *mut *mut Oid, *mut Octets<'_>, *mut u32,
        *mut u32, *mut Handle
    );
    gss_delete_sec_context(*mut Handle, *mut Octets<'_>);
    gss_context_time(Handle, *mut u32);
    gss_wrap(Handle, c_int, u32, *const Octets<'_>, *mut c_int, *mut Octets<'_>);
    gss_unwrap(Handle, *const Octets<'_>, *mut Octets<'_>, *mut c_int, *mut u32);
    gss_wrap_size_limit(Handle, c_int, u32, u32, *mut u32);
    gss_display_status(u32, c_int, *const Oid, *mut u32, *mut Octets<'_>);
    gss_release_buffer(*mut Octets<'_>);
    ?gss_acquire_cred_from(
        Handle, u32, *const OidSet, c_int, *const Store, *mut Handle, *mut *mut OidSet, *mut u32
    );
}

/// The library, opened once.
fn api() -> Result<&'static Api, Error> {
    static API: OnceLock<Result<Api, String>> = OnceLock::new();
    let api = API.get_or_init(|| match std::env::var_os(KNOB) {
        Some(path) if Path::new(&path).is_absolute() => open(path),
        Some(_) => Err(format!("{KNOB} is not an absolute path")),
        None => {
            let [mit, heimdal] = LIBRARIES.map(OsString::from);
            let hint = |error| format!("{error} (Debian: apt install libgssapi-krb5-2)");
            open(mit).or_else(|error| open(heimdal).map_err(|_| hint(error)))
        }
    });
    api.as_ref().map_err(|text| Error::new(UNAVAILABLE, text))
}

fn open(name: OsString) -> Result<Api, String> {
    // SAFETY: what a GSSAPI library does when it is opened needs nothing of us, and it is never closed.
    let library = unsafe { Library::open(Some(&name), RTLD_NOW | RTLD_LOCAL) };
    let name = name.display();
    let library = library.map_err(|error| match error.source() {
        Some(source) => one_line(&source.to_string()),
        None => format!("{name}: {error}"),
    })?;
    Api::load(library).map_err(|error| format!("{name} {error}"))
}

/// Whether there is a GSSAPI library.
///
/// # Errors
/// Why it can't be opened, and what to install.
pub fn available() -> Result<(), String> {
    api().map(|_| ()).map_err(|error| error.text)
}

impl Api {
    /// The major status, when it is no error.
    fn call(&self, function: impl FnOnce(*mut u32) -> u32) -> Result<u32, Error> {
        let mut minor = 0;
        let major = function(&mut minor);
        if major & ERRORS == 0 { Ok(major) } else { Err(self.error(major & ERRORS, minor)) }
    }

    /// What the library says of an error; to be asked on the thread that had it.
    fn error(&self, major: u32, minor: u32) -> Error {
        let (of_major, of_minor) = (self.words(major, MAJOR), self.words(minor, MINOR));
        let text = match () {
            // MIT's way of a minor that is 0.
            _ if minor == 0 || of_minor == "Success" => of_major,
            // This major says only that the minor tells.
            _ if major == FAILURE && !of_minor.is_empty() => of_minor,
            _ => format!("{of_major}: {of_minor}"),
        };
        Error { text, major, minor }
    }

    fn words(&self, value: u32, kind: c_int) -> String {
        let (mut words, mut more, mut minor) = (Vec::new(), 0, 0);
        // One message for each bit, and no endless list.
        for _ in 0..8 {
            let mut text = Buffer::new(self);
            let (more, text_octets) = (&mut more, &mut text.octets);
            // SAFETY: all pointers are to what lives here, or to a constant.
            let major = unsafe { (self.gss_display_status)(&mut minor, value, kind, &KRB5, more, text_octets) };
            if major & ERRORS != 0 {
                break;
            }
            words.push(one_line(&String::from_utf8_lossy(text.as_slice())));
            if *more == 0 {
                break;
            }
        }
        words.join(", ")
    }
}

/// Octets that the library allocates.
struct Buffer<'a> {
    api: &'a Api,
    octets: Octets<'a>,
}

impl<'a> Buffer<'a> {
    fn new(api: &'a Api) -> Self {
        Self { api, octets: Octets::NONE }
    }

    fn as_slice(&self) -> &[u8] {
        if self.octets.value.is_null() {
            return &[];
        }
        // SAFETY: the library has filled that many octets, which are ours until the drop.
        unsafe { std::slice::from_raw_parts(self.octets.value.cast(), self.octets.length) }
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        // MIT allocates for a message of no octets, too, and would not release what seems to have none.
        self.octets.length = self.octets.length.max((!self.octets.value.is_null()).into());
        // SAFETY: it is empty or the library's, and nobody has released it.
        unsafe { (self.api.gss_release_buffer)(&mut 0, &mut self.octets) };
    }
}

/// A name in the library's form.
struct RawName {
    api: &'static Api,
    handle: Handle,
}

impl RawName {
    fn import(text: &[u8], kind: &'static Oid) -> Result<Self, Error> {
        let api = api()?;
        let mut name = Self { api, handle: null_mut() };
        let text = Octets::of(text);
        // SAFETY: all pointers are to what lives here, or to a constant.
        api.call(|minor| unsafe { (api.gss_import_name)(minor, &text, kind, &mut name.handle) })?;
        Ok(name)
    }

    fn display(&self) -> Result<Vec<u8>, Error> {
        let mut text = Buffer::new(self.api);
        let octets = &mut text.octets;
        // SAFETY: the name is the library's, the rest lives here.
        self.api.call(|minor| unsafe { (self.api.gss_display_name)(minor, self.handle, octets, null_mut()) })?;
        Ok(text.as_slice().to_vec())
    }
}

impl Drop for RawName {
    fn drop(&mut self) {
        if !self.handle.is_null() {
            // SAFETY: it is the library's, and nobody has released it.
            unsafe { (self.api.gss_release_name)(&mut 0, &mut self.handle) };
        }
    }
}

/// A key or a ticket of Kerberos.
pub struct Credential {
    api: &'static Api,
    handle: Handle,
}

// SAFETY: the library locks what changes in a credential, and does not care for the thread.
unsafe impl Send for Credential {}
// SAFETY: as above.
unsafe impl Sync for Credential {}

impl Credential {
    /// The keys of a service: any of the keytab, or those of one name; of the system's keytab if none is given.
    ///
    /// # Errors
    /// There is no library, or no such key. An unreadable keytab is told as an empty one.
    pub fn acceptor(name: Option<&Name>, keytab: Option<&Path>) -> Result<Self, Error> {
        let name = name.map(Name::import).transpose()?;
        Self::acquire(name.as_ref(), ACCEPT, keytab.map(|path| (c"keytab", path, "a keytab: set KRB5_KTNAME")))
    }

    /// The ticket of a user; of the system's ticket cache if none is given.
    ///
    /// # Errors
    /// There is no library, or no ticket. Whether an expired one is told here or when it is used is the library's affair.
    pub fn initiator(ccache: Option<&Path>) -> Result<Self, Error> {
        Self::acquire(None, INITIATE, ccache.map(|path| (c"ccache", path, "a ticket cache: set KRB5CCNAME")))
    }

    /// With a key of the store, its path, and what to say where there is no store.
    fn acquire(name: Option<&RawName>, usage: c_int, place: Option<(&CStr, &Path, &str)>) -> Result<Self, Error> {
        let api = api()?;
        let name = name.map_or(null_mut(), |name| name.handle);
        let mechanisms = OidSet { count: 1, elements: &KRB5 };
        let mut credential = Self { api, handle: null_mut() };
        let handle = &mut credential.handle;
        let Some((key, path, instead)) = place else {
            // SAFETY: all pointers are to what lives here.
            api.call(|minor| unsafe {
                (api.gss_acquire_cred)(minor, name, INDEFINITE, &mechanisms, usage, handle, null_mut(), null_mut())
            })?;
            return Ok(credential);
        };
        let Some(acquire_from) = api.gss_acquire_cred_from else {
            return Err(Error::new(UNAVAILABLE, format!("this GSSAPI library takes no path of {instead}")));
        };
        let value = CString::new([b"FILE:", path.as_os_str().as_bytes()].concat());
        let value = value.map_err(|_| Error::new(FAILURE, "a path with a NUL in it"))?;
        let entry = StoreEntry { key: key.as_ptr(), value: value.as_ptr() };
        let store = Store { count: 1, elements: &entry };
        // SAFETY: all pointers are to what lives here.
        let acquired = api.call(|minor| unsafe {
            acquire_from(minor, name, INDEFINITE, &mechanisms, usage, &store, handle, null_mut(), null_mut())
        });
        acquired.map(|_| credential).map_err(|error| error.about(path))
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
            // SAFETY: it is the library's, and nobody has released it.
            unsafe { (self.api.gss_release_cred)(&mut 0, &mut self.handle) };
        }
    }
}

/// What a step of the establishment gave.
struct RawStep {
    output: Vec<u8>,
    is_complete: bool,
    flags: u32,
}

impl RawStep {
    fn new(major: u32, output: &Buffer<'_>, flags: u32) -> Self {
        Self { output: output.as_slice().to_vec(), is_complete: major & CONTINUE == 0, flags }
    }
}

/// A context of the library; in what state is known elsewhere.
struct RawContext {
    api: &'static Api,
    handle: Handle,
}

// SAFETY: the library does not care which thread it is, as long as it is one at a time.
unsafe impl Send for RawContext {}

impl RawContext {
    fn new() -> Result<Self, Error> {
        Ok(Self { api: api()?, handle: null_mut() })
    }

    /// With the name of the initiator, which may come at any step.
    fn accept(&mut self, credential: &Credential, token: &[u8]) -> Result<(RawStep, RawName), Error> {
        let Self { api, handle } = self;
        let mut source = RawName { api, handle: null_mut() };
        let (mut output, mut flags, token) = (Buffer::new(api), 0, Octets::of(token));
        let (name, octets, cred) = (&mut source.handle, &mut output.octets, credential.handle);
        // No place for a delegated credential, the last one, is how it is not taken.
        // SAFETY: the handles are the library's or null, all pointers are to what lives here.
        let major = api.call(|minor| unsafe {
            (api.gss_accept_sec_context)(
                minor,
                handle,
                cred,
                &token,
                null(),
                name,
                null_mut(),
                octets,
                &mut flags,
                null_mut(),
                null_mut(),
            )
        })?;
        Ok((RawStep::new(major, &output, flags), source))
    }

    fn init(
        &mut self,
        cred: &Credential,
        target: &RawName,
        wants: u32,
        token: Option<&[u8]>,
    ) -> Result<RawStep, Error> {
        let Self { api, handle } = self;
        let (mut output, mut flags, token) = (Buffer::new(api), 0, token.map(Octets::of));
        let (octets, cred, target) = (&mut output.octets, cred.handle, target.handle);
        let token = token.as_ref().map_or(null(), |token| token as *const Octets<'_>);
        // SAFETY: the handles are the library's or null, all pointers are to what lives here, to constants, or null.
        let major = api.call(|minor| unsafe {
            (api.gss_init_sec_context)(
                minor,
                cred,
                handle,
                target,
                &KRB5,
                wants,
                0,
                null(),
                token,
                null_mut(),
                octets,
                &mut flags,
                null_mut(),
            )
        })?;
        Ok(RawStep::new(major, &output, flags))
    }

    /// In seconds.
    fn lifetime(&self) -> Result<u32, Error> {
        let mut seconds = 0;
        // SAFETY: the context is the library's or null, the rest lives here.
        self.api.call(|minor| unsafe { (self.api.gss_context_time)(minor, self.handle, &mut seconds) })?;
        Ok(seconds)
    }

    /// The token, and whether it is sealed.
    fn wrap(&mut self, data: &[u8], seal: bool) -> Result<(Vec<u8>, bool), Error> {
        let Self { api, handle } = self;
        let (mut output, mut is_sealed, data) = (Buffer::new(api), 0, Octets::of(data));
        let octets = &mut output.octets;
        // SAFETY: the context is the library's or null, the rest lives here.
        api.call(|minor| unsafe { (api.gss_wrap)(minor, *handle, seal.into(), 0, &data, &mut is_sealed, octets) })?;
        Ok((output.as_slice().to_vec(), is_sealed != 0))
    }

    /// The data if there is some, whether it was sealed, and the major status with its remarks. The library writes into
    /// the token.
    fn unwrap(&mut self, token: &mut [u8]) -> Result<(Option<Vec<u8>>, bool, u32), Error> {
        let Self { api, handle } = self;
        let (mut output, mut is_sealed, token) = (Buffer::new(api), 0, Octets::of_mut(token));
        let octets = &mut output.octets;
        // SAFETY: the context is the library's or null, the rest lives here and may be written to.
        let major =
            api.call(|minor| unsafe { (api.gss_unwrap)(minor, *handle, &token, octets, &mut is_sealed, null_mut()) })?;
        let data = (!output.octets.value.is_null()).then(|| output.as_slice().to_vec());
        Ok((data, is_sealed != 0, major))
    }

    fn capacity(&self, seal: bool, token: u32) -> Result<u32, Error> {
        let mut size = 0;
        // SAFETY: the context is the library's or null, the rest lives here.
        self.api.call(|minor| unsafe {
            (self.api.gss_wrap_size_limit)(minor, self.handle, seal.into(), 0, token, &mut size)
        })?;
        Ok(size)
    }
}

impl Drop for RawContext {
    fn drop(&mut self) {
        if !self.handle.is_null() {
            // SAFETY: it is the library's, and nobody has released it.
            unsafe { (self.api.gss_delete_sec_context)(&mut 0, &mut self.handle, null_mut()) };
        }
    }
}
