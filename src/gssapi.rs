//! GSSAPI authentication for SOCKS5 (RFC 1961), client and server: establishes a security context and negotiates the
//! protection level.
//!
//! [`ffi`] calls the GSSAPI library, which creates and checks tokens. `conn` protects the stream after the handshake.

pub mod ffi;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use smol::lock::{Semaphore, SemaphoreGuardArc};

use crate::conn::{Conn, Protection, ReadError, SecurityContext, TokenOrder, Unwrapped, timeout_at};
use crate::proto::{Frame, MAX_TOKEN_LEN, ProtectionLevel};
use ffi::{Credential, GssContext, GssName, RequestedFlags};

/// Maximum number of tokens from the peer until the context must be established. Kerberos needs one.
const MAX_TOKEN_ROUNDS: usize = 8;
/// Maximum number of handshakes that wait for a KDC. Each blocks a thread for up to 30 s, the timeout of the library.
const MAX_KDC_REQUESTS: usize = 32;
/// Time that a handshake waits while [`MAX_KDC_REQUESTS`] others wait for a KDC.
const KDC_PERMIT_TIMEOUT: Duration = Duration::from_secs(1);
/// Time that a handshake waits for the library, which reads the ticket cache or waits for a KDC.
const KDC_TIMEOUT: Duration = Duration::from_secs(10);

type Result<T, E = GssapiError> = std::result::Result<T, E>;

/// Reason why no security context was established.
#[derive(Debug)]
pub enum GssapiError {
    /// The peer refused the context: it sent an abort or closed the connection.
    Refused(String),
    /// The library reported an error, or the peer sent an unexpected message.
    Failed(String),
    /// The user has no ticket.
    NoCredential(String),
    /// No GSSAPI library is installed.
    Unavailable(String),
}

impl fmt::Display for GssapiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(reason) | Self::Failed(reason) | Self::Unavailable(reason) => write!(f, "GSSAPI: {reason}"),
            Self::NoCredential(reason) => write!(f, "GSSAPI: {reason} (run kinit, or set --ccache)"),
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

fn failed(reason: impl Into<String>) -> GssapiError {
    GssapiError::Failed(reason.into())
}

/// The server side: its keys and the protection levels that it grants.
#[derive(Debug)]
pub struct Acceptor {
    credential: Arc<Credential>,
    /// Not empty.
    levels: Vec<ProtectionLevel>,
    /// One permit per CPU: accepting a token is CPU-bound.
    cpu_permits: Arc<Semaphore>,
}

/// A client that has logged in.
#[derive(Debug)]
pub struct AuthenticatedClient {
    /// Kerberos principal of the client, `alice@REALM`.
    pub user: Vec<u8>,
    /// The granted level.
    pub level: ProtectionLevel,
    /// Protection for all further data; `None` at [`ProtectionLevel::None`].
    pub protection: Option<Protection>,
    /// Set when the context detects replayed and reordered data. RFC 1961 requires this for TCP.
    pub detects_reordering: bool,
}

impl Acceptor {
    /// Loads the key of `service` (`rcmd`, `rcmd@host` or a principal), or all keys, from `keytab` or the system's one.
    ///
    /// # Errors
    /// No library is installed, or the keytab has no such key.
    pub fn new(keytab: Option<PathBuf>, service: Option<&str>, levels: Vec<ProtectionLevel>) -> Result<Self> {
        ffi::available().map_err(GssapiError::Failed)?;
        let name = service.map(import_name).transpose()?;
        let credential = Arc::new(Credential::acceptor(name.as_ref(), keytab.as_deref())?);
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self { credential, levels, cpu_permits: Arc::new(Semaphore::new(cpus)) })
    }

    /// Establishes a context with the client on `conn` after the server has selected GSSAPI. The caller sets the
    /// deadline, and sends [`Frame::Abort`] after an error.
    ///
    /// # Errors
    /// See [`GssapiError`].
    pub async fn accept(&self, conn: &mut Conn) -> Result<AuthenticatedClient> {
        let context = self.establish_context(conn).await?;
        let flags = context.flags();
        let name = context.initiator_name().filter(|_| !flags.anonymous);
        let user = name.ok_or_else(|| failed("the client is anonymous"))?.to_vec();
        let is_supported = |level: &ProtectionLevel| match level {
            ProtectionLevel::None => true,
            ProtectionLevel::Integrity => flags.integrity,
            ProtectionLevel::Confidentiality => flags.integrity && flags.confidentiality,
        };
        let levels: Vec<ProtectionLevel> = self.levels.iter().copied().filter(is_supported).collect();
        let (level, context) = negotiate_level(conn, context, &levels).await?;
        let detects_reordering = flags.replay && flags.sequence;
        Ok(AuthenticatedClient { user, level, protection: Protection::new(context, level), detects_reordering })
    }

    async fn establish_context(&self, conn: &mut Conn) -> Result<GssContext> {
        let mut context = GssContext::default();
        for _ in 0..MAX_TOKEN_ROUNDS {
            let token = match conn.read_message().await? {
                Frame::Authentication(token) if !token.is_empty() => token,
                other => return Err(failed(format!("expected an authentication token, received {other:?}"))),
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
            // The last token is sent even if it is empty (RFC 1961 section 3.6).
            if !step.output.is_empty() || step.is_complete {
                send_frame(conn, Frame::Authentication(step.output)).await?;
            }
            if step.is_complete {
                return Ok(context);
            }
        }
        Err(failed(format!("no security context after {MAX_TOKEN_ROUNDS} tokens")))
    }
}

/// Reads the requested level and sends the granted one. Both are wrapped, or both are one byte (NEC's variant).
async fn negotiate_level(
    conn: &mut Conn,
    context: GssContext,
    levels: &[ProtectionLevel],
) -> Result<(ProtectionLevel, EstablishedContext)> {
    let mut context = EstablishedContext(context);
    let Frame::Protection(mut token) = conn.read_message().await? else {
        return Err(failed("expected a request for a protection level"));
    };
    let is_nec_exchange = token.len() == 1;
    let requested = if is_nec_exchange { token.first().copied() } else { Some(context.unwrap_level(&mut token)?) };
    let level = choose_level(requested, levels)
        .ok_or_else(|| failed("the security context supports no allowed protection level (see --gssapi-protection)"))?;
    let code = [level.code()];
    let answer = if is_nec_exchange { code.into() } else { context.wrap(&code, false).map_err(failed)? };
    send_frame(conn, Frame::Protection(answer)).await?;
    Ok((level, context))
}

/// Returns the requested level if it is allowed, else the strongest allowed level.
fn choose_level(requested: Option<u8>, levels: &[ProtectionLevel]) -> Option<ProtectionLevel> {
    let requested = requested.and_then(ProtectionLevel::from_code).filter(|level| levels.contains(level));
    requested.or_else(|| levels.iter().copied().max())
}

/// The client side: its ticket cache, the service name and the protection levels.
#[derive(Debug)]
pub struct Initiator {
    /// Ticket cache. [default: `KRB5CCNAME`, or the cache of the system]
    pub ccache: Option<PathBuf>,
    /// Service name without the host, or a principal with a `/`.
    pub service: String,
    /// Host in the service name. [default: the host name of the proxy]
    pub host: Option<String>,
    /// Level that is requested.
    pub requested_level: ProtectionLevel,
    /// Lowest level that is accepted.
    pub min_level: ProtectionLevel,
    /// Set to negotiate the level in NEC's variant, as one byte that is not wrapped.
    pub uses_nec_exchange: bool,
    /// Limits how many handshakes wait for a KDC at once.
    pub kdc_permits: Arc<Semaphore>,
}

impl Default for Initiator {
    /// The defaults of RFC 1961 and Dante: service `rcmd`, encryption if possible, at least integrity protection.
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

/// A credential of the client.
#[derive(Clone, Debug)]
pub struct Ticket(Arc<Credential>);

impl Initiator {
    /// Returns whether there are signs of tickets: an environment variable, the default cache file, or a configuration
    /// that sets or includes another cache. Without signs, the library need not be loaded.
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

    /// Returns the client's credential. Does not check that it is valid for the service.
    ///
    /// # Errors
    /// No library or no ticket is available.
    pub async fn acquire_ticket(&self) -> Result<Ticket> {
        let ccache = self.ccache.clone();
        let task = smol::unblock(move || {
            ffi::available().map_err(GssapiError::Unavailable)?;
            Credential::initiator(ccache.as_deref()).map_err(|error| GssapiError::NoCredential(error.to_string()))
        });
        let credential = timeout_at(Instant::now() + KDC_TIMEOUT, task)
            .await
            .ok_or_else(|| failed(format!("reading the ticket cache took more than {KDC_TIMEOUT:?}")))?;
        Ok(Ticket(Arc::new(credential?)))
    }

    /// Establishes a context with the server on `conn` after the server has selected GSSAPI. Returns the protection for
    /// all further data; `None` at [`ProtectionLevel::None`]. `host` is the host name of the proxy.
    ///
    /// # Errors
    /// See [`GssapiError`].
    pub async fn initiate(&self, conn: &mut Conn, ticket: Ticket, host: &str) -> Result<Option<Protection>> {
        let context = self.establish_context(conn, ticket, self.target_name(host)?).await?;
        let flags = context.flags();
        if !flags.mutual || !flags.integrity {
            return Err(failed("the server did not authenticate itself"));
        }
        if !flags.replay || !flags.sequence {
            return Err(failed("the security context does not detect replayed or reordered data"));
        }
        let mut context = EstablishedContext(context);
        let strongest =
            if flags.confidentiality { ProtectionLevel::Confidentiality } else { ProtectionLevel::Integrity };
        let code = [self.requested_level.min(strongest).code()];
        let request = if self.uses_nec_exchange { code.into() } else { context.wrap(&code, false).map_err(failed)? };
        send_frame(conn, Frame::Protection(request)).await?;
        let mut answer = conn.read_message().await?;
        if answer == Frame::Authentication(Vec::new()) {
            // A server without a further token sends an empty one (RFC 1961 section 3.6).
            answer = conn.read_message().await?;
        }
        let code = match answer {
            Frame::Protection(token) if self.uses_nec_exchange && token.len() == 1 => token.first().copied(),
            Frame::Protection(mut token) if !self.uses_nec_exchange => Some(context.unwrap_level(&mut token)?),
            other => return Err(unexpected_frame(&other)),
        };
        match code.and_then(ProtectionLevel::from_code) {
            Some(level) if level < self.min_level => {
                let min = self.min_level;
                Err(failed(format!("the server grants protection {level}, required is {min} (see --gssapi-min)")))
            }
            Some(level) if level > strongest => Err(failed("the security context can't encrypt")),
            Some(level) => Ok(Protection::new(context, level)),
            None => Err(failed("the server grants an unknown protection level")),
        }
    }

    async fn establish_context(&self, conn: &mut Conn, ticket: Ticket, target: String) -> Result<GssContext> {
        let confidentiality = self.requested_level == ProtectionLevel::Confidentiality;
        let requested = RequestedFlags { sequence: true, confidentiality };
        let mut context = GssContext::default();
        let mut token: Option<Vec<u8>> = None;
        for _ in 0..MAX_TOKEN_ROUNDS {
            let (ticket, service) = (ticket.clone(), target.clone());
            // Only the first token can need a KDC.
            let permit = if token.is_none() { Some(self.kdc_permit().await?) } else { None };
            let (next_context, step) = self
                .run_blocking(permit, move || {
                    let step = import_name(&service).and_then(|name| {
                        context.init(&ticket.0, &name, requested, token.as_deref()).map_err(GssapiError::from)
                    });
                    (context, step)
                })
                .await?;
            context = next_context;
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
        Err(failed(format!("no security context after {MAX_TOKEN_ROUNDS} tokens")))
    }

    /// Returns the name of the proxy's service. `host` is the host name of the proxy.
    fn target_name(&self, host: &str) -> Result<String> {
        let host = self.host.as_deref().unwrap_or(host);
        match self.service.contains(['/', '@']) {
            true => Ok(self.service.clone()),
            false if host.is_empty() || host.parse::<std::net::IpAddr>().is_ok() => Err(failed(format!(
                "Kerberos needs the host name of the proxy, not {host:?} (set it with --gssapi-host)"
            ))),
            false => Ok(format!("{}@{host}", self.service)),
        }
    }

    /// Waits until fewer than [`MAX_KDC_REQUESTS`] handshakes wait for a KDC.
    async fn kdc_permit(&self) -> Result<SemaphoreGuardArc> {
        let permit = timeout_at(Instant::now() + KDC_PERMIT_TIMEOUT, self.kdc_permits.acquire_arc()).await;
        permit.ok_or_else(|| failed("too many logins are waiting for the KDC"))
    }

    /// Runs a blocking call on another thread, and waits at most [`KDC_TIMEOUT`] for it.
    async fn run_blocking<T: Send + 'static>(
        &self,
        permit: Option<SemaphoreGuardArc>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T> {
        let task = smol::unblock(move || {
            let _permit = permit;
            work()
        });
        // Dropping the task does not stop a running call: its thread continues, and keeps the permit.
        timeout_at(Instant::now() + KDC_TIMEOUT, task)
            .await
            .ok_or_else(|| failed(format!("no answer from the KDC within {KDC_TIMEOUT:?}")))
    }
}

/// Parses `service@host`, or a principal if there is a `/`.
fn import_name(text: &str) -> Result<GssName> {
    Ok(if text.contains('/') { GssName::principal(text)? } else { GssName::service(text)? })
}

fn unexpected_frame(frame: &Frame) -> GssapiError {
    match frame {
        Frame::Abort => GssapiError::Refused("the server refused the login".into()),
        other => failed(format!("unexpected {other:?}")),
    }
}

async fn send_frame(conn: &mut Conn, frame: Frame) -> Result<()> {
    conn.write_message(&frame).await.map_err(|error| GssapiError::Refused(error.to_string()))
}

#[derive(Debug)]
struct EstablishedContext(GssContext);

impl EstablishedContext {
    /// Unwraps the protection level, which is one byte.
    fn unwrap_level(&mut self, token: &mut [u8]) -> Result<u8> {
        let unwrapped = self.unwrap(token).map_err(failed)?;
        match unwrapped.data.as_slice() {
            [level] if unwrapped.order == TokenOrder::Next => Ok(*level),
            _ => Err(failed("invalid message for the protection level")),
        }
    }
}

impl SecurityContext for EstablishedContext {
    fn wrap(&mut self, data: &[u8], should_encrypt: bool) -> Result<Vec<u8>, String> {
        self.0.wrap(data, should_encrypt).map_err(|error| error.to_string())
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

    fn wrap_size_limit(&self, should_encrypt: bool) -> usize {
        // Used if the library reports an error: no mechanism adds as much as 256 bytes.
        self.0.wrap_size_limit(should_encrypt).unwrap_or(MAX_TOKEN_LEN - 256)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requested_level_is_granted_if_allowed_else_the_strongest_allowed() {
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
            assert_eq!(choose_level(Some(requested), levels), granted, "requested {requested}, allowed {levels:?}");
        }
    }

    #[test]
    fn target_name_adds_host_to_service_but_not_to_principal() {
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
