//! How a mode ends: the exit statuses, all of them, and the line that goes with each.
//!
//! Every message is one line on stderr: `s5: ` and then who or what, the phase, the reason, and where there is one the
//! way out. Lower case, no full stop, never a secret.

use std::fmt;
use std::io::Write as _;
use std::process::ExitCode;

use crate::client::{self as socks, Cause, Phase};
use crate::dial::DialError;
use crate::proto::Rep;

/// An exit status. Scripts rely on the numbers: curl's where curl has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ExitStatus(u8);

macro_rules! exit_statuses {
    ($($code:literal $name:ident $meaning:literal)*) => {
        impl ExitStatus {
            $(#[doc = concat!("Status ", stringify!($code), ": ", $meaning, ".")] pub const $name: Self = Self($code);)*
            /// Every status there is, with its meaning; but for those of a program that was run.
            pub const ALL: &[(u8, &str)] = &[$(($code, $meaning)),*];
        }
    };
}

exit_statuses! {
    0 SUCCESS "it ended well: TCP's word, which does not say that the other side had finished; `udp`: all was sent"
    1 FAILURE "none of the below"
    2 USAGE "the command line, a variable or a file is wrong"
    5 RESOLVE_PROXY "the proxy's name could not be resolved"
    6 RESOLVE_TARGET "the target's name could not be resolved, with `-R local` or without a proxy"
    7 UNREACHABLE "the proxy, a later one of a chain, or without a proxy the target could not be reached"
    23 WRITE_STDOUT "stdout, or the file of an option, could not be written"
    26 READ_STDIN "stdin could not be read, or is not what an option says that it is"
    28 TIMED_OUT "time ran out; the message names the phase"
    45 LOCAL_ADDR "the address or port of `-s`, `-p` or `-l` could not be had"
    55 SEND_ERROR "sending failed in the middle"
    56 RECEIVE_ERROR "receiving failed in the middle"
    67 LOGIN_FAILED "the proxy wants a login that was not given, or refused it"
    97 PROTOCOL "not a SOCKS5 server, or it broke off"
    101 REP_1 "the proxy answered: general failure"
    102 REP_2 "the proxy answered: not allowed by ruleset"
    103 REP_3 "the proxy answered: network unreachable"
    104 REP_4 "the proxy answered: host unreachable, or no such name"
    105 REP_5 "the proxy answered: connection refused"
    106 REP_6 "the proxy answered: TTL expired, which most servers say for a time-out"
    107 REP_7 "the proxy answered: command not supported"
    108 REP_8 "the proxy answered: address type not supported"
    109 REP_9 "the proxy answered with a code that is not assigned"
    126 NOT_EXECUTABLE "the program of `-e` could not be run"
    127 PROGRAM_NOT_FOUND "the program of `-e` was not found"
    141 BROKEN_PIPE "nobody reads stdout any more"
}

impl ExitStatus {
    /// Of a reply that is a failure: 100 + REP, 109 for all that are not assigned.
    fn from_rep(rep: Rep) -> Self {
        Self(100 + rep.0.min(9))
    }

    /// As a program ended that was run: its own, 128 and the signal that killed it.
    pub fn from_child(code: Option<i32>, signal: Option<i32>) -> Self {
        let code = code.or(signal.map(|signal| 128 + signal));
        code.and_then(|code| u8::try_from(code).ok()).map_or(Self::FAILURE, Self)
    }

    /// The number.
    pub fn code(self) -> u8 {
        self.0
    }
}

/// How a mode ends when it does not end well.
#[derive(Debug)]
pub struct CliError {
    /// What is printed behind `s5: `; empty for nothing.
    pub message: String,
    /// How the program exits.
    pub status: ExitStatus,
    /// Whether it would fail the same way if it were tried again.
    pub is_final: bool,
}

impl CliError {
    /// A failure that trying again would not mend.
    pub fn new(status: ExitStatus, message: impl Into<String>) -> Self {
        Self { message: message.into(), status, is_final: true }
    }

    /// A mistake in the command line or in a file that it names.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(ExitStatus::USAGE, message)
    }

    /// Prints it and gives the exit status.
    pub fn print(self) -> ExitCode {
        if !self.message.is_empty() {
            eprint_line(&format!("s5: {self}"));
        }
        ExitCode::from(self.status.code())
    }
}

/// Escapes what a terminal could take for a command: proxies and targets have a say in messages.
impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.message.chars() {
            if c.is_control() { write!(f, "{}", c.escape_default())? } else { write!(f, "{c}")? }
        }
        Ok(())
    }
}

impl From<socks::Error> for CliError {
    fn from(error: socks::Error) -> Self {
        let status = match (&error.cause, error.phase) {
            (Cause::Unreachable(DialError::TimedOut) | Cause::TimedOut(_), _) => ExitStatus::TIMED_OUT,
            (Cause::Unreachable(DialError::LocalAddr), _) => ExitStatus::LOCAL_ADDR,
            (Cause::Unreachable(_), Phase::Target) => ExitStatus::RESOLVE_TARGET,
            (Cause::Unreachable(_), Phase::Resolve) => ExitStatus::RESOLVE_PROXY,
            (Cause::Unreachable(_) | Cause::Socket(_) | Cause::NextHop(_), _) => ExitStatus::UNREACHABLE,
            (Cause::Protocol(_) | Cause::Closed(_), _) => ExitStatus::PROTOCOL,
            (Cause::NoMethod | Cause::LoginRefused | Cause::Gssapi(_), _) => ExitStatus::LOGIN_FAILED,
            (Cause::Rep(rep), _) => ExitStatus::from_rep(*rep),
        };
        let is_final = match &error.cause {
            Cause::Unreachable(failure) => *failure == DialError::LocalAddr,
            Cause::Protocol(_) | Cause::NoMethod | Cause::LoginRefused | Cause::Gssapi(_) => true,
            Cause::Rep(rep) => [Rep::NOT_ALLOWED, Rep::COMMAND_NOT_SUPPORTED, Rep::ATYP_NOT_SUPPORTED].contains(rep),
            Cause::Socket(_) | Cause::Closed(_) | Cause::NextHop(_) | Cause::TimedOut(_) => false,
        };
        Self { message: error.to_string(), status, is_final }
    }
}

/// One line on stderr, in one piece: others may be writing there too. With stderr closed the status has to do.
pub fn eprint_line(line: &str) {
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_can_not_drive_a_terminal() {
        assert_eq!(CliError::usage("a\x1b[2Jb\n").to_string(), "a\\u{1b}[2Jb\\n");
    }

    #[test]
    fn a_program_ends_as_a_shell_would_tell_it() {
        let table = [(Some(0), None, 0), (Some(3), None, 3), (None, Some(9), 137), (Some(256), None, 1)];
        for (code, signal, status) in table {
            assert_eq!(ExitStatus::from_child(code, signal).code(), status);
        }
    }
}
