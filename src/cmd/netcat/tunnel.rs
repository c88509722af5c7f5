//! The use of an established tunnel. s5 closes it (`-z`), passes its socket to another process (`-F`), or relays
//! between it and stdin and stdout, or those of a program (`-e`, `-c`).

use std::cell::Cell;
use std::future::{pending, poll_fn};
use std::io::{self, IsTerminal as _};
use std::mem::replace;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::pin::Pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_lite::FutureExt as _;

use super::child::{self, Program};
use super::connector::Connector;
use super::options::ClientArgs;
use super::progress;
use super::report::SessionReport;
use super::stdio::StdioStream;
use crate::cmd::cli::exit::{CliError, CliResult, ExitStatus};
use crate::conn::Conn;
use crate::net::{
    RelayError, RelayOp, RelayOptions, RelayOutcome, RelayResult, relay, send_descriptors, send_queue, sleep,
    timeout_at,
};
use crate::proto::Addr;

/// Time limit of the last flush of stdout after a timeout.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(250);
/// With `--send-only`, time from the end of stdin, or from the last progress, to the exit of s5.
const SEND_ONLY_GRACE: Duration = Duration::from_secs(5);

/// Checks the options that apply to an established tunnel. Returns the program of `-e` or `-c`.
pub(crate) fn check_args(args: &ClientArgs) -> CliResult<Option<Program>> {
    CliError::usage_if(args.timeout.is_some_and(|time| time.is_zero()), "-w: must be greater than 0")?;
    let exclusive = [
        (args.zero_io, "-z"),
        (args.pass_fd, "-F"),
        (args.exec.is_some(), "-e"),
        (args.sh_exec.is_some(), "-c"),
        (args.listen.is_some(), "-l"),
        (args.recv_only, "-d"),
        (args.send_only, "--send-only"),
    ];
    let given: Vec<&str> = exclusive.iter().filter(|(is_given, _)| *is_given).map(|(_, name)| *name).collect();
    if let [first, second, ..] = given.as_slice() {
        return Err(CliError::usage(format!("{first} and {second} cannot be combined")));
    }
    let given = given.concat();
    let has_relay = !(args.zero_io || args.pass_fd);
    CliError::usage_if(!has_relay && args.linger.is_some(), format!("--linger cannot be used with {given}"))?;
    let has_stdin = has_relay && args.listen.is_none();
    let needs_stdin = args.crlf || args.no_shutdown || args.quit_after.is_some() || args.progress;
    let problem = format!("-C, -q, --no-shutdown and --progress cannot be used with {given}");
    CliError::usage_if(needs_stdin && !has_stdin, problem)?;
    let is_socket = || rustix::net::sockopt::socket_type(io::stdout()).is_ok();
    let problem = "-F: stdout is not a socket (this option is for ssh's ProxyUseFdpass)";
    CliError::usage_if(args.pass_fd && !is_socket(), problem)?;
    Program::from_args(args)
}

/// Uses the tunnel as the options require, until it ends.
pub(crate) async fn run(
    connector: &Connector,
    program: Option<&Program>,
    tunnel: Conn,
    bnd: &Addr,
    report: &mut SessionReport<'_>,
) -> CliResult {
    let args = &connector.args;
    let failure = |reason: &str, error| connector.transfer_error(ExitStatus::FAILURE, &format!("{reason}: {error}"));
    if args.zero_io {
        return Ok(());
    }
    if args.pass_fd {
        return pass_socket(&tunnel).map_err(|error| failure("pass the socket", error));
    }
    let Some(program) = program else {
        let stdio = StdioStream::from_stdio(!args.recv_only, !args.send_only, args.crlf);
        let stdio = stdio.map_err(|error| failure("open stdin and stdout", error))?;
        return relay_local(connector, stdio, None, tunnel, report).await;
    };
    let variables = [
        ("S5_TARGET", connector.dst().map(ToString::to_string).unwrap_or_default()),
        ("S5_BND", bnd.to_string()),
        ("S5_PROXY_ADDR", connector.hops.last().map(ToString::to_string).unwrap_or_default()),
    ];
    let (child, stdio) = program.start(&variables, args.crlf)?;
    let exit = Box::pin(child::wait(child));
    relay_local(connector, stdio, Some(exit), tunnel, report).await
}

/// Relays between the tunnel and stdin and stdout, or those of the program whose exit is `program_exit`.
async fn relay_local(
    connector: &Connector,
    mut stdio: StdioStream,
    mut program_exit: Option<Pin<Box<dyn Future<Output = io::Result<ExitStatus>>>>>,
    mut tunnel: Conn,
    report: &mut SessionReport<'_>,
) -> CliResult {
    let args = &connector.args;
    let (counts, stats) = report.start_relay();
    // After the end of the answer, a user at a terminal has nothing more to say.
    let ends_with_remote = program_exit.is_none() && (args.recv_only || io::stdin().is_terminal());
    let options = RelayOptions {
        idle_timeout: args.max_idle_time(),
        linger: if ends_with_remote { Some(Duration::ZERO) } else { args.linger },
        keeps_dst_open: args.no_shutdown,
        stats: Some(stats.clone()),
        ..RelayOptions::default()
    };
    let mut exit_status = None;
    let quit_timed_out = Cell::new(false);
    let outcome = {
        // Closed with this block, before the tunnel.
        let socket = args.send_only.then(|| tunnel.as_fd().try_clone_to_owned()).and_then(Result::ok);
        let quit = async {
            // Without stdin, the time of -q begins at once. The relay wakes this task, and is polled first.
            poll_fn(|_| if args.recv_only || stats.is_up_done() { Poll::Ready(()) } else { Poll::Pending }).await;
            match (args.quit_after.or(args.send_only.then_some(SEND_ONLY_GRACE)), &mut program_exit) {
                (Some(time), _) => {
                    sleep(time).await;
                    let mut queued = u32::MAX;
                    // A close drops the send queue if the target is still sending.
                    while let (None, now @ 1..) = (args.quit_after, socket.as_ref().map_or(0, send_queue)) {
                        if now >= replace(&mut queued, now) {
                            let error = format!("no data was accepted for {time:?}, so the last bytes may be lost");
                            return Err(RelayError::Undelivered(io::Error::other(error)));
                        }
                        sleep(time).await;
                    }
                    quit_timed_out.set(true);
                }
                // After the program has exited, nothing reads the answers.
                (None, Some(program_exit)) => exit_status = Some(program_exit.await),
                (None, None) => pending().await,
            }
            Ok(RelayOutcome::Finished)
        };
        let show = progress::show(args.progress && io::stderr().is_terminal(), &counts);
        relay(&mut stdio, &mut tunnel, &options, &counts, |_, _| true).or(quit).or(show).await
    };
    if outcome.is_ok() {
        // After -q or the exit of the program, the peer may still be sending: close without a reset.
        let _ = tunnel.set_reset_on_close(false);
    }
    let is_aborted = quit_timed_out.get() || matches!(outcome, Err(RelayError::IdleTimeout));
    let flushed = match is_aborted {
        // A stalled reader of stdout must not delay the exit.
        true => timeout_at(Instant::now() + FLUSH_TIMEOUT, stdio.flush()).await.unwrap_or(Ok(())),
        false => stdio.flush().await,
    };
    drop((stdio, tunnel));
    relay_result(connector, outcome, flushed)?;
    if let (None, Some(program_exit)) = (&exit_status, program_exit.filter(|_| !quit_timed_out.get())) {
        exit_status = match args.linger {
            // The program may go on although nothing reads its output any more.
            Some(linger) => timeout_at(Instant::now() + linger, program_exit).await,
            None => Some(program_exit.await),
        };
    }
    match exit_status {
        Some(Ok(ExitStatus::SUCCESS)) | None => Ok(()),
        Some(Ok(status)) => Err(CliError::new(status, "")),
        Some(Err(error)) => {
            Err(connector.transfer_error(ExitStatus::FAILURE, &format!("wait for the program: {error}")))
        }
    }
}

/// Maps the result of a relay to the result of the mode. `flushed` is the result of the last flush of stdout.
pub(super) fn relay_result(connector: &Connector, outcome: RelayResult, flushed: io::Result<()>) -> CliResult {
    let outcome = match (outcome, flushed) {
        (
            Ok(_) | Err(RelayError::DstGone | RelayError::IdleTimeout | RelayError::Io(RelayOp::WriteClient, _)),
            Err(error),
        ) => Err(RelayError::Io(RelayOp::WriteClient, error)),
        (outcome, _) => outcome,
    };
    let (status, error) = match outcome {
        // The clients never stop a relay from outside.
        Ok(_) | Err(RelayError::DstGone | RelayError::Stopped) => return Ok(()),
        Err(RelayError::IdleTimeout) => {
            let idle = connector.args.max_idle_time().unwrap_or_default();
            return Err(connector.transfer_error(ExitStatus::TIMED_OUT, &format!("idle for {idle:?}")));
        }
        Err(RelayError::Io(RelayOp::WriteClient, error)) => (ExitStatus::WRITE_STDOUT, error),
        Err(RelayError::Io(RelayOp::ReadClient, error)) => (ExitStatus::READ_STDIN, error),
        Err(RelayError::Io(RelayOp::WriteDst, error) | RelayError::Undelivered(error)) => {
            (ExitStatus::SEND_ERROR, error)
        }
        Err(RelayError::Io(RelayOp::ReadDst, error)) => (ExitStatus::RECEIVE_ERROR, error),
    };
    Err(connector.io_error(status, &error))
}

/// Sends the tunnel's socket over stdout, with one byte of data as required (SCM_RIGHTS, unix(7)).
fn pass_socket(tunnel: &Conn) -> io::Result<()> {
    if tunnel.protection().is_some() {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "a tunnel that GSSAPI protects cannot be passed"));
    }
    // O_NONBLOCK is shared with the receiver, which expects a blocking socket.
    rustix::io::ioctl_fionbio(tunnel, false)?;
    send_descriptors(io::stdout(), &[tunnel.as_fd().as_raw_fd()])
}
