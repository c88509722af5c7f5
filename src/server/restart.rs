//! SIGUSR2: a new process with the same command line takes over the listening sockets, and this one drains its sessions.
//!
//! The sandbox allows no program to be run, so a helper does this: a process that is started before the sandbox and the
//! switch to the user of `--run-as`. It runs that one command line and no other, and ends with the server. Code in the
//! server that an attacker controls can start it, with sockets as its listeners, and nothing else.

use std::env;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{self, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_lite::{AsyncRead, AsyncReadExt as _, FutureExt as _};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use smol::{Async, Timer};

use super::inherited::{SUCCESSOR, is_successor};
use super::listen::{KEEP_SOCKET_FILES, Listener};
use crate::net::{receive_descriptors, send_descriptors};

/// Argument with which s5 is the helper.
pub const RESTART_HELPER: &str = "restart-helper";
/// Time limit of a new process, from its start until it is ready to accept connections.
const START_TIMEOUT: Duration = Duration::from_secs(15);
/// Time limit of the helper to end a process, and of the old process to stop accepting.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum size of what the new process reports, in bytes.
const MAX_REPORT: u64 = 4096;
/// What the server tells the helper about a new process.
const KEEP: [u8; 1] = *b"k";
const KILL: [u8; 1] = *b"x";

/// The listeners for clients, and those for metrics.
pub(super) type PassedListeners = [Vec<Weak<Listener>>; 2];

/// Asks the helper for new processes.
pub(super) struct Restarter {
    program: PathBuf,
    helper: UnixStream,
}

impl Restarter {
    /// Starts the helper. Call it with signals blocked: the helper inherits that, and ends only with the server.
    pub(super) fn start(
        command_line: &[String],
        variable: Option<&(&str, String)>,
        has_watchdog: bool,
    ) -> io::Result<Self> {
        if std::process::id() == 1 {
            return Err(io::Error::other("process 1 cannot be replaced (restart the container instead)"));
        }
        let name = command_line.first().ok_or(io::ErrorKind::InvalidInput)?;
        let program = program(name)?;
        let (helper, stdin) = UnixStream::pair()?;
        let mut command = Command::new(&program);
        command.arg0(name).arg(RESTART_HELPER).stdin(OwnedFd::from(stdin));
        let for_this_process = [SUCCESSOR, "LISTEN_PID", "LISTEN_FDS", "WATCHDOG_PID"];
        let watchdog = (!has_watchdog).then_some("WATCHDOG_USEC");
        for variable in for_this_process.into_iter().chain(watchdog) {
            command.env_remove(variable);
        }
        command.envs(variable.map(|(name, value)| (name, value)));
        command.spawn()?;
        let mut words = vec![program.as_os_str().as_bytes()];
        words.extend(command_line.iter().map(String::as_bytes));
        let message = words.join(&0);
        let length = u32::try_from(message.len()).map_err(io::Error::other)?;
        (&helper).write_all(&length.to_ne_bytes())?;
        (&helper).write_all(&message)?;
        Ok(Self { program, helper })
    }

    /// Returns the process id of a new process when it is ready, and the connection to it: it accepts connections when
    /// that is closed.
    pub(super) async fn wait_ready(&self, started: io::Result<UnixStream>) -> Result<(u32, impl Sized), String> {
        let started = started.and_then(|control| Ok((Async::new(control)?, &self.helper)));
        let (control, mut helper) = started.map_err(|error| format!("restart helper: {error}"))?;
        let too_slow = async {
            Timer::after(START_TIMEOUT).await;
            format!("not ready within {START_TIMEOUT:?}")
        };
        let report = read_report(&control).or(too_slow).await;
        if let Some(pid) = report.strip_prefix("ready ").and_then(|pid| pid.trim().parse().ok()) {
            let _ = helper.write_all(&KEEP);
            return Ok((pid, control));
        }
        let _ = helper.write_all(&KILL);
        let helper = Async::new(helper).map_err(|error| error.to_string())?;
        let no_status = async {
            Timer::after(STOP_TIMEOUT).await;
            String::new()
        };
        let status = read_report(helper).or(no_status).await;
        let _ = self.helper.set_nonblocking(false);
        let reason = if report.is_empty() { status } else { format!("{report} ({status})") };
        Err(format!("{}: {reason}", self.program.display()))
    }

    /// Starts a new process, and passes the listeners to it. Returns a connection to it. Needs two descriptors.
    pub(super) fn start_successor(&self, listeners: &PassedListeners) -> io::Result<UnixStream> {
        let (control, stdin) = UnixStream::pair()?;
        for listeners in listeners {
            let listeners: Vec<Arc<Listener>> = listeners.iter().filter_map(Weak::upgrade).collect();
            let numbers: Vec<_> = listeners.iter().map(|listener| listener.as_fd().as_raw_fd()).collect();
            send_descriptors(&control, &numbers)?;
        }
        send_descriptors(&self.helper, &[stdin.as_raw_fd()])?;
        Ok(control)
    }
}

/// Reads a line, or the text until the end of the stream. Line ends are removed.
async fn read_report(mut stream: impl AsyncRead + Unpin) -> String {
    let (mut report, mut byte) = (Vec::new(), [0]);
    while report.len() < MAX_REPORT as usize && matches!(stream.read(&mut byte).await, Ok(1)) && byte != *b"\n" {
        report.extend(byte);
    }
    String::from_utf8_lossy(&report).into_owned()
}

/// Returns the path by which the program was started. After an upgrade, the new program is there. The path in
/// /proc/self/exe follows symbolic links, which may lead to another program then.
fn program(name: &str) -> io::Result<PathBuf> {
    let this = fs::metadata("/proc/self/exe");
    let this = this.map_err(|error| io::Error::other(format!("/proc/self/exe: {error} (mount /proc)")))?;
    let is_this =
        |path: &PathBuf| fs::metadata(path).is_ok_and(|found| (found.dev(), found.ino()) == (this.dev(), this.ino()));
    let dirs = env::var_os("PATH").unwrap_or_default();
    let in_path = env::split_paths(&dirs).filter(|_| !name.contains('/')).map(|dir| dir.join(name));
    let given = name.contains('/').then(|| PathBuf::from(name));
    let absolute = given.into_iter().chain(in_path).filter_map(|path| path::absolute(path).ok());
    absolute.into_iter().find(is_this).map_or_else(env::current_exe, Ok)
}

/// Waits until the old process, if there is one, accepts no more connections. This one must be able to.
pub(super) fn take_over() -> io::Result<()> {
    if is_successor() {
        let mut control = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
        control.set_read_timeout(Some(STOP_TIMEOUT * 2))?;
        writeln!(control, "ready {}", std::process::id())?;
        // From now on, the old process ends: an error here would end the service. If it is stuck, both accept.
        let _ = control.read_exact(&mut [0]);
        KEEP_SOCKET_FILES.store(false, Ordering::Relaxed);
    }
    Ok(())
}

/// Reports the error that ends this process to the old one, if there is one.
pub fn report_failed_start(error: &str) {
    if is_successor() {
        let _ = rustix::io::write(io::stdin(), error.as_bytes());
    }
}

/// Runs the helper until the server ends, or a new process has taken over.
pub fn run_restart_helper() -> io::Result<()> {
    // The command line and the environment can have passwords.
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let mut server = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut length = [0; 4];
    server.read_exact(&mut length)?;
    let mut message = Vec::new();
    (&server).take(u32::from_ne_bytes(length).into()).read_to_end(&mut message)?;
    let words: Vec<_> =
        message.split(|byte| *byte == 0).map(|word| std::ffi::OsString::from_vec(word.into())).collect();
    let [program, name, args @ ..] = words.as_slice() else { return Err(io::ErrorKind::InvalidInput.into()) };
    while let Some(stdin) = receive_descriptors(&server)?.pop() {
        let mut command = Command::new(program);
        let child = command.arg0(name).args(args).env(SUCCESSOR, "1").stdin(Stdio::from(stdin)).spawn();
        // Closes its stdin here.
        drop(command);
        let mut verdict = [0];
        if server.read(&mut verdict)? == 1 && verdict == KEEP {
            return Ok(());
        }
        let ended = child.and_then(|mut child| child.kill().and(child.wait()));
        writeln!(server, "{}", ended.map_or_else(|error| error.to_string(), |status| status.to_string()))?;
    }
    Ok(())
}
