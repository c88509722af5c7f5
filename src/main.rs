//! The binary: parses the command line, starts logging, runs one mode, prints its error and exits.

#![forbid(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::ffi::OsString;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use s5::cmd::{self, Action, CliError};
use simple_logger::SimpleLogger;

/// Wraps `SimpleLogger`, which panics if stderr is closed. That must not end the server.
struct InfallibleLogger(SimpleLogger);

impl log::Log for InfallibleLogger {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        self.0.enabled(metadata)
    }

    fn log(&self, record: &log::Record<'_>) {
        let text = cmd::plain_os_errors(record.args().to_string());
        let log = || {
            let mut plain = log::Record::builder();
            self.0.log(&plain.metadata(record.metadata().clone()).args(format_args!("{text}")).build());
        };
        // A lost log line can't be reported: the log is where it would be reported.
        let _ = catch_unwind(AssertUnwindSafe(log));
    }

    fn flush(&self) {}
}

fn main() -> ExitCode {
    let Ok(args) = std::env::args_os().map(OsString::into_string).collect::<Result<Vec<String>, _>>() else {
        return CliError::usage("the command line is not UTF-8").print();
    };
    let mode = match cmd::parse(&args) {
        Ok(Action::Run(mode)) => mode,
        Ok(Action::Print(text)) => {
            // A closed stdout is not an error here.
            let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
            return ExitCode::SUCCESS;
        }
        Err(error) => return error.print(),
    };
    let level = mode.log_level();
    let logger = SimpleLogger::new().with_level(level).with_utc_timestamps();
    log::set_max_level(level);
    if log::set_boxed_logger(Box::new(InfallibleLogger(logger))).is_err() {
        return CliError::usage("a logger is already set").print();
    }
    // A panic is one line and status 1, as any other error. Rust's default status 101 would mean REP 1.
    std::panic::set_hook(Box::new(|panic| cmd::eprint_line(&format!("s5: {}", panic.to_string().replace('\n', " ")))));
    match catch_unwind(AssertUnwindSafe(|| mode.run())) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => error.print(),
        Err(_) => ExitCode::FAILURE,
    }
}
