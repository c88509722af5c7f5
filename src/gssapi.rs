//! GSSAPI for SOCKS5 (RFC 1961), both sides: how a security context comes about, and the level at which it is used.
//!
//! What is in tokens is the library's affair (`ffi`); what protects a stream once this is over is `conn`'s.

#[cfg_attr(not(feature = "gssapi"), path = "gssapi/absent.rs")]
pub mod ffi;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use smol::lock::{Semaphore, SemaphoreGuardArc};

use crate::conn::{Conn, Protection, ReadError, SecurityContext, TokenOrder, Unwrapped, timeout_at};
use crate::proto::{Frame, MAX_TOKEN_LEN, ProtectionLevel};
use ffi::{Credential, GssContext, GssName, RequestedFlags};

/// How many tokens one side may take to establish a context. Kerberos needs one.
const MAX_TOKEN_ROUNDS: usize = 8;
/// How many handshakes may wait for a KDC at once. Each holds a thread, and the library waits for half a minute.
const MAX_KDC_REQUESTS: usize = 32;
/// How long one waits for his turn to do so.
const KDC_PERMIT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long establishing a context may take on our side; a KDC that is silent is not waited for any longer.
const KDC_TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no context.
#[derive(Debug)]
pub enum GssapiError {
    /// The peer has refused it: with an abort, or by closing the connection.
    Refused(String),
    /// We do not take what the peer says, or the library does not.
    Failed(String),
    /// There is no credential to be had, for which the user can do something.
    NoCredential(String),
    /// There is no library.
    Unavailable(String),
}

impl fmt::Display for GssapiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(what) | Self::Failed(what) | Self::Unavailable(what) => write!(f, "GSSAPI: {what}"),
            Self::NoCredential(what) => write!(f, "GSSAPI: {what} (run kinit, or name a cache with --ccache)"),
        }
    }
}

impl std::error::Error for GssapiError {}

impl From<ffi::LibraryError> for GssapiError {
    fn from(error: ffi::LibraryError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<ReadError> for GssapiError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Protocol(error, _) => Self::Failed(error.to_string()),
            closed => Self::Refused(closed.to_string()),
        }
    }
}

fn failed(what: impl Into<String>) -> GssapiError {
    GssapiError::Failed(what.into())
}

/// The server's side: who it is, and what it grants.
#[derive(Debug)]
pub struct Acceptor {
    credential: Arc<Credential>,
    /// At least one.
    levels: Vec<ProtectionLevel>,
    cpu_permits: Arc<Semaphore>,
}

/// A client whose context is established.
#[derive(Debug)]
pub struct AuthenticatedClient {
    /// The name of the initiator, whole: `alice@REALM`.
    pub user: Vec<u8>,
    /// What was granted.
    pub level: ProtectionLevel,
    /// From here on, for the stream; none at [`ProtectionLevel::None`].
    pub protection: Option<Protection>,
    /// Whether octets that are replayed or in another order would be noticed, as RFC 1961 demands of a stream.
    pub detects_reordering: bool,
}

impl Acceptor {
    /// Takes the key of `service` (a name such as `rcmd`, `rcmd@host` or a principal with a `/`), or any key there is.
    ///
    /// # Errors
    /// The library is missing, or there is no such key.
    pub fn new(
        keytab: Option<PathBuf>,
        service: Option<&str>,
        levels: Vec<ProtectionLevel>,
    ) -> Result<Self, GssapiError> {
        ffi::available().map_err(GssapiError::Failed)?;
        let name = service.map(import_name).transpose()?;
        let credential = Arc::new(Credential::acceptor(name.as_ref(), keytab.as_deref())?);
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self { credential, levels, cpu_permits: Arc::new(Semaphore::new(cpus)) })
    }

    /// Establishes a context with the client on `conn`, which has been told that this is the method. The caller sets the
    /// deadline, and says [`Frame::Abort`] to whoever fails.
    ///
    /// # Errors
    /// Whoever fails.
    pub async fn accept(&self, conn: &mut Conn) -> Result<AuthenticatedClient, GssapiError> {
        let context = self.establish_context(conn).await?;
        let flags = context.flags();
        let user = context
            .initiator_name()
            .filter(|_| !flags.anonymous)
            .map(<[u8]>::to_vec)
            .ok_or_else(|| failed("the client has no name"))?;
        let allowed = |level: &ProtectionLevel| match level {
            ProtectionLevel::None => true,
            ProtectionLevel::Integrity => flags.integrity,
            ProtectionLevel::Confidentiality => flags.integrity && flags.confidentiality,
        };
        let levels: Vec<ProtectionLevel> = self.levels.iter().copied().filter(allowed).collect();
        let (level, context) = negotiate_level(conn, context, &levels).await?;
        let detects_reordering = flags.replay && flags.sequence;
        Ok(AuthenticatedClient { user, level, protection: Protection::new(context, level), detects_reordering })
    }

    async fn establish_context(&self, conn: &mut Conn) -> Result<GssContext, GssapiError> {
        let mut context = GssContext::default();
        for _ in 0..MAX_TOKEN_ROUNDS {
            let token = match conn.read_message().await? {
                Frame::Authentication(token) if !token.is_empty() => token,
                other => return Err(failed(format!("{other:?} where a token was due"))),
            };
            let (credential, permit) = (self.credential.clone(), self.cpu_permits.acquire_arc().await);
            let step;
            (context, step) = smol::unblock(move || {
                let _permit = permit;
                let step = context.accept(&credential, &token);
                (context, step)
            })
            .await;
            let step = step?;
            // The last token may be empty, and is said all the same (RFC 1961 section 3.6).
            if !step.output.is_empty() || step.is_complete {
                send_frame(conn, Frame::Authentication(step.output)).await?;
            }
            if step.is_complete {
                return Ok(context);
            }
        }
        Err(failed("too many tokens"))
    }
}

/// Grants a level, in the form in which it was asked for: wrapped, or as NEC has it, as it is.
async fn negotiate_level(
    conn: &mut Conn,
    context: GssContext,
    levels: &[ProtectionLevel],
) -> Result<(ProtectionLevel, EstablishedContext), GssapiError> {
    let mut context = EstablishedContext(context);
    let Frame::Protection(mut token) = conn.read_message().await? else {
        return Err(failed("no level of protection was asked for"));
    };
    let is_nec_exchange = token.len() == 1;
    let requested = if is_nec_exchange { token.first().copied() } else { Some(context.unwrap_level(&mut token)?) };
    let level =
        choose_level(requested, levels).ok_or_else(|| failed("none of the levels that are allowed can be had"))?;
    let answer =
        if is_nec_exchange { vec![level.code()] } else { context.wrap(&[level.code()], false).map_err(failed)? };
    send_frame(conn, Frame::Protection(answer)).await?;
    Ok((level, context))
}

/// What was asked for where that is allowed, else the strongest that is.
fn choose_level(requested: Option<u8>, levels: &[ProtectionLevel]) -> Option<ProtectionLevel> {
    let requested = requested.and_then(ProtectionLevel::from_code).filter(|level| levels.contains(level));
    requested.or_else(|| levels.iter().copied().max())
}

/// The client's side: whom it logs in as, to what, and what it wants.
#[derive(Debug)]
pub struct Initiator {
    /// A file with tickets; else what the environment says.
    pub ccache: Option<PathBuf>,
    /// The service's name without its host, or a principal with a `/`.
    pub service: String,
    /// The host in the service's name, where it is not that of the proxy.
    pub host: Option<String>,
    /// The level that is asked for.
    pub requested_level: ProtectionLevel,
    /// The lowest that is taken.
    pub min_level: ProtectionLevel,
    /// Whether the level is said as NEC does it.
    pub uses_nec_exchange: bool,
    /// How many may wait for a KDC.
    pub kdc_permits: Arc<Semaphore>,
}

impl Default for Initiator {
    /// As RFC 1961 and Dante have it: the service is `rcmd`, everything is sealed if possible and signed in any case.
    fn default() -> Self {
        Self {
            ccache: None,
            service: "rcmd".into(),
            host: None,
            requested_level: ProtectionLevel::Confidentiality,
            min_level: ProtectionLevel::Integrity,
            uses_nec_exchange: false,
            kdc_permits: Arc::new(Semaphore::new(MAX_KDC_REQUESTS)),
        }
    }
}

/// Something to log in with.
#[derive(Clone, Debug)]
pub struct Ticket(Arc<Credential>);

impl Initiator {
    /// Whether it is worth to look for tickets, which takes a library and the time to load it: where the environment says
    /// so, the usual cache is there, or the configuration names or includes another one.
    pub fn may_have_tickets() -> bool {
        let is_set = |variable| std::env::var_os(variable).is_some_and(|value| !value.is_empty());
        let default_cache = format!("/tmp/krb5cc_{}", rustix::process::getuid().as_raw());
        ["KRB5CCNAME", "KRB5_CONFIG", "KRB5_CLIENT_KTNAME"].into_iter().any(is_set)
            || std::path::Path::new(&default_cache).exists()
            || std::fs::read_to_string("/etc/krb5.conf").is_ok_and(|text| {
                text.lines()
                    .any(|line| ["default_ccache_name", "include"].iter().any(|word| line.trim().starts_with(word)))
            })
    }

    /// The credential, when there is one; whether it is good for the service shows later.
    ///
    /// # Errors
    /// Why not.
    pub async fn acquire_ticket(&self) -> Result<Ticket, GssapiError> {
        let ccache = self.ccache.clone();
        let found = smol::unblock(move || {
            ffi::available().map_err(GssapiError::Unavailable)?;
            Credential::initiator(ccache.as_deref()).map_err(|error| GssapiError::NoCredential(error.to_string()))
        });
        let found =
            timeout_at(Instant::now() + KDC_TIMEOUT, found).await.ok_or_else(|| failed("no answer about tickets"))?;
        Ok(Ticket(Arc::new(found?)))
    }

    /// Establishes a context with the server on `conn`, which has selected this method: what protects the connection
    /// from here on, none at [`ProtectionLevel::None`]. `host` is how we call the proxy.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn initiate(
        &self,
        conn: &mut Conn,
        ticket: Ticket,
        host: &str,
    ) -> Result<Option<Protection>, GssapiError> {
        let context = self.establish_context(conn, ticket, self.target_name(host)?).await?;
        let flags = context.flags();
        if !flags.mutual || !flags.integrity {
            return Err(failed("the server has not shown who it is"));
        }
        if !flags.replay || !flags.sequence {
            return Err(failed("the context would not notice octets in another order"));
        }
        let mut context = EstablishedContext(context);
        let level = if flags.confidentiality {
            self.requested_level
        } else {
            self.requested_level.min(ProtectionLevel::Integrity)
        };
        let requested = vec![level.code()];
        let requested =
            if self.uses_nec_exchange { requested } else { context.wrap(&requested, false).map_err(failed)? };
        send_frame(conn, Frame::Protection(requested)).await?;
        let mut answer = conn.read_message().await?;
        if answer == Frame::Authentication(Vec::new()) {
            // What a server says that has nothing more to say (RFC 1961 section 3.6).
            answer = conn.read_message().await?;
        }
        let code = match answer {
            Frame::Protection(token) if self.uses_nec_exchange && token.len() == 1 => token.first().copied(),
            Frame::Protection(mut token) if !self.uses_nec_exchange => Some(context.unwrap_level(&mut token)?),
            other => return Err(unexpected_frame(&other)),
        };
        match code.and_then(ProtectionLevel::from_code) {
            Some(level) if level < self.min_level => {
                let why = format!("the server grants {level}, and the least that is taken is {}", self.min_level);
                Err(failed(why + " (--gssapi-min)"))
            }
            Some(ProtectionLevel::Confidentiality) if !flags.confidentiality => Err(failed("the context can't seal")),
            Some(level) => Ok(Protection::new(context, level)),
            None => Err(failed("the server grants a level that there is not")),
        }
    }

    async fn establish_context(
        &self,
        conn: &mut Conn,
        ticket: Ticket,
        target: String,
    ) -> Result<GssContext, GssapiError> {
        let requested = RequestedFlags {
            sequence: true,
            confidentiality: self.requested_level == ProtectionLevel::Confidentiality,
        };
        let mut context = GssContext::default();
        let mut token: Option<Vec<u8>> = None;
        for _ in 0..MAX_TOKEN_ROUNDS {
            let (ticket, service) = (ticket.clone(), target.clone());
            // Only the first token can be had from a KDC.
            let permit = if token.is_none() { Some(self.kdc_permit().await?) } else { None };
            let (after, step) = self
                .run_blocking(permit, move || {
                    let step = import_name(&service).and_then(|name| {
                        context.init(&ticket.0, &name, requested, token.as_deref()).map_err(GssapiError::from)
                    });
                    (context, step)
                })
                .await?;
            context = after;
            let step = step?;
            if !step.output.is_empty() {
                send_frame(conn, Frame::Authentication(step.output)).await?;
            }
            if step.is_complete {
                return Ok(context);
            }
            token = match conn.read_message().await? {
                Frame::Authentication(token) if !token.is_empty() => Some(token),
                other => return Err(unexpected_frame(&other)),
            };
        }
        Err(failed("too many tokens"))
    }

    /// The name of the service on `host`.
    fn target_name(&self, host: &str) -> Result<String, GssapiError> {
        let host = self.host.as_deref().unwrap_or(host);
        match self.service.contains(['/', '@']) {
            true => Ok(self.service.clone()),
            false if host.is_empty() || host.parse::<std::net::IpAddr>().is_ok() => Err(failed(format!(
                "Kerberos knows hosts by name, and the proxy is {host:?}: name it with --gssapi-host"
            ))),
            false => Ok(format!("{}@{host}", self.service)),
        }
    }

    /// For whoever may have to wait for a KDC.
    async fn kdc_permit(&self) -> Result<SemaphoreGuardArc, GssapiError> {
        let permit = timeout_at(Instant::now() + KDC_PERMIT_TIMEOUT, self.kdc_permits.acquire_arc()).await;
        permit.ok_or_else(|| failed("too many are waiting for the KDC"))
    }

    /// Runs what may take long; gives up waiting for it after a while.
    async fn run_blocking<T: Send + 'static>(
        &self,
        permit: Option<SemaphoreGuardArc>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, GssapiError> {
        let task = smol::unblock(move || {
            let _permit = permit;
            work()
        });
        // A task that is dropped is not cancelled once it runs; its thread goes on, and its permit with it.
        timeout_at(Instant::now() + KDC_TIMEOUT, task).await.ok_or_else(|| failed("the KDC gives no answer"))
    }
}

/// `service@host`, or a principal, which has a `/`.
fn import_name(text: &str) -> Result<GssName, GssapiError> {
    Ok(if text.contains('/') { GssName::principal(text)? } else { GssName::service(text)? })
}

fn unexpected_frame(frame: &Frame) -> GssapiError {
    match frame {
        Frame::Abort => GssapiError::Refused("refused by the server".into()),
        other => failed(format!("{other:?} out of place")),
    }
}

async fn send_frame(conn: &mut Conn, frame: Frame) -> Result<(), GssapiError> {
    conn.write_message(&frame).await.map_err(|error| GssapiError::Refused(error.to_string()))
}

/// A context that is established.
#[derive(Debug)]
struct EstablishedContext(GssContext);

impl EstablishedContext {
    /// The one octet of a wrapped level.
    fn unwrap_level(&mut self, token: &mut [u8]) -> Result<u8, GssapiError> {
        let unwrapped = self.unwrap(token).map_err(failed)?;
        match unwrapped.data.as_slice() {
            [level] if unwrapped.order == TokenOrder::Next => Ok(*level),
            _ => Err(failed("a level that is not one octet in its place")),
        }
    }
}

impl SecurityContext for EstablishedContext {
    fn wrap(&mut self, data: &[u8], encrypt: bool) -> Result<Vec<u8>, String> {
        self.0.wrap(data, encrypt).map_err(|error| error.to_string())
    }

    fn unwrap(&mut self, token: &mut [u8]) -> Result<Unwrapped, String> {
        let unwrapped = self.0.unwrap(token).map_err(|error| error.to_string())?;
        let order = match unwrapped.order {
            ffi::SequenceStatus::InOrder => TokenOrder::Next,
            ffi::SequenceStatus::Gap | ffi::SequenceStatus::Unsequenced => TokenOrder::OutOfOrder,
            ffi::SequenceStatus::Duplicate | ffi::SequenceStatus::Old => TokenOrder::Duplicate,
        };
        Ok(Unwrapped { data: unwrapped.data, is_encrypted: unwrapped.is_encrypted, order })
    }

    fn wrap_size_limit(&self, encrypt: bool) -> usize {
        // More than any mechanism needs, should the library not say.
        self.0.wrap_size_limit(encrypt).unwrap_or(MAX_TOKEN_LEN - 256)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_granted_or_the_strongest_there_is() {
        use ProtectionLevel::{Confidentiality, Integrity, None as Clear};
        let table: [(u8, &[ProtectionLevel], Option<ProtectionLevel>); 9] = [
            (1, &[Integrity, Confidentiality], Some(Integrity)),
            (2, &[Integrity, Confidentiality], Some(Confidentiality)),
            (0, &[Integrity, Confidentiality], Some(Confidentiality)),
            (3, &[Integrity, Confidentiality], Some(Confidentiality)),
            (2, &[Clear], Some(Clear)),
            (2, &[Clear, Integrity, Confidentiality], Some(Confidentiality)),
            (0, &[Clear, Integrity], Some(Clear)),
            (2, &[Clear, Integrity], Some(Integrity)),
            (1, &[], None),
        ];
        for (requested, levels, granted) in table {
            assert_eq!(choose_level(Some(requested), levels), granted, "{requested} of {levels:?}");
        }
    }

    #[test]
    fn a_service_is_named_with_its_host_and_a_principal_as_it_is() {
        let target = |service: &str, host: Option<&str>, proxy: &str| {
            let initiator = Initiator { service: service.into(), host: host.map(Into::into), ..Initiator::default() };
            initiator.target_name(proxy).ok()
        };
        assert_eq!(target("rcmd", None, "proxy.test").as_deref(), Some("rcmd@proxy.test"));
        assert_eq!(target("rcmd", Some("real.test"), "192.0.2.1").as_deref(), Some("rcmd@real.test"));
        assert_eq!(target("socks/other.test@REALM", None, "192.0.2.1").as_deref(), Some("socks/other.test@REALM"));
        assert_eq!(target("rcmd", None, "192.0.2.1"), None);
    }
}
