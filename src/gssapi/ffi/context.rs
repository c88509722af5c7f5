//! Security contexts and names with a safe interface, which checks the order of the calls. The calls are in ffi.rs.

use std::fmt;
use std::time::Duration;

use super::status::{
    ContextFlags, GSS_C_CONF_FLAG, GSS_C_INTEG_FLAG, GSS_C_MUTUAL_FLAG, GSS_C_REPLAY_FLAG, GSS_C_SEQUENCE_FLAG,
    GSS_S_BAD_NAME, GSS_S_BAD_QOP, GSS_S_DEFECTIVE_TOKEN, GSS_S_FAILURE, GSS_S_NO_CONTEXT, LibraryError, Result,
    SequenceStatus,
};
use super::{
    Credential, GSS_C_INDEFINITE, HOSTBASED_SERVICE_OID, KRB5_OID_BYTES, KRB5_PRINCIPAL_OID, RawContext, RawName,
    RawStep,
};

const MAX_TOKEN_LEN: u32 = crate::proto::MAX_TOKEN_LEN as u32;

/// The name of a service or user.
///
/// Holds the text and imports it for each call: Heimdal's library modifies imported names without a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GssName {
    text: Vec<u8>,
    is_principal: bool,
}

impl GssName {
    /// Returns the host-based service `service@host`.
    ///
    /// # Errors
    /// No library is installed, or it rejects the name.
    pub fn service(text: &str) -> Result<Self> {
        Self::new(text, false)
    }

    /// Returns the Kerberos principal `service/host@REALM`.
    ///
    /// # Errors
    /// No library is installed, or it rejects the name.
    pub fn principal(text: &str) -> Result<Self> {
        Self::new(text, true)
    }

    fn new(text: &str, is_principal: bool) -> Result<Self> {
        // The libraries cut off a name at a NUL byte, and accept an empty name.
        if text.is_empty() || text.contains('\0') {
            return Err(LibraryError::new(GSS_S_BAD_NAME, "name is empty or contains a NUL byte"));
        }
        let name = Self { text: text.into(), is_principal };
        name.import().map(|_| name)
    }

    pub(super) fn import(&self) -> Result<RawName> {
        RawName::import(&self.text, if self.is_principal { &KRB5_PRINCIPAL_OID } else { &HOSTBASED_SERVICE_OID })
    }

    /// Returns the text of the name in the library's form.
    ///
    /// # Errors
    /// Errors from the library.
    pub fn display(&self) -> Result<Vec<u8>> {
        self.import()?.display()
    }
}

/// Flags that an initiator requests in addition to mutual authentication, integrity and replay detection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestedFlags {
    /// Detection of missing and reordered messages.
    pub sequence: bool,
    /// Encryption.
    pub confidentiality: bool,
}

/// Result of processing a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextStep {
    /// Token for the peer; can be empty.
    pub output: Vec<u8>,
    /// Set when this side has established the context.
    pub is_complete: bool,
}

/// A message from the peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unwrapped {
    /// The data that was wrapped.
    pub data: Vec<u8>,
    /// Set when the data was encrypted.
    pub is_encrypted: bool,
    /// Position relative to other messages.
    pub order: SequenceStatus,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Fresh,
    Accepting,
    Initiating,
    Complete,
    /// Rejects all further calls.
    Failed,
}

/// One side of a security context. Must not be used by two threads at once.
#[derive(Default)]
pub struct GssContext {
    raw: Option<RawContext>,
    state: State,
    flags: ContextFlags,
    initiator_name: Option<Vec<u8>>,
}

impl GssContext {
    /// Returns a context for a first call of [`Self::accept`] or [`Self::init`].
    pub fn new() -> Self {
        Self::default()
    }

    /// Processes a token of the initiator. Ignores a delegated credential.
    ///
    /// # Errors
    /// The library rejects the token, or the initiator's name is not available. The context is then unusable.
    pub fn accept(&mut self, credential: &Credential, token: &[u8]) -> Result<ContextStep> {
        let is_first = self.begin_step(State::Accepting)?;
        if token.is_empty() {
            return Err(LibraryError::new(GSS_S_DEFECTIVE_TOKEN, "empty token"));
        }
        let raw = if is_first { self.raw.insert(RawContext::new()?) } else { self.raw_mut()? };
        let (step, initiator) = raw.accept(credential, token)?;
        if step.is_complete {
            self.initiator_name = Some(initiator.display()?);
        }
        Ok(self.finish_step(State::Accepting, step))
    }

    /// Creates the first token for `target`, or processes the answer to the last token. Never delegates the credential.
    ///
    /// # Errors
    /// The library reports an error. The context is then unusable.
    pub fn init(
        &mut self,
        credential: &Credential,
        target: &GssName,
        requested: RequestedFlags,
        token: Option<&[u8]>,
    ) -> Result<ContextStep> {
        let is_first = self.begin_step(State::Initiating)?;
        if token.is_none() != is_first || !token.is_none_or(is_acceptor_token) {
            return Err(LibraryError::new(GSS_S_DEFECTIVE_TOKEN, "not the answer of a Kerberos acceptor"));
        }
        let mut flags = GSS_C_MUTUAL_FLAG | GSS_C_REPLAY_FLAG | GSS_C_INTEG_FLAG;
        flags |= if requested.sequence { GSS_C_SEQUENCE_FLAG } else { 0 };
        flags |= if requested.confidentiality { GSS_C_CONF_FLAG } else { 0 };
        let target = target.import()?;
        let raw = if is_first { self.raw.insert(RawContext::new()?) } else { self.raw_mut()? };
        let step = raw.init(credential, &target, flags, token)?;
        Ok(self.finish_step(State::Initiating, step))
    }

    /// Returns whether this is the first step. The context is failed until [`Self::finish_step`].
    fn begin_step(&mut self, kind: State) -> Result<bool> {
        if self.state != State::Fresh && self.state != kind {
            return Err(LibraryError::new(GSS_S_NO_CONTEXT, "unexpected token for the security context"));
        }
        Ok(std::mem::replace(&mut self.state, State::Failed) == State::Fresh)
    }

    fn finish_step(&mut self, kind: State, step: RawStep) -> ContextStep {
        self.state = if step.is_complete { State::Complete } else { kind };
        if step.is_complete {
            self.flags = ContextFlags::new(step.flags);
        }
        ContextStep { output: step.output, is_complete: step.is_complete }
    }

    fn raw_mut(&mut self) -> Result<&mut RawContext> {
        self.raw.as_mut().ok_or_else(not_established)
    }

    fn established(&self) -> Result<&RawContext> {
        self.raw.as_ref().filter(|_| self.state == State::Complete).ok_or_else(not_established)
    }

    fn established_mut(&mut self) -> Result<&mut RawContext> {
        self.established()?;
        self.raw_mut()
    }

    /// Returns the flags of the established context.
    pub fn flags(&self) -> ContextFlags {
        self.flags
    }

    /// Returns the initiator's principal, `alice@REALM`. Available to the acceptor of an established context.
    pub fn initiator_name(&self) -> Option<&[u8]> {
        self.initiator_name.as_deref()
    }

    /// Returns the remaining lifetime of the ticket; `None` if it is unlimited, zero if it is not available.
    pub fn lifetime(&self) -> Option<Duration> {
        match self.established().and_then(RawContext::lifetime) {
            Ok(GSS_C_INDEFINITE) => None,
            Ok(seconds) => Some(Duration::from_secs(seconds.into())),
            Err(_) => Some(Duration::ZERO),
        }
    }

    /// Wraps `data` into a message, encrypted or only integrity-protected.
    ///
    /// # Errors
    /// The context is not established, the library reports an error, or it did not encrypt.
    pub fn wrap(&mut self, data: &[u8], should_encrypt: bool) -> Result<Vec<u8>> {
        let (token, is_encrypted) = self.established_mut()?.wrap(data, should_encrypt)?;
        if should_encrypt && !is_encrypted {
            Err(LibraryError::new(GSS_S_BAD_QOP, "the security context can't encrypt"))
        } else {
            Ok(token)
        }
    }

    /// Unwraps a message. Overwrites `token`.
    ///
    /// # Errors
    /// The context is not established, or the message was changed or is not for this context. Heimdal's library also
    /// rejects messages out of order; MIT's returns them with their order, unless they are empty.
    pub fn unwrap(&mut self, token: &mut [u8]) -> Result<Unwrapped> {
        let raw = self.established_mut()?;
        if token.is_empty() {
            return Err(LibraryError::new(GSS_S_DEFECTIVE_TOKEN, "empty token"));
        }
        let (data, is_encrypted, major) = raw.unwrap(token)?;
        match (data, SequenceStatus::new(major)) {
            // Heimdal's library has not verified the message yet, so the order can be forged.
            (None, order) if order != SequenceStatus::InOrder => {
                Err(LibraryError::new(GSS_S_FAILURE, "message out of order"))
            }
            (data, order) => Ok(Unwrapped { data: data.unwrap_or_default(), is_encrypted, order }),
        }
    }

    /// Returns how much data fits into a token of 65535 bytes, in bytes.
    ///
    /// # Errors
    /// The context is not established, or the library reports an error.
    pub fn wrap_size_limit(&self, should_encrypt: bool) -> Result<usize> {
        let size = self.established()?.wrap_size_limit(should_encrypt, MAX_TOKEN_LEN)?;
        Ok(usize::try_from(size).unwrap_or(usize::MAX))
    }
}

/// Returns whether a token is a framed AP-REP or KRB-ERROR (RFC 2743 section 3.1, RFC 4121 section 4.1). For other
/// tokens, Heimdal 7.8 dereferences an uninitialized pointer.
fn is_acceptor_token(token: &[u8]) -> bool {
    let (length, rest) = match token {
        [0x60, 0x82, high, low, rest @ ..] => (u16::from_be_bytes([*high, *low]).into(), rest),
        [0x60, 0x81, length, rest @ ..] | [0x60, length @ ..=0x7F, rest @ ..] => (usize::from(*length), rest),
        _ => return false,
    };
    let kind = rest.strip_prefix(b"\x06\x09").and_then(|rest| rest.strip_prefix(KRB5_OID_BYTES));
    rest.len() == length && kind.is_some_and(|kind| matches!(kind, [2 | 3, 0, ..]))
}

fn not_established() -> LibraryError {
    LibraryError::new(GSS_S_NO_CONTEXT, "the security context is not established")
}

impl fmt::Debug for GssContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GssContext").field("state", &self.state).field("flags", &self.flags).finish_non_exhaustive()
    }
}
