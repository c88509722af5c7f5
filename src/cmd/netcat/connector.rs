//! Establishes tunnels and associations for the client modes, with retries, and prints the results.

use std::future::pending;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_signal::{Signal, Signals};
use futures_lite::{FutureExt as _, StreamExt as _};
use smol::lock::OnceCell;

use super::options::ClientArgs;
use super::report::{JsonOutput, SessionReport};
use super::{credentials, proxies};
use crate::client::{Client, ClientError, ClientErrorKind, ClientOptions, Endpoint, Phase, Proxy};
use crate::cmd::cli::exit::{CliError, CliResult, ExitStatus, eprint_line};
use crate::gssapi::Initiator;
use crate::net::{LocalAddr, reactor, sleep, sleep_until, timeout_at, yield_now};
use crate::proto::{Addr, Command, Method};
use crate::server::is_ignored;

/// Default for `-w`: the time limit of a handshake. A proxy that connects through other proxies may be slow.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);
/// Pause before the second attempt. Each further pause is longer by half, up to `MAX_PAUSE`.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const MAX_PAUSE: Duration = Duration::from_secs(2);
/// Time for all sessions to report their results after a signal or the end of `--max-time`.
const REPORT_TIMEOUT: Duration = Duration::from_secs(1);
/// Minimum time left of `--retry` for a further attempt.
const MIN_TIME_LEFT: Duration = Duration::from_millis(20);
/// The remedy for a proxy whose UDP relay cannot be reached at the address in the reply.
pub(crate) const UDP_RELAY_HINT: &str = "--udp-relay proxy uses the address of the proxy itself";

/// Establishes tunnels and associations to one target through the selected proxies.
pub(crate) struct Connector {
    pub(crate) args: ClientArgs,
    json: JsonOutput,
    /// The end of `--max-time`.
    deadline: Option<(Instant, Duration)>,
    /// Set when all sessions must end, so that they report their results.
    cut: OnceCell<Cut>,
    /// Each task of a tunnel or association has a reference until it has reported its result.
    pub(crate) open_sessions: Rc<()>,
    pub(super) hops: Vec<Proxy>,
    dst: Addr,
    options: Arc<ClientOptions>,
}

/// The rest of a mode. One boxed type, so that the code of the event loop and of executors is compiled once.
pub(crate) type ModeFuture<'a> = Pin<Box<dyn Future<Output = CliResult> + 'a>>;

/// The result of one or more attempts. `client` is the client of the attempt with this result.
pub(crate) struct RetryOutcome<T> {
    pub(crate) client: Client,
    pub(crate) attempts: u32,
    pub(crate) result: CliResult<T>,
}

#[derive(Clone, Copy)]
pub(crate) enum Cut {
    /// The end of `--max-time`.
    TimedOut(Duration),
    Signal(Signal),
}

impl Connector {
    /// `dst` is the target, or with BIND the expected peer. `None`: only the login to the proxy is tested.
    pub(crate) fn new(command: Command, args: ClientArgs, json: JsonOutput, dst: Option<Addr>) -> CliResult<Self> {
        let deadline = args.max_time.and_then(|time| Some((Instant::now().checked_add(time)?, time)));
        // no_proxy does not apply to BIND: the peer connects to the proxy.
        let hops = proxies::select_proxies(&args, dst.as_ref().filter(|_| command != Command::Bind))?;
        let requires_proxy = command == Command::Bind || dst.is_none();
        CliError::usage_if(hops.is_empty() && requires_proxy, "a proxy is required (give one with -x)")?;
        let local = source_from_args(&args, &hops)?;
        let (methods, gssapi) = auth_from_args(&args, &hops)?;
        let options = Arc::new(ClientOptions {
            methods,
            gssapi,
            limits: None,
            local,
            resolves_target: args.resolves_target,
            proxy_is_udp_relay: args.udp_relay,
            passes_socket: args.pass_fd,
        });
        let mut connector = Self {
            args,
            json,
            deadline,
            cut: OnceCell::new(),
            open_sessions: Rc::default(),
            hops,
            dst: dst.unwrap_or(Addr::UNSPECIFIED),
            options,
        };
        // --quiet and -z apply to all errors except usage errors.
        credentials::add_credentials(&mut connector.hops, &connector.args).or_else(|error| match error.status {
            ExitStatus::USAGE => Err(error),
            _ => connector.finish(&SessionReport::default(), Err(error)),
        })?;
        Ok(connector)
    }

    /// Runs a mode on the event loop. Removes the message of its error if the options hide errors.
    pub(crate) fn run(&self, mode: ModeFuture<'_>) -> CliResult {
        let start_error = |error| Err(CliError::new(ExitStatus::FAILURE, format!("start the event loop: {error}")));
        let limited = mode.or(async {
            let cut = *self.cut.wait().await;
            // Sessions, which also observe it, report their results first.
            let reported = async {
                while Rc::strong_count(&self.open_sessions) > 1 {
                    yield_now().await;
                }
            };
            timeout_at(Instant::now() + REPORT_TIMEOUT, reported).await;
            Err(self.cut_error(cut))
        });
        let watch = async {
            let _ = self.cut.try_set(self.next_cut().await);
            pending().await
        };
        let result = reactor::run(limited.or(watch)).unwrap_or_else(start_error);
        let report = |error| match self.cut.get() {
            // Sessions have reported it.
            Some(_) if self.args.listen.is_some() => CliError { is_reported: true, ..error },
            _ => self.json.report_error(&SessionReport::default(), error),
        };
        let result = self.filter_error(result.map_err(report));
        if let Some(Cut::Signal(signal)) = self.cut.get() {
            log::logger().flush();
            // As the signal does without a handler.
            let _ = signal_hook::low_level::emulate_default_handler(*signal as i32);
        }
        result
    }

    /// Returns the target, or the expected peer of BIND, if there is one.
    pub(crate) fn dst(&self) -> Option<&Addr> {
        Some(&self.dst).filter(|dst| **dst != Addr::UNSPECIFIED)
    }

    /// Establishes a tunnel or association by `operation`, with retries, and uses it by `transfer`. Reports both.
    pub(crate) async fn run_reported<T>(
        &self,
        operation: impl AsyncFn(&Client) -> Result<T, ClientError>,
        transfer: impl AsyncFnOnce(T, &Client, &mut SessionReport<'_>) -> CliResult,
    ) -> CliResult {
        self.use_reported(self.retry(operation).await, transfer).await
    }

    /// Uses what attempts have established by `transfer`. Reports both.
    pub(super) async fn use_reported<T>(
        &self,
        RetryOutcome { client, attempts, result }: RetryOutcome<T>,
        transfer: impl AsyncFnOnce(T, &Client, &mut SessionReport<'_>) -> CliResult,
    ) -> CliResult {
        let mut report = SessionReport::new(&client, attempts);
        let result = match result {
            Ok(established) => {
                let transferred = self.until_cut(transfer(established, &client, &mut report)).await;
                transferred.unwrap_or_else(|cut| Err(self.session_cut_error(&client, &report, cut)))
            }
            Err(error) => Err(error),
        };
        self.finish(&report, result)
    }

    /// Runs `future` until the end of `--max-time`, or until a signal ends s5.
    pub(crate) async fn until_cut<T>(&self, future: impl Future<Output = T>) -> Result<T, Cut> {
        async { Ok(future.await) }.or(async { Err(*self.cut.wait().await) }).await
    }

    pub(crate) fn is_cut(&self) -> bool {
        self.cut.is_initialized()
    }

    /// Waits for the end of `--max-time`, or with `--json` for SIGTERM or SIGINT, unless s5 was started with it ignored.
    async fn next_cut(&self) -> Cut {
        let timed_out = async {
            let Some((deadline, limit)) = self.deadline else { return pending().await };
            sleep_until(deadline).await;
            Cut::TimedOut(limit)
        };
        let watched = [Signal::Term, Signal::Int].into_iter().filter(|signal| !is_ignored(*signal as i32));
        if self.args.json.is_some()
            && let Ok(mut signals) = Signals::new(watched)
        {
            let signalled = async {
                let Some(Ok(signal)) = signals.next().await else { return pending().await };
                Cut::Signal(signal)
            };
            return signalled.or(timed_out).await;
        }
        timed_out.await
    }

    fn session_cut_error(&self, client: &Client, report: &SessionReport<'_>, cut: Cut) -> CliError {
        match cut {
            Cut::TimedOut(limit) if !report.has_relay() => client.timed_out(limit).into(),
            cut => self.cut_error(cut),
        }
    }

    fn cut_error(&self, cut: Cut) -> CliError {
        match cut {
            Cut::TimedOut(limit) => self.transfer_error(ExitStatus::TIMED_OUT, &format!("timed out after {limit:?}")),
            Cut::Signal(signal) => {
                let name = format!("{signal:?}").to_uppercase();
                let status = ExitStatus::from_child(None, Some(signal as i32));
                self.transfer_error(status, &format!("ended by SIG{name}"))
            }
        }
    }

    /// Repeats `operation` until it succeeds, fails with a final error, or `--retry` expires.
    pub(crate) async fn retry<T>(&self, operation: impl AsyncFn(&Client) -> Result<T, ClientError>) -> RetryOutcome<T> {
        let started = Instant::now();
        let max_timeout = self.args.connect_timeout().unwrap_or(DEFAULT_TIMEOUT);
        let limit = self.args.retry.filter(|time| !time.is_zero());
        let max_left = || self.deadline.map(|(deadline, _)| deadline.saturating_duration_since(Instant::now()));
        let retry_left = || limit.map(|limit| limit.saturating_sub(started.elapsed()));
        let time_left = || retry_left().map(|left| max_left().map_or(left, |max_left| max_left.min(left)));
        let mut pause = FIRST_PAUSE;
        let mut attempts = 0;
        let mut previous: Option<(Client, CliError)> = None;
        let (client, mut error) = loop {
            attempts += 1;
            let timeout = retry_left().map_or(max_timeout, |left| left.min(max_timeout).max(MIN_TIME_LEFT));
            let timeout = Duration::from_millis(u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX));
            let client = Client::new(self.hops.clone(), self.dst.clone(), Some(timeout), self.options.clone());
            let error = match self.until_cut(operation(&client)).await {
                Ok(Ok(value)) => return RetryOutcome { client, attempts, result: Ok(value) },
                Ok(Err(error)) => error,
                Err(Cut::TimedOut(limit)) => client.timed_out(limit),
                Err(cut) => return RetryOutcome { client, attempts, result: Err(self.cut_error(cut)) },
            };
            let is_shortened = timeout < max_timeout && matches!(error.kind, ClientErrorKind::TimedOut(_));
            let hint = self.hint(&error);
            let mut error = CliError::from(error);
            error.message += &hint.map(|hint| format!(" ({hint})")).unwrap_or_default();
            // If --retry has cut the last attempt short, the error of the attempt before it is more informative.
            let latest = match previous.take() {
                Some(previous) if is_shortened => previous,
                _ => (client, error),
            };
            let left = time_left().filter(|left| *left > MIN_TIME_LEFT && !latest.1.is_final);
            let Some(left) = left else { break latest };
            previous = Some(latest);
            if let Err(cut) = self.until_cut(sleep(pause.min(left / 2))).await
                && let Some((client, _)) = previous
            {
                return RetryOutcome { client, attempts, result: Err(self.cut_error(cut)) };
            }
            pause = (pause * 3 / 2).min(MAX_PAUSE);
        };
        if attempts > 1 {
            error.message += &format!(" (given up after {attempts} attempts)");
        }
        if !error.is_final && limit.is_some() && max_left().is_some_and(|left| left <= MIN_TIME_LEFT) {
            error.status = ExitStatus::TIMED_OUT;
        }
        RetryOutcome { client, attempts, result: Err(error) }
    }

    /// Returns what may help against an error of a handshake.
    fn hint(&self, error: &ClientError) -> Option<String> {
        match (&error.kind, error.phase) {
            (ClientErrorKind::Relay(..), _) if !self.args.udp_relay => Some(UDP_RELAY_HINT.into()),
            (ClientErrorKind::Unreachable(_), Phase::Connect) => proxies::default_proxy_hint(&self.args),
            _ => None,
        }
    }

    /// Prints where a tunnel begins and ends if `-v` is set.
    pub(crate) fn print_connected(&self, bnd: &Addr) {
        let from = if bnd.port == 0 { String::new() } else { format!(" from {bnd}") };
        self.print_verbose(&format!("connected to {}{from}", self.dst));
    }

    /// Returns the prefix of messages: the last proxy, or `direct`.
    fn label(&self) -> String {
        self.hops.last().map_or("direct".into(), |hop| format!("proxy {hop}"))
    }

    /// Returns an error that occurred after the handshake.
    pub(crate) fn transfer_error(&self, status: ExitStatus, reason: &str) -> CliError {
        let target = self.dst().map(|dst| format!(", for {dst}")).unwrap_or_default();
        CliError::new(status, format!("{}: transfer{target}: {reason}", self.label()))
    }

    /// Returns a read or write error after the handshake. The status selects the text.
    pub(crate) fn io_error(&self, status: ExitStatus, error: &io::Error) -> CliError {
        let operation = match status {
            ExitStatus::WRITE_STDOUT if error.kind() == io::ErrorKind::BrokenPipe => {
                return CliError::new(ExitStatus::BROKEN_PIPE, "");
            }
            ExitStatus::READ_STDIN => "read from stdin",
            ExitStatus::WRITE_STDOUT => "write to stdout",
            ExitStatus::SEND_ERROR => "write error",
            _ => "read error",
        };
        self.transfer_error(status, &format!("{operation}: {error}"))
    }

    /// Prints a line on stderr, unless `--quiet` is set, or `--json` reserves stderr for objects.
    pub(crate) fn print_line(&self, line: &str) {
        if !self.args.quiet && !self.args.prints_only_json() {
            eprint_line(&CliError::new(ExitStatus::FAILURE, line).to_string());
        }
    }

    pub(crate) fn print_error(&self, result: CliResult) {
        if let Err(error) = result
            && !error.message.is_empty()
        {
            self.print_line(&format!("s5: {error}"));
        }
    }

    pub(crate) fn print_verbose(&self, event: &str) {
        if self.args.verbose > 0 {
            self.print_line(&format!("s5: {}: {event}", self.label()));
        }
    }

    /// Writes the report if `--json` is set. Returns `result`, without its message if that must not be printed.
    pub(crate) fn finish(&self, report: &SessionReport<'_>, result: CliResult) -> CliResult {
        self.filter_error(self.json.report(report, result))
    }

    /// Removes the message of an error if it must not be printed: the status of `-z` is enough for a single attempt.
    fn filter_error(&self, result: CliResult) -> CliResult {
        let is_probe = self.args.zero_io && self.args.verbose == 0 && self.args.retry.is_none();
        let is_hidden = self.args.quiet || is_probe || self.args.prints_only_json();
        result.map_err(|error| if is_hidden { CliError { message: String::new(), ..error } } else { error })
    }
}

fn source_from_args(args: &ClientArgs, hops: &[Proxy]) -> CliResult<LocalAddr> {
    CliError::usage_if(args.ipv4 && args.ipv6, "-4 and -6 cannot be combined")?;
    let is_excluded = |ip: &IpAddr| if ip.is_ipv4() { args.ipv6 } else { args.ipv4 };
    if let Some(ip) = args.source.filter(is_excluded) {
        return Err(CliError::usage(format!("-s {ip}: not an address of the family that -4 or -6 selects")));
    }
    let any = LocalAddr::default().ips.map(|ip| ip.filter(|ip| !is_excluded(ip)));
    let ips = args.source.map_or(any, |ip| [Some(ip), None]);
    let is_unix = matches!(hops, [Proxy { endpoint: Endpoint::Unix(_), .. }, ..]);
    let has_source = args.source.is_some() || args.source_port.is_some() || args.ipv4 || args.ipv6;
    CliError::usage_if(is_unix && has_source, "-4, -6, -s and -p cannot be used with a proxy on a Unix socket")?;
    Ok(LocalAddr { ips, port: args.source_port.unwrap_or(0) })
}

/// Returns the methods to offer to proxies, and the options of GSSAPI.
fn auth_from_args(args: &ClientArgs, hops: &[Proxy]) -> CliResult<(Option<Vec<Method>>, Option<Initiator>)> {
    let has_gssapi_options = args.ccache.is_some() || args.gssapi_service.is_some() || args.gssapi_host.is_some();
    let requires_gssapi = args.gssapi_protection.is_some() || args.gssapi_min.is_some() || args.gssapi_nec;
    let methods = match &args.auth {
        Some(methods) if (has_gssapi_options || requires_gssapi) && !methods.contains(&Method::GSSAPI) => {
            return Err(CliError::usage("--gssapi-* and --ccache require gssapi in --auth"));
        }
        // With a required protection level, the proxy must not be able to select an unprotected method.
        None if requires_gssapi => Some(vec![Method::GSSAPI]),
        methods => methods.clone(),
    };
    let offers_gssapi = match &methods {
        Some(methods) => methods.contains(&Method::GSSAPI),
        None => has_gssapi_options || Initiator::may_have_tickets(),
    };
    let names_one_proxy =
        args.gssapi_host.is_some() || args.gssapi_service.as_ref().is_some_and(|name| name.contains(['/', '@']));
    let problem = "--gssapi-host, or a principal in --gssapi-service, requires a single proxy, not a chain";
    CliError::usage_if(hops.len() > 1 && names_one_proxy, problem)?;
    let default = Initiator::default();
    let requested = args.gssapi_protection.unwrap_or(default.requested_level);
    // NEC's exchange of the level is not protected, so an attacker could lower it.
    let default_min = if args.gssapi_nec { requested } else { default.min_level.min(requested) };
    let min_level = args.gssapi_min.unwrap_or(default_min);
    let problem = format!("--gssapi-min {min_level} is higher than --gssapi-protection {requested}");
    CliError::usage_if(min_level > requested, problem)?;
    let gssapi = Initiator {
        ccache: args.ccache.clone(),
        service: args.gssapi_service.clone().unwrap_or(default.service),
        host: args.gssapi_host.clone(),
        requested_level: requested,
        min_level,
        uses_nec_exchange: args.gssapi_nec,
        ..default
    };
    Ok((methods, offers_gssapi.then_some(gssapi)))
}
