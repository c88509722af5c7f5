//! What a client mode sets out to do: the way, who we are, how long it may take and how often it is tried, and what is
//! said of it in the end.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::report::Report;
use super::{Args, ClientMode, credentials, proxies};
use crate::client::{Client, ClientAuth, ClientError, ClientErrorKind, Proxy};
use crate::cmd::CliError;
use crate::cmd::exit_status::{ExitStatus, eprint_line};
use crate::conn::Conn;
use crate::dial::{LocalAddr, Resolver};
use crate::gssapi::Initiator;
use crate::proto::{Addr, Command, Method};
use crate::reactor::{self, sleep};

/// How long a handshake may take when nobody says: a proxy that goes through others may well need a while.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);
/// The pause before the second try; each further one is half as long again, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const MAX_PAUSE: Duration = Duration::from_secs(2);
/// With less time left than this there is no further try.
const MIN_TIME_LEFT: Duration = Duration::from_millis(20);

/// One way to one target, for one tunnel or for many.
#[derive(Debug)]
pub(in crate::cmd) struct Connector {
    hops: Vec<Proxy>,
    dst: Addr,
    auth: Arc<ClientAuth>,
    source: LocalAddr,
    resolves_target: bool,
    resolver: Resolver,
    /// For one try.
    timeout: Duration,
    /// For all tries.
    wait: Option<Duration>,
    verbosity: Verbosity,
}

/// What is said on stderr.
#[derive(Clone, Copy, Debug)]
struct Verbosity {
    is_verbose: bool,
    is_quiet: bool,
    /// Failures have their status alone to tell of them.
    hides_errors: bool,
    has_json: bool,
}

/// What came of it: the client that got there or failed last, and how many tries it took.
pub(in crate::cmd) struct Attempt<T> {
    pub(in crate::cmd) client: Client,
    pub(in crate::cmd) tries: u32,
    pub(in crate::cmd) result: Result<T, CliError>,
}

impl Connector {
    /// `dst` is what the mode asks for: nothing, when a proxy is only probed; with BIND, who may come.
    pub(in crate::cmd) fn new(mode: ClientMode, args: &Args, dst: Option<Addr>) -> Result<Self, CliError> {
        // Whom a proxy waits for can't be reached directly instead.
        let mut hops = proxies::select_proxies(args, dst.as_ref().filter(|_| mode != ClientMode::Bind))?;
        if hops.is_empty() && (mode == ClientMode::Bind || dst.is_none()) {
            return Err(CliError::usage("without a proxy there is nobody to ask"));
        }
        let source = source_from_args(args, &hops)?;
        let auth = auth_from_args(args, &hops)?;
        // What fails from here on is no mistake of the command line.
        credentials::add_credentials(&mut hops, args).or_else(|failure| match failure.status {
            ExitStatus::USAGE => Err(failure),
            _ => Verbosity::from_args(args).finish(Report::default(), Err(failure)),
        })?;
        Ok(Self {
            hops,
            dst: dst.unwrap_or(Addr::UNSPECIFIED),
            auth: Arc::new(auth),
            source,
            resolves_target: args.proxy_dns,
            resolver: Resolver::default(),
            timeout: args.timeout.filter(|time| !time.is_zero()).unwrap_or(DEFAULT_TIMEOUT),
            wait: args.wait.filter(|time| !time.is_zero()),
            verbosity: Verbosity::from_args(args),
        })
    }

    /// Runs the mode to its end, whose failures are as quiet as the rest.
    pub(in crate::cmd) fn run(
        &self,
        mode: Pin<Box<dyn Future<Output = Result<(), CliError>> + '_>>,
    ) -> Result<(), CliError> {
        let no_reactor = |error| Err(CliError::new(ExitStatus::FAILURE, format!("no reactor: {error}")));
        self.verbosity.apply(reactor::run(mode).unwrap_or_else(no_reactor))
    }

    /// The proxies, without credentials.
    pub(in crate::cmd) fn hops(&self) -> impl Iterator<Item = String> {
        self.hops.iter().map(ToString::to_string)
    }

    /// What it leads to, if to anything.
    pub(in crate::cmd) fn dst(&self) -> Option<&Addr> {
        Some(&self.dst).filter(|dst| **dst != Addr::UNSPECIFIED)
    }

    fn client(&self, timeout: Duration) -> Client {
        Client::new(self.hops.clone(), self.dst.clone(), Some(timeout))
            .with_auth(self.auth.clone())
            .with_resolver(self.resolver.clone())
            .with_local_addr(self.source)
            .with_target_lookup(self.resolves_target)
    }

    /// Makes the request, as [`Connector::attempt`] has it: a tunnel, and BND.
    pub(in crate::cmd) async fn request(&self, command: Command) -> Attempt<(Conn, Addr)> {
        self.attempt(async |client| client.request(command).await).await
    }

    /// Asks until it succeeds, or would fail again the same way, or there is no time left for another try.
    pub(in crate::cmd) async fn attempt<T>(
        &self,
        operation: impl AsyncFn(&Client) -> Result<T, ClientError>,
    ) -> Attempt<T> {
        let started = Instant::now();
        let left = || self.wait.map(|wait| wait.saturating_sub(started.elapsed()));
        let mut pause = FIRST_PAUSE;
        let mut tries = 0;
        let mut previous: Option<(Client, CliError)> = None;
        loop {
            tries += 1;
            let timeout = left().map_or(self.timeout, |left| left.min(self.timeout).max(MIN_TIME_LEFT));
            let timeout = Duration::from_millis(u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX));
            let client = self.client(timeout);
            let error = match operation(&client).await {
                Ok(done) => return Attempt { client, tries, result: Ok(done) },
                Err(error) => error,
            };
            let is_shortened = timeout < self.timeout && matches!(error.kind, ClientErrorKind::TimedOut(_));
            let failure = CliError::from(error);
            // That the last try had no time left tells less than why the one before it failed.
            let latest = match previous.take() {
                Some(previous) if is_shortened => previous,
                _ => (client, failure),
            };
            match left() {
                Some(left) if left > MIN_TIME_LEFT && !latest.1.is_final => {
                    previous = Some(latest);
                    sleep(pause.min(left / 2)).await;
                    pause = (pause * 3 / 2).min(MAX_PAUSE);
                }
                _ => {
                    let (client, mut failure) = latest;
                    if tries > 1 {
                        failure.message += &format!(" (given up after {tries} tries)");
                    }
                    return Attempt { client, tries, result: Err(failure) };
                }
            }
        }
    }

    /// Whose affair something is: the last proxy's, or nobody's but ours.
    fn label(&self) -> String {
        self.hops.last().map_or("direct".into(), |hop| format!("proxy {hop}"))
    }

    /// A failure behind the handshake.
    pub(in crate::cmd) fn transfer_error(&self, status: ExitStatus, what: &str) -> CliError {
        let target = self.dst().map(|dst| format!(", for {dst}")).unwrap_or_default();
        CliError::new(status, format!("{}: transfer{target}: {what}", self.label()))
    }

    /// One line on stderr, unless nothing is to be said.
    pub(in crate::cmd) fn print_line(&self, what: &str) {
        if !self.verbosity.is_quiet {
            eprint_line(&CliError::new(ExitStatus::FAILURE, what).to_string());
        }
    }

    /// The line of one failure of many.
    pub(in crate::cmd) fn print_error(&self, result: Result<(), CliError>) {
        if let Err(failure) = result
            && !failure.message.is_empty()
        {
            self.print_line(&format!("s5: {failure}"));
        }
    }

    /// One line on stderr, with `-v`.
    pub(in crate::cmd) fn print_verbose(&self, what: &str) {
        if self.verbosity.is_verbose {
            eprint_line(&format!("s5: {}", CliError::new(ExitStatus::FAILURE, format!("{}: {what}", self.label()))));
        }
    }

    /// Says what is to be said at the end.
    pub(in crate::cmd) fn finish(&self, report: Report, result: Result<(), CliError>) -> Result<(), CliError> {
        self.verbosity.finish(report, result)
    }
}

impl Verbosity {
    fn from_args(args: &Args) -> Self {
        Self {
            is_verbose: args.verbose > 0 && !args.quiet,
            is_quiet: args.quiet,
            hides_errors: args.quiet || args.zero_io && args.verbose == 0,
            has_json: args.json,
        }
    }

    fn finish(self, report: Report, result: Result<(), CliError>) -> Result<(), CliError> {
        if self.has_json {
            eprint_line(&report.into_json(&result));
        }
        // What the object tells is not told beside it.
        Self { hides_errors: self.hides_errors || self.has_json, ..self }.apply(result)
    }

    fn apply(self, result: Result<(), CliError>) -> Result<(), CliError> {
        result.map_err(|failure| match self.hides_errors {
            true => CliError { message: String::new(), ..failure },
            false => failure,
        })
    }
}

fn source_from_args(args: &Args, hops: &[Proxy]) -> Result<LocalAddr, CliError> {
    let is_ipv4 = match (args.ipv4, args.ipv6) {
        (true, true) => return Err(CliError::usage("-4 and -6: one or the other")),
        (true, false) => Some(true),
        (false, true) => Some(false),
        (false, false) => None,
    };
    let source = LocalAddr { ip: args.source, port: args.source_port.unwrap_or(0), is_ipv4 };
    if source.ip.is_some_and(|ip| !source.can_reach(ip)) {
        return Err(CliError::usage("-s is of the other family than -4 or -6 wants"));
    }
    let is_unix = hops.first().is_some_and(Proxy::is_unix);
    if is_unix && (args.source.is_some() || args.source_port.is_some() || is_ipv4.is_some()) {
        return Err(CliError::usage("-4, -6, -s and -p are of no use with a proxy on a Unix socket"));
    }
    Ok(source)
}

/// What is offered to proxies, besides passwords.
fn auth_from_args(args: &Args, hops: &[Proxy]) -> Result<ClientAuth, CliError> {
    let has_gssapi_options = args.ccache.is_some() || args.gssapi_service.is_some() || args.gssapi_host.is_some();
    let requires_gssapi = args.gssapi_protection.is_some() || args.gssapi_min.is_some() || args.gssapi_nec;
    let methods = match &args.auth {
        Some(methods) if (has_gssapi_options || requires_gssapi) && !methods.contains(&Method::GSSAPI) => {
            return Err(CliError::usage("--gssapi-* and --ccache are of no use without gssapi in --auth"));
        }
        // Who wants protection does not want to be talked out of it.
        None if requires_gssapi => Some(vec![Method::GSSAPI]),
        methods => methods.clone(),
    };
    let offers_gssapi = match &methods {
        Some(methods) => methods.contains(&Method::GSSAPI),
        None => has_gssapi_options || Initiator::may_have_tickets(),
    };
    let names_one_proxy =
        args.gssapi_host.is_some() || args.gssapi_service.as_ref().is_some_and(|name| name.contains(['/', '@']));
    if hops.len() > 1 && names_one_proxy {
        return Err(CliError::usage(
            "--gssapi-host, or a principal as --gssapi-service, is of one proxy, not of a chain",
        ));
    }
    let default = Initiator::default();
    let wanted = args.gssapi_protection.unwrap_or(default.requested_level);
    // What NEC's servers say of the level can be changed on the way.
    let default_least = if args.gssapi_nec { wanted } else { default.min_level.min(wanted) };
    let least = args.gssapi_min.unwrap_or(default_least);
    if least > wanted {
        return Err(CliError::usage(format!("--gssapi-min {least} is more than --gssapi-protection {wanted}")));
    }
    let gssapi = Initiator {
        ccache: args.ccache.clone(),
        service: args.gssapi_service.clone().unwrap_or(default.service.clone()),
        host: args.gssapi_host.clone(),
        requested_level: wanted,
        min_level: least,
        uses_nec_exchange: args.gssapi_nec,
        ..default
    };
    Ok(ClientAuth { methods, gssapi: offers_gssapi.then_some(gssapi) })
}
