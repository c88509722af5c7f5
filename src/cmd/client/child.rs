//! A program that is given a tunnel as its stdin and stdout.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Stdio};

use super::Args;
use super::pipe::Pipe;
use crate::cmd::Failure;
use crate::cmd::status::Status;

/// Which program, and its arguments.
#[derive(Debug)]
pub(super) struct Program(Vec<String>);

impl Program {
    /// The one that the options name.
    pub(super) fn of(args: &Args) -> Result<Option<Self>, Failure> {
        match (&args.exec, &args.sh_exec) {
            (Some(_), Some(_)) => Err(Failure::usage("-e and -c: one or the other")),
            (Some(program), None) => {
                let words: Vec<String> = program.split_whitespace().map(str::to_owned).collect();
                if words.is_empty() { Err(Failure::usage("-e: no program")) } else { Ok(Some(Self(words))) }
            }
            (None, Some(command)) => Ok(Some(Self(vec!["/bin/sh".into(), "-c".into(), command.clone()]))),
            (None, None) => Ok(None),
        }
    }

    /// Starts it, with these variables in its environment: it, and its stdout and stdin.
    pub(super) fn start(&self, variables: &[(&str, String)], crlf: bool) -> Result<(Child, Pipe), Failure> {
        let Self(words) = self;
        let mut command = Command::new(words.first().map(String::as_str).unwrap_or_default());
        command.args(words.iter().skip(1)).envs(variables.iter().map(|(name, value)| (*name, value)));
        let failed = |error: &io::Error| {
            let status = match error.kind() {
                io::ErrorKind::NotFound => Status::NO_PROGRAM,
                _ => Status::NOT_EXECUTABLE,
            };
            Failure::new(status, format!("{}: {error}", words.join(" ")))
        };
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(|error| failed(&error))?;
        let pipes = child.stdin.take().map(OwnedFd::from).zip(child.stdout.take().map(OwnedFd::from));
        let pipe = pipes.ok_or_else(|| io::ErrorKind::BrokenPipe.into());
        let pipe = pipe.and_then(|(stdin, stdout)| Pipe::of_program(stdout, stdin, crlf));
        Ok((child, pipe.map_err(|error| failed(&error))?))
    }
}

/// How it ends, which is waited for on another thread.
pub(super) async fn end(mut child: Child) -> io::Result<Status> {
    let ended = smol::unblock(move || child.wait()).await?;
    Ok(Status::of_program(ended.code(), ended.signal()))
}
