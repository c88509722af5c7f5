//! A context of GSSAPI from its first token to its last message, and the names it goes by: what may be called when. The
//! calls themselves are in ffi.rs.

use std::fmt;
use std::time::Duration;

use super::status::{
    BAD_NAME, BAD_QOP, CONFIDENTIALITY, DEFECTIVE_TOKEN, Error, FAILURE, Flags, INTEGRITY, MUTUAL, NO_CONTEXT, Order,
    REPLAY, SEQUENCE,
};
use super::{Credential, HOST_BASED_SERVICE, INDEFINITE, KRB5_OCTETS, KRB5_PRINCIPAL, RawContext, RawName, RawStep};

/// The longest token of RFC 1961.
const TOKEN_MAX: u32 = 65_535;

/// Whom to authenticate to, or as whom.
///
/// It holds the text, and the library's form of it is made for each call: Heimdal adds to a name without a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    text: Vec<u8>,
    is_principal: bool,
}

impl Name {
    /// `service@host`.
    ///
    /// # Errors
    /// There is no library, or it does not take that for a name.
    pub fn service(text: &str) -> Result<Self, Error> {
        Self::new(text, false)
    }

    /// A principal of Kerberos, `service/host@REALM`, which is taken as it is.
    ///
    /// # Errors
    /// There is no library, or it does not take that for a name.
    pub fn principal(text: &str) -> Result<Self, Error> {
        Self::new(text, true)
    }

    fn new(text: &str, is_principal: bool) -> Result<Self, Error> {
        // To the libraries a NUL is an end, and nothing is a name like others.
        if text.is_empty() || text.contains('\0') {
            return Err(Error::new(BAD_NAME, "a name that is empty or has a NUL in it"));
        }
        let name = Self { text: text.into(), is_principal };
        name.import().map(|_| name)
    }

    pub(super) fn import(&self) -> Result<RawName, Error> {
        RawName::import(&self.text, if self.is_principal { &KRB5_PRINCIPAL } else { &HOST_BASED_SERVICE })
    }

    /// As the library shows it.
    ///
    /// # Errors
    /// The library does not say.
    pub fn display(&self) -> Result<Vec<u8>, Error> {
        self.import()?.display()
    }
}

/// What an initiator asks for besides mutual authentication, integrity and notice of replays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wants {
    /// Notice of what is missing or out of order.
    pub sequence: bool,
    /// Sealed messages.
    pub confidentiality: bool,
}

/// What comes of a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
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
    pub is_sealed: bool,
    /// Where it stands among the others.
    pub order: Order,
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
pub struct Context {
    raw: Option<RawContext>,
    state: State,
    flags: Flags,
    peer: Option<Vec<u8>>,
}

impl Context {
    /// One that waits for its first call of [`Self::accept`] or [`Self::init`].
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a token of the initiator. What may come with it of the initiator's own credentials is not taken.
    ///
    /// # Errors
    /// What the library has against the token, or [`Self::peer`] can't be told. The context is of no use any more.
    pub fn accept(&mut self, credential: &Credential, token: &[u8]) -> Result<Step, Error> {
        let is_first = self.begin(State::Accepting)?;
        if token.is_empty() {
            return Err(Error::new(DEFECTIVE_TOKEN, "an empty token"));
        }
        let raw = if is_first { self.raw.insert(RawContext::new()?) } else { self.raw()? };
        let (step, source) = raw.accept(credential, token)?;
        if step.is_complete {
            self.peer = Some(source.display()?);
        }
        Ok(self.end(State::Accepting, step))
    }

    /// Makes the first token for `target`, or takes the answer to the last one. The initiator's credentials stay here.
    ///
    /// # Errors
    /// What the library has against it. The context is of no use any more.
    pub fn init(
        &mut self,
        credential: &Credential,
        target: &Name,
        wants: Wants,
        token: Option<&[u8]>,
    ) -> Result<Step, Error> {
        let is_first = self.begin(State::Initiating)?;
        if token.is_none() != is_first || !token.is_none_or(is_answer) {
            return Err(Error::new(DEFECTIVE_TOKEN, "no answer of an acceptor"));
        }
        let mut flags = MUTUAL | REPLAY | INTEGRITY;
        flags |= if wants.sequence { SEQUENCE } else { 0 };
        flags |= if wants.confidentiality { CONFIDENTIALITY } else { 0 };
        let target = target.import()?;
        let raw = if is_first { self.raw.insert(RawContext::new()?) } else { self.raw()? };
        let step = raw.init(credential, &target, flags, token)?;
        Ok(self.end(State::Initiating, step))
    }

    /// Whether it is the first step of this kind; the context has failed until the step's [`Self::end`].
    fn begin(&mut self, kind: State) -> Result<bool, Error> {
        if self.state != State::Fresh && self.state != kind {
            return Err(Error::new(NO_CONTEXT, "the context takes no token of this kind"));
        }
        Ok(std::mem::replace(&mut self.state, State::Failed) == State::Fresh)
    }

    fn end(&mut self, kind: State, step: RawStep) -> Step {
        self.state = if step.is_complete { State::Complete } else { kind };
        if step.is_complete {
            self.flags = Flags::new(step.flags);
        }
        Step { output: step.output, is_complete: step.is_complete }
    }

    fn raw(&mut self) -> Result<&mut RawContext, Error> {
        self.raw.as_mut().ok_or_else(incomplete)
    }

    fn complete(&self) -> Result<&RawContext, Error> {
        self.raw.as_ref().filter(|_| self.state == State::Complete).ok_or_else(incomplete)
    }

    fn complete_mut(&mut self) -> Result<&mut RawContext, Error> {
        self.complete()?;
        self.raw()
    }

    /// What it has, once complete.
    pub fn flags(&self) -> Flags {
        self.flags
    }

    /// The acceptor's view of who the initiator is, once complete: `alice@REALM`.
    pub fn peer(&self) -> Option<&[u8]> {
        self.peer.as_deref()
    }

    /// How long it is valid, by the ticket; `None` is for ever, zero also when that can't be told.
    pub fn lifetime(&self) -> Option<Duration> {
        match self.complete().and_then(RawContext::lifetime) {
            Ok(INDEFINITE) => None,
            Ok(seconds) => Some(Duration::from_secs(seconds.into())),
            Err(_) => Some(Duration::ZERO),
        }
    }

    /// Makes a message of `data`, sealed or only protected from change.
    ///
    /// # Errors
    /// The context is not complete, or the library can't; also if it does not seal.
    pub fn wrap(&mut self, data: &[u8], seal: bool) -> Result<Vec<u8>, Error> {
        let (token, is_sealed) = self.complete_mut()?.wrap(data, seal)?;
        if seal && !is_sealed { Err(Error::new(BAD_QOP, "the context does not seal")) } else { Ok(token) }
    }

    /// Takes a message, whose octets are spoilt thereby.
    ///
    /// # Errors
    /// The context is not complete, or that is no message of the other side for it, or a changed one. With Heimdal's
    /// library also any that is not the next one, which MIT's gives with its order unless there is nothing in it.
    pub fn unwrap(&mut self, token: &mut [u8]) -> Result<Unwrapped, Error> {
        let raw = self.complete_mut()?;
        if token.is_empty() {
            return Err(Error::new(DEFECTIVE_TOKEN, "an empty token"));
        }
        let (data, is_sealed, major) = raw.unwrap(token)?;
        match (data, Order::new(major)) {
            // The order of it may be a forger's: Heimdal has not looked yet who made it.
            (None, order) if order != Order::InOrder => Err(Error::new(FAILURE, "a message that is not the next one")),
            (data, order) => Ok(Unwrapped { data: data.unwrap_or_default(), is_sealed, order }),
        }
    }

    /// How many octets of data fit into one message of RFC 1961, of 65535 octets.
    ///
    /// # Errors
    /// The context is not complete, or the library does not say.
    pub fn capacity(&self, seal: bool) -> Result<usize, Error> {
        let size = self.complete()?.capacity(seal, TOKEN_MAX)?;
        Ok(usize::try_from(size).unwrap_or(usize::MAX))
    }
}

/// Whether a token is an AP-REP or a KRB-ERROR in its frame, by RFC 2743 (3.1) and RFC 4121 (4.1). Heimdal 7.8 reads
/// through a pointer that it has not set when it is neither.
fn is_answer(token: &[u8]) -> bool {
    let (length, rest) = match token {
        [0x60, 0x82, high, low, rest @ ..] => (u16::from_be_bytes([*high, *low]).into(), rest),
        [0x60, 0x81, length, rest @ ..] | [0x60, length @ ..=0x7F, rest @ ..] => (usize::from(*length), rest),
        _ => return false,
    };
    let kind = rest.strip_prefix(b"\x06\x09").and_then(|rest| rest.strip_prefix(KRB5_OCTETS));
    rest.len() == length && kind.is_some_and(|kind| matches!(kind, [2 | 3, 0, ..]))
}

fn incomplete() -> Error {
    Error::new(NO_CONTEXT, "the context is not complete")
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("state", &self.state).field("flags", &self.flags).finish_non_exhaustive()
    }
}
