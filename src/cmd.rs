//! The command line and its four modes. stdout is for data only: messages, logs and prompts go to stderr.

pub mod bind;
pub mod cli;
pub mod connect;
pub mod netcat;
pub mod serve;
pub mod udp;

use std::env;

use argh::{ArgsInfo, FromArgs};
use log::LevelFilter;

use crate::proto::Command;
use crate::server::ServeArgs;
pub use crate::server::{RESTART_HELPER, run_restart_helper};
use cli::completions::{ScriptFn, parse_shell};
pub use cli::exit::{CliError, CliResult, ExitStatus};
pub use cli::logger::Logger;
use cli::syntax::{NAME, Syntax};
use cli::{argv, help, manual, secrets};
use netcat::options::{self, ClientArgs};
use netcat::report::{JsonOutput, SessionReport};

/// A SOCKS5 server, and a netcat that works through SOCKS5 proxies
#[derive(FromArgs, ArgsInfo, Debug)]
struct ProgramArgs {
    /// print the version and exit
    #[argh(switch)]
    version: bool,

    /// with --version: print the target, and what this build lacks
    #[argh(switch, short = 'v')]
    verbose: bool,

    /// print completions for bash, zsh or fish and exit
    #[argh(option, arg_name = "SHELL", from_str_fn(parse_shell))]
    completions: Option<ScriptFn>,

    /// print the manual page, in man(7) format, and exit
    #[argh(switch)]
    man: bool,
}

/// One of the four modes, with its options.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "a process has one")]
pub enum Mode {
    /// `s5 serve`
    Serve(ServeArgs),
    /// `s5 connect`, `s5 bind` or `s5 udp`
    Client(Command, ClientArgs),
}

impl Mode {
    /// Returns the logger that the options select.
    pub fn logger(&self) -> Logger {
        let level = match self {
            Self::Serve(args) => return serve::logger(args),
            Self::Client(_, ClientArgs { quiet: true, .. }) => LevelFilter::Off,
            Self::Client(_, args) if args.prints_only_json() => LevelFilter::Off,
            Self::Client(_, ClientArgs { verbose: 0 | 1, .. }) => LevelFilter::Warn,
            Self::Client(..) => LevelFilter::Debug,
        };
        Logger::new(level, false, false)
    }

    /// Runs the mode until it ends. A server can be restarted with the same `command_line`.
    ///
    /// # Errors
    /// The message to print and the exit status.
    pub fn run(self, command_line: Vec<String>) -> CliResult {
        match self {
            Self::Serve(args) => {
                serve::run(args, command_line).map_err(|error| error.with_help(&format!("{NAME} serve")))
            }
            Self::Client(command, args) => {
                let json = JsonOutput::open(args.json.as_deref(), args.listen.is_some())?;
                let result = match command {
                    Command::Connect => connect::run(args, json.clone()),
                    Command::Bind => bind::run(args, json.clone()),
                    Command::UdpAssociate => udp::run(args, json.clone()),
                };
                let help = format!("{NAME} {command}");
                result.map_err(|error| json.report_error(&SessionReport::default(), error.with_help(&help)))
            }
        }
    }
}

/// A parsed command line.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "a process has one")]
pub enum Action {
    /// A mode to run.
    Run(Mode),
    /// Help, manual, version or completions, to be printed on stdout.
    Print(String),
}

/// Returns the syntax of the command line.
pub fn syntax() -> Syntax {
    let connect = "Connect to a target through SOCKS5 proxies; stdin and stdout are the tunnel";
    let bind = "Accept one connection through a SOCKS5 proxy; stdin and stdout are the tunnel";
    let udp = "Send stdin as datagrams through SOCKS5 proxies, and print the answers";
    let modes = vec![
        Syntax::of::<ServeArgs>("serve"),
        options::syntax("connect", connect, "target"),
        options::syntax("bind", bind, "peer"),
        options::syntax("udp", udp, "target"),
    ];
    Syntax { modes, ..Syntax::of::<ProgramArgs>("") }
}

/// Parses a command line, with the program's name, and overwrites passwords in that of this process.
pub fn parse(args: &[String]) -> CliResult<Action> {
    let is_client = args.get(1).is_some_and(|mode| mode.parse::<Command>().is_ok());
    parse_with(&syntax(), args).map_err(|error| match is_client {
        true => JsonOutput::of_invalid_args(args).report_error(&SessionReport::default(), error),
        false => error,
    })
}

fn parse_with(program: &Syntax, args: &[String]) -> CliResult<Action> {
    let mode = args.get(1).filter(|mode| program.modes.iter().any(|known| known.name == **mode));
    let command = mode.map_or(NAME.into(), |mode| format!("{NAME} {mode}"));
    let usage_error = |message| CliError::usage(message).with_help(&command);
    let (mode, normalized) = argv::normalize(args.get(1..).unwrap_or_default(), program).map_err(usage_error)?;
    let Some(normalized) = normalized else { return Ok(Action::Print(help::text(mode))) };
    let normalized: Vec<&str> = normalized.iter().map(String::as_str).collect();
    let action = match mode.name {
        "" => from_args::<ProgramArgs>(&normalized).and_then(|args| args.action(program)),
        "serve" => from_args(&normalized).map(|args| Action::Run(Mode::Serve(args))),
        client => client.parse().and_then(|command| Ok(Action::Run(Mode::Client(command, from_args(&normalized)?)))),
    };
    let user = match &action {
        Ok(Action::Run(Mode::Client(_, client))) => client.proxy_user.as_deref(),
        _ => None,
    };
    secrets::redact(args, user);
    action.map_err(usage_error)
}

impl ProgramArgs {
    fn action(self, program: &Syntax) -> Result<Action, String> {
        match self {
            Self { version: true, verbose, .. } => Ok(Action::Print(version(verbose))),
            Self { man: true, .. } => Ok(Action::Print(manual::text(program))),
            Self { completions: Some(script), .. } => Ok(Action::Print(script(program))),
            _ => Err("a mode is required: serve, connect, bind or udp".into()),
        }
    }
}

/// Returns the version. If `is_verbose` is set, also the target, and what a static binary lacks: libraries of the system.
fn version(is_verbose: bool) -> String {
    let version = format!("{NAME} {}", env!("CARGO_PKG_VERSION"));
    let environment = if cfg!(target_env = "musl") { "musl" } else { "gnu" };
    let (link, gssapi, nsswitch) = match cfg!(target_feature = "crt-static") {
        true => ("static", "no", "no (only files and dns)"),
        false => ("dynamic", "yes, if the library is installed", "yes"),
    };
    let target = format!("{}-{}-{environment}", env::consts::ARCH, env::consts::OS);
    match is_verbose {
        true => format!("{version}\ntarget: {target}, {link}\nGSSAPI: {gssapi}\nnsswitch: {nsswitch}"),
        false => version,
    }
}

fn from_args<T: FromArgs>(args: &[&str]) -> Result<T, String> {
    T::from_args(&[NAME], args).map_err(|early| one_line(&early.output))
}

/// Joins the lines of an error of argh, which may quote a URL: then user name and password are removed.
fn one_line(text: &str) -> String {
    let words: Vec<String> = text.split_whitespace().map(secrets::without_userinfo).collect();
    let line = words.join(" ").replace("Error parsing option '", "").replace("' with value ", " ");
    let line = line.replace("invalid digit found in string", "expected a number");
    let line = line.replace("invalid IP address syntax", "expected an IPv4 or IPv6 address, without a port");
    // The message of a parser may repeat the value.
    let value = line.split('\'').nth(1).map(|value| format!(", found {value:?}"));
    let line = value.and_then(|found| line.strip_suffix(&found)).unwrap_or(&line);
    let mut chars = line.chars();
    chars.next().map(|first| first.to_lowercase().chain(chars).collect()).unwrap_or_default()
}
