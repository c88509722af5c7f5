//! GSSAPI authentication for SOCKS5 (RFC 1961), both sides: establishes a context and negotiates its protection level.
//!
//! [`ffi`] calls the GSSAPI library, which creates and checks tokens. `conn` protects the stream after the handshake.

pub mod ffi;
mod layout;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use smol::lock::Semaphore;
use thiserror::Error;

use crate::conn::{Conn, Protection, ReadError, SecurityContext as _, TokenOrder};
use crate::net::{parse_literal, timeout_at, unblock};
use crate::proto::{Frame, ProtectionLevel};
use ffi::{
    AcceptedContext, Credential, GSS_C_ANON_FLAG, GSS_C_CONF_FLAG, GSS_C_INTEG_FLAG, GSS_C_MUTUAL_FLAG,
    GSS_C_REPLAY_FLAG, GSS_C_SEQUENCE_FLAG, GssContext, PendingContext,
};

/// Maximum number of handshakes that wait for a KDC. Each blocks a thread for up to 30 s, the timeout of the library.
const MAX_KDC_REQUESTS: usize = 32;
/// Time that a handshake waits while [`MAX_KDC_REQUESTS`] others wait for a KDC.
const KDC_PERMIT_TIMEOUT: Duration = Duration::from_secs(1);
/// Time that a handshake waits for the library, which reads the ticket cache or waits for a KDC.
const KDC_TIMEOUT: Duration = Duration::from_secs(10);

/// A ticket, and the name of the service to use it for.
pub type Ticket = (Arc<Credential>, String);

type GssapiResult<T> = Result<T, GssapiError>;

/// Reason why no security context was established.
#[derive(Debug, Error)]
pub enum GssapiError {
    /// The peer refused the context: it sent an abort or closed the connection.
    #[error("GSSAPI: {0}")]
    Refused(String),
    /// The library reported an error, or the peer sent an unexpected message.
    #[error("GSSAPI: {0}")]
    Failed(String),
    /// The user has no valid ticket.
    #[error("GSSAPI: {0} (run kinit, or set --ccache)")]
    NoCredential(String),
    /// No GSSAPI library is installed, or the host name of the proxy is not known.
    #[error("GSSAPI: {0}")]
    Unavailable(String),
}

impl From<String> for GssapiError {
    fn from(reason: String) -> Self {
        Self::Failed(reason)
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
}

/// A client that has logged in.
#[derive(Debug)]
pub(crate) struct AuthenticatedClient {
    /// Kerberos principal of the client, `alice@REALM`.
    pub(crate) user: Vec<u8>,
    pub(crate) level: ProtectionLevel,
    /// Protection for all further data; `None` at [`ProtectionLevel::None`].
    pub(crate) protection: Option<Protection>,
    /// Set when the context detects replayed and reordered data. RFC 1961 requires this for TCP.
    pub(crate) detects_reordering: bool,
}

impl Acceptor {
    /// Loads the key of `service` (`rcmd`, `rcmd@host` or a principal), or all keys, from `keytab` or the system's one.
    pub fn new(keytab: Option<&Path>, service: Option<&str>, levels: Vec<ProtectionLevel>) -> GssapiResult<Self> {
        let credential = Arc::new(Credential::acceptor(service, keytab)?);
        Ok(Self { credential, levels })
    }

    /// Establishes a context with the client on `conn` after the server has selected GSSAPI. Calls `thread` before
    /// it accepts a token, which takes CPU time. The caller sets the deadline, and sends [`Frame::Abort`] on errors.
    pub(crate) async fn accept<T: Send + 'static>(
        &self,
        conn: &mut Conn,
        thread: impl AsyncFnOnce(&Conn) -> Result<T, String>,
    ) -> GssapiResult<AuthenticatedClient> {
        let token = match conn.read_message().await? {
            Frame::Authentication(token) if !token.is_empty() => token,
            other => return Err(failed(format!("expected an authentication token, received {other:?}"))),
        };
        let (credential, thread) = (self.credential.clone(), thread(conn).await.map_err(GssapiError::Refused)?);
        let accepted = unblock(move || {
            let _thread = thread;
            credential.accept(&token)
        });
        let accepted = accepted.await.ok_or_else(|| failed("no thread can be started"))?;
        let AcceptedContext { context, initiator: user, answer } = accepted?;
        // Sent even if it is empty (RFC 1961 section 3.6).
        send_frame(conn, Frame::Authentication(answer)).await?;
        if context.has(GSS_C_ANON_FLAG) {
            return Err(failed("the client is anonymous"));
        }
        let is_supported = |level: &ProtectionLevel| match level {
            ProtectionLevel::None => true,
            ProtectionLevel::Integrity => context.has(GSS_C_INTEG_FLAG),
            ProtectionLevel::Confidentiality => context.has(GSS_C_INTEG_FLAG | GSS_C_CONF_FLAG),
        };
        let levels: Vec<ProtectionLevel> = self.levels.iter().copied().filter(is_supported).collect();
        let detects_reordering = context.has(GSS_C_REPLAY_FLAG | GSS_C_SEQUENCE_FLAG);
        let (level, context) = negotiate_level(conn, context, &levels).await?;
        Ok(AuthenticatedClient { user, level, protection: Protection::new(context, level), detects_reordering })
    }
}

/// Reads the requested level, and sends that level if it is allowed, else the strongest allowed level. Both are
/// wrapped, or both are one byte (NEC's variant).
async fn negotiate_level(
    conn: &mut Conn,
    mut context: GssContext,
    levels: &[ProtectionLevel],
) -> GssapiResult<(ProtectionLevel, GssContext)> {
    let Frame::Protection(mut token) = conn.read_message().await? else {
        return Err(failed("expected a request for a protection level"));
    };
    let is_nec_exchange = token.len() == 1;
    let requested =
        if is_nec_exchange { token.first().copied() } else { Some(unwrap_level(&mut context, &mut token)?) };
    let allowed = requested.and_then(ProtectionLevel::from_code).filter(|level| levels.contains(level));
    let level = allowed
        .or_else(|| levels.iter().copied().max())
        .ok_or_else(|| failed("the security context supports no allowed protection level (see --gssapi-protection)"))?;
    let code = [level as u8];
    let answer = if is_nec_exchange { code.into() } else { context.wrap(&code, false)? };
    send_frame(conn, Frame::Protection(answer)).await?;
    Ok((level, context))
}

/// The client side: its ticket cache, the service name and the protection levels.
#[derive(Clone, Debug)]
pub struct Initiator {
    /// Ticket cache. [default: `KRB5CCNAME`, or the cache of the system]
    pub ccache: Option<PathBuf>,
    /// Service name without the host, or a principal with a `/`.
    pub service: String,
    /// Host in the service name. [default: the host name of the proxy]
    pub host: Option<String>,
    pub(crate) requested_level: ProtectionLevel,
    pub(crate) min_level: ProtectionLevel,
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

impl Initiator {
    /// Returns whether there are signs of tickets: an environment variable, the default cache file, or a configuration
    /// that sets or includes another cache. Without signs, the library need not be loaded.
    pub fn may_have_tickets() -> bool {
        let is_set = |variable| std::env::var_os(variable).is_some_and(|value| !value.is_empty());
        let default_cache = format!("/tmp/krb5cc_{}", rustix::process::getuid().as_raw());
        let names_cache =
            |line: &str| ["default_ccache_name", "include"].iter().any(|word| line.trim().starts_with(word));
        ["KRB5CCNAME", "KRB5_CONFIG", "KRB5_CLIENT_KTNAME"].into_iter().any(is_set)
            || Path::new(&default_cache).exists()
            || std::fs::read_to_string("/etc/krb5.conf").is_ok_and(|text| text.lines().any(names_cache))
    }

    /// Returns the client's ticket for the proxy with this host name. An expired one is an error here or at its use.
    pub async fn acquire_ticket(&self, host: &str) -> GssapiResult<Ticket> {
        let (service, ccache) = (self.target_name(host), self.ccache.clone());
        let acquired = unblock_within_kdc_timeout(move || {
            ffi::available().map_err(GssapiError::Unavailable)?;
            let ticket = Credential::initiator(ccache.as_deref(), None).map_err(GssapiError::NoCredential)?;
            service.map(|service| (Arc::new(ticket), service))
        });
        let too_slow = || failed(format!("reading the ticket cache took more than {KDC_TIMEOUT:?}"));
        let ticket = acquired.await.ok_or_else(too_slow)??;
        let ((used, service), ccache) = (ticket.clone(), self.ccache.clone());
        let permit = self.kdc_permits.try_acquire_arc();
        let expired = unblock_within_kdc_timeout(move || {
            let (_permit, mut lifetime) = (permit?, 0);
            // If the primary ticket has expired, the library may select another one, and ask its KDC.
            let is_valid = Credential::initiator(ccache.as_deref(), Some(&mut lifetime)).is_ok() && lifetime > 0;
            if is_valid { None } else { PendingContext::new(used, &service, 0).err() }
        });
        match expired.await.flatten().map(initiator_error) {
            Some(error @ GssapiError::NoCredential(_)) => Err(error),
            _ => Ok(ticket),
        }
    }

    /// Establishes a context for `ticket` on `conn` after the server has selected GSSAPI. Returns the protection for all
    /// further data; `None` at [`ProtectionLevel::None`].
    pub async fn initiate(&self, conn: &mut Conn, ticket: Ticket) -> GssapiResult<Option<Protection>> {
        let mut context = self.establish_context(conn, ticket).await?;
        if !context.has(GSS_C_MUTUAL_FLAG | GSS_C_INTEG_FLAG) {
            return Err(failed("the server did not authenticate itself"));
        }
        if !context.has(GSS_C_REPLAY_FLAG | GSS_C_SEQUENCE_FLAG) {
            return Err(failed("the security context does not detect replayed or reordered data"));
        }
        let strongest = match context.has(GSS_C_CONF_FLAG) {
            true => ProtectionLevel::Confidentiality,
            false => ProtectionLevel::Integrity,
        };
        let code = [self.requested_level.min(strongest) as u8];
        let request = if self.uses_nec_exchange { code.into() } else { context.wrap(&code, false)? };
        send_frame(conn, Frame::Protection(request)).await?;
        let mut answer = conn.read_message().await?;
        if answer == Frame::Authentication(Vec::new()) {
            // A server without a further token sends an empty one (RFC 1961 section 3.6).
            answer = conn.read_message().await?;
        }
        let code = match answer {
            Frame::Protection(token) if self.uses_nec_exchange && token.len() == 1 => token.first().copied(),
            Frame::Protection(mut token) if !self.uses_nec_exchange => Some(unwrap_level(&mut context, &mut token)?),
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

    async fn establish_context(&self, conn: &mut Conn, (ticket, service): Ticket) -> GssapiResult<GssContext> {
        let encrypts = self.requested_level == ProtectionLevel::Confidentiality;
        let flags = GSS_C_SEQUENCE_FLAG | if encrypts { GSS_C_CONF_FLAG } else { 0 };
        let permit = timeout_at(Instant::now() + KDC_PERMIT_TIMEOUT, self.kdc_permits.acquire_arc()).await;
        let permit = permit.ok_or_else(|| failed("too many logins are waiting for the KDC"))?;
        let no_answer = || failed(format!("no answer from the KDC within {KDC_TIMEOUT:?}"));
        let first = unblock_within_kdc_timeout(move || {
            // Kept until the call returns, also if its result is no longer awaited.
            let _permit = permit;
            PendingContext::new(ticket, &service, flags)
        });
        let (pending, token) = first.await.ok_or_else(no_answer)?.map_err(initiator_error)?;
        send_frame(conn, Frame::Authentication(token)).await?;
        let answer = match conn.read_message().await? {
            Frame::Authentication(token) if !token.is_empty() => token,
            other => return Err(unexpected_frame(&other)),
        };
        let established = unblock_within_kdc_timeout(move || pending.complete(&answer)).await;
        Ok(established.ok_or_else(no_answer)??)
    }

    /// Returns the name of the proxy's service. `host` is the host name of the proxy.
    fn target_name(&self, host: &str) -> GssapiResult<String> {
        let host = self.host.as_deref().unwrap_or(host);
        match self.service.contains(['/', '@']) {
            true => Ok(self.service.clone()),
            false if host.is_empty() || parse_literal(host).is_some() => Err(GssapiError::Unavailable(format!(
                "Kerberos needs the host name of the proxy, not {host:?} (use it in the URL; clients with a single proxy \
                 can set --gssapi-host)"
            ))),
            false => Ok(format!("{}@{host}", self.service)),
        }
    }
}

fn initiator_error(reason: String) -> GssapiError {
    if reason.contains("expired") { GssapiError::NoCredential(reason) } else { failed(reason) }
}

/// Runs a blocking call on another thread. Returns `None` if it takes longer than [`KDC_TIMEOUT`]; it then continues.
async fn unblock_within_kdc_timeout<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    timeout_at(Instant::now() + KDC_TIMEOUT, unblock(work)).await.flatten()
}

fn unexpected_frame(frame: &Frame) -> GssapiError {
    match frame {
        Frame::Abort => GssapiError::Refused("the server refused the login".into()),
        other => failed(format!("unexpected {other:?}")),
    }
}

/// Sends a message of the handshake, if LEN can express the length of its token.
async fn send_frame(conn: &mut Conn, frame: Frame) -> GssapiResult<()> {
    frame.check_len().map_err(|error| failed(error.to_string()))?;
    conn.write_message(&frame).await.map_err(|error| GssapiError::Refused(error.to_string()))
}

fn unwrap_level(context: &mut GssContext, token: &mut [u8]) -> GssapiResult<u8> {
    let unwrapped = context.unwrap(token)?;
    match unwrapped.data.as_slice() {
        [level] if unwrapped.order == TokenOrder::Next => Ok(*level),
        _ => Err(failed("invalid message for the protection level")),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::net::Io;

    #[test]
    fn token_that_len_cannot_express_is_an_error_and_is_not_sent() {
        let (near, mut far) = UnixStream::pair().expect("socket pair created");
        near.set_nonblocking(true).expect("option set");
        let sent = crate::net::reactor::run(async {
            let mut conn = Conn::Unix(Io::new(near.into()).expect("socket registered"));
            let too_long = send_frame(&mut conn, Frame::Authentication(vec![0; 65_536])).await;
            (too_long, send_frame(&mut conn, Frame::Authentication(vec![7])).await)
        });
        let (too_long, next) = sent.expect("the reactor runs");
        let error = too_long.expect_err("too long").to_string();
        assert_eq!(error, "GSSAPI: token of 65536 bytes is too long (at most 65535)");
        next.expect("sent");
        let mut received = Vec::new();
        far.read_to_end(&mut received).expect("read");
        assert_eq!(received, [1, 1, 0, 1, 7]);
    }
}
