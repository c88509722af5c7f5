//! HTTP/1.1 for metrics and health checks, on a thread of its own: one request for each connection. Time, size and the
//! number of connections are limited.

use std::cell::Cell;
use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::rc::Rc;
use std::sync::{Arc, OnceLock, Weak};
use std::thread::Builder;
use std::time::{Duration, Instant};

use async_net::TcpStream;
use futures_lite::future::yield_now;
use futures_lite::{AsyncReadExt as _, AsyncWriteExt as _, FutureExt as _};
use smol::channel::Receiver;
use smol::{Async, LocalExecutor, Timer};

use super::handshakes::{HandshakeGuard, Handshakes};
use super::limiter::warn;
use super::listen::Listener;
use super::metrics;
use super::shares::ClientKey;
use super::state::Server;
use crate::counters::Histogram;
use crate::net::{ACCEPT_RETRY_DELAY, accept};

const MAX_CONNECTIONS: usize = 32;
/// Maximum length of a request with its header, and of what follows it, in bytes.
const MAX_REQUEST_LEN: usize = 8 << 10;
/// Time from accept to the end of the request, and from there to the end of the connection.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Time between two measurements of the lag of the event loops.
const LAG_INTERVAL: Duration = Duration::from_secs(1);
/// A worker that has not run a task for this long is stuck.
const MAX_LAG: Duration = Duration::from_secs(10);

const OK: &str = "200 OK";
const UNAVAILABLE: &str = "503 Service Unavailable";

/// The server, once it accepts connections.
pub(super) type StartedServer = Arc<OnceLock<Weak<Server>>>;

/// Status and body.
type Response = (&'static str, String);

/// Returns the number of descriptors that the listeners need. Each is open twice. One connection more than the limit is
/// open until the oldest is closed, and /proc during a scrape. If the process has few, those of some connections suffice.
pub(super) fn descriptors(limit: u64, listeners: u64) -> u64 {
    if listeners == 0 { 0 } else { 2 * listeners + (limit / 32).min(MAX_CONNECTIONS as u64) + 2 }
}

/// Starts the thread if there are listeners. It serves as soon as `server` is set, until the process ends or `replaced`
/// is closed, because another process replaces this one.
pub(super) fn start(
    listeners: &[Arc<Listener>],
    server: StartedServer,
    replaced: Receiver<Infallible>,
) -> io::Result<()> {
    let clones = listeners.iter().map(|listener| Async::new(listener.as_fd().try_clone_to_owned()?));
    let clones = clones.collect::<io::Result<Vec<_>>>()?;
    if clones.is_empty() {
        return Ok(());
    }
    listeners.iter().for_each(|listener| log::info!("metrics on {listener}"));
    Builder::new().name("s5-metrics".into()).spawn(move || {
        let (server, connections) = (server.wait().clone(), Handshakes::new(MAX_CONNECTIONS));
        let (executor, measuring) = (LocalExecutor::new(), Cell::default());
        let service = Rc::new(Service { executor, connections, server, measuring });
        for listener in clones {
            service.executor.spawn(service.clone().accept(listener, replaced.clone())).detach();
        }
        smol::block_on(service.executor.run(service.measure_lag()));
    })?;
    Ok(())
}

struct Service {
    executor: LocalExecutor<'static>,
    /// At the limit, a new connection ends the oldest one of the client that has most of them.
    connections: Handshakes,
    server: Weak<Server>,
    /// Start of the current measurement of the lag.
    measuring: Cell<Option<Instant>>,
}

impl Service {
    async fn measure_lag(&self) {
        loop {
            Timer::after(LAG_INTERVAL).await;
            let Some(server) = self.server.upgrade() else { continue };
            let since = Instant::now();
            self.measuring.set(Some(since));
            server.workers.wait_for_all().await;
            self.measuring.set(None);
            Histogram::LoopLag.observe(since.elapsed());
        }
    }

    async fn accept(self: Rc<Self>, listener: Async<OwnedFd>, replaced: Receiver<Infallible>) {
        let is_replaced = || async {
            let _ = replaced.recv().await;
            Err(io::ErrorKind::Other.into())
        };
        while !replaced.is_closed() {
            // A Unix socket needs no type of its own: it is read, written and shut down by the same calls.
            let accepted = listener.read_with(accept).or(is_replaced()).await;
            let Ok((stream, client)) = accepted.and_then(|(fd, ip)| Ok((TcpStream::try_from(fd)?, ip))) else {
                Timer::after(ACCEPT_RETRY_DELAY).await;
                continue;
            };
            let client = ClientKey::new(client.map(|client| client.ip()));
            let connection = self.connections.begin(Some(client));
            self.executor.spawn(self.clone().serve(stream, client, connection)).detach();
            // The connection that this one has ended closes now. Otherwise a burst would take thousands of descriptors.
            yield_now().await;
        }
    }

    async fn serve(self: Rc<Self>, stream: TcpStream, client: ClientKey, connection: HandshakeGuard) {
        let ended = async {
            connection.wait_ended().await;
            log_refusal(client, "closed for a newer connection", "too many connections");
        };
        self.answer(stream, client).or(ended).await;
    }

    async fn answer(&self, mut stream: TcpStream, client: ClientKey) {
        let mut request = Vec::new();
        in_time(read_request(&mut stream, &mut request)).await;
        if request.is_empty() {
            // A check whether the port is open.
            return;
        }
        let response = self.response(&request);
        if response.0.starts_with('4') {
            log_refusal(client, response.0, &response.1);
        }
        in_time(async {
            respond(&mut stream, !request.starts_with(b"HEAD "), response).await?;
            stream.close().await?;
            // Unread data would reset the connection.
            stream.take(MAX_REQUEST_LEN as u64).read_to_end(&mut request).await
        })
        .await;
    }

    fn response(&self, request: &[u8]) -> Response {
        let server = self.server.upgrade();
        let is_ready = server.as_ref().is_some_and(|server| server.workers.is_accepting());
        let is_stuck = self.measuring.get().is_some_and(|since| since.elapsed() > MAX_LAG);
        let (status, body) = match parse(request) {
            _ if request.len() > MAX_REQUEST_LEN => ("431 Request Header Fields Too Large", "at most 8192 bytes"),
            None => ("400 Bad Request", "expected GET /metrics HTTP/1.1, with one Host, within 3 s"),
            Some((method, _)) if !["GET", "HEAD"].contains(&method) => ("405 Method Not Allowed", "use GET or HEAD"),
            Some((_, "/metrics")) => return (OK, metrics::text(server.as_deref())),
            Some((_, "/healthz")) if is_stuck => (UNAVAILABLE, "a worker is stuck"),
            Some((_, "/healthz")) => (OK, "ok"),
            Some((_, "/readyz")) if is_ready => (OK, "ready"),
            Some((_, "/readyz")) => (UNAVAILABLE, "draining"),
            Some(_) => ("404 Not Found", "use /metrics, /healthz or /readyz"),
        };
        (status, body.into())
    }
}

/// Runs `work` for at most [`TIMEOUT`].
async fn in_time<T>(work: impl Future<Output = io::Result<T>>) {
    async { _ = work.await }.or(async { _ = Timer::after(TIMEOUT).await }).await;
}

/// Reads to the end of the header, or until it is certain that there will be none.
async fn read_request(stream: &mut TcpStream, request: &mut Vec<u8>) -> io::Result<()> {
    let mut buffer = [0; 1024];
    while request.len() <= MAX_REQUEST_LEN
        && request.first().is_none_or(u8::is_ascii_uppercase)
        && !has_end(request)
        && let n @ 1.. = stream.read(&mut buffer).await?
    {
        request.extend_from_slice(buffer.get(..n).unwrap_or_default());
    }
    Ok(())
}

fn has_end(request: &[u8]) -> bool {
    request.windows(4).any(|end| end == b"\r\n\r\n") || request.windows(2).any(|end| end == b"\n\n")
}

/// Returns method and path (RFC 9112 section 3). The target may be a URL.
fn parse(request: &[u8]) -> Option<(&str, &str)> {
    let mut lines = request.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii_end);
    let mut words = str::from_utf8(lines.next().filter(|_| has_end(request))?).ok()?.split(' ');
    let (method, target, version) = (words.next()?, words.next()?, words.next()?);
    let is_host = |line: &&[u8]| line.get(..5).is_some_and(|name| name.eq_ignore_ascii_case(b"host:"));
    let hosts = lines.take_while(|line| !line.is_empty()).filter(is_host).count();
    let is_valid = matches!((version, hosts), ("HTTP/1.0", 0 | 1) | ("HTTP/1.1", 1)) && words.next().is_none();
    let is_url = target.get(..7).is_some_and(|scheme| scheme.eq_ignore_ascii_case("http://"));
    let path = if is_url { target.get(7..)?.trim_start_matches(|c| c != '/') } else { target };
    (is_valid && path.starts_with('/')).then_some((method, path.split('?').next()?))
}

fn log_refusal(client: ClientKey, status: &str, body: &str) {
    warn(|| format!("metrics: client {client}: {status}: {body}"));
}

async fn respond(stream: &mut TcpStream, has_body: bool, (status, body): Response) -> io::Result<()> {
    let (allow, length) = (if status.starts_with("405") { "Allow: GET, HEAD\r\n" } else { "" }, body.len() + 1);
    let head = format!("HTTP/1.1 {status}\r\n{allow}Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n");
    let body = if has_body { body + "\n" } else { String::new() };
    let response = format!("{head}Content-Length: {length}\r\nConnection: close\r\n\r\n{body}");
    stream.write_all(response.as_bytes()).await
}
