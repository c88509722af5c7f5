//! Exit statuses and error messages.
//!
//! An error is one line on stderr: `s5: `, the operation that failed, the phase, the reason and, if there is one, the
//! remedy. It is in lower case, has no full stop and never contains a password.

use std::fmt;
use std::process::ExitCode;

use rustix::io::Errno;

use super::argv::with_typed_names;
pub(crate) use super::escape::escape;
use super::escape::plain_os_errors;
use super::logger::error_line;
use crate::client::{ClientError, ClientErrorKind as Kind, Phase};
use crate::net::DialError;
use crate::proto::Rep;
use crate::server::ServerError;
use crate::server::report_failed_start;
pub use crate::server::{eprint_line, start_stderr_thread};

/// An exit status. The numbers are stable. Errors that curl(1) also reports have curl's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ExitStatus(u8);

macro_rules! exit_statuses {
    ($($code:literal $name:ident $meaning:literal)*) => {
        impl ExitStatus {
            $(#[doc = concat!("Status ", stringify!($code), ": ", $meaning, ".")] pub const $name: Self = Self($code);)*
            /// All statuses with their meanings, except those passed on from a child process.
            pub const ALL: &[(u8, &str)] = &[$(($code, $meaning)),*];
        }
    };
}

exit_statuses! {
    0 SUCCESS "success: the transfer ended without an error (`udp`: all datagrams were sent)"
    1 FAILURE "any other failure"
    2 USAGE "the command line, an environment variable or a file is invalid"
    5 RESOLVE_PROXY "the proxy's name could not be resolved"
    6 RESOLVE_TARGET "the target's name could not be resolved (with `-R local`, or without a proxy)"
    7 UNREACHABLE "a proxy, or without a proxy the target, could not be reached"
    23 WRITE_STDOUT "stdout, or a file named by an option, could not be written"
    26 READ_STDIN "stdin could not be read, or is not in the format that an option requires"
    28 TIMED_OUT "a timeout expired (the message names the phase)"
    45 LOCAL_ADDR "the local address or port (`-s`, `-p`, `-l`) is not available"
    55 SEND_ERROR "write error during the transfer"
    56 RECEIVE_ERROR "read error during the transfer"
    67 LOGIN_FAILED "the proxy refused the login, or requires credentials that were not given"
    97 PROTOCOL "not a SOCKS5 server, or connection closed during the handshake"
    101 REP_1 "the proxy replied: general failure"
    102 REP_2 "the proxy replied: not allowed by ruleset"
    103 REP_3 "the proxy replied: network unreachable"
    104 REP_4 "the proxy replied: host unreachable, or no such name"
    105 REP_5 "the proxy replied: connection refused"
    106 REP_6 "the proxy replied: TTL expired, which most servers send for a timeout"
    107 REP_7 "the proxy replied: command not supported"
    108 REP_8 "the proxy replied: address type not supported"
    109 REP_9 "the proxy replied with an unassigned code"
    126 NOT_EXECUTABLE "the program of `-e` could not be executed"
    127 PROGRAM_NOT_FOUND "the program of `-e` was not found"
    141 BROKEN_PIPE "broken pipe: the reader of stdout has closed it"
}

impl ExitStatus {
    /// Returns the status of a child process as a shell does: its exit code, or 128 + the signal that killed it.
    pub fn from_child(code: Option<i32>, signal: Option<i32>) -> Self {
        let code = code.or(signal.map(|signal| 128 + signal));
        code.and_then(|code| u8::try_from(code).ok()).map_or(Self::FAILURE, Self)
    }

    /// Returns the status as a number.
    pub fn code(self) -> u8 {
        self.0
    }
}

/// An error that ends a mode.
#[derive(Debug)]
pub struct CliError {
    /// Text after `s5: `; nothing is printed if it is empty.
    pub message: String,
    /// Exit status of the program.
    pub status: ExitStatus,
    /// Set if a retry would fail in the same way.
    pub is_final: bool,
    /// Set if the command line is invalid, so that the help can explain the error.
    pub refers_to_help: bool,
    /// Set if an object of `--json` has this error.
    pub is_reported: bool,
}

/// Result of a mode or of a part of it.
pub type CliResult<T = ()> = Result<T, CliError>;

impl CliError {
    /// Returns an error for which `is_final` is set.
    pub fn new(status: ExitStatus, message: impl Into<String>) -> Self {
        Self { message: message.into(), status, is_final: true, refers_to_help: false, is_reported: false }
    }

    /// Returns an error in the command line.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { refers_to_help: true, ..Self::new(ExitStatus::USAGE, message) }
    }

    /// Fails if the command line has this problem.
    pub(crate) fn usage_if(has_problem: bool, message: impl Into<String>) -> CliResult {
        if has_problem { Err(Self::usage(message)) } else { Ok(()) }
    }

    /// Adds a reference to the help of a mode, unless the message ends with a remedy. `command` is `s5` or `s5 MODE`.
    pub(crate) fn with_help(mut self, command: &str) -> Self {
        self.message = with_typed_names(&self.message);
        if self.refers_to_help && !self.message.is_empty() && !self.message.ends_with(')') {
            self.message += &format!(" (see {command} --help)");
        }
        self
    }

    /// Prints the message and returns the exit status.
    pub fn print(self) -> ExitCode {
        if !self.message.is_empty() {
            report_failed_start(&self.to_string());
            eprint_line(&error_line(&self.to_string()));
        }
        ExitCode::from(self.status.code())
    }
}

/// Messages may contain text from proxies, targets and files.
impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&escape(&plain_os_errors(self.message.clone())))
    }
}

impl From<ServerError> for CliError {
    fn from(error: ServerError) -> Self {
        match error {
            ServerError::Io(operation, error) => Self::new(ExitStatus::FAILURE, format!("{operation}: {error}")),
            ServerError::AccessLog(file, error) => {
                let hint = match Errno::from_io_error(&error) {
                    Some(Errno::NOENT) => " (create its directory)",
                    Some(Errno::ACCESS) => " (the user of the server must be allowed to write there)",
                    Some(Errno::NXIO) => " (a pipe needs a reader, and /dev/tty a terminal)",
                    _ => "",
                };
                Self::new(ExitStatus::WRITE_STDOUT, format!("--access-log {}: {error}{hint}", file.display()))
            }
            ServerError::Config(message) => Self::new(ExitStatus::USAGE, message),
        }
    }
}

impl From<ClientError> for CliError {
    fn from(error: ClientError) -> Self {
        let (status, is_final) = match (&error.kind, error.phase) {
            (Kind::Unreachable(DialError::TimedOut) | Kind::TimedOut(_), _) => (ExitStatus::TIMED_OUT, false),
            (Kind::Unreachable(DialError::LocalAddr(_)), _) => (ExitStatus::LOCAL_ADDR, true),
            (Kind::Unreachable(_), Phase::ResolveTarget) => (ExitStatus::RESOLVE_TARGET, false),
            (Kind::Unreachable(_), Phase::ResolveProxy) => (ExitStatus::RESOLVE_PROXY, false),
            (Kind::Unreachable(_) | Kind::Socket(_) | Kind::NextHop(_) | Kind::Relay(..), _) => {
                (ExitStatus::UNREACHABLE, false)
            }
            (Kind::Protocol(_), _) => (ExitStatus::PROTOCOL, true),
            (Kind::Closed(_), _) => (ExitStatus::PROTOCOL, false),
            (Kind::NoAcceptableMethod(..) | Kind::LoginRefused | Kind::Gssapi(_), _) => {
                (ExitStatus::LOGIN_FAILED, true)
            }
            (Kind::NoPeer(_), _) => (ExitStatus::REP_6, false),
            (Kind::Rep(rep), _) => {
                let final_reps = [Rep::NOT_ALLOWED, Rep::COMMAND_NOT_SUPPORTED, Rep::ATYP_NOT_SUPPORTED];
                // 109 stands for all unassigned codes.
                (ExitStatus(100 + rep.0.min(9)), final_reps.contains(rep))
            }
        };
        Self { is_final, ..Self::new(status, error.to_string()) }
    }
}
