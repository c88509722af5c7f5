//! A context of GSSAPI from its first token to its last message, and the names it goes by: what may be called when. The
//! calls themselves are in ffi.rs.

use std::fmt;
use std::time::Duration;

use super::status::{
    ContextFlags, GSS_C_CONF_FLAG, GSS_C_INTEG_FLAG, GSS_C_MUTUAL_FLAG, GSS_C_REPLAY_FLAG, GSS_C_SEQUENCE_FLAG,
    GSS_S_BAD_NAME, GSS_S_BAD_QOP, GSS_S_DEFECTIVE_TOKEN, GSS_S_FAILURE, GSS_S_NO_CONTEXT, LibraryError,
    SequenceStatus,
};
use super::{
    Credential, GSS_C_INDEFINITE, HOSTBASED_SERVICE_OID, KRB5_OID_BYTES, KRB5_PRINCIPAL_OID, RawContext, RawName,
    RawStep,
};

/// The longest token of RFC 1961.
const MAX_TOKEN_LEN: u32 = 65_535;

/// Whom to authenticate to, or as whom.
///
/// It holds the text, and the library's form of it is made for each call: Heimdal adds to a name without a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GssName {
    text: Vec<u8>,
    is_principal: bool,
}

impl GssName {
    /// `service@host`.
    ///
    /// # Errors
    /// There is no library, or it does not take that for a name.
    pub fn service(text: &str) -> Result<Self, LibraryError> {
        Self::new(text, false)
    }

    /// A principal of Kerberos, `service/host@REALM`, which is taken as it is.
    ///
    /// # Errors
    /// There is no library, or it does not take that for a name.
    pub fn principal(text: &str) -> Result<Self, LibraryError> {
        Self::new(text, true)
    }

    fn new(text: &str, is_principal: bool) -> Result<Self, LibraryError> {
        // To the libraries a NUL is an end, and nothing is a name like others.
        if text.is_empty() || text.contains('\0') {
            return Err(LibraryError::new(GSS_S_BAD_NAME, "a name that is empty or has a NUL in it"));
        }
        let name = Self { text: text.into(), is_principal };
        name.import().map(|_| name)
    }

    pub(super) fn import(&self) -> Result<RawName, LibraryError> {
        RawName::import(&self.text, if self.is_principal { &KRB5_PRINCIPAL_OID } else { &HOSTBASED_SERVICE_OID })
    }

    /// As the library shows it.
    ///
    /// # Errors
    /// The library does not say.
    pub fn display(&self) -> Result<Vec<u8>, LibraryError> {
        self.import()?.display()
    }
}

/// What an initiator asks for besides mutual authentication, integrity and notice of replays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestedFlags {
    /// Notice of what is missing or out of order.
    pub sequence: bool,
    /// Sealed messages.
    pub confidentiality: bool,
}

/// What comes of a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextStep {
    /// For the other side; may be empty.
    pub output: Vec<u8>,
    /// Whether this side needs no more tokens.
    pub is_complete: bool,
}

/// A message that came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unwrapped {
    /// What was wrapped.
    pub data: Vec<u8>,
    /// Whether nobody else can have read it.
    pub is_encrypted: bool,
    /// Where it stands among the others.
    pub order: SequenceStatus,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Fresh,
    Accepting,
    Initiating,
    Complete,
    /// For good.
    Failed,
}

/// One side of an authenticated conversation. Not for two threads at once.
#[derive(Default)]
pub struct GssContext {
    raw: Option<RawContext>,
    state: State,
    flags: ContextFlags,
    initiator_name: Option<Vec<u8>>,
}

impl GssContext {
    /// One that waits for its first call of [`Self::accept`] or [`Self::init`].
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a token of the initiator. What may come with it of the initiator's own credentials is not taken.
    ///
    /// # Errors
    /// What the library has against the token, or [`Self::initiator_name`] can't be told. The context is of no use any more.
    pub fn accept(&mut self, credential: &Credential, token: &[u8]) -> Result<ContextStep, LibraryError> {
        let is_first = self.begin_step(State::Accepting)?;
        if token.is_empty() {
            return Err(LibraryError::new(GSS_S_DEFECTIVE_TOKEN, "an empty token"));
        }
        let raw = if is_first { self.raw.insert(RawContext::new()?) } else { self.raw_mut()? };
        let (step, initiator) = raw.accept(credential, token)?;
        if step.is_complete {
            self.initiator_name = Some(initiator.display()?);
        }
        Ok(self.finish_step(State::Accepting, step))
    }

    /// Makes the first token for `target`, or takes the answer to the last one. The initiator's credentials stay here.
    ///
    /// # Errors
    /// What the library has against it. The context is of no use any more.
    pub fn init(
        &mut self,
        credential: &Credential,
        target: &GssName,
        requested: RequestedFlags,
        token: Option<&[u8]>,
    ) -> Result<ContextStep, LibraryError> {
        let is_first = self.begin_step(State::Initiating)?;
        if token.is_none() != is_first || !token.is_none_or(is_acceptor_token) {
            return Err(LibraryError::new(GSS_S_DEFECTIVE_TOKEN, "no answer of an acceptor"));
        }
        let mut flags = GSS_C_MUTUAL_FLAG | GSS_C_REPLAY_FLAG | GSS_C_INTEG_FLAG;
        flags |= if requested.sequence { GSS_C_SEQUENCE_FLAG } else { 0 };
        flags |= if requested.confidentiality { GSS_C_CONF_FLAG } else { 0 };
        let target = target.import()?;
        let raw = if is_first { self.raw.insert(RawContext::new()?) } else { self.raw_mut()? };
        let step = raw.init(credential, &target, flags, token)?;
        Ok(self.finish_step(State::Initiating, step))
    }

    /// Whether it is the first step of this kind; the context has failed until the step's [`Self::finish_step`].
    fn begin_step(&mut self, kind: State) -> Result<bool, LibraryError> {
        if self.state != State::Fresh && self.state != kind {
            return Err(LibraryError::new(GSS_S_NO_CONTEXT, "the context takes no token of this kind"));
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

    fn raw_mut(&mut self) -> Result<&mut RawContext, LibraryError> {
        self.raw.as_mut().ok_or_else(not_established)
    }

    fn established(&self) -> Result<&RawContext, LibraryError> {
        self.raw.as_ref().filter(|_| self.state == State::Complete).ok_or_else(not_established)
    }

    fn established_mut(&mut self) -> Result<&mut RawContext, LibraryError> {
        self.established()?;
        self.raw_mut()
    }

    /// What it has, once complete.
    pub fn flags(&self) -> ContextFlags {
        self.flags
    }

    /// The acceptor's view of who the initiator is, once complete: `alice@REALM`.
    pub fn initiator_name(&self) -> Option<&[u8]> {
        self.initiator_name.as_deref()
    }

    /// How long it is valid, by the ticket; `None` is for ever, zero also when that can't be told.
    pub fn lifetime(&self) -> Option<Duration> {
        match self.established().and_then(RawContext::lifetime) {
            Ok(GSS_C_INDEFINITE) => None,
            Ok(seconds) => Some(Duration::from_secs(seconds.into())),
            Err(_) => Some(Duration::ZERO),
        }
    }

    /// Makes a message of `data`, sealed or only protected from change.
    ///
    /// # Errors
    /// The context is not complete, or the library can't; also if it does not seal.
    pub fn wrap(&mut self, data: &[u8], encrypt: bool) -> Result<Vec<u8>, LibraryError> {
        let (token, is_encrypted) = self.established_mut()?.wrap(data, encrypt)?;
        if encrypt && !is_encrypted {
            Err(LibraryError::new(GSS_S_BAD_QOP, "the context does not seal"))
        } else {
            Ok(token)
        }
    }

    /// Takes a message, whose octets are spoilt thereby.
    ///
    /// # Errors
    /// The context is not complete, or that is no message of the other side for it, or a changed one. With Heimdal's
    /// library also any that is not the next one, which MIT's gives with its order unless there is nothing in it.
    pub fn unwrap(&mut self, token: &mut [u8]) -> Result<Unwrapped, LibraryError> {
        let raw = self.established_mut()?;
        if token.is_empty() {
            return Err(LibraryError::new(GSS_S_DEFECTIVE_TOKEN, "an empty token"));
        }
        let (data, is_encrypted, major) = raw.unwrap(token)?;
        match (data, SequenceStatus::new(major)) {
            // The order of it may be a forger's: Heimdal has not looked yet who made it.
            (None, order) if order != SequenceStatus::InOrder => {
                Err(LibraryError::new(GSS_S_FAILURE, "a message that is not the next one"))
            }
            (data, order) => Ok(Unwrapped { data: data.unwrap_or_default(), is_encrypted, order }),
        }
    }

    /// How many octets of data fit into one message of RFC 1961, of 65535 octets.
    ///
    /// # Errors
    /// The context is not complete, or the library does not say.
    pub fn wrap_size_limit(&self, encrypt: bool) -> Result<usize, LibraryError> {
        let size = self.established()?.wrap_size_limit(encrypt, MAX_TOKEN_LEN)?;
        Ok(usize::try_from(size).unwrap_or(usize::MAX))
    }
}

/// Whether a token is an AP-REP or a KRB-ERROR in its frame, by RFC 2743 (3.1) and RFC 4121 (4.1). Heimdal 7.8 reads
/// through a pointer that it has not set when it is neither.
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
    LibraryError::new(GSS_S_NO_CONTEXT, "the context is not complete")
}

impl fmt::Debug for GssContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GssContext").field("state", &self.state).field("flags", &self.flags).finish_non_exhaustive()
    }
}
