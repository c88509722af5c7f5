//! The destination of the objects of `--json`: stderr, a file, or an inherited descriptor.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;
use std::rc::Rc;

use super::descriptor;
use super::report::SessionReport;
use crate::cmd::cli::exit::{CliError, ExitStatus, eprint_line};
use crate::cmd::cli::output_file;
use crate::cmd::cli::syntax::OPTIONAL_VALUE;

/// Where to write one object per line.
#[derive(Clone, Default)]
pub(crate) enum JsonOutput {
    /// There is no `--json`.
    #[default]
    Disabled,
    Stderr,
    File(Rc<File>),
}

impl JsonOutput {
    /// Opens the output that the value of `--json` names. A file of an earlier run is emptied.
    ///
    /// # Errors
    /// The file cannot be written, or the descriptor is not open.
    pub(crate) fn open(value: Option<&str>) -> Result<Self, CliError> {
        let Some(text) = value else { return Ok(Self::Disabled) };
        match text {
            text if text == OPTIONAL_VALUE.1 => return Ok(Self::Stderr),
            "-" => return Err(CliError::usage("--json=-: stdout is for data (use --json for stderr, or a file)")),
            _ => {}
        }
        let file_error = |status| move |error: io::Error| CliError::new(status, format!("--json={text}: {error}"));
        let file = match descriptor::fd_number(text) {
            Some(number) => descriptor::take_fd(number).map_err(file_error(ExitStatus::USAGE))?,
            None => output_file::open(Path::new(text), true).map_err(file_error(ExitStatus::WRITE_STDOUT))?,
        };
        Ok(Self::File(Rc::new(file)))
    }

    /// Opens the output of a command line that could not be parsed.
    pub(crate) fn of_invalid_args(args: &[String]) -> Self {
        let (option, default) = OPTIONAL_VALUE;
        let mut options = args.iter().take_while(|arg| *arg != "--").filter_map(|arg| arg.strip_prefix(option));
        let value = options.find_map(|rest| if rest.is_empty() { Some(default) } else { rest.strip_prefix('=') });
        Self::open(value).unwrap_or_default()
    }

    /// Returns whether an object on stderr replaces all other lines.
    pub(crate) fn is_stderr(&self) -> bool {
        matches!(self, Self::Stderr)
    }

    /// Writes the report of a session and returns its result.
    pub(crate) fn report(&self, report: &SessionReport<'_>, result: Result<(), CliError>) -> Result<(), CliError> {
        match result {
            Ok(()) => self
                .write(&report.to_json(None))
                .map_err(|error| CliError::new(ExitStatus::WRITE_STDOUT, format!("--json: {error}"))),
            Err(error) => Err(self.report_error(report, error)),
        }
    }

    /// Writes the report of an error, unless the error is reported already. Removes its message if the object on stderr
    /// replaces it.
    pub(crate) fn report_error(&self, report: &SessionReport<'_>, error: CliError) -> CliError {
        if error.is_reported || matches!(self, Self::Disabled) {
            return error;
        }
        // If the write fails, the error of the session is still the more important one.
        let _ = self.write(&report.to_json(Some(&error)));
        let message = if self.is_stderr() { String::new() } else { error.message };
        CliError { message, is_reported: true, ..error }
    }

    /// Writes the report of an error in the command line, unless the error is reported already.
    pub(crate) fn report_usage_error(&self, error: CliError) -> CliError {
        self.report_error(&SessionReport::default(), error)
    }

    fn write(&self, object: &str) -> io::Result<()> {
        match self {
            Self::Disabled => {}
            Self::Stderr => eprint_line(object),
            Self::File(file) => file.as_ref().write_all(format!("{object}\n").as_bytes())?,
        }
        Ok(())
    }
}
