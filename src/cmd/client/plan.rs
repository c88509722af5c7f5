//! What a client mode sets out to do: the way, who we are, how long it may take and how often it is tried, and what is
//! said of it in the end.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::report::Report;
use super::{Args, ClientMode, credentials, proxies};
use crate::client::{Auth, Cause, Client, Error, Proxy};
use crate::cmd::CliError;
use crate::cmd::exit_status::{ExitStatus, eprint_line};
use crate::conn::Conn;
use crate::dial::{Resolver, Source};
use crate::gssapi::Initiator;
use crate::proto::{Addr, Command, Method};
use crate::reactor::{self, sleep};

/// How long a handshake may take when nobody says: a proxy that goes through others may well need a while.
const HANDSHAKE: Duration = Duration::from_secs(60);
/// The pause before the second try; each further one is half as long again, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// With less time left than this there is no further try.
const LAST: Duration = Duration::from_millis(20);

/// One way to one target, for one tunnel or for many.
#[derive(Debug)]
pub(in crate::cmd) struct Plan {
    hops: Vec<Proxy>,
    dst: Addr,
    auth: Arc<Auth>,
    source: Source,
    resolves: bool,
    resolver: Resolver,
    /// For one try.
    limit: Duration,
    /// For all tries.
    wait: Option<Duration>,
    said: Said,
}

/// What is said on stderr.
#[derive(Clone, Copy, Debug)]
struct Said {
    verbose: bool,
    quiet: bool,
    /// Failures have their status alone to tell of them.
    mute: bool,
    json: bool,
}

/// What came of it: the client that got there or failed last, and how many tries it took.
pub(in crate::cmd) struct Attempt<T> {
    pub(in crate::cmd) client: Client,
    pub(in crate::cmd) tries: u32,
    pub(in crate::cmd) result: Result<T, CliError>,
}

impl Plan {
    /// `dst` is what the mode asks for: nothing, when a proxy is only probed; with BIND, who may come.
    pub(in crate::cmd) fn new(mode: ClientMode, args: &Args, dst: Option<Addr>) -> Result<Self, CliError> {
        // Whom a proxy waits for can't be reached directly instead.
        let mut hops = proxies::hops(args, dst.as_ref().filter(|_| mode != ClientMode::Bind))?;
        if hops.is_empty() && (mode == ClientMode::Bind || dst.is_none()) {
            return Err(CliError::usage("without a proxy there is nobody to ask"));
        }
        let source = source(args, &hops)?;
        let auth = auth(args, &hops)?;
        // What fails from here on is no mistake of the command line.
        credentials::complete(&mut hops, args).or_else(|failure| match failure.status {
            ExitStatus::USAGE => Err(failure),
            _ => Said::of(args).conclude(Report::default(), Err(failure)),
        })?;
        Ok(Self {
            hops,
            dst: dst.unwrap_or(Addr::UNSPECIFIED),
            auth: Arc::new(auth),
            source,
            resolves: args.proxy_dns,
            resolver: Resolver::default(),
            limit: args.timeout.filter(|time| !time.is_zero()).unwrap_or(HANDSHAKE),
            wait: args.wait.filter(|time| !time.is_zero()),
            said: Said::of(args),
        })
    }

    /// Runs the mode to its end, whose failures are as quiet as the rest.
    pub(in crate::cmd) fn run(
        &self,
        mode: Pin<Box<dyn Future<Output = Result<(), CliError>> + '_>>,
    ) -> Result<(), CliError> {
        let no_reactor = |error| Err(CliError::new(ExitStatus::FAILURE, format!("no reactor: {error}")));
        self.said.muted(reactor::run(mode).unwrap_or_else(no_reactor))
    }

    /// The proxies, without credentials.
    pub(in crate::cmd) fn hops(&self) -> impl Iterator<Item = String> {
        self.hops.iter().map(ToString::to_string)
    }

    /// What it leads to, if to anything.
    pub(in crate::cmd) fn dst(&self) -> Option<&Addr> {
        Some(&self.dst).filter(|dst| **dst != Addr::UNSPECIFIED)
    }

    fn client(&self, limit: Duration) -> Client {
        Client::new(self.hops.clone(), self.dst.clone(), Some(limit))
            .with_auth(self.auth.clone())
            .resolving_by(self.resolver.clone())
            .from_source(self.source)
            .resolving_target(self.resolves)
    }

    /// Makes the request, as [`Plan::attempt`] has it: a tunnel, and BND.
    pub(in crate::cmd) async fn request(&self, command: Command) -> Attempt<(Conn, Addr)> {
        self.attempt(async |client| client.request(command).await).await
    }

    /// Asks until it succeeds, or would fail again the same way, or there is no time left for another try.
    pub(in crate::cmd) async fn attempt<T>(&self, ask: impl AsyncFn(&Client) -> Result<T, Error>) -> Attempt<T> {
        let began = Instant::now();
        let left = || self.wait.map(|wait| wait.saturating_sub(began.elapsed()));
        let mut pause = FIRST_PAUSE;
        let mut tries = 0;
        let mut last: Option<(Client, CliError)> = None;
        loop {
            tries += 1;
            let limit = left().map_or(self.limit, |left| left.min(self.limit).max(LAST));
            let limit = Duration::from_millis(u64::try_from(limit.as_millis()).unwrap_or(u64::MAX));
            let client = self.client(limit);
            let error = match ask(&client).await {
                Ok(done) => return Attempt { client, tries, result: Ok(done) },
                Err(error) => error,
            };
            let is_cut = limit < self.limit && matches!(error.cause, Cause::TimedOut(_));
            let failure = CliError::from(error);
            // That the last try had no time left tells less than why the one before it failed.
            let failed = match last.take() {
                Some(last) if is_cut => last,
                _ => (client, failure),
            };
            match left() {
                Some(left) if left > LAST && !failed.1.is_final => {
                    last = Some(failed);
                    sleep(pause.min(left / 2)).await;
                    pause = (pause * 3 / 2).min(LONGEST_PAUSE);
                }
                _ => {
                    let (client, mut failure) = failed;
                    if tries > 1 {
                        failure.message += &format!(" (given up after {tries} tries)");
                    }
                    return Attempt { client, tries, result: Err(failure) };
                }
            }
        }
    }

    /// Whose affair something is: the last proxy's, or nobody's but ours.
    fn who(&self) -> String {
        self.hops.last().map_or("direct".into(), |hop| format!("proxy {hop}"))
    }

    /// A failure behind the handshake.
    pub(in crate::cmd) fn failed(&self, status: ExitStatus, what: &str) -> CliError {
        let target = self.dst().map(|dst| format!(", for {dst}")).unwrap_or_default();
        CliError::new(status, format!("{}: transfer{target}: {what}", self.who()))
    }

    /// One line on stderr, unless nothing is to be said.
    pub(in crate::cmd) fn tell(&self, what: &str) {
        if !self.said.quiet {
            eprint_line(&CliError::new(ExitStatus::FAILURE, what).to_string());
        }
    }

    /// The line of one failure of many.
    pub(in crate::cmd) fn tell_failure(&self, result: Result<(), CliError>) {
        if let Err(failure) = result
            && !failure.message.is_empty()
        {
            self.tell(&format!("s5: {failure}"));
        }
    }

    /// One line on stderr, with `-v`.
    pub(in crate::cmd) fn note(&self, what: &str) {
        if self.said.verbose {
            eprint_line(&format!("s5: {}", CliError::new(ExitStatus::FAILURE, format!("{}: {what}", self.who()))));
        }
    }

    /// Says what is to be said at the end.
    pub(in crate::cmd) fn conclude(&self, report: Report, result: Result<(), CliError>) -> Result<(), CliError> {
        self.said.conclude(report, result)
    }
}

impl Said {
    fn of(args: &Args) -> Self {
        Self {
            verbose: args.verbose > 0 && !args.quiet,
            quiet: args.quiet,
            mute: args.quiet || args.zero_io && args.verbose == 0,
            json: args.json,
        }
    }

    fn conclude(self, report: Report, result: Result<(), CliError>) -> Result<(), CliError> {
        if self.json {
            eprint_line(&report.json(&result));
        }
        // What the object tells is not told beside it.
        Self { mute: self.mute || self.json, ..self }.muted(result)
    }

    fn muted(self, result: Result<(), CliError>) -> Result<(), CliError> {
        result.map_err(|failure| match self.mute {
            true => CliError { message: String::new(), ..failure },
            false => failure,
        })
    }
}

fn source(args: &Args, hops: &[Proxy]) -> Result<Source, CliError> {
    let is_ipv4 = match (args.ipv4, args.ipv6) {
        (true, true) => return Err(CliError::usage("-4 and -6: one or the other")),
        (true, false) => Some(true),
        (false, true) => Some(false),
        (false, false) => None,
    };
    let source = Source { ip: args.source, port: args.source_port.unwrap_or(0), is_ipv4 };
    if source.ip.is_some_and(|ip| !source.reaches(ip)) {
        return Err(CliError::usage("-s is of the other family than -4 or -6 wants"));
    }
    let is_unix = hops.first().is_some_and(Proxy::is_unix);
    if is_unix && (args.source.is_some() || args.source_port.is_some() || is_ipv4.is_some()) {
        return Err(CliError::usage("-4, -6, -s and -p are of no use with a proxy on a Unix socket"));
    }
    Ok(source)
}

/// What is offered to proxies, besides passwords.
fn auth(args: &Args, hops: &[Proxy]) -> Result<Auth, CliError> {
    let is_named = args.ccache.is_some() || args.gssapi_service.is_some() || args.gssapi_host.is_some();
    let is_demanded = args.gssapi_protection.is_some() || args.gssapi_min.is_some() || args.gssapi_nec;
    let methods = match &args.auth {
        Some(methods) if (is_named || is_demanded) && !methods.contains(&Method::GSSAPI) => {
            return Err(CliError::usage("--gssapi-* and --ccache are of no use without gssapi in --auth"));
        }
        // Who wants protection does not want to be talked out of it.
        None if is_demanded => Some(vec![Method::GSSAPI]),
        methods => methods.clone(),
    };
    let is_offered = match &methods {
        Some(methods) => methods.contains(&Method::GSSAPI),
        None => is_named || Initiator::may_have_tickets(),
    };
    let is_one_host =
        args.gssapi_host.is_some() || args.gssapi_service.as_ref().is_some_and(|name| name.contains(['/', '@']));
    if hops.len() > 1 && is_one_host {
        return Err(CliError::usage(
            "--gssapi-host, or a principal as --gssapi-service, is of one proxy, not of a chain",
        ));
    }
    let default = Initiator::default();
    let wanted = args.gssapi_protection.unwrap_or(default.wanted);
    // What NEC's servers say of the level can be changed on the way.
    let usual = if args.gssapi_nec { wanted } else { default.least.min(wanted) };
    let least = args.gssapi_min.unwrap_or(usual);
    if least > wanted {
        return Err(CliError::usage(format!("--gssapi-min {least} is more than --gssapi-protection {wanted}")));
    }
    let gssapi = Initiator {
        ccache: args.ccache.clone(),
        service: args.gssapi_service.clone().unwrap_or(default.service.clone()),
        host: args.gssapi_host.clone(),
        wanted,
        least,
        nec: args.gssapi_nec,
        ..default
    };
    Ok(Auth { methods, gssapi: is_offered.then_some(gssapi) })
}
