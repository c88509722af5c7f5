//! The binary: parses the command line, starts logging, runs one mode, prints its error and exits.

#![forbid(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::ffi::OsString;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Arc;

use rustix::net::sockopt::socket_type;
use rustix::process::Signal;
use s5::cmd::{self, Action, CliError, ExitStatus};

fn main() -> ExitCode {
    let Ok(args) = std::env::args_os().map(OsString::into_string).collect::<Result<Vec<String>, _>>() else {
        return CliError::usage("the command line is not UTF-8").print();
    };
    if args.get(1).is_some_and(|arg| arg == cmd::RESTART_HELPER) {
        return match socket_type(std::io::stdin()) {
            // It has nothing to report to but the server, which is gone then.
            Ok(_) => ExitCode::from(u8::from(cmd::run_restart_helper().is_err())),
            Err(_) => CliError::usage("only s5 itself runs restart-helper (see s5 --help)").print(),
        };
    }
    let mode = match cmd::parse(&args) {
        Ok(Action::Run(mode)) => mode,
        Ok(Action::Print(text)) => {
            // A closed stdout is not an error here.
            let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
            return ExitCode::SUCCESS;
        }
        Err(error) => return error.print(),
    };
    if mode.logger().install().is_err() {
        return CliError::usage("a logger is already set").print();
    }
    // A panic is one line and status 1, as any other error. Rust's default status 101 would mean REP 1.
    std::panic::set_hook(Box::new(|panic| {
        CliError::new(ExitStatus::FAILURE, panic.to_string().replace('\n', " ")).print();
    }));
    // SIGUSR1 and SIGUSR2 can be sent to all processes of s5, but only servers handle them. SIGXFSZ would end the
    // process; with a handler, write(2) fails with EFBIG instead.
    for signal in [Signal::USR1, Signal::USR2, Signal::XFSZ] {
        let _ = signal_hook::flag::register(signal.as_raw(), Arc::default());
    }
    let code = match catch_unwind(AssertUnwindSafe(|| mode.run(args))) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => error.print(),
        Err(_) => ExitCode::FAILURE,
    };
    log::logger().flush();
    code
}
