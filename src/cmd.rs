//! The command line: which mode, what it may say, and how it ends.
//!
//! Every message is one line on stderr: `s5: ` and then who or what, the phase, the reason, and where there is one the
//! way out. Lower case, no full stop, never a secret. stdout is data. One table, [`Status`], has all exit statuses.

pub mod bind;
pub mod connect;
pub mod serve;
pub mod udp;

mod argv;
mod client;
mod pipe;

use std::fmt;
use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use argh::{ArgsInfo, FromArgs};
use log::LevelFilter;

use crate::client::{self as socks, Cause, Client, Phase, Proxy, parse_hops};
use crate::dial::Failure as DialFailure;
use crate::proto::Addr;

/// A SOCKS5 server, and a netcat through SOCKS5 proxies.
#[derive(FromArgs, ArgsInfo, Debug)]
#[argh(
    error_code(2, "Usage; other statuses of the clients stand in the README."),
    example = "s5 serve\ns5 connect -x socks5h://127.0.0.1:1080 example.org:80"
)]
pub struct Args {
    /// print the version and exit
    #[argh(switch)]
    version: bool,

    #[argh(subcommand)]
    mode: Option<Command>,
}

/// One of the four modes.
#[derive(FromArgs, ArgsInfo, Debug)]
#[argh(subcommand)]
#[allow(clippy::large_enum_variant, reason = "there is one in a process")]
pub enum Command {
    /// `s5 serve`
    Serve(serve::Args),
    /// `s5 connect`
    Connect(connect::Args),
    /// `s5 bind`
    Bind(bind::Args),
    /// `s5 udp`
    Udp(udp::Args),
}

impl Command {
    /// What is logged.
    pub fn log_level(&self) -> LevelFilter {
        match self {
            Self::Serve(args) => args.log_level(),
            Self::Connect(_) | Self::Bind(_) | Self::Udp(_) => LevelFilter::Warn,
        }
    }

    /// Runs the mode to its end.
    ///
    /// # Errors
    /// What to print and how to exit.
    pub fn run(self) -> Result<(), Failure> {
        match self {
            Self::Serve(args) => args.run(),
            Self::Connect(args) => args.run(),
            Self::Bind(args) => args.run(),
            Self::Udp(args) => args.run(),
        }
    }
}

/// What ends the program before a mode has begun.
#[derive(Debug)]
pub enum Exit {
    /// Text that was asked for: to stdout, status 0.
    Text(String),
    /// A command line that makes no sense.
    Usage(Failure),
}

impl Exit {
    /// Prints it and gives the exit status.
    pub fn print(self) -> ExitCode {
        match self {
            Self::Text(text) => {
                // Nobody is left to be told that nobody reads.
                let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
                ExitCode::SUCCESS
            }
            Self::Usage(failure) => failure.print(),
        }
    }
}

/// Reads a command line, `args[0]` being the program's name.
///
/// # Errors
/// What to print instead of running.
pub fn parse(args: &[String]) -> Result<Command, Exit> {
    let args = argv::normalise(args.get(1..).unwrap_or_default());
    let args = args.map_err(|what| Exit::Usage(Failure::usage(what)))?;
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let parsed = Args::from_args(&["s5"], &args).map_err(|early| match early.status {
        Ok(()) => Exit::Text(early.output),
        Err(()) => Exit::Usage(Failure::usage(one_line(&early.output))),
    })?;
    match parsed {
        Args { version: true, .. } => Err(Exit::Text(format!("s5 {}", env!("CARGO_PKG_VERSION")))),
        Args { mode: Some(command), .. } => Ok(command),
        Args { mode: None, .. } => Err(Exit::Usage(Failure::usage("a mode is missing: serve, connect, bind or udp"))),
    }
}

/// argh's complaints are paragraphs; ours are lines. Words of the command line are repeated in them, and a proxy's URL in
/// the wrong place may have a password in it.
fn one_line(text: &str) -> String {
    let words: Vec<String> = text.split_whitespace().map(without_userinfo).collect();
    let line = words.join(" ").replace("Run s5", "run s5").replace(" for more information.", "");
    let mut chars = line.chars();
    chars.next().map(|first| first.to_lowercase().chain(chars).collect()).unwrap_or_default()
}

/// What stands before an `@`, but for a scheme, is not shown.
fn without_userinfo(word: &str) -> String {
    match word.rsplit_once('@') {
        Some((before, place)) => match before.split_once("://") {
            Some((scheme, _)) => format!("{scheme}://…@{place}"),
            None => format!("…@{place}"),
        },
        None => word.into(),
    }
}

/// Every exit status there is. Scripts rely on the numbers: curl's where curl has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Nothing of the below.
    Other,
    /// The command line or a file that it names is wrong.
    Usage,
    /// The proxy's name could not be resolved.
    ProxyName,
    /// The proxy, or a later one of the chain, could not be reached.
    ProxyUnreachable,
    /// stdout could not be written.
    Stdout,
    /// stdin could not be read.
    Stdin,
    /// A deadline passed.
    TimedOut,
    /// Sending failed in the middle.
    Send,
    /// Receiving failed in the middle.
    Receive,
    /// The proxy did not let us in.
    Login,
    /// The proxy does not speak SOCKS5, or stopped to.
    Protocol,
    /// The proxy answered with this REP: 100 + REP, 109 for all that are not assigned.
    Rep(u8),
    /// Nobody reads stdout any more; what the shell shows for a death by SIGPIPE.
    BrokenPipe,
}

impl Status {
    fn code(self) -> u8 {
        match self {
            Self::Other => 1,
            Self::Usage => 2,
            Self::ProxyName => 5,
            Self::ProxyUnreachable => 7,
            Self::Stdout => 23,
            Self::Stdin => 26,
            Self::TimedOut => 28,
            Self::Send => 55,
            Self::Receive => 56,
            Self::Login => 67,
            Self::Protocol => 97,
            Self::Rep(rep) => 100 + rep.min(9),
            Self::BrokenPipe => 141,
        }
    }
}

/// How a mode ends when it does not end well.
#[derive(Debug)]
pub struct Failure {
    /// What is printed behind `s5: `; empty for nothing.
    pub message: String,
    /// How the program exits.
    pub status: Status,
}

impl Failure {
    /// A failure that is none of the others.
    pub fn new(status: Status, message: impl Into<String>) -> Self {
        Self { message: message.into(), status }
    }

    /// A mistake in the command line or in a file that it names.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Status::Usage, message)
    }

    /// Prints it and gives the exit status.
    pub fn print(self) -> ExitCode {
        if !self.message.is_empty() {
            say(&format!("s5: {self}"));
        }
        ExitCode::from(self.status.code())
    }
}

/// Escapes what a terminal could take for a command: proxies and targets have a say in messages.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.message.chars() {
            if c.is_control() { write!(f, "{}", c.escape_default())? } else { write!(f, "{c}")? }
        }
        Ok(())
    }
}

impl From<socks::Error> for Failure {
    fn from(error: socks::Error) -> Self {
        let status = match (&error.cause, error.phase) {
            (Cause::Unreachable(DialFailure::TimedOut) | Cause::TimedOut(_), _) => Status::TimedOut,
            (Cause::Unreachable(_), Phase::Resolve) => Status::ProxyName,
            (Cause::Unreachable(_) | Cause::Socket(_) | Cause::NextHop(_), _) => Status::ProxyUnreachable,
            (Cause::Protocol(_) | Cause::Closed(_), _) => Status::Protocol,
            (Cause::NoMethod | Cause::LoginRefused | Cause::Gssapi(_), _) => Status::Login,
            (Cause::Rep(rep), _) => Status::Rep(rep.0),
        };
        Self::new(status, error.to_string())
    }
}

/// The proxies to go through: `-x`, else the environment, else the default.
fn hops(option: Option<&str>) -> Result<Vec<Proxy>, Failure> {
    if let Some(text) = option {
        return parse_hops(text).map_err(|error| Failure::usage(format!("--proxy: {error}")));
    }
    for variable in ["S5_PROXY", "all_proxy", "ALL_PROXY"] {
        if let Some(text) = std::env::var_os(variable).filter(|text| !text.is_empty()) {
            return parse_hops(&text.to_string_lossy()).map_err(|error| Failure::usage(format!("{variable}: {error}")));
        }
    }
    parse_hops("127.0.0.1:1080").map_err(Failure::usage)
}

/// The target of `host:port` or `host port`.
fn target(words: &[String]) -> Result<Addr, Failure> {
    let parsed = match words {
        [both] => socks::parse_addr(both, None),
        [host, port] => socks::parse_host(host).and_then(|host| Ok(Addr { host, port: socks::parse_port(port)? })),
        _ => Err("write one target: host:port or host port".into()),
    };
    match parsed {
        Ok(addr) if addr.port == 0 => Err(Failure::usage("the target's port is 0")),
        parsed => parsed.map_err(|error| Failure::usage(format!("target: {error}"))),
    }
}

/// `10`, `2.5`, `500ms`, `10s`, `5m`, `2h`.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text.get(digits.len()..).unwrap_or_default() {
        "" | "s" => 1.0,
        "ms" => 0.001,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(format!("{text:?} has a unit other than ms, s, m and h")),
    };
    let number = digits.parse::<f64>().ok().filter(|_| digits.starts_with(|c: char| c.is_ascii_digit()));
    let seconds = number.map(|number| number * unit).filter(|seconds| *seconds <= MAX_SECONDS);
    let seconds = seconds.ok_or_else(|| format!("{text:?} is not a number of seconds up to a year"))?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

/// The longest time that an option takes: a year.
const MAX_SECONDS: f64 = 365.0 * 24.0 * 3600.0;

/// As [`duration`], but not 0.
fn deadline(text: &str) -> Result<Duration, String> {
    duration(text).and_then(|time| if time.is_zero() { Err("0 is no time at all".into()) } else { Ok(time) })
}

/// How long a handshake may take when nobody says: a proxy that goes through others may well need a while.
const HANDSHAKE: Duration = Duration::from_secs(60);

/// One line on stderr, in one piece: others may be writing there too. With stderr closed the status has to do.
pub fn say(line: &str) {
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// One line on stderr, with `-v`.
fn note(verbose: bool, client: &Client, what: &str) {
    if verbose {
        let text = Failure::new(Status::Other, format!("proxy {}: {what}", client.last_proxy()));
        say(&format!("s5: {text}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_seconds_unless_it_says_otherwise() {
        let table =
            [("10", 10_000), ("2.5", 2500), ("500ms", 500), ("10s", 10_000), ("5m", 300_000), ("2h", 7_200_000)];
        for (text, millis) in table {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "-1", "1d", "x", "1e9999", "inf", "NaN", "99999999999", "ms"] {
            assert!(duration(text).is_err(), "{text}");
        }
        assert!(deadline("0").is_err());
    }

    #[test]
    fn complaints_fit_on_a_line() {
        let words = ["s5", "connect", "--nonsense"].map(String::from);
        let Err(Exit::Usage(failure)) = parse(&words) else { panic!("not a usage error") };
        assert_eq!(failure.message.lines().count(), 1, "{}", failure.message);
        assert!(failure.message.contains("--nonsense"), "{}", failure.message);
    }

    #[test]
    fn a_url_in_the_wrong_place_does_not_give_its_password_away() {
        for words in [
            ["s5", "socks5h://alice:secret@proxy.test", ""],
            ["s5", "connect", "--socks5h://alice:secret@proxy.test"],
            ["s5", "serve", "alice:secret@proxy.test"],
        ] {
            let Err(Exit::Usage(failure)) = parse(&words.map(String::from)) else { panic!("not a usage error") };
            assert!(failure.message.contains("@proxy.test") && !failure.message.contains("secret"), "{failure}");
        }
    }

    #[test]
    fn a_message_can_not_drive_a_terminal() {
        assert_eq!(Failure::usage("a\x1b[2Jb\n").to_string(), "a\\u{1b}[2Jb\\n");
    }
}
