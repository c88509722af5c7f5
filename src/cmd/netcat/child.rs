//! `-e` and `-c`: a program that has the tunnel as its stdin and stdout.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Stdio};

use super::options::ClientArgs;
use super::stdio::StdioStream;
use crate::cmd::cli::exit::{CliError, CliResult, ExitStatus};
use crate::net::unblock;

#[derive(Debug)]
pub(crate) struct Program(Vec<String>);

impl Program {
    /// Returns the program of `-e` or `-c`, if one is given.
    pub(super) fn from_args(args: &ClientArgs) -> CliResult<Option<Self>> {
        let words: Option<Vec<String>> = match (&args.exec, &args.sh_exec) {
            (Some(program), _) => Some(program.split_whitespace().map(str::to_owned).collect()),
            (None, command) => command.as_ref().map(|command| vec!["/bin/sh".into(), "-c".into(), command.clone()]),
        };
        CliError::usage_if(words.as_ref().is_some_and(Vec::is_empty), "-e requires a program")?;
        Ok(words.map(Self))
    }

    /// Starts the program with these environment variables. Returns the process, and its stdin and stdout as a stream.
    pub(super) fn start(&self, variables: &[(&str, String)], crlf: bool) -> CliResult<(Child, StdioStream)> {
        let Self(words) = self;
        let mut command = Command::new(words.first().map(String::as_str).unwrap_or_default());
        command.args(words.iter().skip(1)).envs(variables.iter().map(|(name, value)| (*name, value)));
        let start_error = |error: io::Error| {
            let status = match error.kind() {
                io::ErrorKind::NotFound => ExitStatus::PROGRAM_NOT_FOUND,
                _ => ExitStatus::NOT_EXECUTABLE,
            };
            CliError::new(status, format!("run {}: {error}", words.join(" ")))
        };
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(start_error)?;
        let pipes = child.stdin.take().map(OwnedFd::from).zip(child.stdout.take().map(OwnedFd::from));
        let pipes = pipes.ok_or_else(|| io::ErrorKind::BrokenPipe.into());
        let stdio = pipes.and_then(|(stdin, stdout)| StdioStream::from_child(stdout, stdin, crlf));
        Ok((child, stdio.map_err(start_error)?))
    }
}

/// Waits for a process on another thread. Returns its exit status.
pub(super) async fn wait(mut child: Child) -> io::Result<ExitStatus> {
    let status = unblock(move || child.wait()).await;
    let status = status.unwrap_or_else(|| Err(io::Error::other("no thread can be started")))?;
    Ok(ExitStatus::from_child(status.code(), status.signal()))
}
