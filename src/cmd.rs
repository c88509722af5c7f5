//! The command line and its four modes. stdout is for data only: messages, logs and prompts go to stderr.

pub mod bind;
pub mod cli;
pub mod connect;
pub mod netcat;
pub mod serve;
pub mod udp;

use argh::{ArgsInfo, FromArgs};
use log::LevelFilter;

use cli::argv::{self, Normalized};
pub use cli::completions::Shell;
pub use cli::exit::{CliError, ExitStatus, eprint_line, plain_os_errors};
use cli::help::NAME;
use cli::{manual, secrets};
use netcat::options::{self, unsupported_reason};

/// A SOCKS5 server, and a netcat that works through SOCKS5 proxies
#[derive(FromArgs, ArgsInfo, Debug)]
pub struct Args {
    /// print the version and exit
    #[argh(switch)]
    version: bool,

    /// print completions for bash, zsh or fish and exit
    #[argh(option, arg_name = "SHELL")]
    completions: Option<Shell>,

    /// print the manual page, in man(7) format, and exit
    #[argh(switch)]
    man: bool,

    #[argh(subcommand)]
    mode: Option<Mode>,
}

/// One of the four modes.
#[derive(FromArgs, ArgsInfo, Debug)]
#[argh(subcommand)]
#[allow(clippy::large_enum_variant, reason = "a process has one")]
pub enum Mode {
    /// `s5 serve`
    Serve(serve::Args),
    /// `s5 connect`
    Connect(connect::Args),
    /// `s5 bind`
    Bind(bind::Args),
    /// `s5 udp`
    Udp(udp::Args),
}

impl Mode {
    /// Returns the log level that the options select.
    pub fn log_level(&self) -> LevelFilter {
        match self {
            Self::Serve(args) => args.log_level(),
            Self::Connect(connect::Args(args)) | Self::Bind(bind::Args(args)) | Self::Udp(udp::Args(args)) => {
                match (args.quiet, args.verbose) {
                    (true, _) => LevelFilter::Off,
                    (false, 0 | 1) => LevelFilter::Warn,
                    (false, _) => LevelFilter::Debug,
                }
            }
        }
    }

    /// Runs the mode until it ends.
    ///
    /// # Errors
    /// The message to print and the exit status.
    pub fn run(self) -> Result<(), CliError> {
        let (name, result) = match self {
            Self::Serve(args) => ("serve", args.run()),
            Self::Connect(args) => ("connect", args.run()),
            Self::Bind(args) => ("bind", args.run()),
            Self::Udp(args) => ("udp", args.run()),
        };
        result.map_err(|error| error.with_help(&format!("{NAME} {name}")))
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

/// Parses a command line, and overwrites passwords in the command line of this process. `args[0]` is the program's name.
///
/// # Errors
/// The command line is invalid.
pub fn parse(args: &[String]) -> Result<Action, CliError> {
    let program = Args::get_args_info();
    let mode = args.get(1).filter(|mode| program.commands.iter().any(|known| known.name == **mode));
    let command = mode.map_or(NAME.into(), |mode| format!("{NAME} {mode}"));
    let usage_error = |message| CliError::usage(message).with_help(&command);
    let normalized = argv::normalize(args.get(1..).unwrap_or_default(), &program, unsupported_reason);
    let normalized = match normalized.map_err(usage_error)? {
        Normalized::Args(args) => args,
        Normalized::Help(text) => return Ok(Action::Print(text)),
    };
    let normalized: Vec<&str> = normalized.iter().map(String::as_str).collect();
    let option = normalized.iter().position(|arg| ["-P", "--proxy-user"].contains(arg));
    secrets::redact(args, option.and_then(|option| normalized.get(option + 1)).copied());
    let parsed = Args::from_args(&[NAME], &normalized).map_err(|early| usage_error(one_line(&early.output)))?;
    Ok(match parsed {
        Args { version: true, .. } => Action::Print(format!("{NAME} {}", env!("CARGO_PKG_VERSION"))),
        Args { man: true, .. } => Action::Print(manual::text(&program, options::Args::get_args_info().flags)),
        Args { completions: Some(shell), .. } => Action::Print(shell.script(&program)),
        Args { mode: Some(mode), .. } => Action::Run(mode),
        Args { mode: None, .. } => return Err(usage_error("a mode is required: serve, connect, bind or udp".into())),
    })
}

/// Joins the lines of an error message of argh. Removes user names and passwords: the message may quote the URL of a
/// proxy that was given to the wrong option.
fn one_line(text: &str) -> String {
    let words: Vec<String> = text.split_whitespace().map(secrets::without_userinfo).collect();
    let line = words.join(" ").replace("Error parsing option '", "").replace("' with value ", " ");
    let line = line.replace("invalid digit found in string", "expected a number");
    let mut chars = line.chars();
    chars.next().map(|first| first.to_lowercase().chain(chars).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_error_is_one_line() {
        let args = ["s5", "connect", "--nonsense"].map(String::from);
        let Err(error) = parse(&args) else { panic!("not a usage error") };
        assert_eq!(error.message.lines().count(), 1, "{}", error.message);
        assert!(error.message.contains("--nonsense"), "{}", error.message);
    }

    #[test]
    fn usage_error_hides_password_of_misplaced_url() {
        for args in [
            ["s5", "socks5h://alice:secret@proxy.test", ""],
            ["s5", "connect", "--socks5h://alice:secret@proxy.test"],
            ["s5", "serve", "alice:secret@proxy.test"],
        ] {
            let Err(error) = parse(&args.map(String::from)) else { panic!("not a usage error") };
            assert!(error.message.contains("@proxy.test") && !error.message.contains("secret"), "{error}");
        }
    }
}
