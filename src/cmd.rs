//! The command line and its four modes. stdout is for data only: messages, logs and prompts go to stderr.

pub mod bind;
pub mod cli;
pub mod connect;
pub mod netcat;
pub mod serve;
pub mod udp;

use std::ffi::OsString;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::process::ExitCode;

use argh::{ArgsInfo, FromArgs};
use log::LevelFilter;

use cli::argv::{self, Normalized};
pub use cli::completions::Shell;
pub use cli::exit::{CliError, ExitStatus, eprint_line};
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
        match self {
            Self::Serve(args) => args.run().map_err(|error| error.with_help("s5 serve")),
            Self::Connect(args) => args.run().map_err(|error| error.with_help("s5 connect")),
            Self::Bind(args) => args.run().map_err(|error| error.with_help("s5 bind")),
            Self::Udp(args) => args.run().map_err(|error| error.with_help("s5 udp")),
        }
    }
}

/// A reason to exit before a mode runs.
#[derive(Debug)]
pub enum EarlyExit {
    /// Help, manual, version or completions, to be printed on stdout. The exit status is 0.
    Output(String),
    /// An invalid command line.
    Usage(CliError),
}

impl EarlyExit {
    /// Prints the text or the error, and returns the exit status.
    pub fn print(self) -> ExitCode {
        match self {
            Self::Output(text) => {
                // A closed stdout is not an error here.
                let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
                ExitCode::SUCCESS
            }
            Self::Usage(error) => error.print(),
        }
    }
}

/// Parses a command line; `args[0]` is the program's name.
///
/// # Errors
/// The output or the error to print before the program exits.
pub fn parse(args: &[String]) -> Result<Mode, EarlyExit> {
    let program = Args::get_args_info();
    let mode = args.get(1).filter(|mode| program.commands.iter().any(|known| known.name == **mode));
    let command = mode.map_or(NAME.into(), |mode| format!("{NAME} {mode}"));
    let usage_error = |message| EarlyExit::Usage(CliError::usage(message).with_help(&command));
    let normalized = argv::normalize(args.get(1..).unwrap_or_default(), &program, unsupported_reason);
    let args = match normalized.map_err(usage_error)? {
        Normalized::Args(args) => args,
        Normalized::Help(text) => return Err(EarlyExit::Output(text)),
    };
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let parsed = Args::from_args(&[NAME], &args).map_err(|early| match early.status {
        Ok(()) => EarlyExit::Output(early.output),
        Err(()) => usage_error(one_line(&early.output)),
    })?;
    match parsed {
        Args { version: true, .. } => Err(EarlyExit::Output(format!("{NAME} {}", env!("CARGO_PKG_VERSION")))),
        Args { man: true, .. } => Err(EarlyExit::Output(manual::text(&program, options::Args::get_args_info().flags))),
        Args { completions: Some(shell), .. } => Err(EarlyExit::Output(shell.script(&program))),
        Args { mode: Some(mode), .. } => Ok(mode),
        Args { mode: None, .. } => Err(usage_error("a mode is required: serve, connect, bind or udp".into())),
    }
}

/// Overwrites passwords in the command line of this process. `args` is a copy of it.
pub fn redact_command_line(args: &[OsString]) {
    let raw_args: Vec<&[u8]> = args.iter().map(|arg| arg.as_bytes()).collect();
    let may_have_password =
        |arg: &&[u8]| arg.contains(&b'@') || arg.starts_with(b"-") && (arg.contains(&b'P') || arg.contains(&b'u'));
    if !raw_args.iter().any(may_have_password) {
        return;
    }
    let args: Vec<String> = args.iter().skip(1).map(|arg| arg.to_string_lossy().into_owned()).collect();
    let user = match argv::normalize(&args, &Args::get_args_info(), unsupported_reason) {
        Ok(Normalized::Args(args)) => {
            let option = args.iter().position(|arg| arg == "-P" || arg == "--proxy-user");
            option.and_then(|index| args.get(index + 1)).cloned()
        }
        _ => None,
    };
    secrets::redact(&raw_args, user.as_deref());
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
        let Err(EarlyExit::Usage(error)) = parse(&args) else { panic!("not a usage error") };
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
            let Err(EarlyExit::Usage(error)) = parse(&args.map(String::from)) else { panic!("not a usage error") };
            assert!(error.message.contains("@proxy.test") && !error.message.contains("secret"), "{error}");
        }
    }
}
